//! The daemon's socket: how the command line talks to a running node.
//!
//! HTTP/1.1 with JSON bodies over a Unix socket. The system says who is at the other end of it: the superuser and the
//! user that runs the daemon may do everything, everybody else may only look.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `POST /v1/up` | [`UpRequest`] | [`UpResponse`], as soon as the node runs or waits for approval |
//! | `POST /v1/wait` | [`WaitRequest`] | [`UpResponse`], when the node runs |
//! | `POST /v1/down` | none | [`Done`] |
//! | `POST /v1/login` | [`UpRequest`] | [`UpResponse`]; signs in again, with a new node key |
//! | `POST /v1/logout` | none | [`Done`] |
//! | `GET /v1/status` | | [`Status`](crate::status::Status) |
//! | `GET /v1/ip` | | [`Addresses`] |
//! | `POST /v1/ping` | [`PingRequest`] | [`Pong`] |
//! | `GET /v1/netcheck` | | [`NetcheckReport`](crate::netcheck::NetcheckReport) |
//! | `POST /v1/set` | [`SetRequest`] | [`Done`] |
//! | `GET /v1/version` | | [`Version`] |
//!
//! A refusal has a status other than 200 and a body of [`Failure`].

mod client;
mod server;

pub use client::{Client, ClientError};
pub use server::LocalApi;

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use mesh_derp::map::RegionId;
use serde::{Deserialize, Serialize};

use crate::prefs::PathMode;
use crate::status::NodeState;

/// What `mesh up` and `mesh login` ask for. Absent members keep what was asked for last time.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct UpRequest {
    /// The coordinator's URL.
    pub control_url: Option<String>,
    /// A key that approves the node at once. Used for this registration and not stored.
    pub auth_key: Option<String>,
    /// The name to ask for.
    pub hostname: Option<String>,
    /// How long to wait, in milliseconds; 30 seconds if absent.
    pub timeout_ms: Option<u64>,
}

impl fmt::Debug for UpRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpRequest")
            .field("control_url", &self.control_url)
            .field("auth_key", &self.auth_key.as_ref().map(|_| "…"))
            .field("hostname", &self.hostname)
            .field("timeout_ms", &self.timeout_ms)
            .finish()
    }
}

/// Waits for a node that has been brought up.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct WaitRequest {
    /// How long to wait, in milliseconds; 30 seconds if absent.
    pub timeout_ms: Option<u64>,
}

/// How far `up` came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpResponse {
    /// The state reached.
    #[serde(flatten)]
    pub state: NodeState,
    /// Where to approve the node, while it waits for that.
    pub auth_url: Option<String>,
    /// The node's addresses within the mesh, once it runs.
    pub addresses: Vec<IpAddr>,
}

/// The node's addresses within the mesh, IPv4 first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// The addresses.
    pub addresses: Vec<IpAddr>,
}

/// Asks for one path probe to a peer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PingRequest {
    /// The peer's name, short or full, or one of its addresses.
    pub peer: String,
    /// The datagram's size in bytes; the smallest possible if absent.
    #[serde(default)]
    pub size: Option<usize>,
    /// How long to wait, in milliseconds; 5 seconds if absent.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
}

/// A peer's answer to a probe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pong {
    /// The peer's full name.
    pub peer: String,
    /// The peer's address within the mesh.
    pub address: Option<IpAddr>,
    /// The way that the probe took.
    #[serde(flatten)]
    pub via: Via,
    /// The round trip in milliseconds.
    pub ms: f64,
}

/// The way that a probe took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "via", rename_all = "kebab-case")]
pub enum Via {
    /// UDP between the two.
    Direct {
        /// The peer's address.
        endpoint: SocketAddr,
    },
    /// Another node that relays UDP.
    PeerRelay {
        /// That node's address.
        endpoint: SocketAddr,
    },
    /// A relay region.
    Relay {
        /// The region.
        region: RegionId,
    },
}

impl From<mesh_nat::Path> for Via {
    fn from(path: mesh_nat::Path) -> Self {
        match path {
            mesh_nat::Path::Direct { remote, .. } => Self::Direct { endpoint: remote },
            mesh_nat::Path::PeerRelay { server, .. } => Self::PeerRelay { endpoint: server },
            mesh_nat::Path::Relay { region } => Self::Relay { region },
        }
    }
}

/// Changes preferences; absent members stay.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SetRequest {
    /// Which paths may be used.
    pub path: Option<PathMode>,
    /// The name to ask for at the next `up`.
    pub hostname: Option<String>,
}

/// The daemon's version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The version of `mesh-node`.
    pub version: String,
    /// The capability version spoken with the coordinator.
    pub capability_version: u16,
}

/// It is done; there is nothing more to say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

/// Why a request was refused, in one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The line.
    pub error: String,
}
