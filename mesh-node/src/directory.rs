//! Names and addresses of the nodes in the mesh, for everything that is asked for one by name.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_control::netmap::Netmap;
use mesh_noise::key::NodePublic;

/// One node by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its node key.
    pub key: NodePublic,
    /// Its full name in lower case, without a final dot.
    pub name: String,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
}

impl Entry {
    /// The name up to the first dot.
    #[must_use]
    pub fn short(&self) -> &str {
        self.name.split('.').next().unwrap_or(&self.name)
    }
}

/// All nodes of a network map by name and address; immutable, replaced as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Directory {
    entries: Vec<Entry>,
    this: Option<usize>,
    by_name: BTreeMap<String, usize>,
    by_address: BTreeMap<IpAddr, usize>,
    suffix: String,
}

impl Directory {
    /// A directory of `nodes`, of which `this` is our own.
    #[must_use]
    pub fn new(this: Option<Entry>, nodes: impl IntoIterator<Item = Entry>) -> Self {
        let mut directory = Self::default();
        if let Some(this) = this {
            directory.suffix = this.name.split_once('.').map(|(_, suffix)| suffix.to_owned()).unwrap_or_default();
            directory.this = Some(0);
            directory.add(this);
        }
        for node in nodes {
            directory.add(node);
        }
        directory
    }

    /// The directory of `netmap`.
    #[must_use]
    pub fn of(netmap: &Netmap) -> Self {
        let entry = |node: &mesh_control::wire::Node| Entry {
            key: node.key,
            name: node.name.trim_end_matches('.').to_ascii_lowercase(),
            addresses: node.addresses.iter().map(ipnet::IpNet::addr).collect(),
        };
        Self::new(netmap.node().map(entry), netmap.peers().values().map(|node| entry(node)))
    }

    fn add(&mut self, entry: Entry) {
        let index = self.entries.len();
        for address in &entry.addresses {
            self.by_address.entry(*address).or_insert(index);
        }
        // A node that is shared in from elsewhere is known by its full name only.
        if self.suffix.is_empty() || entry.name.split_once('.').is_some_and(|(_, suffix)| suffix == self.suffix) {
            self.by_name.entry(entry.short().to_owned()).or_insert(index);
        }
        self.by_name.insert(entry.name.clone(), index);
        self.entries.push(entry);
    }

    /// The domain that names in this mesh end with, without dots around it; empty before the first map.
    #[must_use]
    pub fn suffix(&self) -> &str {
        &self.suffix
    }

    /// Our own entry.
    #[must_use]
    pub fn this(&self) -> Option<&Entry> {
        self.entries.get(self.this?)
    }

    /// All entries.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// Finds a node by its full or short name, in any case, with or without a final dot.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<&Entry> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        self.entries.get(*self.by_name.get(&name)?)
    }

    /// Finds a node by one of its addresses.
    #[must_use]
    pub fn by_address(&self, address: IpAddr) -> Option<&Entry> {
        self.entries.get(*self.by_address.get(&address.to_canonical())?)
    }

    /// Finds a node by an address or a name.
    #[must_use]
    pub fn find(&self, name_or_address: &str) -> Option<&Entry> {
        match name_or_address.trim_start_matches('[').trim_end_matches(']').parse() {
            Ok(address) => self.by_address(address),
            Err(_) => self.by_name(name_or_address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u8, name: &str) -> Entry {
        Entry {
            key: NodePublic::from_bytes([number; 32]),
            name: name.to_owned(),
            addresses: vec![IpAddr::from([100, 64, 0, number])],
        }
    }

    #[test]
    fn nodes_are_found_by_short_and_full_name_and_by_address() {
        let directory =
            Directory::new(Some(entry(1, "one.mesh.test")), [entry(2, "two.mesh.test"), entry(3, "two.other.test")]);
        assert_eq!(directory.suffix(), "mesh.test");
        let key = |found: Option<&Entry>| found.map(|entry| entry.key.as_bytes()[0]);
        assert_eq!(key(directory.find("two")), Some(2));
        assert_eq!(key(directory.find("TWO.mesh.test.")), Some(2));
        assert_eq!(key(directory.find("two.other.test")), Some(3));
        assert_eq!(key(directory.find("100.64.0.1")), Some(1));
        assert_eq!(key(directory.find("::ffff:100.64.0.3")), Some(3));
        assert_eq!(key(directory.find("three")), None);
        assert_eq!(key(directory.this()), Some(1));
    }
}
