//! Places that are more than a NAT at each end: chains of NATs, common ones, firewalls, IPv6, blocked UDP, narrow links,
//! moves and sleep.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::SocketAddr;
use std::time::Duration;

use mesh_nat::sim::{
    Excuse, GatewayConfig, HostId, Io, Link, Method, NatConfig, Program, StunServer, Verdict, World, oracle,
};
use mesh_nat::stun::Binding;
use mesh_nat::stun::binding::Event;
use mesh_nat::{Family, Path, SocketId};

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn both_direct(world: &World, a: HostId, b: HostId) -> bool {
    world.is_direct(a, b) && world.is_direct(b, a)
}

/// Lets two nodes talk; they should be direct as the oracle says.
fn as_foretold(world: &mut World, a: HostId, b: HostId) -> Duration {
    let Verdict::Direct { within, .. } = oracle(world, a, b) else { panic!("{:?}", oracle(world, a, b)) };
    world.introduce(a, b);
    world.converse(a, b, Duration::from_millis(50));
    let took = world.run_until(within, |world| both_direct(world, a, b));
    took.unwrap_or_else(|| panic!("not within {within:?}: {:?} and {:?}", world.path(a, b), world.path(b, a)))
}

fn remote(world: &World, from: HostId, to: HostId) -> SocketAddr {
    match world.path(from, to) {
        Some(Path::Direct { remote, .. }) => remote,
        other => panic!("{other:?}"),
    }
}

#[test]
fn two_nats_in_a_row_are_got_through_like_the_stricter_one() {
    let mut world = World::seeded(1);
    let carrier = world.network_behind(world.internet(), NatConfig::easy());
    let home = world.network_behind(carrier, NatConfig::open());
    let a = world.node_in(home);
    let b = world.node_behind(NatConfig::easy());
    as_foretold(&mut world, a, b);
    assert!(matches!(oracle(&world, a, b), Verdict::Direct { how: Method::Punch, .. }));
}

#[test]
fn homes_of_one_carrier_meet_by_hairpin() {
    let mut world = World::seeded(2);
    let carrier = world.network_behind(world.internet(), NatConfig { hairpin: true, ..NatConfig::easy() });
    let [a, b] = [(); 2].map(|()| {
        let home = world.network_behind(carrier, NatConfig::easy());
        world.node_in(home)
    });
    as_foretold(&mut world, a, b);
    let outside = world.endpoints(b)[0];
    assert_eq!(remote(&world, a, b).ip(), outside.ip(), "by the carrier's outside address");
}

#[test]
fn homes_of_one_carrier_without_hairpin_stay_on_the_relay() {
    let mut world = World::seeded(3);
    let carrier = world.network_behind(world.internet(), NatConfig::easy());
    let [a, b] = [(); 2].map(|()| {
        let home = world.network_behind(carrier, NatConfig::easy());
        world.node_in(home)
    });
    world.introduce(a, b);
    let stream = world.converse(a, b, Duration::from_millis(50));
    assert_eq!(world.run_until(secs(20), |world| world.is_direct(a, b) || world.is_direct(b, a)), None);
    assert!(world.stream(stream).arrived() + 2 >= world.stream(stream).sent(), "data goes by the relay");
}

#[test]
fn hosts_of_one_network_use_it() {
    for nat in [NatConfig::easy(), NatConfig::hard()] {
        let mut world = World::seeded(4);
        let home = world.network_behind(world.internet(), nat);
        let (a, b) = (world.node_in(home), world.node_in(home));
        as_foretold(&mut world, a, b);
        assert_eq!(remote(&world, a, b), SocketAddr::new(world.addresses(b)[0], 41641));
    }
}

#[test]
fn a_private_address_that_is_somebody_elses_here_fools_nobody() {
    // Both homes count alike, and in each the other's address belongs to somebody: a node of its own.
    let mut world = World::seeded(5);
    let homes = [(); 2].map(|()| world.network_with_prefix(world.internet(), NatConfig::easy(), [192, 168, 1]));
    let [(a, _), (b, _)] = homes.map(|home| (world.node_in(home), world.node_in(home)));
    assert_eq!(world.addresses(a), world.addresses(b));
    as_foretold(&mut world, a, b);
    assert!(remote(&world, a, b).ip().to_string().starts_with("198.18."));
}

