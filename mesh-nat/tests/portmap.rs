//! Port mappings in the laboratory: what a gateway that maps is worth to nodes behind hard NATs.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::SocketAddr;
use std::time::Duration;

use mesh_nat::behaviour::{Allocation, Mapping};
use mesh_nat::portmap::gateway::Quirks;
use mesh_nat::portmap::lab::{MapperProgram, MapsPorts};
use mesh_nat::portmap::{Protocol, Status};
use mesh_nat::sim::{HostId, NatConfig, NetworkId, World};

/// Both behind NATs that give every destination a port of its own, any of 64,512, with relays alone to meet at.
fn hard() -> NatConfig {
    NatConfig { mapping: Mapping::AddressAndPortDependent, allocation: Allocation::Random, ..NatConfig::easy() }
}

fn port_of(world: &World, host: HostId) -> u16 {
    world.endpoints(host).iter().find(|endpoint| world.addresses(host).contains(&endpoint.ip())).unwrap().port()
}

/// Lets `host` ask its gateway for a mapping, and tell of it.
fn map(world: &mut World, host: HostId) -> Status {
    let port = port_of(world, host);
    world.add_program(host, MapperProgram::new(port, [3; 32]));
    world.run_for(Duration::from_secs(3));
    let status = world.program::<MapperProgram>(host).unwrap().status();
    world.set_extra_endpoints(host, status.endpoint().into_iter().collect());
    status
}

/// How long it takes until both are direct, within `limit`.
fn meet(world: &mut World, a: HostId, b: HostId, limit: Duration) -> Option<Duration> {
    world.introduce(a, b);
    world.send_data(a, b, Duration::from_millis(100));
    world.run_until(limit, |world| world.is_direct(a, b) && world.is_direct(b, a))
}

fn network(world: &mut World, nat: NatConfig, speaks: &[Protocol], quirks: Quirks) -> NetworkId {
    let internet = world.internet();
    let network = world.network_behind(internet, nat);
    let gateway = world.gateway_of(network).unwrap();
    world.add_service(gateway, MapsPorts::speaking(speaks, quirks));
    network
}

#[test]
fn one_gateway_that_maps_makes_two_hard_nats_direct() {
    for protocol in Protocol::ALL {
        for seed in 0..20 {
            let mut world = World::seeded(seed);
            let network = network(&mut world, hard(), &[protocol], Quirks::default());
            let (a, b) = (world.node_in(network), world.node_behind(hard()));
            let status = map(&mut world, a);
            assert_eq!(status.mapping.map(|mapping| mapping.protocol), Some(protocol), "seed {seed}");
            let took = meet(&mut world, b, a, Duration::from_secs(2));
            assert!(took.is_some_and(|took| took <= Duration::from_millis(200)), "{protocol}, seed {seed}: {took:?}");
        }
    }
}

#[test]
fn two_nodes_of_one_network_get_ports_of_their_own() {
    let mut world = World::seeded(5);
    let network = network(&mut world, hard(), &Protocol::ALL, Quirks::default());
    let (a, b) = (world.node_in(network), world.node_in(network));
    let (first, second) = (map(&mut world, a), map(&mut world, b));
    assert!(first.endpoint().is_some() && second.endpoint().is_some());
    assert_ne!(first.endpoint(), second.endpoint());
    let c = world.node_behind(hard());
    assert!(meet(&mut world, c, a, Duration::from_secs(2)).is_some());
    assert!(meet(&mut world, c, b, Duration::from_secs(2)).is_some());
}

#[test]
fn behind_two_nats_the_mapping_of_the_inner_one_is_kept_and_not_told() {
    let mut world = World::seeded(5);
    let internet = world.internet();
    let carrier = world.network_behind(internet, hard());
    let home = world.network_behind(carrier, hard());
    let gateway = world.gateway_of(home).unwrap();
    world.add_service(gateway, MapsPorts::speaking(&Protocol::ALL, Quirks::default()));
    let a = world.node_in(home);
    let status = map(&mut world, a);
    assert!(status.mapping.unwrap().double_nat);
    assert_eq!(status.endpoint(), None);
}

#[test]
fn a_mapping_lives_for_days_and_ends_with_its_node() {
    let mut world = World::seeded(5);
    let network = network(&mut world, hard(), &Protocol::ALL, Quirks::default());
    let gateway = world.gateway_of(network).unwrap();
    let a = world.node_in(network);
    let endpoint = map(&mut world, a).endpoint().unwrap();
    world.run_for(Duration::from_secs(2 * 86_400));
    let program = world.program::<MapperProgram>(a).unwrap();
    assert_eq!(program.status().endpoint(), Some(endpoint));
    let told = program.changes().iter().filter(|status| status.endpoint() != Some(endpoint)).count();
    assert!(told <= 3, "nothing but what the probe found out before: {told}");
    world.with_program(a, |program: &mut MapperProgram, io| program.close(io)).unwrap();
    world.run_for(Duration::from_secs(1));
    let inside = SocketAddr::new(world.addresses(a)[0], port_of(&world, a));
    assert_eq!(world.nat(gateway).unwrap().forwarded(world.now(), inside), None);
}
