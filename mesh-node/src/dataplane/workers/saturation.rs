//! When one thread is not enough: a judgement from what it has used and carried.
//!
//! A thread that computes for nine tenths of a window carries as much as it can. Workers then take the larger part of its
//! work, so that its own time says nothing about the load any more; what it carries does. Workers are let go when that has
//! been less than half of what the thread alone carried, for a second.

use std::time::Duration;

/// How long is measured before each judgement.
const WINDOW: Duration = Duration::from_millis(100);

/// Tenths of a window that a thread must have computed to count as saturated.
const BUSY_TENTHS: u32 = 9;

/// How long the load must have been low before workers are let go.
const CALM: Duration = Duration::from_secs(1);

/// What a thread has used and carried since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sample {
    /// Time of the processor.
    pub(super) cpu: Duration,
    /// Packets.
    pub(super) packets: u64,
}

/// Judges one thread. Time is that of any clock that the caller keeps to.
#[derive(Debug, Default)]
pub(super) struct Saturation {
    /// Where the window began.
    start: Option<(Duration, Sample)>,
    /// Packets a second that the thread carried by itself when it was saturated; none while it is not.
    alone: Option<u64>,
    /// Since when less than half of that was carried.
    low_since: Option<Duration>,
}

impl Saturation {
    /// When [`Saturation::judge`] has something new to say.
    pub(super) fn due(&self) -> Duration {
        self.start.map_or(Duration::ZERO, |(start, _)| start + WINDOW)
    }

    /// Whether workers are of use from now on. Calling early is harmless.
    pub(super) fn judge(&mut self, now: Duration, sample: Sample) -> bool {
        let Some((start, before)) = self.start else {
            self.start = Some((now, sample));
            return false;
        };
        let elapsed = now.saturating_sub(start);
        if elapsed < WINDOW {
            return self.alone.is_some();
        }
        self.start = Some((now, sample));
        let cpu = sample.cpu.saturating_sub(before.cpu);
        let packets = u128::from(sample.packets.saturating_sub(before.packets));
        let rate = u64::try_from(packets * 1_000_000 / elapsed.as_micros()).unwrap_or(u64::MAX);
        match self.alone {
            None if cpu * 10 >= elapsed * BUSY_TENTHS => self.alone = Some(rate),
            Some(alone) if rate < alone / 2 => {
                let since = *self.low_since.get_or_insert(start);
                if now.saturating_sub(since) >= CALM {
                    (self.alone, self.low_since) = (None, None);
                }
            }
            None | Some(_) => self.low_since = None,
        }
        self.alone.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread whose load is told in tenths of its time, and packets a millisecond.
    #[derive(Default)]
    struct Thread {
        saturation: Saturation,
        now: Duration,
        sample: Sample,
    }

    impl Thread {
        /// The judgement after `ms` milliseconds of this load, looked at every five.
        fn run(&mut self, ms: u64, tenths: u32, packets: u64) -> bool {
            let step = Duration::from_millis(5);
            let mut judged = false;
            for _ in 0..ms / 5 {
                self.now += step;
                self.sample.cpu += step * tenths / 10;
                self.sample.packets += packets * 5;
                judged = self.saturation.judge(self.now, self.sample);
            }
            judged
        }
    }

    #[test]
    fn a_window_at_full_load_is_enough_and_less_never_is() {
        let mut thread = Thread::default();
        assert!(!thread.run(10_000, 8, 100));
        assert!(thread.run(205, 10, 100));
        let mut thread = Thread::default();
        assert!(!thread.run(85, 10, 100), "no window has passed");
        assert!(!thread.run(100, 0, 0), "and it was not full");
    }

    #[test]
    fn with_workers_the_load_counts_and_not_the_time_used() {
        let mut thread = Thread::default();
        assert!(thread.run(300, 10, 100));
        assert!(thread.run(10_000, 3, 60), "more than half of what it did alone");
        assert!(thread.run(900, 1, 40), "less, but not for long");
        assert!(thread.run(200, 3, 60));
        assert!(thread.run(900, 1, 40), "counted from new");
        assert!(!thread.run(300, 1, 40));
        assert!(!thread.run(1_000, 3, 40), "alone again, with time to spare");
    }

    #[test]
    fn silence_is_a_low_load() {
        let mut thread = Thread::default();
        assert!(thread.run(300, 10, 100));
        thread.now += Duration::from_secs(10);
        assert!(!thread.saturation.judge(thread.now, thread.sample));
    }

    #[test]
    fn a_clock_that_jumps_is_harmless() {
        let mut thread = Thread::default();
        assert!(thread.run(300, 10, 100));
        thread.now -= Duration::from_millis(200);
        assert!(thread.saturation.judge(thread.now, thread.sample));
        thread.now += Duration::from_secs(1 << 40);
        thread.saturation.judge(thread.now, Sample::default());
    }
}
