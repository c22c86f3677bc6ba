//! Opening our ports, and what is known about them then.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::super::attempt::{Attempt, Out, Phase, Role};
use super::super::ladder::{self, MAX_SOCKETS, SWEEP};
use super::super::message::{Guess, MAX_LISTED, Step, Why};
use super::super::pace;
use super::super::ports::following;
use super::super::survey::{Survey, pairs};
use super::{ANSWER, Action, Block, Guesser, SURVEY, Timer};
use crate::behaviour::{Allocation, Mapping, PortRange};

/// For sockets from the driver.
const SOCKETS: Duration = Duration::from_secs(2);
/// Ports that are in use at most after a success, one a peer.
const MAX_PINNED: usize = 16;
/// Questions to STUN servers before two hard NATs with few ports go at each other.
const SURVEY_FLOWS: usize = 96;
/// The same where an earlier attempt has asked, to see whether the block is still the same one.
const LOOK_FLOWS: usize = 4;
/// Addresses of a peer that is not ours that each socket opens towards.
const TARGETS: usize = 2;

impl Guesser {
    /// How many sockets the stage needs.
    pub(super) fn needed(&self, attempt: &Attempt) -> usize {
        let width = ladder::width(&self.ours);
        match attempt.role {
            Role::Opener | Role::Lister => {
                let predictable = ladder::is_predictable(&self.ours);
                let stages = if predictable { &ladder::PREDICTED[..] } else { attempt.stages() };
                let stage = stages.get(usize::from(attempt.stage)).or(stages.last());
                stage.map_or(0, |stage| ladder::fitted(*stage, width).sockets)
            }
            Role::Sweeper => match (self.ours.allocation, self.ours.mapping) {
                (Some(Allocation::Preserving), _) => SWEEP / 2 * usize::from(attempt.stage + 1).min(4),
                (_, Some(Mapping::AddressAndPortDependent)) => 1 + usize::from(attempt.stage),
                _ => SWEEP * usize::from(attempt.stage + 1).min(2),
            },
            // A survey's questions spread over them; an address-dependent NAT needs them all.
            Role::Flooder => match self.ours.mapping {
                Some(Mapping::AddressDependent) => {
                    let half = usize::try_from(width / 2).unwrap_or(MAX_SOCKETS);
                    half.saturating_sub(SURVEY_FLOWS).clamp(1, MAX_SOCKETS)
                }
                _ => SURVEY_FLOWS.div_ceil(self.destinations().len().max(1)).clamp(4, 48),
            },
            Role::Sprayer => usize::from(ladder::is_easy_for_one(&self.ours)),
            Role::Asking | Role::Caller => 0,
        }
    }

    /// STUN servers that are different destinations for our NAT.
    fn destinations(&self) -> Vec<SocketAddr> {
        const ENOUGH: usize = 4;
        let mut chosen: Vec<SocketAddr> = Vec::new();
        for server in &self.servers {
            let known = |held: &SocketAddr| held.ip() == server.ip();
            if self.ours.mapping != Some(Mapping::AddressDependent) || !chosen.iter().any(known) {
                chosen.push(*server);
            }
        }
        chosen.truncate(ENOUGH);
        chosen
    }

    pub(super) fn open(&mut self, now: Instant) {
        let Some(attempt) = &self.active else { return };
        let missing = self.needed(attempt).saturating_sub(attempt.sockets.len());
        let room = MAX_SOCKETS.saturating_sub(self.open_sockets());
        if missing == 0 || (room == 0 && !attempt.sockets.is_empty()) {
            return self.begin_stage(now);
        }
        if room == 0 || self.pinned.len() >= MAX_PINNED {
            return self.end(Some(Why::Busy));
        }
        self.actions.push_back(Action::Open(missing.min(room)));
        if let Some(attempt) = &mut self.active {
            attempt.wait(Phase::Sockets, now + SOCKETS);
            self.timers.set(Timer::Phase, attempt.deadline);
        }
    }

    /// The sockets are there: asks what the NAT gives, where that matters.
    pub(super) fn begin_stage(&mut self, now: Instant) {
        let (servers, width) = (self.destinations(), ladder::width(&self.ours));
        let Some(attempt) = &mut self.active else { return };
        let ids: Vec<_> =
            attempt.sockets[attempt.used.min(attempt.sockets.len())..].iter().map(|extra| extra.id).collect();
        let flows = match (attempt.role, self.ours.allocation) {
            (_, Some(Allocation::Preserving)) => 0,
            (_, Some(Allocation::Sequential { .. })) => 3,
            (Role::Opener | Role::Lister, _) if attempt.stage == 0 => ids.len().min(ladder::asked(width) as usize),
            (Role::Flooder, _) => match (self.reuses, self.block) {
                (Some(false), Some(_)) => LOOK_FLOWS,
                (Some(false), None) => 16,
                _ => SURVEY_FLOWS.min(usize::try_from(width / 4).unwrap_or(SURVEY_FLOWS)),
            },
            (Role::Asking | Role::Opener | Role::Lister | Role::Sweeper | Role::Sprayer | Role::Caller, _) => 0,
        };
        attempt.survey = Survey::default();
        let questions: Vec<_> =
            if flows <= ids.len() && !matches!(self.ours.allocation, Some(Allocation::Sequential { .. })) {
                // One each: no port is used twice for nothing.
                ids.iter().zip(servers.iter().cycle()).map(|(id, server)| (*id, *server)).take(flows).collect()
            } else {
                pairs(&ids, &servers, flows).collect()
            };
        if questions.is_empty() {
            return self.surveyed(now);
        }
        questions.into_iter().for_each(|(id, server)| attempt.push(Out::Ask(id, server)));
        attempt.wait(Phase::Survey, now + pace::span(attempt.queue.len()) + SURVEY);
        self.timers.set(Timer::Phase, attempt.deadline);
        self.set_burst(now);
    }

