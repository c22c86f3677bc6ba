use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_derp::map::{DerpMap, DerpRegion, RegionId};
use mesh_noise::key::{MachinePublic, NodePublic};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::netmap::Netmap;
use crate::server::state::{Context, Decision, NewAuthKey, Refusal, Registered, Registration, Rules, Update};
use crate::server::{Actor, Change, NodeChange, TailnetId};
use crate::wire::{Hostinfo, NetInfo};

/// A tailnet, whoever is online in it, and the log that streams read.
struct World {
    state: State,
    presence: Presence,
    settings: Settings,
    log: Changelog,
    now: Moment,
    instant: Instant,
    rng: StdRng,
    auth: String,
}

impl World {
    #[expect(clippy::disallowed_methods, reason = "a starting point for virtual time")]
    fn new(log: usize) -> Self {
        let mut world = Self {
            state: State::new(TailnetId(1), Rules::default()),
            presence: Presence::default(),
            settings: Settings { domain: "tailnet.mesh.internal".into(), derp_map: DerpMap::default() },
            log: Changelog::new(log),
            now: Moment::from_millis(1_790_000_000_000),
            instant: Instant::now(),
            rng: StdRng::seed_from_u64(4),
            auth: String::new(),
        };
        world.run(|state, context, _| state.create_user(context, "alice")).unwrap();
        let wanted = NewAuthKey { user: "alice".into(), reusable: true, ..NewAuthKey::default() };
        world.auth = world.run(|state, context, rng| state.create_key(context, rng, wanted)).unwrap().0;
        world
    }

    fn run<T>(
        &mut self,
        decide: impl FnOnce(&State, &Context, &mut StdRng) -> Result<Decision<T>, Refusal>,
    ) -> Result<T, Refusal> {
        let context = Context { now: self.now, by: Actor::Coordinator };
        let decision = decide(&self.state, &context, &mut self.rng)?;
        let (events, reply) = self.state.seal(&context, decision);
        for event in events {
            if let Some(notice) = Notice::of(&event.change) {
                if let Change::NodeRemoved(node) = &event.change {
                    self.presence.forget(node.id);
                }
                self.log.push(notice);
            }
        }
        Ok(reply)
    }

    fn join(&mut self, machine: u8, key: u8) -> Option<NodeId> {
        let request = Registration {
            machine: MachinePublic::from_bytes([machine; 32]),
            node_key: NodePublic::from_bytes([key; 32]),
            old_node_key: NodePublic::ZERO,
            auth_key: Some(self.auth.clone()),
            expiry: None,
            followup: None,
            hostinfo: Hostinfo { hostname: format!("host{machine}"), os: "linux".into(), ..Hostinfo::default() },
            ephemeral: false,
            version: 130,
            from: None,
        };
        match self.run(|state, context, rng| state.register(context, rng, &request)) {
            Ok(Registered::Accepted(id)) => Some(id),
            Ok(_) | Err(_) => None,
        }
    }

    fn update(&mut self, id: NodeId, update: Update) {
        // A node that is gone reports nothing.
        let _ = self.run(|state, context, _| state.update(context, id, update));
    }

    fn come(&mut self, id: NodeId) {
        if self.state.node(id).is_some() && self.presence.open(id).came_online {
            self.log.push(Notice::Presence(id));
        }
    }

    fn go(&mut self, id: NodeId) {
        let was = self.presence.is_online(id);
        let poll = self.presence.open(id).poll;
        if !was {
            self.log.push(Notice::Presence(id));
        }
        self.presence.close(self.instant, id, poll);
        self.instant += crate::server::presence::GRACE;
        for gone in self.presence.handle_timeout(self.instant) {
            let _ = self.run(|state, context, _| state.seen(context, gone));
        }
    }

    fn view(&self) -> View<'_> {
        View { state: &self.state, presence: &self.presence, settings: &self.settings, now: self.now }
    }
}

/// A client that follows one stream.
struct Follower {
    stream: MapStream,
    netmap: Netmap,
    ended: bool,
}

