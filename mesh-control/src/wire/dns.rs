//! DNS settings.

use std::collections::BTreeMap;
use std::net::IpAddr;

message! {
    /// How a node resolves names. A new one replaces the former wholly.
    pub struct DnsConfig {
        /// Resolvers that override the device's own.
        resolvers: Vec<Resolver> = "Resolvers",
        /// Split DNS: a suffix without leading dot, and who answers for it; nobody listed: this node itself.
        routes: BTreeMap<String, Vec<Resolver>> = "Routes" via "crate::wire::lenient::map_of_nullable",
        /// Used only where the device's own cannot be.
        fallback_resolvers: Vec<Resolver> = "FallbackResolvers",
        /// Search domains without trailing dot, the tailnet's own first.
        domains: Vec<String> = "Domains",
        /// Names of peers resolve (MagicDNS).
        proxied: bool = "Proxied",
        /// Names for which certificates may be had.
        cert_domains: Vec<String> = "CertDomains",
        /// Further records.
        extra_records: Vec<DnsRecord> = "ExtraRecords",
        /// Names that this node does not answer when it resolves for others.
        exit_node_filtered_set: Vec<String> = "ExitNodeFilteredSet",
    }
}

message! {
    /// A server that answers DNS.
    pub struct Resolver {
        /// `IP`, `IP:port`, or an `https://` URL.
        addr: String = "Addr",
        /// Addresses of the host in a URL.
        bootstrap_resolution: Vec<IpAddr> = "BootstrapResolution",
        /// Keep using it with an exit node.
        use_with_exit_node: bool = "UseWithExitNode",
    }
}

message! {
    /// One record.
    pub struct DnsRecord {
        /// The full name.
        name: String = "Name" always,
        /// `A`, `AAAA`, or empty for whichever fits the value.
        kind: String = "Type",
        /// An address.
        value: String = "Value" always,
    }
}
