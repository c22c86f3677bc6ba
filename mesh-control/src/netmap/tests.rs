use super::*;
use crate::version::CapabilityVersion;
use crate::wire::{NetPortRange, PeerChange};
use mesh_derp::map::{DerpRegion, HomeParams, RegionId};
use mesh_noise::key::DiscoPublic;
use proptest::prelude::*;

fn peer(id: u64) -> Node {
    Node {
        id: NodeId(id),
        name: format!("n{id}.mesh.test."),
        key: NodePublic::from_bytes([u8::try_from(id).unwrap(); 32]),
        addresses: vec![format!("100.64.0.{id}/32").parse().unwrap()],
        ..Node::default()
    }
}

fn peers(ids: &[u64]) -> Vec<Node> {
    ids.iter().copied().map(peer).collect()
}

fn ids(ids: &[u64]) -> BTreeSet<NodeId> {
    ids.iter().copied().map(NodeId).collect()
}

fn with_peers(known: &[u64]) -> Netmap {
    let mut netmap = Netmap::new();
    netmap.apply(MapResponse { node: Some(peer(99)), peers: peers(known), ..MapResponse::default() });
    netmap
}

#[test]
fn a_keep_alive_changes_nothing_but_the_clock() {
    let mut netmap = with_peers(&[1]);
    let time = Timestamp::from_unix(1_700_000_000, 0);
    let message = MapResponse {
        control_time: time,
        peers_removed: vec![NodeId(1)],
        domain: "ignored".into(),
        ..MapResponse::keep_alive()
    };
    assert!(netmap.apply(message).is_empty());
    assert_eq!((netmap.control_time(), netmap.peers().len(), netmap.domain()), (time, 1, ""));
}

#[test]
fn a_whole_list_replaces_and_an_empty_one_does_not() {
    let mut netmap = with_peers(&[1, 2]);
    assert!(netmap.apply(MapResponse::default()).is_empty());
    let changes =
        netmap.apply(MapResponse { peers: peers(&[2, 3]), peers_removed: vec![NodeId(2)], ..MapResponse::default() });
    assert_eq!((changes.updated, changes.removed), (ids(&[3]), ids(&[1])));
    assert_eq!(netmap.peers().keys().copied().collect::<BTreeSet<_>>(), ids(&[2, 3]));
}

#[test]
fn deltas_act_in_order_and_skip_strangers() {
    let mut netmap = with_peers(&[1, 2]);
    let time = Timestamp::from_unix(1_800_000_000, 0);
    let changes = netmap.apply(MapResponse {
        control_time: time,
        peers_removed: vec![NodeId(1), NodeId(50)],
        peers_changed: vec![peer(1), peer(3)],
        online_change: BTreeMap::from([(NodeId(2), true), (NodeId(60), true)]),
        peer_seen_change: BTreeMap::from([(NodeId(3), true)]),
        peers_changed_patch: vec![
            PeerChange { node_id: NodeId(3), online: Some(false), ..PeerChange::default() },
            PeerChange { node_id: NodeId(70), online: Some(false), ..PeerChange::default() },
        ],
        ..MapResponse::default()
    });
    assert_eq!((changes.updated, changes.removed), (ids(&[1, 2, 3]), ids(&[])));
    assert_eq!(netmap.peer(NodeId(2)).unwrap().online, Some(true));
    let third = netmap.peer(NodeId(3)).unwrap();
    assert_eq!((third.online, third.last_seen), (Some(false), Some(time)));
}

