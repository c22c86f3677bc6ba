//! One report, over sockets of its own: what a person wants to know before there is a node.

use std::future::{Future, pending};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_derp::driver::client::latency_check;
use mesh_derp::map::{DerpMap, DerpRegion, FamilyAddress, RegionId};
use mesh_derp::proxy::Proxies;
use mesh_derp::tls::ClientTls;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use super::portal::look_for_portal;
use super::spare::SpareSockets;
use crate::path::{Family, SocketId};
use crate::report::{Event, Netcheck, Report, Scope};

const V4: SocketId = SocketId(0);
const V6: SocketId = SocketId(1);

/// What was found out beside.
enum Finding {
    Addresses(String, Vec<IpAddr>),
    Https(RegionId, Option<(Duration, Family)>),
    Portal(Option<bool>),
}

/// Makes one full report about `map`, trusting relays' certificates as `tls` says. Where UDP is blocked, relays are measured
/// through the proxy that `proxies` name.
///
/// Takes little longer than two round trips to the farthest of the three nearest regions, less than a second where UDP
/// is blocked, never over 1.5 s.
pub async fn netcheck_once(map: DerpMap, tls: &ClientTls, proxies: &Proxies) -> Report {
    netcheck_with(map, |region| {
        let (tls, proxies) = (tls.clone(), proxies.clone());
        async move { latency_check(&region, &tls, &proxies).await.ok() }
    })
    .await
}

/// Makes one full report about `map`. `https` measures a region by HTTPS where UDP is silent; `None` if it cannot.
pub async fn netcheck_with<F, Fut>(map: DerpMap, https: F) -> Report
where
    F: Fn(DerpRegion) -> Fut,
    Fut: Future<Output = Option<Duration>> + Send + 'static,
{
    let sockets = [(V4, Family::V4, "0.0.0.0:0"), (V6, Family::V6, "[::]:0")];
    let open = |(id, family, address): (SocketId, Family, &str)| {
        let address: SocketAddr = address.parse().ok()?;
        Some((id, family, super::bind(address).ok()?))
    };
    let sockets: Vec<_> = sockets.into_iter().filter_map(open).collect();
    let socket = |wanted| sockets.iter().find(|(id, ..)| *id == wanted).map(|(.., socket)| socket);

    // Transaction ids need not be secret here: nothing but this report depends on them.
    let mut seed = [0; 32];
    let mut rng = rand::rngs::SysRng;
    let _ = rand_core::TryRng::try_fill_bytes(&mut rng, &mut seed);
    let mut netcheck = Netcheck::new(seed);
    let bound = |(id, _, socket): &(SocketId, Family, UdpSocket)| Some((*id, socket.local_addr().ok()?));
    netcheck.set_sockets(sockets.iter().map(|(id, family, _)| (*id, *family)).collect());
    netcheck.set_ports(&sockets.iter().filter_map(bound).collect::<Vec<_>>());
    netcheck.set_interfaces(own_addresses(&map));

    let map = Arc::new(map);
    let started = super::now();
    netcheck.start(started, Arc::clone(&map), Scope::Full);
    let mut tasks: JoinSet<Finding> = JoinSet::new();
    let mut spare = SpareSockets::new();
    let (mut buffer_v4, mut buffer_v6) = ([0; 1500], [0; 1500]);
    loop {
        while let Some(transmit) = netcheck.poll_transmit() {
            // A family without a route is silence, not an error.
            match socket(transmit.socket) {
                Some(socket) => drop(socket.send_to(&transmit.datagram, transmit.remote).await),
                None => spare.send(transmit.socket, transmit.remote, &transmit.datagram),
            }
        }
        let mut news = false;
        while let Some(event) = netcheck.poll_event() {
            news = true;
            match event {
                Event::Finished(report) => return report,
                Event::Located(_) => {}
                Event::WantSockets { count } => {
                    let opened = spare.open(count, None);
                    netcheck.handle_sockets(super::now(), &opened);
                }
                Event::WantPortalCheck(checks) => {
                    tasks.spawn(async move { Finding::Portal(look_for_portal(checks).await) });
                }
                Event::Resolve { host } => {
                    tasks.spawn(async move {
                        let found = tokio::net::lookup_host((host.as_str(), 0)).await;
                        let addresses = found.map(|found| found.map(|address| address.ip()).collect());
                        Finding::Addresses(host, addresses.unwrap_or_default())
                    });
                }
                Event::WantHttpsLatency { region } => {
                    if let Some(found) = map.regions.get(&region) {
                        let (measure, family) = (https(found.clone()), https_family(found));
                        tasks.spawn(async move { Finding::Https(region, measure.await.map(|took| (took, family))) });
                    }
                }
            }
        }
        if news {
            continue;
        }
        tokio::select! {
            received = receive(socket(V4), &mut buffer_v4) => if let Ok((len, source)) = received {
                let _ = netcheck.handle_datagram_from(super::now(), source, &buffer_v4[..len]);
            },
            received = receive(socket(V6), &mut buffer_v6) => if let Ok((len, source)) = received {
                let _ = netcheck.handle_datagram_from(super::now(), source, &buffer_v6[..len]);
            },
            (source, datagram) = spare.receive() => {
                let _ = netcheck.handle_datagram_from(super::now(), source, &datagram);
            }
            Some(Ok(finding)) = tasks.join_next() => match finding {
                Finding::Addresses(host, addresses) => netcheck.handle_resolved(super::now(), &host, addresses),
                Finding::Https(region, measured) => netcheck.handle_https_latency(super::now(), region, measured),
                Finding::Portal(found) => netcheck.handle_portal(super::now(), found),
            },
            () = sleep_until(netcheck.poll_timeout()) => netcheck.handle_timeout(super::now()),
        }
    }
}

