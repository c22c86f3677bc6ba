//! A node without privileges carries its peers' traffic to a subnet: TCP, UDP and echo requests.
//!
//! The subnet here is a documentation prefix, and a [`Targets`] of the test says that its hosts are 127.0.0.1.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "tests fail by panicking")]

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_node::forward::{Config, Counters, Forwarder, Targets};
use mesh_node::netstack::{self, Netstack, StackDevice};
use mesh_tun::batch::Batch;
use mesh_tun::device::Device;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};

const PEER: &str = "100.64.0.1";
const ROUTER: &str = "100.64.0.2";
/// In the subnet; `.13` is nobody.
const HOST: &str = "192.0.2.7";
const NOBODY: &str = "192.0.2.13";

/// Every host of the subnet but one is this one.
#[derive(Debug)]
struct AllHere;

impl Targets for AllHere {
    fn target(&self, destination: SocketAddr) -> Option<SocketAddr> {
        let known = destination.ip() != NOBODY.parse::<IpAddr>().unwrap();
        known.then(|| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), destination.port()))
    }
}

/// A peer, and the bare end of its cable to a router of 192.0.2.0/24 that runs with `config`.
struct Net {
    peer: Netstack,
    router: Netstack,
    to_router: StackDevice,
    counters: Arc<Counters>,
}

fn net(config: Config) -> Net {
    let mut settings = netstack::Config::with_addresses([PEER.parse().unwrap()]);
    settings.connect_timeout = Duration::from_millis(500);
    let (peer, peer_device) = Netstack::start(settings).unwrap();
    let mut settings = netstack::Config::with_addresses([ROUTER.parse().unwrap()]);
    settings.subnets = vec!["192.0.2.0/24".parse().unwrap()];
    let (router, to_router) = Netstack::start(settings).unwrap();
    pump(peer_device.clone(), to_router.clone());
    pump(to_router.clone(), peer_device);
    let forwarder = Forwarder::new(router.clone(), config).with_targets(Arc::new(AllHere));
    let counters = forwarder.counters();
    tokio::spawn(forwarder.run());
    Net { peer, router, to_router, counters }
}

fn pump(from: StackDevice, to: StackDevice) {
    std::thread::spawn(move || {
        let mut batch = Batch::new(64, 1280);
        while from.read_batch(&mut batch, Duration::from_secs(5)).is_ok() && to.write_batch(&mut batch).is_ok() {
            batch.clear();
        }
    });
}

fn at(host: &str, port: u16) -> SocketAddr {
    SocketAddr::new(host.parse().unwrap(), port)
}

