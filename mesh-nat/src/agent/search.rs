//! Sending: searches, pings, call-me-maybes, heartbeats.

use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;
use rand_core::Rng;

use super::peer::within;
use super::{Agent, Event, MAX_TRANSMITS, Mode, PingId, Timer, Transmit};
use crate::disco::message::{CallMeMaybe, Message, PING_LEN, Ping, TxId};
use crate::disco::seal;
use crate::path::Path;
use crate::path::candidate::Target;
use crate::path::probe::Probe;

/// The longest ping that a user may ask for, in bytes.
const MAX_PING: usize = 9000;
/// Addresses in one call-me-maybe. Stock peers send a dozen at most.
const MAX_CALL: usize = 64;
/// Between two requests for our own addresses.
const ENDPOINTS_ASK: Duration = Duration::from_secs(5);

/// What makes a ping so long, or as long as it can be.
fn padding(size: usize) -> usize {
    size.min(MAX_PING).saturating_sub(seal::OVERHEAD + PING_LEN)
}

/// Why a search is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// There is traffic: what was tried lately is not tried again.
    Routine,
    /// Something has changed: everything is tried.
    Event,
}

impl Agent {
    /// Pings candidates and asks the peer to ping ours.
    pub(super) fn search(&mut self, node: NodePublic, urgency: Urgency) {
        if self.mode == Mode::Relay || self.sockets.is_empty() {
            return;
        }
        let (now, timing) = (self.now, self.timing);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if peer.disco.is_zero() {
            return;
        }
        peer.candidates.prune(now, timing.active);
        peer.searched = Some(now);
        let due: Vec<_> = peer
            .candidates
            .iter()
            .filter(|(_, candidate)| urgency == Urgency::Event || !within(candidate.pinged, now, timing.search))
            .map(|(target, _)| *target)
            .collect();
        let call = urgency == Urgency::Event
            || (!within(peer.called, now, timing.search) && (!due.is_empty() || peer.candidates.is_empty()));
        for target in due {
            self.probe_within_budget(node, target);
        }
        if call {
            self.send_call(node);
        }
    }

    /// Pings one address unless the peer has used up its budget.
    pub(super) fn probe_within_budget(&mut self, node: NodePublic, target: Target) {
        let now = self.now;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if peer.budget.take(now) {
            self.send_ping(node, target.into(), None, 0);
        } else {
            self.counters.pings_suppressed += 1;
        }
    }

    pub(super) fn send_ping(&mut self, node: NodePublic, path: Path, user: Option<PingId>, size: usize) {
        let now = self.now;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if let Path::Direct { socket, remote } = path
            && let Some(candidate) = peer.candidates.get_mut(&Target { socket, remote })
        {
            candidate.pinged = Some(now);
        }
        let mut tx = [0; 12];
        self.rng.fill_bytes(&mut tx);
        let tx = TxId(tx);
        self.probes.insert(tx, Probe { peer: node, path, sent: now, user, length: None });
        self.timers.set(Timer::Probe(tx), now + self.timing.ping_timeout);
        self.send(node, path, &Message::Ping(Ping { tx, node: Some(self.node), padding: padding(size) }));
    }

    /// Asks whether a datagram of `length` bytes arrives. No answer says nothing else about the path.
    pub(super) fn send_length_probe(&mut self, node: NodePublic, target: Target, length: usize) {
        let (now, path) = (self.now, Path::from(target));
        let mut tx = [0; 12];
        self.rng.fill_bytes(&mut tx);
        let tx = TxId(tx);
        self.probes.insert(tx, Probe { peer: node, path, sent: now, user: None, length: Some(length) });
        self.timers.set(Timer::Probe(tx), now + self.timing.ping_timeout);
        self.send(node, path, &Message::Ping(Ping { tx, node: Some(self.node), padding: padding(length) }));
    }

    /// Asks the peer, through its relay, to ping all our addresses.
    pub(super) fn send_call(&mut self, node: NodePublic) {
        let now = self.now;
        if self.mode == Mode::Relay || self.sockets.is_empty() {
            return;
        }
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let Some(region) = peer.region() else { return };
        peer.called = Some(now);
        // What the peer itself sees of us may be in no other list, and stock peers drop what is not listed.
        let proven = peer.candidates.iter().filter(|(_, candidate)| candidate.proven_within(now, self.timing.active));
        let observed = proven.filter_map(|(_, candidate)| candidate.observed);
        let mut endpoints = Vec::new();
        for endpoint in self.endpoints.iter().copied().chain(observed) {
            if endpoints.len() < MAX_CALL && !endpoints.contains(&endpoint) {
                endpoints.push(endpoint);
            }
        }
        self.send(node, Path::Relay { region }, &Message::CallMeMaybe(CallMeMaybe { endpoints }));
        self.want_endpoints();
    }

