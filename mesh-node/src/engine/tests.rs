//! Two engines in virtual time, with a pipe that acts as the relay and as the network.

use super::*;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use ipnet::IpNet;
use mesh_derp::map::{DerpMap, DerpNode, DerpRegion};
use mesh_nat::SocketId;
use mesh_nat::stun::responder::{Audience, Responder};
use mesh_noise::key::DiscoPrivate;
use mesh_noise::wireguard::message::{self, MessageKind};
use mesh_noise::wireguard::{Session, Timing};
use mesh_tun::masquerade::Masquerade;

/// Some moment; tests count from here.
#[expect(clippy::disallowed_methods, reason = "virtual time needs one real instant to start from")]
pub(crate) fn epoch() -> Instant {
    Instant::now()
}

const RELAY_DELAY: Duration = Duration::from_millis(20);
const DIRECT_DELAY: Duration = Duration::from_millis(5);

fn region(number: u16) -> RegionId {
    RegionId::new(number).unwrap()
}

fn derp_map() -> DerpMap {
    let mut map = DerpMap::default();
    let mut entry = DerpRegion::new(region(1), "one", "One");
    let mut node = DerpNode::new("1a", region(1), "192.0.2.1");
    node.ipv4 = "192.0.2.1".to_owned();
    entry.nodes.push(node);
    map.regions.insert(region(1), entry);
    map
}

struct Host {
    engine: Engine,
    address: SocketAddr,
    overlay: IpNet,
    send: BTreeMap<NodePublic, Arc<Session>>,
    receive: BTreeMap<u32, Arc<Session>>,
    paths: BTreeMap<NodePublic, Option<Path>>,
    backups: BTreeMap<NodePublic, Option<Path>>,
    /// Every path command, in order.
    history: Vec<Option<Path>>,
    announced: Option<Announcement>,
    events: Vec<Event>,
    received: Vec<(Path, Vec<u8>)>,
    /// When each of them came.
    times: Vec<Instant>,
}

enum Parcel {
    Engine { from: Hop, datagram: Vec<u8> },
    Data { from: Hop, datagram: Vec<u8> },
}

struct World {
    now: Instant,
    hosts: Vec<Host>,
    in_flight: BTreeMap<(Instant, u64), (usize, Parcel)>,
    counter: u64,
    stun: Responder,
    direct_works: bool,
    udp_works: bool,
}

impl World {
    fn new() -> Self {
        let now = epoch();
        let mut rng = StdRng::seed_from_u64(7);
        let mut hosts = Vec::new();
        for number in 1..=2_u8 {
            let engine = Engine::new(
                now,
                Config {
                    private: NodePrivate::generate(&mut rng),
                    disco: DiscoPrivate::generate(&mut rng),
                    seed: [number; 32],
                    epoch: now,
                    wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
                    mode: PathMode::Auto,
                    port_guessing: true,
                    static_endpoints: Vec::new(),
                    timing: Timing::default(),
                },
            );
            hosts.push(Host {
                engine,
                address: SocketAddr::new(IpAddr::from([198, 51, 100, number]), 41641),
                overlay: IpNet::from(IpAddr::from([100, 64, 0, number])),
                send: BTreeMap::new(),
                receive: BTreeMap::new(),
                paths: BTreeMap::new(),
                backups: BTreeMap::new(),
                history: Vec::new(),
                announced: None,
                events: Vec::new(),
                received: Vec::new(),
                times: Vec::new(),
            });
        }
        let stun = Responder::new(Audience::Members);
        let mut world =
            Self { now, hosts, in_flight: BTreeMap::new(), counter: 0, stun, direct_works: true, udp_works: true };
        for host in &mut world.hosts {
            let addresses = vec![LocalAddress { interface: "eth0".into(), network: host.address.ip().into() }];
            let port = Some(host.address.port());
            let local = Local { addresses, port_v4: port, port_v6: None, loopback: false };
            host.engine.set_control_connected(now, true);
            host.engine.set_local(now, local, &[(SocketId(0), host.address)]);
        }
        world.publish();
        world
    }

