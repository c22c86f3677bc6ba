//! The first bytes of transport headers: ports, flags and types.
//!
//! | protocol | read here | defined in |
//! |---|---|---|
//! | TCP | ports at 0 and 2, flags at 13 | RFC 9293 §3.1 |
//! | UDP | ports at 0 and 2 | RFC 768 |
//! | SCTP | ports at 0 and 2 | RFC 9260 §3.1 |
//! | ICMP, ICMPv6 | type at 0, code at 1, identifier of echoes at 4 | RFC 792, RFC 4443 |

use super::{Malformed, Protocol};

/// What the transport header of a packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// The sender's port.
        source: u16,
        /// The receiver's port.
        destination: u16,
        /// The control bits.
        flags: TcpFlags,
    },
    /// UDP.
    Udp {
        /// The sender's port.
        source: u16,
        /// The receiver's port.
        destination: u16,
    },
    /// SCTP.
    Sctp {
        /// The sender's port.
        source: u16,
        /// The receiver's port.
        destination: u16,
    },
    /// ICMP or ICMPv6.
    Icmp {
        /// What kind of message it is.
        class: IcmpClass,
        /// The identifier of an echo request or reply; 0 for other messages.
        identifier: u16,
    },
    /// Another protocol, or a later fragment.
    Unknown,
}

/// The control bits of a TCP segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// Synchronise: opens a connection.
    pub const SYN: Self = Self(0x02);
    /// Acknowledge.
    pub const ACK: Self = Self(0x10);

    /// Whether the segment asks to open a connection: SYN without ACK.
    #[must_use]
    pub fn opens(self) -> bool {
        self.0 & Self::SYN.0 != 0 && self.0 & Self::ACK.0 == 0
    }
}

/// What kind of ICMP or ICMPv6 message a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IcmpClass {
    /// Asks for an echo.
    EchoRequest,
    /// Answers an echo request.
    EchoReply,
    /// Reports an error about an earlier packet: unreachable, too big, time exceeded, parameter problem.
    Error,
    /// Anything else.
    Other,
}

impl Transport {
    /// Reads the header of `protocol` at the beginning of `payload`.
    ///
    /// # Errors
    /// [`Malformed::Transport`] if a known header is cut off.
    pub fn parse(protocol: Protocol, payload: &[u8]) -> Result<Self, Malformed> {
        match protocol {
            Protocol::TCP => {
                let header = payload.first_chunk::<20>().ok_or(Malformed::Transport)?;
                let (source, destination) = ports(header);
                Ok(Self::Tcp { source, destination, flags: TcpFlags(header[13]) })
            }
            Protocol::UDP => {
                let (source, destination) = ports(payload.first_chunk::<8>().ok_or(Malformed::Transport)?);
                Ok(Self::Udp { source, destination })
            }
            Protocol::SCTP => {
                let (source, destination) = ports(payload.first_chunk::<12>().ok_or(Malformed::Transport)?);
                Ok(Self::Sctp { source, destination })
            }
            Protocol::ICMP => icmp(payload.first_chunk().ok_or(Malformed::Transport)?, |kind| match kind {
                8 => IcmpClass::EchoRequest,
                0 => IcmpClass::EchoReply,
                3 | 4 | 11 | 12 => IcmpClass::Error,
                _ => IcmpClass::Other,
            }),
            Protocol::ICMPV6 => icmp(payload.first_chunk().ok_or(Malformed::Transport)?, |kind| match kind {
                128 => IcmpClass::EchoRequest,
                129 => IcmpClass::EchoReply,
                1..=4 => IcmpClass::Error,
                _ => IcmpClass::Other,
            }),
            _ => Ok(Self::Unknown),
        }
    }

    /// Source and destination port, where the protocol has them.
    #[must_use]
    pub fn ports(&self) -> Option<(u16, u16)> {
        match *self {
            Self::Tcp { source, destination, .. }
            | Self::Udp { source, destination }
            | Self::Sctp { source, destination } => Some((source, destination)),
            Self::Icmp { .. } | Self::Unknown => None,
        }
    }
}

fn ports(header: &[u8]) -> (u16, u16) {
    (u16::from_be_bytes([header[0], header[1]]), u16::from_be_bytes([header[2], header[3]]))
}

fn icmp(header: &[u8; 8], class: impl Fn(u8) -> IcmpClass) -> Result<Transport, Malformed> {
    let class = class(header[0]);
    let identifier = match class {
        IcmpClass::EchoRequest | IcmpClass::EchoReply => u16::from_be_bytes([header[4], header[5]]),
        IcmpClass::Error | IcmpClass::Other => 0,
    };
    Ok(Transport::Icmp { class, identifier })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_syn_without_ack_opens() {
        for (flags, opens) in [(0x02, true), (0x12, false), (0x10, false), (0x00, false), (0x03, true), (0xc2, true)] {
            assert_eq!(TcpFlags(flags).opens(), opens, "{flags:#x}");
        }
    }

    #[test]
    fn icmp_types_are_told_apart_by_version() {
        let echo = |kind| [kind, 0, 0, 0, 0x12, 0x34, 0, 1];
        let class = |protocol, kind| {
            let Ok(Transport::Icmp { class, .. }) = Transport::parse(protocol, &echo(kind)) else {
                panic!("{protocol} type {kind} is not read as ICMP")
            };
            class
        };
        assert_eq!(class(Protocol::ICMP, 8), IcmpClass::EchoRequest);
        assert_eq!(class(Protocol::ICMP, 0), IcmpClass::EchoReply);
        assert_eq!(class(Protocol::ICMPV6, 128), IcmpClass::EchoRequest);
        assert_eq!(class(Protocol::ICMPV6, 129), IcmpClass::EchoReply);
        assert_eq!(class(Protocol::ICMPV6, 2), IcmpClass::Error);
        assert_eq!(class(Protocol::ICMPV6, 135), IcmpClass::Other);
    }

    #[test]
    fn cut_off_headers_are_malformed() {
        for (protocol, len) in [(Protocol::TCP, 19), (Protocol::UDP, 7), (Protocol::SCTP, 11), (Protocol::ICMP, 7)] {
            assert_eq!(Transport::parse(protocol, &vec![0; len]), Err(Malformed::Transport), "{protocol}");
            assert!(Transport::parse(protocol, &vec![0; len + 1]).is_ok(), "{protocol}");
        }
    }
}
