//! What a node is told: the full map when it begins to poll, deltas afterwards (control.md §5).
//!
//! Everything here is a pure function of a [`View`]: the state, who is online, and the settings. A stream remembers only
//! a [`Position`] in the [`Changelog`]; [`Changelog::since`] sums up what happened after it, per node rather than per
//! event, and [`delta`] says it with values as they are *now*. So a slow reader gets fewer and larger deltas, never a
//! longer queue, and one that has fallen too far behind gets a full map.
//!
//! | what happened to a peer | what its peers are sent |
//! |---|---|
//! | joined, renamed, new key, new host information, expired | `PeersChanged` with the whole node, and `UserProfiles` |
//! | endpoints, home region, disco key | `PeersChangedPatch` with the present values |
//! | came or went | the patch with `Online`, and `LastSeen` when it went; `PeerSeenChange` false when it came |
//! | deleted | `PeersRemoved` |
//! | of the same user: joined, changed as a whole, deleted | also the filter that says who may relay for whom |
//!
//! Clients re-read a `PeersChanged` node as a patch when only patchable fields differ, and then lose what a patch cannot
//! say (control.md §5.8). Hence `Endpoints` is always present, even when empty, and presence always travels as a patch.

mod changelog;
mod node;
mod relay;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use mesh_derp::map::DerpMap;

use super::presence::Presence;
use super::record::{Moment, NodeId, TAGGED_DEVICES, UserId};
use super::state::State;
use crate::wire::{Debug, DnsConfig, FilterRule, MapResponse, NetPortRange, PeerChange, PortRange, UserProfile};

pub use changelog::{Behind, Changelog, Changes, NodeNews, Notice, Position};
pub use node::hostinfo_for_peers;
pub use stream::{MapStream, Next};

/// What the operator has set that maps show.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The suffix of node names, without dots at either end; also the tailnet's name for people.
    pub domain: String,
    /// The relays.
    pub derp_map: DerpMap,
}

/// Everything that a map is made of.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Users and nodes.
    pub state: &'a State,
    /// Who is online.
    pub presence: &'a Presence,
    /// What the operator has set.
    pub settings: &'a Settings,
    /// The present.
    pub now: Moment,
}

/// Why there is no map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoMap {
    /// The node does not exist (any more).
    #[error("the node does not exist")]
    Gone,
}

/// The first message of a map poll: all that the node may know.
///
/// A node whose key has expired sees itself, expired, and nobody else.
///
/// # Errors
/// [`NoMap::Gone`].
pub fn full(view: &View<'_>, id: NodeId) -> Result<MapResponse, NoMap> {
    let me = view.state.node(id).ok_or(NoMap::Gone)?;
    let expired = me.is_expired(view.now);
    let peers: Vec<_> = if expired {
        Vec::new()
    } else {
        view.state.nodes().filter(|node| node.id != id).map(|node| node::for_peer(view, node)).collect()
    };
    let users = peers.iter().map(|peer| peer.user).chain([me.owner.user_id()]);
    Ok(MapResponse {
        node: Some(node::for_self(view, me)),
        derp_map: Some(view.settings.derp_map.clone()),
        user_profiles: profiles(view, users),
        peers,
        dns_config: Some(dns(view)),
        domain: view.settings.domain.clone(),
        collect_services: Some(false),
        packet_filters: filters(view, me),
        ssh_policy: Some(serde_json::json!({ "rules": [] })),
        control_time: node::time(view.now),
        debug: Some(Debug { disable_log_tail: true, ..Debug::default() }),
        ..MapResponse::default()
    })
}

/// The answer to a request for one's own node only (`ReadOnly` with `OmitPeers`).
///
/// # Errors
/// [`NoMap::Gone`].
pub fn only_self(view: &View<'_>, id: NodeId) -> Result<MapResponse, NoMap> {
    let me = view.state.node(id).ok_or(NoMap::Gone)?;
    Ok(MapResponse { peers: Vec::new(), user_profiles: profiles(view, [me.owner.user_id()]), ..full(view, id)? })
}

