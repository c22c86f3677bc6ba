//! Ports in the order in which they are tried.

use rand::RngExt;
use rand::rngs::StdRng;

use crate::behaviour::PortRange;

/// All ports of a range, each once, in an order that depends on the seed alone.
///
/// The steps of an odd walk around the range: as good as a shuffle against ports that are drawn at random, and it needs
/// no memory.
#[derive(Debug, Clone)]
pub(super) struct Walk {
    range: PortRange,
    step: u32,
    at: u32,
    left: u32,
}

impl Walk {
    pub(super) fn new(range: PortRange, rng: &mut StdRng) -> Self {
        let len = range.len();
        // Far from 0 and from the end: neighbours are not tried one after the other.
        let mut step = rng.random_range(len / 3..=len.div_ceil(2)).max(1);
        while gcd(step, len) != 1 {
            step += 1;
        }
        Self { range, step, at: rng.random_range(0..len), left: len }
    }

    /// The range that is walked over.
    pub(super) const fn range(&self) -> PortRange {
        self.range
    }
}

impl Iterator for Walk {
    type Item = u16;

    fn next(&mut self) -> Option<u16> {
        self.left = self.left.checked_sub(1)?;
        self.at = (self.at + self.step) % self.range.len();
        u16::try_from(u32::from(self.range.first) + self.at).ok()
    }
}

const fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The next `count` ports of an allocator that adds `stride` each time and was last seen at `last`. At an end of the
/// ports it goes on from the other.
pub(super) fn following(last: u16, stride: i16, count: u16) -> Vec<u16> {
    let (low, len) = (i32::from(PortRange::ALL.first), i32::from(u16::MAX - PortRange::ALL.first) + 1);
    (1..=i32::from(count))
        .filter_map(|nth| {
            let port = i32::from(last) + i32::from(stride) * nth;
            u16::try_from(low + (port - low).rem_euclid(len)).ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_walk_visits_every_port_once(first in 1u16.., len in 0u16..3000, seed: u64) {
            let range = PortRange { first, last: first.saturating_add(len) };
            let walked: Vec<_> = Walk::new(range, &mut StdRng::seed_from_u64(seed)).collect();
            let all: BTreeSet<_> = walked.iter().copied().collect();
            prop_assert_eq!(walked.len(), all.len());
            prop_assert!(all.into_iter().eq(range.first..=range.last));
        }
    }

    #[test]
    fn what_follows_wraps_around_the_ends() {
        assert_eq!(following(4000, 2, 3), [4002, 4004, 4006]);
        assert_eq!(following(65534, 1, 3), [65535, 1024, 1025]);
        assert_eq!(following(1025, -1, 3), [1024, 65535, 65534]);
    }
}
