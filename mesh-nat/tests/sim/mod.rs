//! A small world in virtual time: nodes with an agent each, their NATs, and one relay.

#![expect(clippy::unwrap_used, reason = "a world that contradicts itself fails its test")]

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_nat::agent::{Event, PeerConfig, PingId, Reject, Source};
use mesh_nat::{Agent, Class, Family, Path, SocketId, classify};
use mesh_noise::key::{DiscoPrivate, NodePrivate, NodePublic};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// How a NAT picks the outside port, and whom it lets in (RFC 4787 §4.1, §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nat {
    /// No NAT, no filter.
    Open,
    /// Endpoint-independent mapping, address-and-port-dependent filtering.
    PortRestricted,
    /// Address-and-port-dependent mapping and filtering.
    PerDestination,
}

/// One-way delay between any two nodes, and between a node and the relay.
pub(crate) const DELAY: Duration = Duration::from_millis(20);
const SOCKET: SocketId = SocketId(0);

pub(crate) type NodeId = usize;

struct Node {
    key: NodePublic,
    disco: DiscoPrivate,
    agent: Agent,
    nat: Nat,
    inside: SocketAddr,
    outside: u8,
    /// Outside port by destination, or by nothing where the mapping does not depend on it.
    mappings: BTreeMap<Option<SocketAddr>, u16>,
    /// Who was sent to from an outside port.
    opened: BTreeSet<(u16, SocketAddr)>,
    events: Vec<(Duration, Event)>,
    rejects: Vec<Reject>,
    udp_sent: u64,
    relay_sent: u64,
    sends_data: bool,
}

enum Arrival {
    Udp { to: NodeId, at: SocketAddr, from: SocketAddr },
    Relay { to: NodeId, from: NodePublic },
}

pub(crate) struct World {
    start: Instant,
    pub(crate) now: Instant,
    rng: StdRng,
    nodes: Vec<Node>,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    in_flight: BTreeMap<u64, (Arrival, Vec<u8>)>,
    next: u64,
    /// Nothing passes by UDP.
    pub(crate) udp_blocked: bool,
    /// Lost datagrams in a thousand.
    pub(crate) loss: u32,
    /// Every datagram delivered, for comparing runs.
    pub(crate) transcript: Vec<(Duration, bool, NodeId, Vec<u8>)>,
}

pub(crate) fn region() -> RegionId {
    RegionId::new(900).unwrap()
}

impl World {
    #[expect(clippy::disallowed_methods, reason = "virtual time starts at any instant")]
    pub(crate) fn seeded(seed: u64) -> Self {
        let start = Instant::now();
        Self {
            start,
            now: start,
            rng: StdRng::seed_from_u64(seed),
            nodes: Vec::new(),
            queue: BinaryHeap::new(),
            in_flight: BTreeMap::new(),
            next: 0,
            udp_blocked: false,
            loss: 0,
            transcript: Vec::new(),
        }
    }

    /// Adds a node behind a NAT of its own. Its STUN address is known where that is of use.
    pub(crate) fn node_behind(&mut self, nat: Nat) -> NodeId {
        let id = self.nodes.len();
        let number = u8::try_from(id).unwrap() + 1;
        let key = NodePrivate::generate(&mut self.rng).public();
        let disco = DiscoPrivate::generate(&mut self.rng);
        let mut agent = Agent::new(self.now, disco.clone(), key, self.rng.random());
        agent.set_sockets(vec![(SOCKET, Family::V4)]);
        let inside =
            SocketAddr::from((if nat == Nat::Open { [203, 0, 113, number] } else { [10, 0, number, 2] }, 41641));
        self.nodes.push(Node {
            key,
            disco,
            agent,
            nat,
            inside,
            outside: number,
            mappings: BTreeMap::new(),
            opened: BTreeSet::new(),
            events: Vec::new(),
            rejects: Vec::new(),
            udp_sent: 0,
            relay_sent: 0,
            sends_data: false,
        });
        let endpoints = self.endpoints(id);
        self.nodes[id].agent.set_endpoints(self.now, endpoints);
        self.drain(id);
        id
    }

