//! The IPv6 header and its extension headers (RFC 8200 §3, §4).
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | version (6), traffic class, flow label |
//! | 4 | 2 | payload length |
//! | 6 | 1 | next header |
//! | 7 | 1 | hop limit |
//! | 8 | 16 | source |
//! | 24 | 16 | destination |
//!
//! Extension headers begin with the next header's number and, but for the fragment header (8 bytes), their own length.

use std::net::Ipv6Addr;

use super::{Fragment, Malformed, Protocol};

/// The length of the fixed header.
pub const HEADER_LEN: usize = 40;

/// Real packets carry at most a handful; more is an attack on whoever walks them.
const MAX_EXTENSIONS: usize = 8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// A checked view of one IPv6 packet.
#[derive(Debug, Clone, Copy)]
pub struct Ipv6<'a> {
    header: &'a [u8; HEADER_LEN],
    payload: &'a [u8],
}

/// What lies behind the extension headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upper<'a> {
    /// The transport protocol.
    pub protocol: Protocol,
    /// Whether the packet is whole.
    pub fragment: Fragment,
    /// The bytes from the transport header on.
    pub payload: &'a [u8],
}

impl<'a> Ipv6<'a> {
    /// Checks version and length.
    ///
    /// # Errors
    /// [`Malformed`] says what is wrong.
    pub fn new(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let header = bytes.first_chunk::<HEADER_LEN>().ok_or(Malformed::Header)?;
        if header[0] >> 4 != 6 {
            return Err(Malformed::Version);
        }
        let len = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let payload = bytes.get(HEADER_LEN..HEADER_LEN + len).ok_or(Malformed::Length)?;
        Ok(Self { header, payload })
    }

    /// The sender.
    #[must_use]
    pub fn source(&self) -> Ipv6Addr {
        address(&self.header[8..24])
    }

    /// The receiver.
    #[must_use]
    pub fn destination(&self) -> Ipv6Addr {
        address(&self.header[24..40])
    }

    /// Walks the extension headers to the transport protocol.
    ///
    /// # Errors
    /// [`Malformed`] if a header is cut off or there are too many.
    pub fn upper(&self) -> Result<Upper<'a>, Malformed> {
        let (mut next, mut rest, mut fragment) = (self.header[6], self.payload, Fragment::Whole);
        for _ in 0..MAX_EXTENSIONS {
            let len = match next {
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                    (usize::from(*rest.get(1).ok_or(Malformed::Header)?) + 1) * 8
                }
                AUTHENTICATION => (usize::from(*rest.get(1).ok_or(Malformed::Header)?) + 2) * 4,
                FRAGMENT => 8,
                _ => return Ok(Upper { protocol: Protocol(next), fragment, payload: rest }),
            };
            let (extension, behind) = rest.split_at_checked(len).ok_or(Malformed::Header)?;
            if next == FRAGMENT {
                let word = u16::from_be_bytes([extension[2], extension[3]]);
                let offset = usize::from(word & 0xfff8);
                fragment = match (offset, word & 1 != 0) {
                    (0, false) => Fragment::Whole,
                    (0, true) => Fragment::First,
                    (offset, _) => Fragment::Later { offset },
                };
            }
            (next, rest) = (extension[0], behind);
            if matches!(fragment, Fragment::Later { .. }) {
                return Ok(Upper { protocol: Protocol(next), fragment, payload: rest });
            }
        }
        Err(Malformed::Extensions)
    }
}

fn address(bytes: &[u8]) -> Ipv6Addr {
    bytes.first_chunk::<16>().copied().unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extension_headers_are_walked() {
        let mut hop = vec![FRAGMENT, 0];
        hop.extend([1, 4, 0, 0, 0, 0]);
        let bytes = packet(HOP_BY_HOP, &[&hop, &[17, 0, 0, 1, 0, 0, 0, 9], &[0, 1, 0, 2, 0, 8, 0, 0]]);
        let upper = Ipv6::new(&bytes).unwrap().upper().unwrap();
        assert_eq!((upper.protocol, upper.fragment), (Protocol::UDP, Fragment::First));
        assert_eq!(upper.payload, [0, 1, 0, 2, 0, 8, 0, 0]);
    }

    #[test]
    fn later_fragments_keep_their_offset() {
        let bytes = packet(FRAGMENT, &[&[6, 0, 0x05, 0xa8, 0, 0, 0, 9], b"tail"]);
        let upper = Ipv6::new(&bytes).unwrap().upper().unwrap();
        assert_eq!(upper.fragment, Fragment::Later { offset: 0x5a8 });
        assert_eq!(upper.payload, b"tail");
    }

    #[test]
    fn endless_and_cut_off_extensions_are_malformed() {
        let endless = packet(DESTINATION_OPTIONS, &[&[DESTINATION_OPTIONS, 0, 0, 0, 0, 0, 0, 0].repeat(20)]);
        assert_eq!(Ipv6::new(&endless).unwrap().upper().unwrap_err(), Malformed::Extensions);
        let cut = packet(ROUTING, &[&[17, 3, 0, 0, 0, 0, 0, 0]]);
        assert_eq!(Ipv6::new(&cut).unwrap().upper().unwrap_err(), Malformed::Header);
        assert_eq!(Ipv6::new(&cut[..47]).unwrap_err(), Malformed::Length);
    }

    fn packet(next: u8, parts: &[&[u8]]) -> Vec<u8> {
        let payload = parts.concat();
        let mut bytes = vec![0; HEADER_LEN];
        bytes[0] = 0x60;
        bytes[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap().to_be_bytes());
        bytes[6] = next;
        bytes.extend(payload);
        bytes
    }
}
