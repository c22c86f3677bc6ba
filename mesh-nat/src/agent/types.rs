//! The agent's vocabulary: what goes in, what comes out, what can be set.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_noise::key::{DiscoPublic, NodePublic};

use super::Why;
use crate::behaviour::Behaviour;
use crate::disco::message::DecodeError;
use crate::hard::Outcome;
use crate::path::{Family, Path, SocketId};

/// Which paths may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Direct where possible, else the relay. The default.
    #[default]
    Auto,
    /// Only relays: nothing is sent by UDP, and pings that arrive by it are not answered.
    Relay,
    /// Only direct. Relays still carry the signalling that makes it possible.
    Direct,
}

/// How often things are done. The defaults are those of deployed peers; change them in tests only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between pings of the path in use while there is traffic. 3 s.
    pub heartbeat: Duration,
    /// How long a pong proves a path. 6.5 s.
    pub trust: Duration,
    /// How long a peer counts as active after traffic; also how long a learnt address lives. 45 s.
    pub active: Duration,
    /// How long a ping may take. 5 s.
    pub ping_timeout: Duration,
    /// Between two searches' pings to one address, and between call-me-maybes. 5 s.
    pub search: Duration,
    /// Between searches for something better than a working path that is slower than `good_enough`. 60 s.
    pub upgrade: Duration,
    /// No search for better below this. 5 ms.
    pub good_enough: Duration,
    /// Older lists of our own addresses are sent, and refreshed at the same time. 27 s.
    pub endpoints_fresh: Duration,
    /// Silence after sending that makes a direct path suspicious, where two round trips are not longer. 200 ms.
    pub silence: Duration,
    /// What that grows to while pings refute it again and again. 600 ms.
    pub silence_max: Duration,
    /// Wait for the answer to a ping along the path in use, where the round trip does not ask for more. 100 ms, and twice
    /// as long after each one that is missed.
    pub retry: Duration,
    /// Repetitions before a silent path is given up. 3.
    pub retries: u8,
    /// How long a direct path that has just replaced another one is left only for a much better one. 10 s.
    pub dwell: Duration,
    /// Between two looks whether a path still carries the wanted length, while there is traffic. 15 s.
    pub mtu_confirm: Duration,
    /// Between two looks whether a path that carries less has grown wider. 60 s.
    pub mtu_raise: Duration,
    /// The least wait for the answers to padded pings. 200 ms.
    pub mtu_round: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(3),
            trust: Duration::from_millis(6500),
            active: Duration::from_secs(45),
            ping_timeout: Duration::from_secs(5),
            search: Duration::from_secs(5),
            upgrade: Duration::from_secs(60),
            good_enough: Duration::from_millis(5),
            endpoints_fresh: Duration::from_secs(27),
            silence: Duration::from_millis(200),
            silence_max: Duration::from_millis(600),
            retry: Duration::from_millis(100),
            retries: 3,
            dwell: Duration::from_secs(10),
            mtu_confirm: Duration::from_secs(15),
            mtu_raise: Duration::from_secs(60),
            mtu_round: Duration::from_millis(200),
        }
    }
}

/// What control says about a peer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerConfig {
    /// Its node key.
    pub node: NodePublic,
    /// Its disco key. All zero while unknown: then only the relay is used.
    pub disco: DiscoPublic,
    /// Its home region.
    pub home: Option<RegionId>,
    /// Where it may be reached. Unusable addresses and all beyond the first hundred are ignored.
    pub endpoints: Vec<SocketAddr>,
    /// What its NATs do, as far as it has told.
    pub behaviour: Behaviour,
    /// Whether it is known to be one of our own kind, which understands the messages of [`hard`](crate::hard).
    pub ours: bool,
}

/// Where a datagram came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// The way it came.
    pub path: Path,
    /// Who sent it, according to the relay. `None` for UDP.
    pub node: Option<NodePublic>,
}

impl Source {
    /// A datagram that `socket` received from `remote`.
    #[must_use]
    pub const fn direct(socket: SocketId, remote: SocketAddr) -> Self {
        Self { path: Path::Direct { socket, remote }, node: None }
    }

    /// A packet that the relay of `region` delivered from `node`.
    #[must_use]
    pub const fn relay(region: RegionId, node: NodePublic) -> Self {
        Self { path: Path::Relay { region }, node: Some(node) }
    }
}

/// A datagram to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Along which way.
    pub path: Path,
    /// For whom; relays need to know.
    pub peer: NodePublic,
    /// What.
    pub datagram: Vec<u8>,
}

/// Names one user ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PingId(pub(crate) u64);

