//! Cutting super-packets into packets.

use super::{Header, Kind, Unusable, short};
use crate::packet::checksum::{Sum, pseudo_header};
use crate::packet::{self, Protocol, checksum, ipv4, ipv6};

const TCP_FLAGS: usize = 13;
/// FIN and PSH belong to the last byte, so only the last segment keeps them.
const LAST_ONLY: u8 = 0x01 | 0x08;
/// CWR answers once, so only the first segment keeps it.
const FIRST_ONLY: u8 = 0x80;

/// The packets in one super-packet, written one after another to wherever there is room.
///
/// Holds only numbers: the super-packet itself is lent for each segment, so that the rest of one can wait for the next
/// batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    header: Header,
    /// Bytes of IP header, and of IP and transport header.
    transport_at: usize,
    payload_at: usize,
    /// Bytes of the whole super-packet, and those cut already.
    len: usize,
    done: usize,
    /// Segments cut already.
    index: u16,
}

impl Segments {
    /// Looks at a packet or super-packet with its virtio header.
    ///
    /// # Errors
    /// [`Unusable::Header`] if the two contradict each other.
    pub fn new(header: Header, packet: &[u8]) -> Result<Self, Unusable> {
        let transport_at = usize::from(header.checksum_start);
        let field = transport_at + usize::from(header.checksum_offset);
        let mut segments = Self { header, transport_at, payload_at: 0, len: packet.len(), done: 0, index: 0 };
        if header.kind == Kind::Single {
            let fits = !header.needs_checksum || field + 2 <= packet.len();
            return if fits { Ok(segments) } else { Err(Unusable::Header) };
        }
        let version = packet.first().map(|byte| byte >> 4).ok_or(Unusable::Header)?;
        let (minimum, right) = match header.kind {
            Kind::Single | Kind::Udp => (if version == 4 { ipv4::HEADER_LEN } else { ipv6::HEADER_LEN }, true),
            Kind::Tcp4 => (ipv4::HEADER_LEN, version == 4),
            Kind::Tcp6 => (ipv6::HEADER_LEN, version == 6),
        };
        let ip_len = if version == 4 { usize::from(packet[0] & 0xf) * 4 } else { transport_at };
        let transport = packet.get(transport_at..).ok_or(Unusable::Header)?;
        let transport_len = match header.kind {
            Kind::Udp => 8,
            Kind::Single | Kind::Tcp4 | Kind::Tcp6 => {
                usize::from(transport.get(TCP_FLAGS - 1).ok_or(Unusable::Header)? >> 4) * 4
            }
        };
        segments.payload_at = transport_at + transport_len;
        segments.done = segments.payload_at;
        let shortest = if header.kind == Kind::Udp { 8 } else { 20 };
        let plausible = right
            && matches!(version, 4 | 6)
            && transport_at >= minimum
            && transport_at == ip_len
            && transport_len >= shortest
            && segments.payload_at < packet.len()
            && packet.len() <= super::MAX_PACKET
            && header.segment_size > 0;
        if plausible { Ok(segments) } else { Err(Unusable::Header) }
    }

    /// How many packets are left to be written.
    #[must_use]
    pub fn remaining(&self) -> usize {
        match self.header.kind {
            Kind::Single => usize::from(self.index == 0),
            Kind::Tcp4 | Kind::Tcp6 | Kind::Udp => {
                (self.len - self.done).div_ceil(usize::from(self.header.segment_size))
            }
        }
    }

    /// Writes the next packet to the beginning of `out` and returns its length; none when all are written.
    ///
    /// `packet` is the one given to [`Segments::new`].
    ///
    /// # Errors
    /// [`Unusable::Size`] if `out` is too short for it; the packet is then passed over.
    pub fn write_next(&mut self, packet: &[u8], out: &mut [u8]) -> Option<Result<usize, Unusable>> {
        if self.remaining() == 0 || packet.len() != self.len {
            return None;
        }
        let (index, from) = (self.index, self.done);
        self.index = self.index.wrapping_add(1);
        if self.header.kind == Kind::Single {
            let Some(room) = out.get_mut(..self.len) else { return Some(Err(Unusable::Size)) };
            room.copy_from_slice(packet);
            if self.header.needs_checksum {
                complete(room, self.transport_at, usize::from(self.header.checksum_offset));
            }
            return Some(Ok(self.len));
        }
        let size = (self.len - from).min(usize::from(self.header.segment_size));
        self.done += size;
        let len = self.payload_at + size;
        let Some(room) = out.get_mut(..len) else { return Some(Err(Unusable::Size)) };
        let (headers, payload) = room.split_at_mut(self.payload_at);
        headers.copy_from_slice(&packet[..self.payload_at]);
        payload.copy_from_slice(&packet[from..from + size]);
        self.finish(room, index, from - self.payload_at, self.done == self.len);
        Some(Ok(len))
    }

    /// Makes the copied headers those of segment `index`, whose payload begins `offset` bytes into the whole.
    fn finish(&self, segment: &mut [u8], index: u16, offset: usize, is_last: bool) {
        let len = segment.len();
        if segment[0] >> 4 == 4 {
            segment[2..4].copy_from_slice(&short(len).to_be_bytes());
            let id = u16::from_be_bytes([segment[4], segment[5]]).wrapping_add(index);
            segment[4..6].copy_from_slice(&id.to_be_bytes());
            segment[10..12].fill(0);
            let sum = Sum::default().bytes(&segment[..self.transport_at]).finish();
            segment[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            segment[4..6].copy_from_slice(&short(len - ipv6::HEADER_LEN).to_be_bytes());
        }
        let (Some(source), Some(destination)) = (packet::source(segment), packet::destination(segment)) else { return };
        let transport = &mut segment[self.transport_at..];
        let (protocol, field) = if self.header.kind == Kind::Udp {
            let len = short(transport.len());
            transport[4..6].copy_from_slice(&len.to_be_bytes());
            (Protocol::UDP, 6)
        } else {
            let sequence = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            let sequence = sequence.wrapping_add(u32::try_from(offset).unwrap_or(0));
            transport[4..8].copy_from_slice(&sequence.to_be_bytes());
            transport[TCP_FLAGS] &= !(if is_last { 0 } else { LAST_ONLY } | if index == 0 { 0 } else { FIRST_ONLY });
            (Protocol::TCP, 16)
        };
        transport[field..field + 2].fill(0);
        let sum = pseudo_header(source, destination, protocol, transport.len()).bytes(transport).finish();
        put_checksum(transport, field, sum, protocol == Protocol::UDP);
    }
}

/// Completes the checksum over `packet[start..]`, whose field holds the sum over the pseudo header.
fn complete(packet: &mut [u8], start: usize, offset: usize) {
    let sum = checksum::Sum::default().bytes(&packet[start..]).finish();
    // Of the protocols that the kernel leaves to us, only UDP's checksum stands at 6.
    put_checksum(&mut packet[start..], offset, sum, offset == 6);
}

/// UDP writes a checksum of zero as ones, since zero says that there is none (RFC 768).
fn put_checksum(transport: &mut [u8], field: usize, sum: u16, is_udp: bool) {
    let sum = if is_udp && sum == 0 { u16::MAX } else { sum };
    transport[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}
