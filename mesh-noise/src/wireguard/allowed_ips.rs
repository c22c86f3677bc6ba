//! Cryptokey routing: which peer a destination belongs to, and which source a peer may use (whitepaper §2).

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// A table from prefix to `T`, looked up by longest match. A prefix belongs to one `T` only.
///
/// ```
/// use mesh_noise::wireguard::AllowedIps;
///
/// let mut table = AllowedIps::new();
/// table.insert("100.64.0.0/10".parse()?, "everybody");
/// table.insert("100.64.0.7/32".parse()?, "seven");
/// assert_eq!(table.lookup("100.64.0.7".parse()?), Some(&"seven"));
/// assert_eq!(table.lookup("100.64.0.8".parse()?), Some(&"everybody"));
/// assert_eq!(table.lookup("::1".parse()?), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct AllowedIps<T> {
    v4: PrefixMap<Ipv4Net, T>,
    v6: PrefixMap<Ipv6Net, T>,
}

impl<T> Default for AllowedIps<T> {
    fn default() -> Self {
        Self { v4: PrefixMap::new(), v6: PrefixMap::new() }
    }
}

impl<T> AllowedIps<T> {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Binds `prefix` to `value` and returns whom it was taken from. Host bits of the prefix are ignored.
    pub fn insert(&mut self, prefix: IpNet, value: T) -> Option<T> {
        match prefix {
            IpNet::V4(prefix) => self.v4.insert(prefix.trunc(), value),
            IpNet::V6(prefix) => self.v6.insert(prefix.trunc(), value),
        }
    }

    /// Frees exactly this prefix.
    pub fn remove(&mut self, prefix: &IpNet) -> Option<T> {
        match prefix {
            IpNet::V4(prefix) => self.v4.remove(&prefix.trunc()),
            IpNet::V6(prefix) => self.v6.remove(&prefix.trunc()),
        }
    }

    /// Keeps only what `keep` wants.
    pub fn retain(&mut self, mut keep: impl FnMut(IpNet, &T) -> bool) {
        self.v4.retain(|prefix, value| keep(IpNet::V4(*prefix), value));
        self.v6.retain(|prefix, value| keep(IpNet::V6(*prefix), value));
    }

    /// What the longest prefix that holds `address` is bound to.
    #[must_use]
    pub fn lookup(&self, address: IpAddr) -> Option<&T> {
        match address {
            IpAddr::V4(address) => self.v4.get_lpm(&Ipv4Net::from(address)).map(|(_, value)| value),
            IpAddr::V6(address) => self.v6.get_lpm(&Ipv6Net::from(address)).map(|(_, value)| value),
        }
    }

    /// All bindings, IPv4 first, by address.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, &T)> {
        let v4 = self.v4.iter().map(|(prefix, value)| (IpNet::V4(prefix), value));
        let v6 = self.v6.iter().map(|(prefix, value)| (IpNet::V6(prefix), value));
        v4.chain(v6)
    }

    /// The number of prefixes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// Whether there is no prefix.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

impl<T> FromIterator<(IpNet, T)> for AllowedIps<T> {
    fn from_iter<I: IntoIterator<Item = (IpNet, T)>>(bindings: I) -> Self {
        let mut table = Self::new();
        for (prefix, value) in bindings {
            table.insert(prefix, value);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    #[test]
    fn a_prefix_has_one_owner_and_the_default_route_catches_the_rest() {
        let mut table = AllowedIps::new();
        assert_eq!(table.insert("10.0.0.5/8".parse().unwrap(), 1), None);
        assert_eq!(table.insert("10.9.9.9/8".parse().unwrap(), 2), Some(1), "host bits do not count");
        table.insert("0.0.0.0/0".parse().unwrap(), 3);
        table.insert("fd00::/8".parse().unwrap(), 4);
        assert_eq!(table.lookup("10.1.1.1".parse().unwrap()), Some(&2));
        assert_eq!(table.lookup("11.1.1.1".parse().unwrap()), Some(&3));
        assert_eq!(table.lookup("fe80::1".parse().unwrap()), None);
        assert_eq!(table.iter().count(), table.len());
        table.retain(|_, value| *value != 3);
        assert_eq!(table.lookup("11.1.1.1".parse().unwrap()), None);
        assert_eq!(table.remove(&"10.0.0.0/8".parse().unwrap()), Some(2));
        assert_eq!(table.len(), 1);
    }

    proptest! {
        #[test]
        fn lookups_equal_a_linear_search(
            prefixes in proptest::collection::vec((0u32..64, 0u8..=32), 0..40),
            addresses in proptest::collection::vec(0u32..64, 1..40),
        ) {
            // Few distinct high and low bits, so that prefixes nest and collide.
            let spread = |n: u32| Ipv4Addr::from((n & 7) | (n >> 3) << 29);
            let mut slow: Vec<(Ipv4Net, usize)> = Vec::new();
            let mut table = AllowedIps::new();
            for (value, (address, len)) in prefixes.into_iter().enumerate() {
                let net = Ipv4Net::new(spread(address), len).unwrap().trunc();
                slow.retain(|(other, _)| *other != net);
                slow.push((net, value));
                table.insert(IpNet::V4(net), value);
            }
            for address in addresses.into_iter().map(spread) {
                let best = slow.iter().filter(|(net, _)| net.contains(&address)).max_by_key(|(net, _)| net.prefix_len());
                prop_assert_eq!(table.lookup(address.into()), best.map(|(_, value)| value));
            }
        }
    }
}
