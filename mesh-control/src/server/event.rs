//! Events: what has changed, numbered, in order.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::record::{Actor, AuthKey, Code, CodeId, Login, LoginId, Moment, Node, User};

/// An event's place in its tailnet's log. The first is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventId(pub u64);

impl EventId {
    /// The event after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One change to a tailnet: what, when, and who asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its place in the log.
    pub id: EventId,
    /// When it was decided.
    pub at: Moment,
    /// Who asked for it.
    pub by: Actor,
    /// What changed.
    pub change: Change,
}

/// What an event changes. Each carries the whole record as it stands afterwards, so that applying one is a plain
/// replacement and storing one is one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Change {
    /// A user exists.
    UserCreated(User),
    /// An auth key exists.
    KeyCreated(AuthKey),
    /// An auth key has registered a machine.
    KeyUsed(AuthKey),
    /// An approval code exists, or has been tried in vain.
    CodePut(Code),
    /// An approval code is used, lapsed or tried too often.
    CodeRemoved(CodeId),
    /// A pending login exists, was approved or tried in vain.
    LoginPut(Login),
    /// A pending login is complete or lapsed.
    LoginRemoved(LoginId),
    /// A node has joined or changed.
    NodePut {
        /// What about it is new.
        what: NodeChange,
        /// The node as it is now.
        node: Arc<Node>,
    },
    /// A node is gone. This is its last state.
    NodeRemoved(Arc<Node>),
}

impl Change {
    /// A short word for logs and the store.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::UserCreated(_) => "user-created",
            Self::KeyCreated(_) => "key-created",
            Self::KeyUsed(_) => "key-used",
            Self::CodePut(_) => "code-put",
            Self::CodeRemoved(_) => "code-removed",
            Self::LoginPut(_) => "login-put",
            Self::LoginRemoved(_) => "login-removed",
            Self::NodePut { what, .. } => match what {
                NodeChange::Joined => "node-joined",
                NodeChange::Whole => "node-changed",
                NodeChange::Patch => "node-patched",
                NodeChange::Seen => "node-seen",
                NodeChange::Private => "node-noted",
            },
            Self::NodeRemoved(_) => "node-removed",
        }
    }
}

/// What about a node is new, from its peers' point of view: it decides what they are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeChange {
    /// It did not exist before.
    Joined,
    /// Something that needs the whole node sent again: name, host information, key, expiry, tags.
    Whole,
    /// Only what a patch carries: endpoints, home region, disco key, capability version.
    Patch,
    /// Only when it was last seen.
    Seen,
    /// Nothing that a peer is told.
    Private,
}
