//! Every kind of NAT in virtual time: each must be recognised for what it is, or called unknown, never anything else.

use rand::RngExt;

use super::*;
use crate::behaviour::{Allocation, Behaviour, Filtering, PortRange};
use crate::stun::message::request;
use crate::stun::responder::Responder;

/// From a socket to the NAT, and from there to a server.
const INSIDE: Duration = Duration::from_millis(1);
const OUTSIDE: Duration = Duration::from_millis(15);
const SOCKET: SocketId = SocketId(0);

#[derive(Debug, Clone, Copy)]
struct Kind {
    mapping: Mapping,
    filtering: Filtering,
    allocation: Allocation,
    hairpin: bool,
}

/// One NAT with one host behind it, and two servers outside.
struct Nat {
    kind: Kind,
    rng: StdRng,
    next: u16,
    block: u16,
    /// The outside port by inside port and what the mapping depends on.
    mappings: BTreeMap<(u16, Option<IpAddr>, Option<u16>), u16>,
    /// Whom an outside port has sent to.
    opened: BTreeSet<(u16, SocketAddr)>,
    /// The inside port of each socket.
    sockets: BTreeMap<SocketId, u16>,
    servers: BTreeMap<IpAddr, Responder>,
}

fn outside(port: u16) -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 5], port))
}

impl Nat {
    fn new(kind: Kind, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let (next, block) = (rng.random_range(2000..60_000), rng.random_range(4..120u16) * 512);
        let server = |number: u8| (IpAddr::from([192, 0, 2, number]), Responder::default().paired());
        Self {
            kind,
            rng,
            next,
            block,
            mappings: BTreeMap::new(),
            opened: BTreeSet::new(),
            sockets: BTreeMap::from([(SOCKET, 41641)]),
            servers: BTreeMap::from([server(1), server(2)]),
        }
    }

    fn map_out(&mut self, inside: u16, to: SocketAddr) -> u16 {
        let (ip, port) = match self.kind.mapping {
            Mapping::EndpointIndependent => (None, None),
            Mapping::AddressDependent => (Some(to.ip()), None),
            Mapping::AddressAndPortDependent => (Some(to.ip()), Some(to.port())),
        };
        let key = (inside, ip, port);
        let known = self.mappings.get(&key).copied();
        let mapped = known.unwrap_or_else(|| {
            let taken: BTreeSet<u16> = self.mappings.values().copied().collect();
            let mut draw = || match self.kind.allocation {
                Allocation::Preserving if !taken.contains(&inside) => inside,
                Allocation::Sequential { stride } => {
                    self.next = self.next.wrapping_add_signed(stride);
                    self.next
                }
                Allocation::Block => self.rng.random_range(self.block..=self.block + 511),
                Allocation::Random | Allocation::Preserving => self.rng.random_range(1024..=u16::MAX),
            };
            let mut port = draw();
            while taken.contains(&port) {
                port = draw();
            }
            port
        });
        self.mappings.insert(key, mapped);
        self.opened.insert((mapped, to));
        mapped
    }

    /// Whose socket a datagram to `port` reaches, if the NAT lets it in.
    fn let_in(&self, port: u16, from: SocketAddr) -> Option<u16> {
        let (inside, ..) = self.mappings.iter().find(|(_, mapped)| **mapped == port)?.0;
        let open = match self.kind.filtering {
            Filtering::EndpointIndependent => true,
            Filtering::AddressDependent => self.opened.iter().any(|(own, to)| *own == port && to.ip() == from.ip()),
            Filtering::AddressAndPortDependent => self.opened.contains(&(port, from)),
        };
        open.then_some(*inside)
    }

    /// Carries a datagram out, and says what comes back in: when, and from where.
    fn send(&mut self, transmit: &Transmit) -> Option<(Duration, SocketAddr, Vec<u8>)> {
        let inside = self.sockets[&transmit.socket];
        let from = outside(self.map_out(inside, transmit.remote));
        if transmit.remote.ip() == from.ip() {
            let arrives = self.kind.hairpin && self.let_in(transmit.remote.port(), from).is_some();
            return arrives.then(|| (INSIDE * 2, from, transmit.datagram.clone()));
        }
        let responder = self.servers.get_mut(&transmit.remote.ip())?;
        let answer = responder.handle_datagram(from, &transmit.datagram).unwrap();
        let mut source = transmit.remote;
        if answer.from_other_port {
            source.set_port(if source.port() == 3478 { 3479 } else { 3478 });
        }
        self.let_in(from.port(), source)?;
        Some(((INSIDE + OUTSIDE) * 2, source, answer.datagram))
    }
}

