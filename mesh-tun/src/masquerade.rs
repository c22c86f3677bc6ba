//! Another address for this node in the eyes of one peer: rewrites packets both ways, without any state.
//!
//! | packet | outgoing | incoming |
//! |---|---|---|
//! | IP header | our source becomes the one shown | the shown destination becomes ours |
//! | packet quoted in an ICMP error | its destination | its source |
//!
//! Checksums that cover an address are brought up to date by the difference (RFC 1624), so that a packet that was damaged
//! before stays damaged. Later fragments have an IP header only.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::packet::checksum::Sum;
use crate::packet::{self, Fragment, IcmpClass, Packet, Protocol, Transport, ipv4, ipv6};

const ICMP_HEADER_LEN: usize = 8;

/// By which addresses a peer knows this node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Masquerade {
    v4: Option<[Ipv4Addr; 2]>,
    v6: Option<[Ipv6Addr; 2]>,
}

impl Masquerade {
    /// No difference yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Shows the peer `shown` in place of `own`. Two addresses of different families, or the same, change nothing.
    #[must_use]
    pub fn show(mut self, own: IpAddr, shown: IpAddr) -> Self {
        match (own, shown) {
            (IpAddr::V4(own), IpAddr::V4(shown)) if own != shown => self.v4 = Some([own, shown]),
            (IpAddr::V6(own), IpAddr::V6(shown)) if own != shown => self.v6 = Some([own, shown]),
            _ => {}
        }
        self
    }

    /// Whether every packet stays as it is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Rewrites a packet to the peer; true if something was to be changed. What is no packet stays as it is.
    pub fn outgoing(&self, bytes: &mut [u8]) -> bool {
        match bytes.first().map(|byte| byte >> 4) {
            Some(4) => self.v4.is_some_and(|[own, shown]| rewrite(bytes, Side::Source, own.octets(), shown.octets())),
            Some(6) => self.v6.is_some_and(|[own, shown]| rewrite(bytes, Side::Source, own.octets(), shown.octets())),
            _ => false,
        }
    }

    /// Rewrites a packet from the peer; true if something was to be changed. What is no packet stays as it is.
    pub fn incoming(&self, bytes: &mut [u8]) -> bool {
        match bytes.first().map(|byte| byte >> 4) {
            Some(4) => {
                self.v4.is_some_and(|[own, shown]| rewrite(bytes, Side::Destination, shown.octets(), own.octets()))
            }
            Some(6) => {
                self.v6.is_some_and(|[own, shown]| rewrite(bytes, Side::Destination, shown.octets(), own.octets()))
            }
            _ => false,
        }
    }
}

/// Which address of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

impl Side {
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }

    /// Where the address is in a header with addresses of `len` bytes.
    fn offset(self, len: usize) -> usize {
        let first = if len == 4 { 12 } else { 8 };
        if self == Self::Source { first } else { first + len }
    }
}

/// How much the sum over some bytes has changed.
#[derive(Debug, Clone, Copy, Default)]
struct Difference(Sum);

impl Difference {
    fn and(self, old: u16, new: u16) -> Self {
        Self(self.0.word(!old).word(new))
    }

    fn plus(self, other: Self) -> Self {
        Self(self.0.word(!other.0.finish()))
    }
}

