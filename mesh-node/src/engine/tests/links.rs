//! Changes of the host's network under a conversation.

use mesh_nat::SocketId;

use super::world::{Host, World};
use crate::engine::*;

/// Changes the first host's network.
fn change(world: &mut World, edit: impl FnOnce(&mut Local)) -> Option<LinkChange> {
    let (now, bound) = (world.now, world.hosts[0].address);
    let mut local = world.hosts[0].engine.local().clone();
    edit(&mut local);
    let change = world.hosts[0].engine.set_local(now, local, &[(SocketId(0), bound)]);
    world.drain(0);
    change
}

fn another_router(local: &mut Local) {
    local.default_v4 = local.default_v4.map(|route| DefaultRoute { router: "198.51.100.253".parse().ok(), ..route });
}

fn in_doubt(world: &World) -> bool {
    world.hosts[0].backups.values().any(Option::is_some)
}

/// The longest time without data at either host from `from` on.
fn longest_pause(world: &World, from: Instant) -> Duration {
    let pause = |host: &Host| {
        let came = host.times.iter().copied().filter(|at| *at >= from);
        let ends = std::iter::once(from).chain(came.clone()).zip(came.chain([world.now]));
        ends.map(|(one, next)| next - one).max().unwrap_or_default()
    };
    world.hosts.iter().map(pause).max().unwrap_or_default()
}

#[test]
fn another_default_router_with_the_same_addresses_puts_paths_in_doubt_and_loses_nothing() {
    let mut world = World::direct_after(Duration::from_secs(15));
    world.run(Duration::from_secs(1));
    world.hosts[0].history.clear();
    let counts: Vec<_> = world.hosts.iter().map(|host| host.received.len()).collect();
    assert_eq!(change(&mut world, another_router), Some(LinkChange::Route));
    assert!(in_doubt(&world), "nobody knows yet whether the other router knows the way");
    assert!(world.path(0).is_some_and(|path| path.is_direct()), "the old path carries until another one is proven");
    world.converse(Duration::from_secs(5));
    world.run(Duration::from_secs(1));
    assert!(!in_doubt(&world));
    assert_eq!(world.hosts[0].history, [], "the path works, so it was never left");
    for (host, before) in world.hosts.iter().zip(counts) {
        assert_eq!(host.received.len() - before, 50, "every packet has arrived once");
    }
    assert!(world.hosts[0].events.contains(&Event::LinkChanged(LinkChange::Route)));
}

#[test]
fn where_the_other_router_breaks_the_direct_path_the_relay_carries_on_without_a_gap() {
    let mut world = World::direct_after(Duration::from_secs(15));
    let changed = world.now;
    world.direct_works = false;
    change(&mut world, another_router);
    world.converse(Duration::from_secs(10));
    assert!(world.path(0).is_some_and(|path| path.is_relay()), "{:?}", world.path(0));
    // The second host notices by itself, or by the data of the first that comes through the relay.
    let pause = longest_pause(&world, changed);
    assert!(pause <= Duration::from_millis(500), "{pause:?}");
    world.direct_works = true;
    let back = world.now;
    change(&mut world, |local| local.default_v4 = None);
    world.converse(Duration::from_secs(2));
    assert!(world.path(0).is_some_and(|path| path.is_direct()), "{:?} after {:?}", world.path(0), world.now - back);
}

#[test]
fn an_address_more_leads_to_probes_and_puts_nothing_in_doubt() {
    let mut world = World::direct_after(Duration::from_secs(15));
    world.hosts[0].history.clear();
    let added = LocalAddress { interface: "eth1".to_owned(), network: "10.0.0.4/8".parse().unwrap() };
    assert_eq!(change(&mut world, |local| local.addresses.push(added)), Some(LinkChange::Minor));
    assert!(!in_doubt(&world));
    world.converse(Duration::from_secs(3));
    assert!(!in_doubt(&world) && world.hosts[0].history.is_empty());
    let announced = world.hosts[0].announced.as_ref().unwrap();
    assert!(announced.endpoints.iter().any(|endpoint| endpoint.address.to_string() == "10.0.0.4:41641"));
}

#[test]
fn an_address_that_nobody_can_use_changes_nothing() {
    let mut world = World::direct_after(Duration::from_secs(15));
    let sent = world.hosts[0].engine.poll_timeout();
    let added = LocalAddress { interface: "eth0".to_owned(), network: "fe80::9/64".parse().unwrap() };
    assert_eq!(change(&mut world, |local| local.addresses.push(added)), None);
    assert_eq!(world.hosts[0].engine.poll_timeout(), sent, "no measurement, no probe");
}
