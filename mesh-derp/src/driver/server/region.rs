//! This relay among the others of its region: what it tells them, and what it does for them.
//!
//! [`link`] is the other direction: what this relay learns from each other one, and forwards to it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use mesh_noise::key::NodePublic;

use super::RelayServer;
use super::outlet::Outlet;
use crate::frame::{Frame, GoneReason};
use crate::login::ClientInfo;
use crate::queue::Lane;
use crate::server::{Connection, ConnectionId, Departure, Presence, Regional, Watch};
use crate::upgrade::Asked;

pub(super) mod link;
mod sibling;

pub use sibling::{BadSibling, Sibling};

/// A client that has been let in, as far as others are concerned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guest {
    pub(super) node: NodePublic,
    pub(super) presence: Presence,
    /// Whether it understands Health and Restarting: the official Rust client ends its connection on either.
    pub(super) takes_notices: bool,
}

impl Guest {
    pub(super) fn is_relay(&self) -> bool {
        self.presence.flags & Presence::RELAY != 0
    }
}

/// What is told to an older connection of a node when a newer one takes over.
const SHADOWED: &str = "this node's key is in use on a newer connection, which gets its packets";

/// This relay's place in its region, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RegionStatus {
    /// Links to other relays that are up.
    pub links: usize,
    /// Other relays that watch this one.
    pub watchers: usize,
    /// Nodes that are reached through other relays.
    pub nodes_elsewhere: usize,
}

impl RelayServer {
    /// This relay's place in its region now.
    #[must_use]
    pub fn region(&self) -> RegionStatus {
        let registry = self.registry();
        let (links, nodes_elsewhere) = (registry.links(), registry.nodes_elsewhere());
        RegionStatus { links, watchers: registry.watchers().count(), nodes_elsewhere }
    }

    /// Who a client is that has logged in.
    pub(super) fn guest(&self, node: NodePublic, address: SocketAddr, info: &ClientInfo, asked: Asked) -> Guest {
        let shown = info.mesh_key.as_ref().zip(self.config.mesh_key.as_ref());
        let is_relay = shown.is_some_and(|(shown, own)| own.matches(shown));
        let bit = |set: bool, bit| if set { bit } else { 0 };
        let flags = bit(is_relay, Presence::RELAY)
            | bit(info.is_prober, Presence::PROBER)
            | bit(matches!(asked, Asked::Relay { not_ideal: true, .. }), Presence::NOT_IDEAL);
        let flags = if flags == 0 { Presence::REGULAR } else { flags };
        let takes_notices = info.can_ack_pings || !info.app_name.is_empty();
        Guest { node, presence: Presence { address, flags }, takes_notices }
    }

    /// A connection is there: it gets its node's packets, and watchers are told.
    pub(super) fn enter(&self, outlet: &Arc<Outlet>) -> ConnectionId {
        let Guest { node, presence, .. } = *outlet.guest();
        // Watchers are told under the lock, so that each hears of arrivals and departures in their order.
        self.change_registry(|registry| {
            if let Some((_, older)) = registry.route(&node) {
                older.notice(SHADOWED);
            }
            let id = registry.register(node, Arc::clone(outlet));
            registry.watchers().for_each(|watcher| watcher.tell_watcher(|watch| watch.present(node, presence)));
            id
        })
    }

    /// A connection is over; `with_all` if it was ended together with all others, the links of the region among them: then
    /// the node has not left the region as far as others know.
    pub(super) fn leave(&self, id: ConnectionId, with_all: bool) {
        let departure = self.change_registry(|registry| {
            let node = registry.node(id)?;
            let departure = registry.unregister(id);
            match &departure {
                Some(_) if with_all => {}
                Some(_) => registry.watchers().for_each(|watcher| watcher.tell_watcher(|watch| watch.gone(node))),
                None => drop(registry.route(&node).map(|(_, heir)| heir.notice(""))),
            }
            departure
        });
        if let Some(departure) = departure {
            self.tell_of(departure);
        }
    }

    fn tell_of(&self, departure: Departure<Arc<Outlet>>) {
        for listener in departure.heard_by {
            self.counters.peer_gone.add(1);
            listener.tell(Frame::PeerGone { peer: departure.node, reason: GoneReason::Disconnected });
        }
    }

    /// Sends packets on to the relay of the region that has their receiver; `false` if none has, which the sender may be
    /// told. What is for a receiver that is just changing relays is dropped without a word.
    pub(super) fn forward(&self, source: NodePublic, destination: NodePublic, packets: &mut Vec<Bytes>) -> bool {
        let registry = self.registry();
        let Some(link) = registry.forwarder(&destination).map(Arc::clone) else {
            let in_doubt = registry.is_in_doubt(&destination);
            if in_doubt {
                self.counters.dropped_in_doubt.add(packets.len() as u64);
                packets.clear();
            }
            return in_doubt;
        };
        drop(registry);
        self.counters.forwarded_out.add(packets.len() as u64);
        self.counters.dropped_link.add(link.push(source, destination, packets.drain(..)));
        true
    }

    /// Does what another relay of the region asks on its connection.
    pub(super) fn regional(
        &self,
        now: Instant,
        asked: Regional,
        core: &mut Connection,
        id: ConnectionId,
        own: &Outlet,
    ) {
        match asked {
            Regional::Watch => {
                let mut registry = self.registry_mut();
                registry.watch(id);
                let present = registry.present().into_iter();
                own.watch(Watch::new(present.map(|(node, outlet)| (node, outlet.guest().presence))));
            }
            Regional::Forward { source, destination, payload } => {
                self.counters.forwarded_in.add(1);
                let found = {
                    let registry = self.registry();
                    let found = registry.route(&destination);
                    found.map(|(id, outlet)| (id, registry.is_new_to(id, &source), Arc::clone(outlet)))
                };
                let Some((receiver, new, outlet)) = found else {
                    self.counters.dropped_forwarded.add(1);
                    if Lane::of(&payload) == Lane::Disco && core.may_report_missing(now) {
                        self.counters.peer_gone.add(1);
                        own.tell(Frame::PeerGone { peer: destination, reason: GoneReason::NotHere });
                    }
                    return;
                };
                if new {
                    self.registry_mut().note_heard(receiver, source);
                }
                outlet.push(now, source, std::iter::once(payload), &self.counters);
            }
            Regional::Close(node) => self.disconnect(&node),
        }
    }
}
