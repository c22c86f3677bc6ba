//! Fixtures shared by the benchmarks.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use mesh_noise::key::NodePrivate;
use mesh_noise::wireguard::{Event, Interface, PeerConfig, Session};

/// Two interfaces that know each other and have no session yet.
#[derive(Debug)]
pub struct Pair {
    now: Instant,
    a: Interface<u8>,
    b: Interface<u8>,
    key_b: mesh_noise::key::NodePublic,
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
        let (private_a, private_b) = (NodePrivate::from_bytes([1; 32]), NodePrivate::from_bytes([2; 32]));
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
    pub fn handshake(&mut self) -> [Arc<Session>; 2] {
        self.a.want_session(self.now, &self.key_b);
        let initiation = self.a.poll_transmit().expect("an initiation").datagram;
        self.b.handle_datagram(self.now, &0, None, &initiation).expect("the peer is known");
        let response = self.b.poll_transmit().expect("a response").datagram;
        self.a.handle_datagram(self.now, &0, None, &response).expect("it was asked for");
        [opened(&mut self.a), opened(&mut self.b)]
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
