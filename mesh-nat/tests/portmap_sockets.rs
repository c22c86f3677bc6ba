//! Port mappings over real sockets on loopback: our gateway serves our driver, the crates `crab_nat` and `igd-next`, and
//! Debian's `natpmpc` and `upnpc` (`cargo test -p mesh-nat --test portmap_sockets -- --ignored`).
//!
//! Gateways have fixed ports, so each test gives its gateway a loopback address of its own. IPv6 has only one.

#![cfg(all(feature = "sim", feature = "tokio", target_os = "linux"))]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "tests fail by panicking and read the real clock"
)]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, UdpSocket};
use std::num::NonZeroU16;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crab_nat::{InternetProtocol, PortMapping, PortMappingOptions, PortMappingType};
use igd_next::{PortMappingProtocol, SearchOptions};
use mesh_nat::driver::PortMapper;
use mesh_nat::portmap::gateway::{Config as GatewayConfig, Gateway, HTTP_PORT, Quirks};
use mesh_nat::portmap::{Config, Event, Network, Protocol, Status, pcp, ssdp};

const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 5);
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// What threads wait before they look whether the test is over.
const TICK: Duration = Duration::from_millis(50);

/// A gateway on sockets; ends when dropped.
struct Served {
    address: IpAddr,
    core: Arc<Mutex<Gateway>>,
    over: Arc<AtomicBool>,
}

impl Served {
    /// `number` keeps the tests of this file apart, the process id those of other runs.
    fn start(number: u8, protocols: &[Protocol], quirks: Quirks) -> Self {
        let [.., high, low] = std::process::id().to_be_bytes();
        Self::at(IpAddr::from([127, 10 + number, high, low.clamp(1, 254)]), protocols, quirks)
    }

    fn at(address: IpAddr, protocols: &[Protocol], quirks: Quirks) -> Self {
        let mut config = GatewayConfig::new(address, OUTSIDE).speaking(protocols);
        config.quirks = quirks;
        let served =
            Self { address, core: Arc::new(Mutex::new(Gateway::new(Instant::now(), config))), over: Arc::default() };
        for port in [pcp::SERVER_PORT, ssdp::PORT] {
            served.serve_udp(port);
        }
        served.serve_http();
        served
    }

    fn serve_udp(&self, port: u16) {
        let socket = bound(|| UdpSocket::bind((self.address, port)));
        socket.set_read_timeout(Some(TICK)).unwrap();
        let (core, over) = (Arc::clone(&self.core), Arc::clone(&self.over));
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !over.load(Relaxed) {
                let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
                let answers = core.lock().unwrap().handle_datagram(Instant::now(), from, port, &buffer[..len]);
                for answer in answers {
                    socket.send_to(&answer, from).unwrap();
                }
            }
        });
    }

    fn serve_http(&self) {
        let listener = bound(|| TcpListener::bind((self.address, HTTP_PORT)));
        listener.set_nonblocking(true).unwrap();
        let (core, over) = (Arc::clone(&self.core), Arc::clone(&self.over));
        std::thread::spawn(move || {
            while !over.load(Relaxed) {
                let Ok((mut stream, from)) = listener.accept() else {
                    std::thread::sleep(TICK / 10);
                    continue;
                };
                stream.set_nonblocking(false).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                let (mut received, mut buffer) = (Vec::new(), [0; 4096]);
                while let Ok(len @ 1..) = stream.read(&mut buffer) {
                    received.extend_from_slice(&buffer[..len]);
                    let answer = core.lock().unwrap().handle_http(Instant::now(), from.ip(), &received);
                    if let Some(answer) = answer {
                        stream.write_all(&answer).unwrap();
                        break;
                    }
                }
            }
        });
    }

    fn inside(&self, port: u16) -> Option<SocketAddr> {
        self.core.lock().unwrap().inside(Instant::now(), port)
    }

    fn is_open(&self, inside: SocketAddr) -> bool {
        self.core.lock().unwrap().is_open(Instant::now(), inside)
    }

    fn count(&self) -> usize {
        self.core.lock().unwrap().count(Instant::now())
    }
}

