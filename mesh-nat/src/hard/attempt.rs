//! One attempt with one peer: what it has opened, what it still has to send, what it waits for.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;

use super::ladder::{BIRTHDAY, LISTED, MAX_PROBES, PREDICTED, Stage};
use super::message::Guess;
use super::ports::Walk;
use super::survey::Survey;
use crate::behaviour::Behaviour;
use crate::path::SocketId;

/// A socket opened for an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extra {
    /// Its number, which no other socket has.
    pub id: SocketId,
    /// The port that it is bound to on this host.
    pub port: u16,
}

/// Our part in an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// We have asked the peer, and do not know yet.
    Asking,
    /// We are hard: we open ports, the peer tries them.
    Opener,
    /// We are easy: we try the ports of the peer.
    Sprayer,
    /// Both count.
    Sweeper,
    /// Both try many.
    Flooder,
    /// We are hard and the peer, which is not one of ours, probes what we list.
    Lister,
    /// We are easy and the peer, which is not one of ours, may be hard: we try what is likely.
    Caller,
}

/// What is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The peer's answer to our proposal.
    Answer,
    /// Sockets from the driver.
    Sockets,
    /// What STUN servers say.
    Survey,
    /// That all has left.
    Sending,
    /// The peer's next step.
    Peer,
    /// That something comes through after all.
    Settling,
}

/// A datagram that waits for its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Out {
    /// A ping; from the ordinary socket if none is named.
    Ping(Option<SocketId>, SocketAddr),
    /// A question to a STUN server.
    Ask(SocketId, SocketAddr),
}

#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) peer: NodePublic,
    pub(super) id: u32,
    /// Whether we asked, not the peer.
    pub(super) proposer: bool,
    pub(super) role: Role,
    pub(super) phase: Phase,
    /// When the phase ends by itself.
    pub(super) deadline: Instant,
    /// When all ends.
    pub(super) end: Instant,
    pub(super) stage: u8,
    pub(super) theirs: Behaviour,
    /// Where the peer's ordinary socket is seen.
    pub(super) target: Option<SocketAddr>,
    /// The peer's latest stage and its ports.
    pub(super) ready: Option<(u8, Guess)>,
    /// The stage that we have told ours for.
    pub(super) told: Option<u8>,
    pub(super) sockets: Vec<Extra>,
    /// What guesses are sent from, if not from the ordinary socket.
    pub(super) from: Option<SocketId>,
    /// How many of them have been used.
    pub(super) used: usize,
    pub(super) survey: Survey,
    /// Where our flows come from.
    pub(super) guess: Guess,
    pub(super) walk: Option<Walk>,
    pub(super) queue: VecDeque<Out>,
    /// Pings and questions sent.
    pub(super) sent: u32,
    /// The peer has come through; all else waits for the proof.
    pub(super) heard: Option<Instant>,
    /// The peer has a path and has stopped.
    pub(super) done_there: bool,
}

/// The longest that an attempt may take.
const LONGEST: Duration = Duration::from_secs(30);

impl Attempt {
    pub(super) fn new(now: Instant, peer: NodePublic, id: u32, role: Role) -> Self {
        Self {
            peer,
            id,
            proposer: false,
            role,
            phase: Phase::Answer,
            deadline: now,
            end: now + LONGEST,
            stage: 0,
            theirs: Behaviour::default(),
            target: None,
            ready: None,
            told: None,
            sockets: Vec::new(),
            from: None,
            used: 0,
            survey: Survey::default(),
            guess: Guess::None,
            walk: None,
            queue: VecDeque::new(),
            sent: 0,
            heard: None,
            done_there: false,
        }
    }

    pub(super) fn wait(&mut self, phase: Phase, until: Instant) {
        self.phase = phase;
        self.deadline = until.min(self.end);
    }

