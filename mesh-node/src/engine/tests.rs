//! What an engine does, shown by two of them in virtual time.

mod links;
mod restart;
mod world;

use super::*;
use mesh_nat::SocketId;
pub(crate) use world::epoch;
use world::{DIRECT_DELAY, World, derp_map, region};

#[test]
fn the_first_packets_take_the_relay_and_then_the_path_becomes_direct() {
    let mut world = World::at_home();
    assert_eq!(world.path(0), Some(Path::Relay { region: region(1) }));
    assert!(!world.send(0, b"no session yet"));
    let b = world.key(1);
    assert!(world.run_until(Duration::from_secs(1), |world| world.hosts[0].send.contains_key(&b)));
    assert!(world.send(0, b"hello hello 1234"));
    assert!(world.run_until(Duration::from_secs(10), |world| {
        (0..2).all(|index| world.path(index).is_some_and(|path| path.is_direct()))
    }));
    assert!(world.send(0, b"hello hello 5678"));
    assert!(world.run_until(Duration::from_secs(1), |world| world.hosts[1].received.len() == 2));
    let paths: Vec<bool> = world.hosts[1].received.iter().map(|(path, _)| path.is_direct()).collect();
    assert_eq!(world.hosts[1].received[0].1, b"hello hello 1234");
    assert!(paths[1], "the second packet went {:?}", world.hosts[1].received[1].0);
    assert!(world.hosts[0].history[0].is_some_and(|path| path.is_relay()));
    assert!(world.hosts[1].engine.peer(&world.key(0)).unwrap().last_handshake.is_some());
}

#[test]
fn a_node_that_asks_before_it_is_known_gets_its_session_as_soon_as_it_is() {
    let mut world = World::at_home();
    // Control has told the first of the second, but not yet the second of the first.
    let (now, b) = (world.now, world.key(1));
    let empty = MapView { derp: Arc::new(derp_map(1)), ..MapView::default() };
    world.hosts[1].engine.set_map(now, Arc::new(empty));
    world.drain(1);
    world.send(0, b"");
    world.run(Duration::from_millis(300));
    assert!(!world.hosts[0].send.contains_key(&b));
    world.publish();
    assert!(world.run_until(Duration::from_millis(200), |world| world.hosts[0].send.contains_key(&b)));
}

#[test]
fn without_udp_a_region_is_chosen_all_the_same_and_traffic_stays_on_the_relay() {
    let mut world = World::new();
    world.udp_works = false;
    let chosen =
        world.run_until(Duration::from_secs(30), |world| world.hosts.iter().all(|host| host.engine.home().is_some()));
    assert!(chosen);
    world.publish();
    let b = world.key(1);
    world.send(0, b"");
    assert!(world.run_until(Duration::from_secs(2), |world| world.hosts[0].send.contains_key(&b)));
    for _ in 0..20 {
        assert!(world.send(0, b"through the relay"));
        world.run(Duration::from_secs(1));
    }
    assert_eq!(world.hosts[1].received.len(), 20);
    assert!(world.hosts[1].received.iter().all(|(path, _)| path.is_relay()));
}

#[test]
fn data_pauses_for_less_than_a_second_when_the_direct_path_dies() {
    for offset in 0..8 {
        let mut world = World::direct_after(Duration::from_millis(15_000 + 400 * offset));
        let relayed = |world: &World| {
            world.hosts.iter().flat_map(|host| &host.received).filter(|(path, _)| path.is_relay()).count()
        };
        let before = relayed(&world);
        world.converse(Duration::from_secs(10));
        assert_eq!(relayed(&world), before, "a sound path needs no copies");
        world.direct_works = false;
        let lost = world.now;
        world.converse(Duration::from_secs(8));
        for host in &world.hosts {
            let came = host.times.iter().copied().filter(|at| *at >= lost);
            let ends = std::iter::once(lost).chain(came.clone()).zip(came.chain([world.now]));
            let pause = ends.map(|(one, next)| next - one).max().unwrap();
            assert!(pause <= Duration::from_secs(1), "offset {offset}: {pause:?}");
        }
        assert!(world.hosts.iter().all(|host| host.backups.values().all(Option::is_none)), "in doubt for ever");
    }
}

#[test]
fn losing_udp_moves_traffic_back_to_the_relay_within_four_seconds() {
    // The outage begins at different moments between two heartbeats.
    for offset in 0..8 {
        let mut world = World::direct_after(Duration::from_millis(15_000 + 400 * offset));
        world.direct_works = false;
        let lost = world.now;
        while !(0..2).all(|index| world.path(index).is_some_and(|path| path.is_relay())) {
            world.converse(Duration::from_millis(100));
            assert!(world.now - lost < Duration::from_secs(4), "still direct, outage begun at offset {offset}");
        }
    }
}

