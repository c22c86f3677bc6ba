//! A host: its addresses, where it is, and what it does with datagrams and when it is to be woken.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use super::link::Link;
use super::node::Node;
use super::packet::{Happening, Packet, Record};
use super::program::{Program, RequestId};
use super::route::{NetworkId, Owner};
use super::sockets::Sockets;
use super::world::World;
use crate::agent::Source;
use crate::classify::{Class, GENEVE_LEN, classify};
use crate::path::{Family, SocketId};

/// Names one host of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub(super) usize);

/// What a host has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// Datagrams of its agent by UDP.
    pub udp: u64,
    /// Frames of its agent by relay.
    pub relay: u64,
    /// Requests to STUN servers by the node.
    pub stun: u64,
}

pub(super) struct Host {
    pub(super) addresses: Vec<(NetworkId, IpAddr)>,
    pub(super) link: Link,
    pub(super) sockets: Sockets,
    pub(super) node: Option<Node>,
    pub(super) programs: Vec<Option<Box<dyn Program>>>,
    pub(super) asleep: bool,
    pub(super) udp_blocked: bool,
    /// The next time it is going to be woken at.
    pub(super) wake_at: Option<Instant>,
    /// From when on its connection to its relay is open.
    pub(super) relay_ready: Instant,
    /// When the latest frame of each direction arrives: streams keep their order.
    pub(super) last_up: Instant,
    pub(super) last_down: Instant,
    pub(super) sent: Sent,
}

impl World {
    /// Adds a host without any node.
    pub fn add_host(&mut self, network: NetworkId, families: &[Family]) -> HostId {
        let id = HostId(self.hosts.len());
        self.hosts.push(Host {
            addresses: Vec::new(),
            link: Link::default(),
            sockets: Sockets::default(),
            node: None,
            programs: Vec::new(),
            asleep: false,
            udp_blocked: false,
            wake_at: None,
            relay_ready: self.now,
            last_up: self.now,
            last_down: self.now,
            sent: Sent::default(),
        });
        for family in families {
            self.add_address(id, network, *family);
        }
        id
    }

    /// Gives a host one more address, in whichever network.
    pub fn add_address(&mut self, host: HostId, network: NetworkId, family: Family) -> IpAddr {
        let address = match family {
            Family::V4 => self.new_v4(network),
            Family::V6 => self.new_v6(network),
        };
        self.hosts[host.0].addresses.push((network, address));
        self.announce(network, address, Owner::Host(host));
        address
    }

    /// Takes all addresses of a host away. Nothing reaches it then, nor leaves it.
    pub fn unplug(&mut self, host: HostId) {
        for (_, address) in std::mem::take(&mut self.hosts[host.0].addresses) {
            self.withdraw(address, host);
        }
    }

    /// What a host has sent so far.
    #[must_use]
    pub fn sent(&self, host: HostId) -> Sent {
        self.hosts[host.0].sent
    }

    /// The host's addresses.
    #[must_use]
    pub fn addresses(&self, host: HostId) -> Vec<IpAddr> {
        self.hosts[host.0].addresses.iter().map(|(_, address)| *address).collect()
    }

    /// The network that the host's first address belongs to.
    #[must_use]
    pub fn network_of(&self, host: HostId) -> Option<NetworkId> {
        self.hosts[host.0].addresses.first().map(|(network, _)| *network)
    }

    /// The gateway between a host and its nearest other network.
    #[must_use]
    pub fn gateway_above(&self, host: HostId) -> Option<super::GatewayId> {
        self.gateway_of(self.network_of(host)?)
    }

    /// What the host's own wire does, beside that of its network.
    pub fn set_host_link(&mut self, host: HostId, link: Link) {
        self.hosts[host.0].link = link;
    }

    /// Whether the host can send and receive by UDP. Its relay is reached all the same.
    pub fn block_host_udp(&mut self, host: HostId, blocked: bool) {
        self.hosts[host.0].udp_blocked = blocked;
    }

    pub(super) fn udp_blocked_at(&self, host: HostId) -> bool {
        let above = self.network_of(host).map(|network| self.gateways_above(network)).unwrap_or_default();
        self.hosts[host.0].udp_blocked || above.iter().any(|id| self.gateways[id.0].udp_blocked)
    }

