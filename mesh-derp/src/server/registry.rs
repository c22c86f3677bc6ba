//! Who is connected, and which connection a packet goes to.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use mesh_noise::key::NodePublic;

use super::forwarders::{Forwarders, LinkId};

/// Names one connection for as long as the relay runs; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(u64);

#[derive(Debug)]
struct Entry<H> {
    node: NodePublic,
    handle: H,
    /// Nodes from which this connection has been given a packet.
    heard: BTreeSet<NodePublic>,
}

#[derive(Debug)]
struct ClientSet {
    active: ConnectionId,
    /// In order of arrival; holds `active` as well.
    all: Vec<ConnectionId>,
}

/// A node's last connection went away.
#[derive(Debug)]
pub struct Departure<H> {
    /// The node.
    pub node: NodePublic,
    /// The connections that had heard from it, in the order they were made. None if it is still at another relay of the
    /// region.
    pub heard_by: Vec<H>,
}

/// All connections of a relay, by node, and the nodes that other relays of the region have. `H` is whatever leads to a
/// connection's queue, `F` whatever leads to a link's.
///
/// # A node connected twice
/// happens after its network changed and before the old connection is found dead. All its connections stay open and are
/// read; the *active* one gets its packets. The newest is active when it arrives; after that, any frame on another makes
/// that one active ([`Registry::touch`]). When the active one closes, the newest of the others takes over.
///
/// # A node at another relay
/// is known from that relay's PeerPresent and PeerGone, which come over this one's link to it. Of several such relays the
/// one that has said so longest gets its packets. When the last of them has lost it, by PeerGone or because the link
/// broke, it stays *in doubt* for [`DOUBT`](super::DOUBT): its packets go nowhere, but nobody is told that it left, since
/// it is most likely on its way to another relay of the region. Only then are those told who had heard from it.
#[derive(Debug)]
pub struct Registry<H, F = ()> {
    next: u64,
    clients: HashMap<NodePublic, ClientSet>,
    connections: HashMap<ConnectionId, Entry<H>>,
    /// Source of packets → connections that were given some.
    listeners: BTreeMap<NodePublic, BTreeSet<ConnectionId>>,
    doubled: usize,
    watchers: BTreeSet<ConnectionId>,
    elsewhere: Forwarders<F>,
}

impl<H, F> Default for Registry<H, F> {
    fn default() -> Self {
        Self {
            next: 0,
            clients: HashMap::new(),
            connections: HashMap::new(),
            listeners: BTreeMap::new(),
            doubled: 0,
            watchers: BTreeSet::new(),
            elsewhere: Forwarders::default(),
        }
    }
}

impl<H: Clone, F> Registry<H, F> {
    /// A registry without connections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a connection and makes it the active one of its node.
    pub fn register(&mut self, node: NodePublic, handle: H) -> ConnectionId {
        let id = ConnectionId(self.next);
        self.next += 1;
        self.connections.insert(id, Entry { node, handle, heard: BTreeSet::new() });
        self.elsewhere.settle(&node);
        match self.clients.get_mut(&node) {
            Some(set) => {
                self.doubled += usize::from(set.all.len() == 1);
                set.all.push(id);
                set.active = id;
            }
            None => {
                self.clients.insert(node, ClientSet { active: id, all: vec![id] });
            }
        }
        id
    }

    /// Removes a connection. If it was its node's last, says who is to be told.
    pub fn unregister(&mut self, id: ConnectionId) -> Option<Departure<H>> {
        let Entry { node, heard, .. } = self.connections.remove(&id)?;
        self.watchers.remove(&id);
        for source in heard {
            if let Some(listeners) = self.listeners.get_mut(&source) {
                listeners.remove(&id);
                if listeners.is_empty() {
                    self.listeners.remove(&source);
                }
            }
        }
        let set = self.clients.get_mut(&node)?;
        set.all.retain(|other| *other != id);
        if let Some(newest) = set.all.last() {
            self.doubled -= usize::from(set.all.len() == 1);
            if set.active == id {
                set.active = *newest;
            }
            return None;
        }
        self.clients.remove(&node);
        let heard_by = if self.elsewhere.has(&node) { Vec::new() } else { self.take_listeners(&node) };
        Some(Departure { node, heard_by })
    }

    fn take_listeners(&mut self, node: &NodePublic) -> Vec<H> {
        let mut handles = Vec::new();
        for listener in self.listeners.remove(node).unwrap_or_default() {
            if let Some(entry) = self.connections.get_mut(&listener) {
                entry.heard.remove(node);
                handles.push(entry.handle.clone());
            }
        }
        handles
    }

    /// Whose connection that is.
    #[must_use]
    pub fn node(&self, id: ConnectionId) -> Option<NodePublic> {
        self.connections.get(&id).map(|entry| entry.node)
    }

    /// The connection that gets a packet for `destination`.
    #[must_use]
    pub fn route(&self, destination: &NodePublic) -> Option<(ConnectionId, &H)> {
        let active = self.clients.get(destination)?.active;
        self.connections.get(&active).map(|entry| (active, &entry.handle))
    }

