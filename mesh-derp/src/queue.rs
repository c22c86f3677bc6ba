//! A bounded queue of packets in which disco overtakes data and fresh packets displace stale ones.
//!
//! Both ends of a relay connection use it: the client for what it sends, the relay for what each receiver has yet to
//! take. Whoever puts a packet in never waits: when there is no room, the *oldest* of the same lane goes, and is counted.
//! A packet that has waited long is worth less than a new one, and path probes (disco) are worth most of all, so data
//! never delays them and never displaces them.
//!
//! A queue that takes the bursts of several TCP windows would also hold them for good, as delay for everybody else, if
//! nothing told the senders that it is too much. So data is dropped one packet at a time, ever more often, as long as
//! packets keep waiting longer than a few milliseconds: CoDel (RFC 8289). A burst that drains in time loses nothing.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

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

/// How many packets made room for newer ones, or had waited too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Displaced {
    /// Data packets.
    pub data: u64,
    /// Disco packets.
    pub disco: u64,
}

/// How long packets may go on waiting before some are dropped (RFC 8289 §4.2: 5 ms at least; a relay adds the batches of
/// a scheduler that is busy).
const TARGET: Duration = Duration::from_millis(15);
/// How long they may do so: a round trip in which the senders can react (RFC 8289 §4.3).
const INTERVAL: Duration = Duration::from_millis(100);

/// When to drop what has waited too long: RFC 8289 §5, with names of our own.
#[derive(Debug, Default)]
struct Thinning {
    /// When packets will have waited above the target for an interval.
    patience_ends: Option<Instant>,
    /// When the next packet is to be dropped; only while dropping.
    next: Option<Instant>,
    /// Drops since dropping began, and when it last began.
    count: u32,
    count_before: u32,
}

impl Thinning {
    /// Whether the packet just taken, which has waited for `waited`, is to be dropped; `last` if the queue is now empty.
    fn drops(&mut self, now: Instant, waited: Duration, last: bool) -> bool {
        if waited < TARGET || last {
            self.patience_ends = None;
        } else if self.patience_ends.is_none() {
            self.patience_ends = Some(now + INTERVAL);
        }
        let too_long = self.patience_ends.is_some_and(|at| now >= at);
        match self.next {
            Some(_) if !too_long => {
                self.next = None;
                false
            }
            Some(at) if now >= at => {
                self.count += 1;
                self.next = Some(at + self.pause());
                true
            }
            Some(_) => false,
            None if too_long => {
                // Where it stopped a short while ago, the rate of drops was nearly right.
                let recently = self.patience_ends.is_some_and(|at| now.saturating_duration_since(at) < INTERVAL);
                let since = self.count - self.count_before;
                self.count = if recently && since > 1 { since } else { 1 };
                self.count_before = self.count;
                self.next = Some(now + self.pause());
                true
            }
            None => false,
        }
    }

    /// The time to the next drop: shorter with each, so that the rate of a TCP stream falls steadily.
    fn pause(&self) -> Duration {
        INTERVAL.div_f64(f64::from(self.count.max(1)).sqrt())
    }
}

#[derive(Debug)]
struct Waiting {
    since: Instant,
    packet: Queued,
}

#[derive(Debug, Default)]
struct Line {
    packets: VecDeque<Waiting>,
    bytes: usize,
}

impl Line {
    fn push(&mut self, now: Instant, packet: Queued, depth: usize, bytes: usize) -> u64 {
        let mut displaced = 0;
        let len = packet.payload.len();
        while !self.packets.is_empty() && (self.packets.len() >= depth || self.bytes + len > bytes) {
            self.pop();
            displaced += 1;
        }
        self.bytes += len;
        self.packets.push_back(Waiting { since: now, packet });
        displaced
    }

    fn pop(&mut self) -> Option<Waiting> {
        let waiting = self.packets.pop_front()?;
        self.bytes -= waiting.packet.payload.len();
        Some(waiting)
    }
}

/// The queue. See the [module doc](self).
#[derive(Debug)]
pub struct PacketQueue {
    depth: Depth,
    disco: Line,
    data: Line,
    thinning: Thinning,
    displaced: Displaced,
}

impl PacketQueue {
    /// An empty queue.
    #[must_use]
    pub fn new(depth: Depth) -> Self {
        let (disco, data, thinning) = (Line::default(), Line::default(), Thinning::default());
        Self { depth, disco, data, thinning, displaced: Displaced::default() }
    }

    /// Puts a packet in, and says in which lane and how many older ones of that lane went for it.
    pub fn push(&mut self, now: Instant, node: NodePublic, payload: Bytes) -> (Lane, u64) {
        let lane = Lane::of(&payload);
        let packet = Queued { node, payload };
        let displaced = match lane {
            Lane::Disco => self.disco.push(now, packet, self.depth.disco, self.depth.bytes),
            Lane::Data => self.data.push(now, packet, self.depth.data, self.depth.bytes),
        };
        match lane {
            Lane::Disco => self.displaced.disco += displaced,
            Lane::Data => self.displaced.data += displaced,
        }
        (lane, displaced)
    }

    /// Takes the packet that is to go next: the oldest disco packet, or else the oldest of the data. What has waited too
    /// long is dropped on the way, and counted as displaced.
    pub fn pop(&mut self, now: Instant) -> Option<Queued> {
        if let Some(waiting) = self.disco.pop() {
            return Some(waiting.packet);
        }
        loop {
            let Waiting { since, packet } = self.data.pop()?;
            let waited = now.saturating_duration_since(since);
            if !self.thinning.drops(now, waited, self.data.packets.is_empty()) {
                return Some(packet);
            }
            self.displaced.data += 1;
        }
    }

