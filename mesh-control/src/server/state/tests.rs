use std::collections::BTreeSet;
use std::time::Duration;

use mesh_noise::key::{DiscoPublic, MachinePublic, NodePublic};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::server::NodeChange;
use crate::server::record::{LoginStatus, Tag};
use crate::wire::Hostinfo;

const TAILNET: TailnetId = TailnetId(1);
const HOUR: Duration = Duration::from_secs(3600);

/// A tailnet with its clock and its dice.
struct World {
    state: State,
    log: Vec<Event>,
    now: Moment,
    rng: StdRng,
}

impl World {
    fn new() -> Self {
        let now = Moment::from_millis(1_790_000_000_000);
        let mut world =
            Self { state: State::new(TAILNET, Rules::default()), log: Vec::new(), now, rng: StdRng::seed_from_u64(1) };
        world.run(|state, context, _| state.create_user(context, "alice")).unwrap();
        world
    }

    fn run<T>(
        &mut self,
        decide: impl FnOnce(&State, &Context, &mut StdRng) -> Result<Decision<T>, Refusal>,
    ) -> Result<T, Refusal> {
        let context = Context { now: self.now, by: Actor::Operator { uid: 0 } };
        let before = self.state.clone();
        let decision = decide(&self.state, &context, &mut self.rng);
        assert_eq!(self.state, before, "deciding changes nothing");
        let (events, reply) = self.state.seal(&context, decision?);
        self.log.extend(events);
        Ok(reply)
    }

    fn key(&mut self, wanted: NewAuthKey) -> String {
        let wanted = NewAuthKey { user: "alice".into(), ..wanted };
        self.run(|state, context, rng| state.create_key(context, rng, wanted)).unwrap().0
    }

    fn register(&mut self, request: &Registration) -> Result<Registered, Refusal> {
        self.run(|state, context, rng| state.register(context, rng, request))
    }

    fn join(&mut self, machine: u8, node_key: u8, auth_key: &str) -> NodeId {
        let outcome = self.register(&request(machine, node_key, Some(auth_key))).unwrap();
        let Registered::Accepted(id) = outcome else { panic!("not accepted: {outcome:?}") };
        id
    }

    fn node(&self, id: NodeId) -> &Node {
        self.state.node(id).unwrap()
    }
}

fn node_key(number: u8) -> NodePublic {
    NodePublic::from_bytes([number; 32])
}

fn request(machine: u8, key: u8, auth_key: Option<&str>) -> Registration {
    Registration {
        machine: MachinePublic::from_bytes([machine; 32]),
        node_key: node_key(key),
        old_node_key: NodePublic::ZERO,
        auth_key: auth_key.map(str::to_owned),
        expiry: None,
        followup: None,
        hostinfo: Hostinfo { hostname: format!("host{machine}"), os: "linux".into(), ..Hostinfo::default() },
        ephemeral: false,
        version: 130,
        from: None,
    }
}

fn logout(machine: u8, key: u8) -> Registration {
    Registration { expiry: Some(Moment::from_millis(123_000)), ..request(machine, key, None) }
}

fn reusable() -> NewAuthKey {
    NewAuthKey { reusable: true, ..NewAuthKey::default() }
}

#[test]
fn a_one_off_key_registers_one_machine() {
    let mut world = World::new();
    let key = world.key(NewAuthKey::default());
    let id = world.join(1, 1, &key);
    assert_eq!(world.node(id).addresses.v4.to_string(), "100.64.0.1");
    assert_eq!(world.node(id).name, "host1");
    assert_eq!(world.register(&request(2, 2, Some(&key))), Err(Refusal::SpentAuthKey));
}

#[test]
fn a_restart_with_a_spent_key_changes_nothing() {
    let mut world = World::new();
    let key = world.key(NewAuthKey::default());
    let id = world.join(1, 1, &key);
    let events = world.log.len();
    assert_eq!(world.join(1, 1, &key), id);
    assert_eq!(world.log.len(), events);
}

