//! Room for what one call receives.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;

use socket2::Socket;

use super::{GATHERED, MAX_SEGMENTS};
use crate::batch::Batch;
use crate::linux::sys;

/// About as many bytes are received in one call: what is worked on at once stays in the cache, and what came first goes
/// on before the last is looked at.
const RECEIVED_AT_ONCE: usize = 128 << 10;
const MIN_OFFERED: usize = 2;

/// So many times the last call's datagrams fit into the next: preparing room for dozens takes time that one alone waits.
const GROWTH: usize = 4;

/// Datagrams received in one call, and whence each came.
#[derive(Debug)]
pub struct RecvBatch {
    batch: Batch,
    sources: Vec<SocketAddr>,
    datagram_size: usize,
    truncated: u64,
    /// How many buffers the next call gets: fewer while the kernel joins much.
    offered: usize,
}

impl RecvBatch {
    /// Room for `capacity` datagrams of up to `datagram_size` bytes.
    #[must_use]
    pub fn new(capacity: usize, datagram_size: usize) -> Self {
        Self::with(Batch::new(capacity, datagram_size), datagram_size)
    }

    pub(super) fn with(batch: Batch, datagram_size: usize) -> Self {
        let sources = Vec::with_capacity(batch.capacity() * MAX_SEGMENTS);
        Self { batch, sources, datagram_size, truncated: 0, offered: MIN_OFFERED }
    }

    /// The datagrams, to be opened in place.
    #[must_use]
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// The datagrams, to be opened in place.
    pub fn batch_mut(&mut self) -> &mut Batch {
        &mut self.batch
    }

    /// How many datagrams are in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.batch.len()
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Who sent the datagram at `index`.
    ///
    /// # Panics
    /// If `index` is not below [`RecvBatch::len`].
    #[must_use]
    pub fn source(&self, index: usize) -> SocketAddr {
        self.sources[index]
    }

    /// How many datagrams were dropped so far because they were longer than their slot.
    #[must_use]
    pub fn truncated(&self) -> u64 {
        self.truncated
    }

    pub(super) fn clear(&mut self) {
        self.batch.clear();
        self.sources.clear();
    }

    /// One call; returns the number of datagrams.
    pub(super) fn fill(&mut self, socket: &Socket) -> io::Result<usize> {
        let mut messages = [None; sys::MAX_MESSAGES];
        let mut filled = messages.iter_mut();
        let count = sys::recvmmsg(socket.as_fd(), self.batch.vacancies().take(self.offered), |received| {
            if let Some(slot) = filled.next() {
                *slot = Some(received);
            }
        })?;
        let before = self.batch.len();
        let bytes: usize = messages.iter().flatten().map(|received| received.len).sum();
        let room = (RECEIVED_AT_ONCE * count / bytes.max(1)).min(GROWTH * count);
        self.offered = room.clamp(MIN_OFFERED, GATHERED);
        for received in messages.into_iter().take(count).flatten() {
            let segment = received.segment.unwrap_or(received.len).min(received.len);
            let whole = !received.truncated && segment <= self.datagram_size;
            match received.from.filter(|_| whole) {
                Some(from) if segment > 0 => {
                    self.batch.commit_many(received.len, segment);
                    self.sources.resize(self.batch.len(), from);
                }
                from => {
                    // An empty datagram says nothing either.
                    self.batch.commit(0);
                    self.sources.push(from.unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)));
                    self.truncated += u64::from(from.is_none());
                }
            }
        }
        Ok(self.batch.len() - before)
    }
}
