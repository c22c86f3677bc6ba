//! Puts together what `mesh status` shows.

use mesh_control::netmap::Netmap;
use mesh_control::wire::Node;

use super::Driver;
use crate::status::{NodeState, PathStatus, PeerStatus, STATUS_VERSION, SelfStatus, Status, WhyStatus};

impl Driver {
    /// The node and its peers as of now.
    pub(super) fn status(&self) -> Status {
        let session = self.session.as_ref();
        let netmap = session.and_then(|session| session.netmap.as_deref());
        let mut peers: Vec<PeerStatus> = match netmap {
            Some(netmap) => netmap.peers().values().map(|node| self.peer_status(netmap, node)).collect(),
            None => Vec::new(),
        };
        peers.sort_by(|a, b| a.name.cmp(&b.name).then(a.key.cmp(&b.key)));
        Status {
            version: STATUS_VERSION,
            state: session.map_or_else(|| self.shared.state.borrow().clone(), |session| session.state().clone()),
            control_connected: session.is_some_and(|session| session.control_connected),
            control_url: self.prefs.control_url.clone(),
            tailnet: netmap.map(|netmap| netmap.domain().to_owned()).filter(|domain| !domain.is_empty()),
            health: self.health(),
            this: self.self_status(netmap),
            peers,
            drops: self.plane.drops(),
        }
    }

    fn health(&self) -> Vec<String> {
        let Some(session) = &self.session else { return Vec::new() };
        let mut health = Vec::new();
        if let Some(problem) = &session.control_problem {
            health.push(format!("coordinator: {problem}"));
        }
        health.extend(session.clock_problem.clone());
        health
            .extend(session.relay_problems.iter().map(|(region, problem)| format!("relay region {region}: {problem}")));
        if let Some(netmap) = &session.netmap {
            health.extend(netmap.health().iter().cloned());
            health.extend(netmap.messages().values().map(|message| format!("{}: {}", message.title, message.text)));
        }
        if session.state() == &NodeState::Running && session.engine.home().is_none() {
            health.push("no relay region is in reach".to_owned());
        }
        health
    }

    fn self_status(&self, netmap: Option<&Netmap>) -> SelfStatus {
        let engine = self.session.as_ref().map(|session| &session.engine);
        let node = netmap.and_then(Netmap::node);
        SelfStatus {
            name: node.map(full_name).unwrap_or_default(),
            key: engine.map(crate::engine::Engine::node_key),
            addresses: node.map(|node| node.addresses.iter().map(ipnet::IpNet::addr).collect()).unwrap_or_default(),
            endpoints: engine
                .map(|engine| engine.endpoints().iter().map(|endpoint| endpoint.address).collect())
                .unwrap_or_default(),
            home_region: engine.and_then(crate::engine::Engine::home),
            relay_connected: engine.is_some_and(crate::engine::Engine::home_connected),
            owner: node.and_then(|node| owner(netmap, node)),
            os: std::env::consts::OS.to_owned(),
            key_expiry: node.filter(|node| !node.key_expiry.is_zero()).map(|node| node.key_expiry.unix_seconds()),
            device: self.fixed.device.to_owned(),
            path_mode: self.prefs.path_mode,
            port: self.host.sockets.port(),
            port_mapping: engine.map(|engine| engine.port_mappings().into()).unwrap_or_default(),
        }
    }

    fn peer_status(&self, netmap: &Netmap, node: &Node) -> PeerStatus {
        let report = self.session.as_ref().and_then(|session| session.engine.peer(&node.key));
        let (direct, relay) = self.plane.counters(&node.key);
        let path = PathStatus::from(report.and_then(|report| report.path));
        PeerStatus {
            name: full_name(node),
            key: node.key,
            addresses: node.addresses.iter().map(ipnet::IpNet::addr).collect(),
            owner: owner(Some(netmap), node),
            os: node.hostinfo.as_ref().map(|hostinfo| hostinfo.os.clone()).filter(|os| !os.is_empty()),
            online: node.online,
            path,
            why: report.and_then(|report| report.discovery).map(|found| WhyStatus {
                reason: path.because(&found.why),
                since: self.clock.unix(found.since),
                rtt_ms: found.latency.map(|latency| latency.as_secs_f64() * 1e3),
                mtu: found.limit.map(|datagram| datagram.saturating_sub(crate::engine::SEALED)),
                candidates: found.candidates,
            }),
            rx_bytes: direct.rx_bytes + relay.rx_bytes,
            tx_bytes: direct.tx_bytes + relay.tx_bytes,
            last_handshake: report.and_then(|report| report.last_handshake).map(|moment| self.clock.unix(moment)),
            direct,
            relay,
            endpoints: node.endpoints.clone(),
            home_region: node.home_derp,
        }
    }
}

fn full_name(node: &Node) -> String {
    node.name.trim_end_matches('.').to_owned()
}

fn owner(netmap: Option<&Netmap>, node: &Node) -> Option<String> {
    if let Some(tag) = node.tags.first() {
        return Some(tag.clone());
    }
    netmap?.users().get(&node.user).map(|user| user.login_name.clone())
}
