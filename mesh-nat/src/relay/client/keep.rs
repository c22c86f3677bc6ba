//! A path that has been proven: keeping it, binding it again, giving it up, and leaving it for a better one.
//!
//! A server forwards from one address of each client, and moves there with each bind. So when our own network changes,
//! nothing is allocated anew and the peer need not hear of it: the same allocation is bound from where we are now.
//!
//! ```text
//!            rebind, or the second ping in a row without an answer
//!   sound ────────────────────────────────────────────────────────► in doubt: a region carries copies
//!     ▲                                                               │            │
//!     └──────── a pong, along the path or after binding again ────────┘            │ the fourth ping without an answer
//!                                                                                  ▼
//!                                                                                given up
//! ```

use std::cmp::Reverse;
use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;

use super::{Client, Output, Place, Timer, Timing};
use crate::disco::message::{RelayEndpoint, TxId};
use crate::path::probe::RoundTrip;

/// A relay must be so much faster before a working one is left for it.
const MARGIN: Duration = Duration::from_millis(5);
/// A ping that comes in is answered by one that goes out if the path was proven no later than this ago.
const STALE: Duration = Duration::from_millis(2500);
/// Paths that are bound again at once after a change of network; then there is one each `TURN`.
const AT_ONCE: u32 = 64;
const TURN: Duration = Duration::from_millis(2);

#[derive(Debug)]
pub(super) struct Relayed {
    /// The allocation.
    pub(super) endpoint: RelayEndpoint,
    pub(super) place: Place,
    pub(super) round_trip: RoundTrip,
    proven: Instant,
    /// The latest ping.
    pinged: Option<(TxId, Instant)>,
    /// Pings in a row without an answer.
    unanswered: u8,
    /// Our own address may be another than the server knows.
    moved: bool,
}

impl Relayed {
    pub(super) const fn new(endpoint: RelayEndpoint, place: Place, now: Instant, round_trip: RoundTrip) -> Self {
        Self { endpoint, place, round_trip, proven: now, pinged: None, unanswered: 0, moved: false }
    }

    pub(super) fn is_proven(&self, now: Instant, timing: &Timing) -> bool {
        now.saturating_duration_since(self.proven) < timing.trust
    }

    fn is_doubted(&self) -> bool {
        self.moved || self.unanswered > 1
    }

    /// Whether to leave this path, which may not be proven any more, for `other`, which is.
    fn yields(&self, other: &Self, now: Instant, timing: &Timing) -> bool {
        let (ours, theirs) = (self.round_trip.smoothed(), other.round_trip.smoothed());
        let sound = self.is_proven(now, timing) && !self.is_doubted();
        !sound || self.endpoint.server == other.endpoint.server || theirs + MARGIN.max(ours / 10) < ours
    }
}

impl Client {
    /// A handshake has ended well: takes the path if it is better than the one in use.
    pub(super) fn proven(&mut self, peer: NodePublic, path: Relayed) {
        let (now, timing) = (self.now, self.timing);
        let Some(state) = self.peers.get_mut(&peer) else { return };
        if state.path.as_ref().is_none_or(|current| current.yields(&path, now, &timing)) {
            state.path = Some(path);
            let interval = if state.direct { timing.warm } else { timing.heartbeat };
            self.timers.set(Timer::Keep(peer), now + interval);
            self.tell(peer);
        }
    }

    /// The network below has changed: what is in use is bound again, from wherever we are now, and is in doubt meanwhile.
    /// Where there is nothing yet, all servers may be asked again soon.
    pub fn rebind(&mut self, now: Instant) {
        self.tick(now);
        let (now, timing) = (self.now, self.timing);
        let mut peers: Vec<_> = self.peers.iter().map(|(peer, state)| (Reverse(state.sent), *peer)).collect();
        peers.sort_unstable();
        let mut turn = 0_u32;
        for (_, peer) in peers {
            let Some(state) = self.peers.get_mut(&peer) else { continue };
            if !state.is_active(now, &timing) {
                self.remove_peer(&peer);
                continue;
            }
            let at = now + TURN * turn.saturating_sub(AT_ONCE);
            turn = turn.saturating_add(1);
            let endpoint = state.path.as_mut().map(|path| {
                // An answer to an earlier ping says nothing about where we are now.
                (path.moved, path.pinged, path.unanswered) = (true, None, 0);
                path.endpoint.clone()
            });
            if endpoint.is_some() {
                self.timers.set(Timer::Keep(peer), at);
            } else {
                state.looked = None;
                self.timers.clear(Timer::Look(peer));
            }
            self.begin_again(peer, endpoint, at);
            self.tell(peer);
        }
    }

