//! Where packets for a region go in.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mesh_noise::key::NodePublic;
use tokio::sync::Notify;

use crate::driver::now;
use crate::frame::MAX_PACKET_LEN;
use crate::queue::{Depth, Displaced, PacketQueue};

/// What an outbox has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct OutboxCounters {
    /// Packets handed to a connection.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Packets that made room for newer ones.
    pub displaced: Displaced,
    /// Packets longer than a relay passes on.
    pub too_long: u64,
}

#[derive(Debug)]
pub(super) struct Shared {
    queue: Mutex<PacketQueue>,
    pub(super) ready: Notify,
    pub(super) sent: AtomicU64,
    pub(super) sent_bytes: AtomicU64,
    too_long: AtomicU64,
}

impl Shared {
    pub(super) fn queue(&self) -> MutexGuard<'_, PacketQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where packets for a region go in. Cheap to clone; usable from any thread; never blocks.
///
/// Disco overtakes data. When the queue is full, the oldest packet makes room and is counted; so are packets that are
/// dropped because all wait too long (see [`queue`](crate::queue)).
#[derive(Debug, Clone)]
pub struct Outbox(pub(super) Arc<Shared>);

impl Outbox {
    pub(super) fn new(depth: Depth) -> Self {
        Self(Arc::new(Shared {
            queue: Mutex::new(PacketQueue::new(depth)),
            ready: Notify::new(),
            sent: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            too_long: AtomicU64::new(0),
        }))
    }

    /// Queues a packet for `destination`; `false` if it is longer than a relay passes on.
    pub fn try_send(&self, destination: NodePublic, payload: Bytes) -> bool {
        self.try_send_all([(destination, payload)]) == 1
    }

    /// Queues packets and says how many were taken.
    pub fn try_send_all(&self, packets: impl IntoIterator<Item = (NodePublic, Bytes)>) -> usize {
        let mut taken = 0;
        {
            let mut queue = self.0.queue();
            let at = now();
            for (destination, payload) in packets {
                if payload.len() > MAX_PACKET_LEN {
                    self.0.too_long.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                queue.push(at, destination, payload);
                taken += 1;
            }
        }
        if taken > 0 {
            self.0.ready.notify_one();
        }
        taken
    }

    /// What has been counted.
    #[must_use]
    pub fn counters(&self) -> OutboxCounters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        OutboxCounters {
            sent: load(&self.0.sent),
            sent_bytes: load(&self.0.sent_bytes),
            displaced: self.0.queue().displaced(),
            too_long: load(&self.0.too_long),
        }
    }
}
