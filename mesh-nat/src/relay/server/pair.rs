//! What forwarding needs to know of two clients, and nothing else: shared with the threads that move datagrams.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::path::Vni;

/// One of a pair's two clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leg {
    /// The one with the lower disco key.
    Low,
    /// The other one.
    High,
}

impl Leg {
    /// The other client.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Low => Self::High,
            Self::High => Self::Low,
        }
    }

    pub(super) const fn index(self) -> usize {
        match self {
            Self::Low => 0,
            Self::High => 1,
        }
    }
}

/// Two clients whose legs are both bound. Never changes: when a leg moves, there is a new one.
#[derive(Debug, Clone)]
pub struct Pair {
    vni: Vni,
    legs: [SocketAddr; 2],
    meter: Arc<Meter>,
}

/// What came from one client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Datagrams.
    pub packets: u64,
    /// Their bytes, Geneve header included.
    pub bytes: u64,
}

#[derive(Debug, Default)]
pub(super) struct Meter([Counters; 2]);

#[derive(Debug, Default)]
struct Counters {
    packets: AtomicU64,
    bytes: AtomicU64,
    /// Milliseconds of [`Server::clock_ms`](super::Server::clock_ms) when it last sent something.
    seen: AtomicU64,
}

impl Pair {
    pub(super) const fn new(vni: Vni, legs: [SocketAddr; 2], meter: Arc<Meter>) -> Self {
        Self { vni, legs, meter }
    }

    /// Its number, which datagrams carry.
    #[must_use]
    pub const fn vni(&self) -> Vni {
        self.vni
    }

    /// Where a client's datagrams come from and go to.
    #[must_use]
    pub const fn address(&self, leg: Leg) -> SocketAddr {
        self.legs[leg.index()]
    }

    /// Which client has sent a datagram that came from `source`; `None` for anybody else, whose datagrams are dropped.
    #[must_use]
    pub fn sender(&self, source: SocketAddr) -> Option<Leg> {
        [Leg::Low, Leg::High].into_iter().find(|leg| self.legs[leg.index()] == source)
    }

    /// Counts what `leg` has sent. Once for all neighbours in a batch.
    pub fn note(&self, leg: Leg, now_ms: u64, packets: u64, bytes: u64) {
        let counters = &self.meter.0[leg.index()];
        counters.packets.fetch_add(packets, Ordering::Relaxed);
        counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        counters.seen.fetch_max(now_ms, Ordering::Relaxed);
    }
}

impl Meter {
    /// Notes that `leg` lives, without a datagram to forward.
    pub(super) fn touch(&self, leg: Leg, now_ms: u64) {
        self.0[leg.index()].seen.fetch_max(now_ms, Ordering::Relaxed);
    }

    /// When the client that has been silent for longer was last heard.
    pub(super) fn seen(&self) -> u64 {
        self.0.iter().map(|leg| leg.seen.load(Ordering::Relaxed)).min().unwrap_or(0)
    }

    pub(super) fn forwarded(&self) -> [Forwarded; 2] {
        [0, 1].map(|leg: usize| Forwarded {
            packets: self.0[leg].packets.load(Ordering::Relaxed),
            bytes: self.0[leg].bytes.load(Ordering::Relaxed),
        })
    }
}
