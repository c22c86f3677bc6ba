//! What a node reports with its map requests (control.md §5.2): disco key, endpoints, host information.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_noise::key::DiscoPublic;

use super::{Context, Decision, Refusal, State};
use crate::server::event::{Change, NodeChange};
use crate::server::mapper;
use crate::server::record::{Node, NodeId};
use crate::wire::Hostinfo;

/// Most endpoints that are kept of one node.
const MAX_ENDPOINTS: usize = 64;

/// A node's report. What is `None` stays as it was.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Its capability version.
    pub version: Option<u16>,
    /// Its disco key.
    pub disco_key: Option<DiscoPublic>,
    /// All its endpoints.
    pub endpoints: Option<Vec<SocketAddr>>,
    /// What it says about itself.
    pub hostinfo: Option<Hostinfo>,
}

impl State {
    /// Takes over a node's report; a report that says nothing new changes nothing.
    ///
    /// # Errors
    /// [`Refusal::UnknownNode`] if the node is gone.
    pub fn update(&self, _context: &Context, id: NodeId, update: Update) -> Result<Decision<()>, Refusal> {
        let before = self.nodes.get(&id).ok_or_else(|| Refusal::UnknownNode(id.to_string()))?;
        let mut node = Node::clone(before);
        if let Some(version) = update.version {
            node.version = version;
        }
        if let Some(key) = update.disco_key.filter(|key| !key.is_zero()) {
            node.disco_key = key;
        }
        if let Some(endpoints) = update.endpoints {
            node.endpoints = endpoints.into_iter().filter(|at| is_usable(*at)).take(MAX_ENDPOINTS).collect();
        }
        if let Some(hostinfo) = update.hostinfo {
            self.describe(&mut node, hostinfo);
        }
        Ok(match difference(before, &node) {
            Some(what) => Decision { changes: vec![Change::NodePut { what, node: Arc::new(node) }], reply: () },
            None => Decision::unchanged(()),
        })
    }

    /// Notes that a node's last map poll has ended.
    ///
    /// # Errors
    /// [`Refusal::UnknownNode`] if the node is gone.
    pub fn seen(&self, context: &Context, id: NodeId) -> Result<Decision<()>, Refusal> {
        let node = self.nodes.get(&id).ok_or_else(|| Refusal::UnknownNode(id.to_string()))?;
        let node = Arc::new(Node { last_seen: Some(context.now), ..Node::clone(node) });
        Ok(Decision { changes: vec![Change::NodePut { what: NodeChange::Seen, node }], reply: () })
    }
}

/// An endpoint that a peer could send to.
fn is_usable(endpoint: SocketAddr) -> bool {
    let link_local = match endpoint {
        SocketAddr::V4(_) => false,
        SocketAddr::V6(v6) => v6.ip().is_unicast_link_local() || v6.scope_id() != 0,
    };
    endpoint.port() != 0 && !endpoint.ip().is_unspecified() && !endpoint.ip().is_multicast() && !link_local
}

/// What peers have to be told of the difference.
fn difference(before: &Node, after: &Node) -> Option<NodeChange> {
    let whole = before.name != after.name
        || mapper::hostinfo_for_peers(&before.hostinfo) != mapper::hostinfo_for_peers(&after.hostinfo);
    let patch = before.endpoints != after.endpoints
        || before.home != after.home
        || before.disco_key != after.disco_key
        || before.version != after.version;
    if whole {
        Some(NodeChange::Whole)
    } else if patch {
        Some(NodeChange::Patch)
    } else if before == after {
        None
    } else {
        Some(NodeChange::Private)
    }
}
