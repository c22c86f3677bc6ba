//! Peer relays, with real agents and a real server's core in the laboratory.

use std::time::Duration;

use mesh_nat::agent::{Reject, Source};
use mesh_nat::sim::{HostId, NatConfig, World};
use mesh_nat::{Class, Path, classify};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// Two nodes whose NATs never let them meet, and a third that both reach.
fn hopeless(seed: u64) -> (World, [HostId; 3]) {
    let mut world = World::seeded(seed);
    let hosts = [world.node_behind(NatConfig::hard()), world.node_behind(NatConfig::hard()), open(&mut world)];
    let [a, b, relay] = hosts;
    world.introduce(a, b);
    world.introduce(a, relay);
    world.introduce(b, relay);
    (world, hosts)
}

fn open(world: &mut World) -> HostId {
    let internet = world.internet();
    world.node_in(internet)
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
    world.relay_for(relay, &[a, b]);
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
    let mut world = World::seeded(2);
    let (a, b, relay) = (open(&mut world), open(&mut world), open(&mut world));
    for (this, other) in [(a, b), (a, relay), (b, relay)] {
        world.introduce(this, other);
    }
    world.relay_for(relay, &[a, b]);
    world.cut(a, b, true);
    world.send_data(a, b, MS * 20);
    let took = world.run_until(SECOND * 5, |world| both(world, a, b));
    assert!(took.is_some(), "{:?}", world.path(a, b));
}

#[test]
fn a_direct_path_is_preferred_and_nothing_is_allocated_for_it() {
    let mut world = World::seeded(3);
    let (a, b) = (world.node_behind(NatConfig::easy()), world.node_behind(NatConfig::easy()));
    let relay = open(&mut world);
    for (this, other) in [(a, b), (a, relay), (b, relay)] {
        world.introduce(this, other);
    }
    world.relay_for(relay, &[a, b]);
    world.send_data(a, b, MS * 50);
    world.send_data(b, a, MS * 50);
    world.run_for(SECOND * 60);
    assert!(world.is_direct(a, b) && world.is_direct(b, a));
    assert_eq!(world.forwarded(relay), 0);
}

#[test]
fn a_direct_path_that_appears_replaces_the_relay_and_one_that_goes_falls_back_to_it() {
    let mut world = World::seeded(4);
    let (a, b, relay) = (open(&mut world), open(&mut world), open(&mut world));
    for (this, other) in [(a, b), (a, relay), (b, relay)] {
        world.introduce(this, other);
    }
    world.relay_for(relay, &[a, b]);
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
    world.relay_for(relay, &[a, b]);
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
fn whoever_is_not_allowed_gets_no_allocation() {
    let (mut world, [a, b, relay]) = hopeless(6);
    // The clients believe that they may; the server knows of nobody.
    world.relay_for(relay, &[a, b]);
    world.with(relay, |agent, _| agent.set_relays(mesh_nat::agent::Relays::default()));
    world.send_data(a, b, MS * 50);
    world.run_for(SECOND * 20);
    assert!(matches!(world.path(a, b), Some(Path::Relay { .. })));
    assert!(world.rejects(relay).contains(&Reject::NotAllowed));
}

#[test]
fn binding_messages_are_taken_behind_their_header_only() {
    let (mut world, [a, b, relay]) = hopeless(7);
    world.relay_for(relay, &[a, b]);
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
