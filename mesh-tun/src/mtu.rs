//! What a router does in front of a narrower link: it lowers the segment size that TCP agrees on, and answers packets that
//! are too long.
//!
//! Each peer may have a smaller MTU than the device, since the network under the tunnel may carry less. TCP is spared any
//! loss by [`clamp_mss`] on both SYNs; everything else learns of the limit by [`too_big`].
//!
//! An IPv4 packet that may be fragmented is answered like one that may not: the sender's system remembers the limit for the
//! destination, and fragments what it sends from then on by itself, which costs the tunnel nothing. IPv6 knows no links
//! below 1,280 bytes, so systems do not go below that: over a narrower network TCP works, by its segment size, and longer
//! packets of other protocols are lost.

use std::net::IpAddr;

use crate::packet::checksum::{self, Sum};
use crate::packet::{self, Fragment, IcmpClass, Packet, Protocol, TcpFlags, Transport, ipv4, ipv6};

/// No answer of [`too_big`] is longer: the least MTU of IPv6 (RFC 4443 §2.4 c).
pub const ANSWER_MAX: usize = 1280;

/// No answer to IPv4 is longer (RFC 1812 §4.3.2.3).
const ANSWER_MAX_V4: usize = 576;

const ICMP_HEADER_LEN: usize = 8;
const TCP_HEADER_LEN: usize = 20;

/// Lowers the maximum segment size in a TCP SYN so that full segments make packets of at most `mtu` bytes; true if it was
/// larger. All other packets stay as they are, and a SYN without the option does, since what it implies (RFC 9293 §3.7.1)
/// fits everywhere.
pub fn clamp_mss(bytes: &mut [u8], mtu: usize) -> bool {
    let Some((at, segment)) = find_mss(bytes) else { return false };
    let header_len = if bytes[0] >> 4 == 4 { ipv4::HEADER_LEN } else { ipv6::HEADER_LEN };
    let limit = u16::try_from(mtu.saturating_sub(header_len + TCP_HEADER_LEN)).unwrap_or(u16::MAX);
    let transport = at.transport;
    let Some(option) = bytes.get_mut(at.option..at.option + 2).filter(|_| segment > limit) else { return false };
    option.copy_from_slice(&limit.to_be_bytes());
    // At an odd place the value's bytes are the low half of one word and the high half of the next.
    let odd = (at.option - transport) % 2 == 1;
    let (old, new) = if odd { (segment.swap_bytes(), limit.swap_bytes()) } else { (segment, limit) };
    let Some(field) = bytes.get_mut(transport + 16..transport + 18) else { return false };
    let updated = checksum::update(u16::from_be_bytes([field[0], field[1]]), old, new);
    field.copy_from_slice(&updated.to_be_bytes());
    true
}

/// Where a SYN has its maximum segment size, from the beginning of the packet.
struct MssAt {
    transport: usize,
    option: usize,
}

fn find_mss(bytes: &[u8]) -> Option<(MssAt, u16)> {
    let parsed = Packet::parse(bytes).ok()?;
    match (parsed.fragment, parsed.transport) {
        (Fragment::Whole, Transport::Tcp { flags, .. }) if flags.0 & TcpFlags::SYN.0 != 0 => {}
        _ => return None,
    }
    let transport = packet::claimed_len(bytes)?.checked_sub(parsed.payload.len())?;
    let options_end = usize::from(parsed.payload.get(12)? >> 4) * 4;
    let options = parsed.payload.get(TCP_HEADER_LEN..options_end)?;
    let mut at = 0;
    loop {
        let len = match *options.get(at)? {
            0 => return None,
            1 => 1,
            kind => {
                let len = usize::from(*options.get(at + 1)?);
                if kind == 2 && len == 4 {
                    let value = u16::from_be_bytes(*options.get(at + 2..)?.first_chunk::<2>()?);
                    return Some((MssAt { transport, option: transport + TCP_HEADER_LEN + at + 2 }, value));
                }
                len.max(2)
            }
        };
        at += len;
    }
}

