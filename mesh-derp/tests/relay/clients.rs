//! Clients that do as they should.

use bytes::Bytes;
use mesh_derp::driver::client::{RelayEvent, latency_check};
use mesh_derp::frame::{Frame, GoneReason};
use mesh_derp::map::DerpNode;
use mesh_derp::proxy::Proxies;
use mesh_derp::tls::{ClientTls, ServerTls};
use mesh_noise::key::NodePublic;

use crate::harness::{
    PATIENCE, Raw, TestRelay, client, connected, disco, event, eventually, node_key, packet, trusting,
};

async fn talk(relay: &TestRelay, tls: ClientTls) {
    let (mut a, mut b) = (client(relay.region(), tls.clone(), 1), client(relay.region(), tls, 2));
    connected(&mut a).await;
    connected(&mut b).await;
    a.outbox().try_send(node_key(2).public(), Bytes::from_static(b"ping"));
    let (source, payload) = tokio::select! {
        got = packet(&mut b) => got,
        other = a.next_event() => panic!("{other:?}"),
    };
    assert_eq!((source, &payload[..]), (node_key(1).public(), &b"ping"[..]));
    b.outbox().try_send(source, Bytes::from_static(b"pong"));
    let (source, payload) = tokio::select! {
        got = packet(&mut a) => got,
        other = b.next_event() => panic!("{other:?}"),
    };
    assert_eq!((source, &payload[..]), (node_key(2).public(), &b"pong"[..]));
    let counters = relay.counters();
    assert_eq!((counters.packets_in, counters.packets_out, counters.nodes), (2, 2, 2));
    assert_eq!((counters.bytes_in, counters.dropped_unknown), (8, 0));
    assert_eq!(a.outbox().counters().sent, 1);
}

#[tokio::test]
async fn two_clients_talk_over_pinned_tls() {
    let relay = TestRelay::start().await;
    talk(&relay, trusting()).await;
}

#[tokio::test]
async fn two_clients_talk_over_plain_http_on_the_same_port() {
    let relay = TestRelay::start().await;
    talk(&relay, ClientTls::plain()).await;
}

#[tokio::test]
async fn a_certificate_authority_from_a_file_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let tls = ServerTls::load_or_generate(dir.path(), &["localhost".to_owned()]).unwrap();
    let relay = TestRelay::start_showing(&tls, Default::default(), "127.0.0.1:0".parse().unwrap()).await;
    let mut region = relay.region();
    region.nodes[0].cert_name = String::new();
    let mut knowing = client(region.clone(), ClientTls::with_ca_file(&dir.path().join("tls.pem")).unwrap(), 1);
    connected(&mut knowing).await;
    let mut ignorant = client(region, trusting(), 2);
    let RelayEvent::Disconnected { reason } = event(&mut ignorant).await else { panic!() };
    assert!(reason.starts_with("localhost: tls: invalid peer certificate: "), "{reason}");
}

#[tokio::test]
async fn a_wrong_pin_is_refused_in_one_clear_line_and_tests_may_ignore_it() {
    let relay = TestRelay::start().await;
    let mut region = relay.region();
    region.nodes[0].cert_name = format!("sha256-raw:{}", "00".repeat(32));
    let RelayEvent::Disconnected { reason } = event(&mut client(region.clone(), trusting(), 1)).await else { panic!() };
    assert!(reason.contains("not the pinned one") && reason.contains(&relay.pin), "{reason}");
    assert!(!reason.contains('\n'));
    region.nodes[0].cert_name = String::new();
    region.nodes[0].insecure_for_tests = true;
    connected(&mut client(region, trusting(), 1)).await;
}

#[tokio::test]
async fn the_second_node_serves_when_the_first_does_not() {
    let relay = TestRelay::start().await;
    let mut region = relay.region();
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = dead.local_addr().unwrap().port();
    drop(dead);
    region.nodes[0].name = "900b".into();
    region.nodes.insert(0, DerpNode { name: "900a".into(), derp_port: port, ..region.nodes[0].clone() });
    region.nodes.insert(0, DerpNode { name: "900s".into(), stun_only: true, ..region.nodes[0].clone() });
    let mut client = client(region, trusting(), 1);
    let RelayEvent::Connected { node } = event(&mut client).await else { panic!() };
    assert_eq!(node, "900b");
}

#[tokio::test]
async fn packets_queued_before_the_connection_are_sent_and_one_to_oneself_comes_back() {
    let relay = TestRelay::start().await;
    let mut a = client(relay.region(), trusting(), 1);
    assert!(a.outbox().try_send(node_key(1).public(), Bytes::from_static(b"early")));
    connected(&mut a).await;
    assert_eq!(packet(&mut a).await, (node_key(1).public(), Bytes::from_static(b"early")));
}

#[tokio::test]
async fn leaving_and_missing_peers_are_reported() {
    let relay = TestRelay::start().await;
    let (mut a, mut b) = (client(relay.region(), trusting(), 1), client(relay.region(), trusting(), 2));
    connected(&mut a).await;
    let stranger = NodePublic::from_bytes([5; 32]);
    // Only disco is answered, so that a relay cannot be made to talk by sending it anything.
    a.outbox().try_send(stranger, Bytes::from_static(b"wireguard"));
    a.outbox().try_send(stranger, disco("hello"));
    let RelayEvent::PeerGone { peer, reason } = event(&mut a).await else { panic!() };
    assert_eq!((peer, reason), (stranger, GoneReason::NotHere));
    assert_eq!((relay.counters().dropped_unknown, relay.counters().peer_gone), (2, 1));
    connected(&mut b).await;
    b.outbox().try_send(node_key(1).public(), disco("here"));
    tokio::select! {
        got = packet(&mut a) => assert_eq!(got.0, node_key(2).public()),
        other = b.next_event() => panic!("{other:?}"),
    }
    drop(b);
    let RelayEvent::PeerGone { peer, reason } = event(&mut a).await else { panic!() };
    assert_eq!((peer, reason), (node_key(2).public(), GoneReason::Disconnected));
}

