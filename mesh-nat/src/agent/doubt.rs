//! Doubt: how a direct path that has died is noticed, and what carries the data until that is certain.
//!
//! ```text
//!            sent, and nothing heard for two round trips          unanswered after a round trip
//!            a heartbeat is due                                   and its variation
//!   trusted ─────────────────────────────────────────► asked ──────────────────────────────────► in doubt
//!      ▲  ▲                                              │                                          │ asks again and
//!      │  └───────────────── pong ───────────────────────┘                                          │ again; every packet
//!      └──────────────────── pong ──────────────────────────────────────────────────────────────────┤ goes by the relay
//!                                                                                                   ▼ as well
//!                                     another address that answers, or the relay alone ◄──── given up after 4 pings
//! ```
//!
//! Silence alone is no proof: a flow may go one way only. So it leads to a ping, and only a ping without an answer to
//! doubt. Where pings refute it again and again while nothing is heard, silence is borne for longer, up to
//! [`Timing::silence_max`](super::Timing::silence_max), and only a steady flow is asked about at all: heartbeats are
//! enough for a trickle.

use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;

use super::peer::{Peer, within};
use super::{Agent, Event, Mode, Timer, Timing, search::Urgency};
use crate::path::Path;
use crate::path::candidate::Target;
use crate::path::probe::RoundTrip;

/// Lengths are not checked more often than this because of silence.
const LENGTH_INTERVAL: Duration = Duration::from_secs(3);
/// A ping is not repeated later than this for want of an answer, unless the round trip itself is longer.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// How often the patience with silence is doubled at most.
const MAX_REFUTED: u8 = 4;
/// After this long, wrong hints are forgotten.
const FORGIVEN: Duration = Duration::from_secs(30);

/// How far the direct path in use is doubted.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Doubt {
    /// When the first of the pings went out that have not been answered.
    pub(super) asked: Option<Instant>,
    /// Pings in a row that were not answered in time. Any makes the path doubtful.
    pub(super) misses: u8,
    /// When silence was last taken for a sign.
    suspected: Option<Instant>,
    /// How often in a row a pong has shown that it was none.
    refuted: u8,
    /// When a hint was last followed, and how many have been in a row.
    hinted: Option<Instant>,
    hints: u8,
    /// When silence last led to a look at lengths.
    length: Option<Instant>,
}

impl Doubt {
    /// Since when there is no answer, if that is longer than usual.
    pub(super) fn since(&self) -> Option<Instant> {
        self.asked.filter(|_| self.misses > 0)
    }

    /// A pong has come from the path in use.
    fn answered(&mut self) {
        self.asked = None;
        self.misses = 0;
        if self.suspected.is_some() {
            self.refuted = (self.refuted + 1).min(MAX_REFUTED);
        }
    }

    /// How long nothing may be heard while sending.
    fn tolerance(&self, round_trip: Option<RoundTrip>, timing: &Timing) -> Duration {
        let two = round_trip.map_or(Duration::ZERO, |round_trip| round_trip.patience() + round_trip.smoothed());
        let least = two.max(timing.silence);
        (least * (1 << self.refuted)).min(least.max(timing.silence_max))
    }
}

impl Peer {
    /// Where data goes as well as by the direct path, or the one through a peer relay, because that is in doubt.
    fn backup(&self, mode: Mode) -> Option<Path> {
        let doubted = match self.best {
            Some(_) => self.doubt.misses > 0,
            None => self.relayed.is_some_and(|relayed| relayed.doubted),
        };
        self.region().filter(|_| mode == Mode::Auto && doubted).map(|region| Path::Relay { region })
    }
}

impl Agent {
    /// Data was sent to `peer` at `since`, and nothing has been heard from it from then until `now`. Call it a few times
    /// a second while that is so: the agent knows how much silence is too much on this path, and then asks. True if it
    /// has just done so; the relay may be needed soon.
    pub fn unanswered(&mut self, now: Instant, peer: &NodePublic, since: Instant) -> bool {
        self.tick(now);
        let timing = self.timing;
        let Some(state) = self.peers.get_mut(peer) else { return false };
        let Some(candidate) = state.best.and_then(|best| state.candidates.get(&best)) else { return false };
        if state.doubt.suspected.is_none_or(|at| at < since) {
            // Something was heard in between.
            state.doubt.refuted = 0;
        }
        // A pong is as good as data.
        let since = candidate.proven.map_or(since, |proven| since.max(proven));
        if state.sent.is_none_or(|sent| sent < since) {
            return false;
        }
        if state.doubt.refuted > 0 && within(state.flowing, now, timing.silence_max) {
            return false;
        }
        let silent = now.saturating_duration_since(since);
        if silent < state.doubt.tolerance(candidate.round_trip, &timing) || self.timers.is_set(Timer::Retry(*peer)) {
            return false;
        }
        state.doubt.suspected = Some(now);
        self.ask(*peer);
        true
    }

