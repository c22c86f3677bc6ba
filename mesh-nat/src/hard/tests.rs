//! Two guessers, their NATs, three STUN servers and a relay, in virtual time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::message::Punch;
use super::*;
use crate::behaviour::{Allocation, Behaviour, Filtering, Mapping, PortRange};
use crate::path::SocketId;
use crate::stun::message::{Request, response};

const UDP: Duration = Duration::from_millis(20);
const RELAY: Duration = Duration::from_millis(40);

/// A NAT that lets in whom was sent to, address and port.
#[derive(Debug, Clone)]
struct Nat {
    behaviour: Behaviour,
    /// What it really gives, whatever is believed about it.
    range: PortRange,
    /// One port may serve several destinations.
    shares: bool,
    /// Flows of others, now and then.
    noise: u32,
}

impl Nat {
    fn easy() -> Self {
        Self::new(Mapping::EndpointIndependent, Allocation::Random, PortRange::ALL)
    }

    fn random() -> Self {
        Self::new(Mapping::AddressAndPortDependent, Allocation::Random, PortRange::ALL)
    }

    fn block(size: u16) -> Self {
        let range = PortRange { first: 10_000, last: 9_999 + size };
        Self::new(Mapping::AddressAndPortDependent, Allocation::Block, range)
    }

    fn counting(stride: i16) -> Self {
        Self::new(Mapping::AddressAndPortDependent, Allocation::Sequential { stride }, PortRange::ALL)
    }

    fn preserving() -> Self {
        Self::new(Mapping::AddressAndPortDependent, Allocation::Preserving, PortRange::ALL)
    }

    fn new(mapping: Mapping, allocation: Allocation, range: PortRange) -> Self {
        let behaviour = Behaviour {
            mapping: Some(mapping),
            filtering: Some(Filtering::AddressAndPortDependent),
            allocation: Some(allocation),
            ports: None,
            ..Behaviour::default()
        };
        Self { behaviour, range, shares: false, noise: 0 }
    }

    fn sharing(mut self) -> Self {
        self.shares = true;
        self
    }

    fn noisy(mut self, noise: u32) -> Self {
        self.noise = noise;
        self
    }

    fn per_address(mut self) -> Self {
        self.behaviour.mapping = Some(Mapping::AddressDependent);
        self
    }
}

struct Node {
    key: NodePublic,
    ip: IpAddr,
    nat: Nat,
    guesser: Guesser,
    facts: PeerFacts,
    /// Outside port by inside port and what the mapping depends on.
    mappings: BTreeMap<(u16, Option<IpAddr>, Option<u16>), u16>,
    /// Who may send to an outside port, and which socket gets it.
    open: BTreeMap<(u16, SocketAddr), SocketId>,
    counter: u16,
    sockets: BTreeMap<SocketId, u16>,
    next_socket: u16,
    /// When each ping or question left.
    sent: Vec<Instant>,
    most_sockets: usize,
    /// What another node listed to us.
    direct: Option<(SocketId, Instant)>,
    outcomes: Vec<Outcome>,
    called: Vec<(Instant, usize)>,
}

enum Packet {
    Ping,
    Pong,
    Stun(Vec<u8>),
}

enum Arrival {
    Udp {
        from: SocketAddr,
        to: SocketAddr,
        packet: Packet,
    },
    Relay {
        to: usize,
        punch: Punch,
    },
    /// A call-me-maybe to a node that is not ours: it pings all of it.
    Call {
        to: usize,
        guesses: Vec<SocketAddr>,
    },
}

struct World {
    start: Instant,
    now: Instant,
    rng: StdRng,
    nodes: [Node; 2],
    due: BinaryHeap<Reverse<(Instant, u64)>>,
    arrivals: BTreeMap<u64, Arrival>,
    next: u64,
}

fn server(nth: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, nth], 3478))
}

