//! A host: its addresses and sockets, the node's agent on it, and what it does with datagrams.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_noise::key::{DiscoPrivate, NodePrivate, NodePublic};
use rand::RngExt;

use super::gateway::GatewayConfig;
use super::link::Link;
use super::packet::{Happening, Packet, Record};
use super::program::{Program, RequestId};
use super::route::{NetworkId, Owner};
use super::world::World;
use crate::agent::{Agent, Event, PeerConfig, Reject, Source};
use crate::behaviour::{Allocation, Behaviour, Filtering, Mapping, PortRange};
use crate::classify::{Class, GENEVE_LEN, classify};
use crate::hard::Extra;
use crate::path::{Family, Path, SocketId};
use crate::stun::message::{Response, TransactionId, request};

/// Names one host of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub(super) usize);

/// How long a node waits for a STUN server.
const STUN_PATIENCE: Duration = Duration::from_secs(1);
/// The port that nodes' first sockets have.
const NODE_PORT: u16 = 41641;
/// The first port of those that are given to sockets that ask for none.
const FIRST_EPHEMERAL: u16 = 49_152;

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

/// The open sockets of a host.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    open: BTreeMap<SocketId, (Family, u16)>,
    by_port: BTreeMap<(Family, u16), SocketId>,
    next: u16,
    next_port: u16,
}

impl Sockets {
    pub(super) fn open(&mut self, family: Family, port: u16) -> SocketId {
        let mut port = port;
        while port == 0 || self.by_port.contains_key(&(family, port)) {
            port = FIRST_EPHEMERAL + self.next_port;
            self.next_port = (self.next_port + 1) % (u16::MAX - FIRST_EPHEMERAL);
        }
        let id = SocketId(self.next);
        self.next = self.next.wrapping_add(1);
        self.open.insert(id, (family, port));
        self.by_port.insert((family, port), id);
        id
    }

    pub(super) fn close(&mut self, id: SocketId) {
        if let Some(held) = self.open.remove(&id) {
            self.by_port.remove(&held);
        }
    }

    pub(super) fn port(&self, id: SocketId) -> Option<u16> {
        self.open.get(&id).map(|(_, port)| *port)
    }
}

/// The mesh node on a host.
pub(super) struct Node {
    pub(super) key: NodePublic,
    pub(super) disco: DiscoPrivate,
    pub(super) agent: Agent,
    pub(super) home: RegionId,
    pub(super) events: Vec<(Duration, Event)>,
    pub(super) rejects: Vec<Reject>,
    /// The agent's sockets.
    pub(super) sockets: Vec<(SocketId, Family)>,
    /// When data was first sent that nothing has answered since, by peer.
    pub(super) unanswered: BTreeMap<HostId, Instant>,
    /// What STUN servers see of each socket.
    reflexive: BTreeMap<SocketId, SocketAddr>,
    /// Addresses that it was told of: static ones, port mappings.
    pub(super) extra: Vec<SocketAddr>,
    asked: BTreeMap<TransactionId, SocketId>,
    stun_until: Option<Instant>,
    /// What it relays for others.
    pub(super) serving: Option<super::peer_relay::Serving>,
    /// Whether others know it for one of our own kind.
    ours: bool,
    /// The most sockets that were open at a time.
    most_sockets: usize,
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

    /// Adds a node with an IPv4 socket, and one for IPv6 where the network has that. Its endpoints are known from the
    /// start, and its connection to its home relay is open.
    pub fn node_in(&mut self, network: NetworkId) -> HostId {
        let ipv6 = self.gateway_of(network).is_some_and(|gateway| self.gateway_config(gateway).ipv6);
        let families: &[Family] = if ipv6 { &[Family::V4, Family::V6] } else { &[Family::V4] };
        let host = self.add_host(network, families);
        self.start_node(host, families);
        host
    }

    /// Adds a node in a network of its own behind a gateway to the internet.
    pub fn node_behind(&mut self, gateway: impl Into<GatewayConfig>) -> HostId {
        let network = self.network_behind(self.internet(), gateway);
        self.node_in(network)
    }

