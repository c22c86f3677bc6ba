//! The TUN device, netlink and policy routing, in a network namespace of their own.
//!
//! Needs root: `unshare -n cargo test -p mesh-tun --test namespace -- --ignored --test-threads=1`.
#![cfg(all(target_os = "linux", feature = "tokio"))]
#![expect(clippy::unwrap_used, reason = "a helper outside a test function, in a test")]

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use mesh_tun::batch::Batch;
use mesh_tun::device::Device;
use mesh_tun::linux::monitor::Monitor;
use mesh_tun::linux::netlink::{Netlink, has_ipv6};
use mesh_tun::linux::tun::{Config, Tun};
use mesh_tun::linux::{BYPASS_MARK, BYPASS_MASK, interfaces, udp};
use mesh_tun::packet::{Packet, Transport, checksum};
use mesh_tun::plan::{self, Host, Routing};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and a network namespace of its own"]
async fn a_tunnel_is_configured_carries_packets_and_leaves_nothing_behind() {
    let netlink = Netlink::open().unwrap();
    let before = interfaces::interfaces(&netlink).await.unwrap();
    assert!(!before.default_v4, "run this in a fresh network namespace: unshare -n");
    let mut monitor = Monitor::start().unwrap();
    let tun = Tun::open(&Config::named("meshtest%d")).unwrap();
    tokio::time::timeout(Duration::from_secs(5), monitor.changed()).await.expect("a new interface is a change");
    assert_eq!((tun.name(), tun.mtu()), ("meshtest0", 1280));
    assert!(Tun::open(&Config::named(tun.name())).unwrap_err().to_string().contains("in use"));

    let routing = if netlink.has_policy_routing().await {
        Routing::Policy { mark: (BYPASS_MARK, BYPASS_MASK) }
    } else {
        Routing::Main
    };
    let addresses = ["100.64.0.1/32".parse().unwrap(), "fd7a:115c:a1e0::1/128".parse().unwrap()];
    let routes = ["100.64.0.0/10".parse().unwrap(), "fd7a:115c:a1e0::/48".parse().unwrap()];
    let mut wanted = plan::wanted(&addresses, &routes, routing);
    if !has_ipv6() {
        wanted = wanted.ipv4_only();
    }
    let done = netlink.converge(tun.index(), &wanted).await.unwrap();
    assert_eq!(netlink.found(tun.index()).await.unwrap(), wanted);
    assert_eq!(netlink.converge(tun.index(), &wanted).await.unwrap(), [], "nothing is left to do");
    netlink.apply_all(tun.index(), &done).await.expect("done again is done");

    carries_packets(&tun);
    if let Routing::Policy { .. } = routing {
        let mut config = udp::Config::bound_to("0.0.0.0:0".parse().unwrap());
        config.mark = Some(BYPASS_MARK);
        let socket = udp::UdpBatch::bind(&config).unwrap();
        assert!(socket.is_marked());
        let looped = socket.send_to(b"underlay", "100.64.0.9:9".parse().unwrap());
        assert!(looped.is_err(), "a marked socket sees no route into the tunnel");
    }

    netlink.apply_all(tun.index(), &plan::undo(&done)).await.unwrap();
    assert_eq!(netlink.found(tun.index()).await.unwrap(), Host::default());
    drop(tun);
    assert_eq!(interfaces::interfaces(&netlink).await.unwrap(), before);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root and a network namespace of its own"]
async fn another_default_router_with_the_same_addresses_is_a_change() {
    let ip = |line: &str| {
        let done = std::process::Command::new("ip").args(line.split(' ')).status().unwrap();
        assert!(done.success(), "ip {line}");
    };
    ip("link add routed0 type veth peer name routed1");
    ip("address add 192.0.2.7/24 dev routed0");
    ip("link set routed1 up");
    ip("link set routed0 up");
    ip("route replace default via 192.0.2.1");
    let netlink = Netlink::open().unwrap();
    let mut monitor = Monitor::start().unwrap();
    let before = interfaces::interfaces(&netlink).await.unwrap();
    let router = |found: &interfaces::Interfaces| found.router_v4.map(|router| router.address.to_string());
    assert_eq!(router(&before).as_deref(), Some("192.0.2.1"));

    ip("route replace default via 192.0.2.2");
    tokio::time::timeout(Duration::from_secs(5), monitor.changed()).await.expect("a new router is a change");
    let after = interfaces::interfaces(&netlink).await.unwrap();
    assert_eq!(router(&after).as_deref(), Some("192.0.2.2"));
    assert_eq!(before.interfaces, after.interfaces, "and nothing else has changed");

    // A third one in its place, and then none.
    ip("route replace default via 192.0.2.3");
    monitor.changed().await;
    assert_eq!(router(&interfaces::interfaces(&netlink).await.unwrap()).as_deref(), Some("192.0.2.3"));
    ip("route delete default via 192.0.2.3");
    monitor.changed().await;
    assert!(!interfaces::interfaces(&netlink).await.unwrap().default_v4);
    ip("link delete routed0");
}

/// One datagram out through the kernel, and its answer in.
fn carries_packets(tun: &Tun) {
    let socket = UdpSocket::bind("100.64.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.send_to(b"question", "100.64.0.2:53").unwrap();
    let mut batch = Batch::new(16, tun.mtu());
    let question = loop {
        batch.clear();
        assert_ne!(tun.read_batch(&mut batch, Duration::from_secs(5)).unwrap(), 0, "the question never came");
        let found = batch.iter().position(|bytes| {
            Packet::parse(bytes).is_ok_and(|packet| matches!(packet.transport, Transport::Udp { destination: 53, .. }))
        });
        if let Some(index) = found {
            break batch.packet(index).to_vec();
        }
    };
    assert!(checksum::transport_is_valid(&Packet::parse(&question).unwrap()), "completed by the kernel or by us");
    // Swapped addresses and ports leave both checksums right.
    let mut answer = question;
    answer[12..20].rotate_left(4);
    answer[20..24].rotate_left(2);
    batch.clear();
    assert!(batch.push(&answer));
    assert_eq!(tun.write_batch(&mut batch).unwrap(), 1);
    let mut buffer = [0; 100];
    let (len, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..len], from), (b"question".as_slice(), "100.64.0.2:53".parse::<SocketAddr>().unwrap()));
}
