//! Where the nodes of a DERP map answer STUN.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use mesh_derp::map::{DerpNode, FamilyAddress};

use crate::path::Family;

/// What is known of a server.
pub(super) enum Server {
    At(SocketAddr),
    /// To be looked up first.
    Named(String),
    None,
}

/// Where a node answers STUN over `family`.
pub(super) fn server(node: &DerpNode, family: Family, names: &BTreeMap<String, Vec<IpAddr>>) -> Server {
    let Some(port) = node.stun_udp_port() else { return Server::None };
    let fits = |ip: &IpAddr| Family::of(&SocketAddr::new(*ip, port)) == family;
    let at = |ip: IpAddr| Server::At(SocketAddr::new(ip, port));
    if let Ok(ip) = node.stun_test_ip.parse::<IpAddr>() {
        return if fits(&ip) { at(ip) } else { Server::None };
    }
    let given = match family {
        Family::V4 => match node.v4() {
            FamilyAddress::At(ip) => Some(IpAddr::V4(ip)),
            FamilyAddress::Disabled => return Server::None,
            FamilyAddress::Lookup => None,
        },
        Family::V6 => match node.v6() {
            FamilyAddress::At(ip) => Some(IpAddr::V6(ip)),
            FamilyAddress::Disabled => return Server::None,
            FamilyAddress::Lookup => None,
        },
    };
    // A host name may be an address itself.
    let given = given.or_else(|| node.host_name.trim_matches(['[', ']']).parse().ok());
    match (given, names.get(&node.host_name)) {
        (Some(ip), _) => {
            if fits(&ip) {
                at(ip)
            } else {
                Server::None
            }
        }
        (None, Some(found)) => found.iter().find(|ip| fits(ip)).map_or(Server::None, |ip| at(*ip)),
        (None, None) if node.host_name.is_empty() => Server::None,
        (None, None) => Server::Named(node.host_name.clone()),
    }
}
