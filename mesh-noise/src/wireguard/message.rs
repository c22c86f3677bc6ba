//! The four messages on the wire (whitepaper §5.4). Integers are little-endian.
//!
//! ```text
//! initiation, 148 bytes      response, 92 bytes         cookie reply, 64 bytes   transport data, 32 + n bytes
//!   0  4  type, 1              0  4  type, 2              0  4  type, 3            0  4  type, 4
//!   4  4  sender index         4  4  sender index         4  4  receiver index     4  4  receiver index
//!   8 32  ephemeral            8  4  receiver index       8 24  nonce              8  8  counter
//!  40 48  static, sealed      12 32  ephemeral           32 32  cookie, sealed    16  n  packet, sealed, n ≡ 0 mod 16
//!  88 28  timestamp, sealed   44 16  tag over nothing                               then  16 bytes of tag
//! 116 16  mac1                60 16  mac1
//! 132 16  mac2                76 16  mac2
//! ```
//!
//! The type is one byte followed by three reserved zero bytes. A datagram is one message; handshake messages have
//! exactly the length above. Some senders do not pad the packet, so a length that is no multiple of 16 is taken too.

use super::Reject;
use crate::noise::ikpsk2::{MESSAGE_ONE_LEN, MESSAGE_TWO_LEN};

/// Length of a handshake initiation in bytes.
pub const INITIATION_LEN: usize = 148;
/// Length of a handshake response in bytes.
pub const RESPONSE_LEN: usize = 92;
/// Length of a cookie reply in bytes.
pub const COOKIE_REPLY_LEN: usize = 64;
/// Length of transport data that carries nothing (a keepalive), the shortest there is.
pub const KEEPALIVE_LEN: usize = 32;
/// Length of each of the two MACs that end a handshake message.
pub const MAC_LEN: usize = 16;

const INITIATION: u32 = 1;
const RESPONSE: u32 = 2;
const COOKIE_REPLY: u32 = 3;
const TRANSPORT_DATA: u32 = 4;

/// What a datagram claims to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageKind {
    /// The first message of a handshake.
    Initiation,
    /// The second message of a handshake.
    Response,
    /// The answer of a responder under load.
    CookieReply,
    /// A sealed packet, or a keepalive.
    TransportData {
        /// The index under which the receiver keeps the session.
        receiver: u32,
    },
}

/// Tells what a datagram is by its first four bytes and its length; `None` if it is not WireGuard's.
#[must_use]
pub fn kind(datagram: &[u8]) -> Option<MessageKind> {
    match (u32_at(datagram, 0)?, datagram.len()) {
        (INITIATION, INITIATION_LEN) => Some(MessageKind::Initiation),
        (RESPONSE, RESPONSE_LEN) => Some(MessageKind::Response),
        (COOKIE_REPLY, COOKIE_REPLY_LEN) => Some(MessageKind::CookieReply),
        (TRANSPORT_DATA, KEEPALIVE_LEN..) => Some(MessageKind::TransportData { receiver: u32_at(datagram, 4)? }),
        _ => None,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Writes type, receiver index and counter of transport data.
pub(crate) fn write_transport_header(header: &mut [u8; 16], receiver: u32, counter: u64) {
    header[..4].copy_from_slice(&TRANSPORT_DATA.to_le_bytes());
    header[4..8].copy_from_slice(&receiver.to_le_bytes());
    header[8..].copy_from_slice(&counter.to_le_bytes());
}

/// The counter of a datagram whose kind is transport data.
pub(crate) fn transport_counter(datagram: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(*datagram.get(8..)?.first_chunk()?))
}

/// A handshake initiation, by fields. The MACs stay with the raw bytes ([`super::cookie`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Initiation {
    pub(crate) sender: u32,
    pub(crate) noise: [u8; MESSAGE_ONE_LEN],
}

impl Initiation {
    pub(crate) fn parse(datagram: &[u8]) -> Result<Self, Reject> {
        if kind(datagram) != Some(MessageKind::Initiation) {
            return Err(Reject::Malformed);
        }
        let sender = u32_at(datagram, 4).ok_or(Reject::Malformed)?;
        let noise = *datagram[8..].first_chunk().ok_or(Reject::Malformed)?;
        Ok(Self { sender, noise })
    }

    /// The message with both MACs zero.
    pub(crate) fn to_bytes(self) -> [u8; INITIATION_LEN] {
        let mut bytes = [0; INITIATION_LEN];
        bytes[..4].copy_from_slice(&INITIATION.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.sender.to_le_bytes());
        bytes[8..116].copy_from_slice(&self.noise);
        bytes
    }
}

