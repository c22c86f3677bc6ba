//! Networks that fail under running nodes: lost links, new addresses, blocked UDP, no IPv4, a coordinator that dies.
//!
//! Run as root: `cargo test -p mesh --test faults -- --ignored --test-threads=1`.
//!
//! ```text
//!        hub 203.0.113.2, 2001:db8:1::2 (coordinator, relay, STUN)
//!             │
//!     a ── router ── b
//! 198.51.100.2     192.0.2.2
//! 2001:db8:2::2    2001:db8:3::2
//! ```
//!
//! Nobody restarts a node here, and nobody tells it what has happened.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and read the real clock"
)]

mod lab;

use std::time::{Duration, Instant};

use lab::{Host, Lab, Process, eventually};
use serde_json::Value;

const MESH: &str = env!("CARGO_BIN_EXE_mesh");
const LOG: &str = "info,mesh_derp=debug,mesh_control=debug,mesh_node=debug,mesh_nat=debug";

/// Which addresses the hosts have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Families {
    V4,
    V6,
}

struct Net {
    // Dropped first to last: processes before the namespaces they live in.
    a: Node,
    b: Node,
    coordinator: Option<Process>,
    hub: Host,
    router: Host,
    families: Families,
    _lab: Lab,
}

impl Net {
    fn new(name: &str, families: Families) -> Self {
        let mut lab = Lab::new(name);
        let router = lab.router("r");
        let hosts = ["hub", "a", "b"].map(|name| lab.host(name));
        let (networks, length) = match families {
            Families::V4 => (["203.0.113.", "198.51.100.", "192.0.2."], 24),
            Families::V6 => (["2001:db8:1::", "2001:db8:2::", "2001:db8:3::"], 64),
        };
        for (host, (network, end)) in hosts.iter().zip(networks.iter().zip(["to-hub", "to-a", "to-b"])) {
            let (own, gateway) = (format!("{network}2/{length}"), format!("{network}1/{length}"));
            lab.link((host, "eth0", &own), (&router, end, &gateway));
            host.sh(&format!("ip route add default via {network}1"));
        }
        router.sh("nft add table inet lab");
        router.sh("nft add chain inet lab forward '{ type filter hook forward priority 0; }'");
        let [hub, a, b] = hosts;
        let [a, b] = [("a", a), ("b", b)].map(|(name, host)| Node::start(name, host));
        let mut net = Self { a, b, coordinator: None, hub, router, families, _lab: lab };
        net.start_coordinator();
        net.admin("users create alice");
        for node in [&net.a, &net.b] {
            let key = net.admin("keys create --user alice")["key"].as_str().expect("a key").to_owned();
            let (url, name) = (net.url(), node.name);
            node.mesh(&format!("up --login-server {url} --auth-key {key} --hostname {name} --timeout 30s"));
        }
        net
    }

    fn hub_address(&self) -> &'static str {
        match self.families {
            Families::V4 => "203.0.113.2",
            Families::V6 => "[2001:db8:1::2]",
        }
    }

    fn url(&self) -> String {
        format!("http://{}:8080", self.hub_address())
    }

    fn start_coordinator(&mut self) {
        let address = self.hub_address();
        let mut command = self.hub.command(MESH);
        command.args(["coordinator", "--url", &self.url(), "--listen", &format!("{address}:8080")]);
        command.args(["--stun", &format!("{address}:3478"), "--state-dir"]).arg(self.hub.dir().join("state"));
        let mut coordinator = self.hub.spawn("coordinator", command.env("RUST_LOG", LOG));
        coordinator.wait_line("ready", Duration::from_secs(10));
        self.coordinator = Some(coordinator);
    }

    fn admin(&self, line: &str) -> Value {
        let state = self.hub.dir().join("state");
        let text = self.hub.sh(&format!("{MESH} admin --state-dir {} {line} -o json", state.display()));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{line}: {error}: {text}"))
    }

    /// Sends packets through the tunnel until they arrive, and says how long that took.
    fn outage(&self) -> Duration {
        let began = Instant::now();
        let to = &self.b.mesh("ip");
        let to = to.lines().next().expect("an address");
        eventually("packets arrive again", Duration::from_secs(60), || {
            let sent = self.a.host.try_sh(&format!("ping -n -c 1 -W 1 {to}"));
            if sent.status.success() { Ok(()) } else { Err(self.a.mesh("status")) }
        });
        began.elapsed()
    }

    fn wait_path(&self, kind: &str) {
        eventually(kind, Duration::from_secs(60), || {
            self.outage();
            let status: Value = serde_json::from_str(&self.a.mesh("status --json")).unwrap();
            if status["peers"][0]["path"]["kind"] == kind { Ok(()) } else { Err(status["peers"][0]["path"].clone()) }
        });
    }
}

