//! Peer relays, with real agents and a real server's core in the laboratory.
#![allow(clippy::print_stdout, reason = "figures are there to be read, with --nocapture or when a test fails")]

use std::time::Duration;

use mesh_nat::agent::{Event, Reject, Source};
use mesh_nat::sim::{HostId, Link, NatConfig, World};
use mesh_nat::{Class, Path, classify};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// The longest datagram that such a tunnel sends, in bytes.
const TUNNEL_OF_1280: usize = 1312;

/// Two nodes behind such NATs, if any, and an open third that relays for them. All know each other.
fn three(seed: u64, nat: Option<NatConfig>) -> (World, [HostId; 3]) {
    let mut world = World::seeded(seed);
    let hosts = [nat, nat, None].map(|nat| match nat {
        Some(nat) => world.node_behind(nat),
        None => world.node_in(world.internet()),
    });
    let [a, b, relay] = hosts;
    for (this, other) in [(a, b), (a, relay), (b, relay)] {
        world.introduce(this, other);
    }
    world.relay_for(relay, &[a, b]);
    (world, hosts)
}

/// The same with two whose NATs never let them meet.
fn hopeless(seed: u64) -> (World, [HostId; 3]) {
    three(seed, Some(NatConfig::hard()))
}

fn by_peer_relay(world: &World, from: HostId, to: HostId) -> bool {
    matches!(world.path(from, to), Some(Path::PeerRelay { .. }))
}

fn both(world: &World, a: HostId, b: HostId) -> bool {
    by_peer_relay(world, a, b) && by_peer_relay(world, b, a)
}

#[test]
fn two_that_cannot_meet_meet_at_a_third() {
    let (mut world, [a, b, relay]) = hopeless(1);
    let streams = [world.send_data(a, b, MS * 20), world.send_data(b, a, MS * 20)];
    let took = world.run_until(SECOND * 5, |world| both(world, a, b)).expect("a path through the third");
    assert!(took <= MS * 900, "{took:?}");
    let (from, before) = (world.now(), world.forwarded(relay));
    world.run_for(SECOND * 60);
    assert!(both(&world, a, b), "it lasts");
    for stream in streams {
        assert_eq!(world.stream(stream).outage(from, world.now(), SECOND), Duration::ZERO);
    }
    assert!(world.forwarded(relay) - before >= 2 * 60 * 50, "the data went through the third");
}

#[test]
fn udp_blocked_between_the_two_goes_through_a_third() {
    let (mut world, [a, b, _]) = three(2, None);
    world.cut(a, b, true);
    world.send_data(a, b, MS * 20);
    let took = world.run_until(SECOND * 5, |world| both(world, a, b));
    assert!(took.is_some(), "{:?}", world.path(a, b));
}

#[test]
fn a_direct_path_is_preferred_and_nothing_is_allocated_for_it() {
    let (mut world, [a, b, relay]) = three(3, Some(NatConfig::easy()));
    world.send_data(a, b, MS * 50);
    world.send_data(b, a, MS * 50);
    world.run_for(SECOND * 60);
    assert!(world.is_direct(a, b) && world.is_direct(b, a));
    assert_eq!(world.forwarded(relay), 0);
}

#[test]
fn a_direct_path_that_appears_replaces_the_relay_and_one_that_goes_falls_back_to_it() {
    let (mut world, [a, b, _]) = three(4, None);
    world.cut(a, b, true);
    world.send_data(a, b, MS * 20);
    world.send_data(b, a, MS * 20);
    world.run_until(SECOND * 5, |world| both(world, a, b)).expect("the relay");
    world.cut(a, b, false);
    world.run_until(SECOND * 10, |world| world.is_direct(a, b) && world.is_direct(b, a)).expect("direct");
    world.run_for(SECOND * 40);
    assert!(world.is_direct(a, b), "it stays");
    world.cut(a, b, true);
    let back = world.run_until(SECOND * 20, |world| both(world, a, b)).expect("the relay again");
    assert!(back <= SECOND * 8, "{back:?}");
}

#[test]
fn when_the_third_goes_away_the_region_takes_over_and_when_it_is_back_so_is_the_path() {
    let (mut world, [a, b, relay]) = hopeless(5);
    world.send_data(a, b, MS * 20);
    world.send_data(b, a, MS * 20);
    world.run_until(SECOND * 5, |world| both(world, a, b)).expect("the relay");
    world.stop_relaying(relay);
    let left = world.run_until(SECOND * 20, |world| matches!(world.path(a, b), Some(Path::Relay { .. })));
    assert!(left.is_some_and(|left| left <= SECOND * 10), "{left:?}");
    world.relay_for(relay, &[a, b]);
    world.run_until(SECOND * 45, |world| both(world, a, b)).expect("the relay again");
}

