//! Which flows this node has begun lately, so that their answers may come in.
//!
//! A table of fixed size, read and written by all threads without locks. An entry is the keyed hash of a flow and the
//! second of its last packet; entries share buckets of four, and a full bucket forgets its oldest. A flow that is
//! forgotten too early is merely judged by the rules again; one that was never begun is found only by guessing a 64-bit
//! hash under a secret key.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::packet::Protocol;

/// How long after its last outgoing packet a flow may be answered. Longer than the two minutes that RFC 4787 §4.3 asks
/// of NATs, so that the mapping outside ends first.
pub const FLOW_LIFETIME: Duration = Duration::from_secs(300);

const WAYS: usize = 4;
const BUCKETS: usize = 1024;

/// A flow as this node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The protocol.
    pub protocol: Protocol,
    /// Our address and port.
    pub local: (IpAddr, u16),
    /// The other side's address and port.
    pub remote: (IpAddr, u16),
}

/// The flows begun lately: 4,096 at most, in 64 KiB.
pub struct Flows {
    key: [u64; 2],
    entries: Box<[Entry]>,
}

#[derive(Debug, Default)]
struct Entry {
    hash: AtomicU64,
    /// Seconds plus one, so that zero means never.
    seen: AtomicU32,
}

impl Flows {
    /// An empty table. `seed` must be random: it keeps others from steering flows into one bucket.
    #[must_use]
    pub fn new(seed: [u8; 16]) -> Self {
        let bits = u128::from_le_bytes(seed);
        #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
        let key = [bits as u64, (bits >> 64) as u64];
        Self { key, entries: (0..BUCKETS * WAYS).map(|_| Entry::default()).collect() }
    }

    /// Notes an outgoing packet of `flow`. `now` counts from any fixed moment, the same for all calls.
    pub fn note(&self, flow: &Flow, now: Duration) {
        let (hash, bucket) = self.find(flow);
        let stamp = stamp(now);
        let known = bucket.iter().find(|entry| entry.hash.load(Ordering::Relaxed) == hash);
        let entry = known.or_else(|| bucket.iter().min_by_key(|entry| entry.seen.load(Ordering::Relaxed)));
        if let Some(entry) = entry {
            // A thread that reads between these stores sees the flow that leaves or the one that comes, each alive.
            // Most packets of a flow find both words right and leave the cache line shared.
            if entry.hash.load(Ordering::Relaxed) != hash {
                entry.hash.store(hash, Ordering::Relaxed);
            }
            if entry.seen.load(Ordering::Relaxed) != stamp {
                entry.seen.store(stamp, Ordering::Relaxed);
            }
        }
    }

    /// Whether a packet of `flow` went out within [`FLOW_LIFETIME`] before `now`.
    #[must_use]
    pub fn contains(&self, flow: &Flow, now: Duration) -> bool {
        let (hash, bucket) = self.find(flow);
        let lifetime = stamp(FLOW_LIFETIME);
        bucket.iter().any(|entry| {
            let seen = entry.seen.load(Ordering::Relaxed);
            entry.hash.load(Ordering::Relaxed) == hash && seen != 0 && stamp(now).saturating_sub(seen) < lifetime
        })
    }

    fn find(&self, flow: &Flow) -> (u64, &[Entry]) {
        let hash = self.hash(flow);
        let bucket = usize::try_from(hash % BUCKETS as u64).unwrap_or(0) * WAYS;
        (hash, &self.entries[bucket..bucket + WAYS])
    }

    /// SipHash-1-3 (Aumasson and Bernstein, 2012) over a fixed number of words.
    fn hash(&self, flow: &Flow) -> u64 {
        let [k0, k1] = self.key;
        let mut state = Sip([
            k0 ^ 0x736f_6d65_7073_6575,
            k1 ^ 0x646f_7261_6e64_6f6d,
            k0 ^ 0x6c79_6765_6e65_7261,
            k1 ^ 0x7465_6462_7974_6573,
        ]);
        for address in [flow.local.0, flow.remote.0] {
            let bits = match address {
                IpAddr::V4(v4) => u128::from(v4.to_bits()),
                IpAddr::V6(v6) => v6.to_bits(),
            };
            #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
            let halves = [bits as u64, (bits >> 64) as u64];
            state.absorb(halves[0]);
            state.absorb(halves[1]);
        }
        let family = u64::from(flow.local.0.is_ipv6());
        state.absorb(
            u64::from(flow.local.1) | u64::from(flow.remote.1) << 16 | u64::from(flow.protocol.0) << 32 | family << 40,
        );
        state.finish()
    }
}