/// The addresses that the system would send from: to the outside, and to the relays of `map`.
fn own_addresses(map: &DerpMap) -> Vec<IpAddr> {
    let outside = ["192.0.2.1:9", "[2001:db8::1]:9"].into_iter().filter_map(|address| address.parse().ok());
    let given = |node: &mesh_derp::map::DerpNode| match (node.v4(), node.v6()) {
        (FamilyAddress::At(v4), _) => Some(SocketAddr::new(v4.into(), 9)),
        (_, FamilyAddress::At(v6)) => Some(SocketAddr::new(v6.into(), 9)),
        _ => None,
    };
    let relays = map.nodes().filter_map(|(_, node)| given(node)).take(8);
    let own = |remote: SocketAddr| {
        // Nothing is sent: connecting makes the system choose an address.
        let any = if remote.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = std::net::UdpSocket::bind(any).ok()?;
        socket.connect(remote).ok()?;
        socket.local_addr().ok().map(|address| address.ip()).filter(|ip| !ip.is_unspecified())
    };
    outside.chain(relays).filter_map(own).collect()
}

async fn receive(socket: Option<&UdpSocket>, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    match socket {
        Some(socket) => socket.recv_from(buffer).await,
        None => pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => pending().await,
    }
}

/// The family that an HTTPS client most likely takes: a relay that has no IPv4 leaves no choice.
fn https_family(region: &DerpRegion) -> Family {
    let v4 = |relay: &mesh_derp::map::DerpNode| {
        relay.v4() != FamilyAddress::Disabled && relay.host_name.parse::<std::net::Ipv6Addr>().is_err()
    };
    if region.relays().any(v4) { Family::V4 } else { Family::V6 }
}

#[cfg(test)]
mod tests {
    use super::super::StunServer;
    use super::*;
    use mesh_derp::map::DerpNode;

    fn map(port: u16) -> DerpMap {
        let id = RegionId::new(900).unwrap();
        let mut region = DerpRegion::new(id, "test", "Test");
        let mut node = DerpNode::new("900a", id, "127.0.0.1");
        node.ipv4 = "127.0.0.1".into();
        node.ipv6 = "none".into();
        node.stun_port = i32::from(port);
        region.nodes.push(node);
        DerpMap { regions: [(id, region)].into(), ..DerpMap::default() }
    }

    #[tokio::test]
    async fn a_server_on_this_host_is_found_and_preferred() {
        let server = StunServer::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let map = map(server.local_addr().unwrap().port());
        let report = tokio::select! {
            never = server.run() => match never {},
            report = netcheck_with(map, |_| async { None }) => report,
        };
        assert!(report.udp && report.ipv4);
        assert_eq!(report.preferred, RegionId::new(900));
        assert!(report.global_v4.is_some_and(|address| address.ip().is_loopback()));
        assert_eq!(report.translated_v4, Some(false), "this host's own address");
        assert!(report.took < Duration::from_millis(500), "{:?}", report.took);
    }

    #[tokio::test]
    async fn a_silent_server_leaves_https_to_decide() {
        let silent = super::super::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let map = map(silent.local_addr().unwrap().port());
        let report = netcheck_with(map, |_| async { Some(Duration::from_millis(7)) }).await;
        assert!(!report.udp && report.ipv4);
        assert_eq!(report.region_latency.values().copied().collect::<Vec<_>>(), [Duration::from_millis(7)]);
        assert_eq!(report.preferred, RegionId::new(900));
        assert!(report.took < Duration::from_secs(1), "{:?}", report.took);
    }

    #[tokio::test]
    async fn a_server_with_two_ports_tells_that_nothing_filters_by_port() {
        let server = StunServer::bind("127.0.0.1:0".parse().unwrap()).await.unwrap().with_other_port(0).await.unwrap();
        let mut map = map(server.local_addr().unwrap().port());
        let region = map.regions.values_mut().next().unwrap();
        let port = server.other_port().unwrap().unwrap();
        let name = format!("900-stun-{port}");
        region.nodes.push(DerpNode { name, stun_port: port.into(), stun_only: true, ..region.nodes[0].clone() });
        let report = tokio::select! {
            never = server.run() => match never {},
            report = netcheck_with(map, |_| async { None }) => report,
        };
        assert_eq!(report.nat_v4.mapping, Some(crate::Mapping::EndpointIndependent));
        assert_ne!(report.nat_v4.filtering, Some(crate::Filtering::AddressAndPortDependent));
        assert!(report.took < Duration::from_millis(500), "{:?}", report.took);
    }
}
