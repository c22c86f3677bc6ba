//! Whether a gateway has forgotten everything since it was last heard.
//!
//! PCP and NAT-PMP servers tell in each response for how many seconds they have had their state. When that number goes
//! back, or does not agree with our own clock, the state is gone (RFC 6887 §8.5; RFC 6886 §3.6 is laxer).

use std::time::{Duration, Instant};

/// What seconds that are counted whole, and their way here, may take away (RFC 6887 §8.5).
const SLACK: Duration = Duration::from_secs(2);

/// What was heard last.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Epoch {
    last: Option<(Instant, u32)>,
}

impl Epoch {
    /// Takes in the number of one response. Returns whether the server has kept its state since the last one.
    pub(super) fn observe(&mut self, now: Instant, server: u32) -> bool {
        let Some((then, before)) = self.last.replace((now, server)) else { return true };
        // Responses may overtake each other by a second.
        if server.saturating_add(1) < before {
            return false;
        }
        let ours = now.saturating_duration_since(then);
        let theirs = Duration::from_secs(u64::from(server.saturating_sub(before)));
        lasts(ours, theirs) && lasts(theirs, ours)
    }
}

/// Whether a server that has had its state for `server` seconds had it at `then`: what it gave then, it still has.
pub(super) fn reaches_back(now: Instant, server: u32, then: Instant) -> bool {
    lasts(Duration::from_secs(server.into()), now.saturating_duration_since(then))
}

/// Whether `one` clock has counted as much as the `other`, which may be a sixteenth faster.
fn lasts(one: Duration, other: Duration) -> bool {
    one + SLACK >= other - other / 16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Instant {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        Instant::now()
    }

    #[test]
    fn a_clock_that_goes_on_is_the_same_server() {
        let (start, mut epoch) = (start(), Epoch::default());
        for (seconds, server) in [(0, 500), (10, 510), (11, 510), (3611, 4111), (3612, 4110)] {
            assert!(epoch.observe(start + Duration::from_secs(seconds), server), "{seconds} {server}");
        }
    }

    #[test]
    fn a_clock_that_goes_back_or_astray_is_another() {
        let (start, mut epoch) = (start(), Epoch::default());
        assert!(epoch.observe(start, 500));
        assert!(!epoch.observe(start + Duration::from_secs(5), 3));
        assert!(epoch.observe(start + Duration::from_secs(6), 4));
        // Restarted, and running for longer than it had before: too slow by our clock.
        assert!(!epoch.observe(start + Duration::from_secs(1006), 100));
        assert!(!epoch.observe(start + Duration::from_secs(1007), 5000));
    }

    #[test]
    fn state_that_is_younger_than_what_was_given_does_not_hold_it() {
        let (start, given) = (start(), |seconds| Duration::from_secs(seconds));
        assert!(reaches_back(start + given(5), 9, start));
        assert!(reaches_back(start + given(3600), 3400, start), "a slow clock");
        assert!(!reaches_back(start + given(5), 0, start));
        assert!(!reaches_back(start + given(3600), 3000, start));
    }
}
