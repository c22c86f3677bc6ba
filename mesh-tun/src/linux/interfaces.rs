//! The host's interfaces and their addresses, and whether it has default routes.
#![expect(clippy::wildcard_enum_match_arm, reason = "the kernel sends more attributes than anyone reads, and new ones")]

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};

use super::netlink::{Netlink, address, all_routes, interface, is_link_local, route, to_io};
use crate::Error;
use crate::plan::{Family, MAIN_TABLE};

/// The host's network as it is now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// By interface index.
    pub interfaces: BTreeMap<u32, Interface>,
    /// Whether IPv4 has a default route in the main table.
    pub default_v4: bool,
    /// Whether IPv6 has a default route in the main table.
    pub default_v6: bool,
    /// The router of IPv4's default route, if it leads to one.
    pub router_v4: Option<Router>,
    /// The router of IPv6's default route, if it leads to one.
    pub router_v6: Option<Router>,
}

/// A default route's next hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Router {
    /// Its address, link-local for most of IPv6.
    pub address: IpAddr,
    /// The index of the interface that it is reached through.
    pub interface: u32,
    /// Our address towards it, if the route names one.
    pub source: Option<IpAddr>,
    /// Lower is preferred among default routes.
    metric: u32,
}

/// One interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Whether it is up and has a carrier.
    pub up: bool,
    /// Whether it leads back to this host.
    pub loopback: bool,
    /// Its addresses with their prefixes.
    pub addresses: Vec<IpNet>,
}

impl Interfaces {
    /// Our address that a router sees us with: the one that the route names, else one in the router's network, else the
    /// first of the family that is not link-local.
    #[must_use]
    pub fn source_towards(&self, router: &Router) -> Option<IpAddr> {
        let interface = self.interfaces.get(&router.interface).filter(|interface| interface.up)?;
        let beside = || interface.addresses.iter().find(|network| network.contains(&router.address)).map(IpNet::addr);
        let any = || {
            let family = |address: &IpAddr| address.is_ipv4() == router.address.is_ipv4();
            interface.addresses.iter().map(IpNet::addr).filter(family).find(|address| !is_link_local(*address))
        };
        router.source.or_else(|| beside().filter(|address| !is_link_local(*address))).or_else(any)
    }

    /// The addresses that other hosts might reach this one at: of interfaces that are up, but for `except` (our own
    /// tunnel), loopback and link-local ones.
    pub fn reachable(&self, except: Option<u32>) -> impl Iterator<Item = IpAddr> {
        self.interfaces
            .iter()
            .filter(move |(index, interface)| Some(**index) != except && interface.up && !interface.loopback)
            .flat_map(|(_, interface)| interface.addresses.iter().map(IpNet::addr))
            .filter(|address| !address.is_loopback() && !is_link_local(*address))
    }
}

/// Reads the host's interfaces, addresses and default routes.
///
/// # Errors
/// [`Error::System`] if the kernel does not answer.
pub async fn interfaces(netlink: &Netlink) -> Result<Interfaces, Error> {
    let handle = &netlink.handle;
    let read = async {
        let mut found = Interfaces::default();
        let mut links = handle.link().get().execute();
        while let Some(link) = links.try_next().await? {
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
            let flags = link.header.flags;
            let interface = Interface {
                name: name.unwrap_or_default(),
                up: flags.contains(LinkFlags::Up | LinkFlags::Running),
                loopback: flags.contains(LinkFlags::Loopback),
                addresses: Vec::new(),
            };
            found.interfaces.insert(link.header.index, interface);
        }
        let mut addresses = handle.address().get().execute();
        while let Some(message) = addresses.try_next().await? {
            if let Some(interface) = found.interfaces.get_mut(&message.header.index) {
                interface.addresses.extend(address(&message));
            }
        }
        let families = [
            (Family::V4, &mut found.default_v4, &mut found.router_v4),
            (Family::V6, &mut found.default_v6, &mut found.router_v6),
        ];
        for (family, default, best) in families {
            let mut routes = handle.route().get(all_routes(family)).execute();
            while let Some(message) = routes.try_next().await? {
                let leads_out = route(&message, family)
                    .is_some_and(|route| route.destination.prefix_len() == 0 && route.table == MAIN_TABLE);
                let through = interface(&message).and_then(|index| found.interfaces.get(&index));
                if leads_out && !through.is_some_and(|interface| interface.loopback) {
                    *default = true;
                    let preferred = |router: &Router| best.is_none_or(|best| router.metric < best.metric);
                    *best = router(&message).filter(preferred).or(*best);
                }
            }
        }
        Ok::<_, rtnetlink::Error>(found)
    };
    read.await.map_err(|error| Error::system("list the network interfaces", to_io(error)))
}

