#![allow(clippy::disallowed_methods, reason = "tests start from any instant")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::portmap::gateway::{self, Gateway, HTTP_PORT, Quirks};
use crate::portmap::pcp::{Body, ResultCode};
use crate::portmap::ssdp;

const PORT: u16 = 41641;
const HOP: Duration = Duration::from_millis(1);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);

enum Item {
    Ask(SocketAddr, Vec<u8>),
    Tell(SocketAddr, Vec<u8>),
    Call(ExchangeId, Vec<u8>),
    Answer(ExchangeId, Option<http::Response>),
}

/// A mapper and gateways on one wire with a millisecond each way.
struct World {
    start: Instant,
    now: Instant,
    mapper: Mapper,
    gateways: BTreeMap<IpAddr, Gateway>,
    client: IpAddr,
    wire: BTreeMap<(Instant, u64), Item>,
    sent: u64,
    told: Vec<(Duration, Status)>,
    closed: bool,
    /// So many things that the mapper sends are lost.
    lose: u32,
    datagrams: usize,
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn network() -> Network {
    Network { gateway: ip("192.168.1.1"), scope: 0, client: ip("192.168.1.7") }
}

impl World {
    fn idle(config: Config, seed: u8) -> Self {
        let now = Instant::now();
        Self {
            start: now,
            now,
            mapper: Mapper::new(config, [seed; 32]),
            gateways: BTreeMap::new(),
            client: network().client,
            wire: BTreeMap::new(),
            sent: 0,
            told: Vec::new(),
            closed: false,
            lose: 0,
            datagrams: 0,
        }
    }

    fn with(protocols: &[Protocol], quirks: Quirks) -> Self {
        Self::configured(Config::default(), protocols, quirks)
    }

    fn configured(config: Config, protocols: &[Protocol], quirks: Quirks) -> Self {
        let mut world = Self::idle(config, 7);
        let mut config = gateway::Config::new(network().gateway, OUTSIDE).speaking(protocols);
        config.quirks = quirks;
        world.gateways.insert(config.inside, Gateway::new(world.now, config));
        world.mapper.set_network(world.now, Some(network()));
        world.mapper.set_port(world.now, Some(PORT));
        world
    }

    fn gateway(&mut self) -> &mut Gateway {
        self.gateways.get_mut(&ip("192.168.1.1")).unwrap()
    }

    fn put(&mut self, item: Item) {
        self.sent += 1;
        self.wire.insert((self.now + HOP, self.sent), item);
    }

    fn drain(&mut self) {
        while let Some(transmit) = self.mapper.poll_transmit() {
            self.datagrams += 1;
            if self.lose > 0 {
                self.lose -= 1;
                continue;
            }
            match transmit {
                Transmit::Datagram { remote, datagram } => self.put(Item::Ask(remote, datagram)),
                Transmit::Http { id, remote, request } if remote.port() == HTTP_PORT => {
                    self.put(Item::Call(id, request))
                }
                Transmit::Http { id, .. } => self.put(Item::Answer(id, None)),
            }
        }
        while let Some(event) = self.mapper.poll_event() {
            match event {
                Event::Changed(status) => self.told.push((self.now - self.start, status)),
                Event::Closed => self.closed = true,
            }
        }
        let next = self.mapper.poll_timeout();
        assert!(next.is_none_or(|next| next + Duration::from_secs(1) > self.now), "a deadline was left behind");
    }