    /// Throws everything away, and says how many packets that were.
    pub fn clear(&mut self) -> usize {
        let count = self.len();
        (self.disco, self.data) = (Line::default(), Line::default());
        count
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

    #[expect(clippy::disallowed_methods, reason = "a point to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    fn numbers(queue: &mut PacketQueue) -> Vec<u8> {
        std::iter::from_fn(|| queue.pop(start())).map(|packet| *packet.payload.last().unwrap()).collect()
    }

    const SMALL: Depth = Depth { data: 3, disco: 2, bytes: 10_000 };

    #[test]
    fn the_newest_packets_stay_and_the_rest_is_counted() {
        let mut queue = PacketQueue::new(SMALL);
        for number in 0..10 {
            queue.push(start(), NodePublic::ZERO, data(number));
        }
        assert_eq!(queue.displaced(), Displaced { data: 7, disco: 0 });
        assert_eq!(numbers(&mut queue), [7, 8, 9]);
    }

    #[test]
    fn disco_overtakes_data_and_is_not_displaced_by_it() {
        let mut queue = PacketQueue::new(SMALL);
        queue.push(start(), NodePublic::ZERO, data(1));
        queue.push(start(), NodePublic::ZERO, disco(2));
        for number in 3..9 {
            queue.push(start(), NodePublic::ZERO, data(number));
        }
        assert_eq!(queue.displaced(), Displaced { data: 4, disco: 0 });
        assert_eq!(numbers(&mut queue), [2, 6, 7, 8]);
    }

    #[test]
    fn bytes_are_bounded_and_one_packet_always_fits() {
        let mut queue = PacketQueue::new(Depth { data: 100, disco: 100, bytes: 1000 });
        assert_eq!(queue.push(start(), NodePublic::ZERO, Bytes::from(vec![0; 5000])), (Lane::Data, 0));
        assert_eq!(queue.push(start(), NodePublic::ZERO, Bytes::from(vec![0; 600])), (Lane::Data, 1));
        assert_eq!(queue.push(start(), NodePublic::ZERO, Bytes::from(vec![0; 400])), (Lane::Data, 0));
        assert_eq!(queue.push(start(), NodePublic::ZERO, Bytes::from(vec![0; 1])), (Lane::Data, 1));
        assert_eq!(queue.len(), 2);
    }

    /// Puts a packet in every `gap` and takes one every `pause`; how many were dropped, and how long the last ones waited.
    fn standing(gap: Duration, pause: Duration, packets: u32) -> (u64, Duration) {
        let mut queue = PacketQueue::new(Depth { bytes: 1 << 30, data: 1 << 20, ..Depth::default() });
        let (start, mut pushed, mut now) = (start(), 0, start());
        let mut waited = Duration::ZERO;
        while pushed < packets || !queue.is_empty() {
            while pushed < packets && start + gap * pushed <= now {
                queue.push(start + gap * pushed, NodePublic::ZERO, Bytes::copy_from_slice(&pushed.to_be_bytes()));
                pushed += 1;
            }
            if let Some(packet) = queue.pop(now) {
                let number = u32::from_be_bytes(*packet.payload.first_chunk().unwrap());
                waited = now - (start + gap * number);
            }
            now += pause;
        }
        (queue.displaced().data, waited)
    }

    #[test]
    fn a_burst_that_drains_in_time_is_kept_whole() {
        // 500 packets at once, and 10 a millisecond: empty after 50 ms.
        assert_eq!(standing(Duration::ZERO, Duration::from_micros(100), 500).0, 0);
    }

    #[test]
    fn a_queue_that_never_empties_is_thinned_out() {
        // A tenth too much for 20 s: without drops the last packet would wait for 2 s.
        let (dropped, waited) = standing(Duration::from_micros(900), Duration::from_millis(1), 22_222);
        assert!(dropped > 1000, "{dropped}");
        assert!(waited < Duration::from_millis(300), "{waited:?}");
    }

    #[test]
    fn disco_is_never_thinned_out() {
        let mut queue = PacketQueue::new(Depth::default());
        let begin = start();
        for number in 0..32 {
            queue.push(begin, NodePublic::ZERO, disco(number));
        }
        for second in 1..=32 {
            assert!(queue.pop(begin + Duration::from_secs(second)).is_some());
        }
        assert_eq!(queue.displaced(), Displaced::default());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_uncounted(pushes in proptest::collection::vec((any::<bool>(), 0usize..200, any::<bool>()), 0..200)) {
            let depth = Depth { data: 5, disco: 4, bytes: 400 };
            let mut queue = PacketQueue::new(depth);
            let (mut pushed, mut popped) = (0u64, 0u64);
            for (is_disco, len, pop) in pushes {
                let payload = if is_disco { disco(0) } else { Bytes::from(vec![0; len]) };
                queue.push(start(), NodePublic::ZERO, payload);
                pushed += 1;
                prop_assert!(queue.data.packets.len() <= depth.data && queue.disco.packets.len() <= depth.disco);
                popped += u64::from(pop && queue.pop(start()).is_some());
            }
            let displaced = queue.displaced();
            prop_assert_eq!(pushed, popped + queue.len() as u64 + displaced.data + displaced.disco);
        }
    }
}
