//! IP packets as views over bytes: checked once, then only asked.
//!
//! [`Packet::parse`] tells everything that routing and filtering need; [`source`] and [`destination`] answer the one
//! question of the packet path without looking further. Nothing here panics, whatever the bytes.

use std::fmt;
use std::net::IpAddr;

pub mod checksum;
pub mod ipv4;
pub mod ipv6;
pub mod transport;

pub use ipv4::Ipv4;
pub use ipv6::Ipv6;
pub use transport::{IcmpClass, TcpFlags, Transport};

/// An IP protocol number (IANA "Assigned Internet Protocol Numbers").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Protocol(pub u8);

impl Protocol {
    /// ICMP for IPv4.
    pub const ICMP: Self = Self(1);
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6.
    pub const ICMPV6: Self = Self(58);
    /// The mark of an IPv6 packet without payload (RFC 8200 §4.7).
    pub const NO_NEXT_HEADER: Self = Self(59);
    /// Messages between mesh nodes themselves: "any private encryption scheme" in IANA's list.
    pub const TSMP: Self = Self(99);
    /// SCTP.
    pub const SCTP: Self = Self(132);
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ICMP => f.write_str("icmp"),
            Self::TCP => f.write_str("tcp"),
            Self::UDP => f.write_str("udp"),
            Self::ICMPV6 => f.write_str("icmpv6"),
            Self::TSMP => f.write_str("tsmp"),
            Self::SCTP => f.write_str("sctp"),
            Self(number) => write!(f, "protocol {number}"),
        }
    }
}

/// Whether a packet is whole, or which part of one it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// The whole packet.
    Whole,
    /// The first fragment: it has the transport header.
    First,
    /// A later fragment, without transport header.
    Later {
        /// Bytes of the original payload before this fragment.
        offset: usize,
    },
}

/// Why bytes are no packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The IP version is neither 4 nor 6.
    #[error("IP version is neither 4 nor 6")]
    Version,
    /// The bytes end before the IP header or its extension headers do.
    #[error("packet ends inside its IP header")]
    Header,
    /// A length field contradicts the bytes.
    #[error("length field does not fit the packet")]
    Length,
    /// More extension headers than any real packet has.
    #[error("too many extension headers")]
    Extensions,
    /// The transport header is cut off.
    #[error("packet ends inside its transport header")]
    Transport,
}

/// The facts of one IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'a> {
    /// Who sent it.
    pub source: IpAddr,
    /// Whom it is for.
    pub destination: IpAddr,
    /// The transport protocol, behind all extension headers.
    pub protocol: Protocol,
    /// Whether it is whole.
    pub fragment: Fragment,
    /// Ports, flags, types.
    pub transport: Transport,
    /// The bytes from the transport header on, without link-layer padding.
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Reads the headers of the packet that begins at the first byte.
    ///
    /// # Errors
    /// [`Malformed`] says what is wrong.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        match bytes.first().map(|byte| byte >> 4) {
            Some(4) => {
                let ip = Ipv4::new(bytes)?;
                let (source, destination) = (ip.source().into(), ip.destination().into());
                Self::above(source, destination, ip.protocol(), ip.fragment(), ip.payload())
            }
            Some(6) => {
                let ip = Ipv6::new(bytes)?;
                let (source, destination) = (ip.source().into(), ip.destination().into());
                let upper = ip.upper()?;
                Self::above(source, destination, upper.protocol, upper.fragment, upper.payload)
            }
            Some(_) => Err(Malformed::Version),
            None => Err(Malformed::Header),
        }
    }

    fn above(
        source: IpAddr,
        destination: IpAddr,
        protocol: Protocol,
        fragment: Fragment,
        payload: &'a [u8],
    ) -> Result<Self, Malformed> {
        let transport = match fragment {
            Fragment::Whole | Fragment::First => Transport::parse(protocol, payload)?,
            Fragment::Later { .. } => Transport::Unknown,
        };
        Ok(Self { source, destination, protocol, fragment, transport, payload })
    }
}

/// The destination address, without looking at the rest; none if the bytes are too short for an IP header.
#[must_use]
pub fn destination(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.first()? >> 4 {
        4 => Some(IpAddr::from(*bytes.get(16..20)?.first_chunk::<4>()?)),
        6 => Some(IpAddr::from(*bytes.get(24..40)?.first_chunk::<16>()?)),
        _ => None,
    }
}

