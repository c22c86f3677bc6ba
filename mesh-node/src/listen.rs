//! What a coordinator and a relay on its own have in common: listeners, STUN, and how the relay is described in a DERP
//! map.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;

use mesh_derp::map::{DerpNode, RegionId};
use mesh_derp::metrics::{Exposition, Kind, Metric, Source};
use mesh_nat::driver::StunServer;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::activation::Sockets;
use crate::error::Error;

/// Where a relay can be reached, as its DERP map node says.
#[derive(Debug, Clone)]
pub(crate) struct Place<'a> {
    /// The region it belongs to.
    pub(crate) region: RegionId,
    /// Its name or address.
    pub(crate) host: String,
    /// The TCP port for TLS and plain HTTP alike.
    pub(crate) port: u16,
    /// The addresses listened on.
    pub(crate) listen: &'a [SocketAddr],
    /// The addresses of the STUN responder.
    pub(crate) stun: &'a [SocketAddr],
}

impl Place<'_> {
    /// The nodes of the region: the relay, and a STUN-only node for each further STUN port.
    ///
    /// A certificate that we made ourselves is pinned; one that was given is verified as usual.
    pub(crate) fn nodes(&self, pin: Option<String>) -> Vec<DerpNode> {
        let region = self.region;
        let mut ports = BTreeSet::new();
        let stun_ports: Vec<u16> = self.stun.iter().map(SocketAddr::port).filter(|port| ports.insert(*port)).collect();
        let mut relay = DerpNode::new(region.to_string(), region, self.host.clone());
        let (ipv4, ipv6) = self.addresses();
        relay.ipv4 = ipv4.unwrap_or_default();
        relay.ipv6 = ipv6.unwrap_or_default();
        relay.derp_port = self.port;
        relay.cert_name = pin.unwrap_or_default();
        relay.stun_port = stun_ports.first().map_or(-1, |port| i32::from(*port));
        let further = stun_ports.iter().skip(1).map(|port| DerpNode {
            name: format!("{region}-stun-{port}"),
            stun_port: i32::from(*port),
            stun_only: true,
            cert_name: String::new(),
            ..relay.clone()
        });
        std::iter::once(relay.clone()).chain(further).collect()
    }

    /// The addresses to publish: those listened on, and the host's own if it is one. A wildcard says nothing.
    fn addresses(&self) -> (Option<String>, Option<String>) {
        let host = self.host.trim_matches(['[', ']']).parse::<IpAddr>().ok();
        let all: Vec<IpAddr> =
            host.into_iter().chain(self.listen.iter().map(SocketAddr::ip)).filter(|ip| !ip.is_unspecified()).collect();
        let first = |wanted: fn(&IpAddr) -> bool| all.iter().copied().find(wanted).map(|ip| ip.to_string());
        (first(IpAddr::is_ipv4), first(IpAddr::is_ipv6))
    }
}

/// Takes listening sockets into the runtime.
pub(crate) fn tcp(sockets: Vec<std::net::TcpListener>) -> Result<Vec<TcpListener>, Error> {
    let taken = sockets.into_iter().map(TcpListener::from_std).collect::<io::Result<_>>();
    taken.map_err(|source| Error::System { what: "serving a socket", source })
}

/// STUN responders that are bound and do not answer yet.
#[derive(Debug)]
pub(crate) struct Stun {
    servers: Vec<Arc<StunServer>>,
    addresses: Vec<SocketAddr>,
}

impl Stun {
    /// A responder on each address.
    pub(crate) fn bind(addresses: &[SocketAddr]) -> Result<Self, Error> {
        Self::on(Sockets::bind(&[], addresses)?.udp)
    }

    /// A responder on each socket. Two ports of one address are a pair, each answering for the other on request: that
    /// shows a client whether its NAT filters by port.
    pub(crate) fn on(sockets: Vec<UdpSocket>) -> Result<Self, Error> {
        let failed = |source| Error::System { what: "serving a STUN socket", source };
        let address = |socket: &UdpSocket| socket.local_addr().map_err(failed);
        let addresses = sockets.iter().map(address).collect::<Result<Vec<_>, _>>()?;
        let (mut servers, mut waiting) = (Vec::new(), sockets.into_iter().zip(addresses.clone()).collect::<Vec<_>>());
        while !waiting.is_empty() {
            let (socket, address) = waiting.remove(0);
            let mut server = StunServer::from_socket(socket).map_err(failed)?;
            let same_host = |(_, other): &(UdpSocket, SocketAddr)| other.ip() == address.ip();
            if let Some(index) = waiting.iter().position(same_host) {
                server = server.with_other_socket(waiting.remove(index).0).map_err(failed)?;
            }
            servers.push(Arc::new(server));
        }
        Ok(Self { servers, addresses })
    }

    /// The same, on the next port as well where only one is named and the next one is free: with one port of one address,
    /// a client cannot tell whether its NAT gives every destination another port.
    pub(crate) fn bind_pairs(addresses: &[SocketAddr]) -> Result<Self, Error> {
        if let Some(port) = second_port(addresses) {
            let further = addresses.iter().map(|address| SocketAddr::new(address.ip(), port));
            let all: Vec<_> = addresses.iter().copied().chain(further).collect();
            match Self::bind(&all) {
                Ok(bound) => return Ok(bound),
                Err(error) => tracing::warn!("no second STUN port: {error}"),
            }
        }
        Self::bind(addresses)
    }

