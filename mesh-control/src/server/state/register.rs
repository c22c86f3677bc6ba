//! Registration (control.md §4): who may join, and as which node.
//!
//! ```text
//! request ─► past expiry? ──────────────► log out
//!         ─► follows a pending login? ──► approved: join · waiting: go on waiting
//!         ─► key known, not expired? ───► as before (a spent auth key does not matter)
//!         ─► key known, expired, no auth► "make a new key"
//!         ─► auth key? ─────────────────► check it, join
//!         ─► otherwise ─────────────────► a pending login with a URL
//! ```

use std::net::IpAddr;
use std::sync::Arc;

use mesh_noise::key::{DiscoPublic, MachinePublic, NodePublic};
use rand_core::CryptoRng;

use super::{Context, Decision, Refusal, State};
use crate::server::event::{Change, NodeChange};
use crate::server::name;
use crate::server::record::{AuthKey, Login, LoginId, LoginStatus, Moment, Node, NodeId, Owner, Tag};
use crate::server::secret;
use crate::wire::Hostinfo;

/// A registration request, as far as the state machine cares.
#[derive(Debug, Clone)]
pub struct Registration {
    /// The machine that asks, as the Noise handshake proved.
    pub machine: MachinePublic,
    /// The key that it wants to use.
    pub node_key: NodePublic,
    /// The key that it used before; zero: none.
    pub old_node_key: NodePublic,
    /// The auth key that it shows.
    pub auth_key: Option<String>,
    /// When it wants its key to expire. In the past: it logs out. None: no wish.
    pub expiry: Option<Moment>,
    /// The login that it waits for; none: it waits for none.
    pub followup: Option<LoginId>,
    /// What it says about itself.
    pub hostinfo: Hostinfo,
    /// Whether it wants to be forgotten when it leaves.
    pub ephemeral: bool,
    /// Its capability version.
    pub version: u16,
    /// The address that it asks from.
    pub from: Option<IpAddr>,
}

/// How a registration ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registered {
    /// The machine is this node.
    Accepted(NodeId),
    /// The machine has logged out; its key is dead.
    LoggedOut,
    /// The node key has expired: make another.
    KeyExpired,
    /// Somebody has to approve. The URL that ends in this id says how.
    Login {
        /// The pending login.
        id: LoginId,
        /// Whether the machine already knows the URL and asks to be held until there is news.
        wait: bool,
    },
}

/// As what a machine joins.
struct Admission {
    owner: Owner,
    tags: Vec<Tag>,
    ephemeral: bool,
}

impl State {
    /// Decides on a registration request.
    ///
    /// # Errors
    /// A [`Refusal`] whose text the machine's user is shown.
    pub fn register(
        &self,
        context: &Context,
        rng: &mut (impl CryptoRng + ?Sized),
        request: &Registration,
    ) -> Result<Decision<Registered>, Refusal> {
        if request.node_key.is_zero() {
            return Err(Refusal::NodeKeyMissing);
        }
        let known = self.node_by_key(&request.node_key);
        if known.is_some_and(|node| node.machine != request.machine) {
            return Err(Refusal::NodeKeyTaken);
        }
        let displaced = self.node_by_key(&request.old_node_key);
        if displaced.is_some_and(|node| node.machine != request.machine) {
            return Err(Refusal::NodeKeyTaken);
        }
        if request.expiry.is_some_and(|expiry| expiry <= context.now) {
            return Ok(known.map_or(Decision::unchanged(Registered::LoggedOut), |node| log_out(context, node)));
        }
        if let Some(id) = &request.followup
            && let Some(login) = self.login(id, context.now)
            && (login.machine, login.node_key) == (request.machine, request.node_key)
        {
            return match login.status {
                LoginStatus::Waiting => Ok(Decision::unchanged(Registered::Login { id: id.clone(), wait: true })),
                LoginStatus::Approved(user) => {
                    let admission =
                        Admission { owner: Owner::User(user), tags: Vec::new(), ephemeral: request.ephemeral };
                    let mut decision = self.admit(context, request, admission)?;
                    decision.changes.push(Change::LoginRemoved(id.clone()));
                    Ok(decision)
                }
            };
        }
        match known {
            Some(node) if !node.is_expired(context.now) => return self.renew(context, request, node),
            Some(_) if request.auth_key.is_none() => return Ok(Decision::unchanged(Registered::KeyExpired)),
            Some(_) | None => {}
        }
        match &request.auth_key {
            Some(text) => self.admit_by_key(context, request, text),
            None => self.start_login(context, rng, request),
        }
    }

    /// A node that is already in registers again: a restart, or a wish for an earlier expiry.
    fn renew(
        &self,
        context: &Context,
        request: &Registration,
        node: &Arc<Node>,
    ) -> Result<Decision<Registered>, Refusal> {
        let mut renewed = Node::clone(node);
        if let Some(expiry) = request.expiry {
            if node.expires.is_some_and(|expires| expiry > expires) {
                return Err(Refusal::ExtendingKey);
            }
            renewed.expires = Some(expiry);
        }
        renewed.version = request.version;
        self.describe(&mut renewed, request.hostinfo.clone());
        let changes = if renewed == **node {
            Vec::new()
        } else {
            vec![Change::NodePut { what: NodeChange::Whole, node: Arc::new(renewed) }]
        };
        let _ = context;
        Ok(Decision { changes, reply: Registered::Accepted(node.id) })
    }

