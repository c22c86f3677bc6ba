//! Segmentation against a slow reference, coalescing against segmentation.

use std::collections::BTreeMap;

use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::*;
use crate::batch::Batch;
use crate::packet::{Packet, Protocol, Transport, checksum};

const NOTHING: Header = Header::SINGLE;

/// A TCP or UDP packet with right checksums. `id` counts for IPv4 only.
#[derive(Debug, Clone)]
struct Sample {
    v6: bool,
    udp: bool,
    port: u16,
    id: u16,
    sequence: u32,
    acknowledgement: u32,
    flags: u8,
    options: bool,
    dont_fragment: bool,
    payload: Vec<u8>,
}

const PLAIN: Sample = Sample {
    v6: false,
    udp: false,
    port: 1000,
    id: 7,
    sequence: 1 << 20,
    acknowledgement: 3,
    flags: 0x10,
    options: true,
    dont_fragment: false,
    payload: Vec::new(),
};

impl Sample {
    fn bytes(&self) -> Vec<u8> {
        let builder = if self.v6 {
            PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 64)
        } else {
            let mut header =
                etherparse::Ipv4Header::new(0, 60, etherparse::IpNumber::TCP, [100, 64, 0, 1], [100, 64, 0, 2])
                    .unwrap();
            (header.identification, header.dont_fragment) = (self.id, self.dont_fragment);
            PacketBuilder::ip(etherparse::IpHeaders::Ipv4(header, etherparse::Ipv4Extensions::default()))
        };
        let mut bytes = Vec::new();
        if self.udp {
            builder.udp(self.port, 443).write(&mut bytes, &self.payload).unwrap();
            return bytes;
        }
        let mut tcp = etherparse::TcpHeader::new(self.port, 443, self.sequence, 5000);
        (tcp.acknowledgment_number, tcp.ack) = (self.acknowledgement, self.flags & 0x10 != 0);
        (tcp.psh, tcp.fin, tcp.cwr) = (self.flags & 8 != 0, self.flags & 1 != 0, self.flags & 0x80 != 0);
        if self.options {
            let timestamp = etherparse::TcpOptionElement::Timestamp(11, 12);
            let noop = etherparse::TcpOptionElement::Noop;
            tcp.set_options(&[noop.clone(), noop, timestamp]).unwrap();
        }
        builder.tcp_header(tcp).write(&mut bytes, &self.payload).unwrap();
        bytes
    }

    /// The header that the kernel would put before this as a super-packet.
    fn header(&self, segment_size: u16) -> Header {
        let checksum_start = if self.v6 { 40 } else { 20 };
        let kind = match (self.udp, self.v6) {
            (true, _) => Kind::Udp,
            (false, false) => Kind::Tcp4,
            (false, true) => Kind::Tcp6,
        };
        let checksum_offset = if self.udp { 6 } else { 16 };
        Header { kind, needs_checksum: true, header_len: 0, segment_size, checksum_start, checksum_offset }
    }

    /// What segmentation has to give: each packet made by itself.
    fn reference(&self, segment_size: usize) -> Vec<Vec<u8>> {
        let count = self.payload.len().div_ceil(segment_size);
        let pieces = self.payload.chunks(segment_size).enumerate();
        pieces
            .map(|(index, piece)| {
                let mut flags = self.flags;
                flags &= !(if index + 1 < count { 0x09 } else { 0 } | if index > 0 { 0x80 } else { 0 });
                let offset = u32::try_from(index * segment_size).unwrap();
                let id = self.id.wrapping_add(u16::try_from(index).unwrap());
                let sequence = self.sequence.wrapping_add(offset);
                Self { payload: piece.to_vec(), flags, id, sequence, ..self.clone() }.bytes()
            })
            .collect()
    }
}

fn segment(header: Header, packet: &[u8]) -> Result<Vec<Vec<u8>>, Unusable> {
    let (mut segments, mut out, mut found) = (Segments::new(header, packet)?, vec![0xee; 1 << 16], Vec::new());
    let expected = segments.remaining();
    while let Some(len) = segments.write_next(packet, &mut out) {
        found.push(out[..len?].to_vec());
    }
    assert_eq!(found.len(), expected);
    Ok(found)
}

/// What a device would be given for these packets: virtio headers and packets.
fn coalesce(packets: &[Vec<u8>], udp: bool) -> Vec<(Header, Vec<u8>)> {
    let mut batch = Batch::new(packets.len().max(1), 2048);
    assert!(packets.iter().all(|packet| batch.push(packet)));
    let mut coalescer = Coalescer::default();
    coalescer.plan(&batch, udp);
    let mut written = Vec::new();
    for group in coalescer.groups() {
        let before = batch.packet(group.first()).to_vec();
        let (header, saved) = group.join(&mut batch);
        let mut whole = Vec::new();
        for index in coalescer.packets(group) {
            let from = if whole.is_empty() { 0 } else { group.payload_at() };
            whole.extend_from_slice(&batch.packet(index)[from..]);
        }
        group.restore(&mut batch, &saved);
        assert_eq!(batch.packet(group.first()), before, "undone");
        written.push((Header::decode(&header).unwrap(), whole));
    }
    written
}

