//! An internet of namespaces with a coordinator, relay and STUN in the middle, and sites around it that reach it as people
//! do: openly, through a router with NAT, through a carrier's NAT behind that, or through a firewall.
//!
//! ```text
//!   192.168.1.11 ── home ── 100.64.1.0/24 ── carrier ── 198.51.100.0/24 ── core ── 192.0.2.0/24 ── …
//!                                                                     203.0.113.1, 2001:db8::1
//! ```
//!
//! All homes have the same network, as they do. What nftables does, in the words of RFC 4787:
//!
//! - `masquerade` keeps the source port while it is free: endpoint-independent mapping for a single user of the port, and
//!   address-and-port-dependent filtering, since an answer has to match a flow that conntrack knows.
//! - `masquerade random,fully-random` draws a port from 1024 to 65535 for each flow: address-and-port-dependent mapping.
//! - Endpoint-independent filtering, and hairpinning with it, take a map from port to host; see [`TURNING`].
//! - A packet that nobody has asked for is dropped, not refused: conntrack would keep a refused one as a flow of the
//!   router's own, and give the next flow from inside to the same place another port.

use super::mesh::Coordinator;
use super::{Host, Lab};

/// How a site reaches the internet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// With an address of its own and without a filter.
    Open,
    /// Through one router: endpoint-independent mapping, port-dependent filtering.
    Easy,
    /// Through one router: a random port for every destination, port-dependent filtering.
    Hard,
    /// Through a router like [`Easy`](Self::Easy), and a carrier's like it.
    Double,
    /// Through a router like [`Easy`](Self::Easy) that lets no UDP pass.
    NoUdp,
    /// IPv4 like [`Hard`](Self::Hard); IPv6 with an address of its own behind a stateful firewall.
    Firewall6,
}

/// How a router treats IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Router {
    Easy,
    Hard,
    NoUdp,
    Turning,
}

/// What all routers do: only answers come in.
const FILTER: &str = "
table inet filter {
  chain to_router { type filter hook input priority 0; iifname wan ct state new meta l4proto != ipv6-icmp drop; }
  chain through { type filter hook forward priority 0; iifname wan ct status dnat accept; iifname wan ct state new drop; }
}";

const MASQUERADE: &str = "
table ip nat {
  chain out { type nat hook postrouting priority 100; oifname wan masquerade HOW; }
}";

const NO_UDP: &str = "
table inet blocked {
  chain no_udp { type filter hook forward priority -1; meta l4proto udp drop; }
}";

/// A carrier's NAT that lets anybody answer, and lets its customers reach each other by their outside addresses.
const TURNING: &str = "
table ip nat {
  map mapped { type inet_service : ipv4_addr . inet_service; flags dynamic,timeout; timeout 5m; }
  chain in {
    type nat hook prerouting priority -100;
    ip daddr OUTSIDE udp dport @mapped dnat to udp dport map @mapped
  }
  chain out {
    type nat hook postrouting priority 100;
    oifname wan udp sport 1-65535 update @mapped { udp sport : ip saddr . udp sport }
    oifname wan masquerade
    ip saddr 100.64.0.0/10 ct status dnat snat to OUTSIDE
  }
  chain to_router { type filter hook input priority 0; ip daddr OUTSIDE ct state new drop; }
}";

/// The middle, and what hangs on it.
pub(crate) struct Internet {
    // Dropped first to last: processes before the namespaces they live in.
    pub(crate) coordinator: Coordinator,
    pub(crate) core: Host,
    lab: Lab,
}

impl Internet {
    /// `name` must be unique within the test binary and short.
    pub(crate) fn new(name: &str) -> Self {
        let mut lab = Lab::new(name);
        let core = lab.router("core");
        core.sh("ip addr add 203.0.113.1/32 dev lo; ip addr add 2001:db8::1/128 dev lo");
        // It answers STUN on the next port as well, by itself: enough to tell what the routers here do.
        let coordinator = Coordinator::start(&core, &["203.0.113.1", "[2001:db8::1]"], &[]);
        Self { coordinator, core, lab }
    }

