//! Two nodes that cannot meet, and a third one of the same user that relays UDP for them.
//!
//! Run as root: `cargo test -p mesh --test peer_relay -- --ignored --test-threads=1 --nocapture`.
//!
//! ```text
//!   a ── site 1 ──┐           ┌── site 2 ── b
//!                 core: DERP, coordinator          UDP between sites 1 and 2 is dropped here
//!                             └── site 3 ── relay (--relay-server-port)
//! ```
//!
//! Whether packets take the DERP relay is judged by its counter, and whether they take the third node by what its core
//! link has carried.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and read the real clock"
)]

mod lab;

use std::time::{Duration, Instant};

use lab::eventually;
use lab::mesh::Node;
use lab::nat::{Access, Internet};
use lab::traffic::ping;

/// Drops UDP between the first two sites.
const CUT: &str = "
table inet cut {
  chain through {
    type filter hook forward priority 0;
    ip saddr 198.51.100.0/24 ip daddr 192.0.2.0/24 meta l4proto udp drop
    ip saddr 192.0.2.0/24 ip daddr 198.51.100.0/24 meta l4proto udp drop
  }
}";

/// The nodes `a`, `b` and `relay`, which have joined.
fn three(net: &mut Internet, access: Access) -> [Node; 3] {
    let [a, b, third] = [net.site(1, access), net.site(2, access), net.site(3, Access::Open)];
    let relay = Node::start_with(&third, &["--relay-server-port", "7777"]);
    relay.mesh(&net.coordinator.up("relay"));
    [Node::join(&a, &net.coordinator, "a"), Node::join(&b, &net.coordinator, "b"), relay]
}

/// Sends until both ends use the third node, and returns how long that took.
fn until_relayed(a: &Node, b: &Node) -> Duration {
    for (node, peer) in [(a, "b"), (b, "a")] {
        eventually("each knows the other", Duration::from_secs(15), || {
            let peer = node.peer(peer);
            if peer["home_region"].is_null() { Err(peer) } else { Ok(()) }
        });
    }
    let traffic = a.host.spawn("ping", a.host.command("ping").args(["-n", "-q", "-i", "0.05", &b.ip()]));
    let began = Instant::now();
    for (node, peer) in [(a, "b"), (b, "a")] {
        eventually("the path goes through the third node", Duration::from_secs(20), || {
            let path = node.peer(peer)["path"].clone();
            let there = path["endpoint"].as_str().is_some_and(|endpoint| endpoint == "198.18.3.2:7777");
            if path["kind"] == "peer-relay" && there { Ok(()) } else { Err(path) }
        });
    }
    drop(traffic);
    began.elapsed()
}

fn is_carried_by_the_third(net: &Internet, a: &Node, b: &Node) {
    let before = net.coordinator.relayed_packets();
    assert_eq!(ping(&a.host, &b.ip(), 100, "0.02"), 100, "every packet is answered");
    let relayed = net.coordinator.relayed_packets() - before;
    assert!(relayed < 20, "{relayed} of 200 packets took the DERP relay");
}

#[test]
#[ignore = "needs root"]
fn two_with_udp_blocked_between_them_use_the_third() {
    let mut net = Internet::new("pc");
    net.core.sh(&format!("nft -f - <<'X'\n{CUT}\nX"));
    let [a, b, _relay] = three(&mut net, Access::Open);
    let took = until_relayed(&a, &b);
    println!("UDP blocked between the two: through the third after {} ms", took.as_millis());
    is_carried_by_the_third(&net, &a, &b);
}

#[test]
#[ignore = "needs root"]
fn two_behind_hard_nats_use_the_third() {
    let mut net = Internet::new("ph");
    let [a, b, _relay] = three(&mut net, Access::Hard);
    let took = until_relayed(&a, &b);
    println!("both behind hard NATs: through the third after {} ms", took.as_millis());
    is_carried_by_the_third(&net, &a, &b);
}