impl Follower {
    fn of(world: &World, id: NodeId) -> Self {
        let key = world.state.node(id).unwrap().node_key;
        Self { stream: MapStream::new(id, key), netmap: Netmap::new(), ended: false }
    }

    /// Takes what the server has to say now, as it comes off the wire. Returns the message.
    fn follow(&mut self, world: &World) -> Option<MapResponse> {
        let message = match self.stream.next(&world.view(), &world.log) {
            Next::Send(message) => Some(message),
            Next::Idle => None,
            Next::End(message) => {
                self.ended = true;
                message
            }
        };
        let message = message?;
        let read: MapResponse = crate::wire::decode(&crate::wire::encode(&message)).unwrap();
        assert_eq!(read, *message);
        self.netmap.apply(read.clone());
        Some(read)
    }
}

fn reachable(port: u16) -> Update {
    let info = NetInfo { preferred_derp: RegionId::new(900), ..NetInfo::default() };
    Update {
        endpoints: Some(vec![([10, 0, 0, 1], port).into()]),
        hostinfo: Some(Hostinfo {
            hostname: "host2".into(),
            os: "linux".into(),
            net_info: Some(info),
            ..Hostinfo::default()
        }),
        ..Update::default()
    }
}

/// A report of a node that offers to relay, or does no longer.
fn offering(peer_relay: bool) -> Update {
    let hostinfo = Hostinfo { hostname: "host2".into(), os: "linux".into(), peer_relay, ..Hostinfo::default() };
    Update { hostinfo: Some(hostinfo), ..Update::default() }
}

/// What the rules grant: from whom, which capability.
fn grants(netmap: &Netmap) -> Vec<(Vec<String>, String)> {
    let own = netmap.node().unwrap().addresses.clone();
    let rules = netmap.filter().unwrap();
    let granted = rules.into_iter().flat_map(|rule| {
        let grants = rule.cap_grant.into_iter().inspect(|grant| assert_eq!(grant.dsts, own)).collect::<Vec<_>>();
        grants.into_iter().flat_map(move |grant| {
            let sources = rule.src_ips.clone();
            grant.cap_map.into_keys().map(move |capability| (sources.clone(), capability)).collect::<Vec<_>>()
        })
    });
    granted.collect()
}

#[test]
fn a_user_s_nodes_may_use_the_relay_that_one_of_them_offers() {
    let mut world = World::new(64);
    let (me, relay) = (world.join(1, 1).unwrap(), world.join(2, 2).unwrap());
    world.run(|state, context, _| state.create_user(context, "bob")).unwrap();
    let wanted = NewAuthKey { user: "bob".into(), reusable: true, ..NewAuthKey::default() };
    world.auth = world.run(|state, context, rng| state.create_key(context, rng, wanted)).unwrap().0;
    let stranger = world.join(3, 3).unwrap();
    let mut followers = [me, relay, stranger].map(|id| Follower::of(&world, id));
    followers.iter_mut().for_each(|follower| assert!(follower.follow(&world).is_some()));
    assert!(followers.iter().all(|follower| grants(&follower.netmap).is_empty()), "nobody offers anything");

    world.update(relay, offering(true));
    followers.iter_mut().for_each(|follower| assert!(follower.follow(&world).is_some()));
    let address = |number: u8| vec![format!("100.64.0.{number}"), format!("fd7a:115c:a1e0::6440:{number}")];
    let target = (address(2), "tailscale.com/cap/relay-target".to_owned());
    let asks = ([address(1), address(2)].concat(), "tailscale.com/cap/relay".to_owned());
    assert_eq!(grants(&followers[0].netmap), std::slice::from_ref(&target));
    assert_eq!(grants(&followers[1].netmap), [target, asks]);
    assert_eq!(grants(&followers[2].netmap), []);
    assert!(followers[0].netmap.peer(relay).unwrap().hostinfo.as_ref().unwrap().peer_relay);

    world.update(relay, offering(false));
    followers.iter_mut().for_each(|follower| assert!(follower.follow(&world).is_some()));
    assert!(followers.iter().all(|follower| grants(&follower.netmap).is_empty()));
}

