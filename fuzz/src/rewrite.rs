//! What changes packets on their way: other addresses, a smaller segment size, and answers to packets that are too long.
//!
//! Checksums are held to more than being right: the sum over what a checksum covers is the same before and after, so a
//! damaged packet stays exactly as damaged as it was.

use std::net::IpAddr;

use mesh_tun::masquerade::Masquerade;
use mesh_tun::mtu::{ANSWER_MAX, clamp_mss, too_big};
use mesh_tun::packet::checksum::{Sum, pseudo_header, transport_is_valid};
use mesh_tun::packet::{self, Fragment, IcmpClass, Packet, Protocol, TcpFlags, Transport};

const OWN4: [u8; 4] = [100, 64, 0, 1];
const SHOWN4: [u8; 4] = [100, 99, 200, 7];
const OWN6: [u8; 16] = [0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const SHOWN6: [u8; 16] = [0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0, 0xff, 0, 0xff, 0, 0x12, 0x34, 0, 0, 0, 9];

/// Bytes of an ICMP header before what it quotes.
const ICMP_HEADER_LEN: usize = 8;
/// What is looked at of a quoted IPv4 header: without its options.
const HEADER_LEN_V4: usize = 20;

/// Which way a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Out,
    In,
}

/// A byte of settings, then a packet. Bit 0 turns the way; bits 1 and 2 put the address that is to be replaced into the
/// header and into the quote of an ICMP error, which a fuzzer would not guess.
pub(crate) fn masquerade(bytes: &[u8]) {
    let Some((settings, packet)) = bytes.split_first() else { return };
    let mut packet = packet.to_vec();
    let way = if settings & 1 == 0 { Way::Out } else { Way::In };
    if settings & 2 != 0 {
        put(&mut packet, way == Way::Out, way);
    }
    if settings & 4 != 0
        && let Some(at) = quote_at(&packet)
    {
        put(&mut packet[at..], way == Way::In, way);
    }
    rewritten(&packet, way);
}

/// Two bytes of MTU, then a packet.
pub(crate) fn mtu(bytes: &[u8]) {
    let Some((mtu, packet)) = bytes.split_first_chunk() else { return };
    let mtu = usize::from(u16::from_be_bytes(*mtu));
    clamped(packet, mtu);
    answered(packet, mtu);
}

/// Rewrites a packet and takes that back.
fn rewritten(before: &[u8], way: Way) {
    let there = Masquerade::new().show(OWN4.into(), SHOWN4.into()).show(OWN6.into(), SHOWN6.into());
    let back = Masquerade::new().show(SHOWN4.into(), OWN4.into()).show(SHOWN6.into(), OWN6.into());
    let rewrite = |masquerade: &Masquerade, bytes: &mut [u8]| match way {
        Way::Out => masquerade.outgoing(bytes),
        Way::In => masquerade.incoming(bytes),
    };
    let mut after = before.to_vec();
    let changed = rewrite(&there, &mut after);
    let Ok(parsed) = Packet::parse(before) else {
        assert!(!changed && after == before, "what is no packet stays as it is");
        return;
    };
    let (from, to) = addresses(parsed.source.is_ipv4(), way);
    let subject = if way == Way::Out { parsed.source } else { parsed.destination };
    let own_is_shown = subject == from;
    assert!(changed || (after == before && !own_is_shown), "nothing was changed, or it is told");
    assert!(
        !changed || own_is_shown || is_error(&parsed),
        "only errors are changed without an address in their header"
    );
    let new = Packet::parse(&after).expect("it was a packet before");
    if own_is_shown {
        assert_eq!(if way == Way::Out { new.source } else { new.destination }, to);
    }
    assert_eq!((new.protocol, new.fragment, new.transport), (parsed.protocol, parsed.fragment, parsed.transport));
    assert_eq!(covered_sum(&new), covered_sum(&parsed), "the transport checksum was brought up to date");
    assert_eq!(transport_is_valid(&new), transport_is_valid(&parsed));
    assert_eq!(header_sum(&after), header_sum(before), "the checksum of the header was brought up to date");
    if let Some(at) = quote_at(before) {
        assert_eq!(header_sum(&after[at..]), header_sum(&before[at..]), "the quoted header was brought up to date");
    }
    let to = match to {
        IpAddr::V4(to) => to.octets().to_vec(),
        IpAddr::V6(to) => to.octets().to_vec(),
    };
    if !changed || before.windows(to.len()).any(|window| window == to) {
        // Where the new address was in the packet before, the way back replaces that too.
        return;
    }
    assert!(rewrite(&back, &mut after), "what was changed is changed back");
    for (old, new) in before.chunks(2).zip(after.chunks(2)) {
        // Ones' complement has two zeros, and an update may turn one into the other.
        let zero = |word: &[u8]| word == [0, 0] || word == [0xff, 0xff];
        assert!(old == new || (zero(old) && zero(new)), "there and back is the same packet");
    }
}

