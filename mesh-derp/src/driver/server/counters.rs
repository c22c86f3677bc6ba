//! What a relay counts.

use crate::driver::counter::counters;

counters! {
    /// What a relay has counted since it started, at one moment. All numbers only grow, except the first three.
    pub Counters, Atomics:

    /// Connections open now.
    connections => gauge "derp_current_connections",
    /// Nodes connected now.
    nodes => gauge "derp_clients_local",
    /// Connections open now that call this relay their home.
    homes => gauge "derp_current_home_connections",
    /// Relay connections accepted.
    accepts => counter "derp_accepts",
    /// Frames read from clients after their login.
    frames_in => counter "mesh_derp_frames_received",
    /// Frames written to clients after their login.
    frames_out => counter "mesh_derp_frames_sent",
    /// Frames of unknown kinds skipped.
    frames_unknown => counter "derp_unknown_frames",
    /// Packets that clients sent.
    packets_in => counter "derp_packets_received",
    /// Packets passed on.
    packets_out => counter "derp_packets_sent",
    /// Bytes of packets that clients sent.
    bytes_in => counter "derp_bytes_received",
    /// Bytes of packets passed on.
    bytes_out => counter "derp_bytes_sent",
    /// Packets dropped because nobody of that key is connected.
    dropped_unknown => counter "derp_packets_dropped" {reason="unknown_dest"},
    /// Packets sent on to another relay of the region.
    forwarded_out => counter "derp_packets_forwarded_out",
    /// Packets that another relay of the region sent on to this one.
    forwarded_in => counter "derp_packets_forwarded_in",
    /// Packets dropped because the link to the other relay is slow and newer ones came, or it broke.
    dropped_link => counter "derp_packets_dropped" {reason="link"},
    /// Packets dropped that another relay sent on although their receiver is not connected here.
    dropped_forwarded => counter "derp_packets_dropped" {reason="unknown_dest_on_fwd"},
    /// Packets dropped because their receiver was at another relay a moment ago and is at none now.
    dropped_in_doubt => counter "derp_packets_dropped" {reason="in_doubt"},
    /// Data packets dropped because their receiver is slow and newer ones came.
    dropped_queue_data => counter "derp_packets_dropped" {reason="queue_head", kind="other"},
    /// Disco packets dropped for that reason.
    dropped_queue_disco => counter "derp_packets_dropped" {reason="queue_head", kind="disco"},
    /// Packets dropped because their receiver left before taking them.
    dropped_gone => counter "derp_packets_dropped" {reason="gone_disconnected"},
    /// Times a client was left unread for a moment, because of its rate limit or because its packets were in vain.
    pauses => counter "mesh_derp_pauses",
    /// Pings read.
    pings => counter "derp_got_ping",
    /// PeerGone frames sent.
    peer_gone => counter "mesh_derp_peer_gone_frames",
    /// Restarting frames sent.
    restarting => counter "mesh_derp_restarting_frames",
    /// Connections ended because the client broke protocol: frames of a wrong kind, order or length.
    protocol_errors => counter "mesh_derp_ended" {reason="protocol"},
    /// Connections ended because the client's login does not prove the key it names.
    logins_refused => counter "mesh_derp_ended" {reason="login_refused"},
    /// Connections ended because the client had not logged in in time.
    logins_late => counter "mesh_derp_ended" {reason="login_late"},
    /// Connections ended because the client was not admitted: the sum of the three kinds of refusals below.
    not_admitted => counter "mesh_derp_ended" {reason="not_admitted"},
    /// Clients admitted.
    admitted => counter "mesh_derp_admissions" {outcome="admitted"},
    /// Clients admitted because whoever knows could not be asked.
    admitted_unasked => counter "mesh_derp_admissions" {outcome="admitted_unasked"},
    /// Clients refused.
    refused => counter "mesh_derp_admissions" {outcome="refused"},
    /// Clients refused because whoever knows could not be asked.
    refused_unasked => counter "mesh_derp_admissions" {outcome="refused_unasked"},
    /// Clients refused because whoever knows gave an answer that makes no sense.
    refused_malformed => counter "mesh_derp_admissions" {outcome="refused_malformed"},
    /// Connections ended because the client took no data.
    stalled => counter "derp_sclient_write_timeouts",
}
