//! Connections that have not logged in: how many there may be, and who goes.

use std::time::Duration;

use mesh_derp::driver::listener::Settings;
use mesh_derp::server::{AcceptLimit, Limits};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::{PATIENCE, TestRelay, client, connected, eventually, node_key, trusting};

fn limits(limits: Limits) -> Settings {
    Settings { limits, ..Settings::default() }
}

async fn is_closed(stream: &mut TcpStream) -> bool {
    matches!(tokio::time::timeout(Duration::from_millis(20), stream.read(&mut [0; 1])).await, Ok(Ok(0) | Err(_)))
}

#[tokio::test]
async fn silent_connections_make_room_for_a_client_oldest_first() {
    let few = Limits { total: 20, patience: Duration::from_millis(200), ..Limits::default() };
    let relay = TestRelay::start_timed(limits(few)).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(relay.address).await.unwrap());
    }
    eventually("all accepted", || (relay.listener.underway() == 20).then_some(())).await;
    let mut client = client(relay.region(), trusting(), 1);
    connected(&mut client).await;
    assert!(is_closed(&mut silent[0]).await, "the oldest goes");
    assert!(!is_closed(&mut silent[19]).await, "the newest stays");
    assert!(relay.listener.counters().dropped_room >= 1);
    // Whoever has logged in has given up its place.
    eventually("places", || (relay.listener.underway() < 20).then_some(())).await;
    for _ in 0..100 {
        silent.push(TcpStream::connect(relay.address).await.unwrap());
    }
    eventually("more came", || (relay.listener.counters().accepted == 121).then_some(())).await;
    assert_eq!((relay.counters().connections, relay.listener.underway()), (1, 20));
    assert!(client.is_connected());
}

#[tokio::test]
async fn each_step_before_the_login_counts_and_can_be_shown_out() {
    let few = Limits { total: 4, patience: Duration::from_millis(300), ..Limits::default() };
    let relay = TestRelay::start_timed(limits(few)).await;
    let mut waiting = Vec::new();
    for opening in [
        &b"\x16\x03\x01\x02\x00\x01"[..],
        b"GET /derp HT",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(relay.address).await.unwrap();
        stream.write_all(opening).await.unwrap();
        waiting.push(stream);
    }
    eventually("all accepted", || (relay.listener.underway() == 4).then_some(())).await;
    for number in 0..4 {
        // Stays: it has logged in, and needs no place.
        std::mem::forget(relay.raw(&node_key(number)).await);
    }
    let new: Vec<TcpStream> = {
        let mut new = Vec::new();
        for _ in 0..4 {
            new.push(TcpStream::connect(relay.address).await.unwrap());
        }
        new
    };
    for stream in &mut waiting {
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "still open");
    }
    eventually("four shown out", || (relay.listener.counters().dropped_room >= 4).then_some(())).await;
    assert_eq!(relay.counters().connections, 4);
    drop(new);
}

#[tokio::test]
async fn one_address_cannot_take_all_places() {
    let few = Limits { total: 100, per_source: 5, patience: Duration::from_secs(60), ..Limits::default() };
    let proxies = vec!["127.0.0.1/32".parse().unwrap()];
    let relay = TestRelay::start_timed(Settings { proxies, ..limits(few) }).await;
    let mut crowd = Vec::new();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(relay.address).await.unwrap();
        stream.write_all(b"PROXY TCP4 203.0.113.7 192.0.2.1 999 443\r\n").await.unwrap();
        crowd.push(stream);
    }
    eventually("refused", || (relay.listener.counters().refused_source == 15).then_some(())).await;
    let mut other = TcpStream::connect(relay.address).await.unwrap();
    other.write_all(b"PROXY TCP4 203.0.113.8 192.0.2.1 999 443\r\nGET /healthz HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    other.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn a_trusted_proxy_has_to_announce_and_nobody_else_may() {
    let proxies = vec!["127.0.0.1/32".parse().unwrap()];
    let behind = TestRelay::start_timed(Settings { proxies, ..Settings::default() }).await;
    let open = TestRelay::start().await;
    for (relay, opening) in [
        (&behind, &b"GET /healthz HTTP/1.1\r\n\r\n"[..]),
        (&open, b"PROXY TCP4 203.0.113.8 192.0.2.1 999 443\r\nGET /healthz HTTP/1.1\r\n\r\n"),
    ] {
        let mut stream = TcpStream::connect(relay.address).await.unwrap();
        stream.write_all(opening).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert_eq!(answer, "");
    }
    let counters = behind.listener.counters();
    assert_eq!((counters.proxy_errors, counters.garbage_heads), (1, 0));
    eventually("garbage", || (open.listener.counters().garbage_heads == 1).then_some(())).await;
}

#[tokio::test]
async fn connections_above_the_rate_are_closed_at_once_and_accepting_goes_on() {
    let accept = AcceptLimit { per_second: 1, burst: 3 };
    let relay = TestRelay::start_timed(Settings { accept, ..Settings::default() }).await;
    let mut open = 0;
    let mut all = Vec::new();
    for _ in 0..10 {
        all.push(TcpStream::connect(relay.address).await.unwrap());
    }
    eventually("all seen", || (relay.listener.counters().accepted == 10).then_some(())).await;
    for stream in &mut all {
        open += usize::from(!is_closed(stream).await);
    }
    assert!((3..=4).contains(&open), "{open} open");
    assert_eq!(relay.listener.counters().refused_rate, 10 - open as u64);
}

#[tokio::test]
async fn a_rush_of_clients_is_served_although_few_handshakes_run_at_once() {
    let few = Limits { handshakes: 4, ..Limits::default() };
    let relay = TestRelay::start_timed(limits(few)).await;
    let mut rush = JoinSet::new();
    for seed in 0..60 {
        let mut client = client(relay.region(), trusting(), seed);
        rush.spawn(async move {
            connected(&mut client).await;
            client
        });
    }
    let clients = rush.join_all().await;
    let counters = relay.listener.counters();
    assert_eq!((clients.len(), relay.counters().connections, counters.tls_1_3), (60, 60, 60));
    assert_eq!((counters.dropped_handshake, counters.dropped_room, counters.dropped_late), (0, 0, 0));
}