#[tokio::test]
async fn home_is_counted_and_moves() {
    let relay = TestRelay::start().await;
    let mut a = client(relay.region(), trusting(), 1);
    a.set_home(true);
    connected(&mut a).await;
    eventually("home", || (relay.counters().homes == 1).then_some(())).await;
    a.set_home(false);
    let _ = tokio::time::timeout(std::time::Duration::from_millis(50), a.next_event()).await;
    eventually("not home", || (relay.counters().homes == 0).then_some(())).await;
    a.set_home(true);
    let _ = tokio::time::timeout(std::time::Duration::from_millis(50), a.next_event()).await;
    eventually("home again", || (relay.counters().homes == 1).then_some(())).await;
    drop(a);
    eventually("gone", || (relay.counters().homes == 0 && relay.counters().connections == 0).then_some(())).await;
}

#[tokio::test]
async fn of_two_connections_of_one_node_the_one_that_speaks_receives() {
    let relay = TestRelay::start().await;
    let key = node_key(1);
    let (mut old, mut new) = (relay.raw(&key).await, relay.raw(&key).await);
    let mut sender = relay.raw(&node_key(2)).await;
    let send = |text: &'static [u8]| Frame::SendPacket { destination: key.public(), payload: Bytes::from_static(text) };
    let got =
        |text: &'static [u8]| Frame::RecvPacket { source: node_key(2).public(), payload: Bytes::from_static(text) };
    sender.send(send(b"1")).await;
    assert_eq!(new.frame().await, Some(got(b"1")));
    old.send(Frame::Ping(*b"notnoise")).await;
    assert_eq!(old.frame().await, Some(Frame::Pong(*b"notnoise")));
    sender.send(send(b"2")).await;
    assert_eq!(old.frame().await, Some(got(b"2")));
    drop(old);
    eventually("old gone", || (relay.counters().connections == 2).then_some(())).await;
    sender.send(send(b"3")).await;
    assert_eq!(new.frame().await, Some(got(b"3")));
}

#[tokio::test]
async fn fast_start_gets_frames_without_any_http_response() {
    let relay = TestRelay::start().await;
    let mut raw = Raw::new(tokio::net::TcpStream::connect(relay.address).await.unwrap());
    let request =
        b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\nDerp-Fast-Start: 1\r\n\r\n";
    raw.write(request).await;
    raw.log_in(&node_key(1)).await;
}

#[tokio::test]
async fn the_official_rust_clients_request_is_served() {
    let relay = TestRelay::start().await;
    let mut raw = Raw::new(tokio::net::TcpStream::connect(relay.address).await.unwrap());
    let port = relay.address.port();
    for _ in 0..2 {
        raw.write(
            format!("GET https://127.0.0.1:{port}/derp/latency-check HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n").as_bytes(),
        )
        .await;
        let head = raw.read_head().await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("Content-Length: 0\r\n"), "{head}");
    }
    let request = format!(
        "POST https://127.0.0.1:{port}/derp HTTP/1.1\r\nhost: 127.0.0.1\r\nupgrade: DERP\r\nconnection: Upgrade\r\n\r\n"
    );
    raw.write(request.as_bytes()).await;
    let head = raw.read_head().await;
    let key = relay.server.public().to_string();
    assert!(head.starts_with("HTTP/1.1 101 Switching Protocols\r\n") && head.contains(&key), "{head}");
    raw.log_in(&node_key(1)).await;
}

#[tokio::test]
async fn a_client_of_tls_1_2_takes_the_slow_start() {
    let relay = TestRelay::start().await;
    let provider = mesh_derp::tls::provider();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(relay.leaf.clone()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(relay.address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let stream = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
    assert_eq!(stream.get_ref().1.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_2));
    let mut raw = Raw::new(stream);
    raw.write(b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\n\r\n").await;
    assert!(raw.read_head().await.starts_with("HTTP/1.1 101 "));
    raw.log_in(&node_key(1)).await;
}

#[tokio::test]
async fn latency_is_measured_over_tls() {
    let relay = TestRelay::start().await;
    let latency = latency_check(&relay.region(), &trusting(), &Proxies::none()).await.unwrap();
    assert!(latency > std::time::Duration::ZERO && latency < PATIENCE, "{latency:?}");
}

#[tokio::test]
async fn a_stream_that_another_server_has_upgraded_is_served_like_any_other() {
    let relay = TestRelay::start().await;
    let (near, far) = tokio::io::duplex(64 * 1024);
    let serving =
        tokio::spawn(std::sync::Arc::clone(&relay.server).serve_upgraded(far, "203.0.113.9:1".parse().unwrap()));
    let mut guest = Raw::new(near);
    guest.log_in(&node_key(1)).await;
    let mut other = relay.raw(&node_key(2)).await;
    let payload = Bytes::from_static(b"from within");
    guest.send(Frame::SendPacket { destination: node_key(2).public(), payload: payload.clone() }).await;
    assert_eq!(other.frame().await, Some(Frame::RecvPacket { source: node_key(1).public(), payload }));
    drop(guest);
    tokio::time::timeout(PATIENCE, serving).await.expect("it ends with its stream").unwrap();
    eventually("gone", || (relay.counters().connections == 1).then_some(())).await;
}
