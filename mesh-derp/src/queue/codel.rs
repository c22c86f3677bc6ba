//! When to drop what has waited too long: CoDel (RFC 8289 §5), with names of our own.

use std::time::{Duration, Instant};

/// How long packets may go on waiting before some are dropped (RFC 8289 §4.2: 5 ms at least; a relay adds the batches of
/// a scheduler that is busy).
pub(super) const TARGET: Duration = Duration::from_millis(15);
/// How long they may do so: a round trip in which the senders can react (RFC 8289 §4.3).
pub(super) const INTERVAL: Duration = Duration::from_millis(100);

/// The state of one flow.
#[derive(Debug, Clone, Default)]
pub(super) struct Thinning {
    /// When packets will have waited above the target for an interval.
    patience_ends: Option<Instant>,
    /// When the next packet is to be dropped; only while dropping.
    next: Option<Instant>,
    /// Drops since dropping began, and when it last began.
    count: u32,
    count_before: u32,
}

impl Thinning {
    /// Whether the packet just taken, which has waited for `waited`, is to be dropped; `last` if the flow is now empty.
    pub(super) fn drops(&mut self, now: Instant, waited: Duration, last: bool) -> bool {
        if waited < TARGET || last {
            self.patience_ends = None;
        } else if self.patience_ends.is_none() {
            self.patience_ends = Some(now + INTERVAL);
        }
        let too_long = self.patience_ends.is_some_and(|at| now >= at);
        match self.next {
            Some(_) if !too_long => {
                self.next = None;
                false
            }
            Some(at) if now >= at => {
                self.count += 1;
                self.next = Some(at + self.pause());
                true
            }
            Some(_) => false,
            None if too_long => {
                // Where it stopped a short while ago, the rate of drops was nearly right.
                let recently = self.patience_ends.is_some_and(|at| now.saturating_duration_since(at) < INTERVAL);
                let since = self.count - self.count_before;
                self.count = if recently && since > 1 { since } else { 1 };
                self.count_before = self.count;
                self.next = Some(now + self.pause());
                true
            }
            None => false,
        }
    }

    /// The time to the next drop: shorter with each, so that the rate of a TCP stream falls steadily.
    fn pause(&self) -> Duration {
        INTERVAL.div_f64(f64::from(self.count.max(1)).sqrt())
    }
}
