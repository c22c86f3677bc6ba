//! The recent past, for streams that have not seen it yet.

use std::collections::{BTreeMap, VecDeque};

use crate::server::event::{Change, NodeChange};
use crate::server::record::NodeId;

/// A place in a [`Changelog`]: everything before it has been seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position(u64);

/// Something that streams may have to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// A node joined or changed in this way.
    Node(NodeId, NodeChange),
    /// A node is gone.
    Removed(NodeId),
    /// A node came online or went offline.
    Presence(NodeId),
    /// The relays changed.
    DerpMap,
}

impl Notice {
    /// What an event means to streams; `None`: nothing.
    #[must_use]
    pub fn of(change: &Change) -> Option<Self> {
        match change {
            Change::NodePut { node, what } => Some(Self::Node(node.id, *what)),
            Change::NodeRemoved(node) => Some(Self::Removed(node.id)),
            Change::UserCreated(_)
            | Change::KeyCreated(_)
            | Change::KeyUsed(_)
            | Change::CodePut(_)
            | Change::CodeRemoved(_)
            | Change::LoginPut(_)
            | Change::LoginRemoved(_) => None,
        }
    }
}

/// What is new about one node, over any number of notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NodeNews {
    /// Needs the whole node.
    pub whole: bool,
    /// A patch will do.
    pub patch: bool,
    /// It came or went.
    pub presence: bool,
    /// Only the node itself is told.
    pub own: bool,
}

/// A sum of notices.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Changes {
    /// By node. One that no longer exists was removed.
    pub nodes: BTreeMap<NodeId, NodeNews>,
    /// The relays changed.
    pub derp_map: bool,
}

impl Changes {
    /// Adds a notice.
    pub fn add(&mut self, notice: Notice) {
        match notice {
            Notice::Node(id, what) => {
                let news = self.nodes.entry(id).or_default();
                match what {
                    NodeChange::Joined | NodeChange::Whole => news.whole = true,
                    NodeChange::Patch => news.patch = true,
                    NodeChange::Seen => news.presence = true,
                    NodeChange::Private => news.own = true,
                }
            }
            Notice::Removed(id) => {
                self.nodes.entry(id).or_default().whole = true;
            }
            Notice::Presence(id) => self.nodes.entry(id).or_default().presence = true,
            Notice::DerpMap => self.derp_map = true,
        }
    }
}

/// The stream has fallen so far behind that the log no longer reaches back to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Behind;

/// The last few thousand notices. When it is full the oldest goes, and streams that had not seen it start over.
#[derive(Debug)]
pub struct Changelog {
    first: u64,
    notices: VecDeque<Notice>,
    capacity: usize,
}

impl Changelog {
    /// A log that remembers so many notices.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { first: 0, notices: VecDeque::new(), capacity }
    }

    /// Adds a notice.
    pub fn push(&mut self, notice: Notice) {
        if self.notices.len() == self.capacity {
            self.notices.pop_front();
            self.first += 1;
        }
        self.notices.push_back(notice);
    }

    /// The present.
    #[must_use]
    pub fn end(&self) -> Position {
        Position(self.first + u64::try_from(self.notices.len()).unwrap_or(u64::MAX))
    }

    /// What has happened since, and the present.
    ///
    /// # Errors
    /// [`Behind`] if part of it is forgotten.
    pub fn since(&self, position: Position) -> Result<(Changes, Position), Behind> {
        let skip = position.0.checked_sub(self.first).ok_or(Behind)?;
        let mut changes = Changes::default();
        for notice in self.notices.iter().skip(usize::try_from(skip).unwrap_or(usize::MAX)) {
            changes.add(*notice);
        }
        Ok((changes, self.end()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_sees_what_comes_after_it_and_nothing_before() {
        let mut log = Changelog::new(8);
        log.push(Notice::DerpMap);
        let position = log.end();
        log.push(Notice::Presence(NodeId(1)));
        log.push(Notice::Node(NodeId(1), NodeChange::Patch));
        let (changes, end) = log.since(position).unwrap();
        assert!(!changes.derp_map);
        let news = NodeNews { presence: true, patch: true, ..NodeNews::default() };
        assert_eq!(changes.nodes, BTreeMap::from([(NodeId(1), news)]));
        assert_eq!(log.since(end).unwrap().0, Changes::default());
    }

    #[test]
    fn a_position_that_is_too_old_is_told_so() {
        let mut log = Changelog::new(2);
        let start = log.end();
        for _ in 0..2 {
            log.push(Notice::DerpMap);
        }
        assert!(log.since(start).is_ok());
        log.push(Notice::DerpMap);
        assert_eq!(log.since(start), Err(Behind));
    }
}
