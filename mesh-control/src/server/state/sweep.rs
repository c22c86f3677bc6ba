//! What happens because time passes.

use std::sync::Arc;

use super::{Decision, State};
use crate::server::event::Change;
use crate::server::record::{Moment, Node, NodeId};

impl State {
    /// Removes what is past its time: lapsed logins and codes, and ephemeral nodes that have been offline for longer
    /// than their grace. `offline_since` says since when a node is offline, `None` while it is online.
    pub fn sweep(&self, now: Moment, offline_since: impl Fn(&Node) -> Option<Moment>) -> Decision<()> {
        let logins = self.logins.values().filter(|login| login.expires <= now);
        let codes = self.codes.values().filter(|code| code.expires <= now);
        let gone = self.nodes.values().filter(|node| {
            node.ephemeral && offline_since(node).is_some_and(|since| now.since(since) >= self.rules.ephemeral_grace)
        });
        let changes = logins
            .map(|login| Change::LoginRemoved(login.id.clone()))
            .chain(codes.map(|code| Change::CodeRemoved(code.id.clone())))
            .chain(gone.map(|node| Change::NodeRemoved(Arc::clone(node))))
            .collect();
        Decision { changes, reply: () }
    }

    /// What is left of an earlier [`sweep`](Self::sweep): the changes whose subject still exists.
    pub fn still_due(&self, mut swept: Decision<()>) -> Decision<()> {
        swept.changes.retain(|change| match change {
            Change::LoginRemoved(id) => self.logins.contains_key(id),
            Change::CodeRemoved(id) => self.codes.contains_key(id),
            Change::NodeRemoved(node) => self.nodes.get(&node.id).is_some_and(|now| now == node),
            Change::UserCreated(_)
            | Change::KeyCreated(_)
            | Change::KeyUsed(_)
            | Change::CodePut(_)
            | Change::LoginPut(_)
            | Change::NodePut { .. } => false,
        });
        swept
    }

    /// The nodes whose keys have expired after `since` and by `now`.
    pub fn expired_between(&self, since: Moment, now: Moment) -> impl Iterator<Item = NodeId> {
        self.nodes
            .values()
            .filter(move |node| node.expires.is_some_and(|expires| since < expires && expires <= now))
            .map(|node| node.id)
    }
}
