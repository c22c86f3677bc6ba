//! `/machine/map`: the request, the stream of answers, and what they carry along.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use mesh_derp::map::DerpMap;
use mesh_noise::key::{DiscoPublic, NodePublic};
use serde::{Deserialize, Serialize};

use super::dns::DnsConfig;
use super::filter::FilterRule;
use super::hostinfo::Hostinfo;
use super::ids::{Base64, NodeId};
use super::node::{Node, PeerChange, UserProfile};
use super::time::Timestamp;
use crate::version::CapabilityVersion;

message! {
    /// Asks for a netmap, or only tells the server something.
    ///
    /// | stream | omit_peers | meaning |
    /// |---|---|---|
    /// | true | false | map poll: a full map, then deltas until either side closes |
    /// | false | true | lite update: the server stores what it is told and answers 200 |
    /// | false | false | one full map |
    pub struct MapRequest {
        /// What the client understands.
        version: CapabilityVersion = "Version" always,
        /// `"zstd"` or empty.
        compress: String = "Compress",
        /// Wants keep-alives.
        keep_alive: bool = "KeepAlive",
        /// Whose map. Must belong to the machine that asks.
        node_key: NodePublic = "NodeKey" always,
        /// The current disco key.
        disco_key: DiscoPublic = "DiscoKey",
        /// Wants a stream.
        stream: bool = "Stream" always,
        /// The device; `None`: unchanged.
        hostinfo: Option<Box<Hostinfo>> = "Hostinfo",
        /// The session to resume; unused by the reference client.
        map_session_handle: String = "MapSessionHandle",
        /// The last sequence number seen in it.
        map_session_seq: i64 = "MapSessionSeq",
        /// Where the node may be reached; replaces the former list.
        endpoints: Vec<SocketAddr> = "Endpoints" via "crate::wire::lenient::endpoints",
        /// How each endpoint was found, in parallel.
        endpoint_types: Vec<EndpointType> = "EndpointTypes",
        /// The head of the local tailnet-lock log.
        tka_head: String = "TKAHead",
        /// An older way to ask without telling.
        read_only: bool = "ReadOnly",
        /// Wants no peers.
        omit_peers: bool = "OmitPeers",
        /// Names of conditions on the client.
        debug_flags: Vec<String> = "DebugFlags",
    }
}

/// How an endpoint was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(from = "i64", into = "i64")]
pub enum EndpointType {
    /// Not said.
    #[default]
    Unknown,
    /// An interface's own address.
    Local,
    /// As a STUN server saw it.
    Stun,
    /// By a port mapping.
    PortMapped,
    /// The STUN IPv4 address with the local port: a guess at a forwarded port.
    Stun4LocalPort,
    /// Configured by the user.
    Explicit,
}

impl From<i64> for EndpointType {
    fn from(number: i64) -> Self {
        match number {
            1 => Self::Local,
            2 => Self::Stun,
            3 => Self::PortMapped,
            4 => Self::Stun4LocalPort,
            5 => Self::Explicit,
            _ => Self::Unknown,
        }
    }
}

impl From<EndpointType> for i64 {
    fn from(kind: EndpointType) -> Self {
        match kind {
            EndpointType::Unknown => 0,
            EndpointType::Local => 1,
            EndpointType::Stun => 2,
            EndpointType::PortMapped => 3,
            EndpointType::Stun4LocalPort => 4,
            EndpointType::Explicit => 5,
        }
    }
}

message! {
    /// One message of a map stream: a whole map first, then what changed, or a sign of life.
    ///
    /// State gathers within one stream only; every new one starts with a whole map. See
    /// [`Netmap::apply`](crate::netmap::Netmap::apply) for the order in which the members act.
    pub struct MapResponse {
        /// Names the session; first message only.
        map_session_handle: String = "MapSessionHandle",
        /// Number in the session.
        seq: i64 = "Seq",
        /// Only a sign of life; everything but pings, times and notices is ignored.
        keep_alive: bool = "KeepAlive",
        /// Asks the client to answer.
        ping_request: Option<PingRequest> = "PingRequest",
        /// A page to open in a browser.
        pop_browser_url: String = "PopBrowserURL",
        /// This node; `None`: unchanged.
        node: Option<Node> = "Node",
        /// The relays; `None`: unchanged.
        derp_map: Option<DerpMap> = "DERPMap",
        /// If not empty: all peers, sorted by ID, and the other peer members are skipped.
        peers: Vec<Node> = "Peers",
        /// Peers that are new or replaced, sorted by ID.
        peers_changed: Vec<Node> = "PeersChanged",
        /// Peers that are gone.
        peers_removed: Vec<NodeId> = "PeersRemoved",
        /// Fields of peers that changed; applied last.
        peers_changed_patch: Vec<PeerChange> = "PeersChangedPatch",
        /// True: seen now; false: not known when.
        peer_seen_change: BTreeMap<NodeId, bool> = "PeerSeenChange",
        /// Whether peers are connected.
        online_change: BTreeMap<NodeId, bool> = "OnlineChange",
        /// Name resolution; `None`: unchanged.
        dns_config: Option<DnsConfig> = "DNSConfig",
        /// The tailnet's name for people; empty: unchanged.
        domain: String = "Domain",
        /// Whether to report listening services; `None`: unchanged.
        collect_services: Option<bool> = "CollectServices",
        /// The filter called `base`; `None`: unchanged; empty: refuse everything.
        packet_filter: Option<Vec<FilterRule>> = "PacketFilter",
        /// Named filters; a `None` deletes its name, and that of `*` deletes all first.
        packet_filters: BTreeMap<String, Option<Vec<FilterRule>>> = "PacketFilters",
        /// People, new or changed.
        user_profiles: Vec<UserProfile> = "UserProfiles",
        /// Problems as texts; `None`: unchanged; empty: none.
        health: Option<Vec<String>> = "Health",
        /// Problems by name; a `None` deletes its name, and that of `*` deletes all first.
        display_messages: BTreeMap<String, Option<DisplayMessage>> = "DisplayMessages",
        /// The SSH policy, kept as sent; `None`: unchanged.
        ssh_policy: Option<serde_json::Value> = "SSHPolicy",
        /// The server's clock.
        control_time: Timestamp = "ControlTime",
        /// Tailnet lock; `None` first: off, later: unchanged.
        tka_info: Option<TkaInfo> = "TKAInfo",
        /// Names the tailnet's data-plane audit log; empty: unchanged.
        domain_data_plane_audit_log_id: String = "DomainDataPlaneAuditLogID",
        /// Switches for the client's process.
        debug: Option<Debug> = "Debug",
        /// Where to find the server next time; `None` first: by DNS, later: unchanged.
        control_dial_plan: Option<ControlDialPlan> = "ControlDialPlan",
        /// A notice about newer clients.
        client_version: Option<ClientVersion> = "ClientVersion",
        /// An older form of a capability.
        default_auto_update: Option<bool> = "DefaultAutoUpdate",
    }
}

