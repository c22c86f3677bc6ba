//! Pings in flight, what their answers say about a path's round trip, and how many may be sent.

use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;

use super::Path;
use crate::agent::PingId;

/// A ping that waits for its pong.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Probe {
    pub(crate) peer: NodePublic,
    pub(crate) path: Path,
    pub(crate) sent: Instant,
    /// The user's ping that this one serves.
    pub(crate) user: Option<PingId>,
    /// Its length in bytes, if it asks whether that passes.
    pub(crate) length: Option<usize>,
}

/// Smoothed round trip and its variation (RFC 6298 §2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RoundTrip {
    smoothed: Duration,
    variation: Duration,
}

impl RoundTrip {
    pub(crate) fn first(sample: Duration) -> Self {
        Self { smoothed: sample, variation: sample / 2 }
    }

    pub(crate) fn update(&mut self, sample: Duration) {
        let off = self.smoothed.abs_diff(sample);
        self.variation = (self.variation * 3 + off) / 4;
        self.smoothed = (self.smoothed * 7 + sample) / 8;
    }

    pub(crate) const fn smoothed(&self) -> Duration {
        self.smoothed
    }

    /// After this long, an answer is not coming any more.
    pub(crate) fn patience(&self) -> Duration {
        self.smoothed + self.variation * 4
    }
}

/// A token bucket: pings towards one peer, heartbeats and user pings not counted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    tokens: u32,
    refilled: Instant,
}

impl Budget {
    /// Pings in one burst: every candidate once, and some.
    pub(crate) const BURST: u32 = 128;
    /// One token comes back per this time.
    const REFILL: Duration = Duration::from_millis(40);

    pub(crate) const fn full(now: Instant) -> Self {
        Self { tokens: Self::BURST, refilled: now }
    }

    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let gained = now.saturating_duration_since(self.refilled).as_millis() / Self::REFILL.as_millis();
        let room = Self::BURST - self.tokens;
        match u32::try_from(gained) {
            Ok(gained) if gained < room => {
                self.tokens += gained;
                self.refilled += Self::REFILL * gained;
            }
            Ok(_) | Err(_) => *self = Self::full(now),
        }
        let taken = self.tokens > 0;
        self.tokens -= u32::from(taken);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_lucky_sample_moves_the_round_trip_by_an_eighth() {
        let mut round_trip = RoundTrip::first(Duration::from_millis(80));
        round_trip.update(Duration::from_millis(8));
        assert_eq!(round_trip.smoothed(), Duration::from_millis(71));
        assert!(round_trip.patience() > Duration::from_millis(200));
    }

    #[test]
    fn a_spent_budget_comes_back_at_25_a_second() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let mut budget = Budget::full(now);
        assert_eq!((0..1000).filter(|_| budget.take(now)).count(), 128);
        let later = now + Duration::from_secs(1);
        assert_eq!((0..1000).filter(|_| budget.take(later)).count(), 25);
        let much_later = now + Duration::from_secs(1000);
        assert_eq!((0..1000).filter(|_| budget.take(much_later)).count(), 128);
    }
}
