//! A bounded queue of packets in which disco overtakes data, fresh packets displace stale ones, and no node's packets
//! push out another's.
//!
//! Both ends of a relay connection use it: the client for what it sends, the relay for what each receiver has yet to
//! take. Whoever puts a packet in never waits: when there is no room, an older one of the same lane goes, and is counted.
//! A packet that has waited long is worth less than a new one, and path probes (disco) are worth most of all, so data
//! never delays them and never displaces them.
//!
//! # Fairness
//! Each lane is shared out among nodes: those that packets come from in a relay's queue, those that they go to in a
//! client's.
//!
//! - *Order*: nodes take turns of 1,600 bytes on the wire (deficit round robin), and a node that had nothing waiting is
//!   served before those that had (RFC 8290). Packets of one node stay in order.
//! - *Room*: when a lane is full, the oldest packet of the node that takes up most room goes. Room is counted as bytes or
//!   as places, whichever a packet takes the larger share of, so neither long packets nor many small ones win by it. Of
//!   equals, the one whose oldest packet is older gives way. A packet that is being put in never goes itself.
//! - *Standing queues*: a queue that takes the bursts of several TCP windows would also hold them for good, as delay, if
//!   nothing told the senders that it is too much. So the data of a node is dropped one packet at a time, ever more often,
//!   as long as its packets keep waiting longer than a few milliseconds: CoDel (RFC 8289), for each node apart. A burst
//!   that drains in time loses nothing, and a node's only packet is never dropped this way.
//!
//! # Cost
//! Putting in and taking out are O(log n) in the number of nodes that have packets waiting, for the heap that knows which
//! takes up most room, and O(1) otherwise. One exception: a packet of many turns' length is paid for by as many rounds
//! over those nodes, so it costs O(1) for each turn's worth of bytes and node.
//! Packets and nodes stand in two slabs that grow to what was needed at most (64 bytes a packet and some 130 a node that
//! has some), and allocate nothing from then on. [`PacketQueue::shrink`] gives all of it back once nothing waits.
//!
//! # Memory behind packets
//! A packet is a slice of the buffer it was read into. That is well while it is passed on at once, but a hundred bytes
//! that wait would hold 64 KiB. While the receiver is *blocked* ([`PacketQueue::set_blocked`]) packets that wait, and those
//! that come, are copied into memory of their own size, each at most once; those of 32 KiB and more are left alone, for
//! they fill most of their buffer. So what a blocked queue holds is [`Depth::bytes`] a lane, at most twice of it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_noise::key::NodePublic;

use crate::frame::looks_like_disco;

mod codel;
mod fair;
mod flow;
mod longest;
mod slab;
#[cfg(test)]
mod tests;

use fair::{FairLane, Rules};

/// How much a queue holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// Data packets; at least 1.
    pub data: usize,
    /// Disco packets; at least 1.
    pub disco: usize,
    /// Bytes of packets in each lane, so that a few long ones cannot hold megabytes. One packet always fits.
    pub bytes: usize,
}

impl Default for Depth {
    /// 4096 data packets, 32 disco packets, 2 MiB: the windows of a few streams at once. What would stand there longer
    /// than a moment is thinned out before.
    fn default() -> Self {
        Self { data: 4096, disco: 32, bytes: 2 * 1024 * 1024 }
    }
}

/// Which lane a packet travels in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Path probes.
    Disco,
    /// Everything else.
    Data,
}

impl Lane {
    /// The lane a packet belongs in.
    #[must_use]
    pub fn of(packet: &[u8]) -> Self {
        if looks_like_disco(packet) { Self::Disco } else { Self::Data }
    }
}

/// A packet and the node at its other end: its destination in a client's queue, its source in a relay's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queued {
    /// The other node.
    pub node: NodePublic,
    /// The packet.
    pub payload: Bytes,
}

/// What came of putting a packet in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pushed {
    /// The lane it stands in.
    pub lane: Lane,
    /// How many packets of that lane went for it, whosever they were.
    pub displaced: u64,
    /// How many of this node's own packets in that lane have been dropped since its previous one was put in, this time
    /// included: displaced, by its own packets or another's, or dropped for having waited too long. It tells the node's
    /// reader how much of what it brings is in vain. A node that has had nothing waiting for long may have been forgotten,
    /// and then it is 0.
    pub own_dropped: u64,
    /// For how long nothing has been taken from the queue although something waits; zero if it was empty.
    pub stuck: Duration,
}

