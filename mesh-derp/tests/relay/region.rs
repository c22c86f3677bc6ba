//! Several relays of one region.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_derp::driver::client::RelayEvent;
use mesh_derp::driver::server::{Config, Sibling};
use mesh_derp::frame::{Frame, GoneReason};
use mesh_derp::login::{ClientInfo, MeshKey};
use mesh_derp::map::DerpRegion;
use mesh_derp::server::{DOUBT, Presence};
use mesh_derp::tls::ServerTls;
use mesh_noise::key::{NodePrivate, NodePublic, RelayPrivate};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::{Raw, TestRelay, client, connected, disco, event, eventually, node_key, packet, trusting};

fn mesh_key() -> MeshKey {
    MeshKey::from_bytes([0x5a; 32])
}

fn config() -> Config {
    Config { mesh_key: Some(mesh_key()), ..Config::default() }
}

#[expect(clippy::disallowed_methods, reason = "measures real time")]
fn now() -> Instant {
    Instant::now()
}

/// A relay of the region, on its own port, with a key of its own.
async fn relay(seed: u64) -> TestRelay {
    relay_at(seed, "127.0.0.1:0".parse().unwrap()).await
}

async fn relay_at(seed: u64, address: SocketAddr) -> TestRelay {
    // Nodes of these tests have keys of small seeds, and a relay must not have the key of one.
    let key = RelayPrivate::generate(&mut StdRng::seed_from_u64(1000 + seed));
    let tls = ServerTls::generate(&["localhost".to_owned()]).unwrap();
    TestRelay::start_as(key, &tls, config(), address).await
}

fn url(relay: &TestRelay) -> Sibling {
    format!("https://localhost:{}/127.0.0.1#{}", relay.address.port(), relay.pin).parse().unwrap()
}

/// Each relay joins each, itself included; the links end with what is returned.
async fn joined(relays: &[&TestRelay]) -> JoinSet<()> {
    let mut links = JoinSet::new();
    for relay in relays {
        for other in relays {
            links.spawn(Arc::clone(&relay.server).join(url(other), trusting()));
        }
    }
    for relay in relays {
        let enough = |links: usize| links == relays.len() - 1;
        eventually("all links", || enough(relay.server.region().links).then_some(())).await;
        eventually("all watchers", || enough(relay.server.region().watchers).then_some(())).await;
    }
    links
}

async fn knows(relay: &TestRelay, nodes: usize) {
    eventually("hearing of the nodes", || (relay.server.region().nodes_elsewhere == nodes).then_some(())).await;
}

/// A raw connection that shows the mesh key.
async fn as_relay(relay: &TestRelay, key: &NodePrivate) -> Raw<TcpStream> {
    let mut raw = relay.upgraded().await;
    raw.log_in_with(key, &ClientInfo { mesh_key: Some(mesh_key()), ..ClientInfo::default() }).await;
    assert!(matches!(raw.frame().await, Some(Frame::ServerInfo { .. })));
    raw
}

#[tokio::test]
async fn a_watcher_is_told_who_is_there_and_then_of_every_change() {
    let relay = relay(1).await;
    let first = relay.raw(&node_key(1)).await;
    let port = first.stream.local_addr().unwrap().port();
    let mut watcher = as_relay(&relay, &node_key(50)).await;
    watcher.send(Frame::WatchConns).await;
    let mut flood = Vec::new();
    for _ in 0..2 {
        let Some(Frame::PeerPresent { peer, address, flags }) = watcher.frame().await else { panic!() };
        flood.push((peer, address.unwrap().port(), flags));
    }
    let own = watcher.stream.local_addr().unwrap().port();
    assert!(flood.contains(&(node_key(1).public(), port, Presence::REGULAR)));
    assert!(flood.contains(&(node_key(50).public(), own, Presence::RELAY)));
    // A second connection of the same node is told as well, its end is not; only the last one's is.
    let second = relay.raw(&node_key(1)).await;
    let port = second.stream.local_addr().unwrap();
    let told = Frame::PeerPresent { peer: node_key(1).public(), address: Some(port), flags: Presence::REGULAR };
    assert_eq!(watcher.frame().await, Some(told));
    drop(first);
    eventually("the end of the first", || (relay.counters().connections == 2).then_some(())).await;
    drop(second);
    let gone = Frame::PeerGone { peer: node_key(1).public(), reason: GoneReason::Disconnected };
    assert_eq!(watcher.frame().await, Some(gone));
}

