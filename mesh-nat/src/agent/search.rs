//! Sending: searches, pings, call-me-maybes, heartbeats.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;
use rand_core::Rng;

use super::peer::{Peer, within};
use super::{Agent, Event, MAX_TRANSMITS, Mode, PingId, Timer, Transmit};
use crate::disco::message::{CallMeMaybe, Message, PING_LEN, Ping, TxId};
use crate::disco::seal;
use crate::path::Path;
use crate::path::candidate::{Candidate, Target};
use crate::path::probe::{Probe, Purpose};
use crate::relay::geneve::{self, Content};

/// The longest ping that a user may ask for, in bytes.
const MAX_PING: usize = 9000;
/// Addresses in one call-me-maybe. Stock peers send a dozen at most.
const MAX_CALL: usize = 64;
/// Between two requests for our own addresses.
const ENDPOINTS_ASK: Duration = Duration::from_secs(5);
/// Until an unanswered ping of a search is repeated.
const AGAIN: Duration = Duration::from_millis(250);
/// Until that is done once more.
const AGAIN_LATER: Duration = Duration::from_millis(500);
/// Pings to one address in one search: it and its repetitions.
const TRIES: u8 = 3;
/// So much more seldom something better is looked for than a path that carries nothing at the moment.
const SILENT_UPGRADE: u32 = 10;
/// Between two searches that repeat pings to addresses long known.
const REPEAT_INTERVAL: Duration = Duration::from_secs(60);

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

/// Whether a ping that is not answered is sent again soon, twice at most: a single loss should not cost five seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// It is.
    Yes,
    /// It is not: the address has not answered before either.
    No,
}

impl Peer {
    /// Whether pings to addresses that have long been known may be repeated: not in every search, lest addresses that
    /// never answer are pinged three times as often. `fresh` says that some were not known.
    pub(super) fn may_repeat(&mut self, now: Instant, fresh: bool) -> Repeat {
        if !fresh && within(self.repeated, now, REPEAT_INTERVAL) {
            return Repeat::No;
        }
        self.repeated = Some(now);
        Repeat::Yes
    }
}

impl Agent {
    /// Pings candidates and asks the peer to ping ours, when its turn comes.
    pub(super) fn search(&mut self, node: NodePublic, urgency: Urgency) {
        if self.mode == Mode::Relay || self.sockets.is_empty() {
            return;
        }
        let Some(peer) = self.peers.get(&node) else { return };
        let (due, call) = self.due(peer, urgency);
        if !peer.disco.is_zero() && (call || !due.is_empty()) && self.admit_search(node) {
            self.search_now(node, urgency);
        }
    }

    /// What there is to be pinged, and whether the peer is to be asked to ping us.
    fn due(&self, peer: &Peer, urgency: Urgency) -> (Vec<Target>, bool) {
        let (now, span) = (self.now, self.timing.search);
        let lately = |candidate: &Candidate| urgency == Urgency::Routine && within(candidate.pinged, now, span);
        let due: Vec<_> =
            peer.candidates.iter().filter(|(_, candidate)| !lately(candidate)).map(|(target, _)| *target).collect();
        let call = urgency == Urgency::Event
            || (!within(peer.called, now, span) && (!due.is_empty() || peer.candidates.is_empty()));
        (due, call)
    }

    /// Pings candidates and asks the peer to ping ours.
    pub(super) fn search_now(&mut self, node: NodePublic, urgency: Urgency) {
        let (now, timing) = (self.now, self.timing);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.candidates.prune(now, timing.active);
        if urgency == Urgency::Event || !within(peer.searched, now, timing.active) {
            peer.sought = Some(now);
        }
        peer.searched = Some(now);
        let (repeat, best) = (peer.may_repeat(now, urgency == Urgency::Event), peer.best);
        let Some(peer) = self.peers.get(&node) else { return };
        let (due, call) = self.due(peer, urgency);
        for target in due {
            if Some(target) == best {
                self.check_best(node);
            } else {
                self.probe_within_budget(node, target, repeat);
            }
        }
        if call {
            self.send_call(node);
            if repeat == Repeat::Yes {
                self.call_again(node);
            }
        }
        self.want_guesses(node);
    }

    /// Pings one address unless the peer has used up its budget.
    pub(super) fn probe_within_budget(&mut self, node: NodePublic, target: Target, repeat: Repeat) {
        let now = self.now;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if !peer.budget.take(now) {
            self.counters.pings_suppressed += 1;
            return;
        }
        if repeat == Repeat::Yes
            && let Some(candidate) = peer.candidates.get_mut(&target)
        {
            candidate.tries = 1;
            self.timers.set_if_absent(Timer::Again(node), now + AGAIN);
        }
        self.send_ping(node, target.into(), None, 0);
    }

