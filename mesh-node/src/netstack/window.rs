//! How much one side of a connection may hold: a window that grows with the path.
//!
//! Buffers of 8 MiB fill 1 Gbit/s over 50 ms, which is 6.25 MB on its way. Offered to everybody, they would fill nothing
//! but queues: between two machines of one house, a megabyte is more than the path holds, and what a peer sends beyond
//! that is lost where a socket's buffer ends. So a window begins small, and doubles whenever half of it has passed within
//! one round trip: the sign of somebody who waits for it. (Linux sizes its windows after the same measurement.)
//!
//! A side that mostly receives measures few round trips, and those of a busy machine are too long: then a window outgrows
//! the path all the same. What is lost shows it, and halves the window again.

use std::time::{Duration, Instant};

/// What a window begins with.
pub(super) const FIRST: usize = 1 << 20;

/// How long a window keeps its size after a loss.
const CALM: Duration = Duration::from_secs(10);
/// Losses so close to each other are one.
const EPISODE: Duration = Duration::from_millis(100);

/// The bytes that may be offered to the peer, or taken from the program, and have not passed.
#[derive(Debug)]
pub(super) struct Window {
    limit: usize,
    most: usize,
    /// When this round trip began, and what has passed since.
    since: Option<Instant>,
    passed: usize,
    /// When packets were lost.
    lost: Option<Instant>,
}

impl Window {
    /// A window for a buffer of `most` bytes.
    pub(super) fn new(most: usize) -> Self {
        Self { limit: most.min(FIRST), most, since: None, passed: 0, lost: None }
    }

    /// How many bytes.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Notes bytes that have passed. Nothing grows before a round trip has been measured.
    pub(super) fn pass(&mut self, now: Instant, bytes: usize, round_trip: Option<Duration>) {
        let calm = self.lost.is_none_or(|lost| now > lost + CALM);
        let Some(round_trip) = round_trip.filter(|_| self.limit < self.most && calm) else { return };
        if self.since.is_none_or(|since| now.saturating_duration_since(since) > round_trip) {
            (self.since, self.passed) = (Some(now), 0);
        }
        self.passed += bytes;
        if self.passed >= self.limit / 2 {
            self.limit = self.limit.saturating_mul(2).min(self.most);
            self.since = None;
        }
    }

    /// Notes that packets are missing.
    pub(super) fn lose(&mut self, now: Instant) {
        if self.lost.is_none_or(|lost| now > lost + EPISODE) {
            self.limit = self.limit.min((self.limit / 2).max(FIRST));
        }
        self.lost = Some(now);
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
    fn a_loss_halves_a_window_that_has_grown_and_holds_it_for_a_while() {
        let (mut window, mut now) = (Window::new(8 << 20), start());
        let grow = |window: &mut Window, now| (0..8).for_each(|_| window.pass(now, 8 << 20, Some(ROUND_TRIP)));
        grow(&mut window, now);
        assert_eq!(window.limit(), 8 << 20);
        for _ in 0..3 {
            window.lose(now);
        }
        assert_eq!(window.limit(), 4 << 20, "one burst is one loss");
        now += CALM;
        grow(&mut window, now);
        assert_eq!(window.limit(), 4 << 20);
        grow(&mut window, now + Duration::from_millis(1));
        assert_eq!(window.limit(), 8 << 20);
        (0..10).for_each(|nth| window.lose(now + nth * Duration::from_secs(1)));
        assert_eq!(window.limit(), FIRST);
        let mut small = Window::new(64 * 1024);
        small.lose(now);
        assert_eq!(small.limit(), 64 * 1024);
    }

    #[test]
    fn a_small_buffer_is_offered_whole() {
        assert_eq!(Window::new(64 * 1024).limit(), 64 * 1024);
    }
}
