//! One peer: its sessions, the handshake in progress, its timers.
//!
//! ```text
//!              we initiated: response                       session_used
//!   (nothing) ────────────────────────► current ◄──────────────────────────── next ◄──── they initiated:
//!                                          │ replaced                                     we responded
//!                                          ▼
//!                                       previous ──── replaced, or REJECT-AFTER-TIME ───► (ended)
//! ```
//!
//! We send on `current` and receive on all three. `next` waits for the initiator to use it, since until then we cannot
//! know that our response arrived. When both sides initiate at once, each ends with the session it initiated as
//! `current` and the other's as `previous`, so that both can be received on.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rand_core::Rng;

use super::cookie::Stamper;
use super::handshake::{Asked, InFlight, Ingredients};
use super::interface::{Event, PeerConfig, Shared, Transmit};
use super::message::{INITIATION_LEN, KEEPALIVE_LEN, RESPONSE_LEN, Response};
use super::session::{Origin, Role};
use super::timers::TimerTable;
use super::timestamp::Timestamp;
use super::{Activity, Reject, Session, Timer};
use crate::key::{NodePublic, PresharedKey};
use crate::noise::ikpsk2::TransportKeys;

/// The least time between two initiations, whatever asks for them: responders count fifty a second as a flood.
const MIN_INITIATION_INTERVAL: Duration = Duration::from_millis(50);

/// A session with the time of its making.
#[derive(Debug)]
struct Live {
    session: Arc<Session>,
    created: Instant,
}

/// A handshake that we try to start.
#[derive(Debug)]
struct Attempt {
    /// When it was last wanted; it is given up `REKEY-ATTEMPT-TIME` later.
    wanted: Instant,
    next_try: Instant,
    in_flight: Option<InFlight>,
}

#[derive(Debug)]
pub(super) struct Peer {
    public: NodePublic,
    preshared: PresharedKey,
    persistent_keepalive: Option<Duration>,
    stamper: Stamper,
    activity: Arc<Activity>,

    previous: Option<Live>,
    current: Option<Live>,
    next: Option<Live>,
    /// Boxed, as a handshake's state takes a kilobyte and most peers are in none.
    attempt: Option<Box<Attempt>>,

    /// The latest timestamp in an initiation of the peer's.
    latest: Option<Timestamp>,
    last_asked: Option<Instant>,
    last_initiation: Option<Instant>,
    gave_up: Option<Instant>,
    last_handshake: Option<SystemTime>,

    /// When the persistent keepalive last fired, or was switched on.
    persistent_from: Instant,
    persistent_now: bool,
    /// Where the interface has filed this peer.
    pub(super) scheduled: Option<Instant>,
}

impl Peer {
    pub(super) fn new(now: Instant, public: NodePublic, config: PeerConfig) -> Self {
        let mut peer = Self {
            public,
            preshared: PresharedKey::default(),
            persistent_keepalive: None,
            stamper: Stamper::default(),
            activity: Arc::default(),
            previous: None,
            current: None,
            next: None,
            attempt: None,
            latest: None,
            last_asked: None,
            last_initiation: None,
            gave_up: None,
            last_handshake: None,
            persistent_from: now,
            persistent_now: false,
            scheduled: None,
        };
        peer.configure(now, config);
        peer
    }

    pub(super) fn configure(&mut self, now: Instant, config: PeerConfig) {
        self.preshared = config.preshared;
        let interval = config.persistent_keepalive.filter(|interval| !interval.is_zero());
        if interval != self.persistent_keepalive {
            // A keepalive at once opens the way through the peer's or our own NAT.
            self.persistent_now = interval.is_some();
            self.persistent_from = now;
            self.persistent_keepalive = interval;
        }
    }

    pub(super) fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    pub(super) fn last_handshake(&self) -> Option<SystemTime> {
        self.last_handshake
    }

    pub(super) fn persistent_keepalive(&self) -> Option<Duration> {
        self.persistent_keepalive
    }

    pub(super) fn preshared(&self) -> &PresharedKey {
        &self.preshared
    }

    pub(super) fn current(&self) -> Option<&Arc<Session>> {
        self.current.as_ref().map(|live| &live.session)
    }