    /// The stages of this attempt, whoever's ports they are about.
    pub(super) fn stages(&self) -> &'static [Stage] {
        let listed = |guess: &Guess| matches!(guess, Guess::Ports(_));
        match self.role {
            Role::Opener if listed(&self.guess) => &PREDICTED,
            Role::Sprayer if self.ready.as_ref().is_some_and(|(_, guess)| listed(guess)) => &PREDICTED,
            Role::Lister if listed(&self.guess) => &PREDICTED,
            Role::Lister => &LISTED,
            Role::Asking | Role::Opener | Role::Sprayer | Role::Sweeper | Role::Flooder | Role::Caller => &BIRTHDAY,
        }
    }

    pub(super) fn is_last_stage(&self) -> bool {
        usize::from(self.stage) + 1 >= self.stages().len()
    }

    /// The sockets by number.
    pub(super) fn ids(&self) -> Vec<SocketId> {
        self.sockets.iter().map(|extra| extra.id).collect()
    }

    /// Puts a datagram in line, unless that would be too many.
    pub(super) fn push(&mut self, out: Out) {
        if self.room() > 0 {
            self.queue.push_back(out);
        }
    }

    /// How many may still be put in line.
    pub(super) fn room(&self) -> usize {
        (MAX_PROBES as usize).saturating_sub(self.sent as usize + self.queue.len())
    }

    /// Lets every socket that has not been used yet send to the peer.
    pub(super) fn open_ports(&mut self, targets: &[SocketAddr]) {
        for extra in self.sockets.clone().iter().skip(self.used) {
            targets.iter().for_each(|target| self.push(Out::Ping(Some(extra.id), *target)));
        }
        self.used = self.sockets.len();
    }

    /// Pairs each flow with a port of the peer's list: the `n`-th flow with the `slope · n`-th port.
    ///
    /// One side takes 1, the other 2. If foreign flows have moved our counter on by `a` and the peer's by `b`, our flow
    /// `n` comes from our port `n + a` and goes to the peer's port `n`; the peer's flow `m` comes from its port `m + b` and
    /// goes to ours `2m`. They meet where `n = m + b` and `2m = n + a`, so at `m = a + b`, whatever `a` and `b` are.
    pub(super) fn sweep(&mut self, ip: IpAddr, ports: &[u16], flows: usize, slope: usize) {
        let sockets: Vec<_> = self.ids().split_off(self.used.min(self.sockets.len().saturating_sub(1)));
        self.used = self.sockets.len();
        for (nth, port) in ports.iter().step_by(slope).take(flows).enumerate() {
            // Where each flow needs a socket of its own, there are as many.
            let Some(socket) = sockets.get(nth).or(sockets.last()) else { return };
            self.push(Out::Ping(Some(*socket), SocketAddr::new(ip, *port)));
        }
    }

    /// Sends to each port once, from all sockets in turn: the peer lets in whoever it has sent to, from any port.
    pub(super) fn scatter(&mut self, ip: IpAddr, ports: &[u16], flows: usize) {
        let sockets = self.ids();
        for (port, socket) in ports.iter().zip(sockets.iter().cycle()).take(flows) {
            self.push(Out::Ping(Some(*socket), SocketAddr::new(ip, *port)));
        }
    }

    /// Sends from every socket to as many ports as the flows suffice for.
    pub(super) fn flood(&mut self, ip: IpAddr, ports: &[u16], flows: usize, per_address: bool) {
        let sockets = self.ids();
        let to = |port: &u16| SocketAddr::new(ip, *port);
        let all: Vec<Out> = if per_address {
            // Flows to further ports cost the NAT nothing: all sockets try the same ones.
            let each = |port| sockets.iter().map(move |socket| Out::Ping(Some(*socket), to(port)));
            ports.iter().flat_map(each).take(flows).collect()
        } else {
            let each = |socket: &SocketId| {
                let socket = *socket;
                ports.iter().map(move |port| Out::Ping(Some(socket), to(port)))
            };
            sockets.iter().flat_map(each).take(flows).collect()
        };
        all.into_iter().for_each(|out| self.push(out));
    }
}
