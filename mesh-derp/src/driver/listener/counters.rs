//! What a listener counts.

use std::sync::Arc;

use super::door::Door;
use crate::driver::counter::counters;
use crate::metrics::{Exposition, Kind, Metric, Source};

counters! {
    /// What a listener has counted since it started, at one moment. All numbers only grow.
    pub ListenerCounters, Atomics:

    /// Connections accepted.
    accepted => counter "tls_listener_accepted_connections",
    /// Connections closed at once because too many came in a short time.
    refused_rate => counter "tls_listener_rejected_connections" {reason="rate"},
    /// Connections closed at once because their address had too many that had not logged in.
    refused_source => counter "tls_listener_rejected_connections" {reason="source"},
    /// Times that the system refused to accept, mostly for want of descriptors.
    accept_errors => counter "mesh_listener_accept_errors",
    /// Connections dropped before their login because others needed the room.
    dropped_room => counter "mesh_listener_dropped" {reason="room"},
    /// Connections dropped before their login because others of their address needed the room.
    dropped_source => counter "mesh_listener_dropped" {reason="source"},
    /// Connections dropped in a TLS handshake that stood still while others waited for theirs.
    dropped_handshake => counter "mesh_listener_dropped" {reason="handshake"},
    /// Connections dropped because their first byte, TLS handshake or request head took too long.
    dropped_late => counter "mesh_listener_dropped" {reason="late"},
    /// Connections that their client ended before its request was there.
    ended_early => counter "mesh_listener_dropped" {reason="ended"},
    /// TLS handshakes that failed.
    tls_failures => counter "mesh_listener_dropped" {reason="tls"},
    /// Requests that are no HTTP, or whose head is too long.
    garbage_heads => counter "mesh_listener_dropped" {reason="garbage"},
    /// Connections from a trusted proxy without a proper PROXY header.
    proxy_errors => counter "mesh_listener_dropped" {reason="proxy"},
    /// TLS 1.2 handshakes.
    tls_1_2 => counter "derper_tls_request_version" {version="1.2"},
    /// TLS 1.3 handshakes.
    tls_1_3 => counter "derper_tls_request_version" {version="1.3"},
}

/// Looks at an [`Acceptor`](super::Acceptor)'s numbers while that accepts.
#[derive(Debug, Clone)]
pub struct Watch(pub(super) Arc<Door>);

impl Watch {
    /// What has been counted so far.
    #[must_use]
    pub fn counters(&self) -> ListenerCounters {
        self.0.counters().snapshot()
    }

    /// How many connections have not logged in.
    #[must_use]
    pub fn underway(&self) -> usize {
        self.0.len()
    }
}

impl Source for Watch {
    fn expose(&self, text: &mut Exposition) {
        let help = "Connections that have not logged in.";
        text.add(Metric { name: "mesh_listener_underway", labels: "", kind: Kind::Gauge, help }, self.underway());
        self.counters().expose(text);
    }
}