#[test]
fn a_patch_leaves_what_it_does_not_name() {
    let mut netmap = with_peers(&[1]);
    let before = netmap.peer(NodeId(1)).unwrap().clone();
    let change = PeerChange {
        node_id: NodeId(1),
        derp_region: RegionId::new(7),
        cap: CapabilityVersion(131),
        endpoints: Some(vec!["192.0.2.1:41641".parse().unwrap(), "0.0.0.0:0".parse().unwrap()]),
        disco_key: DiscoPublic::from_bytes([9; 32]),
        key_expiry: Some(Timestamp::ZERO),
        ..PeerChange::default()
    };
    netmap.apply(MapResponse { peers_changed_patch: vec![change], ..MapResponse::default() });
    let after = netmap.peer(NodeId(1)).unwrap();
    assert_eq!(after.home_derp, RegionId::new(7));
    assert_eq!(after.endpoints, ["192.0.2.1:41641".parse().unwrap()]);
    assert_eq!((&after.key, &after.name, after.online), (&before.key, &before.name, None));
    let clear = PeerChange { node_id: NodeId(1), endpoints: Some(Vec::new()), ..PeerChange::default() };
    netmap.apply(MapResponse { peers_changed_patch: vec![clear], ..MapResponse::default() });
    assert!(netmap.peer(NodeId(1)).unwrap().endpoints.is_empty());
}

#[test]
fn filters_are_named_and_none_is_not_empty() {
    let mut netmap = Netmap::new();
    assert_eq!(netmap.filter(), None);
    let rule = |source: &str| FilterRule { src_ips: vec![source.into()], ..FilterRule::default() };
    netmap.apply(MapResponse { packet_filter: Some(Vec::new()), ..MapResponse::default() });
    assert_eq!(netmap.filter(), Some(Vec::new()));
    let two = BTreeMap::from([("b".into(), Some(vec![rule("2")])), ("a".into(), Some(vec![rule("1")]))]);
    assert!(netmap.apply(MapResponse { packet_filters: two, ..MapResponse::default() }).filter);
    assert_eq!(netmap.filter(), Some(vec![rule("1"), rule("2")]));
    let fewer = BTreeMap::from([("a".to_owned(), None)]);
    netmap.apply(MapResponse { packet_filters: fewer, ..MapResponse::default() });
    assert_eq!(netmap.filter(), Some(vec![rule("2")]));
    let anew = BTreeMap::from([("*".into(), None), ("c".into(), Some(vec![rule("3")]))]);
    netmap.apply(MapResponse { packet_filters: anew, ..MapResponse::default() });
    assert_eq!(netmap.filter(), Some(vec![rule("3")]));
}

#[test]
fn a_relic_voids_the_whole_filter() {
    let mut netmap = Netmap::new();
    let relic = FilterRule {
        dst_ports: vec![NetPortRange { bits: Some(8), ..NetPortRange::default() }],
        ..FilterRule::allow_all()
    };
    netmap.apply(MapResponse { packet_filter: Some(vec![FilterRule::allow_all(), relic]), ..MapResponse::default() });
    assert_eq!(netmap.filter(), Some(Vec::new()));
}

#[test]
fn nodes_are_kept_in_one_form() {
    let mut netmap = Netmap::new();
    let mut node = peer(1);
    node.legacy_derp = "127.3.3.40:12".into();
    node.capabilities = vec!["ssh".into()];
    netmap.apply(MapResponse { node: Some(node.clone()), ..MapResponse::default() });
    let kept = netmap.node().unwrap();
    assert_eq!(kept.home_derp, RegionId::new(12));
    assert_eq!(kept.allowed_ips.as_deref(), Some(&node.addresses[..]));
    assert!(kept.cap_map.contains_key("ssh") && kept.capabilities.is_empty());
    assert_eq!(netmap.dns_suffix(), Some("mesh.test"));
}

#[test]
fn a_relay_map_without_regions_keeps_the_former_ones() {
    let mut netmap = Netmap::new();
    let region = RegionId::new(900).unwrap();
    let mut map = DerpMap::default();
    map.regions.insert(region, DerpRegion::new(region, "t", "test"));
    netmap.apply(MapResponse { derp_map: Some(map), ..MapResponse::default() });
    let params = HomeParams { region_score: BTreeMap::from([(region, 0.5)]) };
    let update = DerpMap { home_params: Some(params.clone()), ..DerpMap::default() };
    assert!(netmap.apply(MapResponse { derp_map: Some(update), ..MapResponse::default() }).derp_map);
    assert_eq!(netmap.derp_map().regions.len(), 1);
    assert_eq!(netmap.derp_map().home_params, Some(params));
}

