//! When a sender's packets are mostly dropped, reading less of them.
//!
//! A relay that reads, decrypts and then drops what its receivers cannot take does the more of it the more it is offered,
//! until little else is done. So a sender most of whose packets are in vain is read more slowly; TCP tells it so, and it
//! drops them itself, oldest first.
//!
//! One slow receiver must not cost the others their share. So the decision is about the sender as a whole: it is slowed
//! only if *every* destination that got a considerable part of its bytes drops a considerable part of them, and
//! destinations that take nothing at all have no say, for reading less would not help them.
//!
//! ```text
//!                     all considerable destinations drop a third or more
//!          free ─────────────────────────────────────────────────────────► slowed ◄─┐ again: slower by a half, but
//!           ▲                                                               │   └───┘ not below what gets through
//!           └── a fifth faster, the same again, then twice, four times… ◄───┘
//!               for each window in a row in which one drops less than a tenth,
//!               or no one has a say; between a third and a tenth nothing changes
//! ```

use std::time::{Duration, Instant};

use crate::queue::Pushed;

/// How long is watched before the pace changes, and how many bytes have to come in that time. Some have to get through as
/// well, for receivers among many are served now and then.
const WINDOW: Duration = Duration::from_millis(100);
const WINDOW_BYTES: u64 = 32 * 1024;
/// How long is watched at most. A sender that has brought no more than that by then is not worth slowing.
const LONGEST_WINDOW: Duration = Duration::from_secs(1);
/// Destinations told apart in a window. Further ones count as one.
const DESTINATIONS: usize = 8;
/// A destination has a say if it gets one of so many bytes.
const CONSIDERABLE: u64 = 10;
/// Drops of one packet in so many slow the sender; of less than one in so many they free it.
const MANY: u64 = 3;
const FEW: u64 = 10;
/// A receiver that has taken nothing for so long has no say.
const STUCK: Duration = Duration::from_secs(3);
/// The longest pause, so that what else the sender has to say is not late by more; and the shortest worth a timer.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
/// The slowest pace, in nanoseconds a byte: what a relay reads at once, 64 KiB, in the longest pause. A thousand senders
/// at that pace are not too many.
const SLOWEST: f64 = 500e6 / 65_536.0;
/// A pace that is no pace any more: a gigabyte a second.
const FASTEST: f64 = 1.0;

/// What became of packets for one destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outcome {
    /// How many were put into its queue.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How many of the sender's own were dropped there meanwhile.
    pub dropped: u64,
    /// For how long the receiver had taken nothing.
    pub stuck: Duration,
}

impl Outcome {
    /// Adds a packet of so many bytes that was put in.
    pub fn add(&mut self, bytes: usize, pushed: &Pushed) {
        self.packets += 1;
        self.bytes += bytes as u64;
        self.dropped += pushed.own_dropped;
        self.stuck = pushed.stuck;
    }
}

/// What one destination got in a window.
#[derive(Debug, Clone, Copy)]
struct Share<K> {
    /// `None` for all that have no entry of their own.
    destination: Option<K>,
    bytes: u64,
    packets: u64,
    dropped: u64,
    stuck: bool,
}

impl<K> Share<K> {
    /// Bytes that got through. Drops are counted in packets, and may be of packets from before the window.
    fn delivered(&self) -> u64 {
        let kept = self.packets.saturating_sub(self.dropped);
        self.bytes * kept / self.packets.max(1)
    }
}

/// Watches one sender. `K` names a destination: a connection of the relay.
#[derive(Debug)]
pub struct Pressure<K> {
    began: Option<Instant>,
    /// The end of the last batch.
    last: Option<Instant>,
    shares: Vec<Share<K>>,
    /// Nanoseconds to pause for each byte; 0 while free.
    pace: f64,
    /// Windows in a row that were good.
    good: i32,
    /// Bytes read since the last batch, and the pause owed for earlier ones.
    bytes: u64,
    owed: Duration,
}