#[test]
fn one_way_traffic_is_not_doubted_off_its_path() {
    let mut world = World::direct_after(Duration::from_secs(10));
    world.hosts[0].history.clear();
    for _ in 0..300 {
        world.send(0, b"0123456789abcdef");
        world.run(Duration::from_millis(100));
    }
    assert_eq!(world.hosts[0].history, [], "the path changed although it works");
}

#[test]
fn in_relay_mode_a_direct_path_is_not_used_and_in_direct_mode_the_relay_is_not() {
    let mut world = World::at_home();
    let now = world.now;
    world.hosts[0].engine.set_mode(now, PathMode::Direct);
    world.drain(0);
    assert_eq!(world.path(0), None);
    world.hosts[0].engine.set_mode(now, PathMode::Relay);
    world.drain(0);
    for _ in 0..20 {
        world.send(0, b"0123456789abcdef");
        world.run(Duration::from_millis(500));
    }
    assert!(world.hosts[0].history.iter().flatten().all(|path| path.is_relay()));
    assert!(!world.hosts[1].received.is_empty());
}

#[test]
fn a_removed_peer_takes_its_sessions_along() {
    let mut world = World::at_home();
    world.send(0, b"");
    world.run(Duration::from_secs(1));
    assert!(!world.hosts[0].receive.is_empty());
    let now = world.now;
    let view = MapView { derp: Arc::new(derp_map(1)), ..MapView::default() };
    world.hosts[0].engine.set_map(now, Arc::new(view));
    world.drain(0);
    assert!(world.hosts[0].send.is_empty());
    assert!(world.hosts[0].engine.peer(&world.key(1)).is_none());
    assert_eq!(world.hosts[0].engine.live_sessions, 0);
}

#[test]
fn a_ping_says_which_way_it_took() {
    let mut world = World::at_home();
    let (now, peer) = (world.now, world.key(1));
    let id = world.hosts[0].engine.ping(now, &peer, None).unwrap();
    world.drain(0);
    world.run(Duration::from_secs(2));
    let answered = world.hosts[0].events.iter().any(|event| {
        matches!(event, Event::PingAnswered { id: answered, latency, .. } if *answered == id && *latency >= DIRECT_DELAY * 2)
    });
    assert!(answered, "{:?}", world.hosts[0].events);
    assert_eq!(world.hosts[0].engine.ping(now, &NodePublic::ZERO, None), None);
}

#[test]
fn endpoints_and_home_are_announced_once_measured() {
    let world = World::at_home();
    let announced = world.hosts[0].announced.clone().unwrap();
    assert_eq!(announced.home, Some(region(1)));
    assert_eq!(announced.endpoints[0].address, world.hosts[0].address);
}

#[test]
fn a_home_that_delivers_data_is_not_left_for_want_of_an_answer_to_stun() {
    let mut world = World::new();
    world.regions = 2;
    world.publish();
    assert!(world.run_until(Duration::from_secs(5), |world| {
        world.hosts.iter().all(|host| host.engine.home() == Some(region(1)) && host.engine.report().is_some())
    }));
    for host in &mut world.hosts {
        // No disco comes through the relay then.
        host.engine.set_mode(world.now, PathMode::Relay);
    }
    world.publish();
    world.mute = Some("192.0.2.1".parse().unwrap());
    world.converse(Duration::from_secs(70));
    let report = world.hosts[0].engine.report().unwrap();
    assert_eq!(report.region_latency.keys().copied().collect::<Vec<_>>(), [region(2)], "the home was not measured");
    assert_eq!(world.hosts[0].engine.home(), Some(region(1)), "{report:?}");
    assert!(world.hosts[1].received.len() > 600);
}

proptest::proptest! {
    #[test]
    fn no_datagram_from_anywhere_upsets_the_engine(
        datagrams in proptest::collection::vec(
            (proptest::bool::ANY, proptest::collection::vec(proptest::num::u8::ANY, 0..200)), 0..20),
    ) {
        let mut world = World::new();
        world.publish();
        let (now, stranger) = (world.now, NodePublic::from_bytes([7; 32]));
        for (relayed, mut datagram) in datagrams {
            if let Some(first) = datagram.first_mut() {
                // Most of what begins otherwise is not even looked at.
                *first %= 5;
            }
            let hop = if relayed {
                Hop { path: Path::Relay { region: region(1) }, node: Some(stranger) }
            } else {
                Hop { path: Path::Direct { socket: SocketId(0), remote: world.hosts[1].address }, node: None }
            };
            world.hosts[0].engine.handle_datagram(now, &hop, &datagram);
            world.drain(0);
        }
        world.run(Duration::from_secs(10));
        proptest::prop_assert!(world.hosts[0].engine.home().is_some());
    }
}
