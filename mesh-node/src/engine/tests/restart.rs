//! A peer whose process starts anew: it has a new disco key and knows no session, and we go on sending.

use super::world::World;
use crate::engine::*;

/// How soon after a restart control has told of it.
const CONTROL_DELAY: Duration = Duration::from_millis(200);
/// Where the second host is found after it has moved.
const ELSEWHERE: ([u8; 4], u16) = ([198, 51, 100, 2], 50_000);

/// The first host sends every 50 ms for `time`, and nobody else does.
fn stream(world: &mut World, time: Duration) {
    let until = world.now + time;
    while world.now < until {
        world.send(0, b"0123456789abcdef");
        world.run(Duration::from_millis(50));
    }
}

/// When the second host first got something at or after `from`.
fn arrived(world: &World, from: Instant) -> Option<Duration> {
    world.hosts[1].times.iter().find(|at| **at >= from).map(|at| *at - from)
}

/// How long it takes from now until data arrives and the first host's path is direct and beyond doubt. Control tells of
/// what the second host announces.
fn until_direct(world: &mut World, limit: Duration) -> Option<Duration> {
    let from = world.now;
    let mut told = world.hosts[1].announced.clone();
    while world.now - from < limit {
        stream(world, Duration::from_millis(50));
        if world.hosts[1].announced != told {
            told.clone_from(&world.hosts[1].announced);
            world.publish();
        }
        let sound = world.hosts[0].backups.values().all(Option::is_none);
        if arrived(world, from).is_some() && sound && world.path(0).is_some_and(|path| path.is_direct()) {
            return Some(world.now - from);
        }
    }
    None
}

#[test]
fn data_reaches_a_restarted_peer_within_two_seconds_and_directly() {
    for (offset, moved) in (0..6).flat_map(|offset| [(offset, false), (offset, true)]) {
        let mut world = World::direct_after(Duration::from_millis(15_000 + 500 * offset));
        let address = if moved { ELSEWHERE.into() } else { world.hosts[1].address };
        let restarted = world.now;
        world.restart(1, address);
        stream(&mut world, CONTROL_DELAY);
        world.publish();
        let direct = until_direct(&mut world, Duration::from_secs(30)).map(|took| took + CONTROL_DELAY);
        let data = arrived(&world, restarted).expect("data never arrives again");
        println!("restart at offset {offset}, moved {moved}: data after {data:?}, direct after {direct:?}");
        assert!(data <= Duration::from_secs(2), "data paused for {data:?}");
        assert!(direct.is_some_and(|took| took <= Duration::from_secs(2)), "direct after {direct:?}");
    }
}

#[test]
fn a_restarted_peer_that_control_has_not_told_of_is_asked_as_soon_as_it_speaks() {
    let mut world = World::direct_after(Duration::from_secs(15));
    // Without data through the relay, only the ping gives it away.
    let (restarted, a) = (world.now, world.key(0));
    world.restart(1, ELSEWHERE.into());
    world.introduce(1);
    world.hosts[1].engine.ping(restarted, &a, None).unwrap();
    world.drain(1);
    stream(&mut world, Duration::from_secs(1));
    let data = arrived(&world, restarted).expect("data arrives again");
    assert!(data <= Duration::from_secs(1), "{data:?}");
}

#[test]
fn who_gets_data_for_a_session_that_it_has_lost_asks_for_a_new_one() {
    let mut world = World::direct_after(Duration::from_secs(15));
    let restarted = world.now;
    world.restart(1, ELSEWHERE.into());
    // The first host is never told, and the second says nothing by itself.
    world.introduce(1);
    stream(&mut world, Duration::from_secs(3));
    let data = arrived(&world, restarted).expect("data arrives again");
    assert!(data <= Duration::from_secs(2), "{data:?}");
}

#[test]
fn strange_disco_keys_lead_to_one_handshake_in_five_seconds() {
    let mut world = World::direct_after(Duration::from_secs(15));
    let (path, node) = (Path::Relay { region: super::region(1) }, Some(world.key(1)));
    let mut strange = [0; 110];
    strange[..6].copy_from_slice(b"TS\xf0\x9f\x92\xac");
    let before = world.hosts[0].opened;
    for _ in 0..100 {
        let now = world.now;
        world.hosts[0].engine.handle_datagram(now, &Hop { path, node }, &strange);
        world.drain(0);
        stream(&mut world, Duration::from_millis(50));
    }
    let opened = world.hosts[0].opened - before;
    assert!((1..=2).contains(&opened), "{opened} sessions in five seconds");
}

#[test]
fn a_disco_key_told_inside_the_tunnel_counts_until_control_tells_of_another() {
    let mut world = World::direct_after(Duration::from_secs(15));
    let b = world.key(1);
    world.restart(1, ELSEWHERE.into());
    world.introduce(1);
    let told = world.hosts[1].engine.disco_key();
    // As a packet from 100.64.0.2 to 100.64.0.1.
    let mut packet = vec![0x45, 0, 0, 53, 0, 0, 0, 0, 64, 99, 0, 0, 100, 64, 0, 2, 100, 64, 0, 1, b'a'];
    packet.extend_from_slice(told.as_bytes());
    let now = world.now;
    world.hosts[0].engine.tsmp(now, &b, &packet);
    world.drain(0);
    world.converse(Duration::from_secs(3));
    assert!(world.path(0).is_some_and(|path| path.is_direct()), "{:?}", world.path(0));

    // A map that says what it said before changes nothing.
    let stale = world.hosts[0].engine.peers[&b].view.clone();
    assert_ne!(stale.disco, Some(told));
    let moved = PeerView { endpoints: Vec::new(), ..stale };
    let view = MapView { peers: BTreeMap::from([(b, moved)]), ..MapView::clone(&world.hosts[0].engine.map) };
    let now = world.now;
    world.hosts[0].engine.set_map(now, Arc::new(view));
    world.drain(0);
    world.converse(Duration::from_secs(10));
    assert!(world.path(0).is_some_and(|path| path.is_direct()), "{:?}", world.path(0));
    for garbage in [&packet[..30], &packet[..20], b"", b"a"] {
        world.hosts[0].engine.tsmp(now, &b, garbage);
    }
    assert_eq!(world.hosts[0].engine.peers[&b].disco(), Some(told));
}