    /// What the node's STUN and interfaces would tell.
    pub(crate) fn endpoints(&mut self, id: NodeId) -> Vec<SocketAddr> {
        let stun: SocketAddr = "192.0.2.250:3478".parse().unwrap();
        match self.nodes[id].nat {
            Nat::Open => vec![self.nodes[id].inside],
            Nat::PortRestricted | Nat::PerDestination => vec![self.map_out(id, stun), self.nodes[id].inside],
        }
    }

    /// Lets `a` know `b` and the other way round, as control would.
    pub(crate) fn introduce(&mut self, a: NodeId, b: NodeId) {
        for (this, other) in [(a, b), (b, a)] {
            let endpoints = self.endpoints(other);
            let config = PeerConfig {
                node: self.nodes[other].key,
                disco: self.nodes[other].disco.public(),
                home: Some(region()),
                endpoints,
            };
            self.with(this, |agent, now| agent.set_peer(now, config));
        }
    }

    pub(crate) fn key(&self, id: NodeId) -> NodePublic {
        self.nodes[id].key
    }

    pub(crate) fn disco(&self, id: NodeId) -> &DiscoPrivate {
        &self.nodes[id].disco
    }

    pub(crate) fn agent(&self, id: NodeId) -> &Agent {
        &self.nodes[id].agent
    }

    pub(crate) fn path(&self, from: NodeId, to: NodeId) -> Option<Path> {
        self.nodes[from].agent.path(&self.nodes[to].key)
    }

    pub(crate) fn is_direct(&self, from: NodeId, to: NodeId) -> bool {
        self.path(from, to).is_some_and(|path| path.is_direct())
    }

    pub(crate) fn events(&self, id: NodeId) -> &[(Duration, Event)] {
        &self.nodes[id].events
    }

    /// How the user's ping was answered.
    pub(crate) fn answer(&self, id: NodeId, ping: PingId) -> Option<(Path, Duration)> {
        self.events(id).iter().find_map(|(_, event)| {
            let Event::PingAnswered { id, path, latency, .. } = event else { return None };
            (*id == ping).then_some((*path, *latency))
        })
    }

    pub(crate) fn rejects(&self, id: NodeId) -> &[Reject] {
        &self.nodes[id].rejects
    }

    /// Datagrams the agent has sent by UDP and by the relay.
    pub(crate) fn sent(&self, id: NodeId) -> (u64, u64) {
        (self.nodes[id].udp_sent, self.nodes[id].relay_sent)
    }

    /// From now on the node has data for everyone it knows, all the time.
    pub(crate) fn sends_data(&mut self, id: NodeId, on: bool) {
        self.nodes[id].sends_data = on;
        if on {
            self.traffic(id);
        }
    }

    /// Calls the node's agent, then carries away what it has to say.
    pub(crate) fn with<T>(&mut self, id: NodeId, call: impl FnOnce(&mut Agent, Instant) -> T) -> T {
        let now = self.now;
        let result = call(&mut self.nodes[id].agent, now);
        self.drain(id);
        result
    }

    /// Delivers bytes out of nowhere.
    pub(crate) fn inject(&mut self, id: NodeId, source: Source, datagram: &[u8]) -> Result<(), Reject> {
        self.with(id, |agent, now| agent.handle_datagram(now, source, datagram))
    }

    /// The NAT forgets everything: outside ports change.
    pub(crate) fn reboot_nat(&mut self, id: NodeId) {
        self.nodes[id].mappings.clear();
        self.nodes[id].opened.clear();
    }

