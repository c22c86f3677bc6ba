//! WebSocket as a byte stream (RFC 6455), without any I/O: for relay connections through what passes nothing else.
//!
//! Browsers speak only this, and some proxies and hosting platforms let only this through. The client asks for the
//! sub-protocol `derp`; binary messages then carry the DERP stream. Where one message ends and the next begins means
//! nothing: a frame of ours may span several, and one may hold several.
//!
//! ```text
//!  0               1               2               3
//! +-+-+-+-+-------+-+-------------+-------------------------------+
//! |F|R|R|R| opcode|M| length (7)  |  16 more bits if length = 126,|
//! |I|S|S|S|  (4)  |A|             |  64 more bits if it is 127    |
//! |N|V|V|V|       |S|             |                               |
//! | |1|2|3|       |K|             |                               |
//! +-+-+-+-+-------+-+-------------+-------------------------------+
//! | masking key, 4 bytes, in what clients send and only there     |
//! +---------------------------------------------------------------+
//! ```
//!
//! Because messages mean nothing, none is ever put together: [`Decoder::decode`] takes the headers out of what was read,
//! in place, and holds no payload. So there is nothing that a peer could make grow. A Ping is answered with a Pong; of
//! several that come while an answer waits, the newest (§5.5.3).

use aws_lc_rs::digest;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, BytesMut};

use crate::upgrade::{RequestHead, ResponseHead};