    /// Towards the peer, our NAT gives a socket one port, which we know: takes it, and tells.
    fn take_port(&mut self, now: Instant) {
        let Some(attempt) = &mut self.active else { return };
        let (Some(target), Some(outside), Some(extra)) =
            (attempt.target, self.outside, attempt.sockets.first().copied())
        else {
            return self.fail(now, true);
        };
        let Guess::Ports(ports) = &attempt.guess else { return self.fail(now, true) };
        let Some(port) = ports.first().copied() else { return self.fail(now, true) };
        attempt.used = attempt.sockets.len();
        attempt.from = Some(extra.id);
        attempt.sent += 1;
        self.actions.push_back(Action::Ping(attempt.peer, attempt.from, target));
        let (peer, id) = (attempt.peer, attempt.id);
        let mut punch = self.punch(id, Step::Accept, Guess::None);
        punch.outside = Some(SocketAddr::new(outside.ip(), port));
        self.actions.push_back(Action::Tell(peer, punch));
        self.expect(now, ANSWER + SURVEY);
    }

    /// What the NAT gives is known as well as it will be.
    pub(super) fn surveyed(&mut self, now: Instant) {
        let Some(attempt) = &mut self.active else { return };
        attempt.queue.clear();
        if let Some(outside) = attempt.survey.outside().filter(|_| self.outside.is_none()) {
            self.outside = Some(outside);
        }
        if attempt.survey.reuses() {
            self.reuses = Some(true);
        } else if attempt.role == Role::Flooder && attempt.sent as usize >= SURVEY_FLOWS {
            self.reuses = Some(false);
        }
        let fresh = &attempt.sockets[attempt.used.min(attempt.sockets.len())..];
        if self.reuses == Some(false) {
            let survey = &attempt.survey;
            let measured = survey.range(0).zip(survey.range(1)).map(|(seen, likely)| Block { seen, likely });
            self.block = measured.or(self.block.filter(|block| survey.confirms(&block.likely)));
        }
        let block = self.block.map(|block| block.likely);
        let estimate = |gaps| block.filter(|_| gaps == 1).or(attempt.survey.range(gaps));
        let known = self.ours.ports.unwrap_or(PortRange::ALL);
        let guess = match self.ours.allocation {
            Some(Allocation::Preserving) => {
                Guess::Ports(fresh.iter().map(|extra| extra.port).take(MAX_LISTED).collect())
            }
            Some(Allocation::Sequential { stride }) => {
                let last = attempt.survey.furthest(stride).or(self.outside.map(|outside| outside.port()));
                let count = if matches!(attempt.role, Role::Opener | Role::Lister) { 64 } else { MAX_LISTED };
                last.map_or(Guess::None, |last| {
                    Guess::Ports(following(last, stride, u16::try_from(count).unwrap_or(u16::MAX)))
                })
            }
            Some(Allocation::Block | Allocation::Random) | None => match (attempt.role, &attempt.guess) {
                (Role::Opener | Role::Lister, Guess::Range(range)) => Guess::Range(*range),
                (Role::Opener | Role::Lister, _) => Guess::Range(estimate(6).unwrap_or(known)),
                _ => Guess::Range(estimate(1).unwrap_or(known)),
            },
        };
        if guess == Guess::None {
            return self.fail(now, true);
        }
        attempt.guess = guess;
        match attempt.role {
            Role::Opener => {
                let targets: Vec<_> = attempt.target.into_iter().collect();
                attempt.open_ports(&targets);
                self.send(now);
            }
            Role::Lister => {
                let targets: Vec<_> = self
                    .active
                    .as_ref()
                    .map(|attempt| attempt.peer)
                    .map_or_else(Vec::new, |peer| self.public_addresses(&peer).into_iter().take(TARGETS).collect());
                if let Some(attempt) = &mut self.active {
                    attempt.open_ports(&targets);
                }
                self.send(now);
            }
            Role::Sweeper | Role::Flooder => {
                let (stage, guess) = (attempt.stage, attempt.guess.clone());
                attempt.told = Some(stage);
                self.tell(Step::Ready { stage }, guess);
                self.meet(now);
            }
            Role::Sprayer => self.take_port(now),
            Role::Asking | Role::Caller => {}
        }
    }
}
