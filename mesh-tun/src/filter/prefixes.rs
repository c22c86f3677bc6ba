//! Which prefixes cover an address, in a number of steps that hardly depends on how many prefixes there are.
//!
//! Prefixes of one length share a hash table in effect (the length is part of the key), and the longest match is found by
//! binary search over the lengths in use (Waldvogel et al., "Scalable High Speed IP Routing Lookups", SIGCOMM 1997): a
//! hit says "longer", a miss says "shorter". For that each prefix leaves a marker at the shorter lengths where a search
//! for it passes; a marker knows the longest prefix that covers it, so that a search led astray has its answer already.
//! Each prefix knows the next shorter one that covers it. With one length that is one probe, with all 33 of IPv4 six.

use std::net::IpAddr;

use ipnet::IpNet;

/// No prefix.
const NONE: u32 = u32::MAX;
/// An unused slot.
const EMPTY: u32 = u32::MAX - 1;

/// Prefixes of both families, each with a number.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    v4: Table<u32>,
    v6: Table<u128>,
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    value: u32,
    /// The next shorter prefix that covers this one.
    parent: u32,
}

impl Prefixes {
    /// Takes distinct prefixes; of equal ones any may win.
    pub(super) fn new(prefixes: impl IntoIterator<Item = (IpNet, u32)>) -> Self {
        let (mut v4, mut v6, mut nodes) = (Vec::new(), Vec::new(), Vec::new());
        for (prefix, value) in prefixes {
            match prefix {
                IpNet::V4(net) => v4.push((net.network().to_bits(), net.prefix_len(), value)),
                IpNet::V6(net) => v6.push((net.network().to_bits(), net.prefix_len(), value)),
            }
        }
        Self { v4: Table::new(v4, &mut nodes), v6: Table::new(v6, &mut nodes), nodes }
    }

    /// The numbers of the prefixes that cover `address`, the longest prefix first.
    pub(super) fn covering(&self, address: IpAddr) -> impl Iterator<Item = u32> + Clone {
        let first = match address {
            IpAddr::V4(v4) => self.v4.longest(v4.to_bits()),
            IpAddr::V6(v6) => self.v6.longest(v6.to_bits()),
        };
        let node = |index: u32| self.nodes.get(index as usize);
        std::iter::successors(node(first), move |covered| node(covered.parent)).map(|node| node.value)
    }
}

/// The prefixes of one family, by bits and length.
#[derive(Debug, Default)]
struct Table<B> {
    /// In rising order.
    lengths: Vec<u8>,
    slots: Slots<(B, u8)>,
}

