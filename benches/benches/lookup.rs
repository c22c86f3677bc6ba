//! What is looked up for every packet: a filter rule, and the peer of an address.
//! `cargo bench -p mesh-benches --bench lookup`
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "criterion's macros make public items; a benchmark may fail loudly"
)]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ipnet::{IpNet, Ipv4Net};
use mesh_noise::wireguard::AllowedIps;
use mesh_tun::filter::{Destination, Filter, Flows, Rule, Standing, Verdict};
use mesh_tun::packet::Packet;

const HERE: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);

/// One rule for each source, with a port of its own.
fn rules(count: u32) -> Vec<Rule> {
    let rule = |number: u32| {
        let port = port(number);
        Rule {
            sources: vec![IpAddr::from(source(number)).into()],
            destinations: vec![Destination { addresses: IpAddr::from(HERE).into(), ports: port..=port }],
            protocols: Vec::new(),
        }
    };
    (0..count).map(rule).collect()
}

fn source(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x6441_0000 + number)
}

fn port(number: u32) -> u16 {
    u16::try_from(1000 + number % 1000).unwrap()
}

/// A TCP packet that opens a connection, which is what rules are asked about.
fn opening(from: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut packet = vec![0; 40];
    packet[0] = 0x45;
    packet[3] = 40;
    packet[8] = 64;
    packet[9] = 6;
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&HERE.octets());
    packet[20..22].copy_from_slice(&4321_u16.to_be_bytes());
    packet[22..24].copy_from_slice(&port.to_be_bytes());
    packet[32] = 0x50;
    packet[33] = 0x02;
    packet
}

fn filter(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("filter");
    for count in [10, 1_000, 100_000] {
        let local = [IpNet::from(IpAddr::from(HERE))];
        let filter = Filter::new(&local, &rules(count), Arc::new(Flows::new([1; 16])));
        for (name, shift, expected) in [("accepts", 0, true), ("refuses", 1, false)] {
            // Many flows, so that the table is in the caches as far as it would be at work.
            let packets: Vec<_> = (0..256_u32)
                .map(|number| number * 7919 % count)
                .map(|number| opening(source(number), port(number) + shift))
                .collect();
            let packets: Vec<_> = packets.iter().map(|packet| Packet::parse(packet).unwrap()).collect();
            let now = Duration::from_secs(1);
            for packet in &packets {
                assert_eq!(filter.inbound(packet, Standing::Ordinary, now) == Verdict::Accept, expected);
            }
            let mut next = packets.iter().cycle();
            group.bench_function(BenchmarkId::new(name, count), |bencher| {
                bencher.iter(|| filter.inbound(next.next().unwrap(), Standing::Ordinary, now));
            });
        }
    }
}

fn allowed_ips(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("allowed IPs");
    for count in [10, 1_000, 100_000, 205_000] {
        let mut table = AllowedIps::new();
        // Lengths from 20 to 32, all over the address space.
        for number in 0..count {
            let length = u8::try_from(20 + number % 13).unwrap();
            let address = Ipv4Addr::from_bits(scattered(number));
            table.insert(Ipv4Net::new(address, length).unwrap().trunc().into(), number);
        }
        let addresses: Vec<_> =
            (0..256).map(|number| IpAddr::from(Ipv4Addr::from_bits(scattered(number * 797 % count)))).collect();
        assert!(addresses.iter().all(|address| table.lookup(*address).is_some()));
        let mut next = addresses.iter().cycle();
        group.bench_function(BenchmarkId::new("lookup", count), |bencher| {
            bencher.iter(|| table.lookup(*next.next().unwrap()).copied());
        });
    }
}

/// Different numbers far from one another.
fn scattered(number: u32) -> u32 {
    number.wrapping_mul(0x9e37_79b1)
}

criterion_group!(benches, filter, allowed_ips);
criterion_main!(benches);
