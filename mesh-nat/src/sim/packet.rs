//! What travels, and what is kept of it.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_noise::key::NodePublic;

use super::gateway::GatewayId;
use super::host::HostId;
use super::program::RequestId;
use super::stream::StreamId;
use crate::agent::Source;
use crate::path::{Family, SocketId};

/// A UDP datagram on its way, with the addresses that it has at this point.
#[derive(Debug, Clone)]
pub(super) struct Packet {
    /// Who sent it, whatever its source says by now.
    pub(super) origin: HostId,
    /// From which of its sockets, and where to.
    pub(super) aim: (SocketId, SocketAddr),
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) hops: u8,
    pub(super) datagram: Vec<u8>,
}

impl Packet {
    /// With IP and UDP headers.
    pub(super) fn length(&self) -> usize {
        let headers = match Family::of(&self.to) {
            Family::V4 => 28,
            Family::V6 => 48,
        };
        self.datagram.len() + headers
    }
}

/// What happens at some time.
#[derive(Debug)]
pub(super) enum Happening {
    /// A datagram arrives at a host.
    Host(HostId, Packet),
    /// A datagram arrives at a gateway from its inner network.
    Outbound(GatewayId, Packet),
    /// A datagram arrives at a gateway from its outer network.
    Inbound(GatewayId, Packet),
    /// A datagram arrives at a gateway for the gateway itself.
    Service(GatewayId, Packet),
    /// A frame arrives at a relay.
    FrameUp { region: RegionId, from: NodePublic, to: NodePublic, bytes: Vec<u8> },
    /// A frame arrives at the host that it is for.
    FrameDown { region: RegionId, from: NodePublic, to: HostId, bytes: Vec<u8> },
    /// The answer to a request over a stream.
    Reply { to: HostId, id: RequestId, reply: Option<Vec<u8>> },
    /// A host has something to do.
    Wake(HostId),
    /// A stream has data to send.
    Data(StreamId),
}

/// One happening and its time. Those of one time happen in the order in which they were foreseen.
#[derive(Debug)]
pub(super) struct Scheduled {
    pub(super) at: Instant,
    pub(super) number: u64,
    pub(super) what: Happening,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    /// Earlier is greater, as the heap's top should be the next.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// Something that was delivered to a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Since the world began.
    pub at: Duration,
    /// To whom.
    pub host: HostId,
    /// The way it came.
    pub source: Source,
    /// What.
    pub datagram: Vec<u8>,
}