/// What the caller should know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Data for the peer goes along another way from now on. `None`: there is none.
    PathChanged {
        /// The peer.
        peer: NodePublic,
        /// The way.
        path: Option<Path>,
        /// Why.
        why: Why,
    },
    /// The path in use is in doubt: every packet for the peer goes along `backup` as well, until this comes again with
    /// `None`. The receiver's replay window drops the second copy.
    BackupChanged {
        /// The peer.
        peer: NodePublic,
        /// The second way: a relay. None is needed if the path is not in doubt.
        backup: Option<Path>,
    },
    /// The path to the peer carries datagrams of so many bytes at most.
    LimitChanged {
        /// The peer.
        peer: NodePublic,
        /// Bytes of WireGuard's; none if all that are wanted pass, as through a region.
        limit: Option<usize>,
    },
    /// A user ping was answered.
    PingAnswered {
        /// Which.
        id: PingId,
        /// By whom.
        peer: NodePublic,
        /// The way that it went.
        path: Path,
        /// There and back.
        latency: Duration,
    },
    /// A user ping was not answered in time, or there was no way to send it.
    PingFailed {
        /// Which.
        id: PingId,
        /// Who did not answer.
        peer: NodePublic,
    },
    /// Our own addresses are unknown or old: ask STUN servers and call [`Agent::set_endpoints`](super::Agent::set_endpoints), changed or not.
    NeedEndpoints,
    /// A node wants two clients served by us as a peer relay, and may: allocate, and call
    /// [`Agent::allocated`](super::Agent::allocated) if that goes well.
    AllocationAsked {
        /// Who asks: a peer, or ourselves.
        from: NodePublic,
        /// The two clients.
        clients: [DiscoPublic; 2],
        /// Names the request; goes into the answer.
        generation: u32,
    },
    /// Open so many UDP sockets more, on any port, and call
    /// [`Agent::sockets_opened`](super::Agent::sockets_opened). They are for guessing ports.
    OpenSockets {
        /// Of this family.
        family: Family,
        /// At most 256.
        count: usize,
    },
    /// Close a socket that was asked for by [`Event::OpenSockets`].
    CloseSocket {
        /// Which.
        socket: SocketId,
    },
    /// Guessing ports has led to something with this peer, or to nothing.
    Guessed {
        /// The peer.
        peer: NodePublic,
        /// How it stands.
        outcome: Outcome,
    },
    /// An address is known to be the peer's: WireGuard messages from it can be attributed.
    PeerMapped {
        /// The peer.
        peer: NodePublic,
        /// The socket that sees the address.
        socket: SocketId,
        /// The address.
        remote: SocketAddr,
    },
}

/// Why a datagram was ignored. Nothing has changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reject {
    /// Not a disco datagram.
    #[error("not a disco datagram")]
    NotDisco,
    /// No peer has the sender's disco key. No cryptography was attempted.
    #[error("sender's disco key is unknown")]
    UnknownSender,
    /// The box does not open: corrupt, or sealed for a key that we no longer have.
    #[error("box does not open")]
    Unsealed,
    /// The box holds no message.
    #[error("malformed message: {0}")]
    Malformed(#[from] DecodeError),
    /// A message that is only believed when it comes through a relay.
    #[error("message must come through a relay")]
    NotOverRelay,
    /// The relay names another node than the one whose disco key sealed the message.
    #[error("relay's sender does not hold the disco key")]
    WrongNode,
    /// A pong to no ping of ours, or too late.
    #[error("pong answers no ping")]
    UnexpectedPong,
    /// Direct paths are switched off.
    #[error("direct paths are switched off")]
    Disabled,
    /// A message that nothing here takes.
    #[error("message is not supported")]
    Unsupported,
    /// Part of a peer relay's handshake that nothing waits for.
    #[error("no handshake with a peer relay waits for this")]
    Unasked,
    /// We do not relay, or not for the sender.
    #[error("the sender may not use us as a relay")]
    NotAllowed,
}

/// What did not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Datagrams dropped because the caller did not drain [`Agent::poll_transmit`](super::Agent::poll_transmit).
    pub transmits_dropped: u64,
    /// Pings not sent because a peer had used up its budget.
    pub pings_suppressed: u64,
    /// Addresses not remembered because a peer had too many.
    pub candidates_refused: u64,
}

/// What is known about a peer's paths, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerStatus {
    /// Where data goes.
    pub path: Option<Path>,
    /// Where data goes as well, while `path` is in doubt.
    pub backup: Option<Path>,
    /// Smoothed round trip of the direct path in use, or of the one through a peer relay.
    pub latency: Option<Duration>,
    /// The longest datagram that the path in use carries, in bytes, if that is less than is wanted.
    pub limit: Option<usize>,
    /// Since when `path` is what it is.
    pub since: Instant,
    /// Why `path` is what it is.
    pub why: Why,
    /// Addresses known.
    pub candidates: usize,
}
