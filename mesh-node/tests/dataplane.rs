//! Two data planes with in-memory devices, over real loopback sockets and a relay of a few lines, with sessions that two
//! WireGuard interfaces agree on.
#![expect(clippy::unwrap_used, reason = "helpers outside test functions, in a test")]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use mesh_derp::map::RegionId;
use mesh_nat::{Path, SocketId, Vni};
use mesh_node::dataplane::{Config, Dataplane, DropReason, Notice, Notices, PeerConfig, RelaySink, Traffic, Workers};
use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::random::SeededRng;
use mesh_noise::wireguard::{self, Event, Interface};
use mesh_tun::channel::{self, ChannelDevice};
use mesh_tun::filter::{ALL_PORTS, Destination, Filter, Rule, Standing};
use mesh_tun::linux::udp::{self, UdpBatch};

const A: [u8; 4] = [100, 64, 0, 1];
const B: [u8; 4] = [100, 64, 0, 2];
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn parked_packets_arrive_after_the_handshake_and_before_later_ones() {
    let mut pair = Pair::direct();
    for sequence in 0..20 {
        assert!(pair.a.host.send(&packet(A, B, 1, sequence)));
    }
    pair.run_until(|pair| pair.b.count() > 0);
    for sequence in 20..300 {
        assert!(pair.a.host.send(&packet(A, B, 1, sequence)));
    }
    pair.run_until(|pair| pair.b.count() == 300);
    assert_eq!(sequences(&pair.b.received, 1), (0..300).collect::<Vec<_>>());
    assert_eq!(pair.a.wanted, 1, "the engine was told once");
    let (a, b) = (pair.a.traffic(), pair.b.traffic());
    assert_eq!((a.0.tx_packets, a.1), (300, Traffic::default()), "nothing went by the relay");
    assert!(b.0.rx_packets >= 300 && b.0.rx_bytes >= a.0.tx_bytes, "{b:?} {a:?}");
}

#[test]
fn flows_keep_their_order_both_ways_at_once() {
    let mut pair = Pair::connected();
    let mut sent = 0;
    for sequence in 0..400 {
        for flow in 1..=3 {
            assert!(pair.a.host.send(&packet(A, B, flow, sequence)));
            assert!(pair.b.host.send(&packet(B, A, flow, sequence)));
            sent += 1;
        }
        if sequence % 50 == 49 {
            pair.run_until(|pair| pair.a.count() == sent && pair.b.count() == sent);
        }
    }
    for flow in 1..=3 {
        assert_eq!(sequences(&pair.b.received, flow), (0..400).collect::<Vec<_>>(), "a to b, flow {flow}");
        assert_eq!(sequences(&pair.a.received, flow), (0..400).collect::<Vec<_>>(), "b to a, flow {flow}");
    }
    assert_eq!(pair.a.plane.drops(), BTreeMap::new());
    assert_eq!(pair.b.plane.drops(), BTreeMap::new());
}

#[test]
fn a_packet_from_an_address_of_somebody_else_is_dropped_and_counted() {
    let mut pair = Pair::connected();
    // A peer that does not check itself, as ours would.
    pair.a.plane.set_filter(Filter::open(pair.a.plane.flows()));
    assert!(pair.a.host.send(&packet([100, 64, 0, 77], B, 1, 0)));
    assert!(pair.a.host.send(&packet(B, B, 1, 1)));
    assert!(pair.a.host.send(&packet(A, B, 1, 2)));
    pair.run_until(|pair| pair.b.count() > 0);
    assert_eq!(sequences(&pair.b.received, 1), [2]);
    assert_eq!(pair.b.plane.drops(), BTreeMap::from([(DropReason::ForeignSource, 2)]));
}

#[test]
fn a_packet_in_the_name_of_somebody_else_does_not_leave() {
    let mut pair = Pair::connected();
    assert!(pair.a.host.send(&packet([100, 64, 0, 77], B, 1, 0)));
    assert!(pair.a.host.send(&packet(A, B, 1, 1)));
    pair.run_until(|pair| pair.b.count() > 0);
    assert_eq!(sequences(&pair.b.received, 1), [1]);
    assert_eq!(pair.a.plane.drops(), BTreeMap::from([(DropReason::NotOurs, 1)]));
    assert_eq!(pair.b.plane.drops(), BTreeMap::new());
}

