//! The operations, and who may do them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_derp::driver::server::Counters;

use super::model::{
    Approve, CodeInfo, CreateCode, CreateKey, CreateUser, KeyInfo, LoginInfo, NodeInfo, NodeRef, Reloaded, Rename,
    UserInfo,
};
use crate::driver::server::{CommandError, Coordinator};
use crate::server::mapper::{self, View};
use crate::server::state::{Context, Decision, NewAuthKey, Redeemed, Refusal, State};
use crate::server::{Actor, AuthKey, Login, LoginId, LoginStatus, Moment, Node, NodeId, Tag, User};
use crate::wire::Timestamp;

/// Why an operation has no effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// Whoever asks may not do this.
    #[error("only the coordinator's own user and root may do this")]
    Forbidden,
    /// A value in the request is not usable.
    #[error("{0}")]
    Invalid(String),
    /// The rules forbid it, or the store has failed.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// A coordinator, as somebody in particular may use it.
#[derive(Debug, Clone)]
pub struct Admin {
    coordinator: Arc<Coordinator>,
    by: Actor,
}

impl Admin {
    /// The operations as `by` may use them.
    #[must_use]
    pub fn new(coordinator: Arc<Coordinator>, by: Actor) -> Self {
        Self { coordinator, by }
    }

    /// Operators may do everything here; nobody else may do any of it.
    fn operator(&self) -> Result<Actor, AdminError> {
        match &self.by {
            by @ Actor::Operator { .. } => Ok(by.clone()),
            Actor::Machine(_) | Actor::Visitor(_) | Actor::Coordinator => Err(AdminError::Forbidden),
        }
    }

    /// All users.
    ///
    /// # Errors
    /// [`AdminError::Forbidden`].
    pub fn users(&self) -> Result<Vec<UserInfo>, AdminError> {
        self.operator()?;
        Ok(self.coordinator.read(|view| view.state.users().map(user_info).collect()))
    }

    /// Creates a user.
    ///
    /// # Errors
    /// If the name is taken or unusable, or as for all operations.
    pub async fn create_user(&self, wanted: CreateUser) -> Result<UserInfo, AdminError> {
        let by = self.operator()?;
        let user =
            self.coordinator.execute(by, move |state, context, _| state.create_user(context, &wanted.name)).await?;
        Ok(user_info(&user))
    }

    /// Creates an approval code.
    ///
    /// # Errors
    /// If the user does not exist, or as for all operations.
    pub async fn create_code(&self, wanted: CreateCode) -> Result<CodeInfo, AdminError> {
        let by = self.operator()?;
        let (code, expires) = self
            .coordinator
            .execute(by, move |state, context, rng| state.create_code(context, rng, wanted.user.as_deref()))
            .await?;
        Ok(CodeInfo { code, expires: time(expires) })
    }

    /// All auth keys, without their secrets.
    ///
    /// # Errors
    /// [`AdminError::Forbidden`].
    pub fn keys(&self) -> Result<Vec<KeyInfo>, AdminError> {
        self.operator()?;
        Ok(self.coordinator.read(|view| view.state.keys().map(|key| key_info(view.state, key, None)).collect()))
    }

    /// Creates an auth key.
    ///
    /// # Errors
    /// If the user does not exist, a tag is malformed or the expiry absurd, or as for all operations.
    pub async fn create_key(&self, wanted: CreateKey) -> Result<KeyInfo, AdminError> {
        let by = self.operator()?;
        let tags = wanted.tags.into_iter().map(Tag::try_from).collect::<Result<Vec<_>, _>>();
        let wanted = NewAuthKey {
            user: wanted.user,
            reusable: wanted.reusable,
            ephemeral: wanted.ephemeral,
            tags: tags.map_err(|error| AdminError::Invalid(error.to_string()))?,
            lifetime: wanted.expiry_seconds.map(Duration::from_secs),
        };
        let (text, key) =
            self.coordinator.execute(by, move |state, context, rng| state.create_key(context, rng, wanted)).await?;
        Ok(self.coordinator.read(|view| key_info(view.state, &key, Some(text))))
    }

    /// All nodes.
    ///
    /// # Errors
    /// [`AdminError::Forbidden`].
    pub fn nodes(&self) -> Result<Vec<NodeInfo>, AdminError> {
        self.operator()?;
        Ok(self.coordinator.read(|view| view.state.nodes().map(|node| node_info(view, node)).collect()))
    }

    /// Renames a node.
    ///
    /// # Errors
    /// If the node does not exist or the name is taken or no label, or as for all operations.
    pub async fn rename(&self, wanted: Rename) -> Result<NodeInfo, AdminError> {
        let Rename { node, name } = wanted;
        self.on_node(node, move |state, context, id| state.rename(context, id, &name)).await
    }

    /// Makes a node's key expire now.
    ///
    /// # Errors
    /// If the node does not exist, or as for all operations.
    pub async fn expire(&self, wanted: NodeRef) -> Result<NodeInfo, AdminError> {
        self.on_node(wanted.node, State::expire).await
    }

    /// Deletes a node.
    ///
    /// # Errors
    /// If the node does not exist, or as for all operations.
    pub async fn delete(&self, wanted: NodeRef) -> Result<NodeInfo, AdminError> {
        self.on_node(wanted.node, State::delete).await
    }