    // --- Commands

    /// A packet waits. Starts a handshake unless there is a session to send on.
    pub(super) fn want_session<P: Clone>(&mut self, shared: &mut Shared<P>, now: Instant) {
        if let Some(current) = self.current().filter(|current| !current.is_spent()) {
            // Whoever asks has no session to send on, so the two views have parted: tell again.
            let ready = Event::SessionReady { peer: self.public, session: Arc::clone(current) };
            shared.events.push_back(ready);
            return;
        }
        match &mut self.attempt {
            Some(attempt) => attempt.wanted = now,
            None => self.start_handshake(shared, now),
        }
    }

    /// The last initiation may have gone nowhere: the next one need not wait for `REKEY-TIMEOUT`.
    pub(super) fn retry_handshake(&mut self, now: Instant, after: Duration) {
        let earliest = self.earliest_initiation(now + after);
        if let Some(attempt) = &mut self.attempt {
            attempt.next_try = attempt.next_try.min(earliest);
        }
    }

    /// The session to send on leads nowhere any more: tries a handshake at once, whatever there is.
    pub(super) fn renew_session(&mut self, now: Instant) {
        let next_try = self.earliest_initiation(now);
        match &mut self.attempt {
            Some(attempt) => {
                attempt.wanted = now;
                attempt.next_try = attempt.next_try.min(next_try);
            }
            None => self.attempt = Some(Box::new(Attempt { wanted: now, next_try, in_flight: None })),
        }
    }

    fn earliest_initiation(&self, wanted: Instant) -> Instant {
        self.last_initiation.map_or(wanted, |last| wanted.max(last + MIN_INITIATION_INTERVAL))
    }

    /// The initiator has used `receiver_index`: it has the keys, so we may send on that session.
    pub(super) fn session_used<P: Clone>(&mut self, shared: &mut Shared<P>, now: Instant, receiver_index: u32) {
        if self.next.as_ref().is_none_or(|next| next.session.receiver_index() != receiver_index) {
            return;
        }
        Self::end(shared, self.previous.take());
        self.previous = self.current.take();
        self.current = self.next.take();
        self.abandon(shared);
        self.handshake_done(shared, now);
    }

    /// Ends everything: all sessions and the handshake in progress.
    pub(super) fn reset<P>(&mut self, shared: &mut Shared<P>) {
        for live in [self.previous.take(), self.current.take(), self.next.take()] {
            Self::end(shared, live);
        }
        self.abandon(shared);
        self.last_initiation = None;
    }

    // --- Messages

    /// Answers an initiation of this peer's.
    pub(super) fn asked<P: Clone>(
        &mut self,
        shared: &mut Shared<P>,
        now: Instant,
        path: &P,
        asked: Asked,
    ) -> Result<(), Reject> {
        if self.latest.is_some_and(|latest| asked.timestamp <= latest) {
            return Err(Reject::OldTimestamp);
        }
        let spacing = shared.timing.initiation_spacing;
        if self.last_asked.is_some_and(|last| now.saturating_duration_since(last) < spacing) {
            return Err(Reject::Flood);
        }
        self.latest = Some(asked.timestamp);
        self.last_asked = Some(now);
        shared.identity.remember(&self.public);

        let sender_index = asked.sender;
        let index = shared.new_index(self.public);
        let (datagram, keys) = match asked.answer(now, &self.preshared, index, &mut self.stamper) {
            Ok(answer) => answer,
            Err(reject) => {
                shared.indices.remove(&index);
                return Err(reject);
            }
        };
        self.heard(shared, now, path, INITIATION_LEN);
        let origin = Origin { peer: self.public, receiver_index: index, sender_index, role: Role::Responder };
        let opened = self.open(shared, now, &origin, &keys);
        Self::end(shared, self.next.replace(opened));
        self.send(shared, now, Some(path.clone()), datagram.to_vec());
        Ok(())
    }