impl std::fmt::Debug for Flows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let used = self.entries.iter().filter(|entry| entry.seen.load(Ordering::Relaxed) != 0).count();
        f.debug_struct("Flows").field("used", &used).finish_non_exhaustive()
    }
}

fn stamp(now: Duration) -> u32 {
    u32::try_from(now.as_secs()).unwrap_or(u32::MAX - 1).saturating_add(1)
}

struct Sip([u64; 4]);

impl Sip {
    fn absorb(&mut self, word: u64) {
        self.0[3] ^= word;
        self.round();
        self.0[0] ^= word;
    }

    fn finish(mut self) -> u64 {
        self.0[2] ^= 0xff;
        (0..3).for_each(|_| self.round());
        self.0[0] ^ self.0[1] ^ self.0[2] ^ self.0[3]
    }

    fn round(&mut self) {
        let [mut a, mut b, mut c, mut d] = self.0;
        a = a.wrapping_add(b);
        b = b.rotate_left(13) ^ a;
        a = a.rotate_left(32);
        c = c.wrapping_add(d);
        d = d.rotate_left(16) ^ c;
        a = a.wrapping_add(d);
        d = d.rotate_left(21) ^ a;
        c = c.wrapping_add(b);
        b = b.rotate_left(17) ^ c;
        c = c.rotate_left(32);
        self.0 = [a, b, c, d];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const NOW: Duration = Duration::from_secs(1000);

    #[test]
    fn a_flow_is_known_until_it_expires() {
        let flows = Flows::new([7; 16]);
        assert!(!flows.contains(&flow(1), NOW));
        flows.note(&flow(1), NOW);
        assert!(flows.contains(&flow(1), NOW));
        assert!(flows.contains(&flow(1), NOW + FLOW_LIFETIME - Duration::from_secs(1)));
        assert!(!flows.contains(&flow(1), NOW + FLOW_LIFETIME + Duration::from_secs(1)));
    }

    #[test]
    fn a_later_packet_keeps_a_flow_alive() {
        let flows = Flows::new([7; 16]);
        flows.note(&flow(1), NOW);
        flows.note(&flow(1), NOW + FLOW_LIFETIME);
        assert!(flows.contains(&flow(1), NOW + FLOW_LIFETIME + FLOW_LIFETIME / 2));
    }

    #[test]
    fn the_other_direction_and_other_protocols_are_other_flows() {
        let flows = Flows::new([7; 16]);
        flows.note(&flow(1), NOW);
        let Flow { protocol, local, remote } = flow(1);
        assert!(!flows.contains(&Flow { protocol, local: remote, remote: local }, NOW));
        assert!(!flows.contains(&Flow { protocol: Protocol::SCTP, local, remote }, NOW));
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_oldest_first() {
        let flows = Flows::new([7; 16]);
        for port in 0..=u16::MAX {
            flows.note(&flow(port), NOW + Duration::from_secs(u64::from(port / 1000)));
        }
        assert_eq!(flows.entries.len(), WAYS * BUCKETS);
        let end = NOW + Duration::from_secs(66);
        let known = |ports: std::ops::Range<u16>| ports.filter(|port| flows.contains(&flow(*port), end)).count();
        assert!(known(65_035..65_535) > 490, "recent flows are kept: {}", known(65_035..65_535));
        assert_eq!(known(0..1000), 0, "old flows are gone");
    }

    fn flow(port: u16) -> Flow {
        let at = |last| IpAddr::V4(Ipv4Addr::new(100, 64, 0, last));
        Flow { protocol: Protocol::UDP, local: (at(1), port), remote: (at(2), 53) }
    }
}
