//! Two interfaces, a link with latency between them, and a clock that only moves when told.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesh_noise::key::NodePublic;
use mesh_noise::key::{NodePrivate, PresharedKey};
use mesh_noise::random::SeededRng;
use mesh_noise::wireguard::message::{MessageKind, kind};
use mesh_noise::wireguard::{Event, HEADER_LEN, Interface, PeerConfig, Reject, Session, Timing, Transmit};

/// An address on the link.
pub(crate) type Address = u8;

pub(crate) const LATENCY: Duration = Duration::from_millis(20);

pub(crate) fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

pub(crate) fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[expect(clippy::disallowed_methods, reason = "tests need an origin; everything after it is virtual")]
pub(crate) fn origin() -> Instant {
    Instant::now()
}

pub(crate) fn wall() -> SystemTime {
    UNIX_EPOCH + secs(1_800_000_000)
}

/// An interface with what a packet path keeps beside it.
pub(crate) struct Node {
    pub(crate) core: Interface<Address>,
    pub(crate) peer: NodePublic,
    pub(crate) address: Address,
    pub(crate) path: Address,
    sessions: BTreeMap<u32, Arc<Session>>,
    sending: Option<Arc<Session>>,
    parked: VecDeque<Vec<u8>>,
    pub(crate) received: Vec<Vec<u8>>,
    pub(crate) rejects: Vec<Reject>,
    pub(crate) failures: usize,
    pub(crate) handshakes: usize,
    /// How often the packet path had to call the core.
    pub(crate) woken: usize,
}

impl Node {
    pub(crate) fn sending(&self) -> Option<&Arc<Session>> {
        self.sending.as_ref()
    }

    pub(crate) fn sessions(&self) -> usize {
        self.sessions.len()
    }
}

/// What the link does with a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Deliver,
    Drop,
    Twice,
    Late(Duration),
}

/// A datagram that was sent, for looking at.
#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub(crate) at: Instant,
    pub(crate) from: usize,
    pub(crate) kind: MessageKind,
    pub(crate) datagram: Vec<u8>,
}

pub(crate) struct Pair {
    pub(crate) start: Instant,
    pub(crate) now: Instant,
    pub(crate) nodes: [Node; 2],
    wire: BTreeMap<(Instant, u64), (Address, Address, Vec<u8>)>,
    serial: u64,
    pub(crate) log: Vec<Sent>,
    pub(crate) fate: Box<dyn FnMut(&Sent) -> Fate>,
}

pub(crate) const A: usize = 0;
pub(crate) const B: usize = 1;

pub(crate) fn keys() -> [NodePrivate; 2] {
    let mut rng = SeededRng::from_seed([42; 32]);
    [NodePrivate::generate(&mut rng), NodePrivate::generate(&mut rng)]
}

impl Pair {
    pub(crate) fn new() -> Self {
        Self::with(Timing::default(), [PeerConfig::default(), PeerConfig::default()])
    }

    pub(crate) fn with_psk(psks: [[u8; 32]; 2]) -> Self {
        let config = psks.map(|psk| PeerConfig { preshared: PresharedKey::from_bytes(psk), ..PeerConfig::default() });
        Self::with(Timing::default(), config)
    }

    pub(crate) fn with(timing: Timing, configs: [PeerConfig; 2]) -> Self {
        let start = origin();
        let keys = keys();
        let node = |me: usize| {
            let mut core = Interface::new(start, wall(), &keys[me], [[1; 32], [2; 32]][me]).with_timing(timing.clone());
            let peer = keys[1 - me].public();
            core.set_peer(start, peer, configs[me].clone());
            Node {
                core,
                peer,
                address: [10, 20][me],
                path: [20, 10][me],
                sessions: BTreeMap::new(),
                sending: None,
                parked: VecDeque::new(),
                received: Vec::new(),
                rejects: Vec::new(),
                failures: 0,
                handshakes: 0,
                woken: 0,
            }
        };
        let mut pair = Self {
            start,
            now: start,
            nodes: [node(A), node(B)],
            wire: BTreeMap::new(),
            serial: 0,
            log: Vec::new(),
            fate: Box::new(|_| Fate::Deliver),
        };
        pair.drain(A);
        pair.drain(B);
        pair
    }