    /// Opens one more socket on a host; on `port`, or any if that is 0 or taken.
    pub fn open_socket(&mut self, host: HostId, family: Family, port: u16) -> SocketId {
        self.hosts[host.0].sockets.open(family, port)
    }

    /// Closes a socket.
    pub fn close_socket(&mut self, host: HostId, socket: SocketId) {
        self.hosts[host.0].sockets.close(socket);
    }

    /// The host's processor stops: no timer fires, what arrives is lost, its relay gives it up.
    pub fn sleep(&mut self, host: HostId) {
        self.hosts[host.0].asleep = true;
    }

    /// Whether the host sleeps.
    #[must_use]
    pub fn is_asleep(&self, host: HostId) -> bool {
        self.hosts[host.0].asleep
    }

    /// The host goes on where it stopped. Its node notices and starts anew.
    pub fn wake(&mut self, host: HostId) {
        self.hosts[host.0].asleep = false;
        self.reconnect(host);
        self.link_changed(host);
    }

    /// The host moves to another network: other addresses, another relay connection, the same sockets. Its node notices.
    pub fn roam(&mut self, host: HostId, network: NetworkId) {
        let families: Vec<Family> = {
            let addresses = self.addresses(host);
            let has = |v4: bool| addresses.iter().any(|address| address.is_ipv4() == v4);
            [(Family::V4, has(true)), (Family::V6, has(false))].iter().filter(|(_, has)| *has).map(|f| f.0).collect()
        };
        self.unplug(host);
        for family in families {
            self.add_address(host, network, family);
        }
        self.reconnect(host);
        self.link_changed(host);
    }

    pub(super) fn gateway_address(&self, host: HostId) -> Option<IpAddr> {
        let gateway = self.gateway_above(host)?;
        Some(self.gateways[gateway.0].inside)
    }

    /// Sends a datagram from one of a host's sockets.
    pub(super) fn emit(&mut self, host: HostId, socket: SocketId, to: SocketAddr, datagram: Vec<u8>) {
        let place = &self.hosts[host.0];
        let Some((family, port)) = place.sockets.open.get(&socket).copied() else { return };
        if place.asleep || place.udp_blocked || family != Family::of(&to) {
            return;
        }
        let fits = |address: &IpAddr| Family::of(&SocketAddr::new(*address, port)) == family;
        let on_link = |network: &NetworkId| self.networks[network.0].owners.contains_key(&to.ip());
        let candidates = place.addresses.iter().filter(|(_, address)| fits(address));
        let Some((network, address)) =
            candidates.clone().find(|(network, _)| on_link(network)).or_else(|| candidates.clone().next()).copied()
        else {
            return;
        };
        let from = SocketAddr::new(address, port);
        let packet = Packet { origin: host, aim: (socket, to), from, to, hops: 0, datagram };
        let link = place.link;
        self.enter(network, link, packet);
    }

    /// A datagram has arrived.
    pub(super) fn receive(&mut self, host: HostId, packet: &Packet) {
        let place = &self.hosts[host.0];
        let Some(socket) = place.sockets.by_port.get(&(Family::of(&packet.to), packet.to.port())).copied() else {
            return;
        };
        let here = place.addresses.iter().any(|(_, address)| *address == packet.to.ip());
        if place.asleep || place.udp_blocked || !here || self.cuts.contains(&(packet.origin, host)) {
            return;
        }
        let source = Source::direct(socket, packet.from);
        self.reached.insert((packet.origin, host, packet.aim), self.now);
        self.record(host, source, &packet.datagram);
        if self.relay_takes(host, socket, packet.from, &packet.datagram) {
            return self.settle(host);
        }
        let class = classify(&packet.datagram);
        let ours = self.hosts[host.0].node.is_some();
        let taken = match class {
            Class::Disco | Class::RelayedDisco { .. } if ours => {
                self.agent_receives(host, source, &packet.datagram);
                true
            }
            Class::Stun if ours => self.stun_answers(host, socket, &packet.datagram),
            Class::WireGuard => self.stream_arrives(host, source, &packet.datagram),
            Class::RelayedWireGuard { .. } => self.stream_arrives(host, source, &packet.datagram[GENEVE_LEN..]),
            Class::Disco | Class::Stun | Class::RelayedDisco { .. } => false,
        };
        let mut programs = 0..if taken { 0 } else { self.hosts[host.0].programs.len() };
        let _ = programs.any(|index| {
            self.call_program(host, index, |program, io| {
                program.handle_datagram(io, socket, packet.from, &packet.datagram)
            }) == Some(true)
        });
        self.settle(host);
    }

