//! Heartbeats: how seldom a path may be pinged that carries nothing at the moment.
//!
//! While data is sent, the path in use is pinged every 3 s, as deployed peers do. While none is, the pings are there for
//! the NATs on the way, which forget a silent flow after a time that nobody tells: 30 s is common, 10 s and less occur.
//! So the silence between two pings is stretched, a heartbeat at a time, for as long as it does no harm:
//!
//! ```text
//!             survived                survived                   survived
//!   3 s ────────────────► 6 s ────────────────► 9 s ─── … ───► 24 s, the longest
//!    ▲                     │ ▲                    │
//!    └──── not survived ───┘ └─── not survived ───┘      and no longer silence is tried for ten minutes
//! ```
//!
//! A silence is survived if the first ping after it is answered, from where it was sent to, and the peer sees it come
//! from where it came before. What has been survived holds for the address that it was found out with, until the network
//! changes.
//!
//! Only peers of our own kind are treated like this. They do the same, so that either side's ping, which the other one
//! answers with a ping of its own, serves both; and they trust a path for as long as they let it be silent. A deployed
//! peer would think it dead after 6.5 s.
//!
//! A path that has been silent may have died unseen. Data that goes again along it is therefore accompanied by a ping,
//! and [`doubt`](super::doubt) does the rest.

use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;

use super::peer::{Peer, within};
use super::{Agent, Timing};
use crate::path::candidate::Target;

/// The longest silence, in heartbeats: 24 s, for most NATs wait 30 s at least.
const LONGEST: u8 = 8;
/// So much less than a silence counts as that silence.
const SLACK: Duration = Duration::from_millis(500);
/// So much later than its turn a heartbeat may come if the peer has pinged meanwhile. Less than trust lasts beyond it.
const YIELD: Duration = Duration::from_secs(2);
/// After this long, a silence that was not survived is tried again.
const RECONSIDER: Duration = Duration::from_secs(600);

/// What is known of the silence that a path survives. Lengths are in heartbeats.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pulse {
    /// Which path.
    target: Option<Target>,
    /// The silence to be kept: the longest that was survived and one more, if that may be tried.
    rest: u8,
    /// The longest that may be tried.
    most: u8,
    /// When a silence was last not survived.
    failed: Option<Instant>,
    /// The silence that a ping has just ended, until that is answered or is not.
    ended: Option<Duration>,
    /// The network has changed: nothing of this holds, once the path has been found to work.
    void: bool,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { target: None, rest: 1, most: LONGEST, failed: None, ended: None, void: false }
    }
}

impl Pulse {
    /// The path in use is `best`: what was learnt of another one says nothing about it.
    pub(super) fn follow(&mut self, best: Option<Target>) {
        if best.is_some() && best != self.target {
            *self = Self { target: best, ..Self::default() };
        }
    }

    /// The network below has changed. The path is trusted as before until its next answer, or the want of one.
    pub(super) fn forget(&mut self) {
        self.void = true;
    }

    /// A ping has been sent after so much silence.
    pub(super) fn asked(&mut self, silence: Duration) {
        self.ended = Some(silence);
    }

    /// The ping was answered. `same` says that no NAT has given the flow another address meanwhile.
    pub(super) fn answered(&mut self, now: Instant, same: bool, timing: &Timing) {
        if self.void {
            *self = Self { target: self.target, ..Self::default() };
        }
        if !same {
            return self.missed(now, timing);
        }
        let Some(silence) = self.ended.take() else { return };
        if !within(self.failed, now, RECONSIDER) {
            self.most = LONGEST;
        }
        self.rest = self.rest.max((heartbeats(silence, timing) + 1).min(self.most));
    }

    /// The ping was not answered in time. Where as long a silence has been survived before, that is an accident.
    pub(super) fn missed(&mut self, now: Instant, timing: &Timing) {
        let Some(silence) = self.ended.take() else { return };
        if self.rest > 1 && heartbeats(silence, timing) >= self.rest {
            self.rest -= 1;
            self.most = self.rest;
            self.failed = Some(now);
        }
    }
}

/// How many heartbeats a silence is long; never more than [`LONGEST`].
fn heartbeats(silence: Duration, timing: &Timing) -> u8 {
    let count = (silence + SLACK).as_millis() / timing.heartbeat.as_millis().max(1);
    u8::try_from(count).unwrap_or(LONGEST).min(LONGEST)
}

impl Peer {
    /// How long the path in use may be silent, data or none.
    fn silence_allowed(&self, timing: &Timing) -> Duration {
        let known = self.ours && self.pulse.target.is_some() && self.pulse.target == self.best;
        timing.heartbeat * if known { self.pulse.rest.into() } else { 1 }
    }

    /// Between two pings of `target`, if that is the path in use.
    pub(super) fn interval(&self, now: Instant, target: Target, timing: &Timing) -> Duration {
        let silent = self.best == Some(target) && !within(self.sent, now, timing.heartbeat);
        if silent { self.silence_allowed(timing) } else { timing.heartbeat }
    }

    /// How long a pong proves the path in use.
    pub(super) fn trust(&self, timing: &Timing) -> Duration {
        timing.trust.saturating_sub(timing.heartbeat) + self.silence_allowed(timing)
    }