#[test]
fn nothing_passes_before_a_filter_is_set_and_then_only_what_it_allows() {
    let mut pair = Pair::of(Relayed::Once);
    pair.go_direct();
    assert!(pair.a.host.send(&packet(A, B, 1, 0)));
    pair.run_until(|pair| pair.b.plane.drops().contains_key(&DropReason::NoFilter));
    let flows = pair.b.plane.flows();
    pair.b.plane.set_filter(Filter::new(&[net(B)], &[], flows));
    assert!(pair.a.host.send(&packet(A, B, 1, 1)));
    pair.run_until(|pair| pair.b.plane.drops().contains_key(&DropReason::Filtered));
    assert_eq!(pair.b.count(), 0);
}

#[test]
fn an_answer_passes_a_filter_without_rules() {
    let mut pair = Pair::connected();
    let flows = pair.a.plane.flows();
    pair.a.plane.set_filter(Filter::new(&[net(A)], &[], flows));
    assert!(pair.b.host.send(&packet(B, A, 7, 0)), "unasked");
    pair.run_until(|pair| pair.a.plane.drops().contains_key(&DropReason::Filtered));
    assert!(pair.a.host.send(&packet(A, B, 7, 1)), "a question");
    pair.run_until(|pair| pair.b.count() > 0);
    assert!(pair.b.host.send(&packet(B, A, 7, 2)), "its answer");
    pair.run_until(|pair| pair.a.count() > 0);
    assert_eq!(sequences(&pair.a.received, 7), [2]);
}

#[test]
fn a_flow_moves_from_relay_to_direct_and_each_is_counted() {
    let mut pair = Pair::of(Relayed::Once);
    pair.allow_all();
    for sequence in 0..10 {
        assert!(pair.a.host.send(&packet(A, B, 1, sequence)));
    }
    pair.run_until(|pair| pair.b.count() == 10);
    let (direct, relay) = pair.a.traffic();
    assert_eq!((direct, relay.tx_packets), (Traffic::default(), 10));
    pair.go_direct();
    for sequence in 10..30 {
        assert!(pair.a.host.send(&packet(A, B, 1, sequence)));
    }
    pair.run_until(|pair| pair.b.count() == 30);
    assert_eq!(sequences(&pair.b.received, 1), (0..30).collect::<Vec<_>>());
    let (direct, relay) = pair.a.traffic();
    assert_eq!((direct.tx_packets, relay.tx_packets), (20, 10));
    let expected = Path::Direct { socket: SocketId(0), remote: pair.a.socket.local_addr() };
    pair.run_until(|pair| pair.b.seen.contains(&expected));
}

#[test]
fn while_a_path_is_in_doubt_packets_go_by_the_relay_too_and_arrive_once() {
    let mut pair = Pair::connected();
    let relay = Path::Relay { region: RegionId::new(1).unwrap() };
    let before = pair.a.traffic();
    pair.a.plane.set_backup(&pair.b.key, Some(relay));
    for sequence in 0..20 {
        assert!(pair.a.host.send(&packet(A, B, 1, sequence)));
    }
    let replayed = |pair: &Pair| pair.b.plane.drops().get(&DropReason::Replayed).copied().unwrap_or(0);
    pair.run_until(|pair| pair.b.count() == 20 && replayed(pair) == 20);
    let mut arrived = sequences(&pair.b.received, 1);
    arrived.sort_unstable();
    assert_eq!(arrived, (0..20).collect::<Vec<_>>());
    let after = pair.a.traffic();
    let sent = [after.0.tx_packets - before.0.tx_packets, after.1.tx_packets - before.1.tx_packets];
    assert_eq!(sent, [20, 20]);

    // The direct path is dead: what is sent arrives all the same, and the receiver's engine hears of it.
    pair.b.seen.clear();
    // That data comes by the relay is told five times a second at most.
    std::thread::sleep(Duration::from_millis(250));
    let nowhere = Path::Direct { socket: SocketId(0), remote: ([127, 0, 0, 1], 9).into() };
    pair.a.plane.set_path(&pair.b.key, Some(nowhere));
    for sequence in 20..30 {
        assert!(pair.a.host.send(&packet(A, B, 1, sequence)));
    }
    pair.run_until(|pair| pair.b.count() == 30 && pair.b.seen.contains(&relay));

    pair.a.plane.set_backup(&pair.b.key, None);
    pair.go_direct();
    let before = pair.a.traffic().1;
    assert!(pair.a.host.send(&packet(A, B, 1, 30)));
    pair.run_until(|pair| pair.b.count() == 31);
    assert_eq!(pair.a.traffic().1, before, "the relay is left");
}

