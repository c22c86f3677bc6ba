//! What the packet path tells the timers: a few words per peer, written once per batch.
//!
//! Times are milliseconds of [`Interface::clock_ms`](super::Interface::clock_ms), which starts at 1, so that 0 says
//! "never". The packet path stores them without a lock; the interface reads them when a deadline falls due, and most
//! of the time finds that there is nothing to do. Only when a timer would have to *start* does the interface have to
//! know at once: it then leaves a flag, and the next note returns true.

use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};

/// The traffic of one peer, shared by all its sessions.
#[derive(Debug, Default)]
pub struct Activity {
    last_sent: AtomicU64,
    last_data_sent: AtomicU64,
    last_received: AtomicU64,
    last_data_received: AtomicU64,
    /// When data was first sent after we last heard anything; 0 if all was answered.
    unanswered: AtomicU64,
    /// When data was first received after we last sent anything; 0 if something was sent.
    unacknowledged: AtomicU64,
    sent_bytes: AtomicU64,
    sent_packets: AtomicU64,
    received_bytes: AtomicU64,
    received_packets: AtomicU64,
    wake_on_send: AtomicBool,
    wake_on_receive: AtomicBool,
}

impl Activity {
    /// Notes datagrams sent at `ms`: `packets` of them carried a packet (keepalives do not count), `bytes` is the
    /// length of all of them.
    ///
    /// True asks the caller to call [`Interface::peer_active`](super::Interface::peer_active) soon.
    #[must_use = "true asks for Interface::peer_active"]
    pub fn note_sent(&self, ms: u64, packets: u64, bytes: u64) -> bool {
        self.sent_bytes.fetch_add(bytes, Relaxed);
        self.last_sent.store(ms, Relaxed);
        if self.unacknowledged.load(Relaxed) != 0 {
            self.unacknowledged.store(0, Relaxed);
        }
        if packets == 0 {
            return false;
        }
        self.sent_packets.fetch_add(packets, Relaxed);
        self.last_data_sent.store(ms, SeqCst);
        if self.unanswered.load(Relaxed) == 0 {
            self.unanswered.store(ms, SeqCst);
        }
        self.wake_on_send.load(SeqCst) && self.wake_on_send.swap(false, SeqCst)
    }

    /// Notes datagrams that opened at `ms`, counted as in [`note_sent`](Self::note_sent).
    ///
    /// True asks the caller to call [`Interface::peer_active`](super::Interface::peer_active) soon.
    #[must_use = "true asks for Interface::peer_active"]
    pub fn note_received(&self, ms: u64, packets: u64, bytes: u64) -> bool {
        self.received_bytes.fetch_add(bytes, Relaxed);
        self.last_received.store(ms, SeqCst);
        if self.unanswered.load(Relaxed) != 0 {
            self.unanswered.store(0, Relaxed);
        }
        if packets > 0 {
            self.received_packets.fetch_add(packets, Relaxed);
            self.last_data_received.store(ms, SeqCst);
            if self.unacknowledged.load(Relaxed) == 0 {
                self.unacknowledged.store(ms, SeqCst);
            }
        }
        self.wake_on_receive.load(SeqCst) && self.wake_on_receive.swap(false, SeqCst)
    }

    /// Bytes of all datagrams sent to the peer, handshakes and keepalives included.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Relaxed)
    }

    /// Packets sent to the peer.
    #[must_use]
    pub fn sent_packets(&self) -> u64 {
        self.sent_packets.load(Relaxed)
    }

    /// Bytes of all authenticated datagrams from the peer, handshakes and keepalives included.
    #[must_use]
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Relaxed)
    }

    /// Packets received from the peer.
    #[must_use]
    pub fn received_packets(&self) -> u64 {
        self.received_packets.load(Relaxed)
    }

    /// When any authenticated datagram was last sent; 0 if never.
    #[must_use]
    pub fn last_sent(&self) -> u64 {
        self.last_sent.load(Relaxed)
    }

    /// When a packet was last sent; 0 if never.
    #[must_use]
    pub fn last_data_sent(&self) -> u64 {
        self.last_data_sent.load(SeqCst)
    }

    /// When any authenticated datagram was last received; 0 if never.
    #[must_use]
    pub fn last_received(&self) -> u64 {
        self.last_received.load(SeqCst)
    }

    /// When a packet was last received; 0 if never.
    #[must_use]
    pub fn last_data_received(&self) -> u64 {
        self.last_data_received.load(SeqCst)
    }

    /// When data was first sent after anything was last received; 0 if all was answered.
    #[must_use]
    pub fn unanswered(&self) -> u64 {
        self.unanswered.load(SeqCst)
    }

    pub(crate) fn clear_unanswered(&self) {
        self.unanswered.store(0, SeqCst);
    }

    pub(crate) fn unacknowledged(&self) -> u64 {
        self.unacknowledged.load(SeqCst)
    }

    pub(crate) fn set_unacknowledged(&self, ms: u64) {
        self.unacknowledged.store(ms, SeqCst);
    }

    /// Asks the next sender, or does not. Set it before reading the words that decide, so that none is missed.
    pub(crate) fn wake_on_send(&self, wake: bool) {
        self.wake_on_send.store(wake, SeqCst);
    }

    pub(crate) fn wake_on_receive(&self, wake: bool) {
        self.wake_on_receive.store(wake, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hearing_anything_answers_and_sending_anything_acknowledges() {
        let activity = Activity::default();
        assert!(!activity.note_sent(5, 1, 100));
        assert!(!activity.note_sent(6, 1, 100));
        assert_eq!(activity.unanswered(), 5, "the first unanswered packet counts");
        assert!(!activity.note_received(7, 0, 32));
        assert_eq!((activity.unanswered(), activity.unacknowledged()), (0, 0));
        assert!(!activity.note_received(8, 1, 132));
        assert_eq!(activity.unacknowledged(), 8);
        assert!(!activity.note_sent(9, 0, 32));
        assert_eq!((activity.unanswered(), activity.unacknowledged()), (0, 0), "a keepalive waits for no answer");
        assert_eq!((activity.sent_packets(), activity.sent_bytes()), (2, 232));
        assert_eq!((activity.received_packets(), activity.received_bytes()), (1, 164));
    }

    #[test]
    fn a_flag_is_reported_once() {
        let activity = Activity::default();
        activity.wake_on_send(true);
        assert!(!activity.note_sent(1, 0, 32), "keepalives start no timer");
        assert!(activity.note_sent(2, 1, 64));
        assert!(!activity.note_sent(3, 1, 64));
        activity.wake_on_receive(true);
        assert!(activity.note_received(4, 0, 32));
        assert!(!activity.note_received(5, 1, 64));
    }
}
