//! A node behind a hard NAT whose router maps ports: Debian's `miniupnpd`, by each of its three protocols.
//!
//! Run as root: `cargo test -p mesh --test portmap -- --ignored --nocapture`.
//!
//! ```text
//!                        203.0.113.2 (coordinator, relay, STUN)
//!                                    │
//!   ours ── gateway (miniupnpd) ── core ── router ── theirs
//!   192.168.7.2 │ 30.0.0.2               198.51.100.2 │ 192.168.8.2
//! ```
//!
//! Both routers draw a random port for every destination and let only answers in, so that without a mapping the two have
//! nothing but the relay. miniupnpd maps nothing where its outside address is private, or kept for documentation or
//! benchmarks, so its router has one that is not; no packet leaves these namespaces.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and read the real clock"
)]

mod lab;

use std::time::{Duration, Instant};

use lab::mesh::{Coordinator, Node};
use lab::{Host, Lab, Process, eventually};
use serde_json::Value;

const PORT: &str = "41641";
const OUTSIDE: &str = "30.0.0.2:41641";
/// How soon a mapping is there, or back.
const SOON: Duration = Duration::from_secs(10);

/// What a hard NAT does; the chains of miniupnpd are empty where it does not run.
const HARD_NAT: &str = "
table inet filter {
  chain input { type filter hook input priority 0; iifname wan ct state new drop; }
  chain forward {
    type filter hook forward priority 0;
    iifname wan ct state new jump miniupnpd
    iifname wan ct state new drop
  }
  chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
  chain postrouting {
    type nat hook postrouting priority 100;
    jump postrouting_miniupnpd
    oifname wan masquerade random,fully-random
  }
  chain miniupnpd { }
  chain prerouting_miniupnpd { }
  chain postrouting_miniupnpd { }
}";

/// PCP begins with a 2, NAT-PMP with a 0.
const NO_PCP: &str = "table inet nopcp {\n chain in {\n  type filter hook input priority -1\n  \
                      iifname lan udp dport 5351 @th,64,8 2 drop\n }\n}";

struct Net {
    coordinator: Coordinator,
    ours: Host,
    theirs: Host,
    gateway: Host,
    _lab: Lab,
}

impl Net {
    fn new() -> Self {
        let mut lab = Lab::new("pm");
        let (core, hub) = (lab.router("core"), lab.host("hub"));
        lab.link((&hub, "eth0", "203.0.113.2/24"), (&core, "hub", "203.0.113.1/24"));
        hub.sh("ip route add default via 203.0.113.1");
        let mut home = |name: &str, wan: &str, lan: &str| {
            let (router, host) = (lab.router(&format!("{name}r")), lab.host(name));
            lab.link((&router, "wan", &format!("{wan}.2/24")), (&core, name, &format!("{wan}.1/24")));
            lab.link((&host, "eth0", &format!("{lan}.2/24")), (&router, "lan", &format!("{lan}.1/24")));
            router.sh(&format!("ip route add default via {wan}.1; nft -f - <<X\n{HARD_NAT}\nX"));
            host.sh(&format!("ip route add default via {lan}.1"));
            (router, host)
        };
        let (gateway, ours) = home("ours", "30.0.0", "192.168.7");
        let (_, theirs) = home("theirs", "198.51.100", "192.168.8");
        let coordinator = Coordinator::start(&hub, &["203.0.113.2"], &["--stun", "203.0.113.2:3479"]);
        Self { coordinator, ours, theirs, gateway, _lab: lab }
    }

