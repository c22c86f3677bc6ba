//! Which proven address carries the data. An address that no pong has proven lately is never chosen.

use std::time::{Duration, Instant};

use super::candidate::{Candidate, Candidates, Target};
use super::score::Quality;

/// The target in use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Incumbent {
    pub(crate) target: Target,
    /// How long a pong proves it.
    pub(crate) trust: Duration,
    /// Since when it has left pings unanswered.
    pub(crate) doubted: Option<Instant>,
    /// Whether it has only just replaced another one.
    pub(crate) dwelling: bool,
}

/// The target to use now, given the one in use. `None` when nothing has been proven within `trust`, or within its own the
/// one in use.
pub(crate) fn select(now: Instant, trust: Duration, set: &Candidates, incumbent: Option<Incumbent>) -> Option<Target> {
    let quality = |target: &Target, candidate: &Candidate| {
        let used = incumbent.filter(|incumbent| incumbent.target == *target);
        let trust = used.map_or(trust, |incumbent| incumbent.trust);
        let round_trip = candidate.round_trip.filter(|_| candidate.proven_within(now, trust))?;
        Some(Quality { remote: target.remote, latency: round_trip.smoothed() })
    };
    let best_of = |wanted: &dyn Fn(&Target, &Candidate) -> bool| {
        let wanted = set.iter().filter(|(target, candidate)| wanted(target, candidate));
        let proven = wanted.filter_map(|(target, candidate)| Some((*target, quality(target, candidate)?)));
        proven.reduce(|best, next| if next.1.beats(&best.1) { next } else { best })
    };
    let best = best_of(&|_, _| true)?;
    let Some(incumbent) = incumbent else { return Some(best.0) };
    let held = set.get(&incumbent.target).and_then(|candidate| quality(&incumbent.target, candidate));
    let Some(held) = held else { return Some(best.0) };
    if let Some(since) = incumbent.doubted {
        // Whatever answers is better than what does not.
        let answers = |target: &Target, candidate: &Candidate| {
            *target != incumbent.target && candidate.proven.is_some_and(|at| at > since)
        };
        return Some(best_of(&answers).map_or(incumbent.target, |(target, _)| target));
    }
    Some(if best.1.displaces(&held, incumbent.dwelling) { best.0 } else { incumbent.target })
}

#[cfg(test)]
mod tests {
    use super::super::SocketId;
    use super::super::probe::RoundTrip;
    use super::*;

    const TRUST: Duration = Duration::from_secs(6);

    fn at(port: u16) -> Option<Incumbent> {
        Some(Incumbent { target: target(port), trust: TRUST, doubted: None, dwelling: false })
    }

    fn target(port: u16) -> Target {
        Target { socket: SocketId(0), remote: ([192, 0, 2, 1], port).into() }
    }

    fn prove(set: &mut Candidates, at: Instant, port: u16, millis: u64) {
        let candidate = set.admit(at, target(port)).unwrap();
        candidate.proven = Some(at);
        candidate.round_trip = Some(RoundTrip::first(Duration::from_millis(millis)));
    }

    #[test]
    fn a_working_path_is_kept_until_a_clearly_better_one_is_proven() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let mut set = Candidates::default();
        set.admit(now, target(1)).unwrap().listed = true;
        assert_eq!(select(now, TRUST, &set, None), None, "nothing is proven");
        prove(&mut set, now, 2, 100);
        assert_eq!(select(now, TRUST, &set, None), Some(target(2)));
        prove(&mut set, now, 3, 98);
        assert_eq!(select(now, TRUST, &set, at(2)), Some(target(2)));
        prove(&mut set, now, 4, 50);
        assert_eq!(select(now, TRUST, &set, at(2)), Some(target(4)));
    }

    #[test]
    fn when_trust_ends_another_proven_path_takes_over() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let mut set = Candidates::default();
        prove(&mut set, now, 2, 10);
        prove(&mut set, now + TRUST / 2, 3, 500);
        assert_eq!(select(now + TRUST, TRUST, &set, at(2)), Some(target(3)));
        assert_eq!(select(now + TRUST * 2, TRUST, &set, at(3)), None);
    }

    #[test]
    fn the_path_in_use_may_be_trusted_for_longer_than_others() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let mut set = Candidates::default();
        prove(&mut set, now, 2, 100);
        prove(&mut set, now, 3, 10);
        let silent = Incumbent { trust: TRUST * 3, ..at(2).unwrap() };
        assert_eq!(select(now + TRUST, TRUST, &set, Some(silent)), Some(target(2)), "the other one is proven no more");
        assert_eq!(select(now + TRUST * 3, TRUST, &set, Some(silent)), None);
    }

    #[test]
    fn a_path_that_has_just_replaced_another_is_left_only_for_a_much_better_one() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let mut set = Candidates::default();
        prove(&mut set, now, 2, 100);
        prove(&mut set, now, 3, 85);
        let dwelling = Incumbent { dwelling: true, ..at(2).unwrap() };
        assert_eq!(select(now, TRUST, &set, Some(dwelling)), Some(target(2)));
        assert_eq!(select(now, TRUST, &set, at(2)), Some(target(3)));
        prove(&mut set, now, 4, 40);
        assert_eq!(select(now, TRUST, &set, Some(dwelling)), Some(target(4)));
    }

    #[test]
    fn a_doubted_path_gives_way_to_any_that_has_answered_since() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut set = Candidates::default();
        prove(&mut set, now, 2, 10);
        prove(&mut set, now, 3, 11);
        let doubted = Incumbent { doubted: Some(now + second), ..at(2).unwrap() };
        assert_eq!(select(now + second, TRUST, &set, Some(doubted)), Some(target(2)), "nothing is known to be better");
        prove(&mut set, now + second * 2, 4, 500);
        assert_eq!(select(now + second * 2, TRUST, &set, Some(doubted)), Some(target(4)));
    }
}
