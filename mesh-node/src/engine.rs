//! The engine: every decision of a node, without I/O.
//!
//! It composes the cores below it (WireGuard handshakes, path discovery, network measurement) with the network map and
//! follows the same contract as they do: time and bytes in, transmissions, commands, events and the next deadline out.
//! A hundred engines run in one thread of a simulation exactly as they run in production.
//!
//! ```text
//!  netmap ───────►┌──────────────────────────────┐──► transmissions: UDP datagrams and relay frames
//!  datagrams ────►│ engine                       │──► commands: peers, sessions, paths, filter → data plane
//!  (not data)     │  Interface   handshakes      │              endpoints, home region     → control
//!  data-plane     │  Agent       paths           │              regions                    → relay connections
//!  notices ──────►│  Netcheck    reflexive       │──► events: pongs, path changes, measurements
//!  ticks ────────►│              addresses, home │──► poll_timeout: when to call again
//!                 └──────────────────────────────┘
//! ```
//!
//! Transport data never comes here: the data plane seals and opens it with the sessions that the engine hands out, and
//! writes down what it did in the sessions' activity words, which the engine reads once a second while sessions exist.
//!
//! A handshake message takes the peer's current path: direct if path discovery has validated one, its home relay
//! otherwise. Paths are learned from validated disco probes only, never from WireGuard messages.

mod endpoints;
mod map;
mod relays;
mod settle;
#[cfg(test)]
pub(crate) mod tests;

pub use endpoints::{Endpoint, EndpointKind, Local, LocalAddress, gather};
pub use map::{MapView, PeerView};
pub use relays::RelayPlan;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_derp::map::{DerpMap, RegionId};
use mesh_nat::agent::{self, Agent, PingId};
use mesh_nat::report::{Netcheck, Report, Scope, fallback_home};
use mesh_nat::{Class, Family, Path, classify};
use mesh_noise::key::{DiscoPrivate, DiscoPublic, NodePrivate, NodePublic, PresharedKey};
use mesh_noise::wireguard::{self, Interface, Session, Timing};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_core::Rng;

use crate::prefs::PathMode;

/// How often activity words are read while sessions exist.
const ACTIVITY_INTERVAL: Duration = Duration::from_secs(1);

/// How long after the last packet a node counts as active: so long its addresses are kept fresh.
const ACTIVE: Duration = Duration::from_secs(45);
/// The least time between two measurements of an active node, below the 30 seconds after which NATs forget.
const MEASURE_AFTER: Duration = Duration::from_secs(20);
/// The most that is added to it.
const MEASURE_JITTER_MS: u64 = 6000;

/// What an engine starts with.
#[derive(Debug)]
pub struct Config {
    /// The node key.
    pub private: NodePrivate,
    /// The disco key, new at every start.
    pub disco: DiscoPrivate,
    /// Randomness for everything below.
    pub seed: [u8; 32],
    /// Where the activity clock counts from; the data plane's clock has the same start.
    pub epoch: Instant,
    /// The wall clock at `epoch`; handshakes carry it.
    pub wall: SystemTime,
    /// Which paths may be used.
    pub mode: PathMode,
    /// Endpoints set by the user, told to peers as they are.
    pub static_endpoints: Vec<SocketAddr>,
    /// WireGuard's timers.
    pub timing: Timing,
}

/// Where a datagram came from, and where an answer goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// The way.
    pub path: Path,
    /// Who stands at the other end of a relay.
    pub node: Option<NodePublic>,
}

/// A datagram to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// The way; for a relay, [`node`](Self::node) says to whom.
    pub path: Path,
    /// The receiver, if known.
    pub node: Option<NodePublic>,
    /// The datagram.
    pub datagram: Vec<u8>,
}

/// What control should be told about this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Announcement {
    /// Where we may be reached.
    pub endpoints: Vec<Endpoint>,
    /// Our home region.
    pub home: Option<RegionId>,
    /// The network as measured; its latencies are those of the time when anything else changed.
    pub report: Option<Box<Report>>,
}

