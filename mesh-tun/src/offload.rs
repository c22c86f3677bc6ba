//! Segmentation offloads: super-packets of up to 64 KiB, cut into packets and put together again. Pure; no I/O.
//!
//! A TUN device with virtio headers hands over what a sender had not cut into packets yet, and takes what a receiver
//! would join anyway. Both save the host's network stack the work of one packet for each of up to 50.
//!
//! ```text
//! super-packet:  │ virtio header │ IP, TCP/UDP header │ payload                                  │
//!                                          ▼ segment                    ▲ coalesce
//! packets:       │ IP, TCP/UDP │ payload │   │ IP, TCP/UDP │ payload │   │ IP, TCP/UDP │ rest │
//! ```
//!
//! Before every packet or super-packet stands a virtio header (virtio 1.2 §5.1.6), integers in the host's byte order:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 1 | flags: 1 = the transport checksum is to be completed |
//! | 1 | 1 | kind of super-packet: 0 none, 1 TCP/IPv4, 4 TCP/IPv6, 5 UDP; 0x80 added: TCP with ECN |
//! | 2 | 2 | length of all headers (a hint) |
//! | 4 | 2 | payload bytes in each segment but the last |
//! | 6 | 2 | where the checksummed part begins: the transport header |
//! | 8 | 2 | where in that part the checksum stands |
//!
//! A checksum to be completed holds the sum over the pseudo header, folded and not complemented.

pub mod coalesce;
pub mod segment;

pub use coalesce::Coalescer;
pub use segment::Segments;

/// The length of a virtio header.
pub const HEADER_LEN: usize = 10;

/// The longest IP packet, and so the longest super-packet.
pub const MAX_PACKET: usize = 65_535;

const NEEDS_CHECKSUM: u8 = 1;
const ECN: u8 = 0x80;

/// What kind of super-packet follows a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One packet.
    Single,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams of one length, over either version.
    Udp,
}

/// A virtio header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Whether the transport checksum is to be completed; always, for a super-packet.
    pub needs_checksum: bool,
    /// Bytes of IP and transport header. Only a hint.
    pub header_len: u16,
    /// Payload bytes of each segment but the last; 0 for one packet.
    pub segment_size: u16,
    /// Where the transport header begins.
    pub checksum_start: u16,
    /// Where in the transport header the checksum stands.
    pub checksum_offset: u16,
}

/// Why a super-packet cannot be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unusable {
    /// The kind is none that was asked for.
    #[error("unknown kind of super-packet")]
    Kind,
    /// The offsets in the virtio header point outside the headers of the packet, or name another protocol.
    #[error("offload header does not fit the packet")]
    Header,
    /// A segment does not fit where it shall be written.
    #[error("segment is longer than its slot")]
    Size,
}

impl Header {
    /// The header of a packet that is whole and has its checksums.
    pub const SINGLE: Self = Self {
        kind: Kind::Single,
        needs_checksum: false,
        header_len: 0,
        segment_size: 0,
        checksum_start: 0,
        checksum_offset: 0,
    };

    /// Reads a header.
    ///
    /// # Errors
    /// [`Unusable::Kind`].
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, Unusable> {
        let kind = match bytes[1] & !ECN {
            0 => Kind::Single,
            1 => Kind::Tcp4,
            4 => Kind::Tcp6,
            5 => Kind::Udp,
            _ => return Err(Unusable::Kind),
        };
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Ok(Self {
            kind,
            needs_checksum: bytes[0] & NEEDS_CHECKSUM != 0,
            header_len: word(2),
            segment_size: word(4),
            checksum_start: word(6),
            checksum_offset: word(8),
        })
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = if self.needs_checksum { NEEDS_CHECKSUM } else { 0 };
        bytes[1] = match self.kind {
            Kind::Single => 0,
            Kind::Tcp4 => 1,
            Kind::Tcp6 => 4,
            Kind::Udp => 5,
        };
        let words = [self.header_len, self.segment_size, self.checksum_start, self.checksum_offset];
        for (room, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            room.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// A length inside a packet: no packet is longer than its 16-bit length field says.
fn short(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests;
