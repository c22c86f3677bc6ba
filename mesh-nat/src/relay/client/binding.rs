//! The binding handshake with one server, and the pings that prove that the other end has bound too.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_noise::key::{DiscoPublic, NodePublic};
use rand_core::Rng;

use super::{Client, Origin, Output, Place, Relayed, Timer};
use crate::disco::message::{Binding, Message, RelayEndpoint, TxId};
use crate::path::Vni;
use crate::path::candidate::usable;
use crate::path::probe::RoundTrip;

/// Addresses of one server that are tried.
const MAX_ADDRESSES: usize = 16;
/// Pings in one handshake: each that comes in leads to one that goes out.
const MAX_PINGS: usize = 10;
/// Handshakes for one peer at a time.
const MAX_HANDSHAKES: usize = 16;

#[derive(Debug)]
pub(super) struct Handshake {
    endpoint: RelayEndpoint,
    generation: u32,
    end: Instant,
    /// Until the next repetition.
    pause: Duration,
    /// Once a challenge has come: from where, and what it was.
    answered: Option<(Place, [u8; 32])>,
    pings: BTreeMap<TxId, Instant>,
}

impl Handshake {
    fn message(&self, remote: DiscoPublic) -> Message {
        let binding = |challenge| Binding { vni: self.endpoint.vni, generation: self.generation, remote, challenge };
        match self.answered {
            None => Message::Bind(binding([0; 32])),
            Some((_, challenge)) => Message::BindAnswer(binding(challenge)),
        }
    }

    /// Where the next message goes: everywhere until one address has answered.
    fn places(&self) -> Vec<Place> {
        match self.answered {
            Some((place, _)) => vec![place],
            None => {
                let usable = self.endpoint.endpoints.iter().filter_map(|address| usable(*address));
                usable.take(MAX_ADDRESSES).map(|server| Place { server, vni: self.endpoint.vni }).collect()
            }
        }
    }
}

impl Client {
    /// There is an allocation: tells the peer if it is news to it, and binds unless that has been done.
    pub(super) fn found(&mut self, peer: NodePublic, endpoint: RelayEndpoint, origin: Origin) {
        let (now, timing) = (self.now, self.timing);
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let server = endpoint.server;
        let newer = |lamport: u64| endpoint.lamport > lamport;
        let path = state.path.as_ref().filter(|path| path.endpoint.server == server);
        let stale = path.is_some_and(|path| !newer(path.endpoint.lamport) && path.place.vni != endpoint.vni);
        if stale || state.handshakes.get(&server).is_some_and(|other| !newer(other.endpoint.lamport)) {
            return;
        }
        if origin == Origin::Asked {
            let message = Message::CallMeMaybeVia(endpoint.clone());
            self.outputs.push_back(Output::Signal { to: peer, message });
        }
        // Binding a second time could move a leg that carries data.
        if path.is_some_and(|path| path.place.vni == endpoint.vni && path.is_proven(now, &timing)) {
            return;
        }
        if !state.handshakes.contains_key(&server) && state.handshakes.len() >= MAX_HANDSHAKES {
            return;
        }
        self.begin(peer, endpoint, now);
        self.speak(peer, server);
    }

    /// Binds from `at` on, in place of any other handshake with the server.
    fn begin(&mut self, peer: NodePublic, endpoint: RelayEndpoint, at: Instant) {
        let (generation, timing, server) = (self.next_generation(), self.timing, endpoint.server);
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let end = at + endpoint.bind_lifetime.min(timing.handshake);
        let handshake =
            Handshake { endpoint, generation, end, pause: timing.rebind, answered: None, pings: BTreeMap::new() };
        state.handshakes.insert(server, handshake);
        self.timers.set(Timer::Handshake(peer, server), at);
    }

    /// Binds everything of `peer` again from `at` on: handshakes under way, whose challenges were for another address of
    /// ours, and the path, if `path` says what it is bound to.
    pub(super) fn begin_again(&mut self, peer: NodePublic, path: Option<RelayEndpoint>, at: Instant) {
        let Some(state) = self.peers.get(&peer) else { return };
        let mut endpoints: Vec<_> = state.handshakes.values().map(|handshake| handshake.endpoint.clone()).collect();
        endpoints.extend(path.filter(|path| !state.handshakes.contains_key(&path.server)));
        for endpoint in endpoints {
            self.begin(peer, endpoint, at);
        }
    }