#[test]
fn a_reusable_key_registers_many_machines_under_different_names_and_addresses() {
    let mut world = World::new();
    let key = world.key(reusable());
    let same_name = |machine: u8| Registration {
        hostinfo: Hostinfo { hostname: "web.local".into(), ..Hostinfo::default() },
        ..request(machine, machine, Some(&key))
    };
    for machine in 1..=3 {
        world.register(&same_name(machine)).unwrap();
    }
    let names: Vec<_> = world.state.nodes().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["web", "web-1", "web-2"]);
    let addresses: BTreeSet<_> = world.state.nodes().map(|node| node.addresses).collect();
    assert_eq!(addresses.len(), 3);
}

#[test]
fn unknown_wrong_and_expired_keys_are_told_apart() {
    let mut world = World::new();
    let key = world.key(NewAuthKey { lifetime: Some(HOUR), ..reusable() });
    for wrong in ["tskey-auth-test", "mesh-auth-9-abc", &format!("{key}x"), ""] {
        let outcome = world.register(&request(1, 1, Some(wrong)));
        assert_eq!(outcome, Err(Refusal::UnknownAuthKey), "{wrong}");
    }
    world.now = world.now.plus(HOUR);
    assert_eq!(world.register(&request(1, 1, Some(&key))), Err(Refusal::ExpiredAuthKey));
    assert_eq!(world.state.nodes().count(), 0);
}

#[test]
fn logout_kills_the_key_and_login_keeps_number_and_addresses() {
    let mut world = World::new();
    let key = world.key(reusable());
    let id = world.join(1, 1, &key);
    let addresses = world.node(id).addresses;
    assert_eq!(world.register(&logout(1, 1)), Ok(Registered::LoggedOut));
    assert!(world.node(id).is_expired(world.now));
    // The dead key needs a new one.
    assert_eq!(world.register(&request(1, 1, None)), Ok(Registered::KeyExpired));
    // Somebody else joins in between.
    world.join(2, 2, &key);
    assert_eq!(world.join(1, 3, &key), id);
    assert_eq!(world.node(id).addresses, addresses);
    assert!(!world.node(id).is_expired(world.now));
    assert!(world.state.node_by_key(&node_key(1)).is_none());
}

#[test]
fn logging_out_twice_or_as_a_stranger_is_harmless() {
    let mut world = World::new();
    let key = world.key(reusable());
    let id = world.join(1, 1, &key);
    assert_eq!(world.register(&logout(9, 9)), Ok(Registered::LoggedOut));
    assert_eq!(world.register(&logout(9, 1)), Err(Refusal::NodeKeyTaken));
    assert!(!world.node(id).is_expired(world.now));
    world.register(&logout(1, 1)).unwrap();
    let events = world.log.len();
    assert_eq!(world.register(&logout(1, 1)), Ok(Registered::LoggedOut));
    assert_eq!(world.log.len(), events);
}

#[test]
fn an_ephemeral_node_is_gone_after_logout_and_its_number_is_not_reused() {
    let mut world = World::new();
    let key = world.key(NewAuthKey { ephemeral: true, ..reusable() });
    let first = world.join(1, 1, &key);
    assert_eq!(world.register(&logout(1, 1)), Ok(Registered::LoggedOut));
    assert!(world.state.node(first).is_none());
    assert!(world.join(1, 2, &key) > first);
}

#[test]
fn an_ephemeral_node_is_gone_after_its_grace_offline() {
    let mut world = World::new();
    let key = world.key(reusable());
    let ephemeral = Registration { ephemeral: true, ..request(1, 1, Some(&key)) };
    world.register(&ephemeral).unwrap();
    let stays = world.join(2, 2, &key);
    let grace = Rules::default().ephemeral_grace;
    let left = world.now;
    for (wait, online, expected) in [(grace, true, 2), (grace - Duration::from_secs(1), false, 2), (grace, false, 1)] {
        let now = left.plus(wait);
        world.run(|state, _, _| Ok(state.sweep(now, |_| (!online).then_some(left)))).unwrap();
        assert_eq!(world.state.nodes().count(), expected);
    }
    assert!(world.state.node(stays).is_some());
}