/// The one next hop of a route.
fn router(message: &RouteMessage) -> Option<Router> {
    let (mut address, mut source, mut metric) = (None, None, 0);
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Gateway(gateway) => address = ip(gateway),
            RouteAttribute::PrefSource(preferred) => source = ip(preferred),
            RouteAttribute::Priority(number) => metric = *number,
            _ => {}
        }
    }
    Some(Router { address: address?, interface: interface(message)?, source, metric })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_host_has_a_loopback_interface() {
        let found = interfaces(&Netlink::open().unwrap()).await.unwrap();
        let loopback = found.interfaces.values().find(|interface| interface.loopback).unwrap();
        assert_eq!(loopback.name, "lo");
        assert!(found.reachable(None).all(|address| !address.is_loopback()));
    }

    #[test]
    fn only_addresses_that_others_can_use_are_reachable() {
        let interface = |up, loopback, addresses: &[&str]| Interface {
            name: "x".into(),
            up,
            loopback,
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        };
        let found = Interfaces {
            interfaces: BTreeMap::from([
                (1, interface(true, true, &["127.0.0.1/8"])),
                (2, interface(true, false, &["192.0.2.7/24", "fe80::1/64", "2001:db8::7/64"])),
                (3, interface(false, false, &["198.51.100.1/24"])),
                (4, interface(true, false, &["100.64.0.1/32"])),
            ]),
            ..Interfaces::default()
        };
        let reachable: Vec<_> = found.reachable(Some(4)).map(|address| address.to_string()).collect();
        assert_eq!(reachable, ["192.0.2.7", "2001:db8::7"]);
    }

    #[test]
    fn a_router_sees_us_with_the_address_that_the_route_or_its_network_names() {
        let interface = Interface {
            up: true,
            addresses: ["198.51.100.9/24", "192.168.1.7/24", "fe80::7/64", "2001:db8::7/64"]
                .map(|text| text.parse().unwrap())
                .to_vec(),
            ..Interface::default()
        };
        let found = Interfaces { interfaces: BTreeMap::from([(2, interface)]), ..Interfaces::default() };
        let mut router = Router { address: "192.168.1.1".parse().unwrap(), interface: 2, source: None, metric: 0 };
        let source = |router: &Router| found.source_towards(router).map(|address| address.to_string());
        assert_eq!(source(&router).as_deref(), Some("192.168.1.7"));
        router.source = Some("198.51.100.9".parse().unwrap());
        assert_eq!(source(&router).as_deref(), Some("198.51.100.9"));
        router = Router { address: "fe80::1".parse().unwrap(), source: None, ..router };
        assert_eq!(source(&router).as_deref(), Some("2001:db8::7"));
        router.interface = 3;
        assert_eq!(source(&router), None);
    }

    #[test]
    fn the_next_hop_of_a_route_is_read() {
        let mut message = RouteMessage::default();
        assert_eq!(router(&message), None);
        message.attributes = vec![
            RouteAttribute::Gateway(RouteAddress::Inet([192, 168, 1, 1].into())),
            RouteAttribute::Oif(4),
            RouteAttribute::Priority(100),
        ];
        let read = router(&message).unwrap();
        assert_eq!((read.address.to_string().as_str(), read.interface, read.metric), ("192.168.1.1", 4, 100));
    }
}
