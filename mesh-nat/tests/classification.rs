//! The netcheck in the laboratory: each kind of NAT is recognised for what it is, or called unknown, never anything else.
#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "a world that contradicts itself fails its test")]
#![allow(clippy::print_stdout, reason = "how much was recognised is there to be read, with --nocapture")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_derp::map::{DerpMap, DerpNode};
use mesh_nat::report::{Event, Netcheck, Report, Scope};
use mesh_nat::sim::{Io, NatConfig, Program, World};
use mesh_nat::{Allocation, Behaviour, Filtering, Mapping, SocketId};
use mesh_nat::{Class, Family, classify};

/// A host that makes one report.
struct Checker {
    netcheck: Netcheck,
    map: Arc<DerpMap>,
    socket: Option<SocketId>,
    report: Option<Report>,
}

impl Checker {
    fn drain(&mut self, io: &mut Io<'_>) {
        loop {
            while let Some(transmit) = self.netcheck.poll_transmit() {
                io.send(transmit.socket, transmit.remote, transmit.datagram);
            }
            match self.netcheck.poll_event() {
                Some(Event::Finished(report)) => self.report = Some(report),
                Some(Event::WantSockets { count }) => {
                    let opened: Vec<_> = (0..count).map(|_| io.open(Family::V4, 0)).collect();
                    let bound = |socket: &SocketId| (*socket, at(io.port(*socket).unwrap()));
                    let bound: Vec<_> = opened.iter().map(bound).collect();
                    self.netcheck.handle_sockets(io.now, &bound);
                }
                Some(Event::WantHttpsLatency { region }) => self.netcheck.handle_https_latency(io.now, region, None),
                Some(_) => {}
                None => return,
            }
        }
    }
}

fn at(port: u16) -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], port))
}

impl Program for Checker {
    fn handle_datagram(&mut self, io: &mut Io<'_>, _: SocketId, from: SocketAddr, datagram: &[u8]) -> bool {
        let ours =
            classify(datagram) == Class::Stun && self.netcheck.handle_datagram_from(io.now, from, datagram).is_ok();
        self.drain(io);
        ours
    }

    fn handle_timeout(&mut self, io: &mut Io<'_>) {
        if self.socket.is_none() {
            let socket = io.open(Family::V4, 41641);
            self.socket = Some(socket);
            self.netcheck.set_sockets(vec![(socket, Family::V4)]);
            self.netcheck.set_ports(&[(socket, at(io.port(socket).unwrap()))]);
            self.netcheck.set_interfaces(io.addresses().iter().copied());
            self.netcheck.start(io.now, Arc::clone(&self.map), Scope::Full);
        }
        self.netcheck.handle_timeout(io.now);
        self.drain(io);
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.netcheck.poll_timeout()
    }
}

/// The world's relays, each with the second port of its STUN server.
fn map(world: &World) -> Arc<DerpMap> {
    let mut map = DerpMap::clone(&world.derp_map());
    for (id, region) in &mut map.regions {
        let name = format!("{id}-stun-3479");
        region.nodes.push(DerpNode { name, stun_port: 3479, stun_only: true, ..region.nodes[0].clone() });
    }
    Arc::new(map)
}

fn report(nat: Option<NatConfig>, seed: u64) -> Report {
    let mut world = World::seeded(seed);
    let network = match nat {
        Some(nat) => world.network_behind(world.internet(), nat),
        None => world.internet(),
    };
    let host = world.add_host(network, &[Family::V4]);
    let map = map(&world);
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_be_bytes());
    world.add_program(host, Checker { netcheck: Netcheck::new(bytes), map, socket: None, report: None });
    let found = |world: &World| world.program::<Checker>(host).unwrap().report.clone();
    world.run_until(Duration::from_millis(1500), |world| found(world).is_some());
    found(&world).expect("a report ends within a second and a half")
}

fn nats() -> impl Iterator<Item = NatConfig> {
    let mappings = [Mapping::EndpointIndependent, Mapping::AddressDependent, Mapping::AddressAndPortDependent];
    let filterings = [Filtering::EndpointIndependent, Filtering::AddressDependent, Filtering::AddressAndPortDependent];
    let allocations = [
        Allocation::Preserving,
        Allocation::Sequential { stride: 1 },
        Allocation::Sequential { stride: 2 },
        Allocation::Block,
        Allocation::Random,
    ];
    mappings.into_iter().flat_map(move |mapping| {
        filterings.into_iter().flat_map(move |filtering| {
            allocations.into_iter().flat_map(move |allocation| {
                [true, false].into_iter().map(move |hairpin| NatConfig {
                    mapping,
                    filtering,
                    allocation,
                    hairpin,
                    overload: false,
                    ..NatConfig::easy()
                })
            })
        })
    })
}

#[test]
fn every_nat_of_the_laboratory_is_recognised() {
    let (mut kinds, mut filtering) = (0, 0);
    for (seed, nat) in (0..3).flat_map(|seed| nats().map(move |nat| (seed, nat))) {
        let report = report(Some(nat), seed);
        let found = report.nat_v4;
        assert_eq!(report.translated_v4, Some(true));
        assert_eq!(found.mapping, Some(nat.mapping), "{nat:?}, seed {seed}: {found:?}");
        assert_eq!(found.allocation, Some(nat.allocation), "{nat:?}, seed {seed}: {found:?}");
        assert!(found.filtering.is_none_or(|filtering| filtering == nat.filtering), "{nat:?}, seed {seed}: {found:?}");
        assert!(found.hairpin.is_none_or(|hairpin| hairpin == nat.hairpin), "{nat:?}, seed {seed}: {found:?}");
        kinds += 1;
        filtering += u32::from(found.filtering.is_some());
    }
    assert_eq!(kinds, 3 * 3 * 3 * 5 * 2);
    println!("{kinds} recognised; filtering known of {filtering}");
}

#[test]
fn a_host_without_a_nat_knows_it() {
    let report = report(None, 1);
    assert_eq!(report.translated_v4, Some(false));
    assert_eq!(report.nat_v4.is_easy(), Some(true));
    assert_ne!(report.nat_v4, Behaviour::default());
}