fn rewrite<const N: usize>(bytes: &mut [u8], side: Side, from: [u8; N], to: [u8; N]) -> bool {
    let Ok(parsed) = Packet::parse(bytes) else { return false };
    let Some(end) = packet::claimed_len(bytes) else { return false };
    let Some(transport) = end.checked_sub(parsed.payload.len()) else { return false };
    let (protocol, fragment) = (parsed.protocol, parsed.fragment);
    let is_error = matches!(parsed.transport, Transport::Icmp { class: IcmpClass::Error, .. });
    let address = replace(bytes, side, from, to);
    if let (Some(difference), 4) = (address, N) {
        apply(bytes, 10, difference);
    }
    if matches!(fragment, Fragment::Later { .. }) {
        return address.is_some();
    }
    let quoted = match bytes.get_mut(transport + ICMP_HEADER_LEN..end) {
        Some(quote) if is_error => rewrite_quote(quote, side.other(), from, to),
        Some(_) | None => None,
    };
    // ICMP's own checksum covers what it quotes; that of ICMPv6 covers the addresses of the header as well.
    match (protocol, address, quoted) {
        (Protocol::ICMP, _, Some(quoted)) => apply(bytes, transport + 2, quoted),
        (Protocol::ICMPV6, address, Some(quoted)) => {
            apply(bytes, transport + 2, address.unwrap_or_default().plus(quoted))
        }
        (_, Some(address), _) => apply_transport(bytes, transport, protocol, address),
        (_, None, _) => None,
    };
    address.is_some() || quoted.is_some()
}

/// Rewrites the packet that an ICMP error quotes, which may be cut off anywhere, and tells how its sum has changed.
fn rewrite_quote<const N: usize>(quote: &mut [u8], side: Side, from: [u8; N], to: [u8; N]) -> Option<Difference> {
    let first = *quote.first()?;
    let (protocol, transport, has_transport) = match (first >> 4, N) {
        (4, 4) if quote.len() >= ipv4::HEADER_LEN => {
            let header_len = usize::from(first & 0xf) * 4;
            let begins = quote[6] & 0x1f == 0 && quote[7] == 0;
            (Protocol(quote[9]), header_len, begins && header_len >= ipv4::HEADER_LEN)
        }
        (6, 16) if quote.len() >= ipv6::HEADER_LEN => (Protocol(quote[6]), ipv6::HEADER_LEN, true),
        _ => return None,
    };
    let address = replace(quote, side, from, to)?;
    let mut difference = address;
    if N == 4
        && let Some(header) = apply(quote, 10, address)
    {
        difference = difference.plus(header);
    }
    if has_transport && let Some(field) = apply_transport(quote, transport, protocol, address) {
        difference = difference.plus(field);
    }
    Some(difference)
}

/// Replaces an address if it is `from`, and tells how the sum has changed.
fn replace<const N: usize>(bytes: &mut [u8], side: Side, from: [u8; N], to: [u8; N]) -> Option<Difference> {
    let at = side.offset(N);
    let field = bytes.get_mut(at..at + N).filter(|field| **field == from)?;
    field.copy_from_slice(&to);
    let words = |bytes: [u8; N]| (0..N).step_by(2).map(move |at| u16::from_be_bytes([bytes[at], bytes[at + 1]]));
    Some(words(from).zip(words(to)).fold(Difference::default(), |sum, (old, new)| sum.and(old, new)))
}

/// Updates the checksum of a transport protocol whose checksum covers the addresses; none if there is none.
fn apply_transport(bytes: &mut [u8], transport: usize, protocol: Protocol, by: Difference) -> Option<Difference> {
    match protocol {
        Protocol::TCP => apply(bytes, transport + 16, by),
        Protocol::ICMPV6 => apply(bytes, transport + 2, by),
        Protocol::UDP => {
            let at = transport + 6;
            // Zero means that there is no checksum (RFC 768).
            let old = word(bytes, at).filter(|old| *old != 0)?;
            let difference = apply(bytes, at, by)?;
            if word(bytes, at) != Some(0) {
                return Some(difference);
            }
            bytes.get_mut(at..at + 2)?.fill(0xff);
            Some(Difference::default().and(old, 0xffff))
        }
        _ => None,
    }
}

