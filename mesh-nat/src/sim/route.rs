//! Networks, their addresses, and how datagrams find their way between them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::gateway::{Gateway, GatewayConfig, GatewayId, Service};
use super::host::HostId;
use super::link::Link;
use super::nat::Nat;
use super::packet::{Happening, Packet};
use super::world::World;

/// Names one network of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkId(pub(super) usize);

/// Datagrams that have crossed so many gateways go in circles.
const MAX_HOPS: u8 = 16;

/// Whose an address is, seen from one network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Host(HostId),
    /// A gateway that leads to it.
    Down(GatewayId),
    /// The gateway that leads out of the network itself.
    Up(GatewayId),
}

pub(super) struct Network {
    /// Every crossing of the network, from one host or gateway to another.
    pub(super) link: Link,
    pub(super) gateway: Option<GatewayId>,
    pub(super) owners: BTreeMap<IpAddr, Owner>,
    /// The first three bytes of its IPv4 addresses. The internet has none: it counts through 198.18.0.0/15.
    prefix: Option<[u8; 3]>,
    hosts: u16,
}

impl Network {
    pub(super) fn internet(delay: Duration) -> Self {
        Self { link: Link::with_delay(delay), gateway: None, owners: BTreeMap::new(), prefix: None, hosts: 0 }
    }
}

impl World {
    /// The network that every other one leads to in the end.
    #[must_use]
    pub const fn internet(&self) -> NetworkId {
        NetworkId(0)
    }

    /// Adds a network behind a gateway in `outer`. Its private addresses, if it has such, are unlike any other network's.
    pub fn network_behind(&mut self, outer: NetworkId, gateway: impl Into<GatewayConfig>) -> NetworkId {
        let number = u16::try_from(self.networks.len()).unwrap_or(u16::MAX);
        let [high, low] = number.to_be_bytes();
        self.network_with_prefix(outer, gateway, [10, high, low])
    }

    /// Adds a network whose private addresses begin with `prefix`, such as that of many other homes.
    pub fn network_with_prefix(
        &mut self,
        outer: NetworkId,
        gateway: impl Into<GatewayConfig>,
        prefix: [u8; 3],
    ) -> NetworkId {
        let config = gateway.into();
        let (network, id) = (NetworkId(self.networks.len()), GatewayId(self.gateways.len()));
        let inside = IpAddr::from([prefix[0], prefix[1], prefix[2], 1]);
        let outside = config.nat.map(|_| self.new_v4(outer));
        self.networks.push(Network {
            link: Link::default(),
            gateway: Some(id),
            owners: BTreeMap::from([(inside, Owner::Up(id))]),
            prefix: Some(prefix),
            hosts: 1,
        });
        self.gateways.push(Gateway::new(config, outer, network, outside, inside));
        if let Some(outside) = outside {
            self.announce(outer, outside, Owner::Down(id));
        }
        network
    }

    /// The gateway that leads out of a network; the internet has none.
    #[must_use]
    pub fn gateway_of(&self, network: NetworkId) -> Option<GatewayId> {
        self.networks[network.0].gateway
    }

    /// What every crossing of a network does. The internet delays by 20 ms, other networks do nothing.
    pub fn set_link(&mut self, network: NetworkId, link: Link) {
        self.networks[network.0].link = link;
    }

    /// What every crossing of a network does.
    #[must_use]
    pub fn link(&self, network: NetworkId) -> Link {
        self.networks[network.0].link
    }

    /// Adds something that the gateway does for those inside.
    pub fn add_service(&mut self, gateway: GatewayId, service: impl Service + 'static) {
        self.gateways[gateway.0].services.push(Box::new(service));
    }

    /// The gateway's NAT, if it has one.
    #[must_use]
    pub fn nat(&self, gateway: GatewayId) -> Option<&Nat> {
        self.gateways[gateway.0].nat.as_ref()
    }

    /// The gateway's NAT, to configure forwards.
    pub fn nat_mut(&mut self, gateway: GatewayId) -> Option<&mut Nat> {
        self.gateways[gateway.0].nat.as_mut()
    }

    /// How the gateway behaves.
    #[must_use]
    pub fn gateway_config(&self, gateway: GatewayId) -> &GatewayConfig {
        &self.gateways[gateway.0].config
    }

    /// The gateway forgets every flow.
    pub fn reboot(&mut self, gateway: GatewayId) {
        self.gateways[gateway.0].reboot();
    }

    /// Whether UDP passes the gateway. Relays are reached all the same.
    pub fn block_udp(&mut self, gateway: GatewayId, blocked: bool) {
        self.gateways[gateway.0].udp_blocked = blocked;
    }

    /// The gateways between a network and the internet, the nearest first.
    #[must_use]
    pub fn gateways_above(&self, network: NetworkId) -> Vec<GatewayId> {
        let next = |id: &GatewayId| self.networks[self.gateways[id.0].outer.0].gateway;
        std::iter::successors(self.networks[network.0].gateway, next).collect()
    }

    /// An IPv4 address that nobody has, of the nearest network that has its own.
    pub(super) fn new_v4(&mut self, network: NetworkId) -> IpAddr {
        let place = &mut self.networks[network.0];
        match (place.gateway, place.prefix) {
            (Some(gateway), _) if self.gateways[gateway.0].nat.is_none() => {
                let outer = self.gateways[gateway.0].outer;
                self.new_v4(outer)
            }
            (_, Some([a, b, c])) => {
                place.hosts += 1;
                IpAddr::from([a, b, c, u8::try_from(place.hosts).unwrap_or(254)])
            }
            (_, None) => {
                place.hosts += 1;
                let [high, low] = place.hosts.to_be_bytes();
                IpAddr::V4(Ipv4Addr::new(198, 18, high, low))
            }
        }
    }

