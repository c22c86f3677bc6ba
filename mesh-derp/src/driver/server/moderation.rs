//! Waking up less often when there is much to do.
//!
//! A packet that wakes an idle thread costs more in waking than in passing on. Network cards therefore wait a little for
//! more once packets come fast, and so does a shard: from [`BUSY`] units a second on it waits [`PAUSE`] before it looks for
//! events, and finds several. Below that, and where CPU time is so short that bulk traffic waits anyway, nothing waits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::driver::now;

/// Units read in a second from which on it is worth it.
const BUSY: u64 = 4_000;
/// For how long a shard waits: a hundredth of a round trip to a relay that is not around the corner. The system adds up to
/// 50 us.
const PAUSE: Duration = Duration::from_micros(100);
/// How long is watched before a decision.
const WINDOW: Duration = Duration::from_millis(10);

/// One shard's. See the [module doc](self).
#[derive(Debug, Default)]
pub(super) struct Moderation {
    units: AtomicU64,
    short: AtomicBool,
    watch: Mutex<Watch>,
}

#[derive(Debug, Default)]
struct Watch {
    since: Option<Instant>,
    units: u64,
    busy: bool,
}

impl Moderation {
    /// A unit has been read.
    pub(super) fn note_unit(&self) {
        self.units.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether CPU time is so short that bulk traffic waits for it.
    pub(super) fn set_short(&self, short: bool) {
        self.short.store(short, Ordering::Relaxed);
    }

    /// The shard has nothing to do. Waits for a moment if more will come soon.
    pub(super) fn before_park(&self) {
        let busy =
            self.watch.lock().unwrap_or_else(PoisonError::into_inner).look(now(), self.units.load(Ordering::Relaxed));
        if busy && !self.short.load(Ordering::Relaxed) {
            thread::sleep(PAUSE);
        }
    }
}

impl Watch {
    /// Whether the shard is busy, having read so many units since it began.
    fn look(&mut self, now: Instant, units: u64) -> bool {
        let elapsed = now.saturating_duration_since(*self.since.get_or_insert(now));
        if elapsed >= WINDOW {
            let rate = u128::from(units - self.units) * 1_000_000 / elapsed.as_micros();
            *self = Self { since: Some(now), units, busy: rate >= u128::from(BUSY) };
        }
        self.busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_is_busy_waits() {
        let (mut watch, begin) = (Watch::default(), now());
        let at = |millis| begin + Duration::from_millis(millis);
        assert!(!watch.look(at(0), 0));
        assert!(!watch.look(at(5), 1000), "not watched for long enough");
        assert!(watch.look(at(10), 1000));
        assert!(watch.look(at(15), 1000));
        assert!(!watch.look(at(20), 1030), "3,000 a second");
        assert!(!watch.look(at(10_000), 2000));
        assert!(watch.look(at(10_020), 2080));
    }
}
