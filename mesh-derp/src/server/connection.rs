//! One client's connection, from its first byte to its last.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use mesh_noise::key::{NodePublic, RelayPrivate, SharedBox};
use rand_core::CryptoRng;

use crate::frame::{Decoder, Frame, FrameError, Kind};
use crate::login::{ClientInfo, LoginError, ServerInfo};
use crate::random::Prepared;

/// How long a client may take to log in.
pub const LOGIN_TIMEOUT: Duration = Duration::from_secs(10);
/// PeerGone(NotHere) frames that may be sent in a burst, and how long one takes to be earned again.
const NOT_HERE_BURST: u32 = 3;
const NOT_HERE_PERIOD: Duration = Duration::from_secs(1);

/// Why a client's connection is ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// It broke the framing.
    #[error("client broke protocol: {0}")]
    Frame(#[from] FrameError),
    /// It sent something else first.
    #[error("client broke protocol: {0:?} before ClientInfo")]
    BeforeLogin(Kind),
    /// It logged in twice.
    #[error("client broke protocol: a second ClientInfo")]
    SecondLogin,
    /// It did what only relays of the region may do.
    #[error("client broke protocol: {0:?} is for relays of this region only")]
    NotARelay(Kind),
    /// It sent a frame that only a relay sends to a client.
    #[error("client broke protocol: {0:?} comes from a relay only")]
    WrongDirection(Kind),
    /// Its login is wrong.
    #[error("login refused: {0}")]
    Login(#[from] LoginError),
    /// It did not log in.
    #[error("no login within {} s", LOGIN_TIMEOUT.as_secs())]
    LoginTimeout,
}

/// What a client wants.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Input {
    /// It has proved who it is. Nothing further is read until [`Connection::admit`].
    Login {
        /// Its node key.
        node: NodePublic,
        /// What it says about itself.
        info: ClientInfo,
    },
    /// A packet for somebody.
    Packet {
        /// For whom.
        destination: NodePublic,
        /// The packet.
        payload: Bytes,
    },
    /// It wants this echoed in a Pong.
    Ping([u8; 8]),
    /// Whether this relay is its home.
    Preferred(bool),
    /// What only another relay of the region may ask.
    Regional(Regional),
    /// A frame without consequence, except that the connection is in use.
    Nothing,
}

/// What only another relay of the region may ask.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Regional {
    /// To be told who is connected, from now on.
    Watch,
    /// To pass on a packet of one of its clients to one of ours.
    Forward {
        /// From whom.
        source: NodePublic,
        /// For whom.
        destination: NodePublic,
        /// The packet.
        payload: Bytes,
    },
    /// To end all connections of a node.
    Close(NodePublic),
}

#[derive(Debug)]
enum State {
    AwaitingLogin,
    AwaitingAdmission(SharedBox),
    Open,
}

/// The relay's side of one connection.
///
/// ```text
///   AwaitingLogin ──ClientInfo──► AwaitingAdmission ──admit()──► Open
///                                        └───────admit_relay()───┘
/// ```
#[derive(Debug)]
pub struct Connection {
    relay: RelayPrivate,
    nonce: Prepared,
    state: State,
    decoder: Decoder,
    out: BytesMut,
    login_by: Option<Instant>,
    is_relay: bool,
    not_here_left: u32,
    not_here_since: Instant,
}

impl Connection {
    /// A connection whose stream has just become DERP frames. The relay's key is the first thing to transmit.
    pub fn new(now: Instant, relay: RelayPrivate, rng: &mut impl CryptoRng) -> Self {
        let mut out = BytesMut::new();
        Frame::ServerKey(relay.public()).encode(&mut out);
        Self {
            relay,
            nonce: Prepared::draw(rng),
            state: State::AwaitingLogin,
            decoder: Decoder::new(),
            out,
            login_by: Some(now + LOGIN_TIMEOUT),
            is_relay: false,
            not_here_left: NOT_HERE_BURST,
            not_here_since: now,
        }
    }

    /// Where a reader appends what the client sent, to be followed by [`Connection::poll_input`] until it has no more.
    pub fn read_buffer(&mut self) -> &mut BytesMut {
        self.decoder.buffer()
    }

