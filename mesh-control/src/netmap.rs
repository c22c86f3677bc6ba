//! The netmap: all that control has told a node, kept up to date by whole maps and deltas.
//!
//! [`Netmap::apply`] takes one [`MapResponse`] and says in [`Changes`] what is different. The members act in this order:
//!
//! 1. A keep-alive changes nothing but the server's clock and dial plan.
//! 2. Peers: a non-empty `Peers` is the whole list and ends the matter. Otherwise `PeersRemoved`, `PeersChanged` (whole
//!    nodes), `PeerSeenChange`, `OnlineChange`, `PeersChangedPatch` (single fields), in that order; peers nobody has
//!    introduced are ignored.
//! 3. This node, people, relays, filters, DNS and the rest, each replaced as a whole if present. `PacketFilter` is the
//!    filter called `base`; in `PacketFilters` a `null` deletes a name and that of `*` deletes all first.
//!
//! State gathers within one stream only. After [`Netmap::restart`] the next map is taken to be whole, and the changes are
//! the differences between it and what was known: an engine sees that a peer vanished while the stream was down.
//!
//! Nodes are kept in one form: [`Node::routed`] in `allowed_ips`, [`Node::home`] in `home_derp`, names of capabilities
//! in `cap_map`, unusable endpoints dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_derp::map::DerpMap;
use mesh_noise::key::NodePublic;

use crate::wire::{
    ControlDialPlan, DisplayMessage, DnsConfig, FilterRule, MapResponse, Node, NodeId, Timestamp, UserId, UserProfile,
};

/// The filter that `PacketFilter` names implicitly.
const BASE_FILTER: &str = "base";
/// The name that stands for all names.
const ALL: &str = "*";

/// What control has told this node.
///
/// Cloning is cheap: nodes are shared.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Netmap {
    node: Option<Arc<Node>>,
    peers: BTreeMap<NodeId, Arc<Node>>,
    users: BTreeMap<UserId, UserProfile>,
    derp_map: Arc<DerpMap>,
    dns: DnsConfig,
    domain: String,
    /// `None` until a filter has come.
    filters: Option<BTreeMap<String, Vec<FilterRule>>>,
    health: Vec<String>,
    messages: BTreeMap<String, DisplayMessage>,
    ssh_policy: Option<serde_json::Value>,
    collect_services: Option<bool>,
    dial_plan: Option<ControlDialPlan>,
    control_time: Timestamp,
    restarting: bool,
}

/// What one message made different. Empty for a keep-alive.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Changes {
    /// This node.
    pub node: bool,
    /// Peers that are new or different.
    pub updated: BTreeSet<NodeId>,
    /// Peers that are gone.
    pub removed: BTreeSet<NodeId>,
    /// People.
    pub users: bool,
    /// The relays.
    pub derp_map: bool,
    /// Name resolution, or the tailnet's name.
    pub dns: bool,
    /// The packet filter.
    pub filter: bool,
    /// Notices to the user.
    pub health: bool,
    /// The SSH policy.
    pub ssh_policy: bool,
    /// The dial plan, or whether to report services.
    pub other: bool,
}

impl Changes {
    /// Whether nothing is different.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// All that differs between two netmaps.
    #[must_use]
    pub fn between(old: &Netmap, new: &Netmap) -> Self {
        let updated = new.peers.iter().filter(|(id, peer)| old.peers.get(id) != Some(peer)).map(|(id, _)| *id);
        let removed = old.peers.keys().filter(|id| !new.peers.contains_key(id)).copied();
        Self {
            node: old.node != new.node,
            updated: updated.collect(),
            removed: removed.collect(),
            users: old.users != new.users,
            derp_map: old.derp_map != new.derp_map,
            dns: old.dns != new.dns || old.domain != new.domain,
            filter: old.filters != new.filters,
            health: old.health != new.health || old.messages != new.messages,
            ssh_policy: old.ssh_policy != new.ssh_policy,
            other: old.dial_plan != new.dial_plan || old.collect_services != new.collect_services,
        }
    }
}

impl Netmap {
    /// Nothing known yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// This node, or `None` before the first map.
    #[must_use]
    pub fn node(&self) -> Option<&Node> {
        self.node.as_deref()
    }

    /// The peers, by number.
    #[must_use]
    pub fn peers(&self) -> &BTreeMap<NodeId, Arc<Node>> {
        &self.peers
    }

    /// One peer.
    #[must_use]
    pub fn peer(&self, id: NodeId) -> Option<&Node> {
        self.peers.get(&id).map(Arc::as_ref)
    }

