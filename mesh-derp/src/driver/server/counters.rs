//! What a relay counts.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// One counter. Relaxed: nothing is decided by it.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        #[derive(Debug, Default)]
        pub(super) struct Atomics {
            $(pub(super) $name: Count,)+
        }

        /// What a relay has counted since it started, at one moment. All numbers only grow, except the first three.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[non_exhaustive]
        pub struct Counters {
            /// Connections open now.
            pub connections: u64,
            /// Nodes connected now.
            pub nodes: u64,
            $($(#[$doc])* pub $name: u64,)+
        }

        impl Atomics {
            pub(super) fn snapshot(&self, connections: usize, nodes: usize) -> Counters {
                Counters { connections: connections as u64, nodes: nodes as u64, $($name: self.$name.get(),)+ }
            }
        }
    };
}

counters! {
    /// Connections open now that call this relay their home.
    homes,
    /// Relay connections accepted.
    accepts,
    /// Frames read from clients after their login.
    frames_in,
    /// Frames written to clients after their login.
    frames_out,
    /// Frames of unknown kinds skipped.
    frames_unknown,
    /// Packets that clients sent.
    packets_in,
    /// Packets passed on.
    packets_out,
    /// Bytes of packets that clients sent.
    bytes_in,
    /// Bytes of packets passed on.
    bytes_out,
    /// Packets dropped because nobody of that key is connected.
    dropped_unknown,
    /// Packets sent on to another relay of the region.
    forwarded_out,
    /// Packets that another relay of the region sent on to this one.
    forwarded_in,
    /// Packets dropped because the link to the other relay is slow and newer ones came, or it broke.
    dropped_link,
    /// Packets dropped that another relay sent on although their receiver is not connected here.
    dropped_forwarded,
    /// Packets dropped because their receiver was at another relay a moment ago and is at none now.
    dropped_in_doubt,
    /// Data packets dropped because their receiver is slow and newer ones came.
    dropped_queue_data,
    /// Disco packets dropped for that reason.
    dropped_queue_disco,
    /// Packets dropped because their receiver left before taking them.
    dropped_gone,
    /// Times a client was left unread for a moment, because of its rate limit or because its packets were in vain.
    pauses,
    /// Pings read.
    pings,
    /// PeerGone frames sent.
    peer_gone,
    /// Restarting frames sent.
    restarting,
    /// Connections ended because the client broke protocol: frames of a wrong kind, order or length.
    protocol_errors,
    /// Connections ended because the client's login does not prove the key it names.
    logins_refused,
    /// Connections ended because the client had not logged in in time.
    logins_late,
    /// Connections ended because the client was not admitted: the sum of the three kinds of refusals below.
    not_admitted,
    /// Clients admitted.
    admitted,
    /// Clients admitted because whoever knows could not be asked.
    admitted_unasked,
    /// Clients refused.
    refused,
    /// Clients refused because whoever knows could not be asked.
    refused_unasked,
    /// Clients refused because whoever knows gave an answer that makes no sense.
    refused_malformed,
    /// Connections ended because the client took no data.
    stalled,
}