/// The sub-protocol that says what the messages carry.
pub const SUBPROTOCOL: &str = "derp";
/// The longest frame that is accepted. Nothing is held of it; more than this is a mistake or malice.
pub const MAX_FRAME_LEN: u64 = 16 << 20;
/// The longest payload of a control frame (§5.5).
const MAX_CONTROL_LEN: usize = 125;
/// The longest header: two bytes, eight of length, four of masking key.
const MAX_HEADER_LEN: usize = 14;
/// What the answer to a key is derived with (§1.3).
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Why a connection that should carry WebSocket messages cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WebSocketError {
    /// The request or its answer lacks something.
    #[error("websocket handshake: {0}")]
    Handshake(&'static str),
    /// A frame breaks the rules.
    #[error("websocket: {0}")]
    Frame(&'static str),
}

/// Which end of the connection this is. Clients mask what they send; servers must not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The end that connected.
    Client,
    /// The end that was connected to.
    Server,
}

/// The request that opens a connection. `nonce` is random; [`check_response`] wants it again. `host` and `ideal_node` are
/// as in [`upgrade::request`](crate::upgrade::request).
#[must_use]
pub fn request(host: &str, nonce: [u8; 16], ideal_node: Option<&str>) -> Vec<u8> {
    let key = STANDARD.encode(nonce);
    let mut text = format!(
        "GET /derp HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n"
    );
    if let Some(node) = ideal_node.filter(|node| node.chars().all(|c| c.is_ascii_graphic())) {
        text.push_str(&format!("Ideal-Node: {node}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

/// Whether a response with status 101 opens the connection that [`request`] has asked for with this nonce.
///
/// # Errors
/// If it answers something else.
pub fn check_response(head: &ResponseHead, nonce: [u8; 16]) -> Result<(), WebSocketError> {
    if !head.headers.has_token("upgrade", "websocket") {
        return Err(WebSocketError::Handshake("the answer is an upgrade to something else"));
    }
    if head.headers.get("sec-websocket-accept") != Some(&answer_to(&STANDARD.encode(nonce))) {
        return Err(WebSocketError::Handshake("the answer is to another request"));
    }
    if head.headers.get("sec-websocket-protocol") != Some(SUBPROTOCOL) {
        return Err(WebSocketError::Handshake("the server does not offer relay connections this way"));
    }
    Ok(())
}

/// The response that opens the connection which `head` asks for. Every origin is welcome, and extensions such as
/// compression are declined by not being mentioned.
///
/// # Errors
/// If the request is not one of version 13 with a key.
pub fn accepted(head: &RequestHead) -> Result<Vec<u8>, WebSocketError> {
    if head.method != "GET" {
        return Err(WebSocketError::Handshake("the method must be GET"));
    }
    if head.header("sec-websocket-version") != Some("13") {
        return Err(WebSocketError::Handshake("the version must be 13"));
    }
    let key = head.header("sec-websocket-key").unwrap_or_default();
    if STANDARD.decode(key).map_or(0, |nonce| nonce.len()) != 16 {
        return Err(WebSocketError::Handshake("the key must be 16 bytes in base64"));
    }
    let answer = answer_to(key);
    let text = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {answer}\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
    );
    Ok(text.into_bytes())
}

fn answer_to(key: &str) -> String {
    // Weak as it is, this hash is what the protocol names; nothing here depends on its strength.
    let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(key.as_bytes());
    context.update(GUID);
    STANDARD.encode(context.finish())
}

/// The payload of a Ping, to be sent back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ping {
    len: usize,
    data: [u8; MAX_CONTROL_LEN],
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// Within a header, of which so many bytes are known.
    Header { have: usize },
    /// Within a binary frame.
    Payload { left: u64, mask: [u8; 4], at: usize },
    /// Within a control frame.
    Control { opcode: u8, mask: [u8; 4], want: usize },
}

const CONTINUATION: u8 = 0;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// Takes the payload of binary messages out of a byte stream. See the [module doc](self).
#[derive(Debug)]
pub struct Decoder {
    role: Role,
    state: State,
    header: [u8; MAX_HEADER_LEN],
    control: Ping,
    /// Whether a message has begun whose last frame has not come.
    within_message: bool,
    ping: Option<Ping>,
    closed: bool,
}

impl Decoder {
    /// A decoder at the start of what the other end of a `role` sends.
    #[must_use]
    pub const fn new(role: Role) -> Self {
        Self {
            role,
            state: State::Header { have: 0 },
            header: [0; MAX_HEADER_LEN],
            control: Ping { len: 0, data: [0; MAX_CONTROL_LEN] },
            within_message: false,
            ping: None,
            closed: false,
        }
    }

    /// Consumes what was read next and leaves the payload in it at the front: that many bytes. Whatever follows a Close is
    /// thrown away.
    ///
    /// # Errors
    /// If the other end broke the rules. The connection is over.
    pub fn decode(&mut self, bytes: &mut [u8]) -> Result<usize, WebSocketError> {
        let (mut read, mut kept) = (0, 0);
        while read < bytes.len() && !self.closed {
            match &mut self.state {
                State::Header { have } => {
                    self.header[*have] = bytes[read];
                    *have += 1;
                    read += 1;
                    let have = *have;
                    if let Some(next) = self.read_header(have)? {
                        self.state = next;
                        self.finish();
                    }
                }
                State::Payload { left, mask, at } => {
                    let len = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len() - read);
                    bytes.copy_within(read..read + len, kept);
                    apply(*mask, *at, &mut bytes[kept..kept + len]);
                    (*left, *at) = (*left - len as u64, (*at + len) % 4);
                    read += len;
                    kept += len;
                    self.finish();
                }
                State::Control { mask, want, .. } => {
                    let at = self.control.len;
                    let len = (*want - at).min(bytes.len() - read);
                    let into = &mut self.control.data[at..at + len];
                    into.copy_from_slice(&bytes[read..read + len]);
                    apply(*mask, at % 4, into);
                    self.control.len += len;
                    read += len;
                    self.finish();
                }
            }
        }
        Ok(kept)
    }

    /// Whether the other end has said that it is done.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Appends the answer to the newest Ping, if one waits. `mask` is random; it is used by clients only.
    pub fn answer(&mut self, mask: [u8; 4], out: &mut BytesMut) {
        if let Some(ping) = self.ping.take() {
            encode(self.role, PONG, mask, &ping.data[..ping.len], out);
        }
    }

    /// Whether a Ping waits to be answered.
    #[must_use]
    pub const fn has_answer(&self) -> bool {
        self.ping.is_some()
    }

    /// What comes after the header, if it is whole.
    fn read_header(&mut self, have: usize) -> Result<Option<State>, WebSocketError> {
        let [first, second, ..] = self.header;
        let (last, opcode, masked, short) = (first & 0x80 != 0, first & 0x0f, second & 0x80 != 0, second & 0x7f);
        if first & 0x70 != 0 {
            return Err(WebSocketError::Frame("a reserved bit is set"));
        }
        if have < 2 {
            return Ok(None);
        }
        if masked != (self.role == Role::Server) {
            return Err(WebSocketError::Frame("clients mask what they send, and servers do not"));
        }
        let more = match short {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let whole = 2 + more + if masked { 4 } else { 0 };
        if have < whole {
            return Ok(None);
        }
        let long = self.header[2..2 + more].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let length = if more == 0 { u64::from(short) } else { long };
        let mut mask = [0; 4];
        if masked {
            mask.copy_from_slice(&self.header[whole - 4..whole]);
        }
        match opcode {
            CLOSE | PING | PONG => {
                if !last || more != 0 {
                    return Err(WebSocketError::Frame("a control frame in pieces, or longer than 125 bytes"));
                }
                self.control.len = 0;
                Ok(Some(State::Control { opcode, mask, want: usize::from(short) }))
            }
            CONTINUATION | BINARY => {
                if (opcode == CONTINUATION) != self.within_message {
                    return Err(WebSocketError::Frame("messages are mixed up"));
                }
                if length > MAX_FRAME_LEN {
                    return Err(WebSocketError::Frame("a frame longer than 16 MiB"));
                }
                self.within_message = !last;
                Ok(Some(State::Payload { left: length, mask, at: 0 }))
            }
            1 => Err(WebSocketError::Frame("a text message")),
            _ => Err(WebSocketError::Frame("an unknown kind of frame")),
        }
    }

    /// Goes on to the next header if the frame is whole.
    fn finish(&mut self) {
        match self.state {
            State::Payload { left: 0, .. } => {}
            State::Control { opcode, want, .. } if want == self.control.len => match opcode {
                CLOSE => self.closed = true,
                PING => self.ping = Some(self.control),
                _ => {}
            },
            State::Header { .. } | State::Payload { .. } | State::Control { .. } => return,
        }
        self.state = State::Header { have: 0 };
    }
}

/// Appends `payload` as one message. `mask` is random, since a client's bytes must not be foreseeable (§10.3).
pub fn encode_message(role: Role, mask: [u8; 4], payload: &[u8], out: &mut BytesMut) {
    encode(role, BINARY, mask, payload, out);
}

/// Appends a Close that says all is well.
pub fn encode_close(role: Role, mask: [u8; 4], out: &mut BytesMut) {
    encode(role, CLOSE, mask, &1000u16.to_be_bytes(), out);
}

fn encode(role: Role, opcode: u8, mask: [u8; 4], payload: &[u8], out: &mut BytesMut) {
    out.reserve(MAX_HEADER_LEN + payload.len());
    out.put_u8(0x80 | opcode);
    let masked = if role == Role::Client { 0x80 } else { 0 };
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(short @ ..=125), _) => out.put_u8(masked | short),
        (_, Ok(length)) => {
            out.put_u8(masked | 126);
            out.put_u16(length);
        }
        (_, Err(_)) => {
            out.put_u8(masked | 127);
            out.put_u64(payload.len() as u64);
        }
    }
    if role == Role::Server {
        out.put_slice(payload);
        return;
    }
    out.put_slice(&mask);
    let begin = out.len();
    out.put_slice(payload);
    apply(mask, 0, &mut out[begin..]);
}

/// Masks or unmasks `bytes`, the first of which stands at `at` in its frame, modulo 4.
fn apply(mask: [u8; 4], at: usize, bytes: &mut [u8]) {
    if mask == [0; 4] {
        return;
    }
    let turned = [mask[at % 4], mask[(at + 1) % 4], mask[(at + 2) % 4], mask[(at + 3) % 4]];
    let half = u64::from(u32::from_ne_bytes(turned));
    let word = half << 32 | half;
    let (words, rest) = bytes.as_chunks_mut::<8>();
    for chunk in words {
        *chunk = (u64::from_ne_bytes(*chunk) ^ word).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(turned.into_iter().cycle()) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upgrade::{parse_request, parse_response};
    use proptest::prelude::*;

    fn decode(role: Role, bytes: &[u8]) -> Result<(Vec<u8>, Decoder), WebSocketError> {
        let (mut decoder, mut bytes) = (Decoder::new(role), bytes.to_vec());
        let kept = decoder.decode(&mut bytes)?;
        bytes.truncate(kept);
        Ok((bytes, decoder))
    }

    #[test]
    fn the_example_of_the_rfc_is_answered_as_there() {
        // RFC 6455 §1.3.
        assert_eq!(answer_to("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn both_ends_understand_each_other_and_refuse_others() {
        let (request, _) = parse_request(&request("relay.example", [7; 16], Some("1a"))).unwrap().unwrap();
        assert_eq!(crate::upgrade::asked(&request), crate::upgrade::Asked::WebSocket);
        let (response, _) = parse_response(&accepted(&request).unwrap()).unwrap().unwrap();
        assert_eq!((response.status, check_response(&response, [7; 16])), (101, Ok(())));
        assert!(check_response(&response, [8; 16]).is_err());
        for (from, to) in [("13", "8"), ("GET", "POST"), ("BwcH", "Bwc")] {
            let bytes = String::from_utf8(super::request("h", [7; 16], None)).unwrap().replace(from, to);
            let (request, _) = parse_request(bytes.as_bytes()).unwrap().unwrap();
            assert!(accepted(&request).is_err(), "{to}");
        }
    }

    #[test]
    fn the_examples_of_the_rfc_are_read() {
        // RFC 6455 §5.7, with binary in place of text.
        let masked = [0x82, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        assert_eq!(decode(Role::Server, &masked).unwrap().0, b"Hello");
        let pieces = [0x02, 0x03, 0x48, 0x65, 0x6c, 0x80, 0x02, 0x6c, 0x6f];
        assert_eq!(decode(Role::Client, &pieces).unwrap().0, b"Hello");
        let mut out = BytesMut::new();
        let ping = [0x89, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        decode(Role::Server, &ping).unwrap().1.answer([0; 4], &mut out);
        assert_eq!(out[..], [0x8a, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f]);
    }

    #[test]
    fn control_frames_may_stand_between_the_pieces_of_a_message() {
        let bytes = [0x02, 1, b'a', 0x89, 1, b'1', 0x00, 1, b'b', 0x89, 1, b'2', 0x8a, 0, 0x80, 1, b'c', 0x88, 0, 0x82];
        let (payload, mut decoder) = decode(Role::Client, &bytes).unwrap();
        assert_eq!((&payload[..], decoder.is_closed()), (&b"abc"[..], true));
        let mut out = BytesMut::new();
        decoder.answer([1; 4], &mut out);
        decoder.answer([1; 4], &mut out);
        assert_eq!(out[..], [0x8a, 0x81, 1, 1, 1, 1, b'2' ^ 1], "the newest ping, once");
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        let huge = [0x82, 127, 0, 0, 0, 0, 1, 0, 0, 1];
        let cases: [(&str, Role, &[u8]); 9] = [
            ("masked by a server", Role::Client, &[0x82, 0x80]),
            ("bare from a client", Role::Server, &[0x82, 0x00]),
            ("compressed", Role::Client, &[0xc2, 0]),
            ("text", Role::Client, &[0x81, 0]),
            ("unknown", Role::Client, &[0x83, 0]),
            ("a rest without a beginning", Role::Client, &[0x80, 0]),
            ("a beginning within a message", Role::Client, &[0x02, 0, 0x02, 0]),
            ("a long ping", Role::Client, &[0x89, 126, 0, 126]),
            ("16 MiB and a byte", Role::Client, &huge),
        ];
        for (what, role, bytes) in cases {
            assert!(decode(role, bytes).is_err(), "{what}");
        }
    }

    #[test]
    fn lengths_are_written_in_the_shortest_form() {
        for (len, header) in [(125, 2), (126, 4), (65_535, 4), (65_536, 10)] {
            let mut out = BytesMut::new();
            encode_message(Role::Server, [0; 4], &vec![1; len], &mut out);
            assert_eq!(out.len(), len + header, "{len}");
            assert_eq!(decode(Role::Client, &out).unwrap().0.len(), len);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_are_a_stream_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            at in 0usize..300,
            server in any::<bool>(),
        ) {
            let role = if server { Role::Server } else { Role::Client };
            let at = at.min(bytes.len());
            let whole = decode(role, &bytes).map(|(payload, _)| payload);
            let mut decoder = Decoder::new(role);
            let (mut first, mut second) = (bytes[..at].to_vec(), bytes[at..].to_vec());
            let mut pieces = || {
                let kept = decoder.decode(&mut first)?;
                first.truncate(kept);
                let kept = decoder.decode(&mut second)?;
                second.truncate(kept);
                Ok([&first[..], &second[..]].concat())
            };
            prop_assert_eq!(pieces(), whole);
        }

        #[test]
        fn what_is_written_is_read_in_any_pieces(
            messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..400), 0..8),
            mask in any::<[u8; 4]>(),
            piece in 1usize..50,
            client in any::<bool>(),
        ) {
            let (from, to) = if client { (Role::Client, Role::Server) } else { (Role::Server, Role::Client) };
            let mut bytes = BytesMut::new();
            for message in &messages {
                encode_message(from, mask, message, &mut bytes);
            }
            let (mut decoder, mut got) = (Decoder::new(to), Vec::new());
            for piece in bytes.chunks_mut(piece) {
                let kept = decoder.decode(piece).unwrap();
                got.extend_from_slice(&piece[..kept]);
            }
            prop_assert_eq!(got, messages.concat());
        }
    }
}
