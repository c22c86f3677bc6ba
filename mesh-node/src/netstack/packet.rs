//! What the stack needs to know about a packet before it chooses who gets it.
//!
//! smoltcp parses every packet fully once it is handed one; this is the cheaper look that finds the connection, so that
//! a packet is never offered to a thousand sockets that do not want it.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use mesh_tun::packet::Protocol;
use mesh_tun::packet::checksum::{Sum, pseudo_header};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IPV6_HEADER_LEN, IpAddress, IpProtocol, IpRepr, IpVersion, Ipv4Packet, Ipv6Packet, TcpControl, TcpOption,
    TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};

/// Hop limit of packets the stack makes itself, as smoltcp's TCP uses.
const HOP_LIMIT: u8 = 64;

/// Both ends of a flow, as this stack sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// Our end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

/// What a segment says about the data that we have sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ack {
    /// The first byte that the peer has not got.
    pub(super) number: TcpSeqNumber,
    /// The byte after the segment's own.
    pub(super) end: TcpSeqNumber,
    /// The window field, unscaled.
    pub(super) window: u16,
    /// Carries nothing else.
    pub(super) bare: bool,
}

/// A segment that we have sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) start: TcpSeqNumber,
    /// The byte after the last; SYN and FIN count.
    pub(super) end: TcpSeqNumber,
    /// What it acknowledges.
    pub(super) acks: TcpSeqNumber,
    /// The window field, unscaled.
    pub(super) window: u16,
}

/// One inbound packet, looked at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// A TCP segment; `opens` when it is a plain SYN, `ack` when it acknowledges and neither opens nor resets.
    Tcp { flow: Flow, opens: bool, ack: Option<Ack> },
    /// A UDP datagram with a good checksum; the payload stands at this range of the packet.
    Udp { flow: Flow, payload: Range<usize> },
    /// Anything else that is addressed to somebody; `echo` is where the message of an echo request stands.
    Other { destination: IpAddr, echo: Option<Range<usize>> },
}

impl Parsed {
    /// The address that the packet is for.
    pub(super) fn destination(&self) -> IpAddr {
        match self {
            Self::Tcp { flow, .. } | Self::Udp { flow, .. } => flow.local.ip(),
            Self::Other { destination, .. } => *destination,
        }
    }
}

/// What is known of a TCP segment's checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    /// Nothing: it is looked at.
    Unknown,
    /// It was right, or the segment has never left this stack.
    Right,
}

/// Looks at `packet`; `None` when it is no IP packet, is a fragment, or its UDP or TCP checksum is wrong.
pub(super) fn parse(packet: &[u8], checksum: Checksum) -> Option<Parsed> {
    // smoltcp reads the first byte unasked.
    packet.first()?;
    let (source, destination, protocol, payload) = match IpVersion::of_packet(packet).ok()? {
        IpVersion::Ipv4 => {
            let ip = Ipv4Packet::new_checked(packet).ok()?;
            if ip.more_frags() || ip.frag_offset() != 0 {
                return None;
            }
            let start = usize::from(ip.header_len());
            let end = usize::from(ip.total_len());
            (IpAddr::V4(ip.src_addr()), IpAddr::V4(ip.dst_addr()), ip.next_header(), start..end)
        }
        IpVersion::Ipv6 => {
            let ip = Ipv6Packet::new_checked(packet).ok()?;
            let end = ip.header_len() + usize::from(ip.payload_len());
            (IpAddr::V6(ip.src_addr()), IpAddr::V6(ip.dst_addr()), ip.next_header(), ip.header_len()..end)
        }
    };
    let body = packet.get(payload.clone())?;
    #[expect(clippy::wildcard_enum_match_arm, reason = "every other protocol is smoltcp's to answer or ignore")]
    match protocol {
        IpProtocol::Tcp => {
            let tcp = TcpPacket::new_checked(body).ok()?;
            let sum = || pseudo_header(source, destination, Protocol::TCP, body.len()).bytes(body).finish();
            if checksum == Checksum::Unknown && sum() != 0 {
                return None;
            }
            let flow = Flow {
                local: SocketAddr::new(destination, tcp.dst_port()),
                remote: SocketAddr::new(source, tcp.src_port()),
            };
            let ack = (tcp.ack() && !tcp.syn() && !tcp.rst()).then(|| Ack {
                number: tcp.ack_number(),
                end: tcp.seq_number() + tcp.segment_len(),
                window: tcp.window_len(),
                bare: tcp.segment_len() == 0,
            });
            Some(Parsed::Tcp { flow, opens: tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin(), ack })
        }
        IpProtocol::Udp => {
            let udp = UdpPacket::new_checked(body).ok()?;
            if !udp.verify_checksum(&IpAddress::from(source), &IpAddress::from(destination)) {
                return None;
            }
            let flow = Flow {
                local: SocketAddr::new(destination, udp.dst_port()),
                remote: SocketAddr::new(source, udp.src_port()),
            };
            let start = payload.start + smoltcp::wire::UDP_HEADER_LEN;
            Some(Parsed::Udp { flow, payload: start..payload.start + usize::from(udp.len()) })
        }
        protocol => {
            let is_echo =
                matches!((protocol, body.first()), (IpProtocol::Icmp, Some(8)) | (IpProtocol::Icmpv6, Some(128)));
            Some(Parsed::Other { destination, echo: (is_echo && body.len() >= 8).then_some(payload) })
        }
    }
}

