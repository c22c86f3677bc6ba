//! How agents behave towards each other, through NATs and a relay, in virtual time.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use mesh_derp::map::RegionId;
use mesh_nat::agent::{Event, Mode, PeerConfig, PingId, Reject, Source};
use mesh_nat::disco::message::{CallMeMaybe, Message, Ping, TxId};
use mesh_nat::disco::seal;
use mesh_nat::sim::{HostId, Link, NatConfig, Sent, World};
use mesh_nat::{Path, SocketId};
use mesh_noise::key::DiscoPrivate;
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// One-way delay between any two nodes, and between a node and the relay.
const DELAY: Duration = Duration::from_millis(20);
/// A node's round trip to the relay.
const RELAY_ROUND_TRIP: Duration = Duration::from_millis(40);

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn region() -> RegionId {
    World::region(900)
}

/// Two nodes behind NATs that know each other; `None` is no NAT.
fn pair(seed: u64, a: Option<NatConfig>, b: Option<NatConfig>) -> (World, HostId, HostId) {
    let mut world = World::seeded(seed);
    let internet = world.internet();
    let mut node = |nat: Option<NatConfig>| match nat {
        Some(nat) => world.node_behind(nat),
        None => world.node_in(internet),
    };
    let (a, b) = (node(a), node(b));
    world.introduce(a, b);
    (world, a, b)
}

fn easy_pair(seed: u64) -> (World, HostId, HostId) {
    pair(seed, Some(NatConfig::easy()), Some(NatConfig::easy()))
}

fn open_pair(seed: u64) -> (World, HostId, HostId) {
    pair(seed, None, None)
}

fn both_direct(world: &World, a: HostId, b: HostId) -> bool {
    world.is_direct(a, b) && world.is_direct(b, a)
}

fn data(world: &mut World, from: HostId, to: HostId) {
    world.send_data(from, to, Duration::from_millis(100));
}

/// A pair that has found its direct path, with data going from a to b.
fn direct_pair(seed: u64) -> (World, HostId, HostId) {
    let (mut world, a, b) = easy_pair(seed);
    data(&mut world, a, b);
    world.run_until(secs(5), |world| both_direct(world, a, b)).expect("a direct path");
    (world, a, b)
}

fn block_udp(world: &mut World, hosts: [HostId; 2], blocked: bool) {
    hosts.iter().for_each(|host| world.block_host_udp(*host, blocked));
}

/// The internet loses this share of all datagrams.
fn lose(world: &mut World, loss: f64) {
    let internet = world.internet();
    world.set_link(internet, Link { loss, ..world.link(internet) });
}

fn reboot(world: &mut World, host: HostId) {
    let gateway = world.gateway_above(host).unwrap();
    world.reboot(gateway);
}

/// How the user's ping was answered.
fn answer(world: &World, host: HostId, ping: PingId) -> Option<(Path, Duration)> {
    world.events(host).iter().find_map(|(_, event)| {
        let Event::PingAnswered { id, path, latency, .. } = event else { return None };
        (*id == ping).then_some((*path, *latency))
    })
}

#[test]
fn two_nodes_behind_easy_nats_are_direct_both_ways_within_three_round_trips() {
    for seed in 0..20 {
        let (mut world, a, b) = easy_pair(seed);
        assert_eq!(world.path(a, b), Some(Path::Relay { region: region() }), "data can go from the start");
        data(&mut world, a, b);
        let took = world.run_until(secs(5), |world| both_direct(world, a, b));
        let took = took.unwrap_or_else(|| panic!("seed {seed}: never direct"));
        assert!(took <= RELAY_ROUND_TRIP * 3, "seed {seed}: {took:?}");
    }
}

#[test]
fn an_open_node_is_reached_in_one_round_trip() {
    let (mut world, a, b) = pair(1, Some(NatConfig::hard()), None);
    data(&mut world, a, b);
    let took = world.run_until(secs(5), |world| world.is_direct(a, b));
    assert_eq!(took, Some(DELAY * 2));
}

#[test]
fn nodes_unknown_to_each_others_lists_meet_by_answering_in_kind() {
    let (mut world, a, b) = easy_pair(3);
    for (this, other) in [(a, b), (b, a)] {
        let config = PeerConfig {
            node: world.key(other),
            disco: world.disco(other).public(),
            home: Some(region()),
            ..PeerConfig::default()
        };
        world.with(this, |agent, now| agent.set_peer(now, config));
    }
    data(&mut world, a, b);
    let took = world.run_until(secs(5), |world| both_direct(world, a, b)).expect("a direct path");
    assert!(took <= RELAY_ROUND_TRIP * 4, "{took:?}");
}

