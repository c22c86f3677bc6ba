//! Counts of what was dropped, by reason.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_tun::filter::Reason;

/// Why the data plane dropped a packet or a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum DropReason {
    /// Outgoing: not an IP packet.
    Malformed,
    /// Outgoing: no peer has the destination.
    NoPeer,
    /// Outgoing: from an address that is not one of ours.
    NotOurs,
    /// Outgoing: parked for want of a session, and pushed out by newer packets or given up.
    NoSession,
    /// Outgoing: the peer has no path.
    NoPath,
    /// Outgoing: the path's socket is gone, or the path's kind is not supported.
    NoSocket,
    /// Outgoing: longer than the way to the peer carries; the sender is told.
    TooLong,
    /// Outgoing: the system refused the datagram.
    SendFailed,
    /// Outgoing: the socket's buffer stayed full.
    SendBufferFull,
    /// Outgoing: the relay had no room.
    RelayFull,
    /// Incoming: longer than any datagram of ours.
    Oversized,
    /// Incoming: transport data with a receiver index that is not ours.
    UnknownSession,
    /// Incoming: transport data that does not authenticate, or whose session has ended.
    NotAuthentic,
    /// Incoming: transport data seen before, or too old to tell.
    Replayed,
    /// Incoming: a packet from an address that its peer does not have.
    ForeignSource,
    /// Incoming: transport data that holds no IP packet.
    BadPacket,
    /// Incoming: dropped by the filter, which had not been set.
    NoFilter,
    /// Incoming: dropped by the filter.
    Filtered,
    /// Incoming: the device did not take the packet.
    DeviceRefused,
    /// Incoming: relayed faster than opened.
    RelayQueueFull,
    /// A notice or a datagram for the engine, which was too far behind.
    NoticeQueueFull,
}

impl DropReason {
    const ALL: [Self; 21] = [
        Self::Malformed,
        Self::NoPeer,
        Self::NotOurs,
        Self::NoSession,
        Self::NoPath,
        Self::NoSocket,
        Self::TooLong,
        Self::SendFailed,
        Self::SendBufferFull,
        Self::RelayFull,
        Self::Oversized,
        Self::UnknownSession,
        Self::NotAuthentic,
        Self::Replayed,
        Self::ForeignSource,
        Self::BadPacket,
        Self::NoFilter,
        Self::Filtered,
        Self::DeviceRefused,
        Self::RelayQueueFull,
        Self::NoticeQueueFull,
    ];
}

impl From<Reason> for DropReason {
    fn from(reason: Reason) -> Self {
        if reason == Reason::NoFilter { Self::NoFilter } else { Self::Filtered }
    }
}

/// How often each reason has occurred since the start; reasons that have not are left out.
pub type Drops = BTreeMap<DropReason, u64>;

/// The live counters.
#[derive(Debug, Default)]
pub(super) struct DropCounters([AtomicU64; DropReason::ALL.len()]);

impl DropCounters {
    pub(super) fn add(&self, reason: DropReason, count: usize) {
        if count > 0 {
            self.0[reason as usize].fetch_add(count as u64, Ordering::Relaxed);
        }
    }

    pub(super) fn read(&self) -> Drops {
        let counts =
            DropReason::ALL.into_iter().map(|reason| (reason, self.0[reason as usize].load(Ordering::Relaxed)));
        counts.filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_counter_of_its_own() {
        let counters = DropCounters::default();
        for (index, reason) in DropReason::ALL.into_iter().enumerate() {
            counters.add(reason, index + 1);
        }
        counters.add(DropReason::Malformed, 0);
        let read = counters.read();
        assert_eq!(read.len(), DropReason::ALL.len());
        assert_eq!(read.into_values().collect::<Vec<_>>(), (1..=21).collect::<Vec<_>>());
    }
}