#[tokio::test]
async fn only_who_shows_the_mesh_key_may_ask_what_relays_ask() {
    let relay = relay(1).await;
    let key = NodePublic::from_bytes([3; 32]);
    let forward = Frame::ForwardPacket { source: key, destination: key, payload: Bytes::new() };
    let wrong = ClientInfo { mesh_key: Some(MeshKey::from_bytes([1; 32])), ..ClientInfo::default() };
    for (info, frame) in [
        (ClientInfo::default(), Frame::WatchConns),
        (ClientInfo::default(), forward),
        (ClientInfo::default(), Frame::ClosePeer(key)),
        (wrong, Frame::WatchConns),
    ] {
        let mut raw = relay.upgraded().await;
        raw.log_in_with(&node_key(1), &info).await;
        // A wrong key is no reason to be turned away.
        assert!(matches!(raw.frame().await, Some(Frame::ServerInfo { .. })));
        raw.send(frame).await;
        assert_eq!(raw.frame().await, None);
    }
    eventually("the count", || (relay.counters().protocol_errors == 4).then_some(())).await;
    let unshared = TestRelay::start().await;
    let mut raw = as_relay(&unshared, &node_key(1)).await;
    raw.send(Frame::WatchConns).await;
    assert_eq!(raw.frame().await, None, "without a mesh key of its own nobody is a relay of its region");
}

#[tokio::test]
async fn a_relay_of_the_region_ends_all_connections_of_a_node() {
    let relay = relay(1).await;
    let (mut first, mut second) = (relay.raw(&node_key(1)).await, relay.raw(&node_key(1)).await);
    let mut other = relay.raw(&node_key(2)).await;
    let mut asking = as_relay(&relay, &node_key(50)).await;
    asking.send(Frame::ClosePeer(node_key(1).public())).await;
    assert_eq!((first.frame().await, second.frame().await), (None, None));
    other.send(Frame::Ping(*b"12345678")).await;
    assert_eq!(other.frame().await, Some(Frame::Pong(*b"12345678")));
}

#[tokio::test]
async fn what_was_forwarded_is_delivered_here_or_answered_but_never_forwarded_again() {
    let (a, b) = (relay(1).await, relay(2).await);
    let _links = joined(&[&a, &b]).await;
    let _there = b.raw(&node_key(2)).await;
    let mut here = a.raw(&node_key(1)).await;
    knows(&a, 1).await;
    let mut asking = as_relay(&a, &node_key(50)).await;
    let source = node_key(60).public();
    let forward = |destination, payload| Frame::ForwardPacket { source, destination, payload };
    asking.send(forward(node_key(1).public(), Bytes::from_static(b"for one"))).await;
    assert_eq!(here.frame().await, Some(Frame::RecvPacket { source, payload: Bytes::from_static(b"for one") }));
    // Node 2 is at B, and A knows it: it would forward the same packet of a client.
    asking.send(forward(node_key(2).public(), Bytes::from_static(b"data"))).await;
    asking.send(forward(node_key(2).public(), disco("probe"))).await;
    let missing = Frame::PeerGone { peer: node_key(2).public(), reason: GoneReason::NotHere };
    assert_eq!(asking.frame().await, Some(missing));
    let counters = a.counters();
    assert_eq!((counters.forwarded_in, counters.dropped_forwarded, counters.forwarded_out), (3, 2, 0));
    assert_eq!(b.counters().forwarded_in, 0);
}

#[tokio::test]
async fn clients_of_three_relays_talk_and_learn_when_one_leaves_the_region() {
    let relays = [relay(1).await, relay(2).await, relay(3).await];
    let _links = joined(&[&relays[0], &relays[1], &relays[2]]).await;
    let mut clients: Vec<_> = Vec::new();
    for (number, relay) in (1..).zip(&relays) {
        let mut client = client(relay.region(), trusting(), number);
        connected(&mut client).await;
        clients.push(client);
    }
    for relay in &relays {
        knows(relay, 2).await;
    }
    for from in 0..3usize {
        for to in 0..3usize {
            let text = Bytes::from(format!("{from} to {to}"));
            clients[from].outbox().try_send(node_key(to as u64 + 1).public(), text.clone());
            let Ok([sender, receiver]) = clients.get_disjoint_mut([from, to]) else {
                assert_eq!(packet(&mut clients[from]).await.1, text);
                continue;
            };
            tokio::select! {
                got = packet(receiver) => assert_eq!(got, (node_key(from as u64 + 1).public(), text)),
                other = sender.next_event() => panic!("{other:?}"),
            }
        }
    }
    for relay in &relays {
        let counters = relay.counters();
        assert_eq!((counters.forwarded_out, counters.forwarded_in, counters.dropped_unknown), (2, 2, 0));
    }
    drop(clients.pop());
    let RelayEvent::PeerGone { peer, reason } = event(&mut clients[0]).await else { panic!() };
    assert_eq!((peer, reason), (node_key(3).public(), GoneReason::Disconnected));
    knows(&relays[0], 1).await;
}

