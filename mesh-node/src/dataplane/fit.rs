//! Packets that are longer than the way to their peer carries: answered and dropped before they are sealed.

use std::ops::Range;

use mesh_tun::batch::Batch;
use mesh_tun::mtu;

use super::{DropReason, Shared};

/// Answers written in one go, and the most that may follow each other at once.
const BURST: usize = 16;
/// One more answer each so many milliseconds (RFC 4443 §2.4 f asks for a limit).
const REFILL_MS: u64 = 10;

/// Answers to senders on this host.
#[derive(Debug)]
pub(super) struct Fit {
    answers: Batch,
    tokens: usize,
    refilled_ms: u64,
}

impl Default for Fit {
    fn default() -> Self {
        // The memory comes with the first answer: most nodes never give one.
        Self { answers: Batch::new(0, 0), tokens: BURST, refilled_ms: 0 }
    }
}

impl Fit {
    /// Lowers the segment size of SYNs to `limit` and takes what is longer than that out of `batch`. Returns the end of
    /// the first part of `run` in which every packet fits.
    pub(super) fn limit(
        &mut self,
        shared: &Shared,
        batch: &mut Batch,
        run: Range<usize>,
        limit: usize,
        now_ms: u64,
    ) -> usize {
        let mut end = run.end;
        for index in run {
            if batch.packet(index).len() > limit {
                self.answer(batch.packet(index), limit, now_ms);
                batch.discard(index);
                shared.drops.add(DropReason::TooLong, 1);
                end = end.min(index);
            } else {
                mtu::clamp_mss(batch.packet_mut(index), limit);
            }
        }
        if !self.answers.is_empty() {
            // A device that does not take them is counted where the packet was.
            let _ = shared.device.write_batch(&mut self.answers);
            self.answers.clear();
        }
        end
    }

    fn answer(&mut self, packet: &[u8], limit: usize, now_ms: u64) {
        let gained = now_ms.saturating_sub(self.refilled_ms) / REFILL_MS;
        if gained > 0 {
            self.tokens = (self.tokens + usize::try_from(gained).unwrap_or(BURST)).min(BURST);
            self.refilled_ms = now_ms;
        }
        if self.tokens == 0 {
            return;
        }
        if self.answers.capacity() == 0 {
            self.answers = Batch::new(BURST, mtu::ANSWER_MAX);
        }
        let Some(mut vacant) = self.answers.vacant() else { return };
        if let Some(len) = mtu::too_big(packet, limit, vacant.buffer()) {
            vacant.commit(len);
            self.tokens -= 1;
        }
    }
}
