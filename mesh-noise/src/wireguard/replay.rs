//! The replay window (RFC 6479): which counters of a session have been seen.
//!
//! A ring of 64-bit words covers the newest [`WINDOW`] counters and a little more. The word of counter `c` is
//! `(c / 64) mod N`, its bit `c mod 64`. When a newer counter arrives, the words between are cleared; nothing is
//! ever shifted.
//!
//! ```text
//!                    too old        the window, 8192 wide            newest
//!   counters   ─ ─ ─ ─ ─ ─ ─ ─ ┤ seen? look at the bit ├──────────────▲───── newer: clear, move on ─►
//!
//!   words        ┌────┬────┬────┬────┬────┬────┬────┬────┬────┐
//!   (a ring)     │    │    │    │    │    │ ▲  │    │    │    │   the word that holds "newest" is being filled;
//!                └────┴────┴────┴────┴────┴─│──┴────┴────┴────┘   the one after it, the oldest, is the spare that
//!                                        newest                   makes clearing whole words enough
//! ```

/// How far behind the newest counter a datagram may be and still be accepted.
pub const WINDOW: u64 = 8192;

const BITS: u64 = 64;
/// One word more than the window needs: see the drawing.
const WORDS: u64 = WINDOW / BITS + 1;
/// The same, as the length of an array.
const RING: usize = 129;
const _: () = assert!(WORDS == RING as u64, "the ring holds the window and one word");

/// The window of one session.
#[derive(Debug, Clone)]
pub struct Replay {
    /// One more than the greatest counter accepted; 0 before the first.
    next: u64,
    words: [u64; RING],
}

impl Default for Replay {
    fn default() -> Self {
        Self { next: 0, words: [0; RING] }
    }
}

impl Replay {
    /// Marks `counter` as seen. False if it was seen before, or is older than the window.
    ///
    /// Only for counters of datagrams that opened: a forged one must not move the window.
    pub fn accept(&mut self, counter: u64) -> bool {
        if counter >= self.next {
            self.advance(counter);
        } else if self.next - counter > WINDOW {
            return false;
        }
        let (word, bit) = (Self::word(counter), 1 << (counter % BITS));
        let fresh = self.words[word] & bit == 0;
        self.words[word] |= bit;
        fresh
    }

    fn advance(&mut self, counter: u64) {
        let newest = self.next.checked_sub(1).map_or(0, |newest| newest / BITS);
        let words = (counter / BITS - newest).min(WORDS);
        for step in 1..=words {
            self.words[Self::word((newest + step) * BITS)] = 0;
        }
        self.next = counter.saturating_add(1);
    }

    fn word(counter: u64) -> usize {
        usize::try_from(counter / BITS % WORDS).expect("an index into the ring")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_counter_passes_once() {
        let mut replay = Replay::default();
        assert!(replay.accept(0));
        assert!(!replay.accept(0));
        assert!(replay.accept(WINDOW));
        assert!(replay.accept(1));
        assert!(!replay.accept(1));
        assert!(!replay.accept(0), "seen");
    }

    #[test]
    fn what_is_older_than_the_window_is_refused() {
        let mut replay = Replay::default();
        assert!(replay.accept(WINDOW + 1));
        assert!(!replay.accept(1), "unseen, but too old to tell");
        assert!(replay.accept(2));
    }

    #[test]
    fn a_jump_clears_everything_behind_it() {
        let mut replay = Replay::default();
        for counter in 0..300 {
            assert!(replay.accept(counter));
        }
        let far = 1 << 40;
        assert!(replay.accept(far));
        for counter in far + 1 - WINDOW..far {
            assert!(replay.accept(counter), "{counter}");
        }
        assert!(!replay.accept(far - WINDOW));
    }

    proptest! {
        #[test]
        fn the_window_equals_a_set(counters in proptest::collection::vec(
            prop_oneof![0u64..400, 8000u64..8600, 16_000u64..17_000, 100_000u64..100_200], 1..600))
        {
            let (mut replay, mut seen, mut newest) = (Replay::default(), BTreeSet::new(), None::<u64>);
            for counter in counters {
                let old = newest.is_some_and(|newest| counter + WINDOW <= newest);
                let expected = !old && seen.insert(counter);
                prop_assert_eq!(replay.accept(counter), expected, "counter {}, newest {:?}", counter, newest);
                newest = newest.max(Some(counter));
            }
        }
    }
}
