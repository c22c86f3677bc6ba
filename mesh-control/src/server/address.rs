//! Addresses: one IPv4 and one IPv6 for each node, for as long as the node exists.
//!
//! IPv4 addresses are handed out in order from 100.64.0.0/10 (control.md §11.1). The IPv6 address is the IPv4 address
//! in the last four bytes of fd7a:115c:a1e0::/96, so that one is unique because the other is. The search goes on from
//! where it last ended and comes round only when the range is used up; so the address of a deleted node rests for a
//! long time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// The range of node IPv4 addresses: 100.64.0.0/10.
pub const IPV4_RANGE: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);
/// The range of all mesh IPv6 addresses: fd7a:115c:a1e0::/48.
pub const IPV6_RANGE: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0), 48);

/// Ranges inside [`IPV4_RANGE`] that no node gets: the service addresses and their surroundings, and ChromeOS's own.
const RESERVED: [Ipv4Net; 3] = [
    Ipv4Net::new_assert(Ipv4Addr::new(100, 100, 0, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 100, 100, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 115, 92, 0), 23),
];

/// Number of addresses in [`IPV4_RANGE`].
const SIZE: u32 = 1 << 22;

/// A node's two addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Addresses {
    /// The IPv4 address.
    pub v4: Ipv4Addr,
    /// The IPv6 address.
    pub v6: Ipv6Addr,
}

impl Addresses {
    /// The pair that belongs to an IPv4 address.
    #[must_use]
    pub fn of(v4: Ipv4Addr) -> Self {
        let base = u128::from(IPV6_RANGE.network());
        Self { v4, v6: Ipv6Addr::from(base | u128::from(u32::from(v4))) }
    }

    /// Both, IPv4 first.
    #[must_use]
    pub fn both(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Both as host prefixes, IPv4 first, as maps carry them.
    #[must_use]
    pub fn prefixes(&self) -> [IpNet; 2] {
        self.both().map(IpNet::from)
    }
}

/// Where the search for a free address goes on: the offset in [`IPV4_RANGE`] that was handed out last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cursor(u32);

impl Cursor {
    /// Takes an offset as it was stored; out-of-range values wrap.
    #[must_use]
    pub const fn from_offset(offset: u32) -> Self {
        Self(offset % SIZE)
    }

    /// The offset, for the store.
    #[must_use]
    pub const fn offset(self) -> u32 {
        self.0
    }

    /// The next free address after this position, or `None` when all 4 million are taken.
    pub fn allocate(self, taken: impl Fn(Ipv4Addr) -> bool) -> Option<Addresses> {
        (1..=SIZE)
            .map(|step| at((self.0 + step) % SIZE))
            .find(|address| !is_reserved(*address) && !taken(*address))
            .map(Addresses::of)
    }

    /// The position of an address that was handed out.
    #[must_use]
    pub fn at(address: Ipv4Addr) -> Self {
        Self(u32::from(address).wrapping_sub(u32::from(IPV4_RANGE.network())) % SIZE)
    }
}

fn at(offset: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(IPV4_RANGE.network()) + offset)
}

/// Whether no node may have this address.
#[must_use]
pub fn is_reserved(address: Ipv4Addr) -> bool {
    !IPV4_RANGE.contains(&address)
        || address == IPV4_RANGE.network()
        || address == IPV4_RANGE.broadcast()
        || RESERVED.iter().any(|range| range.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_in_order_and_in_pairs() {
        let first = Cursor::default().allocate(|_| false).unwrap();
        assert_eq!(first.v4, Ipv4Addr::new(100, 64, 0, 1));
        assert_eq!(first.v6.to_string(), "fd7a:115c:a1e0::6440:1");
        assert!(IPV6_RANGE.contains(&first.v6));
        let second = Cursor::at(first.v4).allocate(|_| false).unwrap();
        assert_eq!(second.v4, Ipv4Addr::new(100, 64, 0, 2));
        assert_eq!(first.prefixes().map(|p| p.to_string()), ["100.64.0.1/32", "fd7a:115c:a1e0::6440:1/128"]);
    }

    #[test]
    fn reserved_ranges_are_stepped_over() {
        let step = |before: [u8; 4]| Cursor::at(before.into()).allocate(|_| false).unwrap().v4;
        assert_eq!(step([100, 99, 255, 255]), Ipv4Addr::new(100, 100, 1, 0));
        assert_eq!(step([100, 100, 99, 255]), Ipv4Addr::new(100, 100, 101, 0));
        assert_eq!(step([100, 115, 91, 255]), Ipv4Addr::new(100, 115, 94, 0));
    }

    #[test]
    fn the_search_comes_round_and_ends_when_all_are_taken() {
        let after_last = Cursor::at([100, 127, 255, 254].into()).allocate(|a| a == Ipv4Addr::new(100, 64, 0, 1));
        assert_eq!(after_last.unwrap().v4, Ipv4Addr::new(100, 64, 0, 2));
        assert_eq!(Cursor::default().allocate(|_| true), None);
    }
}