#[test]
fn a_node_that_changes_networks_takes_its_path_through_the_third_along() {
    for seed in 20..30 {
        let (mut world, [a, b, relay]) = hopeless(seed);
        world.relay_for(relay, &[a, b]);
        let streams = [world.send_data(a, b, MS * 20), world.send_data(b, a, MS * 20)];
        world.run_until(SECOND * 5, |world| both(world, a, b)).expect("the relay");
        world.run_for(SECOND * 5);
        let (path, from, events) = (world.path(a, b), world.now(), world.events(a).len());
        let internet = world.internet();
        let elsewhere = world.network_behind(internet, NatConfig::hard());
        world.roam(a, elsewhere);
        let doubted =
            |world: &World| world.agent(a).status(&world.key(b)).is_some_and(|status| status.backup.is_some());
        assert!(doubted(&world), "a region carries copies meanwhile");
        let took = world.run_until(SECOND * 5, |world| !doubted(world)).expect("bound again");
        world.run_for(SECOND * 20);
        assert_eq!(world.path(a, b), path, "the same pair at the same server");
        assert!(both(&world, a, b));
        let left = world.events(a)[events..].iter().any(|(_, event)| matches!(event, Event::PathChanged { .. }));
        assert!(!left, "the path was never left");
        let outages = streams.map(|stream| world.stream(stream).outage(from, world.now(), SECOND));
        println!("seed {seed}: sound after {took:?}, outage {outages:?}");
        // A bind, its challenge and the answer; a packet more from the other side is on its way to the old place.
        assert!(took <= MS * 140 && outages.iter().all(|outage| *outage <= MS * 80), "{took:?} {outages:?}");
    }
}

#[test]
fn a_change_of_links_that_changes_nothing_costs_nothing() {
    let (mut world, [a, b, relay]) = hopeless(31);
    world.relay_for(relay, &[a, b]);
    let streams = [world.send_data(a, b, MS * 20), world.send_data(b, a, MS * 20)];
    world.run_until(SECOND * 5, |world| both(world, a, b)).expect("the relay");
    let from = world.now();
    for _ in 0..5 {
        world.link_changed(a);
        world.run_for(SECOND * 3);
        assert!(both(&world, a, b));
    }
    for stream in streams {
        assert_eq!(world.stream(stream).outage(from, world.now(), SECOND), Duration::ZERO);
    }
}

#[test]
fn a_narrow_link_on_either_side_of_the_third_is_found() {
    for narrow in 0..2 {
        let (mut world, hosts @ [a, b, relay]) = hopeless(40 + narrow as u64);
        world.set_host_link(hosts[narrow], Link { mtu: 1300, ..Link::default() });
        world.with(a, |agent, now| agent.set_wanted_length(now, Some(TUNNEL_OF_1280)));
        world.relay_for(relay, &[a, b]);
        world.send_data(a, b, MS * 20);
        world.run_until(SECOND * 5, |world| both(world, a, b)).expect("the relay");
        let limit = |world: &World| world.agent(a).status(&world.key(b)).and_then(|status| status.limit);
        let took = world.run_until(SECOND * 2, |world| limit(world).is_some()).expect("a limit");
        // 28 bytes of IP and UDP, and 8 of the relay's.
        assert_eq!(limit(&world), Some(1300 - 36));
        assert!(took <= SECOND, "{took:?}");
        world.set_host_link(hosts[narrow], Link::default());
        world.run_for(SECOND * 62);
        assert_eq!(limit(&world), None, "it has grown wider");
    }
}

#[test]
fn long_datagrams_go_through_the_third_once_a_ping_as_long_has_been_answered() {
    let (mut world, [a, b, relay]) = hopeless(42);
    world.with(a, |agent, now| agent.set_wanted_length(now, Some(1440)));
    world.relay_for(relay, &[a, b]);
    world.send_data(a, b, MS * 20);
    world.run_until(SECOND * 5, |world| both(world, a, b)).expect("the relay");
    world.run_for(SECOND);
    let limits: Vec<_> = world
        .events(a)
        .iter()
        .filter_map(|(_, event)| if let Event::LimitChanged { limit, .. } = event { Some(*limit) } else { None })
        .collect();
    assert_eq!(limits, [Some(TUNNEL_OF_1280), None]);
}

#[test]
fn whoever_is_not_allowed_gets_no_allocation() {
    let (mut world, [a, b, relay]) = hopeless(6);
    // The clients believe that they may; the server knows of nobody.
    world.with(relay, |agent, _| agent.set_relays(mesh_nat::agent::Relays::default()));
    world.send_data(a, b, MS * 50);
    world.run_for(SECOND * 20);
    assert!(matches!(world.path(a, b), Some(Path::Relay { .. })));
    assert!(world.rejects(relay).contains(&Reject::NotAllowed));
}

#[test]
fn binding_messages_are_taken_behind_their_header_only() {
    let (mut world, [a, b, _]) = hopeless(7);
    world.keep_transcript();
    world.send_data(a, b, MS * 50);
    world.run_until(SECOND * 5, |world| both(world, a, b)).expect("the relay");
    let challenges: Vec<_> = world
        .transcript()
        .iter()
        .filter(|record| matches!(classify(&record.datagram), Class::RelayedDisco { control: true, .. }))
        .filter(|record| record.host == a)
        .map(|record| (record.source, record.datagram.clone()))
        .collect();
    let (source, challenge) = challenges.first().expect("a challenge");
    let refused = |world: &mut World, source: Source, datagram: &[u8]| world.inject(a, source, datagram).unwrap_err();
    assert_eq!(refused(&mut world, *source, challenge), Reject::UnknownSender, "the handshake is over");
    let mut as_data = challenge.clone();
    as_data[1] = 0;
    assert_eq!(refused(&mut world, *source, &as_data), Reject::UnknownSender);
    assert_eq!(refused(&mut world, *source, &challenge[8..]), Reject::UnknownSender);
}
