//! How a NAT hands out outside ports, judged by a handful that were seen in the order in which they were given.
//!
//! | what is seen | what it is |
//! |---|---|
//! | sockets keep their own port | preserving |
//! | each a small step from the one before, all in one direction | sequential |
//! | four or more within 4,096 | a block |
//! | further apart | random |
//!
//! Too few to tell gives nothing. With the dozen that a full report sees, a random allocator passes for another kind in
//! less than one of a thousand reports.

use crate::behaviour::{Allocation, PortRange};

/// A mapping's outside port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Given {
    /// The socket's own port, where known and where this is the first mapping that the socket got.
    pub(super) own: Option<u16>,
    /// The outside port.
    pub(super) port: u16,
}

/// The longest step that still counts as "the next one": others behind the same NAT take ports in between.
const MAX_STEP: i32 = 256;
/// The widest block.
const MAX_BLOCK: u32 = 4096;
/// Ports that it takes to tell order and blocks from chance.
const ENOUGH: usize = 4;
/// Sizes that carriers give subscribers, as powers of two.
const BLOCKS: [u16; 7] = [64, 128, 256, 512, 1024, 2048, 4096];
/// Ranges that implementations draw from: the upper half, Linux's ephemeral ports, the dynamic ports of RFC 6335 §6.
const RANGES: [PortRange; 3] = [
    PortRange { first: 32_768, last: u16::MAX },
    PortRange { first: 32_768, last: 60_999 },
    PortRange { first: 49_152, last: u16::MAX },
];
/// A narrower range is believed if a wider one would show the same this rarely.
const CHANCE: f64 = 0.02;

/// Judges ports in the order in which they were given, and estimates which others may come.
pub(super) fn estimate(given: &[Given]) -> (Option<Allocation>, Option<PortRange>) {
    let owned = given.iter().filter(|given| given.own.is_some()).count();
    let kept = given.iter().filter(|given| given.own == Some(given.port)).count();
    // Another host may hold one of the ports.
    if kept > 0 && kept * 3 >= owned * 2 {
        return (Some(Allocation::Preserving), None);
    }
    let ports: Vec<u16> = given.iter().map(|given| given.port).collect();
    let (Some(&lowest), Some(&highest)) = (ports.iter().min(), ports.iter().max()) else { return (None, None) };
    if let Some(stride) = stride(&ports) {
        return (Some(Allocation::Sequential { stride }), None);
    }
    let spread = u32::from(highest - lowest) + 1;
    if ports.len() >= ENOUGH && spread <= MAX_BLOCK {
        return (Some(Allocation::Block), Some(block(lowest, highest, ports.len())));
    }
    if ports.len() >= ENOUGH - 1 && spread > MAX_BLOCK {
        return (Some(Allocation::Random), Some(range(lowest, highest, ports.len())));
    }
    (None, None)
}

/// The step from one port to the next, if the ports are in order.
fn stride(ports: &[u16]) -> Option<i16> {
    if ports.len() < ENOUGH {
        return None;
    }
    let steps: Vec<i32> = ports.windows(2).map(|pair| i32::from(pair[1]) - i32::from(pair[0])).collect();
    let ahead = steps.iter().filter(|step| **step > 0).count() * 2 > steps.len();
    let in_order = |step: &&i32| **step != 0 && step.abs() <= MAX_STEP && (**step > 0) == ahead;
    let good: Vec<i32> = steps.iter().filter(in_order).copied().collect();
    // One step may go back to the other end of the range.
    let wrapped = usize::from(steps.len() > ENOUGH && steps.iter().any(|step| step.abs() > MAX_STEP));
    if good.len() + wrapped < steps.len() {
        return None;
    }
    let least = good.iter().copied().min_by_key(|step| step.abs())?;
    // A few ports may stand in order by chance, but not evenly.
    let even = good.iter().filter(|step| **step == least).count() * 2 >= good.len();
    if even || ports.len() > 6 { i16::try_from(least).ok() } else { None }
}

/// The block around `count` ports: an aligned one of a usual size, or as wide as chance suggests.
fn block(lowest: u16, highest: u16, count: usize) -> PortRange {
    let margin = usize::from(highest - lowest).div_ceil(count.saturating_sub(1).max(1));
    let margin = u16::try_from(margin).unwrap_or(u16::MAX);
    let likely = PortRange { first: lowest.saturating_sub(margin), last: highest.saturating_add(margin) };
    let aligned = BLOCKS.iter().find_map(|size| {
        let first = lowest / size * size;
        (highest / size * size == first).then(|| PortRange { first, last: first + (size - 1) })
    });
    aligned.filter(|aligned| aligned.len() <= likely.len() * 2).unwrap_or(likely)
}

