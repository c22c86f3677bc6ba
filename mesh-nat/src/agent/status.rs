//! Getters: what the agent knows, for those who act on it and for people.

use std::net::SocketAddr;

use mesh_noise::key::{DiscoPublic, NodePublic};

use super::{Agent, Counters, Mode, PeerStatus};
use crate::behaviour::Behaviour;
use crate::path::candidate::Target;
use crate::path::{Path, SocketId};

impl Agent {
    /// Where data for `peer` goes now.
    #[must_use]
    pub fn path(&self, peer: &NodePublic) -> Option<Path> {
        self.peers.get(peer).and_then(|peer| peer.path(self.mode))
    }

    /// Whose the address is that `socket` sees as `remote`.
    #[must_use]
    pub fn owner(&self, socket: SocketId, remote: SocketAddr) -> Option<NodePublic> {
        self.owners.get(&Target { socket, remote }).copied()
    }

    /// What is known about `peer`'s paths.
    #[must_use]
    pub fn status(&self, peer: &NodePublic) -> Option<PeerStatus> {
        let state = self.peers.get(peer)?;
        let best = state.best.and_then(|target| state.candidates.get(&target));
        Some(PeerStatus {
            path: state.path(self.mode),
            backup: state.published_backup,
            latency: match best {
                Some(candidate) => candidate.round_trip.map(|round_trip| round_trip.smoothed()),
                None => self.relay.status(peer).map(|status| status.latency),
            },
            limit: state.told_limit,
            since: state.since,
            why: self.why(peer, state),
            candidates: state.candidates.len(),
        })
    }

    /// The peers, in key order.
    pub fn peers(&self) -> impl Iterator<Item = &NodePublic> {
        self.peers.keys()
    }

    /// Our disco key, for control to publish.
    #[must_use]
    pub const fn disco_public(&self) -> DiscoPublic {
        self.disco_public
    }

    /// Which paths may be used.
    #[must_use]
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// Our own addresses, as last set.
    #[must_use]
    pub fn endpoints(&self) -> &[SocketAddr] {
        &self.endpoints
    }

    /// What our own NATs do, as last set.
    #[must_use]
    pub const fn behaviour(&self) -> Behaviour {
        self.behaviour
    }

    /// What did not fit.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }
}
