//! What the peer says once both take part.

use std::net::SocketAddr;
use std::time::Instant;

use super::super::attempt::{Out, Phase, Role};
use super::super::ladder::{self, Hopeless, MAX_FLOWS, MAX_PROBES, ORDINARY, SWEEP, Side};
use super::super::message::{Guess, Punch, Why};
use super::super::ports::Walk;
use super::{ANSWER, Guesser, PROOF, SURVEY, Timer};
use crate::behaviour::{Allocation, Behaviour, Mapping};

impl Guesser {
    pub(super) fn on_ready(&mut self, now: Instant, stage: u8, punch: Punch) {
        let Some(attempt) = &mut self.active else { return };
        if attempt.role == Role::Asking {
            // The word before it was lost, or overtaken.
            self.on_accept(now, &punch);
        }
        let Some(attempt) = &mut self.active else { return };
        if punch.outside.is_some() {
            attempt.target = punch.outside;
        }
        if attempt.ready.as_ref().is_some_and(|(known, _)| *known >= stage) {
            return;
        }
        attempt.ready = Some((stage, punch.guess));
        match attempt.role {
            Role::Sprayer => self.spray(now, stage),
            Role::Sweeper | Role::Flooder => self.meet(now),
            Role::Asking | Role::Opener | Role::Lister | Role::Caller => {}
        }
    }

    /// Tries the ports that the peer has opened.
    pub(super) fn spray(&mut self, now: Instant, stage: u8) {
        let Some(attempt) = &mut self.active else { return };
        let (Some(target), Some((_, guess))) = (attempt.target, attempt.ready.clone()) else { return };
        attempt.stage = stage;
        let Some(limits) = attempt.stages().get(usize::from(stage)).copied() else { return };
        let ports: Vec<u16> = match guess {
            Guess::Ports(ports) => ports.into_iter().take(limits.probes as usize).collect(),
            Guess::Range(range) => {
                let probes = ladder::fitted(limits, range.len()).probes as usize;
                if attempt.walk.as_ref().is_none_or(|walk| walk.range() != range || walk.clone().next().is_none()) {
                    attempt.walk = None;
                }
                attempt.walk.get_or_insert_with(|| Walk::new(range, &mut self.rng)).take(probes).collect()
            }
            Guess::None => Vec::new(),
        };
        for port in ports {
            attempt.push(Out::Ping(attempt.from, SocketAddr::new(target.ip(), port)));
        }
        self.send(now);
    }

    /// Begins once both have said that they are ready.
    pub(super) fn meet(&mut self, now: Instant) {
        let Some(attempt) = &mut self.active else { return };
        let theirs = match &attempt.ready {
            Some((stage, guess)) if attempt.told == Some(attempt.stage) && *stage == attempt.stage => guess.clone(),
            _ if attempt.told == Some(attempt.stage) => return self.expect(now, ANSWER + SURVEY),
            _ => return,
        };
        let Some(target) = attempt.target else { return self.fail(now, true) };
        if attempt.role == Role::Sweeper {
            let Guess::Ports(ports) = theirs else { return self.fail(now, true) };
            let in_order = |behaviour: &Behaviour| matches!(behaviour.allocation, Some(Allocation::Sequential { .. }));
            let drifts = in_order(&self.ours) || in_order(&attempt.theirs);
            let slope = if drifts && !attempt.proposer { 2 } else { 1 };
            let flows = match self.ours.allocation {
                Some(Allocation::Preserving) => attempt.sockets.len() - attempt.used,
                _ => SWEEP,
            };
            attempt.sweep(target.ip(), &ports, flows, slope);
            return self.send(now);
        }
        let (ours, theirs_width) = (
            self.side(),
            match &theirs {
                Guess::Range(range) => range.len(),
                Guess::Ports(ports) => u32::try_from(ports.len()).unwrap_or(1),
                Guess::None => 0,
            },
        );
        let bearable = self.bearable();
        let Some(attempt) = &mut self.active else { return };
        let them = Side { width: theirs_width.max(1), ..Side::of(&attempt.theirs) };
        if let Err(hopeless) = ours.is_worth_going_on(&them) {
            return self.give_up(now, hopeless);
        }
        let ports: Vec<u16> = match theirs {
            Guess::Range(range) => Walk::new(range, &mut self.rng).collect(),
            Guess::Ports(ports) => ports,
            Guess::None => Vec::new(),
        };
        let per_address = self.ours.mapping == Some(Mapping::AddressDependent);
        if ours.any_port_of(&them) > ours.expected_pairs(&them) {
            let most = if per_address { MAX_PROBES } else { ours.flows.max(bearable.saturating_sub(attempt.sent)) };
            attempt.scatter(target.ip(), &ports, most as usize);
        } else {
            attempt.flood(target.ip(), &ports, ours.flows as usize, per_address);
        }
        self.send(now);
    }

    /// What our side can do in a flood, now that it has been measured.
    pub(super) fn side(&self) -> Side {
        let Some(attempt) = &self.active else { return Side::of(&self.ours) };
        let mut side = Side::of(&self.ours);
        match &attempt.guess {
            Guess::Range(range) => side.width = range.len(),
            Guess::Ports(ports) => side.width = u32::try_from(ports.len()).unwrap_or(1),
            Guess::None => {}
        }
        if self.ours.mapping == Some(Mapping::AddressDependent) {
            side.flows = MAX_PROBES - attempt.sent;
        } else {
            side.flows = self.bearable().saturating_sub(attempt.sent);
            if let Guess::Ports(ports) = &attempt.guess {
                side.flows = side.flows.min(u32::try_from(ports.len()).unwrap_or(1));
            }
        }
        side
    }

    /// How many flows our NAT may remember for an attempt.
    fn bearable(&self) -> u32 {
        let Some(attempt) = &self.active else { return 0 };
        // Where every flow takes a port of its own, the others of this subscriber need some too.
        let most = match (&attempt.guess, self.reuses) {
            // Certainly not more than it has: what was seen of it, without what is estimated.
            (Guess::Range(range), Some(false) | None) => {
                let seen = self.block.map(|block| block.seen).or(attempt.survey.range(0));
                seen.unwrap_or(*range).len() / 2
            }
            _ => MAX_FLOWS,
        };
        most.min(MAX_FLOWS).saturating_sub(ORDINARY)
    }

    pub(super) fn on_more(&mut self, now: Instant, stage: u8) {
        let Some(attempt) = &mut self.active else { return };
        if attempt.role == Role::Opener && stage == attempt.stage + 1 && usize::from(stage) < attempt.stages().len() {
            attempt.stage = stage;
            self.open(now);
        }
    }

    pub(super) fn on_stop(&mut self, now: Instant, why: Why, punch: &Punch) {
        let Some(attempt) = &mut self.active else { return };
        match why {
            Why::Hit => {
                // The peer has a path. What came through to us is being proven.
                attempt.queue.clear();
                attempt.wait(Phase::Settling, now + PROOF);
                attempt.done_there = true;
                self.timers.clear(Timer::Burst);
                self.timers.set(Timer::Phase, attempt.deadline);
            }
            Why::Failed => self.fail(now, false),
            Why::Busy => {
                let peer = attempt.peer;
                self.end(None);
                self.busy(now, peer);
            }
            Why::Refused => match ladder::plan(&self.ours, &punch.behaviour) {
                Some(Err(hopeless)) => self.give_up(now, hopeless),
                Some(Ok(_)) | None => self.give_up(now, Hopeless::Refused),
            },
        }
    }
}
