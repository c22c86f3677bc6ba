//! Packet filter rules and capability grants.

use std::collections::BTreeMap;

use ipnet::IpNet;

/// Capabilities by name. Presence of the name is what counts; the values are each capability's own business.
pub type CapMap = BTreeMap<String, Vec<serde_json::Value>>;

message! {
    /// Who may open what on the node that receives it, or which capabilities they have there: never both.
    pub struct FilterRule {
        /// Sources: an address, a prefix, an inclusive range `a-b`, `*`, or `cap:NAME` for any peer that has it.
        src_ips: Vec<String> = "SrcIPs" always,
        /// A relic of 2020. If a rule has it the whole filter is void. Never sent.
        src_bits: Vec<i64> = "SrcBits",
        /// Destinations and their ports.
        dst_ports: Vec<NetPortRange> = "DstPorts",
        /// IP protocol numbers; empty means TCP, UDP, ICMP and ICMPv6.
        ip_proto: Vec<i64> = "IPProto",
        /// Capabilities that the sources have at these destinations.
        cap_grant: Vec<CapGrant> = "CapGrant",
    }
}

impl FilterRule {
    /// Everything from everywhere to every port.
    #[must_use]
    pub fn allow_all() -> Self {
        let any = NetPortRange { ip: "*".into(), bits: None, ports: PortRange::ANY };
        Self { src_ips: vec!["*".into()], dst_ports: vec![any], ..Self::default() }
    }
}

message! {
    /// A destination in a [`FilterRule`].
    pub struct NetPortRange {
        /// An address, a prefix, an inclusive range `a-b`, or `*`.
        ip: String = "IP" always,
        /// A relic of 2020. If a rule has it the whole filter is void. Never sent.
        bits: Option<i64> = "Bits",
        /// The ports.
        ports: PortRange = "Ports" always,
    }
}

message! {
    /// Ports from `first` to `last`, both included; 0 to 65535 is any.
    #[derive(Copy, Eq)]
    pub struct PortRange {
        /// The first.
        first: u16 = "First" always,
        /// The last.
        last: u16 = "Last" always,
    }
}

impl PortRange {
    /// Every port.
    pub const ANY: Self = Self { first: 0, last: u16::MAX };
}

message! {
    /// Capabilities at some destinations.
    pub struct CapGrant {
        /// The receiving node's own addresses.
        dsts: Vec<IpNet> = "Dsts" always,
        /// Names without values.
        caps: Vec<String> = "Caps",
        /// Names with values.
        cap_map: CapMap = "CapMap" via "crate::wire::lenient::map_of_nullable",
    }
}
