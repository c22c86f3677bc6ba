//! Finds and keeps the best path to every peer: one core for a node.
//!
//! ```text
//!                    traffic, call-me-maybe, new candidate
//!   relay (or none) ──────────────────────────────────────► probing: ping every candidate,
//!        ▲                                                   call-me-maybe through the peer's relay
//!        │ no pong for 6.5 s, or                                        │ pong
//!        │ four pings unanswered                                        ▼
//!        │                                                 direct: heartbeat every 3 s while there is
//!        │                                                         traffic, trusted 6.5 s after each pong;
//!        │                                                         seldomer in pauses, see `pulse`
//!        │                                      ping unanswered │        ▲
//!        │                                                      ▼        │ pong
//!        └──────────────────────────────────────────────── in doubt: the relay carries a copy of everything
//! ```
//!
//! Both ends do the same; nobody is in control. Data goes by relay until a pong has proven an address, so searching
//! never delays it. What keeps both directions in step is the *triggered check*: a ping that arrives from an address
//! which has not answered us lately is answered and pinged back at once. With it, two nodes behind NATs that keep one
//! mapping per socket are direct both ways two and a half relay round trips after the first packet:
//!
//! ```text
//!   A ── ping to B's listed addresses (opens A's NAT, dies at B's) ──►
//!   A ── call-me-maybe, through the relay ──────────────────────────► B
//!   A ◄──────────────────────── pings to all of A's addresses ─────── B
//!   A ── pong, and a ping back at once ─────────────────────────────► B    B is direct
//!   A ◄──────────────────────────────────────────────────── pong ──── B    A is direct
//! ```
//!
//! Deployed peers work the same way but for the triggered check, and in their eyes we are one of them: they forget an
//! address that an earlier call-me-maybe of ours listed and the latest does not, so every list holds all addresses of
//! ours that work, including those that only the peer can see.
//!
//! Calls come in four kinds, in the order of the crate's drain rule: commands ([`Agent::set_peer`],
//! [`Agent::traffic`], [`Agent::ping`], …), inputs ([`Agent::handle_datagram`], [`Agent::handle_timeout`]), outputs
//! (`poll_*`), and getters. After each command or input, drain the outputs.
//!
//! Between a direct path and a region stands a *peer relay*: another node that forwards UDP. The agent looks for one for
//! every active peer without a direct path; how is the business of [`relay`](crate::relay).
//!
//! Not in here: port mapping ([`crate::portmap`]), and how ports are guessed ([`crate::hard`]), which this carries out.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_noise::key::{DiscoPrivate, DiscoPublic, NodePublic, SharedBox};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_core::Rng;

use crate::behaviour::Behaviour;
use crate::hard::Guesser;
use crate::path::candidate::Target;
use crate::path::{Family, SocketId};
use crate::relay::Client;

mod doubt;
mod guess;
mod incoming;
mod length;
mod network;
mod pace;
mod peer;
mod pulse;
mod relay;
mod search;
mod status;
mod timers;
mod types;
mod why;

use doubt::Doubt;
use pace::Pace;
use peer::{Peer, within};
pub use relay::Relays;
use timers::{Timer, Timers};
pub use types::{Counters, Event, Mode, PeerConfig, PeerStatus, PingId, Reject, Source, Timing, Transmit};
pub use why::Why;

/// A user's ping under way.
#[derive(Debug, Clone, Copy)]
struct UserPing {
    peer: NodePublic,
    /// There was no path to send it along: the first pong that proves one answers it.
    any: bool,
}

/// Datagrams that wait to be polled; more are dropped and counted.
const MAX_TRANSMITS: usize = 8192;
/// Data with shorter pauses is a steady flow.
const STEADY: Duration = Duration::from_millis(500);
/// User pings that may be under way.
const MAX_USER_PINGS: usize = 256;