impl World {
    fn of(seed: u64, a: Nat, b: Nat) -> Self {
        #[expect(clippy::disallowed_methods, reason = "virtual time starts from any instant")]
        let start = Instant::now();
        let mut rng = StdRng::seed_from_u64(seed);
        let mut node = |number: u8, nat: Nat| Node {
            key: NodePublic::from_bytes([number; 32]),
            ip: IpAddr::from([198, 51, 100, number]),
            guesser: Guesser::new(rng.random()),
            facts: PeerFacts { ours: true, addresses: Vec::new() },
            mappings: BTreeMap::new(),
            open: BTreeMap::new(),
            counter: rng.random_range(20_000..30_000),
            sockets: BTreeMap::from([(SocketId(0), 41_641)]),
            next_socket: 16,
            sent: Vec::new(),
            most_sockets: 0,
            direct: None,
            outcomes: Vec::new(),
            called: Vec::new(),
            nat,
        };
        let nodes = [node(1, a), node(2, b)];
        let mut world =
            Self { start, now: start, rng, nodes, due: BinaryHeap::new(), arrivals: BTreeMap::new(), next: 0 };
        for id in 0..2 {
            let outside = world.map_out(id, SocketId(0), server(1));
            let behaviour = world.nodes[id].nat.behaviour;
            world.nodes[id].guesser.set_ours(behaviour, Some(outside));
            world.nodes[id].guesser.set_servers(&[server(1), server(2), server(3)]);
            world.nodes[1 - id].facts.addresses = vec![outside];
        }
        world
    }

    /// The outside port of a flow.
    fn map_out(&mut self, id: usize, socket: SocketId, to: SocketAddr) -> SocketAddr {
        let noise = self.nodes[id].nat.noise;
        let node = &mut self.nodes[id];
        let inside = node.sockets[&socket];
        let key = match node.nat.behaviour.mapping.unwrap() {
            Mapping::EndpointIndependent => (inside, None, None),
            Mapping::AddressDependent => (inside, Some(to.ip()), None),
            Mapping::AddressAndPortDependent => (inside, Some(to.ip()), Some(to.port())),
        };
        let port = if let Some(port) = node.mappings.get(&key) {
            *port
        } else {
            let shares = node.nat.shares;
            let taken: BTreeSet<u16> = if shares { BTreeSet::new() } else { node.mappings.values().copied().collect() };
            let clashes = |port: u16| taken.contains(&port) || node.open.contains_key(&(port, to));
            let mut port = match node.nat.behaviour.allocation.unwrap() {
                Allocation::Preserving if !clashes(inside) => inside,
                Allocation::Sequential { stride } => {
                    if noise > 0 && self.rng.random_range(0..100) < noise {
                        node.counter = node.counter.wrapping_add_signed(stride);
                    }
                    node.counter = node.counter.wrapping_add_signed(stride);
                    node.counter
                }
                Allocation::Preserving | Allocation::Block | Allocation::Random => {
                    self.rng.random_range(node.nat.range.first..=node.nat.range.last)
                }
            };
            assert!(taken.len() < node.nat.range.len() as usize, "the NAT has run out of ports");
            while clashes(port) {
                port = self.rng.random_range(node.nat.range.first..=node.nat.range.last);
            }
            node.mappings.insert(key, port);
            port
        };
        node.open.insert((port, to), socket);
        SocketAddr::new(node.ip, port)
    }

    fn send(&mut self, at: Instant, arrival: Arrival) {
        self.due.push(Reverse((at, self.next)));
        self.arrivals.insert(self.next, arrival);
        self.next += 1;
    }

    fn udp(&mut self, id: usize, socket: SocketId, to: SocketAddr, packet: Packet) {
        let from = self.map_out(id, socket, to);
        self.send(self.now + UDP, Arrival::Udp { from, to, packet });
    }