    /// Starts miniupnpd with no memory of what it mapped before.
    fn miniupnpd(&self, natpmp: bool, upnp: bool) -> Process {
        for chain in ["miniupnpd", "prerouting_miniupnpd", "postrouting_miniupnpd"] {
            self.gateway.sh(&format!("nft flush chain inet filter {chain}"));
        }
        let yes = |on: bool| if on { "yes" } else { "no" };
        let config = format!(
            "ext_ifname=wan\nlistening_ip=lan\nhttp_port=5000\nenable_natpmp={}\nenable_upnp={}\nsecure_mode=yes\n\
             uuid=00000000-0000-0000-0000-000000000001\nallow 1024-65535 192.168.7.0/24 1024-65535\n\
             deny 0-65535 0.0.0.0/0 0-65535\n",
            yes(natpmp),
            yes(upnp)
        );
        let (file, pid) = (self.gateway.dir().join("miniupnpd.conf"), self.gateway.dir().join("miniupnpd.pid"));
        std::fs::write(&file, config).unwrap();
        let mut command = self.gateway.command("miniupnpd");
        self.gateway.spawn("miniupnpd", command.arg("-d").arg("-f").arg(file).arg("-P").arg(pid))
    }

    /// What miniupnpd has mapped to us.
    fn mapped(&self) -> bool {
        self.gateway.sh("nft list chain inet filter prerouting_miniupnpd").contains("192.168.7.2")
    }
}

/// Our node once the router has given it a port by `protocol`.
fn wait_mapped(node: &Node, protocol: &str) -> Value {
    eventually(protocol, SOON, || {
        let mapping = node.status()["self"]["port_mapping"].clone();
        let there = mapping["external"] == OUTSIDE && mapping["protocol"] == protocol;
        if there { Ok(mapping) } else { Err(mapping) }
    })
}

#[test]
#[ignore = "needs root and miniupnpd"]
fn a_node_behind_a_hard_nat_is_reached_directly_where_its_router_maps_ports() {
    let net = Net::new();
    let theirs = Node::join(&net.theirs, &net.coordinator, "theirs");

    // Without a mapping there is only the relay.
    let unmapped = Node::start_with(&net.ours, &["--port", PORT, "--no-portmap"]);
    unmapped.mesh(&net.coordinator.up("ours"));
    let address = unmapped.ip();
    let daemon = net.miniupnpd(true, true);
    theirs.outage(&address);
    let watched = Instant::now();
    while watched.elapsed() < Duration::from_secs(5) {
        theirs.outage(&address);
    }
    assert_eq!(theirs.peer("ours")["path"]["kind"], "relay");
    assert!(!net.mapped(), "--no-portmap asks nobody");
    unmapped.stop();
    drop(daemon);

    for (protocol, natpmp, upnp) in [("PCP", true, true), ("NAT-PMP", true, false), ("UPnP", false, true)] {
        let daemon = net.miniupnpd(natpmp, upnp);
        if protocol == "NAT-PMP" {
            net.gateway.sh(&format!("nft -f - <<X\n{NO_PCP}\nX"));
        }
        let began = Instant::now();
        let ours = Node::start_with(&net.ours, &["--port", PORT]);
        wait_mapped(&ours, protocol);
        let mapped = began.elapsed();
        assert!(net.mapped(), "{protocol}: miniupnpd has done it");

        let began = Instant::now();
        eventually("direct", SOON, || {
            theirs.outage(&address);
            let path = theirs.peer("ours")["path"].clone();
            if path["kind"] == "direct" && path["endpoint"] == OUTSIDE { Ok(()) } else { Err(path) }
        });
        println!("{protocol}: mapped {mapped:?} after the start, direct {:?} after the first packet", began.elapsed());
        let report = ours.mesh("netcheck");
        assert!(report.contains(&format!("port mapping: {OUTSIDE} by {protocol}")), "{report}");

        // The router forgets everything; it tells so by multicast, but for UPnP.
        let mut daemon = daemon;
        if protocol != "UPnP" {
            daemon.terminate();
            daemon = net.miniupnpd(natpmp, upnp);
            let began = Instant::now();
            eventually("the mapping is back", SOON, || if net.mapped() { Ok(()) } else { Err(daemon.log()) });
            println!("{protocol}: back {:?} after miniupnpd was started anew", began.elapsed());
        }
        ours.stop();
        assert!(!net.mapped(), "{protocol}: given back");
    }
}