/// Regions 1 and 2, each with a second port.
fn servers(regions: u16, second_port: bool) -> DerpMap {
    let mut map = map(regions);
    for (number, region) in map.regions.iter_mut().filter(|_| second_port) {
        let name = format!("{number}-stun-3479");
        region.nodes.push(DerpNode { name, stun_port: 3479, stun_only: true, ..region.nodes[0].clone() });
    }
    map
}

fn check(nat: &mut Nat, map: DerpMap, sockets: usize) -> Report {
    let mut bench = Bench::new(&[V4]);
    bench.netcheck.set_interfaces(["10.0.0.2".parse().unwrap()]);
    let mut due: BTreeMap<(Instant, usize), (SocketAddr, Vec<u8>)> = BTreeMap::new();
    let mut number = 0;
    assert!(bench.netcheck.start(bench.now, Arc::new(map), Scope::Full));
    for _ in 0..10_000 {
        while let Some(transmit) = bench.netcheck.poll_transmit() {
            if let Some((after, source, datagram)) = nat.send(&transmit) {
                due.insert((bench.now + after, number), (source, datagram));
                number += 1;
            }
        }
        match bench.netcheck.poll_event() {
            Some(Event::Finished(report)) => return report,
            Some(Event::WantSockets { count }) => {
                assert_eq!(count, probing::SOCKETS);
                let ports = (0..sockets).map(|index| u16::try_from(index).unwrap());
                let opened: Vec<_> = ports.map(|index| (SocketId(100 + index), 50_000 + index * 37)).collect();
                nat.sockets.extend(opened.iter().copied());
                let bound: Vec<_> = opened.iter().map(|(id, port)| (*id, ([0, 0, 0, 0], *port).into())).collect();
                bench.netcheck.handle_sockets(bench.now, &bound);
                continue;
            }
            Some(_) => continue,
            None => {}
        }
        let timeout = bench.netcheck.poll_timeout().expect("a running report has a deadline");
        match due.first_key_value().map(|(key, _)| *key).filter(|(at, _)| *at <= timeout) {
            Some(key) => {
                bench.now = bench.now.max(key.0);
                let (source, datagram) = due.remove(&key).unwrap();
                let _ = bench.netcheck.handle_datagram_from(bench.now, source, &datagram);
            }
            None => {
                bench.now = timeout;
                bench.netcheck.handle_timeout(timeout);
                assert!(bench.netcheck.poll_timeout().is_none_or(|next| next > timeout), "a deadline stays due");
            }
        }
    }
    panic!("the report never ends");
}

const MAPPINGS: [Mapping; 3] =
    [Mapping::EndpointIndependent, Mapping::AddressDependent, Mapping::AddressAndPortDependent];
const FILTERINGS: [Filtering; 3] =
    [Filtering::EndpointIndependent, Filtering::AddressDependent, Filtering::AddressAndPortDependent];
const ALLOCATIONS: [Allocation; 6] = [
    Allocation::Preserving,
    Allocation::Sequential { stride: 1 },
    Allocation::Sequential { stride: 2 },
    Allocation::Sequential { stride: -1 },
    Allocation::Block,
    Allocation::Random,
];

fn kinds() -> impl Iterator<Item = Kind> {
    MAPPINGS.into_iter().flat_map(|mapping| {
        FILTERINGS.into_iter().flat_map(move |filtering| {
            ALLOCATIONS.into_iter().flat_map(move |allocation| {
                [true, false].into_iter().map(move |hairpin| Kind { mapping, filtering, allocation, hairpin })
            })
        })
    })
}

