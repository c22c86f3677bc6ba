//! What smoltcp lacks to repair losses without waiting for its timer, which is a second at least.
//!
//! - *Several holes in one flight* (RFC 6582). smoltcp repairs the first hole after three duplicate acknowledgements. When
//!   the acknowledgement of that repair shows the next hole (a *partial* one: new, but below what had been sent when the
//!   loss was noticed), NewReno repairs that at once.
//! - *Duplicates beside window updates.* A receiver whose program reads meanwhile sends acknowledgements that differ in
//!   their window only, which smoltcp does not take for duplicates.
//! - *A lost tail, or a lost repair* (as RFC 8985 §7). When nothing is acknowledged for some round trips, the first hole
//!   is repaired without any duplicates: a probe, which either ends the loss or shows the next hole.
//!
//! smoltcp has no way to be told to repair something, but three duplicates say the same: the stack repeats the last
//! acknowledgement to the socket as if the peer had.
//!
//! Not done: selective acknowledgements of the peer, which smoltcp does not read either.

use std::time::{Duration, Instant};

use smoltcp::wire::TcpSeqNumber;

use super::packet::{Ack, Sent};

/// Duplicate acknowledgements that mean a loss (RFC 5681 §3.2).
pub(super) const DUPLICATES: u8 = 3;
/// How long a peer may hold an acknowledgement back, at most: Linux does so for 40 ms, smoltcp for 10 ms.
const ACK_DELAY: Duration = Duration::from_millis(50);
/// Probes in a row that nothing comes of, until the rest is left to smoltcp's timer.
const MAX_PROBES: u32 = 3;
/// How long the shortest round trip counts: the path may be another one after that.
const SHORTEST_AGE: Duration = Duration::from_secs(10);
/// The longest wait before a probe: smoltcp's timer fires then.
const LATEST_PROBE: Duration = Duration::from_secs(1);

/// What one connection knows of its losses.
#[derive(Debug, Default)]
pub(super) struct Recovery {
    /// The byte after the last one ever sent.
    highest: Option<TcpSeqNumber>,
    /// The newest acknowledgement, and how often it was repeated.
    last_ack: Option<Ack>,
    repeats: u8,
    /// What had been sent when the loss was noticed; an acknowledgement of it ends the recovery.
    until: Option<TcpSeqNumber>,
    /// The hole that was repaired last.
    repaired: Option<TcpSeqNumber>,
    /// What we have acknowledged last, and our window.
    ours: Option<(TcpSeqNumber, u16)>,
    /// A segment whose acknowledgement will tell the round-trip time, and when it was sent.
    timing: Option<(TcpSeqNumber, Instant)>,
    /// The smoothed round-trip time and its variation (RFC 6298 §2).
    round_trip: Option<(Duration, Duration)>,
    /// The shortest round trip of late, and when it was measured.
    shortest: Option<(Duration, Instant)>,
    /// When to probe, and how often that was done since the last progress.
    probe_at: Option<Instant>,
    probes: u32,
}

impl Recovery {
    /// Notes a segment that the socket sends.
    pub(super) fn sent(&mut self, now: Instant, sent: Sent) {
        self.ours = Some((sent.acks, sent.window));
        if sent.start == sent.end {
            return;
        }
        if self.highest.is_some_and(|highest| sent.end <= highest) {
            // An acknowledgement could be of either copy (RFC 6298 §3).
            self.timing = None;
            if self.last_ack.is_some_and(|last| last.number == sent.start) {
                if self.repaired == Some(sent.start) {
                    // A second time: the timer has fired, and everything is sent again anyhow.
                    self.until = None;
                }
                self.repaired = Some(sent.start);
            }
        } else {
            self.highest = Some(sent.end);
            self.timing = self.timing.or(Some((sent.end, now)));
        }
        self.plan_probe(now);
    }

