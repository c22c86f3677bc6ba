//! The header in front of what goes through a peer relay (RFC 8926 §3.4, without options).

use crate::classify::GENEVE_LEN;
use crate::path::Vni;

/// What follows the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Disco between the two clients.
    Disco,
    /// Disco between a client and the server: the binding handshake.
    Control,
    /// WireGuard between the two clients.
    WireGuard,
}

/// A header as the server reads it: what it forwards is not its business.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The pair.
    pub vni: Vni,
    /// Whether it is for the server itself.
    pub control: bool,
}

/// The header for `content`.
#[must_use]
pub const fn header(vni: Vni, content: Content) -> [u8; GENEVE_LEN] {
    let [_, high, middle, low] = vni.get().to_be_bytes();
    let (flags, protocol) = match content {
        Content::Disco => (0, 0x11),
        Content::Control => (0x80, 0x11),
        Content::WireGuard => (0, 0x12),
    };
    [0, flags, 0x7a, protocol, high, middle, low, 0]
}

/// `payload` behind a header.
#[must_use]
pub fn encapsulate(vni: Vni, content: Content, payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::with_capacity(GENEVE_LEN + payload.len());
    datagram.extend_from_slice(&header(vni, content));
    datagram.extend_from_slice(payload);
    datagram
}

/// Reads a header and what follows it; `None` if it is none, has options, or is of another version.
#[must_use]
pub fn split(datagram: &[u8]) -> Option<(Header, &[u8])> {
    let (header, payload) = datagram.split_first_chunk::<GENEVE_LEN>()?;
    let plain = header[0] == 0 && header[1] & 0x3f == 0 && header[7] == 0;
    let vni = Vni::from_bytes([header[4], header[5], header[6]]);
    plain.then_some((Header { vni, control: header[1] & 0x80 != 0 }, payload))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::{Class, classify};

    #[test]
    fn what_is_written_is_classified_as_such() {
        let vni = Vni::new(0x01_02_03).unwrap();
        let mut disco = crate::disco::seal::MAGIC.to_vec();
        disco.extend([9; 74]);
        let classified = |content, payload: &[u8]| classify(&encapsulate(vni, content, payload));
        assert_eq!(classified(Content::Disco, &disco), Class::RelayedDisco { vni, control: false });
        assert_eq!(classified(Content::Control, &disco), Class::RelayedDisco { vni, control: true });
        assert_eq!(classified(Content::WireGuard, &[4, 0, 0, 0]), Class::RelayedWireGuard { vni });
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let vni = Vni::new((1 << 24) - 1).unwrap();
        for (content, control) in [(Content::Disco, false), (Content::Control, true), (Content::WireGuard, false)] {
            let datagram = encapsulate(vni, content, b"x");
            assert_eq!(split(&datagram), Some((Header { vni, control }, &b"x"[..])));
        }
        assert_eq!(split(&[0; 7]), None, "too short");
        assert_eq!(split(&[0x40, 0, 0x7a, 0x12, 0, 0, 1, 0]), None, "another version");
        assert_eq!(split(&[1, 0, 0x7a, 0x12, 0, 0, 1, 0]), None, "options");
        assert_eq!(split(&[0, 1, 0x7a, 0x12, 0, 0, 1, 0]), None, "a reserved bit");
    }
}