#[test]
fn while_a_path_through_a_peer_relay_is_in_doubt_the_copies_have_no_header() {
    let mut pair = Pair::connected();
    // The peer's own socket, as if a server had forwarded to it.
    let through = Path::PeerRelay { server: pair.b.socket.local_addr(), vni: Vni::new(7).unwrap() };
    pair.a.plane.set_path(&pair.b.key, Some(through));
    pair.a.plane.set_backup(&pair.b.key, Some(Path::Relay { region: RegionId::new(1).unwrap() }));
    for sequence in 0..20 {
        assert!(pair.a.host.send(&packet(A, B, 1, sequence)));
    }
    let replayed = |pair: &Pair| pair.b.plane.drops().get(&DropReason::Replayed).copied().unwrap_or(0);
    pair.run_until(|pair| pair.b.count() == 20 && replayed(pair) == 20);
}

#[test]
fn a_datagram_seen_before_is_dropped_and_counted() {
    let mut pair = Pair::of(Relayed::Twice);
    pair.allow_all();
    for sequence in 0..10 {
        assert!(pair.a.host.send(&packet(A, B, 1, sequence)));
    }
    let replayed = |pair: &Pair| pair.b.plane.drops().get(&DropReason::Replayed).copied().unwrap_or(0);
    pair.run_until(|pair| pair.b.count() == 10 && replayed(pair) >= 10);
    assert_eq!(sequences(&pair.b.received, 1), (0..10).collect::<Vec<_>>());
}

#[test]
fn without_a_session_the_latest_packets_are_kept_and_the_engine_is_asked_once() {
    let mut pair = Pair::direct();
    for sequence in 0..100 {
        assert!(pair.a.host.send(&packet(A, B, 1, sequence)));
    }
    wait_until(|| pair.a.plane.drops().get(&DropReason::NoSession) == Some(&36));
    pair.run_until(|pair| pair.b.count() == 64);
    assert_eq!(sequences(&pair.b.received, 1), (36..100).collect::<Vec<_>>());
    assert_eq!(pair.a.wanted, 1);
}

#[test]
fn packets_for_nobody_and_no_packets_are_counted() {
    let mut pair = Pair::connected();
    assert!(pair.a.host.send(&packet(A, [8, 8, 8, 8], 1, 0)));
    assert!(pair.a.host.send(b"not IP"));
    assert!(pair.a.plane.remove_peer(&pair.b.key));
    assert!(!pair.a.plane.remove_peer(&pair.b.key));
    assert!(pair.a.host.send(&packet(A, B, 1, 0)));
    pair.run_until(|pair| pair.a.plane.drops().values().sum::<u64>() == 3);
    assert_eq!(pair.a.plane.drops(), BTreeMap::from([(DropReason::NoPeer, 2), (DropReason::Malformed, 1)]));
}

