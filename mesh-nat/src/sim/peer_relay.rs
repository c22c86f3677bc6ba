//! Nodes that relay for others: the server's core on a socket of its own, beside the agent.

use std::net::SocketAddr;
use std::time::Instant;

use mesh_noise::key::{DiscoPrivate, DiscoPublic, NodePublic};
use rand::RngExt;

use super::host::HostId;
use super::world::World;
use crate::agent::Relays;
use crate::disco::message::AllocateResponse;
use crate::path::{Family, SocketId};
use crate::relay::Server;
use crate::relay::server::{Config, Handled};

/// A relay that a node offers.
pub(super) struct Serving {
    socket: SocketId,
    server: Server,
    /// Datagrams that it has forwarded.
    forwarded: u64,
}

impl Serving {
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.server.poll_timeout()
    }
}

impl World {
    /// Lets the node on `host` relay for `clients`, on a UDP socket of its own, and lets them know. All of them must have
    /// been introduced to it.
    pub fn relay_for(&mut self, host: HostId, clients: &[HostId]) {
        let socket = self.open_socket(host, Family::V4, 0);
        let disco = DiscoPrivate::generate(&mut self.rng);
        let mut server = Server::new(self.now, disco, self.rng.random(), Config::default());
        let port = self.hosts[host.0].sockets.port(socket).unwrap_or_default();
        server.set_addresses(self.addresses(host).into_iter().map(|ip| SocketAddr::new(ip, port)).collect());
        let key = self.key(host);
        self.node_mut(host).serving = Some(Serving { socket, server, forwarded: 0 });
        let relays = Relays { clients: clients.iter().map(|client| self.key(*client)).collect(), ..Relays::default() };
        self.with(host, |agent, _| agent.set_relays(relays));
        for client in clients {
            let relays = Relays { servers: [key].into(), ..Relays::default() };
            self.with(*client, |agent, _| agent.set_relays(relays));
        }
    }

    /// Stops relaying without telling anybody.
    pub fn stop_relaying(&mut self, host: HostId) {
        self.node_mut(host).serving = None;
    }

    /// How many datagrams the node on `host` has forwarded for others.
    #[must_use]
    pub fn forwarded(&self, host: HostId) -> u64 {
        self.node(host).serving.as_ref().map_or(0, |serving| serving.forwarded)
    }

    /// A datagram for the relay on `host`, if it came to the relay's socket. Returns whether it did.
    pub(super) fn relay_takes(&mut self, host: HostId, socket: SocketId, from: SocketAddr, datagram: &[u8]) -> bool {
        let now = self.now;
        let Some(serving) = self.hosts[host.0].node.as_mut().and_then(|node| node.serving.as_mut()) else {
            return false;
        };
        if serving.socket != socket {
            return false;
        }
        let forward = serving.server.handle_datagram(now, from, datagram);
        let mut out: Vec<_> = std::iter::from_fn(|| serving.server.poll_transmit()).collect();
        if let Ok(Handled::Forward(to)) = forward {
            serving.forwarded += 1;
            out.push((to, datagram.to_vec()));
        }
        for (to, datagram) in out {
            self.emit(host, socket, to, datagram);
        }
        true
    }

    pub(super) fn relay_wakes(&mut self, host: HostId) {
        let now = self.now;
        if let Some(serving) = self.hosts[host.0].node.as_mut().and_then(|node| node.serving.as_mut()) {
            serving.server.handle_timeout(now);
        }
    }

    /// The agent of `host` was asked for an allocation.
    pub(super) fn allocate(&mut self, host: HostId, from: NodePublic, clients: [DiscoPublic; 2], generation: u32) {
        let now = self.now;
        let node = self.node_mut(host);
        let Some(serving) = &mut node.serving else { return };
        if let Ok(endpoint) = serving.server.allocate(now, clients) {
            node.agent.allocated(now, from, AllocateResponse { generation, endpoint });
        }
    }
}
