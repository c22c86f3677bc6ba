//! The internet checksum (RFC 1071) and its incremental update (RFC 1624).

use std::net::IpAddr;

use super::{Malformed, Packet, Protocol, ipv4};

/// A running ones'-complement sum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes as big-endian words; an odd last byte is padded with zero.
    ///
    /// The sum does not depend on the order of bytes in a word (RFC 1071 §1.2 B), so it is taken over the host's words of
    /// four bytes, which compilers turn into vector instructions, and turned round at the end.
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        let mut sum: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        sum += u64::from(u32::from_ne_bytes(last));
        Self(self.0 + u64::from(u16::from_be_bytes(fold(sum).to_ne_bytes())))
    }

    /// Adds one word.
    #[must_use]
    pub fn word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word))
    }

    /// The checksum: the complement of the folded sum.
    #[must_use]
    pub fn finish(self) -> u16 {
        !fold(self.0)
    }
}

/// Adds the words of a sum until one is left.
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0)
}

/// The sum over the pseudo header of TCP, UDP and ICMPv6 (RFC 9293 §3.1, RFC 8200 §8.1).
#[must_use]
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: Protocol, len: usize) -> Sum {
    let sum = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            Sum::default().bytes(&source.octets()).bytes(&destination.octets())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            Sum::default().bytes(&source.octets()).bytes(&destination.octets())
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => Sum::default(),
    };
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    sum.word(u16::from(protocol.0)).bytes(&len.to_be_bytes())
}

/// A checksum after one covered word changed (RFC 1624 equation 3).
#[must_use]
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    Sum::default().word(!checksum).word(!old).word(new).finish()
}

/// Writes the checksum of an IPv4 header in place.
///
/// # Errors
/// [`Malformed::Header`] if the bytes are no IPv4 header.
pub fn fill_ipv4_header(packet: &mut [u8]) -> Result<(), Malformed> {
    let len = usize::from(packet.first().ok_or(Malformed::Header)? & 0xf) * 4;
    let header = packet.get_mut(..len).filter(|header| header.len() >= ipv4::HEADER_LEN).ok_or(Malformed::Header)?;
    header[10..12].fill(0);
    let checksum = Sum::default().bytes(header).finish();
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    Ok(())
}

/// Whether the checksum of a TCP, UDP or ICMP packet is right; other protocols and fragments have none to check.
#[must_use]
pub fn transport_is_valid(packet: &Packet<'_>) -> bool {
    if packet.fragment != super::Fragment::Whole {
        return true;
    }
    let pseudo = match packet.protocol {
        Protocol::UDP if packet.payload.get(6..8) == Some(&[0, 0]) && packet.source.is_ipv4() => return true,
        Protocol::TCP | Protocol::UDP | Protocol::ICMPV6 => {
            pseudo_header(packet.source, packet.destination, packet.protocol, packet.payload.len())
        }
        Protocol::ICMP => Sum::default(),
        _ => return true,
    };
    pseudo.bytes(packet.payload).finish() == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    #[test]
    fn example_of_rfc_1071_adds_up() {
        // §3: 0001 f203 f4f5 f6f7 sums to ddf2.
        assert_eq!(Sum::default().bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]).finish(), !0xddf2);
    }

    #[test]
    fn checksums_made_elsewhere_are_valid_and_changed_ones_are_not() {
        for v6 in [false, true] {
            let mut bytes = Vec::new();
            let builder =
                if v6 { PacketBuilder::ipv6([1; 16], [2; 16], 64) } else { PacketBuilder::ipv4([1; 4], [2; 4], 64) };
            builder.tcp(1, 2, 3, 4).write(&mut bytes, b"odd").unwrap();
            assert!(transport_is_valid(&Packet::parse(&bytes).unwrap()));
            *bytes.last_mut().unwrap() ^= 1;
            assert!(!transport_is_valid(&Packet::parse(&bytes).unwrap()));
        }
    }

    #[test]
    fn ipv4_header_checksum_equals_the_one_made_elsewhere() {
        let mut bytes = Vec::new();
        PacketBuilder::ipv4([9; 4], [8; 4], 3).udp(1, 2).write(&mut bytes, b"x").unwrap();
        let made = bytes.clone();
        bytes[10..12].fill(0xab);
        fill_ipv4_header(&mut bytes).unwrap();
        assert_eq!(bytes, made);
        assert_eq!(fill_ipv4_header(&mut [0x45; 19]), Err(Malformed::Header));
    }

    proptest! {
        #[test]
        fn summing_by_four_equals_summing_by_two(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let by_two = bytes.chunks(2).fold(Sum::default(), |sum, word| {
                sum.word(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]))
            });
            prop_assert_eq!(Sum::default().bytes(&bytes).finish(), by_two.finish());
        }

        #[test]
        fn updating_equals_summing_anew(mut words in proptest::collection::vec(any::<u16>(), 2..20), new: u16) {
            let sum = |words: &[u16]| words.iter().fold(Sum::default(), |sum, word| sum.word(*word)).finish();
            // All words zero is the one input where the two zeros of ones' complement differ.
            prop_assume!(words[1..].iter().any(|word| *word != 0));
            let (before, old) = (sum(&words), words[0]);
            words[0] = new;
            prop_assert_eq!(update(before, old, new), sum(&words));
        }
    }
}
