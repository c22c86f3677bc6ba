//! Where one connection's packets go, remembered.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use mesh_noise::key::NodePublic;

use super::RelayServer;
use super::outlet::Outlet;
use crate::server::ConnectionId;

/// How many destinations a connection remembers.
const REMEMBERED: usize = 8;

/// Where packets for a node go.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) node: NodePublic,
    /// The node's active connection.
    pub(super) id: ConnectionId,
    pub(super) outlet: Arc<Outlet>,
}

/// What a connection remembers of the registry, for as long as nobody comes or goes.
#[derive(Debug, Default)]
pub(super) struct Routes {
    /// The registry's generation that it was read from.
    generation: u64,
    /// Whether a frame on this connection would make it its node's active one.
    shadowed: bool,
    /// Last used first.
    known: Vec<Route>,
}

impl Routes {
    /// Forgets everything if somebody has come or gone since it was learnt. A frame has come on `own`, which makes that
    /// its node's active connection.
    pub(super) fn refresh(&mut self, server: &RelayServer, own: ConnectionId, outlet: &Outlet) {
        let generation = server.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.known.clear();
            self.generation = generation;
            self.shadowed = server.registry().is_shadowed(own);
        }
        if self.shadowed {
            server.change_registry(|registry| registry.touch(own));
            outlet.notice("");
            self.shadowed = false;
        }
    }

    /// The route to `destination`, if it is remembered.
    pub(super) fn get(&mut self, destination: &NodePublic) -> Option<&Route> {
        let at = self.known.iter().position(|route| route.node == *destination)?;
        self.known[..=at].rotate_right(1);
        self.known.first()
    }

    pub(super) fn remember(&mut self, route: Route) -> Option<&Route> {
        self.known.truncate(REMEMBERED - 1);
        self.known.insert(0, route);
        self.known.first()
    }
}