impl<K: Copy + PartialEq> Pressure<K> {
    /// For a sender that has just come.
    #[must_use]
    pub const fn new() -> Self {
        Self { began: None, last: None, shares: Vec::new(), pace: 0.0, good: 0, bytes: 0, owed: Duration::ZERO }
    }

    /// Packets have been queued for `destination`, with that outcome.
    pub fn note(&mut self, destination: K, outcome: Outcome) {
        self.bytes += outcome.bytes;
        let known = self.shares.iter().position(|share| share.destination == Some(destination));
        let place = known.or_else(|| {
            let more = self.shares.len() < DESTINATIONS;
            let destination = more.then_some(destination);
            if more || self.shares.len() == DESTINATIONS {
                self.shares.push(Share { destination, bytes: 0, packets: 0, dropped: 0, stuck: true });
            }
            self.shares.len().checked_sub(1)
        });
        let Some(share) = place.and_then(|at| self.shares.get_mut(at)) else { return };
        share.bytes += outcome.bytes;
        share.packets += outcome.packets;
        share.dropped += outcome.dropped;
        share.stuck &= outcome.stuck >= STUCK;
    }

    /// A batch has been read and passed on, and its outcomes noted. Returns until when nothing is to be read from this
    /// sender; `None` to go on at once.
    pub fn pause(&mut self, now: Instant) -> Option<Instant> {
        let idle = self.last.replace(now).map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        if idle >= LONGEST_WINDOW {
            let seconds = i32::try_from(idle.as_secs()).unwrap_or(i32::MAX);
            self.set_pace(self.pace * 0.5_f64.powi(seconds));
            self.begin(now);
        }
        let began = *self.began.get_or_insert(now);
        let elapsed = now.saturating_duration_since(began);
        let enough = elapsed >= WINDOW && self.total() >= WINDOW_BYTES && self.delivered() > 0;
        if enough || elapsed >= LONGEST_WINDOW {
            self.judge(elapsed);
            self.begin(now);
        }
        let bytes = std::mem::take(&mut self.bytes);
        if self.pace == 0.0 {
            self.owed = Duration::ZERO;
            return None;
        }
        let pause = self.owed + Duration::from_secs_f64(self.pace * bytes as f64 / 1e9);
        if pause < SHORTEST_PAUSE {
            self.owed = pause;
            return None;
        }
        self.owed = Duration::ZERO;
        Some(now + pause.min(LONGEST_PAUSE))
    }

    /// Whether the sender is being read more slowly than it sends.
    #[must_use]
    pub fn is_slowed(&self) -> bool {
        self.pace > 0.0
    }

    fn total(&self) -> u64 {
        self.shares.iter().map(|share| share.bytes).sum()
    }

    fn delivered(&self) -> u64 {
        self.shares.iter().map(Share::delivered).sum()
    }

    fn begin(&mut self, now: Instant) {
        self.began = Some(now);
        self.shares.clear();
    }

    fn judge(&mut self, elapsed: Duration) {
        let total = self.total();
        let heard = |share: &&Share<K>| !share.stuck && share.bytes * CONSIDERABLE >= total;
        let considerable = || self.shares.iter().filter(heard);
        let pressed = total >= WINDOW_BYTES
            && considerable().next().is_some()
            && considerable().all(|share| share.dropped * MANY >= share.packets);
        let eased = considerable().any(|share| share.dropped * FEW < share.packets);
        if pressed {
            // As slow as what gets through, had it been spread over the window.
            let enough = (elapsed.as_secs_f64() * 1e9 / self.delivered().max(1) as f64).min(SLOWEST);
            self.good = 0;
            self.set_pace((self.pace + enough / 2.0).min(enough));
        } else if eased || total < WINDOW_BYTES || considerable().next().is_none() {
            self.good = self.good.saturating_add(1);
            // A fifth faster at first: if what gets through has not grown, that is how it can stay.
            let faster = if self.good <= 2 { 0.8 } else { 0.5_f64.powi(self.good - 2) };
            self.set_pace(self.pace * faster);
        } else {
            self.good = 0;
        }
    }