/// Waits until `condition` holds, for five seconds.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_reaches_a_host_of_the_subnet() {
    let net = net(Config::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        stream.write_all(&all).await.unwrap();
    });
    let mut stream = net.peer.dial_tcp(at(HOST, port)).await.unwrap();
    let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    stream.write_all(&sent).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut echoed = Vec::new();
    stream.read_to_end(&mut echoed).await.unwrap();
    assert!(echoed == sent, "bytes changed on the way");
    assert_eq!((net.counters.accepted(), net.counters.refused()), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_dialed_is_refused_and_other_prefixes_are_not_taken() {
    let net = net(Config::default());
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    for target in [at(HOST, closed), at(NOBODY, 80)] {
        assert_eq!(net.peer.dial_tcp(target).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
    assert_eq!((net.counters.accepted(), net.counters.refused()), (0, 2));
    assert_eq!(net.peer.dial_tcp(at("198.51.100.1", 80)).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert!(net.router.counters().drops.misaddressed > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subnet_that_is_given_up_ends_its_connections() {
    let net = net(Config::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut stream = net.peer.dial_tcp(at(HOST, listener.local_addr().unwrap().port())).await.unwrap();
    net.router.set_subnets(&[]);
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_for_all_our_addresses_is_not_one_for_the_subnet() {
    let net = net(Config::default());
    let _ours = net.router.listen_tcp(80).unwrap();
    assert_eq!(net.peer.dial_tcp(at(NOBODY, 80)).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    assert!(net.peer.dial_tcp(at(ROUTER, 80)).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datagrams_find_their_way_there_and_back_in_bounded_flows() {
    let mut config = Config::default();
    config.max_flows = 2;
    let net = net(config);
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = server.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut buffer = [0; 100];
        loop {
            let (len, from) = server.recv_from(&mut buffer).await.unwrap();
            server.send_to(&buffer[..len], from).await.unwrap();
        }
    });
    for question in [b"first".as_slice(), b"second"] {
        let socket = net.peer.bind_udp(0).unwrap();
        socket.send_to(question, at(HOST, port)).unwrap();
        let (flow, answer) = socket.recv().await.unwrap();
        assert_eq!((flow.remote, answer.as_slice()), (at(HOST, port), question));
    }
    let third = net.peer.bind_udp(0).unwrap();
    third.send_to(b"third", at(HOST, port)).unwrap();
    eventually("the third flow is dropped", || net.counters.dropped_datagrams() == 1).await;
}

/// An ICMP echo request to `host` with an IPv4 header.
fn echo_request(host: &str) -> Vec<u8> {
    use mesh_tun::packet::checksum::{Sum, fill_ipv4_header};
    let mut packet = vec![0x45, 0, 0, 36, 0, 1, 0x40, 0, 64, 1, 0, 0];
    packet.extend(PEER.parse::<Ipv4Addr>().unwrap().octets());
    packet.extend(host.parse::<Ipv4Addr>().unwrap().octets());
    packet.extend([8, 0, 0, 0, 0x12, 0x34, 0, 1]);
    packet.extend(b"whats up");
    fill_ipv4_header(&mut packet).unwrap();
    let sum = Sum::default().bytes(&packet[20..]).finish();
    packet[22..24].copy_from_slice(&sum.to_be_bytes());
    packet
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_echo_request_is_answered_when_the_host_has_answered() {
    let net = net(Config::default());
    assert_eq!(net.to_router.send([echo_request(NOBODY)]), 1);
    eventually("nobody is no host", || net.counters.dropped_pings() == 1).await;
    assert_eq!(net.counters.pings(), 0);
    // The pump carries the answer to the peer's stack, which has not asked; the counter says that it was made.
    assert_eq!(net.to_router.send([echo_request(HOST)]), 1);
    let both = || (net.counters.pings(), net.counters.dropped_pings());
    let expected = if may_ping() { (1, 1) } else { (0, 2) };
    eventually("this host answers, if it may be asked", || both() == expected).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answer_to_an_echo_request_comes_from_the_host_that_was_asked() {
    let mut settings = netstack::Config::with_addresses([ROUTER.parse().unwrap()]);
    settings.subnets = vec!["192.0.2.0/24".parse().unwrap()];
    let (router, device) = Netstack::start(settings).unwrap();
    let mut requests = router.requests().unwrap();
    let request = echo_request(HOST);
    device.send([request.clone()]);
    let Some(netstack::Request::Ping(ping)) = requests.next().await else { panic!("an echo was requested") };
    assert_eq!(ping.destination(), Some(HOST.parse().unwrap()));
    assert_eq!(ping.message(), &request[20..]);
    ping.answer();
    let mut answer = Vec::new();
    device.recv(1, Duration::from_secs(5), |packet| answer = packet).unwrap();
    assert_eq!((&answer[12..16], &answer[16..20]), (&request[16..20], &request[12..16]));
    assert_eq!((answer[20], &answer[24..]), (0, &request[24..]));
    let is_right = |bytes| mesh_tun::packet::checksum::Sum::default().bytes(bytes).finish() == 0;
    assert!(is_right(&answer[..20]) && is_right(&answer[20..]));
}

/// Whether this process may open an ICMP socket: its group is in `net.ipv4.ping_group_range`.
fn may_ping() -> bool {
    let flags = rustix::net::SocketFlags::CLOEXEC;
    rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        flags,
        Some(rustix::net::ipproto::ICMP),
    )
    .is_ok()
}
