//! A node behind a hard NAT whose router maps ports: Debian's `miniupnpd`, by each of its three protocols. What it does for
//! our node, its own clients `natpmpc` and `upnpc` confirm.
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
/// The chains that miniupnpd writes to.
const CHAINS: [&str; 3] = ["miniupnpd", "prerouting_miniupnpd", "postrouting_miniupnpd"];
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

    /// Starts miniupnpd with no memory of what it mapped before; PCP and NAT-PMP are one switch.
    fn miniupnpd(&self, natpmp: bool) -> Process {
        for chain in CHAINS {
            self.gateway.sh(&format!("nft flush chain inet filter {chain}"));
        }
        let natpmp = if natpmp { "yes" } else { "no" };
        let config = format!(
            "ext_ifname=wan\nlistening_ip=lan\nhttp_port=5000\nenable_natpmp={natpmp}\nenable_upnp=yes\nsecure_mode=yes\n\
             uuid=00000000-0000-0000-0000-000000000001\nallow 1024-65535 192.168.7.0/24 1024-65535\n\
             deny 0-65535 0.0.0.0/0 0-65535\n"
        );
        let (file, pid) = (self.gateway.dir().join("miniupnpd.conf"), self.gateway.dir().join("miniupnpd.pid"));
        std::fs::write(&file, config).unwrap();
        let mut command = self.gateway.command("miniupnpd");
        self.gateway.spawn("miniupnpd", command.arg("-d").arg("-f").arg(file).arg("-P").arg(pid))
    }

    /// Whether miniupnpd forwards this outside port to us; it needs a rule that translates, and one that lets through.
    fn forwards(&self, port: &str) -> bool {
        CHAINS[..2].iter().all(|chain| {
            let rules = self.gateway.sh(&format!("nft list chain inet filter {chain}"));
            rules.lines().any(|rule| rule.contains("192.168.7.2") && rule.contains(port))
        })
    }

    /// Everything that miniupnpd has told the firewall.
    fn rules(&self) -> String {
        let rules = CHAINS.map(|chain| self.gateway.sh(&format!("nft list chain inet filter {chain}")));
        rules.iter().flat_map(|rules| rules.lines()).filter(|line| line.contains("192.168.7.2")).collect()
    }

    /// The reference client of NAT-PMP gets a mapping and gives it back.
    fn natpmpc(&self) {
        let text = self.ours.sh("natpmpc -g 192.168.7.1 -a 5555 5555 udp 60");
        assert!(text.contains("Public IP address : 30.0.0.2"), "{text}");
        assert!(text.contains("Mapped public port 5555 protocol UDP to local port 5555"), "{text}");
        assert!(self.forwards("5555"), "{}", self.rules());
        self.ours.sh("natpmpc -g 192.168.7.1 -a 5555 5555 udp 0");
        assert_eq!(self.rules(), "");
    }

    /// What the reference client of UPnP is told about mappings to us, by whichever protocol they were made.
    fn upnpc(&self) -> String {
        let text = self.ours.sh("upnpc -u http://192.168.7.1:5000/rootDesc.xml -l");
        assert!(text.contains("ExternalIPAddress = 30.0.0.2"), "{text}");
        text.lines().filter(|line| line.contains("->192.168.7.2:")).collect()
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
    let daemon = net.miniupnpd(true);
    theirs.outage(&address);
    let watched = Instant::now();
    while watched.elapsed() < Duration::from_secs(5) {
        theirs.outage(&address);
    }
    assert_eq!(theirs.peer("ours")["path"]["kind"], "relay");
    assert_eq!(net.rules(), "", "--no-portmap asks nobody");
    unmapped.stop();
    drop(daemon);

    for (protocol, natpmp) in [("PCP", true), ("NAT-PMP", true), ("UPnP", false)] {
        let daemon = net.miniupnpd(natpmp);
        if natpmp {
            eventually("miniupnpd answers", SOON, || {
                let answer = net.ours.try_sh("natpmpc -g 192.168.7.1");
                if answer.status.success() { Ok(()) } else { Err(answer) }
            });
            net.natpmpc();
        }
        if protocol == "NAT-PMP" {
            net.gateway.sh(&format!("nft -f - <<X\n{NO_PCP}\nX"));
        }
        let began = Instant::now();
        let ours = Node::start_with(&net.ours, &["--port", PORT]);
        wait_mapped(&ours, protocol);
        let mapped = began.elapsed();
        assert!(net.forwards(PORT), "{protocol}: {}", net.rules());
        let listed = net.upnpc();
        assert!(listed.contains("UDP 41641->192.168.7.2:41641"), "{protocol}: {listed}");

        let began = Instant::now();
        eventually("direct", SOON, || {
            theirs.outage(&address);
            let path = theirs.peer("ours")["path"].clone();
            if path["kind"] == "direct" && path["endpoint"] == OUTSIDE { Ok(()) } else { Err(path) }
        });
        println!("{protocol}: mapped {mapped:?} after the start, direct {:?} after the first packet", began.elapsed());
        let report = ours.mesh("netcheck");
        assert!(report.contains(&format!("port mapping: {OUTSIDE} by {protocol}")), "{report}");

        // The router forgets everything, and tells so by multicast: in PCP, whatever the mapping was made by. Where it
        // does not speak that, nobody would know before the next renewal.
        let mut daemon = daemon;
        if natpmp {
            daemon.terminate();
            // Epochs are whole seconds, and clocks are trusted to two.
            std::thread::sleep(Duration::from_secs(3));
            daemon = net.miniupnpd(natpmp);
            assert_eq!(net.rules(), "", "{protocol}: forgotten");
            let began = Instant::now();
            let back = || if net.forwards(PORT) { Ok(()) } else { Err(daemon.log()) };
            eventually("the mapping is back", SOON, back);
            println!("{protocol}: back {:?} after miniupnpd was started anew", began.elapsed());
        }
        let began = Instant::now();
        ours.stop();
        assert_eq!(net.rules(), "", "{protocol}: given back");
        assert_eq!(net.upnpc(), "", "{protocol}: given back");
        println!("{protocol}: given back within {:?}", began.elapsed());
        drop(daemon);
    }
}
