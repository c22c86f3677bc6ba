//! Filter rules as a control plane words them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};

use crate::packet::Protocol;

/// All ports; the only range that also opens protocols without ports.
pub const ALL_PORTS: RangeInclusive<u16> = 0..=u16::MAX;

/// Opens some destinations of this node to some sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Who may send.
    pub sources: Vec<Addresses>,
    /// To where.
    pub destinations: Vec<Destination>,
    /// By which protocols; empty means TCP, UDP, ICMP and ICMPv6.
    pub protocols: Vec<Protocol>,
}

/// Addresses and ports that a rule opens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// The addresses.
    pub addresses: Addresses,
    /// The ports; [`ALL_PORTS`] for any.
    pub ports: RangeInclusive<u16>,
}

/// A run of addresses: one, a prefix, a range, or all of both families.
///
/// Reads the forms `*`, `100.64.0.1`, `100.64.0.0/10` and `100.64.0.1-100.64.0.9`.
///
/// ```
/// # use mesh_tun::filter::Addresses;
/// let range: Addresses = "100.64.0.1-100.64.0.9".parse()?;
/// assert!(range.contains("100.64.0.5".parse()?));
/// assert!("*".parse::<Addresses>()?.contains("fd7a::1".parse()?));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
// Addresses are ordered, all IPv4 before all IPv6, so one pair of ends says everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Addresses {
    first: IpAddr,
    last: IpAddr,
}

/// Why a text names no addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadAddresses {
    /// Not one of the four forms.
    #[error("{0:?} is no address, prefix, range or *")]
    Form(String),
    /// A prefix with bits set behind its length.
    #[error("{0} has host bits set")]
    HostBits(IpNet),
    /// A range that ends before it begins, or in the other family.
    #[error("{0}-{1} is no range")]
    Range(IpAddr, IpAddr),
}

impl Addresses {
    /// All addresses of both families.
    pub const ANY: Self =
        Self { first: IpAddr::V4(Ipv4Addr::UNSPECIFIED), last: IpAddr::V6(Ipv6Addr::from_bits(u128::MAX)) };

    /// The addresses from `first` to `last`, both included.
    ///
    /// # Errors
    /// [`BadAddresses::Range`] if they are of different families or in the wrong order.
    pub fn range(first: IpAddr, last: IpAddr) -> Result<Self, BadAddresses> {
        if first.is_ipv4() != last.is_ipv4() || first > last {
            return Err(BadAddresses::Range(first, last));
        }
        Ok(Self { first, last })
    }

    /// Whether `address` is one of them.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.first <= address && address <= self.last
    }

    /// The fewest prefixes that cover exactly these addresses.
    #[must_use]
    pub fn prefixes(&self) -> Vec<IpNet> {
        let v4 = |first, last| Ipv4Subnets::new(first, last, 0).map(IpNet::V4);
        let v6 = |first, last| Ipv6Subnets::new(first, last, 0).map(IpNet::V6);
        match (self.first, self.last) {
            (IpAddr::V4(first), IpAddr::V4(last)) => v4(first, last).collect(),
            (IpAddr::V6(first), IpAddr::V6(last)) => v6(first, last).collect(),
            (IpAddr::V4(first), IpAddr::V6(last)) => {
                v4(first, Ipv4Addr::BROADCAST).chain(v6(Ipv6Addr::UNSPECIFIED, last)).collect()
            }
            (IpAddr::V6(_), IpAddr::V4(_)) => Vec::new(),
        }
    }
}

impl From<IpAddr> for Addresses {
    fn from(address: IpAddr) -> Self {
        Self { first: address, last: address }
    }
}

impl From<IpNet> for Addresses {
    fn from(prefix: IpNet) -> Self {
        Self { first: prefix.network(), last: prefix.broadcast() }
    }
}

impl FromStr for Addresses {
    type Err = BadAddresses;

    fn from_str(text: &str) -> Result<Self, BadAddresses> {
        let form = || BadAddresses::Form(text.chars().take(100).collect());
        if text == "*" {
            return Ok(Self::ANY);
        }
        if let Some((first, last)) = text.split_once('-') {
            return Self::range(first.parse().map_err(|_| form())?, last.parse().map_err(|_| form())?);
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(address.into());
        }
        let prefix: IpNet = text.parse().map_err(|_| form())?;
        if prefix.trunc() != prefix {
            return Err(BadAddresses::HostBits(prefix));
        }
        Ok(prefix.into())
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ANY {
            return f.write_str("*");
        }
        if self.first == self.last {
            return self.first.fmt(f);
        }
        match self.prefixes().as_slice() {
            [prefix] => prefix.fmt(f),
            _ => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

impl Rule {
    /// Whether the rule is about `protocol`.
    #[must_use]
    pub fn covers(&self, protocol: Protocol) -> bool {
        if self.protocols.is_empty() {
            matches!(protocol, Protocol::TCP | Protocol::UDP | Protocol::ICMP | Protocol::ICMPV6)
        } else {
            self.protocols.contains(&protocol)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_four_forms_are_read_and_written() {
        for text in ["*", "100.64.0.1", "100.64.0.0/10", "100.115.94.0-100.127.255.255", "fd7a:115c:a1e0::/48"] {
            assert_eq!(text.parse::<Addresses>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_texts_are_refused_with_a_reason() {
        assert!(matches!("".parse::<Addresses>(), Err(BadAddresses::Form(_))));
        assert!(matches!("cap:x".parse::<Addresses>(), Err(BadAddresses::Form(_))));
        assert!(matches!("100.64.0.1/10".parse::<Addresses>(), Err(BadAddresses::HostBits(_))));
        assert!(matches!("1.2.3.4-1.2.3.3".parse::<Addresses>(), Err(BadAddresses::Range(..))));
        assert!(matches!("1.2.3.4-::1".parse::<Addresses>(), Err(BadAddresses::Range(..))));
    }

    #[test]
    fn any_covers_both_families() {
        assert_eq!(Addresses::ANY.prefixes(), ["0.0.0.0/0".parse::<IpNet>().unwrap(), "::/0".parse().unwrap()]);
    }

    proptest! {
        #[test]
        fn prefixes_cover_exactly_the_range(a: u16, b: u16, probe: u16) {
            let at = |low: u16| IpAddr::V4(Ipv4Addr::from_bits(0x6440_0000 | u32::from(low)));
            let range = Addresses::range(at(a.min(b)), at(a.max(b))).unwrap();
            let covered = range.prefixes().iter().any(|prefix| prefix.contains(&at(probe)));
            prop_assert_eq!(covered, range.contains(at(probe)));
        }

        #[test]
        fn any_text_is_survived(text in ".{0,40}") {
            let _ = text.parse::<Addresses>();
        }
    }
}
