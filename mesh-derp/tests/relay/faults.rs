//! Clients that break the rules, and relays that go away.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_derp::driver::client::RelayEvent;
use mesh_derp::driver::server::{AllowList, Config};
use mesh_derp::frame::Frame;
use mesh_derp::tls::ServerTls;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::harness::{Raw, TestRelay, client, connected, event, eventually, node_key, packet, trusting};

#[tokio::test]
async fn a_relay_that_restarts_gets_its_clients_back_and_traffic_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let tls = ServerTls::load_or_generate(dir.path(), &["localhost".to_owned()]).unwrap();
    let anywhere: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let relay = TestRelay::start_showing(&tls, Config::default(), anywhere).await;
    let (address, region) = (relay.address, relay.region());
    let (mut a, mut b) = (client(region.clone(), trusting(), 1), client(region, trusting(), 2));
    connected(&mut a).await;
    connected(&mut b).await;
    drop(relay);
    for client in [&mut a, &mut b] {
        let RelayEvent::Disconnected { reason } = event(client).await else { panic!() };
        assert!(!reason.is_empty());
        assert!(!client.is_connected());
        // Nobody listens for a while.
        assert!(matches!(event(client).await, RelayEvent::Disconnected { .. }));
    }
    a.outbox().try_send(node_key(2).public(), Bytes::from_static(b"queued meanwhile"));
    let relay = TestRelay::start_showing(&tls, Config::default(), address).await;
    connected(&mut b).await;
    let came = tokio::select! {
        came = packet(&mut b) => came,
        () = async { loop { let _ = a.next_event().await; } } => unreachable!(),
    };
    assert_eq!(came, (node_key(1).public(), Bytes::from_static(b"queued meanwhile")));
    assert_eq!(relay.counters().nodes, 2);
}

#[tokio::test]
async fn each_malformed_frame_ends_its_own_connection_only() {
    let relay = TestRelay::start().await;
    let mut bystander = relay.raw(&node_key(50)).await;
    let header = |kind: u8, length: u32| [&[kind][..], &length.to_be_bytes()].concat();
    let with_body = |kind: u8, length: u32| [header(kind, length), vec![0; length as usize]].concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("packet without a whole key", with_body(0x04, 31)),
        ("packet one byte too long", header(0x04, 32 + 65_536 + 1)),
        ("note of two bytes", with_body(0x07, 2)),
        ("note of no byte", with_body(0x07, 0)),
        ("note that is neither", [header(0x07, 1), vec![9]].concat()),
        ("short ping", with_body(0x12, 7)),
        ("long ping", with_body(0x12, 1001)),
        ("watch with a body", with_body(0x10, 1)),
        ("watch", with_body(0x10, 0)),
        ("close without a whole key", with_body(0x11, 31)),
        ("close with more than a key", with_body(0x11, 33)),
        ("close", with_body(0x11, 32)),
        ("forward", with_body(0x0a, 70)),
        ("a second login", with_body(0x02, 80)),
        ("a frame that only relays send", with_body(0x05, 40)),
        ("unknown frame of 4 GiB", header(0x77, u32::MAX)),
    ];
    for (number, (name, bytes)) in cases.iter().enumerate() {
        let before = relay.counters().protocol_errors;
        let mut raw = relay.raw(&node_key(100 + number as u64)).await;
        raw.write(bytes).await;
        assert_eq!(raw.frame().await, None, "{name}");
        eventually(name, || (relay.counters().protocol_errors == before + 1).then_some(())).await;
        bystander.send(Frame::Ping(*b"still ok")).await;
        assert_eq!(bystander.frame().await, Some(Frame::Pong(*b"still ok")), "after {name}");
    }
    assert_eq!((relay.counters().connections, relay.counters().dropped_unknown), (1, 0));
}

#[tokio::test]
async fn the_longest_packet_and_unknown_frames_are_fine() {
    let relay = TestRelay::start().await;
    let (mut a, mut b) = (relay.raw(&node_key(1)).await, relay.raw(&node_key(2)).await);
    a.write(&[0x66, 0, 0, 0, 3, 1, 2, 3]).await;
    let payload = Bytes::from(vec![9; 65_536]);
    a.send(Frame::SendPacket { destination: node_key(2).public(), payload: payload.clone() }).await;
    assert_eq!(b.frame().await, Some(Frame::RecvPacket { source: node_key(1).public(), payload }));
    assert_eq!(relay.counters().frames_unknown, 1);
    a.send(Frame::Ping(*b"with tai")).await;
    assert_eq!(a.frame().await, Some(Frame::Pong(*b"with tai")));
    a.write(&[&[0x12, 0, 0, 3, 0xe8][..], &[7; 1000]].concat()).await;
    assert_eq!(a.frame().await, Some(Frame::Pong([7; 8])));
}

