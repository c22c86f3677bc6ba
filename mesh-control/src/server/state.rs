//! One tailnet's state: a fold over its events, and the decisions that make new ones.
//!
//! Deciding and applying are apart. A decision reads the state, validates a command and answers with changes and a
//! reply; it touches nothing. [`State::seal`] numbers the changes and applies them. So a refused command leaves no
//! trace, and replaying events, or loading what the store kept of them, leads to the same state.
//!
//! | decisions | file |
//! |---|---|
//! | registration, logout, rotation, pending logins | `register.rs` |
//! | what a map request reports | `update.rs` |
//! | users, auth keys, codes, approvals, renaming, expiring, deleting | `operate.rs` |
//! | time passing | `sweep.rs` |

mod operate;
mod register;
mod sweep;
mod update;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use mesh_noise::key::{MachinePublic, NodePublic};
use serde::{Deserialize, Serialize};

use super::address::Cursor;
use super::event::{Change, Event, EventId};
use super::record::{
    Actor, AuthKey, AuthKeyId, Code, CodeId, Login, LoginId, Moment, Node, NodeId, Owner, TailnetId, User, UserId,
};

pub use operate::{NewAuthKey, Redeemed};
pub use register::{Registered, Registration};
pub use update::Update;

/// Who asks, and when.
#[derive(Debug, Clone)]
pub struct Context {
    /// The moment of the decision.
    pub now: Moment,
    /// Who asks for it.
    pub by: Actor,
}

/// What a command comes to: changes, not yet applied, and the answer for whoever asked.
#[derive(Debug, Clone, PartialEq)]
#[must_use = "a decision does nothing until it is sealed"]
pub struct Decision<T> {
    /// What is to change, in order. May be empty.
    pub changes: Vec<Change>,
    /// The answer.
    pub reply: T,
}

impl<T> Decision<T> {
    /// An answer that changes nothing.
    pub const fn unchanged(reply: T) -> Self {
        Self { changes: Vec::new(), reply }
    }
}

/// Why a command is refused. The text is shown to the person who asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The text is no auth key of this coordinator.
    #[error("auth key is not known to this coordinator (create one with: mesh admin keys create --user NAME)")]
    UnknownAuthKey,
    /// The auth key is past its time.
    #[error("auth key has expired (create another with: mesh admin keys create --user NAME)")]
    ExpiredAuthKey,
    /// The auth key was for one machine, which has joined.
    #[error("auth key has already been used (create another, or a --reusable one, with: mesh admin keys create)")]
    SpentAuthKey,
    /// The machine asks for tags that its auth key does not give.
    #[error("tags {0} are not granted by this auth key (create one with: mesh admin keys create --tag …)")]
    TagsNotGranted(String),
    /// The node key belongs to another machine or node.
    #[error("this node key belongs to another node")]
    NodeKeyTaken,
    /// A required key is all zero.
    #[error("a node key is required")]
    NodeKeyMissing,
    /// Node keys may expire sooner than planned, never later.
    #[error("extending key is not allowed")]
    ExtendingKey,
    /// All four million addresses are taken.
    #[error("no free addresses are left in 100.64.0.0/10")]
    NoAddresses,
    /// Too many machines wait for approval.
    #[error("too many machines are waiting for approval; try again later")]
    TooManyLogins,
    /// The name of a new user is taken.
    #[error("a user named {0} exists already")]
    UserExists(String),
    /// The name of a new user is not usable.
    #[error("a user name is 1 to 64 letters, digits, \".\", \"-\", \"_\", \"+\" and \"@\"")]
    BadUserName,
    /// No user has this name.
    #[error("no user is named {0} (create one with: mesh admin users create {0})")]
    UnknownUser(String),
    /// The lifetime of a new key is zero or beyond reason.
    #[error("an expiry lies between one second and ten years")]
    BadExpiry,
    /// Nothing by this id waits for approval.
    #[error("no machine is waiting under {0}: it has joined, given up, or its time has run out")]
    UnknownLogin(String),
    /// No node has this id or name.
    #[error("no node is named {0} (see: mesh admin nodes list)")]
    UnknownNode(String),
    /// A node's new name is not a DNS label.
    #[error("a node name is 1 to 63 lower-case letters, digits and \"-\", not at either end")]
    BadNodeName,
    /// Another node has this name.
    #[error("a node named {0} exists already")]
    NodeNameTaken(String),
}