    fn deliver(&mut self, item: Item) {
        let source = SocketAddr::new(self.client, 55555);
        match item {
            Item::Ask(remote, datagram) => {
                let to: Vec<_> = match [ssdp::GROUP, ssdp::GROUP_V6].contains(&remote.ip()) {
                    true => self.gateways.keys().copied().collect(),
                    false => vec![remote.ip()],
                };
                for address in to {
                    let Some(gateway) = self.gateways.get_mut(&address) else { continue };
                    for answer in gateway.handle_datagram(self.now, source, remote.port(), &datagram) {
                        self.put(Item::Tell(SocketAddr::new(address, remote.port()), answer));
                    }
                }
            }
            Item::Tell(source, datagram) => {
                let _ = self.mapper.handle_datagram(self.now, source, &datagram);
            }
            Item::Call(id, request) => {
                let answer = self
                    .gateways
                    .values_mut()
                    .next()
                    .and_then(|gateway| gateway.handle_http(self.now, source.ip(), &request));
                let response = answer.and_then(|bytes| http::response(&bytes, true).ok().flatten());
                self.put(Item::Answer(id, response));
            }
            Item::Answer(id, response) => self.mapper.handle_http(self.now, id, response.as_ref()),
        }
    }

    fn run(&mut self, time: Duration) -> Status {
        let end = self.now + time;
        self.drain();
        loop {
            let on_wire = self.wire.keys().next().map(|(at, _)| *at);
            let Some(next) = on_wire.into_iter().chain(self.mapper.poll_timeout()).min().filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(next);
            if on_wire == Some(next) {
                let (_, item) = self.wire.pop_first().unwrap();
                self.deliver(item);
            } else {
                self.mapper.handle_timeout(self.now);
                self.drain();
                assert!(self.mapper.poll_timeout().is_none_or(|next| next > self.now), "a due deadline was left");
            }
            self.drain();
        }
        self.now = end;
        self.mapper.status()
    }

