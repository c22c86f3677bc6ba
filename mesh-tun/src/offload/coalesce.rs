//! Putting packets together to super-packets, without moving them: a plan says which to write in one go.
//!
//! Packets of one TCP or UDP flow join when they follow one another exactly and cutting the super-packet would give them
//! back: equal headers, one payload length (the last may be shorter), sequence numbers and IPv4 identifications in order,
//! right checksums. PSH ends a super-packet. Everything else stays alone.
//!
//! The order inside a flow never changes: a packet joins only the newest group of its flow, and groups are written in the
//! order of their first packets. What cannot be told to be of a flow (fragments, IP options and extension headers) lets
//! nothing pass it.

use super::{HEADER_LEN, Header, Kind, MAX_PACKET, short};
use crate::batch::Batch;
use crate::packet::checksum::{Sum, pseudo_header};
use crate::packet::{self, Protocol, ipv4, ipv6};

/// The most packets that join.
pub const MAX_JOINED: usize = 64;

/// How many of the latest groups are searched for a packet's flow; in older ones it counts as new.
const SEARCHED: usize = 16;

/// The longest headers of what joins: IPv6 and TCP with all its options.
const MAX_HEADERS: usize = ipv6::HEADER_LEN + 60;

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const DONT_FRAGMENT: u8 = 0x40;

/// Plans how a batch is written. The lists are kept from batch to batch for their memory alone.
#[derive(Debug, Default)]
pub struct Coalescer {
    groups: Vec<Group>,
    /// For each packet the next one of its group.
    next: Vec<usize>,
}

/// Packets that are written in one go.
#[derive(Debug, Clone)]
pub struct Group {
    first: usize,
    last: usize,
    count: usize,
    /// Bytes of the super-packet.
    len: usize,
    joining: Option<Joining>,
}

/// What the next packet of an open group has to look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Joining {
    shape: Shape,
    /// Whether the first packet's checksum has been found right.
    verified: bool,
    closed: bool,
}

/// A packet that might join others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    protocol: Protocol,
    transport_at: usize,
    payload_at: usize,
    payload: usize,
    sequence: u32,
    pushed: bool,
}

/// What a packet is to the coalescer.
enum Class {
    /// May join others of its flow.
    Joinable(Shape),
    /// Of a flow that can be told, but alone.
    Alone,
    /// Of a flow that cannot be told: nothing may pass it.
    Barrier,
}

/// The first packet's headers as they were before [`Group::join`].
#[derive(Debug, Clone)]
pub struct Saved {
    bytes: [u8; MAX_HEADERS],
    len: usize,
}

impl Coalescer {
    /// Plans the packets of `batch`, passing over empty ones. UDP joins only if `udp` says that the device takes it.
    pub fn plan(&mut self, batch: &Batch, udp: bool) {
        self.groups.clear();
        self.next.clear();
        self.next.resize(batch.len(), usize::MAX);
        let mut barrier = 0;
        for (index, bytes) in batch.iter().enumerate().filter(|(_, bytes)| !bytes.is_empty()) {
            let joining = match classify(bytes, udp) {
                Class::Joinable(shape) => {
                    if self.join(batch, index, &shape, barrier) {
                        continue;
                    }
                    Some(Joining { shape, verified: false, closed: shape.pushed })
                }
                Class::Alone => None,
                Class::Barrier => {
                    barrier = self.groups.len() + 1;
                    None
                }
            };
            self.groups.push(Group { first: index, last: index, count: 1, len: bytes.len(), joining });
        }
    }

    /// The groups, in the order to be written.
    #[must_use]
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The packets of a group in order.
    pub fn packets(&self, group: &Group) -> impl Iterator<Item = usize> {
        let next = |index: &usize| Some(self.next[*index]).filter(|next| *next != usize::MAX);
        std::iter::successors(Some(group.first), next)
    }

