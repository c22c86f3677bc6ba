//! Nodes, changes of nodes, and the people who own them.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use mesh_derp::map::RegionId;
use mesh_noise::key::{DiscoPublic, MachinePublic, NodePublic};

use super::dns::Resolver;
use super::filter::CapMap;
use super::hostinfo::Hostinfo;
use super::ids::{Base64, NodeId, UserId};
use super::time::Timestamp;
use crate::version::CapabilityVersion;

message! {
    /// One machine in the mesh, as a netmap shows it.
    pub struct Node {
        /// Its number; sorts lists of nodes.
        id: NodeId = "ID" always,
        /// An opaque, lasting name. Never empty.
        stable_id: String = "StableID" always,
        /// The full DNS name with a trailing dot.
        name: String = "Name" always,
        /// The owner.
        user: UserId = "User" always,
        /// Who shared it in, if not the owner.
        sharer: UserId = "Sharer",
        /// Its node key.
        key: NodePublic = "Key" always,
        /// When the key expires; zero: never.
        key_expiry: Timestamp = "KeyExpiry",
        /// Tailnet lock: the signature of the key.
        key_signature: Option<Base64> = "KeySignature",
        /// Its machine key; servers leave it out for peers.
        machine: MachinePublic = "Machine",
        /// Its disco key; zero: cannot be reached directly.
        disco_key: DiscoPublic = "DiscoKey",
        /// Its own addresses, IPv4 first.
        addresses: Vec<IpNet> = "Addresses" always,
        /// Everything that is routed to it; `None` means its addresses.
        allowed_ips: Option<Vec<IpNet>> = "AllowedIPs",
        /// Where it may be reached by UDP. Always sent, since an absent list does not clear one that a client knows.
        endpoints: Vec<SocketAddr> = "Endpoints" always via "crate::wire::lenient::endpoints",
        /// The home region in its old form, `127.3.3.40:<region>`; for clients before capability 111.
        legacy_derp: String = "DERP",
        /// The home region; `None`: not known.
        home_derp: Option<RegionId> = "HomeDERP" via "mesh_derp::map::region_or_zero::deserialize",
        /// The device, trimmed for peers.
        hostinfo: Option<Box<Hostinfo>> = "Hostinfo",
        /// Since when it is known.
        created: Timestamp = "Created",
        /// What its client understands.
        cap: CapabilityVersion = "Cap",
        /// Its tags, each `tag:…`.
        tags: Vec<String> = "Tags",
        /// Subnet routes that it serves at present.
        primary_routes: Vec<IpNet> = "PrimaryRoutes",
        /// When it was last connected; for offline nodes only.
        last_seen: Option<Timestamp> = "LastSeen",
        /// Connected to control; `None`: unknown.
        online: Option<bool> = "Online",
        /// May run.
        machine_authorized: bool = "MachineAuthorized",
        /// Names of capabilities, an older form of `cap_map`.
        capabilities: Vec<String> = "Capabilities",
        /// Capabilities with values.
        cap_map: CapMap = "CapMap" via "crate::wire::lenient::map_of_nullable",
        /// Outside tailnet lock: only its PeerAPI may be used.
        unsigned_peer_api_only: bool = "UnsignedPeerAPIOnly",
        /// Names its data-plane audit log.
        data_plane_audit_log_id: String = "DataPlaneAuditLogID",
        /// Its key has expired.
        expired: bool = "Expired",
        /// The IPv4 address by which this peer knows us.
        self_node_v4_masq_addr: Option<IpAddr> = "SelfNodeV4MasqAddrForThisPeer",
        /// The IPv6 address by which this peer knows us.
        self_node_v6_masq_addr: Option<IpAddr> = "SelfNodeV6MasqAddrForThisPeer",
        /// Plain WireGuard: no disco, no relay.
        is_wireguard_only: bool = "IsWireGuardOnly",
        /// May be contacted but may not initiate.
        is_jailed: bool = "IsJailed",
        /// Resolvers to use while this WireGuard-only node is the exit node.
        exit_node_dns_resolvers: Vec<Resolver> = "ExitNodeDNSResolvers",
    }
}

