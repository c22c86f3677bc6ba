//! Which flow takes up most room: a binary heap in which every flow knows its place.
//!
//! A flow's weight changes with every packet put in or taken, and it then moves by at most the height of the heap; the
//! heaviest is always on top. So dropping from it costs O(log flows), and with few flows next to nothing.

use super::flow::Flow;
use super::slab::{NONE, Slab};

/// The flows that have packets, the heaviest first. Of two equals the one whose first packet is older comes first.
#[derive(Debug)]
pub(super) struct Longest(Vec<u32>);

fn before(flows: &Slab<Flow>, one: u32, other: u32) -> bool {
    let (one, other) = (&flows[one], &flows[other]);
    one.weight.cmp(&other.weight).then(other.oldest.cmp(&one.oldest)).is_gt()
}

impl Longest {
    pub(super) const fn new() -> Self {
        Self(Vec::new())
    }

    pub(super) const fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn first(&self) -> Option<u32> {
        self.0.first().copied()
    }

    /// Puts a flow where it belongs after its weight has changed, or in if it is not.
    pub(super) fn update(&mut self, flows: &mut Slab<Flow>, id: u32) {
        if flows[id].rank == NONE {
            self.put(flows, self.0.len(), id);
        }
        if self.0.len() == 1 {
            return;
        }
        let at = self.rise(flows, flows[id].rank as usize);
        self.sink(flows, at);
    }

    /// Takes a flow out, if it is in.
    pub(super) fn remove(&mut self, flows: &mut Slab<Flow>, id: u32) {
        let rank = std::mem::replace(&mut flows[id].rank, NONE);
        let Some(last) = self.0.pop_if(|_| rank != NONE) else { return };
        if last != id {
            self.put(flows, rank as usize, last);
            let at = self.rise(flows, rank as usize);
            self.sink(flows, at);
        }
    }

    fn put(&mut self, flows: &mut Slab<Flow>, at: usize, id: u32) {
        match self.0.get_mut(at) {
            Some(place) => *place = id,
            None => self.0.push(id),
        }
        flows[id].rank = u32::try_from(at).expect("fewer flows than packets");
    }

    fn swap(&mut self, flows: &mut Slab<Flow>, one: usize, other: usize) {
        let (a, b) = (self.0[one], self.0[other]);
        self.put(flows, one, b);
        self.put(flows, other, a);
    }

    fn rise(&mut self, flows: &mut Slab<Flow>, mut at: usize) -> usize {
        while at > 0 {
            let parent = (at - 1) / 2;
            if !before(flows, self.0[at], self.0[parent]) {
                break;
            }
            self.swap(flows, at, parent);
            at = parent;
        }
        at
    }

    fn sink(&mut self, flows: &mut Slab<Flow>, mut at: usize) {
        loop {
            let mut heaviest = at;
            for child in [2 * at + 1, 2 * at + 2] {
                if child < self.0.len() && before(flows, self.0[child], self.0[heaviest]) {
                    heaviest = child;
                }
            }
            if heaviest == at {
                return;
            }
            self.swap(flows, at, heaviest);
            at = heaviest;
        }
    }
}
