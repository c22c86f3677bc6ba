//! Which nodes are reached through which other relay of the region.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;

/// How long a node that was last seen at another relay may be on its way to the next one before it counts as gone: a
/// relay that dies breaks its link at once, and its clients need a moment to find another.
pub const DOUBT: Duration = Duration::from_secs(3);

/// Names one link to another relay for as long as this one runs; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(u64);

#[derive(Debug)]
struct Link<F> {
    handle: F,
    nodes: BTreeSet<NodePublic>,
}

/// The links, the nodes behind each, and the nodes that were behind one a moment ago. `F` is whatever leads to a link's
/// queue.
#[derive(Debug)]
pub(super) struct Forwarders<F> {
    next: u64,
    links: BTreeMap<LinkId, Link<F>>,
    /// For each node the links behind which it is, in the order in which they said so. Never empty.
    nodes: HashMap<NodePublic, Vec<LinkId>>,
    doubts: HashMap<NodePublic, Instant>,
    /// The same as `doubts`, soonest first.
    due: BTreeSet<(Instant, NodePublic)>,
}

impl<F> Default for Forwarders<F> {
    fn default() -> Self {
        let (links, nodes, doubts, due) = (BTreeMap::new(), HashMap::new(), HashMap::new(), BTreeSet::new());
        Self { next: 0, links, nodes, doubts, due }
    }
}

impl<F> Forwarders<F> {
    pub(super) fn add(&mut self, handle: F) -> LinkId {
        let id = LinkId(self.next);
        self.next += 1;
        self.links.insert(id, Link { handle, nodes: BTreeSet::new() });
        id
    }

    /// A relay says that a node is connected to it.
    pub(super) fn present(&mut self, id: LinkId, node: NodePublic) {
        let Some(link) = self.links.get_mut(&id) else { return };
        if link.nodes.insert(node) {
            self.nodes.entry(node).or_default().push(id);
            self.settle(&node);
        }
    }

    /// A relay says that a node is not connected to it. Says whether no relay has that node any more.
    pub(super) fn gone(&mut self, id: LinkId, node: &NodePublic) -> bool {
        let known = self.links.get_mut(&id).is_some_and(|link| link.nodes.remove(node));
        known && self.forget(id, node)
    }

    /// A link broke. Says which nodes no relay has any more.
    pub(super) fn remove(&mut self, id: LinkId) -> Vec<NodePublic> {
        let nodes = self.links.remove(&id).map(|link| link.nodes).unwrap_or_default();
        nodes.into_iter().filter(|node| self.forget(id, node)).collect()
    }

    fn forget(&mut self, id: LinkId, node: &NodePublic) -> bool {
        let Some(links) = self.nodes.get_mut(node) else { return false };
        links.retain(|other| *other != id);
        let last = links.is_empty();
        if last {
            self.nodes.remove(node);
        }
        last
    }

    /// The link that takes packets for a node: the one that has known it longest.
    pub(super) fn route(&self, node: &NodePublic) -> Option<&F> {
        let oldest = self.nodes.get(node)?.first()?;
        self.links.get(oldest).map(|link| &link.handle)
    }

    pub(super) fn has(&self, node: &NodePublic) -> bool {
        self.nodes.contains_key(node)
    }

    pub(super) fn doubts(&self, node: &NodePublic) -> bool {
        self.doubts.contains_key(node)
    }

    /// Nobody has the node; it may come back until [`DOUBT`] from now.
    pub(super) fn doubt(&mut self, now: Instant, node: NodePublic) {
        self.settle(&node);
        self.doubts.insert(node, now + DOUBT);
        self.due.insert((now + DOUBT, node));
    }

    /// Somebody has the node.
    pub(super) fn settle(&mut self, node: &NodePublic) {
        if let Some(at) = self.doubts.remove(node) {
            self.due.remove(&(at, *node));
        }
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// A node that has not come back in time.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<NodePublic> {
        let (_, node) = *self.due.first().filter(|(at, _)| *at <= now)?;
        self.settle(&node);
        Some(node)
    }

    /// How many nodes are reached through other relays.
    pub(super) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn links(&self) -> usize {
        self.links.len()
    }
}