    /// Takes the response to our initiation.
    pub(super) fn answered<P: Clone>(
        &mut self,
        shared: &mut Shared<P>,
        now: Instant,
        path: &P,
        response: &Response,
    ) -> Result<(), Reject> {
        let in_flight = self.attempt.as_mut().and_then(|attempt| attempt.in_flight.as_mut());
        let in_flight =
            in_flight.filter(|in_flight| in_flight.index == response.receiver).ok_or(Reject::UnknownIndex)?;
        let keys = in_flight.finish(&self.preshared, response)?;
        shared.identity.remember(&self.public);
        self.heard(shared, now, path, RESPONSE_LEN);
        // The session inherits the index, so it must not be given back.
        self.attempt = None;
        let origin = Origin {
            peer: self.public,
            receiver_index: response.receiver,
            sender_index: response.sender,
            role: Role::Initiator,
        };
        let opened = self.open(shared, now, &origin, &keys);
        let replaced = self.current.replace(opened);
        let retired = match self.next.take() {
            Some(next) => {
                next.session.settle();
                Self::end(shared, replaced);
                self.previous.replace(next)
            }
            None => std::mem::replace(&mut self.previous, replaced),
        };
        Self::end(shared, retired);
        self.handshake_done(shared, now);
        // The responder may not send before it has heard us on the new session.
        self.send_keepalive(shared, now, Some(path.clone()));
        Ok(())
    }

    /// Takes a cookie, to be used in the next initiation or response.
    pub(super) fn cookie(&mut self, now: Instant, reply: &super::message::CookieReply) -> Result<(), Reject> {
        self.stamper.take_reply(now, &self.public, reply)
    }

    // --- Timers

    /// Does what is due and returns when the next is. To be called after everything that touches this peer.
    pub(super) fn settle<P: Clone>(&mut self, shared: &mut Shared<P>, now: Instant) -> Option<Instant> {
        loop {
            let timers = self.arm(shared, now);
            let Some(timer) = timers.expired(now) else { return timers.next() };
            tracing::trace!(peer = ?self.public, ?timer, "timer");
            self.fire(shared, now, timer);
        }
    }

    /// Derives every deadline from the state and the activity words.
    fn arm<P>(&self, shared: &Shared<P>, now: Instant) -> TimerTable {
        let (timing, activity) = (&shared.timing, &self.activity);
        let mut timers = TimerTable::default();
        for live in [&self.previous, &self.current, &self.next].into_iter().flatten() {
            timers.set(Timer::SessionEnd, live.created + timing.reject_after);
        }
        if let Some(attempt) = &self.attempt {
            timers.set(Timer::GiveUp, attempt.wanted + timing.rekey_attempt);
            timers.set(Timer::Retry, attempt.next_try);
        }
        if let Some(interval) = self.persistent_keepalive {
            let last = shared.instant(activity.last_sent().max(activity.last_received()));
            let base = last.map_or(self.persistent_from, |last| last.max(self.persistent_from));
            timers.set(Timer::PersistentKeepalive, if self.persistent_now { now } else { base + interval });
        }

        let receiving = self.previous.is_some() || self.current.is_some() || self.next.is_some();
        // The flags go up before the words are read: whoever writes a word afterwards sees the flag.
        activity.wake_on_send(receiving);
        activity.wake_on_receive(receiving);
        if !receiving {
            return timers;
        }
        let mut wake_on_send = false;
        let mut wake_on_receive = false;
        // A timer that does not run may start at any moment. While packets flow that is not worth a wake-up each time: what
        // starts from now on falls due a whole period from now, so the words are read again then. Only a peer that has
        // been quiet for a period raises its flag.
        let quiet = |ms: u64, period| shared.instant(ms).is_none_or(|last| last + period <= now);
        match shared.instant(activity.unanswered()) {
            Some(first) => timers.set(Timer::Silence, first + timing.silence()),
            None if quiet(activity.last_data_sent(), timing.silence()) => wake_on_send = true,
            None => timers.set(Timer::Silence, now + timing.silence()),
        }
        match shared.instant(activity.unacknowledged()) {
            Some(first) => timers.set(Timer::Keepalive, first + timing.keepalive_timeout),
            None if quiet(activity.last_data_received(), timing.keepalive_timeout) => wake_on_receive = true,
            None => timers.set(Timer::Keepalive, now + timing.keepalive_timeout),
        }
        if self.rekey_is_due(shared, now) {
            timers.set(Timer::Rekey, now);
        } else if let Some(current) = self.rekeyable() {
            let on_send = current.created + timing.rekey_after;
            let on_receive = current.created + timing.rekey_on_receive();
            for (from, wake) in [(on_send, &mut wake_on_send), (on_receive, &mut wake_on_receive)] {
                if now < from { timers.set(Timer::Rekey, from) } else { *wake = true }
            }
        }
        // Worn sessions raise the flag themselves, so it is only ever taken down here when nothing can be missed.
        if !wake_on_send && !self.current.as_ref().is_some_and(|live| live.session.is_worn()) {
            activity.wake_on_send(false);
        }
        if !wake_on_receive {
            activity.wake_on_receive(false);
        }
        timers
    }