    /// The peer that holds this node key. Walks all peers.
    #[must_use]
    pub fn peer_by_key(&self, key: &NodePublic) -> Option<&Node> {
        self.peers.values().find(|peer| peer.key == *key).map(Arc::as_ref)
    }

    /// The people that nodes refer to, by number.
    #[must_use]
    pub fn users(&self) -> &BTreeMap<UserId, UserProfile> {
        &self.users
    }

    /// The relays; without regions until a map has brought some.
    #[must_use]
    pub fn derp_map(&self) -> &Arc<DerpMap> {
        &self.derp_map
    }

    /// Name resolution.
    #[must_use]
    pub fn dns(&self) -> &DnsConfig {
        &self.dns
    }

    /// The tailnet's name for people.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The suffix of this tailnet's names, without leading or trailing dot: this node's name but for its first label.
    #[must_use]
    pub fn dns_suffix(&self) -> Option<&str> {
        let (_, suffix) = self.node()?.name.trim_end_matches('.').split_once('.')?;
        Some(suffix)
    }

    /// The rules for inbound packets, or `None` if no filter has come. Either nothing or an empty list lets nothing in.
    ///
    /// A rule with a member from 2020 (`SrcBits`, `Bits`) says something else than it seems to, so it voids them all.
    #[must_use]
    pub fn filter(&self) -> Option<Vec<FilterRule>> {
        let rules: Vec<FilterRule> = self.filters.as_ref()?.values().flatten().cloned().collect();
        let relic =
            |rule: &FilterRule| !rule.src_bits.is_empty() || rule.dst_ports.iter().any(|range| range.bits.is_some());
        Some(if rules.iter().any(relic) { Vec::new() } else { rules })
    }

    /// Problems that the server wants shown, as texts.
    #[must_use]
    pub fn health(&self) -> &[String] {
        &self.health
    }

    /// Problems that the server wants shown, by name.
    #[must_use]
    pub fn messages(&self) -> &BTreeMap<String, DisplayMessage> {
        &self.messages
    }

    /// The SSH policy as it was sent.
    #[must_use]
    pub fn ssh_policy(&self) -> Option<&serde_json::Value> {
        self.ssh_policy.as_ref()
    }

    /// Whether the server wants listening services reported; `None`: it did not say.
    #[must_use]
    pub fn collect_services(&self) -> Option<bool> {
        self.collect_services
    }

    /// Where to find the server next time.
    #[must_use]
    pub fn dial_plan(&self) -> Option<&ControlDialPlan> {
        self.dial_plan.as_ref()
    }

    /// The server's clock when it last told it; zero if never.
    #[must_use]
    pub fn control_time(&self) -> Timestamp {
        self.control_time
    }

    /// Says that a new stream begins: the next map is whole. What is known stays until then.
    pub fn restart(&mut self) {
        self.restarting = true;
    }

    /// Takes one message of the stream and says what it changed.
    pub fn apply(&mut self, message: MapResponse) -> Changes {
        if !message.control_time.is_zero() {
            self.control_time = message.control_time;
        }
        if message.keep_alive {
            let plan = message.control_dial_plan;
            let other = plan.is_some() && plan != self.dial_plan;
            if other {
                self.dial_plan = plan;
            }
            return Changes { other, ..Changes::default() };
        }
        if !self.restarting {
            return self.apply_in_stream(message);
        }
        let mut whole = Self { control_time: self.control_time, ..Self::default() };
        whole.apply_in_stream(message);
        let changes = Changes::between(self, &whole);
        *self = whole;
        changes
    }

