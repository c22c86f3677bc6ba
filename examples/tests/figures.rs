//! First figures of nodes, printed and not judged: how soon they answer, how soon they are reached directly, and what a
//! peer relay carries beside a region.
//!
//! Run as root: `cargo test --release -p mesh --test figures -- --ignored --test-threads=1 --nocapture`.
//!
//! Nodes on TUN devices in namespaces of one machine; the relay is 0.1 ms away.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "figures come from the real clock"
)]

mod lab;

use std::time::{Duration, Instant};

use lab::eventually;
use lab::mesh::Node;
use lab::nat::{Access, Internet};
use lab::net::{Families, Net};
use lab::traffic::iperf3;

const ROUNDS: usize = 5;

#[test]
#[ignore = "needs root and network namespaces"]
fn a_node_answers_soon_after_up_and_is_soon_direct() {
    let (mut first_ping, mut direct) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let net = Net::new(&format!("f{round}"), Families::V4, &[]);
        let ours = net.our_node();
        let theirs = Node::start(&net.theirs);
        let up = net.coordinator.up("theirs");

        let started = Instant::now();
        theirs.mesh(&up);
        let their_ip = theirs.ip();
        eventually("the first answer", Duration::from_secs(20), || {
            let ping = net.ours.try_sh(&format!("ping -c 1 -W 0.2 -n {their_ip}"));
            if ping.status.success() { Ok(()) } else { Err(ping.status) }
        });
        first_ping.push(started.elapsed());

        // A pair that has never exchanged a packet: the path is watched from the first one on.
        drop((ours, theirs));
        let net = Net::new(&format!("g{round}"), Families::V4, &[]);
        let ours = net.our_node();
        let theirs = Node::start(&net.theirs);
        theirs.mesh(&net.coordinator.up("theirs"));
        let their_ip = theirs.ip();
        ours.peer("theirs");
        std::thread::sleep(Duration::from_millis(500));
        let _traffic = net.ours.spawn("ping", net.ours.command("ping").args(["-i", "0.01", "-n", &their_ip]));
        let started = Instant::now();
        eventually("the direct path in the status", Duration::from_secs(20), || {
            let path = ours.peer("theirs")["path"].clone();
            if path["kind"] == "direct" { Ok(()) } else { Err(path) }
        });
        direct.push(started.elapsed());
    }
    print("from `up` to the first ping answered", &mut first_ping);
    print("from the first packet to the direct path", &mut direct);
}

/// What three seconds of traffic through whoever relays have come to.
#[derive(Default)]
struct Carried {
    mbit: Vec<f64>,
    packets: Vec<f64>,
    /// CPU seconds of whoever relays, by GB of a stream and by million small packets that arrived.
    cpu_gb: Vec<f64>,
    cpu_million: Vec<f64>,
    /// CPU seconds of the sender and the receiver, by GB of a stream.
    ends_gb: Vec<f64>,
}

#[test]
#[ignore = "needs root, network namespaces and iperf3"]
fn what_a_peer_relay_carries_and_what_a_region_does() {
    let mut net = Internet::new("fr");
    net.core.sh("nft add table inet cut; nft add chain inet cut out '{ type filter hook forward priority 0; }'");
    net.core.sh("nft add rule inet cut out ip saddr 198.51.100.2 ip daddr 192.0.2.2 meta l4proto udp drop");
    net.core.sh("nft add rule inet cut out ip daddr 198.51.100.2 ip saddr 192.0.2.2 meta l4proto udp drop");
    let [a, b, third] = [1, 2, 3].map(|number| net.site(number, Access::Open));
    let third = Node::start_with(&third, &["--relay-server-port", "7777"]);
    third.mesh(&net.coordinator.up("relay"));
    let [a, b] = [Node::join(&a, &net.coordinator, "a"), Node::join(&b, &net.coordinator, "b")];
    let to = b.ip();
    let kinds = [("auto", "peer-relay"), ("relay", "relay")];
    let mut carried = kinds.map(|_| Carried::default());
    for _ in 0..ROUNDS {
        for ((mode, kind), carried) in kinds.iter().zip(&mut carried) {
            for node in [&a, &b] {
                node.mesh(&format!("set --path {mode}"));
            }
            for (node, peer) in [(&a, "b"), (&b, "a")] {
                eventually("the path", Duration::from_secs(60), || {
                    a.outage(&to);
                    let path = node.peer(peer)["path"].clone();
                    if path["kind"] == *kind { Ok(()) } else { Err(path) }
                });
            }
            let cpu = || (if *kind == "relay" { net.coordinator.cpu() } else { third.cpu() }, a.cpu() + b.cpu());
            let before = cpu();
            let sum = &iperf3(&a.host, &b.host, &to, "-t 3")["sum_received"];
            let (after, bytes) = (cpu(), sum["bytes"].as_f64().expect("bytes"));
            carried.mbit.push(sum["bits_per_second"].as_f64().expect("a rate") / 1e6);
            carried.cpu_gb.push((after.0 - before.0) / bytes * 1e9);
            carried.ends_gb.push((after.1 - before.1) / bytes * 1e9);

            let before = cpu();
            let sum = &iperf3(&a.host, &b.host, &to, "-u -l 64 -b 0 -t 3")["sum"];
            let number = |name: &str| sum[name].as_f64().expect("a number");
            let arrived = number("packets") - number("lost_packets");
            carried.packets.push(arrived / number("seconds"));
            carried.cpu_million.push((cpu().0 - before.0) / arrived * 1e6);
        }
    }
    for ((_, kind), mut carried) in kinds.iter().zip(carried) {
        println!("{kind}:");
        spread("  one stream, Mbit/s", &mut carried.mbit);
        spread("  CPU s/GB of whoever relays", &mut carried.cpu_gb);
        spread("  CPU s/GB of both ends", &mut carried.ends_gb);
        spread("  UDP of 64 bytes that arrived, packets/s", &mut carried.packets);
        spread("  CPU s of whoever relays for a million of them", &mut carried.cpu_million);
    }
}

fn spread(what: &str, values: &mut [f64]) {
    values.sort_by(f64::total_cmp);
    let [median, least, most] = [values.len() / 2, 0, values.len() - 1].map(|at| values[at]);
    println!("{what}: {median:.2} ({least:.2} to {most:.2})");
}

fn print(what: &str, times: &mut [Duration]) {
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "{what}: median {:.0} ms, min {:.0}, max {:.0} ({} rounds)",
        ms(times[times.len() / 2]),
        ms(times[0]),
        ms(times[times.len() - 1]),
        times.len()
    );
}
