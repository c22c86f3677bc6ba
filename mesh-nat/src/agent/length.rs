//! Which lengths arrive: runs [`MtuSearch`] for paths that carry traffic, direct ones and those through peer relays.
//!
//! What is pinged with is a datagram of the wanted length at the place where data would go: through a peer relay it has
//! the relay's header in front, and has to pass on both sides of the relay. A direct path is thought to carry what is
//! wanted until that is refuted; a relayed one, of which nobody knows the other side, only what a tunnel of 1,280 needs.

use std::time::Duration;

use mesh_noise::key::NodePublic;

use super::peer::within;
use super::{Agent, Event, Timer};
use crate::classify::GENEVE_LEN;
use crate::path::candidate::Target;
use crate::path::mtu::{Found, MtuSearch};
use crate::path::{Family, Path};

/// IP and UDP headers.
const OVERHEAD_V4: usize = 28;
const OVERHEAD_V6: usize = 48;

/// What stands in front of WireGuard's datagrams along a path.
fn overhead(path: &Path) -> usize {
    let (remote, header) = match path {
        Path::Direct { remote, .. } => (remote, 0),
        Path::PeerRelay { server, .. } => (server, GENEVE_LEN),
        // Regions are not asked: TCP carries any length.
        Path::Relay { .. } => return 0,
    };
    let ip = match Family::of(remote) {
        Family::V4 => OVERHEAD_V4,
        Family::V6 => OVERHEAD_V6,
    };
    ip + header
}

impl Agent {
    /// The path in use has changed, or what is wanted of it.
    pub(super) fn length_of_another_path(&mut self, node: NodePublic) {
        let (now, mode) = (self.now, self.mode);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.mtu = None;
        self.timers.clear(Timer::Mtu(node));
        if peer.udp_path(mode).is_some() && self.wanted.is_some() && peer.active(now, &self.timing) {
            self.timers.set(Timer::Mtu(node), now);
        }
        self.tell_limit(node);
    }

    /// The way through a peer relay has changed, which matters where there is no direct one.
    pub(super) fn length_through_relay(&mut self, node: NodePublic) {
        if self.peers.get(&node).is_some_and(|peer| peer.best.is_none()) {
            self.length_of_another_path(node);
        }
    }

    /// Looks now whether the path still carries what it did, unless that is under way.
    pub(super) fn check_length(&mut self, node: NodePublic) {
        let mode = self.mode;
        let idle = self.peers.get(&node).is_some_and(|peer| peer.mtu.is_none() && peer.udp_path(mode).is_some());
        if idle && self.wanted.is_some() {
            self.timers.set(Timer::Mtu(node), self.now);
        }
    }

    /// Begins a search, or its next round.
    pub(super) fn length_due(&mut self, node: NodePublic) {
        let (now, timing, mode) = (self.now, self.timing, self.mode);
        let patience = self.patience_of_relay(&node);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let (Some(wanted), Some(path)) = (self.wanted, peer.udp_path(mode)) else { return };
        if peer.mtu.is_none() && !within(peer.sent, now, timing.mtu_confirm) {
            // The next traffic looks again. Until then the path may be silent.
            return;
        }
        let (known, patience) = match path {
            Path::Direct { socket, remote } => {
                let Some(candidate) = peer.candidates.get(&Target { socket, remote }) else { return };
                (candidate.limit, candidate.round_trip.map_or(Duration::ZERO, |round_trip| round_trip.patience()))
            }
            Path::PeerRelay { .. } => (peer.relayed.and_then(|relayed| relayed.limit), patience),
            Path::Relay { .. } => return,
        };
        let search = peer.mtu.get_or_insert_with(|| MtuSearch::new(wanted, overhead(&path), known));
        match search.next_round() {
            Ok(lengths) => {
                self.timers.set(Timer::Mtu(node), now + patience.max(timing.mtu_round));
                for length in lengths {
                    self.send_length_probe(node, path, length);
                }
            }
            Err(found) => self.length_found(node, path, found),
        }
    }

    /// How long an answer through the peer relay in use may take.
    fn patience_of_relay(&self, node: &NodePublic) -> Duration {
        self.relay.status(node).map_or(Duration::ZERO, |status| status.latency * 2)
    }

    /// A padded ping along `path` was answered.
    pub(super) fn length_passes(&mut self, node: NodePublic, path: Path, length: usize) {
        let mode = self.mode;
        let Some(peer) = self.peers.get_mut(&node).filter(|peer| peer.path(mode) == Some(path)) else { return };
        if peer.mtu.as_mut().is_some_and(|search| search.answered(length)) {
            self.length_found(node, path, Found::NoLimit);
        }
    }

    fn length_found(&mut self, node: NodePublic, path: Path, found: Found) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.mtu = None;
        let limit = match path {
            Path::Direct { socket, remote } => {
                peer.candidates.get_mut(&Target { socket, remote }).map(|candidate| &mut candidate.limit)
            }
            Path::PeerRelay { .. } => peer.relayed.as_mut().map(|relayed| &mut relayed.limit),
            Path::Relay { .. } => None,
        };
        let Some(limit) = limit else { return };
        match found {
            Found::NoLimit => *limit = None,
            Found::Limit(found) => *limit = Some(found),
            Found::Nothing => {}
        }
        let pause = if limit.is_none() { self.timing.mtu_confirm } else { self.timing.mtu_raise };
        self.timers.set(Timer::Mtu(node), self.now + pause);
        self.tell_limit(node);
    }

    /// Tells the caller if the path in use has another limit than it knows of.
    pub(super) fn tell_limit(&mut self, node: NodePublic) {
        let (mode, wanted) = (self.mode, self.wanted);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let limit = match peer.path(mode) {
            Some(Path::Direct { socket, remote }) => {
                peer.candidates.get(&Target { socket, remote }).and_then(|candidate| candidate.limit)
            }
            Some(Path::PeerRelay { .. }) => peer.relayed.and_then(|relayed| relayed.limit),
            Some(Path::Relay { .. }) | None => None,
        };
        let limit = limit.filter(|limit| wanted.is_some_and(|wanted| *limit < wanted));
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