    /// A host at a site of its own. There are three sites, 1 to 3.
    pub(crate) fn site(&mut self, number: u8, access: Access) -> Host {
        let core = self.core.clone();
        let outside = outside(number);
        let router = match access {
            Access::Open => {
                let host = self.lab.host(&format!("h{number}"));
                let (own, gateway) = (format!("{outside}.2/24"), format!("{outside}.1/24"));
                self.lab.link((&host, "eth0", &own), (&core, &format!("site{number}"), &gateway));
                host.sh(&format!("ip route add default via {outside}.1"));
                return host;
            }
            Access::Easy => self.router(&format!("home{number}"), &core, outside, Router::Easy),
            Access::Hard | Access::Firewall6 => self.router(&format!("home{number}"), &core, outside, Router::Hard),
            Access::NoUdp => self.router(&format!("home{number}"), &core, outside, Router::NoUdp),
            Access::Double => {
                let carrier = self.router(&format!("isp{number}"), &core, outside, Router::Easy);
                self.router(&format!("home{number}"), &carrier, &format!("100.64.{number}"), Router::Easy)
            }
        };
        let host = self.host(&router, number);
        if access == Access::Firewall6 {
            let home = format!("home{number}");
            core.sh(&format!("ip addr add 2001:db8:{number}::1/64 dev {home} nodad"));
            core.sh(&format!("ip route add 2001:db8:{number}:1::/64 via 2001:db8:{number}::2"));
            router.sh(&format!("ip addr add 2001:db8:{number}::2/64 dev wan nodad"));
            router.sh(&format!("ip addr add 2001:db8:{number}:1::1/64 dev lan nodad"));
            router.sh(&format!("ip route add default via 2001:db8:{number}::1"));
            host.sh(&format!("ip addr add 2001:db8:{number}:1::11/64 dev eth0 nodad"));
            host.sh(&format!("ip route add default via 2001:db8:{number}:1::1"));
        }
        host
    }

    /// Two hosts in one home, behind a router like [`Access::Easy`].
    pub(crate) fn same_lan(&mut self) -> [Host; 2] {
        let core = self.core.clone();
        let router = self.router("home", &core, outside(1), Router::Easy);
        [1, 2].map(|number| self.host(&router, number))
    }

    /// Two homes behind one carrier's NAT, which hairpins.
    pub(crate) fn same_carrier(&mut self) -> [Host; 2] {
        let core = self.core.clone();
        let carrier = self.router("isp", &core, outside(1), Router::Turning);
        [1, 2].map(|number| {
            let name = format!("home{number}");
            let router = self.router(&name, &carrier, &format!("100.64.{number}"), Router::Easy);
            self.host(&router, number)
        })
    }

    /// A router on a network of its own below `uplink`, with a network for a home above it.
    fn router(&mut self, name: &str, uplink: &Host, network: &str, kind: Router) -> Host {
        let router = self.lab.router(name);
        let (own, gateway) = (format!("{network}.2/24"), format!("{network}.1/24"));
        self.lab.link((&router, "wan", &own), (uplink, name, &gateway));
        router.sh(&format!("ip route add default via {network}.1; ip link add lan type bridge; ip link set lan up"));
        router.sh("ip addr add 192.168.1.1/24 dev lan");
        let masquerade = |how: &str| MASQUERADE.replace("HOW", how);
        let rules = match kind {
            Router::Easy => masquerade(""),
            Router::Hard => masquerade("random,fully-random"),
            Router::NoUdp => masquerade("") + NO_UDP,
            Router::Turning => TURNING.replace("OUTSIDE", &format!("{network}.2")),
        };
        router.sh(&format!("nft -f - <<'X'\n{FILTER}\n{rules}\nX"));
        router
    }

    /// A host in the home behind `router`.
    fn host(&mut self, router: &Host, number: u8) -> Host {
        let host = self.lab.host(&format!("h{number}"));
        let port = format!("port{number}");
        self.lab.cable((&host, "eth0"), (router, &port));
        router.sh(&format!("ip link set {port} master lan"));
        host.sh(&format!("ip addr add 192.168.1.1{number}/24 dev eth0; ip route add default via 192.168.1.1"));
        host
    }
}

/// The network between the core and a site.
fn outside(number: u8) -> &'static str {
    match number {
        1 => "198.51.100",
        2 => "192.0.2",
        _ => "198.18.3",
    }
}