    /// Tells each engine what it should know of the other, as control would.
    fn publish(&mut self) {
        let derp = Arc::new(derp_map());
        let views: Vec<PeerView> = self
            .hosts
            .iter()
            .map(|host| PeerView {
                node: host.engine.node_key(),
                disco: Some(host.engine.disco_key()),
                home: host.engine.home(),
                endpoints: host.engine.endpoints().iter().map(|endpoint| endpoint.address).collect(),
                allowed: vec![host.overlay],
                jailed: false,
                masquerade: Masquerade::default(),
                ours: true,
            })
            .collect();
        for index in 0..self.hosts.len() {
            let other = views[1 - index].clone();
            let view = MapView {
                addresses: vec![self.hosts[index].overlay],
                peers: BTreeMap::from([(other.node, other)]),
                derp: Arc::clone(&derp),
                filter: Some(Vec::new()),
                ..MapView::default()
            };
            self.hosts[index].engine.set_map(self.now, Arc::new(view));
            self.drain(index);
        }
    }

    fn key(&self, index: usize) -> NodePublic {
        self.hosts[index].engine.node_key()
    }

    fn path(&self, index: usize) -> Option<Path> {
        self.hosts[index].paths.get(&self.key(1 - index)).copied().flatten()
    }

    fn carry(&mut self, from: usize, path: Path, node: Option<NodePublic>, datagram: Vec<u8>) {
        let (delay, to, hop) = match path {
            Path::Relay { .. } => {
                let to = 1 - from;
                assert_eq!(node, Some(self.key(to)), "a relay frame names its receiver");
                (RELAY_DELAY, to, Hop { path, node: Some(self.key(from)) })
            }
            Path::Direct { remote, .. } if !self.udp_works => {
                let _ = remote;
                return;
            }
            Path::Direct { remote, .. } if remote.port() == 3478 => {
                let answer = self.stun.handle_datagram(self.hosts[from].address, &datagram).unwrap();
                let hop = Hop { path: Path::Direct { socket: SocketId(0), remote }, node: None };
                self.enqueue(DIRECT_DELAY * 2, from, Parcel::Engine { from: hop, datagram: answer.datagram });
                return;
            }
            Path::Direct { remote, .. } => {
                let to = 1 - from;
                if !self.direct_works || remote != self.hosts[to].address {
                    return;
                }
                let path = Path::Direct { socket: SocketId(0), remote: self.hosts[from].address };
                (DIRECT_DELAY, to, Hop { path, node: None })
            }
            Path::PeerRelay { .. } => unreachable!("nobody has told of one"),
        };
        // A receiver's data plane keeps transport data for itself, keepalives of the engine's making included.
        let data = matches!(message::kind(&datagram), Some(MessageKind::TransportData { .. }));
        let parcel = if data { Parcel::Data { from: hop, datagram } } else { Parcel::Engine { from: hop, datagram } };
        self.enqueue(delay, to, parcel);
    }

    fn enqueue(&mut self, delay: Duration, to: usize, parcel: Parcel) {
        self.counter += 1;
        self.in_flight.insert((self.now + delay, self.counter), (to, parcel));
    }

    fn drain(&mut self, index: usize) {
        while let Some(transmit) = self.hosts[index].engine.poll_transmit() {
            self.carry(index, transmit.path, transmit.node, transmit.datagram);
        }
        while let Some(command) = self.hosts[index].engine.poll_command() {
            let host = &mut self.hosts[index];
            match command {
                Command::SetPath(peer, path) => {
                    host.paths.insert(peer, path);
                    host.history.push(path);
                }
                Command::OpenSession(session) => {
                    host.receive.insert(session.receiver_index(), session);
                }
                Command::UseSession(session) => {
                    host.send.insert(session.peer(), session);
                }
                Command::CloseSession(peer, receiver_index) => {
                    host.receive.remove(&receiver_index);
                    host.send.retain(|key, session| *key != peer || session.receiver_index() != receiver_index);
                }
                Command::RemovePeer(peer) => {
                    host.send.remove(&peer);
                    host.paths.remove(&peer);
                }
                Command::Announce(announcement) => host.announced = Some(announcement),
                Command::SetBackup(peer, backup) => {
                    host.backups.insert(peer, backup);
                }
                Command::SetPeers(_)
                | Command::SetLimit(..)
                | Command::Configure(_)
                | Command::Relays(_)
                | Command::Regions(_)
                | Command::Resolve(_)
                | Command::OpenSockets(_)
                | Command::CloseSockets
                | Command::OpenExtra(_)
                | Command::CloseExtra(_)
                | Command::CarryExtra(_)
                | Command::LookForPortal(_)
                | Command::Allocate { .. }
                | Command::GiveUp(_) => {}
                Command::MeasureHttps(region) => {
                    let now = self.now;
                    self.hosts[index].engine.https_latency(now, region, None);
                }
            }
        }
        while let Some(event) = self.hosts[index].engine.poll_event() {
            self.hosts[index].events.push(event);
        }
    }

