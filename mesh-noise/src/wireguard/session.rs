//! A session: two keys, two indices, a counter and a window. Seals and opens transport data (whitepaper §5.4.6).
//!
//! Everything works in the caller's buffer, and from several threads at once. Sending takes counters from an atomic;
//! the replay window is behind a lock that is meant to be taken once per batch.

use std::fmt;
use std::sync::atomic::{
    AtomicBool, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::message::{self, MessageKind};
use super::{Activity, Reject, Replay, Timing};
use crate::aead::{Aead, Order};
use crate::key::NodePublic;
use crate::noise::ikpsk2::TransportKeys;

/// Bytes before the packet: type, receiver index, counter.
pub const HEADER_LEN: usize = 16;
/// Bytes behind the packet.
pub const TAG_LEN: usize = crate::aead::TAG_LEN;
/// The most counters that one call of [`Session::reserve`] gives.
pub const MAX_RESERVE: u64 = 4096;

/// Length of a packet of `len` bytes once padded: the next multiple of 16, but no more than `mtu` unless the packet
/// itself is longer (whitepaper §5.4.6).
#[must_use]
pub const fn padded_len(len: usize, mtu: usize) -> usize {
    let padded = len.next_multiple_of(16);
    if padded <= mtu {
        padded
    } else if len > mtu {
        len
    } else {
        mtu
    }
}

/// Which side of the handshake made this session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Initiator,
    Responder,
}

/// One derived key pair with its counters. Shared; the keys are wiped when the last user lets go.
pub struct Session {
    peer: NodePublic,
    receiver_index: u32,
    sender_index: u32,
    role: Role,
    send: Aead,
    receive: Aead,
    next_counter: AtomicU64,
    rekey_after_messages: u64,
    reject_after_messages: u64,
    /// Not to be sent on yet: the initiator has not shown that it has the keys.
    unconfirmed: AtomicBool,
    ended: AtomicBool,
    replay: Mutex<Replay>,
    activity: Arc<Activity>,
}

/// Where a session comes from.
pub(crate) struct Origin {
    pub(crate) peer: NodePublic,
    pub(crate) receiver_index: u32,
    pub(crate) sender_index: u32,
    pub(crate) role: Role,
}

/// A datagram that opened.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened<'a> {
    /// Its counter, still to be shown to the replay window.
    pub counter: u64,
    /// The packet with its padding, which the length inside the IP header tells from the packet. Empty for a
    /// keepalive.
    pub packet: &'a mut [u8],
}

impl Session {
    pub(crate) fn new(origin: &Origin, keys: &TransportKeys, activity: Arc<Activity>, timing: &Timing) -> Self {
        Self {
            peer: origin.peer,
            receiver_index: origin.receiver_index,
            sender_index: origin.sender_index,
            role: origin.role,
            send: Aead::new(&keys.send),
            receive: Aead::new(&keys.receive),
            next_counter: AtomicU64::new(0),
            rekey_after_messages: timing.rekey_after_messages,
            reject_after_messages: timing.reject_after_messages,
            unconfirmed: AtomicBool::new(origin.role == Role::Responder),
            ended: AtomicBool::new(false),
            replay: Mutex::default(),
            activity,
        }
    }

    /// The peer at the other end.
    #[must_use]
    pub fn peer(&self) -> NodePublic {
        self.peer
    }

    /// Our index: what the peer writes into the transport data that it sends us.
    #[must_use]
    pub fn receiver_index(&self) -> u32 {
        self.receiver_index
    }

    /// The peer's index: what we write into the transport data that we send.
    #[must_use]
    pub fn sender_index(&self) -> u32 {
        self.sender_index
    }

    /// The words to note traffic in; the same for all sessions of the peer.
    #[must_use]
    pub fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    pub(crate) fn role(&self) -> Role {
        self.role
    }

    /// Whether this session waits for its first datagram, and will replace the one to send on when that has opened.
    ///
    /// A packet path that wants no reply to go astray need not wait for [`Event::SessionReady`](super::Event): when an
    /// unconfirmed session opens a datagram, it may send on that session at once. A peer that has just restarted knows
    /// no other.
    #[must_use]
    pub fn is_unconfirmed(&self) -> bool {
        self.unconfirmed.load(Acquire)
    }

    /// The session has been used, or will never be the one to send on.
    pub(crate) fn settle(&self) {
        self.unconfirmed.store(false, Release);
    }