/// The destination address of an IP packet; `None` when it is none.
pub(super) fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => packet.get(16..20).and_then(|octets| <[u8; 4]>::try_from(octets).ok()).map(IpAddr::from),
        6 => packet.get(24..40).and_then(|octets| <[u8; 16]>::try_from(octets).ok()).map(IpAddr::from),
        _ => None,
    }
}

/// Whether a SYN offers to scale windows (RFC 7323 §2.2).
pub(super) fn offers_scaling(packet: &[u8]) -> bool {
    let scaling = |packet: &[u8]| {
        let tcp = TcpPacket::new_checked(packet.get(transport(packet)?..)?).ok()?;
        let mut options = tcp.options();
        while !options.is_empty() {
            let (rest, option) = TcpOption::parse(options).ok()?;
            if matches!(option, TcpOption::WindowScale(_)) {
                return Some(());
            }
            options = rest;
        }
        None
    };
    scaling(packet).is_some()
}

/// Makes the window of a TCP packet of ours at most `most`, unscaled; not a SYN's, which is never scaled. The checksum is
/// not mended.
pub(super) fn limit_window(packet: &mut [u8], most: u16) {
    let Some(body) = tcp_of(packet).and_then(|at| packet.get_mut(at..)) else { return };
    let mut tcp = TcpPacket::new_unchecked(body);
    if !tcp.syn() && tcp.window_len() > most {
        tcp.set_window_len(most);
    }
}

/// Where the TCP header of a packet of ours begins.
fn tcp_of(packet: &[u8]) -> Option<usize> {
    let (protocol, start) = match packet.first()? >> 4 {
        4 => (*packet.get(9)?, 20),
        _ => (*packet.get(6)?, 40),
    };
    (protocol == u8::from(IpProtocol::Tcp) && packet.len() >= start + 20).then_some(start)
}

/// Where the header behind the IP header begins.
fn transport(packet: &[u8]) -> Option<usize> {
    let first = packet.first()?;
    Some(if first >> 4 == 4 { usize::from(first & 0xf) * 4 } else { IPV6_HEADER_LEN })
}

/// The numbers of a TCP packet of ours; none for a reset.
pub(super) fn sent(packet: &[u8]) -> Option<Sent> {
    let tcp = TcpPacket::new_checked(packet.get(tcp_of(packet)?..)?).ok()?;
    (!tcp.rst()).then(|| Sent {
        start: tcp.seq_number(),
        end: tcp.seq_number() + tcp.segment_len(),
        acks: tcp.ack_number(),
        window: tcp.window_len(),
    })
}

/// Builds the bare acknowledgement that the peer of `flow` would send to repeat `ack`.
pub(super) fn build_ack(flow: Flow, ack: Ack) -> Vec<u8> {
    let Flow { local, remote } = flow;
    let numbers = Sent { start: ack.end, end: ack.end, acks: ack.number, window: ack.window };
    build_segment(Flow { local: remote, remote: local }, TcpControl::None, numbers)
}

/// Copies the bare acknowledgement in `packet` to `room`, with another number; its checksum is not mended. `None` when it
/// does not fit.
pub(super) fn acknowledge_less<'a>(packet: &[u8], number: TcpSeqNumber, room: &'a mut [u8]) -> Option<&'a [u8]> {
    let at = transport(packet)?;
    let copy = room.get_mut(..packet.len())?;
    copy.copy_from_slice(packet);
    TcpPacket::new_unchecked(copy.get_mut(at..)?).set_ack_number(number);
    Some(copy)
}

/// Builds the bare FIN of our end of `flow`, at `numbers.start`.
pub(super) fn build_fin(flow: Flow, numbers: Sent) -> Vec<u8> {
    build_segment(flow, TcpControl::Fin, numbers)
}