#[test]
fn a_prefix_belongs_to_the_last_peer_it_was_given_to() {
    let mut pair = Pair::connected();
    let other = NodePrivate::generate(&mut SeededRng::from_seed([9; 32])).public();
    let give = |key, allowed_ips| PeerConfig { key, allowed_ips, standing: Standing::Ordinary };
    pair.a.plane.set_peer(&give(other, vec![net(B)]));
    pair.a.plane.set_peer(&give(pair.b.key, vec![]));
    assert!(pair.a.plane.remove_peer(&other), "and goes with it");
    assert!(pair.a.host.send(&packet(A, B, 1, 0)));
    pair.run_until(|pair| pair.a.plane.drops() == BTreeMap::from([(DropReason::NoPeer, 1)]));
    pair.a.plane.set_peer(&give(pair.b.key, vec![net(B)]));
    assert!(pair.a.host.send(&packet(A, B, 1, 1)), "the session has stayed");
    pair.run_until(|pair| pair.b.count() == 1);
    assert_eq!(sequences(&pair.b.received, 1), [1]);
}

#[test]
fn a_socket_can_be_replaced_while_traffic_flows() {
    let mut pair = Pair::connected();
    let fresh = UdpBatch::bind(&udp::Config::bound_to(([127, 0, 0, 1], 0).into())).unwrap();
    pair.a.plane.add_socket(SocketId(0), Arc::clone(&fresh)).unwrap();
    pair.b.plane.set_path(&pair.a.key, Some(Path::Direct { socket: SocketId(0), remote: fresh.local_addr() }));
    assert!(pair.a.host.send(&packet(A, B, 1, 0)));
    assert!(pair.b.host.send(&packet(B, A, 1, 0)));
    pair.run_until(|pair| pair.a.count() == 1 && pair.b.count() == 1);
    pair.a.plane.remove_socket(SocketId(0));
    assert!(pair.a.host.send(&packet(A, B, 1, 1)));
    pair.run_until(|pair| pair.a.plane.drops() == BTreeMap::from([(DropReason::NoSocket, 1)]));
}

#[test]
fn garbage_is_dropped_and_disco_is_handed_over() {
    let mut pair = Pair::connected();
    let to = pair.b.socket.local_addr();
    let mut disco = b"TS\xf0\x9f\x92\xac".to_vec();
    disco.extend([7; 80]);
    let mut unknown = vec![4, 0, 0, 0, 9, 9, 9, 9];
    unknown.extend([0; 40]);
    for datagram in [b"garbage".as_slice(), &unknown, &disco] {
        assert!(pair.a.plane.send_to(SocketId(0), to, datagram));
    }
    pair.run_until(|pair| pair.b.others.contains(&disco));
    let expected = BTreeMap::from([(DropReason::UnknownSession, 1), (DropReason::NotAuthentic, 1)]);
    assert_eq!(pair.b.plane.drops(), expected);
}

#[test]
fn an_idle_data_plane_stops_at_once() {
    let pair = Pair::direct();
    let started = now();
    pair.a.plane.shutdown();
    assert!(started.elapsed() < Duration::from_secs(2), "took {:?}", started.elapsed());
    pair.a.plane.shutdown();
}

/// A node without an engine but for its WireGuard interface.
struct End {
    interface: Interface<Path>,
    key: NodePublic,
    peer: OnceLock<NodePublic>,
    plane: Arc<Dataplane>,
    notices: Notices,
    host: ChannelDevice,
    socket: Arc<UdpBatch>,
    received: Vec<Vec<u8>>,
    others: Vec<Vec<u8>>,
    seen: Vec<Path>,
    wanted: usize,
}

struct Pair {
    a: End,
    b: End,
}

/// What the relay does with a datagram.
#[derive(Debug, Clone, Copy)]
enum Relayed {
    Once,
    Twice,
}

/// Where a relay's datagrams go; filled in once both ends exist.
type Other = Arc<Mutex<Weak<Dataplane>>>;

/// Hands datagrams to the other data plane.
struct TestRelay {
    from: NodePublic,
    other: Other,
    relayed: Relayed,
}

impl fmt::Debug for TestRelay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestRelay").field("relayed", &self.relayed).finish_non_exhaustive()
    }
}

