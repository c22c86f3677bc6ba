//! One report, over sockets of its own: what a person wants to know before there is a node.

use std::future::{Future, pending};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_derp::driver::client::latency_check;
use mesh_derp::map::{DerpMap, DerpRegion, FamilyAddress, RegionId};
use mesh_derp::tls::ClientTls;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use crate::path::{Family, SocketId};
use crate::report::{Event, Netcheck, Report, Scope};

const V4: SocketId = SocketId(0);
const V6: SocketId = SocketId(1);

/// What was found out beside.
enum Finding {
    Addresses(String, Vec<IpAddr>),
    Https(RegionId, Option<(Duration, Family)>),
}

/// Makes one full report about `map`, trusting relays' certificates as `tls` says.
///
/// Takes as long as the farthest of the three nearest regions does, about a second where UDP is blocked, never over 5 s.
pub async fn netcheck_once(map: DerpMap, tls: &ClientTls) -> Report {
    netcheck_with(map, |region| {
        let tls = tls.clone();
        async move { latency_check(&region, &tls).await.ok() }
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
    netcheck.set_sockets(sockets.iter().map(|(id, family, _)| (*id, *family)).collect());

    let map = Arc::new(map);
    let started = super::now();
    netcheck.start(started, Arc::clone(&map), Scope::Full);
    let mut tasks: JoinSet<Finding> = JoinSet::new();
    let (mut buffer_v4, mut buffer_v6) = ([0; 1500], [0; 1500]);
    loop {
        while let Some(transmit) = netcheck.poll_transmit() {
            if let Some(socket) = socket(transmit.socket) {
                // A family without a route is silence, not an error.
                let _ = socket.send_to(&transmit.datagram, transmit.remote).await;
            }
        }
        let mut news = false;
        while let Some(event) = netcheck.poll_event() {
            news = true;
            match event {
                Event::Finished(report) => return report,
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
            received = receive(socket(V4), &mut buffer_v4) => if let Ok(len) = received {
                let _ = netcheck.handle_datagram(super::now(), &buffer_v4[..len]);
            },
            received = receive(socket(V6), &mut buffer_v6) => if let Ok(len) = received {
                let _ = netcheck.handle_datagram(super::now(), &buffer_v6[..len]);
            },
            Some(Ok(finding)) = tasks.join_next() => match finding {
                Finding::Addresses(host, addresses) => netcheck.handle_resolved(super::now(), &host, addresses),
                Finding::Https(region, measured) => netcheck.handle_https_latency(super::now(), region, measured),
            },
            () = sleep_until(netcheck.poll_timeout()) => netcheck.handle_timeout(super::now()),
        }
    }
}

async fn receive(socket: Option<&UdpSocket>, buffer: &mut [u8]) -> io::Result<usize> {
    match socket {
        Some(socket) => socket.recv(buffer).await,
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
    }

    #[tokio::test]
    async fn a_silent_server_leaves_https_to_decide() {
        let silent = super::super::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let map = map(silent.local_addr().unwrap().port());
        let report = netcheck_with(map, |_| async { Some(Duration::from_millis(7)) }).await;
        assert!(!report.udp && report.ipv4);
        assert_eq!(report.region_latency.values().copied().collect::<Vec<_>>(), [Duration::from_millis(7)]);
        assert_eq!(report.preferred, RegionId::new(900));
        assert!(report.took < Duration::from_millis(1500), "{:?}", report.took);
    }
}
