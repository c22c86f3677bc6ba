//! Carries the engine's commands out on the data plane.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use mesh_control::wire::FilterRule;
use mesh_nat::SocketId;
use mesh_noise::key::NodePublic;
use mesh_noise::random::SystemRng;
use mesh_tun::device::Device;
use mesh_tun::filter::{Addresses, Destination, Filter, Rule, Standing};
use mesh_tun::linux::udp::UdpBatch;
use mesh_tun::packet::Protocol;

use super::relays::RelaySender;
use super::{Clock, Sockets};
use crate::dataplane::{Config, Dataplane, Notices, PeerConfig, Traffic, Workers};
use crate::engine::{Command, MapView, PeerView};
use crate::error::Error;
use crate::status::PathCounters;

/// The data plane and which peers are in it.
#[derive(Debug)]
pub(crate) struct Plane {
    dataplane: Arc<Dataplane>,
    peers: BTreeSet<NodePublic>,
    /// Sockets beside the ordinary ones.
    carried: BTreeSet<SocketId>,
}

impl Plane {
    /// Starts the threads.
    pub(crate) fn start(
        device: Arc<dyn Device>,
        sockets: &Sockets,
        relay: RelaySender,
        clock: Clock,
    ) -> Result<(Self, Notices), Error> {
        let config = Config {
            device,
            sockets: sockets.all().map(|(id, socket)| (id, Arc::clone(socket))).collect(),
            relay: Arc::new(relay),
            flow_seed: SystemRng.array(),
            clock: Arc::new(move || clock.activity_ms()),
            workers: Workers::default(),
        };
        let (dataplane, notices) = Dataplane::start(config)
            .map_err(|source| Error::System { what: "cannot start the data plane's threads", source })?;
        Ok((Self { dataplane: Arc::new(dataplane), peers: BTreeSet::new(), carried: BTreeSet::new() }, notices))
    }

    /// The data plane, for whoever brings it datagrams.
    pub(crate) fn dataplane(&self) -> Arc<Dataplane> {
        Arc::clone(&self.dataplane)
    }

    /// Sends a datagram of the engine's own by UDP; a path that the system refuses is loss.
    pub(crate) fn send_to(&self, socket: SocketId, remote: SocketAddr, datagram: &[u8]) {
        if !self.dataplane.send_to(socket, remote, datagram) {
            tracing::debug!(%remote, "datagram not sent");
        }
    }

    /// Carries out a command that is for the data plane; others are none of its business.
    pub(crate) fn apply(&mut self, command: Command) {
        match command {
            Command::SetPeers(views) => {
                self.peers.extend(views.iter().map(|view| view.node));
                let shown: Vec<_> = views.iter().map(|view| (view.node, view.masquerade)).collect();
                let peer = |view: PeerView| {
                    let standing = if view.jailed { Standing::Jailed } else { Standing::Ordinary };
                    PeerConfig { key: view.node, allowed_ips: view.allowed, standing }
                };
                self.dataplane.set_peers(&views.into_iter().map(peer).collect::<Vec<_>>());
                shown.into_iter().for_each(|(peer, masquerade)| self.dataplane.set_masquerade(&peer, masquerade));
            }
            Command::RemovePeer(peer) => {
                self.peers.remove(&peer);
                self.dataplane.remove_peer(&peer);
            }
            Command::SetLimit(peer, limit) => self.dataplane.set_limit(&peer, limit),
            Command::SetPath(peer, path) => self.dataplane.set_path(&peer, path),
            Command::SetBackup(peer, backup) => self.dataplane.set_backup(&peer, backup),
            Command::OpenSession(session) => self.dataplane.session_opened(&session),
            Command::UseSession(session) => self.dataplane.session_ready(&session),
            Command::CloseSession(peer, receiver_index) => self.dataplane.session_closed(&peer, receiver_index),
            Command::GiveUp(peer) => self.dataplane.handshake_failed(&peer),
            Command::Configure(map) => self.configure(&map),
            Command::Relays(_)
            | Command::Regions(_)
            | Command::Announce(_)
            | Command::Allocate { .. }
            | Command::MeasureHttps(_)
            | Command::Resolve(_)
            | Command::OpenSockets(_)
            | Command::CloseSockets
            | Command::OpenExtra(_)
            | Command::CloseExtra(_)
            | Command::CarryExtra(_)
            | Command::LookForPortal(_) => {}
        }
    }

    fn configure(&self, map: &MapView) {
        let flows = self.dataplane.flows();
        let filter = match &map.filter {
            Some(rules) => Filter::new(&map.addresses, &rules.iter().filter_map(rule).collect::<Vec<_>>(), flows),
            None => Filter::closed(flows),
        };
        self.dataplane.set_filter(filter);
    }