    async fn on_node(
        &self,
        node: String,
        decide: impl FnOnce(&State, &Context, NodeId) -> Result<Decision<Arc<Node>>, Refusal> + Send,
    ) -> Result<NodeInfo, AdminError> {
        let by = self.operator()?;
        let after = self
            .coordinator
            .execute(by, move |state, context, _| {
                let id = state.find_node(&node).map(|node| node.id).ok_or(Refusal::UnknownNode(node))?;
                decide(state, context, id)
            })
            .await?;
        Ok(self.coordinator.read(|view| node_info(view, &after)))
    }

    /// The machines that wait for approval.
    ///
    /// # Errors
    /// [`AdminError::Forbidden`].
    pub fn logins(&self) -> Result<Vec<LoginInfo>, AdminError> {
        self.operator()?;
        let url = self.coordinator.url();
        Ok(self.coordinator.read(|view| {
            let live = view.state.logins().filter(|login| view.now < login.expires);
            live.map(|login| login_info(view.state, url, login)).collect()
        }))
    }

    /// Lets a waiting machine in.
    ///
    /// # Errors
    /// If nothing waits there or the user does not exist, or as for all operations.
    pub async fn approve(&self, wanted: Approve) -> Result<LoginInfo, AdminError> {
        let by = self.operator()?;
        let Some(id) = LoginId::from_url(&wanted.login) else {
            return Err(CommandError::from(Refusal::UnknownLogin(wanted.login)).into());
        };
        let login =
            self.coordinator.execute(by, move |state, context, _| state.approve(context, &id, &wanted.user)).await?;
        Ok(self.coordinator.read(|view| login_info(view.state, self.coordinator.url(), &login)))
    }

    /// Tries to let a waiting machine in by a one-time code. Anybody may try: the code is the authority.
    ///
    /// # Errors
    /// If nothing waits there, or the store has failed.
    pub async fn redeem(&self, id: &LoginId, code: &str, user: Option<&str>) -> Result<Redeemed, CommandError> {
        self.coordinator.execute(self.by.clone(), |state, context, _| state.redeem(context, id, code, user)).await
    }

    /// What the relay in the same process has moved and dropped.
    ///
    /// # Errors
    /// If there is none, or [`AdminError::Forbidden`].
    pub fn relay(&self) -> Result<Counters, AdminError> {
        self.operator()?;
        let relay = self.coordinator.relay().map(|relay| relay.counters());
        relay.ok_or_else(|| AdminError::Invalid("this coordinator runs without a relay of its own".to_owned()))
    }

    /// Reads the relays again.
    ///
    /// # Errors
    /// If they cannot be read, or [`AdminError::Forbidden`].
    pub fn reload_derp_map(&self) -> Result<Reloaded, AdminError> {
        self.operator()?;
        self.coordinator.reload_derp_map().map(|regions| Reloaded { regions }).map_err(AdminError::Invalid)
    }
}

fn time(moment: Moment) -> Timestamp {
    Timestamp::from(SystemTime::from(moment))
}

fn user_info(user: &User) -> UserInfo {
    UserInfo { id: user.id.0, name: user.name.clone(), created: time(user.created) }
}

fn key_info(state: &State, key: &AuthKey, text: Option<String>) -> KeyInfo {
    KeyInfo {
        id: key.id.0,
        key: text,
        user: state.user(key.user).map(|user| user.name.clone()).unwrap_or_default(),
        reusable: key.reusable,
        ephemeral: key.ephemeral,
        tags: key.tags.iter().map(|tag| tag.as_str().to_owned()).collect(),
        created: time(key.created),
        expires: time(key.expires),
        used: key.used.map(time),
    }
}

fn node_info(view: &View<'_>, node: &Node) -> NodeInfo {
    let online = view.presence.is_online(node.id);
    let owner = mapper::profile(view.state, node.owner.user_id());
    NodeInfo {
        id: node.id.0,
        name: node.name.clone(),
        fqdn: format!("{}.{}", node.name, view.settings.domain),
        user: owner.map(|owner| owner.login_name).unwrap_or_default(),
        tags: node.tags.iter().map(|tag| tag.as_str().to_owned()).collect(),
        addresses: node.addresses.both().to_vec(),
        online,
        expired: node.is_expired(view.now),
        expires: node.expires.map(time),
        ephemeral: node.ephemeral,
        created: time(node.created),
        last_seen: node.last_seen.filter(|_| !online).map(time),
        os: node.hostinfo.os.clone(),
        client: node.hostinfo.ipn_version.clone(),
        capability: node.version,
        endpoints: node.endpoints.clone(),
        home_region: node.home.map(mesh_derp::map::RegionId::get),
        node_key: node.node_key.to_string(),
        machine_key: node.machine.to_string(),
    }
}

fn login_info(state: &State, url: &str, login: &Login) -> LoginInfo {
    let approved = match login.status {
        LoginStatus::Waiting => None,
        LoginStatus::Approved(user) => state.user(user).map(|user| user.name.clone()),
    };
    LoginInfo {
        id: login.id.to_string(),
        url: format!("{url}/register/{}", login.id),
        hostname: login.hostname.clone(),
        os: login.os.clone(),
        from: login.from,
        node_key: login.node_key.to_string(),
        approved_for: approved,
        expires: time(login.expires),
    }
}
