//! What a node says about itself and its peers: the JSON of `mesh status --json`.
//!
//! Fields are added, never renamed; a change of meaning raises [`STATUS_VERSION`].

use std::net::{IpAddr, SocketAddr};

use mesh_derp::map::RegionId;
use mesh_nat::agent::Why;
use mesh_noise::key::NodePublic;
use serde::{Deserialize, Serialize};

use crate::engine::PortMappings;

/// The version of the status format.
pub const STATUS_VERSION: u32 = 1;

/// How far a node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NodeState {
    /// Not connected and not trying to be.
    Stopped {
        /// What made it stop; none if it was asked to.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// Waits for somebody to approve it.
    NeedsLogin {
        /// Where to approve it.
        url: String,
    },
    /// Talks to the coordinator, or tries to.
    Starting {
        /// The last failure, while it goes on trying.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
        /// Whether trying again will not help until somebody does something about it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        needs_attention: bool,
    },
    /// Has a network map and carries traffic.
    Running,
}

impl NodeState {
    /// Talks to the coordinator for the first time.
    pub(crate) const STARTING: Self = Self::Starting { error: None, needs_attention: false };

    /// Whether the node carries traffic.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self, Self::Running)
    }
}

/// A node and its peers at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// [`STATUS_VERSION`].
    pub version: u32,
    /// How far the node is.
    #[serde(flatten)]
    pub state: NodeState,
    /// Whether the coordinator is reachable at present. Tunnels work without it.
    pub control_connected: bool,
    /// The coordinator's URL.
    pub control_url: Option<String>,
    /// The tailnet's name.
    pub tailnet: Option<String>,
    /// What the user should know; empty if all is well.
    pub health: Vec<String>,
    /// The node itself.
    #[serde(rename = "self")]
    pub this: SelfStatus,
    /// The peers, by name.
    pub peers: Vec<PeerStatus>,
    /// Datagrams and packets that were discarded, by reason; only reasons that have occurred.
    #[serde(default)]
    pub drops: std::collections::BTreeMap<String, u64>,
}

/// The node's own part of [`Status`].
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct SelfStatus {
    /// The full name within the mesh, without a final dot; empty before the first network map.
    pub name: String,
    /// The node key.
    pub key: Option<NodePublic>,
    /// Its addresses within the mesh.
    pub addresses: Vec<IpAddr>,
    /// Where it believes that it can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// The relay region where it listens.
    pub home_region: Option<RegionId>,
    /// Whether the home relay is connected at present.
    pub relay_connected: bool,
    /// Its owner's login name.
    pub owner: Option<String>,
    /// Its operating system.
    pub os: String,
    /// When its key expires, in seconds since 1970; none if never.
    pub key_expiry: Option<i64>,
    /// `tun` or `userspace`.
    pub device: String,
    /// Which paths may be used.
    pub path_mode: crate::prefs::PathMode,
    /// The UDP port.
    pub port: u16,
    /// What the gateway has given.
    #[serde(default)]
    pub port_mapping: PortMappingStatus,
}

/// What the gateway was asked for and has given.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PortMappingStatus {
    /// Whether the gateway speaks PCP; none if it was not asked.
    pub pcp: Option<bool>,
    /// Whether it speaks NAT-PMP.
    pub nat_pmp: Option<bool>,
    /// Whether it is a UPnP gateway.
    pub upnp: Option<bool>,
    /// The gateway's address and port that lead to us.
    pub external: Option<SocketAddr>,
    /// Who gave it: `PCP`, `NAT-PMP` or `UPnP`.
    pub protocol: Option<String>,
    /// Whether the gateway is behind a NAT itself, so that peers cannot use the mapping and are not told of it.
    pub double_nat: bool,
    /// The IPv6 address and port that the router lets peers in to.
    pub pinhole: Option<SocketAddr>,
    /// Why there is no mapping.
    pub problem: Option<String>,
}

impl From<&PortMappings> for PortMappingStatus {
    fn from(mappings: &PortMappings) -> Self {
        let status = mappings.v4;
        Self {
            pcp: status.pcp,
            nat_pmp: status.nat_pmp,
            upnp: status.upnp,
            external: status.mapping.map(|mapping| mapping.external),
            protocol: status.mapping.map(|mapping| mapping.protocol.to_string()),
            double_nat: status.mapping.is_some_and(|mapping| mapping.double_nat),
            pinhole: mappings.v6.endpoint(),
            problem: status.problem.map(|problem| problem.to_string()),
        }
    }
}

