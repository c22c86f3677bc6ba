//! The client's half of a relay connection, without any I/O.
//!
//! ```text
//!                      ServerKey               ServerInfo
//!   AwaitingKey ────────────────► LoggingIn ───────────────► Open
//!        │    (fast start begins      ▲
//!        └──── here ──────────────────┘        anything wrong, or silence ──► an error, and the connection is over
//! ```
//!
//! Bytes go in through [`Connection::handle_bytes`], out through [`Connection::poll_transmit`]; time through
//! [`Connection::handle_timeout`]. Packets may be queued in any state and leave as soon as the login has been sent: the
//! protocol does not wait for the relay's answer.
//!
//! # Liveness
//! The relay sends something at least every 65 s. A connection is given up after [`Timing::silence`] without a byte. That
//! is long while traffic is waiting, so a client that has sent something and heard nothing for [`Timing::ping_after`]
//! asks with a Ping, and gives up [`Timing::pong_within`] later. Who sends nothing asks nothing: an idle connection costs
//! a keep-alive a minute.
//!
//! # Rate
//! A relay may say in its answer to the login how many bytes a second it wants at most. After a packet that exceeds that,
//! [`Connection::is_paused`] until the bytes have been earned; what waits meanwhile, and what is dropped of it, is the
//! caller's to decide. A burst of one longest packet is taken for granted, whatever the relay says.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use mesh_noise::key::{NodePrivate, NodePublic, RelayPublic, SharedBox};
use rand_core::CryptoRng;

use crate::frame::{Decoder, Frame, FrameError, GoneReason, HEADER_LEN, MAX_PACKET_LEN};
use crate::login::{ClientInfo, LoginError, MeshKey, ServerInfo};
use crate::random::Prepared;
use crate::server::{RateLimit, RateLimiter};

pub mod dialling;

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The relay broke the framing.
    #[error("relay broke protocol: {0}")]
    Frame(#[from] FrameError),
    /// The relay sent a frame out of order.
    #[error("relay broke protocol: {got} before {expected}")]
    Unexpected {
        /// What came.
        got: &'static str,
        /// What had to come first.
        expected: &'static str,
    },
    /// The relay's side of the login is wrong.
    #[error("relay's answer to the login: {0}")]
    Login(#[from] LoginError),
    /// The relay did not answer the login in time.
    #[error("relay did not answer the login within {} s", .0.as_secs())]
    LoginTimeout(Duration),
    /// Nothing came for too long.
    #[error("relay silent for {} s", .0.as_secs())]
    Silent(Duration),
}

/// How long to wait for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// For the login to be answered.
    pub login: Duration,
    /// Without any byte before the connection counts as dead. The relay's keep-alive comes every 60 to 65 s.
    pub silence: Duration,
    /// Without any byte, having sent something since the last one, before a Ping is sent.
    pub ping_after: Duration,
    /// For any byte to follow that Ping.
    pub pong_within: Duration,
}

impl Default for Timing {
    /// 10 s, 120 s, 4 s and 3 s. A Ping waits behind up to 192 KiB of our own: 1.5 s on a megabit.
    fn default() -> Self {
        let secs = Duration::from_secs;
        Self { login: secs(10), silence: secs(120), ping_after: secs(4), pong_within: secs(3) }
    }
}

/// What a connection has learnt.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The relay has accepted the login.
    Connected {
        /// Its key.
        relay: RelayPublic,
        /// What it said.
        info: ServerInfo,
    },
    /// A packet came.
    Packet {
        /// From whom.
        source: NodePublic,
        /// The packet.
        payload: Bytes,
    },
    /// A peer cannot be reached here.
    PeerGone {
        /// Which.
        peer: NodePublic,
        /// Why.
        reason: GoneReason,
    },
    /// A peer has connected to the relay; only another relay of the region is told.
    PeerPresent {
        /// Which.
        peer: NodePublic,
        /// The flags of [`Presence`](crate::server::Presence); 0 if the relay does not tell.
        flags: u8,
    },
    /// The relay reports a problem, or, with an empty text, that it is over.
    Health(String),
    /// The relay will restart.
    Restarting {
        /// When to reconnect.
        reconnect_in: Duration,
        /// For how long to keep trying.
        try_for: Duration,
    },
}

#[derive(Debug)]
enum State {
    AwaitingKey,
    LoggingIn { relay: RelayPublic, shared: SharedBox },
    Open,
}

