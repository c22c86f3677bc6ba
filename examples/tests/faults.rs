//! Networks that fail under running nodes: lost links, new addresses, blocked UDP, no IPv4, a coordinator that dies.
//!
//! Run as root: `cargo test -p mesh --test faults -- --ignored --test-threads=1`.
//!
//! Nobody restarts a node here, and nobody tells it what has happened. `lab/net.rs` draws the network.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and read the real clock"
)]

mod lab;

use std::time::Duration;

use lab::eventually;
use lab::mesh::Node;
use lab::net::{Families, Net};
use serde_json::Value;

/// Both nodes, with a direct path between them, and the second one's address.
fn two_nodes(net: &Net) -> ([Node; 2], String) {
    let nodes = [&net.ours, &net.theirs].map(Node::start);
    for (node, name) in nodes.iter().zip(["ours", "theirs"]) {
        node.mesh(&net.coordinator.up(name));
    }
    let to = nodes[1].ip();
    nodes[0].wait_path(&to, "direct");
    (nodes, to)
}

#[test]
#[ignore = "needs root"]
fn traffic_survives_lost_links_new_addresses_and_blocked_udp() {
    let net = Net::new("roam", Families::V4, &[]);
    let ([node, _theirs], to) = two_nodes(&net);

    net.ours.sh("ip link set eth0 down; sleep 3; ip link set eth0 up; ip route add default via 198.51.100.1");
    println!("a link that was lost: {:?}", node.outage(&to));
    node.wait_path(&to, "direct");

    net.router.sh("ip addr add 198.51.100.65/26 dev ours");
    net.ours
        .sh("ip addr flush dev eth0; ip addr add 198.51.100.77/26 dev eth0; ip route add default via 198.51.100.65");
    println!("another address: {:?}", node.outage(&to));
    node.wait_path(&to, "direct");

    net.block_direct_udp();
    println!("UDP blocked: {:?}", node.outage(&to));
    node.wait_path(&to, "relay");
    net.allow_direct_udp();
    node.wait_path(&to, "direct");
}

#[test]
#[ignore = "needs root"]
fn a_coordinator_that_is_killed_takes_no_tunnel_with_it_and_serves_again_when_it_returns() {
    let mut net = Net::new("kill", Families::V4, &[]);
    let (nodes, to) = two_nodes(&net);
    net.coordinator.kill();
    for _ in 0..20 {
        assert!(nodes[0].outage(&to) < Duration::from_secs(2), "a tunnel stood still while the coordinator was away");
    }
    net.coordinator.start_again();
    eventually("both are connected again", Duration::from_secs(60), || {
        let states = nodes.each_ref().map(|node| node.mesh("status"));
        if states.iter().all(|text| text.contains("coordinator connected")) { Ok(()) } else { Err(states) }
    });
    assert!(nodes[0].outage(&to) < Duration::from_secs(2));
}

#[test]
#[ignore = "needs root"]
fn a_network_without_ipv4_is_enough() {
    let net = Net::new("six", Families::V6, &[]);
    let (nodes, to) = two_nodes(&net);
    let status = nodes[0].status();
    let endpoint = &status["peers"][0]["path"]["endpoint"];
    assert!(endpoint.as_str().is_some_and(|endpoint| endpoint.starts_with("[2001:db8:3::2]")), "{endpoint}");
    let report: Value = serde_json::from_str(&nodes[0].mesh("netcheck --json")).unwrap();
    assert_eq!((&report["ipv6"], &report["ipv4"]), (&Value::Bool(true), &Value::Bool(false)), "{report}");
    let seen = report["global_v6"].as_str().expect("an address");
    assert!(seen.starts_with("[2001:db8:2::2]"), "{seen}");
    for node in &nodes {
        node.mesh("set --path relay");
    }
    nodes[0].wait_path(&to, "relay");
}