/// A handshake response, by fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) sender: u32,
    pub(crate) receiver: u32,
    pub(crate) noise: [u8; MESSAGE_TWO_LEN],
}

impl Response {
    pub(crate) fn parse(datagram: &[u8]) -> Result<Self, Reject> {
        if kind(datagram) != Some(MessageKind::Response) {
            return Err(Reject::Malformed);
        }
        let sender = u32_at(datagram, 4).ok_or(Reject::Malformed)?;
        let receiver = u32_at(datagram, 8).ok_or(Reject::Malformed)?;
        let noise = *datagram[12..].first_chunk().ok_or(Reject::Malformed)?;
        Ok(Self { sender, receiver, noise })
    }

    /// The message with both MACs zero.
    pub(crate) fn to_bytes(self) -> [u8; RESPONSE_LEN] {
        let mut bytes = [0; RESPONSE_LEN];
        bytes[..4].copy_from_slice(&RESPONSE.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.sender.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.receiver.to_le_bytes());
        bytes[12..60].copy_from_slice(&self.noise);
        bytes
    }
}

/// A cookie reply, by fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CookieReply {
    pub(crate) receiver: u32,
    pub(crate) nonce: [u8; 24],
    /// Cookie (16 bytes) and tag.
    pub(crate) sealed: [u8; 32],
}

impl CookieReply {
    pub(crate) fn parse(datagram: &[u8]) -> Result<Self, Reject> {
        if kind(datagram) != Some(MessageKind::CookieReply) {
            return Err(Reject::Malformed);
        }
        let receiver = u32_at(datagram, 4).ok_or(Reject::Malformed)?;
        let nonce = *datagram[8..].first_chunk().ok_or(Reject::Malformed)?;
        let sealed = *datagram[32..].first_chunk().ok_or(Reject::Malformed)?;
        Ok(Self { receiver, nonce, sealed })
    }

    pub(crate) fn to_bytes(self) -> [u8; COOKIE_REPLY_LEN] {
        let mut bytes = [0; COOKIE_REPLY_LEN];
        bytes[..4].copy_from_slice(&COOKIE_REPLY.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.receiver.to_le_bytes());
        bytes[8..32].copy_from_slice(&self.nonce);
        bytes[32..].copy_from_slice(&self.sealed);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn kind_and_length_go_together() {
        for (first, len, expected) in [
            (1, 148, Some(MessageKind::Initiation)),
            (1, 147, None),
            (2, 92, Some(MessageKind::Response)),
            (2, 148, None),
            (3, 64, Some(MessageKind::CookieReply)),
            (4, 32, Some(MessageKind::TransportData { receiver: 0 })),
            (4, 1500, Some(MessageKind::TransportData { receiver: 0 })),
            (4, 31, None),
            (5, 64, None),
            (0, 0, None),
        ] {
            let mut datagram = vec![0; len];
            if let Some(byte) = datagram.first_mut() {
                *byte = first;
            }
            assert_eq!(kind(&datagram), expected, "type {first}, {len} bytes");
        }
        let mut reserved = vec![0; 64];
        reserved[..4].copy_from_slice(&[3, 0, 1, 0]);
        assert_eq!(kind(&reserved), None, "reserved bytes are zero");
    }

    proptest! {
        #[test]
        fn parsers_survive_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200), first in 0u8..6) {
            let mut bytes = bytes;
            if bytes.len() > 4 {
                bytes[..4].copy_from_slice(&[first, 0, 0, 0]);
            }
            let _ = kind(&bytes);
            let _ = (Initiation::parse(&bytes), Response::parse(&bytes), CookieReply::parse(&bytes));
            let _ = transport_counter(&bytes);
        }

        #[test]
        fn fields_survive_the_wire(sender: u32, receiver: u32, fill: u8) {
            let initiation = Initiation { sender, noise: [fill; MESSAGE_ONE_LEN] };
            prop_assert_eq!(Initiation::parse(&initiation.to_bytes()), Ok(initiation));
            let response = Response { sender, receiver, noise: [fill; MESSAGE_TWO_LEN] };
            prop_assert_eq!(Response::parse(&response.to_bytes()), Ok(response));
            let reply = CookieReply { receiver, nonce: [fill; 24], sealed: [!fill; 32] };
            prop_assert_eq!(CookieReply::parse(&reply.to_bytes()), Ok(reply));
        }
    }
}