impl Node {
    /// What is routed to this node: its allowed IPs, or its addresses where the server left those out.
    #[must_use]
    pub fn routed(&self) -> &[IpNet] {
        if self.unsigned_peer_api_only {
            return &self.addresses;
        }
        self.allowed_ips.as_deref().unwrap_or(&self.addresses)
    }

    /// Its home region, from either form.
    #[must_use]
    pub fn home(&self) -> Option<RegionId> {
        self.home_derp.or_else(|| self.legacy_derp.strip_prefix("127.3.3.40:")?.parse().ok())
    }

    /// The first label of its name.
    #[must_use]
    pub fn short_name(&self) -> &str {
        self.name.split('.').next().unwrap_or_default()
    }

    /// Whether its key is past its expiry at `now` (by the server's clock).
    #[must_use]
    pub fn expired_at(&self, now: Timestamp) -> bool {
        self.expired || (!self.key_expiry.is_zero() && self.key_expiry <= now)
    }

    /// Changes the fields that `change` names.
    pub fn apply(&mut self, change: &PeerChange) {
        let PeerChange {
            node_id: _,
            derp_region,
            cap,
            cap_map,
            endpoints,
            key,
            key_signature,
            disco_key,
            online,
            last_seen,
            key_expiry,
        } = change;
        if derp_region.is_some() {
            self.home_derp = *derp_region;
            self.legacy_derp.clear();
        }
        if cap.0 != 0 {
            self.cap = *cap;
        }
        if let Some(map) = cap_map {
            self.cap_map.clone_from(map);
        }
        if let Some(list) = endpoints {
            self.endpoints.clone_from(list);
        }
        if !key.is_zero() {
            self.key = *key;
        }
        if key_signature.is_some() {
            self.key_signature.clone_from(key_signature);
        }
        if !disco_key.is_zero() {
            self.disco_key = *disco_key;
        }
        if online.is_some() {
            self.online = *online;
        }
        if last_seen.is_some() {
            self.last_seen = *last_seen;
        }
        if let Some(expiry) = key_expiry {
            self.key_expiry = *expiry;
        }
    }
}

message! {
    /// Some fields of a peer that changed; what is absent stays.
    pub struct PeerChange {
        /// Which peer. An unknown one is ignored.
        node_id: NodeId = "NodeID" always,
        /// A new home region; `None` (0) stays.
        derp_region: Option<RegionId> = "DERPRegion" via "mesh_derp::map::region_or_zero::deserialize",
        /// A new capability version; 0 stays.
        cap: CapabilityVersion = "Cap",
        /// Replaces all capabilities.
        cap_map: Option<CapMap> = "CapMap" via "crate::wire::lenient::optional_map_of_nullable",
        /// Replaces all endpoints; an empty list clears them.
        endpoints: Option<Vec<SocketAddr>> = "Endpoints" via "crate::wire::lenient::optional_endpoints",
        /// A new node key; zero stays.
        key: NodePublic = "Key",
        /// The new key's signature.
        key_signature: Option<Base64> = "KeySignature",
        /// A new disco key; zero stays.
        disco_key: DiscoPublic = "DiscoKey",
        /// Connected or not.
        online: Option<bool> = "Online",
        /// When it was last connected.
        last_seen: Option<Timestamp> = "LastSeen",
        /// A new expiry; the zero time removes it.
        key_expiry: Option<Timestamp> = "KeyExpiry",
    }
}

message! {
    /// A person or a tag, for showing.
    pub struct UserProfile {
        /// The number.
        id: UserId = "ID" always,
        /// The name they sign in with.
        login_name: String = "LoginName" always,
        /// The name for people.
        display_name: String = "DisplayName" always,
        /// A picture's address.
        profile_pic_url: String = "ProfilePicURL",
        /// Groups that they are in.
        groups: Vec<String> = "Groups",
    }
}
