//! What a device says about itself and its network.

use std::collections::BTreeMap;

use ipnet::IpNet;
use mesh_derp::map::RegionId;

/// A capability that a coordinator gives a peer that speaks this project's own additions, private disco messages above
/// all. Others ignore it.
pub const OURS: &str = "mesh/disco-1";
/// How the version of a client of this project ends.
pub const VERSION_SUFFIX: &str = "-mesh";

impl Hostinfo {
    /// Whether the client is one of this project, by its own word.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.ipn_version.ends_with(VERSION_SUFFIX)
    }
}

message! {
    /// A device as it describes itself. Everything is optional; a trimmed form travels to peers.
    pub struct Hostinfo {
        /// The client's version.
        ipn_version: String = "IPNVersion",
        /// Names a front end's log; unused here.
        frontend_log_id: String = "FrontendLogID",
        /// Names a back end's log. The Go client always has one.
        backend_log_id: String = "BackendLogID",
        /// `linux`, `macOS`, `windows`, `iOS`, `android`, `freebsd`, `js`…
        os: String = "OS",
        /// The kernel's or system's version.
        os_version: String = "OSVersion",
        /// In a container.
        container: Option<bool> = "Container",
        /// A hosting environment's code.
        env: String = "Env",
        /// The Linux distribution.
        distro: String = "Distro",
        /// Its version.
        distro_version: String = "DistroVersion",
        /// Its code name.
        distro_code_name: String = "DistroCodeName",
        /// The embedding application.
        app: String = "App",
        /// Has a desktop.
        desktop: Option<bool> = "Desktop",
        /// How it was installed.
        package: String = "Package",
        /// The device's model.
        device_model: String = "DeviceModel",
        /// For waking phones.
        push_device_token: String = "PushDeviceToken",
        /// The host name, before the server makes it a label.
        hostname: String = "Hostname",
        /// Refuses inbound connections.
        shields_up: bool = "ShieldsUp",
        /// Shared in from another tailnet; set by servers.
        sharee_node: bool = "ShareeNode",
        /// Sends no logs and expects no support.
        no_logs_no_support: bool = "NoLogsNoSupport",
        /// Wants to receive Funnel traffic.
        wire_ingress: bool = "WireIngress",
        /// Has a Funnel listener.
        ingress_enabled: bool = "IngressEnabled",
        /// May be updated remotely.
        allows_update: bool = "AllowsUpdate",
        /// May be configured remotely.
        remote_config: bool = "RemoteConfig",
        /// The machine's architecture as the system calls it.
        machine: String = "Machine",
        /// The architecture as Go calls it.
        go_arch: String = "GoArch",
        /// Its variant.
        go_arch_var: String = "GoArchVar",
        /// The toolchain.
        go_version: String = "GoVersion",
        /// Routes it would serve, subject to approval.
        routable_ips: Vec<IpNet> = "RoutableIPs",
        /// Tags it asks for.
        request_tags: Vec<String> = "RequestTags",
        /// Addresses for wake-on-LAN.
        wol_macs: Vec<String> = "WoLMACs",
        /// What it listens on, and its pseudo-services.
        services: Vec<Service> = "Services",
        /// A digest of the services that it hosts.
        services_hash: String = "ServicesHash",
        /// Its network as last measured; absent in an update keeps the former one.
        net_info: Option<NetInfo> = "NetInfo",
        /// SSH host keys; non-empty while it serves SSH.
        ssh_host_keys: Vec<String> = "sshHostKeys",
        /// The cloud it runs in.
        cloud: String = "Cloud",
        /// Runs without a TUN device.
        userspace: Option<bool> = "Userspace",
        /// Routes subnets without the system's help.
        userspace_router: Option<bool> = "UserspaceRouter",
        /// Is an app connector.
        app_connector: Option<bool> = "AppConnector",
        /// Is a peer relay.
        peer_relay: bool = "PeerRelay",
        /// The StableID of the exit node in use.
        exit_node_id: String = "ExitNodeID",
        /// Where it is.
        location: Option<Location> = "Location",
        /// Its TPM, kept as sent.
        tpm: Option<serde_json::Value> = "TPM",
        /// Its state is encrypted.
        state_encrypted: Option<bool> = "StateEncrypted",
    }
}

message! {
    /// Something a device listens on, or offers through its PeerAPI.
    pub struct Service {
        /// `tcp`, `udp`, `peerapi4`, `peerapi6` or `peerapi-dns-proxy`.
        proto: String = "Proto" always,
        /// The port; 1 for a pseudo-service without one.
        port: u16 = "Port" always,
        /// For people.
        description: String = "Description",
    }
}

message! {
    /// A place on Earth.
    pub struct Location {
        /// The country's name.
        country: String = "Country",
        /// Its two letters.
        country_code: String = "CountryCode",
        /// The city's name.
        city: String = "City",
        /// Its letters.
        city_code: String = "CityCode",
        /// Degrees north.
        latitude: f64 = "Latitude",
        /// Degrees east.
        longitude: f64 = "Longitude",
        /// Greater is preferred among exit nodes at one place.
        priority: i64 = "Priority",
    }
}

message! {
    /// A device's network as it last measured it.
    pub struct NetInfo {
        /// Mapping behaviour other than endpoint-independent (RFC 4787 §4.1).
        mapping_varies_by_dest_ip: Option<bool> = "MappingVariesByDestIP",
        /// IPv6 reaches the internet.
        working_ipv6: Option<bool> = "WorkingIPv6",
        /// The system has IPv6.
        os_has_ipv6: Option<bool> = "OSHasIPv6",
        /// UDP reaches the internet.
        working_udp: Option<bool> = "WorkingUDP",
        /// ICMPv4 reaches the internet.
        working_icmp_v4: Option<bool> = "WorkingICMPv4",
        /// Holds a port mapping.
        have_port_map: bool = "HavePortMap",
        /// A UPnP gateway answered.
        upnp: Option<bool> = "UPnP",
        /// A NAT-PMP gateway answered.
        pmp: Option<bool> = "PMP",
        /// A PCP gateway answered.
        pcp: Option<bool> = "PCP",
        /// The home region; `None` (0) does not overwrite a known one.
        preferred_derp: Option<RegionId> = "PreferredDERP" via "mesh_derp::map::region_or_zero::deserialize",
        /// `wired`, `wifi` or `mobile`.
        link_type: String = "LinkType",
        /// Seconds to each region, by `"<region>-v4"` and `"<region>-v6"`.
        derp_latency: BTreeMap<String, f64> = "DERPLatency",
        /// How the firewall is driven.
        firewall_mode: String = "FirewallMode",
    }
}