#[test]
fn where_both_map_per_destination_data_stays_on_the_relay() {
    let (mut world, a, b) = pair(4, Some(NatConfig::hard()), Some(NatConfig::hard()));
    data(&mut world, a, b);
    assert_eq!(world.run_until(secs(60), |world| world.is_direct(a, b) || world.is_direct(b, a)), None);
    assert_eq!(world.path(a, b), Some(Path::Relay { region: region() }));
    let Sent { udp, relay, .. } = world.sent(a);
    assert!(udp <= 72 && relay <= 30, "searching in vain sent {udp} pings and {relay} signals in a minute");
}

#[test]
fn loss_delays_the_direct_path_but_does_not_prevent_it() {
    for seed in 0..20 {
        let (mut world, a, b) = easy_pair(seed);
        lose(&mut world, 0.3);
        data(&mut world, a, b);
        data(&mut world, b, a);
        let took = world.run_until(secs(60), |world| both_direct(world, a, b));
        assert!(took.is_some(), "seed {seed}");
    }
}

#[test]
fn losing_the_direct_path_moves_to_the_relay() {
    for seed in 0..10 {
        let (mut world, a, b) = direct_pair(seed);
        world.run_for(secs(20) + Duration::from_millis(seed * 313));
        assert!(both_direct(&world, a, b), "seed {seed}: heartbeats keep the path");
        block_udp(&mut world, [a, b], true);
        let outage = world.run_until(secs(30), |world| !world.is_direct(a, b) && !world.is_direct(b, a));
        let outage = outage.expect("the relay takes over");
        assert!(outage <= Duration::from_millis(6500), "seed {seed}: data went into a dead path for {outage:?}");
        assert_eq!(world.path(a, b), Some(Path::Relay { region: region() }));

        block_udp(&mut world, [a, b], false);
        let back = world.run_until(secs(10), |world| both_direct(world, a, b));
        assert!(back.is_some(), "seed {seed}: the direct path comes back");
    }
}

#[test]
fn the_sender_notices_a_dead_path_before_its_trust_ends() {
    let (mut world, a, b) = direct_pair(5);
    world.run_for(secs(10));
    block_udp(&mut world, [a, b], true);
    let outage = world.run_until(secs(10), |world| !world.is_direct(a, b)).expect("the relay takes over");
    assert!(outage < Duration::from_millis(4700), "{outage:?}");
}

#[test]
fn a_nat_that_forgets_is_got_through_again() {
    let (mut world, a, b) = direct_pair(6);
    world.run_for(secs(10));
    reboot(&mut world, a);
    reboot(&mut world, b);
    world.run_for(secs(1));
    let took = world.run_until(secs(15), |world| both_direct(world, a, b));
    assert!(took.is_some());
    world.run_for(secs(20));
    assert!(both_direct(&world, a, b));
}

#[test]
fn one_way_traffic_keeps_the_path_at_both_ends_with_few_pings() {
    let (mut world, a, b) = direct_pair(7);
    world.run_for(secs(1));
    let before = (world.sent(a), world.sent(b));
    let moved = |world: &World, id| {
        world.events(id).iter().filter(|(_, event)| matches!(event, Event::PathChanged { .. })).count()
    };
    let moves = (moved(&world, a), moved(&world, b));
    world.run_for(secs(60));
    assert_eq!((moved(&world, a), moved(&world, b)), moves, "the path never changed");
    let after = (world.sent(a), world.sent(b));
    // Since nothing answers the data, the sender asks whether it arrives, less than once a second; each of its pings is
    // answered, and pinged back every three seconds.
    assert!(after.0.udp - before.0.udp <= 110, "{before:?} {after:?}");
    assert!(after.1.udp - before.1.udp <= 110, "{before:?} {after:?}");
    assert!(after.0.relay - before.0.relay <= 2, "{before:?} {after:?}");
}

#[test]
fn an_idle_pair_falls_silent() {
    let (mut world, a, b) = direct_pair(8);
    world.stop_all_data();
    world.run_for(secs(60));
    let before = (world.sent(a), world.sent(b));
    world.run_for(secs(600));
    assert_eq!((world.sent(a), world.sent(b)), before);
    assert_eq!(world.path(a, b), Some(Path::Relay { region: region() }));
}