/// Protocol and ports.
type Flow = (u8, Option<(u16, u16)>);

fn flow(packet: &[u8]) -> Flow {
    let packet = Packet::parse(packet).unwrap();
    (packet.protocol.0, packet.transport.ports())
}

/// Packets by flow, with the identification of those left out that need none.
fn by_flow(packets: &[Vec<u8>]) -> BTreeMap<Flow, Vec<Vec<u8>>> {
    let mut flows = BTreeMap::<_, Vec<_>>::new();
    for packet in packets {
        let mut packet = packet.clone();
        let key = flow(&packet);
        if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
            packet[4..6].fill(0);
            checksum::fill_ipv4_header(&mut packet).unwrap();
        }
        flows.entry(key).or_default().push(packet);
    }
    flows
}

fn sample() -> impl Strategy<Value = Sample> {
    let payload = proptest::collection::vec(any::<u8>(), 1..6000);
    (any::<bool>(), any::<bool>(), any::<u16>(), any::<u32>(), any::<bool>(), payload, 0..8_usize).prop_map(
        |(v6, udp, id, sequence, options, payload, flags)| {
            let flags = [0x10, 0x18, 0x11, 0x19, 0x90, 0x10, 0x98, 0x10][flags];
            Sample { v6, udp, id, sequence, options, payload, flags, ..PLAIN }
        },
    )
}

/// Streams of packets that mostly belong together, of a few flows, interleaved, with something odd now and then.
fn traffic() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let step = (0..3_u16, 0..12_u8, any::<bool>(), 1..4_usize);
    (any::<bool>(), any::<bool>(), proptest::collection::vec(step, 0..60)).prop_map(|(v6, dont_fragment, steps)| {
        let mut flows: Vec<_> =
            (0..3_u16).map(|flow| Sample { v6, dont_fragment, udp: flow == 2, port: 1000 + flow, ..PLAIN }).collect();
        let mut packets = Vec::new();
        for (index, odd, push, times) in steps {
            let flow = &mut flows[usize::from(index)];
            for _ in 0..times {
                flow.payload = vec![odd; if odd == 1 { 7 } else { 100 }];
                flow.flags = if push && odd == 2 { 0x18 } else { 0x10 };
                let mut bytes = flow.bytes();
                match odd {
                    3 => bytes.truncate(bytes.len() - 1),
                    4 => *bytes.last_mut().unwrap() ^= 1,
                    5 => flow.acknowledgement += 1,
                    6 => flow.sequence += 50,
                    7 => flow.id += 9,
                    _ => {}
                }
                flow.sequence = flow.sequence.wrapping_add(u32::try_from(flow.payload.len()).unwrap());
                flow.id = flow.id.wrapping_add(1);
                if odd != 3 {
                    packets.push(bytes);
                }
            }
        }
        packets
    })
}

proptest! {
    #[test]
    fn segmentation_equals_packets_made_one_by_one(sample in sample(), size in 1..1500_u16) {
        let found = segment(sample.header(size), &sample.bytes()).unwrap();
        prop_assert_eq!(&found, &sample.reference(size.into()));
        for packet in found {
            prop_assert!(checksum::transport_is_valid(&Packet::parse(&packet).unwrap()));
        }
    }

    #[test]
    fn cutting_what_was_joined_gives_it_back_in_order(packets in traffic(), udp: bool) {
        let written = coalesce(&packets, udp);
        prop_assert!(written.len() <= packets.len());
        let mut cut = Vec::new();
        for (header, whole) in &written {
            cut.extend(segment(*header, whole).unwrap());
        }
        prop_assert_eq!(by_flow(&cut), by_flow(&packets));
    }

    #[test]
    fn any_bytes_with_any_header_are_survived(
        header in any::<[u8; HEADER_LEN]>(), kind in 0..6_u8, start in 0..70_u8, size in 0..40_u16,
        mut bytes in proptest::collection::vec(any::<u8>(), 0..300), version in 0..3_u8,
    ) {
        let _ = Header::decode(&header);
        let mut near = header;
        (near[0], near[1]) = (1, kind);
        near[4..6].copy_from_slice(&size.to_ne_bytes());
        near[6..8].copy_from_slice(&u16::from(start).to_ne_bytes());
        if let (Some(first), 1..) = (bytes.first_mut(), version) {
            *first = if version == 1 { 0x45 } else { 0x60 };
        }
        if let Ok(header) = Header::decode(&near) {
            let _ = segment(header, &bytes);
        }
    }

    #[test]
    fn any_packets_are_coalesced_without_loss(
        packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..90), 0..12), six: bool,
    ) {
        let mut packets = packets;
        for packet in &mut packets {
            packet[0] = if six { 0x60 } else { 0x45 };
        }
        let total: usize = coalesce(&packets, true).iter().map(|(_, whole)| whole.len()).sum();
        prop_assert_eq!(total, packets.iter().map(Vec::len).sum::<usize>());
    }
}

