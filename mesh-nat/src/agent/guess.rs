//! Port guessing's place in the agent: when it is wanted, what it is told, and how it is carried out.

use std::net::SocketAddr;
use std::time::Instant;

use mesh_derp::map::RegionId;
use mesh_noise::key::NodePublic;

use super::{Agent, Event, Mode, Reject, Source, Timer, Transmit};
use crate::disco::message::Message;
use crate::hard::message::Punch;
use crate::hard::{Action, Extra, Outcome, PeerFacts};
use crate::path::candidate::{Target, usable};
use crate::path::probe::Purpose;
use crate::path::{Family, Path, SocketId};
use crate::stun::message::StunError;

impl Agent {
    /// Switches port guessing on or off; it is on at first.
    pub fn set_guessing(&mut self, now: Instant, enabled: bool) {
        self.tick(now);
        self.guesser.set_enabled(enabled);
        self.carry_out_guesses();
    }

    /// Where STUN servers see our ordinary IPv4 socket, and which servers there are, nearest first. Both are for guessing
    /// ports alone, as is what [`Self::set_behaviour`] tells.
    pub fn set_outside(&mut self, now: Instant, outside: Option<SocketAddr>, servers: &[SocketAddr]) {
        self.tick(now);
        self.guesser.set_servers(servers);
        self.guesser.set_ours(self.behaviour, outside.or(self.guesser.outside()));
        self.carry_out_guesses();
    }

    /// The sockets that [`Event::OpenSockets`] has asked for, or fewer. They must have numbers of their own, which are not
    /// given again soon.
    pub fn sockets_opened(&mut self, now: Instant, opened: Vec<Extra>) {
        self.tick(now);
        self.guesser.sockets_opened(now, opened);
        self.carry_out_guesses();
    }

    /// Takes a STUN answer that has come to a socket which [`Event::OpenSockets`] had asked for.
    ///
    /// # Errors
    /// Says why it is of no use.
    pub fn handle_stun(&mut self, now: Instant, datagram: &[u8]) -> Result<(), StunError> {
        self.tick(now);
        let outcome = self.guesser.handle_stun(now, datagram);
        self.carry_out_guesses();
        outcome
    }

    /// How guessing ports has gone with `peer`. `None` if there was no need.
    #[must_use]
    pub fn guessing(&self, peer: &NodePublic) -> Option<Outcome> {
        self.guesser.outcome(peer)
    }

    /// Whether `socket` was opened for guessing ports.
    #[must_use]
    pub fn is_extra(&self, socket: SocketId) -> bool {
        self.guesser.has_socket(socket)
    }

    pub(super) fn tell_behaviour(&mut self) {
        self.guesser.set_ours(self.behaviour, self.guesser.outside());
        self.carry_out_guesses();
    }

    /// A search for a direct path has been made, and there is none yet.
    pub(super) fn want_guesses(&mut self, node: NodePublic) {
        let Some(peer) = self.peers.get(&node) else { return };
        let v4 = self.sockets.iter().any(|(_, family)| *family == Family::V4);
        // A peer of ours is asked first; of another one this is all there is to tell whether it is there.
        let present = if peer.ours { peer.region().is_some() } else { peer.heard.is_some() };
        if peer.best.is_some() || !present || self.mode == Mode::Relay || !v4 {
            return;
        }
        let mut addresses: Vec<_> = peer.candidates.iter().map(|(target, _)| target.remote).collect();
        addresses.retain(|address| Family::of(address) == Family::V4);
        addresses.dedup();
        self.guesser.want(self.now, node, PeerFacts { ours: peer.ours, addresses });
        self.carry_out_guesses();
    }

    pub(super) fn guesses_due(&mut self) {
        self.guesser.handle_timeout(self.now);
        self.carry_out_guesses();
    }

    pub(super) fn guesses_dropped(&mut self, node: &NodePublic) {
        self.guesser.remove_peer(node);
        self.carry_out_guesses();
    }

    pub(super) fn guesses_forgotten(&mut self) {
        self.guesser.forget();
        self.carry_out_guesses();
    }

