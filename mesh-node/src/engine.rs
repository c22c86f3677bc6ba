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

mod announce;
mod endpoints;
mod grants;
mod guess;
mod io;
mod links;
mod map;
mod measure;
mod peers;
mod relays;
mod settle;
#[cfg(test)]
pub(crate) mod tests;

pub use endpoints::{Endpoint, EndpointKind, Local, LocalAddress, PortMappings, gather};
pub use io::{Announcement, Command, Config, Event, Hop, PeerReport, Transmit};
pub use links::{DefaultRoute, LinkChange};
pub use map::{MapView, PeerView};
pub use relays::RelayPlan;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_nat::agent::{self, Agent, PingId};
use mesh_nat::disco::message::AllocateResponse;
use mesh_nat::report::{Netcheck, Report, Scope};
use mesh_nat::{Class, Family, Path, classify};
use mesh_noise::key::{DiscoPublic, NodePrivate, NodePublic};
use mesh_noise::wireguard::{self, Interface};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_core::Rng;

use crate::prefs::PathMode;

/// How often activity words are read while sessions exist.
const ACTIVITY_INTERVAL: Duration = Duration::from_secs(1);
/// The same, while data is sent by a direct path: so soon a dead one may be noticed.
const ACTIVITY_SOON: Duration = Duration::from_millis(200);
/// How soon a handshake is tried again with a peer that its relay does not know.
const NOT_AT_RELAY: Duration = Duration::from_millis(300);