/// Binds, and waits for another run of these tests to let go of the address.
fn bound<T>(bind: impl Fn() -> std::io::Result<T>) -> T {
    let began = Instant::now();
    loop {
        match bind() {
            Err(error) if error.kind() == ErrorKind::AddrInUse && began.elapsed() < Duration::from_secs(10) => {
                std::thread::sleep(TICK);
            }
            outcome => return outcome.unwrap(),
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
    }
}

fn mapper(gateway: IpAddr, port: u16) -> PortMapper {
    let client = if gateway.is_ipv6() { gateway } else { CLIENT };
    let mut mapper = PortMapper::new(Config::default(), [9; 32], None, Box::new(Instant::now));
    mapper.set_network(Some(Network { gateway, scope: 0, client }));
    mapper.set_port(Some(port));
    mapper
}

async fn until(mapper: &mut PortMapper, wanted: impl Fn(&Status) -> bool) -> Status {
    let wait = async {
        loop {
            if let Event::Changed(status) = mapper.next_event().await
                && wanted(&status)
            {
                return status;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(15), wait).await.expect("it comes to that in time")
}

#[tokio::test]
async fn each_protocol_gives_a_mapping_over_real_sockets_and_takes_it_back() {
    for (number, protocol) in (0..).zip(Protocol::ALL) {
        let served = Served::start(number, &[protocol], Quirks::default());
        let mut mapper = mapper(served.address, 41641);
        let status = until(&mut mapper, |status| status.mapping.is_some()).await;
        assert_eq!(status.mapping.unwrap().protocol, protocol);
        assert_eq!(status.endpoint(), Some(SocketAddr::new(OUTSIDE.into(), 41641)));
        assert_eq!(served.inside(41641), Some(SocketAddr::new(CLIENT, 41641)));
        mapper.close().await;
        assert_eq!(served.count(), 0, "{protocol}");
    }
}

/// One test, because all of its gateways have the same address.
#[tokio::test]
async fn pinholes_are_opened_over_real_sockets_by_our_driver_and_by_another_client() {
    let gateway = IpAddr::V6(Ipv6Addr::LOCALHOST);
    if UdpSocket::bind((gateway, 0)).is_err() {
        println!("SKIPPED: this host has no IPv6");
        return;
    }
    let inside = SocketAddr::new(gateway, 41641);
    for protocol in [Protocol::Pcp, Protocol::Upnp] {
        let served = Served::at(gateway, &[protocol], Quirks::default());
        let mut mapper = mapper(gateway, inside.port());
        let status = until(&mut mapper, |status| status.mapping.is_some()).await;
        let mapping = status.mapping.unwrap();
        assert_eq!((mapping.protocol, mapping.external), (protocol, inside));
        assert!(served.is_open(inside), "{protocol}");
        mapper.close().await;
        assert_eq!(served.count(), 0, "{protocol}");
    }

    let served = Served::at(gateway, &[Protocol::Upnp], Quirks::default());
    let firewall = igd_next::search_ipv6_firewall_gateway(search_at(gateway)).unwrap();
    let client = SocketAddrV6::new(Ipv6Addr::LOCALHOST, inside.port(), 0, 0);
    let id = firewall.add_pinhole(PortMappingProtocol::UDP, client, 60).unwrap();
    assert!(served.is_open(inside));
    firewall.update_pinhole(id, 120).unwrap();
    firewall.remove_pinhole(id).unwrap();
    assert_eq!(served.count(), 0);
    assert!(firewall.update_pinhole(id, 60).is_err(), "it is gone");
}

#[tokio::test]
async fn another_client_of_pcp_and_nat_pmp_is_served() {
    for (number, protocol) in [(8, Protocol::Pcp), (9, Protocol::NatPmp)] {
        let served = Served::start(number, &[protocol], Quirks { taken: vec![5000], ..Quirks::default() });
        let port = NonZeroU16::new(41641).unwrap();
        let options = PortMappingOptions {
            external_port: NonZeroU16::new(5000),
            lifetime_seconds: Some(60),
            ..PortMappingOptions::default()
        };
        // It asks for PCP first, and takes a refusal of that version for an invitation to NAT-PMP.
        let asked = PortMapping::new(served.address.into(), CLIENT, InternetProtocol::Udp, port, options);
        let mut mapping = asked.await.unwrap();
        match mapping.mapping_type() {
            PortMappingType::Pcp { external_ip, .. } => {
                assert_eq!((protocol, external_ip), (Protocol::Pcp, IpAddr::V4(OUTSIDE)));
            }
            PortMappingType::NatPmp => assert_eq!(protocol, Protocol::NatPmp),
        }
        // Asked for 5000, which is taken; given the private port.
        assert_eq!((mapping.external_port(), mapping.lifetime()), (port, 60));
        assert_eq!(served.inside(41641), Some(SocketAddr::new(CLIENT, 41641)));
        mapping.renew().await.unwrap();
        assert_eq!((mapping.external_port(), served.count()), (port, 1), "{protocol}: renewed, not made anew");
        mapping.try_drop().await.unwrap();
        assert_eq!(served.count(), 0, "{protocol}");
    }
    let served = Served::start(10, &[Protocol::NatPmp], Quirks::default());
    let seen = crab_nat::natpmp::external_address(served.address.into(), None).await.unwrap();
    assert_eq!(seen, OUTSIDE);
}

fn search_at(gateway: IpAddr) -> SearchOptions {
    let mut options = SearchOptions::default();
    options.broadcast_address = SocketAddr::new(gateway, ssdp::PORT);
    // It does not trust loopback addresses that answer, unless told to.
    options.allowed_gateway_ips = vec![gateway];
    options.bind_addr = SocketAddr::new(if gateway.is_ipv6() { gateway } else { CLIENT }, 0);
    options
}

#[test]
fn another_client_of_upnp_is_served() {
    for (number, first_version) in [(11, true), (12, false)] {
        let served = Served::start(number, &[Protocol::Upnp], Quirks { first_version, ..Quirks::default() });
        let gateway = igd_next::search_gateway(search_at(served.address)).unwrap();
        assert_eq!(gateway.get_external_ip().unwrap(), IpAddr::V4(OUTSIDE));
        let (first, second) = (SocketAddr::new(CLIENT, 41641), SocketAddr::new(CLIENT, 41642));
        gateway.add_port(PortMappingProtocol::UDP, 5000, first, 60, "test").unwrap();
        assert_eq!(served.inside(5000), Some(first));
        assert!(gateway.add_port(PortMappingProtocol::UDP, 5000, second, 60, "test").is_err(), "it is taken");
        let any = gateway.add_any_port(PortMappingProtocol::UDP, second, 60, "test").unwrap();
        assert_eq!(served.inside(any), Some(second));
        for port in [5000, any] {
            gateway.remove_port(PortMappingProtocol::UDP, port).unwrap();
        }
        assert_eq!(served.count(), 0);
    }
}

#[tokio::test]
async fn a_waiting_driver_may_be_dropped_and_asked_again() {
    let served = Served::start(3, &[Protocol::Upnp], Quirks { permanent_only: true, ..Quirks::default() });
    let mut mapper = mapper(served.address, 41641);
    let began = Instant::now();
    while mapper.status().mapping.is_none() && began.elapsed() < Duration::from_secs(15) {
        tokio::time::timeout(Duration::from_millis(3), mapper.next_event()).await.ok();
    }
    assert_eq!(mapper.status().mapping.unwrap().protocol, Protocol::Upnp);
}

#[tokio::test]
async fn a_server_that_sends_without_end_is_given_up() {
    let [.., high, low] = std::process::id().to_be_bytes();
    let address = IpAddr::from([127, 14, high, low.clamp(1, 254)]);
    let search = UdpSocket::bind((address, ssdp::PORT)).unwrap();
    let flood = TcpListener::bind((address, HTTP_PORT)).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        let (_, from) = search.recv_from(&mut buffer).unwrap();
        let host = SocketAddr::new(address, HTTP_PORT);
        search.send_to(&ssdp::respond(host, "/d.xml", ssdp::GATEWAY), from).unwrap();
        let (mut stream, _) = flood.accept().unwrap();
        let mut sent = 0;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        // Ends when the other side has had enough; a bound in case that it never has.
        while sent < 100_000_000 && stream.write_all(&[b' '; 4096]).is_ok() {
            sent += 4096;
        }
        assert!(sent < 100_000_000);
    });
    let mut mapper = mapper(address, 41641);
    let status = until(&mut mapper, |status| status.problem.is_some()).await;
    assert_eq!(status.upnp, Some(true));
    assert!(status.problem.unwrap().to_string().starts_with("UPnP"), "{status:?}");
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    println!("{program} {}:\n{text}", arguments.join(" "));
    text
}

#[test]
#[ignore = "needs natpmpc"]
fn the_reference_client_of_nat_pmp_is_served() {
    let served = Served::start(5, &[Protocol::NatPmp], Quirks { taken: vec![5000], ..Quirks::default() });
    let gateway = served.address.to_string();
    let text = run("natpmpc", &["-g", &gateway, "-a", "5000", "41641", "udp", "60"]);
    assert!(text.contains("Public IP address : 203.0.113.5"), "{text}");
    // Asked for 5000, which is taken; given the private port.
    assert!(text.contains("Mapped public port 41641 protocol UDP to local port 41641 liftime 60"), "{text}");
    assert_eq!(served.inside(41641), Some(SocketAddr::new(CLIENT, 41641)));
    run("natpmpc", &["-g", &gateway, "-a", "0", "41641", "udp", "0"]);
    assert_eq!(served.count(), 0);
}

#[test]
#[ignore = "needs upnpc"]
fn the_reference_client_of_upnp_is_served() {
    for (number, first_version) in [(6, true), (7, false)] {
        let served = Served::start(number, &[Protocol::Upnp], Quirks { first_version, ..Quirks::default() });
        let url = format!("http://{}:{HTTP_PORT}/description.xml", served.address);
        let text = run("upnpc", &["-u", &url, "-a", "127.0.0.1", "41641", "5000", "udp", "60"]);
        assert!(text.contains("ExternalIPAddress = 203.0.113.5"), "{text}");
        assert_eq!(served.inside(5000), Some(SocketAddr::new(CLIENT, 41641)), "{text}");
        run("upnpc", &["-u", &url, "-d", "5000", "udp"]);
        assert_eq!(served.count(), 0);
    }
}