    /// One step of virtual time: the next parcel or the next deadline, whichever is first.
    fn step(&mut self, until: Instant) -> bool {
        let parcel = self.in_flight.keys().next().map(|(at, _)| *at);
        let timer = self.hosts.iter().filter_map(|host| host.engine.poll_timeout()).min();
        let Some(next) = parcel.into_iter().chain(timer).min().filter(|next| *next <= until) else {
            self.now = until;
            return false;
        };
        self.now = self.now.max(next);
        if parcel == Some(next) {
            let (_, (to, parcel)) = self.in_flight.pop_first().unwrap();
            match parcel {
                Parcel::Engine { from, datagram } => self.hosts[to].engine.handle_datagram(self.now, &from, &datagram),
                Parcel::Data { from, datagram } => self.open(to, &from, datagram),
            }
            self.drain(to);
        } else {
            for index in 0..self.hosts.len() {
                self.hosts[index].engine.handle_timeout(self.now);
                self.drain(index);
                let deadline = self.hosts[index].engine.poll_timeout();
                assert!(deadline.is_none_or(|deadline| deadline > self.now), "{:?}", self.hosts[index].engine);
            }
        }
        true
    }

    fn run(&mut self, time: Duration) {
        let until = self.now + time;
        while self.step(until) {}
    }

    fn run_until(&mut self, limit: Duration, condition: impl Fn(&Self) -> bool) -> bool {
        let until = self.now + limit;
        while !condition(self) {
            if !self.step(until) {
                return condition(self);
            }
        }
        true
    }

    /// The double of the data plane's sending half.
    fn send(&mut self, from: usize, packet: &[u8]) -> bool {
        let peer = self.key(1 - from);
        let host = &mut self.hosts[from];
        let Some(session) = host.send.get(&peer).cloned() else {
            host.engine.want_session(self.now, &peer);
            self.drain(from);
            return false;
        };
        let Some(path) = host.paths.get(&peer).copied().flatten() else { return false };
        let mut datagram = vec![0; 16 + packet.len() + 32];
        datagram[16..16 + packet.len()].copy_from_slice(packet);
        let counter = session.reserve(1).unwrap();
        let length = session.seal(counter, &mut datagram, packet.len());
        datagram.truncate(length);
        if session.activity().note_sent(host.engine.clock_ms(self.now), 1, length as u64) {
            host.engine.peer_active(self.now, &peer);
        }
        let backup = host.backups.get(&peer).copied().flatten();
        for path in std::iter::once(path).chain(backup) {
            self.carry(from, path, Some(peer), datagram.clone());
        }
        true
    }

    /// The double of the data plane's receiving half.
    fn open(&mut self, to: usize, from: &Hop, mut datagram: Vec<u8>) {
        let host = &mut self.hosts[to];
        let index = u32::from_le_bytes(datagram[4..8].try_into().unwrap());
        let Some(session) = host.receive.get(&index).cloned() else { return };
        let opened = session.open(&mut datagram).unwrap();
        let packet = opened.packet.to_vec();
        if !session.replay().accept(opened.counter) {
            return;
        }
        if session.activity().note_received(host.engine.clock_ms(self.now), 1, packet.len() as u64) {
            host.engine.peer_active(self.now, &session.peer());
        }
        host.engine.session_used(self.now, index);
        host.engine.path_seen(self.now, &session.peer(), from.path);
        if !packet.is_empty() {
            host.received.push((from.path, packet));
            host.times.push(self.now);
        }
    }
}

#[test]
fn the_first_packets_take_the_relay_and_then_the_path_becomes_direct() {
    let mut world = World::new();
    assert!(
        world.run_until(Duration::from_secs(5), |world| world.hosts.iter().all(|host| host.engine.home().is_some()))
    );
    world.publish();
    assert_eq!(world.path(0), Some(Path::Relay { region: region(1) }));
    assert!(!world.send(0, b"no session yet"));
    let b = world.key(1);
    assert!(world.run_until(Duration::from_secs(1), |world| world.hosts[0].send.contains_key(&b)));
    assert!(world.send(0, b"hello hello 1234"));
    assert!(world.run_until(Duration::from_secs(10), |world| {
        (0..2).all(|index| world.path(index).is_some_and(|path| path.is_direct()))
    }));
    assert!(world.send(0, b"hello hello 5678"));
    assert!(world.run_until(Duration::from_secs(1), |world| world.hosts[1].received.len() == 2));
    let paths: Vec<bool> = world.hosts[1].received.iter().map(|(path, _)| path.is_direct()).collect();
    assert_eq!(world.hosts[1].received[0].1, b"hello hello 1234");
    assert!(paths[1], "the second packet went {:?}", world.hosts[1].received[1].0);
    assert!(world.hosts[0].history[0].is_some_and(|path| path.is_relay()));
    assert!(world.hosts[1].engine.peer(&world.key(0)).unwrap().last_handshake.is_some());
}

