//! When the next probes may leave, and when an attempt may follow another.

use std::time::{Duration, Instant};

use rand::RngExt;
use rand::rngs::StdRng;

use super::ladder::MAX_PER_SECOND;

/// Probes that leave together.
pub(super) const BURST: usize = 4;
/// Between two bursts: 50 of them touch any second, so that [`MAX_PER_SECOND`] holds wherever one starts to count.
const INTERVAL: Duration = Duration::from_micros(20_250);
const _: () = assert!(BURST as u128 * (1_000_000 / INTERVAL.as_micros() + 1) <= MAX_PER_SECOND as u128);

/// Lets a burst out at a time, whatever is in it.
#[derive(Debug, Default)]
pub(super) struct Pacer {
    free: Option<Instant>,
}

impl Pacer {
    /// When the next burst may leave, `now` at the earliest.
    pub(super) fn next(&self, now: Instant) -> Instant {
        self.free.map_or(now, |free| free.max(now))
    }

    /// A burst leaves now.
    pub(super) fn take(&mut self, now: Instant) {
        self.free = Some(now + INTERVAL);
    }
}

/// How long probes take to leave.
pub(super) fn span(probes: usize) -> Duration {
    INTERVAL * u32::try_from(probes.div_ceil(BURST)).unwrap_or(u32::MAX)
}

/// After so many failures in a row: a minute, doubling to an hour.
pub(super) fn back_off(failures: u32) -> Duration {
    const FIRST: Duration = Duration::from_secs(60);
    const LONGEST: Duration = Duration::from_secs(3600);
    (FIRST * 2u32.saturating_pow(failures.saturating_sub(1).min(16))).min(LONGEST)
}

/// Up to a quarter more, so that nodes do not try in step.
pub(super) fn jittered(span: Duration, rng: &mut StdRng) -> Duration {
    span + span.mul_f64(rng.random_range(0.0..0.25))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_second_has_more_than_two_hundred_probes() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let start = Instant::now();
        let (mut pacer, mut now, mut sent) = (Pacer::default(), start, Vec::new());
        while sent.len() < 1000 {
            now = pacer.next(now);
            pacer.take(now);
            sent.extend([now; BURST]);
        }
        for first in &sent {
            let second = sent.iter().filter(|at| *at >= first && **at < *first + Duration::from_secs(1)).count();
            assert!(second <= 200, "{second}");
        }
        assert!(now - start < Duration::from_millis(5100));
    }

    #[test]
    fn failures_keep_a_peer_quiet_for_minutes_then_an_hour() {
        let minutes: Vec<_> = (1..9).map(|failures| back_off(failures).as_secs() / 60).collect();
        assert_eq!(minutes, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(back_off(u32::MAX), Duration::from_secs(3600));
    }
}
