//! What a node knows of itself as seen from outside: what STUN servers tell, and what a measurement would tell about the
//! NATs above it.

use std::net::SocketAddr;
use std::time::Duration;

use super::gateway::GatewayConfig;
use super::host::HostId;
use super::world::World;
use crate::behaviour::{Allocation, Behaviour, Filtering, Mapping, PortRange};
use crate::path::{Family, SocketId};
use crate::stun::message::{Response, TransactionId, request};

/// How long a node waits for a STUN server.
const STUN_PATIENCE: Duration = Duration::from_secs(1);

impl World {
    /// What the STUN servers would say, without asking: a node that has been running for a while knows.
    pub(super) fn learn_endpoints(&mut self, host: HostId) {
        for (socket, family) in self.node(host).sockets.clone() {
            let place = &self.hosts[host.0];
            let address = place.addresses.iter().find(|(_, address)| address.is_ipv4() == (family == Family::V4));
            let server = self.stun_servers.iter().find(|server| Family::of(server) == family).copied();
            let (Some((network, address)), Some(port), Some(server)) =
                (address.copied(), place.sockets.port(socket), server)
            else {
                continue;
            };
            if place.udp_blocked {
                continue;
            }
            if let Some(seen) = self.reflect(network, SocketAddr::new(address, port), server) {
                self.node_mut(host).reflexive.insert(socket, seen);
            }
        }
        self.tell_endpoints(host);
    }

    /// Asks the nearest STUN server of each family from the node's first socket of it.
    pub(super) fn ask_stun(&mut self, host: HostId) {
        self.node_mut(host).stun_until = Some(self.now + STUN_PATIENCE);
        for (socket, family) in self.node(host).sockets.clone() {
            let server = self.stun_servers.iter().find(|server| Family::of(server) == family).copied();
            let first = self.node(host).sockets.iter().find(|(_, other)| *other == family).map(|(socket, _)| *socket);
            if let (Some(server), true) = (server, first == Some(socket)) {
                let tx = TransactionId::generate(&mut self.rng);
                self.node_mut(host).asked.insert(tx, socket);
                self.hosts[host.0].sent.stun += 1;
                self.emit(host, socket, server, request(tx));
            }
        }
    }

    pub(super) fn stun_answers(&mut self, host: HostId, socket: SocketId, datagram: &[u8]) -> bool {
        let now = self.now;
        if self.agent(host).is_extra(socket) {
            return self.node_mut(host).agent.handle_stun(now, datagram).is_ok();
        }
        let Ok(response) = Response::decode(datagram) else { return false };
        let node = self.node_mut(host);
        let Some(socket) = node.asked.remove(&response.tx) else { return false };
        node.reflexive.insert(socket, response.mapped);
        if node.asked.is_empty() {
            node.stun_until = None;
        }
        self.tell_endpoints(host);
        true
    }

    pub(super) fn tell_endpoints(&mut self, host: HostId) {
        let (endpoints, now) = (self.endpoints(host), self.now);
        self.node_mut(host).agent.set_endpoints(now, endpoints);
        self.tell_behaviour(host);
    }

    /// What a measurement of the network would tell about the NATs above.
    pub(super) fn tell_behaviour(&mut self, host: HostId) {
        let above = self.network_of(host).map(|network| self.gateways_above(network)).unwrap_or_default();
        let behaviour = behaviour(above.iter().map(|gateway| self.gateway_config(*gateway)));
        let (servers, now) = (self.stun_servers.clone(), self.now);
        let node = self.node_mut(host);
        let v4 = node.sockets.iter().find(|(_, family)| *family == Family::V4);
        let outside = v4.and_then(|(socket, _)| node.reflexive.get(socket)).copied();
        node.agent.set_behaviour(behaviour);
        node.agent.set_outside(now, outside, &servers);
    }
}

/// What NATs and firewalls in a row look like from inside.
fn behaviour<'a>(above: impl Iterator<Item = &'a GatewayConfig>) -> Behaviour {
    let mut seen = Behaviour {
        mapping: Some(Mapping::EndpointIndependent),
        filtering: Some(Filtering::EndpointIndependent),
        ..Behaviour::default()
    };
    for gateway in above {
        seen.filtering = seen.filtering.max(gateway.nat.map(|nat| nat.filtering).or(gateway.firewall));
        let Some(nat) = gateway.nat else { continue };
        // One port towards everyone, whatever the rule is called.
        let keeps = nat.allocation == Allocation::Preserving && nat.overload;
        if !keeps {
            seen.mapping = seen.mapping.max(Some(nat.mapping));
        }
        seen.allocation = Some(nat.allocation);
        seen.ports = (nat.allocation != Allocation::Block && nat.ports != PortRange::ALL).then_some(nat.ports);
    }
    seen
}
