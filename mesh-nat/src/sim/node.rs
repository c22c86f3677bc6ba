//! The mesh node on a host: a real agent, and what its engine elsewhere would do for it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_noise::key::{DiscoPrivate, NodePrivate, NodePublic};
use rand::RngExt;

use super::gateway::GatewayConfig;
use super::host::HostId;
use super::route::NetworkId;
use super::world::World;
use crate::agent::{Agent, Event, PeerConfig, Reject, Source, Transmit};
use crate::hard::Extra;
use crate::path::{Family, Path, SocketId};
use crate::stun::message::TransactionId;

/// The port that nodes' first sockets have.
const NODE_PORT: u16 = 41641;

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
    pub(super) reflexive: BTreeMap<SocketId, SocketAddr>,
    /// Addresses that it was told of: static ones, port mappings.
    pub(super) extra: Vec<SocketAddr>,
    pub(super) asked: BTreeMap<TransactionId, SocketId>,
    pub(super) stun_until: Option<Instant>,
    /// What it relays for others.
    pub(super) serving: Option<super::peer_relay::Serving>,
    /// Whether others know it for one of our own kind.
    pub(super) ours: bool,
    /// The most sockets that were open at a time.
    pub(super) most_sockets: usize,
}

impl World {
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

    /// Makes the node one of another kind in the eyes of others, and others in its own: it understands the protocol's own
    /// messages and opens no further sockets. To be called before it is introduced.
    pub fn make_stock(&mut self, host: HostId) {
        self.node_mut(host).ours = false;
        self.with(host, |agent, now| agent.set_guessing(now, false));
    }

    /// Tells a node further addresses of its own, such as a port mapping's, in place of those told before.
    pub fn set_extra_endpoints(&mut self, host: HostId, extra: Vec<SocketAddr>) {
        self.node_mut(host).extra = extra;
        self.tell_endpoints(host);
        self.settle(host);
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

    /// The most sockets that the host has had open at a time, those of its own node included.
    #[must_use]
    pub fn most_sockets(&self, host: HostId) -> usize {
        self.node(host).most_sockets
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

    pub(super) fn agent_receives(&mut self, host: HostId, source: Source, datagram: &[u8]) {
        let now = self.now;
        let Some(node) = &mut self.hosts[host.0].node else { return };
        if let Err(reject) = node.agent.handle_datagram(now, source, datagram) {
            node.rejects.push(reject);
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "the others are for the engine that an agent has elsewhere")]
    pub(super) fn carry_out(&mut self, host: HostId, event: Event) {
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

    pub(super) fn send(&mut self, host: HostId, transmit: Transmit) {
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
}
