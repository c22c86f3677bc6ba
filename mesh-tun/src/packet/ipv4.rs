//! The IPv4 header (RFC 791 §3.1).
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 1 | version (4) and header length in words |
//! | 2 | 2 | total length |
//! | 6 | 2 | flags (bit 13: more fragments) and fragment offset in units of 8 bytes |
//! | 8 | 1 | time to live |
//! | 9 | 1 | protocol |
//! | 10 | 2 | header checksum |
//! | 12 | 4 | source |
//! | 16 | 4 | destination |
//! | 20 | 0–40 | options |

use std::net::Ipv4Addr;

use super::{Fragment, Malformed, Protocol};

/// The length of a header without options.
pub const HEADER_LEN: usize = 20;

/// A checked view of one IPv4 packet. The header checksum is not verified.
#[derive(Debug, Clone, Copy)]
pub struct Ipv4<'a> {
    header: &'a [u8; HEADER_LEN],
    payload: &'a [u8],
}

impl<'a> Ipv4<'a> {
    /// Checks version and lengths.
    ///
    /// # Errors
    /// [`Malformed`] says what is wrong.
    pub fn new(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let header = bytes.first_chunk::<HEADER_LEN>().ok_or(Malformed::Header)?;
        if header[0] >> 4 != 4 {
            return Err(Malformed::Version);
        }
        let header_len = usize::from(header[0] & 0xf) * 4;
        let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if header_len < HEADER_LEN || total_len < header_len {
            return Err(Malformed::Length);
        }
        let payload = bytes.get(header_len..total_len).ok_or(Malformed::Length)?;
        Ok(Self { header, payload })
    }

    /// The sender.
    #[must_use]
    pub fn source(&self) -> Ipv4Addr {
        let [.., a, b, c, d, _, _, _, _] = *self.header;
        Ipv4Addr::new(a, b, c, d)
    }

    /// The receiver.
    #[must_use]
    pub fn destination(&self) -> Ipv4Addr {
        let [.., a, b, c, d] = *self.header;
        Ipv4Addr::new(a, b, c, d)
    }

    /// The transport protocol.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        Protocol(self.header[9])
    }

    /// Whether the packet is whole.
    #[must_use]
    pub fn fragment(&self) -> Fragment {
        let word = u16::from_be_bytes([self.header[6], self.header[7]]);
        let offset = usize::from(word & 0x1fff) * 8;
        match (offset, word & 0x2000 != 0) {
            (0, false) => Fragment::Whole,
            (0, true) => Fragment::First,
            (offset, _) => Fragment::Later { offset },
        }
    }

    /// The bytes behind the header, up to the total length.
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_fields_are_where_rfc_791_puts_them() {
        let mut bytes = [0; 28];
        bytes[..20].copy_from_slice(&[0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0, 100, 64, 0, 1, 100, 101, 102, 103]);
        let ip = Ipv4::new(&bytes).unwrap();
        assert_eq!(ip.source(), Ipv4Addr::new(100, 64, 0, 1));
        assert_eq!(ip.destination(), Ipv4Addr::new(100, 101, 102, 103));
        assert_eq!((ip.protocol(), ip.payload().len(), ip.fragment()), (Protocol::UDP, 8, Fragment::Whole));
        bytes[6] = 0x20;
        assert_eq!(Ipv4::new(&bytes).unwrap().fragment(), Fragment::First);
        bytes[7] = 2;
        assert_eq!(Ipv4::new(&bytes).unwrap().fragment(), Fragment::Later { offset: 16 });
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let mut bytes = [0; 24];
        (bytes[0], bytes[3]) = (0x45, 25);
        assert_eq!(Ipv4::new(&bytes).unwrap_err(), Malformed::Length);
        bytes[3] = 19;
        assert_eq!(Ipv4::new(&bytes).unwrap_err(), Malformed::Length);
        (bytes[0], bytes[3]) = (0x44, 24);
        assert_eq!(Ipv4::new(&bytes).unwrap_err(), Malformed::Length);
        assert_eq!(Ipv4::new(&bytes[..19]).unwrap_err(), Malformed::Header);
    }
}