    /// Adds the packet to the newest group of its flow, if it follows there.
    fn join(&mut self, batch: &Batch, index: usize, shape: &Shape, barrier: usize) -> bool {
        let bytes = batch.packet(index);
        let from = barrier.max(self.groups.len().saturating_sub(SEARCHED));
        let Some(groups) = self.groups.get_mut(from..) else { return false };
        let Some(group) = groups.iter_mut().rev().find(|group| is_same_flow(batch.packet(group.first), bytes)) else {
            return false;
        };
        let Some(joining) = group.joining.as_mut().filter(|joining| !joining.closed) else { return false };
        let (first, count) = (batch.packet(group.first), group.count);
        let follows = shape.payload <= joining.shape.payload
            && group.len + shape.payload <= MAX_PACKET
            && group.count < MAX_JOINED
            && joining.shape.is_continued(first, shape, bytes, count);
        if !follows || !(joining.verified || joining.shape.is_valid(first)) || !shape.is_valid(bytes) {
            return false;
        }
        joining.verified = true;
        joining.closed = shape.pushed || shape.payload < joining.shape.payload || group.count + 1 == MAX_JOINED;
        joining.shape.pushed = shape.pushed;
        self.next[group.last] = index;
        (group.last, group.count, group.len) = (index, group.count + 1, group.len + shape.payload);
        true
    }
}

impl Group {
    /// How many packets it has.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Its first packet.
    #[must_use]
    pub fn first(&self) -> usize {
        self.first
    }

    /// Where the payload of each packet begins.
    #[must_use]
    pub fn payload_at(&self) -> usize {
        self.joining.map_or(0, |joining| joining.shape.payload_at)
    }

    /// Makes the first packet's headers those of the super-packet and returns the virtio header for it, and how the
    /// headers were. To be written: the virtio header, the first packet, the payload of the others. Of a group of one
    /// packet nothing is changed.
    pub fn join(&self, batch: &mut Batch) -> ([u8; HEADER_LEN], Saved) {
        let mut saved = Saved { bytes: [0; MAX_HEADERS], len: 0 };
        let Some(Joining { shape, .. }) = self.joining.filter(|_| self.count > 1) else {
            return (Header::SINGLE.encode(), saved);
        };
        let packet = batch.packet_mut(self.first);
        saved.len = shape.payload_at;
        saved.bytes[..shape.payload_at].copy_from_slice(&packet[..shape.payload_at]);
        let is_v4 = packet[0] >> 4 == 4;
        if is_v4 {
            packet[2..4].copy_from_slice(&short(self.len).to_be_bytes());
            packet[10..12].fill(0);
            let sum = Sum::default().bytes(&packet[..ipv4::HEADER_LEN]).finish();
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            packet[4..6].copy_from_slice(&short(self.len - ipv6::HEADER_LEN).to_be_bytes());
        }
        let transport_len = self.len - shape.transport_at;
        let pseudo = pseudo_sum(packet, shape.protocol, transport_len);
        let transport = &mut packet[shape.transport_at..];
        let (kind, checksum_offset) = if shape.protocol == Protocol::UDP {
            transport[4..6].copy_from_slice(&short(transport_len).to_be_bytes());
            (Kind::Udp, 6)
        } else {
            transport[13] |= if shape.pushed { PSH } else { 0 };
            (if is_v4 { Kind::Tcp4 } else { Kind::Tcp6 }, 16)
        };
        transport[checksum_offset..checksum_offset + 2].copy_from_slice(&(!pseudo.finish()).to_be_bytes());
        let header = Header {
            kind,
            needs_checksum: true,
            header_len: short(shape.payload_at),
            segment_size: short(shape.payload),
            checksum_start: short(shape.transport_at),
            checksum_offset: short(checksum_offset),
        };
        (header.encode(), saved)
    }

    /// Undoes [`Group::join`].
    pub fn restore(&self, batch: &mut Batch, saved: &Saved) {
        batch.packet_mut(self.first)[..saved.len].copy_from_slice(&saved.bytes[..saved.len]);
    }
}

