//! Receiving: what is believed, and what it leads to.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_noise::key::NodePublic;

use super::peer::within;
use super::search::Repeat;
use super::{Agent, Event, Mode, PingId, Reject, Source, Timer, UserPing};
use crate::classify::{Class, GENEVE_LEN, classify};
use crate::disco::message::{CallMeMaybe, Message, Ping, Pong};
use crate::disco::seal;
use crate::path::Path;
use crate::path::candidate::{MAX_CANDIDATES, Target, usable};
use crate::path::probe::{Purpose, RoundTrip};
use crate::relay::client::Place;

/// Between two triggered checks of one address.
const TRIGGER_INTERVAL: Duration = Duration::from_millis(250);
/// So long, a ping to an address that has answered before may still be answered.
const ASKED: Duration = Duration::from_millis(500);
/// A call-me-maybe is answered in kind unless we sent one within this time.
const CALL_BACK: Duration = Duration::from_secs(2);
/// Attributed addresses per peer before those are dropped that are candidates no more.
const MAX_OWNED: usize = 2 * MAX_CANDIDATES;

impl Agent {
    /// Consumes one datagram that [`classify`](crate::classify()) calls disco and that arrived at `now`.
    ///
    /// # Errors
    /// Says why it was ignored.
    pub fn handle_datagram(&mut self, now: Instant, source: Source, datagram: &[u8]) -> Result<(), Reject> {
        self.tick(now);
        if let (Path::Direct { remote, .. }, Class::RelayedDisco { vni, control }) = (source.path, classify(datagram)) {
            return self.handle_relayed(remote, vni, control, &datagram[GENEVE_LEN..]);
        }
        self.handle_disco(source, datagram)
    }

    pub(super) fn handle_disco(&mut self, source: Source, datagram: &[u8]) -> Result<(), Reject> {
        let sender = seal::sender(datagram).ok_or(Reject::NotDisco)?;
        let holders = self.holders(sender);
        let holder = holders.first().ok_or(Reject::UnknownSender)?;
        match source.path {
            Path::Direct { .. } if self.mode == Mode::Relay => return Err(Reject::Disabled),
            Path::Direct { .. } | Path::PeerRelay { .. } | Path::Relay { .. } => {}
        }
        // All holders of one disco key share the box; any of them can open it.
        let peer = self.peers.get_mut(holder).ok_or(Reject::UnknownSender)?;
        let shared = peer.shared.get_or_insert_with(|| self.disco.box_with(&sender));
        let plaintext = seal::open(shared, datagram).ok_or(Reject::Unsealed)?;
        match Message::decode(&plaintext)? {
            Message::Ping(ping) => self.on_ping(source, &holders, &ping),
            Message::Pong(pong) => self.on_pong(source, &holders, &pong),
            Message::CallMeMaybe(call) => self.on_call(source, &holders, &call),
            Message::Punch(punch) => self.on_punch(source, &holders, punch),
            Message::CallMeMaybeVia(endpoint) => self.on_via(source, &holders, endpoint),
            Message::AllocateRequest(request) => self.on_allocate(source, &holders, sender, &request),
            Message::AllocateResponse(response) => self.on_allocated(source, &holders, response),
            // Between a client and a server only, behind a header that says so.
            Message::Bind(_) | Message::BindChallenge(_) | Message::BindAnswer(_) => Err(Reject::Unasked),
        }
    }

    fn on_ping(&mut self, source: Source, holders: &[NodePublic], ping: &Ping) -> Result<(), Reject> {
        let held = |node: &NodePublic| holders.contains(node);
        if source.node.is_some_and(|node| !held(&node)) {
            return Err(Reject::WrongNode);
        }
        // Several nodes may share a disco key. Who it is must be clear before an address is attributed.
        let claimed = source.node.or(ping.node.filter(held));
        let who = claimed.or(if let [only] = holders { Some(*only) } else { None });
        let Some(addressee) = who.or(holders.first().copied()) else { return Err(Reject::UnknownSender) };
        let observed = match source.path {
            Path::Direct { remote, .. } | Path::PeerRelay { server: remote, .. } => remote,
            Path::Relay { region } => relay_address(region),
        };
        self.send(addressee, source.path, &Message::Pong(Pong { tx: ping.tx, observed }));
        match source.path {
            Path::Direct { socket, remote } => {
                let Some(remote) = usable(remote) else { return Ok(()) };
                let target = Target { socket, remote };
                if let Some(node) = who {
                    self.learn(node, target);
                    self.heard_directly(&node);
                    self.map(node, target);
                } else {
                    holders.iter().for_each(|node| self.learn(*node, target));
                }
            }
            Path::Relay { region } => {
                if let Some(node) = source.node {
                    self.heard_by_relay(&node, region);
                }
            }
            Path::PeerRelay { server, vni } => {
                if let Some(node) = who {
                    self.relay.pinged(self.now, node, Place { server, vni });
                }
            }
        }
        Ok(())
    }