/// A client's connection to one relay. See the [module doc](self).
#[derive(Debug)]
pub struct Connection {
    private: NodePrivate,
    public: NodePublic,
    info: ClientInfo,
    nonce: Prepared,
    ping: [u8; 8],
    timing: Timing,
    home: bool,
    state: State,
    decoder: Decoder,
    out: BytesMut,
    events: VecDeque<Event>,
    login_by: Option<Instant>,
    heard: Instant,
    sent: Option<Instant>,
    /// When a Ping must have been answered, if one is under way.
    answer_by: Option<Instant>,
    limiter: RateLimiter,
    paused_until: Option<Instant>,
}

impl Connection {
    /// A connection whose stream has just become DERP frames.
    ///
    /// `known` is the relay's key where the TLS handshake has told it; the login is then the first thing sent. `home`
    /// says whether this is the node's home relay.
    pub fn new(
        now: Instant,
        private: NodePrivate,
        known: Option<RelayPublic>,
        home: bool,
        rng: &mut impl CryptoRng,
    ) -> Self {
        Self::with_info(now, private, known, home, ClientInfo::default(), rng)
    }

    /// The connection of another relay of the region, which shows the mesh key and asks to be told who is there.
    /// `private` is that relay's own key. [`Event::PeerPresent`] and [`Event::PeerGone`] tell.
    pub fn for_relay(
        now: Instant,
        private: NodePrivate,
        known: Option<RelayPublic>,
        mesh_key: MeshKey,
        rng: &mut impl CryptoRng,
    ) -> Self {
        let info = ClientInfo { mesh_key: Some(mesh_key), ..ClientInfo::default() };
        Self::with_info(now, private, known, false, info, rng)
    }

    fn with_info(
        now: Instant,
        private: NodePrivate,
        known: Option<RelayPublic>,
        home: bool,
        info: ClientInfo,
        rng: &mut impl CryptoRng,
    ) -> Self {
        let mut ping = [0; 8];
        rng.fill_bytes(&mut ping);
        let timing = Timing::default();
        let mut connection = Self {
            public: private.public(),
            private,
            info: ClientInfo { can_ack_pings: true, ..info },
            nonce: Prepared::draw(rng),
            ping,
            timing,
            home,
            state: State::AwaitingKey,
            decoder: Decoder::new(),
            out: BytesMut::new(),
            events: VecDeque::new(),
            login_by: Some(now + timing.login),
            heard: now,
            sent: None,
            answer_by: None,
            limiter: RateLimiter::new(now, RateLimit::default()),
            paused_until: None,
        };
        if let Some(relay) = known {
            connection.log_in(relay);
        }
        connection
    }

    /// The same with other waiting times.
    #[must_use]
    pub fn with_timing(mut self, timing: Timing) -> Self {
        self.login_by = self.login_by.map(|by| by - self.timing.login + timing.login);
        self.timing = timing;
        self
    }

    /// Whether packets may be queued: the login has been sent.
    #[must_use]
    pub const fn accepts_packets(&self) -> bool {
        matches!(self.state, State::LoggingIn { .. } | State::Open)
    }

