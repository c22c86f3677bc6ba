//! Which relay of a region to connect to, by which address, and when to try another: the decisions, without any I/O.
//!
//! ```text
//!   0 ms          125 ms        250 ms        375 ms     …   10 s
//!   first node    first node    second node   second node    give up
//!   one family    the other     one family    the other
//!        │
//!        └─ TCP connected ─► TLS, HTTP ─► done: whoever is first. For a second after TCP, no further node begins.
//! ```
//!
//! [`Dialling`] is one round of attempts at a region. Nodes begin 250 ms apart, the addresses of one node 125 ms apart and
//! IPv6 and IPv4 in turn (RFC 8305, §4 to §6), and whatever fails makes the next begin at once. So a dead first node costs a
//! quarter of a second if it is silent, and nothing if it refuses. A node that has accepted TCP gets a second for the
//! rest before others are bothered: on a long path that is no failure. Names are looked up when their node's turn comes,
//! each beside everything else.
//!
//! [`History`] is what rounds leave behind for the next one. Three rules make the order:
//! 1. The map's order: all nodes of a region pass packets to one another, but each hop costs, so everybody prefers the first.
//! 2. Before it the node that last worked, for [`REMEMBERED`]: who comes back should not pay for a dead node again.
//! 3. After all others those that have failed at a later stage (the login, or by falling silent) within [`FORGIVEN`]: they
//!    look alive to TCP, and would be chosen again and again.
//!
//! Whoever is connected to another than the first node tries that one from time to time ([`History::return_after`]),
//! beside the connection that works.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::map::{DerpNode, DerpRegion, FamilyAddress};

/// Between the beginnings of two nodes' attempts.
pub const NODE_DELAY: Duration = Duration::from_millis(250);
/// Between the beginnings of attempts at two addresses of one node.
pub const ADDRESS_DELAY: Duration = Duration::from_millis(125);
/// How long a node that has accepted TCP keeps further nodes from being tried.
pub const UPGRADE_PATIENCE: Duration = Duration::from_secs(1);
/// How long the node that last worked is preferred, counted from when it last did.
pub const REMEMBERED: Duration = Duration::from_secs(600);
/// How long a node that failed after TCP and TLS comes after all others.
pub const FORGIVEN: Duration = Duration::from_secs(30);
/// When the first node of a region is tried beside a connection to another one, at first and at most.
const RETURN: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(600));
/// How many addresses of one family a name may give.
const MAX_ADDRESSES: usize = 4;

/// Where an attempt goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// To the relay.
    Address(SocketAddr),
    /// To the proxy, which looks up the relay's name itself.
    Proxy,
}

/// One attempt at one node of the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt {
    /// The node's place in [`DerpRegion::nodes`].
    pub node: usize,
    /// Where to.
    pub target: Target,
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Look up the name of a node; the answer goes to [`Dialling::handle_addresses`].
    LookUp {
        /// The node's place in [`DerpRegion::nodes`].
        node: usize,
    },
    /// Open a TCP connection. The outcome goes to [`Dialling::handle_connected`] or [`Dialling::handle_failure`].
    Connect(Attempt),
    /// Nothing has worked and nothing is left to try, or the time is up.
    GiveUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Waiting,
    Trying,
    Upgrading { attempt: Attempt, since: Instant },
    Failed,
}

#[derive(Debug, Default)]
struct Addresses {
    v4: VecDeque<SocketAddr>,
    v6: VecDeque<SocketAddr>,
    v6_is_next: bool,
}

impl Addresses {
    fn push(&mut self, ip: IpAddr, port: u16) {
        let line = if ip.is_ipv6() { &mut self.v6 } else { &mut self.v4 };
        let address = SocketAddr::new(ip, port);
        if line.len() < MAX_ADDRESSES && !line.contains(&address) {
            line.push_back(address);
        }
    }

    fn pop(&mut self) -> Option<SocketAddr> {
        let (first, second) = if self.v6_is_next { (&mut self.v6, &mut self.v4) } else { (&mut self.v4, &mut self.v6) };
        let address = first.pop_front().or_else(|| second.pop_front())?;
        self.v6_is_next = address.is_ipv4();
        Some(address)
    }

    fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

/// The attempts at one node.
#[derive(Debug)]
struct Lane {
    node: usize,
    port: u16,
    by_proxy: bool,
    /// For which families the name is asked.
    ask: (bool, bool),
    asking: bool,
    addresses: Addresses,
    running: usize,
    next_address: Instant,
    progress: Progress,
}

impl Lane {
    fn new(at: usize, node: &DerpNode, by_proxy: bool, v6_first: bool, now: Instant) -> Self {
        let (v4, v6) = (node.v4(), node.v6());
        let mut addresses = Addresses { v6_is_next: v6_first, ..Addresses::default() };
        if let FamilyAddress::At(ip) = v4
            && !by_proxy
        {
            addresses.push(ip.into(), node.relay_port());
        }
        if let FamilyAddress::At(ip) = v6
            && !by_proxy
        {
            addresses.push(ip.into(), node.relay_port());
        }
        Self {
            node: at,
            port: node.relay_port(),
            by_proxy,
            ask: (v4 == FamilyAddress::Lookup, v6 == FamilyAddress::Lookup),
            asking: false,
            addresses,
            running: 0,
            next_address: now,
            progress: Progress::Waiting,
        }
    }