#[test]
fn firewalls_without_nat_are_got_through() {
    let mut world = World::seeded(6);
    let (a, b) = (world.node_behind(GatewayConfig::firewall()), world.node_behind(GatewayConfig::firewall()));
    assert_eq!(world.endpoints(a).len(), 1, "what the world sees is its own address");
    as_foretold(&mut world, a, b);
}

#[test]
fn ipv6_helps_where_both_ipv4_nats_are_hopeless() {
    let mut world = World::seeded(7);
    let hard = GatewayConfig::from(NatConfig::hard()).and_ipv6();
    let (a, b) = (world.node_behind(hard), world.node_behind(hard));
    as_foretold(&mut world, a, b);
    assert!(remote(&world, a, b).is_ipv6() && remote(&world, b, a).is_ipv6());
}

#[test]
fn the_oracle_excuses_no_udp_and_no_common_family_and_the_relay_carries_the_data() {
    let mut world = World::seeded(8);
    let network = world.network_behind(world.internet(), NatConfig::easy());
    let blocked = world.node_in(network);
    world.block_udp(world.gateway_of(network).unwrap(), true);
    let only_v6 = world.add_host(world.internet(), &[Family::V6]);
    world.start_node(only_v6, &[Family::V6]);
    let easy = world.node_behind(NatConfig::easy());
    for (other, excuse) in [(blocked, Excuse::UdpBlocked), (only_v6, Excuse::NoCommonFamily)] {
        assert_eq!(oracle(&world, easy, other), Verdict::Excused(excuse));
        world.introduce(easy, other);
        let stream = world.converse(easy, other, Duration::from_millis(50));
        world.run_for(secs(10));
        assert!(!world.is_direct(easy, other) && !world.is_direct(other, easy));
        assert!(world.stream(stream).arrived() + 2 >= world.stream(stream).sent());
    }
}

#[test]
fn a_forwarded_port_makes_a_hard_nat_open() {
    let mut world = World::seeded(9);
    let (a, b) = (world.node_behind(NatConfig::hard()), world.node_behind(NatConfig::hard()));
    let gateway = world.gateway_above(b).unwrap();
    let inside = SocketAddr::new(world.addresses(b)[0], 41641);
    let (now, outside) = (world.now(), world.endpoints(b)[0].ip());
    assert!(world.nat_mut(gateway).unwrap().forward(now, 40_000, inside, None));
    world.set_extra_endpoints(b, vec![SocketAddr::new(outside, 40_000)]);
    world.introduce(a, b);
    world.converse(a, b, Duration::from_millis(50));
    assert!(world.run_until(Duration::from_millis(140), |world| both_direct(world, a, b)).is_some());
    assert_eq!(remote(&world, a, b), SocketAddr::new(outside, 40_000));
}

#[test]
fn a_node_that_moves_is_direct_again_within_a_second() {
    let mut world = World::seeded(10);
    let (a, b) = (world.node_behind(NatConfig::easy()), world.node_behind(NatConfig::easy()));
    as_foretold(&mut world, a, b);
    world.run_for(secs(20));
    let elsewhere = world.network_behind(world.internet(), NatConfig::easy());
    let (old, now) = (remote(&world, b, a), world.now());
    world.roam(a, elsewhere);
    let moved = |world: &World| {
        let to = |from, to| world.path(from, to).and_then(|path| world.reached(from, to, path));
        to(a, b).is_some_and(|at| at > now) && to(b, a).is_some_and(|at| at > now) && remote(world, b, a) != old
    };
    let took = world.run_until(secs(10), moved).expect("a direct path");
    assert!(took <= secs(1), "{took:?}");
}

#[test]
fn a_node_that_slept_is_direct_again_within_a_second() {
    let mut world = World::seeded(11);
    let (a, b) = (world.node_behind(NatConfig::easy()), world.node_behind(NatConfig::easy()));
    as_foretold(&mut world, a, b);
    world.run_for(secs(20));
    world.sleep(b);
    world.run_for(secs(600));
    assert!(!world.is_direct(a, b));
    world.wake(b);
    let now = world.now();
    let reached = |world: &World, from, to| world.path(from, to).and_then(|path| world.reached(from, to, path));
    let took = world.run_until(secs(10), |world| {
        reached(world, a, b).is_some_and(|at| at > now) && reached(world, b, a).is_some_and(|at| at > now)
    });
    assert!(took.is_some_and(|took| took <= secs(1)), "{took:?}");
}