    fn apply_in_stream(&mut self, message: MapResponse) -> Changes {
        let mut changes = Changes::default();
        let MapResponse {
            node,
            derp_map,
            peers,
            peers_changed,
            peers_removed,
            peers_changed_patch,
            peer_seen_change,
            online_change,
            dns_config,
            domain,
            collect_services,
            packet_filter,
            packet_filters,
            user_profiles,
            health,
            display_messages,
            ssh_policy,
            control_dial_plan,
            ..
        } = message;
        if peers.is_empty() {
            for id in peers_removed {
                if self.peers.remove(&id).is_some() {
                    changes.updated.remove(&id);
                    changes.removed.insert(id);
                }
            }
            for peer in peers_changed {
                self.put_peer(peer, &mut changes);
            }
            let now = self.control_time;
            for (id, seen) in peer_seen_change {
                self.edit(id, &mut changes, |peer| peer.last_seen = seen.then_some(now));
            }
            for (id, online) in online_change {
                self.edit(id, &mut changes, |peer| peer.online = Some(online));
            }
            for change in &peers_changed_patch {
                self.edit(change.node_id, &mut changes, |peer| peer.apply(change));
            }
        } else {
            let mut gone = std::mem::take(&mut self.peers);
            for peer in peers {
                if let Some(known) = gone.remove(&peer.id) {
                    self.peers.insert(peer.id, known);
                }
                self.put_peer(peer, &mut changes);
            }
            changes.removed.extend(gone.into_keys());
        }
        if let Some(node) = node {
            let node = Some(Arc::new(normalised(node)));
            changes.node = replace(&mut self.node, node);
        }
        for user in user_profiles {
            changes.users |= self.users.get(&user.id) != Some(&user);
            self.users.insert(user.id, user);
        }
        if let Some(update) = derp_map {
            let map = Arc::new(merged(&self.derp_map, update));
            changes.derp_map = replace(&mut self.derp_map, map);
        }
        if let Some(dns) = dns_config {
            changes.dns |= replace(&mut self.dns, dns);
        }
        if !domain.is_empty() {
            changes.dns |= replace(&mut self.domain, domain);
        }
        if packet_filter.is_some() || !packet_filters.is_empty() {
            let mut filters = self.filters.clone().unwrap_or_default();
            if let Some(rules) = packet_filter {
                filters.insert(BASE_FILTER.to_owned(), rules);
            }
            patch(&mut filters, packet_filters);
            changes.filter = replace(&mut self.filters, Some(filters));
        }
        if let Some(health) = health {
            changes.health |= replace(&mut self.health, health);
        }
        if !display_messages.is_empty() {
            let mut messages = self.messages.clone();
            patch(&mut messages, display_messages);
            changes.health |= replace(&mut self.messages, messages);
        }
        if ssh_policy.is_some() {
            changes.ssh_policy = replace(&mut self.ssh_policy, ssh_policy);
        }
        if control_dial_plan.is_some() {
            changes.other |= replace(&mut self.dial_plan, control_dial_plan);
        }
        if collect_services.is_some() {
            changes.other |= replace(&mut self.collect_services, collect_services);
        }
        changes
    }

    fn put_peer(&mut self, peer: Node, changes: &mut Changes) {
        let (id, peer) = (peer.id, normalised(peer));
        if self.peers.get(&id).is_none_or(|known| **known != peer) {
            self.peers.insert(id, Arc::new(peer));
            changes.removed.remove(&id);
            changes.updated.insert(id);
        }
    }

    /// Edits a known peer and notes it if that made a difference.
    fn edit(&mut self, id: NodeId, changes: &mut Changes, edit: impl FnOnce(&mut Node)) {
        let Some(known) = self.peers.get_mut(&id) else { return };
        let mut peer = Node::clone(known);
        edit(&mut peer);
        drop_unusable(&mut peer);
        if **known != peer {
            *known = Arc::new(peer);
            changes.updated.insert(id);
        }
    }
}

/// Puts a new value in place and says whether it is different.
fn replace<T: PartialEq>(place: &mut T, value: T) -> bool {
    let different = *place != value;
    *place = value;
    different
}

/// Applies a map of changes by name: `None` deletes, and `*` with `None` deletes all first.
fn patch<T>(values: &mut BTreeMap<String, T>, mut changes: BTreeMap<String, Option<T>>) {
    if let Some(None) = changes.get(ALL) {
        values.clear();
        changes.remove(ALL);
    }
    for (name, value) in changes {
        match value {
            Some(value) => {
                values.insert(name, value);
            }
            None => {
                values.remove(&name);
            }
        }
    }
}

/// A relay map update over the former one: without regions the former ones stay, and likewise the home parameters.
fn merged(known: &DerpMap, mut update: DerpMap) -> DerpMap {
    if update.regions.is_empty() {
        update.regions.clone_from(&known.regions);
        update.omit_default_regions = known.omit_default_regions;
    }
    if update.home_params.is_none() {
        update.home_params.clone_from(&known.home_params);
    }
    update
}

/// The one form in which nodes are kept.
fn normalised(mut node: Node) -> Node {
    node.home_derp = node.home();
    node.legacy_derp.clear();
    node.allowed_ips = Some(node.routed().to_vec());
    for name in std::mem::take(&mut node.capabilities) {
        node.cap_map.entry(name).or_default();
    }
    drop_unusable(&mut node);
    node
}

fn drop_unusable(node: &mut Node) {
    node.endpoints.retain(|endpoint| !endpoint.ip().is_unspecified() && endpoint.port() != 0);
}

#[cfg(test)]
mod tests;
