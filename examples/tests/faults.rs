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

use std::time::{Duration, Instant};

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

#[test]
#[ignore = "needs root"]
fn a_default_route_that_moves_to_another_router_loses_nothing() {
    let net = Net::new("route", Families::V4, &[]);
    // Both addresses are there from the beginning; only the way out changes.
    net.router.sh(&format!("ip link add ours2 type veth peer name eth1 netns {}", net.ours.ns()));
    net.router.sh("ip addr add 198.51.101.1/24 dev ours2; ip link set ours2 up");
    net.ours.sh("ip addr add 198.51.101.2/24 dev eth1; ip link set eth1 up");
    let ([node, _theirs], to) = two_nodes(&net);
    let text = net.ours.sh(&format!(
        "(sleep 1; ip route replace default via 198.51.101.1) & ping -n -i 0.02 -c 200 -W 1 {to} || true; wait"
    ));
    let received = text.split(", ").find_map(|part| part.strip_suffix(" received")).expect("ping's count");
    println!("{received} of 200 packets while the default route moved");
    assert!(received.parse::<u32>().unwrap() >= 199, "{text}");
    let log = std::fs::read_to_string(net.ours.dir().join("daemon.log")).unwrap();
    assert!(log.contains("default route has changed"), "the node has not noticed");
    node.wait_path(&to, "direct");
}

#[test]
#[ignore = "needs root"]
fn a_netcheck_takes_a_second_and_a_half_at_most_and_one_where_udp_is_blocked() {
    let net = Net::new("check", Families::V4, &[]);
    let node = net.our_node();
    let netcheck = || {
        let began = Instant::now();
        let report: Value = serde_json::from_str(&node.mesh("netcheck --json")).unwrap();
        (began.elapsed(), report)
    };
    let (took, report) = netcheck();
    println!("netcheck: {took:?}");
    assert!(took < Duration::from_millis(1500), "{took:?}");
    assert_eq!((&report["udp"], &report["behind_nat"]), (&Value::Bool(true), &Value::Bool(false)), "{report}");
    assert!(report["global_v4"].as_str().is_some_and(|address| address.starts_with("198.51.100.2:")), "{report}");

    net.router.sh("nft add rule inet lab forward ip saddr 198.51.100.0/24 meta l4proto udp drop");
    let (took, report) = netcheck();
    println!("netcheck without UDP: {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(report["udp"], Value::Bool(false), "{report}");
    assert!(report["preferred_region"].is_u64(), "the relay is reached without UDP: {report}");
}
