//! One lane, shared out fairly among nodes: deficit round robin with CoDel for each flow, in the manner of FQ-CoDel
//! (RFC 8290), and the oldest packet of the longest flow makes room.

use std::time::Instant;

use bytes::Bytes;
use mesh_noise::key::NodePublic;

use super::Queued;
use super::flow::Flows;
use super::longest::Longest;
use super::slab::{NONE, Slab};
use crate::frame::HEADER_LEN;

/// What a frame adds to its packet on the wire: the header and a key. Empty packets are not free.
const OVERHEAD: usize = HEADER_LEN + 32;
/// A packet at least this long makes up most of the buffer it was read into, and is not worth copying.
const LONG: usize = 32 * 1024;

/// How a lane differs from the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// Packets it holds.
    pub(super) packets: usize,
    /// Bytes of packets it holds, if it holds more than one.
    pub(super) bytes: usize,
    /// Whether packets that have waited too long are dropped.
    pub(super) thins: bool,
}

#[derive(Debug)]
struct Waiting {
    since: Instant,
    payload: Bytes,
    /// In order of arrival.
    number: u64,
    /// The next packet of its flow.
    next: u32,
    /// Whether it has memory of its own.
    detached: bool,
}

/// Gives a packet memory of its own, so that it does not hold what else was read with it.
fn detach(payload: &mut Bytes) {
    if payload.len() < LONG {
        *payload = Bytes::copy_from_slice(payload);
    }
}

/// A lane. All packets stand in one slab and are chained by flow, so that neither a packet nor a flow allocates.
#[derive(Debug)]
pub(super) struct FairLane {
    packets: Slab<Waiting>,
    flows: Flows,
    longest: Longest,
    len: usize,
    bytes: usize,
    arrivals: u64,
}

impl FairLane {
    pub(super) fn new() -> Self {
        let (packets, flows, longest) = (Slab::new(), Flows::new(), Longest::new());
        Self { packets, flows, longest, len: 0, bytes: 0, arrivals: 0 }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Puts a packet in; says how many were displaced, and how many of this node's have been dropped since it last asked.
    pub(super) fn push(
        &mut self,
        now: Instant,
        node: NodePublic,
        mut payload: Bytes,
        blocked: bool,
        rules: &Rules,
    ) -> (u64, u64) {
        let mut displaced = 0;
        while self.len > 0 && (self.len >= rules.packets || self.bytes + payload.len() > rules.bytes) {
            self.displace(rules);
            displaced += 1;
        }
        if blocked {
            detach(&mut payload);
        }
        let (length, number) = (payload.len(), self.arrivals);
        let waiting = Waiting { since: now, payload, number, next: NONE, detached: blocked };
        let at = self.packets.insert(waiting);
        let id = self.flows.enlist(node);
        let flow = &mut self.flows.slab[id];
        if flow.tail == NONE {
            (flow.head, flow.oldest) = (at, number);
        } else {
            self.packets[flow.tail].next = at;
        }
        flow.tail = at;
        flow.weight += rules.weight(length);
        let dropped = std::mem::take(&mut flow.dropped);
        self.longest.update(&mut self.flows.slab, id);
        self.len += 1;
        self.bytes += length;
        self.arrivals += 1;
        (displaced, dropped)
    }

    /// Takes the packet that is to go next, and says how many were dropped on the way.
    pub(super) fn pop(&mut self, now: Instant, rules: &Rules) -> (Option<Queued>, u64) {
        let mut thinned = 0;
        if self.len == 0 {
            self.flows.retire_all();
        }
        while let Some(id) = self.flows.first() {
            if self.flows.slab[id].deficit <= 0 {
                self.flows.next_turn(id);
                continue;
            }
            let Some(waiting) = self.take(id, rules) else {
                self.flows.pass_over(id, self.longest.len());
                continue;
            };
            let flow = &mut self.flows.slab[id];
            let waited = now.saturating_duration_since(waiting.since);
            if rules.thins && flow.thinning.drops(now, waited, flow.head == NONE) {
                flow.dropped += 1;
                thinned += 1;
                continue;
            }
            let cost = i32::try_from(waiting.payload.len() + OVERHEAD).unwrap_or(i32::MAX);
            flow.deficit = flow.deficit.saturating_sub(cost);
            return (Some(Queued { node: flow.node, payload: waiting.payload }), thinned);
        }
        (None, thinned)
    }

    #[cfg(test)]
    pub(super) fn flows_in_memory(&mut self) -> usize {
        self.flows.slab.values_mut().count()
    }

    /// Gives every packet that waits memory of its own.
    pub(super) fn detach(&mut self) {
        for waiting in self.packets.values_mut().filter(|waiting| !waiting.detached) {
            detach(&mut waiting.payload);
            waiting.detached = true;
        }
    }

    /// Drops the oldest packet of the longest flow.
    fn displace(&mut self, rules: &Rules) {
        let Some(id) = self.longest.first() else { return };
        self.take(id, rules);
        let flow = &mut self.flows.slab[id];
        flow.dropped += 1;
        if flow.head == NONE {
            self.flows.retire(id);
        }
    }

    /// Takes a flow's oldest packet.
    fn take(&mut self, id: u32, rules: &Rules) -> Option<Waiting> {
        let flow = &mut self.flows.slab[id];
        let waiting = self.packets.remove(flow.head)?;
        flow.head = waiting.next;
        flow.weight -= rules.weight(waiting.payload.len());
        self.len -= 1;
        self.bytes -= waiting.payload.len();
        if let Some(next) = self.packets.get(waiting.next) {
            flow.oldest = next.number;
            self.longest.update(&mut self.flows.slab, id);
        } else {
            flow.tail = NONE;
            self.longest.remove(&mut self.flows.slab, id);
        }
        Some(waiting)
    }
}

impl Rules {
    /// How much of the lane's room a packet takes up: of its bytes, or of its places if that is more.
    fn weight(&self, length: usize) -> usize {
        length.max(self.bytes / self.packets.max(1)).max(1)
    }
}
