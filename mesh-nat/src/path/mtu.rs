//! How long a datagram may be to arrive along a path, found out by padded pings (RFC 8899 in spirit).
//!
//! A path is thought to carry what is wanted until that has been refuted, since most do and a probe costs them one
//! datagram. A round sends pings and waits for their pongs:
//!
//! ```text
//!   round 1   the wanted length, and the limit known so far      answered in full ──► no limit
//!   round 2   all lengths worth trying that are unanswered       answered in full ──► no limit
//!   round 3   the same again, against chance losses              the longest answered is the limit
//! ```
//!
//! All lengths go out together, so that a path that is too narrow stalls for three round trips and not for a binary
//! search. If nothing is answered the path says nothing about lengths, and what was known stays.

/// Rounds until silence is believed.
const ROUNDS: u8 = 3;

/// MTUs of real links: the least of IPv4, tunnels in tunnels, the least of IPv6, `PPPoE`, Ethernet, clouds, jumbo frames.
const LINKS: [usize; 16] =
    [576, 1000, 1200, 1240, 1280, 1300, 1320, 1340, 1360, 1380, 1400, 1420, 1460, 1500, 4000, 8900];

/// What one search for the limit of a path has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MtuSearch {
    wanted: usize,
    /// Of the headers in front of a datagram.
    overhead: usize,
    /// The limit known before.
    known: Option<usize>,
    round: u8,
    longest: usize,
}

/// How a search has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// Everything that is wanted passes.
    NoLimit,
    /// Datagrams of up to this many bytes pass, longer ones do not.
    Limit(usize),
    /// Nothing passes at all: whether the path works is for others to find out.
    Nothing,
}

impl MtuSearch {
    /// A search whether datagrams of `wanted` bytes pass. `overhead` is 28 for IPv4 and 48 for IPv6, and 8
    /// more through a peer relay.
    pub(crate) fn new(wanted: usize, overhead: usize, known: Option<usize>) -> Self {
        Self { wanted, overhead, known, round: 0, longest: 0 }
    }

    /// Begins the next round: the lengths to ping with, shortest first, or how the search has ended.
    pub(crate) fn next_round(&mut self) -> Result<Vec<usize>, Found> {
        if self.longest >= self.wanted {
            return Err(Found::NoLimit);
        }
        if self.round == ROUNDS {
            return Err(if self.longest == 0 { Found::Nothing } else { Found::Limit(self.longest) });
        }
        self.round += 1;
        let mut lengths: Vec<usize> = match self.round {
            1 => self.known.into_iter().collect(),
            _ => LINKS.iter().map(|link| link - self.overhead).chain(self.known).collect(),
        };
        lengths.push(self.wanted);
        lengths.retain(|length| (self.longest + 1..=self.wanted).contains(length));
        lengths.sort_unstable();
        lengths.dedup();
        Ok(lengths)
    }

    /// A ping of `length` bytes was answered. True if that ends the search.
    pub(crate) fn answered(&mut self, length: usize) -> bool {
        self.longest = self.longest.max(length);
        self.longest >= self.wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_wide_path_costs_one_ping() {
        let mut search = MtuSearch::new(1312, 28, None);
        assert_eq!(search.next_round(), Ok(vec![1312]));
        assert!(search.answered(1312));
        assert_eq!(search.next_round(), Err(Found::NoLimit));
    }

    #[test]
    fn a_narrow_path_is_found_in_three_rounds() {
        let mut search = MtuSearch::new(1312, 28, None);
        assert_eq!(search.next_round(), Ok(vec![1312]));
        assert_eq!(search.next_round(), Ok(vec![548, 972, 1172, 1212, 1252, 1272, 1292, 1312]));
        assert!(!search.answered(972));
        assert!(!search.answered(548), "out of order");
        assert_eq!(search.next_round(), Ok(vec![1172, 1212, 1252, 1272, 1292, 1312]));
        search.answered(1172);
        assert_eq!(search.next_round(), Err(Found::Limit(1172)));
    }

    #[test]
    fn silence_says_nothing() {
        let mut search = MtuSearch::new(1312, 48, Some(1152));
        assert_eq!(search.next_round(), Ok(vec![1152, 1312]));
        assert!(search.next_round().is_ok() && search.next_round().is_ok());
        assert_eq!(search.next_round(), Err(Found::Nothing));
    }

    proptest! {
        #[test]
        fn the_limit_is_never_above_what_passes_nor_far_below(
            wanted in 600..9000_usize, passes in 600..9000_usize, lost in proptest::collection::vec(any::<bool>(), 3),
        ) {
            let mut search = MtuSearch::new(wanted, 28, None);
            let mut lost = lost.into_iter();
            let found = loop {
                match search.next_round() {
                    Ok(lengths) if lost.next() == Some(false) => {
                        lengths.iter().filter(|length| **length <= passes).for_each(|length| {
                            search.answered(*length);
                        });
                    }
                    Ok(_) => {}
                    Err(found) => break found,
                }
            };
            match found {
                Found::NoLimit => prop_assert!(wanted <= passes),
                Found::Limit(limit) => {
                    prop_assert!(limit <= passes);
                    let better = LINKS.iter().any(|link| (limit + 1..=passes.min(wanted)).contains(&(link - 28)));
                    prop_assert!(!better, "{} of {}", limit, passes);
                }
                Found::Nothing => {}
            }
        }
    }
}