    /// The path through the server is sound without being bound again. An answer that is under way has to be waited for,
    /// though: it may bind us at another address.
    pub(super) fn need_not_bind(&mut self, peer: NodePublic, server: DiscoPublic, vni: Vni) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let silent = |handshake: &Handshake| handshake.answered.is_none() && handshake.endpoint.vni == vni;
        if state.handshakes.get(&server).is_some_and(silent) {
            state.handshakes.remove(&server);
            self.timers.clear(Timer::Handshake(peer, server));
        }
    }

    /// Sends what the handshake waits for an answer to, and arms its repetition.
    fn speak(&mut self, peer: NodePublic, server: DiscoPublic) {
        let now = self.now;
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let disco = state.disco;
        let Some(handshake) = state.handshakes.get_mut(&server) else { return };
        let again = (now + handshake.pause).min(handshake.end);
        handshake.pause *= 2;
        let message = handshake.message(disco);
        let answered = handshake.answered.map(|(place, _)| place);
        for place in handshake.places() {
            self.outputs.push_back(Output::Control { key: server, place, message: message.clone() });
        }
        self.timers.set(Timer::Handshake(peer, server), again);
        if let Some(place) = answered {
            self.handshake_ping(peer, server, place);
        }
    }

    fn handshake_ping(&mut self, peer: NodePublic, server: DiscoPublic, place: Place) {
        let (now, tx) = (self.now, self.tx());
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let Some(handshake) = state.handshakes.get_mut(&server) else { return };
        if handshake.pings.len() < MAX_PINGS {
            handshake.pings.insert(tx, now);
            self.push(Output::Ping { peer, place, tx });
        }
    }

    pub(super) fn tx(&mut self) -> TxId {
        let mut tx = [0; 12];
        self.rng.fill_bytes(&mut tx);
        TxId(tx)
    }

    pub(super) fn handshake_due(&mut self, peer: NodePublic, server: DiscoPublic) {
        let now = self.now;
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let Some(handshake) = state.handshakes.get(&server) else { return };
        if handshake.end <= now {
            state.handshakes.remove(&server);
        } else {
            self.speak(peer, server);
        }
    }

    /// Whether a handshake with the server whose disco key this is waits for it: nobody else's control is opened.
    #[must_use]
    pub fn expects(&self, server: &DiscoPublic) -> bool {
        self.peers.values().any(|state| state.handshakes.contains_key(server))
    }

    /// The server with the disco key `server` asks from `source` for an answer. False if nothing had asked it.
    pub fn challenge(&mut self, now: Instant, server: DiscoPublic, source: SocketAddr, challenge: &Binding) -> bool {
        self.tick(now);
        let meant = |state: &super::Peer| {
            let handshake = state.handshakes.get(&server);
            state.disco == challenge.remote
                && handshake.is_some_and(|handshake| {
                    handshake.endpoint.vni == challenge.vni
                        && handshake.generation == challenge.generation
                        && handshake.answered.is_none()
                })
        };
        let Some(peer) = self.peers.iter().find(|(_, state)| meant(state)).map(|(peer, _)| *peer) else { return false };
        let pause = self.timing.rebind;
        if let Some(handshake) = self.peers.get_mut(&peer).and_then(|state| state.handshakes.get_mut(&server)) {
            handshake.answered = Some((Place { server: source, vni: challenge.vni }, challenge.challenge));
            handshake.pause = pause;
        }
        self.speak(peer, server);
        true
    }

    /// `peer` has pinged us through a relay (and is answered by whoever owns the key): its leg is bound, so ours is worth
    /// a ping.
    pub fn pinged(&mut self, now: Instant, peer: NodePublic, place: Place) {
        self.tick(now);
        let Some(state) = self.peers.get(&peer) else { return };
        let here = |handshake: &Handshake| handshake.answered.is_some_and(|(other, _)| other == place);
        if let Some(server) = state.handshakes.iter().find(|(_, other)| here(other)).map(|(server, _)| *server) {
            self.handshake_ping(peer, server, place);
        } else {
            self.path_pinged(peer, place);
        }
    }

    /// A pong that came through a relay. False if it answers no ping of ours.
    pub fn pong(&mut self, now: Instant, peer: NodePublic, place: Place, tx: TxId) -> bool {
        self.tick(now);
        let now = self.now;
        let Some(state) = self.peers.get_mut(&peer) else { return false };
        let done = state.handshakes.iter().find_map(|(server, handshake)| {
            let (other, _) = handshake.answered?;
            let sent = handshake.pings.get(&tx)?;
            (other == place).then_some((*server, *sent))
        });
        let Some((server, sent)) = done else { return self.path_pong(peer, place, tx) };
        self.timers.clear(Timer::Handshake(peer, server));
        let Some(handshake) = state.handshakes.remove(&server) else { return false };
        let round_trip = RoundTrip::first(now.saturating_duration_since(sent));
        self.proven(peer, Relayed::new(handshake.endpoint, place, now, round_trip));
        true
    }
}
