//! What the packet filter grants beside passage: who may relay for whom.
//!
//! A capability is granted to the sources of a rule at the destinations named in it, which are this node's own addresses.

use std::net::IpAddr;

use ipnet::IpNet;
use mesh_control::netmap::Netmap;
use mesh_control::wire::{CapGrant, FilterRule, Node};
use mesh_nat::agent::Relays;
use mesh_tun::filter::Addresses;

/// The sources may allocate on our relay.
const RELAY: &str = "tailscale.com/cap/relay";
/// We may allocate on the sources' relays.
const RELAY_TARGET: &str = "tailscale.com/cap/relay-target";
/// Switches that an administrator may set for this node.
const DISABLE_CLIENT: &str = "disable-relay-client";
const DISABLE_SERVER: &str = "disable-relay-server";
/// The first version of clients that know peer relays.
const KNOWS_RELAYS: u16 = 121;

/// Who may relay for whom, as the coordinator says.
pub(super) fn relays(netmap: &Netmap) -> Relays {
    let (Some(me), Some(rules)) = (netmap.node(), netmap.filter()) else { return Relays::default() };
    let has = |node: &Node, capability| {
        rules
            .iter()
            .filter(|rule| rule.cap_grant.iter().any(|grant| grants(grant, capability, &me.addresses)))
            .any(|rule| node.addresses.iter().any(|address| is_source(rule, address.addr())))
    };
    let off = |switch: &str| me.cap_map.contains_key(switch);
    let peers = || netmap.peers().values().filter(|peer| peer.cap.0 >= KNOWS_RELAYS);
    let mut relays = Relays::default();
    if !off(DISABLE_CLIENT) {
        relays.servers = peers().filter(|peer| has(peer, RELAY_TARGET)).map(|peer| peer.key).collect();
        if !off(DISABLE_SERVER) && has(me, RELAY_TARGET) {
            relays.servers.insert(me.key);
        }
    }
    if !off(DISABLE_SERVER) {
        relays.clients = peers().filter(|peer| has(peer, RELAY)).map(|peer| peer.key).collect();
    }
    relays
}

fn grants(grant: &CapGrant, capability: &str, own: &[IpNet]) -> bool {
    let named = grant.cap_map.contains_key(capability) || grant.caps.iter().any(|name| name == capability);
    named && grant.dsts.iter().any(|prefix| own.iter().any(|own| prefix.contains(&own.addr())))
}

fn is_source(rule: &FilterRule, address: IpAddr) -> bool {
    rule.src_ips.iter().any(|text| text.parse::<Addresses>().is_ok_and(|range| range.contains(address)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_control::version::CapabilityVersion;
    use mesh_control::wire::{CapMap, MapResponse, NodeId};
    use mesh_noise::key::NodePublic;
    use std::collections::{BTreeMap, BTreeSet};

    fn key(number: u8) -> NodePublic {
        NodePublic::from_bytes([number; 32])
    }

    fn node(number: u8, cap: u16) -> Node {
        Node {
            id: NodeId(number.into()),
            key: key(number),
            addresses: vec![IpNet::from(IpAddr::from([100, 64, 0, number]))],
            cap: CapabilityVersion(cap),
            ..Node::default()
        }
    }

    fn rule(source: &str, destination: u8, capability: &str) -> FilterRule {
        let dsts = vec![IpNet::from(IpAddr::from([100, 64, 0, destination]))];
        let cap_map = BTreeMap::from([(capability.to_owned(), Vec::new())]);
        let grant = CapGrant { dsts, cap_map, ..CapGrant::default() };
        FilterRule { src_ips: vec![source.to_owned()], cap_grant: vec![grant], ..FilterRule::default() }
    }

    fn granted(rules: Vec<FilterRule>, switches: &[&str]) -> Relays {
        let switches: CapMap = switches.iter().map(|switch| ((*switch).to_owned(), Vec::new())).collect();
        let mut netmap = Netmap::default();
        netmap.apply(MapResponse {
            node: Some(Node { cap_map: switches, ..node(1, 130) }),
            peers: vec![node(2, 130), node(3, 130), node(4, 120)],
            packet_filter: Some(rules),
            ..MapResponse::default()
        });
        relays(&netmap)
    }

    #[test]
    fn rules_say_who_may_be_asked_and_who_may_ask() {
        let rules = || vec![rule("100.64.0.2", 1, RELAY_TARGET), rule("*", 1, RELAY), rule("*", 2, RELAY_TARGET)];
        let relays = granted(rules(), &[]);
        assert_eq!(relays.servers, BTreeSet::from([key(2)]), "the rule for somebody else says nothing to us");
        assert_eq!(relays.clients, BTreeSet::from([key(2), key(3)]), "the fourth is too old");
        assert_eq!(granted(rules(), &[DISABLE_CLIENT]).servers, BTreeSet::new());
        assert_eq!(granted(rules(), &[DISABLE_SERVER]).clients, BTreeSet::new());
    }

    #[test]
    fn we_may_be_our_own_relay() {
        assert_eq!(granted(vec![rule("100.64.0.1", 1, RELAY_TARGET)], &[]).servers, BTreeSet::from([key(1)]));
    }

    #[test]
    fn without_rules_nobody_relays() {
        assert_eq!(granted(Vec::new(), &[]), Relays::default());
    }
}
