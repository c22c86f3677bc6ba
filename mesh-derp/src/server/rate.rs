//! How much a client may send, and how many may come: two limits that never drop a packet.
//!
//! [`RateLimiter`] says until when a client's next bytes are to be left unread, so that TCP slows the client down.
//! [`AcceptLimiter`] says whether a new connection is served or closed at once; accepting goes on either way.

use std::time::{Duration, Instant};

/// The smallest burst: the longest legal frame, a packet of 64 KiB behind a key. A frame is charged no more than that
/// either, so every frame passes in the end.
pub const MIN_BURST: u64 = 65_536 + 32;

/// A token bucket, kept as the time at which it will be full again. That needs neither fractions nor a timer.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    per_second: u64,
    burst: u64,
    full_at: Instant,
}

impl Bucket {
    const fn new(now: Instant, per_second: u64, burst: u64) -> Self {
        Self { per_second, burst, full_at: now }
    }

    /// The time in which so much flows in.
    fn time(&self, amount: u64) -> Duration {
        let nanos = u128::from(amount) * 1_000_000_000 / u128::from(self.per_second.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// When the bucket will hold what it lacks after `amount` has been taken; `None` if it lacks nothing.
    fn lacks_until(&self, now: Instant, amount: u64) -> Option<Instant> {
        let full_at = self.full_at.max(now) + self.time(amount);
        full_at.checked_sub(self.time(self.burst)).filter(|at| *at > now)
    }

    fn take(&mut self, now: Instant, amount: u64) {
        self.full_at = self.full_at.max(now) + self.time(amount);
    }

    /// Another limit, as much being missing from the bucket as before.
    fn replace(&mut self, now: Instant, per_second: u64, burst: u64) {
        let missing = self.full_at.saturating_duration_since(now).as_nanos() * u128::from(self.per_second);
        let missing = u64::try_from(missing / 1_000_000_000).unwrap_or(u64::MAX).min(burst.saturating_add(MIN_BURST));
        *self = Self::new(now, per_second, burst);
        self.full_at = now + self.time(missing);
    }
}

/// How much one client may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RateLimit {
    /// Bytes of frames, without their headers, in a second; 0 is no limit.
    pub bytes_per_second: u64,
    /// Bytes that may come at once after a silence; at least [`MIN_BURST`] whatever is written here.
    pub burst: u64,
}

/// Holds one client to a [`RateLimit`]. Delays, and never drops.
#[derive(Debug, Clone, Copy)]
pub struct RateLimiter {
    /// `None` while there is no limit.
    bucket: Option<Bucket>,
    exempt: bool,
}

impl RateLimiter {
    /// For a client that has just come.
    #[must_use]
    pub fn new(now: Instant, limit: RateLimit) -> Self {
        let mut limiter = Self { bucket: None, exempt: false };
        limiter.set_limit(now, limit);
        limiter
    }

    /// For another relay of the region: no limit, now or later.
    #[must_use]
    pub const fn exempt() -> Self {
        Self { bucket: None, exempt: true }
    }

    /// Replaces the limit of a client that is connected. What it has used up of the last one it has used up of this.
    pub fn set_limit(&mut self, now: Instant, limit: RateLimit) {
        let RateLimit { bytes_per_second, burst } = limit;
        let burst = burst.max(MIN_BURST);
        match &mut self.bucket {
            _ if bytes_per_second == 0 || self.exempt => self.bucket = None,
            Some(bucket) => bucket.replace(now, bytes_per_second, burst),
            None => self.bucket = Some(Bucket::new(now, bytes_per_second, burst)),
        }
    }

    /// A frame of `length` bytes, as its header has it, has come. Returns until when nothing more is to be read from the
    /// client, nor the frame passed on; `None` if all is well.
    pub fn charge(&mut self, now: Instant, length: usize) -> Option<Instant> {
        let bucket = self.bucket.as_mut()?;
        let amount = (length as u64).min(MIN_BURST);
        let until = bucket.lacks_until(now, amount);
        bucket.take(now, amount);
        until
    }
}

/// How many connections are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptLimit {
    /// New connections in a second; 0 is no limit.
    pub per_second: u64,
    /// That many may come at once after a silence; at least 1 whatever is written here.
    pub burst: u64,
}

/// Decides which new connections are served. One that is not is to be closed at once, and the next one accepted: a relay
/// that stops accepting would leave the rest in the kernel's queue, where they look like a relay that is down.
#[derive(Debug, Clone, Copy)]
pub struct AcceptLimiter(Option<Bucket>);

impl AcceptLimiter {
    /// A limiter through which nobody has come yet.
    #[must_use]
    pub fn new(now: Instant, limit: AcceptLimit) -> Self {
        let AcceptLimit { per_second, burst } = limit;
        Self((per_second > 0).then(|| Bucket::new(now, per_second, burst.max(1))))
    }

