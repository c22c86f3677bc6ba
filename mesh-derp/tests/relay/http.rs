//! What a relay answers to requests that are not for a relay connection.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_derp::driver::listener::Settings;
use mesh_derp::driver::server::{BootstrapDns, Config, Public};
use mesh_derp::frame::Frame;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{TestRelay, client, connected, node_key, trusting};

async fn ask(relay: &TestRelay, request: &str) -> String {
    let mut stream = TcpStream::connect(relay.address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    // A relay that has not read everything it was sent resets the connection when it closes it.
    let _ = stream.read_to_string(&mut answer).await;
    answer
}

#[tokio::test]
async fn every_path_answers_as_documented() {
    let relay = TestRelay::start().await;
    let cases = [
        ("GET /derp", "426 Upgrade Required", "DERP requires an upgrade"),
        ("GET /derp/probe", "200 OK", "Access-Control-Allow-Origin: *\r\n"),
        ("GET /derp/latency-check", "200 OK", "Content-Length: 0\r\n"),
        ("POST /derp/probe", "405 Method Not Allowed", ""),
        ("GET /robots.txt", "200 OK", "Disallow: /"),
        ("GET /generate_204?t=1", "204 No Content", "Cache-Control: no-cache, no-store, must-revalidate"),
        ("GET /", "200 OK", "relay"),
        ("GET /debug/", "404 Not Found", ""),
        ("GET /healthz", "200 OK", "ok"),
        ("GET /bootstrap-dns", "404 Not Found", ""),
    ];
    for (request, status, text) in cases {
        let answer = ask(&relay, &format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{request}: {answer}");
        assert!(answer.contains(text), "{request}: {answer}");
    }
    let head = ask(&relay, "HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n").await;
    assert!(head.ends_with("\r\n\r\n") && !head.contains("Content-Length: 0"), "{head}");
}

#[tokio::test]
async fn challenges_are_echoed_only_when_harmless() {
    let relay = TestRelay::start().await;
    let challenge = |text: &str| {
        format!("GET /generate_204 HTTP/1.1\r\nX-Tailscale-Challenge: {text}\r\nConnection: close\r\n\r\n")
    };
    let good = ask(&relay, &challenge("ts.relay-1:x")).await;
    assert!(good.contains("X-Tailscale-Response: response ts.relay-1:x\r\n"), "{good}");
    for bad in ["<script>", "a b", &"x".repeat(65), ""] {
        let answer = ask(&relay, &challenge(bad)).await;
        assert!(answer.starts_with("HTTP/1.1 204") && !answer.contains("X-Tailscale-Response"), "{answer}");
    }
    let host = ask(&relay, &challenge("ts_relay.example")).await;
    assert!(host.starts_with("HTTP/1.1 204"), "{host}");
}

#[tokio::test]
async fn what_is_not_http_is_dropped() {
    let relay = TestRelay::start().await;
    assert_eq!(ask(&relay, "\0\0\0 nonsense\r\n\r\n").await, "");
    assert_eq!(ask(&relay, &format!("GET / HTTP/1.1\r\nA: {}", "x".repeat(20_000))).await, "");
}

fn with(public: Public) -> Config {
    Config { public, ..Config::default() }
}

fn anywhere() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

#[tokio::test]
async fn a_relay_about_to_end_says_so() {
    let relay = TestRelay::start().await;
    relay.server.shutdown(Duration::ZERO).await;
    let answer = ask(&relay, "GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
}

#[tokio::test]
async fn bootstrap_names_are_told_as_json_and_the_connection_ends() {
    let dns = Arc::new(BootstrapDns::new(vec!["localhost".to_owned()]));
    let public = Public { bootstrap_dns: Some(Arc::clone(&dns)), ..Public::default() };
    let relay = TestRelay::start_with(with(public), anywhere()).await;
    let refreshing = tokio::spawn(async move { dns.run().await });
    let answer = eventually_answered(&relay, "127.0.0.1").await;
    refreshing.abort();
    // Not asked to, it closes.
    assert!(
        answer.contains("Connection: close\r\n") && answer.contains("Content-Type: application/json\r\n"),
        "{answer}"
    );
    let body = answer.split("\r\n\r\n").nth(1).unwrap();
    let found: BTreeMap<String, Vec<IpAddr>> = serde_json::from_str(body).unwrap();
    assert!(found["localhost"].contains(&"127.0.0.1".parse().unwrap()));
}

async fn eventually_answered(relay: &TestRelay, text: &str) -> String {
    for _ in 0..500 {
        let answer = ask(relay, "GET /bootstrap-dns?q=localhost HTTP/1.1\r\n\r\n").await;
        if answer.contains(text) {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no {text} at /bootstrap-dns");
}

#[tokio::test]
async fn plain_http_goes_to_https_where_that_is_asked_for() {
    let public = Public { redirect_plain_to: Some(443), ..Public::default() };
    let relay = TestRelay::start_with(with(public), anywhere()).await;
    for (request, answer) in [
        ("GET /x?y=1", "HTTP/1.1 302 Found\r\nLocation: https://relay.example/x?y=1\r\n"),
        ("GET /derp", "HTTP/1.1 302 Found\r\n"),
        ("GET /generate_204", "HTTP/1.1 204 "),
        ("GET /healthz", "HTTP/1.1 200 "),
        ("GET /metrics", "HTTP/1.1 200 "),
    ] {
        let headers = "Host: relay.example:80\r\nUpgrade: DERP\r\nConnection: close\r\n";
        let got = ask(&relay, &format!("{request} HTTP/1.1\r\n{headers}\r\n")).await;
        assert!(got.starts_with(answer), "{request}: {got}");
    }
    // Over TLS it is a relay as ever.
    let mut client = client(relay.region(), trusting(), 1);
    connected(&mut client).await;
}

#[tokio::test]
async fn metrics_are_for_this_host_and_named_networks_only() {
    let public = |networks: &[&str]| Public {
        metrics_from: networks.iter().map(|network| network.parse().unwrap()).collect(),
        ..Public::default()
    };
    // Clients are where the proxy says that they are.
    let settings = Settings { proxies: vec!["127.0.0.1/32".parse().unwrap()], ..Settings::default() };
    let relay = TestRelay::start_with_settings(with(public(&["203.0.113.0/24"])), settings).await;
    let from = |address: &str, more: &str| {
        format!("PROXY TCP4 {address} 192.0.2.1 999 443\r\nGET /metrics HTTP/1.1\r\n{more}Connection: close\r\n\r\n")
    };
    for (address, more, status) in [
        ("127.0.0.1", "", 200),
        ("203.0.113.9", "", 200),
        ("203.0.112.9", "", 403),
        ("127.0.0.1", "X-Forwarded-For: 203.0.112.9\r\n", 403),
        ("127.0.0.1", "Via: 1.1 x\r\n", 403),
    ] {
        let got = ask(&relay, &from(address, more)).await;
        assert!(got.starts_with(&format!("HTTP/1.1 {status} ")), "{address} {more}: {got}");
    }
}

/// A line of Prometheus's text that holds a number: name, labels, value.
fn sample(line: &str) -> (&str, &str, f64) {
    let (left, value) = line.rsplit_once(' ').unwrap();
    let (name, labels) = match left.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}').unwrap()),
        None => (left, ""),
    };
    for label in labels.split(',').filter(|label| !label.is_empty()) {
        let (key, value) = label.split_once('=').unwrap();
        assert!(key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{line}");
        assert!(value.len() >= 2 && value.starts_with('"') && value.ends_with('"'), "{line}");
    }
    assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{line}");
    (name, labels, value.parse().unwrap())
}

#[tokio::test]
async fn every_counter_is_shown_parses_and_is_documented() {
    let relay = TestRelay::start().await;
    let (mut a, mut b) = (relay.raw(&node_key(1)).await, relay.raw(&node_key(2)).await);
    a.send(Frame::SendPacket { destination: node_key(2).public(), payload: Bytes::from_static(b"hello") }).await;
    assert!(matches!(b.frame().await, Some(Frame::RecvPacket { .. })));
    assert_eq!(ask(&relay, "\0\0 nonsense\r\n\r\n").await, "");
    let answer = ask(&relay, "GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n").await;
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
    let samples: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).map(sample).collect();
    let distinct: BTreeSet<_> = samples.iter().map(|(name, labels, _)| (name, labels)).collect();
    assert_eq!(distinct.len(), samples.len(), "one number for each name and labels");
    // As many as there are fields: each counter of both structs, and the process's own.
    let fields = |counters: serde_json::Value| counters.as_object().unwrap().len();
    let counted = fields(serde_json::to_value(relay.counters()).unwrap())
        + fields(serde_json::to_value(relay.listener.counters()).unwrap());
    let own =
        ["mesh_build_info", "mesh_uptime_seconds", "derp_current_file_descriptors", "process_resident_memory_bytes"];
    assert_eq!(samples.len(), counted + own.len() + 1);
    for name in own.into_iter().chain(["mesh_listener_underway"]) {
        assert!(samples.iter().any(|sample| sample.0 == name), "{name}");
    }
    for (name, labels, value) in [
        ("derp_packets_sent", "", 1.0),
        ("derp_bytes_received", "", 5.0),
        ("derp_current_connections", "", 2.0),
        ("mesh_listener_dropped", "reason=\"garbage\"", 1.0),
    ] {
        assert!(samples.contains(&(name, labels, value)), "{name}{{{labels}}} {value} in {text}");
    }
    let documented = include_str!("../../METRICS.md");
    for (name, labels, _) in &samples {
        assert!(documented.contains(&format!("`{name}`")), "{name} is not in METRICS.md");
        let reason = labels.split(',').find_map(|label| label.strip_prefix("reason=\"")?.strip_suffix('"'));
        assert!(reason.is_none_or(|reason| documented.contains(&format!("`{reason}`"))), "{name} {labels}");
    }
}