    /// The next thing the client wants.
    ///
    /// # Errors
    /// If it broke protocol or its login is wrong. The connection is over.
    pub fn poll_input(&mut self) -> Result<Option<Input>, ServerError> {
        if matches!(self.state, State::AwaitingAdmission(_)) {
            return Ok(None);
        }
        let Some(frame) = self.decoder.next_frame()? else { return Ok(None) };
        let kind = frame.kind();
        if matches!(self.state, State::AwaitingLogin) {
            let Frame::ClientInfo { node, sealed } = frame else { return Err(ServerError::BeforeLogin(kind)) };
            let shared = self.relay.box_with_node(&node);
            let info = ClientInfo::open(&shared, &sealed)?;
            self.state = State::AwaitingAdmission(shared);
            self.login_by = None;
            return Ok(Some(Input::Login { node, info }));
        }
        match frame {
            Frame::SendPacket { destination, payload } => Ok(Some(Input::Packet { destination, payload })),
            Frame::Ping(data) => Ok(Some(Input::Ping(data))),
            Frame::NotePreferred(home) => Ok(Some(Input::Preferred(home))),
            Frame::Pong(_) | Frame::KeepAlive => Ok(Some(Input::Nothing)),
            Frame::ClientInfo { .. } => Err(ServerError::SecondLogin),
            Frame::ForwardPacket { .. } | Frame::WatchConns | Frame::ClosePeer(_) if !self.is_relay => {
                Err(ServerError::NotARelay(kind))
            }
            Frame::ForwardPacket { source, destination, payload } => {
                Ok(Some(Input::Regional(Regional::Forward { source, destination, payload })))
            }
            Frame::WatchConns => Ok(Some(Input::Regional(Regional::Watch))),
            Frame::ClosePeer(node) => Ok(Some(Input::Regional(Regional::Close(node)))),
            Frame::ServerKey(_)
            | Frame::ServerInfo { .. }
            | Frame::RecvPacket { .. }
            | Frame::PeerGone { .. }
            | Frame::PeerPresent { .. }
            | Frame::Health(_)
            | Frame::Restarting { .. } => Err(ServerError::WrongDirection(kind)),
        }
    }

    /// Lets the client in: the relay's half of the login goes out. Does nothing unless a login is waiting.
    pub fn admit(&mut self) {
        if let State::AwaitingAdmission(shared) = &self.state {
            ServerInfo::default().seal(shared, &mut self.nonce).encode(&mut self.out);
            self.state = State::Open;
        }
    }

    /// Lets in another relay of the region, which has shown the mesh key: it may ask what [`Regional`] lists.
    pub fn admit_relay(&mut self) {
        self.is_relay = matches!(self.state, State::AwaitingAdmission(_));
        self.admit();
    }

    /// Whether a PeerGone(NotHere) may be sent now. A yes counts as sent.
    pub fn may_report_missing(&mut self, now: Instant) -> bool {
        while self.not_here_left < NOT_HERE_BURST && now >= self.not_here_since + NOT_HERE_PERIOD {
            self.not_here_since += NOT_HERE_PERIOD;
            self.not_here_left += 1;
        }
        if self.not_here_left == NOT_HERE_BURST {
            self.not_here_since = now;
        }
        let may = self.not_here_left > 0;
        self.not_here_left = self.not_here_left.saturating_sub(1);
        may
    }

    /// How many frames of unknown kinds were skipped.
    #[must_use]
    pub const fn skipped(&self) -> u64 {
        self.decoder.skipped()
    }

