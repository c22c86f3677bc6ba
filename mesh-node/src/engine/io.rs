//! What goes into an engine and what comes out of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_derp::map::{DerpMap, RegionId};
use mesh_nat::agent::{self, PingId, Why};
use mesh_nat::report::{PortalCheck, Report};
use mesh_nat::{Path, SocketId};
use mesh_noise::key::{DiscoPrivate, DiscoPublic, NodePrivate, NodePublic};
use mesh_noise::wireguard::{Session, Timing};

use super::{Endpoint, LinkChange, MapView, PeerView, PortMappings, RelayPlan};
use crate::prefs::PathMode;

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
    /// Whether the user has chosen the port of the IPv4 socket, so that it may be forwarded.
    pub fixed_port: bool,
    /// Whether ports of NATs may be guessed, which takes extra sockets for seconds.
    pub port_guessing: bool,
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
    /// The way; for a relay, [`node`](Self::node) says to whom. Never a peer relay: what goes there has its header already
    /// and is direct to the server.
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
    /// What the host's gateways speak and have given.
    pub mappings: PortMappings,
}

impl Announcement {
    /// Whether control should hear of the difference: latencies alone are not worth a message.
    pub(super) fn differs(&self, other: &Self) -> bool {
        let network = |report: &Option<Box<Report>>| {
            report.as_ref().map(|report| (report.udp, report.ipv4, report.ipv6, report.mapping_varies_by_dest_ip))
        };
        let gateway = |mappings: &PortMappings| {
            let status = mappings.v4;
            (status.pcp, status.nat_pmp, status.upnp, status.mapping.is_some())
        };
        gateway(&self.mappings) != gateway(&other.mappings)
            || self.endpoints != other.endpoints
            || self.home != other.home
            || network(&self.report) != network(&other.report)
    }

    /// Whether endpoints of the other are missing here, and that is all the difference.
    pub(super) fn only_lacks(&self, other: &Self) -> bool {
        let same = Self { endpoints: other.endpoints.clone(), ..self.clone() };
        self.endpoints.iter().all(|endpoint| other.endpoints.contains(endpoint)) && !same.differs(other)
    }
}

/// What others should do.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Command {
    /// Data plane: peers have been added, or what is routed to them has changed.
    SetPeers(Vec<PeerView>),
    /// Data plane: a peer is gone, with its sessions.
    RemovePeer(NodePublic),
    /// Data plane: packets to the peer go this way.
    SetPath(NodePublic, Option<Path>),
    /// Data plane: packets to the peer go this way as well, until told otherwise: the other one is in doubt.
    SetBackup(NodePublic, Option<Path>),
    /// Data plane: packets of so many bytes at most arrive at the peer; none if the device sets the only limit.
    SetLimit(NodePublic, Option<usize>),
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
    /// Measure this region over HTTPS, for UDP brings no answer, and call [`Engine::https_latency`](super::Engine::https_latency).
    MeasureHttps(RegionId),
    /// Open so many UDP sockets for the moment that a measurement takes and call
    /// [`Engine::spare_sockets`](super::Engine::spare_sockets).
    OpenSockets(usize),
    /// The measurement is over: close them.
    CloseSockets,
    /// Find out whether somebody answers HTTP in others' place and call [`Engine::portal`](super::Engine::portal).
    LookForPortal(Vec<PortalCheck>),
    /// Open so many IPv4 sockets to guess ports with, and call [`Engine::extra_opened`](super::Engine::extra_opened).
    OpenExtra(usize),
    /// Close one of them.
    CloseExtra(SocketId),
    /// Data plane: a peer has come through by this one of them, so it will carry data.
    CarryExtra(SocketId),
    /// Look this host up and call [`Engine::resolved`](super::Engine::resolved).
    Resolve(String),
    /// Our own peer relay: allocate for these two clients, and call
    /// [`Engine::allocated`](super::Engine::allocated) with the answer if there is one.
    Allocate {
        /// Who asks, and is allowed to.
        from: NodePublic,
        /// The two clients.
        clients: [DiscoPublic; 2],
        /// Goes into the answer.
        generation: u32,
    },
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
        /// The way until now.
        from: Option<Path>,
        /// The way; none if the peer cannot be reached.
        to: Option<Path>,
        /// The round trip there, smoothed; none through a relay region.
        latency: Option<Duration>,
        /// Packets of so many bytes at most arrive there; none if the device sets the only limit.
        limit: Option<usize>,
        /// Why.
        why: Why,
    },
    /// The path to the peer is in doubt, and packets take this way as well; or, with none, no longer.
    BackupChanged {
        /// The peer.
        peer: NodePublic,
        /// The second way.
        backup: Option<Path>,
    },
    /// Packets of so many bytes at most arrive at the peer.
    LimitChanged {
        /// The peer.
        peer: NodePublic,
        /// None if the device sets the only limit.
        limit: Option<usize>,
    },
    /// A probe asked for with [`Engine::ping`](super::Engine::ping) was answered.
    PingAnswered {
        /// Which one.
        id: PingId,
        /// The way that it took.
        path: Path,
        /// The round trip.
        latency: Duration,
    },
    /// A probe asked for with [`Engine::ping`](super::Engine::ping) was lost.
    PingFailed {
        /// Which one.
        id: PingId,
    },
    /// A peer has not answered handshakes for 90 seconds.
    PeerSilent {
        /// The peer.
        peer: NodePublic,
    },
    /// The host's network has changed.
    LinkChanged(LinkChange),
    /// A measurement of the network has ended.
    Measured(Box<Report>),
}

/// What the engine knows about a peer, for status displays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerReport {
    /// Where packets to it go.
    pub path: Option<Path>,
    /// How path discovery sees it: round trip, longest datagram, since when and why the path is what it is. None if
    /// the peer takes no part in it.
    pub discovery: Option<agent::PeerStatus>,
    /// When the current session was agreed.
    pub last_handshake: Option<Instant>,
}