impl Announcement {
    /// Whether control should hear of the difference: latencies alone are not worth a message.
    fn differs(&self, other: &Self) -> bool {
        let network = |report: &Option<Box<Report>>| {
            report.as_ref().map(|report| (report.udp, report.ipv4, report.ipv6, report.mapping_varies_by_dest_ip))
        };
        self.endpoints != other.endpoints || self.home != other.home || network(&self.report) != network(&other.report)
    }
}

/// What others should do.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Command {
    /// Data plane: a peer has been added, or what is routed to it has changed.
    SetPeer(Box<PeerView>),
    /// Data plane: a peer is gone, with its sessions.
    RemovePeer(NodePublic),
    /// Data plane: packets to the peer go this way.
    SetPath(NodePublic, Option<Path>),
    /// Data plane: packets of this session may arrive.
    OpenSession(Arc<Session>),
    /// Data plane: packets to the session's peer are sealed with this one.
    UseSession(Arc<Session>),
    /// Data plane: the session with this receiver index is over.
    CloseSession(NodePublic, u32),
    /// Data plane: the filter and our own addresses are now those of this map.
    Configure(Arc<MapView>),
    /// Relay connections that should exist.
    Relays(RelayPlan),
    /// Relays: the map that says where they are.
    Regions(Arc<DerpMap>),
    /// Control: tell it this.
    Announce(Announcement),
    /// Measure this region over HTTPS, for UDP brings no answer, and call [`Engine::https_latency`].
    MeasureHttps(RegionId),
    /// Look this host up and call [`Engine::resolved`].
    Resolve(String),
    /// Data plane: give up the packets that wait for a session with this peer.
    GiveUp(NodePublic),
}

/// What a user may want to know.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// Packets to the peer take another way.
    PathChanged {
        /// The peer.
        peer: NodePublic,
        /// The way; none if the peer cannot be reached.
        path: Option<Path>,
    },
    /// A probe asked for with [`Engine::ping`] was answered.
    PingAnswered {
        /// Which one.
        id: PingId,
        /// The way that it took.
        path: Path,
        /// The round trip.
        latency: Duration,
    },
    /// A probe asked for with [`Engine::ping`] was lost.
    PingFailed {
        /// Which one.
        id: PingId,
    },
    /// A peer has not answered handshakes for 90 seconds.
    PeerSilent {
        /// The peer.
        peer: NodePublic,
    },
    /// A measurement of the network has ended.
    Measured(Box<Report>),
}

/// What the engine knows about a peer, for status displays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerReport {
    /// Where packets to it go.
    pub path: Option<Path>,
    /// When the current session was agreed.
    pub last_handshake: Option<Instant>,
}

#[derive(Debug)]
struct Peer {
    view: PeerView,
    /// The last path told to the data plane.
    path: Option<Path>,
    /// The region from which it has spoken to us; used while its home is unknown.
    heard_at: Option<RegionId>,
    last_handshake: Option<Instant>,
    /// Receiver indices of live sessions.
    sessions: Vec<u32>,
    /// Milliseconds of the activity clock when data was last seen to be sent.
    last_sent: u64,
}

/// One node's decisions. See the [module documentation](self).
#[derive(Debug)]
pub struct Engine {
    me: NodePublic,
    disco: DiscoPublic,
    interface: Interface<Hop>,
    agent: Agent,
    netcheck: Netcheck,
    mode: PathMode,
    static_endpoints: Vec<SocketAddr>,
    local: Local,
    map: Arc<MapView>,
    peers: BTreeMap<NodePublic, Peer>,
    relays: relays::Relays,
    report: Option<Box<Report>>,
    announced: Announcement,
    /// Whether what goes into an announcement may have changed.
    announce: bool,
    /// Peers whose path may have changed.
    moved: BTreeSet<NodePublic>,
    live_sessions: usize,
    control_connected: bool,
    next_activity: Option<Instant>,
    next_measure: Option<Instant>,
    last_active: Option<Instant>,
    measure_again: bool,
    rng: StdRng,
    transmits: VecDeque<Transmit>,
    commands: VecDeque<Command>,
    events: VecDeque<Event>,
    unroutable: u64,
}