/// Writes to `answer` what a router would tell the sender of a packet that is longer than `mtu`: ICMP "fragmentation needed"
/// (RFC 1191 §4) or ICMPv6 "packet too big" (RFC 4443 §3.2), in the name of the packet's receiver. Returns its length; none
/// if the packet must not be answered (an ICMP error, a later fragment, to or from a group), or `answer` is shorter than
/// [`ANSWER_MAX`].
pub fn too_big(bytes: &[u8], mtu: usize, answer: &mut [u8]) -> Option<usize> {
    let parsed = Packet::parse(bytes).ok()?;
    let is_error = matches!(parsed.transport, Transport::Icmp { class: IcmpClass::Error, .. });
    let single = |address: IpAddr| !address.is_multicast() && !address.is_unspecified();
    if is_error
        || matches!(parsed.fragment, Fragment::Later { .. })
        || !single(parsed.source)
        || !single(parsed.destination)
    {
        return None;
    }
    let answer = answer.first_chunk_mut::<ANSWER_MAX>()?;
    let whole = bytes.get(..packet::claimed_len(bytes)?)?;
    // The addresses change places.
    match (parsed.destination, parsed.source) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let start = ipv4::HEADER_LEN + ICMP_HEADER_LEN;
            let quoted = whole.get(..whole.len().min(ANSWER_MAX_V4 - start))?;
            let len = start + quoted.len();
            answer[..start].fill(0);
            (answer[0], answer[8], answer[9]) = (0x45, 64, Protocol::ICMP.0);
            answer[2..4].copy_from_slice(&u16::try_from(len).ok()?.to_be_bytes());
            answer[12..16].copy_from_slice(&from.octets());
            answer[16..20].copy_from_slice(&to.octets());
            // Destination unreachable, fragmentation needed.
            (answer[20], answer[21]) = (3, 4);
            answer[26..28].copy_from_slice(&u16::try_from(mtu).unwrap_or(u16::MAX).to_be_bytes());
            answer[start..len].copy_from_slice(quoted);
            checksum::fill_ipv4_header(answer).ok()?;
            let sum = Sum::default().bytes(&answer[ipv4::HEADER_LEN..len]).finish();
            answer[22..24].copy_from_slice(&sum.to_be_bytes());
            Some(len)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let start = ipv6::HEADER_LEN + ICMP_HEADER_LEN;
            let quoted = whole.get(..whole.len().min(ANSWER_MAX - start))?;
            let len = start + quoted.len();
            answer[..start].fill(0);
            (answer[0], answer[6], answer[7]) = (0x60, Protocol::ICMPV6.0, 64);
            let payload = len - ipv6::HEADER_LEN;
            answer[4..6].copy_from_slice(&u16::try_from(payload).ok()?.to_be_bytes());
            answer[8..24].copy_from_slice(&from.octets());
            answer[24..40].copy_from_slice(&to.octets());
            // Packet too big.
            answer[40] = 2;
            answer[44..48].copy_from_slice(&u32::try_from(mtu).unwrap_or(u32::MAX).to_be_bytes());
            answer[start..len].copy_from_slice(quoted);
            let pseudo = checksum::pseudo_header(from.into(), to.into(), Protocol::ICMPV6, payload);
            let sum = pseudo.bytes(&answer[ipv6::HEADER_LEN..len]).finish();
            answer[42..44].copy_from_slice(&sum.to_be_bytes());
            Some(len)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{PacketBuilder, TcpOptionElement};
    use proptest::prelude::*;

    #[test]
    fn a_syns_segment_size_is_lowered_to_what_fits() {
        for (v6, fits) in [(false, 1100), (true, 1080)] {
            let mut bytes = syn(
                v6,
                &[TcpOptionElement::MaximumSegmentSize(1240), TcpOptionElement::SelectiveAcknowledgementPermitted],
            );
            assert!(clamp_mss(&mut bytes, 1140));
            assert_eq!(find_mss(&bytes).unwrap().1, fits);
            assert!(checksum::transport_is_valid(&Packet::parse(&bytes).unwrap()));
            assert!(!clamp_mss(&mut bytes, 1140), "once is enough");
        }
    }

    #[test]
    fn a_segment_size_at_an_odd_place_is_lowered_too() {
        let mut bytes = syn(false, &[TcpOptionElement::Noop, TcpOptionElement::MaximumSegmentSize(1460)]);
        assert!(clamp_mss(&mut bytes, 1201));
        assert_eq!(find_mss(&bytes).unwrap().1, 1161);
        assert!(checksum::transport_is_valid(&Packet::parse(&bytes).unwrap()));
    }

    #[test]
    fn a_smaller_segment_size_and_other_segments_stay() {
        let mut small = syn(false, &[TcpOptionElement::MaximumSegmentSize(536)]);
        let mut none = syn(false, &[TcpOptionElement::WindowScale(7)]);
        let mut later = Vec::new();
        PacketBuilder::ipv4([1; 4], [2; 4], 64).tcp(1, 2, 3, 4).ack(1).write(&mut later, &[9; 900]).unwrap();
        for bytes in [&mut small, &mut none, &mut later] {
            let before = bytes.clone();
            assert!(!clamp_mss(bytes, 800));
            assert_eq!(*bytes, before);
        }
    }

    #[test]
    fn a_long_packet_is_answered_with_the_limit_and_its_own_beginning() {
        let mut answer = [0xaa; ANSWER_MAX];
        for v6 in [false, true] {
            let mut bytes = Vec::new();
            if v6 {
                PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 64).udp(7, 9).write(&mut bytes, &[5; 1232]).unwrap();
            } else {
                PacketBuilder::ipv4([1; 4], [2; 4], 64).udp(7, 9).write(&mut bytes, &[5; 1252]).unwrap();
            }
            let sent = Packet::parse(&bytes).unwrap();
            let len = too_big(&bytes, 1140, &mut answer).unwrap();
            let told = Packet::parse(&answer[..len]).unwrap();
            assert_eq!((told.source, told.destination), (sent.destination, sent.source));
            assert!(checksum::transport_is_valid(&told));
            assert_eq!(told.transport, Transport::Icmp { class: IcmpClass::Error, identifier: 0 });
            assert_eq!(u16::from_be_bytes([told.payload[6], told.payload[7]]), 1140);
            assert_eq!(told.payload[8..], bytes[..told.payload.len() - 8]);
            assert_eq!(len, if v6 { ANSWER_MAX } else { ANSWER_MAX_V4 });
            // The kernel would refuse a header that does not add up.
            let header = &answer[..ipv4::HEADER_LEN];
            assert!(v6 || Sum::default().bytes(header).finish() == 0);
            assert_eq!(too_big(&answer[..len], 100, &mut [0; ANSWER_MAX]), None, "errors are not answered");
        }
    }

    #[test]
    fn groups_are_not_answered() {
        let mut bytes = Vec::new();
        PacketBuilder::ipv4([1; 4], [224, 0, 0, 1], 64).udp(7, 9).write(&mut bytes, &[5; 1252]).unwrap();
        assert_eq!(too_big(&bytes, 1140, &mut [0; ANSWER_MAX]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), v6: bool, mtu in 0..70_000_usize) {
            if let Some(first) = bytes.first_mut() {
                *first = if v6 { 0x60 } else { 0x45 };
            }
            let _ = too_big(&bytes, mtu, &mut [0; ANSWER_MAX]);
            let _ = clamp_mss(&mut bytes, mtu);
        }

        #[test]
        fn any_options_are_survived_and_checksums_stay_valid(
            options in proptest::collection::vec(0..5_u8, 0..40), mtu in 100..1500_usize,
        ) {
            let options = &options[..options.len() / 4 * 4];
            let mut bytes = Vec::new();
            let builder = PacketBuilder::ipv4([1; 4], [2; 4], 64).tcp(1, 2, 3, 4).syn();
            builder.options_raw(options).unwrap().write(&mut bytes, b"x").unwrap();
            clamp_mss(&mut bytes, mtu);
            prop_assert!(checksum::transport_is_valid(&Packet::parse(&bytes).unwrap()));
            prop_assert!(find_mss(&bytes).is_none_or(|(_, segment)| usize::from(segment) + 40 <= mtu));
        }
    }

    fn syn(v6: bool, options: &[TcpOptionElement]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let builder =
            if v6 { PacketBuilder::ipv6([1; 16], [2; 16], 64) } else { PacketBuilder::ipv4([1; 4], [2; 4], 64) };
        builder.tcp(4000, 80, 7, 1024).syn().options(options).unwrap().write(&mut bytes, b"").unwrap();
        bytes
    }
}
