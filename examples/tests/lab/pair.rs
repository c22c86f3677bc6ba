//! Two of our nodes on either side of a hub that forwards, and has coordinator, relay and STUN on one of its addresses.
//!
//! ```text
//!   a 198.51.100.2 ── to-a, 198.51.100.1 hub 192.0.2.1, to-b ── 192.0.2.2 b
//! ```

use super::mesh::{Coordinator, Node};
use super::{Host, Lab};

pub(crate) struct Pair {
    // Dropped first to last: processes before the namespaces they live in.
    pub(crate) a: Node,
    pub(crate) b: Node,
    pub(crate) coordinator: Coordinator,
    _lab: Lab,
}

impl Pair {
    /// Joins two nodes named `a` and `b`. `prepare` may change the hub, a and b before any program of ours starts.
    pub(crate) fn new(name: &str, prepare: impl FnOnce(&Host, &Host, &Host)) -> Self {
        let mut lab = Lab::new(name);
        let hub = lab.router("hub");
        let (a, b) = (lab.host("a"), lab.host("b"));
        lab.link((&hub, "to-a", "198.51.100.1/24"), (&a, "eth0", "198.51.100.2/24"));
        lab.link((&hub, "to-b", "192.0.2.1/24"), (&b, "eth0", "192.0.2.2/24"));
        a.sh("ip route add default via 198.51.100.1");
        b.sh("ip route add default via 192.0.2.1");
        prepare(&hub, &a, &b);
        let coordinator = Coordinator::start(&hub, &["198.51.100.1"], &[]);
        let [a, b] = [("a", a), ("b", b)].map(|(name, host)| Node::join(&host, &coordinator, name));
        Self { a, b, coordinator, _lab: lab }
    }
}