    fn begin(&mut self, now: Instant, actions: &mut VecDeque<Action>) {
        self.progress = Progress::Trying;
        self.next_address = now;
        if self.by_proxy {
            self.running = 1;
            actions.push_back(Action::Connect(Attempt { node: self.node, target: Target::Proxy }));
            return;
        }
        if self.ask != (false, false) {
            self.asking = true;
            actions.push_back(Action::LookUp { node: self.node });
        }
        self.go_on(now, actions);
    }

    /// Tries the next address if it is time, and notices when none is left.
    fn go_on(&mut self, now: Instant, actions: &mut VecDeque<Action>) {
        if self.progress != Progress::Trying {
            return;
        }
        if (self.running == 0 || now >= self.next_address)
            && let Some(address) = self.addresses.pop()
        {
            self.running += 1;
            self.next_address = now + ADDRESS_DELAY;
            actions.push_back(Action::Connect(Attempt { node: self.node, target: Target::Address(address) }));
        }
        if self.running == 0 && !self.asking {
            self.progress = Progress::Failed;
        }
    }

    fn timeout(&self) -> Option<Instant> {
        (self.progress == Progress::Trying && !self.addresses.is_empty()).then_some(self.next_address)
    }
}

/// One round of attempts at the nodes of a region. See the [module doc](self).
#[derive(Debug)]
pub struct Dialling {
    lanes: Vec<Lane>,
    begun: usize,
    last_begin: Instant,
    deadline: Instant,
    over: bool,
    actions: VecDeque<Action>,
}

impl Dialling {
    /// Begins a round at `now` that may take as long as `budget`. `by_proxy` says which nodes are reached through a proxy.
    pub fn new(
        now: Instant,
        region: &DerpRegion,
        history: &History,
        by_proxy: impl Fn(&DerpNode) -> bool,
        budget: Duration,
    ) -> Self {
        Self::with_order(now, region, &history.order(now, region), history, by_proxy, budget)
    }

    /// Begins a round with these nodes alone, in this order.
    pub fn with_order(
        now: Instant,
        region: &DerpRegion,
        order: &[usize],
        history: &History,
        by_proxy: impl Fn(&DerpNode) -> bool,
        budget: Duration,
    ) -> Self {
        let lane = |at: &usize| {
            let node = region.nodes.get(*at)?;
            Some(Lane::new(*at, node, by_proxy(node), history.prefers_v6(&node.name), now))
        };
        let lanes = order.iter().filter_map(lane).collect();
        let actions = VecDeque::new();
        let mut dialling = Self { lanes, begun: 0, last_begin: now, deadline: now + budget, over: false, actions };
        dialling.go_on(now);
        dialling
    }

    /// What is to be done next.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Dialling::handle_timeout`] has something to do.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.over {
            return None;
        }
        let lanes = self.lanes.iter().filter_map(Lane::timeout);
        lanes.chain(self.next_begin()).chain([self.deadline]).min()
    }

    /// Does whatever is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        for lane in &mut self.lanes {
            if lane.timeout().is_some_and(|at| now >= at) {
                lane.go_on(now, &mut self.actions);
            }
        }
        self.go_on(now);
    }

    /// The name of a node has been looked up: what it gives, which may be nothing.
    pub fn handle_addresses(&mut self, now: Instant, node: usize, found: &[IpAddr]) {
        if let Some(lane) = self.lanes.iter_mut().find(|lane| lane.node == node && lane.asking) {
            lane.asking = false;
            for ip in found.iter().filter(|ip| if ip.is_ipv4() { lane.ask.0 } else { lane.ask.1 }) {
                lane.addresses.push(*ip, lane.port);
            }
            lane.go_on(now, &mut self.actions);
        }
        self.go_on(now);
    }

    /// An attempt has a TCP connection. Whether to go on with TLS and HTTP: not if another attempt at the same node already
    /// does.
    #[must_use]
    pub fn handle_connected(&mut self, now: Instant, attempt: Attempt) -> bool {
        let Some(lane) = self.lane(attempt) else { return false };
        if lane.progress != Progress::Trying {
            return false;
        }
        lane.progress = Progress::Upgrading { attempt, since: now };
        true
    }

    /// An attempt has failed, at whatever stage.
    pub fn handle_failure(&mut self, now: Instant, attempt: Attempt) {
        let Some(lane) = self.lanes.iter_mut().find(|lane| lane.node == attempt.node) else { return };
        match lane.progress {
            Progress::Trying => {
                lane.running = lane.running.saturating_sub(1);
                lane.next_address = now;
                lane.go_on(now, &mut self.actions);
            }
            // Another address leads to the same relay, which has just said no.
            Progress::Upgrading { attempt: upgrading, .. } if upgrading == attempt => lane.progress = Progress::Failed,
            Progress::Upgrading { .. } | Progress::Waiting | Progress::Failed => {}
        }
        self.go_on(now);
    }

    fn lane(&mut self, attempt: Attempt) -> Option<&mut Lane> {
        self.lanes.iter_mut().find(|lane| lane.node == attempt.node)
    }

    /// When the next node's turn comes.
    fn next_begin(&self) -> Option<Instant> {
        if self.begun == self.lanes.len() {
            return None;
        }
        let begun = &self.lanes[..self.begun];
        if begun.iter().all(|lane| lane.progress == Progress::Failed) {
            return Some(self.last_begin);
        }
        let upgrading = begun.iter().filter_map(|lane| match lane.progress {
            Progress::Upgrading { since, .. } => Some(since + UPGRADE_PATIENCE),
            Progress::Waiting | Progress::Trying | Progress::Failed => None,
        });
        upgrading.chain([self.last_begin + NODE_DELAY]).max()
    }

    fn go_on(&mut self, now: Instant) {
        while self.next_begin().is_some_and(|at| now >= at) {
            self.lanes[self.begun].begin(now, &mut self.actions);
            self.begun += 1;
            self.last_begin = now;
        }
        let exhausted =
            self.begun == self.lanes.len() && self.lanes.iter().all(|lane| lane.progress == Progress::Failed);
        if !self.over && (exhausted || now >= self.deadline) {
            self.over = true;
            self.actions.push_back(Action::GiveUp);
        }
    }
}