    fn admit_by_key(
        &self,
        context: &Context,
        request: &Registration,
        text: &str,
    ) -> Result<Decision<Registered>, Refusal> {
        let (id, hash) = secret::parse_auth_key(text).ok_or(Refusal::UnknownAuthKey)?;
        let key = self.keys.get(&id).filter(|key| key.secret == hash).ok_or(Refusal::UnknownAuthKey)?;
        if key.expires <= context.now {
            return Err(Refusal::ExpiredAuthKey);
        }
        if key.used.is_some() && !key.reusable {
            return Err(Refusal::SpentAuthKey);
        }
        let refused: Vec<&str> = request
            .hostinfo
            .request_tags
            .iter()
            .map(String::as_str)
            .filter(|wanted| !key.tags.iter().any(|tag| tag.as_str() == *wanted))
            .collect();
        if !refused.is_empty() {
            return Err(Refusal::TagsNotGranted(refused.join(", ")));
        }
        let owner = if key.tags.is_empty() { Owner::User(key.user) } else { Owner::Tags };
        let admission = Admission { owner, tags: key.tags.clone(), ephemeral: key.ephemeral || request.ephemeral };
        let mut decision = self.admit(context, request, admission)?;
        decision.changes.insert(0, Change::KeyUsed(AuthKey { used: Some(context.now), ..key.clone() }));
        Ok(decision)
    }

    /// Makes the machine a node of its owner: the one that it already is, with a new key, or a new one.
    fn admit(
        &self,
        context: &Context,
        request: &Registration,
        admission: Admission,
    ) -> Result<Decision<Registered>, Refusal> {
        let Admission { owner, tags, ephemeral } = admission;
        let existing = self.by_machine.get(&(request.machine, owner)).and_then(|id| self.nodes.get(id));
        let using = self.node_by_key(&request.node_key);
        if using.is_some_and(|using| existing.is_none_or(|existing| existing.id != using.id)) {
            return Err(Refusal::NodeKeyTaken);
        }
        let planned = match owner {
            Owner::User(_) => Some(context.now.plus(self.rules.key_lifetime)),
            Owner::Tags => None,
        };
        let expires = [planned, request.expiry].into_iter().flatten().min();
        let (mut node, what) = if let Some(existing) = existing {
            (Node::clone(existing), NodeChange::Whole)
        } else {
            let addresses = self
                .counters
                .address
                .allocate(|address| self.by_address.contains_key(&address))
                .ok_or(Refusal::NoAddresses)?;
            let node = Node {
                id: NodeId(self.counters.node + 1),
                machine: request.machine,
                owner,
                tags: Vec::new(),
                node_key: request.node_key,
                expires,
                ephemeral,
                addresses,
                name: String::new(),
                name_is_chosen: false,
                version: request.version,
                disco_key: DiscoPublic::ZERO,
                endpoints: Vec::new(),
                home: None,
                hostinfo: Hostinfo::default(),
                created: context.now,
                last_seen: None,
            };
            (node, NodeChange::Joined)
        };
        node.node_key = request.node_key;
        node.expires = expires;
        node.tags = tags;
        node.ephemeral = ephemeral;
        node.version = request.version;
        self.describe(&mut node, request.hostinfo.clone());
        let reply = Registered::Accepted(node.id);
        Ok(Decision { changes: vec![Change::NodePut { what, node: Arc::new(node) }], reply })
    }

    fn start_login(
        &self,
        context: &Context,
        rng: &mut (impl CryptoRng + ?Sized),
        request: &Registration,
    ) -> Result<Decision<Registered>, Refusal> {
        let same = |login: &&Login| {
            (login.machine, login.node_key) == (request.machine, request.node_key) && context.now < login.expires
        };
        if let Some(login) = self.logins.values().find(same) {
            return Ok(Decision::unchanged(Registered::Login { id: login.id.clone(), wait: false }));
        }
        if self.logins.len() >= self.rules.max_logins {
            return Err(Refusal::TooManyLogins);
        }
        let id = secret::new_login_id(rng);
        let login = Login {
            id: id.clone(),
            machine: request.machine,
            node_key: request.node_key,
            hostname: request.hostinfo.hostname.chars().take(255).collect(),
            os: request.hostinfo.os.chars().take(64).collect(),
            from: request.from,
            status: LoginStatus::Waiting,
            expires: context.now.plus(self.rules.login_lifetime),
            tries_left: self.rules.tries,
        };
        Ok(Decision { changes: vec![Change::LoginPut(login)], reply: Registered::Login { id, wait: false } })
    }

    /// Takes over what a node says about itself: host information, and with it the name and the home region.
    pub(super) fn describe(&self, node: &mut Node, mut hostinfo: Hostinfo) {
        if hostinfo.net_info.is_none() {
            hostinfo.net_info = node.hostinfo.net_info.take();
        }
        if let Some(home) = hostinfo.net_info.as_ref().and_then(|info| info.preferred_derp) {
            node.home = Some(home);
        }
        let base = name::label(&hostinfo.hostname);
        let settled = node.name_is_chosen || name::is_derived(&node.name, &base);
        if node.name.is_empty() || !settled {
            node.name = name::unique(&base, |name| self.by_name.get(name).is_some_and(|id| *id != node.id));
        }
        node.hostinfo = hostinfo;
    }
}

/// Logging out kills the key. The node stays, with its addresses, unless it is ephemeral.
fn log_out(context: &Context, node: &Arc<Node>) -> Decision<Registered> {
    let change = if node.ephemeral {
        Change::NodeRemoved(Arc::clone(node))
    } else if node.is_expired(context.now) {
        return Decision::unchanged(Registered::LoggedOut);
    } else {
        let node = Node { expires: Some(context.now), ..Node::clone(node) };
        Change::NodePut { what: NodeChange::Whole, node: Arc::new(node) }
    };
    Decision { changes: vec![change], reply: Registered::LoggedOut }
}
