//! Which proven address carries the data. An address that no pong has proven lately is never chosen.

use std::time::{Duration, Instant};

use super::candidate::{Candidate, Candidates, Target};
use super::score::Quality;

/// The target to use now, given the one in use. `None` when nothing has been proven within `trust`.
pub(crate) fn select(now: Instant, trust: Duration, set: &Candidates, current: Option<Target>) -> Option<Target> {
    let quality = |target: &Target, candidate: &Candidate| {
        let round_trip = candidate.round_trip.filter(|_| candidate.proven_within(now, trust))?;
        Some(Quality { remote: target.remote, latency: round_trip.smoothed() })
    };
    let proven = set.iter().filter_map(|(target, candidate)| Some((*target, quality(target, candidate)?)));
    let best = proven.reduce(|best, next| if next.1.beats(&best.1) { next } else { best })?;
    let held = current.and_then(|target| Some((target, quality(&target, set.get(&target)?)?)));
    Some(match held {
        Some((target, quality)) if !best.1.displaces(&quality) => target,
        Some(_) | None => best.0,
    })
}

#[cfg(test)]
mod tests {
    use super::super::SocketId;
    use super::super::probe::RoundTrip;
    use super::*;

    const TRUST: Duration = Duration::from_secs(6);

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
        assert_eq!(select(now, TRUST, &set, Some(target(2))), Some(target(2)));
        prove(&mut set, now, 4, 50);
        assert_eq!(select(now, TRUST, &set, Some(target(2))), Some(target(4)));
    }

    #[test]
    fn when_trust_ends_another_proven_path_takes_over() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let mut set = Candidates::default();
        prove(&mut set, now, 2, 10);
        prove(&mut set, now + TRUST / 2, 3, 500);
        assert_eq!(select(now + TRUST, TRUST, &set, Some(target(2))), Some(target(3)));
        assert_eq!(select(now + TRUST * 2, TRUST, &set, Some(target(3))), None);
    }
}
