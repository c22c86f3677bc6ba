//! Who may relay for whom, until there is a language for policies: the nodes of one user that offer it, for the others.
//!
//! A capability is granted in the filter of the node it is used at. A node that offers to relay learns who may ask it
//! (`relay`), and the others learn that it may be asked (`relay-target`), itself included: it may need its own help.

use std::collections::BTreeMap;

use super::View;
use crate::server::record::{Node, Owner};
use crate::wire::{CapGrant, FilterRule};

/// The sources may allocate on the relay of the node that has the rule.
const RELAY: &str = "tailscale.com/cap/relay";
/// The node that has the rule may allocate on the sources' relays.
const RELAY_TARGET: &str = "tailscale.com/cap/relay-target";

/// The name of these rules among a node's filters.
pub(super) const FILTER: &str = "relay";

/// The rules for `me`; none if nobody of its user's offers to relay, or it is nobody's.
pub(super) fn rules(view: &View<'_>, me: &Node) -> Vec<FilterRule> {
    if !matches!(me.owner, Owner::User(_)) || me.is_expired(view.now) {
        return Vec::new();
    }
    let ours = || view.state.nodes().filter(|node| node.owner == me.owner);
    let relays: Vec<String> = ours().filter(|node| node.hostinfo.peer_relay).flat_map(|node| addresses(node)).collect();
    if relays.is_empty() {
        return Vec::new();
    }
    let mut rules = vec![grant(me, relays, RELAY_TARGET)];
    if me.hostinfo.peer_relay {
        rules.push(grant(me, ours().flat_map(|node| addresses(node)).collect(), RELAY));
    }
    rules
}

fn addresses(node: &Node) -> impl Iterator<Item = String> {
    node.addresses.prefixes().map(|prefix| prefix.addr().to_string()).into_iter()
}

fn grant(me: &Node, sources: Vec<String>, capability: &str) -> FilterRule {
    let cap_map = BTreeMap::from([(capability.to_owned(), Vec::new())]);
    let grant = CapGrant { dsts: me.addresses.prefixes().to_vec(), cap_map, ..CapGrant::default() };
    FilterRule { src_ips: sources, cap_grant: vec![grant], ..FilterRule::default() }
}
