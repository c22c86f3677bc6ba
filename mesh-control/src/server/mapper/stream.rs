//! One map poll: what it has been told, and so what comes next.

use std::sync::Arc;

use mesh_noise::key::NodePublic;

use super::{Changelog, NoMap, Position, View, delta, farewell, full};
use crate::server::record::{Node, NodeId};
use crate::wire::MapResponse;

/// The server's side of one map poll. A core without I/O.
///
/// ```text
/// new ──full map──► following ──deltas──► following ──► ended: node deleted, key replaced, nothing left to send
///                       ▲ fell too far behind, or the key is valid again │
///                       └────────────── another full map ◄───────────────┘
/// ```
#[derive(Debug)]
pub struct MapStream {
    node: NodeId,
    key: NodePublic,
    position: Option<Position>,
    last: Option<Arc<Node>>,
    was_expired: bool,
}

/// What a map poll sends next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// This message.
    Send(Box<MapResponse>),
    /// Nothing: all is known.
    Idle,
    /// This message, if there is one, and then the end.
    End(Option<Box<MapResponse>>),
}

impl MapStream {
    /// A poll by a node that uses this key. The first message will be a full map.
    #[must_use]
    pub fn new(node: NodeId, key: NodePublic) -> Self {
        Self { node, key, position: None, last: None, was_expired: false }
    }

    /// What to send now.
    pub fn next(&mut self, view: &View<'_>, log: &Changelog) -> Next {
        let Some(me) = view.state.node(self.node) else {
            let last = self.last.take();
            return Next::End(last.map(|last| Box::new(farewell(view, &last))));
        };
        // Another key has taken this one's place, with a poll of its own.
        if me.node_key != self.key {
            return Next::End(None);
        }
        let revived = std::mem::replace(&mut self.was_expired, me.is_expired(view.now)) && !self.was_expired;
        self.last = Some(Arc::clone(me));
        let first = self.position.is_none();
        let news = self.position.filter(|_| !revived).and_then(|position| log.since(position).ok());
        let Some((changes, position)) = news else {
            self.position = Some(log.end());
            return match full(view, self.node) {
                // An empty list of peers does not clear a client's, so it has to begin anew by itself.
                Ok(map) if map.peers.is_empty() && !first => Next::End(None),
                Ok(map) => Next::Send(Box::new(map)),
                Err(NoMap::Gone) => Next::End(None),
            };
        };
        self.position = Some(position);
        match delta(view, self.node, &changes) {
            Ok(Some(message)) => Next::Send(Box::new(message)),
            Ok(None) => Next::Idle,
            Err(NoMap::Gone) => Next::End(None),
        }
    }
}