fn never_wrong(kind: Kind, found: &Behaviour) {
    let is = |ok: bool, what: &str| assert!(ok, "{what} of {kind:?} is called {found:?}");
    is(found.mapping.is_none_or(|mapping| mapping == kind.mapping), "the mapping");
    is(!found.varies || kind.mapping != Mapping::EndpointIndependent, "the mapping");
    is(found.filtering.is_none_or(|filtering| filtering == kind.filtering), "the filtering");
    is(found.allocation.is_none_or(|allocation| allocation == kind.allocation), "the allocation");
    is(found.hairpin.is_none_or(|hairpin| hairpin == kind.hairpin), "hairpinning");
}

#[test]
fn every_nat_is_recognised_where_two_servers_have_two_ports_each() {
    for (seed, kind) in (0..20).flat_map(|seed| kinds().map(move |kind| (seed, kind))) {
        let mut nat = Nat::new(kind, seed);
        let report = check(&mut nat, servers(2, true), probing::SOCKETS);
        let found = &report.nat_v4;
        never_wrong(kind, found);
        assert_eq!(report.translated_v4, Some(true));
        assert_eq!(found.mapping, Some(kind.mapping), "{kind:?}, seed {seed}");
        assert_eq!(found.allocation, Some(kind.allocation), "{kind:?}, seed {seed}");
        if kind.mapping == Mapping::EndpointIndependent {
            assert_eq!(found.hairpin, Some(kind.hairpin), "{kind:?}");
        }
        let tells = kind.hairpin && kind.mapping == Mapping::EndpointIndependent;
        if tells || kind.filtering == Filtering::AddressAndPortDependent {
            assert_eq!(found.filtering, Some(kind.filtering), "{kind:?}");
        }
        if kind.allocation == Allocation::Block {
            let ports = found.ports.unwrap();
            let shared = PortRange { first: ports.first.max(nat.block), last: ports.last.min(nat.block + 511) };
            assert!(shared.len() >= 256 && ports.len() <= 1024, "{ports:?} for a block from {}", nat.block);
        }
        assert!(report.took < Duration::from_millis(500), "{:?}", report.took);
    }
}

#[test]
fn with_fewer_servers_less_is_known_but_nothing_wrong() {
    for (seed, kind) in (0..5).flat_map(|seed| kinds().map(move |kind| (seed, kind))) {
        for (regions, second_port, sockets) in [(1, false, 6), (1, true, 6), (2, false, 6), (2, true, 2), (2, true, 0)]
        {
            let report = check(&mut Nat::new(kind, seed), servers(regions, second_port), sockets);
            never_wrong(kind, &report.nat_v4);
            let hard = kind.mapping != Mapping::EndpointIndependent;
            if regions == 2 {
                assert_eq!(report.nat_v4.is_easy(), Some(!hard), "{kind:?}");
            }
        }
    }
}

#[test]
fn a_report_in_between_keeps_what_the_full_one_found() {
    let kind = Kind {
        mapping: Mapping::EndpointIndependent,
        filtering: Filtering::AddressAndPortDependent,
        allocation: Allocation::Random,
        hairpin: true,
    };
    let mut nat = Nat::new(kind, 1);
    let full = check(&mut nat, servers(2, true), probing::SOCKETS);
    let mut bench = Bench::new(&[V4]);
    bench.netcheck.last = Some(full.clone());
    bench.netcheck.last_full = Some(bench.now);
    let seen: &'static str = Box::leak(full.global_v4.unwrap().to_string().into_boxed_str());
    let between = bench.report(servers(2, true), Scope::Auto, |_| Some((seen, 30)), nobody);
    assert!(!between.full);
    assert_eq!(between.nat_v4, full.nat_v4);
    let elsewhere = bench.report(servers(2, true), Scope::Auto, |_| Some(("198.51.100.77:1", 30)), nobody);
    assert_eq!(elsewhere.nat_v4.filtering, None, "another network");
}

#[test]
fn nobody_else_can_make_a_nat_look_open() {
    let mut bench = Bench::new(&[V4]);
    bench.netcheck.start(bench.now, Arc::new(map(1)), Scope::Full);
    let stranger = request(TransactionId([7; 12]));
    let source = "198.51.100.9:9".parse().unwrap();
    assert_eq!(bench.netcheck.handle_datagram_from(bench.now, source, &stranger), Err(StunError::UnknownTransaction));
}
