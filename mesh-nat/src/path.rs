//! Paths: the ways on which a datagram can reach a peer, and what decides between them.
//!
//! - `candidate`: addresses worth trying, bounded per peer
//! - `probe`: pings in flight, round-trip estimate, ping budget
//! - [`score`]: which of two proven addresses is better
//! - `select`: which proven address carries the data

use std::fmt;
use std::net::SocketAddr;

use mesh_derp::map::RegionId;

pub(crate) mod candidate;
pub(crate) mod mtu;
pub(crate) mod probe;
pub mod score;
pub(crate) mod select;

/// Names one of the node's own UDP sockets. The driver hands the numbers out; they mean nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketId(pub u16);

/// An IP version, as sockets have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family that a socket needs to reach `address`. IPv4-mapped IPv6 addresses count as IPv4.
    #[must_use]
    pub fn of(address: &SocketAddr) -> Self {
        if address.ip().to_canonical().is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// A virtual network identifier: names one pair of clients at a peer relay. 24 bits (RFC 8926 §3.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

impl Vni {
    /// Takes a number below 2²⁴; anything larger gives `None`.
    #[must_use]
    pub const fn new(number: u32) -> Option<Self> {
        if number < 1 << 24 { Some(Self(number)) } else { None }
    }

    /// Takes the three bytes of a Geneve header, most significant first.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 3]) -> Self {
        Self(u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]))
    }

    /// The number, below 2²⁴.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One way to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    /// UDP between the two nodes.
    Direct {
        /// The socket of ours that the datagram leaves by or came in on.
        socket: SocketId,
        /// The peer's address as our socket sees it.
        remote: SocketAddr,
    },
    /// UDP through another node that forwards (Geneve-encapsulated).
    PeerRelay {
        /// The forwarding node's address.
        server: SocketAddr,
        /// The pair's number there.
        vni: Vni,
    },
    /// A DERP relay.
    Relay {
        /// The region whose relay forwards.
        region: RegionId,
    },
}

impl Path {
    /// Whether the two nodes talk without anyone in between.
    #[must_use]
    pub const fn is_direct(&self) -> bool {
        matches!(self, Self::Direct { .. })
    }

    /// Whether a DERP relay carries the data.
    #[must_use]
    pub const fn is_relay(&self) -> bool {
        matches!(self, Self::Relay { .. })
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct { remote, .. } => write!(f, "direct {remote}"),
            Self::PeerRelay { server, vni } => write!(f, "peer relay {server} vni {vni}"),
            Self::Relay { region } => write!(f, "relay region {region}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vni_has_24_bits() {
        assert_eq!(Vni::new(1 << 24), None);
        assert_eq!(Vni::from_bytes([0xff; 3]), Vni::new((1 << 24) - 1).unwrap());
    }

    #[test]
    fn an_ipv4_mapped_address_needs_an_ipv4_socket() {
        assert_eq!(Family::of(&"[::ffff:192.0.2.1]:1".parse().unwrap()), Family::V4);
        assert_eq!(Family::of(&"[2001:db8::1]:1".parse().unwrap()), Family::V6);
    }
}
