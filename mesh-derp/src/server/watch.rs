//! What another relay of the region is told about who is connected here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use mesh_noise::key::NodePublic;

use crate::frame::{Frame, GoneReason};

/// How a node is connected, as other relays are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Presence {
    /// Where it connects from.
    pub address: SocketAddr,
    /// What it is: the bits below.
    pub flags: u8,
}

impl Presence {
    /// An ordinary node. Only set when no other bit is.
    pub const REGULAR: u8 = 1;
    /// Another relay of the region.
    pub const RELAY: u8 = 2;
    /// A monitor.
    pub const PROBER: u8 = 4;
    /// A node whose preferred relay is another one of the region.
    pub const NOT_IDEAL: u8 = 8;
}

/// The news for one watcher, kept as the difference between what it was told and what is so.
///
/// A watcher that reads slowly therefore misses intermediate steps and nothing else, and what waits for it is bounded by
/// the nodes that are connected or that it believes connected, however often they come and go.
#[derive(Debug, Default)]
pub struct Watch {
    told: BTreeSet<NodePublic>,
    /// What is so now, where that is news.
    pending: BTreeMap<NodePublic, Option<Presence>>,
}

impl Watch {
    /// A watcher that has been told nothing; `connected` is the first news.
    pub fn new(connected: impl IntoIterator<Item = (NodePublic, Presence)>) -> Self {
        let pending = connected.into_iter().map(|(node, presence)| (node, Some(presence))).collect();
        Self { told: BTreeSet::new(), pending }
    }

    /// A node has connected, or connected once more.
    pub fn present(&mut self, node: NodePublic, presence: Presence) {
        self.pending.insert(node, Some(presence));
    }

    /// A node's last connection has ended.
    pub fn gone(&mut self, node: NodePublic) {
        if self.told.contains(&node) {
            self.pending.insert(node, None);
        } else {
            self.pending.remove(&node);
        }
    }

    /// The next frame for the watcher.
    pub fn poll(&mut self) -> Option<Frame> {
        let (peer, presence) = self.pending.pop_first()?;
        Some(match presence {
            Some(Presence { address, flags }) => {
                self.told.insert(peer);
                Frame::PeerPresent { peer, address: Some(address), flags }
            }
            None => {
                self.told.remove(&peer);
                Frame::PeerGone { peer, reason: GoneReason::Disconnected }
            }
        })
    }

    /// How many frames wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pending.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(number: u8) -> NodePublic {
        NodePublic::from_bytes([number; 32])
    }

    fn from_port(port: u16) -> Presence {
        Presence { address: SocketAddr::from(([192, 0, 2, 1], port)), flags: Presence::REGULAR }
    }

    #[test]
    fn a_node_that_comes_and_goes_before_the_watcher_reads_leaves_nothing_behind() {
        let mut watch = Watch::new([(node(1), from_port(1))]);
        for number in 2..200 {
            watch.present(node(number), from_port(7));
            watch.gone(node(number));
        }
        assert_eq!(watch.len(), 1);
        let Some(Frame::PeerPresent { peer, address, flags }) = watch.poll() else { panic!() };
        assert_eq!((peer, address, flags), (node(1), Some(from_port(1).address), Presence::REGULAR));
        assert!(watch.poll().is_none() && watch.is_empty());
    }

    #[test]
    fn every_further_connection_is_news_and_the_last_end_once() {
        let mut watch = Watch::default();
        watch.present(node(1), from_port(1));
        assert!(matches!(watch.poll(), Some(Frame::PeerPresent { .. })));
        watch.present(node(1), from_port(2));
        assert!(matches!(watch.poll(), Some(Frame::PeerPresent { .. })));
        watch.gone(node(1));
        assert_eq!(watch.poll(), Some(Frame::PeerGone { peer: node(1), reason: GoneReason::Disconnected }));
        watch.gone(node(1));
        assert_eq!(watch.poll(), None);
    }

    proptest! {
        #[test]
        fn a_watcher_of_any_speed_ends_up_knowing_what_is_so(
            first in proptest::collection::btree_set(0u8..6, 0..6),
            steps in proptest::collection::vec((0u8..6, any::<bool>(), 0u8..3), 0..60),
        ) {
            let mut so = first.clone();
            let mut watch = Watch::new(first.into_iter().map(|number| (node(number), from_port(0))));
            let mut believed = BTreeSet::new();
            let mut read = |watch: &mut Watch| match watch.poll() {
                Some(Frame::PeerPresent { peer, .. }) => { believed.insert(peer); true }
                Some(Frame::PeerGone { peer, .. }) => { assert!(believed.remove(&peer), "never told of"); true }
                _ => false,
            };
            for (number, here, reads) in steps {
                if here {
                    so.insert(number);
                    watch.present(node(number), from_port(1));
                } else if so.remove(&number) {
                    watch.gone(node(number));
                }
                for _ in 0..reads {
                    read(&mut watch);
                }
                prop_assert!(watch.len() <= 6);
            }
            while read(&mut watch) {}
            prop_assert_eq!(believed, so.into_iter().map(node).collect::<BTreeSet<_>>());
        }
    }
}
