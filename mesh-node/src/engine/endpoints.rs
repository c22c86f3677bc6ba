//! Where we may be reached: interface addresses, what STUN servers have seen, and what the user has set.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_nat::portmap;

use super::DefaultRoute;

/// How an endpoint was found out; control is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EndpointKind {
    /// A port of the gateway that leads to us.
    PortMapped,
    /// An address of one of our interfaces.
    Local,
    /// Our address as a STUN server has seen it.
    Stun,
    /// Our address as a STUN server has seen it, with the port that our socket has here: a guess that it is forwarded.
    StunLocalPort,
    /// Set by the user.
    Explicit,
}

/// An address at which peers may try to reach us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// The address.
    pub address: SocketAddr,
    /// How it was found out.
    pub kind: EndpointKind,
}

/// An address of an interface of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalAddress {
    /// The interface's name.
    pub interface: String,
    /// The address with the length of its network.
    pub network: IpNet,
}

/// What this host has: addresses, and the ports that our sockets are bound to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Local {
    /// The addresses of interfaces that are up, our own TUN device excepted.
    pub addresses: Vec<LocalAddress>,
    /// The port of the IPv4 socket.
    pub port_v4: Option<u16>,
    /// The port of the IPv6 socket.
    pub port_v6: Option<u16>,
    /// The default route of IPv4.
    pub default_v4: Option<DefaultRoute>,
    /// The default route of IPv6.
    pub default_v6: Option<DefaultRoute>,
    /// Whether loopback addresses count even where there are others: for several nodes on one host.
    pub loopback: bool,
}

impl Local {
    pub(super) fn default_routes(&self) -> [Option<DefaultRoute>; 2] {
        [self.default_v4, self.default_v6]
    }
}

/// What the gateways of this host have given, family by family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PortMappings {
    /// IPv4.
    pub v4: portmap::Status,
    /// IPv6: a hole in the router's firewall.
    pub v6: portmap::Status,
}

impl PortMappings {
    fn endpoints(&self) -> impl Iterator<Item = SocketAddr> {
        [self.v4.endpoint(), self.v6.endpoint()].into_iter().flatten()
    }
}

/// Per subnet, how many IPv6 addresses are worth telling (privacy extensions make many).
const MAX_V6_PER_SUBNET: usize = 2;

/// Gathers the endpoints, the likeliest to work from afar first; `seen` are those that STUN servers know us by.
#[must_use]
pub fn gather(local: &Local, mappings: &PortMappings, seen: &[Endpoint], explicit: &[SocketAddr]) -> Vec<Endpoint> {
    let mut found = Vec::new();
    let mut add = |address: SocketAddr, kind| {
        if !found.iter().any(|endpoint: &Endpoint| endpoint.address == address) {
            found.push(Endpoint { address, kind });
        }
    };
    for address in mappings.endpoints() {
        add(address, EndpointKind::PortMapped);
    }
    for address in explicit {
        add(*address, EndpointKind::Explicit);
    }
    for endpoint in seen {
        add(endpoint.address, endpoint.kind);
    }
    for address in interface_addresses(local) {
        add(address, EndpointKind::Local);
    }
    found
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    Regular,
    /// Works only where there is nothing better.
    LastResort,
    Loopback,
    Never,
}

fn scope(address: IpAddr) -> Scope {
    let address = address.to_canonical();
    if address.is_loopback() {
        return Scope::Loopback;
    }
    if address.is_unspecified() || address.is_multicast() || is_overlay(address) {
        return Scope::Never;
    }
    match address {
        IpAddr::V4(v4) if v4.is_link_local() => Scope::LastResort,
        IpAddr::V4(v4) if v4.is_broadcast() => Scope::Never,
        IpAddr::V4(_) => Scope::Regular,
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Scope::Never,
        IpAddr::V6(v6) if v6.is_unique_local() => Scope::LastResort,
        IpAddr::V6(_) => Scope::Regular,
    }
}

/// Whether `address` lies in the ranges that meshes use themselves: a path through another mesh, or through ourselves,
/// is no path. ChromeOS uses a piece of the IPv4 range for its own containers.
fn is_overlay(address: IpAddr) -> bool {
    const CGNAT: Ipv4Net = Ipv4Net::new_assert(std::net::Ipv4Addr::new(100, 64, 0, 0), 10);
    const CHROME_OS: Ipv4Net = Ipv4Net::new_assert(std::net::Ipv4Addr::new(100, 115, 92, 0), 23);
    const ULA: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0), 48);
    match address {
        IpAddr::V4(v4) => CGNAT.contains(&v4) && !CHROME_OS.contains(&v4),
        IpAddr::V6(v6) => ULA.contains(&v6),
    }
}