/// What `changes` mean to a node, or `None` if they mean nothing to it.
///
/// # Errors
/// [`NoMap::Gone`] if the node itself was deleted; send it [`farewell`] and end the poll.
pub fn delta(view: &View<'_>, id: NodeId, changes: &Changes) -> Result<Option<MapResponse>, NoMap> {
    let me = view.state.node(id).ok_or(NoMap::Gone)?;
    let mut message = MapResponse::default();
    let mut users = Vec::new();
    let mut relays = false;
    for (changed, news) in &changes.nodes {
        // Of a node that is gone, nobody knows any more whose it was.
        let ours = || view.state.node(*changed).is_none_or(|node| node.owner == me.owner);
        relays |= news.whole && (*changed == id || (!me.is_expired(view.now) && ours()));
        if *changed == id {
            if news.whole || news.own {
                message.node = Some(node::for_self(view, me));
                users.push(me.owner.user_id());
            }
            continue;
        }
        let Some(peer) = view.state.node(*changed) else {
            message.peers_removed.push(*changed);
            continue;
        };
        if me.is_expired(view.now) {
            continue;
        }
        if news.whole {
            let whole = node::for_peer(view, peer);
            users.push(whole.user);
            message.peers_changed.push(whole);
        }
        let mut patch = PeerChange { node_id: *changed, ..PeerChange::default() };
        if news.patch && !news.whole {
            patch.derp_region = peer.home;
            patch.endpoints = Some(peer.endpoints.clone());
            patch.disco_key = peer.disco_key;
            patch.cap = node::cap(peer);
        }
        if news.presence {
            let online = view.presence.is_online(*changed);
            patch.online = Some(online);
            if online {
                message.peer_seen_change.insert(*changed, false);
            } else {
                patch.last_seen = peer.last_seen.map(node::time);
            }
        }
        if patch != (PeerChange { node_id: *changed, ..PeerChange::default() }) {
            message.peers_changed_patch.push(patch);
        }
    }
    if relays {
        message.packet_filters = filters(view, me);
    }
    if changes.derp_map {
        message.derp_map = Some(view.settings.derp_map.clone());
    }
    if !users.is_empty() {
        message.user_profiles = profiles(view, users);
    }
    Ok((message != MapResponse::default()).then_some(message))
}

/// The last message to a node that was deleted: itself, expired, so that it asks its user to sign in again.
#[must_use]
pub fn farewell(view: &View<'_>, last: &super::record::Node) -> MapResponse {
    let expires = last.expires.map_or(view.now, |expires| expires.min(view.now));
    let last = super::record::Node { expires: Some(expires), ..last.clone() };
    MapResponse { node: Some(node::for_self(view, &last)), ..MapResponse::default() }
}

/// Profiles of these users, each once.
fn profiles(view: &View<'_>, users: impl IntoIterator<Item = UserId>) -> Vec<UserProfile> {
    let users: std::collections::BTreeSet<UserId> = users.into_iter().collect();
    users.into_iter().filter_map(|id| profile(view.state, id)).collect()
}

/// How a user is shown.
#[must_use]
pub fn profile(state: &State, id: UserId) -> Option<UserProfile> {
    let (login_name, display_name) = if id == TAGGED_DEVICES {
        ("tagged-devices".to_owned(), "Tagged Devices".to_owned())
    } else {
        let user = state.user(id)?;
        (user.name.clone(), user.name.clone())
    };
    Some(UserProfile { id, login_name, display_name, ..UserProfile::default() })
}

/// Names of peers resolve; everything else is the device's own business.
fn dns(view: &View<'_>) -> DnsConfig {
    DnsConfig { proxied: true, domains: vec![view.settings.domain.clone()], ..DnsConfig::default() }
}

/// All filters of a node, by name. Always sent together, and empty rather than absent: not every client knows to keep what
/// is not named, and null is a list to some only.
fn filters(view: &View<'_>, me: &super::record::Node) -> BTreeMap<String, Option<Vec<FilterRule>>> {
    let base = if me.is_expired(view.now) { Vec::new() } else { filter() };
    [("base", base), (relay::FILTER, relay::rules(view, me))].map(|(name, rules)| (name.to_owned(), Some(rules))).into()
}

/// The policy until there is a language for one: every node of the tailnet may open everything on every other.
fn filter() -> Vec<FilterRule> {
    use super::address::{IPV4_RANGE, IPV6_RANGE};
    let any = NetPortRange { ip: "*".to_owned(), ports: PortRange::ANY, ..NetPortRange::default() };
    vec![FilterRule {
        src_ips: vec![IPV4_RANGE.to_string(), IPV6_RANGE.to_string()],
        dst_ports: vec![any],
        ..FilterRule::default()
    }]
}