#[test]
fn relay_only_mode_never_sends_udp() {
    let (mut world, a, b) = open_pair(9);
    world.with(a, |agent, _| agent.set_mode(Mode::Relay));
    data(&mut world, a, b);
    data(&mut world, b, a);
    let id = {
        let key = world.key(b);
        world.with(a, |agent, now| agent.ping(now, &key, None))
    };
    world.run_for(secs(30));
    assert_eq!(world.sent(a).udp, 0);
    assert!(world.sent(b).udp > 0, "the other end tried");
    assert!(world.rejects(a).contains(&Reject::Disabled));
    assert_eq!(world.path(a, b), Some(Path::Relay { region: region() }));
    assert_eq!(world.path(b, a), Some(Path::Relay { region: region() }));
    let answered = answer(&world, a, id).map(|(path, _)| path);
    assert_eq!(answered, Some(Path::Relay { region: region() }));
}

#[test]
fn leaving_relay_only_mode_finds_the_direct_path_and_back_drops_it() {
    let (mut world, a, b) = easy_pair(10);
    world.with(a, |agent, _| agent.set_mode(Mode::Relay));
    data(&mut world, a, b);
    world.run_for(secs(10));
    world.with(a, |agent, _| agent.set_mode(Mode::Auto));
    let took = world.run_until(secs(5), |world| both_direct(world, a, b)).expect("a direct path");
    assert!(took <= RELAY_ROUND_TRIP * 3, "{took:?}");
    world.with(a, |agent, _| agent.set_mode(Mode::Relay));
    assert!(!world.is_direct(a, b), "at once");
    assert!(world.run_until(secs(7), |world| !world.is_direct(b, a)).is_some());
}

#[test]
fn direct_only_mode_has_no_path_until_one_is_proven() {
    let (mut world, a, b) = easy_pair(11);
    world.with(a, |agent, _| agent.set_mode(Mode::Direct));
    assert_eq!(world.path(a, b), None);
    let key = world.key(b);
    let id = world.with(a, |agent, now| agent.ping(now, &key, None));
    world.run_for(secs(2));
    assert!(world.is_direct(a, b));
    block_udp(&mut world, [a, b], true);
    world.run_for(secs(10));
    assert_eq!(world.path(a, b), None);
    assert!(answer(&world, a, id).is_some_and(|(path, _)| path.is_direct()));
}

#[test]
fn user_pings_go_by_relay_and_then_direct() {
    let (mut world, a, b) = easy_pair(12);
    let key = world.key(b);
    let first = world.with(a, |agent, now| agent.ping(now, &key, None));
    world.run_for(secs(1));
    world.keep_transcript();
    let second = world.with(a, |agent, now| agent.ping(now, &key, Some(1400)));
    world.run_for(secs(1));
    let answer = |ping| answer(&world, a, ping).map(|(path, latency)| (path.is_direct(), latency));
    assert_eq!(answer(first), Some((false, DELAY * 4)));
    assert_eq!(answer(second), Some((true, DELAY * 2)));
    assert!(world.transcript().iter().any(|record| record.source.path.is_direct() && record.datagram.len() == 1400));
}

#[test]
fn a_user_ping_to_nobody_fails() {
    let (mut world, a, b) = open_pair(13);
    let key = world.key(b);
    world.with(b, |agent, _| agent.set_mode(Mode::Relay));
    world.with(a, |agent, _| agent.set_mode(Mode::Direct));
    let unanswered = world.with(a, |agent, now| agent.ping(now, &key, None));
    let stranger = DiscoPrivate::from_bytes([9; 32]);
    let nobody = mesh_noise::key::NodePublic::from_bytes(*stranger.public().as_bytes());
    let unknown = world.with(a, |agent, now| agent.ping(now, &nobody, None));
    world.run_for(secs(6));
    for id in [unanswered, unknown] {
        assert!(
            world
                .events(a)
                .iter()
                .any(|(_, event)| matches!(event, Event::PingFailed { id: failed, .. } if *failed == id))
        );
    }
}

#[test]
fn unknown_sender_gets_no_answer() {
    let (mut world, a, b) = open_pair(14);
    let mut rng = StdRng::seed_from_u64(14);
    let stranger = DiscoPrivate::generate(&mut rng);
    let mut plaintext = Vec::new();
    Message::Ping(Ping { tx: TxId([1; 12]), node: Some(world.key(b)), padding: 0 }).encode(&mut plaintext);
    let shared = stranger.box_with(&world.disco(a).public());
    let datagram = seal::seal(&stranger.public(), &shared, &mut rng, &plaintext);
    let before = world.sent(a);
    let source = Source::direct(SocketId(0), "203.0.113.99:5".parse().unwrap());
    assert_eq!(world.inject(a, source, &datagram), Err(Reject::UnknownSender));

    // The same ping under a known key that it was not sealed with.
    let forged = seal::seal(&world.disco(b).public(), &shared, &mut rng, &plaintext);
    assert_eq!(world.inject(a, source, &forged), Err(Reject::Unsealed));
    assert_eq!(world.sent(a), before);
}