    /// Something speaks against the direct path to `peer`, such as data of its own that came through a relay: asks at once
    /// whether it still works, instead of at the next heartbeat. Harmless while an answer is awaited, and the seldomer
    /// followed the more often it was wrong.
    pub fn suspect(&mut self, now: Instant, peer: &NodePublic) {
        self.tick(now);
        let pause = self.timing.silence;
        let Some(state) = self.peers.get_mut(peer) else { return };
        let Some(candidate) = state.best.and_then(|best| state.candidates.get(&best)) else { return };
        let doubt = &mut state.doubt;
        if !within(doubt.hinted, now, FORGIVEN) {
            doubt.hints = 0;
        }
        if candidate.proven_within(now, pause * (1 << doubt.hints)) || self.timers.is_set(Timer::Retry(*peer)) {
            return;
        }
        doubt.hinted = Some(now);
        doubt.hints = (doubt.hints + 1).min(MAX_REFUTED);
        self.ask(*peer);
    }

    fn ask(&mut self, node: NodePublic) {
        let (peer, now) = (&node, self.now);
        self.check_best(node);
        let Some(state) = self.peers.get_mut(peer) else { return };
        // Long datagrams may be what gets lost, and pings are short.
        if !within(state.doubt.length, now, LENGTH_INTERVAL) {
            state.doubt.length = Some(now);
            self.check_length(*peer);
        }
    }

    /// Pings the path in use, if it is a direct one and no answer is awaited.
    pub(super) fn check_best(&mut self, node: NodePublic) {
        if let Some(best) = self.peers.get(&node).and_then(|peer| peer.best)
            && !self.timers.is_set(Timer::Retry(node))
        {
            self.ping_best(node, best);
        }
    }

    pub(super) fn ping_best(&mut self, node: NodePublic, best: Target) {
        let (now, least) = (self.now, self.timing.retry);
        let Some(silence) = self.peers.get(&node).map(|peer| peer.silence(now, best)) else { return };
        self.send_ping(node, best.into(), None, 0);
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if let (None, Some(silence)) = (peer.doubt.asked, silence) {
            peer.pulse.asked(silence);
        }
        peer.doubt.asked.get_or_insert(now);
        let round_trip = peer.candidates.get(&best).and_then(|candidate| candidate.round_trip);
        let patience = round_trip.map_or(least, |round_trip| round_trip.patience().max(least));
        let wait = (patience * (1 << peer.doubt.misses.min(4))).min(patience.max(LONGEST_WAIT));
        self.timers.set(Timer::Retry(node), now + wait);
    }

    /// A ping along the path in use has not been answered in time.
    pub(super) fn retry(&mut self, node: NodePublic) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let Some(best) = peer.best else { return };
        peer.doubt.misses += 1;
        peer.pulse.missed(self.now, &self.timing);
        if peer.doubt.misses <= self.timing.retries {
            let first = peer.doubt.misses == 1;
            self.ping_best(node, best);
            self.refresh(node);
            if first && self.peers.get(&node).is_some_and(|peer| peer.active(self.now, &self.timing)) {
                // Other addresses may work, and the peer should look at its own path.
                self.search(node, Urgency::Event);
            }
            return;
        }
        if let Some(candidate) = peer.candidates.get_mut(&best) {
            candidate.forget();
        }
        self.lost(node);
    }

    /// The network below may have lost the path in use: doubts it before any ping has been missed.
    pub(super) fn doubt(&mut self, node: NodePublic) {
        let now = self.now;
        if let Some(peer) = self.peers.get_mut(&node).filter(|peer| peer.best.is_some()) {
            peer.doubt.asked = Some(now);
            peer.doubt.misses = peer.doubt.misses.max(1);
            self.refresh(node);
        }
    }

    /// A pong came along the path in use. `same` says that neither end's NAT has given the flow another address.
    pub(super) fn undoubt(&mut self, node: NodePublic, same: bool) {
        self.timers.clear(Timer::Retry(node));
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.doubt.answered();
            peer.pulse.answered(self.now, same, &self.timing);
        }
    }

    /// The path in use may have gone: takes another, or searches while the relay carries the data.
    pub(super) fn lost(&mut self, node: NodePublic) {
        self.reselect(node);
        let Some(peer) = self.peers.get(&node) else { return };
        if peer.best.is_none() {
            // Our NAT may have forgotten us; then the addresses that we would tell the peer are wrong as well.
            self.endpoints_at = None;
        }
        if peer.best.is_none() && peer.active(self.now, &self.timing) {
            self.search(node, Urgency::Routine);
        }
    }

    /// Tells the caller if the relay is needed beside the path in use, or no longer.
    pub(super) fn tell_backup(&mut self, node: NodePublic) {
        let mode = self.mode;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let backup = peer.backup(mode);
        if backup != peer.published_backup {
            peer.published_backup = backup;
            self.events.push_back(Event::BackupChanged { peer: node, backup });
        }
    }
}