    /// Puts a node on a host, with one socket for each family.
    pub fn start_node(&mut self, host: HostId, families: &[Family]) {
        let key = NodePrivate::generate(&mut self.rng).public();
        let disco = DiscoPrivate::generate(&mut self.rng);
        let mut agent = Agent::new(self.now, disco.clone(), key, self.rng.random());
        let place = &mut self.hosts[host.0];
        let sockets: Vec<_> = families.iter().map(|family| (place.sockets.open(*family, NODE_PORT), *family)).collect();
        agent.set_sockets(sockets.clone());
        place.node = Some(Node {
            key,
            disco,
            agent,
            home: self.home,
            events: Vec::new(),
            rejects: Vec::new(),
            sockets,
            unanswered: BTreeMap::new(),
            reflexive: BTreeMap::new(),
            extra: Vec::new(),
            asked: BTreeMap::new(),
            stun_until: None,
            serving: None,
            ours: true,
            most_sockets: 0,
        });
        self.by_key.insert(key, host);
        self.learn_endpoints(host);
        self.settle(host);
    }

    /// Lets each know the other, as control would: keys, home, and the endpoints known at this time.
    pub fn introduce(&mut self, a: HostId, b: HostId) {
        for (this, other) in [(a, b), (b, a)] {
            let endpoints = self.endpoints(other);
            let config = PeerConfig {
                node: self.key(other),
                disco: self.disco(other).public(),
                home: Some(self.node(other).home),
                endpoints,
                ours: self.node(other).ours && self.node(this).ours,
                ..PeerConfig::default()
            };
            self.with(this, |agent, now| agent.set_peer(now, config));
        }
    }

    /// The node's own addresses as it knows them: what STUN servers saw, what it was told, what its host has.
    #[must_use]
    pub fn endpoints(&self, host: HostId) -> Vec<SocketAddr> {
        let (place, node) = (&self.hosts[host.0], self.node(host));
        let mut list = node.extra.clone();
        list.extend(node.sockets.iter().filter_map(|(socket, _)| node.reflexive.get(socket)));
        for (socket, family) in &node.sockets {
            let Some(port) = place.sockets.port(*socket) else { continue };
            let own = place.addresses.iter().map(|(_, address)| SocketAddr::new(*address, port));
            list.extend(own.filter(|address| Family::of(address) == *family));
        }
        let mut seen = Vec::new();
        list.retain(|address| {
            !seen.contains(address) && {
                seen.push(*address);
                true
            }
        });
        list
    }

    /// Makes the node one of another kind in the eyes of others, and others in its own: it understands the protocol's own
    /// messages and opens no further sockets. To be called before it is introduced.
    pub fn make_stock(&mut self, host: HostId) {
        self.node_mut(host).ours = false;
        self.with(host, |agent, now| agent.set_guessing(now, false));
    }

    /// The most sockets that the host has had open at a time, those of its own node included.
    #[must_use]
    pub fn most_sockets(&self, host: HostId) -> usize {
        self.node(host).most_sockets
    }

    /// Tells a node further addresses of its own, such as a port mapping's, in place of those told before.
    pub fn set_extra_endpoints(&mut self, host: HostId, extra: Vec<SocketAddr>) {
        self.node_mut(host).extra = extra;
        self.tell_endpoints(host);
        self.settle(host);
    }

    /// The node's key.
    #[must_use]
    pub fn key(&self, host: HostId) -> NodePublic {
        self.node(host).key
    }

    /// The node's disco key.
    #[must_use]
    pub fn disco(&self, host: HostId) -> &DiscoPrivate {
        &self.node(host).disco
    }

    /// The node's agent.
    #[must_use]
    pub fn agent(&self, host: HostId) -> &Agent {
        &self.node(host).agent
    }

    /// Calls the node's agent, then carries away what it has to say.
    pub fn with<T>(&mut self, host: HostId, call: impl FnOnce(&mut Agent, Instant) -> T) -> T {
        let now = self.now;
        let result = call(&mut self.node_mut(host).agent, now);
        self.settle(host);
        result
    }

    /// Hands the node's agent bytes out of nowhere.
    ///
    /// # Errors
    /// Those of [`Agent::handle_datagram`].
    pub fn inject(&mut self, host: HostId, source: Source, datagram: &[u8]) -> Result<(), Reject> {
        self.with(host, |agent, now| agent.handle_datagram(now, source, datagram))
    }

    /// Where data from one node to another goes.
    #[must_use]
    pub fn path(&self, from: HostId, to: HostId) -> Option<Path> {
        self.agent(from).path(&self.key(to))
    }

    /// Whether data from one node to another goes directly.
    #[must_use]
    pub fn is_direct(&self, from: HostId, to: HostId) -> bool {
        self.path(from, to).is_some_and(|path| path.is_direct())
    }

    /// When the host `to` last received a datagram that `from` had sent along `path`, whatever NATs made of its addresses.
    #[must_use]
    pub fn reached(&self, from: HostId, to: HostId, path: Path) -> Option<Instant> {
        match path {
            Path::Direct { socket, remote } => self.reached.get(&(from, to, (socket, remote))).copied(),
            Path::PeerRelay { .. } | Path::Relay { .. } => None,
        }
    }