    /// Where they answer.
    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// What they count.
    pub(crate) fn watch(&self) -> StunWatch {
        StunWatch(self.servers.clone())
    }

    /// Lets them answer.
    pub(crate) fn serve(self, tasks: &mut JoinSet<()>) {
        for server in self.servers {
            tasks.spawn(async move { match server.run().await {} });
        }
    }
}

/// Looks at the numbers of STUN responders while they answer.
#[derive(Debug)]
pub(crate) struct StunWatch(Vec<Arc<StunServer>>);

impl Source for StunWatch {
    fn expose(&self, text: &mut Exposition) {
        let mut counted = [[0; 2]; 2];
        for server in &self.0 {
            let Ok(address) = server.local_addr() else { continue };
            let (family, counters) = (usize::from(address.is_ipv6()), server.counters());
            counted[family][0] += counters.answered;
            counted[family][1] += counters.rejected;
        }
        let labels = [
            ["disposition=\"success\",family=\"ipv4\"", "disposition=\"not_stun\",family=\"ipv4\""],
            ["disposition=\"success\",family=\"ipv6\"", "disposition=\"not_stun\",family=\"ipv6\""],
        ];
        for (labels, value) in labels.into_iter().flatten().zip(counted.into_iter().flatten()) {
            let help = "Datagrams that came to the STUN responder, by what became of them.";
            text.add(Metric { name: "stun_requests", labels, kind: Kind::Counter, help }, value);
        }
    }
}

/// The port after the only one that is named. None on this host's loopback, which no NAT leads to.
fn second_port(addresses: &[SocketAddr]) -> Option<u16> {
    let first = addresses.first()?.port();
    let alone = first != 0 && addresses.iter().all(|address| address.port() == first && !address.ip().is_loopback());
    first.checked_add(1).filter(|_| alone)
}

/// Makes sure that the state directory exists and is its owner's alone.
pub(crate) fn state_dir(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| Error::Setting(format!("cannot use the state directory {}: {error}", path.display())))
}

/// Says which address could not be had.
pub(crate) fn listen_error(what: &str, address: SocketAddr, source: io::Error) -> Error {
    Error::Listen { what: format!("{address} ({what})"), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place<'a>(listen: &'a [SocketAddr], stun: &'a [SocketAddr]) -> Place<'a> {
        Place { region: RegionId::new(900).unwrap(), host: "203.0.113.2".to_owned(), port: 8080, listen, stun }
    }

    #[test]
    fn a_further_stun_port_becomes_a_stun_only_node() {
        let listen = ["203.0.113.2:8080".parse().unwrap(), "[2001:db8::2]:8080".parse().unwrap()];
        let stun = [
            "203.0.113.2:3478".parse().unwrap(),
            "[2001:db8::2]:3478".parse().unwrap(),
            "203.0.113.2:3479".parse().unwrap(),
        ];
        let nodes = place(&listen, &stun).nodes(Some("sha256-raw:00".to_owned()));
        assert_eq!(nodes.len(), 2);
        assert_eq!((nodes[0].stun_port, nodes[0].stun_only, nodes[0].derp_port), (3478, false, 8080));
        assert_eq!((nodes[0].ipv4.as_str(), nodes[0].ipv6.as_str()), ("203.0.113.2", "2001:db8::2"));
        assert_eq!((nodes[1].stun_port, nodes[1].stun_only), (3479, true));
        assert_eq!(nodes[1].cert_name, "");
    }

    #[test]
    fn a_second_port_is_added_where_one_is_named_and_a_nat_may_lie_in_between() {
        let second =
            |list: &[&str]| second_port(&list.iter().map(|text| text.parse().unwrap()).collect::<Vec<SocketAddr>>());
        assert_eq!(second(&["203.0.113.2:3478"]), Some(3479));
        assert_eq!(second(&["203.0.113.2:3478", "[2001:db8::2]:3478"]), Some(3479));
        assert_eq!(second(&["203.0.113.2:3478", "203.0.113.2:5000"]), None);
        for one in ["127.0.0.1:3478", "[::1]:3478", "203.0.113.2:0", "203.0.113.2:65535"] {
            assert_eq!(second(&[one]), None, "{one}");
        }
        assert_eq!(second(&[]), None);
    }

    #[tokio::test]
    async fn a_second_port_that_is_taken_is_done_without() {
        // No second port is added on loopback, so this holds the wildcard's.
        let first = std::net::UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap();
        let Some(next) = second_port(&[first]) else { return };
        let _taken = std::net::UdpSocket::bind((first.ip(), next));
        let bound = Stun::bind_pairs(&[first]).unwrap();
        assert_eq!(bound.addresses(), [first]);
    }

    #[test]
    fn without_stun_the_port_says_so_and_a_wildcard_is_not_published() {
        let nodes = place(&["[::]:8080".parse().unwrap()], &[]).nodes(None);
        assert_eq!(nodes.len(), 1);
        assert_eq!(nodes[0].stun_port, -1);
        assert_eq!((nodes[0].ipv4.as_str(), nodes[0].ipv6.as_str()), ("203.0.113.2", ""));
    }
}