#[test]
fn rotation_keeps_the_node_and_kills_the_old_key() {
    let mut world = World::new();
    let key = world.key(reusable());
    let id = world.join(1, 1, &key);
    let before = world.node(id).clone();
    let rotation = Registration { old_node_key: node_key(1), ..request(1, 2, Some(&key)) };
    assert_eq!(world.register(&rotation), Ok(Registered::Accepted(id)));
    assert_eq!((world.node(id).addresses, &world.node(id).name), (before.addresses, &before.name));
    assert!(world.state.node_by_key(&node_key(1)).is_none());
    // Nobody else may point at it.
    let theft = Registration { old_node_key: node_key(2), ..request(3, 3, Some(&key)) };
    assert_eq!(world.register(&theft), Err(Refusal::NodeKeyTaken));
}

#[test]
fn a_node_key_of_another_machine_is_refused() {
    let mut world = World::new();
    let key = world.key(reusable());
    world.join(1, 1, &key);
    assert_eq!(world.register(&request(2, 1, Some(&key))), Err(Refusal::NodeKeyTaken));
    assert_eq!(world.register(&request(2, 1, None)), Err(Refusal::NodeKeyTaken));
    assert_eq!(world.register(&request(2, 0, Some(&key))), Err(Refusal::NodeKeyMissing));
}

#[test]
fn a_key_expires_by_itself_and_the_node_signs_in_again() {
    let mut world = World::new();
    let key = world.key(NewAuthKey { lifetime: Some(HOUR * 24 * 3000), ..reusable() });
    let id = world.join(1, 1, &key);
    let joined = world.now;
    world.now = world.now.plus(Rules::default().key_lifetime);
    assert_eq!(world.state.expired_between(joined, world.now).collect::<Vec<_>>(), [id]);
    assert_eq!(world.register(&request(1, 1, None)), Ok(Registered::KeyExpired));
    // As the Go client does: a new key, the old one named, no auth key.
    let again = Registration { old_node_key: node_key(1), ..request(1, 2, None) };
    assert!(matches!(world.register(&again), Ok(Registered::Login { wait: false, .. })));
    // With a valid auth key even the old node key lives again.
    assert_eq!(world.join(1, 1, &key), id);
    assert!(!world.node(id).is_expired(world.now));
}

#[test]
fn an_expiry_may_come_sooner_never_later() {
    let mut world = World::new();
    let key = world.key(reusable());
    let id = world.join(1, 1, &key);
    let soon = world.now.plus(HOUR);
    world.register(&Registration { expiry: Some(soon), ..request(1, 1, None) }).unwrap();
    assert_eq!(world.node(id).expires, Some(soon));
    let later = Registration { expiry: Some(soon.plus(HOUR)), ..request(1, 1, None) };
    assert_eq!(world.register(&later), Err(Refusal::ExtendingKey));
}

#[test]
fn tags_come_from_the_key_and_own_the_node() {
    let mut world = World::new();
    let tag = |text: &str| Tag::try_from(text.to_owned()).unwrap();
    let key = world.key(NewAuthKey { tags: vec![tag("tag:web"), tag("tag:db")], ..reusable() });
    let mut asks = request(1, 1, Some(&key));
    asks.hostinfo.request_tags = vec!["tag:web".into(), "tag:db".into()];
    let Registered::Accepted(id) = world.register(&asks).unwrap() else { panic!("not accepted") };
    assert_eq!(world.node(id).owner, Owner::Tags);
    assert_eq!(world.node(id).tags.len(), 2);
    assert_eq!(world.node(id).expires, None);
    let mut greedy = request(2, 2, Some(&key));
    greedy.hostinfo.request_tags = vec!["tag:root".into()];
    assert_eq!(world.register(&greedy), Err(Refusal::TagsNotGranted("tag:root".into())));
}

#[test]
fn one_machine_is_one_node_for_each_owner() {
    let mut world = World::new();
    world.run(|state, context, _| state.create_user(context, "bob")).unwrap();
    let alices = world.key(reusable());
    let bobs = NewAuthKey { user: "bob".into(), ..reusable() };
    let bobs = world.run(|state, context, rng| state.create_key(context, rng, bobs)).unwrap().0;
    let first = world.join(1, 1, &alices);
    let second = world.join(1, 2, &bobs);
    assert_ne!(first, second);
    assert_ne!(world.node(first).addresses, world.node(second).addresses);
    // A key of one's node is not a key of the other.
    assert_eq!(world.join(1, 1, &bobs), first);
}

