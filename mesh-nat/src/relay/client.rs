//! The asking side: finds relays for peers without a direct path, binds to them, and keeps what works alive.
//!
//! It speaks in messages; whoever owns the disco key seals and opens them. For each peer:
//!
//! ```text
//!           traffic without a direct path
//!   idle ─────────────────────────────────► asking every server at once (again after 3 s, given up after 10 s)
//!                                               │ response, or the peer's call-me-maybe-via
//!                                               ▼
//!                                           binding: bind to all addresses, answer the first challenge, ping
//!                                               │ pong
//!                                               ▼
//!   asking again ◄───────────────────────── path: pinged every 3 s in use, every 25 s behind a direct path;
//!    (unanswered, or 60 s old)                     bound again when our own network changes
//! ```
//!
//! The first look is delayed a little, for most peers turn out to be direct; when a direct path is lost there is no delay.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_noise::key::{DiscoPublic, NodePublic};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_core::Rng;

use crate::disco::message::{AllocateRequest, AllocateResponse, Message, RelayEndpoint, TxId};
use crate::path::Vni;
use crate::path::probe::Budget;
use crate::timer::TimerTable;

mod binding;
mod keep;
#[cfg(test)]
mod tests;

use binding::Handshake;
use keep::Relayed;

/// How often things are done. The defaults are those of deployed peers where they have any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timing {
    /// How long a direct path may take before relays are looked for. 400 ms.
    pub patience: Duration,
    /// The least time between two looks without a path. 30 s.
    pub again: Duration,
    /// Between two looks for a better relay than the one in use. 60 s.
    pub upgrade: Duration,
    /// Until an unanswered request is repeated. 3 s.
    pub resend: Duration,
    /// Until a request is given up. 10 s.
    pub give_up: Duration,
    /// Until binds, answers and pings of a handshake are repeated for the first time; then twice as long. 500 ms.
    pub rebind: Duration,
    /// The longest handshake. 30 s.
    pub handshake: Duration,
    /// Between pings of a path in use. 3 s.
    pub heartbeat: Duration,
    /// Between pings of a path behind a direct one, so that NATs on the way remember it. 25 s.
    pub warm: Duration,
    /// How long a pong proves a path. 6.5 s.
    pub trust: Duration,
    /// How long a peer counts as active after traffic. 45 s.
    pub active: Duration,
    /// The least wait before an unanswered heartbeat is repeated. 400 ms.
    pub retry: Duration,
    /// Repetitions before a path is given up. 3.
    pub retries: u8,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            patience: Duration::from_millis(400),
            again: Duration::from_secs(30),
            upgrade: Duration::from_secs(60),
            resend: Duration::from_secs(3),
            give_up: Duration::from_secs(10),
            rebind: Duration::from_millis(500),
            handshake: Duration::from_secs(30),
            heartbeat: Duration::from_secs(3),
            warm: Duration::from_secs(25),
            trust: Duration::from_millis(6500),
            active: Duration::from_secs(45),
            retry: Duration::from_millis(400),
            retries: 3,
        }
    }
}

/// Where a peer is reached through a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The server's address.
    pub server: SocketAddr,
    /// The pair's number there.
    pub vni: Vni,
}

/// What the owner should do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Output {
    /// Seal this for a node and send it through the node's region.
    Signal {
        /// A server, or the peer.
        to: NodePublic,
        /// The message.
        message: Message,
    },
    /// We are a server ourselves: allocate, and call [`Client::allocated`].
    Allocate(AllocateRequest),
    /// Seal this for a server and send it there, control bit set.
    Control {
        /// The server's disco key.
        key: DiscoPublic,
        /// Where to.
        place: Place,
        /// The message.
        message: Message,
    },
    /// Ping a peer through a relay, and call [`Client::pong`] with the answer's transaction.
    Ping {
        /// The peer.
        peer: NodePublic,
        /// Through where.
        place: Place,
        /// Names the ping.
        tx: TxId,
    },
    /// The peer can be reached there from now on, or not through any relay.
    Path {
        /// The peer.
        peer: NodePublic,
        /// The way.
        place: Option<Place>,
    },
    /// The way last told may have stopped working: a region should carry copies of everything until this comes again with
    /// `false`, or another [`Output::Path`].
    Doubt {
        /// The peer.
        peer: NodePublic,
        /// Whether it is in doubt.
        doubted: bool,
    },
}

