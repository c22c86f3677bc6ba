//! How much one side of a connection may hold: a window that grows with the path.
//!
//! Buffers of 8 MiB fill 1 Gbit/s over 50 ms, which is 6.25 MB on its way. Offered to everybody, they would fill nothing
//! but queues: between two machines of one house, a megabyte is more than the path holds, and what a peer sends beyond
//! that is lost where a socket's buffer ends. So a window begins small, and doubles whenever half of it has passed within
//! one round trip: the sign of somebody who waits for it. (Linux sizes its windows after the same measurement.)

use std::time::{Duration, Instant};

/// What a window begins with.
pub(super) const FIRST: usize = 1 << 20;

/// The bytes that may be offered to the peer, or taken from the program, and have not passed.
#[derive(Debug)]
pub(super) struct Window {
    limit: usize,
    most: usize,
    /// When this round trip began, and what has passed since.
    since: Option<Instant>,
    passed: usize,
}

impl Window {
    /// A window for a buffer of `most` bytes.
    pub(super) fn new(most: usize) -> Self {
        Self { limit: most.min(FIRST), most, since: None, passed: 0 }
    }

    /// How many bytes.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Notes bytes that have passed. Nothing grows before a round trip has been measured.
    pub(super) fn pass(&mut self, now: Instant, bytes: usize, round_trip: Option<Duration>) {
        let Some(round_trip) = round_trip.filter(|_| self.limit < self.most) else { return };
        if self.since.is_none_or(|since| now.saturating_duration_since(since) > round_trip) {
            (self.since, self.passed) = (Some(now), 0);
        }
        self.passed += bytes;
        if self.passed >= self.limit / 2 {
            self.limit = self.limit.saturating_mul(2).min(self.most);
            self.since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND_TRIP: Duration = Duration::from_millis(50);

    #[expect(clippy::disallowed_methods, reason = "a point to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    /// Passes `rate` bytes a second for a second, ten thousand times a bit.
    fn after_a_second(rate: usize, round_trip: Option<Duration>) -> usize {
        let mut window = Window::new(8 << 20);
        let begin = start();
        let at = |part: u32| begin + part * Duration::from_micros(100);
        (0..10_000).for_each(|part| window.pass(at(part), rate / 10_000, round_trip));
        window.limit()
    }

    #[test]
    fn a_window_grows_until_the_path_is_full_and_no_further() {
        assert_eq!(after_a_second(125_000_000, Some(ROUND_TRIP)), 8 << 20, "1 Gbit/s over 50 ms needs 6.25 MB");
        assert_eq!(after_a_second(125_000_000, Some(Duration::from_millis(1))), FIRST, "125 kB are on their way");
        assert_eq!(after_a_second(1_000_000, Some(ROUND_TRIP)), FIRST);
        assert_eq!(after_a_second(125_000_000, None), FIRST);
    }

    #[test]
    fn a_small_buffer_is_offered_whole() {
        assert_eq!(Window::new(64 * 1024).limit(), 64 * 1024);
    }
}