    /// A ping of `node` has come straight to one of our sockets.
    pub(super) fn heard_directly(&mut self, node: &NodePublic) {
        self.guesser.heard(self.now, node);
        self.carry_out_guesses();
    }

    /// Data for `node` goes along `path` now.
    pub(super) fn tell_guesser(&mut self, node: &NodePublic, path: Option<Path>) {
        let socket = match path {
            Some(Path::Direct { socket, .. }) => Some(socket),
            Some(Path::PeerRelay { .. } | Path::Relay { .. }) | None => None,
        };
        self.guesser.path_changed(self.now, node, socket);
        self.carry_out_guesses();
    }

    pub(super) fn on_punch(&mut self, source: Source, holders: &[NodePublic], punch: Punch) -> Result<(), Reject> {
        let Path::Relay { region } = source.path else { return Err(Reject::NotOverRelay) };
        let node = source.node.filter(|node| holders.contains(node)).ok_or(Reject::WrongNode)?;
        if self.mode == Mode::Relay {
            return Err(Reject::Disabled);
        }
        self.heard_by_relay(&node, region);
        if let Some(peer) = self.peers.get_mut(&node)
            && punch.behaviour.is_easy().is_some()
        {
            peer.behaviour = punch.behaviour;
        }
        self.guesser.handle_message(self.now, node, punch);
        self.carry_out_guesses();
        Ok(())
    }

    /// The pong to a guess: its address is a candidate from now on.
    pub(super) fn guess_answered(&mut self, node: NodePublic, target: Target) {
        let now = self.now;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        if peer.candidates.admit(now, target).is_none() {
            self.counters.candidates_refused += 1;
        }
    }

    fn carry_out_guesses(&mut self) {
        while let Some(action) = self.guesser.poll_action() {
            match action {
                Action::Tell(node, punch) => {
                    if let Some(region) = self.region_of(&node) {
                        self.send(node, Path::Relay { region }, &Message::Punch(punch));
                    }
                }
                Action::Ping(node, socket, remote) => self.send_guess(node, socket, remote),
                Action::Ask(socket, remote, datagram) => {
                    // To a server, not to a peer; the key goes unread.
                    self.transmits.push_back(Transmit {
                        path: Path::Direct { socket, remote },
                        peer: self.node,
                        datagram,
                    });
                }
                Action::Open(count) => {
                    self.events.push_back(Event::OpenSockets { family: Family::V4, count });
                }
                Action::Close(socket) => self.close_extra(socket),
                Action::Call(node, guesses) => self.send_call_with(node, &guesses),
                Action::Tried(peer, outcome) => self.events.push_back(Event::Guessed { peer, outcome }),
            }
        }
        match self.guesser.poll_timeout() {
            Some(at) => self.timers.set(Timer::Guess, at),
            None => self.timers.clear(Timer::Guess),
        }
    }

    fn region_of(&self, node: &NodePublic) -> Option<RegionId> {
        self.peers.get(node)?.region()
    }

    fn send_guess(&mut self, node: NodePublic, socket: Option<SocketId>, remote: SocketAddr) {
        let ordinary = || self.sockets.iter().find(|(_, family)| *family == Family::of(&remote)).map(|(id, _)| *id);
        let (Some(socket), Some(remote)) = (socket.or_else(ordinary), usable(remote)) else { return };
        self.launch(node, Path::Direct { socket, remote }, Purpose::Guess, 0);
    }

    /// What was learnt from a socket goes with it.
    fn close_extra(&mut self, socket: SocketId) {
        self.owners.retain(|target, _| target.socket != socket);
        let mut affected = Vec::new();
        for (node, peer) in &mut self.peers {
            let before = peer.candidates.len();
            peer.candidates.retain(|target| target.socket != socket);
            if peer.candidates.len() != before {
                affected.push(*node);
            }
        }
        self.events.push_back(Event::CloseSocket { socket });
        for node in affected {
            self.reselect(node);
        }
    }
}
