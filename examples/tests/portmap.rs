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
//!
//! With IPv6 the same router has a firewall, which lets in what it was asked to.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "tests fail by panicking and read the real clock"
)]

mod lab;

use std::net::SocketAddr;
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
  chain input { type filter hook input priority 0; iifname wan meta l4proto != ipv6-icmp ct state new drop; }
  chain forward {
    type filter hook forward priority 0;
    iifname wan ct state new jump miniupnpd
    iifname wan ct state new drop
  }
  chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
  chain postrouting {
    type nat hook postrouting priority 100;
    jump postrouting_miniupnpd
    oifname wan meta nfproto ipv4 masquerade random,fully-random
  }
  chain miniupnpd { }
  chain prerouting_miniupnpd { }
  chain postrouting_miniupnpd { }
}";

/// PCP begins with a 2, NAT-PMP with a 0.
const NO_PCP: &str = "table inet nopcp {\n chain in {\n  type filter hook input priority -1\n  \
                      iifname lan udp dport 5351 @th,64,8 2 drop\n }\n}";

/// The hub's IPv6 address, and ours.
const HUB_V6: &str = "2001:db8:1::2";
const OURS_V6: &str = "2001:db8:7::2";

struct Net {
    // First, for it ends first.
    coordinator: Option<Coordinator>,
    core: Host,
    hub: Host,
    ours: Host,
    theirs: Host,
    gateway: Host,
    _lab: Lab,
}

impl Net {
    /// A network of IPv4.
    fn new() -> Self {
        let mut net = Self::cabled("pm");
        for (host, lan) in [(&net.ours, "192.168.7"), (&net.theirs, "192.168.8")] {
            host.sh(&format!("ip route add default via {lan}.1"));
        }
        net.coordinator = Some(Coordinator::start(&net.hub, &["203.0.113.2"], &["--stun", "203.0.113.2:3479"]));
        net
    }

    /// The same, in which our node has IPv6 alone, and its router's address on the link alone to go by.
    fn with_ipv6() -> Self {
        let mut net = Self::cabled("pm6");
        net.core.sh("ip addr add 2001:db8:1::1/64 dev hub nodad; ip addr add 2001:db8:2::1/64 dev ours nodad");
        net.core.sh("ip route add 2001:db8:7::/64 via 2001:db8:2::2");
        net.hub.sh(&format!("ip addr add {HUB_V6}/64 dev eth0 nodad; ip route add default via 2001:db8:1::1"));
        net.gateway.sh("ip addr add 2001:db8:2::2/64 dev wan nodad; ip route add default via 2001:db8:2::1");
        net.gateway.sh("ip addr add 2001:db8:7::1/64 dev lan nodad; ip addr add fe80::7/64 dev lan nodad");
        net.ours.sh(&format!("ip addr add {OURS_V6}/64 dev eth0 nodad; ip route add default via fe80::7 dev eth0"));
        let (hub, second) = (format!("[{HUB_V6}]"), format!("[{HUB_V6}]:3479"));
        net.coordinator = Some(Coordinator::start(&net.hub, &[&hub], &["--stun", &second]));
        net
    }

    fn coordinator(&self) -> &Coordinator {
        self.coordinator.as_ref().unwrap()
    }

    fn cabled(name: &str) -> Self {
        let mut lab = Lab::new(name);
        let (core, hub) = (lab.router("core"), lab.host("hub"));
        lab.link((&hub, "eth0", "203.0.113.2/24"), (&core, "hub", "203.0.113.1/24"));
        hub.sh("ip route add default via 203.0.113.1");
        let mut home = |name: &str, wan: &str, lan: &str| {
            let (router, host) = (lab.router(&format!("{name}r")), lab.host(name));
            lab.link((&router, "wan", &format!("{wan}.2/24")), (&core, name, &format!("{wan}.1/24")));
            lab.link((&host, "eth0", &format!("{lan}.2/24")), (&router, "lan", &format!("{lan}.1/24")));
            router.sh(&format!("ip route add default via {wan}.1; nft -f - <<X\n{HARD_NAT}\nX"));
            (router, host)
        };
        let (gateway, ours) = home("ours", "30.0.0", "192.168.7");
        let (_, theirs) = home("theirs", "198.51.100", "192.168.8");
        Self { coordinator: None, core, hub, ours, theirs, gateway, _lab: lab }
    }

