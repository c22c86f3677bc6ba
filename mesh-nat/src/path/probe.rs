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
    /// It went to an address that may be the peer's and may be anybody's.
    pub(crate) guess: bool,
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

/// How much a [`Budget`] allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    /// At once.
    burst: u32,
    /// Until one more is allowed.
    refill: Duration,
}

impl Rate {
    /// Pings towards one peer, heartbeats and user pings not counted: every candidate once, and some.
    const PEER: Self = Self { burst: 128, refill: Duration::from_millis(40) };
    /// Searches for peers of one node.
    pub(crate) const SEARCHES: Self = Self { burst: 64, refill: Duration::from_millis(2) };
}

/// A token bucket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    tokens: u32,
    refilled: Instant,
}

impl Budget {
    /// For pings towards one peer.
    pub(crate) const fn full(now: Instant) -> Self {
        Self::full_of(now, Rate::PEER)
    }

    pub(crate) fn take(&mut self, now: Instant) -> bool {
        self.take_of(now, Rate::PEER)
    }

    /// For whatever `rate` is for, as in each [`Self::take_of`] that follows.
    pub(crate) const fn full_of(now: Instant, rate: Rate) -> Self {
        Self { tokens: rate.burst, refilled: now }
    }

    pub(crate) fn take_of(&mut self, now: Instant, rate: Rate) -> bool {
        let gained = now.saturating_duration_since(self.refilled).as_millis() / rate.refill.as_millis();
        let room = rate.burst - self.tokens;
        match u32::try_from(gained) {
            Ok(gained) if gained < room => {
                self.tokens += gained;
                self.refilled += rate.refill * gained;
            }
            Ok(_) | Err(_) => *self = Self::full_of(now, rate),
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