    /// Tells the owner if the path is another, in doubt, or proven no longer; looks again at that time.
    pub(super) fn tell(&mut self, peer: NodePublic) {
        let (now, timing) = (self.now, self.timing);
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let path = state.path.as_ref().filter(|path| path.is_proven(now, &timing));
        match path {
            Some(path) => self.timers.set(Timer::Trust(peer), path.proven + timing.trust),
            None => self.timers.clear(Timer::Trust(peer)),
        }
        let place = path.map(|path| path.place);
        if place != state.told {
            state.told = place;
            state.doubted = false;
            self.outputs.push_back(Output::Path { peer, place });
        }
        let doubted = path.is_some_and(Relayed::is_doubted);
        if doubted != state.doubted {
            state.doubted = doubted;
            self.outputs.push_back(Output::Doubt { peer, doubted });
        }
    }

    fn ping_path(&mut self, peer: NodePublic) {
        let (now, timing, tx) = (self.now, self.timing, self.tx());
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let Some(path) = &mut state.path else { return };
        path.pinged = Some((tx, now));
        path.unanswered = path.unanswered.saturating_add(1);
        let place = path.place;
        let patience = path.round_trip.patience().max(timing.retry);
        self.timers.set(Timer::Keep(peer), now + patience);
        self.push(Output::Ping { peer, place, tx });
        self.tell(peer);
    }

    /// Time for a ping, or for its repetition, or to give the path up.
    pub(super) fn keep_due(&mut self, peer: NodePublic) {
        let (now, timing) = (self.now, self.timing);
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let Some(path) = &state.path else { return };
        if path.unanswered > timing.retries {
            // Whoever relays may have restarted: what it knew of us is worth nothing.
            state.path = None;
            state.looked = None;
            let (direct, active) = (state.direct, state.is_active(now, &timing));
            self.tell(peer);
            if active && !direct {
                self.timers.set(Timer::Look(peer), now);
            }
        } else if path.unanswered > 0 || state.is_active(now, &timing) {
            self.ping_path(peer);
        } else if !path.is_proven(now, &timing) {
            // Quiet, and not worth being kept.
            state.path = None;
            self.tell(peer);
        } else {
            let end = path.proven + timing.trust;
            self.timers.set(Timer::Keep(peer), end);
        }
    }

    /// The peer pings us along the path: if we have not heard an answer along it lately, it is time to ask.
    pub(super) fn path_pinged(&mut self, peer: NodePublic, place: Place) {
        let now = self.now;
        let Some(state) = self.peers.get(&peer) else { return };
        let stale = state.path.as_ref().is_some_and(|path| {
            path.place == place && path.unanswered == 0 && now.saturating_duration_since(path.proven) >= STALE
        });
        if stale {
            self.ping_path(peer);
        }
    }

    pub(super) fn path_pong(&mut self, peer: NodePublic, place: Place, tx: TxId) -> bool {
        let (now, timing) = (self.now, self.timing);
        let Some(state) = self.peers.get_mut(&peer) else { return false };
        let Some(path) = state.path.as_mut().filter(|path| path.place == place) else { return false };
        let Some((_, sent)) = path.pinged.filter(|(latest, _)| *latest == tx) else { return false };
        path.pinged = None;
        path.unanswered = 0;
        path.proven = now;
        path.round_trip.update(now.saturating_duration_since(sent));
        let (moved, server) = (std::mem::take(&mut path.moved), path.endpoint.server);
        let interval = if state.direct { timing.warm } else { timing.heartbeat };
        self.timers.set(Timer::Keep(peer), now + interval);
        if moved {
            self.need_not_bind(peer, server, place.vni);
        }
        self.tell(peer);
        true
    }
}
