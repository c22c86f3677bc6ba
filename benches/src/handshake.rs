//! Handshakes: ours, and the same Noise messages by snow with its default resolver.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::wireguard::{Event, Interface, PeerConfig, Session};
use snow::params::NoiseParams;
use snow::{Builder, HandshakeState, StatelessTransportState};

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
const PRIVATE: [[u8; 32]; 2] = [[1; 32], [2; 32]];

/// Two interfaces that know each other and have no session yet.
#[derive(Debug)]
pub struct Pair {
    now: Instant,
    a: Interface<u8>,
    b: Interface<u8>,
    key_b: NodePublic,
}

impl Default for Pair {
    fn default() -> Self {
        Self::new()
    }
}

impl Pair {
    /// The same pair every time.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "an instant can only come from the clock; it never moves here")]
    pub fn new() -> Self {
        let now = Instant::now();
        let (private_a, private_b) = (NodePrivate::from_bytes(PRIVATE[0]), NodePrivate::from_bytes(PRIVATE[1]));
        let (key_a, key_b) = (private_a.public(), private_b.public());
        let mut a = Interface::new(now, SystemTime::UNIX_EPOCH, &private_a, [3; 32]);
        let mut b = Interface::new(now, SystemTime::UNIX_EPOCH, &private_b, [4; 32]);
        a.set_peer(now, key_b, PeerConfig::default());
        b.set_peer(now, key_a, PeerConfig::default());
        Self { now, a, b, key_b }
    }

    /// One whole handshake: initiation, response, and what both sides compute for it. Returns the initiator's session
    /// and the responder's.
    ///
    /// # Panics
    /// If the handshake fails, which it does not between these two.
    #[must_use]
    pub fn handshake(self) -> [Arc<Session>; 2] {
        let mut exchange = self.initiate();
        let response = exchange.respond();
        exchange.a.handle_datagram(exchange.now, &0, None, &response).expect("it was asked for");
        [opened(&mut exchange.a), opened(&mut exchange.b)]
    }

    /// The first half.
    ///
    /// # Panics
    /// If there is no initiation, which there is.
    #[must_use]
    pub fn initiate(mut self) -> Exchange {
        self.a.want_session(self.now, &self.key_b);
        let initiation = self.a.poll_transmit().expect("an initiation").datagram;
        Exchange { now: self.now, a: self.a, b: self.b, initiation }
    }
}

/// An initiation and the interface that it is for.
#[derive(Debug)]
pub struct Exchange {
    now: Instant,
    a: Interface<u8>,
    b: Interface<u8>,
    initiation: Vec<u8>,
}

impl Exchange {
    /// All the responder's work, MACs, timestamp and the session's keys included. Returns the response.
    ///
    /// # Panics
    /// If the initiation is refused, which it is not.
    pub fn respond(&mut self) -> Vec<u8> {
        self.b.handle_datagram(self.now, &0, None, &self.initiation).expect("the peer is known");
        self.b.poll_transmit().expect("a response").datagram
    }
}

fn opened(interface: &mut Interface<u8>) -> Arc<Session> {
    let mut found = None;
    while let Some(event) = interface.poll_event() {
        if let Event::SessionOpened { session, .. } = event {
            found = Some(session);
        }
    }
    found.expect("a handshake opens a session")
}

/// The same two Noise messages by snow with the cryptography it brings: only them, without MACs, cookies and indices.
#[derive(Debug)]
pub struct SnowExchange {
    initiator: HandshakeState,
    initiation: Vec<u8>,
}

impl Default for SnowExchange {
    fn default() -> Self {
        Self::new()
    }
}

impl SnowExchange {
    /// The first half.
    ///
    /// # Panics
    /// If snow cannot make an initiation, which it can.
    #[must_use]
    pub fn new() -> Self {
        let responder = NodePrivate::from_bytes(PRIVATE[1]).public();
        let mut initiator = builder(&PRIVATE[0])
            .psk(2, &[0; 32])
            .and_then(|builder| builder.remote_public_key(responder.as_bytes()))
            .and_then(Builder::build_initiator)
            .expect("all that the pattern wants is there");
        let mut initiation = vec![0; 256];
        let len = initiator.write_message(&[0; 12], &mut initiation).expect("there is room");
        initiation.truncate(len);
        Self { initiator, initiation }
    }

    /// All the responder's work: the message read, the response written, the session's keys derived.
    ///
    /// # Panics
    /// If snow refuses its own message, which it does not.
    pub fn respond(&mut self) -> Vec<u8> {
        let mut responder = builder(&PRIVATE[1]).build_responder().expect("all that the pattern wants is there");
        let mut buffer = [0; 256];
        responder.read_message(&self.initiation, &mut buffer).expect("it is whole");
        responder.set_psk(2, &[0; 32]).expect("the pattern has a place for it");
        let len = responder.write_message(&[], &mut buffer).expect("there is room");
        let keys = responder.dangerously_get_raw_split();
        std::hint::black_box(keys);
        buffer[..len].to_vec()
    }

    /// Both sides after the handshake: what the initiator writes, the responder reads.
    ///
    /// # Panics
    /// If snow refuses its own messages, which it does not.
    #[must_use]
    pub fn into_transport(mut self) -> [StatelessTransportState; 2] {
        let mut responder = builder(&PRIVATE[1])
            .psk(2, &[0; 32])
            .and_then(Builder::build_responder)
            .expect("all that the pattern wants is there");
        let mut buffer = [0; 256];
        responder.read_message(&self.initiation, &mut buffer).expect("it is whole");
        let len = responder.write_message(&[], &mut buffer).expect("there is room");
        self.initiator.read_message(&buffer[..len], &mut [0; 256]).expect("it is whole");
        [self.initiator, responder].map(|side| side.into_stateless_transport_mode().expect("the handshake is over"))
    }

    /// The initiator's second half.
    ///
    /// # Panics
    /// If snow refuses its own message, which it does not.
    pub fn finish(mut self, response: &[u8]) {
        let mut buffer = [0; 256];
        self.initiator.read_message(response, &mut buffer).expect("it is whole");
        std::hint::black_box(self.initiator.dangerously_get_raw_split());
    }
}

fn builder(private: &[u8; 32]) -> Builder<'_> {
    let params: NoiseParams = PATTERN.parse().expect("the pattern is a constant");
    Builder::new(params)
        .local_private_key(private)
        .and_then(|builder| builder.prologue(PROLOGUE))
        .expect("nothing was set before")
}