#[test]
fn a_removed_peer_is_a_stranger_again() {
    let (mut world, a, b) = direct_pair(15);
    let key = world.key(a);
    world.with(b, |agent, _| agent.remove_peer(&key));
    assert_eq!(world.path(b, a), None);
    let before = world.sent(b);
    world.run_for(secs(10));
    assert_eq!(world.sent(b), before);
    assert!(world.rejects(b).contains(&Reject::UnknownSender));
    assert!(!world.is_direct(a, b));
}

#[test]
fn call_me_maybe_is_believed_only_through_the_relay_from_the_key_holder() {
    let mut world = World::seeded(16);
    let internet = world.internet();
    let [a, b, c] = [(); 3].map(|()| world.node_in(internet));
    world.introduce(a, b);
    world.introduce(a, c);
    let mut rng = StdRng::seed_from_u64(16);
    let mut plaintext = Vec::new();
    let endpoints = vec!["203.0.113.77:7".parse().unwrap()];
    Message::CallMeMaybe(CallMeMaybe { endpoints }).encode(&mut plaintext);
    let shared = world.disco(b).box_with(&world.disco(a).public());
    let datagram = seal::seal(&world.disco(b).public(), &shared, &mut rng, &plaintext);
    let direct = Source::direct(SocketId(0), "198.51.100.2:41641".parse().unwrap());
    assert_eq!(world.inject(a, direct, &datagram), Err(Reject::NotOverRelay));
    assert_eq!(world.inject(a, Source::relay(region(), world.key(c)), &datagram), Err(Reject::WrongNode));
    assert_eq!(world.sent(a).udp, 0);
    assert_eq!(world.inject(a, Source::relay(region(), world.key(b)), &datagram), Ok(()));
    assert_eq!(world.sent(a).udp, 2, "the listed and the called address");
}

#[test]
fn a_flood_of_addresses_is_bounded() {
    let (mut world, a, b) = open_pair(17);
    let mut rng = StdRng::seed_from_u64(17);
    let shared = world.disco(b).box_with(&world.disco(a).public());
    for round in 0..10u16 {
        let endpoints = (1..2000u16).map(|port| ([203, 0, 113, 66], port + round * 2000).into()).collect();
        let mut plaintext = Vec::new();
        Message::CallMeMaybe(CallMeMaybe { endpoints }).encode(&mut plaintext);
        let datagram = seal::seal(&world.disco(b).public(), &shared, &mut rng, &plaintext);
        world.inject(a, Source::relay(region(), world.key(b)), &datagram).unwrap();
    }
    assert!(world.sent(a).udp <= 128, "{:?}", world.sent(a));
    let status = world.agent(a).status(&world.key(b)).unwrap();
    assert!(status.candidates <= 100, "{}", status.candidates);
    assert!(world.agent(a).counters().candidates_refused > 0);
    assert!(world.agent(a).counters().pings_suppressed > 0);
}

#[test]
fn a_ping_without_a_node_key_is_answered_and_attributed_if_only_one_node_has_the_disco_key() {
    let (mut world, a, b) = open_pair(18);
    let mut rng = StdRng::seed_from_u64(18);
    let shared = world.disco(b).box_with(&world.disco(a).public());
    let mut ping = |tx, node| {
        let mut plaintext = Vec::new();
        Message::Ping(Ping { tx: TxId(tx), node, padding: 0 }).encode(&mut plaintext);
        seal::seal(&world.disco(b).public(), &shared, &mut rng, &plaintext)
    };
    let (ancient, second, third) = (ping([1; 12], None), ping([2; 12], None), ping([3; 12], Some(world.key(b))));
    let source = |port: u16| Source::direct(SocketId(0), ([198, 51, 100, 2], port).into());
    let owner = |world: &World, port: u16| world.agent(a).owner(SocketId(0), ([198, 51, 100, 2], port).into());

    assert_eq!(world.inject(a, source(1), &ancient), Ok(()));
    assert_eq!(owner(&world, 1), Some(world.key(b)));

    // A second node with the same disco key, as with a shared node: now nobody can tell.
    let twin = PeerConfig {
        node: mesh_noise::key::NodePublic::from_bytes([7; 32]),
        disco: world.disco(b).public(),
        ..PeerConfig::default()
    };
    world.with(a, |agent, now| agent.set_peer(now, twin));
    assert_eq!(world.inject(a, source(2), &second), Ok(()));
    assert_eq!(owner(&world, 2), None);
    assert_eq!(world.inject(a, source(3), &third), Ok(()));
    assert_eq!(owner(&world, 3), Some(world.key(b)));
}