    /// Whether the interface has ended this session. It then seals and opens nothing.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.load(Acquire)
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Release);
    }

    /// Takes `n` counters for sealing and returns the first.
    ///
    /// `None` when the session has ended, when its counters are used up, or if `n` exceeds [`MAX_RESERVE`].
    #[must_use]
    pub fn reserve(&self, n: u64) -> Option<u64> {
        if n > MAX_RESERVE || self.has_ended() || self.next_counter.load(Relaxed) >= self.reject_after_messages {
            return None;
        }
        let first = self.next_counter.fetch_add(n, Relaxed);
        let end = first.checked_add(n)?;
        if end > self.rekey_after_messages && first <= self.rekey_after_messages {
            self.activity.wake_on_send(true);
        }
        (end <= self.reject_after_messages).then_some(first)
    }

    /// Whether so many messages were sent that a new session is due (`REKEY-AFTER-MESSAGES`).
    pub(crate) fn is_worn(&self) -> bool {
        self.next_counter.load(Relaxed) > self.rekey_after_messages
    }

    /// Whether its counters are used up: nothing can be sent on it any more (`REJECT-AFTER-MESSAGES`).
    pub(crate) fn is_spent(&self) -> bool {
        self.next_counter.load(Relaxed) >= self.reject_after_messages
    }

    /// Seals the packet of `len` bytes that stands at `buf[16..]`, zero-padded to a multiple of 16, and returns the
    /// length of the datagram, which begins at `buf[0]`. A `len` of 0 makes a keepalive.
    ///
    /// `counter` comes from [`reserve`](Self::reserve); using one twice gives the keys away.
    ///
    /// # Panics
    /// If `buf` is shorter than `len` padded to 16 plus 32 bytes.
    pub fn seal(&self, counter: u64, buf: &mut [u8], len: usize) -> usize {
        self.seal_padded(counter, buf, len, len.next_multiple_of(16))
    }

    /// As [`seal`](Self::seal), with the padded length given: see [`padded_len`].
    ///
    /// # Panics
    /// If `padded` is less than `len`, or `buf` shorter than `padded` plus 32 bytes.
    pub fn seal_padded(&self, counter: u64, buf: &mut [u8], len: usize, padded: usize) -> usize {
        let (header, rest) = buf.split_first_chunk_mut::<HEADER_LEN>().expect("room for the header");
        message::write_transport_header(header, self.sender_index, counter);
        let (text, tail) = rest.split_at_mut(padded);
        text[len..].fill(0);
        let tag = self.send.seal(counter, Order::Little, &[], text);
        tail[..TAG_LEN].copy_from_slice(&tag);
        HEADER_LEN + padded + TAG_LEN
    }

    /// Opens transport data in place. The counter is authenticated but may have been seen before: show it to
    /// [`replay`](Self::replay) and drop the packet if that refuses.
    ///
    /// # Errors
    /// Says why the datagram does not belong to this session; its contents are then of no use.
    pub fn open<'a>(&self, datagram: &'a mut [u8]) -> Result<Opened<'a>, Reject> {
        match message::kind(datagram) {
            Some(MessageKind::TransportData { receiver }) if receiver == self.receiver_index => {}
            Some(MessageKind::TransportData { .. }) => return Err(Reject::UnknownIndex),
            Some(MessageKind::Initiation | MessageKind::Response | MessageKind::CookieReply) => {
                return Err(Reject::WrongKind);
            }
            None => return Err(Reject::Malformed),
        }
        let counter = message::transport_counter(datagram).ok_or(Reject::Malformed)?;
        if self.has_ended() || counter >= self.reject_after_messages {
            return Err(Reject::SessionEnded);
        }
        let packet = self
            .receive
            .open(counter, Order::Little, &[], &mut datagram[HEADER_LEN..])
            .map_err(|_| Reject::Authentication)?;
        Ok(Opened { counter, packet })
    }

    /// Locks the replay window, for a whole batch.
    pub fn replay(&self) -> MutexGuard<'_, Replay> {
        self.replay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a batch of counters to the replay window; `verdicts[i]` becomes whether `counters[i]` is new.
    pub fn accept(&self, counters: &[u64], verdicts: &mut [bool]) {
        let mut replay = self.replay();
        for (counter, verdict) in counters.iter().zip(verdicts) {
            *verdict = replay.accept(*counter);
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("peer", &self.peer)
            .field("receiver_index", &self.receiver_index)
            .field("sender_index", &self.sender_index)
            .field("role", &self.role)
            .field("next_counter", &self.next_counter)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zeroize::Zeroizing;

    /// Two ends of one session.
    fn pair(timing: &Timing) -> (Session, Session) {
        let end = |role, receiver_index, sender_index, send, receive| {
            Session::new(
                &Origin { peer: NodePublic::ZERO, receiver_index, sender_index, role },
                &TransportKeys { send: Zeroizing::new([send; 32]), receive: Zeroizing::new([receive; 32]) },
                Arc::default(),
                timing,
            )
        };
        (end(Role::Initiator, 7, 9, 1, 2), end(Role::Responder, 9, 7, 2, 1))
    }

    #[test]
    fn a_sealed_packet_opens_at_the_other_end_with_zero_padding() {
        let (a, b) = pair(&Timing::default());
        let mut buf = [0xff; 100];
        buf[16..21].copy_from_slice(b"hello");
        let len = a.seal(a.reserve(1).unwrap(), &mut buf, 5);
        assert_eq!(len, 48);
        assert_eq!(buf[..16], [4, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mut elsewhere = buf;
        assert_eq!(a.open(&mut elsewhere[..len]), Err(Reject::UnknownIndex));
        let opened = b.open(&mut buf[..len]).unwrap();
        assert_eq!((opened.counter, &*opened.packet), (0, &b"hello\0\0\0\0\0\0\0\0\0\0\0"[..]));
        assert!(b.replay().accept(0));
        assert!(!b.replay().accept(0));
        let mut verdicts = [true; 3];
        b.accept(&[1, 1, 0], &mut verdicts);
        assert_eq!(verdicts, [true, false, false]);
    }

    #[test]
    fn any_changed_byte_is_refused() {
        let (a, b) = pair(&Timing::default());
        let mut datagram = [0; 48];
        let len = a.seal(a.reserve(1).unwrap(), &mut datagram, 16);
        for at in 0..len {
            let mut changed = datagram;
            changed[at] ^= 0x80;
            assert!(b.open(&mut changed).is_err(), "byte {at}");
        }
        assert_eq!(b.open(&mut datagram[..20]), Err(Reject::Malformed));
    }

    #[test]
    fn counters_run_out_and_do_not_wrap() {
        let timing = Timing { rekey_after_messages: 10, reject_after_messages: 20, ..Timing::default() };
        let (a, b) = pair(&timing);
        assert_eq!(a.reserve(MAX_RESERVE + 1), None);
        assert_eq!(a.reserve(11), Some(0));
        assert!(a.is_worn());
        assert!(a.activity().note_sent(1, 1, 1), "the interface has to hear of it");
        assert_eq!(a.reserve(9), Some(11));
        assert_eq!(a.reserve(1), None);
        let mut datagram = [0; 32];
        a.seal(20, &mut datagram, 0);
        assert_eq!(b.open(&mut datagram), Err(Reject::SessionEnded));
    }

    #[test]
    fn an_ended_session_neither_seals_nor_opens() {
        let (a, b) = pair(&Timing::default());
        let mut datagram = [0; 32];
        a.seal(a.reserve(1).unwrap(), &mut datagram, 0);
        a.end();
        b.end();
        assert_eq!(a.reserve(1), None);
        assert_eq!(b.open(&mut datagram), Err(Reject::SessionEnded));
    }

    #[test]
    fn padding_stops_at_the_mtu() {
        assert_eq!(padded_len(0, 1420), 0);
        assert_eq!(padded_len(1, 1420), 16);
        assert_eq!(padded_len(1409, 1420), 1420);
        assert_eq!(padded_len(1420, 1420), 1420);
        assert_eq!(padded_len(1430, 1420), 1430);
    }

    #[test]
    fn keys_do_not_print() {
        let shown = format!("{:?}", pair(&Timing::default()).0);
        assert!(shown.contains("receiver_index: 7") && !shown.contains("0101"), "{shown}");
    }

    proptest! {
        #[test]
        fn open_survives_any_bytes(mut bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (a, _) = pair(&Timing::default());
            if bytes.len() >= 8 {
                bytes[..8].copy_from_slice(&[4, 0, 0, 0, 7, 0, 0, 0]);
            }
            prop_assert!(a.open(&mut bytes).is_err());
        }
    }
}