    fn deliver(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Relay { to, punch } => {
                let (from, now) = (self.nodes[1 - to].key, self.now);
                self.nodes[to].guesser.handle_message(now, from, punch);
            }
            Arrival::Call { to, guesses } => {
                for guess in guesses {
                    self.udp(to, SocketId(0), guess, Packet::Ping);
                }
            }
            Arrival::Udp { from, to, packet: Packet::Stun(request) } if to.port() == 3478 => {
                let answer = response(Request::decode(&request).unwrap().tx, from);
                let arrival = Arrival::Udp { from: to, to: from, packet: Packet::Stun(answer) };
                self.send(self.now + UDP, arrival);
            }
            Arrival::Udp { from, to, packet } => {
                let Some(id) = self.nodes.iter().position(|node| node.ip == to.ip()) else { return };
                let Some(socket) = self.nodes[id].open.get(&(to.port(), from)).copied() else { return };
                if !self.nodes[id].sockets.contains_key(&socket) {
                    return;
                }
                let (now, peer) = (self.now, self.nodes[1 - id].key);
                match packet {
                    Packet::Stun(answer) => drop(self.nodes[id].guesser.handle_stun(now, &answer)),
                    Packet::Ping => {
                        self.nodes[id].guesser.heard(now, &peer);
                        self.udp(id, socket, from, Packet::Pong);
                        if self.nodes[id].direct.is_none() {
                            self.udp(id, socket, from, Packet::Ping);
                        }
                    }
                    Packet::Pong => {
                        if self.nodes[id].direct.is_none() {
                            self.nodes[id].direct = Some((socket, now));
                        }
                        self.nodes[id].guesser.path_changed(now, &peer, Some(socket));
                    }
                }
            }
        }
        (0..2).for_each(|id| self.drain(id));
    }

    fn drain(&mut self, id: usize) {
        while let Some(action) = self.nodes[id].guesser.poll_action() {
            let now = self.now;
            match action {
                Action::Tell(_, punch) => self.send(now + RELAY, Arrival::Relay { to: 1 - id, punch }),
                Action::Ping(_, socket, remote) => {
                    self.nodes[id].sent.push(now);
                    self.udp(id, socket.unwrap_or(SocketId(0)), remote, Packet::Ping);
                }
                Action::Ask(socket, server, request) => {
                    self.nodes[id].sent.push(now);
                    self.udp(id, socket, server, Packet::Stun(request));
                }
                Action::Open(count) => {
                    let node = &mut self.nodes[id];
                    let mut opened = Vec::new();
                    for _ in 0..count {
                        let extra = Extra { id: SocketId(node.next_socket), port: 50_000 + node.next_socket };
                        node.next_socket += 1;
                        node.sockets.insert(extra.id, extra.port);
                        opened.push(extra);
                    }
                    node.most_sockets = node.most_sockets.max(node.sockets.len() - 1);
                    node.guesser.sockets_opened(now, opened);
                }
                Action::Close(socket) => assert!(self.nodes[id].sockets.remove(&socket).is_some(), "closed twice"),
                Action::Call(_, guesses) => {
                    self.nodes[id].called.push((now, guesses.len()));
                    self.send(now + RELAY, Arrival::Call { to: 1 - id, guesses });
                }
                Action::Tried(_, outcome) => self.nodes[id].outcomes.push(outcome),
            }
        }
    }

    /// Lets both want each other, runs, and says when both were direct.
    fn run(&mut self, wanting: &[usize], limit: Duration) -> Option<Duration> {
        let end = self.now + limit;
        let mut search = self.now;
        while !self.nodes.iter().all(|node| node.direct.is_some()) {
            if self.now >= search {
                search = self.now + Duration::from_secs(5);
                for id in wanting {
                    let (peer, facts, now) = (self.nodes[1 - id].key, self.nodes[*id].facts.clone(), self.now);
                    self.nodes[*id].guesser.want(now, peer, facts);
                    self.drain(*id);
                }
            }
            let arrival = self.due.peek().map(|Reverse((at, _))| *at);
            let timers = self.nodes.iter().filter_map(|node| node.guesser.poll_timeout()).min();
            let at = [arrival, timers, Some(search)].into_iter().flatten().min().unwrap().max(self.now);
            if at > end {
                self.now = end;
                return None;
            }
            self.now = at;
            if arrival == Some(at) {
                let Reverse((_, number)) = self.due.pop().unwrap();
                let arrival = self.arrivals.remove(&number).unwrap();
                self.deliver(arrival);
            }
            for id in 0..2 {
                self.nodes[id].guesser.handle_timeout(self.now);
                self.drain(id);
                let next = self.nodes[id].guesser.poll_timeout();
                assert!(next.is_none_or(|next| next > self.now), "a deadline stays due after it was handled");
            }
        }
        Some(self.now - self.start)
    }

    fn settle(&mut self) {
        let end = self.now + Duration::from_secs(1);
        while let Some(Reverse((at, number))) = self.due.pop().filter(|Reverse((at, _))| *at <= end) {
            self.now = at;
            let arrival = self.arrivals.remove(&number).unwrap();
            self.deliver(arrival);
        }
    }

    /// What one attempt may cost.
    fn assert_limits(&self) {
        for node in &self.nodes {
            assert!(node.most_sockets <= MAX_SOCKETS, "{} sockets", node.most_sockets);
            assert!(node.sent.len() <= MAX_PROBES as usize, "{} probes", node.sent.len());
            for (nth, first) in node.sent.iter().enumerate() {
                let Some(last) = node.sent.get(nth + MAX_PER_SECOND as usize) else { break };
                assert!(*last - *first >= Duration::from_secs(1), "more than 200 probes within {:?}", *last - *first);
            }
        }
    }
}

