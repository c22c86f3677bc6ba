//! Three hosts around a router: a coordinator on the hub, and two hosts for nodes.
//!
//! ```text
//!        hub 203.0.113.2 (coordinator, relay, STUN)
//!             │
//!   ours ── router ── theirs          every host on a subnet of its own; the router's
//! 198.51.100.2     192.0.2.2          packet filter counts, and may drop, UDP between the two
//! ```

use std::time::Duration;

use serde_json::Value;

use super::{Host, Lab, Process, eventually};

/// The program under test.
pub(crate) const MESH: &str = env!("CARGO_BIN_EXE_mesh");
/// What our programs log; only seen when a test fails.
const LOG: &str = "info,mesh_derp=debug,mesh_control=debug,mesh_node=debug,mesh_nat=debug";
/// The coordinator.
pub(crate) const URL: &str = "http://203.0.113.2:8080";

/// Three hosts around a router, with a coordinator running on the hub.
pub(crate) struct Net {
    // Dropped first to last: processes before the namespaces they live in.
    _coordinator: Process,
    pub(crate) hub: Host,
    pub(crate) router: Host,
    pub(crate) ours: Host,
    pub(crate) theirs: Host,
    _lab: Lab,
}

impl Net {
    pub(crate) fn new(name: &str, relay_check: &[&str]) -> Self {
        let mut lab = Lab::new(name);
        let router = lab.router("r");
        let (hub, ours, theirs) = (lab.host("hub"), lab.host("ours"), lab.host("theirs"));
        lab.link((&hub, "eth0", "203.0.113.2/24"), (&router, "hub", "203.0.113.1/24"));
        lab.link((&ours, "eth0", "198.51.100.2/24"), (&router, "ours", "198.51.100.1/24"));
        lab.link((&theirs, "eth0", "192.0.2.2/24"), (&router, "theirs", "192.0.2.1/24"));
        hub.sh("ip route add default via 203.0.113.1");
        ours.sh("ip route add default via 198.51.100.1");
        theirs.sh("ip route add default via 192.0.2.1");
        router.sh("nft -f - <<X
table inet lab {
  counter between { }
  set blocked { type inet_proto; }
  chain forward {
    type filter hook forward priority 0; policy accept;
    ip saddr { 198.51.100.2, 192.0.2.2 } ip daddr { 198.51.100.2, 192.0.2.2 } meta l4proto @blocked drop
    ip saddr { 198.51.100.2, 192.0.2.2 } ip daddr { 198.51.100.2, 192.0.2.2 } meta l4proto udp counter name between
  }
}
X");
        let state = hub.dir().join("state");
        let mut coordinator = hub.spawn(
            "coordinator",
            hub.command(MESH)
                .args(["coordinator", "--listen", "203.0.113.2:8080", "--url", URL])
                .args(relay_check)
                .args(["--stun", "203.0.113.2:3478", "--state-dir"])
                .arg(&state)
                .env("RUST_LOG", LOG),
        );
        coordinator.wait_line("ready", Duration::from_secs(10));
        let net = Self { _coordinator: coordinator, hub, router, ours, theirs, _lab: lab };
        net.admin("users create alice");
        net
    }

    pub(crate) fn admin(&self, line: &str) -> Value {
        let state = self.hub.dir().join("state");
        let text = self.hub.sh(&format!("{MESH} admin --state-dir {} {line} -o json", state.display()));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{line}: {error}: {text}"))
    }

    pub(crate) fn auth_key(&self, options: &str) -> String {
        let answer = self.admin(&format!("keys create --user alice {options}"));
        answer["key"].as_str().expect("a key").to_owned()
    }

    pub(crate) fn block_direct_udp(&self) {
        self.router.sh("nft add element inet lab blocked '{ udp }'");
    }

    pub(crate) fn allow_direct_udp(&self) {
        self.router.sh("nft flush set inet lab blocked");
    }

    /// Bytes of UDP that the router has let through between the two nodes since the last call. Bytes, because a
    /// segmentation offload makes many packets look like one here.
    pub(crate) fn direct_bytes(&self) -> u64 {
        let text = self.router.sh("nft -j reset counter inet lab between");
        let json: Value = serde_json::from_str(&text).unwrap();
        let objects = json["nftables"].as_array().expect("a list of objects");
        let counter = objects.iter().find_map(|object| object.get("counter")).expect("the counter");
        counter["bytes"].as_u64().expect("a number of bytes")
    }

    /// Packets that the relay has handed on since it started.
    pub(crate) fn relayed_packets(&self) -> u64 {
        self.admin("relay")["packets_out"].as_u64().expect("the relay's counter")
    }

    /// Our node, up and running on a TUN device.
    pub(crate) fn our_node(&self) -> OurNode<'_> {
        let node = self.daemon_on(&self.ours);
        node.mesh(&self.up("ours"));
        node
    }

    /// Our daemon on a host, not yet joined.
    pub(crate) fn daemon_on<'a>(&'a self, host: &'a Host) -> OurNode<'a> {
        let mut command = host.command(MESH);
        command.args(["daemon", "--tun", "mesh0", "--state-dir"]).arg(host.dir().join("state"));
        command.arg("--socket").arg(host.dir().join("mesh.sock")).env("RUST_LOG", LOG);
        let mut daemon = host.spawn("daemon", &mut command);
        daemon.wait_line("ready", Duration::from_secs(10));
        OurNode { _daemon: daemon, host }
    }

    /// The command that joins, with a new key.
    pub(crate) fn up(&self, name: &str) -> String {
        format!("up --login-server {URL} --auth-key {} --hostname {name} --timeout 30s", self.auth_key(""))
    }
}

/// A daemon of ours on one of the hosts.
pub(crate) struct OurNode<'a> {
    _daemon: Process,
    host: &'a Host,
}

impl OurNode<'_> {
    pub(crate) fn mesh(&self, line: &str) -> String {
        self.host.sh(&format!("{MESH} --socket {} {line}", self.host.dir().join("mesh.sock").display()))
    }

    pub(crate) fn status(&self) -> Value {
        serde_json::from_str(&self.mesh("status --json")).unwrap()
    }

    pub(crate) fn ip(&self) -> String {
        self.mesh("ip").split_whitespace().next().expect("an address").to_owned()
    }

    pub(crate) fn peer(&self, name: &str) -> Value {
        eventually("the peer is in the status", Duration::from_secs(15), || {
            let status = self.status();
            let peers = status["peers"].as_array().cloned().unwrap_or_default();
            peers.into_iter().find(|peer| peer["name"].as_str().is_some_and(|n| n.starts_with(name))).ok_or(status)
        })
    }
}
