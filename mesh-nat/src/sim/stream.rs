//! Data between nodes: sent at a steady rate along whichever path the agent says, twice while that is in doubt, and
//! counted where it arrives. What the agents learn of it is what a node's data plane would note and its engine tell them.

use std::time::{Duration, Instant};

use super::host::HostId;
use super::packet::Happening;
use super::world::World;
use crate::agent::Source;
use crate::path::{Family, Path};
use crate::relay::geneve::{Content, encapsulate};

/// Names one stream of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub(super) usize);

/// What a datagram of a stream begins with: it looks like WireGuard's transport data (whitepaper §5.4.6).
const MAGIC: [u8; 4] = [4, 0, 0, 0];
/// How often agents hear of data that nothing has answered.
const LOOK: Duration = Duration::from_millis(200);
/// How long every datagram of a stream is.
const LENGTH: usize = 128;

/// Data from one node to another.
#[derive(Debug)]
pub struct Stream {
    from: HostId,
    to: HostId,
    every: Duration,
    running: bool,
    answers: Option<StreamId>,
    /// When each datagram was sent and when it first arrived.
    datagrams: Vec<(Instant, Option<Instant>)>,
    direct: u64,
    relayed: u64,
    /// When the sender's agent was last told that nothing had been heard.
    looked: Option<Instant>,
}

impl Stream {
    /// Datagrams sent, copies not counted.
    #[must_use]
    pub const fn sent(&self) -> usize {
        self.datagrams.len()
    }

    /// Datagrams that arrived, each counted once.
    #[must_use]
    pub fn arrived(&self) -> usize {
        self.datagrams.iter().filter(|(_, arrived)| arrived.is_some()).count()
    }

    /// Copies that arrived directly.
    #[must_use]
    pub const fn direct(&self) -> u64 {
        self.direct
    }

    /// Copies that arrived through a relay.
    #[must_use]
    pub const fn relayed(&self) -> u64 {
        self.relayed
    }

    /// The stream of answers to this one, if there is one.
    #[must_use]
    pub const fn answers(&self) -> Option<StreamId> {
        self.answers
    }

    /// For how long data sent since `from` was lost, at the longest: from the first datagram that never arrived to the
    /// next one that did. Those sent within `settle` before `now` do not count, as they may still be on their way.
    #[must_use]
    pub fn outage(&self, from: Instant, now: Instant, settle: Duration) -> Duration {
        let mut longest = Duration::ZERO;
        let mut since: Option<Instant> = None;
        for (sent, arrived) in self.datagrams.iter().filter(|(sent, _)| *sent >= from && *sent + settle <= now) {
            if arrived.is_some() {
                since = None;
            } else {
                let since = *since.get_or_insert(*sent);
                longest = longest.max(sent.saturating_duration_since(since) + self.every);
            }
        }
        longest
    }

    /// The longest time since `from` during which nothing new arrived.
    #[must_use]
    pub fn longest_gap(&self, from: Instant, now: Instant) -> Duration {
        let mut arrivals: Vec<_> = self.datagrams.iter().filter_map(|(_, at)| *at).filter(|at| *at >= from).collect();
        arrivals.sort_unstable();
        let ends = std::iter::once(from).chain(arrivals.iter().copied()).zip(arrivals.iter().copied().chain([now]));
        ends.map(|(one, next)| next.saturating_duration_since(one)).max().unwrap_or_default()
    }
}

impl World {
    /// From now on there is data from one node to another at a steady rate.
    pub fn send_data(&mut self, from: HostId, to: HostId, every: Duration) -> StreamId {
        let id = self.add_stream(from, to, every, None);
        self.stream_due(id);
        id
    }

    /// The same, and each datagram that arrives is answered by another one.
    pub fn converse(&mut self, from: HostId, to: HostId, every: Duration) -> StreamId {
        let answers = self.add_stream(to, from, every, None);
        let id = self.add_stream(from, to, every, Some(answers));
        self.stream_due(id);
        id
    }