    /// What the node's agent has told, and when since the world began.
    #[must_use]
    pub fn events(&self, host: HostId) -> &[(Duration, Event)] {
        &self.node(host).events
    }

    /// What the node's agent has refused.
    #[must_use]
    pub fn rejects(&self, host: HostId) -> &[Reject] {
        &self.node(host).rejects
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

    /// The node looks at its addresses anew, as after any change of links. What STUN servers saw counts until they are
    /// asked again.
    pub fn link_changed(&mut self, host: HostId) {
        if self.hosts[host.0].node.is_some() {
            self.tell_endpoints(host);
            self.with(host, Agent::rebind);
        }
    }

    pub(super) fn node(&self, host: HostId) -> &Node {
        self.hosts[host.0].node.as_ref().expect("the host was started as a node")
    }

    pub(super) fn node_mut(&mut self, host: HostId) -> &mut Node {
        self.hosts[host.0].node.as_mut().expect("the host was started as a node")
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

    pub(super) fn agent_receives(&mut self, host: HostId, source: Source, datagram: &[u8]) {
        let now = self.now;
        let Some(node) = &mut self.hosts[host.0].node else { return };
        if let Err(reject) = node.agent.handle_datagram(now, source, datagram) {
            node.rejects.push(reject);
        }
    }

    /// Asks the nearest STUN server of each family from the node's first socket of it.
    fn ask_stun(&mut self, host: HostId) {
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

    fn stun_answers(&mut self, host: HostId, socket: SocketId, datagram: &[u8]) -> bool {
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

    fn tell_endpoints(&mut self, host: HostId) {
        let (endpoints, now) = (self.endpoints(host), self.now);
        self.node_mut(host).agent.set_endpoints(now, endpoints);
        self.tell_behaviour(host);
    }

    /// What a measurement of the network would tell about the NATs above.
    fn tell_behaviour(&mut self, host: HostId) {
        let above = self.network_of(host).map(|network| self.gateways_above(network)).unwrap_or_default();
        let behaviour = behaviour(above.iter().map(|gateway| self.gateway_config(*gateway)));
        let (servers, now) = (self.stun_servers.clone(), self.now);
        let node = self.node_mut(host);
        let v4 = node.sockets.iter().find(|(_, family)| *family == Family::V4);
        let outside = v4.and_then(|(socket, _)| node.reflexive.get(socket)).copied();
        node.agent.set_behaviour(behaviour);
        node.agent.set_outside(now, outside, &servers);
    }

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

    #[expect(clippy::wildcard_enum_match_arm, reason = "the others are for the engine that an agent has elsewhere")]
    fn carry_out(&mut self, host: HostId, event: Event) {
        match event {
            Event::NeedEndpoints => self.ask_stun(host),
            Event::OpenSockets { family, count } => {
                let mut opened = Vec::new();
                for _ in 0..count {
                    let id = self.open_socket(host, family, 0);
                    let port = self.hosts[host.0].sockets.port(id).unwrap_or_default();
                    opened.push(Extra { id, port });
                }
                let (now, open) = (self.now, self.hosts[host.0].sockets.open.len());
                let node = self.node_mut(host);
                node.most_sockets = node.most_sockets.max(open);
                node.agent.sockets_opened(now, opened);
            }
            Event::CloseSocket { socket } => self.close_socket(host, socket),
            Event::AllocationAsked { from, clients, generation } => self.allocate(host, from, clients, generation),
            _ => {}
        }
    }

    fn send(&mut self, host: HostId, transmit: crate::agent::Transmit) {
        match transmit.path {
            Path::Direct { socket, remote } => {
                self.hosts[host.0].sent.udp += 1;
                self.emit(host, socket, remote, transmit.datagram);
            }
            Path::Relay { region } => {
                self.hosts[host.0].sent.relay += 1;
                self.send_frame(host, region, transmit.peer, transmit.datagram);
            }
            Path::PeerRelay { .. } => {}
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

impl Host {
    fn next(&self) -> Option<Instant> {
        let agent = self.node.as_ref().and_then(|node| node.agent.poll_timeout());
        let stun = self.node.as_ref().and_then(|node| node.stun_until);
        let serving = self.node.as_ref().and_then(|node| node.serving.as_ref()?.poll_timeout());
        let programs = self.programs.iter().flatten().filter_map(|program| program.poll_timeout());
        if self.asleep { None } else { programs.chain(agent).chain(stun).chain(serving).min() }
    }
}
