//! Sending: bursts, stages, lists for peers that are not ours.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::super::attempt::{Out, Phase, Role};
use super::super::message::{Guess, Step};
use super::super::pace::{self, BURST};
use super::super::ports::Walk;
use super::{ANSWER, Action, Guesser, PATIENCE_HARD, SETTLE, Timer};
use crate::behaviour::PortRange;

/// Between two lists of guesses: time for a peer far away to answer the first.
const LISTS: Duration = Duration::from_secs(2);
/// Ports of a peer that is not ours that are tried.
const CALLED: usize = 32;

impl Guesser {
    pub(super) fn send(&mut self, now: Instant) {
        let Some(attempt) = &mut self.active else { return };
        attempt.wait(Phase::Sending, attempt.end);
        self.timers.set(Timer::Phase, attempt.deadline);
        if attempt.queue.is_empty() { self.sent(now) } else { self.set_burst(now) }
    }

    pub(super) fn set_burst(&mut self, now: Instant) {
        // Not in this instant: a deadline that has been handled lies in the future.
        let at = self.pacer.next(now).max(now + Duration::from_micros(1));
        self.timers.set_if_absent(Timer::Burst, at);
    }

    pub(super) fn burst(&mut self, now: Instant) {
        let Some(attempt) = &mut self.active else { return };
        for out in attempt.queue.drain(..attempt.queue.len().min(BURST)) {
            attempt.sent += 1;
            self.actions.push_back(match out {
                Out::Ping(socket, remote) => Action::Ping(attempt.peer, socket, remote),
                Out::Ask(socket, server) => Action::Ask(socket, server, attempt.survey.ask(server, &mut self.rng)),
            });
        }
        let (over, sending) = (attempt.queue.is_empty(), attempt.phase == Phase::Sending);
        self.pacer.take(now);
        if !over {
            self.set_burst(now);
        }
        if sending {
            self.ask_for_more();
        }
        if sending && over {
            self.sent(now);
        }
    }

    /// Asks for the next stage early enough that its ports are open when this one's probes have left.
    pub(super) fn ask_for_more(&mut self) {
        const ROUND_TRIP: Duration = Duration::from_millis(300);
        let Some(attempt) = &mut self.active else { return };
        let next = attempt.stage + 1;
        if attempt.role != Role::Sprayer || attempt.is_last_stage() || attempt.told == Some(next) {
            return;
        }
        let stages = attempt.stages();
        let opened = stages[usize::from(next)].sockets - stages[usize::from(attempt.stage)].sockets;
        if pace::span(attempt.queue.len()) <= pace::span(opened) + ROUND_TRIP {
            attempt.told = Some(next);
            self.tell(Step::More { stage: next }, Guess::None);
        }
    }

    /// All probes have left.
    pub(super) fn sent(&mut self, now: Instant) {
        let Some(attempt) = &mut self.active else { return };
        match attempt.role {
            Role::Opener => {
                let (stage, guess) = (attempt.stage, attempt.guess.clone());
                let probes = attempt.stages()[usize::from(stage)].probes;
                self.tell(Step::Ready { stage }, guess);
                self.expect(now, pace::span(probes as usize) + ANSWER);
            }
            Role::Sprayer if !attempt.is_last_stage() => self.expect(now, ANSWER),
            Role::Lister => self.list(now),
            Role::Sprayer | Role::Sweeper | Role::Flooder | Role::Caller | Role::Asking => {
                attempt.wait(Phase::Settling, now + SETTLE);
                self.timers.set(Timer::Phase, attempt.deadline);
            }
        }
    }

    /// Our ports are open: lets a peer that is not ours try some.
    pub(super) fn list(&mut self, now: Instant) {
        let Some(attempt) = &mut self.active else { return };
        let Some(outside) = self.outside else { return self.fail(now, true) };
        let probes = attempt.stages()[usize::from(attempt.stage)].probes as usize;
        let ports: Vec<u16> = match &attempt.guess {
            Guess::Ports(ports) => ports.iter().copied().take(probes).collect(),
            Guess::Range(range) => {
                let walk = attempt.walk.get_or_insert_with(|| Walk::new(*range, &mut self.rng));
                walk.take(probes).collect()
            }
            Guess::None => Vec::new(),
        };
        let guesses = ports.into_iter().map(|port| SocketAddr::new(outside.ip(), port)).collect();
        self.actions.push_back(Action::Call(attempt.peer, guesses));
        self.expect(now, LISTS);
    }

    /// The peer may be hard and is not ours: tries ports near those that it has listed.
    pub(super) fn call(&mut self, now: Instant) {
        let Some(peer) = self.active.as_ref().map(|attempt| attempt.peer) else { return };
        // It makes the peer send to us, so that its NAT has a port for us.
        self.actions.push_back(Action::Call(peer, Vec::new()));
        let public = self.public_addresses(&peer);
        let Some(record) = self.records.get(&peer) else { return };
        let mut guesses: Vec<SocketAddr> = Vec::new();
        let mut add = |ip, port: u16| {
            let guess = SocketAddr::new(ip, port);
            if port >= PortRange::ALL.first && !guesses.contains(&guess) && guesses.len() < CALLED {
                guesses.push(guess);
            }
        };
        for address in &public {
            // A NAT that keeps ports gives the one that the peer's own host gave.
            record.facts.addresses.iter().for_each(|inside| add(address.ip(), inside.port()));
        }
        for address in &public {
            (1..=8).for_each(|ahead| add(address.ip(), address.port().wrapping_add(ahead)));
        }
        let Some(attempt) = &mut self.active else { return };
        guesses.into_iter().for_each(|guess| attempt.push(Out::Ping(None, guess)));
        // Time for the peer to hear of it and to send.
        attempt.wait(Phase::Peer, now + PATIENCE_HARD);
        self.timers.set(Timer::Phase, attempt.deadline);
    }
}