/// Updates the checksum at `at`, and tells how that has changed the sum of what it is part of; none if it is cut off.
fn apply(bytes: &mut [u8], at: usize, by: Difference) -> Option<Difference> {
    let old = word(bytes, at)?;
    let new = by.0.word(!old).finish();
    bytes.get_mut(at..at + 2)?.copy_from_slice(&new.to_be_bytes());
    Some(Difference::default().and(old, new))
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk::<2>()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mtu;
    use crate::packet::checksum;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    const PEER4: [u8; 4] = [100, 64, 0, 2];
    const OWN4: [u8; 4] = [100, 64, 0, 1];
    const SHOWN4: [u8; 4] = [100, 99, 200, 7];
    const PEER6: [u8; 16] = [0xfe; 16];
    const OWN6: [u8; 16] = [0xfd; 16];
    const SHOWN6: [u8; 16] = [0xfc; 16];

    #[test]
    fn packets_leave_with_the_shown_address_and_come_back_to_ours() {
        for v6 in [false, true] {
            for kind in 0..3 {
                let original = packet(v6, kind, b"some payload", true);
                let mut bytes = original.clone();
                assert!(masquerade().outgoing(&mut bytes));
                assert_eq!(packet::source(&bytes), Some(if v6 { SHOWN6.into() } else { SHOWN4.into() }));
                assert_valid(&bytes);
                // The peer's answer comes to the shown address.
                let mut answer = packet(v6, kind, b"some answer", false);
                assert!(masquerade().incoming(&mut answer));
                assert_eq!(packet::destination(&answer), Some(if v6 { OWN6.into() } else { OWN4.into() }));
                assert_valid(&answer);
            }
        }
    }

    #[test]
    fn other_addresses_and_an_empty_masquerade_change_nothing() {
        let mut bytes = packet(false, 0, b"x", true);
        let before = bytes.clone();
        assert!(!masquerade().incoming(&mut bytes));
        assert!(!Masquerade::new().outgoing(&mut bytes));
        assert!(Masquerade::new().show(OWN4.into(), OWN6.into()).is_empty());
        assert_eq!(bytes, before);
    }

    #[test]
    fn errors_quote_what_their_reader_has_sent() {
        for v6 in [false, true] {
            for kind in 0..3 {
                // We send; somebody behind the peer finds it too long, as it looked on the way.
                let original = packet(v6, kind, &[7; 1000], true);
                let mut sent = original.clone();
                masquerade().outgoing(&mut sent);
                let mut error = vec![0; mtu::ANSWER_MAX];
                let len = mtu::too_big(&sent, 800, &mut error).unwrap();
                let mut error = error[..len].to_vec();
                assert!(masquerade().incoming(&mut error));
                assert_valid(&error);
                let quote = Packet::parse(&error).unwrap().payload[8..].to_vec();
                assert_eq!(quote, original[..quote.len()], "the quote is what we have sent");
                // And what we quote to the peer is what it has sent.
                let theirs = packet(v6, kind, &[7; 1000], false);
                let mut seen = theirs.clone();
                masquerade().incoming(&mut seen);
                let mut error = vec![0; mtu::ANSWER_MAX];
                let len = mtu::too_big(&seen, 800, &mut error).unwrap();
                let mut error = error[..len].to_vec();
                assert!(masquerade().outgoing(&mut error));
                assert_valid(&error);
                let quote = Packet::parse(&error).unwrap().payload[8..].to_vec();
                assert_eq!(quote, theirs[..quote.len()]);
            }
        }
    }

    #[test]
    fn a_datagram_without_checksum_gets_none() {
        let mut bytes = packet(false, 1, b"x", true);
        bytes[26..28].fill(0);
        assert!(masquerade().outgoing(&mut bytes));
        assert_eq!(bytes[26..28], [0, 0]);
    }

    #[test]
    fn a_later_fragment_changes_its_header_alone() {
        let mut bytes = packet(false, 1, &[9; 64], true);
        bytes[6..8].copy_from_slice(&[0, 20]);
        checksum::fill_ipv4_header(&mut bytes).unwrap();
        let before = bytes.clone();
        assert!(masquerade().outgoing(&mut bytes));
        assert_eq!(bytes[20..], before[20..]);
        assert_eq!(Sum::default().bytes(&bytes[..20]).finish(), 0);
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_same_packet(
            v6: bool, kind in 0..3_u8, payload in proptest::collection::vec(any::<u8>(), 0..300), own: [u8; 16], shown: [u8; 16],
        ) {
            let (own, shown) = if v6 { (IpAddr::from(own), shown.into()) } else { (first4(own), first4(shown)) };
            prop_assume!(own != shown);
            let there = Masquerade::new().show(own, shown);
            let back = Masquerade::new().show(shown, own);
            let original = with_source(kind, &payload, own);
            let mut bytes = original.clone();
            prop_assert!(there.outgoing(&mut bytes));
            prop_assert_eq!(packet::source(&bytes), Some(shown));
            assert_valid(&bytes);
            prop_assert!(back.outgoing(&mut bytes));
            prop_assert_eq!(bytes, original);
        }

        #[test]
        fn any_bytes_are_survived(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200), v6: bool, protocol in 0..4_usize, quote: bool,
        ) {
            // Plausible headers, so that the inner parts are reached.
            let protocol = [1, 6, 17, 58][protocol];
            let len = u16::try_from(bytes.len()).unwrap();
            if v6 && bytes.len() >= 40 {
                (bytes[0], bytes[6]) = (0x60, protocol);
                bytes[4..6].copy_from_slice(&(len - 40).to_be_bytes());
                bytes[8..24].copy_from_slice(&OWN6);
                bytes[24..40].copy_from_slice(&SHOWN6);
                if quote && bytes.len() > 40 {
                    bytes[40] = 1;
                }
            } else if bytes.len() >= 20 {
                (bytes[0], bytes[9]) = (0x45, protocol);
                bytes[2..4].copy_from_slice(&len.to_be_bytes());
                bytes[12..16].copy_from_slice(&OWN4);
                bytes[16..20].copy_from_slice(&SHOWN4);
                if quote && bytes.len() > 20 {
                    bytes[20] = 3;
                }
            }
            masquerade().outgoing(&mut bytes);
            masquerade().incoming(&mut bytes);
            prop_assert_eq!(bytes.len(), usize::from(len));
        }
    }

    fn masquerade() -> Masquerade {
        Masquerade::new().show(OWN4.into(), SHOWN4.into()).show(OWN6.into(), SHOWN6.into())
    }

    fn first4(bytes: [u8; 16]) -> IpAddr {
        IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    fn assert_valid(bytes: &[u8]) {
        assert!(checksum::transport_is_valid(&Packet::parse(bytes).unwrap()));
        assert!(bytes[0] >> 4 == 6 || Sum::default().bytes(&bytes[..20]).finish() == 0);
    }

    /// TCP, UDP or an echo request, from us or to the address that we show.
    fn packet(v6: bool, kind: u8, payload: &[u8], ours: bool) -> Vec<u8> {
        match (v6, ours) {
            (false, true) => build(PacketBuilder::ipv4(OWN4, PEER4, 64), false, kind, payload),
            (false, false) => build(PacketBuilder::ipv4(PEER4, SHOWN4, 64), false, kind, payload),
            (true, true) => build(PacketBuilder::ipv6(OWN6, PEER6, 64), true, kind, payload),
            (true, false) => build(PacketBuilder::ipv6(PEER6, SHOWN6, 64), true, kind, payload),
        }
    }

    fn with_source(kind: u8, payload: &[u8], source: IpAddr) -> Vec<u8> {
        match source {
            IpAddr::V4(source) => build(PacketBuilder::ipv4(source.octets(), PEER4, 64), false, kind, payload),
            IpAddr::V6(source) => build(PacketBuilder::ipv6(source.octets(), PEER6, 64), true, kind, payload),
        }
    }

    fn build(
        builder: etherparse::PacketBuilderStep<etherparse::IpHeaders>,
        v6: bool,
        kind: u8,
        payload: &[u8],
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        match kind {
            0 => builder.tcp(1, 2, 3, 4).write(&mut bytes, payload),
            1 => builder.udp(1, 2).write(&mut bytes, payload),
            _ if v6 => builder.icmpv6_echo_request(1, 2).write(&mut bytes, payload),
            _ => builder.icmpv4_echo_request(1, 2).write(&mut bytes, payload),
        }
        .unwrap();
        bytes
    }
}
