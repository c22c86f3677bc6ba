//! Guessing ports: what the agent is told for it, and what it asks for.

use std::net::SocketAddr;
use std::time::Instant;

use mesh_derp::map::FamilyAddress;
use mesh_nat::hard::Extra;
use mesh_nat::report::Report;
use mesh_nat::{Path, SocketId};

use super::{Command, Engine};

/// Servers that may be asked what our NAT gives.
const MAX_SERVERS: usize = 8;

impl Engine {
    /// The sockets that [`Command::OpenExtra`] has asked for, or fewer.
    pub fn extra_opened(&mut self, now: Instant, opened: Vec<Extra>) {
        self.agent.sockets_opened(now, opened);
        self.settle(now);
    }

    /// Tells the agent what a measurement has shown of our NAT.
    pub(super) fn tell_agent(&mut self, now: Instant, report: &Report) {
        self.agent.set_behaviour(report.nat_v4);
        self.agent.set_outside(now, report.global_v4, &self.stun_servers(report));
    }

    /// STUN servers with an IPv4 address in the map, nearest first.
    fn stun_servers(&self, report: &Report) -> Vec<SocketAddr> {
        let mut regions: Vec<_> =
            self.map.derp.regions.iter().filter(|(_, region)| !region.no_measure_no_home).collect();
        regions.sort_by_key(|(id, _)| report.region_latency.get(id).copied().unwrap_or(std::time::Duration::MAX));
        let servers = regions.into_iter().flat_map(|(_, region)| &region.nodes).filter_map(|node| {
            let port = node.stun_udp_port()?;
            let FamilyAddress::At(ip) = node.v4() else { return None };
            Some(SocketAddr::from((ip, port)))
        });
        servers.take(MAX_SERVERS).collect()
    }

    /// Whether a STUN answer that came this way is for the agent.
    pub(super) fn is_for_guesses(&self, path: &Path) -> bool {
        matches!(path, Path::Direct { socket, .. } if self.agent.is_extra(*socket))
    }

    /// A peer has shown itself at this socket.
    pub(super) fn carry_extra(&mut self, socket: SocketId) {
        if self.agent.is_extra(socket) {
            self.commands.push_back(Command::CarryExtra(socket));
        }
    }
}
