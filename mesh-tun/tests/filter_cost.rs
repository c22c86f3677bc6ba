//! A lookup among 100,000 rules costs at most three times one among 10, whatever it is that the rules have in common.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "tests; time is what is measured")]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use mesh_tun::filter::{Addresses, Destination, Filter, Flows, Rule, Standing, Verdict};
use mesh_tun::packet::{Fragment, Packet, Protocol, TcpFlags, Transport};

const PACKETS: usize = 1024;
const ROUNDS: usize = 60;

#[test]
fn rules_that_differ_in_their_source() {
    check(|n| (source(n), destination(0), 22..=22));
}

#[test]
fn rules_that_differ_in_source_and_ports() {
    check(|n| (source(n), destination(0), low(n)..=low(n)));
}

#[test]
fn rules_that_differ_in_their_destination() {
    check(|n| (source(0), destination(n), 22..=22));
}

#[test]
fn rules_that_differ_in_their_ports_alone() {
    check(|n| (source(0), destination(0), low(2 * n)..=low(2 * n)));
}

#[test]
fn rules_for_everyone_that_differ_in_destination_and_ports() {
    check(|n| (Addresses::ANY, destination(n), low(n)..=low(n)));
}

#[test]
fn rules_about_prefixes_of_many_lengths() {
    check(|n| {
        let prefix = IpNet::new(nth(10, n), u8::try_from(16 + n % 17).unwrap()).unwrap().trunc();
        (prefix.into(), destination(0), 22..=22)
    });
}

/// Compares a filter of 10 rules to one of 100,000 in turns, each at its best, for others use this machine as well.
fn check(rule: impl Fn(u32) -> (Addresses, Addresses, std::ops::RangeInclusive<u16>)) {
    let few = Lookups::new(10, &rule);
    let many = Lookups::new(100_000, &rule);
    let (mut best_few, mut best_many) = (Duration::MAX, Duration::MAX);
    for _ in 0..ROUNDS {
        best_few = best_few.min(few.time());
        best_many = best_many.min(many.time());
    }
    let each = |total: Duration| total / u32::try_from(PACKETS).unwrap();
    assert!(best_many <= best_few * 3, "{:?} among 100,000 rules, {:?} among 10", each(best_many), each(best_few));
}

struct Lookups {
    filter: Filter,
    packets: Vec<Packet<'static>>,
}

impl Lookups {
    /// `count` rules, and packets spread evenly over them: each is accepted by one of the rules.
    fn new(count: u32, rule: &impl Fn(u32) -> (Addresses, Addresses, std::ops::RangeInclusive<u16>)) -> Self {
        let rules: Vec<Rule> = (0..count)
            .map(|n| {
                let (source, addresses, ports) = rule(n);
                Rule { sources: vec![source], destinations: vec![Destination { addresses, ports }], protocols: vec![] }
            })
            .collect();
        let filter = Filter::new(&["100.64.0.0/10".parse().unwrap()], &rules, Arc::new(Flows::new([1; 16])));
        let packets = (0..u32::try_from(PACKETS).unwrap())
            .map(|n| {
                let (sources, destinations, ports) = rule(n.wrapping_mul(7919) % count);
                let transport = Transport::Tcp { source: 9, destination: *ports.start(), flags: TcpFlags::SYN };
                let first = |addresses: Addresses| addresses.prefixes()[0].network();
                let (source, destination) = (first(sources), first(destinations));
                let protocol = Protocol::TCP;
                Packet { source, destination, protocol, fragment: Fragment::Whole, transport, payload: &[] }
            })
            .collect();
        Self { filter, packets }
    }

    fn time(&self) -> Duration {
        let begun = Instant::now();
        for packet in &self.packets {
            assert_eq!(black_box(self.filter.inbound(packet, Standing::Ordinary, Duration::ZERO)), Verdict::Accept);
        }
        begun.elapsed()
    }
}

fn source(n: u32) -> Addresses {
    nth(10, n).into()
}

fn destination(n: u32) -> Addresses {
    nth(100, 0x0040_0000 | n).into()
}

fn nth(first: u32, n: u32) -> IpAddr {
    Ipv4Addr::from_bits(first << 24 | n).into()
}

fn low(n: u32) -> u16 {
    u16::try_from(n & 0xffff).unwrap()
}
