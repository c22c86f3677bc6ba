//! One node as itself and its peers are shown it.

use std::time::SystemTime;

use crate::server::record::{Moment, Node};
use crate::version::CapabilityVersion;
use crate::wire::{self, CapMap, Hostinfo};

use super::View;

/// A moment as messages carry it.
pub(super) fn time(moment: Moment) -> wire::Timestamp {
    wire::Timestamp::from(SystemTime::from(moment))
}

pub(super) fn cap(node: &Node) -> CapabilityVersion {
    CapabilityVersion(node.version)
}

/// What every view of a node has.
fn common(view: &View<'_>, node: &Node) -> wire::Node {
    let addresses = node.addresses.prefixes().to_vec();
    let online = view.presence.is_online(node.id);
    wire::Node {
        id: node.id,
        stable_id: node.stable_id(),
        name: format!("{}.{}.", node.name, view.settings.domain),
        user: node.owner.user_id(),
        key: node.node_key,
        key_expiry: node.expires.map(time).unwrap_or_default(),
        disco_key: node.disco_key,
        allowed_ips: Some(addresses.clone()),
        addresses,
        endpoints: node.endpoints.clone(),
        home_derp: node.home,
        created: time(node.created),
        cap: cap(node),
        tags: node.tags.iter().map(|tag| tag.as_str().to_owned()).collect(),
        last_seen: if online { None } else { node.last_seen.map(time) },
        online: Some(online),
        machine_authorized: true,
        expired: node.is_expired(view.now),
        ..wire::Node::default()
    }
}

/// A node as its peers see it.
pub(super) fn for_peer(view: &View<'_>, node: &Node) -> wire::Node {
    let mut capabilities = CapMap::new();
    if node.hostinfo.is_ours() {
        capabilities.insert(wire::OURS.to_owned(), Vec::new());
    }
    wire::Node {
        hostinfo: Some(Box::new(hostinfo_for_peers(&node.hostinfo))),
        cap_map: capabilities,
        ..common(view, node)
    }
}

/// A node as it sees itself.
pub(super) fn for_self(view: &View<'_>, node: &Node) -> wire::Node {
    let hostinfo = Hostinfo {
        hostname: node.hostinfo.hostname.clone(),
        services: node.hostinfo.services.clone(),
        request_tags: node.hostinfo.request_tags.clone(),
        ..Hostinfo::default()
    };
    let mut capabilities = CapMap::new();
    // Peers have both kinds of address, so both kinds of question deserve an answer.
    capabilities.insert("magicdns-aaaa".to_owned(), Vec::new());
    wire::Node {
        machine: node.machine,
        hostinfo: Some(Box::new(hostinfo)),
        cap_map: capabilities,
        // A node that asks is online, whatever the bookkeeping says at this instant.
        online: Some(true),
        last_seen: None,
        ..common(view, node)
    }
}

/// The part of host information that peers need: what to call it, what it runs, what it offers.
#[must_use]
pub fn hostinfo_for_peers(full: &Hostinfo) -> Hostinfo {
    let pseudo = |service: &&wire::Service| service.proto.starts_with("peerapi");
    Hostinfo {
        os: full.os.clone(),
        hostname: full.hostname.clone(),
        services: full.services.iter().filter(pseudo).cloned().collect(),
        ssh_host_keys: full.ssh_host_keys.clone(),
        routable_ips: full.routable_ips.clone(),
        app_connector: full.app_connector,
        peer_relay: full.peer_relay,
        location: full.location.clone(),
        ..Hostinfo::default()
    }
}
