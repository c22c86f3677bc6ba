//! Networks that carry less than the tunnel's MTU: nothing stalls.
//!
//! Run as root: `cargo test -p mesh --test mtu -- --ignored --test-threads=1`.
//!
//! ```text
//!   a 198.51.100.2 ── 1500 ── hub 198.51.100.1, 192.0.2.1 ── 1300 or 1200 ── 192.0.2.2 b
//!                             coordinator, relay, STUN;
//!                             silent about what it cannot forward
//! ```
//!
//! A full packet of the tunnel (1,280 bytes) needs 1,340 bytes below it. `a` loses what is longer on the way, and is not
//! told; `b` is refused it by its own interface.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and read the real clock"
)]

mod lab;

use lab::pair::Pair;
use lab::traffic::{download, serve};

const SIZE: usize = 5_000_000;

#[test]
#[ignore = "needs root"]
fn a_network_of_1300_bytes_stalls_nothing() {
    streams_and_long_datagrams_pass("m1300", 1300);
}

#[test]
#[ignore = "needs root"]
fn a_network_of_1200_bytes_stalls_nothing() {
    streams_and_long_datagrams_pass("m1200", 1200);
}

fn streams_and_long_datagrams_pass(name: &str, mtu: usize) {
    let net = Pair::new(name, |hub, a, b| {
        hub.sh(&format!("ip link set to-b mtu {mtu}"));
        b.sh(&format!("ip link set eth0 mtu {mtu}"));
        hub.sh("nft add table ip lab");
        hub.sh("nft add chain ip lab out '{ type filter hook output priority 0; }'");
        hub.sh("nft add rule ip lab out icmp type destination-unreachable drop");
        a.sh("ip route change default via 198.51.100.1 advmss 1000");
        b.sh("ip route change default via 192.0.2.1 advmss 1000");
    });
    let _files = [&net.a, &net.b].map(|node| serve(&node.host, "file", &vec![b'.'; SIZE]));
    let (to_a, to_b) = (net.a.addresses(), net.b.addresses());
    net.a.wait_path(&to_b[0], "direct");
    net.b.wait_path(&to_a[0], "direct");
    for (node, from) in [(&net.a, &to_b), (&net.b, &to_a)] {
        for address in from {
            let host = if address.contains(':') { format!("[{address}]") } else { address.clone() };
            let took = download(&node.host, &format!("http://{host}:8000/file"), SIZE, 40);
            println!("{name}: 5 MB from {address} in {took:?}");
        }
    }
    // Both senders learn the limit by their first packets and fragment from then on.
    let long = format!("ping -n -M dont -s {} -c 8 -i 0.3 -W 2 {}", 1280 - 28, to_b[0]);
    let said = net.a.host.try_sh(&long);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let arrived = said.lines().filter(|line| line.contains("bytes from") && line.contains("ttl=")).count();
    assert!(arrived >= 4, "{said}");
    for node in [&net.a, &net.b] {
        let status = node.status();
        assert_eq!(status["peers"][0]["path"]["kind"], "direct");
        println!("{name}: dropped {}", status["drops"]);
        assert!(status["drops"]["TooLong"].as_u64().is_some_and(|count| count > 0), "the sender was told");
    }
}
