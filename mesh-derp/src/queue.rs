//! A bounded queue of packets in which disco overtakes data and fresh packets displace stale ones.
//!
//! Both ends of a relay connection use it: the client for what it sends, the relay for what each receiver has yet to
//! take. Whoever puts a packet in never waits: when there is no room, the *oldest* of the same lane goes, and is counted.
//! A packet that has waited long is worth less than a new one, and path probes (disco) are worth most of all, so data
//! never delays them and never displaces them.

use std::collections::VecDeque;

use bytes::Bytes;
use mesh_noise::key::NodePublic;

use crate::frame::looks_like_disco;

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
    /// 128 data packets, 32 disco packets, 256 KiB: some 25 ms at 40 Mbit/s, and four bursts of a sender that hands over
    /// 32 packets at a time.
    fn default() -> Self {
        Self { data: 128, disco: 32, bytes: 256 * 1024 }
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

/// How many packets made room for newer ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Displaced {
    /// Data packets.
    pub data: u64,
    /// Disco packets.
    pub disco: u64,
}

#[derive(Debug, Default)]
struct Line {
    packets: VecDeque<Queued>,
    bytes: usize,
}

impl Line {
    fn push(&mut self, packet: Queued, depth: usize, bytes: usize) -> u64 {
        let mut displaced = 0;
        let len = packet.payload.len();
        while !self.packets.is_empty() && (self.packets.len() >= depth || self.bytes + len > bytes) {
            self.pop();
            displaced += 1;
        }
        self.bytes += len;
        self.packets.push_back(packet);
        displaced
    }

    fn pop(&mut self) -> Option<Queued> {
        let packet = self.packets.pop_front()?;
        self.bytes -= packet.payload.len();
        Some(packet)
    }
}

/// The queue. See the [module doc](self).
#[derive(Debug)]
pub struct PacketQueue {
    depth: Depth,
    disco: Line,
    data: Line,
    displaced: Displaced,
}

impl PacketQueue {
    /// An empty queue.
    #[must_use]
    pub fn new(depth: Depth) -> Self {
        Self { depth, disco: Line::default(), data: Line::default(), displaced: Displaced::default() }
    }

    /// Puts a packet in, and says in which lane and how many older ones of that lane went for it.
    pub fn push(&mut self, node: NodePublic, payload: Bytes) -> (Lane, u64) {
        let lane = Lane::of(&payload);
        let packet = Queued { node, payload };
        let displaced = match lane {
            Lane::Disco => self.disco.push(packet, self.depth.disco, self.depth.bytes),
            Lane::Data => self.data.push(packet, self.depth.data, self.depth.bytes),
        };
        match lane {
            Lane::Disco => self.displaced.disco += displaced,
            Lane::Data => self.displaced.data += displaced,
        }
        (lane, displaced)
    }

    /// Takes the packet that is to go next: the oldest disco packet, or else the oldest of the data.
    pub fn pop(&mut self) -> Option<Queued> {
        self.disco.pop().or_else(|| self.data.pop())
    }

    /// How many packets wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.disco.packets.len() + self.data.packets.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many have been displaced since the start.
    #[must_use]
    pub const fn displaced(&self) -> Displaced {
        self.displaced
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data(number: u8) -> Bytes {
        Bytes::from(vec![4, 0, 0, 0, number])
    }

    fn disco(number: u8) -> Bytes {
        let mut packet = b"TS\xF0\x9F\x92\xAC".to_vec();
        packet.resize(62, number);
        packet.into()
    }

    fn numbers(queue: &mut PacketQueue) -> Vec<u8> {
        std::iter::from_fn(|| queue.pop()).map(|packet| *packet.payload.last().unwrap()).collect()
    }

    const SMALL: Depth = Depth { data: 3, disco: 2, bytes: 10_000 };

    #[test]
    fn the_newest_packets_stay_and_the_rest_is_counted() {
        let mut queue = PacketQueue::new(SMALL);
        for number in 0..10 {
            queue.push(NodePublic::ZERO, data(number));
        }
        assert_eq!(queue.displaced(), Displaced { data: 7, disco: 0 });
        assert_eq!(numbers(&mut queue), [7, 8, 9]);
    }

    #[test]
    fn disco_overtakes_data_and_is_not_displaced_by_it() {
        let mut queue = PacketQueue::new(SMALL);
        queue.push(NodePublic::ZERO, data(1));
        queue.push(NodePublic::ZERO, disco(2));
        for number in 3..9 {
            queue.push(NodePublic::ZERO, data(number));
        }
        assert_eq!(queue.displaced(), Displaced { data: 4, disco: 0 });
        assert_eq!(numbers(&mut queue), [2, 6, 7, 8]);
    }

    #[test]
    fn bytes_are_bounded_and_one_packet_always_fits() {
        let mut queue = PacketQueue::new(Depth { data: 100, disco: 100, bytes: 1000 });
        assert_eq!(queue.push(NodePublic::ZERO, Bytes::from(vec![0; 5000])), (Lane::Data, 0));
        assert_eq!(queue.push(NodePublic::ZERO, Bytes::from(vec![0; 600])), (Lane::Data, 1));
        assert_eq!(queue.push(NodePublic::ZERO, Bytes::from(vec![0; 400])), (Lane::Data, 0));
        assert_eq!(queue.push(NodePublic::ZERO, Bytes::from(vec![0; 1])), (Lane::Data, 1));
        assert_eq!(queue.len(), 2);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_uncounted(pushes in proptest::collection::vec((any::<bool>(), 0usize..200, any::<bool>()), 0..200)) {
            let depth = Depth { data: 5, disco: 4, bytes: 400 };
            let mut queue = PacketQueue::new(depth);
            let (mut pushed, mut popped) = (0u64, 0u64);
            for (is_disco, len, pop) in pushes {
                let payload = if is_disco { disco(0) } else { Bytes::from(vec![0; len]) };
                queue.push(NodePublic::ZERO, payload);
                pushed += 1;
                prop_assert!(queue.data.packets.len() <= depth.data && queue.disco.packets.len() <= depth.disco);
                popped += u64::from(pop && queue.pop().is_some());
            }
            let displaced = queue.displaced();
            prop_assert_eq!(pushed, popped + queue.len() as u64 + displaced.data + displaced.disco);
        }
    }
}