    /// Whether the relay has accepted the login.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        matches!(self.state, State::Open)
    }

    /// Whether the relay's limit asks for packets to be kept back until [`Connection::handle_timeout`] has ended that. Those
    /// that are sent all the same are counted against it.
    #[must_use]
    pub const fn is_paused(&self) -> bool {
        self.paused_until.is_some()
    }

    /// Queues a packet for `destination`; `false` if it is longer than a relay passes on, or the login has not been sent.
    pub fn send(&mut self, now: Instant, destination: NodePublic, payload: Bytes) -> bool {
        if payload.len() > MAX_PACKET_LEN || !self.accepts_packets() {
            return false;
        }
        let length = HEADER_LEN + 32 + payload.len();
        Frame::SendPacket { destination, payload }.encode(&mut self.out);
        self.sent = Some(now);
        self.paused_until = self.limiter.charge(now, length);
        true
    }

    /// Frames that the caller has encoded itself are being sent: whether the relay is still there matters again. Only for
    /// what [`Connection::accepts_packets`] allows.
    pub const fn note_sent(&mut self, now: Instant) {
        self.sent = Some(now);
    }

    /// Tells the relay whether it is the node's home.
    pub fn set_home(&mut self, home: bool) {
        if self.home != home {
            self.home = home;
            if self.accepts_packets() {
                Frame::NotePreferred(home).encode(&mut self.out);
            }
        }
    }

    /// Consumes bytes that came from the relay, in any pieces.
    ///
    /// # Errors
    /// If the relay broke protocol. The connection is over.
    pub fn handle_bytes(&mut self, now: Instant, bytes: &[u8]) -> Result<(), ClientError> {
        self.decoder.extend(bytes);
        self.handle_buffered(now)
    }

    /// Where a reader may append bytes itself, to be followed by [`Connection::handle_buffered`].
    pub fn read_buffer(&mut self) -> &mut BytesMut {
        self.decoder.buffer()
    }

    /// Consumes what has been appended to [`Connection::read_buffer`].
    ///
    /// # Errors
    /// As [`Connection::handle_bytes`].
    pub fn handle_buffered(&mut self, now: Instant) -> Result<(), ClientError> {
        self.heard = now;
        self.sent = None;
        self.answer_by = None;
        while let Some(frame) = self.decoder.next_frame()? {
            self.handle_frame(now, frame)?;
        }
        Ok(())
    }

    /// The bytes to send next, if there are any.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        (!self.out.is_empty()).then(|| self.out.split().freeze())
    }

    /// The next thing that was learnt.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Connection::handle_timeout`] has something to do.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let silence = self.heard + self.timing.silence;
        let ping = match (self.answer_by, self.sent) {
            (Some(answer_by), _) => Some(answer_by),
            (None, Some(_)) if matches!(self.state, State::Open) => Some(self.ping_due()),
            (None, _) => None,
        };
        [self.login_by, Some(silence), ping, self.paused_until].into_iter().flatten().min()
    }

    /// Does whatever is due.
    ///
    /// # Errors
    /// If the relay has been silent for too long. The connection is over.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), ClientError> {
        if self.login_by.is_some_and(|by| now >= by) {
            return Err(ClientError::LoginTimeout(self.timing.login));
        }
        self.paused_until = self.paused_until.filter(|until| now < *until);
        let unanswered = self.answer_by.is_some_and(|answer_by| now >= answer_by);
        if unanswered || now >= self.heard + self.timing.silence {
            return Err(ClientError::Silent(now.duration_since(self.heard)));
        }
        let waiting = self.sent.is_some() && self.answer_by.is_none() && matches!(self.state, State::Open);
        if waiting && now >= self.ping_due() {
            self.check(now, self.timing.pong_within);
        }
        Ok(())
    }

    /// Asks whether the relay is still there: unless any byte comes within `patience`, the connection is over. Does nothing
    /// before the login has been answered, for that has a limit of its own.
    pub fn check(&mut self, now: Instant, patience: Duration) {
        if matches!(self.state, State::Open) {
            Frame::Ping(self.ping).encode(&mut self.out);
            let answer_by = now + patience;
            self.answer_by = Some(self.answer_by.map_or(answer_by, |earlier| earlier.min(answer_by)));
        }
    }

    /// Counted from the later of the last byte and the first packet since: an idle connection is not asked at once.
    fn ping_due(&self) -> Instant {
        self.sent.map_or(self.heard, |sent| sent.max(self.heard)) + self.timing.ping_after
    }

    fn log_in(&mut self, relay: RelayPublic) {
        let shared = self.private.box_with_relay(&relay);
        self.info.seal(self.public, &shared, &mut self.nonce).encode(&mut self.out);
        if self.home {
            Frame::NotePreferred(true).encode(&mut self.out);
        }
        if self.info.mesh_key.is_some() {
            Frame::WatchConns.encode(&mut self.out);
        }
        self.state = State::LoggingIn { relay, shared };
    }

    fn handle_frame(&mut self, now: Instant, frame: Frame) -> Result<(), ClientError> {
        match (&self.state, frame) {
            (State::AwaitingKey, Frame::ServerKey(relay)) => self.log_in(relay),
            (State::AwaitingKey, frame) => {
                return Err(ClientError::Unexpected { got: name(&frame), expected: "ServerKey" });
            }
            (State::LoggingIn { relay, shared }, Frame::ServerInfo { sealed }) => {
                let info = ServerInfo::open(shared, &sealed)?;
                let limit = RateLimit { bytes_per_second: info.bytes_per_second, burst: info.burst };
                self.limiter.set_limit(now, limit);
                self.events.push_back(Event::Connected { relay: *relay, info });
                self.login_by = None;
                self.state = State::Open;
            }
            (_, Frame::RecvPacket { source, payload }) => self.events.push_back(Event::Packet { source, payload }),
            (_, Frame::PeerGone { peer, reason }) => self.events.push_back(Event::PeerGone { peer, reason }),
            (_, Frame::PeerPresent { peer, flags, .. }) if self.info.mesh_key.is_some() => {
                self.events.push_back(Event::PeerPresent { peer, flags });
            }
            (_, Frame::Ping(data)) => Frame::Pong(data).encode(&mut self.out),
            (_, Frame::Health(text)) => self.events.push_back(Event::Health(text)),
            (_, Frame::Restarting { reconnect_in, try_for }) => {
                self.events.push_back(Event::Restarting { reconnect_in, try_for });
            }
            // The key is repeated after a fast start; the rest is for relays or of no interest, and stock clients skip
            // it as well.
            (
                _,
                Frame::ServerKey(_)
                | Frame::ServerInfo { .. }
                | Frame::KeepAlive
                | Frame::Pong(_)
                | Frame::PeerPresent { .. }
                | Frame::ClientInfo { .. }
                | Frame::SendPacket { .. }
                | Frame::NotePreferred(_)
                | Frame::ForwardPacket { .. }
                | Frame::WatchConns
                | Frame::ClosePeer(_),
            ) => {}
        }
        Ok(())
    }
}