#[test]
fn the_first_map_holds_all_that_a_client_needs() {
    let mut world = World::new(64);
    let (me, peer) = (world.join(1, 1).unwrap(), world.join(2, 2).unwrap());
    world.come(me);
    let mut follower = Follower::of(&world, me);
    let map = follower.follow(&world).unwrap();
    let node = map.node.unwrap();
    assert_eq!(node.name, "host1.tailnet.mesh.internal.");
    assert!(node.machine_authorized && node.online == Some(true) && !node.stable_id.is_empty());
    assert_eq!(node.key, NodePublic::from_bytes([1; 32]));
    assert_eq!(
        node.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["100.64.0.1/32", "fd7a:115c:a1e0::6440:1/128"]
    );
    assert_eq!(map.peers.iter().map(|peer| peer.id).collect::<Vec<_>>(), [peer]);
    assert!(map.peers[0].machine.is_zero() && map.peers[0].online == Some(false));
    assert_eq!(map.user_profiles.len(), 1);
    assert!(map.debug.unwrap().disable_log_tail);
    assert_eq!(map.collect_services, Some(false));
    assert_eq!(map.dns_config.unwrap().domains, ["tailnet.mesh.internal"]);
    assert!(map.derp_map.is_some() && !map.packet_filters["base"].as_ref().unwrap().is_empty());
    assert!(!map.control_time.is_zero());
}

#[test]
fn nothing_in_a_map_is_null() {
    fn check(value: &serde_json::Value, path: &str) {
        match value {
            serde_json::Value::Null => panic!("{path} is null"),
            serde_json::Value::Array(list) => list.iter().for_each(|value| check(value, path)),
            serde_json::Value::Object(map) => {
                map.iter().for_each(|(name, value)| check(value, &format!("{path}.{name}")))
            }
            serde_json::Value::Bool(_) | serde_json::Value::Number(_) | serde_json::Value::String(_) => {}
        }
    }
    let mut world = World::new(64);
    let me = world.join(1, 1).unwrap();
    world.join(2, 2).unwrap();
    let map = full(&world.view(), me).unwrap();
    check(&serde_json::to_value(&map).unwrap(), "");
}

#[test]
fn joined_changed_and_gone_peers_come_as_deltas() {
    let mut world = World::new(64);
    let me = world.join(1, 1).unwrap();
    let mut follower = Follower::of(&world, me);
    follower.follow(&world).unwrap();
    assert_eq!(follower.follow(&world), None);

    let peer = world.join(2, 2).unwrap();
    let joined = follower.follow(&world).unwrap();
    assert_eq!(joined.peers_changed.iter().map(|peer| peer.id).collect::<Vec<_>>(), [peer]);
    assert_eq!(joined.user_profiles.len(), 1);
    assert!(joined.node.is_none() && joined.peers.is_empty());

    world.update(peer, reachable(7));
    let patched = follower.follow(&world).unwrap();
    assert!(patched.peers_changed.is_empty());
    assert_eq!(patched.peers_changed_patch[0].derp_region, RegionId::new(900));
    assert_eq!(patched.peers_changed_patch[0].endpoints.as_deref(), Some(&[([10, 0, 0, 1], 7).into()][..]));

    // Clearing is said aloud.
    world.update(peer, Update { endpoints: Some(Vec::new()), ..Update::default() });
    assert_eq!(follower.follow(&world).unwrap().peers_changed_patch[0].endpoints, Some(Vec::new()));

    world.come(peer);
    assert_eq!(follower.follow(&world).unwrap().peers_changed_patch[0].online, Some(true));
    world.go(peer);
    let gone = follower.follow(&world).unwrap().peers_changed_patch.remove(0);
    assert!(gone.online == Some(false) && gone.last_seen.is_some());

    world.run(|state, context, _| state.rename(context, peer, "front")).unwrap();
    assert_eq!(follower.follow(&world).unwrap().peers_changed[0].name, "front.tailnet.mesh.internal.");

    world.run(|state, context, _| state.delete(context, peer)).unwrap();
    assert_eq!(follower.follow(&world).unwrap().peers_removed, [peer]);
    assert_eq!(follower.follow(&world), None);
}

