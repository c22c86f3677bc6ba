//! What a session does, as its engine has decided.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_nat::Path;
use mesh_nat::disco::message::AllocateResponse;
use mesh_nat::driver::{SpareSockets, look_for_portal};
use mesh_noise::key::{DiscoPublic, NodePublic};
use mesh_tun::linux::BYPASS_MARK;

use super::{Job, Session};
use crate::driver::{HostNetwork, Plane, answer, control};
use crate::engine::{Command, Endpoint, Event};
use crate::error::Error;
use crate::events::{self, Change};
use crate::netcheck::NetcheckReport;

impl Session {
    /// Carries out everything that the engine has decided.
    pub(in crate::driver) fn drain(&mut self, plane: &mut Plane, host: &mut HostNetwork) {
        loop {
            while let Some(command) = self.engine.poll_command() {
                self.carry_out(command, plane, host);
            }
            let Some((to, response)) = self.allocated.pop() else { break };
            self.engine.allocated(self.clock.now(), to, response);
        }
        while let Some(transmit) = self.engine.poll_transmit() {
            match (transmit.path, transmit.node) {
                (Path::Relay { region }, Some(node)) => {
                    if !self.relay_sender.send_one(region, node, Bytes::from(transmit.datagram)) {
                        tracing::debug!(%region, "no room, or no connection, for a datagram to this relay");
                    }
                }
                (Path::Relay { .. }, None) => {}
                (Path::Direct { socket, remote }, _) if self.extra.contains(socket) => {
                    self.extra.send(socket, remote, &transmit.datagram);
                }
                (Path::Direct { socket, remote }, _) if self.spare.contains(socket) => {
                    self.spare.send(socket, remote, &transmit.datagram);
                }
                (Path::Direct { socket, remote }, _) => plane.send_to(socket, remote, &transmit.datagram),
                // The engine makes datagrams to the server of these.
                (Path::PeerRelay { .. }, _) => {}
            }
        }
        while let Some(event) = self.engine.poll_event() {
            self.tell(event);
        }
        self.pings.retain(|_, reply| !reply.is_closed());
    }

    fn carry_out(&mut self, command: Command, plane: &mut Plane, host: &mut HostNetwork) {
        match command {
            Command::Relays(plan) => self.relays.set_plan(plan),
            Command::Regions(map) => self.relays.set_map(map),
            Command::Announce(announcement) => {
                if let Some(relay) = &self.peer_relay {
                    let (known, told) = (&announcement.endpoints, &self.peer_relay_addresses);
                    relay.set_addresses(peer_relay_addresses(relay.bound(), known, told));
                }
                let disco = self.engine.disco_key();
                self.control.describe(control::description(&self.hostinfo, disco, &announcement));
            }
            Command::MeasureHttps(region) => self.measure_https(region),
            Command::Resolve(host) => self.resolve(host),
            Command::Allocate { from, clients, generation } => self.allocate(from, clients, generation),
            Command::LookForPortal(checks) => {
                self.job(async move { Job::Portal(look_for_portal(checks).await) });
            }
            Command::OpenSockets(count) => {
                let opened = self.spare.open(count, Some(BYPASS_MARK));
                self.job(std::future::ready(Job::Sockets(opened)));
            }
            Command::CloseSockets => self.spare = SpareSockets::new(),
            Command::OpenExtra(count) => {
                let opened = self.extra.open(count);
                self.engine.extra_opened(self.clock.now(), opened);
            }
            Command::CarryExtra(id) => {
                if let Some(socket) = self.extra.take(id) {
                    plane.carry(id, socket);
                }
            }
            Command::CloseExtra(id) => {
                if !self.extra.close(id) {
                    plane.carry_no_more(id);
                }
            }
            Command::Configure(map) => {
                host.configure(&map);
                plane.apply(Command::Configure(map));
            }
            Command::SetPeers(_)
            | Command::RemovePeer(_)
            | Command::SetPath(..)
            | Command::SetBackup(..)
            | Command::SetLimit(..)
            | Command::OpenSession(_)
            | Command::UseSession(_)
            | Command::CloseSession(..)
            | Command::GiveUp(_) => plane.apply(command),
        }
    }

    /// Somebody who may asks for an allocation on our peer relay. Without an answer it is asked again.
    fn allocate(&mut self, from: NodePublic, clients: [DiscoPublic; 2], generation: u32) {
        let Some(relay) = &self.peer_relay else { return };
        match relay.allocate(clients) {
            Ok(endpoint) => {
                self.allocated.push((from, AllocateResponse { generation, endpoint }));
            }
            Err(reason) => tracing::debug!(%reason, peer = from.short(), "no allocation on our peer relay"),
        }
    }

    fn tell(&mut self, event: Event) {
        match event {
            Event::PathChanged { peer, from, to, latency: rtt, limit: mtu, why } => {
                match to {
                    Some(path) => tracing::info!(peer = peer.short(), via = path_kind(&path), %why, "path"),
                    None => tracing::info!(peer = peer.short(), %why, "no path"),
                }
                self.publish(Change::Path { peer, from: from.into(), to: to.into(), rtt, mtu, why });
            }
            Event::BackupChanged { peer, backup } => {
                let backup = backup.map(|path| Some(path).into());
                self.publish(Change::Doubt { peer, backup });
            }
            Event::LinkChanged(change) => self.publish(Change::Link(change)),
            Event::LimitChanged { peer, limit } => self.publish(Change::Mtu { peer, mtu: limit }),
            Event::PingAnswered { id, path, latency } => {
                if let Some(reply) = self.pings.remove(&id) {
                    answer(reply, Ok((path.into(), latency)));
                }
            }
            Event::PingFailed { id } => {
                if let Some(reply) = self.pings.remove(&id) {
                    answer(reply, Err(Error::Timeout(Duration::from_secs(5))));
                }
            }
            Event::PeerSilent { peer } => {
                tracing::info!(peer = peer.short(), "no answer to handshakes");
                self.publish(Change::Silent { peer });
            }
            Event::Measured(report) => {
                for reply in self.netchecks.drain(..) {
                    let port_mapping = self.engine.port_mappings().into();
                    answer(reply, Ok(NetcheckReport { port_mapping, ..NetcheckReport::from(&*report) }));
                }
            }
        }
    }
}

impl Session {
    fn publish(&self, change: Change) {
        // There may be no reader.
        let _ = self.events.send(events::Event::new(self.clock.wall(self.clock.now()), change));
    }
}

fn path_kind(path: &Path) -> &'static str {
    match path {
        Path::Direct { .. } => "direct",
        Path::PeerRelay { .. } => "peer relay",
        Path::Relay { .. } => "relay",
    }
}

/// Where our peer relay may be reached: what the user says, and its ports at every address that we know of ourselves.
fn peer_relay_addresses(
    bound: impl Iterator<Item = SocketAddr>,
    known: &[Endpoint],
    told: &[SocketAddr],
) -> Vec<SocketAddr> {
    let mut addresses = told.to_vec();
    for bound in bound {
        for endpoint in known.iter().filter(|endpoint| endpoint.address.is_ipv4() == bound.is_ipv4()) {
            let address = SocketAddr::new(endpoint.address.ip(), bound.port());
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    addresses
}
