//! What comes from gateways, and what comes to them: port mappings in all three protocols.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use mesh_nat::portmap::gateway::{Config as GatewayConfig, Gateway, Quirks};
use mesh_nat::portmap::{Config, Mapper, Network, Transmit, http, nat_pmp, pcp, ssdp, upnp};

const INSIDE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 1, 1));
const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 1, 7));
const INSIDE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
const CLIENT_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7));

/// PCP and NAT-PMP: what is read is written and read again as the same, and a mapper and a gateway take it in their lives.
///
/// # Panics
/// When it has found a failure.
pub fn portmap(bytes: &[u8]) {
    if let Ok(request) = pcp::Request::decode(bytes) {
        assert_eq!(pcp::Request::decode(&request.encode()), Ok(request));
    }
    if let Ok(response) = pcp::Response::decode(bytes) {
        assert_eq!(pcp::Response::decode(&response.encode()), Ok(response));
    }
    if let Ok(request) = nat_pmp::Request::decode(bytes) {
        assert_eq!(nat_pmp::Request::decode(&request.encode()), Ok(request));
    }
    if let Ok(response) = nat_pmp::Response::decode(bytes) {
        assert_eq!(nat_pmp::Response::decode(&response.encode()), Ok(response));
    }
    let mut now = super::epoch();
    let mut gateway = Gateway::new(now, GatewayConfig::new(INSIDE, Ipv4Addr::new(203, 0, 113, 5)));
    let source = SocketAddr::new(CLIENT, 5555);
    let mut mapper = mapper(INSIDE, CLIENT);
    // Each datagram behind its length; the length's top bits say how much time passes before.
    let mut rest = bytes;
    while let Some((&[len], behind)) = rest.split_first_chunk() {
        let (datagram, behind) = behind.split_at(usize::from(len % 80).min(behind.len()));
        rest = behind;
        now += Duration::from_secs(u64::from(len / 80) * 400);
        for answer in gateway.handle_datagram(now, source, pcp::SERVER_PORT, datagram) {
            let _ = mapper.handle_datagram(now, SocketAddr::new(INSIDE, pcp::SERVER_PORT), &answer);
        }
        let _ = mapper.handle_datagram(now, SocketAddr::new(INSIDE, pcp::SERVER_PORT), datagram);
        step(&mut mapper, &mut gateway, now);
    }
}

/// Searches, descriptions and calls: read in one piece or in two, and by a mapper that has nothing but UPnP.
///
/// # Panics
/// When it has found a failure.
pub fn upnp(bytes: &[u8]) {
    let _ = (ssdp::answer(bytes), ssdp::searched(bytes), http::response(bytes, true));
    for cut in [bytes.len() / 2, bytes.len() * 3 / 4] {
        if let Ok(Some(early)) = http::response(&bytes[..cut], false) {
            assert_eq!(http::response(bytes, false), Ok(Some(early)), "a whole answer changed when more came");
        }
    }
    if let Ok(Some(request)) = http::request(bytes) {
        let _ = upnp::Action::decode(request.soap_action, &request.body);
    }
    let text = String::from_utf8_lossy(bytes);
    let location = http::Url { port: 5000, path: "/d/x.xml".to_owned() };
    for service in upnp::services(bytes, &location) {
        let map = upnp::PortMapping { external_port: 1, internal_port: 2, client: Ipv4Addr::LOCALHOST, lease: 3 };
        let hole = upnp::Pinhole { client: Ipv6Addr::LOCALHOST, port: 2, lease: 3 };
        for call in [upnp::Action::AddPortMapping(map), upnp::Action::AddPinhole(hole)] {
            let read = upnp::Action::decode(&call.soap_action(&service), call.encode(&service).as_bytes());
            assert_eq!(read, Some(call), "{service:?} breaks out of the call");
        }
    }
    if let Some(url) = http::Url::parse(&text) {
        assert!(url.path.starts_with('/') && !url.path.contains(char::is_whitespace), "{url:?}");
    }
    let _ = upnp::Answer::decode(500, bytes);

    // The bytes in place of every third answer that a mapper gets: a description, an address, a mapping; or a pinhole.
    let now = super::epoch();
    let (inside, client, wanted) = match bytes.len() / 6 % 2 {
        0 => (INSIDE, CLIENT, ssdp::GATEWAY),
        _ => (INSIDE_V6, CLIENT_V6, ssdp::FIREWALL),
    };
    let mut mapper = mapper(inside, client);
    let found = ssdp::respond(SocketAddr::new(inside, 5000), "/description.xml", wanted);
    let _ = mapper.handle_datagram(now, SocketAddr::new(inside, ssdp::PORT), &found);
    let later = now + Duration::from_secs(1);
    mapper.handle_timeout(later);
    let mut config = GatewayConfig::new(inside, Ipv4Addr::new(203, 0, 113, 5));
    config.quirks = Quirks { first_version: bytes.len().is_multiple_of(2), taken: vec![4242], ..Quirks::default() };
    let mut gateway = Gateway::new(now, config);
    let (told, which) = (http::Response { status: 200, body: bytes.to_vec() }, bytes.len() % 3);
    let mut exchanges = 0;
    while exchanges < 32 {
        let Some(transmit) = mapper.poll_transmit() else { break };
        let Transmit::Http { id, request, .. } = transmit else { continue };
        let real = gateway.handle_http(later, client, &request);
        let real = real.and_then(|bytes| http::response(&bytes, true).ok().flatten());
        mapper.handle_http(later, id, if exchanges % 3 == which { Some(&told) } else { real.as_ref() });
        exchanges += 1;
    }
    assert!(exchanges < 32, "a gateway keeps a mapper busy for ever");
}

fn mapper(gateway: IpAddr, client: IpAddr) -> Mapper {
    let mut mapper = Mapper::new(Config::default(), [1; 32]);
    mapper.set_network(super::epoch(), Some(Network { gateway, scope: 0, client }));
    mapper.set_port(super::epoch(), Some(4242));
    mapper
}

/// Lets time come to `now`, and the gateway answer.
fn step(mapper: &mut Mapper, gateway: &mut Gateway, now: std::time::Instant) {
    mapper.handle_timeout(now);
    for _ in 0..32 {
        let Some(transmit) = mapper.poll_transmit() else { break };
        if let Transmit::Datagram { remote, datagram } = transmit {
            for answer in gateway.handle_datagram(now, SocketAddr::new(CLIENT, 5555), remote.port(), &datagram) {
                let _ = mapper.handle_datagram(now, SocketAddr::new(INSIDE, remote.port()), &answer);
            }
        }
    }
    while mapper.poll_transmit().is_some() {}
    while mapper.poll_event().is_some() {}
    assert!(mapper.poll_timeout().is_none_or(|next| next > now), "a due deadline was left behind");
}
