//! Data between nodes: sent at a steady rate along whichever path the agent says, and counted where it arrives.

use std::time::{Duration, Instant};

use super::host::HostId;
use super::packet::Happening;
use super::world::World;
use crate::path::Path;

/// Names one stream of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub(super) usize);

/// What a datagram of a stream begins with: it looks like WireGuard's transport data (whitepaper §5.4.6).
const MAGIC: [u8; 4] = [4, 0, 0, 0];

/// Data from one node to another.
#[derive(Debug)]
pub struct Stream {
    from: HostId,
    to: HostId,
    every: Duration,
    running: bool,
    /// When each datagram was sent and when it first arrived.
    datagrams: Vec<(Instant, Option<Instant>)>,
    /// Arrivals of what had arrived already.
    duplicates: u64,
}

impl Stream {
    /// Datagrams sent.
    #[must_use]
    pub const fn sent(&self) -> usize {
        self.datagrams.len()
    }

    /// Datagrams that arrived, each counted once.
    #[must_use]
    pub fn arrived(&self) -> usize {
        self.datagrams.iter().filter(|(_, arrived)| arrived.is_some()).count()
    }

    /// Arrivals of datagrams that had arrived before.
    #[must_use]
    pub const fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// The longest time during which whatever was sent since `from` never arrived: from the first datagram lost to the
    /// next one that was not. Datagrams sent within `settle` before `now` may still be on their way.
    #[must_use]
    pub fn outage(&self, from: Instant, now: Instant, settle: Duration) -> Duration {
        let mut longest = Duration::ZERO;
        let mut since: Option<Instant> = None;
        for (sent, arrived) in self.datagrams.iter().filter(|(sent, _)| *sent >= from && *sent + settle <= now) {
            if arrived.is_some() {
                if let Some(since) = since.take() {
                    longest = longest.max(sent.saturating_duration_since(since));
                }
            } else {
                let since = *since.get_or_insert(*sent);
                longest = longest.max(sent.saturating_duration_since(since) + self.every);
            }
        }
        longest
    }
}

impl World {
    /// From now on there is data from one node to another at a steady rate.
    pub fn send_data(&mut self, from: HostId, to: HostId, every: Duration) -> StreamId {
        let id = StreamId(self.streams.len());
        self.streams.push(Stream { from, to, every, running: true, datagrams: Vec::new(), duplicates: 0 });
        self.stream_due(id);
        id
    }

    /// Ends a stream.
    pub fn stop_data(&mut self, id: StreamId) {
        self.streams[id.0].running = false;
    }

    /// Ends all streams.
    pub fn stop_all_data(&mut self) {
        self.streams.iter_mut().for_each(|stream| stream.running = false);
    }

    /// What became of a stream's data.
    #[must_use]
    pub fn stream(&self, id: StreamId) -> &Stream {
        &self.streams[id.0]
    }

    pub(super) fn stream_due(&mut self, id: StreamId) {
        let stream = &mut self.streams[id.0];
        if !stream.running {
            return;
        }
        let (from, to, every, number) = (stream.from, stream.to, stream.every, stream.datagrams.len());
        self.schedule(self.now + every, Happening::Data(id));
        if self.hosts[from.0].asleep {
            return;
        }
        self.streams[id.0].datagrams.push((self.now, None));
        let peer = self.key(to);
        self.with(from, |agent, now| agent.traffic(now, &peer));
        let mut datagram = MAGIC.to_vec();
        datagram.extend((id.0 as u64).to_le_bytes());
        datagram.extend((number as u64).to_le_bytes());
        datagram.resize(128, 0);
        match self.path(from, to) {
            Some(Path::Direct { socket, remote }) => self.emit(from, socket, remote, datagram),
            Some(Path::Relay { region }) => self.send_frame(from, region, peer, datagram),
            Some(Path::PeerRelay { .. }) | None => {}
        }
    }

    /// Data may have arrived. Returns whether it was some stream's.
    pub(super) fn stream_arrives(&mut self, host: HostId, datagram: &[u8]) -> bool {
        let Some(rest) = datagram.strip_prefix(&MAGIC) else { return false };
        let Some((id, rest)) = rest.split_first_chunk() else { return false };
        let Some((number, _)) = rest.split_first_chunk() else { return false };
        let index = |bytes: &[u8; 8]| usize::try_from(u64::from_le_bytes(*bytes)).unwrap_or(usize::MAX);
        let Some(stream) = self.streams.get_mut(index(id)).filter(|stream| stream.to == host) else { return false };
        let Some((_, arrived)) = stream.datagrams.get_mut(index(number)) else { return false };
        if arrived.is_some() {
            stream.duplicates += 1;
        } else {
            *arrived = Some(self.now);
        }
        true
    }
}