/// One peer's part of [`Status`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// The full name within the mesh, without a final dot.
    pub name: String,
    /// The node key.
    pub key: NodePublic,
    /// Its addresses within the mesh.
    pub addresses: Vec<IpAddr>,
    /// Its owner's login name, or its first tag.
    pub owner: Option<String>,
    /// Its operating system.
    pub os: Option<String>,
    /// Whether the coordinator sees it; none if unknown.
    pub online: Option<bool>,
    /// Where packets to it go at present.
    pub path: PathStatus,
    /// Since when, how well and why they go there; none before the node knows the peer.
    #[serde(default)]
    pub why: Option<WhyStatus>,
    /// Bytes of packets received from it, all paths.
    pub rx_bytes: u64,
    /// Bytes of packets sent to it, all paths.
    pub tx_bytes: u64,
    /// When the current session's keys were agreed, in seconds since 1970; none if never.
    pub last_handshake: Option<u64>,
    /// What went through UDP.
    pub direct: PathCounters,
    /// What went through relays.
    pub relay: PathCounters,
    /// Where it says that it can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// The relay region where it listens.
    pub home_region: Option<RegionId>,
}

/// Why packets to a peer go where they go: `mesh status --why`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct WhyStatus {
    /// The reason, in words.
    pub reason: String,
    /// Since when the path is what it is, in seconds since 1970.
    pub since: u64,
    /// The smoothed round trip, directly or through a peer relay, in milliseconds; none through a relay region.
    pub rtt_ms: Option<f64>,
    /// The longest packet that arrives there, in bytes; none if the device sets the only limit.
    pub mtu: Option<usize>,
    /// How many addresses of the peer are known.
    pub candidates: usize,
}

/// Where packets to a peer go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PathStatus {
    /// Direct, relay or none.
    pub kind: PathKind,
    /// The peer's address, if direct.
    pub endpoint: Option<SocketAddr>,
    /// The relay region, if relayed.
    pub region: Option<RegionId>,
}

/// The kinds of path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum PathKind {
    /// There is no way to the peer.
    #[default]
    None,
    /// UDP between the two.
    Direct,
    /// Through another node that relays UDP.
    PeerRelay,
    /// Through a relay region.
    Relay,
}

impl From<Option<mesh_nat::Path>> for PathStatus {
    fn from(path: Option<mesh_nat::Path>) -> Self {
        match path {
            None => Self::default(),
            Some(mesh_nat::Path::Direct { remote, .. }) => {
                Self { kind: PathKind::Direct, endpoint: Some(remote), region: None }
            }
            Some(mesh_nat::Path::PeerRelay { server, .. }) => {
                Self { kind: PathKind::PeerRelay, endpoint: Some(server), region: None }
            }
            Some(mesh_nat::Path::Relay { region }) => {
                Self { kind: PathKind::Relay, endpoint: None, region: Some(region) }
            }
        }
    }
}

impl PathStatus {
    /// Why packets take this way, in words that follow "because".
    #[must_use]
    pub fn because(&self, why: &Why) -> String {
        match self.kind {
            PathKind::PeerRelay => format!("it answers through this relay, but not directly: {why}"),
            PathKind::None | PathKind::Direct | PathKind::Relay => why.to_string(),
        }
    }
}

/// Packets and bytes both ways over one kind of path. Bytes are those of datagrams, headers of WireGuard included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PathCounters {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_nat::{Path, Vni};

    #[test]
    fn a_path_through_a_peer_relay_says_both_why_it_is_used_and_why_there_is_none_better() {
        let server = "192.0.2.7:7777".parse().unwrap();
        let relayed = PathStatus::from(Some(Path::PeerRelay { server, vni: Vni::new(5).unwrap() }));
        let text = "it answers through this relay, but not directly: none of its addresses answers";
        assert_eq!(relayed.because(&Why::Silence), text);
        let direct = PathStatus::from(Some(Path::Direct { socket: mesh_nat::SocketId(0), remote: server }));
        assert_eq!(direct.because(&Why::Answers), "it answers there");
    }
}
