//! Two engines in virtual time, with a pipe that acts as the relay and as the network.

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

use crate::engine::*;

/// Some moment; tests count from here.
#[expect(clippy::disallowed_methods, reason = "virtual time needs one real instant to start from")]
pub(crate) fn epoch() -> Instant {
    Instant::now()
}

const RELAY_DELAY: Duration = Duration::from_millis(20);
pub(super) const DIRECT_DELAY: Duration = Duration::from_millis(5);

pub(super) fn region(number: u16) -> RegionId {
    RegionId::new(number).unwrap()
}

/// Region n has one relay, at 192.0.2.n.
pub(super) fn derp_map(regions: u16) -> DerpMap {
    let mut map = DerpMap::default();
    for number in 1..=regions {
        let mut entry = DerpRegion::new(region(number), "r", "R");
        let mut node = DerpNode::new(format!("{number}a"), region(number), format!("192.0.2.{number}"));
        node.ipv4 = format!("192.0.2.{number}");
        entry.nodes.push(node);
        map.regions.insert(region(number), entry);
    }
    map
}

pub(super) struct Host {
    pub(super) engine: Engine,
    private: NodePrivate,
    pub(super) address: SocketAddr,
    pub(super) overlay: IpNet,
    pub(super) send: BTreeMap<NodePublic, Arc<Session>>,
    pub(super) receive: BTreeMap<u32, Arc<Session>>,
    /// Sessions that there have been.
    pub(super) opened: usize,
    pub(super) paths: BTreeMap<NodePublic, Option<Path>>,
    pub(super) backups: BTreeMap<NodePublic, Option<Path>>,
    /// Every path command, in order.
    pub(super) history: Vec<Option<Path>>,
    pub(super) announced: Option<Announcement>,
    pub(super) events: Vec<Event>,
    pub(super) received: Vec<(Path, Vec<u8>)>,
    /// When each of them came.
    pub(super) times: Vec<Instant>,
}

pub(super) enum Parcel {
    Engine { from: Hop, datagram: Vec<u8> },
    Data { from: Hop, datagram: Vec<u8> },
}

pub(super) struct World {
    start: Instant,
    pub(super) now: Instant,
    pub(super) hosts: Vec<Host>,
    in_flight: BTreeMap<(Instant, u64), (usize, Parcel)>,
    counter: u64,
    stun: Responder,
    pub(super) direct_works: bool,
    pub(super) udp_works: bool,
    /// How many relay regions there are.
    pub(super) regions: u16,
    /// A STUN server that does not answer.
    pub(super) mute: Option<IpAddr>,
}

fn engine(now: Instant, wall: SystemTime, private: &NodePrivate, rng: &mut StdRng) -> Engine {
    let mut seed = [0; 32];
    rng.fill_bytes(&mut seed);
    let config = Config {
        private: private.clone(),
        disco: DiscoPrivate::generate(rng),
        seed,
        epoch: now,
        wall,
        mode: PathMode::Auto,
        port_guessing: true,
        fixed_port: false,
        static_endpoints: Vec::new(),
        timing: Timing::default(),
    };
    Engine::new(now, config)
}

impl Host {
    fn new(now: Instant, number: u8, rng: &mut StdRng) -> Self {
        let private = NodePrivate::generate(rng);
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let mut host = Self {
            engine: engine(now, wall, &private, rng),
            private,
            address: SocketAddr::new(IpAddr::from([198, 51, 100, number]), 41641),
            overlay: IpNet::from(IpAddr::from([100, 64, 0, number])),
            send: BTreeMap::new(),
            receive: BTreeMap::new(),
            opened: 0,
            paths: BTreeMap::new(),
            backups: BTreeMap::new(),
            history: Vec::new(),
            announced: None,
            events: Vec::new(),
            received: Vec::new(),
            times: Vec::new(),
        };
        host.connect(now);
        host
    }

    /// The process ends and another one starts, with the same node key and nothing else.
    fn restart(&mut self, now: Instant, wall: SystemTime) {
        // Whatever a core draws its numbers from is never the same twice.
        let mut rng = StdRng::seed_from_u64(self.engine.clock_ms(now));
        self.engine = engine(now, wall, &self.private, &mut rng);
        self.send.clear();
        self.receive.clear();
        self.paths.clear();
        self.backups.clear();
        self.announced = None;
        self.connect(now);
    }

