//! Which lengths arrive: runs [`MtuSearch`] for direct paths that carry traffic.

use std::time::Duration;

use mesh_noise::key::NodePublic;

use super::relay::RELAYED_LIMIT;
use super::{Agent, Event, Timer};
use crate::path::candidate::Target;
use crate::path::mtu::{Found, MtuSearch};
use crate::path::{Family, Path};

/// IP and UDP headers.
const OVERHEAD_V4: usize = 28;
const OVERHEAD_V6: usize = 48;

impl Agent {
    /// The direct path has changed, or what is wanted of it.
    pub(super) fn length_of_another_path(&mut self, node: NodePublic) {
        let now = self.now;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.mtu = None;
        self.timers.clear(Timer::Mtu(node));
        if peer.best.is_some() && self.wanted.is_some() && peer.active(now, &self.timing) {
            self.timers.set(Timer::Mtu(node), now);
        }
        self.tell_limit(node);
    }

    /// Looks now whether the path still carries what it did, unless that is under way.
    pub(super) fn check_length(&mut self, node: NodePublic) {
        let idle = self.peers.get(&node).is_some_and(|peer| peer.mtu.is_none() && peer.best.is_some());
        if idle && self.wanted.is_some() {
            self.timers.set(Timer::Mtu(node), self.now);
        }
    }

    /// Begins a search, or its next round.
    pub(super) fn length_due(&mut self, node: NodePublic) {
        let (now, timing) = (self.now, self.timing);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let (Some(wanted), Some(best)) = (self.wanted, peer.best) else { return };
        let Some(candidate) = peer.candidates.get(&best) else { return };
        if peer.mtu.is_none() && !peer.active(now, &timing) {
            // The next traffic looks again.
            return;
        }
        let overhead = match Family::of(&best.remote) {
            Family::V4 => OVERHEAD_V4,
            Family::V6 => OVERHEAD_V6,
        };
        let patience = candidate.round_trip.map_or(Duration::ZERO, |round_trip| round_trip.patience());
        let search = peer.mtu.get_or_insert_with(|| MtuSearch::new(wanted, overhead, candidate.limit));
        match search.next_round() {
            Ok(lengths) => {
                self.timers.set(Timer::Mtu(node), now + patience.max(timing.mtu_round));
                for length in lengths {
                    self.send_length_probe(node, best, length);
                }
            }
            Err(found) => self.length_found(node, best, found),
        }
    }

    /// A padded ping along `target` was answered.
    pub(super) fn length_passes(&mut self, node: NodePublic, target: Target, length: usize) {
        let Some(peer) = self.peers.get_mut(&node).filter(|peer| peer.best == Some(target)) else { return };
        if peer.mtu.as_mut().is_some_and(|search| search.answered(length)) {
            self.length_found(node, target, Found::NoLimit);
        }
    }