    /// The bytes to send next, if there are any.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        (!self.out.is_empty()).then(|| self.out.split().freeze())
    }

    /// When [`Connection::handle_timeout`] has something to do.
    #[must_use]
    pub const fn poll_timeout(&self) -> Option<Instant> {
        self.login_by
    }

    /// Does whatever is due.
    ///
    /// # Errors
    /// If the client has not logged in in time. The connection is over.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), ServerError> {
        match self.login_by {
            Some(by) if now >= by => Err(ServerError::LoginTimeout),
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_noise::key::NodePrivate;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[expect(clippy::disallowed_methods, reason = "tests need some instant to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    fn fresh() -> (Connection, NodePrivate, StdRng) {
        let mut rng = StdRng::seed_from_u64(4);
        let relay = RelayPrivate::generate(&mut rng);
        let node = NodePrivate::generate(&mut rng);
        (Connection::new(start(), relay, &mut rng), node, rng)
    }

    fn open() -> Connection {
        let mut connection = awaiting();
        connection.admit();
        connection
    }

    fn awaiting() -> Connection {
        let (mut connection, node, mut rng) = fresh();
        let shared = node.box_with_relay(&connection.relay.public());
        let login = ClientInfo::default().seal(node.public(), &shared, &mut rng);
        connection.read_buffer().extend_from_slice(&login.to_bytes());
        assert!(matches!(connection.poll_input(), Ok(Some(Input::Login { .. }))));
        connection
    }

    #[test]
    fn the_key_goes_out_first_and_nothing_is_read_before_admission() {
        let (mut connection, node, mut rng) = fresh();
        let key = connection.relay.public();
        assert_eq!(connection.poll_transmit(), Some(Frame::ServerKey(key).to_bytes()));
        let shared = node.box_with_relay(&key);
        let login = ClientInfo::default().seal(node.public(), &shared, &mut rng);
        connection.read_buffer().extend_from_slice(&login.to_bytes());
        connection.read_buffer().extend_from_slice(&Frame::NotePreferred(true).to_bytes());
        let input = connection.poll_input().unwrap();
        assert_eq!(input, Some(Input::Login { node: node.public(), info: ClientInfo::default() }));
        assert_eq!(connection.poll_input().unwrap(), None);
        assert_eq!((connection.poll_transmit(), connection.poll_timeout()), (None, None));
        connection.admit();
        let mut reader = Decoder::new();
        reader.extend(&connection.poll_transmit().unwrap());
        let Some(Frame::ServerInfo { sealed }) = reader.next_frame().unwrap() else { panic!() };
        assert_eq!(ServerInfo::open(&shared, &sealed).unwrap(), ServerInfo::default());
        assert_eq!(connection.poll_input().unwrap(), Some(Input::Preferred(true)));
    }

    #[test]
    fn a_login_with_somebody_elses_key_is_refused() {
        let (mut connection, node, mut rng) = fresh();
        let victim = NodePrivate::generate(&mut rng).public();
        let shared = node.box_with_relay(&connection.relay.public());
        let login = ClientInfo::default().seal(victim, &shared, &mut rng);
        connection.read_buffer().extend_from_slice(&login.to_bytes());
        let error = connection.poll_input().unwrap_err();
        assert_eq!(error.to_string(), "login refused: login box does not open with the key it names");
    }

    #[test]
    fn who_does_not_log_in_is_let_go() {
        let (mut connection, ..) = fresh();
        let by = connection.poll_timeout().unwrap();
        assert!(connection.handle_timeout(by - Duration::from_millis(1)).is_ok());
        assert!(matches!(connection.handle_timeout(by), Err(ServerError::LoginTimeout)));
    }

    #[test]
    fn each_forbidden_frame_ends_the_connection_with_its_own_reason() {
        let key = NodePublic::ZERO;
        let cases = [
            (Frame::WatchConns, "client broke protocol: WatchConns is for relays of this region only"),
            (Frame::ClosePeer(key), "client broke protocol: ClosePeer is for relays of this region only"),
            (
                Frame::RecvPacket { source: key, payload: Bytes::new() },
                "client broke protocol: RecvPacket comes from a relay only",
            ),
            (Frame::ClientInfo { node: key, sealed: vec![0; 40].into() }, "client broke protocol: a second ClientInfo"),
        ];
        for (frame, expected) in cases {
            let mut connection = open();
            connection.read_buffer().extend_from_slice(&frame.to_bytes());
            assert_eq!(connection.poll_input().unwrap_err().to_string(), expected);
        }
        let (mut early, ..) = fresh();
        early.read_buffer().extend_from_slice(&Frame::Ping([0; 8]).to_bytes());
        assert_eq!(early.poll_input().unwrap_err().to_string(), "client broke protocol: Ping before ClientInfo");
    }

    #[test]
    fn another_relay_of_the_region_may_watch_forward_and_close() {
        let mut connection = awaiting();
        connection.admit_relay();
        let (source, destination) = (NodePublic::from_bytes([1; 32]), NodePublic::from_bytes([2; 32]));
        let payload = Bytes::from_static(b"x");
        let frames = [
            (Frame::WatchConns, Regional::Watch),
            (
                Frame::ForwardPacket { source, destination, payload: payload.clone() },
                Regional::Forward { source, destination, payload },
            ),
            (Frame::ClosePeer(source), Regional::Close(source)),
        ];
        for (frame, expected) in frames {
            connection.read_buffer().extend_from_slice(&frame.to_bytes());
            assert_eq!(connection.poll_input().unwrap(), Some(Input::Regional(expected)));
        }
        // The lengths of these frames are exact.
        for wrong in [&[0x10, 0, 0, 0, 1, 0][..], &[0x11, 0, 0, 0, 31], &[0x11, 0, 0, 0, 33]] {
            let mut connection = awaiting();
            connection.admit_relay();
            connection.read_buffer().extend_from_slice(wrong);
            assert!(matches!(connection.poll_input(), Err(ServerError::Frame(FrameError::Length { .. }))), "{wrong:?}");
        }
    }

    #[test]
    fn missing_peers_are_reported_three_times_and_then_once_a_second() {
        let (now, mut connection) = (start(), open());
        let burst: Vec<bool> = (0..5).map(|_| connection.may_report_missing(now)).collect();
        assert_eq!(burst, [true, true, true, false, false]);
        let at = |millis| now + Duration::from_millis(millis);
        assert!(!connection.may_report_missing(at(900)));
        assert!(connection.may_report_missing(at(1100)));
        assert!(!connection.may_report_missing(at(1200)));
        let later: Vec<bool> = (0..4).map(|_| connection.may_report_missing(at(60_000))).collect();
        assert_eq!(later, [true, true, true, false]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300), opened: bool) {
            let mut connection = if opened { open() } else { fresh().0 };
            connection.read_buffer().extend_from_slice(&bytes);
            while let Ok(Some(_)) = connection.poll_input() {}
        }
    }
}