    /// Tells the engine of the host's network.
    fn connect(&mut self, now: Instant) {
        let addresses = vec![LocalAddress { interface: "eth0".into(), network: self.address.ip().into() }];
        let router = DefaultRoute { router: "198.51.100.254".parse().ok(), interface: Some(2), source: None };
        let port_v4 = Some(self.address.port());
        let local = Local { addresses, port_v4, default_v4: Some(router), ..Local::default() };
        self.engine.set_control_connected(now, true);
        self.engine.set_local(now, local, &[(SocketId(0), self.address)]);
    }
}

impl World {
    pub(super) fn new() -> Self {
        let now = epoch();
        let mut rng = StdRng::seed_from_u64(7);
        let hosts = (1..=2).map(|number| Host::new(now, number, &mut rng)).collect();
        let stun = Responder::new(Audience::Members);
        let mut world = Self {
            start: now,
            now,
            hosts,
            in_flight: BTreeMap::new(),
            counter: 0,
            stun,
            direct_works: true,
            udp_works: true,
            regions: 1,
            mute: None,
        };
        world.publish();
        world
    }

    /// Both have a home and know of each other.
    pub(super) fn at_home() -> Self {
        let mut world = Self::new();
        let settled = |world: &Self| world.hosts.iter().all(|host| host.engine.home().is_some());
        assert!(world.run_until(Duration::from_secs(5), settled), "no home");
        world.publish();
        world
    }

    /// Both have talked for `time`, and do so directly.
    pub(super) fn direct_after(time: Duration) -> Self {
        let mut world = Self::at_home();
        world.converse(time);
        assert!(world.path(0).is_some_and(|path| path.is_direct()), "{:?}", world.path(0));
        world
    }

    /// Sends both ways every 100 ms for `time`.
    pub(super) fn converse(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.send(0, b"0123456789abcdef");
            self.send(1, b"0123456789abcdef");
            self.run(Duration::from_millis(100));
        }
    }

    /// Tells each engine what it should know of the other, as control would.
    pub(super) fn publish(&mut self) {
        (0..self.hosts.len()).for_each(|index| self.introduce(index));
    }

    /// Tells the engine of `index` what it should know of the other.
    pub(super) fn introduce(&mut self, index: usize) {
        let host = &self.hosts[1 - index];
        let other = PeerView {
            node: host.engine.node_key(),
            disco: Some(host.engine.disco_key()),
            home: host.engine.home(),
            endpoints: host.engine.endpoints().iter().map(|endpoint| endpoint.address).collect(),
            allowed: vec![host.overlay],
            jailed: false,
            masquerade: Masquerade::default(),
            ours: true,
        };
        let view = MapView {
            addresses: vec![self.hosts[index].overlay],
            peers: BTreeMap::from([(other.node, other)]),
            derp: Arc::new(derp_map(self.regions)),
            filter: Some(Vec::new()),
            ..MapView::default()
        };
        self.hosts[index].engine.set_map(self.now, Arc::new(view));
        self.drain(index);
    }

    /// The process of `index` ends and another one starts; it listens at `address` from now on.
    pub(super) fn restart(&mut self, index: usize, address: SocketAddr) {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + (self.now - self.start);
        self.hosts[index].address = address;
        self.hosts[index].restart(self.now, wall);
        self.drain(index);
    }

    pub(super) fn key(&self, index: usize) -> NodePublic {
        self.hosts[index].engine.node_key()
    }

    pub(super) fn path(&self, index: usize) -> Option<Path> {
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
            Path::Direct { remote, .. } if self.mute == Some(remote.ip()) => return,
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

    pub(super) fn drain(&mut self, index: usize) {
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
                    host.opened += 1;
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

    pub(super) fn run(&mut self, time: Duration) {
        let until = self.now + time;
        while self.step(until) {}
    }

    pub(super) fn run_until(&mut self, limit: Duration, condition: impl Fn(&Self) -> bool) -> bool {
        let until = self.now + limit;
        while !condition(self) {
            if !self.step(until) {
                return condition(self);
            }
        }
        true
    }

    /// The double of the data plane's sending half.
    pub(super) fn send(&mut self, from: usize, packet: &[u8]) -> bool {
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
        if let Path::Relay { region } = from.path {
            host.engine.relay_heard(self.now, region);
        }
        let index = u32::from_le_bytes(datagram[4..8].try_into().unwrap());
        let Some(session) = host.receive.get(&index).cloned() else {
            if let Some(peer) = from.node {
                host.engine.session_unknown(self.now, &peer);
            }
            return;
        };
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