/// What sealing adds to a packet.
pub(crate) const SEALED: usize = wireguard::HEADER_LEN + wireguard::TAG_LEN;

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
    /// Where packets go as well, because `path` is in doubt.
    backup: Option<Path>,
    /// When it was last asked for new sessions because it may have restarted.
    renewed: Option<Instant>,
    /// The disco key that it has told us itself, until control tells of another one than before.
    told_disco: Option<DiscoPublic>,
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
    fixed_port: bool,
    local: Local,
    mappings: PortMappings,
    map: Arc<MapView>,
    peers: BTreeMap<NodePublic, Peer>,
    /// Nodes that have asked for a session before control has told us of them.
    strangers: BTreeMap<NodePublic, Instant>,
    relays: relays::Relays,
    report: Option<Box<Report>>,
    sightings: announce::Sightings,
    /// Where we may be reached, as of now.
    endpoints: Vec<Endpoint>,
    announcer: announce::Announcer,
    /// Whether what goes into an announcement may have changed.
    announce: bool,
    /// Peers whose path may have changed.
    moved: BTreeSet<NodePublic>,
    live_sessions: usize,
    control_connected: bool,
    next_activity: Option<Instant>,
    /// How long after the last look at activity words the next one is due.
    activity_interval: Duration,
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
        agent.set_guessing(now, config.port_guessing);
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
            fixed_port: config.fixed_port,
            local: Local::default(),
            mappings: PortMappings::default(),
            map: Arc::default(),
            peers: BTreeMap::new(),
            strangers: BTreeMap::new(),
            relays: relays::Relays::default(),
            report: None,
            sightings: announce::Sightings::default(),
            endpoints: Vec::new(),
            announcer: announce::Announcer::default(),
            announce: false,
            moved: BTreeSet::new(),
            live_sessions: 0,
            control_connected: false,
            next_activity: None,
            activity_interval: ACTIVITY_INTERVAL,
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
        &self.endpoints
    }

    /// What this host has, as it was last told.
    #[must_use]
    pub fn local(&self) -> &Local {
        &self.local
    }

    /// What the host's gateways have given, as it was last told.
    #[must_use]
    pub fn port_mappings(&self) -> &PortMappings {
        &self.mappings
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
        let discovery = self.agent.status(peer);
        Some(PeerReport { path: self.current_path(peer), discovery, last_handshake: known.last_handshake })
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
        self.set_peers(now);
        if former.relays != self.map.relays {
            self.agent.set_relays(self.map.relays.clone());
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
    #[expect(clippy::wildcard_enum_match_arm, reason = "classes to come are not for us yet")]
    pub fn handle_datagram(&mut self, now: Instant, from: &Hop, datagram: &[u8]) {
        let source = match from.path {
            Path::Direct { remote, .. } => Some(remote),
            Path::PeerRelay { .. } | Path::Relay { .. } => None,
        };
        if let Path::Relay { region } = from.path {
            self.netcheck.heard_by_relay(now, region);
        }
        let outcome = match classify(datagram) {
            Class::Stun if self.is_for_guesses(&from.path) => {
                self.agent.handle_stun(now, datagram).map_err(|reject| reject.to_string())
            }
            Class::Stun => match source {
                Some(source) => {
                    self.netcheck.handle_datagram_from(now, source, datagram).map_err(|reject| reject.to_string())
                }
                None => Err("stun through a relay".to_owned()),
            },
            Class::Disco | Class::RelayedDisco { .. } => {
                let source = agent::Source { path: from.path, node: from.node };
                self.agent.handle_datagram(now, source, datagram).map_err(|reject| {
                    if let (agent::Reject::UnknownSender, Some(node)) = (reject, from.node) {
                        self.may_have_restarted(now, node);
                    }
                    reject.to_string()
                })
            }
            Class::WireGuard => self.interface.handle_datagram(now, from, source, datagram).map_err(|reject| {
                if let (wireguard::Reject::UnknownPeer, Some(node)) = (reject, from.node) {
                    self.note_stranger(now, node);
                }
                reject.to_string()
            }),
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
        // After a quiet time, this may be the first packet into a path that has died meanwhile.
        self.next_activity = self.next_activity.map(|due| due.min(now + ACTIVITY_SOON));
        self.settle(now);
    }

    /// Authentic data of `peer` has come by `path`. A relay where ours is direct means that the peer has no direct path, or
    /// doubts it: ours may be dead as well.
    pub fn path_seen(&mut self, now: Instant, peer: &NodePublic, path: Path) {
        if path.is_relay() && self.peers.get(peer).and_then(|peer| peer.path).is_some_and(|own| own.is_direct()) {
            self.agent.suspect(now, peer);
        }
        self.settle(now);
    }

    /// `peer` sends on a session that we do not have, so we have restarted and it does not know yet. Its data is lost until
    /// it has a new session: asks it for one.
    pub fn session_unknown(&mut self, now: Instant, peer: &NodePublic) {
        if self.peers.get(peer).is_some_and(|known| known.sessions.is_empty()) {
            self.interface.want_session(now, peer);
        }
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
        if connected {
            let there = |peer: &&Peer| peer.path == Some(Path::Relay { region });
            let waiting: Vec<_> = self.peers.values().filter(there).map(|peer| peer.view.node).collect();
            for peer in waiting {
                self.interface.retry_handshake(now, &peer, Duration::ZERO);
            }
        }
        self.settle(now);
    }

    /// The relay of `region` has delivered data. What comes to [`handle_datagram`](Self::handle_datagram) tells as much by
    /// itself; data does not come here, and a home that delivers it is not left for want of an answer to STUN. Once a
    /// second is enough.
    pub fn relay_heard(&mut self, now: Instant, region: RegionId) {
        self.netcheck.heard_by_relay(now, region);
    }

    /// A relay says that `peer` is not connected to it. If a handshake is being tried, it is tried again soon: a node that
    /// has just joined may be known to us a moment before it is known to its relay.
    pub fn peer_not_at_relay(&mut self, now: Instant, peer: &NodePublic) {
        self.interface.retry_handshake(now, peer, NOT_AT_RELAY);
        self.settle(now);
    }

    /// The stream from control has come up or gone down. The home region stays while it is down: peers could not learn
    /// of a move.
    pub fn set_control_connected(&mut self, now: Instant, connected: bool) {
        self.control_connected = connected;
        self.settle(now);
    }

    /// The host's gateways give these port mappings now.
    pub fn set_port_mappings(&mut self, now: Instant, mappings: PortMappings) {
        if self.mappings != mappings {
            self.mappings = mappings;
            self.gather(now, false);
            self.settle(now);
        }
    }

    /// The machine has slept: nothing that was proven about paths holds any more, and the network may be another one.
    pub fn resumed(&mut self, now: Instant) {
        self.agent.rebind(now);
        self.netcheck.forget_network();
        self.start_measuring(now, Scope::Full);
        self.settle(now);
    }

    /// The device's largest packet has so many bytes: paths are probed whether they carry it.
    pub fn set_device_mtu(&mut self, now: Instant, mtu: usize) {
        self.agent.set_wanted_length(now, Some(mtu + SEALED));
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

    /// Our own peer relay has an allocation for whoever asked by [`Command::Allocate`].
    pub fn allocated(&mut self, now: Instant, to: NodePublic, response: AllocateResponse) {
        self.agent.allocated(now, to, response);
        self.settle(now);
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

    /// The sockets that [`Command::OpenSockets`] asked for, and what they are bound to. What they receive comes to
    /// [`handle_datagram`](Self::handle_datagram), what they should send out of [`poll_transmit`](Self::poll_transmit).
    pub fn spare_sockets(&mut self, now: Instant, sockets: &[(mesh_nat::SocketId, SocketAddr)]) {
        self.netcheck.handle_sockets(now, sockets);
        self.settle(now);
    }

    /// What [`Command::LookForPortal`] has found; none if nobody answered.
    pub fn portal(&mut self, now: Instant, found: Option<bool>) {
        self.netcheck.handle_portal(now, found);
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
            self.announcer.due(),
        ]
        .into_iter()
        .flatten()
        .min()
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