#[test]
fn an_interactive_login_waits_for_approval_and_completes_once() {
    let mut world = World::new();
    let Registered::Login { id, wait: false } = world.register(&request(1, 1, None)).unwrap() else {
        panic!("no login")
    };
    // A repeated question gets the same URL.
    assert_eq!(world.register(&request(1, 1, None)), Ok(Registered::Login { id: id.clone(), wait: false }));
    let followup = Registration { followup: Some(id.clone()), ..request(1, 1, None) };
    assert_eq!(world.register(&followup), Ok(Registered::Login { id: id.clone(), wait: true }));
    // The URL gets around; another machine gains nothing by it.
    let thief = Registration { followup: Some(id.clone()), ..request(2, 2, None) };
    assert!(matches!(world.register(&thief), Ok(Registered::Login { id: other, wait: false }) if other != id));

    assert!(matches!(
        world.run(|state, context, _| state.approve(context, &id, "nobody")),
        Err(Refusal::UnknownUser(_))
    ));
    world.run(|state, context, _| state.approve(context, &id, "alice")).unwrap();
    let Registered::Accepted(node) = world.register(&followup).unwrap() else { panic!("not accepted") };
    assert_eq!(world.node(node).owner, Owner::User(UserId(1)));
    // Asked once more, say after a lost answer, it is simply in.
    assert_eq!(world.register(&followup), Ok(Registered::Accepted(node)));
}

#[test]
fn a_lapsed_login_gets_a_new_url() {
    let mut world = World::new();
    let Registered::Login { id, .. } = world.register(&request(1, 1, None)).unwrap() else { panic!("no login") };
    world.now = world.now.plus(Rules::default().login_lifetime);
    assert!(world.run(|state, context, _| state.approve(context, &id, "alice")).is_err());
    let followup = Registration { followup: Some(id.clone()), ..request(1, 1, None) };
    assert!(matches!(world.register(&followup), Ok(Registered::Login { id: new, wait: false }) if new != id));
    let now = world.now;
    world.run(|state, _, _| Ok(state.sweep(now, |_| None))).unwrap();
    assert_eq!(world.state.logins().count(), 1);
}

#[test]
fn pending_logins_are_bounded() {
    let mut world = World::new();
    world.state.rules.max_logins = 2;
    for machine in 1..=2 {
        world.register(&request(machine, machine, None)).unwrap();
    }
    assert_eq!(world.register(&request(3, 3, None)), Err(Refusal::TooManyLogins));
    let key = world.key(NewAuthKey::default());
    world.join(3, 3, &key);
}

#[test]
fn a_code_approves_one_login() {
    let mut world = World::new();
    let (code, _) = world.run(|state, context, rng| state.create_code(context, rng, None)).unwrap();
    let Registered::Login { id, .. } = world.register(&request(1, 1, None)).unwrap() else { panic!("no login") };
    let typed = code.to_ascii_lowercase();
    let redeemed = world.run(|state, context, _| state.redeem(context, &id, &typed, Some(""))).unwrap();
    assert_eq!(redeemed, Redeemed::Approved(UserId(1)));
    assert_eq!(world.state.login(&id, world.now).unwrap().status, LoginStatus::Approved(UserId(1)));
    let Registered::Login { id, .. } = world.register(&request(2, 2, None)).unwrap() else { panic!("no login") };
    let again = world.run(|state, context, _| state.redeem(context, &id, &code, None)).unwrap();
    assert_eq!(again, Redeemed::WrongCode { tries_left: 4 });
}

#[test]
fn a_code_lapses_after_ten_minutes() {
    let mut world = World::new();
    let (code, expires) = world.run(|state, context, rng| state.create_code(context, rng, Some("alice"))).unwrap();
    assert_eq!(expires.since(world.now), Duration::from_secs(600));
    world.now = expires;
    let Registered::Login { id, .. } = world.register(&request(1, 1, None)).unwrap() else { panic!("no login") };
    let late = world.run(|state, context, _| state.redeem(context, &id, &code, None)).unwrap();
    assert_eq!(late, Redeemed::WrongCode { tries_left: 4 });
}