#[test]
fn what_peers_do_not_see_is_not_sent_to_them() {
    let mut world = World::new(64);
    let (me, peer) = (world.join(1, 1).unwrap(), world.join(2, 2).unwrap());
    let (mut mine, mut theirs) = (Follower::of(&world, me), Follower::of(&world, peer));
    mine.follow(&world);
    theirs.follow(&world);
    let hostinfo =
        Hostinfo { hostname: "host2".into(), os: "linux".into(), go_arch: "arm64".into(), ..Hostinfo::default() };
    world.update(peer, Update { hostinfo: Some(hostinfo), ..Update::default() });
    assert_eq!(mine.follow(&world), None);
    assert!(theirs.follow(&world).unwrap().node.is_some());
}

#[test]
fn an_expired_node_sees_itself_expired_and_nobody_else() {
    let mut world = World::new(64);
    let (me, _) = (world.join(1, 1).unwrap(), world.join(2, 2).unwrap());
    let mut follower = Follower::of(&world, me);
    follower.follow(&world).unwrap();
    world.run(|state, context, _| state.expire(context, me)).unwrap();
    let node = follower.follow(&world).unwrap().node.unwrap();
    assert!(node.expired && !node.key_expiry.is_zero());
    let map = full(&world.view(), me).unwrap();
    assert!(map.peers.is_empty() && map.packet_filters["base"] == Some(Vec::new()));
    world.join(3, 3).unwrap();
    assert_eq!(follower.follow(&world), None);
    // The same key is accepted again: the stream begins anew and has all peers.
    world.join(1, 1).unwrap();
    assert_eq!(follower.follow(&world).unwrap().peers.len(), 2);
}

#[test]
fn a_deleted_node_is_told_that_it_has_expired_and_the_stream_ends() {
    let mut world = World::new(64);
    let me = world.join(1, 1).unwrap();
    let mut follower = Follower::of(&world, me);
    follower.follow(&world).unwrap();
    world.run(|state, context, _| state.delete(context, me)).unwrap();
    assert!(follower.follow(&world).unwrap().node.unwrap().expired);
    assert!(follower.ended);
}

#[test]
fn a_stream_of_a_replaced_key_ends() {
    let mut world = World::new(64);
    let me = world.join(1, 1).unwrap();
    let mut follower = Follower::of(&world, me);
    follower.follow(&world).unwrap();
    assert_eq!(world.join(1, 9), Some(me));
    assert_eq!(follower.follow(&world), None);
    assert!(follower.ended);
}

#[test]
fn a_stream_too_far_behind_gets_a_full_map_or_begins_anew() {
    let mut world = World::new(4);
    let (me, peer) = (world.join(1, 1).unwrap(), world.join(2, 2).unwrap());
    let (mut mine, mut lonely) = (Follower::of(&world, me), Follower::of(&world, peer));
    mine.follow(&world);
    lonely.follow(&world);
    for port in 1..9 {
        world.update(peer, reachable(port));
    }
    assert_eq!(mine.follow(&world).unwrap().peers.len(), 1);
    // An empty list of peers clears nothing, so the stream ends instead.
    world.run(|state, context, _| state.delete(context, me)).unwrap();
    assert_eq!(lonely.follow(&world), None);
    assert!(lonely.ended);
}

#[test]
fn a_new_derp_map_goes_to_everyone() {
    let mut world = World::new(64);
    let me = world.join(1, 1).unwrap();
    let mut follower = Follower::of(&world, me);
    follower.follow(&world);
    let region = RegionId::new(901).unwrap();
    world.settings.derp_map.regions.insert(region, DerpRegion::new(region, "x", "X"));
    world.log.push(Notice::DerpMap);
    assert_eq!(follower.follow(&world).unwrap().derp_map, Some(world.settings.derp_map.clone()));
}

