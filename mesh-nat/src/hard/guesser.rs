//! All attempts of one node, one at a time.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::attempt::{Attempt, Extra, Phase, Role};
use super::ladder::Hopeless;
use super::message::{Punch, Step, Why};
use super::pace::Pacer;
use crate::behaviour::{Behaviour, PortRange};
use crate::path::SocketId;
use crate::stun::message::StunError;
use crate::timer::TimerTable;

/// How long a peer stays wanted after a search in vain: searches are repeated more often than that.
const WANTED: Duration = Duration::from_secs(15);
/// Before a hard node proposes to a peer of ours: the ordinary search needs so long to succeed where it can.
const PATIENCE_HARD: Duration = Duration::from_millis(400);
/// The same for an easy node, whose peer may propose first.
const PATIENCE_EASY: Duration = Duration::from_millis(1500);
/// Before we list guesses to a peer that is not ours, or try some of its ports: its own searches take so long.
const PATIENCE_OTHERS: Duration = Duration::from_secs(6);
/// For an answer through the relay.
const ANSWER: Duration = Duration::from_secs(3);
/// For a STUN server, after the last question.
const SURVEY: Duration = Duration::from_millis(700);
/// For a hit after the last probe.
const SETTLE: Duration = Duration::from_secs(2);
/// For the proof after a hit.
const PROOF: Duration = Duration::from_secs(2);
/// A socket whose path is no longer used is kept for as long.
const UNUSED: Duration = Duration::from_secs(60);
/// How many of them tell the range well enough.
const RANGE_FLOWS: usize = 24;

mod ending;
mod meeting;
mod opening;
mod sending;
mod starting;

/// What is known about a peer besides its key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PeerFacts {
    /// Whether it is one of ours, so that it understands [`Punch`].
    pub ours: bool,
    /// Its IPv4 addresses, as control and the peer itself list them.
    pub addresses: Vec<SocketAddr>,
}

/// What the caller should do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Send the message through the peer's relay.
    Tell(NodePublic, Punch),
    /// Ping the peer from a socket, or from the ordinary one.
    Ping(NodePublic, Option<SocketId>, SocketAddr),
    /// Send a STUN request, whose answer goes to [`Guesser::handle_stun`].
    Ask(SocketId, SocketAddr, Vec<u8>),
    /// Open so many IPv4 sockets more, and call [`Guesser::sockets_opened`].
    Open(usize),
    /// Close a socket that was opened.
    Close(SocketId),
    /// Send a call-me-maybe with our addresses and these.
    Call(NodePublic, Vec<SocketAddr>),
    /// Nothing: what is known about a peer has changed.
    Tried(NodePublic, Outcome),
}

/// How it stands with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// An attempt is under way.
    Trying,
    /// It led to a direct path.
    Direct,
    /// It led to nothing; so many in a row did.
    Failed(u32),
    /// None is made.
    Hopeless(Hopeless),
}

#[derive(Debug, Default)]
struct Record {
    facts: PeerFacts,
    /// When a search was last made in vain, and since when.
    wanted: Option<(Instant, Instant)>,
    failures: u32,
    busy: u32,
    not_before: Option<Instant>,
    outcome: Option<Outcome>,
}

impl Record {
    /// The ordinary search has found the peer before anything was tried, as it does with most.
    fn says_nothing(&self) -> bool {
        (self.failures, self.busy, self.not_before, self.outcome) == (0, 0, None, None)
    }
}

/// A block of ports that was measured once and is only looked at later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    /// Ports certainly belong to it.
    seen: PortRange,
    /// They may come from here.
    likely: PortRange,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// A peer's turn may have come.
    Due(NodePublic),
    /// The attempt's phase ends.
    Phase,
    /// The next burst leaves.
    Burst,
    /// A winner may be closed.
    Unused(SocketId),
}

/// Guesses ports for one node. Follows the crate's drain rule.
pub struct Guesser {
    rng: StdRng,
    enabled: bool,
    ours: Behaviour,
    outside: Option<SocketAddr>,
    servers: Vec<SocketAddr>,
    /// What surveys have shown: whether ports are shared by flows.
    reuses: Option<bool>,
    /// Where they are not: from which ports they come, as seen by the longest survey.
    block: Option<Block>,
    records: BTreeMap<NodePublic, Record>,
    active: Option<Attempt>,
    pinned: BTreeMap<SocketId, NodePublic>,
    pacer: Pacer,
    timers: TimerTable<Timer>,
    actions: VecDeque<Action>,
}

impl std::fmt::Debug for Guesser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guesser").field("enabled", &self.enabled).field("active", &self.active).finish_non_exhaustive()
    }
}