    pub(super) fn send(&mut self, node: NodePublic, path: Path, message: &Message) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if peer.disco.is_zero() {
            return;
        }
        if self.transmits.len() >= MAX_TRANSMITS {
            self.counters.transmits_dropped += 1;
            return;
        }
        let shared = peer.shared.get_or_insert_with(|| self.disco.box_with(&peer.disco));
        let mut plaintext = Vec::new();
        message.encode(&mut plaintext);
        let datagram = seal::seal(&self.disco_public, shared, &mut self.rng, &plaintext);
        self.transmits.push_back(Transmit { path, peer: node, datagram });
    }

    pub(super) fn heartbeat(&mut self, node: NodePublic) {
        let (now, timing) = (self.now, self.timing);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if !peer.active(now, &timing) || self.mode == Mode::Relay {
            return;
        }
        self.timers.set(Timer::Heartbeat(node), now + timing.heartbeat);
        let Some(best) = peer.best else { return self.search(node, Urgency::Routine) };
        let Some(candidate) = peer.candidates.get(&best) else { return };
        let slow = candidate.round_trip.is_some_and(|round_trip| round_trip.smoothed() > timing.good_enough);
        let searched = peer.searched;
        // A triggered check may have pinged it just now.
        if !within(candidate.pinged, now, timing.heartbeat / 2) {
            self.ping_best(node, best);
        }
        if slow && !within(searched, now, timing.upgrade) {
            self.search(node, Urgency::Routine);
        }
    }

    /// Pings the path in use, if it is a direct one.
    pub(super) fn check_best(&mut self, node: NodePublic) {
        if let Some(best) = self.peers.get(&node).and_then(|peer| peer.best) {
            self.ping_best(node, best);
        }
    }

    fn ping_best(&mut self, node: NodePublic, best: Target) {
        self.send_ping(node, best.into(), None, 0);
        let patience = self
            .peers
            .get(&node)
            .and_then(|peer| peer.candidates.get(&best)?.round_trip)
            .map_or(self.timing.retry, |round_trip| round_trip.patience().max(self.timing.retry));
        self.timers.set(Timer::Retry(node), self.now + patience);
    }

    /// A heartbeat has not been answered: repeats it, and in the end gives the path up before its trust ends.
    pub(super) fn retry(&mut self, node: NodePublic) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let Some(best) = peer.best else { return };
        if peer.retries < self.timing.retries {
            peer.retries += 1;
            return self.ping_best(node, best);
        }
        if let Some(candidate) = peer.candidates.get_mut(&best) {
            candidate.forget();
        }
        self.lost(node);
    }

    /// The path in use may have gone: takes another, or searches while the relay carries the data.
    pub(super) fn lost(&mut self, node: NodePublic) {
        self.reselect(node);
        let Some(peer) = self.peers.get(&node) else { return };
        if peer.best.is_none() {
            // Our NAT may have forgotten us; then the addresses that we would tell the peer are wrong as well.
            self.endpoints_at = None;
        }
        if peer.best.is_none() && peer.active(self.now, &self.timing) {
            self.search(node, Urgency::Routine);
        }
    }

    /// Asks the caller for our own addresses if those known are old.
    pub(super) fn want_endpoints(&mut self) {
        let fresh = within(self.endpoints_at, self.now, self.timing.endpoints_fresh);
        if !fresh && !within(self.endpoints_asked, self.now, ENDPOINTS_ASK) {
            self.endpoints_asked = Some(self.now);
            self.events.push_back(Event::NeedEndpoints);
        }
    }

    /// Starts asking for our own addresses regularly, which also keeps the NAT's mapping of the socket alive.
    pub(super) fn arm_endpoints(&mut self) {
        if !self.timers.is_set(Timer::Endpoints) {
            let at = self.next_endpoints();
            self.timers.set(Timer::Endpoints, at);
        }
    }

    /// 20 to 26 s from now: most NATs forget a silent flow after 30 s, and nodes should not ask in step.
    fn next_endpoints(&mut self) -> Instant {
        let jitter = u64::from(self.rng.next_u32() % 6000);
        self.now + Duration::from_millis(20_000 + jitter)
    }

    pub(super) fn endpoints_due(&mut self) {
        let (now, timing) = (self.now, self.timing);
        if self.mode == Mode::Relay || !self.peers.values().any(|peer| peer.active(now, &timing)) {
            return;
        }
        let at = self.next_endpoints();
        self.timers.set(Timer::Endpoints, at);
        if !within(self.endpoints_at, now, Duration::from_secs(15)) {
            self.endpoints_asked = Some(now);
            self.events.push_back(Event::NeedEndpoints);
        }
    }
}
