//! First figures of a node, printed and not judged: how soon it answers, and how soon it is reached directly.
//!
//! Run as root: `cargo test --release -p mesh --test figures -- --ignored --test-threads=1 --nocapture`.
//!
//! Two nodes on TUN devices, each behind a router, in namespaces of one machine; the relay is 0.1 ms away.
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
use lab::net::{Families, Net};

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