    /// For how long nothing that we know of has passed along `target`, if that is the path in use.
    pub(super) fn silence(&self, now: Instant, target: Target) -> Option<Duration> {
        let candidate = self.candidates.get(&target).filter(|_| self.best == Some(target))?;
        let last = [self.sent, candidate.proven, candidate.seen, candidate.pinged].into_iter().flatten().max()?;
        Some(now.saturating_duration_since(last))
    }

    /// When the next heartbeat has its turn, if that is not yet: the path has proven itself meanwhile.
    pub(super) fn not_before(&self, now: Instant, timing: &Timing) -> Option<Instant> {
        if !self.ours || within(self.sent, now, timing.heartbeat) {
            return None;
        }
        let candidate = self.candidates.get(&self.best?)?;
        let (rest, proven) = (self.silence_allowed(timing), candidate.proven?);
        // What the peer has sent ends a silence too. Both would otherwise disturb each other's for ever.
        let heard = candidate.seen.map_or(proven, |seen| seen.max(proven).min(proven + YIELD));
        Some(heard + rest).filter(|due| *due > now)
    }
}

impl Agent {
    /// There is data for `node`. If its path has been silent for longer than a heartbeat, asks whether it still works.
    pub(super) fn end_silence(&mut self, node: NodePublic) {
        let (now, timing) = (self.now, self.timing);
        let Some(peer) = self.peers.get(&node) else { return };
        let Some(candidate) = peer.best.and_then(|best| peer.candidates.get(&best)) else { return };
        let stale = !candidate.proven_within(now, timing.heartbeat) && !within(candidate.pinged, now, timing.heartbeat);
        if stale && peer.silence_allowed(&timing) > timing.heartbeat {
            self.check_best(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Lives through as many silences as the path allows, of which it survives those shorter than `lifetime`.
    fn live(pulse: &mut Pulse, now: &mut Instant, silences: usize, lifetime: Duration) -> Vec<u64> {
        let timing = Timing::default();
        let mut lived = Vec::new();
        for _ in 0..silences {
            let silence = timing.heartbeat * u32::from(pulse.rest);
            *now += silence;
            pulse.asked(silence);
            if silence < lifetime {
                pulse.answered(*now, true, &timing);
            } else {
                pulse.missed(*now, &timing);
            }
            lived.push(silence.as_secs());
        }
        lived
    }

    #[test]
    fn silences_grow_to_what_the_path_survives_and_stay_there() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let mut now = Instant::now();
        let [mut long, mut short, mut shortest] = [Pulse::default(); 3];
        assert_eq!(live(&mut long, &mut now, 10, SECOND * 30), [3, 6, 9, 12, 15, 18, 21, 24, 24, 24]);
        assert_eq!(live(&mut short, &mut now, 7, SECOND * 10), [3, 6, 9, 12, 9, 9, 9]);
        assert_eq!(live(&mut shortest, &mut now, 5, SECOND * 5), [3, 6, 3, 3, 3]);
    }

    #[test]
    fn after_ten_minutes_a_longer_silence_is_tried_once() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let mut now = Instant::now();
        let mut pulse = Pulse::default();
        live(&mut pulse, &mut now, 5, SECOND * 10);
        let lived = live(&mut pulse, &mut now, 75, SECOND * 10);
        assert_eq!(lived.iter().filter(|silence| **silence == 12).count(), 1, "{lived:?}");
        assert!(lived.iter().all(|silence| *silence >= 9));
    }

    #[test]
    fn a_mapping_that_was_made_anew_did_not_survive() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let mut now = Instant::now();
        let mut pulse = Pulse::default();
        live(&mut pulse, &mut now, 3, SECOND * 30);
        pulse.asked(SECOND * 12);
        pulse.answered(now, false, &Timing::default());
        assert_eq!((pulse.rest, pulse.most), (3, 3));
    }

    #[test]
    fn a_loss_after_less_than_was_survived_changes_nothing() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let mut now = Instant::now();
        let mut pulse = Pulse::default();
        live(&mut pulse, &mut now, 8, SECOND * 30);
        pulse.asked(SECOND * 20);
        pulse.missed(now, &Timing::default());
        assert_eq!(pulse.rest, 8);
    }

    #[test]
    fn after_a_change_of_network_the_next_answer_begins_anew() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let mut now = Instant::now();
        let mut pulse = Pulse::default();
        live(&mut pulse, &mut now, 5, SECOND * 30);
        pulse.forget();
        assert_eq!(pulse.rest, 6, "until then, the path is trusted as before");
        assert_eq!(live(&mut pulse, &mut now, 3, SECOND * 30), [18, 3, 6]);
    }

    #[test]
    fn another_path_is_learnt_anew() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let mut now = Instant::now();
        let target = |port: u16| Target { socket: crate::SocketId(0), remote: ([192, 0, 2, 1], port).into() };
        let mut pulse = Pulse::default();
        pulse.follow(Some(target(1)));
        live(&mut pulse, &mut now, 3, SECOND * 30);
        pulse.follow(None);
        pulse.follow(Some(target(1)));
        assert_eq!(pulse.rest, 4);
        pulse.follow(Some(target(2)));
        assert_eq!(pulse.rest, 1);
    }
}