/// The paths of one node to all its peers.
pub struct Agent {
    disco: DiscoPrivate,
    disco_public: DiscoPublic,
    node: NodePublic,
    rng: StdRng,
    timing: Timing,
    mode: Mode,
    /// What our own NATs do.
    behaviour: Behaviour,
    /// The longest datagram of data; none if lengths are not probed.
    wanted: Option<usize>,
    /// The latest time that was passed in.
    now: Instant,
    sockets: Vec<(SocketId, Family)>,
    endpoints: Vec<SocketAddr>,
    endpoints_at: Option<Instant>,
    endpoints_asked: Option<Instant>,
    /// In boxes: a tree is half empty, and what is known of a peer is long.
    peers: BTreeMap<NodePublic, Box<Peer>>,
    /// Who has a disco key: one, but for shared nodes.
    by_disco: BTreeSet<(DiscoPublic, NodePublic)>,
    /// Whose an address is.
    owners: BTreeMap<Target, NodePublic>,
    user_pings: BTreeMap<PingId, UserPing>,
    next_ping: u64,
    timers: Timers,
    pace: Pace,
    /// Paths through peer relays.
    relay: Client,
    /// Who may ask us to relay.
    relay_clients: BTreeSet<NodePublic>,
    /// For binding at servers.
    server_boxes: BTreeMap<DiscoPublic, SharedBox>,
    guesser: Guesser,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
    counters: Counters,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("node", &self.node)
            .field("mode", &self.mode)
            .field("peers", &self.peers.len())
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// An agent for the node `node`, whose disco key is `disco`. All its random numbers come from `seed`.
    #[must_use]
    pub fn new(now: Instant, disco: DiscoPrivate, node: NodePublic, seed: [u8; 32]) -> Self {
        let (disco_public, mut rng) = (disco.public(), StdRng::from_seed(seed));
        let mut relay_seed = [0; 32];
        rng.fill_bytes(&mut relay_seed);
        Self {
            guesser: Guesser::new(rng.random()),
            relay: Client::new(now, node, disco_public, relay_seed),
            relay_clients: BTreeSet::new(),
            server_boxes: BTreeMap::new(),
            disco_public,
            disco,
            node,
            rng,
            timing: Timing::default(),
            mode: Mode::Auto,
            behaviour: Behaviour::default(),
            wanted: None,
            now,
            sockets: Vec::new(),
            endpoints: Vec::new(),
            endpoints_at: None,
            endpoints_asked: None,
            peers: BTreeMap::new(),
            by_disco: BTreeSet::new(),
            owners: BTreeMap::new(),
            user_pings: BTreeMap::new(),
            next_ping: 0,
            timers: Timers::new(),
            pace: Pace::new(now),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// The same agent with other timing.
    #[must_use]
    pub const fn with_timing(mut self, timing: Timing) -> Self {
        self.timing = timing;
        self
    }

    // Commands

    /// Our own node key has changed (it rotates when the owner signs in again); pings name the new one from now on.
    pub const fn set_node(&mut self, node: NodePublic) {
        self.node = node;
        self.relay.set_node(node);
    }

    /// Adds a peer or changes what is known about it. A changed disco key means that it has restarted: what was proven
    /// about its paths no longer counts, and all of them are tried anew if there has been traffic.
    pub fn set_peer(&mut self, now: Instant, config: PeerConfig) {
        self.tick(now);
        let node = config.node;
        let old_disco = self.peers.get(&node).map(|peer| peer.disco);
        if let Some(old) = old_disco
            && old != config.disco
        {
            self.by_disco.remove(&(old, node));
        }
        if !config.disco.is_zero() {
            self.by_disco.insert((config.disco, node));
        }
        let peer = self.peers.entry(node).or_insert_with(|| Box::new(Peer::new(now, config.disco)));
        let restarted = peer.disco != config.disco && !peer.disco.is_zero() && !config.disco.is_zero();
        if peer.disco != config.disco {
            peer.disco = config.disco;
            peer.shared = None;
        }
        peer.home = config.home;
        // Control may not say; the peer itself may have.
        if config.behaviour != Behaviour::default() {
            peer.behaviour = config.behaviour;
        }
        peer.ours = config.ours;
        let fresh = peer.set_listed(now, &self.sockets, config.endpoints.into_boxed_slice(), &mut self.counters);
        let engaged = peer.engaged(now, &self.timing);
        if restarted {
            self.restarted(node);
            return;
        }
        self.reselect(node);
        if engaged && self.mode != Mode::Relay {
            for target in fresh {
                self.probe_within_budget(node, target, search::Repeat::Yes);
            }
        }
    }

    /// Forgets a peer. Its user pings fail.
    pub fn remove_peer(&mut self, node: &NodePublic) {
        let Some(peer) = self.peers.remove(node) else { return };
        self.by_disco.remove(&(peer.disco, *node));
        self.relay.remove_peer(node);
        self.owners.retain(|_, owner| owner != node);
        let pings: Vec<_> = self.user_pings.iter().filter(|(_, ping)| ping.peer == *node).map(|(id, _)| *id).collect();
        for id in pings {
            self.user_pings.remove(&id);
            self.timers.clear(Timer::UserPing(id));
            self.events.push_back(Event::PingFailed { id, peer: *node });
        }
        self.timers.clear_peer(node);
        self.guesses_dropped(node);
    }

    /// We have sent data to `peer` lately. Call it at least every few seconds while that is so; more often is harmless.
    pub fn traffic(&mut self, now: Instant, peer: &NodePublic) {
        self.tick(now);
        self.end_silence(*peer);
        let Some(state) = self.peers.get_mut(peer) else { return };
        if !within(state.sent, now, STEADY) {
            state.flowing = Some(now);
        }
        state.sent = Some(now);
        if self.mode == Mode::Relay || self.sockets.is_empty() {
            return;
        }
        let (searching, probing) = (state.best.is_none(), self.wanted.is_some() && state.udp_path(self.mode).is_some());
        self.relay_traffic(*peer);
        self.timers.set_by(Timer::Heartbeat(*peer), now + self.timing.heartbeat);
        self.arm_endpoints();
        if searching {
            self.search(*peer, search::Urgency::Routine);
        }
        if probing {
            self.timers.set_if_absent(Timer::Mtu(*peer), now);
        }
    }

    /// Learns that `peer` was heard through the relay of `region`: the way of last resort to a peer without a home.
    pub fn heard_by_relay(&mut self, peer: &NodePublic, region: RegionId) {
        if let Some(state) = self.peers.get_mut(peer)
            && state.heard.replace(region) != Some(region)
        {
            self.refresh(*peer);
        }
    }

    /// Pings `peer` for a user: along the direct path if there is one, else through its relay, searching for a direct
    /// one at the same time. Where there is neither, the first address that answers the search answers the ping. `size`
    /// pads the datagram to that many bytes, at least 124 and at most 9,000.
    ///
    /// Ends with [`Event::PingAnswered`], or after 5 s with [`Event::PingFailed`].
    pub fn ping(&mut self, now: Instant, peer: &NodePublic, size: Option<usize>) -> PingId {
        self.tick(now);
        let id = PingId(self.next_ping);
        self.next_ping += 1;
        let usable = self.peers.get(peer).is_some_and(|state| !state.disco.is_zero());
        if !usable || self.user_pings.len() >= MAX_USER_PINGS {
            self.events.push_back(Event::PingFailed { id, peer: *peer });
            return id;
        }
        let path = self.path(peer);
        self.user_pings.insert(id, UserPing { peer: *peer, any: path.is_none() });
        self.timers.set(Timer::UserPing(id), now + self.timing.ping_timeout);
        if let Some(path) = path {
            self.send_ping(*peer, path, Some(id), size.unwrap_or(0));
        }
        self.traffic(now, peer);
        id
    }

    /// The longest datagram of data that will be sent, in bytes. Paths in use are probed whether they carry it, direct ones
    /// and those through peer relays, and [`Event::LimitChanged`] tells of those that do not. Without it, nothing is probed.
    pub fn set_wanted_length(&mut self, now: Instant, wanted: Option<usize>) {
        self.tick(now);
        if wanted == self.wanted {
            return;
        }
        self.wanted = wanted;
        for peer in self.peers.values_mut() {
            peer.candidates.values_mut().for_each(|candidate| candidate.limit = None);
            peer.relayed.iter_mut().for_each(relay::Relayed::forget_limit);
        }
        for node in self.peers.keys().copied().collect::<Vec<_>>() {
            self.length_of_another_path(node);
        }
    }

    // Inputs

    /// Does whatever is due at `now`. Calling early, late or twice is harmless.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.tick(now);
        while let Some(timer) = self.timers.pop_due(self.now) {
            match timer {
                Timer::Heartbeat(node) => self.heartbeat(node),
                Timer::Retry(node) => self.retry(node),
                Timer::Again(node) => self.again(node),
                Timer::Pace => self.pace_due(),
                Timer::Trust(node) => self.lost(node),
                Timer::Flight(node) => self.flight_due(node),
                Timer::UserPing(id) => {
                    if let Some(ping) = self.user_pings.remove(&id) {
                        self.events.push_back(Event::PingFailed { id, peer: ping.peer });
                    }
                }
                Timer::Endpoints => self.endpoints_due(),
                Timer::Mtu(node) => self.length_due(node),
                Timer::Guess => self.guesses_due(),
            }
        }
        self.relay.handle_timeout(self.now);
    }

    // Outputs

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.drain_relay();
        self.transmits.pop_front()
    }

