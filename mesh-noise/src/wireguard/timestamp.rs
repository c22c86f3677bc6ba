//! TAI64N, the timestamp inside an initiation (whitepaper §5.4.2).
//!
//! Twelve bytes, big-endian: seconds since 1970 plus 2^62 plus 10, then nanoseconds. Read as a byte string, later
//! means greater, and that is all a responder asks of it: each initiation has to be later than the peer's last one.
//! The low 24 bits of the nanoseconds are cleared, so that the timestamp is no precise clock for an observer.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// 2^62, the label's origin, plus the ten leap seconds that TAI was ahead in 1970.
const ORIGIN: u64 = 0x4000_0000_0000_000a;
/// Nanoseconds are rounded down to a multiple of this: 16.8 ms.
const GRAIN: u32 = 1 << 24;

/// A point in time as it stands in an initiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Timestamp([u8; 12]);

impl Timestamp {
    pub(crate) fn from_bytes(bytes: [u8; 12]) -> Self {
        Self(bytes)
    }

    pub(crate) fn to_bytes(self) -> [u8; 12] {
        self.0
    }

    fn new(since_epoch: Duration) -> Self {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&ORIGIN.wrapping_add(since_epoch.as_secs()).to_be_bytes());
        bytes[8..].copy_from_slice(&(since_epoch.subsec_nanos() & !(GRAIN - 1)).to_be_bytes());
        Self(bytes)
    }
}

/// Wall time, derived from the caller's clock: the two are paired once and then move together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WallClock {
    at: Instant,
    since_epoch: Duration,
    /// What was last handed out. The next one is later, whatever the clock does.
    last: Duration,
}

impl WallClock {
    pub(crate) fn new(now: Instant, wall: SystemTime) -> Self {
        let since_epoch = wall.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { at: now, since_epoch, last: Duration::ZERO }
    }

    /// Pairs again, after the system's clock was set.
    pub(crate) fn set(&mut self, now: Instant, wall: SystemTime) {
        *self = Self { last: self.last, ..Self::new(now, wall) };
    }

    pub(crate) fn system_time(&self, now: Instant) -> SystemTime {
        UNIX_EPOCH + self.since_epoch + now.saturating_duration_since(self.at)
    }

    /// A timestamp for `now`, later than every one before it.
    pub(crate) fn timestamp(&mut self, now: Instant) -> Timestamp {
        let wall = self.since_epoch + now.saturating_duration_since(self.at);
        let step = Duration::from_nanos(u64::from(GRAIN));
        self.last = if Timestamp::new(wall) > Timestamp::new(self.last) { wall } else { self.last + step };
        Timestamp::new(self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wireguard::interface::tests::start;

    #[test]
    fn the_label_is_tai64n_with_a_coarse_fraction() {
        let wall = UNIX_EPOCH + Duration::new(0x5f5e_1000, 999_999_999);
        let now = start();
        let stamp = WallClock::new(now, wall).timestamp(now);
        assert_eq!(stamp.to_bytes()[..8], 0x4000_0000_5f5e_100a_u64.to_be_bytes());
        assert_eq!(stamp.to_bytes()[8..], (999_999_999_u32 & 0xff00_0000).to_be_bytes());
    }

    #[test]
    fn timestamps_rise_even_when_the_clock_stands_or_goes_back() {
        let now = start();
        let mut clock = WallClock::new(now, UNIX_EPOCH + Duration::from_secs(1_000_000));
        let mut last = clock.timestamp(now);
        for step in 0..200 {
            if step == 100 {
                clock.set(now, UNIX_EPOCH + Duration::from_secs(5));
            }
            let next = clock.timestamp(now);
            assert!(next > last, "step {step}");
            last = next;
        }
    }
}
