//! The flows of a lane: which nodes have packets waiting, and whose turn it is.
//!
//! ```text
//!             first packet             its packets are gone, or its turn is over
//!   dormant ───────────────► new list ──────────────────────────────────────────► old list ◄─┐ turn is over
//!      ▲                                                                            │ └───────┘
//!      └───────────────────────── has no packets when its turn comes ───────────────┘
//! ```
//!
//! The new list is served before the old one, so a node that sends now and then does not wait for those that always do
//! (RFC 8290 §4.2). A flow that runs empty goes to the end of the old list first: sending the next packet whenever the
//! last one is gone must not buy precedence.

use std::collections::HashMap;

use mesh_noise::key::NodePublic;

use super::codel::Thinning;
use super::slab::{NONE, Slab};

/// What a flow may send before the next one has its turn, in bytes on the wire: a packet of any usual MTU.
pub(super) const QUANTUM: i32 = 1600;
/// Flows without packets that are remembered, for what CoDel has learnt of them and for attribution.
const DORMANT: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    New,
    Old,
    Dormant,
}

/// The packets of one node.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) node: NodePublic,
    /// Its first and last packet in the lane's slab.
    pub(super) head: u32,
    pub(super) tail: u32,
    /// The number in order of arrival of the first packet.
    pub(super) oldest: u64,
    /// How much room its packets take up.
    pub(super) weight: usize,
    /// Bytes it may send in this turn; not positive if its turn is over.
    pub(super) deficit: i32,
    pub(super) thinning: Thinning,
    /// Packets dropped since the node was last told.
    pub(super) dropped: u64,
    /// Where it stands in the heap of the longest flows.
    pub(super) rank: u32,
    place: Place,
    prev: u32,
    next: u32,
}

#[derive(Debug)]
struct List {
    first: u32,
    last: u32,
    len: usize,
}

impl List {
    const EMPTY: Self = Self { first: NONE, last: NONE, len: 0 };

    fn append(&mut self, slab: &mut Slab<Flow>, id: u32) {
        let flow = &mut slab[id];
        (flow.prev, flow.next) = (self.last, NONE);
        if self.last == NONE {
            self.first = id;
        } else {
            slab[self.last].next = id;
        }
        self.last = id;
        self.len += 1;
    }

    fn remove(&mut self, slab: &mut Slab<Flow>, id: u32) {
        let (prev, next) = (slab[id].prev, slab[id].next);
        if prev == NONE {
            self.first = next;
        } else {
            slab[prev].next = next;
        }
        if next == NONE {
            self.last = prev;
        } else {
            slab[next].prev = prev;
        }
        self.len -= 1;
    }
}

/// All flows of a lane.
#[derive(Debug)]
pub(super) struct Flows {
    pub(super) slab: Slab<Flow>,
    by_node: HashMap<NodePublic, u32>,
    new: List,
    old: List,
    dormant: List,
    /// The flow asked for last: a reader brings many packets of one node in a row.
    recent: u32,
}

impl Flows {
    pub(super) fn new() -> Self {
        let slab = Slab::new();
        Self { slab, by_node: HashMap::new(), new: List::EMPTY, old: List::EMPTY, dormant: List::EMPTY, recent: NONE }
    }

    /// The flow of a node, which is about to get a packet.
    pub(super) fn enlist(&mut self, node: NodePublic) -> u32 {
        let recent = self.slab.get(self.recent).filter(|flow| flow.node == node);
        let known = if recent.is_some() { Some(self.recent) } else { self.by_node.get(&node).copied() };
        let id = known.unwrap_or_else(|| {
            let (place, thinning) = (Place::Dormant, Thinning::default());
            let (head, tail, prev, next, rank) = (NONE, NONE, NONE, NONE, NONE);
            let (oldest, weight, deficit, dropped) = (0, 0, QUANTUM, 0);
            let flow = Flow { node, head, tail, oldest, weight, deficit, thinning, dropped, rank, place, prev, next };
            let id = self.slab.insert(flow);
            self.dormant.append(&mut self.slab, id);
            self.by_node.insert(node, id);
            id
        });
        self.recent = id;
        let flow = &mut self.slab[id];
        if flow.place == Place::Dormant {
            if flow.deficit > 0 {
                flow.deficit = QUANTUM;
                self.move_to(id, Place::New);
            } else {
                // In debt, since its packets were displaced: it waits for its turn like those that go on sending.
                self.move_to(id, Place::Old);
            }
        }
        id
    }

    /// Whose turn it is.
    pub(super) fn first(&self) -> Option<u32> {
        let id = if self.new.first == NONE { self.old.first } else { self.new.first };
        (id != NONE).then_some(id)
    }

    /// Its turn is over.
    pub(super) fn next_turn(&mut self, id: u32) {
        self.slab[id].deficit += QUANTUM;
        self.move_to(id, Place::Old);
    }

    /// Its turn has come and it has no packets; `busy` flows have some.
    pub(super) fn pass_over(&mut self, id: u32, busy: usize) {
        // Nodes that come and go while others always have packets must not pile up at the end of the old list.
        let idle = (self.new.len + self.old.len).saturating_sub(busy);
        if self.slab[id].place == Place::New && self.old.len > 0 && idle <= DORMANT {
            self.move_to(id, Place::Old);
        } else {
            self.retire(id);
        }
    }

    /// It has no packets and leaves the lists.
    pub(super) fn retire(&mut self, id: u32) {
        self.move_to(id, Place::Dormant);
        if self.dormant.len > DORMANT {
            let oldest = self.dormant.first;
            self.dormant.remove(&mut self.slab, oldest);
            if let Some(flow) = self.slab.remove(oldest) {
                self.by_node.remove(&flow.node);
            }
        }
    }

    /// No flow has packets: nobody owes anybody anything.
    pub(super) fn retire_all(&mut self) {
        while let Some(id) = self.first() {
            self.slab[id].deficit = QUANTUM;
            self.retire(id);
        }
    }

    fn move_to(&mut self, id: u32, place: Place) {
        let from = std::mem::replace(&mut self.slab[id].place, place);
        let (list, slab) = self.list(from);
        list.remove(slab, id);
        let (list, slab) = self.list(place);
        list.append(slab, id);
    }

    const fn list(&mut self, place: Place) -> (&mut List, &mut Slab<Flow>) {
        let list = match place {
            Place::New => &mut self.new,
            Place::Old => &mut self.old,
            Place::Dormant => &mut self.dormant,
        };
        (list, &mut self.slab)
    }
}
