//! A relay that ends gently, and what it says to whom.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_derp::driver::server::Config;
use mesh_derp::frame::Frame;
use mesh_derp::login::{ClientInfo, MeshKey};
use tokio::net::TcpStream;

use crate::harness::{Raw, TestRelay, eventually, node_key};

#[expect(clippy::disallowed_methods, reason = "measures real time")]
fn now() -> Instant {
    Instant::now()
}

fn acking() -> ClientInfo {
    ClientInfo { can_ack_pings: true, ..ClientInfo::default() }
}

async fn logged_in(relay: &TestRelay, seed: u64, info: &ClientInfo) -> Raw<TcpStream> {
    let mut raw = relay.upgraded().await;
    raw.log_in_with(&node_key(seed), info).await;
    assert!(matches!(raw.frame().await, Some(Frame::ServerInfo { .. })));
    raw
}

#[tokio::test]
async fn clients_are_told_when_to_come_back_and_sent_away_one_after_another() {
    const CLIENTS: u64 = 200;
    let relay = TestRelay::start().await;
    let mut clients = Vec::new();
    for seed in 0..CLIENTS {
        clients.push(logged_in(&relay, seed, &acking()).await);
    }
    // The official Rust client ends its connection on any frame like this one, and says that it knows no pings.
    let mut simple = logged_in(&relay, CLIENTS, &ClientInfo::default()).await;
    let at = now();
    let server = Arc::clone(&relay.server);
    let ending = tokio::spawn(async move { server.shutdown(Duration::from_secs(5)).await });
    let mut times = Vec::new();
    for client in &mut clients {
        let Some(Frame::Restarting { reconnect_in, try_for }) = client.frame().await else { panic!() };
        assert!(reconnect_in >= Duration::from_millis(100) && reconnect_in <= Duration::from_millis(301));
        assert_eq!(try_for, Duration::from_secs(5));
        times.push(reconnect_in);
    }
    times.sort_unstable();
    times.dedup();
    assert!(times.len() > 50, "{} different times", times.len());
    for client in &mut clients {
        assert_eq!(client.frame().await, None);
    }
    assert_eq!(simple.frame().await, None);
    ending.await.unwrap();
    assert!(at.elapsed() < Duration::from_secs(2), "{:?}", at.elapsed());
    assert_eq!(relay.counters().restarting, CLIENTS);
    eventually("the end of all", || (relay.counters().connections == 0).then_some(())).await;
    // Nobody is let in any more.
    let mut late = relay.upgraded().await;
    late.log_in_with(&node_key(1), &acking()).await;
    assert_eq!(late.frame().await, None);
}

#[tokio::test]
async fn packets_flow_until_a_connection_ends_and_relays_go_last() {
    let mesh_key = MeshKey::from_bytes([3; 32]);
    let config = Config { mesh_key: Some(mesh_key.clone()), ..Config::default() };
    let relay = TestRelay::start_with(config, "127.0.0.1:0".parse().unwrap()).await;
    let mut client = logged_in(&relay, 1, &acking()).await;
    let mut other = logged_in(&relay, 2, &ClientInfo { mesh_key: Some(mesh_key), ..acking() }).await;
    other.send(Frame::WatchConns).await;
    for _ in 0..2 {
        assert!(matches!(other.frame().await, Some(Frame::PeerPresent { .. })));
    }
    let server = Arc::clone(&relay.server);
    let ending = tokio::spawn(async move { server.shutdown(Duration::from_secs(5)).await });
    assert!(matches!(client.frame().await, Some(Frame::Restarting { .. })));
    client.send(Frame::SendPacket { destination: node_key(1).public(), payload: Bytes::from_static(b"still") }).await;
    assert!(matches!(client.frame().await, Some(Frame::RecvPacket { .. })));
    assert_eq!(client.frame().await, None);
    ending.await.unwrap();
    // A relay is told of who left, and no more.
    while let Some(frame) = other.frame().await {
        assert!(matches!(frame, Frame::PeerGone { peer, .. } if peer == node_key(1).public()), "{frame:?}");
    }
}

#[tokio::test]
async fn without_clients_the_end_is_immediate_and_grace_is_a_limit() {
    let relay = TestRelay::start().await;
    let at = now();
    relay.server.shutdown(Duration::from_secs(60)).await;
    assert!(at.elapsed() < Duration::from_millis(50), "{:?}", at.elapsed());
    let hasty = TestRelay::start().await;
    let mut client = hasty.raw(&node_key(1)).await;
    hasty.server.shutdown(Duration::ZERO).await;
    assert_eq!(client.frame().await, None);
}

#[tokio::test]
async fn an_older_connection_is_told_that_a_newer_one_took_over_and_when_that_is_over() {
    let relay = TestRelay::start().await;
    let mut old = logged_in(&relay, 1, &acking()).await;
    let new = logged_in(&relay, 1, &acking()).await;
    let Some(Frame::Health(text)) = old.frame().await else { panic!() };
    assert_eq!(text, "this node's key is in use on a newer connection, which gets its packets");
    drop(new);
    assert_eq!(old.frame().await, Some(Frame::Health(String::new())));
    // A client that does not say that it understands is told nothing.
    let mut simple = logged_in(&relay, 2, &ClientInfo::default()).await;
    let _newer = logged_in(&relay, 2, &acking()).await;
    simple.send(Frame::Ping(*b"12345678")).await;
    assert_eq!(simple.frame().await, Some(Frame::Pong(*b"12345678")));
    // A frame makes the older connection the active one again, and nothing is wrong with it any more.
    let mut labelled = logged_in(&relay, 3, &ClientInfo { app_name: "x".into(), ..ClientInfo::default() }).await;
    let _newer = logged_in(&relay, 3, &acking()).await;
    assert!(matches!(labelled.frame().await, Some(Frame::Health(text)) if !text.is_empty()));
    labelled.send(Frame::NotePreferred(true)).await;
    assert_eq!(labelled.frame().await, Some(Frame::Health(String::new())));
}
