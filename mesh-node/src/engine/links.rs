//! What a change of the host's network means for paths.
//!
//! | what | means |
//! |---|---|
//! | an address that peers could use is gone, a default route is gone or another one, a port is another one | paths in use may be dead: all are doubted and asked at once, while relays carry a copy |
//! | an address, or a default route where there was none | there may be better paths: peers are probed, paths in use are left alone |
//! | anything else: link-local addresses, other meshes' interfaces | nothing |

use std::net::IpAddr;
use std::time::Instant;

use mesh_nat::report::Scope;
use mesh_nat::{Family, SocketId};

use super::endpoints::{Local, is_usable};
use super::{Engine, Event};

/// Where a family's packets leave the host that have no better route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultRoute {
    /// The next hop; none if the route names an interface only.
    pub router: Option<IpAddr>,
    /// The index of the interface that leads to the router.
    pub interface: Option<u32>,
    /// Our address towards it, if the route names one.
    pub source: Option<IpAddr>,
}

/// How much a change of the host's network matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkChange {
    /// Something was added: paths in use go on, and better ones are looked for.
    Minor,
    /// A default route is gone or another one, while all addresses are still there: paths in use are doubted.
    Route,
    /// An address or a port is gone: paths and connections that used it are dead.
    Address,
}

impl LinkChange {
    /// What leads from one network to the other; none if nothing that matters.
    #[must_use]
    pub fn between(former: &Local, now: &Local) -> Option<Self> {
        let ports = (former.port_v4, former.port_v6) != (now.port_v4, now.port_v6);
        let lost = |one: &Local, other: &Local| {
            let kept = |address| other.addresses.iter().any(|found| found.network.addr() == address);
            one.addresses.iter().filter(|found| is_usable(found)).any(|found| !kept(found.network.addr()))
        };
        let routes = || former.default_routes().into_iter().zip(now.default_routes());
        if ports || lost(former, now) {
            Some(Self::Address)
        } else if routes().any(|(former, now)| former.is_some() && former != now) {
            Some(Self::Route)
        } else if lost(now, former) || routes().any(|(former, now)| former != now) {
            Some(Self::Minor)
        } else {
            None
        }
    }

    /// Whether paths in use may be dead.
    #[must_use]
    pub const fn is_major(self) -> bool {
        matches!(self, Self::Route | Self::Address)
    }
}

impl Engine {
    /// The host's network or our sockets have changed. Returns how much that matters.
    pub fn set_local(
        &mut self,
        now: Instant,
        local: Local,
        sockets: &[(SocketId, std::net::SocketAddr)],
    ) -> Option<LinkChange> {
        let change = LinkChange::between(&self.local, &local);
        if self.local != local {
            self.local = local;
            self.netcheck.set_ports(sockets);
            let sockets: Vec<_> = sockets.iter().map(|(id, bound)| (*id, Family::of(bound))).collect();
            self.agent.set_sockets(sockets.clone());
            self.netcheck.set_sockets(sockets);
            self.netcheck.set_interfaces(self.local.addresses.iter().map(|found| found.network.addr()));
            if change.is_some_and(LinkChange::is_major) {
                self.sightings.forget();
            }
            self.gather(now, false);
        }
        if let Some(change) = change {
            if change.is_major() {
                self.agent.rebind(now);
                self.netcheck.forget_network();
            } else {
                self.agent.look_again(now);
            }
            self.start_measuring(now, Scope::Full);
            self.events.push_back(Event::LinkChanged(change));
        }
        self.settle(now);
        change
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::LocalAddress;

    fn local(addresses: &[&str], router_v4: Option<&str>) -> Local {
        let address = |text: &&str| LocalAddress { interface: "eth0".to_owned(), network: text.parse().unwrap() };
        let route = |router: &str| DefaultRoute { router: router.parse().ok(), interface: Some(2), source: None };
        Local {
            addresses: addresses.iter().map(address).collect(),
            default_v4: router_v4.map(route),
            port_v4: Some(41641),
            ..Local::default()
        }
    }

    #[test]
    fn what_is_lost_is_major_what_is_added_minor_and_what_nobody_uses_nothing() {
        let home = local(&["192.168.1.7/24", "fe80::7/64"], Some("192.168.1.1"));
        let cases = [
            (local(&["192.168.1.7/24", "fe80::7/64"], Some("192.168.1.1")), None),
            (local(&["192.168.1.7/24"], Some("192.168.1.1")), None),
            (local(&["192.168.1.7/24", "fe80::8/64"], Some("192.168.1.1")), None),
            (local(&["192.168.1.7/24", "10.0.0.4/8"], Some("192.168.1.1")), Some(LinkChange::Minor)),
            (local(&["192.168.1.7/24"], Some("192.168.1.2")), Some(LinkChange::Route)),
            (local(&["192.168.1.7/24", "10.0.0.4/8"], None), Some(LinkChange::Route)),
            (local(&["10.0.0.4/8"], Some("10.0.0.1")), Some(LinkChange::Address)),
            (local(&[], Some("192.168.1.1")), Some(LinkChange::Address)),
            (Local { port_v4: Some(5), ..home.clone() }, Some(LinkChange::Address)),
        ];
        for (number, (now, expected)) in cases.into_iter().enumerate() {
            assert_eq!(LinkChange::between(&home, &now), expected, "case {number}");
        }
        let offline = local(&["192.168.1.7/24"], None);
        assert_eq!(LinkChange::between(&offline, &home), Some(LinkChange::Minor));
    }
}