/// The source address, without looking at the rest; none if the bytes are too short for an IP header.
#[must_use]
pub fn source(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.first()? >> 4 {
        4 if bytes.len() >= 20 => Some(IpAddr::from(*bytes.get(12..16)?.first_chunk::<4>()?)),
        6 if bytes.len() >= 40 => Some(IpAddr::from(*bytes.get(8..24)?.first_chunk::<16>()?)),
        _ => None,
    }
}

/// The length that the IP header claims, which may be less than the bytes there are (padding) or more (cut off).
#[must_use]
pub fn claimed_len(bytes: &[u8]) -> Option<usize> {
    match bytes.first()? >> 4 {
        4 => Some(usize::from(u16::from_be_bytes(*bytes.get(2..4)?.first_chunk::<2>()?))),
        6 => Some(ipv6::HEADER_LEN + usize::from(u16::from_be_bytes(*bytes.get(4..6)?.first_chunk::<2>()?))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    #[test]
    fn udp_over_ipv4_is_read() {
        let bytes = udp4();
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.source, "100.64.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(packet.destination, "100.64.0.2".parse::<IpAddr>().unwrap());
        assert_eq!(packet.transport, Transport::Udp { source: 1000, destination: 53 });
        assert_eq!(packet.fragment, Fragment::Whole);
        assert_eq!(destination(&bytes), Some(packet.destination));
        assert_eq!(source(&bytes), Some(packet.source));
        assert_eq!(claimed_len(&bytes), Some(bytes.len()));
    }

    #[test]
    fn tcp_over_ipv6_is_read() {
        let mut bytes = Vec::new();
        PacketBuilder::ipv6([0xfd; 16], [0xfe; 16], 64)
            .tcp(4000, 80, 7, 1024)
            .syn()
            .write(&mut bytes, b"hello")
            .unwrap();
        let packet = Packet::parse(&bytes).unwrap();
        let Transport::Tcp { source: 4000, destination: 80, flags } = packet.transport else {
            panic!("not TCP: {packet:?}")
        };
        assert!(flags.opens());
        assert_eq!(destination(&bytes), Some(IpAddr::from([0xfe; 16])));
        assert_eq!(claimed_len(&bytes), Some(bytes.len()));
    }

    #[test]
    fn padding_behind_the_packet_is_not_payload() {
        let mut bytes = udp4();
        let payload = Packet::parse(&bytes).unwrap().payload.len();
        bytes.extend_from_slice(&[0; 12]);
        assert_eq!(Packet::parse(&bytes).unwrap().payload.len(), payload);
    }

    #[test]
    fn cut_off_packets_are_malformed() {
        let bytes = udp4();
        for len in 0..bytes.len() {
            assert!(Packet::parse(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Packet::parse(&bytes);
            let _ = (source(&bytes), destination(&bytes), claimed_len(&bytes));
        }

        #[test]
        fn any_bytes_after_a_plausible_header_are_survived(
            v6: bool, next: u8, tail in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let bytes = if v6 {
                let mut bytes = vec![0; 40];
                bytes[0] = 0x60;
                bytes[4..6].copy_from_slice(&u16::try_from(tail.len()).unwrap().to_be_bytes());
                bytes[6] = next;
                bytes.extend(tail);
                bytes
            } else {
                let mut bytes = vec![0; 20];
                bytes[0] = 0x45;
                bytes[2..4].copy_from_slice(&u16::try_from(20 + tail.len()).unwrap().to_be_bytes());
                bytes[9] = next;
                bytes.extend(tail);
                bytes
            };
            if let Ok(packet) = Packet::parse(&bytes) {
                prop_assert_eq!(Some(packet.destination), destination(&bytes));
                prop_assert_eq!(Some(packet.source), source(&bytes));
            }
        }
    }

    fn udp4() -> Vec<u8> {
        let mut bytes = Vec::new();
        PacketBuilder::ipv4([100, 64, 0, 1], [100, 64, 0, 2], 64).udp(1000, 53).write(&mut bytes, b"query").unwrap();
        bytes
    }
}