    /// Starts miniupnpd with no memory of what it mapped before; PCP and NAT-PMP are one switch.
    fn miniupnpd(&self, natpmp: bool) -> Process {
        self.forget();
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

    /// Takes back what miniupnpd has told the firewall, as a router does that starts anew.
    fn forget(&self) {
        for chain in CHAINS {
            self.gateway.sh(&format!("nft flush chain inet filter {chain}"));
        }
    }

    /// Whether miniupnpd forwards this outside port to us; it needs a rule that translates, and one that lets through.
    fn forwards(&self, port: &str) -> bool {
        let rules = self.rules();
        rules.contains(&format!("dnat ip to 192.168.7.2:{port}")) && rules.contains(&format!("th dport {port} @nh"))
    }

    /// Everything that miniupnpd has told the firewall.
    fn rules(&self) -> String {
        let rules = CHAINS.map(|chain| self.gateway.sh(&format!("nft list chain inet filter {chain}")));
        rules.iter().flat_map(|rules| rules.lines()).filter(|line| line.contains(" dport ")).collect()
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
    let theirs = Node::join(&net.theirs, net.coordinator(), "theirs");

    // Without a mapping there is only the relay.
    let unmapped = Node::start_with(&net.ours, &["--port", PORT, "--no-portmap"]);
    unmapped.mesh(&net.coordinator().up("ours"));
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

        // We begin: the other side would go on with the session of our former process for fifteen seconds.
        let began = Instant::now();
        ours.outage(&theirs.ip());
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
            net.forget();
            // Epochs are whole seconds, and clocks are trusted to two.
            std::thread::sleep(Duration::from_secs(3));
            assert_eq!(net.rules(), "", "{protocol}: forgotten");
            daemon = net.miniupnpd(natpmp);
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

/// Sends something to our node that nobody has asked for, and says whether it arrives.
fn lets_in(net: &Net, port: u16) -> bool {
    let nothing = || net.ours.sh("nft list chain inet seen in").contains("packets 0 ");
    net.ours.sh(&format!(
        "nft delete table inet seen 2>/dev/null || true; nft -f - <<X\ntable inet seen {{\n chain in {{\n  \
         type filter hook input priority 0\n  ip6 saddr {HUB_V6} udp dport {port} udp sport 7777 counter\n }}\n}}\nX"
    ));
    net.hub.sh(&format!(
        "python3 -c 'import socket; s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind((\"::\", 7777)); \
         s.sendto(b\"hello\", (\"{OURS_V6}\", {port}))'"
    ));
    let began = Instant::now();
    while nothing() && began.elapsed() < Duration::from_millis(500) {
        std::thread::sleep(Duration::from_millis(20));
    }
    !nothing()
}

/// That it has started anew, miniupnpd tells IPv4 alone: its other announcement names no interface, and leaves by another.
#[test]
#[ignore = "needs root and miniupnpd"]
fn a_router_opens_its_firewall_for_the_ipv6_address_of_a_node() {
    let net = Net::with_ipv6();
    for (protocol, asked) in [("PCP", "PCP request"), ("UPnP", "#AddPinhole")] {
        let daemon = net.miniupnpd(true);
        let ours = Node::start_with(&net.ours, &["--port", PORT]);
        if protocol == "PCP" {
            ours.mesh(&net.coordinator().up("ours"));
        }
        let began = Instant::now();
        let pinhole: SocketAddr = eventually(protocol, SOON, || {
            let status = ours.status()["self"]["port_mapping"].clone();
            status["pinhole"].as_str().and_then(|text| text.parse().ok()).ok_or((status, daemon.log()))
        });
        println!("{protocol}: {pinhole} opened within {:?}", began.elapsed());
        assert_eq!(pinhole.ip().to_string(), OURS_V6);
        assert!(lets_in(&net, pinhole.port()), "{protocol}: {}", net.rules());
        assert!(daemon.log().contains(asked), "{protocol}: {}", daemon.log());
        ours.stop();
        assert_eq!(net.rules(), "", "{protocol}: closed");
        assert!(!lets_in(&net, pinhole.port()), "{protocol}: closed");
        if protocol == "PCP" {
            net.gateway.sh(&format!("nft -f - <<X\n{NO_PCP}\nX"));
        }
    }
}