impl Shape {
    /// Whether a packet with this shape continues a group that begins with the packet of shape `self` and has `count`.
    fn is_continued(&self, first: &[u8], shape: &Self, bytes: &[u8], count: usize) -> bool {
        if (self.protocol, self.transport_at, self.payload_at) != (shape.protocol, shape.transport_at, shape.payload_at)
        {
            return false;
        }
        let same = |range: std::ops::Range<usize>| first[range.clone()] == bytes[range];
        let (at, end) = (self.transport_at, self.payload_at);
        let ip = if first[0] >> 4 == 4 {
            let id = |bytes: &[u8]| u16::from_be_bytes([bytes[4], bytes[5]]);
            let in_order = id(bytes) == id(first).wrapping_add(short(count));
            // What may not be fragmented needs no identification (RFC 6864 §4.1).
            same(0..2) && same(6..10) && (in_order || bytes[6] & DONT_FRAGMENT != 0)
        } else {
            same(0..4) && same(6..8)
        };
        let transport = if self.protocol == Protocol::UDP {
            true
        } else {
            let offset = u32::try_from(count * self.payload).unwrap_or(0);
            // Acknowledgement, header length; flags but for PSH; window, urgent pointer, options.
            shape.sequence == self.sequence.wrapping_add(offset)
                && same(at + 8..at + 13)
                && same(at + 14..at + 16)
                && same(at + 18..end)
        };
        ip && transport
    }

    /// Whether the checksums are right. Joined, a wrong one would be made right.
    fn is_valid(&self, bytes: &[u8]) -> bool {
        let transport = &bytes[self.transport_at..];
        let ip = bytes[0] >> 4 == 6 || Sum::default().bytes(&bytes[..ipv4::HEADER_LEN]).finish() == 0;
        ip && pseudo_sum(bytes, self.protocol, transport.len()).bytes(transport).finish() == 0
    }
}

fn pseudo_sum(bytes: &[u8], protocol: Protocol, len: usize) -> Sum {
    match (packet::source(bytes), packet::destination(bytes)) {
        (Some(source), Some(destination)) => pseudo_header(source, destination, protocol, len),
        _ => Sum::default(),
    }
}

/// Where protocol, addresses and ports stand in a packet without options, extension headers and fragments.
fn flow(bytes: &[u8]) -> Option<(u8, &[u8])> {
    match bytes.first()? {
        0x45 => Some((*bytes.get(9)?, bytes.get(12..24)?)),
        first if first >> 4 == 6 => Some((*bytes.get(6)?, bytes.get(8..44)?)),
        _ => None,
    }
}

fn is_same_flow(one: &[u8], other: &[u8]) -> bool {
    matches!((flow(one), flow(other)), (Some(one), Some(other)) if one == other)
}

fn classify(bytes: &[u8], udp: bool) -> Class {
    let (claimed, transport_at, protocol) = match bytes {
        [0x45, ..] if bytes.len() >= ipv4::HEADER_LEN => {
            if bytes[6] & 0x3f != 0 || bytes[7] != 0 {
                return Class::Barrier;
            }
            (packet::claimed_len(bytes), ipv4::HEADER_LEN, Protocol(bytes[9]))
        }
        [first, ..] if first >> 4 == 6 && bytes.len() >= ipv6::HEADER_LEN => {
            (packet::claimed_len(bytes), ipv6::HEADER_LEN, Protocol(bytes[6]))
        }
        _ => return Class::Barrier,
    };
    let transport = &bytes[transport_at..];
    if claimed != Some(bytes.len()) {
        return Class::Barrier;
    }
    match protocol {
        Protocol::TCP if transport.len() >= 20 => {
            let header_len = usize::from(transport[12] >> 4) * 4;
            let flags = transport[13];
            if header_len < 20 || header_len >= transport.len() || flags & !PSH != ACK || transport[12] & 0xf != 0 {
                return Class::Alone;
            }
            Class::Joinable(Shape {
                protocol,
                transport_at,
                payload_at: transport_at + header_len,
                payload: transport.len() - header_len,
                sequence: u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]),
                pushed: flags & PSH != 0,
            })
        }
        Protocol::UDP if transport.len() >= 8 => {
            let whole = usize::from(u16::from_be_bytes([transport[4], transport[5]])) == transport.len();
            if !udp || !whole || transport.len() == 8 || transport[6..8] == [0, 0] {
                return Class::Alone;
            }
            let (payload_at, payload) = (transport_at + 8, transport.len() - 8);
            Class::Joinable(Shape { protocol, transport_at, payload_at, payload, sequence: 0, pushed: false })
        }
        // Answers to nobody's order but their own.
        Protocol::ICMP | Protocol::ICMPV6 => Class::Alone,
        _ => Class::Barrier,
    }
}