    fn set_pace(&mut self, pace: f64) {
        self.pace = if pace < FASTEST { 0.0 } else { pace };
    }
}

impl<K: Copy + PartialEq> Default for Pressure<K> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::{Depth, PacketQueue};
    use bytes::Bytes;
    use mesh_noise::key::NodePublic;
    use proptest::prelude::*;

    #[expect(clippy::disallowed_methods, reason = "a point to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    const PACKET: usize = 1400;
    const STEP: Duration = Duration::from_millis(1);

    /// A sender that always has more, read at up to 100 MB/s, and receivers with a queue each.
    struct Relay {
        now: Instant,
        begin: Instant,
        pressure: Pressure<usize>,
        queues: Vec<PacketQueue>,
        read: u64,
        delivered: Vec<u64>,
        paused: Duration,
        until: Option<Instant>,
    }

    impl Relay {
        fn new(receivers: usize) -> Self {
            let now = start();
            Self {
                now,
                begin: now,
                pressure: Pressure::new(),
                queues: (0..receivers).map(|_| PacketQueue::new(Depth::default())).collect(),
                read: 0,
                delivered: vec![0; receivers],
                paused: Duration::ZERO,
                until: None,
            }
        }

        /// Runs for a time in which receiver `n` takes `rates[n]` packets a millisecond and, of every 20 packets,
        /// `of_20[n]` are for it.
        fn run(&mut self, time: Duration, rates: &[f64], of_20: &[usize]) -> &mut Self {
            let order: Vec<usize> =
                of_20.iter().enumerate().flat_map(|(to, count)| std::iter::repeat_n(to, *count)).collect();
            let end = self.now + time;
            let (mut credit, mut round) = (vec![0.0; rates.len()], 0);
            while self.now < end {
                self.now += STEP;
                round += 1;
                if self.until.is_some_and(|until| until > self.now) {
                    self.paused += STEP;
                } else {
                    self.until = None;
                    for batch in 0..8 {
                        for at in 0..10 {
                            let to = order[(round + at * 7 + batch) % order.len()];
                            let payload = Bytes::from_static(&[0; PACKET]);
                            let outcome = self.queues[to].push(self.now, NodePublic::ZERO, payload);
                            let mut noted = Outcome::default();
                            noted.add(PACKET, &outcome);
                            self.pressure.note(to, noted);
                            self.read += PACKET as u64;
                        }
                        self.until = self.pressure.pause(self.now);
                        if self.until.is_some() {
                            break;
                        }
                    }
                }
                for (to, rate) in rates.iter().enumerate() {
                    credit[to] += rate;
                    while credit[to] >= 1.0 {
                        credit[to] -= 1.0;
                        self.delivered[to] += u64::from(self.queues[to].pop(self.now).is_some());
                    }
                }
            }
            self
        }

        fn reset(&mut self) {
            (self.read, self.paused, self.begin) = (0, Duration::ZERO, self.now);
            self.delivered.fill(0);
        }
    }

    #[test]
    fn a_sender_is_read_at_little_more_than_its_receivers_take() {
        for rate in [0.1, 0.5, 4.0, 20.0] {
            let mut relay = Relay::new(2);
            relay.run(Duration::from_secs(2), &[rate, rate], &[10, 10]).reset();
            relay.run(Duration::from_secs(2), &[rate, rate], &[10, 10]);
            let (read, delivered) = (relay.read / PACKET as u64, relay.delivered.iter().sum::<u64>());
            assert!(delivered as f64 > 0.97 * rate * 2.0 * 2000.0, "{delivered} delivered at {rate}");
            assert!(read < delivered * 2, "{read} read for {delivered} at {rate}");
        }
    }

    #[test]
    fn a_sender_whose_receivers_keep_up_is_never_paused() {
        let mut relay = Relay::new(2);
        relay.run(Duration::from_secs(5), &[100.0, 100.0], &[10, 10]);
        assert_eq!(relay.paused, Duration::ZERO);
    }

    #[test]
    fn one_slow_receiver_of_several_never_pauses_the_sender() {
        for slow in [0.0, 0.1, 1.0] {
            let mut relay = Relay::new(3);
            relay.run(Duration::from_secs(5), &[slow, 100.0, 100.0], &[10, 7, 3]);
            assert_eq!(relay.paused, Duration::ZERO, "{slow}");
        }
    }

    #[test]
    fn a_receiver_that_takes_nothing_costs_the_small_rest_little_and_not_for_long() {
        // Hardly one packet in 20 is for the other: it has no say.
        let mut relay = Relay::new(2);
        relay.run(Duration::from_secs(5), &[0.0, 100.0], &[19, 1]).reset();
        relay.run(Duration::from_secs(5), &[0.0, 100.0], &[19, 1]);
        assert_eq!(relay.paused, Duration::ZERO);
    }

    #[test]
    fn a_sender_is_free_again_soon_after_its_receivers_are() {
        let mut relay = Relay::new(1);
        relay.run(Duration::from_secs(5), &[0.5], &[20]);
        assert!(relay.pressure.is_slowed());
        relay.run(Duration::from_millis(1500), &[100.0], &[20]);
        assert!(!relay.pressure.is_slowed());
        let mut relay = Relay::new(1);
        relay.run(Duration::from_secs(5), &[0.5], &[20]);
        relay.now += Duration::from_secs(15);
        relay.pressure.pause(relay.now);
        assert!(!relay.pressure.is_slowed(), "silence is forgiven");
    }

    #[test]
    fn a_sender_is_not_paused_for_a_few_packets() {
        let (mut pressure, begin) = (Pressure::new(), start());
        let mut queue = PacketQueue::new(Depth { data: 1, ..Depth::default() });
        for number in 0..1000 {
            let now = begin + 50 * STEP * number;
            let outcome = queue.push(now, NodePublic::ZERO, Bytes::from_static(&[0; PACKET]));
            let mut noted = Outcome::default();
            noted.add(PACKET, &outcome);
            pressure.note(0, noted);
            assert_eq!(pressure.pause(now), None);
        }
    }

    #[test]
    fn many_destinations_are_judged_together_and_none_is_remembered() {
        let mut relay = Relay::new(20);
        relay.run(Duration::from_secs(3), &[0.2; 20], &[1; 20]);
        assert!(relay.pressure.is_slowed());
        assert!(relay.pressure.shares.len() <= DESTINATIONS + 1);
        let mut rates = [100.0; 20];
        rates[0] = 0.0;
        let mut relay = Relay::new(20);
        relay.run(Duration::from_secs(3), &rates, &[1; 20]);
        assert_eq!(relay.paused, Duration::ZERO);
    }

    proptest! {
        #[test]
        fn a_pause_is_short_whatever_comes(
            steps in proptest::collection::vec((0u8..12, 0u64..70_000, 0u64..1000, 0u64..5000, 0u64..400), 0..200),
        ) {
            let (mut pressure, mut now) = (Pressure::new(), start());
            for (to, bytes, dropped, stuck, wait) in steps {
                pressure.note(to, Outcome { packets: 1, bytes, dropped, stuck: Duration::from_millis(stuck) });
                now += Duration::from_millis(wait);
                if let Some(until) = pressure.pause(now) {
                    prop_assert!(until > now && until <= now + LONGEST_PAUSE);
                }
                prop_assert!(pressure.pace <= SLOWEST && pressure.shares.len() <= DESTINATIONS + 1);
            }
        }
    }
}