    fn call_again(&mut self, node: NodePublic) {
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.call_again = true;
            self.timers.set_if_absent(Timer::Again(node), self.now + AGAIN);
        }
    }

    /// Repeats what has not been answered.
    pub(super) fn again(&mut self, node: NodePublic) {
        let now = self.now;
        if self.mode == Mode::Relay {
            return;
        }
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let call = std::mem::take(&mut peer.call_again) && peer.best.is_none();
        let mut due = Vec::new();
        for (target, candidate) in peer.candidates.iter_mut().filter(|(_, candidate)| candidate.tries > 0) {
            // What was pinged only just now has its turn the next time.
            if !within(candidate.pinged, now, AGAIN / 2) && peer.budget.take(now) {
                candidate.tries = (candidate.tries + 1) % TRIES;
                due.push(*target);
            }
        }
        let more = peer.candidates.iter().any(|(_, candidate)| candidate.tries > 0);
        for target in due {
            self.send_ping(node, target.into(), None, 0);
        }
        if call {
            self.send_call(node);
        }
        if more {
            self.timers.set(Timer::Again(node), now + AGAIN_LATER);
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
        let purpose = user.map_or(Purpose::Proof, Purpose::User);
        self.launch(node, path, purpose, padding(size));
    }

    /// Asks whether a datagram of `length` bytes arrives. No answer says nothing else about the path.
    pub(super) fn send_length_probe(&mut self, node: NodePublic, path: Path, length: usize) {
        self.launch(node, path, Purpose::Length(length), padding(length));
    }

    /// Sends a ping along `path` and waits for its pong.
    pub(super) fn launch(&mut self, node: NodePublic, path: Path, purpose: Purpose, padding: usize) {
        let now = self.now;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let mut tx = [0; 12];
        self.rng.fill_bytes(&mut tx);
        let tx = TxId(tx);
        peer.flight.push(Probe { tx, path, sent: now, purpose });
        self.timers.set_if_absent(Timer::Flight(node), now + self.timing.ping_timeout);
        self.send(node, path, &Message::Ping(Ping { tx, node: Some(self.node), padding }));
    }

    /// Gives up pings that have not been answered for too long.
    pub(super) fn flight_due(&mut self, node: NodePublic) {
        let (now, patience) = (self.now, self.timing.ping_timeout);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if let Some(latest) = now.checked_sub(patience) {
            peer.flight.give_up(latest);
        }
        if let Some(oldest) = peer.flight.oldest() {
            self.timers.set(Timer::Flight(node), oldest + patience);
        }
    }

    /// Asks the peer, through its relay, to ping all our addresses.
    pub(super) fn send_call(&mut self, node: NodePublic) {
        // Another list would take the place of the guesses that the peer is to try.
        if !self.guesser.is_listing(&node) {
            self.send_call_with(node, &[]);
        }
    }

    /// The same with further addresses that may be ours.
    pub(super) fn send_call_with(&mut self, node: NodePublic, guesses: &[SocketAddr]) {
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
        endpoints.extend_from_slice(guesses);
        self.send(node, Path::Relay { region }, &Message::CallMeMaybe(CallMeMaybe { endpoints }));
        self.want_endpoints();
    }

    pub(super) fn send(&mut self, node: NodePublic, path: Path, message: &Message) {
        let relayed = match path {
            Path::PeerRelay { server, vni } => match self.way_to(server) {
                Some(way) => Some((way, vni)),
                None => return,
            },
            Path::Direct { .. } | Path::Relay { .. } => None,
        };
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
        let (path, datagram) = match relayed {
            Some((way, vni)) => (way, geneve::encapsulate(vni, Content::Disco, &datagram)),
            None => (path, datagram),
        };
        self.transmits.push_back(Transmit { path, peer: node, datagram });
    }

    pub(super) fn heartbeat(&mut self, node: NodePublic) {
        let (now, timing) = (self.now, self.timing);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if !peer.active(now, &timing) || self.mode == Mode::Relay {
            return;
        }
        if let Some(later) = peer.not_before(now, &timing) {
            return self.timers.set(Timer::Heartbeat(node), later);
        }
        self.timers.set(Timer::Heartbeat(node), now + timing.heartbeat);
        let Some(best) = peer.best else { return self.search(node, Urgency::Routine) };
        let Some(candidate) = peer.candidates.get(&best) else { return };
        let slow = candidate.round_trip.is_some_and(|round_trip| round_trip.smoothed() > timing.good_enough);
        let (searched, silent) = (peer.searched, peer.interval(now, best, &timing) > timing.heartbeat);
        // A triggered check may have pinged it just now.
        if !within(candidate.pinged, now, timing.heartbeat / 2) {
            self.check_best(node);
        }
        let pause = if silent { timing.upgrade * SILENT_UPGRADE } else { timing.upgrade };
        if slow && !within(searched, now, pause) {
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