impl Engine {
    /// An engine without peers.
    #[must_use]
    pub fn new(now: Instant, config: Config) -> Self {
        let me = config.private.public();
        let disco = config.disco.public();
        let seeds = Seeds::split(config.seed);
        let mut agent = Agent::new(now, config.disco, me, seeds.agent);
        agent.set_mode(config.mode.into());
        let interface =
            Interface::new(config.epoch, config.wall, &config.private, seeds.interface).with_timing(config.timing);
        Self {
            me,
            disco,
            interface,
            agent,
            netcheck: Netcheck::new(seeds.netcheck),
            mode: config.mode,
            static_endpoints: config.static_endpoints,
            local: Local::default(),
            map: Arc::default(),
            peers: BTreeMap::new(),
            relays: relays::Relays::default(),
            report: None,
            announced: Announcement::default(),
            announce: false,
            moved: BTreeSet::new(),
            live_sessions: 0,
            control_connected: false,
            next_activity: None,
            next_measure: None,
            last_active: None,
            measure_again: false,
            rng: StdRng::from_seed(seeds.engine),
            transmits: VecDeque::new(),
            commands: VecDeque::new(),
            events: VecDeque::new(),
            unroutable: 0,
        }
    }

    // --- what is -----------------------------------------------------------------------------------------------------

    /// Our node key.
    #[must_use]
    pub fn node_key(&self) -> NodePublic {
        self.me
    }

    /// Our disco key.
    #[must_use]
    pub fn disco_key(&self) -> DiscoPublic {
        self.disco
    }

    /// Our home region, once one has been chosen.
    #[must_use]
    pub fn home(&self) -> Option<RegionId> {
        self.relays.home()
    }

    /// Whether the home relay is connected.
    #[must_use]
    pub fn home_connected(&self) -> bool {
        self.relays.home().is_some_and(|home| self.relays.is_connected(home))
    }