fn interface_addresses(local: &Local) -> Vec<SocketAddr> {
    let of_scope = |wanted: Scope| -> Vec<SocketAddr> {
        let mut subnets: Vec<(IpNet, usize)> = Vec::new();
        let usable = local.addresses.iter().filter(|found| !is_other_vpn(&found.interface));
        usable
            .filter(|found| scope(found.network.addr()) == wanted)
            .filter(|found| {
                if wanted == Scope::Loopback || found.network.addr().is_ipv4() {
                    return true;
                }
                let subnet = found.network.trunc();
                match subnets.iter_mut().find(|(known, _)| *known == subnet) {
                    Some((_, count)) => {
                        *count += 1;
                        *count <= MAX_V6_PER_SUBNET
                    }
                    None => {
                        subnets.push((subnet, 1));
                        true
                    }
                }
            })
            .filter_map(|found| {
                let port = if found.network.addr().is_ipv4() { local.port_v4 } else { local.port_v6 };
                port.map(|port| SocketAddr::new(found.network.addr(), port))
            })
            .collect()
    };
    let mut addresses = of_scope(Scope::Regular);
    if addresses.is_empty() {
        addresses = of_scope(Scope::LastResort);
    }
    if addresses.is_empty() || local.loopback {
        addresses.extend(of_scope(Scope::Loopback));
    }
    addresses
}

/// Whether other hosts may know us by this address.
pub(super) fn is_usable(found: &LocalAddress) -> bool {
    matches!(scope(found.network.addr()), Scope::Regular | Scope::LastResort) && !is_other_vpn(&found.interface)
}

/// Interfaces that other mesh networks make.
fn is_other_vpn(interface: &str) -> bool {
    interface.starts_with("zt") || interface == "wt0" || interface.starts_with("tailscale")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(addresses: &[(&str, &str)]) -> Local {
        Local {
            addresses: addresses
                .iter()
                .map(|(interface, network)| LocalAddress {
                    interface: (*interface).to_owned(),
                    network: network.parse().unwrap(),
                })
                .collect(),
            port_v4: Some(41641),
            port_v6: Some(41642),
            ..Local::default()
        }
    }

    fn found(local: &Local) -> Vec<String> {
        gather(local, &PortMappings::default(), &[], &[]).iter().map(|endpoint| endpoint.address.to_string()).collect()
    }

    #[test]
    fn loopback_counts_only_where_there_is_nothing_else() {
        let lonely = local(&[("lo", "127.0.0.1/8"), ("lo", "::1/128")]);
        assert_eq!(found(&lonely), ["127.0.0.1:41641", "[::1]:41642"]);
        let mut connected = local(&[("lo", "127.0.0.1/8"), ("eth0", "192.0.2.7/24")]);
        assert_eq!(found(&connected), ["192.0.2.7:41641"]);
        connected.loopback = true;
        assert_eq!(found(&connected), ["192.0.2.7:41641", "127.0.0.1:41641"]);
    }

    #[test]
    fn overlay_ranges_link_local_and_other_meshes_are_left_out() {
        let host = local(&[
            ("eth0", "100.64.1.1/10"),
            ("eth0", "100.115.92.2/23"),
            ("eth0", "fe80::1/64"),
            ("eth0", "fd7a:115c:a1e0::1/128"),
            ("eth0", "169.254.1.1/16"),
            ("zt0", "10.9.0.1/24"),
            ("eth0", "2001:db8::1/64"),
        ]);
        assert_eq!(found(&host), ["100.115.92.2:41641", "[2001:db8::1]:41642"]);
    }

    #[test]
    fn private_leftovers_serve_where_nothing_regular_exists() {
        let host = local(&[("lo", "127.0.0.1/8"), ("eth0", "169.254.1.1/16"), ("eth0", "fd00::5/64")]);
        assert_eq!(found(&host), ["169.254.1.1:41641", "[fd00::5]:41642"]);
    }

    #[test]
    fn at_most_two_addresses_of_an_ipv6_subnet_are_told() {
        let host = local(&[
            ("eth0", "2001:db8::1/64"),
            ("eth0", "2001:db8::2/64"),
            ("eth0", "2001:db8::3/64"),
            ("eth1", "2001:db8:1::1/64"),
        ]);
        assert_eq!(found(&host).len(), 3);
    }

    #[test]
    fn explicit_endpoints_come_first_and_nothing_twice() {
        let host = local(&[("eth0", "192.0.2.7/24")]);
        let seen = [Endpoint { address: "198.51.100.1:5".parse().unwrap(), kind: EndpointKind::Stun }];
        let explicit = ["192.0.2.7:41641".parse().unwrap()];
        let found = gather(&host, &PortMappings::default(), &seen, &explicit);
        let kinds: Vec<_> = found.iter().map(|endpoint| endpoint.kind).collect();
        assert_eq!(kinds, [EndpointKind::Explicit, EndpointKind::Stun]);
    }

    #[test]
    fn a_mapped_port_comes_before_all_and_one_behind_two_nats_not_at_all() {
        let host = local(&[("eth0", "192.168.1.7/24")]);
        let mut mapping = portmap::Mapping {
            protocol: portmap::Protocol::Pcp,
            internal_port: 41641,
            external: "203.0.113.5:7".parse().unwrap(),
            double_nat: false,
        };
        let mapped = |mapping| PortMappings {
            v4: portmap::Status { mapping: Some(mapping), ..portmap::Status::default() },
            ..PortMappings::default()
        };
        let first = gather(&host, &mapped(mapping), &[], &["192.0.2.7:1".parse().unwrap()])[0];
        assert_eq!(first, Endpoint { address: mapping.external, kind: EndpointKind::PortMapped });
        mapping.double_nat = true;
        assert_eq!(gather(&host, &mapped(mapping), &[], &[]).len(), 1);
    }
}