#[test]
fn a_stream_becomes_one_super_packet() {
    for v6 in [false, true] {
        let whole = Sample { v6, payload: vec![7; 10_000], flags: 0x18, ..PLAIN };
        let written = coalesce(&whole.reference(1200), false);
        assert_eq!(written.len(), 1);
        assert_eq!((written[0].0.segment_size, written[0].0.kind), (1200, whole.header(0).kind));
        assert_eq!(written[0].1.len(), whole.bytes().len());
    }
}

#[test]
fn datagrams_join_only_where_the_device_takes_them() {
    let whole = Sample { udp: true, payload: vec![7; 1100], ..PLAIN };
    assert_eq!(coalesce(&whole.reference(200), true).len(), 1);
    assert_eq!(coalesce(&whole.reference(200), false).len(), 6);
}

#[test]
fn two_streams_join_though_their_packets_alternate() {
    let stream = |port| Sample { port, payload: vec![1; 5000], ..PLAIN }.reference(500);
    let packets: Vec<_> = stream(1).into_iter().zip(stream(2)).flat_map(|(one, two)| [one, two]).collect();
    assert_eq!(coalesce(&packets, false).len(), 2);
}

#[test]
fn nothing_passes_a_fragment() {
    let mut packets = Sample { payload: vec![1; 600], ..PLAIN }.reference(200);
    let mut fragment = packets[1].clone();
    fragment[6] = 0x20;
    checksum::fill_ipv4_header(&mut fragment).unwrap();
    packets.insert(1, fragment);
    assert_eq!(coalesce(&packets, false).len(), 3, "the packet before, the fragment, the two after");
}

#[test]
fn a_wrong_checksum_is_not_made_right() {
    let mut packets = Sample { payload: vec![1; 600], ..PLAIN }.reference(200);
    packets[0][60] ^= 1;
    assert_eq!(coalesce(&packets, false).len(), 2);
    packets[1][60] ^= 1;
    let written = coalesce(&packets, false);
    assert_eq!(written.iter().map(|(_, whole)| whole.clone()).collect::<Vec<_>>(), packets);
}

#[test]
fn a_checksum_left_to_us_is_completed() {
    for (udp, v6) in [(false, false), (true, false), (true, true)] {
        let expected = Sample { udp, v6, payload: b"hello".to_vec(), ..PLAIN }.bytes();
        let header = Sample { udp, v6, ..PLAIN }.header(0);
        let (start, offset) = (usize::from(header.checksum_start), usize::from(header.checksum_offset));
        let packet = Packet::parse(&expected).unwrap();
        let pseudo = checksum::pseudo_header(packet.source, packet.destination, packet.protocol, packet.payload.len());
        let mut partial = expected.clone();
        partial[start + offset..start + offset + 2].copy_from_slice(&(!pseudo.finish()).to_be_bytes());
        assert_eq!(segment(Header { kind: Kind::Single, ..header }, &partial), Ok(vec![expected]));
    }
}

#[test]
fn a_packet_with_nothing_to_do_is_copied() {
    let bytes = Sample { payload: b"as it is".to_vec(), ..PLAIN }.bytes();
    assert_eq!(segment(NOTHING, &bytes), Ok(vec![bytes.clone()]));
}

#[test]
fn headers_that_contradict_the_packet_are_refused() {
    let sample = Sample { payload: vec![1; 100], ..PLAIN };
    let (header, bytes) = (sample.header(50), sample.bytes());
    for wrong in [
        Header { segment_size: 0, ..header },
        Header { kind: Kind::Tcp6, ..header },
        Header { checksum_start: 24, ..header },
        Header { checksum_start: 4000, ..header },
    ] {
        assert_eq!(Segments::new(wrong, &bytes), Err(Unusable::Header), "{wrong:?}");
    }
    assert_eq!(Header::decode(&[1, 3, 0, 0, 0, 0, 0, 0, 0, 0]), Err(Unusable::Kind), "UFO was never asked for");
    let mut segments = Segments::new(header, &bytes).unwrap();
    assert_eq!(segments.write_next(&bytes, &mut [0; 60]), Some(Err(Unusable::Size)));
    assert_eq!(segments.remaining(), 1, "passed over");
}

#[test]
fn a_rest_waits_for_more_room() {
    let sample = Sample { payload: vec![1; 1000], ..PLAIN };
    let bytes = sample.bytes();
    let mut segments = Segments::new(sample.header(300), &bytes).unwrap();
    let mut out = [0; 400];
    for expected in sample.reference(300) {
        let len = segments.write_next(&bytes, &mut out).unwrap().unwrap();
        assert_eq!(out[..len], expected);
    }
    assert_eq!(segments.write_next(&bytes, &mut out), None);
    assert!(matches!(Packet::parse(&bytes).unwrap().transport, Transport::Tcp { .. }));
    assert_eq!(Packet::parse(&bytes).unwrap().protocol, Protocol::TCP);
}