/// How a node was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Via {
    /// Whether by IPv6; `None` through a proxy.
    pub v6: Option<bool>,
    /// Whether inside WebSocket messages, since nothing else got through.
    pub websocket: bool,
}

#[derive(Debug, Clone)]
struct Good {
    node: String,
    via: Via,
    at: Instant,
}

/// What earlier rounds have shown about the nodes of a region. See the [module doc](self).
#[derive(Debug, Clone, Default)]
pub struct History {
    good: Option<Good>,
    failed: BTreeMap<String, Instant>,
    returns: u32,
}

impl History {
    /// A node works, or has worked until now.
    pub fn note_good(&mut self, now: Instant, node: &str, via: Via) {
        self.failed.remove(node);
        self.good = Some(Good { node: node.to_owned(), via, at: now });
    }

    /// A node that could be connected to has refused the login, has ended the connection at once, or has fallen silent.
    pub fn note_failed(&mut self, now: Instant, node: &str) {
        self.failed.retain(|_, at| now.saturating_duration_since(*at) < FORGIVEN);
        self.failed.insert(node.to_owned(), now);
        if self.good.as_ref().is_some_and(|good| good.node == node) {
            self.good = None;
        }
    }

    /// The nodes that relay, in the order in which they are to be tried: places in [`DerpRegion::nodes`].
    #[must_use]
    pub fn order(&self, now: Instant, region: &DerpRegion) -> Vec<usize> {
        let good = self.good.as_ref().filter(|good| now.saturating_duration_since(good.at) < REMEMBERED);
        let failed = |node: &DerpNode| {
            let at = self.failed.get(&node.name).copied();
            at.filter(|at| now.saturating_duration_since(*at) < FORGIVEN)
        };
        let mut order: Vec<usize> = (0..region.nodes.len()).filter(|at| !region.nodes[*at].stun_only).collect();
        // Of those that have failed, the one whose failure is longest ago comes first.
        order.sort_by_key(|at| {
            let node = &region.nodes[*at];
            (failed(node), good.is_none_or(|good| good.node != node.name))
        });
        order
    }

    /// Whether IPv6 comes first at this node: unless IPv4 is what last worked.
    #[must_use]
    pub fn prefers_v6(&self, node: &str) -> bool {
        self.via(node).is_none_or(|via| via.v6 != Some(false))
    }

    /// Whether this node was last reached inside WebSocket messages only.
    #[must_use]
    pub fn prefers_websocket(&self, node: &str) -> bool {
        self.via(node).is_some_and(|via| via.websocket)
    }

    /// How long to be content with another node before the region's first one is tried again: 30 s, and twice as long after
    /// each time that did not help, up to 10 min. The caller adds jitter.
    #[must_use]
    pub fn return_after(&self) -> Duration {
        RETURN.0.saturating_mul(1 << self.returns.min(8)).min(RETURN.1)
    }

    /// The first node is being tried beside another one.
    pub fn note_return(&mut self) {
        self.returns = self.returns.saturating_add(1);
    }

    /// The first node has proven itself.
    pub fn note_returned(&mut self) {
        self.returns = 0;
    }

    fn via(&self, node: &str) -> Option<Via> {
        self.good.as_ref().filter(|good| good.node == node).map(|good| good.via)
    }
}

/// The node that all of a region prefer: the first that relays.
#[must_use]
pub fn ideal(region: &DerpRegion) -> Option<usize> {
    region.nodes.iter().position(|node| !node.stun_only)
}

#[cfg(test)]
mod tests;