    /// When a mapping was first told.
    fn mapped_after(&self) -> Duration {
        self.told.iter().find(|(_, status)| status.mapping.is_some()).unwrap().0
    }
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn mapped(status: Status) -> (Protocol, u16) {
    let mapping = status.mapping.unwrap_or_else(|| panic!("no mapping: {status:?}"));
    assert_eq!(mapping.external.ip(), IpAddr::V4(OUTSIDE));
    assert_eq!(status.endpoint(), Some(mapping.external));
    (mapping.protocol, mapping.external.port())
}

#[test]
fn pcp_is_preferred_and_takes_two_round_trips() {
    let mut world = World::with(&Protocol::ALL, Quirks::default());
    let status = world.run(secs(3));
    assert_eq!(mapped(status), (Protocol::Pcp, PORT));
    assert_eq!((status.pcp, status.nat_pmp, status.upnp), (Some(true), Some(true), Some(true)));
    assert_eq!(world.mapped_after(), 4 * HOP);
    let (now, inside) = (world.now, SocketAddr::new(network().client, PORT));
    assert_eq!(world.gateway().inside(now, PORT), Some(inside));
}

#[test]
fn each_protocol_alone_is_enough() {
    for protocol in Protocol::ALL {
        let mut world = World::with(&[protocol], Quirks::default());
        let status = world.run(secs(5));
        assert_eq!(mapped(status), (protocol, PORT));
        let spoken = [status.pcp, status.nat_pmp, status.upnp];
        assert_eq!(spoken.map(|spoken| spoken == Some(true)), Protocol::ALL.map(|other| other == protocol));
        assert!(world.mapped_after() < secs(1), "{protocol}: {:?}", world.mapped_after());
    }
}

#[test]
fn nat_pmp_does_not_wait_for_a_pcp_that_says_it_is_not_there() {
    let mut world = World::with(&[Protocol::NatPmp], Quirks::default());
    world.run(secs(1));
    assert_eq!(world.mapped_after(), 4 * HOP);
}

#[test]
fn a_refusal_moves_on_to_the_next() {
    use Protocol::{NatPmp, Pcp, Upnp};
    for (refuses, expected) in [(vec![Pcp], NatPmp), (vec![Pcp, NatPmp], Upnp), (vec![NatPmp, Upnp], Pcp)] {
        let quirks = Quirks { refuses: refuses.clone(), ..Quirks::default() };
        let mut world = World::with(&Protocol::ALL, quirks);
        assert_eq!(mapped(world.run(secs(3))).0, expected, "{refuses:?} refused");
    }
}

#[test]
fn a_gateway_that_refuses_everything_is_asked_again_ever_later() {
    let quirks = Quirks { refuses: Protocol::ALL.to_vec(), ..Quirks::default() };
    let mut world = World::with(&Protocol::ALL, quirks);
    let status = world.run(secs(10));
    assert_eq!(status.problem, Some(Problem::Refused(Protocol::Upnp, Refusal::NotAuthorized)));
    world.gateway().set_quirks(Quirks::default());
    assert_eq!(mapped(world.run(secs(90))).0, Protocol::Pcp);
}

#[test]
fn a_network_without_such_a_gateway_is_left_in_peace() {
    let mut world = World::idle(Config::default(), 7);
    world.mapper.set_network(world.now, Some(network()));
    world.mapper.set_port(world.now, Some(PORT));
    assert_eq!(world.run(secs(3)).problem, Some(Problem::NoService));
    world.run(secs(3600));
    let first_hour = world.datagrams;
    world.run(secs(24 * 3600));
    let day = world.datagrams - first_hour;
    assert!(first_hour <= 8 * 18 && day <= 48 * 18 + 18, "{first_hour} datagrams in an hour, {day} in a day");
}

#[test]
fn mappings_are_renewed_at_half_of_their_life_and_keep_their_port() {
    for protocol in Protocol::ALL {
        let mut world = World::with(&[protocol], Quirks::default());
        world.run(secs(5));
        let first = world.mapper.expires().unwrap();
        let told = world.told.len();
        world.run(secs(3700));
        assert!(world.mapper.expires().unwrap() > first, "{protocol}");
        world.run(secs(24 * 3600));
        assert_eq!(mapped(world.mapper.status()), (protocol, PORT));
        assert_eq!(world.told.len(), told, "{protocol}: nothing has changed for others");
        let now = world.now;
        assert_eq!(world.gateway().count(now), 1);
    }
}

#[test]
fn short_lifetimes_are_respected() {
    for protocol in [Protocol::Pcp, Protocol::NatPmp] {
        let mut world = World::with(&[protocol], Quirks::default());
        let mut config = gateway::Config::new(network().gateway, OUTSIDE).speaking(&[protocol]);
        config.max_lifetime = secs(120);
        world.gateways.insert(network().gateway, Gateway::new(world.now, config));
        world.run(secs(5));
        for _ in 0..20 {
            world.run(secs(50));
            let now = world.now;
            assert_eq!(world.gateway().count(now), 1, "{protocol}");
        }
    }
}

#[test]
fn a_gateway_that_started_anew_is_noticed_and_asked_for_the_same_port() {
    for (protocol, within) in [(Protocol::Pcp, 125), (Protocol::NatPmp, 125), (Protocol::Upnp, 1205)] {
        let mut world = World::with(&[protocol], Quirks::default());
        world.run(secs(600));
        let now = world.now;
        world.gateway().restart(now);
        world.run(secs(within));
        let now = world.now;
        assert_eq!(world.gateway().count(now), 1, "{protocol}");
        assert_eq!(mapped(world.mapper.status()), (protocol, PORT));
    }
}

#[test]
fn a_gateway_that_announces_its_start_is_asked_at_once() {
    for protocol in [Protocol::Pcp, Protocol::NatPmp] {
        let mut world = World::with(&[protocol], Quirks::default());
        world.run(secs(600));
        let now = world.now;
        for datagram in world.gateway().restart(now) {
            let source = SocketAddr::new(network().gateway, pcp::SERVER_PORT);
            world.mapper.handle_datagram(now, source, &datagram).unwrap();
        }
        world.run(secs(1));
        let now = world.now;
        assert_eq!(world.gateway().count(now), 1, "{protocol}");
    }
}

#[test]
fn a_start_announced_by_pcp_alone_counts_for_what_the_others_gave() {
    for protocol in [Protocol::NatPmp, Protocol::Upnp] {
        // As miniupnpd does, where PCP itself is refused, or does not get through.
        let quirks = Quirks { refuses: vec![Protocol::Pcp], ..Quirks::default() };
        let mut world = World::with(&[Protocol::Pcp, protocol], quirks);
        assert_eq!(mapped(world.run(secs(20))).0, protocol);
        let now = world.now;
        let told = world.gateway().restart(now);
        let source = SocketAddr::new(network().gateway, pcp::SERVER_PORT);
        for announcement in 0..10 {
            world.mapper.handle_datagram(world.now, source, &told[0]).unwrap();
            world.run(Duration::from_millis(100));
            let now = world.now;
            assert_eq!(world.gateway().count(now), 1, "{protocol}: after announcement {announcement}");
        }
    }
}

#[test]
fn a_gateway_whose_epoch_stands_still_is_not_asked_all_the_time() {
    let mut world = World::with(&[Protocol::NatPmp], Quirks::default());
    world.run(secs(600));
    let before = world.datagrams;
    let source = SocketAddr::new(network().gateway, pcp::SERVER_PORT);
    let announce = pcp::Response { result: ResultCode::Success, lifetime: 0, epoch: 0, body: Body::Announce };
    for _ in 0..100 {
        world.mapper.handle_datagram(world.now, source, &announce.encode()).unwrap();
        world.run(Duration::from_millis(100));
    }
    let asked = world.datagrams - before;
    assert!((1..=12).contains(&asked), "{asked} datagrams in ten seconds");
}

#[test]
fn a_port_that_was_given_away_meanwhile_is_replaced_and_told() {
    let mut world = World::with(&[Protocol::Pcp], Quirks::default());
    world.run(secs(600));
    let now = world.now;
    world.gateway().restart(now);
    world.gateway().set_quirks(Quirks { taken: vec![PORT], ..Quirks::default() });
    let (_, port) = mapped(world.run(secs(125)));
    assert_ne!(port, PORT);
    assert_eq!(world.told.last().unwrap().1.mapping.unwrap().external.port(), port);
}

#[test]
fn a_new_outside_address_is_told() {
    for protocol in [Protocol::NatPmp, Protocol::Upnp] {
        let mut world = World::with(&[protocol], Quirks::default());
        world.run(secs(5));
        world.gateway().set_outside(Ipv4Addr::new(203, 0, 113, 77));
        // STUN sees it first; the gateway confirms.
        world.mapper.set_reflexive(world.now, Some(ip("203.0.113.77")));
        assert_eq!(world.run(secs(1)).endpoint(), Some("203.0.113.77:41641".parse().unwrap()), "{protocol}");
    }
}

#[test]
fn closing_gives_the_mapping_back() {
    for protocol in Protocol::ALL {
        let mut world = World::with(&[protocol], Quirks::default());
        world.run(secs(5));
        world.mapper.close(world.now);
        let status = world.run(secs(1));
        let now = world.now;
        assert_eq!(world.gateway().count(now), 0, "{protocol}");
        assert!(world.closed && status.mapping.is_none());
        assert_eq!(world.mapper.poll_timeout(), None);
    }
}

#[test]
fn closing_does_not_wait_for_a_gateway_that_is_gone() {
    for protocol in Protocol::ALL {
        let mut world = World::with(&[protocol], Quirks::default());
        world.run(secs(5));
        world.gateways.clear();
        world.mapper.close(world.now);
        world.run(secs(3));
        assert!(world.closed, "{protocol}");
    }
}

#[test]
fn another_port_gives_the_former_one_back() {
    for protocol in Protocol::ALL {
        let mut world = World::with(&[protocol], Quirks::default());
        world.run(secs(5));
        world.mapper.set_port(world.now, Some(4242));
        assert_eq!(mapped(world.run(secs(5))), (protocol, 4242));
        let now = world.now;
        assert_eq!((world.gateway().count(now), world.gateway().inside(now, PORT)), (1, None), "{protocol}");
    }
}

#[test]
fn another_gateway_on_the_same_link_takes_over_and_the_former_is_told() {
    let mut world = World::with(&[Protocol::Pcp], Quirks::default());
    world.run(secs(5));
    let second = gateway::Config::new(ip("192.168.1.2"), Ipv4Addr::new(198, 51, 100, 9));
    world.gateways.insert(second.inside, Gateway::new(world.now, second));
    world.mapper.set_network(world.now, Some(Network { gateway: ip("192.168.1.2"), ..network() }));
    let status = world.run(secs(3));
    assert_eq!(status.endpoint(), Some("198.51.100.9:41641".parse().unwrap()));
    let now = world.now;
    assert_eq!(world.gateway().count(now), 0);
}

#[test]
fn a_taken_port_is_exchanged_for_another() {
    for first_version in [false, true] {
        let quirks = Quirks { taken: vec![PORT], first_version, ..Quirks::default() };
        let mut world = World::with(&[Protocol::Upnp], quirks);
        let (_, port) = mapped(world.run(secs(5)));
        assert!(port != PORT && port >= 1024, "{port}");
    }
}

#[test]
fn a_gateway_without_leases_gives_a_permanent_mapping_that_is_looked_after_and_removed() {
    let quirks = Quirks { permanent_only: true, first_version: true, ..Quirks::default() };
    let mut world = World::with(&[Protocol::Upnp], quirks);
    assert_eq!(mapped(world.run(secs(5))), (Protocol::Upnp, PORT));
    assert_eq!(world.mapper.expires(), None);
    let now = world.now;
    world.gateway().restart(now);
    world.run(secs(1205));
    let now = world.now;
    assert_eq!(world.gateway().count(now), 1);
    world.mapper.close(world.now);
    world.run(secs(1));
    assert_eq!(world.gateway().count(now), 0);
}

#[test]
fn the_only_port_that_will_do_is_not_exchanged() {
    for protocol in Protocol::ALL {
        let config = Config { exactly: Some(1111), ..Config::default() };
        let mut free = World::configured(config.clone(), &[protocol], Quirks::default());
        assert_eq!(mapped(free.run(secs(5))), (protocol, 1111));
        let quirks = Quirks { taken: vec![1111], ..Quirks::default() };
        let mut taken = World::configured(config, &[protocol], quirks);
        let status = taken.run(secs(5));
        assert_eq!(status.problem, Some(Problem::Refused(protocol, Refusal::PortTaken)), "{protocol}");
        let now = taken.now;
        assert_eq!(taken.gateway().count(now), 0);
    }
}

#[test]
fn an_outside_address_that_is_private_is_told_as_double_nat_and_to_nobody_else() {
    for (outside, double) in [("100.64.3.4", true), ("10.1.2.3", true), ("203.0.113.5", false)] {
        let mut world = World::with(&[Protocol::Pcp], Quirks::default());
        world.gateway().set_outside(outside.parse().unwrap());
        let status = world.run(secs(5));
        assert_eq!(status.mapping.unwrap().double_nat, double);
        assert_eq!(status.endpoint().is_none(), double);
    }
}

#[test]
fn a_private_outside_address_counts_if_the_world_sees_us_with_it() {
    let mut world = World::with(&[Protocol::Pcp], Quirks::default());
    world.gateway().set_outside(Ipv4Addr::new(10, 1, 2, 3));
    world.run(secs(5));
    world.mapper.set_reflexive(world.now, Some(ip("10.1.2.3")));
    assert_eq!(world.run(secs(1)).endpoint(), Some("10.1.2.3:41641".parse().unwrap()));
}

#[test]
fn lost_datagrams_are_sent_again() {
    for protocol in Protocol::ALL {
        let mut world = World::with(&[protocol], Quirks::default());
        world.lose = 6;
        assert_eq!(mapped(world.run(secs(5))).0, protocol);
    }
}

#[test]
fn a_renewal_without_an_answer_is_repeated_until_the_mapping_has_expired() {
    let mut world = World::with(&[Protocol::Pcp], Quirks::default());
    world.run(secs(5));
    let gateway = world.gateways.remove(&network().gateway).unwrap();
    world.run(secs(7000));
    assert!(world.mapper.status().mapping.is_some(), "not expired yet");
    world.run(secs(300));
    assert_eq!(world.mapper.status().mapping, None);
    world.gateways.insert(network().gateway, gateway);
    world.run(secs(1800));
    assert_eq!(mapped(world.mapper.status()).0, Protocol::Pcp);
}

#[test]
fn an_answer_with_another_nonce_is_nobodys() {
    let mut world = World::with(&[], Quirks::default());
    let source = SocketAddr::new(network().gateway, pcp::SERVER_PORT);
    let announce = pcp::Response { result: ResultCode::Success, lifetime: 0, epoch: 5, body: Body::Announce };
    world.mapper.handle_datagram(world.now, source, &announce.encode()).unwrap();
    let forged = pcp::Response {
        lifetime: 7200,
        body: Body::Map(pcp::Map {
            nonce: Nonce([0; 12]),
            protocol: pcp::UDP,
            internal_port: PORT,
            external: "198.51.100.66:6".parse().unwrap(),
            prefer_failure: false,
        }),
        ..announce
    };
    let outcome = world.mapper.handle_datagram(world.now, source, &forged.encode());
    assert_eq!(outcome, Err(Reject::Unasked));
    assert_eq!(world.run(secs(1)).mapping, None);
}

#[test]
fn nobody_but_the_gateway_is_listened_to() {
    let mut world = World::with(&[], Quirks::default());
    let answer = ssdp::respond("192.168.1.66:80".parse().unwrap(), "/evil.xml", ssdp::GATEWAY);
    let stranger = "192.168.1.66:1900".parse().unwrap();
    assert_eq!(world.mapper.handle_datagram(world.now, stranger, &answer), Err(Reject::Stranger));
    assert_eq!(world.run(secs(5)).upnp, Some(false));
}

/// A node with an IPv6 address, the firewall in front of it, and what it wants to be open.
fn behind_firewall(protocols: &[Protocol], quirks: Quirks) -> (World, SocketAddr) {
    let mut world = World::idle(Config::default(), 7);
    world.client = ip("2001:db8::7");
    let mut config = gateway::Config::new(ip("fe80::1"), OUTSIDE).speaking(protocols);
    config.quirks = quirks;
    world.gateways.insert(config.inside, Gateway::new(world.now, config));
    let network = Network { gateway: ip("fe80::1"), scope: 3, client: world.client };
    assert_eq!(network.gateway_at(5351).to_string(), "[fe80::1%3]:5351");
    world.mapper.set_network(world.now, Some(network));
    world.mapper.set_port(world.now, Some(PORT));
    let inside = SocketAddr::new(world.client, PORT);
    (world, inside)
}

#[test]
fn a_pinhole_for_an_ipv6_address_is_opened_kept_and_closed() {
    for protocol in [Protocol::Pcp, Protocol::Upnp] {
        let (mut world, inside) = behind_firewall(&[protocol], Quirks::default());
        let status = world.run(secs(5));
        assert_eq!((status.mapping.unwrap().protocol, status.endpoint()), (protocol, Some(inside)));
        let told = world.told.len();
        for _ in 0..10 {
            world.run(secs(3600));
            assert!(world.gateways[&ip("fe80::1")].is_open(world.now, inside), "{protocol}");
        }
        assert_eq!(world.told.len(), told, "{protocol}: nothing has changed for others");
        let now = world.now;
        world.gateways.get_mut(&ip("fe80::1")).unwrap().restart(now);
        world.run(secs(1205));
        assert!(world.gateways[&ip("fe80::1")].is_open(world.now, inside), "{protocol}: opened again");
        let now = world.now;
        world.mapper.close(now);
        world.run(secs(1));
        assert!(world.closed && !world.gateways[&ip("fe80::1")].is_open(now, inside));
    }
}

#[test]
fn a_firewall_that_refuses_pcp_is_asked_by_upnp_and_one_that_cannot_open_is_told() {
    let quirks = Quirks { refuses: vec![Protocol::Pcp], ..Quirks::default() };
    let (mut world, inside) = behind_firewall(&Protocol::ALL, quirks);
    let status = world.run(secs(5));
    assert_eq!((status.mapping.unwrap().protocol, status.endpoint()), (Protocol::Upnp, Some(inside)));
    // The first version has no firewall service, and answers to no search for it.
    let (mut world, _) = behind_firewall(&[Protocol::Upnp], Quirks { first_version: true, ..Quirks::default() });
    let status = world.run(secs(20));
    assert!(status.mapping.is_none() && status.problem.is_some(), "{status:?}");
}

#[test]
fn a_gateway_may_answer_a_search_from_its_address_in_our_subnet() {
    let (mut world, _) = behind_firewall(&[], Quirks::default());
    let answer = ssdp::respond("[2001:db8::1]:5000".parse().unwrap(), "/description.xml", ssdp::FIREWALL);
    let from = |address: &str| SocketAddr::new(ip(address), ssdp::PORT);
    assert_eq!(world.mapper.handle_datagram(world.now, from("2001:db8:0:1::1"), &answer), Err(Reject::Stranger));
    assert_eq!(world.mapper.handle_datagram(world.now, from("2001:db8::1"), &answer), Ok(()));
    assert_eq!(world.mapper.status().upnp, Some(true));
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = || {
        let quirks = Quirks { taken: vec![PORT], first_version: true, ..Quirks::default() };
        let mut world = World::with(&[Protocol::Upnp], quirks);
        world.run(secs(4000));
        (world.told, world.datagrams)
    };
    assert_eq!(run(), run());
}

proptest! {
    /// Whatever happens, in whatever order: deadlines stay ahead, a gateway that maps is found again, and closing ends.
    #[test]
    fn any_life_keeps_the_contract(
        spoken in prop::collection::btree_set(0usize..3, 0..=3),
        refused in prop::collection::btree_set(0usize..3, 0..=2),
        first_version in any::<bool>(),
        steps in prop::collection::vec((0u8..8, 0u64..4000), 1..20),
    ) {
        let pick = |chosen: &BTreeSet<usize>| chosen.iter().map(|index| Protocol::ALL[*index]).collect::<Vec<_>>();
        let quirks = Quirks { refuses: pick(&refused), first_version, ..Quirks::default() };
        let mut world = World::with(&pick(&spoken), quirks);
        for (what, seconds) in steps {
            let now = world.now;
            match what {
                0 => world.mapper.set_port(now, Some(1000 + u16::try_from(seconds % 3).unwrap())),
                1 => world.mapper.set_network(now, None),
                2 => world.mapper.set_network(now, Some(network())),
                3 => { world.gateway().restart(now); }
                4 => world.lose = u32::try_from(seconds % 20).unwrap(),
                5 => world.mapper.set_reflexive(now, Some(ip("203.0.113.5"))),
                6 => world.gateway().set_quirks(Quirks::default()),
                _ => {}
            }
            world.run(secs(seconds));
        }
        world.lose = 0;
        world.mapper.set_network(world.now, Some(network()));
        world.mapper.set_port(world.now, Some(PORT));
        world.gateway().set_quirks(Quirks::default());
        world.run(secs(8000));
        prop_assert_eq!(world.mapper.status().mapping.is_some(), !spoken.is_empty());
        world.mapper.close(world.now);
        world.run(secs(4));
        prop_assert!(world.closed);
        prop_assert_eq!(world.mapper.poll_timeout(), None);
    }

    #[test]
    fn any_datagram_from_the_gateway_is_survived(
        port in prop::sample::select(vec![5351u16, 1900, 9]),
        datagrams in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 1..8),
    ) {
        let mut world = World::with(&Protocol::ALL, Quirks::default());
        for datagram in datagrams {
            let _ = world.mapper.handle_datagram(world.now, SocketAddr::new(network().gateway, port), &datagram);
            world.run(HOP);
        }
        world.mapper.close(world.now);
        world.run(secs(4));
        prop_assert!(world.closed);
    }
}
