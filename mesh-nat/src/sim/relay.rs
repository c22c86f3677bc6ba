//! Relays: frames between nodes over streams, which are late where datagrams are lost.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_derp::map::{DerpMap, DerpNode, DerpRegion, RegionId};
use mesh_noise::key::NodePublic;

use super::host::HostId;
use super::link::Link;
use super::packet::Happening;
use super::program::StunServer;
use super::world::World;
use crate::agent::Source;
use crate::classify::{Class, classify};
use crate::path::Family;

/// Opening a connection to a relay: TCP, TLS, the upgrade and the login take a round trip each.
const CONNECT_ROUND_TRIPS: u32 = 4;

impl World {
    /// Adds a relay on the internet, with a STUN server on two ports of its IPv4 and IPv6 addresses, 3478 and 3479.
    /// `link` is what lies between it and the internet.
    pub fn add_relay(&mut self, region: RegionId, link: Link) -> HostId {
        let host = self.add_host(self.internet(), &[Family::V4, Family::V6]);
        self.set_host_link(host, link);
        for family in [Family::V4, Family::V6] {
            for port in [3478, 3479] {
                self.open_socket(host, family, port);
            }
        }
        self.add_program(host, StunServer::default());
        self.stun_servers.extend(self.addresses(host).into_iter().map(|ip| SocketAddr::new(ip, 3478)));
        self.relays.insert(region, host);
        host
    }

    /// The STUN servers: each relay's addresses, with the first of their two ports.
    #[must_use]
    pub fn stun_servers(&self) -> &[SocketAddr] {
        &self.stun_servers
    }

    /// The relays as control would tell of them, by address.
    #[must_use]
    pub fn derp_map(&self) -> Arc<DerpMap> {
        let mut map = DerpMap::default();
        for (id, host) in &self.relays {
            let mut region = DerpRegion::new(*id, format!("lab{id}"), format!("Laboratory {id}"));
            let mut node = DerpNode::new(format!("{id}a"), *id, format!("relay{id}.example"));
            for address in self.addresses(*host) {
                match address {
                    IpAddr::V4(ip) => node.ipv4 = ip.to_string(),
                    IpAddr::V6(ip) => node.ipv6 = ip.to_string(),
                }
            }
            node.stun_port = 3478;
            region.nodes.push(node);
            map.regions.insert(*id, region);
        }
        Arc::new(map)
    }

    /// The node's home relay is another from now on. Peers know when they are told.
    pub fn set_home(&mut self, host: HostId, home: RegionId) {
        self.node_mut(host).home = home;
    }

    /// How long a frame from a host to a relay and back takes where nothing is lost.
    #[must_use]
    pub fn relay_round_trip(&self, host: HostId, region: RegionId) -> Duration {
        self.leg(host, region).delay * 2
    }

    /// The host's connection to its relay is opened anew.
    pub(super) fn reconnect(&mut self, host: HostId) {
        let Some(home) = self.hosts[host.0].node.as_ref().map(|node| node.home) else { return };
        let took = self.relay_round_trip(host, home) * CONNECT_ROUND_TRIPS;
        self.hosts[host.0].relay_ready = self.now + took;
    }

    /// What lies between a host and a relay.
    fn leg(&self, host: HostId, region: RegionId) -> Link {
        let internet = self.networks[self.internet().0].link;
        let network = self.network_of(host).unwrap_or(self.internet());
        let relay = self.relays.get(&region).map(|relay| self.hosts[relay.0].link).unwrap_or_default();
        self.hosts[host.0].link.then(self.access(network)).then(internet).then(relay)
    }

    /// Sends a frame to a node through a relay.
    pub(super) fn send_frame(&mut self, host: HostId, region: RegionId, to: NodePublic, bytes: Vec<u8>) {
        let unplugged = self.hosts[host.0].addresses.is_empty();
        if self.hosts[host.0].asleep || unplugged || !self.relays.contains_key(&region) {
            return;
        }
        let took = self.leg(host, region).carry_reliably(&mut self.rng);
        let place = &mut self.hosts[host.0];
        let at = (self.now.max(place.relay_ready) + took).max(place.last_up);
        place.last_up = at;
        let from = self.key(host);
        self.schedule(at, Happening::FrameUp { region, from, to, bytes });
    }

    /// A frame is at a relay, which passes it on if its addressee is connected.
    pub(super) fn relay_passes(&mut self, region: RegionId, from: NodePublic, to: &NodePublic, bytes: Vec<u8>) {
        let Some(host) = self.by_key.get(to).copied() else { return };
        let place = &self.hosts[host.0];
        if place.asleep || place.addresses.is_empty() || place.relay_ready > self.now {
            return;
        }
        let took = self.leg(host, region).carry_reliably(&mut self.rng);
        let place = &mut self.hosts[host.0];
        let at = (self.now + took).max(place.last_down);
        place.last_down = at;
        self.schedule(at, Happening::FrameDown { region, from, to: host, bytes });
    }

    /// A frame is at its addressee.
    pub(super) fn frame_arrives(&mut self, region: RegionId, from: NodePublic, host: HostId, bytes: &[u8]) {
        if self.hosts[host.0].asleep {
            return;
        }
        let source = Source::relay(region, from);
        self.record(host, source, bytes);
        match classify(bytes) {
            Class::Disco => self.agent_receives(host, source, bytes),
            Class::WireGuard if self.stream_arrives(host, source, bytes) => {}
            Class::WireGuard | Class::Stun | Class::RelayedDisco { .. } | Class::RelayedWireGuard { .. } => {
                let mut programs = 0..self.hosts[host.0].programs.len();
                let _ = programs.any(|index| {
                    self.call_program(host, index, |program, io| program.handle_frame(io, from, bytes)) == Some(true)
                });
            }
        }
        self.settle(host);
    }
}