impl<B: Bits> Table<B>
where
    (B, u8): Key,
{
    fn new(prefixes: Vec<(B, u8, u32)>, nodes: &mut Vec<Node>) -> Self {
        let mut lengths: Vec<u8> = prefixes.iter().map(|(_, len, _)| *len).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let mut entries: Vec<(B, u8, Option<u32>)> = Vec::with_capacity(prefixes.len() * 2);
        for (bits, len, value) in prefixes {
            let (mut low, mut high) = (0, lengths.len());
            while low < high {
                let middle = usize::midpoint(low, high);
                match lengths[middle].cmp(&len) {
                    std::cmp::Ordering::Less => {
                        entries.push((bits.masked(lengths[middle]), lengths[middle], None));
                        low = middle + 1;
                    }
                    std::cmp::Ordering::Equal => break,
                    std::cmp::Ordering::Greater => high = middle,
                }
            }
            entries.push((bits, len, Some(value)));
        }
        // A covering prefix sorts before what it covers, and a prefix before the markers in its place.
        entries.sort_unstable_by_key(|(bits, len, value)| (*bits, *len, value.is_none()));
        entries.dedup_by_key(|(bits, len, _)| (*bits, *len));
        let mut slots = Slots::with_room(entries.len());
        let mut around: Vec<(B, u8, u32)> = Vec::new();
        for (bits, len, value) in entries {
            while around.last().is_some_and(|(outer, outer_len, _)| bits.masked(*outer_len) != *outer) {
                around.pop();
            }
            let mut best = around.last().map_or(NONE, |(_, _, node)| *node);
            if let Some(value) = value {
                nodes.push(Node { value, parent: best });
                best = index(nodes.len() - 1);
                around.push((bits, len, best));
            }
            slots.insert((bits, len), best);
        }
        Self { lengths, slots }
    }

    fn longest(&self, bits: B) -> u32 {
        let (mut low, mut high, mut best) = (0, self.lengths.len(), NONE);
        while low < high {
            let middle = usize::midpoint(low, high);
            let len = self.lengths[middle];
            if let Some(node) = self.slots.get((bits.masked(len), len)) {
                best = node;
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        best
    }
}

/// The bits of an address.
trait Bits: Copy + Ord {
    /// The bits with all but the first `len` cleared.
    fn masked(self, len: u8) -> Self;
}

impl Bits for u32 {
    fn masked(self, len: u8) -> Self {
        self & Self::MAX.checked_shl(Self::BITS - u32::from(len)).unwrap_or(0)
    }
}

impl Bits for u128 {
    fn masked(self, len: u8) -> Self {
        self & Self::MAX.checked_shl(Self::BITS - u32::from(len)).unwrap_or(0)
    }
}

/// What a [`Slots`] is asked for. The hash need not withstand attacks: keys come from the control plane alone.
pub(super) trait Key: Copy + Default + Eq {
    /// A number whose upper bits are spread evenly.
    fn hash(self) -> u64;
}

impl Key for (u32, u8) {
    fn hash(self) -> u64 {
        spread(u64::from(self.0) << 8 | u64::from(self.1))
    }
}

impl Key for (u128, u8) {
    fn hash(self) -> u64 {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
        let (low, high) = (self.0 as u64, (self.0 >> 64) as u64);
        spread(spread(high) ^ low ^ u64::from(self.1) << 32)
    }
}

impl Key for (u32, u32) {
    fn hash(self) -> u64 {
        spread(u64::from(self.0) << 32 | u64::from(self.1))
    }
}

/// Multiplies by 2^64 over the golden ratio, twice, so that every bit reaches the upper ones.
fn spread(word: u64) -> u64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let once = word.wrapping_mul(GOLDEN);
    (once ^ once >> 32).wrapping_mul(GOLDEN)
}

/// A hash table of fixed size with linear probing, at most half full: an answer is one cache line away.
#[derive(Debug, Default)]
pub(super) struct Slots<K> {
    /// As many as a power of two.
    slots: Vec<(K, u32)>,
    shift: u32,
}

impl<K: Key> Slots<K> {
    /// An empty table with room for `count` keys.
    pub(super) fn with_room(count: usize) -> Self {
        let size = (count * 2).next_power_of_two().max(2);
        Self { slots: vec![(K::default(), EMPTY); size], shift: u64::BITS - size.trailing_zeros() }
    }

    /// Sets the value of `key`. There must be room left.
    pub(super) fn insert(&mut self, key: K, value: u32) {
        if let Some(at) = self.find(key) {
            self.slots[at] = (key, value);
        }
    }

    pub(super) fn get(&self, key: K) -> Option<u32> {
        let value = self.slots[self.find(key)?].1;
        (value != EMPTY).then_some(value)
    }

    /// Where `key` is, or the empty slot where it would be; none in a table without slots.
    fn find(&self, key: K) -> Option<usize> {
        let mask = self.slots.len().checked_sub(1)?;
        let mut at = usize::try_from(key.hash() >> self.shift).unwrap_or(0) & mask;
        loop {
            let (other, value) = self.slots[at];
            if value == EMPTY || other == key {
                return Some(at);
            }
            at = (at + 1) & mask;
        }
    }
}

/// A position as the tables keep it. Four thousand million prefixes do not fit into memory.
pub(super) fn index(position: usize) -> u32 {
    u32::try_from(position).unwrap_or(EMPTY - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_prefixes_cover_nothing() {
        assert_eq!(Prefixes::default().covering([10, 0, 0, 1].into()).count(), 0);
        assert_eq!(Prefixes::new([]).covering([0xfd; 16].into()).count(), 0);
    }

    #[test]
    fn the_longest_prefix_comes_first() {
        let nets = ["10.0.0.0/8", "0.0.0.0/0", "10.1.2.3/32", "10.1.0.0/16", "11.0.0.0/8", "::/0"];
        let prefixes = Prefixes::new(nets.iter().zip(0..).map(|(net, value)| (net.parse().unwrap(), value)));
        assert_eq!(prefixes.covering([10, 1, 2, 3].into()).collect::<Vec<_>>(), [2, 3, 0, 1]);
        assert_eq!(prefixes.covering([10, 1, 2, 4].into()).collect::<Vec<_>>(), [3, 0, 1]);
        assert_eq!(prefixes.covering([12, 1, 2, 4].into()).collect::<Vec<_>>(), [1]);
        assert_eq!(prefixes.covering([0xfd; 16].into()).collect::<Vec<_>>(), [5]);
    }

    proptest! {
        #[test]
        fn covering_prefixes_are_those_that_contain_the_address(
            nets in proptest::collection::btree_set(any_net(), 0..60),
            probes in proptest::collection::vec(any_address(), 1..20),
        ) {
            let nets: Vec<IpNet> = nets.into_iter().collect();
            let prefixes = Prefixes::new(nets.iter().copied().zip(0..));
            for probe in probes {
                let mut expected: Vec<_> =
                    nets.iter().zip(0..).filter(|(net, _)| net.contains(&probe)).map(|(net, n)| (net.prefix_len(), n)).collect();
                expected.sort_unstable();
                let expected: Vec<u32> = expected.into_iter().rev().map(|(_, n)| n).collect();
                prop_assert_eq!(prefixes.covering(probe).collect::<Vec<_>>(), expected);
            }
        }

        #[test]
        fn slots_keep_every_key(keys in proptest::collection::btree_set((any::<u32>(), 0..4_u32), 0..200)) {
            let keys: BTreeSet<_> = keys;
            let mut slots = Slots::with_room(keys.len());
            for (key, value) in keys.iter().zip(0..) {
                slots.insert(*key, value);
            }
            for (key, value) in keys.iter().zip(0..) {
                prop_assert_eq!(slots.get(*key), Some(value));
                prop_assert_eq!(slots.get((key.0, 9)), None);
            }
        }
    }

    fn any_address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0..4_u8, 0..4_u8, 0..4_u8).prop_map(|(b, c, d)| IpAddr::from([100, b * 64, c * 64, d])),
            (0..4_u16, 0..4_u16).prop_map(|(b, h)| IpAddr::from([0xfd7a, b << 14, 0, 0, 0, 0, 0, h])),
        ]
    }

    fn any_net() -> impl Strategy<Value = IpNet> {
        (any_address(), 0..=128_u8).prop_map(|(address, len)| {
            IpNet::new(address, if address.is_ipv4() { len % 33 } else { len }).unwrap().trunc()
        })
    }
}