    /// Whether a frame on `id` would make it active. Nearly always no, and cheap.
    #[must_use]
    pub fn is_shadowed(&self, id: ConnectionId) -> bool {
        let set = self.connections.get(&id).and_then(|entry| self.clients.get(&entry.node));
        self.doubled > 0 && set.is_some_and(|set| set.active != id)
    }

    /// A frame came on `id`: it becomes its node's active connection.
    pub fn touch(&mut self, id: ConnectionId) {
        let Some(entry) = self.connections.get(&id) else { return };
        if let Some(set) = self.clients.get_mut(&entry.node) {
            set.active = id;
        }
    }

    /// Whether [`Registry::note_heard`] would change something.
    #[must_use]
    pub fn is_new_to(&self, listener: ConnectionId, source: &NodePublic) -> bool {
        self.in_region(source) && self.connections.get(&listener).is_some_and(|entry| !entry.heard.contains(source))
    }

    fn in_region(&self, node: &NodePublic) -> bool {
        self.clients.contains_key(node) || self.elsewhere.has(node) || self.elsewhere.doubts(node)
    }

    /// `listener` is being given a packet from `source`, and wants to know when that node leaves the region.
    pub fn note_heard(&mut self, listener: ConnectionId, source: NodePublic) {
        if !self.in_region(&source) {
            return;
        }
        if let Some(entry) = self.connections.get_mut(&listener) {
            entry.heard.insert(source);
            self.listeners.entry(source).or_default().insert(listener);
        }
    }

    /// Every node that is connected here, with its active connection, in the order of their keys.
    #[must_use]
    pub fn present(&self) -> Vec<(NodePublic, H)> {
        let handle = |set: &ClientSet| self.connections.get(&set.active).map(|entry| entry.handle.clone());
        let mut present: Vec<_> =
            self.clients.iter().filter_map(|(node, set)| handle(set).map(|handle| (*node, handle))).collect();
        present.sort_unstable_by_key(|(node, _)| *node);
        present
    }

    /// This connection is another relay's, and wants to be told who comes and goes.
    pub fn watch(&mut self, id: ConnectionId) {
        if self.connections.contains_key(&id) {
            self.watchers.insert(id);
        }
    }

    /// The connections that want to be told who comes and goes, in the order in which they were made.
    pub fn watchers(&self) -> impl Iterator<Item = &H> {
        self.watchers.iter().filter_map(|id| self.connections.get(id)).map(|entry| &entry.handle)
    }

    /// Adds a link to another relay of the region. It brings no nodes until they are named.
    pub fn add_link(&mut self, handle: F) -> LinkId {
        self.elsewhere.add(handle)
    }

    /// The relay at the other end has a node.
    pub fn link_present(&mut self, link: LinkId, node: NodePublic) {
        self.elsewhere.present(link, node);
    }

    /// The relay at the other end has a node no more, or never had it.
    pub fn link_gone(&mut self, now: Instant, link: LinkId, node: &NodePublic) {
        if self.elsewhere.gone(link, node) && !self.clients.contains_key(node) {
            self.elsewhere.doubt(now, *node);
        }
    }

    /// A link broke, and takes all that it brought with it.
    pub fn remove_link(&mut self, now: Instant, link: LinkId) {
        for node in self.elsewhere.remove(link) {
            if !self.clients.contains_key(&node) {
                self.elsewhere.doubt(now, node);
            }
        }
    }

    /// The link that gets a packet for `destination`, for which there is no connection here.
    #[must_use]
    pub fn forwarder(&self, destination: &NodePublic) -> Option<&F> {
        self.elsewhere.route(destination)
    }

    /// Whether a node that no relay of the region has may be back any moment.
    #[must_use]
    pub fn is_in_doubt(&self, node: &NodePublic) -> bool {
        self.elsewhere.doubts(node)
    }

    /// When [`Registry::poll_departure`] may have something to say.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.elsewhere.next_due()
    }

    /// A node that was at another relay and has not come back in time.
    pub fn poll_departure(&mut self, now: Instant) -> Option<Departure<H>> {
        let node = self.elsewhere.take_due(now)?;
        Some(Departure { node, heard_by: self.take_listeners(&node) })
    }

    /// How many links there are.
    #[must_use]
    pub fn links(&self) -> usize {
        self.elsewhere.links()
    }

    /// How many nodes other relays of the region have.
    #[must_use]
    pub fn nodes_elsewhere(&self) -> usize {
        self.elsewhere.nodes()
    }

    /// How many nodes are connected.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.clients.len()
    }

    /// How many connections there are.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// How many nodes have more than one.
    #[must_use]
    pub const fn doubled(&self) -> usize {
        self.doubled
    }

    /// Every connection's handle, in the order they were made.
    #[must_use]
    pub fn handles(&self) -> Vec<H> {
        let mut ids: Vec<_> = self.connections.keys().copied().collect();
        ids.sort_unstable();
        ids.iter().filter_map(|id| self.connections.get(id)).map(|entry| entry.handle.clone()).collect()
    }
}

#[cfg(test)]
mod tests;