    /// The next fact to know.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.drain_relay();
        self.events.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.next().into_iter().chain(self.relay.poll_timeout()).min()
    }

    // Time never runs backwards in here, whatever the caller's clocks do.
    fn tick(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    /// Who has this disco key, in key order.
    fn holders(&self, disco: DiscoPublic) -> Vec<NodePublic> {
        let from = (disco, NodePublic::from_bytes([0; 32]));
        self.by_disco.range(from..).take_while(|(held, _)| *held == disco).map(|(_, node)| *node).collect()
    }

    fn engaged_peers(&self) -> Vec<NodePublic> {
        let engaged = |peer: &Peer| peer.engaged(self.now, &self.timing);
        self.peers.iter().filter(|(_, peer)| engaged(peer)).map(|(node, _)| *node).collect()
    }

    /// Chooses the direct path anew after something about the peer's candidates has changed.
    fn reselect(&mut self, node: NodePublic) {
        let (now, timing, mode) = (self.now, self.timing, self.mode);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let best = match mode {
            Mode::Relay => None,
            Mode::Auto | Mode::Direct => peer.choose(now, &timing),
        };
        if best != peer.best {
            if peer.best.is_some() && best.is_some() {
                peer.switched = Some(now);
            }
            peer.best = best;
            peer.doubt = Doubt::default();
            self.timers.clear(Timer::Retry(node));
            self.length_of_another_path(node);
        }
        let Some(peer) = self.peers.get_mut(&node) else { return };
        peer.pulse.follow(best);
        match best.and_then(|target| peer.candidates.get(&target)?.proven) {
            Some(proven) => self.timers.set(Timer::Trust(node), proven + peer.trust(&timing)),
            None => self.timers.clear(Timer::Trust(node)),
        }
        self.refresh(node);
    }

    /// Tells the caller if data goes elsewhere now.
    fn refresh(&mut self, node: NodePublic) {
        let (now, mode) = (self.now, self.mode);
        let Some(why) = self.peers.get(&node).map(|peer| self.why(&node, peer)) else { return };
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let path = peer.path(mode);
        if path != peer.published {
            peer.published = path;
            peer.since = now;
            self.events.push_back(Event::PathChanged { peer: node, path, why });
            if self.peers.get(&node).is_some_and(|peer| peer.active(now, &self.timing)) {
                self.relay_traffic(node);
            }
            self.tell_guesser(&node, path);
        }
        self.tell_backup(node);
        self.tell_limit(node);
    }
}
