//! What people decide: users, auth keys, approval codes, approvals, and the care of nodes.

use std::sync::Arc;
use std::time::Duration;

use rand_core::CryptoRng;

use super::{Context, Decision, Refusal, State};
use crate::server::event::{Change, NodeChange};
use crate::server::name;
use crate::server::record::{
    AuthKey, AuthKeyId, Code, Login, LoginId, LoginStatus, Moment, Node, NodeId, Tag, User, UserId,
};
use crate::server::secret;

/// Longest lifetime of an auth key: ten years.
const LONGEST: Duration = Duration::from_secs(3653 * 86_400);

/// What a new auth key shall be.
#[derive(Debug, Clone, Default)]
pub struct NewAuthKey {
    /// Whose nodes it registers, by name.
    pub user: String,
    /// Whether it may register more than one machine.
    pub reusable: bool,
    /// Whether its nodes are deleted when they leave.
    pub ephemeral: bool,
    /// The tags that own its nodes; empty: the user does.
    pub tags: Vec<Tag>,
    /// How long it works. None: 90 days.
    pub lifetime: Option<Duration>,
}

/// How an attempt to approve a login with a code ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Redeemed {
    /// The machine may join as this user's node.
    Approved(UserId),
    /// No such code works; so many attempts are left on this page.
    WrongCode {
        /// Zero: the login is gone.
        tries_left: u8,
    },
    /// The code is right and not tied to a user, and the page names none or one that does not exist.
    UserNeeded,
}

impl State {
    /// Creates a user.
    ///
    /// # Errors
    /// [`Refusal::BadUserName`] or [`Refusal::UserExists`].
    pub fn create_user(&self, context: &Context, name: &str) -> Result<Decision<User>, Refusal> {
        let fits = (1..=64).contains(&name.len())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+' | '@'));
        if !fits {
            return Err(Refusal::BadUserName);
        }
        if self.user_named(name).is_some() {
            return Err(Refusal::UserExists(name.to_owned()));
        }
        let user = User { id: UserId(self.counters.user + 1), name: name.to_owned(), created: context.now };
        Ok(Decision { changes: vec![Change::UserCreated(user.clone())], reply: user })
    }

    /// Creates an auth key. The reply holds its text, which nobody can ask for again.
    ///
    /// # Errors
    /// [`Refusal::UnknownUser`] or [`Refusal::BadExpiry`].
    pub fn create_key(
        &self,
        context: &Context,
        rng: &mut (impl CryptoRng + ?Sized),
        wanted: NewAuthKey,
    ) -> Result<Decision<(String, AuthKey)>, Refusal> {
        let user = self.known_user(&wanted.user)?.id;
        let lifetime = wanted.lifetime.unwrap_or(Duration::from_secs(90 * 86_400));
        if lifetime < Duration::from_secs(1) || lifetime > LONGEST {
            return Err(Refusal::BadExpiry);
        }
        let id = AuthKeyId(self.counters.key + 1);
        let (text, secret) = secret::new_auth_key(rng, id);
        let key = AuthKey {
            id,
            user,
            secret,
            reusable: wanted.reusable,
            ephemeral: wanted.ephemeral,
            tags: wanted.tags,
            created: context.now,
            expires: context.now.plus(lifetime),
            used: None,
        };
        Ok(Decision { changes: vec![Change::KeyCreated(key.clone())], reply: (text, key) })
    }

    /// Creates an approval code, for a user or for whomever the page names. The reply holds its text and its end.
    ///
    /// # Errors
    /// [`Refusal::UnknownUser`].
    pub fn create_code(
        &self,
        context: &Context,
        rng: &mut (impl CryptoRng + ?Sized),
        user: Option<&str>,
    ) -> Result<Decision<(String, Moment)>, Refusal> {
        let user = user.map(|name| self.known_user(name)).transpose()?.map(|user| user.id);
        let (text, id, secret) = secret::new_code(rng);
        let expires = context.now.plus(self.rules.code_lifetime);
        let code = Code { id, secret, user, expires, tries_left: self.rules.tries };
        Ok(Decision { changes: vec![Change::CodePut(code)], reply: (text, expires) })
    }

    /// Approves a pending login for a user.
    ///
    /// # Errors
    /// [`Refusal::UnknownLogin`] or [`Refusal::UnknownUser`].
    pub fn approve(&self, context: &Context, id: &LoginId, user: &str) -> Result<Decision<Login>, Refusal> {
        let login = self.login(id, context.now).ok_or_else(|| Refusal::UnknownLogin(id.to_string()))?;
        let user = self.known_user(user)?.id;
        let login = Login { status: LoginStatus::Approved(user), ..login.clone() };
        Ok(Decision { changes: vec![Change::LoginPut(login.clone())], reply: login })
    }