    fn add_stream(&mut self, from: HostId, to: HostId, every: Duration, answers: Option<StreamId>) -> StreamId {
        let id = StreamId(self.streams.len());
        let datagrams = Vec::new();
        let stream = Stream { from, to, every, running: true, answers, datagrams, direct: 0, relayed: 0, looked: None };
        self.streams.push(stream);
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
        let stream = &self.streams[id.0];
        if stream.running {
            self.schedule(self.now + stream.every, Happening::Data(id));
            self.send_one(id);
        }
    }

    fn send_one(&mut self, id: StreamId) {
        let stream = &mut self.streams[id.0];
        let (from, to, number) = (stream.from, stream.to, stream.datagrams.len());
        if self.hosts[from.0].asleep {
            return;
        }
        stream.datagrams.push((self.now, None));
        let peer = self.key(to);
        self.with(from, |agent, now| agent.traffic(now, &peer));
        self.look(id, from, to);
        let mut datagram = MAGIC.to_vec();
        datagram.extend((id.0 as u64).to_le_bytes());
        datagram.extend((number as u64).to_le_bytes());
        datagram.resize(LENGTH, 0);
        let backup = self.agent(from).status(&peer).and_then(|status| status.backup);
        if backup.is_some() {
            self.send_along(from, to, backup, datagram.clone());
        }
        let path = self.path(from, to);
        self.send_along(from, to, path, datagram);
    }

    /// Tells the sender's agent, a few times a second, since when nothing was heard.
    fn look(&mut self, id: StreamId, from: HostId, to: HostId) {
        let (now, peer) = (self.now, self.key(to));
        let since = *self.node_mut(from).unanswered.entry(to).or_insert(now);
        let stream = &mut self.streams[id.0];
        if stream.looked.is_none_or(|at| now.saturating_duration_since(at) >= LOOK) {
            stream.looked = Some(now);
            self.with(from, |agent, now| agent.unanswered(now, &peer, since));
        }
    }

    fn send_along(&mut self, from: HostId, to: HostId, path: Option<Path>, datagram: Vec<u8>) {
        match path {
            Some(Path::Direct { socket, remote }) => self.emit(from, socket, remote, datagram),
            Some(Path::Relay { region }) => self.send_frame(from, region, self.key(to), datagram),
            Some(Path::PeerRelay { server, vni }) => {
                let socket = self.node(from).sockets.iter().find(|(_, family)| *family == Family::of(&server));
                if let Some((socket, _)) = socket.copied() {
                    self.emit(from, socket, server, encapsulate(vni, Content::WireGuard, &datagram));
                }
            }
            None => {}
        }
    }

    /// Data may have arrived. Returns whether it was some stream's.
    pub(super) fn stream_arrives(&mut self, host: HostId, source: Source, datagram: &[u8]) -> bool {
        let Some(rest) = datagram.strip_prefix(&MAGIC) else { return false };
        let Some((id, rest)) = rest.split_first_chunk() else { return false };
        let Some((number, _)) = rest.split_first_chunk() else { return false };
        let index = |bytes: &[u8; 8]| usize::try_from(u64::from_le_bytes(*bytes)).unwrap_or(usize::MAX);
        let Some(stream) = self.streams.get_mut(index(id)).filter(|stream| stream.to == host) else { return false };
        let Some((_, arrived)) = stream.datagrams.get_mut(index(number)) else { return false };
        if source.path.is_relay() {
            stream.relayed += 1;
        } else {
            stream.direct += 1;
        }
        if arrived.is_some() {
            // The replay window would drop it.
            return true;
        }
        *arrived = Some(self.now);
        let (from, answers) = (stream.from, stream.answers);
        self.node_mut(host).unanswered.remove(&from);
        if source.path.is_relay() && self.is_direct(host, from) {
            let peer = self.key(from);
            self.with(host, |agent, now| agent.suspect(now, &peer));
        }
        if let Some(answers) = answers {
            self.send_one(answers);
        }
        true
    }
}
