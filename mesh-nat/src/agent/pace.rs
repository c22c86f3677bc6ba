//! Pace: when many peers are to be searched for at once, those with the latest traffic go first and the others wait.
//!
//! A node that starts, wakes or changes its network has all its peers to find. A few dozen are looked for at once; for
//! the rest there is one search every two milliseconds, which is 500 peers and some 2,500 datagrams a second.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;

use super::{Agent, Timer, search::Urgency};
use crate::path::probe::{Budget, Rate};

/// Between two looks at who waits.
const TICK: Duration = Duration::from_millis(16);

/// Searches that wait for their turn.
#[derive(Debug)]
pub(super) struct Pace {
    budget: Budget,
    waiting: VecDeque<NodePublic>,
    /// The same again, to find out quickly who waits already.
    known: BTreeSet<NodePublic>,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { budget: Budget::full_of(now, Rate::SEARCHES), waiting: VecDeque::new(), known: BTreeSet::new() }
    }

    /// Whether a search may be made now. Those that wait go first.
    fn admits(&mut self, now: Instant) -> bool {
        self.waiting.is_empty() && self.budget.take_of(now, Rate::SEARCHES)
    }

    fn wait(&mut self, node: NodePublic) {
        if self.known.insert(node) {
            self.waiting.push_back(node);
        }
    }

    fn next(&mut self, now: Instant) -> Option<NodePublic> {
        if self.waiting.is_empty() || !self.budget.take_of(now, Rate::SEARCHES) {
            return None;
        }
        let node = self.waiting.pop_front()?;
        self.known.remove(&node);
        Some(node)
    }

    /// Nobody waits any more: everything is about to be ordered anew.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.known.clear();
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }
}

impl Agent {
    /// Whether `node` may be searched for now. If not, it is when its turn comes.
    pub(super) fn admit_search(&mut self, node: NodePublic) -> bool {
        let admitted = self.pace.admits(self.now);
        if !admitted {
            self.pace.wait(node);
            self.timers.set_if_absent(Timer::Pace, self.now + TICK);
        }
        admitted
    }

    /// Makes the searches whose turn has come.
    pub(super) fn pace_due(&mut self) {
        while let Some(node) = self.pace.next(self.now) {
            // Whoever had to wait did so for an event, or for the first time.
            self.search_now(node, Urgency::Event);
        }
        if !self.pace.is_idle() {
            self.timers.set(Timer::Pace, self.now + TICK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::PeerConfig;
    use crate::path::{Family, Path, SocketId};
    use mesh_noise::key::DiscoPrivate;

    const PEERS: u16 = 1000;

    fn peer(number: u16) -> PeerConfig {
        let mut key = [1; 32];
        key[..2].copy_from_slice(&number.to_be_bytes());
        let [high, low] = number.to_be_bytes();
        let endpoints = vec![([198, 51, high, low], 41641).into()];
        let disco = DiscoPrivate::from_bytes(key).public();
        PeerConfig { node: NodePublic::from_bytes(key), disco, endpoints, ..PeerConfig::default() }
    }

    /// Pings sent by now.
    fn pinged(agent: &mut Agent) -> Vec<NodePublic> {
        let direct = |transmit: &crate::agent::Transmit| matches!(transmit.path, Path::Direct { .. });
        std::iter::from_fn(|| agent.poll_transmit()).filter(direct).map(|transmit| transmit.peer).collect()
    }

    #[test]
    fn a_thousand_peers_are_searched_for_in_turn_the_latest_traffic_first() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let mut now = Instant::now();
        let mut agent = Agent::new(now, DiscoPrivate::from_bytes([9; 32]), NodePublic::from_bytes([9; 32]), [9; 32]);
        agent.set_sockets(vec![(SocketId(0), Family::V4)]);
        for number in 0..PEERS {
            agent.set_peer(now, peer(number));
        }
        for number in 0..PEERS {
            agent.traffic(now, &peer(number).node);
            now += Duration::from_millis(10);
            agent.handle_timeout(now);
        }
        while agent.poll_transmit().is_some() {}

        // The network changes.
        agent.rebind(now);
        let mut order = pinged(&mut agent);
        assert!(order.len() <= 64, "{} in one burst", order.len());
        for _ in 0..200 {
            now += Duration::from_millis(16);
            agent.handle_timeout(now);
            let next = pinged(&mut agent);
            // Those of the burst are repeated, 250 and 750 ms later.
            assert!(next.len() <= 64 + 3 * 9, "{}", next.len());
            order.extend(next);
        }
        let mut seen = BTreeSet::new();
        let first: Vec<_> = order.into_iter().filter(|node| seen.insert(*node)).collect();
        assert_eq!(first.len(), usize::from(PEERS), "everybody within three seconds");
        let expected: Vec<_> = (0..PEERS).rev().map(|number| peer(number).node).collect();
        assert!(first == expected, "the latest traffic first");
    }
}