    /// A pair in which A has initiated a session and both have used it.
    pub(crate) fn connected() -> Self {
        let mut pair = Self::new();
        pair.send(A, b"hello");
        pair.run(secs(1));
        assert_eq!(pair.nodes[B].received, [b"hello"]);
        pair.log.clear();
        pair
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    /// Sends a packet now, or parks it and asks for a session.
    pub(crate) fn send(&mut self, from: usize, packet: &[u8]) {
        let node = &mut self.nodes[from];
        node.parked.push_back(packet.to_vec());
        if node.sending.is_none() {
            let peer = node.peer;
            node.core.want_session(self.now, &peer);
        }
        self.drain(from);
    }

    /// Tells a node that the way to its peer has changed.
    pub(crate) fn retry(&mut self, node: usize, after: Duration) {
        let (now, peer) = (self.now, self.nodes[node].peer);
        self.nodes[node].core.retry_handshake(now, &peer, after);
        self.drain(node);
    }

    /// Tells a node that its peer has restarted.
    pub(crate) fn renew(&mut self, node: usize) {
        let (now, peer) = (self.now, self.nodes[node].peer);
        self.nodes[node].core.renew_session(now, &peer);
        self.drain(node);
    }

    /// Hands datagram bytes to a node as if they had just arrived from `source`.
    pub(crate) fn deliver(&mut self, to: usize, source: Address, mut datagram: Vec<u8>) -> Result<(), Reject> {
        let (now, node) = (self.now, &mut self.nodes[to]);
        let outcome = match kind(&datagram) {
            Some(MessageKind::TransportData { receiver }) => node.open(now, source, receiver, &mut datagram),
            Some(MessageKind::Initiation | MessageKind::Response | MessageKind::CookieReply) | None => {
                let address = std::net::SocketAddr::from(([192, 0, 2, source], 51820));
                node.core.handle_datagram(now, &source, Some(address), &datagram)
            }
        };
        if let Err(reject) = outcome {
            node.rejects.push(reject);
        }
        self.drain(to);
        outcome
    }

    /// Lets `duration` pass, with every delivery and every deadline at its exact time.
    pub(crate) fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        loop {
            let timers = self.nodes.iter().filter_map(|node| node.core.poll_timeout()).min();
            let arrival = self.wire.keys().next().map(|(at, _)| *at);
            let Some(next) = timers.into_iter().chain(arrival).min().filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            let due = self.wire.first_entry().filter(|entry| entry.key().0 <= self.now);
            if let Some((from, to, datagram)) = due.map(|entry| entry.remove()) {
                if let Some(to) = self.nodes.iter().position(|node| node.address == to) {
                    let _ = self.deliver(to, from, datagram);
                }
            } else {
                for node in [A, B] {
                    self.timeout(node);
                }
            }
        }
        self.now = end;
    }

    /// Calls `handle_timeout` and checks the rule that every core obeys.
    pub(crate) fn timeout(&mut self, node: usize) {
        self.nodes[node].core.handle_timeout(self.now);
        self.drain(node);
        let next = self.nodes[node].core.poll_timeout();
        assert!(next.is_none_or(|next| next > self.now), "a deadline stays due: {next:?} at {:?}", self.now);
    }

    /// When datagrams of this kind were sent by `from`, counted from the start.
    pub(crate) fn times(&self, from: usize, which: MessageKind) -> Vec<Duration> {
        self.log
            .iter()
            .filter(|sent| sent.from == from && same_kind(sent.kind, which))
            .map(|sent| sent.at - self.start)
            .collect()
    }

    pub(crate) fn initiations(&self, from: usize) -> Vec<Duration> {
        self.times(from, MessageKind::Initiation)
    }

    /// Times of transport data that carries nothing.
    pub(crate) fn keepalives(&self, from: usize) -> Vec<Duration> {
        self.log
            .iter()
            .filter(|sent| sent.from == from && same_kind(sent.kind, DATA) && sent.datagram.len() == 32)
            .map(|sent| sent.at - self.start)
            .collect()
    }

