//! The host's interfaces and their addresses, and whether it has default routes.
#![expect(clippy::wildcard_enum_match_arm, reason = "the kernel sends more attributes than anyone reads, and new ones")]

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};

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
        for (family, default) in [(Family::V4, &mut found.default_v4), (Family::V6, &mut found.default_v6)] {
            let mut routes = handle.route().get(all_routes(family)).execute();
            while let Some(message) = routes.try_next().await? {
                let leads_out = route(&message, family)
                    .is_some_and(|route| route.destination.prefix_len() == 0 && route.table == MAIN_TABLE);
                let through = interface(&message).and_then(|index| found.interfaces.get(&index));
                *default |= leads_out && !through.is_some_and(|interface| interface.loopback);
            }
        }
        Ok::<_, rtnetlink::Error>(found)
    };
    read.await.map_err(|error| Error::system("list the network interfaces", to_io(error)))
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
}
