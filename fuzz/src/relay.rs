//! What a relay reads before and after a login: a proxy's header, HTTP heads, WebSocket messages, frames, and what becomes of packets in its
//! queue.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use mesh_derp::login::ClientInfo;
use mesh_derp::proxied::Progress;
use mesh_derp::queue::{Depth, PacketQueue};
use mesh_derp::server::{Connection, Input};
use mesh_derp::upgrade::{self, parse_request, parse_response};
use mesh_derp::websocket::{self, Decoder, Role, encode_message};
use mesh_noise::key::{NodePrivate, NodePublic, RelayPrivate};
use mesh_noise::random::SeededRng;

/// Heads of requests and responses: one that is found ends where it says and is not found before; what it asks for is
/// understood or refused.
pub(crate) fn http(bytes: &[u8]) {
    if let Ok(Some((head, len))) = parse_request(bytes) {
        assert_eq!(parse_request(&bytes[..len]), Ok(Some((head.clone(), len))), "a head depends on what follows it");
        assert_eq!(parse_request(&bytes[..len - 1]), Ok(None), "a head is found before its end");
        let _ = (head.path(), head.query(), head.keeps_alive(), upgrade::asked(&head));
        if let Ok(answer) = websocket::accepted(&head) {
            let (answer, len) = parse_response(&answer).expect("our own answer").expect("it is whole");
            assert!(answer.status == 101 && len > 0);
        }
    }
    if let Ok(Some((head, len))) = parse_response(bytes) {
        assert_eq!(parse_response(&bytes[..len]), Ok(Some((head.clone(), len))), "a head depends on what follows it");
        let _ = websocket::check_response(&head, [7; 16]);
    }
    for role in [Role::Client, Role::Server] {
        messages(role, bytes);
    }
    proxied(bytes);
}

/// The header of a proxy, read as a listener does: never a byte more than it says it needs.
fn proxied(bytes: &[u8]) {
    let mut have = 0;
    while let Ok(Progress::Needs(more)) = mesh_derp::proxied::read(&bytes[..have]) {
        assert!(more > 0 && have + more <= 16 + 4096, "a header without end");
        have += more;
        if have > bytes.len() {
            return;
        }
    }
}

/// WebSocket messages read the same in one piece and in two, and hold no more than was read; ours hold what we put in.
fn messages(role: Role, bytes: &[u8]) {
    let decode = |pieces: &[&[u8]]| {
        let (mut decoder, mut found) = (Decoder::new(role), Vec::new());
        for piece in pieces {
            let mut piece = piece.to_vec();
            match decoder.decode(&mut piece) {
                Ok(len) => found.extend_from_slice(&piece[..len]),
                Err(error) => return (found, Some(error)),
            }
        }
        (found, None)
    };
    let (front, back) = bytes.split_at(bytes.len() / 2);
    let (whole, cut) = (decode(&[bytes]), decode(&[front, back]));
    assert_eq!(whole.1, cut.1, "pieces end differently");
    assert!(whole.1.is_some() || whole.0 == cut.0, "pieces decode differently");
    assert!(whole.0.len() <= bytes.len());
    let other = if role == Role::Client { Role::Server } else { Role::Client };
    let mut message = BytesMut::new();
    encode_message(other, [1, 2, 3, 4], bytes, &mut message);
    assert_eq!(decode(&[&message]), (bytes.to_vec(), None), "our own message is refused");
}

/// A relay's side of a connection, logged in, and then whatever comes; its packets go through a queue.
pub(crate) fn session(now: Instant, bytes: &[u8]) {
    let (relay, node) = (RelayPrivate::from_bytes([1; 32]), NodePrivate::from_bytes([2; 32]));
    let rng = &mut SeededRng::from_seed([9; 32]);
    let mut connection = Connection::new(now, relay.clone(), rng);
    let login = ClientInfo::default().seal(node.public(), &node.box_with_relay(&relay.public()), rng);
    connection.read_buffer().extend_from_slice(&login.to_bytes());
    assert!(matches!(connection.poll_input(), Ok(Some(Input::Login { .. }))), "our own login is refused");
    connection.admit();
    let mut queue = Watched::new(Depth { data: 4, disco: 2, bytes: 600 });
    for piece in bytes.chunks(bytes.len() / 3 + 1) {
        connection.read_buffer().extend_from_slice(piece);
        while let Ok(Some(input)) = connection.poll_input() {
            if let Input::Packet { destination, payload } = input {
                queue.push(now, destination, payload);
            }
        }
        queue.pop(now);
        while connection.poll_transmit().is_some() {}
    }
    queue.drain(now);
}

/// A queue; each byte is a packet of some node, a packet taken, or time that passes.
pub(crate) fn queue(begin: Instant, bytes: &[u8]) {
    let depth = |at: usize| usize::from(bytes.get(at).copied().unwrap_or(3)) + 1;
    let mut queue = Watched::new(Depth { data: depth(0), disco: depth(1) % 4 + 1, bytes: depth(2) * 64 });
    let mut now = begin;
    for byte in bytes {
        let number = usize::from(byte >> 3);
        match byte & 7 {
            0..=2 => {
                let mut packet = if number % 5 == 4 { b"TS\xF0\x9F\x92\xAC".to_vec() } else { Vec::new() };
                packet.resize(number * number + 8, 0);
                queue.push(now, NodePublic::from_bytes([(byte & 3) + (byte >> 6); 32]), packet.into());
            }
            3 | 4 => queue.pop(now),
            5 => now += Duration::from_millis(u64::from(byte >> 3)),
            6 => queue.queue.set_blocked(number % 2 == 0),
            _ => queue.queue.shrink(),
        }
    }
    queue.drain(now);
}

/// A queue, and what has to be true of it whatever happens.
struct Watched {
    queue: PacketQueue,
    depth: Depth,
    pushed: u64,
    popped: u64,
}

impl Watched {
    fn new(depth: Depth) -> Self {
        Self { queue: PacketQueue::new(depth), depth, pushed: 0, popped: 0 }
    }

    fn push(&mut self, now: Instant, node: NodePublic, payload: Bytes) {
        let (before, displaced) = (self.queue.len() as u64, self.queue.displaced());
        let outcome = self.queue.push(now, node, payload);
        self.pushed += 1;
        assert_eq!(self.queue.len() as u64, before + 1 - outcome.displaced);
        assert!(
            self.queue.displaced().data + self.queue.displaced().disco - displaced.data - displaced.disco
                == outcome.displaced
        );
        self.check();
    }

    fn pop(&mut self, now: Instant) {
        self.popped += u64::from(self.queue.pop(now).is_some());
        self.check();
    }

    fn check(&self) {
        let (len, displaced) = (self.queue.len(), self.queue.displaced());
        assert!(len <= self.depth.data + self.depth.disco);
        assert_eq!(self.pushed, self.popped + len as u64 + displaced.data + displaced.disco, "lost and not counted");
    }

    fn drain(&mut self, now: Instant) {
        while !self.queue.is_empty() {
            self.pop(now);
        }
        assert_eq!(self.queue.bytes(), 0);
        assert!(self.queue.pop(now).is_none());
    }
}
