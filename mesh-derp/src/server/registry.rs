//! Who is connected, and which connection a packet goes to.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use mesh_noise::key::NodePublic;

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
    /// The connections that had heard from it, in the order they were made.
    pub heard_by: Vec<H>,
}

/// All connections of a relay, by node. `H` is whatever leads to a connection's queue.
///
/// # A node connected twice
/// happens after its network changed and before the old connection is found dead. All its connections stay open and are
/// read; the *active* one gets its packets. The newest is active when it arrives; after that, any frame on another makes
/// that one active ([`Registry::touch`]). When the active one closes, the newest of the others takes over.
#[derive(Debug)]
pub struct Registry<H> {
    next: u64,
    clients: HashMap<NodePublic, ClientSet>,
    connections: HashMap<ConnectionId, Entry<H>>,
    /// Source of packets → connections that were given some.
    listeners: BTreeMap<NodePublic, BTreeSet<ConnectionId>>,
    doubled: usize,
}

impl<H> Default for Registry<H> {
    fn default() -> Self {
        Self { next: 0, clients: HashMap::new(), connections: HashMap::new(), listeners: BTreeMap::new(), doubled: 0 }
    }
}

impl<H: Clone> Registry<H> {
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
        let mut heard_by = Vec::new();
        for listener in self.listeners.remove(&node).unwrap_or_default() {
            if let Some(entry) = self.connections.get_mut(&listener) {
                entry.heard.remove(&node);
                heard_by.push(entry.handle.clone());
            }
        }
        Some(Departure { node, heard_by })
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

    /// `listener` is being given a packet from `source`, and wants to know when that node leaves.
    pub fn note_heard(&mut self, listener: ConnectionId, source: NodePublic) {
        if !self.clients.contains_key(&source) {
            return;
        }
        if let Some(entry) = self.connections.get_mut(&listener) {
            entry.heard.insert(source);
            self.listeners.entry(source).or_default().insert(listener);
        }
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(number: u8) -> NodePublic {
        NodePublic::from_bytes([number; 32])
    }

    fn active(registry: &Registry<u32>, number: u8) -> Option<u32> {
        registry.route(&node(number)).map(|(_, handle)| *handle)
    }

    #[test]
    fn the_newest_connection_is_active_until_another_speaks() {
        let mut registry = Registry::new();
        let old = registry.register(node(1), 10);
        let new = registry.register(node(1), 11);
        assert_eq!((active(&registry, 1), registry.doubled()), (Some(11), 1));
        assert!(registry.is_shadowed(old) && !registry.is_shadowed(new));
        registry.touch(old);
        assert_eq!(active(&registry, 1), Some(10));
        assert!(registry.unregister(old).is_none());
        assert_eq!((active(&registry, 1), registry.doubled()), (Some(11), 0));
        assert!(registry.unregister(new).is_some());
        assert_eq!(active(&registry, 1), None);
    }

    #[test]
    fn those_who_heard_from_a_node_learn_that_it_left() {
        let mut registry = Registry::new();
        let (a, b, c) = (registry.register(node(1), 1), registry.register(node(2), 2), registry.register(node(3), 3));
        registry.note_heard(b, node(1));
        registry.note_heard(c, node(1));
        registry.unregister(c);
        let departure = registry.unregister(a).unwrap();
        assert_eq!((departure.node, departure.heard_by), (node(1), vec![2]));
        let again = registry.register(node(1), 4);
        assert_eq!(registry.unregister(again).unwrap().heard_by, Vec::<u32>::new());
        let again = registry.register(node(1), 5);
        registry.note_heard(b, node(1));
        assert_eq!(registry.unregister(again).unwrap().heard_by, [2]);
    }

    #[test]
    fn a_second_connection_keeps_a_node_present() {
        let mut registry = Registry::new();
        let (first, _second) = (registry.register(node(1), 1), registry.register(node(1), 2));
        let listener = registry.register(node(9), 9);
        registry.note_heard(listener, node(1));
        assert!(registry.unregister(first).is_none());
        assert_eq!((registry.nodes(), registry.connections()), (2, 2));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Register(u8),
        Unregister(usize),
        Touch(usize),
        Heard(usize, u8),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u8..4).prop_map(Step::Register),
            (0usize..20).prop_map(Step::Unregister),
            (0usize..20).prop_map(Step::Touch),
            (0usize..20, 0u8..4).prop_map(|(at, number)| Step::Heard(at, number)),
        ]
    }

    proptest! {
        #[test]
        fn it_routes_as_a_plain_list_would(steps in proptest::collection::vec(any_step(), 0..60)) {
            let mut registry = Registry::new();
            // The model: connections with their node, the last of each node being its active one.
            let mut model: Vec<(ConnectionId, u8)> = Vec::new();
            for step in steps {
                match step {
                    Step::Register(number) => model.push((registry.register(node(number), u32::from(number)), number)),
                    Step::Unregister(at) if at < model.len() => {
                        let (id, number) = model.remove(at);
                        let was_active = !model[at..].iter().any(|(_, other)| *other == number);
                        let left = registry.unregister(id);
                        prop_assert_eq!(left.is_some(), !model.iter().any(|(_, other)| *other == number));
                        if was_active && left.is_none() {
                            // The newest of the others takes over.
                            let heir = (0..model.len()).filter(|i| model[*i].1 == number).max_by_key(|i| model[*i].0);
                            let heir = model.remove(heir.unwrap());
                            model.push(heir);
                        }
                    }
                    Step::Touch(at) if at < model.len() => {
                        registry.touch(model[at].0);
                        let moved = model.remove(at);
                        model.push(moved);
                    }
                    Step::Heard(at, number) if at < model.len() => registry.note_heard(model[at].0, node(number)),
                    Step::Unregister(_) | Step::Touch(_) | Step::Heard(..) => {}
                }
                for number in 0..4 {
                    let expected = model.iter().rev().find(|(_, other)| *other == number).map(|(id, _)| *id);
                    prop_assert_eq!(registry.route(&node(number)).map(|(id, _)| id), expected);
                }
                prop_assert_eq!(registry.connections(), model.len());
                let doubled = (0..4).filter(|n| model.iter().filter(|(_, other)| other == n).count() > 1).count();
                prop_assert_eq!(registry.doubled(), doubled);
            }
            for (id, _) in model {
                registry.unregister(id);
            }
            prop_assert!(registry.listeners.is_empty() && registry.clients.is_empty());
        }
    }
}