    /// The session whose replacement falls to us, if no handshake is on the way.
    fn rekeyable(&self) -> Option<&Live> {
        if self.attempt.is_some() {
            return None;
        }
        self.current.as_ref().filter(|live| live.session.role() == Role::Initiator)
    }

    /// Whether the current session is used beyond its time (whitepaper §6.2).
    fn rekey_is_due<P>(&self, shared: &Shared<P>, now: Instant) -> bool {
        if self.attempt.is_some() {
            return false;
        }
        let used_since = |ms: u64, from: Instant| {
            // Words count whole milliseconds: what happened in the same one as `from` happened after it.
            let fresh = |at: Instant| self.gave_up.is_none_or(|gave_up| at > gave_up);
            shared.instant(ms).is_some_and(|at| at + Duration::from_millis(1) > from && fresh(at))
        };
        let by_age = self.rekeyable().is_some_and(|live| {
            let on_send = live.created + shared.timing.rekey_after;
            let on_receive = live.created + shared.timing.rekey_on_receive();
            (now >= on_send && used_since(self.activity.last_data_sent(), on_send))
                || (now >= on_receive && used_since(self.activity.last_received(), on_receive))
        });
        let by_count = self
            .current
            .as_ref()
            .is_some_and(|live| live.session.is_worn() && used_since(self.activity.last_data_sent(), live.created));
        by_age || by_count
    }

    fn fire<P: Clone>(&mut self, shared: &mut Shared<P>, now: Instant, timer: Timer) {
        match timer {
            Timer::SessionEnd => {
                let limit = shared.timing.reject_after;
                for slot in [&mut self.previous, &mut self.current, &mut self.next] {
                    if slot.as_ref().is_some_and(|live| live.created + limit <= now) {
                        Self::end(shared, slot.take());
                    }
                }
            }
            Timer::GiveUp => {
                self.abandon(shared);
                self.gave_up = Some(now);
                self.activity.clear_unanswered();
                shared.events.push_back(Event::HandshakeFailed { peer: self.public });
            }
            Timer::Retry => self.send_initiation(shared, now),
            Timer::Rekey => {
                if self.rekey_is_due(shared, now) {
                    self.start_handshake(shared, now);
                }
            }
            Timer::Silence => {
                self.activity.clear_unanswered();
                self.start_handshake(shared, now);
            }
            Timer::Keepalive => {
                let first = self.activity.unacknowledged();
                let more = self.activity.last_data_received() > first;
                self.activity.set_unacknowledged(0);
                self.send_keepalive(shared, now, None);
                if more && first != 0 {
                    self.activity.set_unacknowledged(shared.clock_ms(now));
                }
            }
            Timer::PersistentKeepalive => {
                self.persistent_now = false;
                self.persistent_from = now;
                if self.current.is_some() {
                    self.send_keepalive(shared, now, None);
                } else {
                    self.start_handshake(shared, now);
                }
            }
        }
    }

    // --- Steps