impl RelaySink for TestRelay {
    fn send(&self, region: RegionId, _: NodePublic, datagrams: &mut dyn Iterator<Item = &[u8]>) -> usize {
        let Some(other) = self.other.lock().unwrap().upgrade() else { return 0 };
        let taken = datagrams.map(|datagram| {
            let datagram = Bytes::copy_from_slice(datagram);
            if matches!(self.relayed, Relayed::Twice) {
                other.inject(region, self.from, datagram.clone());
            }
            other.inject(region, self.from, datagram)
        });
        taken.filter(|taken| *taken).count()
    }
}

impl End {
    fn new(seed: u8, relayed: Relayed, other: Other) -> Self {
        let private = NodePrivate::generate(&mut SeededRng::from_seed([seed; 32]));
        let (key, epoch) = (private.public(), now());
        let (device, host) = channel::pair(1280, 4096);
        let socket = UdpBatch::bind(&udp::Config::bound_to(([127, 0, 0, 1], 0).into())).unwrap();
        #[expect(clippy::disallowed_methods, reason = "tests are their own driver")]
        let wall = SystemTime::now();
        let interface = Interface::new(epoch, wall, &private, [seed + 1; 32]);
        let config = Config {
            device: Arc::new(device),
            sockets: vec![(SocketId(0), Arc::clone(&socket))],
            relay: Arc::new(TestRelay { from: key, other, relayed }),
            flow_seed: [seed; 16],
            clock: Arc::new(move || u64::try_from(epoch.elapsed().as_millis()).unwrap() + 1),
            workers: Workers::Off,
        };
        let (plane, notices) = Dataplane::start(config).unwrap();
        let (plane, peer) = (Arc::new(plane), OnceLock::new());
        let (received, others, seen) = (Vec::new(), Vec::new(), Vec::new());
        Self { interface, key, peer, plane, notices, host, socket, received, others, seen, wanted: 0 }
    }

    fn set_peer(&mut self, key: NodePublic, address: [u8; 4]) {
        self.peer.set(key).unwrap();
        self.interface.set_peer(now(), key, wireguard::PeerConfig::default());
        let allowed_ips = vec![net(address)];
        self.plane.set_peer(&PeerConfig { key, allowed_ips, standing: Standing::Ordinary });
        self.plane.set_path(&key, Some(Path::Relay { region: RegionId::new(1).unwrap() }));
    }

    /// Direct and relayed.
    fn traffic(&self) -> (Traffic, Traffic) {
        let traffic = self.plane.traffic(self.peer.get().unwrap()).unwrap();
        (traffic.direct, traffic.relay)
    }

    fn count(&self) -> usize {
        self.received.len()
    }

    fn step(&mut self) {
        let now = now();
        while let Some(notice) = self.notices.try_next() {
            match &notice {
                Notice::Datagram { path, datagram, .. } => {
                    if self.interface.handle_datagram(now, path, None, datagram).is_err() {
                        self.others.push(datagram.to_vec());
                    }
                }
                Notice::WantSession { peer } => {
                    self.wanted += 1;
                    self.interface.want_session(now, peer);
                }
                Notice::SessionUsed { receiver_index } => self.interface.session_used(now, *receiver_index),
                Notice::PeerActive { peer } => self.interface.peer_active(now, peer),
                Notice::PathSeen { path, .. } => self.seen.push(*path),
                Notice::Tsmp { .. } | Notice::Failed { .. } | _ => panic!("unexpected {notice:?}"),
            }
            self.drain();
        }
        self.interface.handle_timeout(now);
        self.drain();
        while let Some(packet) = self.host.recv(Duration::ZERO) {
            self.received.push(packet);
        }
    }

    fn drain(&mut self) {
        // Events first: a session that a message announces is known before its answer can come.
        while let Some(event) = self.interface.poll_event() {
            match event {
                Event::SessionOpened { session, .. } => self.plane.session_opened(&session),
                Event::SessionReady { session, .. } => self.plane.session_ready(&session),
                Event::SessionClosed { peer, receiver_index } => self.plane.session_closed(&peer, receiver_index),
                Event::HandshakeFailed { peer } => self.plane.handshake_failed(&peer),
                Event::Authenticated { .. } => {}
            }
        }
        while let Some(transmit) = self.interface.poll_transmit() {
            let path = transmit.path.or_else(|| self.plane.path(&transmit.peer?)).unwrap();
            self.plane.send(&path, transmit.peer, &transmit.datagram);
        }
    }
}