#[tokio::test]
async fn logins_that_prove_nothing_are_turned_away() {
    let relay = TestRelay::start().await;
    for (first, expected) in [
        (Frame::ClientInfo { node: node_key(1).public(), sealed: vec![0; 100].into() }.to_bytes(), (1, 0)),
        (Frame::Ping([0; 8]).to_bytes(), (1, 1)),
        (Bytes::from_static(b"GET / HTTP/1.1\r\n\r\n"), (1, 2)),
    ] {
        let mut raw = Raw::new(TcpStream::connect(relay.address).await.unwrap());
        raw.write(b"GET /derp HTTP/1.1\r\nUpgrade: derp\r\nDerp-Fast-Start: 1\r\n\r\n").await;
        assert!(matches!(raw.frame().await, Some(Frame::ServerKey(_))));
        raw.write(&first).await;
        assert_eq!(raw.frame().await, None);
        let counted = || (relay.counters().logins_refused, relay.counters().protocol_errors);
        eventually("refusal", || (counted() == expected).then_some(())).await;
    }
    assert_eq!(relay.counters().nodes, 0);
}

#[tokio::test]
async fn only_listed_nodes_are_admitted_and_one_can_be_removed() {
    let list = Arc::new(AllowList::new([node_key(1).public()]));
    let config = Config { admission: Arc::clone(&list) as _, ..Config::default() };
    let relay = TestRelay::start_with(config, "127.0.0.1:0".parse().unwrap()).await;
    let (mut listed, mut unlisted) = (client(relay.region(), trusting(), 1), client(relay.region(), trusting(), 2));
    connected(&mut listed).await;
    let RelayEvent::Disconnected { reason } = event(&mut unlisted).await else { panic!() };
    assert_eq!(reason, "relay closed the connection");
    assert_eq!((relay.counters().not_admitted, relay.counters().nodes), (1, 1));
    list.allow(node_key(2).public());
    connected(&mut unlisted).await;
    list.deny(&node_key(1).public());
    relay.server.disconnect(&node_key(1).public());
    assert!(matches!(event(&mut listed).await, RelayEvent::Disconnected { .. }));
    assert!(relay.server.is_connected(&node_key(2).public()));
}

#[tokio::test]
async fn a_client_that_dawdles_delays_nobody() {
    let relay = TestRelay::start().await;
    let mut dawdlers = Vec::new();
    for opening in [&b""[..], b"\x16\x03", b"GET /derp HT"] {
        let mut stream = TcpStream::connect(relay.address).await.unwrap();
        stream.write_all(opening).await.unwrap();
        dawdlers.push(stream);
    }
    let mut prompt = client(relay.region(), trusting(), 1);
    tokio::time::timeout(Duration::from_secs(5), connected(&mut prompt)).await.expect("no waiting for the others");
    drop(dawdlers);
}

#[tokio::test]
async fn closing_all_ends_every_connection() {
    let relay = TestRelay::start().await;
    let (mut a, mut b) = (relay.raw(&node_key(1)).await, relay.raw(&node_key(2)).await);
    relay.server.close_all();
    assert_eq!((a.frame().await, b.frame().await), (None, None));
    eventually("empty", || (relay.counters().connections == 0).then_some(())).await;
}

#[tokio::test]
async fn a_web_server_in_place_of_the_relay_is_named_as_such() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let relay = TestRelay::start().await;
    let mut region = relay.region();
    region.nodes[0].derp_port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        }
    });
    let mut client = client(region, mesh_derp::tls::ClientTls::plain(), 1);
    let RelayEvent::Disconnected { reason } = event(&mut client).await else { panic!() };
    assert_eq!(reason, "localhost: answered 403 and not 101");
}

#[tokio::test]
async fn a_relay_that_drops_whom_it_lets_in_is_asked_ever_less_often() {
    let relay = TestRelay::start().await;
    let mut client = client(relay.region(), trusting(), 1);
    let mut logins = 0u32;
    let _ = tokio::time::timeout(Duration::from_secs(2), async {
        loop {
            if matches!(client.next_event().await, RelayEvent::Connected { .. }) {
                logins += 1;
                relay.server.close_all();
            }
        }
    })
    .await;
    // Waiting n² × 10 ms, give or take half, makes 12 attempts in 2 s at the very most.
    assert!((3..=14).contains(&logins), "{logins} logins");
}
