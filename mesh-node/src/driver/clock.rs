//! The clock of a running node: it counts the time that the machine sleeps.
//!
//! [`Instant`] stands still while a laptop is suspended, and sessions would look younger than they are. This clock adds
//! what `CLOCK_BOOTTIME` has counted beyond it.

use std::time::{Duration, Instant, SystemTime};

use rustix::time::{ClockId, clock_gettime};

/// The longest sleep: after a suspension, deadlines are looked at again within this time.
const MAX_SLEEP: Duration = Duration::from_secs(15);

/// Pairs the three clocks of the system once, at its start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    start: Instant,
    boot: Duration,
    wall: SystemTime,
}

/// A sleep shorter than this changes nothing about the network.
const SHORT_SLEEP: Duration = Duration::from_secs(5);

/// Notices that the machine has slept: one clock has counted on, the other has not.
#[derive(Debug, Default)]
pub(crate) struct SleepWatch {
    /// All sleep that is known of.
    known: Duration,
}

impl SleepWatch {
    /// Given how much time has passed on either clock since the same moment, says how long the machine has slept since
    /// this was last asked; none if it hardly has.
    pub(crate) fn slept(&mut self, passed: Passed) -> Option<Duration> {
        let slept = passed.boot.saturating_sub(passed.awake);
        let since = slept.saturating_sub(self.known);
        if since < SHORT_SLEEP {
            return None;
        }
        self.known = slept;
        Some(since)
    }
}

/// Time that has passed since a node's start.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passed {
    /// With the time asleep.
    pub(crate) boot: Duration,
    /// Without it.
    pub(crate) awake: Duration,
}

fn boot_time() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(now.tv_nsec).unwrap_or_default())
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "the one place where a node reads the system's clocks")]
    pub(crate) fn start() -> Self {
        Self { start: Instant::now(), boot: boot_time(), wall: SystemTime::now() }
    }

    /// How much time has passed since the start, with and without sleep.
    #[expect(clippy::disallowed_methods, reason = "the one place where a node reads the system's clocks")]
    pub(crate) fn passed(&self) -> Passed {
        Passed {
            boot: boot_time().saturating_sub(self.boot),
            awake: Instant::now().saturating_duration_since(self.start),
        }
    }

    /// When the clock was started.
    pub(crate) fn epoch(&self) -> Instant {
        self.start
    }

    pub(crate) fn now(&self) -> Instant {
        self.start + boot_time().saturating_sub(self.boot)
    }

    /// The time as activity words have it: milliseconds since the start, plus one; 0 means "never".
    pub(crate) fn activity_ms(&self) -> u64 {
        let passed = self.now().saturating_duration_since(self.start).as_millis();
        u64::try_from(passed).unwrap_or(u64::MAX - 1) + 1
    }

    /// The wall clock at `moment`.
    pub(crate) fn wall(&self, moment: Instant) -> SystemTime {
        self.wall + moment.saturating_duration_since(self.start)
    }

    /// The wall clock at `moment`, in seconds since 1970.
    pub(crate) fn unix(&self, moment: Instant) -> u64 {
        self.wall(moment).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
    }

    /// Sleeps until `deadline`, for ever without one. May return early.
    pub(crate) async fn sleep_until(&self, deadline: Option<Instant>) {
        let Some(deadline) = deadline else { return std::future::pending().await };
        tokio::time::sleep(deadline.saturating_duration_since(self.now()).min(MAX_SLEEP)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_is_noticed_once_and_a_short_one_not_at_all() {
        let seconds = Duration::from_secs;
        let passed = |boot, awake| Passed { boot: seconds(boot), awake: seconds(awake) };
        let mut watch = SleepWatch::default();
        assert_eq!(watch.slept(passed(100, 100)), None);
        assert_eq!(watch.slept(passed(104, 102)), None);
        assert_eq!(watch.slept(passed(3700, 103)), Some(seconds(3597)));
        assert_eq!(watch.slept(passed(3800, 203)), None);
        assert_eq!(watch.slept(passed(3900, 290)), Some(seconds(13)));
        let clock = Clock::start();
        assert_eq!(SleepWatch::default().slept(clock.passed()), None);
    }

    #[tokio::test]
    async fn the_clock_goes_on_and_agrees_with_the_wall() {
        let clock = Clock::start();
        let before = clock.now();
        clock.sleep_until(Some(before + Duration::from_millis(20))).await;
        let passed = clock.now() - before;
        assert!(passed >= Duration::from_millis(15) && passed < Duration::from_secs(5), "{passed:?}");
        assert!(clock.unix(before) > 1_700_000_000);
    }
}
