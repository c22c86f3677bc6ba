//! Who is tried, when, and in which role.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;
use rand::RngExt;

use super::super::attempt::{Attempt, Phase, Role};
use super::super::ladder::{self, Plan};
use super::super::message::{Guess, Punch, Step, Why};
use super::super::pace;
use super::{ANSWER, Action, Guesser, Outcome, PATIENCE_EASY, Timer, WANTED};

/// Between two looks whether the attempt under way has ended.
const ANOTHER: Duration = Duration::from_secs(4);

impl Guesser {
    pub(super) fn due(&mut self, now: Instant, peer: NodePublic) {
        let Some(record) = self.records.get(&peer) else { return };
        let wanted = record.wanted.is_some_and(|(last, _)| now.saturating_duration_since(last) < WANTED);
        if !self.enabled || !wanted {
            return;
        }
        if let Some(not_before) = record.not_before.filter(|at| *at > now) {
            return self.timers.set(Timer::Due(peer), not_before);
        }
        if self.active.is_some() {
            return self.timers.set(Timer::Due(peer), now + pace::jittered(ANOTHER, &mut self.rng));
        }
        let Some(easy) = self.ours.is_easy() else {
            // The first measurement is still under way.
            return self.timers.set(Timer::Due(peer), now + PATIENCE_EASY);
        };
        let id = self.rng.random();
        if record.facts.ours {
            let mut attempt = Attempt::new(now, peer, id, Role::Asking);
            attempt.proposer = true;
            attempt.wait(Phase::Answer, now + ANSWER);
            self.start(attempt);
            self.tell(Step::Propose, Guess::None);
        } else {
            let targets = self.public_addresses(&peer);
            if targets.is_empty() {
                return self.postpone(now, peer, pace::back_off(1));
            }
            let mut attempt = Attempt::new(now, peer, id, if easy { Role::Caller } else { Role::Lister });
            attempt.target = targets.first().copied();
            self.start(attempt);
            if easy { self.call(now) } else { self.open(now) }
        }
    }

    pub(super) fn start(&mut self, attempt: Attempt) {
        self.timers.set(Timer::Phase, attempt.deadline);
        let peer = attempt.peer;
        self.active = Some(attempt);
        self.note(peer, Outcome::Trying);
    }

    /// The peer's addresses that may be those of its NAT.
    pub(super) fn public_addresses(&self, peer: &NodePublic) -> Vec<SocketAddr> {
        let public = |address: &&SocketAddr| match address {
            SocketAddr::V4(v4) => !v4.ip().is_private() && !v4.ip().is_loopback() && !v4.ip().is_link_local(),
            SocketAddr::V6(_) => false,
        };
        self.records
            .get(peer)
            .map_or_else(Vec::new, |record| record.facts.addresses.iter().filter(public).copied().collect())
    }

    pub(super) fn on_proposal(&mut self, now: Instant, peer: NodePublic, punch: &Punch) {
        let refuse = |guesser: &mut Self, why| {
            let punch = guesser.punch(punch.attempt, Step::Stop(why), Guess::None);
            guesser.actions.push_back(Action::Tell(peer, punch));
        };
        if !self.enabled {
            return refuse(self, Why::Refused);
        }
        if let Some(attempt) = &self.active {
            let asking = attempt.role == Role::Asking && attempt.peer == peer;
            if attempt.peer == peer && attempt.id == punch.attempt {
                return;
            }
            // If both have proposed, the smaller number stands; who chose it ignores the other.
            if !asking {
                return refuse(self, Why::Busy);
            }
            if attempt.id < punch.attempt {
                return;
            }
            self.active = None;
            self.timers.clear(Timer::Phase);
        }
        let record = self.records.entry(peer).or_default();
        // Both count the same failures; whoever asks has waited a little longer.
        if record.not_before.is_some_and(|at| at > now + Duration::from_secs(5)) {
            return refuse(self, Why::Busy);
        }
        match ladder::plan(&self.ours, &punch.behaviour) {
            Some(Ok(plan)) if plan != Plan::Nothing => {
                let mut attempt = Attempt::new(now, peer, punch.attempt, Role::Asking);
                attempt.theirs = punch.behaviour;
                attempt.target = punch.outside;
                self.start(attempt);
                self.tell(Step::Accept, Guess::None);
                self.go(now, plan);
            }
            Some(Ok(_)) => refuse(self, Why::Refused),
            Some(Err(hopeless)) => {
                refuse(self, Why::Refused);
                self.hopeless(now, peer, hopeless);
            }
            None => refuse(self, Why::Busy),
        }
    }

    pub(super) fn on_accept(&mut self, now: Instant, punch: &Punch) {
        let Some(attempt) = &mut self.active else { return };
        attempt.theirs = punch.behaviour;
        attempt.target = punch.outside;
        if attempt.role == Role::Opener && attempt.phase == Phase::Peer && attempt.sockets.is_empty() {
            // Now the peer's port is a known one.
            return self.open(now);
        }
        if attempt.role != Role::Asking {
            return;
        }
        match ladder::plan(&self.ours, &punch.behaviour) {
            Some(Ok(plan)) if plan != Plan::Nothing => self.go(now, plan),
            Some(Ok(_)) | None => self.end(Some(Why::Refused)),
            Some(Err(hopeless)) => self.give_up(now, hopeless),
        }
    }

    /// Takes our part.
    pub(super) fn go(&mut self, now: Instant, plan: Plan) {
        let Some(attempt) = &mut self.active else { return };
        if attempt.target.is_none() {
            return self.end(Some(Why::Refused));
        }
        attempt.role = match plan {
            Plan::Open => Role::Opener,
            Plan::Sweep => Role::Sweeper,
            Plan::Flood => Role::Flooder,
            Plan::Spray | Plan::Nothing => Role::Sprayer,
        };
        match attempt.role {
            Role::Sprayer if self.ours.is_easy() == Some(true) => self.expect(now, ANSWER),
            Role::Opener if attempt.theirs.is_easy() != Some(true) => self.expect(now, ANSWER),
            Role::Asking
            | Role::Opener
            | Role::Sprayer
            | Role::Sweeper
            | Role::Flooder
            | Role::Lister
            | Role::Caller => self.open(now),
        }
    }

    /// Waits for the peer.
    pub(super) fn expect(&mut self, now: Instant, patience: Duration) {
        if let Some(attempt) = &mut self.active {
            attempt.wait(Phase::Peer, now + patience);
            self.timers.set(Timer::Phase, attempt.deadline);
        }
    }
}