/// How many packets made room for newer ones, or had waited too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Displaced {
    /// Data packets.
    pub data: u64,
    /// Disco packets.
    pub disco: u64,
}

/// The queue. See the [module doc](self).
#[derive(Debug)]
pub struct PacketQueue {
    depth: Depth,
    /// Only there while packets wait or not long ago did: most queues of a relay are those of idle connections.
    disco: Option<Box<FairLane>>,
    data: Option<Box<FairLane>>,
    displaced: Displaced,
    /// When something was last taken, or put in while nothing waited.
    moved: Option<Instant>,
    blocked: bool,
}

fn fresh() -> Box<FairLane> {
    Box::new(FairLane::new())
}

impl PacketQueue {
    /// An empty queue. It has no memory of its own yet.
    #[must_use]
    pub const fn new(depth: Depth) -> Self {
        let displaced = Displaced { data: 0, disco: 0 };
        Self { depth, disco: None, data: None, displaced, moved: None, blocked: false }
    }

    const fn rules(&self, lane: Lane) -> Rules {
        let Depth { data, disco, bytes } = self.depth;
        match lane {
            Lane::Disco => Rules { packets: disco, bytes, thins: false },
            Lane::Data => Rules { packets: data, bytes, thins: true },
        }
    }

    /// Puts a packet in, and says in which lane, how many older ones of that lane went for it, and how `node` fares.
    pub fn push(&mut self, now: Instant, node: NodePublic, payload: Bytes) -> Pushed {
        let lane = Lane::of(&payload);
        let rules = self.rules(lane);
        if self.is_empty() {
            self.moved = Some(now);
        }
        let stuck = self.moved.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let place = match lane {
            Lane::Disco => &mut self.disco,
            Lane::Data => &mut self.data,
        };
        let (displaced, own_dropped) = place.get_or_insert_with(fresh).push(now, node, payload, self.blocked, &rules);
        match lane {
            Lane::Disco => self.displaced.disco += displaced,
            Lane::Data => self.displaced.data += displaced,
        }
        Pushed { lane, displaced, own_dropped, stuck }
    }

    /// Takes the packet that is to go next: disco if there is any, or else data. What has waited too long is dropped on
    /// the way, and counted as displaced.
    pub fn pop(&mut self, now: Instant) -> Option<Queued> {
        for lane in [Lane::Disco, Lane::Data] {
            let rules = self.rules(lane);
            let (place, displaced) = match lane {
                Lane::Disco => (&mut self.disco, &mut self.displaced.disco),
                Lane::Data => (&mut self.data, &mut self.displaced.data),
            };
            if let Some(line) = place {
                let (packet, thinned) = line.pop(now, &rules);
                *displaced += thinned;
                if packet.is_some() {
                    self.moved = Some(now);
                    return packet;
                }
            }
        }
        None
    }

    /// Says whether what is put in has to wait because the receiver takes nothing at present. As long as it does not,
    /// packets do not hold more memory than they are long; see the [module doc](self#memory-behind-packets).
    ///
    /// Becoming blocked costs a copy of what waits, once for each packet; so not every write that has to be tried again
    /// is worth telling.
    pub fn set_blocked(&mut self, blocked: bool) {
        if blocked && !self.blocked {
            for lane in self.lanes_mut() {
                lane.detach();
            }
        }
        self.blocked = blocked;
    }

    /// Gives all memory back, if nothing waits: for a connection that has become idle. Who was served last, and how, is
    /// forgotten with it.
    pub fn shrink(&mut self) {
        for place in [&mut self.disco, &mut self.data] {
            if place.as_ref().is_some_and(|lane| lane.len() == 0) {
                *place = None;
            }
        }
    }

    /// Throws everything away, gives the memory back, and says how many packets that were.
    pub fn clear(&mut self) -> usize {
        let count = self.len();
        (self.disco, self.data) = (None, None);
        count
    }

    /// How many packets wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lanes().map(FairLane::len).sum()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes of packets wait.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.lanes().map(FairLane::bytes).sum()
    }

    /// How many have been displaced since the start.
    #[must_use]
    pub const fn displaced(&self) -> Displaced {
        self.displaced
    }

    fn lanes(&self) -> impl Iterator<Item = &FairLane> {
        [&self.disco, &self.data].into_iter().filter_map(Option::as_deref)
    }

    fn lanes_mut(&mut self) -> impl Iterator<Item = &mut FairLane> {
        [&mut self.disco, &mut self.data].into_iter().filter_map(Option::as_deref_mut)
    }
}