/// Builds a segment without data or options.
fn build_segment(flow: Flow, control: TcpControl, numbers: Sent) -> Vec<u8> {
    let (source, destination) = (IpAddress::from(flow.local.ip()), IpAddress::from(flow.remote.ip()));
    let tcp = TcpRepr {
        src_port: flow.local.port(),
        dst_port: flow.remote.port(),
        control,
        seq_number: numbers.start,
        ack_number: Some(numbers.acks),
        window_len: numbers.window,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
    let ip = IpRepr::new(source, destination, IpProtocol::Tcp, tcp.buffer_len(), HOP_LIMIT);
    let checksums = ChecksumCapabilities::default();
    let mut packet = vec![0; ip.buffer_len()];
    ip.emit(&mut packet[..], &checksums);
    tcp.emit(&mut TcpPacket::new_unchecked(&mut packet[ip.header_len()..]), &source, &destination, &checksums);
    packet
}

/// Turns an echo request, whose message begins at `message`, into its answer.
pub(super) fn echo_reply(packet: &mut [u8], message: usize) {
    let is_v4 = packet.first().is_some_and(|first| first >> 4 == 4);
    let (addresses, reply, hops) = if is_v4 { (12..20, 0, 8) } else { (8..40, 129, 7) };
    if packet.len() < message + 8 || message < addresses.end {
        return;
    }
    packet[hops] = HOP_LIMIT;
    let addresses = &mut packet[addresses];
    let (source, destination) = addresses.split_at_mut(addresses.len() / 2);
    source.swap_with_slice(destination);
    let pseudo = match (mesh_tun::packet::source(packet), mesh_tun::packet::destination(packet)) {
        (Some(from), Some(to)) if !is_v4 => pseudo_header(from, to, Protocol::ICMPV6, packet.len() - message),
        _ => Sum::default(),
    };
    let body = &mut packet[message..];
    body[0] = reply;
    body[2..4].fill(0);
    let sum = pseudo.bytes(body).finish();
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    if is_v4 {
        let header = &mut packet[..message];
        header[10..12].fill(0);
        let sum = Sum::default().bytes(header).finish();
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Builds one UDP packet; `None` when the ends are of different families or the packet would exceed `mtu`.
pub(super) fn build_udp(flow: Flow, payload: &[u8], mtu: usize) -> Option<Vec<u8>> {
    if flow.local.is_ipv4() != flow.remote.is_ipv4() {
        return None;
    }
    let (source, destination) = (IpAddress::from(flow.local.ip()), IpAddress::from(flow.remote.ip()));
    let udp = UdpRepr { src_port: flow.local.port(), dst_port: flow.remote.port() };
    let ip = IpRepr::new(source, destination, IpProtocol::Udp, udp.header_len() + payload.len(), HOP_LIMIT);
    let total = ip.header_len() + udp.header_len() + payload.len();
    if total > mtu {
        return None;
    }
    let checksums = ChecksumCapabilities::default();
    let mut packet = vec![0; total];
    ip.emit(&mut packet[..], &checksums);
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut packet[ip.header_len()..]),
        &source,
        &destination,
        payload.len(),
        |body| body.copy_from_slice(payload),
        &checksums,
    );
    Some(packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flow(local: &str, remote: &str) -> Flow {
        Flow { local: local.parse().unwrap(), remote: remote.parse().unwrap() }
    }

    #[test]
    fn a_built_datagram_is_read_back_at_the_other_end() {
        for (local, remote) in
            [("100.64.0.1:53", "100.64.0.2:4000"), ("[fd7a:115c:a1e0::1]:53", "[fd7a:115c:a1e0::2]:4000")]
        {
            let sent = flow(local, remote);
            let packet = build_udp(sent, b"payload", 1280).unwrap();
            let Some(Parsed::Udp { flow, payload }) = parse(&packet, Checksum::Unknown) else {
                panic!("not a datagram")
            };
            assert_eq!(flow, Flow { local: sent.remote, remote: sent.local });
            assert_eq!(&packet[payload], b"payload");
            assert_eq!(destination(&packet), Some(sent.remote.ip()));
        }
    }

    #[test]
    fn a_datagram_with_a_flipped_bit_is_refused() {
        let mut packet = build_udp(flow("100.64.0.1:53", "100.64.0.2:4000"), b"payload", 1280).unwrap();
        *packet.last_mut().unwrap() ^= 1;
        assert_eq!(parse(&packet, Checksum::Unknown), None);
    }

    #[test]
    fn a_datagram_beyond_the_mtu_is_not_built() {
        assert!(build_udp(flow("100.64.0.1:1", "100.64.0.2:2"), &[0; 1252], 1280).is_some());
        assert!(build_udp(flow("100.64.0.1:1", "100.64.0.2:2"), &[0; 1253], 1280).is_none());
        assert!(build_udp(flow("100.64.0.1:1", "[fd7a::2]:2"), b"", 1280).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200), version in any::<bool>()) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = if version { 0x45 } else { 0x60 };
            }
            if let Some(Parsed::Udp { payload, .. }) = parse(&bytes, Checksum::Unknown) {
                prop_assert!(bytes.get(payload).is_some());
            }
            let _ = destination(&bytes);
            let _ = offers_scaling(&bytes);
            limit_window(&mut bytes, 1);
            if let Some(Parsed::Other { echo: Some(message), .. }) = parse(&bytes, Checksum::Unknown) {
                echo_reply(&mut bytes, message.start);
            }
        }
    }
}