/// Lowers the segment size of a SYN.
fn clamped(before: &[u8], mtu: usize) {
    let mut after = before.to_vec();
    if !clamp_mss(&mut after, mtu) {
        assert_eq!(after, before);
        return;
    }
    let (old, new) = (Packet::parse(before).expect("it was changed"), Packet::parse(&after).expect("it was a packet"));
    let is_syn = |packet: &Packet<'_>| match packet.transport {
        Transport::Tcp { flags, .. } => flags.0 & TcpFlags::SYN.0 != 0,
        Transport::Udp { .. } | Transport::Sctp { .. } | Transport::Icmp { .. } | Transport::Unknown => false,
    };
    assert!(is_syn(&old) && is_syn(&new) && old.fragment == Fragment::Whole);
    assert_eq!(covered_sum(&new), covered_sum(&old), "the checksum was brought up to date");
    let transport = packet::claimed_len(before).expect("it is a packet") - old.payload.len();
    assert_eq!(after[..transport + 16], before[..transport + 16], "nothing changes before the checksum");
    let differ = (0..before.len()).filter(|&at| after[at] != before[at]).count();
    assert!(differ <= 4, "the checksum and the segment size");
    assert!(!clamp_mss(&mut after, mtu), "once is enough");
}

/// Asks for the answer to a packet as if it were too long.
fn answered(bytes: &[u8], mtu: usize) {
    let mut answer = [0xaa; ANSWER_MAX];
    let told = too_big(bytes, mtu, &mut answer);
    let Ok(parsed) = Packet::parse(bytes) else {
        assert_eq!(told, None, "what is no packet is not answered");
        return;
    };
    let single = |address: IpAddr| !address.is_multicast() && !address.is_unspecified();
    let later = matches!(parsed.fragment, Fragment::Later { .. });
    let wanted = !is_error(&parsed) && !later && single(parsed.source) && single(parsed.destination);
    assert_eq!(told.is_some(), wanted, "everybody is told but who must not be");
    let Some(len) = told else { return };
    let told = &answer[..len];
    let packet = Packet::parse(told).expect("our own packet");
    assert_eq!((packet.source, packet.destination), (parsed.destination, parsed.source));
    assert!(is_error(&packet) && transport_is_valid(&packet));
    assert_eq!(packet::claimed_len(told), Some(len));
    assert!(header_sum(told).is_none_or(|sum| sum == 0), "the kernel would refuse it");
    let limit = if packet.source.is_ipv4() { 576 } else { ANSWER_MAX };
    let says = usize::from(u16::from_be_bytes([packet.payload[6], packet.payload[7]]));
    assert!(len <= limit && says == mtu);
    let whole = packet::claimed_len(bytes).expect("it is a packet");
    let quote = &packet.payload[ICMP_HEADER_LEN..];
    assert_eq!(*quote, bytes[..quote.len()], "it quotes the packet");
    assert!(len == limit || quote.len() == whole, "as much of it as fits");
    assert_eq!(too_big(told, mtu, &mut [0; ANSWER_MAX]), None, "errors are not answered");
    // On its way it is rewritten like any packet.
    let mut told = told.to_vec();
    let at = quote_at(&told).expect("it is an error");
    put(&mut told[at..], true, Way::In);
    put(&mut told, false, Way::In);
    rewritten(&told, Way::In);
}

/// What a packet that goes this way has in place of what.
fn addresses(v4: bool, way: Way) -> (IpAddr, IpAddr) {
    let (own, shown) = if v4 { (OWN4.into(), SHOWN4.into()) } else { (OWN6.into(), SHOWN6.into()) };
    if way == Way::Out { (own, shown) } else { (shown, own) }
}

/// Writes the address that is replaced on this way into a header: as its source, or as its destination.
fn put(header: &mut [u8], source: bool, way: Way) {
    let (own, at): (&[u8], usize) = match (header.first().map(|byte| byte >> 4), way) {
        (Some(4), Way::Out) => (&OWN4, 12),
        (Some(4), Way::In) => (&SHOWN4, 12),
        (Some(6), Way::Out) => (&OWN6, 8),
        (Some(6), Way::In) => (&SHOWN6, 8),
        _ => return,
    };
    let at = if source { at } else { at + own.len() };
    if let Some(field) = header.get_mut(at..at + own.len()) {
        field.copy_from_slice(own);
    }
}

fn is_error(packet: &Packet<'_>) -> bool {
    matches!(packet.transport, Transport::Icmp { class: IcmpClass::Error, .. })
}

/// Where an ICMP error quotes the packet that it is about.
fn quote_at(bytes: &[u8]) -> Option<usize> {
    let packet = Packet::parse(bytes).ok().filter(is_error)?;
    let end = packet::claimed_len(bytes)?;
    Some(end - packet.payload.len() + ICMP_HEADER_LEN)
}

/// The sum over all that a transport checksum covers, itself included; none if there is no checksum.
fn covered_sum(packet: &Packet<'_>) -> Option<u16> {
    if matches!(packet.fragment, Fragment::Later { .. }) {
        return None;
    }
    let pseudo = match packet.protocol {
        Protocol::UDP if packet.payload[6..8] == [0, 0] => return None,
        Protocol::TCP | Protocol::UDP | Protocol::ICMPV6 => {
            pseudo_header(packet.source, packet.destination, packet.protocol, packet.payload.len())
        }
        Protocol::ICMP => Sum::default(),
        _ => return None,
    };
    Some(pseudo.bytes(packet.payload).finish())
}

/// The sum over an IPv4 header without its options, 0 if it adds up; none if there is no such header.
fn header_sum(bytes: &[u8]) -> Option<u16> {
    let header = bytes.get(..HEADER_LEN_V4).filter(|header| header[0] >> 4 == 4)?;
    Some(Sum::default().bytes(header).finish())
}