impl MapResponse {
    /// The message that only says that the server lives.
    #[must_use]
    pub fn keep_alive() -> Self {
        Self { keep_alive: true, ..Self::default() }
    }
}

message! {
    /// Asks the client to answer, over the network or through the channel.
    pub struct PingRequest {
        /// Where the answer goes; unique for each request.
        url: String = "URL" always,
        /// Answer inside the channel.
        url_is_noise: bool = "URLIsNoise" always,
        /// Log it.
        log: bool = "Log",
        /// Empty: a HEAD request to the URL; `c2n`: run `payload`; else kinds of ping to `ip`, with commas between.
        types: String = "Types" always,
        /// Whom to ping.
        ip: Option<IpAddr> = "IP",
        /// A whole HTTP/1.1 request to answer.
        payload: Base64 = "Payload",
    }
}

message! {
    /// How a ping that the server asked for went.
    pub struct PingResponse {
        /// Its kind.
        kind: String = "Type" always,
        /// The address pinged.
        ip: String = "IP",
        /// The node's address.
        node_ip: String = "NodeIP",
        /// The node's name.
        node_name: String = "NodeName",
        /// What went wrong.
        err: String = "Err",
        /// Seconds there and back.
        latency_seconds: f64 = "LatencySeconds",
        /// The direct path's far end.
        endpoint: String = "Endpoint",
        /// The peer relay.
        peer_relay: String = "PeerRelay",
        /// The relay's region.
        derp_region_id: u32 = "DERPRegionID",
        /// Its code.
        derp_region_code: String = "DERPRegionCode",
        /// The peer's PeerAPI port.
        peer_api_port: u16 = "PeerAPIPort",
        /// The address is our own.
        is_local_ip: bool = "IsLocalIP",
    }
}

message! {
    /// A notice to the user.
    pub struct DisplayMessage {
        /// One line.
        title: String = "Title",
        /// The rest.
        text: String = "Text",
        /// `high`, `medium` or `low`.
        severity: String = "Severity",
        /// Connections suffer.
        impacts_connectivity: bool = "ImpactsConnectivity",
        /// What the user may do.
        primary_action: Option<DisplayMessageAction> = "PrimaryAction",
    }
}

message! {
    /// A page that a notice leads to.
    pub struct DisplayMessageAction {
        /// The page.
        url: String = "URL",
        /// What to call it.
        label: String = "Label",
    }
}

message! {
    /// Tailnet lock's state at the server.
    pub struct TkaInfo {
        /// The head of its log.
        head: String = "Head",
        /// It has been switched off.
        disabled: bool = "Disabled",
    }
}

message! {
    /// Switches for the client's process.
    pub struct Debug {
        /// Wait this long before going on; at most 300 s are honoured.
        sleep_seconds: f64 = "SleepSeconds",
        /// Upload no logs for the life of the process.
        disable_log_tail: bool = "DisableLogTail",
        /// End the process with this status. Not honoured here.
        exit: Option<i64> = "Exit",
    }
}

message! {
    /// Where to find the server.
    pub struct ControlDialPlan {
        /// Addresses to try.
        candidates: Vec<DialCandidate> = "Candidates" always,
    }
}

message! {
    /// One way to reach the server.
    pub struct DialCandidate {
        /// Its address.
        ip: Option<IpAddr> = "IP",
        /// A host to tunnel through.
        ace_host: String = "ACEHost",
        /// Seconds to wait before trying it.
        dial_start_delay_sec: f64 = "DialStartDelaySec",
        /// Seconds to try for.
        dial_timeout_sec: f64 = "DialTimeoutSec",
        /// Greater is preferred.
        priority: i64 = "Priority",
    }
}

message! {
    /// A notice about newer clients.
    pub struct ClientVersion {
        /// This is the latest.
        running_latest: bool = "RunningLatest",
        /// What the latest is.
        latest_version: String = "LatestVersion",
        /// An update closes a hole.
        urgent_security_update: bool = "UrgentSecurityUpdate",
        /// Tell the user.
        notify: bool = "Notify",
        /// Where to read more.
        notify_url: String = "NotifyURL",
        /// What to tell.
        notify_text: String = "NotifyText",
    }
}