fn name(frame: &Frame) -> &'static str {
    if matches!(frame, Frame::RecvPacket { .. }) { "RecvPacket" } else { "another frame" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_noise::key::RelayPrivate;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[expect(clippy::disallowed_methods, reason = "tests need some instant to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    struct Relay {
        private: RelayPrivate,
        rng: StdRng,
        decoder: Decoder,
    }

    impl Relay {
        fn new() -> Self {
            let mut rng = StdRng::seed_from_u64(5);
            Self { private: RelayPrivate::generate(&mut rng), rng, decoder: Decoder::new() }
        }

        fn frames(&mut self, client: &mut Connection) -> Vec<Frame> {
            while let Some(bytes) = client.poll_transmit() {
                self.decoder.extend(&bytes);
            }
            std::iter::from_fn(|| self.decoder.next_frame().unwrap()).collect()
        }

        fn server_info(&mut self, node: NodePublic) -> Bytes {
            ServerInfo::default().seal(&self.private.box_with_node(&node), &mut self.rng).to_bytes()
        }
    }

    fn node() -> NodePrivate {
        NodePrivate::generate(&mut StdRng::seed_from_u64(9))
    }

    fn open_pair(now: Instant) -> (Connection, Relay) {
        let mut relay = Relay::new();
        let mut client =
            Connection::new(now, node(), Some(relay.private.public()), true, &mut StdRng::seed_from_u64(1));
        relay.frames(&mut client);
        client.handle_bytes(now, &relay.server_info(node().public())).unwrap();
        assert!(matches!(client.poll_event(), Some(Event::Connected { .. })));
        (client, relay)
    }

    #[test]
    fn the_login_waits_for_the_key_and_packets_follow_it() {
        let (now, mut relay) = (start(), Relay::new());
        let mut client = Connection::new(now, node(), None, true, &mut StdRng::seed_from_u64(1));
        assert!(!client.send(now, NodePublic::ZERO, Bytes::new()));
        assert_eq!(client.poll_transmit(), None);
        client.handle_bytes(now, &Frame::ServerKey(relay.private.public()).to_bytes()).unwrap();
        assert!(client.send(now, NodePublic::ZERO, Bytes::from_static(b"x")));
        let frames = relay.frames(&mut client);
        let [Frame::ClientInfo { node: named, sealed }, Frame::NotePreferred(true), Frame::SendPacket { .. }] =
            &frames[..]
        else {
            panic!("{frames:?}")
        };
        let info = ClientInfo::open(&relay.private.box_with_node(named), sealed).unwrap();
        assert!(info.can_ack_pings);
        client.handle_bytes(now, &relay.server_info(*named)).unwrap();
        let event = client.poll_event().unwrap();
        assert_eq!(event, Event::Connected { relay: relay.private.public(), info: ServerInfo::default() });
    }

    #[test]
    fn fast_start_logs_in_at_once_and_skips_the_repeated_key() {
        let (now, mut relay) = (start(), Relay::new());
        let key = relay.private.public();
        let mut client = Connection::new(now, node(), Some(key), false, &mut StdRng::seed_from_u64(1));
        assert!(matches!(relay.frames(&mut client)[..], [Frame::ClientInfo { .. }]));
        let mut bytes = Frame::ServerKey(key).to_bytes().to_vec();
        bytes.extend_from_slice(&relay.server_info(node().public()));
        client.handle_bytes(now, &bytes).unwrap();
        assert!(matches!(client.poll_event(), Some(Event::Connected { .. })));
        assert_eq!(client.poll_timeout(), Some(now + Timing::default().silence));
    }

    #[test]
    fn a_relay_shows_the_mesh_key_and_asks_who_is_there() {
        let (now, mut relay) = (start(), Relay::new());
        let (key, mesh_key) = (relay.private.public(), MeshKey::from_bytes([6; 32]));
        let rng = &mut StdRng::seed_from_u64(1);
        let mut client = Connection::for_relay(now, node(), Some(key), mesh_key.clone(), rng);
        let frames = relay.frames(&mut client);
        let [Frame::ClientInfo { node: named, sealed }, Frame::WatchConns] = &frames[..] else { panic!("{frames:?}") };
        let info = ClientInfo::open(&relay.private.box_with_node(named), sealed).unwrap();
        assert!(info.mesh_key.is_some_and(|shown| shown.matches(&mesh_key)));
        client.handle_bytes(now, &relay.server_info(*named)).unwrap();
        assert!(matches!(client.poll_event(), Some(Event::Connected { .. })));
        let peer = NodePublic::from_bytes([3; 32]);
        client.handle_bytes(now, &Frame::PeerPresent { peer, address: None, flags: 0 }.to_bytes()).unwrap();
        assert_eq!(client.poll_event(), Some(Event::PeerPresent { peer, flags: 0 }));
    }

    #[test]
    fn pings_are_answered_and_what_it_does_not_know_is_skipped() {
        let now = start();
        let (mut client, mut relay) = open_pair(now);
        let peer = NodePublic::from_bytes([3; 32]);
        let mut bytes = BytesMut::new();
        for frame in [
            Frame::KeepAlive,
            Frame::PeerPresent { peer, address: None, flags: 0 },
            Frame::Ping(*b"abcdefgh"),
            Frame::Pong(*b"abcdefgh"),
            Frame::Health("slow".into()),
            Frame::PeerGone { peer, reason: GoneReason::NotHere },
        ] {
            frame.encode(&mut bytes);
        }
        bytes.extend_from_slice(&[0x55, 0, 0, 0, 2, 9, 9]);
        Frame::RecvPacket { source: peer, payload: Bytes::from_static(b"hi") }.encode(&mut bytes);
        client.handle_bytes(now, &bytes).unwrap();
        assert_eq!(relay.frames(&mut client), [Frame::Pong(*b"abcdefgh")]);
        assert_eq!(client.poll_event(), Some(Event::Health("slow".into())));
        assert_eq!(client.poll_event(), Some(Event::PeerGone { peer, reason: GoneReason::NotHere }));
        assert_eq!(client.poll_event(), Some(Event::Packet { source: peer, payload: Bytes::from_static(b"hi") }));
        assert_eq!(client.poll_event(), None);
    }

    #[test]
    fn silence_ends_it_and_keep_alives_prevent_that() {
        let now = start();
        let (mut client, _) = open_pair(now);
        let mut at = now;
        for _ in 0..5 {
            at += Duration::from_secs(65);
            client.handle_timeout(at).unwrap();
            client.handle_bytes(at, &Frame::KeepAlive.to_bytes()).unwrap();
        }
        client.handle_timeout(at + Duration::from_secs(119)).unwrap();
        let error = client.handle_timeout(at + Duration::from_secs(120)).unwrap_err();
        assert_eq!(error.to_string(), "relay silent for 120 s");
    }

    #[test]
    fn traffic_without_an_answer_is_noticed_within_seconds() {
        let now = start();
        let (mut client, mut relay) = open_pair(now);
        let later = now + Duration::from_secs(60);
        assert!(client.send(later, NodePublic::ZERO, Bytes::from_static(b"x")));
        relay.frames(&mut client);
        let ping_at = client.poll_timeout().unwrap();
        assert_eq!(ping_at, later + Duration::from_secs(4));
        client.handle_timeout(ping_at).unwrap();
        let frames = relay.frames(&mut client);
        let [Frame::Ping(data)] = frames[..] else { panic!("{frames:?}") };
        let gone_at = client.poll_timeout().unwrap();
        assert_eq!(gone_at, ping_at + Duration::from_secs(3));
        client.handle_bytes(ping_at, &Frame::Pong(data).to_bytes()).unwrap();
        assert_eq!(client.poll_timeout(), Some(ping_at + Duration::from_secs(120)));
        assert!(client.send(ping_at, NodePublic::ZERO, Bytes::from_static(b"x")));
        let ping_at = client.poll_timeout().unwrap();
        client.handle_timeout(ping_at).unwrap();
        assert!(matches!(client.handle_timeout(ping_at + Duration::from_secs(5)), Err(ClientError::Silent(_))));
    }

    #[test]
    fn a_connection_in_doubt_ends_unless_the_relay_says_something_in_time() {
        let now = start();
        let (mut client, mut relay) = open_pair(now);
        let patience = Duration::from_secs(1);
        client.check(now, patience);
        assert!(matches!(relay.frames(&mut client)[..], [Frame::Ping(_)]));
        client.handle_timeout(now + patience / 2).unwrap();
        client.handle_bytes(now + patience / 2, &Frame::KeepAlive.to_bytes()).unwrap();
        client.handle_timeout(now + patience).unwrap();
        client.check(now + patience, patience);
        assert_eq!(client.poll_timeout(), Some(now + patience * 2));
        assert!(matches!(client.handle_timeout(now + patience * 2), Err(ClientError::Silent(_))));
    }

    #[test]
    fn a_relays_limit_pauses_packets_until_the_bytes_are_earned() {
        let (now, mut relay) = (start(), Relay::new());
        let key = relay.private.public();
        let mut client = Connection::new(now, node(), Some(key), false, &mut StdRng::seed_from_u64(1));
        relay.frames(&mut client);
        let info = ServerInfo { bytes_per_second: 10_000, burst: 70_000, ..ServerInfo::default() };
        let sealed = info.seal(&relay.private.box_with_node(&node().public()), &mut relay.rng);
        client.handle_bytes(now, &sealed.to_bytes()).unwrap();
        let packet = Bytes::from(vec![0; 20_000 - HEADER_LEN - 32]);
        for _ in 0..3 {
            assert!(client.send(now, NodePublic::ZERO, packet.clone()));
            assert!(!client.is_paused());
        }
        // 10,000 bytes more than there were: a second's worth.
        assert!(client.send(now, NodePublic::ZERO, packet));
        assert!(client.is_paused());
        assert_eq!(client.poll_timeout(), Some(now + Duration::from_secs(1)));
        client.handle_timeout(now + Duration::from_millis(999)).unwrap();
        assert!(client.is_paused());
        client.handle_timeout(now + Duration::from_secs(1)).unwrap();
        assert!(!client.is_paused());
    }

    #[test]
    fn a_login_that_is_not_answered_times_out() {
        let now = start();
        let mut client = Connection::new(now, node(), None, false, &mut StdRng::seed_from_u64(1));
        assert_eq!(client.poll_timeout(), Some(now + Duration::from_secs(10)));
        assert!(matches!(client.handle_timeout(now + Duration::from_secs(10)), Err(ClientError::LoginTimeout(_))));
    }

    #[test]
    fn a_relay_that_breaks_protocol_gets_one_clear_error() {
        let now = start();
        let fresh = || Connection::new(now, node(), None, false, &mut StdRng::seed_from_u64(1));
        let early = Frame::RecvPacket { source: NodePublic::ZERO, payload: Bytes::new() };
        let error = fresh().handle_bytes(now, &early.to_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "relay broke protocol: RecvPacket before ServerKey");
        assert!(matches!(fresh().handle_bytes(now, b"HTTP/1.1 200 OK"), Err(ClientError::Frame(_))));
        let relay = Relay::new();
        let mut client = fresh();
        client.handle_bytes(now, &Frame::ServerKey(relay.private.public()).to_bytes()).unwrap();
        let wrong = Frame::ServerInfo { sealed: Bytes::from(vec![0; 60]) };
        assert!(matches!(client.handle_bytes(now, &wrong.to_bytes()), Err(ClientError::Login(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived_and_the_next_deadline_is_ahead(
            pieces in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..80), 0u64..70, any::<bool>()), 0..20),
        ) {
            let (mut at, (mut client, mut relay)) = { let now = start(); (now, open_pair(now)) };
            for (bytes, wait, send) in pieces {
                at += Duration::from_secs(wait);
                if client.handle_timeout(at).is_err() {
                    return Ok(());
                }
                if send {
                    client.send(at, NodePublic::ZERO, Bytes::new());
                }
                relay.frames(&mut client);
                prop_assert!(client.poll_timeout().is_none_or(|next| next > at));
                if client.handle_bytes(at, &bytes).is_err() {
                    return Ok(());
                }
            }
        }
    }
}