#[test]
fn five_wrong_codes_close_the_page_and_the_code() {
    let mut world = World::new();
    let (code, _) = world.run(|state, context, rng| state.create_code(context, rng, None)).unwrap();
    let wrong = format!("{}AAAA-AAAA", &code[..5]);
    let Registered::Login { id, .. } = world.register(&request(1, 1, None)).unwrap() else { panic!("no login") };
    for tries_left in (0..5).rev() {
        let outcome = world.run(|state, context, _| state.redeem(context, &id, &wrong, None)).unwrap();
        assert_eq!(outcome, Redeemed::WrongCode { tries_left });
    }
    assert!(world.run(|state, context, _| state.redeem(context, &id, &code, None)).is_err());
    let Registered::Login { id, .. } = world.register(&request(1, 1, None)).unwrap() else { panic!("no login") };
    let outcome = world.run(|state, context, _| state.redeem(context, &id, &code, None)).unwrap();
    assert_eq!(outcome, Redeemed::WrongCode { tries_left: 4 });
}

#[test]
fn with_several_users_a_page_has_to_name_one() {
    let mut world = World::new();
    world.run(|state, context, _| state.create_user(context, "bob")).unwrap();
    let (code, _) = world.run(|state, context, rng| state.create_code(context, rng, None)).unwrap();
    let Registered::Login { id, .. } = world.register(&request(1, 1, None)).unwrap() else { panic!("no login") };
    for user in [None, Some("carol")] {
        let outcome = world.run(|state, context, _| state.redeem(context, &id, &code, user)).unwrap();
        assert_eq!(outcome, Redeemed::UserNeeded);
    }
    let outcome = world.run(|state, context, _| state.redeem(context, &id, &code, Some("bob"))).unwrap();
    assert_eq!(outcome, Redeemed::Approved(UserId(2)));
}

#[test]
fn a_chosen_name_outlasts_the_host_name() {
    let mut world = World::new();
    let key = world.key(reusable());
    let (first, second) = (world.join(1, 1, &key), world.join(2, 2, &key));
    world.run(|state, context, _| state.rename(context, first, "front")).unwrap();
    assert!(matches!(
        world.run(|state, context, _| state.rename(context, second, "front")),
        Err(Refusal::NodeNameTaken(_))
    ));
    assert!(matches!(
        world.run(|state, context, _| state.rename(context, second, "No Label")),
        Err(Refusal::BadNodeName)
    ));
    for id in [first, second] {
        let hostinfo = Hostinfo { hostname: "new name".into(), ..Hostinfo::default() };
        let update = Update { hostinfo: Some(hostinfo), ..Update::default() };
        world.run(|state, context, _| state.update(context, id, update)).unwrap();
    }
    assert_eq!((world.node(first).name.as_str(), world.node(second).name.as_str()), ("front", "new-name"));
    assert_eq!(world.state.find_node("front.tailnet.mesh.internal").map(|node| node.id), Some(first));
    assert_eq!(world.state.find_node("100.64.0.2").map(|node| node.id), Some(second));
    assert_eq!(world.state.find_node("2").map(|node| node.id), Some(second));
}

#[test]
fn reports_change_only_what_they_mention() {
    let mut world = World::new();
    let key = world.key(reusable());
    let id = world.join(1, 1, &key);
    let info = |derp: Option<u16>| Hostinfo {
        hostname: "host1".into(),
        os: "linux".into(),
        net_info: derp.map(|derp| crate::wire::NetInfo {
            preferred_derp: mesh_derp::map::RegionId::new(derp),
            ..crate::wire::NetInfo::default()
        }),
        ..Hostinfo::default()
    };
    let endpoints = ["10.0.0.1:41641", "[fe80::1]:41641", "0.0.0.0:0", "[2001:db8::1]:1"].map(|at| at.parse().unwrap());
    let update = Update {
        disco_key: Some(DiscoPublic::from_bytes([7; 32])),
        endpoints: Some(endpoints.to_vec()),
        hostinfo: Some(info(Some(900))),
        version: None,
    };
    world.run(|state, context, _| state.update(context, id, update)).unwrap();
    assert!(matches!(world.log.last().unwrap().change, Change::NodePut { what: NodeChange::Patch, .. }));
    let expected = ["10.0.0.1:41641", "[2001:db8::1]:1"].map(|at| at.parse().unwrap());
    assert_eq!(world.node(id).endpoints, expected);
    // No NetInfo, or one without a region, keeps the home.
    for later in [info(None), info(Some(0))] {
        let update = Update { hostinfo: Some(later), ..Update::default() };
        world.run(|state, context, _| state.update(context, id, update)).unwrap();
        assert_eq!(world.node(id).home.map(|home| home.get()), Some(900));
        assert_eq!(world.node(id).disco_key, DiscoPublic::from_bytes([7; 32]));
    }
    let events = world.log.len();
    let same = Update { endpoints: Some(expected.to_vec()), ..Update::default() };
    world.run(|state, context, _| state.update(context, id, same)).unwrap();
    assert_eq!(world.log.len(), events);
}

