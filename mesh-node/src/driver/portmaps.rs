//! The port mappings of a node: one for IPv4, and a hole in the router's firewall for an IPv6 address.

use mesh_nat::driver::PortMapper;
use mesh_nat::portmap::{Config, Network, is_public};
use mesh_noise::random::SystemRng;
use mesh_tun::linux::BYPASS_MARK;
use mesh_tun::linux::interfaces::{Interfaces, Router};

use super::{Clock, Sockets};
use crate::engine::{Engine, PortMappings};

/// The mappers of both families, or none if the user wants none.
#[derive(Debug, Default)]
pub(crate) struct PortMaps(Option<[PortMapper; 2]>);

impl PortMaps {
    /// Mappers that map nothing yet; none unless `wanted`.
    pub(crate) fn new(clock: Clock, wanted: bool) -> Self {
        let mapper = || {
            let now = Box::new(move || clock.now());
            PortMapper::new(Config::default(), SystemRng.array(), Some(BYPASS_MARK), now)
        };
        Self(wanted.then(|| [mapper(), mapper()]))
    }

    /// Follows the host's default routes.
    pub(crate) fn set_host(&mut self, found: &Interfaces) {
        let Some([v4, v6]) = &mut self.0 else { return };
        // Who has a public address needs no mapping.
        v4.set_network(network(found, found.router_v4.as_ref()).filter(|network| !is_public(network.client)));
        v6.set_network(network(found, found.router_v6.as_ref()).filter(|network| is_public(network.client)));
    }

    /// Maps the ports of `sockets`, or gives everything back.
    pub(crate) fn set_sockets(&mut self, sockets: Option<&Sockets>) {
        let Some(mappers) = &mut self.0 else { return };
        let mut ports = [None; 2];
        for (_, socket) in sockets.into_iter().flat_map(Sockets::all) {
            let bound = socket.local_addr();
            ports[usize::from(bound.is_ipv6())] = Some(bound.port());
        }
        for (mapper, port) in mappers.iter_mut().zip(ports) {
            mapper.set_port(port);
        }
    }

    /// Tells the engine of mappings, and the mappers of our addresses as it has found them.
    pub(crate) fn exchange(&mut self, clock: Clock, engine: &mut Engine) {
        let Some([v4, v6]) = &mut self.0 else { return };
        if let Some(report) = engine.report() {
            // A measurement that found nothing out takes nothing back.
            for (mapper, seen) in [(&mut *v4, report.global_v4), (&mut *v6, report.global_v6)] {
                if let Some(seen) = seen {
                    mapper.set_reflexive(Some(seen.ip()));
                }
            }
        }
        engine.set_port_mappings(clock.now(), PortMappings { v4: v4.status(), v6: v6.status() });
    }

    /// Waits until something has changed. Safe to cancel.
    pub(crate) async fn changed(&mut self) {
        let Some([v4, v6]) = &mut self.0 else { return std::future::pending().await };
        tokio::select! {
            event = v4.next_event() => tracing::debug!(?event, "IPv4 port mapping"),
            event = v6.next_event() => tracing::debug!(?event, "IPv6 port mapping"),
        }
    }

    /// Gives everything back; takes three seconds at most.
    pub(crate) async fn close(&mut self) {
        if let Some([v4, v6]) = &mut self.0 {
            tokio::join!(v4.close(), v6.close());
        }
    }
}

fn network(found: &Interfaces, router: Option<&Router>) -> Option<Network> {
    let router = router?;
    let client = found.source_towards(router)?;
    let scope = if router.address.is_ipv6() { router.interface } else { 0 };
    Some(Network { gateway: router.address, scope, client })
}
