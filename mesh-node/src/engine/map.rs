//! The part of a network map that the engine and the data plane act on.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use mesh_control::netmap::Netmap;
use mesh_control::wire::{FilterRule, Node, OURS};
use mesh_derp::map::{DerpMap, RegionId};
use mesh_nat::agent::Relays;
use mesh_noise::key::{DiscoPublic, NodePublic};
use mesh_tun::masquerade::Masquerade;

use super::grants;

/// A peer as the engine sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerView {
    /// Its node key.
    pub node: NodePublic,
    /// Its disco key; none if it has no path discovery.
    pub disco: Option<DiscoPublic>,
    /// The relay region where it listens.
    pub home: Option<RegionId>,
    /// Where it may be reached.
    pub endpoints: Vec<SocketAddr>,
    /// What is routed to it, and what it may send from.
    pub allowed: Vec<IpNet>,
    /// It may be contacted, but may not start anything itself.
    pub jailed: bool,
    /// By which other addresses it knows us.
    pub masquerade: Masquerade,
    /// Whether the coordinator says that it is one of our own kind.
    pub ours: bool,
}

impl PeerView {
    /// Whether the data plane must be told of the difference.
    pub(super) fn routing_differs(&self, other: &Self) -> bool {
        self.allowed != other.allowed || self.jailed != other.jailed || self.masquerade != other.masquerade
    }

    /// `own` are our addresses.
    fn of(node: &Node, own: &[IpNet]) -> Option<Self> {
        let disco = (!node.disco_key.is_zero()).then_some(node.disco_key);
        if node.expired || (disco.is_none() && node.home_derp.is_none()) {
            return None;
        }
        let its_own = |net: &IpNet| node.addresses.contains(net);
        let shown = [node.self_node_v4_masq_addr, node.self_node_v6_masq_addr].into_iter().flatten();
        // An address of the other family than ours changes nothing.
        let pairs = shown.flat_map(|shown| own.iter().map(move |own| (own.addr(), shown)));
        let masquerade = pairs.fold(Masquerade::new(), |masquerade, (own, shown)| masquerade.show(own, shown));
        let allowed = node.allowed_ips.as_deref().unwrap_or(&node.addresses);
        Some(Self {
            node: node.key,
            disco,
            home: node.home_derp,
            endpoints: node.endpoints.clone(),
            // Subnet and exit routes are used only by those who ask for them, and nobody can ask yet.
            allowed: allowed.iter().filter(|net| its_own(net)).copied().collect(),
            jailed: node.is_jailed,
            masquerade,
            ours: node.cap_map.contains_key(OURS),
        })
    }
}

/// A network map, reduced.
#[derive(Debug, Clone, Default)]
pub struct MapView {
    /// Our own addresses.
    pub addresses: Vec<IpNet>,
    /// The peers that can be reached at all.
    pub peers: BTreeMap<NodePublic, PeerView>,
    /// The relays.
    pub derp: Arc<DerpMap>,
    /// What may come in; none until control has said so, and then nothing may.
    pub filter: Option<Vec<FilterRule>>,
    /// Who may relay for whom.
    pub relays: Relays,
}

impl MapView {
    /// Reduces `netmap`.
    #[must_use]
    pub fn of(netmap: &Netmap) -> Self {
        let addresses = netmap.node().map(|node| node.addresses.clone()).unwrap_or_default();
        let views = netmap.peers().values().filter_map(|node| PeerView::of(node, &addresses));
        let peers = views.map(|view| (view.node, view)).collect();
        Self {
            addresses,
            peers,
            derp: Arc::clone(netmap.derp_map()),
            filter: netmap.filter(),
            relays: grants::relays(netmap),
        }
    }

    /// Our own addresses without their prefix lengths.
    pub fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().map(IpNet::addr)
    }

    /// Everything that is routed to peers.
    pub fn routes(&self) -> impl Iterator<Item = IpNet> {
        self.peers.values().flat_map(|peer| peer.allowed.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_knows_us_by_another_address_is_shown_it() {
        let addresses: Vec<IpNet> = vec!["100.64.0.1/32".parse().unwrap(), "fd7a::1/128".parse().unwrap()];
        let node = |shown: Option<&str>| Node {
            home_derp: RegionId::new(1),
            self_node_v4_masq_addr: shown.map(|shown| shown.parse().unwrap()),
            ..Node::default()
        };
        let plain = PeerView::of(&node(None), &addresses).unwrap();
        assert!(plain.masquerade.is_empty());
        let shown = PeerView::of(&node(Some("100.99.0.5")), &addresses).unwrap();
        let [own, shown_address] = ["100.64.0.1", "100.99.0.5"].map(|address| address.parse::<IpAddr>().unwrap());
        assert_eq!(shown.masquerade, Masquerade::new().show(own, shown_address));
        assert!(shown.routing_differs(&plain), "the data plane hears of it");
    }
}