#[test]
fn users_have_unique_and_simple_names() {
    let mut world = World::new();
    for bad in ["", "a b", "a\"b", &"x".repeat(65), "é"] {
        assert_eq!(world.run(|state, context, _| state.create_user(context, bad)), Err(Refusal::BadUserName), "{bad}");
    }
    let again = world.run(|state, context, _| state.create_user(context, "alice"));
    assert_eq!(again, Err(Refusal::UserExists("alice".into())));
    let wanted = NewAuthKey { user: "zed".into(), ..NewAuthKey::default() };
    let outcome = world.run(|state, context, rng| state.create_key(context, rng, wanted));
    assert_eq!(outcome, Err(Refusal::UnknownUser("zed".into())));
}

/// One thing that somebody does.
#[derive(Debug, Clone)]
enum Step {
    Join { machine: u8, key: u8, tagged: bool },
    Rotate { machine: u8, old: u8, new: u8 },
    Logout { machine: u8, key: u8 },
    Login { machine: u8, key: u8 },
    Approve,
    Complete,
    WrongCode,
    Report { node: u64, port: u16 },
    Seen { node: u64 },
    Rename { node: u64, name: String },
    Expire { node: u64 },
    Delete { node: u64 },
    Wait { minutes: u16 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1..5_u8, 1..9_u8, any::<bool>()).prop_map(|(machine, key, tagged)| Step::Join { machine, key, tagged }),
        (1..5_u8, 1..9_u8, 1..9_u8).prop_map(|(machine, old, new)| Step::Rotate { machine, old, new }),
        (1..5_u8, 1..9_u8).prop_map(|(machine, key)| Step::Logout { machine, key }),
        (1..5_u8, 1..9_u8).prop_map(|(machine, key)| Step::Login { machine, key }),
        Just(Step::Approve),
        Just(Step::Complete),
        Just(Step::WrongCode),
        (1..6_u64, 1..9_u16).prop_map(|(node, port)| Step::Report { node, port }),
        (1..6_u64).prop_map(|node| Step::Seen { node }),
        (1..6_u64, "[a-c]{1,2}").prop_map(|(node, name)| Step::Rename { node, name }),
        (1..6_u64).prop_map(|node| Step::Expire { node }),
        (1..6_u64).prop_map(|node| Step::Delete { node }),
        (1..40_u16).prop_map(|minutes| Step::Wait { minutes }),
    ];
    prop::collection::vec(step, 1..60)
}

/// Does it; refusals are part of life.
fn perform(world: &mut World, keys: &[String; 2], step: &Step) {
    let first_login = world.state.logins().next().cloned();
    let _ = match step.clone() {
        Step::Join { machine, key, tagged } => {
            world.register(&request(machine, key, Some(&keys[usize::from(tagged)]))).map(drop)
        }
        Step::Rotate { machine, old, new } => {
            let rotation = request(machine, new, Some(&keys[0]));
            world.register(&Registration { old_node_key: node_key(old), ..rotation }).map(drop)
        }
        Step::Logout { machine, key } => world.register(&logout(machine, key)).map(drop),
        Step::Login { machine, key } => world.register(&request(machine, key, None)).map(drop),
        Step::Approve => first_login.map_or(Ok(()), |login| {
            world.run(|state, context, _| state.approve(context, &login.id, "alice")).map(drop)
        }),
        Step::Complete => first_login.map_or(Ok(()), |login| {
            let mut request = request(login.machine.as_bytes()[0], login.node_key.as_bytes()[0], None);
            request.followup = Some(login.id);
            world.register(&request).map(drop)
        }),
        Step::WrongCode => first_login.map_or(Ok(()), |login| {
            world.run(|state, context, rng| state.create_code(context, rng, None)).map(drop).and_then(|()| {
                world.run(|state, context, _| state.redeem(context, &login.id, "AAAA-AAAA-AAAA", None)).map(drop)
            })
        }),
        Step::Report { node, port } => {
            let endpoints = Some(vec![([10, 0, 0, 1], port).into()]);
            let update = Update { endpoints, ..Update::default() };
            world.run(|state, context, _| state.update(context, NodeId(node), update))
        }
        Step::Seen { node } => world.run(|state, context, _| state.seen(context, NodeId(node))),
        Step::Rename { node, name } => {
            world.run(|state, context, _| state.rename(context, NodeId(node), &name)).map(drop)
        }
        Step::Expire { node } => world.run(|state, context, _| state.expire(context, NodeId(node))).map(drop),
        Step::Delete { node } => world.run(|state, context, _| state.delete(context, NodeId(node))).map(drop),
        Step::Wait { minutes } => {
            world.now = world.now.plus(Duration::from_secs(60 * u64::from(minutes)));
            let now = world.now;
            world.run(|state, _, _| Ok(state.sweep(now, |_| None)))
        }
    };
}