/// What is known of a path through a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Where.
    pub place: Place,
    /// Smoothed round trip to the peer.
    pub latency: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// Begin to look.
    Look(NodePublic),
    /// Repeat or give up the request to the second.
    Request(NodePublic, NodePublic),
    /// Repeat or give up the handshake with the second.
    Handshake(NodePublic, DiscoPublic),
    /// Ping the path.
    Keep(NodePublic),
    /// The path is not proven any more.
    Trust(NodePublic),
    /// There may be nothing left to remember.
    Idle(NodePublic),
}

/// A request under way.
#[derive(Debug, Clone, Copy)]
struct Request {
    generation: u32,
    sent: Instant,
    repeated: bool,
}

#[derive(Debug)]
struct Peer {
    disco: DiscoPublic,
    /// When we last had something for it.
    sent: Instant,
    /// Whether that went by a direct path.
    direct: bool,
    looked: Option<Instant>,
    requests: BTreeMap<NodePublic, Request>,
    /// By the server's disco key.
    handshakes: BTreeMap<DiscoPublic, Handshake>,
    path: Option<Relayed>,
    /// What the owner has been told: where the path is, and whether that is in doubt.
    told: Option<Place>,
    doubted: bool,
    /// For what the peer makes us send.
    budget: Budget,
}

/// Outputs that wait to be polled; more are dropped.
const MAX_OUTPUTS: usize = 8192;
/// Servers asked for one peer.
const MAX_SERVERS: usize = 32;

/// One node's paths through peer relays, for all its peers.
#[derive(Debug)]
pub struct Client {
    node: NodePublic,
    disco: DiscoPublic,
    timing: Timing,
    rng: StdRng,
    now: Instant,
    servers: BTreeSet<NodePublic>,
    generation: u32,
    peers: BTreeMap<NodePublic, Peer>,
    timers: TimerTable<Timer>,
    outputs: VecDeque<Output>,
}

impl Client {
    /// For the node with these keys. All its random numbers come from `seed`.
    #[must_use]
    pub fn new(now: Instant, node: NodePublic, disco: DiscoPublic, seed: [u8; 32]) -> Self {
        let mut rng = StdRng::from_seed(seed);
        Self {
            node,
            disco,
            timing: Timing::default(),
            // Not zero, and different after a restart: servers remember what came before.
            generation: rng.next_u32() | 1,
            rng,
            now,
            servers: BTreeSet::new(),
            peers: BTreeMap::new(),
            timers: TimerTable::new(),
            outputs: VecDeque::new(),
        }
    }

    /// The same with other timing.
    #[must_use]
    pub const fn with_timing(mut self, timing: Timing) -> Self {
        self.timing = timing;
        self
    }

    // Commands

    /// Our own node key has changed.
    pub const fn set_node(&mut self, node: NodePublic) {
        self.node = node;
    }

    /// Which nodes may be asked for relaying; we ourselves may be one. Paths through others last while they work.
    pub fn set_servers(&mut self, servers: BTreeSet<NodePublic>) {
        self.servers = servers;
    }

    /// Forgets a peer, or everything about it after its disco key has changed.
    pub fn remove_peer(&mut self, peer: &NodePublic) {
        let Some(state) = self.peers.remove(peer) else { return };
        state.requests.keys().for_each(|server| self.timers.clear(Timer::Request(*peer, *server)));
        state.handshakes.keys().for_each(|server| self.timers.clear(Timer::Handshake(*peer, *server)));
        for timer in [Timer::Look(*peer), Timer::Keep(*peer), Timer::Trust(*peer), Timer::Idle(*peer)] {
            self.timers.clear(timer);
        }
        if state.told.is_some() {
            self.outputs.push_back(Output::Path { peer: *peer, place: None });
        }
    }

    /// Relays cannot or may not be used any more: nothing that was found holds. After a change of network,
    /// [`Self::rebind`].
    pub fn forget(&mut self) {
        for peer in self.peers.keys().copied().collect::<Vec<_>>() {
            self.remove_peer(&peer);
        }
    }