    /// An IPv6 address that nobody has.
    pub(super) fn new_v6(&mut self, network: NetworkId) -> IpAddr {
        let number = u16::try_from(network.0).unwrap_or(u16::MAX);
        self.next_v6 += 1;
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, number, 0, 0, 0, 0, self.next_v6))
    }

    /// Makes an address known in `network`, and in those above it as far as it is good there.
    pub(super) fn announce(&mut self, network: NetworkId, address: IpAddr, owner: Owner) {
        let (mut network, mut owner) = (network, owner);
        loop {
            self.networks[network.0].owners.insert(address, owner);
            let Some(gateway) = self.networks[network.0].gateway else { return };
            if address.is_ipv4() && self.gateways[gateway.0].nat.is_some() {
                return;
            }
            network = self.gateways[gateway.0].outer;
            owner = Owner::Down(gateway);
        }
    }

    /// Takes an address back.
    pub(super) fn withdraw(&mut self, address: IpAddr, host: HostId) {
        let owned: Vec<NetworkId> = (0..self.networks.len())
            .map(NetworkId)
            .filter(|network| self.networks[network.0].owners.get(&address) == Some(&Owner::Host(host)))
            .collect();
        for network in owned {
            self.networks[network.0].owners.remove(&address);
            let mut next = self.networks[network.0].gateway;
            while let Some(gateway) = next {
                if address.is_ipv4() && self.gateways[gateway.0].nat.is_some() {
                    break;
                }
                let outer = self.gateways[gateway.0].outer;
                self.networks[outer.0].owners.remove(&address);
                next = self.networks[outer.0].gateway;
            }
        }
    }

    /// A packet is in `network`, having come over `link`: on to where its destination leads.
    pub(super) fn enter(&mut self, network: NetworkId, link: Link, mut packet: Packet) {
        packet.hops += 1;
        if packet.hops > MAX_HOPS {
            return;
        }
        let place = &self.networks[network.0];
        let link = link.then(place.link);
        let length = packet.length();
        let multicast = packet.to.ip().is_multicast();
        let (link, what) = match (place.owners.get(&packet.to.ip()), place.gateway) {
            (Some(Owner::Host(host)), _) => (link.then(self.hosts[host.0].link), Happening::Host(*host, packet)),
            (Some(Owner::Down(gateway)), _) => {
                (link.then(self.gateways[gateway.0].config.uplink), Happening::Inbound(*gateway, packet))
            }
            (Some(Owner::Up(gateway)), _) => (link, Happening::Service(*gateway, packet)),
            (None, Some(gateway)) if multicast => (link, Happening::Service(gateway, packet)),
            (None, Some(gateway)) => (link, Happening::Outbound(gateway, packet)),
            (None, None) => return,
        };
        match link.carry(&mut self.rng, length) {
            Some(took) => self.schedule(self.now + took, what),
            None => self.lost += 1,
        }
    }

    pub(super) fn at_gateway_outbound(&mut self, id: GatewayId, mut packet: Packet) {
        let gateway = &mut self.gateways[id.0];
        if gateway.udp_blocked {
            return;
        }
        let Some(from) = gateway.outbound(self.now, &mut self.rng, packet.from, packet.to) else { return };
        packet.from = from;
        if gateway.outside == Some(packet.to.ip()) {
            let hairpin = gateway.nat.as_ref().is_some_and(|nat| nat.config().hairpin);
            if hairpin {
                self.at_gateway_inbound(id, packet);
            }
            return;
        }
        let (outer, uplink) = (gateway.outer, gateway.config.uplink);
        self.enter(outer, uplink, packet);
    }

    pub(super) fn at_gateway_inbound(&mut self, id: GatewayId, mut packet: Packet) {
        let gateway = &mut self.gateways[id.0];
        if gateway.udp_blocked {
            return;
        }
        let Some(to) = gateway.inbound(self.now, packet.from, packet.to) else { return };
        packet.to = to;
        let inner = gateway.inner;
        self.enter(inner, Link::default(), packet);
    }

    pub(super) fn at_gateway_service(&mut self, id: GatewayId, packet: &Packet) {
        let gateway = &mut self.gateways[id.0];
        let answers = gateway.serve(self.now, packet.from, packet.to, &packet.datagram);
        let (inside, inner) = (gateway.inside, gateway.inner);
        for (port, to, datagram) in answers {
            let from = SocketAddr::new(inside, port);
            let answer = Packet { origin: packet.origin, aim: packet.aim, from, to, hops: 0, datagram };
            self.enter(inner, Link::default(), answer);
        }
    }

    /// The address that a server at `to` would see of what leaves `network` from `from` now.
    pub(super) fn reflect(&mut self, network: NetworkId, from: SocketAddr, to: SocketAddr) -> Option<SocketAddr> {
        let mut seen = from;
        for id in self.gateways_above(network) {
            let gateway = &mut self.gateways[id.0];
            if gateway.udp_blocked {
                return None;
            }
            seen = gateway.outbound(self.now, &mut self.rng, seen, to)?;
        }
        Some(seen)
    }

    /// All links from a host to the internet, the internet's own not counted.
    pub(super) fn access(&self, network: NetworkId) -> Link {
        let start = if network == self.internet() { Link::default() } else { self.networks[network.0].link };
        self.gateways_above(network).iter().fold(start, |link, id| {
            let gateway = &self.gateways[id.0];
            let link = link.then(gateway.config.uplink);
            if gateway.outer == self.internet() { link } else { link.then(self.networks[gateway.outer.0].link) }
        })
    }
}