    /// Carries data by one more socket, with a thread of its own.
    pub(crate) fn carry(&mut self, id: SocketId, socket: Arc<UdpBatch>) {
        match self.dataplane.add_socket(id, socket) {
            Ok(()) => {
                self.carried.insert(id);
            }
            Err(error) => tracing::warn!(%error, "no thread for a socket"),
        }
    }

    /// Closes a socket that [`Self::carry`] has added.
    pub(crate) fn carry_no_more(&mut self, id: SocketId) {
        if self.carried.remove(&id) {
            self.dataplane.remove_socket(id);
        }
    }

    /// Forgets all peers and lets nothing in any more.
    pub(crate) fn clear(&mut self) {
        for id in std::mem::take(&mut self.carried) {
            self.dataplane.remove_socket(id);
        }
        for peer in std::mem::take(&mut self.peers) {
            self.dataplane.remove_peer(&peer);
        }
        self.dataplane.set_filter(Filter::closed(self.dataplane.flows()));
    }

    /// What went to and came from a peer: by UDP, and by relays.
    pub(crate) fn counters(&self, peer: &NodePublic) -> (PathCounters, PathCounters) {
        let traffic = self.dataplane.traffic(peer).unwrap_or_default();
        (counters(traffic.direct), counters(traffic.relay))
    }

    /// What was dropped, by reason.
    pub(crate) fn drops(&self) -> BTreeMap<String, u64> {
        self.dataplane.drops().into_iter().map(|(reason, count)| (format!("{reason:?}"), count)).collect()
    }

    /// Ends the threads.
    pub(crate) fn close(&self) {
        self.dataplane.shutdown();
    }
}

fn counters(traffic: Traffic) -> PathCounters {
    PathCounters {
        rx_packets: traffic.rx_packets,
        rx_bytes: traffic.rx_bytes,
        tx_packets: traffic.tx_packets,
        tx_bytes: traffic.tx_bytes,
    }
}

/// A rule as the firewall has it; none if it opens nothing. Parts that cannot be read are left out, so that a form which
/// is new to us closes more than it should, never less.
fn rule(rule: &FilterRule) -> Option<Rule> {
    let sources = rule.src_ips.iter().filter_map(|source| addresses(source)).collect::<Vec<_>>();
    let destinations: Vec<Destination> = rule
        .dst_ports
        .iter()
        .filter_map(|range| {
            Some(Destination { addresses: addresses(&range.ip)?, ports: range.ports.first..=range.ports.last })
        })
        .collect();
    let protocols: Vec<Protocol> =
        rule.ip_proto.iter().filter_map(|number| u8::try_from(*number).ok().map(Protocol)).collect();
    let unreadable = !rule.ip_proto.is_empty() && protocols.is_empty();
    (!sources.is_empty() && !destinations.is_empty() && !unreadable).then_some(Rule {
        sources,
        destinations,
        protocols,
    })
}

fn addresses(text: &str) -> Option<Addresses> {
    text.parse().inspect_err(|error| tracing::warn!(%error, "part of a filter rule is left out")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_control::wire::{NetPortRange, PortRange};

    fn wire(sources: &[&str], destinations: &[&str], protocols: &[i64]) -> FilterRule {
        FilterRule {
            src_ips: sources.iter().map(|text| (*text).to_owned()).collect(),
            dst_ports: destinations
                .iter()
                .map(|ip| NetPortRange { ip: (*ip).to_owned(), bits: None, ports: PortRange { first: 80, last: 90 } })
                .collect(),
            ip_proto: protocols.to_vec(),
            ..FilterRule::default()
        }
    }

    #[test]
    fn rules_are_converted_with_their_protocols() {
        let converted = rule(&wire(&["100.64.0.1", "fd7a::/16"], &["*"], &[6])).unwrap();
        assert_eq!(converted.sources.len(), 2);
        assert_eq!(converted.destinations[0].ports, 80..=90);
        assert_eq!(converted.protocols, [Protocol::TCP]);
        assert!(rule(&wire(&["*"], &["*"], &[])).unwrap().protocols.is_empty());
    }

    #[test]
    fn what_cannot_be_read_opens_nothing() {
        assert_eq!(rule(&wire(&["cap:unheard"], &["*"], &[])), None);
        assert_eq!(rule(&wire(&["*"], &["somewhere"], &[])), None);
        assert_eq!(rule(&wire(&["*"], &["*"], &[-1])), None, "a rule without readable protocols is not one for all");
        assert_eq!(rule(&wire(&["cap:unheard", "100.64.0.1"], &["*"], &[])).unwrap().sources.len(), 1);
    }
}
