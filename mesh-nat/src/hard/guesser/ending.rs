//! How attempts end, and what is remembered.

use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;

use super::super::attempt::{Phase, Role};
use super::super::ladder::{Hopeless, SWEEPS};
use super::super::message::{Guess, Punch, Step, Why};
use super::super::pace;
use super::{Action, Guesser, Outcome, SETTLE, Timer};
use crate::path::SocketId;

impl Guesser {
    pub(super) fn phase_over(&mut self, now: Instant) {
        let Some(attempt) = &mut self.active else { return };
        if attempt.heard.take().is_some() && now < attempt.end && !attempt.done_there {
            // It came to nothing.
            self.timers.set(Timer::Phase, attempt.deadline.max(now + SETTLE));
            if !attempt.queue.is_empty() {
                self.set_burst(now);
            }
            return;
        }
        match (attempt.phase, attempt.role) {
            _ if now >= attempt.end => self.fail(now, true),
            (Phase::Answer, _) => {
                let peer = attempt.peer;
                self.end(None);
                self.busy(now, peer);
            }
            (Phase::Survey, _) => self.surveyed(now),
            (Phase::Peer, Role::Caller) => self.send(now),
            (Phase::Peer, Role::Lister) if !attempt.is_last_stage() => {
                attempt.stage += 1;
                self.open(now);
            }
            (Phase::Settling, Role::Sweeper) if attempt.stage + 1 < SWEEPS && !attempt.done_there => {
                attempt.stage += 1;
                self.open(now);
            }
            (Phase::Sockets | Phase::Sending | Phase::Peer | Phase::Settling, _) => self.fail(now, true),
        }
    }

    /// It led to nothing. `tell` if the peer does not know.
    pub(super) fn fail(&mut self, now: Instant, tell: bool) {
        let Some(attempt) = &self.active else { return };
        let peer = attempt.peer;
        self.end(tell.then_some(Why::Failed));
        let Some(record) = self.records.get_mut(&peer) else { return };
        record.failures = record.failures.saturating_add(1);
        record.busy = 0;
        let (failures, wait) = (record.failures, pace::back_off(record.failures));
        self.note(peer, Outcome::Failed(failures));
        self.postpone(now, peer, wait);
    }

    pub(super) fn give_up(&mut self, now: Instant, hopeless: Hopeless) {
        let Some(peer) = self.active.as_ref().map(|attempt| attempt.peer) else { return };
        self.end((hopeless != Hopeless::Refused).then_some(Why::Refused));
        self.hopeless(now, peer, hopeless);
    }

    pub(super) fn hopeless(&mut self, now: Instant, peer: NodePublic, hopeless: Hopeless) {
        self.note(peer, Outcome::Hopeless(hopeless));
        // One of the two may have moved by then.
        self.postpone(now, peer, pace::back_off(4));
    }

    /// The peer has no time, or does not answer.
    pub(super) fn busy(&mut self, now: Instant, peer: NodePublic) {
        const FIRST: Duration = Duration::from_secs(5);
        let Some(record) = self.records.get_mut(&peer) else { return };
        let wait = FIRST * 2u32.pow(record.busy.min(6));
        record.busy += 1;
        record.outcome = None;
        self.postpone(now, peer, wait);
    }

    pub(super) fn postpone(&mut self, now: Instant, peer: NodePublic, wait: Duration) {
        let wait = pace::jittered(wait, &mut self.rng);
        if let Some(record) = self.records.get_mut(&peer) {
            record.not_before = Some(now + wait);
        }
        self.timers.clear(Timer::Due(peer));
    }

    pub(super) fn succeed(&mut self, socket: SocketId) {
        let Some(attempt) = &mut self.active else { return };
        let peer = attempt.peer;
        if let Some(at) = attempt.sockets.iter().position(|extra| extra.id == socket) {
            attempt.sockets.remove(at);
            self.pinned.insert(socket, peer);
        }
        let others = matches!(attempt.role, Role::Lister | Role::Caller);
        self.end((!others).then_some(Why::Hit));
        if let Some(record) = self.records.get_mut(&peer) {
            (record.failures, record.busy, record.not_before) = (0, 0, None);
        }
        self.note(peer, Outcome::Direct);
    }

    pub(super) fn abandon(&mut self, why: Option<Why>) {
        if let Some(peer) = self.active.as_ref().map(|attempt| attempt.peer) {
            self.end(why);
            if let Some(record) = self.records.get_mut(&peer) {
                record.outcome = None;
            }
        }
    }

    /// Releases everything that the attempt holds.
    pub(super) fn end(&mut self, why: Option<Why>) {
        let Some(attempt) = &self.active else { return };
        let others = matches!(attempt.role, Role::Lister | Role::Caller);
        if let Some(why) = why.filter(|_| !others) {
            self.tell(Step::Stop(why), Guess::None);
        }
        let Some(attempt) = self.active.take() else { return };
        self.actions.extend(attempt.sockets.iter().map(|extra| Action::Close(extra.id)));
        if attempt.role == Role::Lister {
            // Else the peer would try our guesses again and again.
            self.actions.push_back(Action::Call(attempt.peer, Vec::new()));
        }
        self.timers.clear(Timer::Phase);
        self.timers.clear(Timer::Burst);
    }

    pub(super) fn unpin(&mut self, id: SocketId) {
        if self.pinned.remove(&id).is_some() {
            self.timers.clear(Timer::Unused(id));
            self.actions.push_back(Action::Close(id));
        }
    }

    pub(super) fn note(&mut self, peer: NodePublic, outcome: Outcome) {
        let record = self.records.entry(peer).or_default();
        if record.outcome != Some(outcome) {
            record.outcome = Some(outcome);
            self.actions.push_back(Action::Tried(peer, outcome));
        }
    }

    pub(super) fn tell(&mut self, step: Step, guess: Guess) {
        let Some(attempt) = &self.active else { return };
        let (peer, id) = (attempt.peer, attempt.id);
        let punch = self.punch(id, step, guess);
        self.actions.push_back(Action::Tell(peer, punch));
    }

    pub(super) fn punch(&self, attempt: u32, step: Step, guess: Guess) -> Punch {
        Punch { attempt, step, behaviour: self.ours, outside: self.outside, guess }
    }
}