    pub(crate) fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        while self.step(end) {}
        self.now = end;
    }

    /// Runs until `done`, at most for `limit`; says how long it took.
    pub(crate) fn run_until(&mut self, limit: Duration, done: impl Fn(&Self) -> bool) -> Option<Duration> {
        let (from, end) = (self.now, self.now + limit);
        while !done(self) {
            if !self.step(end) {
                return None;
            }
        }
        Some(self.now - from)
    }

    /// Does the next thing that is due before `end`.
    fn step(&mut self, end: Instant) -> bool {
        let arrival = self.queue.peek().map(|Reverse((at, _))| *at);
        let timer = self.nodes.iter().filter_map(|node| node.agent.poll_timeout()).min();
        let busy = self.nodes.iter().any(|node| node.sends_data);
        let beat = busy.then(|| self.now + Duration::from_millis(100));
        let Some(at) = [arrival, timer, beat].into_iter().flatten().min().filter(|at| *at <= end) else { return false };
        self.now = self.now.max(at);
        if arrival == Some(at) {
            let Reverse((_, number)) = self.queue.pop().unwrap();
            let (arrival, datagram) = self.in_flight.remove(&number).unwrap();
            self.deliver(&arrival, &datagram);
        }
        for id in 0..self.nodes.len() {
            if self.nodes[id].sends_data {
                self.traffic(id);
            }
            if self.nodes[id].agent.poll_timeout().is_some_and(|due| due <= self.now) {
                self.with(id, Agent::handle_timeout);
                let next = self.nodes[id].agent.poll_timeout();
                assert!(next.is_none_or(|next| next > self.now), "a deadline stays due after it was handled");
            }
        }
        true
    }

    fn traffic(&mut self, id: NodeId) {
        let peers: Vec<_> = self.nodes[id].agent.peers().copied().collect();
        self.with(id, |agent, now| peers.iter().for_each(|peer| agent.traffic(now, peer)));
    }

    fn drain(&mut self, id: NodeId) {
        while let Some(transmit) = self.nodes[id].agent.poll_transmit() {
            assert_eq!(classify(&transmit.datagram), Class::Disco);
            let arrival = match transmit.path {
                Path::Direct { socket, remote } => {
                    assert_eq!(socket, SOCKET);
                    self.nodes[id].udp_sent += 1;
                    let from = self.map_out(id, remote);
                    if self.udp_blocked || self.rng.random_range(0..1000) < self.loss {
                        continue;
                    }
                    let Some(to) = self.route(remote) else { continue };
                    Arrival::Udp { to, at: remote, from }
                }
                Path::Relay { .. } => {
                    self.nodes[id].relay_sent += 1;
                    let from = self.nodes[id].key;
                    let Some(to) = self.nodes.iter().position(|node| node.key == transmit.peer) else { continue };
                    Arrival::Relay { to, from }
                }
                Path::PeerRelay { .. } => panic!("nobody uses peer relays"),
            };
            let hops = if matches!(arrival, Arrival::Relay { .. }) { 2 } else { 1 };
            self.queue.push(Reverse((self.now + DELAY * hops, self.next)));
            self.in_flight.insert(self.next, (arrival, transmit.datagram));
            self.next += 1;
        }
        while let Some(event) = self.nodes[id].agent.poll_event() {
            self.nodes[id].events.push((self.now - self.start, event));
            if event == Event::NeedEndpoints {
                let (endpoints, now) = (self.endpoints(id), self.now);
                self.nodes[id].agent.set_endpoints(now, endpoints);
            }
        }
    }

    /// Leaves through the node's own NAT; returns the address that others see.
    fn map_out(&mut self, id: NodeId, to: SocketAddr) -> SocketAddr {
        let node = &mut self.nodes[id];
        let key = match node.nat {
            Nat::Open => return node.inside,
            Nat::PortRestricted => None,
            Nat::PerDestination => Some(to),
        };
        let random = self.rng.random_range(1024..=65535);
        let port = *node.mappings.entry(key).or_insert(random);
        node.opened.insert((port, to));
        SocketAddr::from(([198, 51, 100, node.outside], port))
    }

    /// Whom an address leads to. Private addresses lead nowhere: every node is alone in its network.
    fn route(&self, to: SocketAddr) -> Option<NodeId> {
        self.nodes.iter().position(|node| match node.nat {
            Nat::Open => to == node.inside,
            Nat::PortRestricted | Nat::PerDestination => {
                to.ip() == std::net::IpAddr::from([198, 51, 100, node.outside])
                    && node.mappings.values().any(|port| *port == to.port())
            }
        })
    }

    fn deliver(&mut self, arrival: &Arrival, datagram: &[u8]) {
        let (to, source) = match *arrival {
            Arrival::Udp { to, at, from } => {
                let node = &self.nodes[to];
                let open = node.nat == Nat::Open || node.opened.contains(&(at.port(), from));
                if self.udp_blocked || !open {
                    return;
                }
                (to, Source::direct(SOCKET, from))
            }
            Arrival::Relay { to, from } => (to, Source::relay(region(), from)),
        };
        self.transcript.push((self.now - self.start, source.path.is_direct(), to, datagram.to_vec()));
        if let Err(reject) = self.inject(to, source, datagram) {
            self.nodes[to].rejects.push(reject);
        }
    }
}