    /// Where we may be reached.
    #[must_use]
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.announced.endpoints
    }

    /// The last measurement of the network.
    #[must_use]
    pub fn report(&self) -> Option<&Report> {
        self.report.as_deref()
    }

    /// What is known about `peer`.
    #[must_use]
    pub fn peer(&self, peer: &NodePublic) -> Option<PeerReport> {
        let known = self.peers.get(peer)?;
        Some(PeerReport { path: self.current_path(peer), last_handshake: known.last_handshake })
    }

    /// Datagrams that could not be sent for want of any path.
    #[must_use]
    pub fn unroutable(&self) -> u64 {
        self.unroutable
    }

    // --- what happens ------------------------------------------------------------------------------------------------

    /// Takes a new network map.
    pub fn set_map(&mut self, now: Instant, map: Arc<MapView>) {
        let former = std::mem::replace(&mut self.map, map);
        let gone: Vec<NodePublic> =
            self.peers.keys().filter(|key| !self.map.peers.contains_key(key)).copied().collect();
        for peer in gone {
            self.remove_peer(now, &peer);
        }
        let map = Arc::clone(&self.map);
        for (key, view) in &map.peers {
            if self.peers.get(key).is_none_or(|known| known.view != *view) {
                self.set_peer(now, view.clone());
            }
        }
        if former.derp != self.map.derp {
            self.set_regions(now);
        }
        let rerouted = !former.routes().eq(self.map.routes());
        if rerouted || former.filter != self.map.filter || former.addresses != self.map.addresses {
            self.commands.push_back(Command::Configure(Arc::clone(&self.map)));
        }
        self.settle(now);
    }

    /// Takes a datagram that is not transport data. Whatever cannot be used is counted by the core that refused it.
    #[expect(clippy::wildcard_enum_match_arm, reason = "peer relays, and classes to come, are not for us yet")]
    pub fn handle_datagram(&mut self, now: Instant, from: &Hop, datagram: &[u8]) {
        let source = match from.path {
            Path::Direct { remote, .. } => Some(remote),
            Path::PeerRelay { .. } | Path::Relay { .. } => None,
        };
        if let Path::Relay { region } = from.path {
            self.netcheck.heard_by_relay(now, region);
        }
        let outcome = match classify(datagram) {
            Class::Stun => self.netcheck.handle_datagram(now, datagram).map_err(|reject| reject.to_string()),
            Class::Disco => {
                let source = agent::Source { path: from.path, node: from.node };
                self.agent.handle_datagram(now, source, datagram).map_err(|reject| reject.to_string())
            }
            Class::WireGuard => {
                self.interface.handle_datagram(now, from, source, datagram).map_err(|reject| reject.to_string())
            }
            other => Err(format!("{other:?}")),
        };
        if let Err(reason) = outcome {
            tracing::trace!(path = %from.path, reason, "datagram refused");
        }
        self.settle(now);
    }

    /// The data plane has a packet for `peer` and no session to seal it with.
    pub fn want_session(&mut self, now: Instant, peer: &NodePublic) {
        if self.peers.contains_key(peer) {
            self.interface.want_session(now, peer);
            self.note_traffic(now, peer);
            self.note_relay_use(now, peer);
        }
        self.settle(now);
    }

    /// The data plane has opened the first packet of a session that the peer had asked for.
    pub fn session_used(&mut self, now: Instant, receiver_index: u32) {
        self.interface.session_used(now, receiver_index);
        self.settle(now);
    }

    /// The data plane has noted traffic that WireGuard's timers wait for.
    pub fn peer_active(&mut self, now: Instant, peer: &NodePublic) {
        self.interface.peer_active(now, peer);
        self.settle(now);
    }

    /// The clock that activity words are written in, in milliseconds.
    #[must_use]
    pub fn clock_ms(&self, now: Instant) -> u64 {
        self.interface.clock_ms(now)
    }

    /// A relay connection has come up or gone down.
    pub fn set_relay_connected(&mut self, now: Instant, region: RegionId, connected: bool) {
        self.relays.set_connected(region, connected);
        self.settle(now);
    }

    /// The stream from control has come up or gone down. The home region stays while it is down: peers could not learn
    /// of a move.
    pub fn set_control_connected(&mut self, now: Instant, connected: bool) {
        self.control_connected = connected;
        self.settle(now);
    }

    /// The host's addresses or our sockets have changed.
    pub fn set_local(&mut self, now: Instant, local: Local, sockets: &[(mesh_nat::SocketId, SocketAddr)]) {
        if self.local != local {
            self.local = local;
            self.announce = true;
            let sockets: Vec<_> = sockets.iter().map(|(id, bound)| (*id, Family::of(bound))).collect();
            self.agent.set_sockets(sockets.clone());
            self.agent.rebind(now);
            self.netcheck.set_sockets(sockets);
            self.netcheck.forget_names();
            self.start_measuring(now, Scope::Full);
        }
        self.settle(now);
    }

    /// Chooses which paths may be used.
    pub fn set_mode(&mut self, now: Instant, mode: PathMode) {
        self.mode = mode;
        self.agent.set_mode(mode.into());
        self.moved.extend(self.peers.keys());
        self.settle(now);
    }

    /// Probes `peer` once, with a datagram of `size` bytes if given. [`Event::PingAnswered`] or
    /// [`Event::PingFailed`] follows. `None` if there is no such peer.
    pub fn ping(&mut self, now: Instant, peer: &NodePublic, size: Option<usize>) -> Option<PingId> {
        if !self.peers.contains_key(peer) {
            return None;
        }
        self.note_relay_use(now, peer);
        let id = self.agent.ping(now, peer, size);
        self.settle(now);
        Some(id)
    }

    /// Measures the network now; [`Event::Measured`] follows.
    pub fn measure(&mut self, now: Instant) {
        self.start_measuring(now, Scope::Full);
        self.settle(now);
    }

    /// A region's latency as measured over HTTPS, and the family that it was measured with.
    pub fn https_latency(&mut self, now: Instant, region: RegionId, measured: Option<(Duration, Family)>) {
        self.netcheck.handle_https_latency(now, region, measured);
        self.settle(now);
    }

    /// The addresses of a host that [`Command::Resolve`] has named.
    pub fn resolved(&mut self, now: Instant, host: &str, addresses: Vec<IpAddr>) {
        self.netcheck.handle_resolved(now, host, addresses);
        self.settle(now);
    }

    /// The coordinator has accepted another node key for us: all sessions end.
    pub fn set_private_key(&mut self, now: Instant, private: &NodePrivate) {
        self.me = private.public();
        self.interface.set_private_key(now, private);
        self.agent.set_node(self.me);
        self.settle(now);
    }

    /// Does whatever is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.interface.handle_timeout(now);
        self.agent.handle_timeout(now);
        self.netcheck.handle_timeout(now);
        self.relays.handle_timeout(now);
        if self.next_activity.is_some_and(|due| due <= now) {
            self.read_activity(now);
        }
        if self.next_measure.is_some_and(|due| due <= now) {
            self.next_measure = None;
            if self.is_active(now) {
                self.start_measuring(now, Scope::Auto);
            }
        }
        self.settle(now);
    }

    // --- what follows ------------------------------------------------------------------------------------------------

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next thing for others to do.
    pub fn poll_command(&mut self) -> Option<Command> {
        self.commands.pop_front()
    }

    /// The next thing that a user may want to know.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        [
            self.interface.poll_timeout(),
            self.agent.poll_timeout(),
            self.netcheck.poll_timeout(),
            self.relays.poll_timeout(),
            self.next_activity,
            self.next_measure,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    // --- peers -------------------------------------------------------------------------------------------------------

    fn set_peer(&mut self, now: Instant, view: PeerView) {
        let key = view.node;
        self.moved.insert(key);
        if self.peers.get(&key).is_none_or(|known| known.view.routing_differs(&view)) {
            self.commands.push_back(Command::SetPeer(Box::new(view.clone())));
        }
        if let Some(disco) = view.disco {
            let endpoints = view.endpoints.clone();
            self.agent.set_peer(now, agent::PeerConfig { node: key, disco, home: view.home, endpoints });
        } else {
            self.agent.remove_peer(&key);
        }
        if let Some(known) = self.peers.get_mut(&key) {
            known.view = view;
            return;
        }
        let config = wireguard::PeerConfig { preshared: PresharedKey::default(), persistent_keepalive: None };
        self.interface.set_peer(now, key, config);
        let peer = Peer { view, path: None, heard_at: None, last_handshake: None, sessions: Vec::new(), last_sent: 0 };
        self.peers.insert(key, peer);
    }

    fn remove_peer(&mut self, now: Instant, key: &NodePublic) {
        self.interface.remove_peer(key);
        self.agent.remove_peer(key);
        self.settle(now);
        if let Some(peer) = self.peers.remove(key) {
            self.live_sessions -= peer.sessions.len();
        }
        self.moved.remove(key);
        self.commands.push_back(Command::RemovePeer(*key));
    }

    /// Where packets to `peer` go now.
    fn current_path(&self, key: &NodePublic) -> Option<Path> {
        let peer = self.peers.get(key)?;
        let relay = || peer.view.home.or(peer.heard_at).map(|region| Path::Relay { region });
        let direct = || self.agent.path(key).filter(|path| !matches!(path, Path::Relay { .. }));
        match self.mode {
            PathMode::Auto => direct().or_else(relay),
            PathMode::Direct => direct(),
            PathMode::Relay => relay(),
        }
    }

    fn note_relay_use(&mut self, now: Instant, peer: &NodePublic) {
        if let Some(region) = self.peers.get(peer).and_then(|peer| peer.view.home.or(peer.heard_at)) {
            self.relays.note_use(now, region);
        }
    }

    /// We send to `peer`: its path is worth an effort, and so are our own addresses.
    fn note_traffic(&mut self, now: Instant, peer: &NodePublic) {
        self.agent.traffic(now, peer);
        self.last_active = Some(now);
        if self.next_measure.is_none() && !self.netcheck.is_running() {
            self.plan_measuring(now);
        }
    }

    /// Tells the agent who has been sent data since the last look, and the relay plan which regions it used.
    fn read_activity(&mut self, now: Instant) {
        let mut active = Vec::new();
        for (key, peer) in &mut self.peers {
            if peer.sessions.is_empty() {
                continue;
            }
            let Some(activity) = self.interface.activity(key) else { continue };
            let sent = activity.last_data_sent();
            if sent > peer.last_sent {
                peer.last_sent = sent;
                active.push(*key);
            }
        }
        for key in active {
            self.note_traffic(now, &key);
            if matches!(self.current_path(&key), Some(Path::Relay { .. })) {
                self.note_relay_use(now, &key);
            }
        }
        self.next_activity = None;
    }

    // --- regions and endpoints ---------------------------------------------------------------------------------------

    fn set_regions(&mut self, now: Instant) {
        let derp = Arc::clone(&self.map.derp);
        self.relays.retain(|region| derp.regions.contains_key(&region));
        self.announce = true;
        self.start_measuring(now, Scope::Full);
        self.commands.push_back(Command::Regions(derp));
    }

    /// Starts a measurement, or notes that another one is due after the present one.
    fn start_measuring(&mut self, now: Instant, scope: Scope) {
        self.next_measure = None;
        self.measure_again = !self.netcheck.start(now, Arc::clone(&self.map.derp), scope);
    }

    fn plan_measuring(&mut self, now: Instant) {
        let jitter = Duration::from_millis(self.rng.next_u64() % MEASURE_JITTER_MS);
        self.next_measure = Some(now + MEASURE_AFTER + jitter);
    }

    fn is_active(&self, now: Instant) -> bool {
        self.last_active.is_some_and(|last| now.saturating_duration_since(last) < ACTIVE)
    }

    fn measured(&mut self, now: Instant, report: Report) {
        let home = self.relays.home();
        let wanted = report.preferred.or(home).or_else(|| fallback_home(&self.map.derp, &self.me));
        if home.is_none() || self.control_connected {
            self.relays.set_home(now, wanted);
        }
        self.netcheck.set_home(self.relays.home());
        self.announce = true;
        if std::mem::take(&mut self.measure_again) {
            self.start_measuring(now, Scope::Full);
        } else if self.is_active(now) {
            self.plan_measuring(now);
        }
        self.report = Some(Box::new(report.clone()));
        self.events.push_back(Event::Measured(Box::new(report)));
    }

    fn announce(&mut self, now: Instant) {
        if !std::mem::take(&mut self.announce) {
            return;
        }
        let endpoints = gather(&self.local, self.report.as_deref(), &self.static_endpoints);
        if endpoints != self.announced.endpoints {
            self.agent.set_endpoints(now, endpoints.iter().map(|endpoint| endpoint.address).collect());
        }
        let announcement = Announcement { endpoints, home: self.relays.home(), report: self.report.clone() };
        if announcement.differs(&self.announced) {
            self.announced.clone_from(&announcement);
            self.commands.push_back(Command::Announce(announcement));
        }
    }
}

/// One seed for each core, so that none can be told from another's output.
struct Seeds {
    interface: [u8; 32],
    agent: [u8; 32],
    netcheck: [u8; 32],
    engine: [u8; 32],
}

impl Seeds {
    fn split(seed: [u8; 32]) -> Self {
        let mut rng = StdRng::from_seed(seed);
        let mut next = || {
            let mut bytes = [0; 32];
            rng.fill_bytes(&mut bytes);
            bytes
        };
        Self { interface: next(), agent: next(), netcheck: next(), engine: next() }
    }
}