impl Pair {
    /// Two nodes that know each other, on a relay path, with filters that drop everything.
    fn of(relayed: Relayed) -> Self {
        let (to_a, to_b) = (Other::default(), Other::default());
        let mut a = End::new(1, relayed, Arc::clone(&to_b));
        let mut b = End::new(3, relayed, Arc::clone(&to_a));
        *to_a.lock().unwrap() = Arc::downgrade(&a.plane);
        *to_b.lock().unwrap() = Arc::downgrade(&b.plane);
        a.set_peer(b.key, B);
        b.set_peer(a.key, A);
        Self { a, b }
    }

    /// Two nodes with direct paths and open filters.
    fn direct() -> Self {
        let pair = Self::of(Relayed::Once);
        pair.go_direct();
        pair.allow_all();
        pair
    }

    /// The same with a session that both may send on, and nothing received yet.
    fn connected() -> Self {
        let mut pair = Self::direct();
        assert!(pair.a.host.send(&packet(A, B, 99, 0)));
        pair.run_until(|pair| pair.b.count() == 1);
        assert!(pair.b.host.send(&packet(B, A, 99, 0)));
        pair.run_until(|pair| pair.a.count() == 1);
        pair.a.received.clear();
        pair.b.received.clear();
        pair
    }

    fn go_direct(&self) {
        let to = |end: &End| Path::Direct { socket: SocketId(0), remote: end.socket.local_addr() };
        self.a.plane.set_path(&self.b.key, Some(to(&self.b)));
        self.b.plane.set_path(&self.a.key, Some(to(&self.a)));
    }

    fn allow_all(&self) {
        let any = "*".parse().unwrap();
        let rule = Rule {
            sources: vec![any],
            destinations: vec![Destination { addresses: any, ports: ALL_PORTS }],
            protocols: vec![],
        };
        for (end, address) in [(&self.a, A), (&self.b, B)] {
            let filter = Filter::new(&[net(address)], std::slice::from_ref(&rule), end.plane.flows());
            end.plane.set_filter(filter);
        }
    }

    fn run_until(&mut self, mut done: impl FnMut(&Self) -> bool) {
        let started = now();
        while !done(self) {
            let (a, b) = (&self.a, &self.b);
            assert!(
                started.elapsed() < PATIENCE,
                "a got {} and dropped {:?}, b got {} and dropped {:?}",
                a.count(),
                a.plane.drops(),
                b.count(),
                b.plane.drops()
            );
            self.a.step();
            self.b.step();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "tests are their own driver")]
fn now() -> Instant {
    Instant::now()
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let started = now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "it never happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn net(address: [u8; 4]) -> ipnet::IpNet {
    std::net::IpAddr::from(address).into()
}

/// A UDP packet of a flow (its ports), with a sequence number.
fn packet(from: [u8; 4], to: [u8; 4], flow: u16, sequence: u32) -> Vec<u8> {
    let mut bytes = vec![0x45, 0, 0, 33, 0, 0, 0, 0, 64, 17, 0, 0];
    bytes.extend(from);
    bytes.extend(to);
    bytes.extend(flow.to_be_bytes());
    bytes.extend(flow.to_be_bytes());
    bytes.extend([0, 13, 0, 0, 0xff]);
    bytes.extend(sequence.to_be_bytes());
    bytes
}

fn sequences(packets: &[Vec<u8>], flow: u16) -> Vec<u32> {
    packets
        .iter()
        .filter(|packet| packet[20..22] == flow.to_be_bytes())
        .map(|packet| {
            assert_eq!(packet.len(), 33, "padding was cut off");
            u32::from_be_bytes(*packet.last_chunk().unwrap())
        })
        .collect()
}
