//! Several losses in one window, repaired one a round trip (RFC 6582).
//!
//! smoltcp repairs the first hole after three duplicate acknowledgements. When the acknowledgement of that repair shows
//! the next hole (a *partial* one: new, but below what had been sent when the loss was noticed), it waits for its timer,
//! which is a second at least. NewReno repairs the next hole at once. smoltcp has no way to be told so, but three more
//! duplicates say the same: the stack repeats the partial acknowledgement to the socket as if the peer had.
//!
//! Not done: selective acknowledgements of the peer, which smoltcp does not read either, and tail-loss probes.

use smoltcp::wire::TcpSeqNumber;

use super::packet::{Ack, Sent};

/// Duplicate acknowledgements that mean a loss (RFC 5681 §3.2).
pub(super) const DUPLICATES: u8 = 3;

/// What one connection knows of its losses.
#[derive(Debug, Default)]
pub(super) struct Recovery {
    /// The byte after the last one ever sent.
    highest: Option<TcpSeqNumber>,
    /// The newest acknowledgement, and how often it was repeated.
    last_ack: Option<TcpSeqNumber>,
    repeats: u8,
    /// What had been sent when the loss was noticed; an acknowledgement of it ends the recovery.
    until: Option<TcpSeqNumber>,
    /// The hole that was repaired last.
    repaired: Option<TcpSeqNumber>,
}

impl Recovery {
    /// Notes a segment that the socket sends.
    pub(super) fn sent(&mut self, sent: Sent) {
        if self.until.is_some() && Some(sent.start) == self.last_ack {
            if self.repaired == Some(sent.start) {
                // A second time: the timer has fired, and everything is sent again anyhow.
                self.until = None;
            }
            self.repaired = Some(sent.start);
        }
        self.highest = Some(self.highest.map_or(sent.end, |highest| highest.max(sent.end)));
    }

    /// Notes an acknowledgement; true when it shows a further hole.
    pub(super) fn acknowledged(&mut self, ack: Ack) -> bool {
        let (Some(highest), Some(last)) = (self.highest, self.last_ack) else {
            self.last_ack = Some(ack.number);
            return false;
        };
        if ack.number == last {
            if ack.bare && ack.number < highest {
                self.repeats = self.repeats.saturating_add(1);
                if self.repeats == DUPLICATES && self.until.is_none() {
                    self.until = Some(highest);
                }
            }
            return false;
        }
        if ack.number < last || ack.number > highest {
            return false;
        }
        (self.last_ack, self.repeats) = (Some(ack.number), 0);
        match self.until {
            Some(until) if ack.number < until => true,
            Some(_) => {
                (self.until, self.repaired) = (None, None);
                false
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(recovery: &mut Recovery, start: i32, end: i32) {
        recovery.sent(Sent { start: TcpSeqNumber(start), end: TcpSeqNumber(end) });
    }

    fn ack(number: i32) -> Ack {
        Ack { number: TcpSeqNumber(number), end: TcpSeqNumber(0), window: 100, bare: true }
    }

    /// Ten bytes in flight of which the peer lacks 100 and 104, after the third duplicate.
    fn losing() -> Recovery {
        let mut recovery = Recovery::default();
        assert!(!recovery.acknowledged(ack(100)));
        sent(&mut recovery, 100, 110);
        for _ in 0..3 {
            assert!(!recovery.acknowledged(ack(100)));
        }
        sent(&mut recovery, 100, 101);
        recovery
    }

    #[test]
    fn a_partial_acknowledgement_shows_the_next_hole() {
        let mut recovery = losing();
        assert!(recovery.acknowledged(ack(104)));
        sent(&mut recovery, 104, 105);
        assert!(!recovery.acknowledged(ack(110)), "all of it has arrived");
        sent(&mut recovery, 110, 120);
        assert!(!recovery.acknowledged(ack(115)), "which is no loss any more");
    }

    #[test]
    fn without_three_duplicates_nothing_is_lost() {
        let mut recovery = Recovery::default();
        recovery.acknowledged(ack(100));
        sent(&mut recovery, 100, 110);
        recovery.acknowledged(ack(100));
        recovery.acknowledged(ack(100));
        assert!(!recovery.acknowledged(ack(104)));
    }

    #[test]
    fn a_repair_that_is_lost_is_left_to_the_timer() {
        let mut recovery = losing();
        sent(&mut recovery, 100, 101);
        assert!(!recovery.acknowledged(ack(104)));
    }

    #[test]
    fn sequence_numbers_wrap() {
        let mut recovery = Recovery::default();
        recovery.acknowledged(ack(i32::MAX));
        sent(&mut recovery, i32::MAX, i32::MIN + 9);
        for _ in 0..3 {
            recovery.acknowledged(ack(i32::MAX));
        }
        assert!(recovery.acknowledged(ack(i32::MIN + 4)));
        assert!(!recovery.acknowledged(ack(i32::MIN + 9)));
    }
}