#[test]
fn a_node_that_asks_before_it_is_known_gets_its_session_as_soon_as_it_is() {
    let mut world = World::new();
    world.run_until(Duration::from_secs(5), |world| world.hosts.iter().all(|host| host.engine.home().is_some()));
    world.publish();
    // Control has told the first of the second, but not yet the second of the first.
    let (now, b) = (world.now, world.key(1));
    let empty = MapView { derp: Arc::new(derp_map()), ..MapView::default() };
    world.hosts[1].engine.set_map(now, Arc::new(empty));
    world.drain(1);
    world.send(0, b"");
    world.run(Duration::from_millis(300));
    assert!(!world.hosts[0].send.contains_key(&b));
    world.publish();
    assert!(world.run_until(Duration::from_millis(200), |world| world.hosts[0].send.contains_key(&b)));
}

#[test]
fn without_udp_a_region_is_chosen_all_the_same_and_traffic_stays_on_the_relay() {
    let mut world = World::new();
    world.udp_works = false;
    let chosen =
        world.run_until(Duration::from_secs(30), |world| world.hosts.iter().all(|host| host.engine.home().is_some()));
    assert!(chosen);
    world.publish();
    let b = world.key(1);
    world.send(0, b"");
    assert!(world.run_until(Duration::from_secs(2), |world| world.hosts[0].send.contains_key(&b)));
    for _ in 0..20 {
        assert!(world.send(0, b"through the relay"));
        world.run(Duration::from_secs(1));
    }
    assert_eq!(world.hosts[1].received.len(), 20);
    assert!(world.hosts[1].received.iter().all(|(path, _)| path.is_relay()));
}

/// Sends both ways every 100 ms for `time`.
fn converse(world: &mut World, time: Duration) {
    let until = world.now + time;
    while world.now < until {
        world.send(0, b"0123456789abcdef");
        world.send(1, b"0123456789abcdef");
        world.run(Duration::from_millis(100));
    }
}

#[test]
fn data_pauses_for_less_than_a_second_when_the_direct_path_dies() {
    for offset in 0..8 {
        let mut world = World::new();
        world.run_until(Duration::from_secs(5), |world| world.hosts.iter().all(|host| host.engine.home().is_some()));
        world.publish();
        converse(&mut world, Duration::from_millis(15_000 + 400 * offset));
        assert!(world.path(0).is_some_and(|path| path.is_direct()), "{:?}", world.path(0));
        let relayed = |world: &World| {
            world.hosts.iter().flat_map(|host| &host.received).filter(|(path, _)| path.is_relay()).count()
        };
        let before = relayed(&world);
        converse(&mut world, Duration::from_secs(10));
        assert_eq!(relayed(&world), before, "a sound path needs no copies");
        world.direct_works = false;
        let lost = world.now;
        converse(&mut world, Duration::from_secs(8));
        for host in &world.hosts {
            let came = host.times.iter().copied().filter(|at| *at >= lost);
            let ends = std::iter::once(lost).chain(came.clone()).zip(came.chain([world.now]));
            let pause = ends.map(|(one, next)| next - one).max().unwrap();
            assert!(pause <= Duration::from_secs(1), "offset {offset}: {pause:?}");
        }
        assert!(world.hosts.iter().all(|host| host.backups.values().all(Option::is_none)), "in doubt for ever");
    }
}

#[test]
fn losing_udp_moves_traffic_back_to_the_relay_within_four_seconds() {
    // The outage begins at different moments between two heartbeats.
    for offset in 0..8 {
        let mut world = World::new();
        world.run_until(Duration::from_secs(5), |world| world.hosts.iter().all(|host| host.engine.home().is_some()));
        world.publish();
        converse(&mut world, Duration::from_millis(15_000 + 400 * offset));
        assert!(world.path(0).is_some_and(|path| path.is_direct()), "{:?}", world.path(0));
        world.direct_works = false;
        let lost = world.now;
        while !(0..2).all(|index| world.path(index).is_some_and(|path| path.is_relay())) {
            converse(&mut world, Duration::from_millis(100));
            assert!(world.now - lost < Duration::from_secs(4), "still direct, outage begun at offset {offset}");
        }
    }
}