/// In how many of `runs` both were direct within `limit`, and how long the slowest of them took.
fn rate(runs: u64, limit: Duration, a: &Nat, b: &Nat) -> (u64, Duration) {
    let (mut direct, mut slowest) = (0, Duration::ZERO);
    for seed in 0..runs {
        let mut world = World::of(seed, a.clone(), b.clone());
        if let Some(took) = world.run(&[0, 1], limit) {
            direct += 1;
            slowest = slowest.max(took);
        }
        world.assert_limits();
    }
    (direct, slowest)
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn hard_with_easy_over_all_ports_is_direct_within_twelve_seconds() {
    let (direct, slowest) = rate(100, secs(12), &Nat::random(), &Nat::easy());
    assert!(direct >= 98, "{direct} of 100, the slowest in {slowest:?}");
}

#[test]
fn an_easy_side_that_has_seen_one_stun_server_only_takes_part_as_well() {
    let mut world = World::of(1, Nat::random(), Nat::easy());
    let (outside, behaviour) = (world.nodes[1].guesser.outside(), world.nodes[1].nat.behaviour);
    let mut fresh = Guesser::new([1; 32]);
    fresh.set_servers(&[server(1)]);
    fresh.set_ours(Behaviour { mapping: None, steady: true, ..behaviour }, outside);
    world.nodes[1].guesser = fresh;
    world.run(&[0, 1], secs(12)).expect("a direct path");
}

#[test]
fn a_measurement_that_shows_less_does_not_end_an_attempt_and_one_that_contradicts_does() {
    let mut world = World::of(2, Nat::random(), Nat::easy());
    let (outside, behaviour) = (world.nodes[0].guesser.outside(), world.nodes[0].nat.behaviour);
    assert_eq!(world.run(&[0, 1], Duration::from_millis(700)), None);
    let open = |world: &World| world.nodes[0].guesser.open_sockets();
    let before = open(&world);
    assert!(before > 0);
    world.nodes[0].guesser.set_ours(Behaviour::default(), outside);
    world.nodes[0].guesser.set_ours(Behaviour { allocation: None, ..behaviour }, outside);
    assert_eq!(open(&world), before);
    let other = Some(Mapping::EndpointIndependent);
    world.nodes[0].guesser.set_ours(Behaviour { mapping: other, ..behaviour }, outside);
    assert_eq!(open(&world), 0);
}

#[test]
fn ports_in_order_are_hit_at_once_though_others_are_active_too() {
    for nat in [Nat::counting(1), Nat::counting(-2).noisy(30), Nat::counting(3).noisy(50), Nat::preserving()] {
        let (direct, slowest) = rate(20, secs(12), &nat, &Nat::easy());
        assert!(direct == 20 && slowest < secs(4), "{nat:?}: {direct} of 20, the slowest in {slowest:?}");
    }
}

#[test]
fn two_nats_that_count_meet_though_others_are_active_too() {
    let one = Nat::counting(1).noisy(10);
    for other in [Nat::counting(1), Nat::counting(-2).noisy(20), Nat::preserving(), Nat::counting(1).per_address()] {
        let (direct, slowest) = rate(20, secs(30), &one, &other);
        assert!(direct == 20, "{other:?}: {direct} of 20, the slowest in {slowest:?}");
        let (direct, _) = rate(5, secs(30), &other, &one);
        assert!(direct == 5, "{other:?}: {direct} of 5 the other way round");
    }
    assert_eq!(rate(10, secs(30), &Nat::preserving(), &Nat::preserving()).0, 10);
}

#[test]
fn two_small_blocks_that_share_ports_are_got_through() {
    let nat = Nat::block(512).sharing();
    let (direct, slowest) = rate(100, secs(30), &nat, &nat);
    assert!(direct >= 95, "{direct} of 100, the slowest in {slowest:?}");
    for seed in 0..20 {
        let mut world = World::of(seed, nat.clone(), nat.clone());
        world.run(&[0], secs(30));
        for node in &world.nodes {
            assert!(node.mappings.len() <= MAX_FLOWS as usize + 1, "{} flows", node.mappings.len());
        }
    }
}

#[test]
fn where_every_flow_takes_a_port_half_of_the_block_stays_free() {
    let nat = Nat::block(512);
    let mut direct = 0;
    for seed in 0..50 {
        let mut world = World::of(seed, nat.clone(), nat.clone());
        direct += u32::from(world.run(&[0], secs(30)).is_some());
        for node in &world.nodes {
            assert!(node.mappings.len() <= 256, "{} ports taken", node.mappings.len());
        }
    }
    assert!((1..25).contains(&direct), "{direct} of 50");
}

#[test]
fn blocks_of_a_nat_that_maps_per_address_are_got_through_with_half_of_them() {
    let nat = Nat::block(512).per_address();
    let (direct, slowest) = rate(20, secs(30), &nat, &nat);
    assert!(direct >= 19, "{direct} of 20, the slowest in {slowest:?}");
}

#[test]
fn a_winner_is_kept_and_everything_else_is_closed() {
    let mut world = World::of(3, Nat::random(), Nat::easy());
    world.run(&[0], secs(12)).unwrap();
    world.settle();
    let (winner, _) = world.nodes[0].direct.unwrap();
    assert!(winner.0 >= 16);
    assert_eq!(world.nodes[0].sockets.keys().copied().collect::<Vec<_>>(), [SocketId(0), winner]);
    assert_eq!(world.nodes[0].guesser.open_sockets(), 1);
    assert_eq!(world.nodes[1].sockets.len(), 1);
    let peer = world.nodes[1].key;
    assert_eq!(world.nodes[0].guesser.outcome(&peer), Some(Outcome::Direct));

    world.nodes[0].guesser.path_changed(world.now, &peer, None);
    world.nodes[0].guesser.handle_timeout(world.now + secs(59));
    assert_eq!(world.nodes[0].guesser.poll_action(), None);
    world.nodes[0].guesser.handle_timeout(world.now + secs(61));
    assert_eq!(world.nodes[0].guesser.poll_action(), Some(Action::Close(winner)));
}

#[test]
fn what_is_hopeless_is_said_so_and_costs_nothing() {
    let mut world = World::of(1, Nat::random(), Nat::random());
    assert_eq!(world.run(&[0, 1], secs(120)), None);
    for node in &world.nodes {
        assert!(node.sent.is_empty() && node.most_sockets == 0);
        let hopeless = Outcome::Hopeless(Hopeless::TooManyPorts { ours: 64_512, theirs: 64_512 });
        assert_eq!(node.outcomes.last(), Some(&hopeless));
    }
}

#[test]
fn failures_are_followed_by_longer_and_longer_pauses() {
    // The hard one is mistaken about its own address.
    let mut world = World::of(5, Nat::random(), Nat::easy());
    let behaviour = world.nodes[0].nat.behaviour;
    world.nodes[0].guesser.set_ours(behaviour, Some("203.0.113.9:1".parse().unwrap()));
    assert_eq!(world.run(&[0, 1], secs(900)), None, "its real address is never tried");
    let began: Vec<_> = world.nodes[1].sent.chunk_by(|a, b| *b - *a < secs(20)).map(|attempt| attempt[0]).collect();
    let pauses: Vec<_> = began.windows(2).map(|pair| (pair[1] - pair[0]).as_secs() / 60).collect();
    assert!(pauses.len() >= 3 && pauses.windows(2).all(|pair| pair[0] < pair[1]), "{pauses:?}");
    assert!(matches!(world.nodes[1].outcomes.last(), Some(Outcome::Failed(3..))));
    assert_eq!(world.nodes[0].sockets.len(), 1, "nothing stays open");
}

#[test]
fn off_means_off_for_both() {
    let mut world = World::of(1, Nat::random(), Nat::easy());
    world.nodes[0].guesser.set_enabled(false);
    assert_eq!(world.run(&[0, 1], secs(60)), None);
    let peer = world.nodes[0].key;
    assert_eq!(world.nodes[1].guesser.outcome(&peer), Some(Outcome::Hopeless(Hopeless::Refused)));
    assert!(world.nodes.iter().all(|node| node.sent.is_empty() && node.most_sockets == 0));
}

#[test]
fn a_peer_that_is_not_ours_is_listed_guesses_politely() {
    let mut direct = 0;
    for seed in 0..50 {
        let mut world = World::of(seed, Nat::random(), Nat::easy());
        world.nodes[0].facts.ours = false;
        direct += u32::from(world.run(&[0], secs(30)).is_some());
        world.settle();
        world.assert_limits();
        let called = &world.nodes[0].called;
        assert!(called.iter().map(|(_, count)| count).sum::<usize>() <= MAX_PROBES as usize);
        assert!(called.iter().all(|(_, count)| *count <= 256));
        assert_eq!(called.last().map(|(_, count)| *count), Some(0), "the last list has real addresses only");
        let lists: Vec<_> = called.iter().filter(|(_, count)| *count > 0).map(|(at, _)| *at).collect();
        assert!(lists.windows(2).all(|pair| pair[1] - pair[0] >= secs(2)), "lists follow each other too closely");
        assert!(world.nodes[1].outcomes.is_empty(), "it was told nothing that it does not understand");
    }
    assert!(direct >= 49, "{direct} of 50");
}

#[test]
fn a_hard_peer_that_is_not_ours_is_found_where_its_nat_counts() {
    let mut world = World::of(1, Nat::easy(), Nat::counting(1));
    world.nodes[0].facts.ours = false;
    // It pings our address, as it does when it is called.
    let target = world.nodes[1].facts.addresses[0];
    world.map_out(1, SocketId(0), target);
    world.run(&[0], secs(20)).unwrap();
    assert!(world.nodes[0].sent.len() <= 32);
}

#[test]
fn one_seed_makes_one_run() {
    let run = |seed| {
        let mut world = World::of(seed, Nat::random(), Nat::easy());
        let took = world.run(&[0, 1], secs(12));
        (took, world.nodes[0].sent.len(), world.nodes[1].sent.len())
    };
    assert_eq!(run(4), run(4));
    assert_ne!(run(4), run(5));
}
