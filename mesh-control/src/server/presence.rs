//! Who is online: a node with a map poll, and for ten seconds after its last one ended.
//!
//! The grace keeps a reconnect, or a poll that replaces another, from flapping at every peer (control.md §5.4).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::record::NodeId;

/// How long after its last map poll a node still counts as online, unless told otherwise.
pub const GRACE: Duration = Duration::from_secs(10);

/// Names one map poll of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PollId(u64);

/// What a poll's end or start means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// The new poll.
    pub poll: PollId,
    /// Whether the node was offline before.
    pub came_online: bool,
}

#[derive(Debug)]
enum Status {
    /// Its newest poll.
    Polling(PollId),
    /// Its newest poll has ended; at this moment it goes offline.
    Leaving(Instant),
}

/// The presence of a tailnet's nodes. A core without I/O.
#[derive(Debug)]
pub struct Presence {
    grace: Duration,
    last: u64,
    online: BTreeMap<NodeId, Status>,
    offline_since: BTreeMap<NodeId, Instant>,
}

impl Default for Presence {
    /// With a grace of [`GRACE`].
    fn default() -> Self {
        Self::new(GRACE)
    }
}

impl Presence {
    /// Nobody is online yet.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self { grace, last: 0, online: BTreeMap::new(), offline_since: BTreeMap::new() }
    }

    /// Whether a node counts as online.
    #[must_use]
    pub fn is_online(&self, node: NodeId) -> bool {
        self.online.contains_key(&node)
    }

    /// Since when a node has been offline, if it has been online since this presence began.
    #[must_use]
    pub fn offline_since(&self, node: NodeId) -> Option<Instant> {
        self.offline_since.get(&node).copied()
    }

    /// A node begins a map poll, which replaces any other that it has.
    pub fn open(&mut self, node: NodeId) -> Opened {
        self.last += 1;
        let poll = PollId(self.last);
        self.offline_since.remove(&node);
        let came_online = self.online.insert(node, Status::Polling(poll)).is_none();
        Opened { poll, came_online }
    }

    /// Whether this is still the newest poll of its node. One that is not should end.
    #[must_use]
    pub fn is_current(&self, node: NodeId, poll: PollId) -> bool {
        matches!(self.online.get(&node), Some(Status::Polling(current)) if *current == poll)
    }

    /// A poll has ended. If no newer one replaced it, the node goes offline unless it returns in time.
    pub fn close(&mut self, now: Instant, node: NodeId, poll: PollId) {
        if self.is_current(node, poll) {
            self.online.insert(node, Status::Leaving(now + self.grace));
        }
    }

    /// A node is no more.
    pub fn forget(&mut self, node: NodeId) {
        self.online.remove(&node);
        self.offline_since.remove(&node);
    }

    /// Takes offline whoever's grace is over, and says who.
    pub fn handle_timeout(&mut self, now: Instant) -> Vec<NodeId> {
        let due = |status: &Status| matches!(status, Status::Leaving(at) if *at <= now);
        let gone: Vec<NodeId> = self.online.iter().filter(|(_, status)| due(status)).map(|(node, _)| *node).collect();
        for node in &gone {
            self.online.remove(node);
            self.offline_since.insert(*node, now);
        }
        gone
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let leaving = |status: &Status| match status {
            Status::Leaving(at) => Some(*at),
            Status::Polling(_) => None,
        };
        self.online.values().filter_map(leaving).min()
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a starting point for virtual time")]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(1);

    #[test]
    fn a_reconnect_within_the_grace_is_not_noticed() {
        let now = Instant::now();
        let mut presence = Presence::default();
        let first = presence.open(NODE);
        assert!(first.came_online);
        presence.close(now, NODE, first.poll);
        assert!(presence.is_online(NODE));
        assert!(presence.handle_timeout(now + Duration::from_secs(9)).is_empty());
        assert!(!presence.open(NODE).came_online);
        assert_eq!(presence.poll_timeout(), None);
    }

    #[test]
    fn a_node_that_stays_away_goes_offline_once() {
        let now = Instant::now();
        let mut presence = Presence::default();
        let poll = presence.open(NODE).poll;
        presence.close(now, NODE, poll);
        assert_eq!(presence.poll_timeout(), Some(now + GRACE));
        assert_eq!(presence.handle_timeout(now + GRACE), vec![NODE]);
        assert_eq!(presence.poll_timeout(), None);
        assert_eq!(presence.offline_since(NODE), Some(now + GRACE));
        assert!(presence.handle_timeout(now + GRACE * 2).is_empty());
    }

    #[test]
    fn the_end_of_a_replaced_poll_means_nothing() {
        let now = Instant::now();
        let mut presence = Presence::default();
        let old = presence.open(NODE).poll;
        let new = presence.open(NODE).poll;
        assert!(!presence.is_current(NODE, old) && presence.is_current(NODE, new));
        presence.close(now, NODE, old);
        assert!(presence.handle_timeout(now + GRACE * 9).is_empty());
        assert!(presence.is_online(NODE));
    }
}