    /// Tries to approve a pending login with a code, as typed on the login's page.
    ///
    /// A wrong code costs the page one of its tries, and the code that it begins like one of its own.
    ///
    /// # Errors
    /// [`Refusal::UnknownLogin`].
    pub fn redeem(
        &self,
        context: &Context,
        id: &LoginId,
        typed: &str,
        user: Option<&str>,
    ) -> Result<Decision<Redeemed>, Refusal> {
        let login = self.login(id, context.now).ok_or_else(|| Refusal::UnknownLogin(id.to_string()))?;
        let parsed = secret::parse_code(typed);
        let named = parsed.as_ref().and_then(|(code, _)| self.codes.get(code));
        let code = named.filter(|code| context.now < code.expires);
        let matches = |code: &&Code| parsed.as_ref().is_some_and(|(_, secret)| *secret == code.secret);
        let Some(code) = code.filter(matches) else {
            let tries_left = login.tries_left.saturating_sub(1);
            let mut changes = vec![if tries_left == 0 {
                Change::LoginRemoved(id.clone())
            } else {
                Change::LoginPut(Login { tries_left, ..login.clone() })
            }];
            if let Some(code) = named {
                let tries_left = code.tries_left.saturating_sub(1);
                changes.push(if tries_left == 0 {
                    Change::CodeRemoved(code.id.clone())
                } else {
                    Change::CodePut(Code { tries_left, ..code.clone() })
                });
            }
            return Ok(Decision { changes, reply: Redeemed::WrongCode { tries_left } });
        };
        let only = || (self.users.len() == 1).then(|| self.users.keys().next().copied()).flatten();
        let named = user.filter(|name| !name.is_empty());
        let owner = match (code.user, named) {
            (Some(user), _) => Some(user),
            (None, Some(name)) => self.user_named(name).map(|user| user.id),
            (None, None) => only(),
        };
        let Some(owner) = owner else {
            return Ok(Decision::unchanged(Redeemed::UserNeeded));
        };
        let login = Login { status: LoginStatus::Approved(owner), ..login.clone() };
        let changes = vec![Change::CodeRemoved(code.id.clone()), Change::LoginPut(login)];
        Ok(Decision { changes, reply: Redeemed::Approved(owner) })
    }

    /// Gives a node a name of the operator's choice, which its own host name no longer changes.
    ///
    /// # Errors
    /// [`Refusal::UnknownNode`], [`Refusal::BadNodeName`] or [`Refusal::NodeNameTaken`].
    pub fn rename(&self, _context: &Context, id: NodeId, to: &str) -> Result<Decision<Arc<Node>>, Refusal> {
        let node = self.nodes.get(&id).ok_or_else(|| Refusal::UnknownNode(id.to_string()))?;
        if !name::is_label(to) {
            return Err(Refusal::BadNodeName);
        }
        if self.by_name.get(to).is_some_and(|other| *other != id) {
            return Err(Refusal::NodeNameTaken(to.to_owned()));
        }
        Ok(put(Node { name: to.to_owned(), name_is_chosen: true, ..Node::clone(node) }))
    }

    /// Makes a node's key expire now. The node stays, and has to sign in again.
    ///
    /// # Errors
    /// [`Refusal::UnknownNode`].
    pub fn expire(&self, context: &Context, id: NodeId) -> Result<Decision<Arc<Node>>, Refusal> {
        let node = self.nodes.get(&id).ok_or_else(|| Refusal::UnknownNode(id.to_string()))?;
        if node.is_expired(context.now) {
            return Ok(Decision::unchanged(Arc::clone(node)));
        }
        Ok(put(Node { expires: Some(context.now), ..Node::clone(node) }))
    }

    /// Deletes a node. Its addresses become free, in time; its number does not.
    ///
    /// # Errors
    /// [`Refusal::UnknownNode`].
    pub fn delete(&self, _context: &Context, id: NodeId) -> Result<Decision<Arc<Node>>, Refusal> {
        let node = self.nodes.get(&id).ok_or_else(|| Refusal::UnknownNode(id.to_string()))?;
        Ok(Decision { changes: vec![Change::NodeRemoved(Arc::clone(node))], reply: Arc::clone(node) })
    }

    fn known_user(&self, name: &str) -> Result<&User, Refusal> {
        self.user_named(name).ok_or_else(|| Refusal::UnknownUser(name.to_owned()))
    }
}

fn put(node: Node) -> Decision<Arc<Node>> {
    let node = Arc::new(node);
    Decision { changes: vec![Change::NodePut { what: NodeChange::Whole, node: Arc::clone(&node) }], reply: node }
}