    /// We have something for `peer`, whose disco key is `disco`, and it goes by a direct path or does not. Call it as
    /// often as every few seconds while that is so; more often is harmless.
    pub fn traffic(&mut self, now: Instant, peer: NodePublic, disco: DiscoPublic, direct: bool) {
        self.tick(now);
        if self.peers.get(&peer).is_some_and(|state| state.disco != disco) {
            self.remove_peer(&peer);
        }
        if !self.peers.contains_key(&peer) && (direct || self.servers.is_empty()) {
            return;
        }
        let (now, timing) = (self.now, self.timing);
        let state = self.peers.entry(peer).or_insert_with(|| Peer::new(now, disco));
        let fell_back = state.direct && !direct;
        state.sent = now;
        state.direct = direct;
        if state.path.is_some() {
            // A warm path may be used again as soon as it answers.
            let due = if fell_back { now } else { now + if direct { timing.warm } else { timing.heartbeat } };
            if fell_back || !self.timers.is_set(Timer::Keep(peer)) {
                self.timers.set(Timer::Keep(peer), due);
            }
        }
        if direct {
            self.timers.clear(Timer::Look(peer));
            return self.tidy(peer);
        }
        let pause = if state.is_proven(now, &timing) { timing.upgrade } else { timing.again };
        let due = match state.looked {
            None if fell_back => now,
            None => now + timing.patience,
            Some(looked) => (looked + pause).max(now),
        };
        if fell_back {
            self.timers.set(Timer::Look(peer), due);
        }
        self.timers.set_if_absent(Timer::Look(peer), due);
    }

    // Inputs

    /// `server` has answered a request.
    pub fn response(&mut self, now: Instant, server: NodePublic, response: AllocateResponse) {
        self.tick(now);
        let [first, second] = response.endpoint.clients;
        let other = if first == self.disco { second } else { first };
        let asked = |state: &Peer| {
            state.disco == other
                && state.requests.get(&server).is_some_and(|request| request.generation == response.generation)
        };
        let Some(peer) = self.peers.iter().find(|(_, state)| asked(state)).map(|(peer, _)| *peer) else { return };
        if self.is_ours(&peer, &response.endpoint) {
            self.end_request(peer, server);
            self.found(peer, response.endpoint, Origin::Asked);
        }
    }

    /// What came of [`Output::Allocate`].
    pub fn allocated(&mut self, now: Instant, response: AllocateResponse) {
        self.response(now, self.node, response);
    }

    /// `peer`, whose disco key is `disco`, has an allocation for us both.
    pub fn via(&mut self, now: Instant, peer: NodePublic, disco: DiscoPublic, endpoint: RelayEndpoint) {
        self.tick(now);
        if self.peers.get(&peer).is_some_and(|state| state.disco != disco) {
            self.remove_peer(&peer);
        }
        let now = self.now;
        let state = self.peers.entry(peer).or_insert_with(|| Peer::new(now, disco));
        if state.budget.take(now) && self.is_ours(&peer, &endpoint) {
            self.found(peer, endpoint, Origin::Told);
        }
        self.tidy(peer);
    }