#[derive(Debug, Clone)]
enum Step {
    Join(u8, u8),
    Report(u64, u16),
    Rename(u64, String),
    Come(u64),
    Go(u64),
    Expire(u64),
    Delete(u64),
    Relay(u64, bool),
    Derp(u16),
    Follow,
    Wait,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = 1..5_u64;
    let step = prop_oneof![
        3 => (2..6_u8, 0..3_u8).prop_map(|(machine, turn)| Step::Join(machine, machine * 10 + turn)),
        3 => (node.clone(), 0..5_u16).prop_map(|(node, port)| Step::Report(node, port)),
        1 => (node.clone(), "[a-d]").prop_map(|(node, name)| Step::Rename(node, name)),
        2 => node.clone().prop_map(Step::Come),
        2 => node.clone().prop_map(Step::Go),
        1 => node.clone().prop_map(Step::Expire),
        1 => node.clone().prop_map(Step::Delete),
        2 => (0..5_u64, any::<bool>()).prop_map(|(node, on)| Step::Relay(node, on)),
        1 => (1..4_u16).prop_map(Step::Derp),
        3 => Just(Step::Follow),
        1 => Just(Step::Wait),
    ];
    prop::collection::vec(step, 1..50)
}

proptest! {
    /// Whatever happens, and however seldom a client reads, it knows in the end what a new client would be told.
    #[test]
    fn deltas_lead_to_what_a_full_map_says(steps in steps(), capacity in 3..40_usize) {
        let mut world = World::new(capacity);
        let me = world.join(1, 1).unwrap();
        world.come(me);
        let mut follower = Follower::of(&world, me);
        follower.follow(&world);
        for step in steps {
            let other = |number: u64| NodeId(number + me.0);
            match step {
                Step::Join(machine, key) => { world.join(machine, key); }
                Step::Report(node, port) => {
                    let endpoints = (port > 0).then(|| ([10, 0, 0, 1], port).into()).into_iter().collect();
                    let hostinfo = (port > 2).then(|| reachable(port).hostinfo).flatten();
                    world.update(other(node), Update { endpoints: Some(endpoints), hostinfo, ..Update::default() });
                }
                Step::Rename(node, name) => {
                    let _ = world.run(|state, context, _| state.rename(context, other(node), &name));
                }
                Step::Come(node) => world.come(other(node)),
                Step::Go(node) => if world.presence.is_online(other(node)) { world.go(other(node)) },
                Step::Expire(node) => {
                    let _ = world.run(|state, context, _| state.expire(context, other(node)));
                }
                Step::Delete(node) => {
                    let _ = world.run(|state, context, _| state.delete(context, other(node)));
                }
                Step::Relay(node, on) => world.update(other(node), offering(on)),
                Step::Derp(number) => {
                    let region = RegionId::new(900 + number).unwrap();
                    world.settings.derp_map.regions = [(region, DerpRegion::new(region, "r", "R"))].into();
                    world.log.push(Notice::DerpMap);
                }
                Step::Follow => { follower.follow(&world); }
                Step::Wait => world.now = world.now.plus(Duration::from_secs(60)),
            }
            if follower.ended {
                follower = Follower::of(&world, me);
                follower.follow(&world);
            }
        }
        follower.follow(&world);
        if follower.ended {
            return Ok(());
        }
        let mut fresh = Netmap::new();
        fresh.apply(full(&world.view(), me).unwrap());
        let peers = |netmap: &Netmap| netmap.peers().values().map(|node| Arc::unwrap_or_clone(Arc::clone(node))).collect::<Vec<_>>();
        prop_assert_eq!(peers(&follower.netmap), peers(&fresh));
        prop_assert_eq!(follower.netmap.node(), fresh.node());
        prop_assert_eq!(follower.netmap.filter(), fresh.filter());
        prop_assert_eq!(follower.netmap.derp_map(), fresh.derp_map());
        for peer in fresh.peers().values() {
            prop_assert!(follower.netmap.users().contains_key(&peer.user));
        }
        let _ = NodeChange::Private;
    }
}