struct Node {
    name: &'static str,
    _daemon: Process,
    host: Host,
}

impl Node {
    fn start(name: &'static str, host: Host) -> Self {
        let mut command = host.command(MESH);
        command.args(["daemon", "--tun", "mesh0", "--state-dir"]).arg(host.dir().join("state"));
        command.arg("--socket").arg(host.dir().join("mesh.sock")).env("RUST_LOG", LOG);
        let mut daemon = host.spawn("daemon", &mut command);
        daemon.wait_line("ready", Duration::from_secs(10));
        Self { name, _daemon: daemon, host }
    }

    fn mesh(&self, line: &str) -> String {
        self.host.sh(&format!("{MESH} --socket {} {line}", self.host.dir().join("mesh.sock").display()))
    }
}

#[test]
#[ignore = "needs root"]
fn traffic_survives_lost_links_new_addresses_and_blocked_udp() {
    let net = Net::new("roam", Families::V4);
    net.wait_path("direct");

    net.a.host.sh("ip link set eth0 down; sleep 3; ip link set eth0 up; ip route add default via 198.51.100.1");
    println!("a link that was lost: {:?}", net.outage());
    net.wait_path("direct");

    net.router.sh("ip addr add 198.51.100.65/26 dev to-a");
    net.a
        .host
        .sh("ip addr flush dev eth0; ip addr add 198.51.100.77/26 dev eth0; ip route add default via 198.51.100.65");
    println!("another address: {:?}", net.outage());
    net.wait_path("direct");

    net.router.sh("nft add rule inet lab forward ip saddr 192.0.2.2 ip daddr 198.51.100.0/24 meta l4proto udp drop");
    net.router.sh("nft add rule inet lab forward ip daddr 192.0.2.2 ip saddr 198.51.100.0/24 meta l4proto udp drop");
    println!("UDP blocked: {:?}", net.outage());
    net.wait_path("relay");
    net.router.sh("nft flush chain inet lab forward");
    net.wait_path("direct");
}

#[test]
#[ignore = "needs root"]
fn a_coordinator_that_is_killed_takes_no_tunnel_with_it_and_serves_again_when_it_returns() {
    let mut net = Net::new("kill", Families::V4);
    net.wait_path("direct");
    net.coordinator = None;
    for _ in 0..20 {
        assert!(net.outage() < Duration::from_secs(2), "a tunnel stood still while the coordinator was away");
    }
    net.start_coordinator();
    eventually("both are connected again", Duration::from_secs(60), || {
        let states = [&net.a, &net.b].map(|node| node.mesh("status"));
        if states.iter().all(|text| text.contains("coordinator connected")) { Ok(()) } else { Err(states) }
    });
    assert!(net.outage() < Duration::from_secs(2));
}

#[test]
#[ignore = "needs root"]
fn a_network_without_ipv4_is_enough() {
    let net = Net::new("six", Families::V6);
    net.wait_path("direct");
    let status: Value = serde_json::from_str(&net.a.mesh("status --json")).unwrap();
    let endpoint = &status["peers"][0]["path"]["endpoint"];
    assert!(endpoint.as_str().is_some_and(|endpoint| endpoint.starts_with("[2001:db8:3::2]")), "{endpoint}");
    let report: Value = serde_json::from_str(&net.a.mesh("netcheck --json")).unwrap();
    assert_eq!((&report["ipv6"], &report["ipv4"]), (&Value::Bool(true), &Value::Bool(false)), "{report}");
    let seen = report["global_v6"].as_str().expect("an address");
    assert!(seen.starts_with("[2001:db8:2::2]"), "{seen}");
    for node in [&net.a, &net.b] {
        node.mesh("set --path relay");
    }
    net.wait_path("relay");
}