    /// Whether a connection that has just come is served. Those that are not count for nothing.
    pub fn admits(&mut self, now: Instant) -> bool {
        let Some(bucket) = &mut self.0 else { return true };
        let admitted = bucket.lacks_until(now, 1).is_none();
        if admitted {
            bucket.take(now, 1);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[expect(clippy::disallowed_methods, reason = "a point to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    fn limit(bytes_per_second: u64, burst: u64) -> RateLimit {
        RateLimit { bytes_per_second, burst }
    }

    const LONGEST: usize = 65_568;

    #[test]
    fn the_longest_frame_passes_with_the_smallest_burst() {
        let now = start();
        let mut limiter = RateLimiter::new(now, limit(1000, 1));
        assert_eq!(limiter.charge(now, LONGEST), None);
        assert_eq!(limiter.charge(now, 500), Some(now + Duration::from_millis(500)));
        // What would never fit is charged as much as what just fits.
        let mut limiter = RateLimiter::new(now, limit(1000, 1));
        assert_eq!(limiter.charge(now, 1 << 20), None);
        assert_eq!(limiter.charge(now, 1), Some(now + Duration::from_millis(1)));
    }

    #[test]
    fn a_burst_comes_back_with_time_and_no_more_than_once() {
        let now = start();
        let mut limiter = RateLimiter::new(now, limit(100_000, 100_000));
        assert_eq!(limiter.charge(now, 60_000), None);
        assert_eq!(limiter.charge(now, 40_000), None);
        assert_eq!(limiter.charge(now, 10_000), Some(now + Duration::from_millis(100)));
        let later = now + Duration::from_secs(100);
        assert_eq!((limiter.charge(later, 60_000), limiter.charge(later, 40_000)), (None, None));
        assert!(limiter.charge(later, 1).is_some());
    }

    #[test]
    fn without_a_limit_and_for_relays_of_the_region_nothing_waits() {
        let now = start();
        let mut none = RateLimiter::new(now, RateLimit::default());
        let mut exempt = RateLimiter::exempt();
        exempt.set_limit(now, limit(1, 1));
        for _ in 0..1000 {
            assert_eq!((none.charge(now, LONGEST), exempt.charge(now, LONGEST)), (None, None));
        }
    }

    #[test]
    fn a_new_limit_holds_at_once_and_forgives_nothing() {
        let now = start();
        let mut limiter = RateLimiter::new(now, limit(1000, 0));
        for _ in 0..2 {
            limiter.charge(now, LONGEST);
        }
        // One frame is owed: 65.568 s at the old rate, a tenth of that at the new one.
        limiter.set_limit(now, limit(10_000, 0));
        assert_eq!(limiter.charge(now, 0), Some(now + Duration::from_micros(6_556_800)));
        limiter.set_limit(now, RateLimit::default());
        assert_eq!(limiter.charge(now, LONGEST), None);
        limiter.set_limit(now, limit(1000, 0));
        assert_eq!(limiter.charge(now, LONGEST), None, "a limit that is new begins with its burst");
    }

    #[test]
    fn connections_above_the_limit_are_refused_and_do_not_count() {
        let now = start();
        let mut limiter = AcceptLimiter::new(now, AcceptLimit { per_second: 10, burst: 3 });
        let served = |limiter: &mut AcceptLimiter, at| (0..100).filter(|_| limiter.admits(at)).count();
        assert_eq!(served(&mut limiter, now), 3);
        assert_eq!(served(&mut limiter, now + Duration::from_millis(99)), 0);
        assert_eq!(served(&mut limiter, now + Duration::from_millis(100)), 1);
        assert_eq!(served(&mut limiter, now + Duration::from_secs(60)), 3);
        let mut none = AcceptLimiter::new(now, AcceptLimit { per_second: 0, burst: 0 });
        assert_eq!(served(&mut none, now), 100);
    }

    proptest! {
        /// A client that waits as it is told never gets more than its burst and its rate; and it is not told to wait
        /// longer than that takes.
        #[test]
        fn what_passes_is_the_burst_and_the_rate(
            rate in 1u64..10_000_000, burst in 0u64..500_000,
            frames in proptest::collection::vec((0usize..100_000, 0u64..200), 1..100),
        ) {
            let (begin, burst) = (start(), burst.max(MIN_BURST));
            let mut limiter = RateLimiter::new(begin, limit(rate, burst));
            let (mut now, mut passed) = (begin, 0u128);
            for (length, pause) in frames {
                now += Duration::from_millis(pause);
                let before = now;
                if let Some(until) = limiter.charge(now, length) {
                    prop_assert!(until > now);
                    now = until;
                }
                passed += length.min(LONGEST) as u128;
                let allowed = u128::from(burst) + (now - begin).as_nanos() * u128::from(rate) / 1_000_000_000;
                prop_assert!(passed <= allowed + 100, "{passed} passed of {allowed}");
                if now > before {
                    prop_assert!(now - before <= Duration::from_secs_f64(LONGEST as f64 / rate as f64 + 1e-3));
                }
            }
        }

        #[test]
        fn any_limits_are_survived(
            steps in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<usize>(), 0u64..u64::MAX / 4), 0..20),
        ) {
            let mut now = start();
            let mut limiter = RateLimiter::new(now, limit(1, 1));
            for (rate, burst, length, wait) in steps {
                limiter.set_limit(now, limit(rate, burst));
                limiter.charge(now, length);
                AcceptLimiter::new(now, AcceptLimit { per_second: rate, burst }).admits(now);
                now += Duration::from_nanos(wait);
            }
        }
    }
}