/// The narrowest of the usual ranges that `count` ports, all of them in it, make believable.
fn range(lowest: u16, highest: u16, count: usize) -> PortRange {
    let mut found = PortRange { first: lowest.min(PortRange::ALL.first), last: u16::MAX };
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    for candidate in RANGES {
        let chance = (f64::from(candidate.len()) / f64::from(found.len())).powi(count);
        if candidate.contains(lowest) && candidate.contains(highest) && chance < CHANCE {
            found = candidate;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    fn strangers(ports: impl IntoIterator<Item = u16>) -> Vec<Given> {
        ports.into_iter().map(|port| Given { own: None, port }).collect()
    }

    fn judged(ports: impl IntoIterator<Item = u16>) -> Option<Allocation> {
        estimate(&strangers(ports)).0
    }

    #[test]
    fn sockets_that_keep_their_ports_are_preserved_even_if_one_was_taken() {
        let mut given: Vec<_> = (5000..5006).map(|port| Given { own: Some(port), port }).collect();
        assert_eq!(estimate(&given).0, Some(Allocation::Preserving));
        given[0].port = 60_000;
        assert_eq!(estimate(&given).0, Some(Allocation::Preserving));
        given[1].port = 60_001;
        given[2].port = 60_002;
        assert_ne!(estimate(&given).0, Some(Allocation::Preserving));
    }

    #[test]
    fn steps_in_one_direction_are_a_sequence() {
        assert_eq!(judged([5000, 5001, 5002, 5003]), Some(Allocation::Sequential { stride: 1 }));
        assert_eq!(judged([5000, 4998, 4996, 4994]), Some(Allocation::Sequential { stride: -2 }));
        assert_eq!(judged([5000, 5001, 5004, 5005, 5006, 5020]), Some(Allocation::Sequential { stride: 1 }), "others");
        assert_eq!(judged([65_534, 65_535, 1024, 1025, 1026, 1027]), Some(Allocation::Sequential { stride: 1 }));
        assert_eq!(judged([5000, 5001, 5002]), None, "three may be chance");
    }

    #[test]
    fn a_block_is_told_with_its_bounds() {
        let (allocation, ports) = estimate(&strangers([2110, 2500, 2049, 2300, 2222, 2556, 2401, 2077]));
        assert_eq!((allocation, ports), (Some(Allocation::Block), Some(PortRange { first: 2048, last: 2559 })));
    }

    #[test]
    fn wide_ranges_are_random_and_narrowed_only_with_reason() {
        assert_eq!(judged([40_000, 50_000]), None, "two are too few");
        let few = estimate(&strangers([40_000, 50_000, 60_000]));
        assert_eq!(few, (Some(Allocation::Random), Some(PortRange::ALL)));
        let many = strangers([40_000, 50_000, 65_000, 33_000, 45_000, 61_234, 39_999, 55_555]);
        assert_eq!(estimate(&many).1, Some(RANGES[0]));
        assert_eq!(estimate(&strangers([500, 60_000, 3000, 40_000])).1.unwrap().first, 500);
    }

    /// Draws `count` ports and says how often the judgement was not `right`, in ten thousand.
    fn wrong(count: usize, seed: u64, mut draw: impl FnMut(&mut StdRng) -> u16, right: Allocation) -> u32 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut wrong = 0;
        for _ in 0..10_000 {
            let found = judged((0..count).map(|_| draw(&mut rng)));
            wrong += u32::from(found != Some(right));
        }
        wrong
    }

    #[test]
    fn chance_seldom_passes_for_order() {
        let all = |rng: &mut StdRng| rng.random_range(1024..=u16::MAX);
        assert!(wrong(12, 1, all, Allocation::Random) <= 1);
        assert!(wrong(6, 2, all, Allocation::Random) <= 10);
        for size in BLOCKS {
            let in_block = |rng: &mut StdRng| rng.random_range(8192..8192 + size);
            assert!(wrong(12, 3, in_block, Allocation::Block) <= 5, "{size}");
            assert!(wrong(6, 4, in_block, Allocation::Block) <= 30, "{size}");
        }
    }

    #[test]
    fn the_estimate_covers_most_of_a_block_and_not_much_beside() {
        let mut rng = StdRng::seed_from_u64(5);
        let mut poor = 0;
        for _ in 0..1000 {
            let size = BLOCKS[rng.random_range(0..BLOCKS.len())];
            // Blocks as RFC 7422 lays them out, and others that start anywhere.
            let first = if rng.random() { 4096 + size * 3 } else { rng.random_range(2000..50_000) };
            let found = estimate(&strangers((0..12).map(|_| rng.random_range(first..first + size)))).1.unwrap();
            let shared = u32::from(found.last.min(first + size - 1).saturating_sub(found.first.max(first))) + 1;
            if shared * 3 < u32::from(size) * 2 || found.len() > u32::from(size) * 2 {
                poor += 1;
            }
        }
        assert!(poor <= 50, "{poor} of 1000");
    }
}