/// What the operator has settled about a tailnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// How long a person's node key lasts. Default 180 days. Tagged nodes do not expire.
    pub key_lifetime: Duration,
    /// How long a pending login waits for approval. Default 30 minutes.
    pub login_lifetime: Duration,
    /// How long an approval code works. Default 10 minutes.
    pub code_lifetime: Duration,
    /// How many wrong attempts an approval code, and a sign-in page, survive. Default 5.
    pub tries: u8,
    /// How many logins may be pending at a time. Default 1024.
    pub max_logins: usize,
    /// How long an ephemeral node may be offline before it is deleted. Default 5 minutes.
    pub ephemeral_grace: Duration,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            key_lifetime: Duration::from_secs(180 * 86_400),
            login_lifetime: Duration::from_secs(30 * 60),
            code_lifetime: Duration::from_secs(10 * 60),
            tries: 5,
            max_logins: 1024,
            ephemeral_grace: Duration::from_secs(5 * 60),
        }
    }
}

/// The numbers given out so far. Stored, since deleted records would otherwise give theirs back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// The last event.
    pub event: EventId,
    /// The last user number.
    pub user: u64,
    /// The last auth key number.
    pub key: u64,
    /// The last node number.
    pub node: u64,
    /// The last address.
    pub address: Cursor,
}

/// Everything the store keeps of a tailnet, as it is read back.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Records {
    /// The numbers given out.
    pub counters: Counters,
    /// All users.
    pub users: Vec<User>,
    /// All auth keys.
    pub keys: Vec<AuthKey>,
    /// All approval codes.
    pub codes: Vec<Code>,
    /// All pending logins.
    pub logins: Vec<Login>,
    /// All nodes.
    pub nodes: Vec<Node>,
}

/// One tailnet as it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    tailnet: TailnetId,
    rules: Rules,
    counters: Counters,
    users: BTreeMap<UserId, User>,
    keys: BTreeMap<AuthKeyId, AuthKey>,
    codes: BTreeMap<CodeId, Code>,
    logins: BTreeMap<LoginId, Login>,
    nodes: BTreeMap<NodeId, Arc<Node>>,
    by_node_key: BTreeMap<NodePublic, NodeId>,
    by_machine: BTreeMap<(MachinePublic, Owner), NodeId>,
    by_name: BTreeMap<String, NodeId>,
    by_address: BTreeMap<Ipv4Addr, NodeId>,
}

impl State {
    /// An empty tailnet.
    #[must_use]
    pub fn new(tailnet: TailnetId, rules: Rules) -> Self {
        Self::load(tailnet, rules, Records::default())
    }

    /// A tailnet as the store remembers it.
    #[must_use]
    pub fn load(tailnet: TailnetId, rules: Rules, records: Records) -> Self {
        let mut state = Self {
            tailnet,
            rules,
            counters: records.counters,
            users: records.users.into_iter().map(|user| (user.id, user)).collect(),
            keys: records.keys.into_iter().map(|key| (key.id, key)).collect(),
            codes: records.codes.into_iter().map(|code| (code.id.clone(), code)).collect(),
            logins: records.logins.into_iter().map(|login| (login.id.clone(), login)).collect(),
            nodes: BTreeMap::new(),
            by_node_key: BTreeMap::new(),
            by_machine: BTreeMap::new(),
            by_name: BTreeMap::new(),
            by_address: BTreeMap::new(),
        };
        for node in records.nodes {
            state.insert(Arc::new(node));
        }
        state
    }

    /// The tailnet that this is.
    #[must_use]
    pub const fn tailnet(&self) -> TailnetId {
        self.tailnet
    }

    /// What the operator has settled.
    #[must_use]
    pub const fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The numbers given out so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// All users, by number.
    pub fn users(&self) -> impl Iterator<Item = &User> {
        self.users.values()
    }