#[test]
fn a_restart_shows_the_difference_and_keeps_the_old_until_then() {
    let mut netmap = with_peers(&[1, 2]);
    netmap.restart();
    assert_eq!(netmap.peers().len(), 2);
    assert!(netmap.apply(MapResponse::keep_alive()).is_empty());
    let whole = MapResponse { node: Some(peer(99)), peers_changed: peers(&[2, 3]), ..MapResponse::default() };
    let changes = netmap.apply(whole);
    assert_eq!((changes.updated, changes.removed, changes.node), (ids(&[3]), ids(&[1]), false));
    assert!(netmap.apply(MapResponse { peers_changed: peers(&[4]), ..MapResponse::default() }).updated == ids(&[4]));
    assert_eq!(netmap.peers().len(), 3);
}

/// What a server knows of one peer.
#[derive(Debug, Clone)]
enum Edit {
    Put(u64, u8),
    Remove(u64),
    Online(u64, bool),
    Endpoints(u64, Vec<u16>),
    Rekey(u64, u8),
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let id = 1_u64..6;
    prop::collection::vec(
        prop_oneof![
            (id.clone(), any::<u8>()).prop_map(|(id, tag)| Edit::Put(id, tag)),
            id.clone().prop_map(Edit::Remove),
            (id.clone(), any::<bool>()).prop_map(|(id, online)| Edit::Online(id, online)),
            (id.clone(), prop::collection::vec(1_u16.., 0..3)).prop_map(|(id, ports)| Edit::Endpoints(id, ports)),
            (id, 1_u8..).prop_map(|(id, key)| Edit::Rekey(id, key)),
        ],
        1..30,
    )
}

/// The server's own bookkeeping, and the delta that it sends for it.
fn serve(model: &mut BTreeMap<NodeId, Node>, edit: &Edit) -> MapResponse {
    let mut message = MapResponse::default();
    let patch = |id: &u64| PeerChange { node_id: NodeId(*id), ..PeerChange::default() };
    match edit {
        Edit::Put(id, tag) => {
            let mut node = peer(*id);
            node.tags = vec![format!("tag:t{tag}")];
            model.insert(node.id, node.clone());
            message.peers_changed.push(node);
        }
        Edit::Remove(id) => {
            model.remove(&NodeId(*id));
            message.peers_removed.push(NodeId(*id));
        }
        Edit::Online(id, online) => {
            if let Some(node) = model.get_mut(&NodeId(*id)) {
                node.online = Some(*online);
            }
            message.online_change.insert(NodeId(*id), *online);
        }
        Edit::Endpoints(id, ports) => {
            let list: Vec<_> = ports.iter().map(|port| ([192, 0, 2, 1], *port).into()).collect();
            if let Some(node) = model.get_mut(&NodeId(*id)) {
                node.endpoints.clone_from(&list);
            }
            message.peers_changed_patch.push(PeerChange { endpoints: Some(list), ..patch(id) });
        }
        Edit::Rekey(id, key) => {
            let key = NodePublic::from_bytes([*key; 32]);
            if let Some(node) = model.get_mut(&NodeId(*id)) {
                node.key = key;
            }
            message.peers_changed_patch.push(PeerChange { key, ..patch(id) });
        }
    }
    message
}

proptest! {
    #[test]
    fn deltas_lead_to_the_same_map_as_a_whole_one(edits in edits()) {
        let mut model = BTreeMap::new();
        let mut by_deltas = with_peers(&[]);
        for edit in &edits {
            let before = by_deltas.clone();
            let message = serve(&mut model, edit);
            // Through the wire, as it would really come.
            let message = crate::wire::decode(&crate::wire::encode(&message)).unwrap();
            let changes = by_deltas.apply(message);
            prop_assert_eq!(&changes, &Changes::between(&before, &by_deltas));
        }
        let mut by_whole = with_peers(&[]);
        by_whole.restart();
        let whole = MapResponse {
            node: Some(peer(99)), peers: model.into_values().collect(), ..MapResponse::default()
        };
        by_whole.apply(whole);
        prop_assert_eq!(by_deltas, by_whole);
    }
}