#[test]
fn a_peer_that_restarts_with_a_new_disco_key_is_found_again() {
    let (mut world, a, b) = direct_pair(19);
    let key = world.key(b);
    let renewed = PeerConfig {
        node: key,
        disco: DiscoPrivate::from_bytes([5; 32]).public(),
        home: RegionId::new(7),
        ..PeerConfig::default()
    };
    world.with(a, |agent, now| agent.set_peer(now, renewed));
    assert!(world.is_direct(a, b), "a new key alone does not end a path");
    world.run_for(secs(7));
    assert_eq!(world.path(a, b), Some(Path::Relay { region: RegionId::new(7).unwrap() }));
    assert!(world.rejects(a).contains(&Reject::UnknownSender), "the old key is gone");
}

#[test]
fn a_rebound_node_is_direct_again_within_three_round_trips() {
    let (mut world, a, b) = direct_pair(20);
    world.run_for(secs(10));
    reboot(&mut world, a);
    world.with(a, |agent, now| agent.rebind(now));
    let in_doubt = |world: &World| world.agent(a).status(&world.key(b)).unwrap().backup.is_some();
    assert!(world.is_direct(a, b) && in_doubt(&world), "the old path is kept, and the relay used as well");
    let took = world.run_until(secs(10), |world| world.is_direct(a, b) && !in_doubt(world)).expect("a direct path");
    assert!(took <= RELAY_ROUND_TRIP * 3, "{took:?}");
}

#[test]
fn same_seed_same_run() {
    let run = |seed| {
        let (mut world, a, b) = easy_pair(seed);
        lose(&mut world, 0.1);
        world.keep_transcript();
        data(&mut world, a, b);
        world.run_for(secs(40));
        let sent = (world.sent(a), world.sent(b));
        (world.transcript().to_vec(), sent, world.fingerprint())
    };
    let (first, second, other) = (run(21), run(21), run(22));
    assert!(first.0.len() > 20);
    assert_eq!(first, second);
    assert_ne!((first.0, first.2), (other.0, other.2));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The world asserts after every timeout that the next deadline lies in the future.
    #[test]
    fn deadlines_move_on_whatever_happens(seed in any::<u64>(), steps in proptest::collection::vec(0u8..12, 1..40)) {
        let (mut world, a, b) = pair(seed, Some(NatConfig::easy()), Some(NatConfig::hard()));
        let (key_a, key_b) = (world.key(a), world.key(b));
        let mut blocked = false;
        for step in steps {
            match step {
                0 => data(&mut world, a, b),
                1 => world.stop_all_data(),
                2 => world.with(a, |agent, now| agent.rebind(now)),
                3 => world.with(b, |agent, _| agent.set_mode(Mode::Relay)),
                4 => world.with(b, |agent, _| agent.set_mode(Mode::Auto)),
                5 => { world.with(a, |agent, now| agent.ping(now, &key_b, None)); }
                6 => {
                    blocked = !blocked;
                    block_udp(&mut world, [a, b], blocked);
                }
                7 => world.with(b, |agent, _| agent.remove_peer(&key_a)),
                8 => world.introduce(a, b),
                9 => reboot(&mut world, a),
                10 => { world.run_for(secs(50)); }
                _ => { world.run_for(Duration::from_millis(700)); }
            }
        }
        world.run_for(secs(10));
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200), known in any::<bool>()) {
        let (mut world, a, b) = open_pair(1);
        let mut datagram = seal::MAGIC.to_vec();
        if known {
            datagram.extend(world.disco(b).public().as_bytes());
        }
        datagram.extend(&bytes);
        let source = Source::direct(SocketId(0), "198.51.100.2:41641".parse().unwrap());
        prop_assert!(world.inject(a, source, &datagram).is_err());
        prop_assert!(world.inject(a, source, &bytes).is_err());
    }

    #[test]
    fn any_sealed_bytes_are_survived(plaintext in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (mut world, a, b) = open_pair(1);
        let shared = world.disco(b).box_with(&world.disco(a).public());
        let datagram = seal::seal(&world.disco(b).public(), &shared, &mut StdRng::seed_from_u64(1), &plaintext);
        for source in [
            Source::direct(SocketId(0), "198.51.100.2:41641".parse().unwrap()),
            Source::relay(region(), world.key(b)),
        ] {
            let _ = world.inject(a, source, &datagram);
        }
        world.run_for(secs(8));
    }
}
