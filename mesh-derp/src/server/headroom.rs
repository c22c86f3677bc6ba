//! Staying below a limit of CPU time, so that what is urgent is not caught by it.
//!
//! A container may use so much CPU time in each period, and stands still for the rest of a period in which it has used it
//! up. A relay at its limit would do so most of the time, and whatever comes meanwhile waits, however little it is. So bulk
//! work is begun only while there is headroom: a little less than the limit is used, nobody is caught, and light traffic
//! passes as it does through an idle relay.

use std::time::{Duration, Instant};

/// A limit of CPU time, as control groups have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuLimit {
    /// CPU time that may be used in each period.
    pub quota: Duration,
    /// The period.
    pub period: Duration,
}

/// What part of the limit is used.
const USED: f64 = 0.9;
/// What part of a period's quota may be used at once.
const AT_ONCE: f64 = 0.6;
/// Bulk work waits no longer than this at a time, whatever else has used the limit up.
const LONGEST: Duration = Duration::from_millis(50);

/// Says when bulk work may go on without getting near the limit: a tenth of it is left for what is urgent.
#[derive(Debug, Default)]
pub struct Headroom {
    limit: Option<CpuLimit>,
    last: Option<(Instant, Duration)>,
    /// CPU time used beyond what has flowed in meanwhile.
    ahead: Duration,
}

impl Headroom {
    /// Without a limit there is always headroom.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces the limit.
    pub fn set_limit(&mut self, limit: Option<CpuLimit>) {
        if self.limit != limit {
            *self = Self { limit, ..Self::new() };
        }
    }

    /// Whether there is a limit, and [`Headroom::wait`] worth asking.
    #[must_use]
    pub const fn is_limited(&self) -> bool {
        self.limit.is_some()
    }

    /// The process has used so much CPU time since it began. Until when bulk work is to wait; `None` to go on.
    pub fn wait(&mut self, now: Instant, used: Duration) -> Option<Instant> {
        let CpuLimit { quota, period } = self.limit?;
        let rate = USED * quota.as_secs_f64() / period.as_secs_f64().max(1e-6);
        let (then, before) = self.last.replace((now, used)).unwrap_or((now, used));
        let flowed = now.saturating_duration_since(then).mul_f64(rate);
        self.ahead = (self.ahead + used.saturating_sub(before)).saturating_sub(flowed);
        let excess = self.ahead.checked_sub(quota.mul_f64(AT_ONCE))?;
        (rate > 0.0 && !excess.is_zero()).then(|| now + excess.div_f64(rate).min(LONGEST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: CpuLimit = CpuLimit { quota: Duration::from_millis(1), period: Duration::from_micros(2857) };

    #[expect(clippy::disallowed_methods, reason = "a point to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let (mut headroom, now) = (Headroom::new(), start());
        assert!(!headroom.is_limited());
        assert_eq!(headroom.wait(now, Duration::from_secs(1)), None);
        assert_eq!(headroom.wait(now, Duration::from_secs(9)), None);
    }

    /// Runs bulk work of `unit` whenever there is headroom, with alarms that are up to a millisecond late.
    fn used_in_a_second(unit: Duration) -> (Duration, Duration) {
        let (mut headroom, begin) = (Headroom::new(), start());
        headroom.set_limit(Some(LIMIT));
        let (mut now, mut used, mut most, mut windows) = (begin, Duration::ZERO, Duration::ZERO, Vec::new());
        while now < begin + Duration::from_secs(1) {
            match headroom.wait(now, used) {
                Some(until) => now = until + Duration::from_micros(500),
                None => {
                    now += unit;
                    used += unit;
                    windows.push((now, unit));
                }
            }
            windows.retain(|(at, _)| *at + LIMIT.period > now);
            most = most.max(windows.iter().map(|(_, unit)| *unit).sum());
        }
        (used, most)
    }

    #[test]
    fn a_little_less_than_the_limit_is_used_and_rarely_more_in_a_period() {
        let (used, most) = used_in_a_second(Duration::from_micros(120));
        let limit = LIMIT.quota.as_secs_f64() / LIMIT.period.as_secs_f64();
        assert!((0.85 * limit..0.95 * limit).contains(&used.as_secs_f64()), "{used:?}");
        assert!(most <= LIMIT.quota.mul_f64(1.5), "{most:?}");
    }

    #[test]
    fn what_others_have_used_up_is_waited_for_but_not_for_ever() {
        let (mut headroom, now) = (Headroom::new(), start());
        headroom.set_limit(Some(LIMIT));
        assert_eq!(headroom.wait(now, Duration::from_secs(5)), None, "what was used before is not counted");
        let until = headroom.wait(now, Duration::from_secs(6)).unwrap();
        assert_eq!(until, now + LONGEST);
        assert_eq!(headroom.wait(now + Duration::from_secs(10), Duration::from_secs(6)), None);
    }
}