    fn length_found(&mut self, node: NodePublic, target: Target, found: Found) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.mtu = None;
        let Some(candidate) = peer.candidates.get_mut(&target) else { return };
        match found {
            Found::NoLimit => candidate.limit = None,
            Found::Limit(limit) => candidate.limit = Some(limit),
            Found::Nothing => {}
        }
        let pause = if candidate.limit.is_none() { self.timing.mtu_confirm } else { self.timing.mtu_raise };
        self.timers.set(Timer::Mtu(node), self.now + pause);
        self.tell_limit(node);
    }

    /// Tells the caller if the path in use has another limit than it knows of.
    pub(super) fn tell_limit(&mut self, node: NodePublic) {
        let (mode, wanted) = (self.mode, self.wanted.filter(|wanted| *wanted > RELAYED_LIMIT));
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let limit = match peer.path(mode) {
            Some(Path::Direct { socket, remote }) => {
                peer.candidates.get(&Target { socket, remote }).and_then(|candidate| candidate.limit)
            }
            Some(Path::PeerRelay { .. }) => wanted.map(|_| RELAYED_LIMIT),
            Some(Path::Relay { .. }) | None => None,
        };
        if limit != peer.told_limit {
            peer.told_limit = limit;
            self.events.push_back(Event::LimitChanged { peer: node, limit });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SocketId;
    use crate::agent::{PeerConfig, Source, Timing};
    use mesh_noise::key::{DiscoPrivate, DiscoPublic};
    use std::net::SocketAddr;
    use std::time::Instant;

    const WANTED: usize = 1312;

    /// Two agents on one link that loses what is longer than `passes`.
    struct Pair {
        now: Instant,
        agents: [(Agent, NodePublic, SocketAddr); 2],
        passes: usize,
        /// Padded pings sent by the first.
        probes: usize,
        limit: Option<usize>,
    }

    impl Pair {
        fn new(passes: usize) -> Self {
            #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
            let now = Instant::now();
            let agents = [1_u8, 2].map(|n| {
                let (disco, node) = (DiscoPrivate::from_bytes([n; 32]), NodePublic::from_bytes([n; 32]));
                let mut agent = Agent::new(now, disco, node, [n; 32]);
                agent.set_sockets(vec![(SocketId(0), Family::V4)]);
                agent.set_wanted_length(now, Some(WANTED));
                (agent, node, SocketAddr::from(([192, 0, 2, n], 41641)))
            });
            let mut pair = Self { now, agents, passes, probes: 0, limit: None };
            for (me, other) in [(0, 1), (1, 0)] {
                let (agent, node, address) = &pair.agents[other];
                let disco: DiscoPublic = agent.disco_public();
                let config = PeerConfig { node: *node, disco, endpoints: vec![*address], ..PeerConfig::default() };
                pair.agents[me].0.set_peer(now, config);
            }
            pair
        }

        /// Lets `span` pass with traffic from the first to the second.
        fn run(&mut self, span: Duration) {
            let end = self.now + span;
            while self.now < end {
                let second = self.agents[1].1;
                self.agents[0].0.traffic(self.now, &second);
                for (me, other) in [(0, 1), (1, 0)] {
                    self.agents[me].0.handle_timeout(self.now);
                    while let Some(transmit) = self.agents[me].0.poll_transmit() {
                        self.probes += usize::from(me == 0 && transmit.datagram.len() > 500);
                        let Path::Direct { remote, .. } = transmit.path else { continue };
                        let (from, to) = (self.agents[me].2, self.agents[other].2);
                        if transmit.datagram.len() <= self.passes && remote == to {
                            let source = Source::direct(SocketId(0), from);
                            let _ = self.agents[other].0.handle_datagram(self.now, source, &transmit.datagram);
                        }
                    }
                    while let Some(event) = self.agents[me].0.poll_event() {
                        if let (0, Event::LimitChanged { limit, .. }) = (me, event) {
                            self.limit = limit;
                        }
                    }
                }
                self.now += Duration::from_millis(10);
            }
        }
    }

    #[test]
    fn a_wide_path_is_looked_at_once_in_a_while() {
        let mut pair = Pair::new(9000);
        pair.run(Duration::from_secs(60));
        assert_eq!(pair.limit, None);
        assert!((4..=6).contains(&pair.probes), "{} probes", pair.probes);
    }

    #[test]
    fn a_narrow_path_is_found_within_a_second() {
        let mut pair = Pair::new(1172);
        pair.run(Duration::from_secs(1));
        assert_eq!(pair.limit, Some(1172));
    }

    #[test]
    fn a_path_that_becomes_narrow_and_wide_again_is_followed() {
        let mut pair = Pair::new(9000);
        pair.run(Duration::from_secs(2));
        pair.passes = 1292;
        pair.run(Timing::default().mtu_confirm + Duration::from_secs(1));
        assert_eq!(pair.limit, Some(1292));
        pair.passes = 9000;
        pair.run(Timing::default().mtu_raise + Duration::from_secs(1));
        assert_eq!(pair.limit, None);
    }

    #[test]
    fn silence_after_sending_asks_at_once() {
        let mut pair = Pair::new(9000);
        pair.run(Duration::from_secs(2));
        pair.passes = 1252;
        let second = pair.agents[1].1;
        pair.agents[0].0.suspect(pair.now, &second);
        pair.run(Duration::from_secs(1));
        assert_eq!(pair.limit, Some(1252));
    }

    #[test]
    fn a_path_that_died_keeps_no_limit() {
        let mut pair = Pair::new(1172);
        pair.run(Duration::from_secs(2));
        assert_eq!(pair.limit, Some(1172));
        pair.passes = 0;
        pair.run(Duration::from_secs(10));
        assert_eq!(pair.limit, None);
    }

    #[test]
    fn nothing_is_probed_unless_a_length_is_wanted() {
        let mut pair = Pair::new(1172);
        let now = pair.now;
        pair.agents[0].0.set_wanted_length(now, None);
        pair.run(Duration::from_secs(20));
        assert_eq!((pair.probes, pair.limit), (0, None));
    }
}