    /// Notes an acknowledgement; true when it shows a hole that the socket does not know of.
    pub(super) fn acknowledged(&mut self, now: Instant, ack: Ack) -> bool {
        let (Some(highest), Some(last)) = (self.highest, self.last_ack) else {
            self.last_ack = Some(ack);
            self.measure(now, ack.number);
            return false;
        };
        if ack.number == last.number {
            self.last_ack = Some(Ack { end: ack.end.max(last.end), ..ack });
            if ack.bare && ack.number < highest {
                self.repeats = self.repeats.saturating_add(1);
                if self.repeats == DUPLICATES && self.until.is_none() {
                    self.until = Some(highest);
                    return self.repaired != Some(ack.number);
                }
            }
            return false;
        }
        if ack.number < last.number || ack.number > highest {
            return false;
        }
        (self.last_ack, self.repeats, self.probes) = (Some(Ack { end: ack.end.max(last.end), ..ack }), 0, 0);
        self.measure(now, ack.number);
        self.plan_probe(now);
        match self.until {
            Some(until) if ack.number < until => true,
            Some(_) => {
                (self.until, self.repaired) = (None, None);
                false
            }
            None => false,
        }
    }

    /// Bytes that are sent and not acknowledged.
    pub(super) fn flight(&self) -> usize {
        match (self.highest, self.last_ack) {
            (Some(highest), Some(last)) if last.number < highest => highest - last.number,
            _ => 0,
        }
    }

    /// The shortest round-trip time of late: that of the path, without the queues that we fill ourselves.
    pub(super) fn shortest_round_trip(&self) -> Option<Duration> {
        self.shortest.map(|(shortest, _)| shortest)
    }

    /// The newest acknowledgement of the peer.
    pub(super) fn last_ack(&self) -> Option<Ack> {
        self.last_ack
    }

    /// How many bytes `ack` acknowledges for the first time; `None` for none, and while losses are repaired.
    pub(super) fn newly_acknowledged(&self, ack: Ack) -> Option<usize> {
        let (Some(last), Some(highest), None) = (self.last_ack, self.highest, self.until) else { return None };
        (last.number < ack.number && ack.number <= highest).then(|| ack.number - last.number)
    }

    /// What we have acknowledged last, and our window.
    pub(super) fn ours(&self) -> Option<(TcpSeqNumber, u16)> {
        self.ours
    }

    /// Whether `ack` says nothing new while something is unacknowledged.
    pub(super) fn is_repeat(&self, ack: Ack) -> bool {
        ack.bare && self.in_flight() && self.last_ack.is_some_and(|last| last.number == ack.number)
    }