#[test]
fn what_is_longer_than_a_link_carries_does_not_arrive() {
    let mut world = World::seeded(12);
    let internet = world.internet();
    let (a, b) = (world.node_in(internet), world.node_in(internet));
    world.set_host_link(b, Link { mtu: 1280, ..Link::default() });
    as_foretold(&mut world, a, b);
    let key = world.key(b);
    let ping = |world: &mut World, size| world.with(a, |agent, now| agent.ping(now, &key, Some(size)));
    let (fits, long) = (ping(&mut world, 1252), ping(&mut world, 1253));
    world.run_for(secs(6));
    let answered = |wanted| {
        world
            .events(a)
            .iter()
            .any(|(_, event)| matches!(event, mesh_nat::agent::Event::PingAnswered { id, .. } if *id == wanted))
    };
    assert!(answered(fits) && !answered(long));
    assert!(world.lost() > 0);
}

#[test]
fn datagrams_overtake_each_other_where_there_is_jitter() {
    let mut world = World::seeded(13);
    let internet = world.internet();
    let (a, b) = (world.node_in(internet), world.node_in(internet));
    as_foretold(&mut world, a, b);
    world.set_link(internet, Link { jitter: Duration::from_millis(200), ..world.link(internet) });
    world.keep_transcript();
    let stream = world.send_data(a, b, Duration::from_millis(5));
    world.run_for(secs(2));
    world.stop_all_data();
    world.run_for(secs(1));
    assert_eq!(world.stream(stream).arrived(), world.stream(stream).sent(), "late, not lost");
    let order: Vec<_> =
        world.transcript().iter().filter(|record| record.host == b).map(|record| &record.datagram).collect();
    assert!(order.windows(2).any(|pair| pair[0].len() == 128 && pair[1].len() == 128 && pair[0] > pair[1]));
}

/// Asks a STUN server from a socket of its own.
struct Asks {
    server: SocketAddr,
    socket: Option<SocketId>,
    binding: Option<Binding>,
    answer: Option<SocketAddr>,
}

impl Asks {
    fn flush(&mut self, io: &mut Io<'_>) {
        let (Some(binding), Some(socket)) = (&mut self.binding, self.socket) else { return };
        while let Some((server, request)) = binding.poll_transmit() {
            io.send(socket, server, request);
        }
        if let Some(Event::Mapped { address, .. }) = binding.poll_event() {
            self.answer = Some(address);
        }
    }
}

impl Program for Asks {
    fn handle_datagram(&mut self, io: &mut Io<'_>, _: SocketId, _: SocketAddr, datagram: &[u8]) -> bool {
        let taken = self.binding.as_mut().is_some_and(|binding| binding.handle_datagram(io.now, datagram).is_ok());
        self.flush(io);
        taken
    }

    fn handle_timeout(&mut self, io: &mut Io<'_>) {
        match &mut self.binding {
            Some(binding) => binding.handle_timeout(io.now),
            None => {
                self.socket = Some(io.open(Family::V4, 5000));
                self.binding = Some(Binding::new(io.now, self.server, io.rng));
            }
        }
        self.flush(io);
    }

    fn poll_timeout(&self) -> Option<std::time::Instant> {
        self.binding.as_ref()?.poll_timeout()
    }
}

#[test]
fn other_cores_run_in_the_laboratory_too() {
    let mut world = World::seeded(14);
    let network = world.network_behind(world.internet(), NatConfig::easy());
    let host = world.add_host(network, &[Family::V4]);
    let server = world.stun_servers()[0];
    world.add_program(host, Asks { server, socket: None, binding: None, answer: None });
    world.run_for(secs(1));
    let seen = world.program::<Asks>(host).unwrap().answer.unwrap();
    assert_eq!(seen.port(), 5000, "the NAT preserves ports");
    assert!(seen.ip().to_string().starts_with("198.18."));
    assert!(world.program::<StunServer>(host).is_none());
}