impl Guesser {
    /// One that knows nothing yet. All its random numbers come from `seed`.
    #[must_use]
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            rng: StdRng::from_seed(seed),
            enabled: true,
            ours: Behaviour::default(),
            outside: None,
            servers: Vec::new(),
            reuses: None,
            block: None,
            records: BTreeMap::new(),
            active: None,
            pinned: BTreeMap::new(),
            pacer: Pacer::default(),
            timers: TimerTable::new(),
            actions: VecDeque::new(),
        }
    }

    // Commands

    /// Switches it on or off; it is on at first. Off, what peers propose is refused.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
        if !enabled {
            self.abandon(Some(Why::Refused));
        }
    }

    /// How our own NATs behave towards IPv4, and where our ordinary socket is seen. Behind the same address, what is not
    /// known this time stays as it was known before. A change forgets earlier failures.
    pub fn set_ours(&mut self, behaviour: Behaviour, outside: Option<SocketAddr>) {
        let (mut now, before) = (behaviour.presumed(), self.ours);
        let moved = self.outside.map(|address| address.ip()) != outside.map(|address| address.ip());
        if !moved {
            if now.mapping.is_none() && now.is_easy().is_none_or(|easy| before.is_easy() == Some(easy)) {
                (now.mapping, now.varies) = (before.mapping, before.varies);
            }
            if now.allocation.is_none() {
                (now.allocation, now.ports) = (before.allocation, before.ports);
            }
            now.filtering = now.filtering.or(before.filtering);
        }
        // `now` knows all that `before` did.
        let contradicted = before.is_easy().is_some_and(|easy| now.is_easy() != Some(easy))
            || before.mapping.is_some_and(|mapping| now.mapping != Some(mapping))
            || before.allocation.is_some_and(|allocation| now.allocation != Some(allocation));
        let learnt = before.is_easy().is_none() && now.is_easy().is_some()
            || before.allocation.is_none() && now.allocation.is_some();
        (self.ours, self.outside) = (now, outside);
        if moved || contradicted {
            self.forget();
        } else if learnt {
            self.reconsider();
        }
    }

    /// STUN servers, nearest first; those with IPv6 addresses are left out, and all beyond the first eight.
    pub fn set_servers(&mut self, servers: &[SocketAddr]) {
        self.servers = servers.iter().filter(|server| server.is_ipv4()).take(8).copied().collect();
    }

    /// The network below has changed: gives the attempt up and forgets earlier failures. Winners stay until they are unused.
    pub fn forget(&mut self) {
        self.abandon(Some(Why::Busy));
        (self.reuses, self.block) = (None, None);
        for record in self.records.values_mut() {
            (record.failures, record.busy, record.not_before, record.outcome) = (0, 0, None, None);
        }
    }

    /// More is known: what was put off for want of knowledge need not wait. The attempt under way goes on.
    fn reconsider(&mut self) {
        let trying = self.active.as_ref().map(|attempt| attempt.peer);
        for (peer, record) in &mut self.records {
            if record.failures == 0 && Some(*peer) != trying {
                (record.busy, record.not_before, record.outcome) = (0, None, None);
            }
        }
    }

    /// The ordinary search for a way to `peer` has found none so far.
    pub fn want(&mut self, now: Instant, peer: NodePublic, facts: PeerFacts) {
        if !self.enabled {
            return;
        }
        let record = self.records.entry(peer).or_default();
        let since = match record.wanted {
            Some((last, since)) if now.saturating_duration_since(last) < WANTED => since,
            _ => now,
        };
        record.wanted = Some((now, since));
        record.facts = facts;
        let patience = match (record.facts.ours, self.ours.is_easy()) {
            (true, Some(false)) => PATIENCE_HARD,
            (true, Some(true) | None) => PATIENCE_EASY,
            (false, _) => PATIENCE_OTHERS,
        };
        let due = (since + patience).max(record.not_before.unwrap_or(since));
        self.timers.set_if_absent(Timer::Due(peer), due);
    }

    /// A peer is gone.
    pub fn remove_peer(&mut self, peer: &NodePublic) {
        if self.active.as_ref().is_some_and(|attempt| attempt.peer == *peer) {
            self.abandon(None);
        }
        self.records.remove(peer);
        self.timers.clear(Timer::Due(*peer));
        let unused: Vec<_> = self.pinned.iter().filter(|(_, owner)| *owner == peer).map(|(id, _)| *id).collect();
        unused.into_iter().for_each(|id| self.unpin(id));
    }

    // Inputs

    /// The driver has opened sockets, fewer than asked for if the system did not want more.
    pub fn sockets_opened(&mut self, now: Instant, opened: Vec<Extra>) {
        match &mut self.active {
            Some(attempt) if attempt.phase == Phase::Sockets => {
                attempt.sockets.extend(opened);
                if attempt.sockets.is_empty() {
                    return self.fail(now, true);
                }
                self.begin_stage(now);
            }
            Some(_) | None => self.actions.extend(opened.into_iter().map(|extra| Action::Close(extra.id))),
        }
    }

    /// Takes a STUN answer that came to an extra socket.
    ///
    /// # Errors
    /// Says why it is of no use.
    pub fn handle_stun(&mut self, now: Instant, datagram: &[u8]) -> Result<(), StunError> {
        let attempt = self.active.as_mut().ok_or(StunError::UnknownTransaction)?;
        attempt.survey.handle_datagram(datagram)?;
        let done = attempt.queue.is_empty() && attempt.survey.is_answered();
        // Then a flood knows all that it wanted to know.
        let enough =
            attempt.role == Role::Flooder && attempt.survey.reuses() && attempt.survey.answers() >= RANGE_FLOWS;
        if attempt.phase == Phase::Survey && (done || enough) {
            self.surveyed(now);
        }
        Ok(())
    }

    /// Takes what a peer says.
    pub fn handle_message(&mut self, now: Instant, peer: NodePublic, punch: Punch) {
        let current = self.active.as_ref().is_some_and(|attempt| attempt.peer == peer && attempt.id == punch.attempt);
        match punch.step {
            Step::Propose => self.on_proposal(now, peer, &punch),
            Step::Accept if current => self.on_accept(now, &punch),
            Step::Ready { stage } if current => self.on_ready(now, stage, punch),
            Step::More { stage } if current => self.on_more(now, stage),
            Step::Stop(why) if current => self.on_stop(now, why, &punch),
            Step::Accept | Step::Ready { .. } | Step::More { .. } | Step::Stop(_) => {}
        }
    }

    /// A ping of `peer` has come by UDP: the proof will follow.
    pub fn heard(&mut self, now: Instant, peer: &NodePublic) {
        if let Some(attempt) = &mut self.active
            && attempt.peer == *peer
            && attempt.heard.is_none()
            && attempt.role != Role::Asking
        {
            attempt.heard = Some(now);
            self.timers.clear(Timer::Burst);
            self.timers.set(Timer::Phase, now + PROOF);
        }
    }

    /// There is a direct path to `peer`, from `socket`; or none any more.
    pub fn path_changed(&mut self, now: Instant, peer: &NodePublic, socket: Option<SocketId>) {
        for id in self.pinned.iter().filter(|(_, owner)| *owner == peer).map(|(id, _)| *id).collect::<Vec<_>>() {
            if Some(id) == socket {
                self.timers.clear(Timer::Unused(id));
            } else {
                self.timers.set_if_absent(Timer::Unused(id), now + UNUSED);
            }
        }
        let Some(socket) = socket else { return };
        if let Some(record) = self.records.get_mut(peer) {
            record.wanted = None;
        }
        if self.active.as_ref().is_some_and(|attempt| attempt.peer == *peer) {
            self.succeed(socket);
        }
        if self.records.get(peer).is_some_and(Record::says_nothing) {
            self.records.remove(peer);
            self.timers.clear(Timer::Due(*peer));
        }
    }

    /// Does whatever is due at `now`. Calling early, late or twice is harmless.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(timer) = self.timers.pop_due(now) {
            match timer {
                Timer::Due(peer) => self.due(now, peer),
                Timer::Phase => self.phase_over(now),
                Timer::Burst => self.burst(now),
                Timer::Unused(id) => self.unpin(id),
            }
        }
    }

    // Outputs

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    // Getters

    /// How it stands with `peer`. `None` if nothing was tried.
    #[must_use]
    pub fn outcome(&self, peer: &NodePublic) -> Option<Outcome> {
        self.records.get(peer)?.outcome
    }

    /// Where our ordinary socket is seen, as far as is known.
    #[must_use]
    pub const fn outside(&self) -> Option<SocketAddr> {
        self.outside
    }

    /// Whether call-me-maybes to `peer` must wait: the list of guesses is to be pinged, and another one would replace it.
    #[must_use]
    pub fn is_listing(&self, peer: &NodePublic) -> bool {
        self.active.as_ref().is_some_and(|attempt| attempt.peer == *peer && attempt.role == Role::Lister)
    }

    /// Whether `id` is one of the sockets that were opened and not closed.
    #[must_use]
    pub fn has_socket(&self, id: SocketId) -> bool {
        let open = self.active.iter().flat_map(|attempt| &attempt.sockets).any(|extra| extra.id == id);
        open || self.pinned.contains_key(&id)
    }

    /// Sockets that are open.
    #[must_use]
    pub fn open_sockets(&self) -> usize {
        let attempt = self.active.as_ref().map_or(0, |attempt| attempt.sockets.len());
        attempt + self.pinned.len()
    }
}