    fn drain(&mut self, at: usize) {
        let now = self.now;
        loop {
            while let Some(event) = self.nodes[at].core.poll_event() {
                self.nodes[at].event(event);
            }
            if let Some(transmit) = self.nodes[at].core.poll_transmit() {
                self.transmit(at, transmit);
            } else if let Some(datagram) = self.nodes[at].seal_parked(now) {
                let to = self.nodes[at].path;
                self.transmit(at, Transmit { peer: None, path: Some(to), datagram });
            } else {
                return;
            }
        }
    }

    fn transmit(&mut self, from: usize, transmit: Transmit<Address>) {
        let node = &self.nodes[from];
        let (source, to) = (node.address, transmit.path.unwrap_or(node.path));
        let kind = kind(&transmit.datagram).expect("what we send is WireGuard");
        let sent = Sent { at: self.now, from, kind, datagram: transmit.datagram.clone() };
        let delays: &[Duration] = match (self.fate)(&sent) {
            Fate::Deliver => &[LATENCY],
            Fate::Drop => &[],
            Fate::Twice => &[LATENCY, LATENCY],
            Fate::Late(more) => &[LATENCY + more],
        };
        for delay in delays {
            self.serial += 1;
            self.wire.insert((self.now + *delay, self.serial), (source, to, transmit.datagram.clone()));
        }
        self.log.push(sent);
    }
}

pub(crate) const DATA: MessageKind = MessageKind::TransportData { receiver: 0 };

pub(crate) fn same_kind(a: MessageKind, b: MessageKind) -> bool {
    std::mem::discriminant(&a) == std::mem::discriminant(&b)
}

impl Node {
    fn event(&mut self, event: Event<Address>) {
        match event {
            Event::SessionOpened { session, .. } => {
                let replaced = self.sessions.insert(session.receiver_index(), session);
                assert!(replaced.is_none(), "an index is given out once");
            }
            Event::SessionReady { session, .. } => {
                assert!(self.sessions.contains_key(&session.receiver_index()), "opened before ready");
                self.handshakes += 1;
                self.sending = Some(session);
            }
            Event::SessionClosed { receiver_index, .. } => {
                let closed = self.sessions.remove(&receiver_index).expect("opened before closed");
                assert!(closed.has_ended());
                if self.sending.as_ref().is_some_and(|sending| sending.receiver_index() == receiver_index) {
                    self.sending = None;
                }
            }
            Event::HandshakeFailed { .. } => {
                self.failures += 1;
                self.parked.clear();
            }
            Event::Authenticated { path, .. } => self.path = path,
        }
    }

    fn seal_parked(&mut self, now: Instant) -> Option<Vec<u8>> {
        let session = Arc::clone(self.sending.as_ref()?);
        let packet = self.parked.pop_front()?;
        let counter = session.reserve(1)?;
        let mut datagram = vec![0; packet.len().next_multiple_of(16) + 32];
        datagram[HEADER_LEN..][..packet.len()].copy_from_slice(&packet);
        let len = session.seal(counter, &mut datagram, packet.len());
        datagram.truncate(len);
        if session.activity().note_sent(self.core.clock_ms(now), 1, len as u64) {
            self.woken += 1;
            self.core.peer_active(now, &session.peer());
        }
        Some(datagram)
    }

    fn open(&mut self, now: Instant, source: Address, receiver: u32, datagram: &mut [u8]) -> Result<(), Reject> {
        let session = Arc::clone(self.sessions.get(&receiver).ok_or(Reject::UnknownIndex)?);
        let len = datagram.len();
        let opened = session.open(datagram)?;
        if !session.replay().accept(opened.counter) {
            return Err(Reject::Replayed);
        }
        self.path = source;
        let packets = u64::from(!opened.packet.is_empty());
        if packets > 0 {
            let end = opened.packet.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            self.received.push(opened.packet[..end].to_vec());
        }
        if session.activity().note_received(self.core.clock_ms(now), packets, len as u64) {
            self.woken += 1;
            self.core.peer_active(now, &session.peer());
        }
        self.core.session_used(now, receiver);
        Ok(())
    }
}