    /// Starts a handshake unless one is on its way. No earlier than `REKEY-TIMEOUT` after the last initiation.
    fn start_handshake<P: Clone>(&mut self, shared: &mut Shared<P>, now: Instant) {
        if self.attempt.is_some() {
            return;
        }
        let earliest = self.last_initiation.map(|last| last + shared.timing.rekey_timeout);
        let next_try = earliest.map_or(now, |earliest| earliest.max(now));
        self.attempt = Some(Box::new(Attempt { wanted: now, next_try, in_flight: None }));
        if next_try <= now {
            self.send_initiation(shared, now);
        }
    }

    fn send_initiation<P: Clone>(&mut self, shared: &mut Shared<P>, now: Instant) {
        let Some(attempt) = &mut self.attempt else { return };
        if let Some(old) = attempt.in_flight.take() {
            shared.indices.remove(&old.index);
        }
        let jitter = shared.timing.rekey_jitter.mul_f64(f64::from(shared.rng.next_u32()) / f64::from(u32::MAX));
        attempt.next_try = now + shared.timing.rekey_timeout + jitter;
        self.last_initiation = Some(now);
        let index = shared.new_index(self.public);
        let with = Ingredients { now, index, timestamp: shared.wall.timestamp(now), ephemeral: shared.rng.array() };
        match InFlight::start(&shared.identity, &self.public, &mut self.stamper, with) {
            Ok((in_flight, datagram)) => {
                attempt.in_flight = Some(in_flight);
                self.send(shared, now, None, datagram.to_vec());
            }
            Err(error) => {
                tracing::warn!(peer = ?self.public, %error, "no handshake is possible with this key");
                shared.indices.remove(&index);
                self.attempt = None;
                self.gave_up = Some(now);
                shared.events.push_back(Event::HandshakeFailed { peer: self.public });
            }
        }
    }

    fn send_keepalive<P: Clone>(&mut self, shared: &mut Shared<P>, now: Instant, path: Option<P>) {
        let Some(session) = self.current() else { return };
        let Some(counter) = session.reserve(1) else { return };
        let mut datagram = vec![0; KEEPALIVE_LEN];
        session.seal(counter, &mut datagram, 0);
        self.send(shared, now, path, datagram);
    }

    fn send<P>(&mut self, shared: &mut Shared<P>, now: Instant, path: Option<P>, datagram: Vec<u8>) {
        let _ = self.activity.note_sent(shared.clock_ms(now), 0, datagram.len() as u64);
        shared.transmits.push_back(Transmit { peer: Some(self.public), path, datagram });
    }

    /// A handshake message of the peer's was authentic.
    fn heard<P: Clone>(&mut self, shared: &mut Shared<P>, now: Instant, path: &P, len: usize) {
        let _ = self.activity.note_received(shared.clock_ms(now), 0, len as u64);
        shared.events.push_back(Event::Authenticated { peer: self.public, path: path.clone() });
    }

    fn handshake_done<P>(&mut self, shared: &mut Shared<P>, now: Instant) {
        self.last_handshake = Some(shared.wall.system_time(now));
        self.gave_up = None;
        if let Some(session) = self.current() {
            session.settle();
            tracing::debug!(peer = ?self.public, index = session.receiver_index(), "session");
            let ready = Event::SessionReady { peer: self.public, session: Arc::clone(session) };
            shared.events.push_back(ready);
        }
    }

    fn open<P>(&self, shared: &mut Shared<P>, now: Instant, origin: &Origin, keys: &TransportKeys) -> Live {
        let session = Arc::new(Session::new(origin, keys, Arc::clone(&self.activity), &shared.timing));
        shared.events.push_back(Event::SessionOpened { peer: self.public, session: Arc::clone(&session) });
        Live { session, created: now }
    }

    fn end<P>(shared: &mut Shared<P>, live: Option<Live>) {
        if let Some(live) = live {
            live.session.end();
            let (peer, receiver_index) = (live.session.peer(), live.session.receiver_index());
            shared.indices.remove(&receiver_index);
            shared.events.push_back(Event::SessionClosed { peer, receiver_index });
        }
    }

    /// Forgets the handshake in progress.
    fn abandon<P>(&mut self, shared: &mut Shared<P>) {
        if let Some(in_flight) = self.attempt.take().and_then(|attempt| attempt.in_flight) {
            shared.indices.remove(&in_flight.index);
        }
    }
}