    /// A user by number.
    #[must_use]
    pub fn user(&self, id: UserId) -> Option<&User> {
        self.users.get(&id)
    }

    /// A user by name.
    #[must_use]
    pub fn user_named(&self, name: &str) -> Option<&User> {
        self.users.values().find(|user| user.name == name)
    }

    /// All auth keys, by number.
    pub fn keys(&self) -> impl Iterator<Item = &AuthKey> {
        self.keys.values()
    }

    /// All pending logins.
    pub fn logins(&self) -> impl Iterator<Item = &Login> {
        self.logins.values()
    }

    /// A pending login that has not lapsed.
    #[must_use]
    pub fn login(&self, id: &LoginId, now: Moment) -> Option<&Login> {
        self.logins.get(id).filter(|login| now < login.expires)
    }

    /// All nodes, by number.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// A node by number.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&Arc<Node>> {
        self.nodes.get(&id)
    }

    /// A node by its current node key.
    #[must_use]
    pub fn node_by_key(&self, key: &NodePublic) -> Option<&Arc<Node>> {
        self.nodes.get(self.by_node_key.get(key)?)
    }

    /// A node by its name, its number or one of its addresses, as people type them.
    #[must_use]
    pub fn find_node(&self, text: &str) -> Option<&Arc<Node>> {
        let label = text.split('.').next().unwrap_or_default();
        let by_name = || self.by_name.get(text).or_else(|| self.by_name.get(label)).and_then(|id| self.nodes.get(id));
        let by_number = || text.parse().ok().and_then(|id| self.nodes.get(&NodeId(id)));
        match text.parse::<std::net::IpAddr>() {
            Ok(address) => self.nodes.values().find(|node| node.addresses.both().contains(&address)),
            Err(_) => by_name().or_else(by_number),
        }
    }

    /// Numbers a decision's changes, applies them and hands out the events and the reply.
    pub fn seal<T>(&mut self, context: &Context, decision: Decision<T>) -> (Vec<Event>, T) {
        let mut events = Vec::with_capacity(decision.changes.len());
        for change in decision.changes {
            let event = Event { id: self.counters.event.next(), at: context.now, by: context.by.clone(), change };
            self.apply(&event);
            events.push(event);
        }
        (events, decision.reply)
    }

    /// Applies one event. Events are applied in order, each once.
    pub fn apply(&mut self, event: &Event) {
        self.counters.event = event.id;
        match &event.change {
            Change::UserCreated(user) => {
                self.counters.user = self.counters.user.max(user.id.0);
                self.users.insert(user.id, user.clone());
            }
            Change::KeyCreated(key) | Change::KeyUsed(key) => {
                self.counters.key = self.counters.key.max(key.id.0);
                self.keys.insert(key.id, key.clone());
            }
            Change::CodePut(code) => {
                self.codes.insert(code.id.clone(), code.clone());
            }
            Change::CodeRemoved(id) => {
                self.codes.remove(id);
            }
            Change::LoginPut(login) => {
                self.logins.insert(login.id.clone(), login.clone());
            }
            Change::LoginRemoved(id) => {
                self.logins.remove(id);
            }
            Change::NodePut { node, .. } => {
                if node.id.0 > self.counters.node {
                    self.counters.node = node.id.0;
                    self.counters.address = Cursor::at(node.addresses.v4);
                }
                self.remove(node.id);
                self.insert(Arc::clone(node));
            }
            Change::NodeRemoved(node) => self.remove(node.id),
        }
    }

    fn insert(&mut self, node: Arc<Node>) {
        self.by_node_key.insert(node.node_key, node.id);
        self.by_machine.insert((node.machine, node.owner), node.id);
        self.by_name.insert(node.name.clone(), node.id);
        self.by_address.insert(node.addresses.v4, node.id);
        self.nodes.insert(node.id, node);
    }

    fn remove(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.remove(&id) {
            self.by_node_key.remove(&node.node_key);
            self.by_machine.remove(&(node.machine, node.owner));
            self.by_name.remove(&node.name);
            self.by_address.remove(&node.addresses.v4);
        }
    }
}