    /// Does whatever is due. Calling early, late or twice is harmless.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.tick(now);
        while let Some(timer) = self.timers.pop_due(self.now) {
            match timer {
                Timer::Look(peer) => self.look(peer),
                Timer::Request(peer, server) => self.request_due(peer, server),
                Timer::Handshake(peer, server) => self.handshake_due(peer, server),
                Timer::Keep(peer) => self.keep_due(peer),
                Timer::Trust(peer) => self.tell(peer),
                Timer::Idle(_) => {}
            }
            let (Timer::Look(peer)
            | Timer::Request(peer, _)
            | Timer::Handshake(peer, _)
            | Timer::Keep(peer)
            | Timer::Trust(peer)
            | Timer::Idle(peer)) = timer;
            self.tidy(peer);
        }
    }

    // Outputs

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    // Getters

    /// The proven path to `peer`.
    #[must_use]
    pub fn status(&self, peer: &NodePublic) -> Option<Status> {
        let state = self.peers.get(peer)?;
        let path = state.path.as_ref().filter(|path| path.is_proven(self.now, &self.timing))?;
        Some(Status { place: path.place, latency: path.round_trip.smoothed() })
    }

    /// How many peers there is anything to remember about.
    #[must_use]
    pub fn peers(&self) -> usize {
        self.peers.len()
    }

    fn tick(&mut self, now: Instant) {
        self.now = self.now.max(now);
    }

    fn push(&mut self, output: Output) {
        if self.outputs.len() < MAX_OUTPUTS {
            self.outputs.push_back(output);
        }
    }

    fn next_generation(&mut self) -> u32 {
        self.generation = self.generation.wrapping_add(1).max(1);
        self.generation
    }

    fn is_ours(&self, peer: &NodePublic, endpoint: &RelayEndpoint) -> bool {
        let Some(state) = self.peers.get(peer) else { return false };
        let pair = [self.disco, state.disco];
        let swapped = [state.disco, self.disco];
        (endpoint.clients == pair || endpoint.clients == swapped) && !endpoint.server.is_zero()
    }

    /// Asks all servers, unless the peer has become direct or quiet.
    fn look(&mut self, peer: NodePublic) {
        let (now, timing) = (self.now, self.timing);
        let Some(state) = self.peers.get_mut(&peer) else { return };
        if state.direct || !state.is_active(now, &timing) {
            return;
        }
        state.looked = Some(now);
        for server in self.servers.iter().copied().take(MAX_SERVERS).collect::<Vec<_>>() {
            let generation = self.next_generation();
            let Some(state) = self.peers.get_mut(&peer) else { return };
            state.requests.insert(server, Request { generation, sent: now, repeated: false });
            self.timers.set(Timer::Request(peer, server), now + timing.resend);
            self.ask(peer, server, generation);
        }
    }

    fn ask(&mut self, peer: NodePublic, server: NodePublic, generation: u32) {
        let Some(other) = self.peers.get(&peer).map(|state| state.disco) else { return };
        let clients = [self.disco.min(other), self.disco.max(other)];
        let request = AllocateRequest { clients, generation };
        self.push(if server == self.node {
            Output::Allocate(request)
        } else {
            Output::Signal { to: server, message: Message::AllocateRequest(request) }
        });
    }

    fn request_due(&mut self, peer: NodePublic, server: NodePublic) {
        let (now, timing) = (self.now, self.timing);
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let Some(request) = state.requests.get_mut(&server) else { return };
        if request.repeated {
            return self.end_request(peer, server);
        }
        request.repeated = true;
        let generation = request.generation;
        let end = (request.sent + timing.give_up).max(now + timing.resend);
        self.timers.set(Timer::Request(peer, server), end);
        self.ask(peer, server, generation);
    }

    fn end_request(&mut self, peer: NodePublic, server: NodePublic) {
        self.timers.clear(Timer::Request(peer, server));
        if let Some(state) = self.peers.get_mut(&peer) {
            state.requests.remove(&server);
        }
    }

    /// Drops what is known of a peer when there is nothing left to do or to remember.
    fn tidy(&mut self, peer: NodePublic) {
        let (now, timing) = (self.now, self.timing);
        let Some(state) = self.peers.get(&peer) else { return };
        if state.path.is_some() || !state.requests.is_empty() || !state.handshakes.is_empty() {
            return;
        }
        if state.direct || !state.is_active(now, &timing) {
            self.remove_peer(&peer);
        } else {
            let end = state.sent + timing.active;
            self.timers.set(Timer::Idle(peer), end);
        }
    }
}

/// How we learnt of an allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// We have asked for it.
    Asked,
    /// The peer says so.
    Told,
}

impl Peer {
    fn new(now: Instant, disco: DiscoPublic) -> Self {
        Self {
            disco,
            sent: now,
            direct: false,
            looked: None,
            requests: BTreeMap::new(),
            handshakes: BTreeMap::new(),
            path: None,
            told: None,
            doubted: false,
            budget: Budget::full(now),
        }
    }

    fn is_active(&self, now: Instant, timing: &Timing) -> bool {
        now.saturating_duration_since(self.sent) < timing.active
    }

    fn is_proven(&self, now: Instant, timing: &Timing) -> bool {
        self.path.as_ref().is_some_and(|path| path.is_proven(now, timing))
    }
}