    /// A program's request over a stream.
    pub(super) fn request(&mut self, host: HostId, id: RequestId, to: SocketAddr, request: &[u8]) {
        let gateway = self.gateway_above(host).filter(|id| self.gateways[id.0].inside == to.ip());
        let (Some(gateway), Some(from)) = (gateway, self.addresses(host).first().copied()) else {
            return self.schedule(self.now, Happening::Reply { to: host, id, reply: None });
        };
        let link = self.hosts[host.0].link.then(self.networks[self.gateways[gateway.0].inner.0].link);
        let reply = self.gateways[gateway.0].request(self.now, from, to, request);
        self.schedule(self.now + link.delay * 4, Happening::Reply { to: host, id, reply });
    }

    /// Keeps what was delivered, for comparing runs.
    pub(super) fn record(&mut self, host: HostId, source: Source, datagram: &[u8]) {
        let at = self.now.saturating_duration_since(self.start);
        self.digest(at, host, datagram);
        if let Some(transcript) = &mut self.transcript {
            transcript.push(Record { at, host, source, datagram: datagram.to_vec() });
        }
    }

    /// Carries away whatever a host has to say, and notes when it wants to be woken.
    pub(super) fn settle(&mut self, host: HostId) {
        while self.hosts[host.0].node.is_some() {
            let agent = &mut self.node_mut(host).agent;
            if let Some(transmit) = agent.poll_transmit() {
                self.send(host, transmit);
                continue;
            }
            let Some(event) = agent.poll_event() else { break };
            let at = self.now.saturating_duration_since(self.start);
            self.node_mut(host).events.push((at, event));
            self.carry_out(host, event);
        }
        let place = &mut self.hosts[host.0];
        if let Some(next) = place.next()
            && place.wake_at.is_none_or(|at| next < at)
        {
            let at = next.max(self.now);
            place.wake_at = Some(at);
            self.schedule(at, Happening::Wake(host));
        }
    }

    /// A host was to be woken now.
    pub(super) fn wakes(&mut self, host: HostId, at: Instant) {
        if self.hosts[host.0].wake_at != Some(at) {
            return;
        }
        self.hosts[host.0].wake_at = None;
        if self.hosts[host.0].asleep {
            return;
        }
        let now = self.now;
        if let Some(node) = &mut self.hosts[host.0].node {
            if node.agent.poll_timeout().is_some_and(|due| due <= now) {
                node.agent.handle_timeout(now);
            }
            if node.stun_until.is_some_and(|until| until <= now) {
                node.stun_until = None;
                node.asked.clear();
                self.tell_endpoints(host);
            }
        }
        self.relay_wakes(host);
        for index in 0..self.hosts[host.0].programs.len() {
            let due = |program: &Option<Box<dyn Program>>| program.as_ref().and_then(|program| program.poll_timeout());
            if due(&self.hosts[host.0].programs[index]).is_some_and(|due| due <= now) {
                self.call_program(host, index, |program, io| program.handle_timeout(io));
            }
        }
        self.settle(host);
        let next = self.hosts[host.0].next();
        assert!(next.is_none_or(|next| next > now), "a deadline of host {} stays due after it was handled", host.0);
    }
}

impl Host {
    fn next(&self) -> Option<Instant> {
        let agent = self.node.as_ref().and_then(|node| node.agent.poll_timeout());
        let stun = self.node.as_ref().and_then(|node| node.stun_until);
        let serving = self.node.as_ref().and_then(|node| node.serving.as_ref()?.poll_timeout());
        let programs = self.programs.iter().flatten().filter_map(|program| program.poll_timeout());
        if self.asleep { None } else { programs.chain(agent).chain(stun).chain(serving).min() }
    }
}
