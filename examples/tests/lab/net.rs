//! Three hosts around a router: a coordinator on the hub, and two hosts for nodes.
//!
//! ```text
//!        hub 203.0.113.2 or 2001:db8:1::2 (coordinator, relay, STUN)
//!             │
//!   ours ── router ── theirs          every host on a subnet of its own; the router's
//! 198.51.100.2     192.0.2.2          packet filter counts, and may drop, UDP between the two
//! 2001:db8:2::2    2001:db8:3::2
//! ```

use serde_json::Value;

use super::mesh::{Coordinator, Node};
use super::{Host, Lab};

/// Which addresses the hosts have.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Families {
    V4,
    V6,
}

/// Three hosts around a router, with a coordinator running on the hub.
pub(crate) struct Net {
    // Dropped first to last: processes before the namespaces they live in.
    pub(crate) coordinator: Coordinator,
    pub(crate) router: Host,
    pub(crate) ours: Host,
    pub(crate) theirs: Host,
    _lab: Lab,
}

impl Net {
    pub(crate) fn new(name: &str, families: Families, options: &[&str]) -> Self {
        let mut lab = Lab::new(name);
        let router = lab.router("r");
        let hosts = ["hub", "ours", "theirs"].map(|name| lab.host(name));
        let (networks, length) = match families {
            Families::V4 => (["203.0.113.", "198.51.100.", "192.0.2."], 24),
            Families::V6 => (["2001:db8:1::", "2001:db8:2::", "2001:db8:3::"], 64),
        };
        for (host, (network, end)) in hosts.iter().zip(networks.iter().zip(["hub", "ours", "theirs"])) {
            let (own, gateway) = (format!("{network}2/{length}"), format!("{network}1/{length}"));
            lab.link((host, "eth0", &own), (&router, end, &gateway));
            host.sh(&format!("ip route add default via {network}1"));
        }
        router.sh("nft -f - <<X
table inet lab {
  counter between { }
  set blocked { type inet_proto; }
  chain forward {
    type filter hook forward priority 0; policy accept;
    ip saddr { 198.51.100.0/24, 192.0.2.0/24 } ip daddr { 198.51.100.0/24, 192.0.2.0/24 } meta l4proto @blocked drop
    ip saddr { 198.51.100.0/24, 192.0.2.0/24 } ip daddr { 198.51.100.0/24, 192.0.2.0/24 } meta l4proto udp counter name between
  }
}
X");
        let [hub, ours, theirs] = hosts;
        let address = match families {
            Families::V4 => "203.0.113.2",
            Families::V6 => "[2001:db8:1::2]",
        };
        let coordinator = Coordinator::start(&hub, &[address], options);
        Self { coordinator, router, ours, theirs, _lab: lab }
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

    /// Our node, up and running.
    pub(crate) fn our_node(&self) -> Node {
        Node::join(&self.ours, &self.coordinator, "ours")
    }
}
