//! What a relay answers to requests that are not for a relay connection.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::TestRelay;

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