    /// Remembers where a ping came from, and makes the triggered check: the peer reaches us from there, so find out at
    /// once whether we reach it.
    fn learn(&mut self, node: NodePublic, target: Target) {
        let (now, timing) = (self.now, self.timing);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let doubted = peer.best == Some(target) && peer.doubt.since().is_some();
        let (silence, interval) = (peer.silence(now, target), peer.interval(now, target, &timing));
        let Some(candidate) = peer.candidates.admit(now, target) else {
            self.counters.candidates_refused += 1;
            return;
        };
        let fresh = candidate.seen.is_none() && candidate.proven.is_none();
        candidate.seen = Some(now);
        // Slightly less than a heartbeat, so that the end that only receives keeps its trust by the other's pings.
        let proven = candidate.proven_within(now, interval * 5 / 6);
        // Two that send heartbeats in step have asked already.
        let asked = candidate.proven_within(now, timing.trust) && within(candidate.pinged, now, ASKED);
        let known = proven || asked;
        if (!known || doubted) && !within(candidate.triggered, now, TRIGGER_INTERVAL) {
            candidate.triggered = Some(now);
            if let (None, Some(silence)) = (peer.doubt.asked, silence) {
                peer.pulse.asked(silence);
            }
            self.probe_within_budget(node, target, Repeat::Yes);
            if fresh && self.peers.get(&node).is_some_and(|peer| peer.best != Some(target)) {
                // It may have moved, and the address that we know lead nowhere.
                self.check_best(node);
            }
        }
    }

    fn map(&mut self, node: NodePublic, target: Target) {
        if self.owners.get(&target) == Some(&node) {
            return;
        }
        if self.owners.len() >= MAX_OWNED * self.peers.len() {
            let peers = &self.peers;
            self.owners
                .retain(|target, node| peers.get(node).is_some_and(|peer| peer.candidates.get(target).is_some()));
        }
        self.owners.insert(target, node);
        self.events.push_back(Event::PeerMapped { peer: node, socket: target.socket, remote: target.remote });
    }

    fn on_pong(&mut self, source: Source, holders: &[NodePublic], pong: &Pong) -> Result<(), Reject> {
        let now = self.now;
        if let Path::PeerRelay { server, vni } = source.path
            && holders.iter().any(|node| self.relay.pong(now, *node, Place { server, vni }, pong.tx))
        {
            return Ok(());
        }
        let take = |node: &NodePublic| {
            let peer = self.peers.get_mut(node)?;
            let probe = peer.flight.answered(&pong.tx, &source.path)?;
            if peer.flight.oldest().is_none() {
                self.timers.clear(Timer::Flight(*node));
            }
            Some((*node, probe))
        };
        let (node, probe) = holders.iter().find_map(take).ok_or(Reject::UnexpectedPong)?;
        let latency = now.saturating_duration_since(probe.sent);
        let served = |id: &PingId, ping: &UserPing| {
            probe.purpose == Purpose::User(*id) || (ping.any && ping.peer == node && probe.path.is_direct())
        };
        let answered: Vec<_> =
            self.user_pings.iter().filter(|(id, ping)| served(id, ping)).map(|(id, _)| *id).collect();
        for id in answered {
            self.user_pings.remove(&id);
            self.timers.clear(Timer::UserPing(id));
            self.events.push_back(Event::PingAnswered { id, peer: node, path: probe.path, latency });
        }
        let Path::Direct { socket, remote } = probe.path else {
            if let Purpose::Length(length) = probe.purpose {
                self.length_passes(node, probe.path, length);
            }
            return Ok(());
        };
        let target = Target { socket, remote };
        if probe.purpose == Purpose::Guess {
            self.guess_answered(node, target);
        }
        let Some(peer) = self.peers.get_mut(&node) else { return Ok(()) };
        let Some(candidate) = peer.candidates.get_mut(&target) else { return Ok(()) };
        candidate.proven = Some(now);
        candidate.tries = 0;
        let observed = usable(pong.observed);
        let same = source.path == probe.path && (candidate.observed.is_none() || candidate.observed == observed);
        candidate.observed = observed;
        match &mut candidate.round_trip {
            Some(round_trip) => round_trip.update(latency),
            empty => *empty = Some(RoundTrip::first(latency)),
        }
        if peer.best == Some(target) {
            self.undoubt(node, same);
        }
        if let Purpose::Length(length) = probe.purpose {
            self.length_passes(node, probe.path, length);
        }
        self.map(node, target);
        self.reselect(node);
        Ok(())
    }

    fn on_call(&mut self, source: Source, holders: &[NodePublic], call: &CallMeMaybe) -> Result<(), Reject> {
        let Path::Relay { region } = source.path else { return Err(Reject::NotOverRelay) };
        let node = source.node.filter(|node| holders.contains(node)).ok_or(Reject::WrongNode)?;
        if self.mode == Mode::Relay {
            return Err(Reject::Disabled);
        }
        self.heard_by_relay(&node, region);
        let now = self.now;
        let Some(peer) = self.peers.get_mut(&node) else { return Err(Reject::UnknownSender) };
        let fresh = peer.set_called(now, &self.sockets, &call.endpoints, &mut self.counters);
        let repeat = peer.may_repeat(now, fresh);
        let call_back = peer.best.is_none() && !within(peer.called, now, CALL_BACK);
        let best = peer.best;
        // The peer asks because it has no path to us, or doubts it: ours may have gone too.
        self.check_best(node);
        for target in self.peers.get(&node).map(|peer| peer.candidates.targets()).unwrap_or_default() {
            if Some(target) != best {
                self.probe_within_budget(node, target, repeat);
            }
        }
        if call_back {
            self.send_call(node);
        }
        self.want_guesses(node);
        Ok(())
    }
}

/// How a pong names a relay: deployed peers write 127.3.3.40 with the region's number as the port.
fn relay_address(region: RegionId) -> SocketAddr {
    SocketAddr::from(([127, 3, 3, 40], region.get()))
}
