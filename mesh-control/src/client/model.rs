//! The vocabulary of the client core: what it is told, what it asks for, what it reports.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_noise::key::{DiscoPublic, NodePrivate};

#[cfg(doc)]
use super::Client;
use super::Problem;
use crate::netmap::{Changes, Netmap};
use crate::version::CapabilityVersion;
use crate::wire::{EndpointType, Hostinfo, Login, MapRequest, PingRequest, RegisterRequest, User};

/// What a node knows of itself and tells control.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Description {
    /// The device and, in `net_info`, its network and home region.
    pub hostinfo: Hostinfo,
    /// Where it may be reached by UDP, best first, and how each was found.
    pub endpoints: Vec<(SocketAddr, EndpointType)>,
    /// The disco key of this run.
    pub disco: DiscoPublic,
}

/// What a [`Client`] starts from.
#[derive(Clone)]
pub struct Config {
    /// The node key: from the state directory, or freshly drawn.
    pub node_key: NodePrivate,
    /// What the node says of itself.
    pub description: Description,
    /// Ask for a node that is forgotten once it is offline. Default: no.
    pub ephemeral: bool,
    /// What we claim to understand. Default: [`CapabilityVersion::CURRENT`].
    pub version: CapabilityVersion,
    /// Ask for compressed maps. Default: yes.
    pub compress: bool,
}

impl Config {
    /// The defaults for this node key.
    #[must_use]
    pub fn new(node_key: NodePrivate, description: Description) -> Self {
        Self { node_key, description, ephemeral: false, version: CapabilityVersion::CURRENT, compress: true }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config").field("node_key", &self.node_key.public()).finish_non_exhaustive()
    }
}

/// Names a request, so that its answer finds it and a late one does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(super) u64);

/// What the driver should do.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Action {
    /// Fetch the server's key and open a channel; then [`Client::connected`] or [`Client::connection_failed`].
    Connect,
    /// Drop the connection, or the attempt, and all that was asked over it. Nothing need be reported.
    Disconnect,
    /// POST to `/machine/register`, without time limit if it has a `Followup`; then [`Client::register_answered`] or
    /// [`Client::request_failed`].
    Register(RequestId, Box<RegisterRequest>),
    /// POST to `/machine/map` and pass every message to [`Client::map_received`], the end to
    /// [`Client::request_failed`].
    OpenMap(RequestId, Box<MapRequest>),
    /// Give up the map stream.
    CloseMap(RequestId),
    /// POST to `/machine/map`, drop the answer's body; then [`Client::update_answered`] or [`Client::request_failed`].
    Update(RequestId, Box<MapRequest>),
    /// POST these bytes to this path, and forget about it.
    Post {
        /// Path and query.
        path: String,
        /// The body.
        body: Vec<u8>,
    },
    /// Send a HEAD request to this path, and forget about it.
    Head {
        /// Path and query.
        path: String,
    },
}

/// What the owner of the node should know.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ControlEvent {
    /// Somebody has to open this page and approve the node.
    AuthUrl(String),
    /// The node is registered.
    Registered(Box<Registered>),
    /// The netmap came or changed.
    Netmap {
        /// All of it.
        netmap: Arc<Netmap>,
        /// What is different from the one before.
        changes: Changes,
    },
    /// The node key has expired: peers no longer talk to it. The client is already asking for a new one.
    Expired,
    /// Control cannot be used now; the client tries again by itself.
    Unreachable {
        /// Why. If it [needs attention](Problem::needs_attention), trying again may not help.
        reason: Problem,
        /// When it tries again.
        retry_in: Duration,
    },
    /// Control cannot be used, and the client has stopped until [`Client::login`].
    Error(Problem),
    /// This machine's clock and the server's are far apart: certificates and expiries may misbehave.
    ClockSkew {
        /// How far.
        by: Duration,
        /// Whether this machine's clock is the one ahead.
        ahead: bool,
    },
    /// The server asks for pings of a peer.
    Ping(PingRequest),
    /// The server asks to show this page.
    OpenBrowser(String),
    /// Logged out; with the problem if the server could not be told.
    LoggedOut(Option<Problem>),
}

/// A successful registration.
#[derive(Debug, Clone)]
pub struct Registered {
    /// The node key that counts from now on: store it.
    pub node_key: NodePrivate,
    /// Whether it replaced another.
    pub rotated: bool,
    /// Who owns the node.
    pub user: User,
    /// How they signed in.
    pub login: Login,
    /// Whether it may run already; else an administrator has to approve the machine.
    pub machine_authorized: bool,
}