fn world_after(steps: &[Step]) -> World {
    let mut world = World::new();
    let tags = vec![Tag::try_from("tag:web".to_owned()).unwrap()];
    let keys = [world.key(reusable()), world.key(NewAuthKey { tags, ephemeral: true, ..reusable() })];
    for step in steps {
        perform(&mut world, &keys, step);
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn replaying_the_log_gives_the_same_state(steps in steps()) {
        let world = world_after(&steps);
        let mut replayed = State::new(TAILNET, Rules::default());
        for (number, event) in (1..).zip(&world.log) {
            prop_assert_eq!(event.id, EventId(number));
            let json = serde_json::to_string(event).unwrap();
            replayed.apply(&serde_json::from_str(&json).unwrap());
        }
        prop_assert_eq!(replayed, world.state);
    }

    #[test]
    fn indexes_and_promises_hold(steps in steps()) {
        let world = world_after(&steps);
        let count = world.state.nodes().count();
        let distinct = |texts: Vec<String>| texts.into_iter().collect::<BTreeSet<_>>().len();
        let nodes = || world.state.nodes();
        prop_assert_eq!(distinct(nodes().map(|node| node.name.clone()).collect()), count);
        prop_assert_eq!(distinct(nodes().map(|node| node.node_key.to_string()).collect()), count);
        prop_assert_eq!(distinct(nodes().map(|node| node.addresses.v4.to_string()).collect()), count);
        for node in nodes() {
            prop_assert_eq!(world.state.node_by_key(&node.node_key).map(|found| found.id), Some(node.id));
        }
        // A number means one machine, for ever, and keeps its addresses.
        let mut first: BTreeMap<NodeId, (MachinePublic, crate::server::address::Addresses)> = BTreeMap::new();
        for event in &world.log {
            if let Change::NodePut { node, .. } = &event.change {
                let known = first.entry(node.id).or_insert((node.machine, node.addresses));
                prop_assert_eq!(*known, (node.machine, node.addresses));
            }
        }
    }
}

mod store {
    use std::sync::mpsc;

    use super::*;
    use crate::server::store::{Batch, SqliteStore, Store};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn what_the_store_reads_back_is_the_same_state(steps in steps()) {
            let world = world_after(&steps);
            let dir = tempfile::tempdir().unwrap();
            {
                let store = SqliteStore::open(dir.path()).unwrap();
                let mut counted = State::new(TAILNET, Rules::default());
                let (tell, told) = mpsc::channel();
                for event in &world.log {
                    counted.apply(event);
                    let batch = Batch { tailnet: TAILNET, events: vec![event.clone()], counters: counted.counters() };
                    let tell = tell.clone();
                    store.append(batch, Box::new(move |outcome| tell.send(outcome.map(drop)).unwrap()));
                }
                for _ in &world.log {
                    told.recv().unwrap().unwrap();
                }
            }
            let store = SqliteStore::open(dir.path()).unwrap();
            prop_assert_eq!(State::load(TAILNET, Rules::default(), store.load(TAILNET).unwrap()), world.state);
        }
    }
}