#[test]
fn one_way_traffic_is_not_doubted_off_its_path() {
    let mut world = World::new();
    world.run_until(Duration::from_secs(5), |world| world.hosts.iter().all(|host| host.engine.home().is_some()));
    world.publish();
    converse(&mut world, Duration::from_secs(10));
    assert!(world.path(0).is_some_and(|path| path.is_direct()));
    world.hosts[0].history.clear();
    for _ in 0..300 {
        world.send(0, b"0123456789abcdef");
        world.run(Duration::from_millis(100));
    }
    assert_eq!(world.hosts[0].history, [], "the path changed although it works");
}

#[test]
fn in_relay_mode_a_direct_path_is_not_used_and_in_direct_mode_the_relay_is_not() {
    let mut world = World::new();
    world.run_until(Duration::from_secs(5), |world| world.hosts.iter().all(|host| host.engine.home().is_some()));
    world.publish();
    let now = world.now;
    world.hosts[0].engine.set_mode(now, PathMode::Direct);
    world.drain(0);
    assert_eq!(world.path(0), None);
    world.hosts[0].engine.set_mode(now, PathMode::Relay);
    world.drain(0);
    for _ in 0..20 {
        world.send(0, b"0123456789abcdef");
        world.run(Duration::from_millis(500));
    }
    assert!(world.hosts[0].history.iter().flatten().all(|path| path.is_relay()));
    assert!(!world.hosts[1].received.is_empty());
}

#[test]
fn a_removed_peer_takes_its_sessions_along() {
    let mut world = World::new();
    world.run_until(Duration::from_secs(5), |world| world.hosts.iter().all(|host| host.engine.home().is_some()));
    world.publish();
    world.send(0, b"");
    world.run(Duration::from_secs(1));
    assert!(!world.hosts[0].receive.is_empty());
    let now = world.now;
    let view = MapView { derp: Arc::new(derp_map()), ..MapView::default() };
    world.hosts[0].engine.set_map(now, Arc::new(view));
    world.drain(0);
    assert!(world.hosts[0].send.is_empty());
    assert!(world.hosts[0].engine.peer(&world.key(1)).is_none());
    assert_eq!(world.hosts[0].engine.live_sessions, 0);
}

#[test]
fn a_ping_says_which_way_it_took() {
    let mut world = World::new();
    world.run_until(Duration::from_secs(5), |world| world.hosts.iter().all(|host| host.engine.home().is_some()));
    world.publish();
    let (now, peer) = (world.now, world.key(1));
    let id = world.hosts[0].engine.ping(now, &peer, None).unwrap();
    world.drain(0);
    world.run(Duration::from_secs(2));
    let answered = world.hosts[0].events.iter().any(|event| {
        matches!(event, Event::PingAnswered { id: answered, latency, .. } if *answered == id && *latency >= DIRECT_DELAY * 2)
    });
    assert!(answered, "{:?}", world.hosts[0].events);
    assert_eq!(world.hosts[0].engine.ping(now, &NodePublic::ZERO, None), None);
}

#[test]
fn endpoints_and_home_are_announced_once_measured() {
    let mut world = World::new();
    world.run_until(Duration::from_secs(5), |world| world.hosts.iter().all(|host| host.engine.home().is_some()));
    let announced = world.hosts[0].announced.clone().unwrap();
    assert_eq!(announced.home, Some(region(1)));
    assert_eq!(announced.endpoints[0].address, world.hosts[0].address);
}

proptest::proptest! {
    #[test]
    fn no_datagram_from_anywhere_upsets_the_engine(
        datagrams in proptest::collection::vec(
            (proptest::bool::ANY, proptest::collection::vec(proptest::num::u8::ANY, 0..200)), 0..20),
    ) {
        let mut world = World::new();
        world.publish();
        let (now, stranger) = (world.now, NodePublic::from_bytes([7; 32]));
        for (relayed, mut datagram) in datagrams {
            if let Some(first) = datagram.first_mut() {
                // Most of what begins otherwise is not even looked at.
                *first %= 5;
            }
            let hop = if relayed {
                Hop { path: Path::Relay { region: region(1) }, node: Some(stranger) }
            } else {
                Hop { path: Path::Direct { socket: SocketId(0), remote: world.hosts[1].address }, node: None }
            };
            world.hosts[0].engine.handle_datagram(now, &hop, &datagram);
            world.drain(0);
        }
        world.run(Duration::from_secs(10));
        proptest::prop_assert!(world.hosts[0].engine.home().is_some());
    }
}