    /// When [`probe`](Self::probe) wants to be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.probe_at
    }

    /// True when the first hole is to be repaired although nothing says that there is one.
    pub(super) fn probe(&mut self, now: Instant) -> bool {
        if self.probe_at.is_none_or(|at| at > now) {
            return false;
        }
        self.probes += 1;
        self.plan_probe(now);
        // A closed window is probed by smoltcp.
        let due = self.in_flight() && self.last_ack.is_some_and(|last| last.window > 0);
        if due {
            (self.until, self.repaired) = (self.highest, None);
        }
        due
    }

    fn in_flight(&self) -> bool {
        matches!((self.highest, self.last_ack), (Some(highest), Some(last)) if last.number < highest)
    }

    /// Without a measurement there is no probe.
    fn plan_probe(&mut self, now: Instant) {
        let wait = self.round_trip.filter(|_| self.in_flight() && self.probes < MAX_PROBES);
        self.probe_at = wait.map(|(smoothed, variation)| {
            let once = 2 * smoothed + 4 * variation + ACK_DELAY;
            now + (once * 2_u32.pow(self.probes)).min(LATEST_PROBE)
        });
    }

    /// Notes that the peer has answered our SYN.
    pub(super) fn connected(&mut self, now: Instant) {
        if let Some(highest) = self.highest {
            self.measure(now, highest);
        }
    }

    /// Takes the time, if `number` acknowledges the segment that was waited for.
    fn measure(&mut self, now: Instant, number: TcpSeqNumber) {
        let Some((_, at)) = self.timing.take_if(|(end, _)| number >= *end) else { return };
        let sample = now.saturating_duration_since(at);
        if self.shortest.is_none_or(|(shortest, at)| sample <= shortest || now > at + SHORTEST_AGE) {
            self.shortest = Some((sample, now));
        }
        self.round_trip = Some(match self.round_trip {
            Some((smoothed, variation)) => {
                ((7 * smoothed + sample) / 8, (3 * variation + smoothed.abs_diff(sample)) / 4)
            }
            None => (sample, sample / 2),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "a point to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    /// A connection's memory, and its time.
    struct Sender {
        recovery: Recovery,
        now: Instant,
    }

    impl Sender {
        fn new() -> Self {
            Self { recovery: Recovery::default(), now: start() }
        }

        fn sends(&mut self, start: i32, end: i32) {
            let (start, end) = (TcpSeqNumber(start), TcpSeqNumber(end));
            self.recovery.sent(self.now, Sent { start, end, acks: TcpSeqNumber(0), window: 100 });
        }

        fn hears(&mut self, number: i32) -> bool {
            self.recovery.acknowledged(self.now, ack(number))
        }

        /// Moves on to the next probe, and says how long that took.
        fn probes(&mut self) -> Option<Duration> {
            let at = self.recovery.poll_timeout()?;
            let waited = at - self.now;
            self.now = at;
            assert!(self.recovery.probe(at));
            Some(waited)
        }
    }

    fn ack(number: i32) -> Ack {
        Ack { number: TcpSeqNumber(number), end: TcpSeqNumber(0), window: 100, bare: true }
    }

    /// Ten bytes in flight of which the peer lacks 100 and 104, after the third duplicate and the repair of 100.
    fn losing() -> Sender {
        let mut sender = Sender::new();
        assert!(!sender.hears(100));
        sender.sends(100, 110);
        assert!(!sender.hears(100) && !sender.hears(100));
        assert!(sender.hears(100));
        sender.sends(100, 101);
        sender
    }

    #[test]
    fn a_partial_acknowledgement_shows_the_next_hole() {
        let mut sender = losing();
        assert!(sender.hears(104));
        sender.sends(104, 105);
        assert!(!sender.hears(110), "all of it has arrived");
        sender.sends(110, 120);
        assert!(!sender.hears(115), "which is no loss any more");
    }

    #[test]
    fn a_hole_that_the_socket_has_repaired_is_not_told_again() {
        let mut sender = Sender::new();
        sender.hears(100);
        sender.sends(100, 110);
        assert!(!sender.hears(100) && !sender.hears(100));
        sender.sends(100, 101);
        assert!(!sender.hears(100));
        assert!(sender.hears(104));
    }

    #[test]
    fn without_three_duplicates_nothing_is_lost() {
        let mut sender = Sender::new();
        sender.hears(100);
        sender.sends(100, 110);
        sender.hears(100);
        sender.hears(100);
        assert!(!sender.hears(104));
    }

    #[test]
    fn a_repair_that_is_lost_is_left_to_the_timer() {
        let mut sender = losing();
        sender.sends(100, 101);
        assert!(!sender.hears(104));
    }

    #[test]
    fn sequence_numbers_wrap() {
        let mut sender = Sender::new();
        sender.hears(i32::MAX);
        sender.sends(i32::MAX, i32::MIN + 9);
        assert!(!sender.hears(i32::MAX) && !sender.hears(i32::MAX));
        assert!(sender.hears(i32::MAX));
        assert!(sender.hears(i32::MIN + 4));
        assert!(!sender.hears(i32::MIN + 9));
    }

    #[test]
    fn silence_is_probed_a_few_times_ever_later() {
        let mut sender = Sender::new();
        sender.hears(100);
        sender.sends(100, 110);
        assert_eq!(sender.probes(), None, "no round trip is known");
        sender.now += Duration::from_millis(20);
        sender.hears(110);
        assert_eq!(sender.probes(), None, "nothing is in flight");
        sender.sends(110, 120);
        // 2 × 20 ms, 4 × 10 ms of variation, and 50 ms for an acknowledgement that is held back.
        let waits: Vec<_> = std::iter::from_fn(|| sender.probes()).map(|wait| wait.as_millis()).collect();
        assert_eq!(waits, [130, 260, 520]);
        sender.sends(110, 111);
        assert!(sender.hears(115), "the probe has shown the next hole");
        assert!(sender.probes().is_some(), "and there was progress");
        assert!(!sender.hears(120));
        assert_eq!(sender.probes(), None);
    }
}