/// A region of several relays, in that order.
fn region_of(relays: &[&TestRelay]) -> DerpRegion {
    let mut region = relays[0].region();
    region.nodes = relays.iter().flat_map(|relay| relay.region().nodes).collect();
    for (node, letter) in region.nodes.iter_mut().zip('a'..) {
        node.name = format!("900{letter}");
    }
    region
}

#[tokio::test]
async fn when_a_relay_dies_its_clients_go_on_at_another_and_nobody_counts_as_gone() {
    let (a, b, c) = (relay(1).await, relay(2).await, relay(3).await);
    let _links = joined(&[&a, &b, &c]).await;
    // Moves from A to B; its peer is at C all the time.
    let mut moving = client(region_of(&[&a, &b]), trusting(), 1);
    connected(&mut moving).await;
    let mut staying = client(c.region(), trusting(), 2);
    connected(&mut staying).await;
    knows(&c, 1).await;
    knows(&a, 1).await;
    moving.outbox().try_send(node_key(2).public(), Bytes::from_static(b"before"));
    tokio::select! {
        got = packet(&mut staying) => assert_eq!(&got.1[..], b"before"),
        other = moving.next_event() => panic!("{other:?}"),
    }
    let at = now();
    drop(a);
    let to_moving = staying.outbox();
    let moved = tokio::spawn(async move {
        // The dying relay may still deliver a packet.
        let mut there = false;
        loop {
            let event = moving.next_event().await;
            if let RelayEvent::Connected { node } = &event {
                there = node == "900b";
            }
            if there && matches!(event, RelayEvent::Packet { .. }) {
                return moving;
            }
        }
    });
    while !moved.is_finished() {
        to_moving.try_send(node_key(1).public(), Bytes::from_static(b"after"));
        let waited = tokio::time::timeout(Duration::from_millis(20), staying.next_event()).await;
        assert!(waited.is_err(), "{waited:?}");
    }
    let outage = at.elapsed();
    println!("packets flow again {outage:?} after the relay died");
    assert!(outage < Duration::from_secs(3), "{outage:?}");
    // Long after the doubt is over, still nobody was told that the moved node had gone.
    let told = tokio::time::timeout(DOUBT + Duration::from_secs(1), staying.next_event()).await;
    assert!(told.is_err(), "{told:?}");
    let mut moving = moved.await.unwrap();
    staying.outbox().try_send(node_key(1).public(), Bytes::from_static(b"still"));
    tokio::select! {
        _ = async { while &packet(&mut moving).await.1[..] != b"still" {} } => {}
        other = staying.next_event() => panic!("{other:?}"),
    }
    knows(&c, 1).await;
}

#[tokio::test]
async fn who_does_not_come_back_from_a_dead_relay_counts_as_gone_after_the_doubt() {
    let (a, b) = (relay(1).await, relay(2).await);
    let _links = joined(&[&a, &b]).await;
    let mut lost = a.raw(&node_key(1)).await;
    let mut staying = b.raw(&node_key(2)).await;
    knows(&a, 1).await;
    lost.send(Frame::SendPacket { destination: node_key(2).public(), payload: disco("x") }).await;
    assert!(matches!(staying.frame().await, Some(Frame::RecvPacket { .. })));
    let at = now();
    drop(a);
    knows(&b, 0).await;
    // In doubt: dropped, and not answered as if the node were unknown.
    staying.send(Frame::SendPacket { destination: node_key(1).public(), payload: disco("y") }).await;
    let gone = Frame::PeerGone { peer: node_key(1).public(), reason: GoneReason::Disconnected };
    assert_eq!(staying.frame().await, Some(gone));
    assert!(at.elapsed() >= DOUBT, "{:?}", at.elapsed());
    assert_eq!((b.counters().dropped_in_doubt, b.counters().dropped_unknown), (1, 0));
    staying.send(Frame::SendPacket { destination: node_key(1).public(), payload: disco("z") }).await;
    assert!(matches!(staying.frame().await, Some(Frame::PeerGone { reason: GoneReason::NotHere, .. })));
}

