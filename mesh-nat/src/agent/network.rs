//! The network below: our own addresses, our sockets, and what happens when they change.
//!
//! Make before break: a path that worked until now is kept, in doubt, so that the relay carries the data as well until a
//! pong has shown whether it still works. Those with the latest traffic are asked first.

use std::net::SocketAddr;
use std::time::Instant;

use mesh_noise::key::NodePublic;

use super::{Agent, Doubt, Mode, Timer, search::Urgency};
use crate::path::candidate::{Candidate, Target};
use crate::path::{Family, SocketId};

impl Agent {
    /// Our own addresses, best first: they go into call-me-maybes. Call it after each [`Event::NeedEndpoints`].
    ///
    /// If there are new ones, active peers hear of them, and both ends look whether there is a better path by now.
    ///
    /// [`Event::NeedEndpoints`]: super::Event::NeedEndpoints
    pub fn set_endpoints(&mut self, now: Instant, endpoints: Vec<SocketAddr>) {
        self.tick(now);
        let mut list = Vec::new();
        for endpoint in endpoints {
            let endpoint = SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port());
            if !list.contains(&endpoint) {
                list.push(endpoint);
            }
        }
        let gained = list.iter().any(|new| !self.endpoints.contains(new));
        let news = gained || list.len() != self.endpoints.len();
        self.endpoints = list;
        self.endpoints_at = Some(now);
        self.endpoints_asked = None;
        if !news {
            return;
        }
        for node in self.engaged_peers() {
            if self.peers.get(&node).is_some_and(|peer| peer.best.is_none()) {
                self.send_call(node);
            } else if gained {
                self.search(node, Urgency::Event);
            }
        }
    }

    /// Our sockets. Candidates are tried from the first socket of their family. A change counts as [`Self::rebind`].
    pub fn set_sockets(&mut self, sockets: Vec<(SocketId, Family)>) {
        if sockets == self.sockets {
            return;
        }
        self.sockets = sockets;
        let (now, guesser, sockets) = (self.now, &self.guesser, &self.sockets);
        let is_open = |socket| guesser.has_socket(socket) || sockets.iter().any(|(id, _)| *id == socket);
        for peer in self.peers.values_mut() {
            peer.candidates.retain(|target| is_open(target.socket));
            let listed = std::mem::take(&mut peer.listed);
            peer.set_listed(now, &self.sockets, listed, &mut self.counters);
        }
        self.owners.retain(|target, _| is_open(target.socket));
        self.rebind(now);
    }

    /// Says which paths may be used. Leaving a path takes effect at once.
    pub fn set_mode(&mut self, mode: Mode) {
        if mode == self.mode {
            return;
        }
        self.mode = mode;
        for peer in self.peers.values_mut() {
            peer.candidates.values_mut().for_each(Candidate::forget);
        }
        self.rebind(self.now);
    }

    /// The network below has changed: asks for our addresses, and searches anew for all peers with recent traffic. Paths in
    /// use are kept until it is clear whether they still work, and the relay is used as well until then.
    pub fn rebind(&mut self, now: Instant) {
        self.tick(now);
        self.endpoints_at = None;
        self.endpoints_asked = None;
        if self.mode == Mode::Auto && !self.sockets.is_empty() {
            self.relay.rebind(now);
        } else {
            self.relay.forget();
        }
        for peer in self.peers.values_mut() {
            // An answer to an earlier ping says nothing about the network as it is now.
            peer.forget_pings();
            peer.forget_others();
            peer.pulse.forget();
        }
        for node in self.peers.keys().copied().collect::<Vec<_>>() {
            self.timers.clear(Timer::Retry(node));
            self.reselect(node);
            self.doubt(node);
        }
        self.pace.clear();
        self.guesses_forgotten();
        for node in self.affected_peers() {
            self.search(node, Urgency::Event);
        }
    }

    /// A peer has another disco key, so it has restarted: what was proven was proven about its former self. The direct path
    /// in use is kept, in doubt, for most come back where they were; whatever else is known is tried anew.
    pub(super) fn restarted(&mut self, node: NodePublic) {
        self.relay.remove_peer(&node);
        self.drain_relay();
        self.guesses_dropped(&node);
        self.timers.clear(Timer::Retry(node));
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.forget_pings();
            peer.forget_others();
            // What the former self listed counts no more.
            peer.candidates.values_mut().for_each(|candidate| candidate.called = false);
            peer.doubt = Doubt::default();
        }
        self.reselect(node);
        self.doubt(node);
        if self.matters(&node) {
            self.search(node, Urgency::Event);
        }
    }

    /// The system says that `remote` cannot be reached from `socket`: what was proven about it no longer holds.
    pub fn unreachable(&mut self, now: Instant, socket: SocketId, remote: SocketAddr) {
        self.tick(now);
        let target = Target { socket, remote };
        let affected: Vec<_> = self
            .peers
            .iter_mut()
            .filter_map(|(node, peer)| {
                peer.candidates.get_mut(&target)?.proven = None;
                Some((*node, peer.best == Some(target)))
            })
            .collect();
        for (node, used) in affected {
            if used { self.lost(node) } else { self.reselect(node) }
        }
    }

    /// Something was added to the network below, an address or a route: there may be better paths by now. Searches for all
    /// peers with recent traffic; paths in use are neither doubted nor left until a better one is proven.
    pub fn look_again(&mut self, now: Instant) {
        self.tick(now);
        self.endpoints_at = None;
        self.endpoints_asked = None;
        for node in self.affected_peers() {
            self.search(node, Urgency::Event);
        }
    }

    /// Peers that a change of network matters to, those with the latest traffic first.
    fn affected_peers(&self) -> Vec<NodePublic> {
        let mut affected: Vec<_> = self.peers.keys().filter(|node| self.matters(node)).copied().collect();
        affected.sort_by_key(|node| std::cmp::Reverse(self.peers.get(node).and_then(|peer| peer.sent)));
        affected
    }

    fn matters(&self, node: &NodePublic) -> bool {
        self.peers.get(node).is_some_and(|peer| peer.best.is_some() || peer.engaged(self.now, &self.timing))
    }
}