#[tokio::test]
async fn a_link_that_breaks_is_made_again_and_restores_what_was_known() {
    let (a, b) = (relay(1).await, relay(2).await);
    let _links = joined(&[&a, &b]).await;
    let mut at_a = a.raw(&node_key(1)).await;
    let mut at_b = b.raw(&node_key(2)).await;
    knows(&b, 1).await;
    // A ends the connection by which B watches it, and nothing else: a watcher is present under its relay's key.
    let b_key = NodePublic::from_bytes(*b.server.public().as_bytes());
    let before = a.counters().accepts;
    a.server.disconnect(&b_key);
    eventually("the link again", || (a.counters().accepts > before).then_some(())).await;
    knows(&b, 1).await;
    at_b.send(Frame::SendPacket { destination: node_key(1).public(), payload: Bytes::from_static(b"hi") }).await;
    assert!(matches!(at_a.frame().await, Some(Frame::RecvPacket { .. })));
    assert_eq!(b.counters().peer_gone, 0);
}

#[tokio::test]
async fn a_relay_with_another_mesh_key_is_no_relay_of_the_region() {
    let a = relay(1).await;
    let key = RelayPrivate::generate(&mut StdRng::seed_from_u64(1002));
    let tls = ServerTls::generate(&["localhost".to_owned()]).unwrap();
    let other = Config { mesh_key: Some(MeshKey::from_bytes([9; 32])), ..Config::default() };
    let b = TestRelay::start_as(key, &tls, other, "127.0.0.1:0".parse().unwrap()).await;
    let mut links = JoinSet::new();
    links.spawn(Arc::clone(&b.server).join(url(&a), trusting()));
    eventually("being refused twice", || (a.counters().protocol_errors >= 2).then_some(())).await;
    assert_eq!((a.server.region().watchers, b.server.region().nodes_elsewhere), (0, 0));
    let unshared = TestRelay::start().await;
    Arc::clone(&unshared.server).join(url(&a), trusting()).await;
}

#[tokio::test]
async fn a_link_that_takes_nothing_stalls_no_sender() {
    let (a, b) = (relay(1).await, relay(2).await);
    let _link_to_a = joined(&[&a, &b]).await;
    // A relay that shows a node and then never reads.
    let stalled = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = stalled.local_addr().unwrap();
    let fake = RelayPrivate::generate(&mut StdRng::seed_from_u64(1003));
    let (a_key, target) = (NodePublic::from_bytes(*a.server.public().as_bytes()), node_key(7).public());
    let held = tokio::spawn(async move {
        use mesh_derp::login::ServerInfo;
        let (stream, _) = stalled.accept().await.unwrap();
        let mut raw = Raw::new(stream);
        raw.read_head().await;
        raw.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n").await;
        raw.send(Frame::ServerKey(fake.public())).await;
        assert!(matches!(raw.frame().await, Some(Frame::ClientInfo { node, .. }) if node == a_key));
        raw.send(ServerInfo::default().seal(&fake.box_with_node(&a_key), &mut StdRng::seed_from_u64(8))).await;
        raw.send(Frame::PeerPresent { peer: target, address: None, flags: 1 }).await;
        raw
    });
    let mut links = JoinSet::new();
    links.spawn(Arc::clone(&a.server).join(format!("http://{address}").parse().unwrap(), trusting()));
    knows(&a, 1).await;
    let _held = held.await.unwrap();
    let mut sender = a.raw(&node_key(1)).await;
    let mut receiver = a.raw(&node_key(2)).await;
    let at = now();
    for _ in 0..8000 {
        sender.send(Frame::SendPacket { destination: target, payload: vec![4; 1400].into() }).await;
    }
    sender.send(Frame::SendPacket { destination: node_key(2).public(), payload: Bytes::from_static(b"me") }).await;
    let came = receiver.frame().await;
    assert!(matches!(came, Some(Frame::RecvPacket { .. })), "{came:?}");
    println!("8000 packets for a stalled link held their sender up for {:?}", at.elapsed());
    let counters = eventually("drops", || Some(a.counters()).filter(|c| c.dropped_link > 0)).await;
    assert_eq!(counters.forwarded_out + counters.dropped_unknown + counters.dropped_in_doubt, 8000);
    // It never answers, so it is given up within 5 s of the first packet, and its nodes with it.
    knows(&a, 0).await;
}
