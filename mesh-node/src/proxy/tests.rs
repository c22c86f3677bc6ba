//! Programs of this host reach a page in the mesh.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::dns::MagicDns;
use crate::netstack::{Config, StackDevice};

fn pump(from: StackDevice, to: StackDevice) {
    std::thread::spawn(move || {
        let mut packets = Vec::new();
        while from.recv(64, Duration::from_secs(5), |packet| packets.push(packet)).is_some() {
            to.send(packets.drain(..));
        }
    });
}

/// Our end of a mesh with a peer named `web`, whose port 80 says what was asked of it; and its other end.
fn mesh() -> (Dialer, Netstack) {
    let start = |v4: &str, v6: &str| {
        let mut config = Config::with_addresses([v4.parse().unwrap(), v6.parse().unwrap()]);
        config.connect_timeout = Duration::from_millis(300);
        Netstack::start(config).unwrap()
    };
    let (ours, our_device) = start("100.64.0.1", "fd7a:115c:a1e0::1");
    let (theirs, their_device) = start("100.64.0.2", "fd7a:115c:a1e0::2");
    pump(our_device.clone(), their_device.clone());
    pump(their_device, our_device);
    let listener = theirs.listen_tcp(80).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve_page(stream));
        }
    });
    let mut table = MagicDns::new("mesh.example");
    table.insert("web", &["100.64.0.2".parse().unwrap(), "fd7a:115c:a1e0::2".parse().unwrap()]);
    table.insert("silent", &["100.64.0.3".parse().unwrap()]);
    (Dialer::new(ours, Arc::new(Names::new(table))), theirs)
}

/// Answers one request with its head and body, and closes.
async fn serve_page(mut stream: netstack::TcpStream) {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer).await.unwrap();
        request.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&request);
        if read == 0 || text.ends_with("\r\n\r\n") || text.ends_with("end") {
            break;
        }
    }
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", request.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&request).await.unwrap();
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

async fn socks5() -> (SocketAddr, Netstack) {
    let ((dialer, peer), (listener, address)) = (mesh(), listen().await);
    tokio::spawn(socks5::serve(listener, dialer));
    (address, peer)
}

async fn http() -> (SocketAddr, Netstack) {
    let ((dialer, peer), (listener, address)) = (mesh(), listen().await);
    tokio::spawn(http::serve(listener, dialer));
    (address, peer)
}

/// Asks a SOCKS5 proxy for `address` in wire form; the stream, if the reply code is 0.
async fn socks5_connect(proxy: SocketAddr, command: u8, address: &[u8], port: u16) -> Result<TcpStream, u8> {
    let mut stream = TcpStream::connect(proxy).await.unwrap();
    stream.write_all(&[5, 1, 0]).await.unwrap();
    let mut method = [0; 2];
    stream.read_exact(&mut method).await.unwrap();
    assert_eq!(method, [5, 0]);
    let request = [&[5, command, 0], address, &port.to_be_bytes()].concat();
    stream.write_all(&request).await.unwrap();
    let mut reply = [0; 10];
    stream.read_exact(&mut reply[..4]).await.unwrap();
    if reply[1] != 0 {
        return Err(reply[1]);
    }
    let rest = if reply[3] == 1 { 6 } else { 18 };
    stream.read_exact(&mut vec![0; rest]).await.unwrap();
    Ok(stream)
}

fn domain(name: &str) -> Vec<u8> {
    [&[3, u8::try_from(name.len()).unwrap()], name.as_bytes()].concat()
}

const PEER_V4: [u8; 5] = [1, 100, 64, 0, 2];

fn peer_v6() -> Vec<u8> {
    let address: std::net::Ipv6Addr = "fd7a:115c:a1e0::2".parse().unwrap();
    [&[4], address.octets().as_slice()].concat()
}

/// Sends `request` to the proxy and reads to the end.
async fn exchange(stream: &mut TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn socks5_reaches_a_peer_by_address_and_by_name() {
    let (proxy, _peer) = socks5().await;
    let targets = [PEER_V4.to_vec(), peer_v6(), domain("web"), domain("web.mesh.example"), domain("WEB.mesh.example.")];
    for target in targets {
        let mut stream = socks5_connect(proxy, 1, &target, 80).await.unwrap();
        let answer = exchange(&mut stream, "GET /page HTTP/1.1\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("GET /page HTTP/1.1\r\n\r\n"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn socks5_says_what_is_wrong() {
    let (proxy, _peer) = socks5().await;
    let code = async |command, target: &[u8], port| socks5_connect(proxy, command, target, port).await.unwrap_err();
    assert_eq!(code(1, &domain("nobody.mesh.example"), 80).await, 4, "no such name");
    assert_eq!(code(1, &[1, 192, 0, 2, 1], 80).await, 3, "not in the mesh");
    assert_eq!(code(1, &PEER_V4, 81).await, 5, "refused");
    assert_eq!(code(1, &domain("silent"), 80).await, 6, "no answer");
    assert_eq!(code(2, &PEER_V4, 80).await, 7, "BIND is not supported");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn socks5_clients_that_talk_nonsense_are_dropped() {
    let (proxy, _peer) = socks5().await;
    for nonsense in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &[4, 1, 0, 80, 0, 0, 0, 1], &[5, 1, 2]] {
        let mut stream = TcpStream::connect(proxy).await.unwrap();
        stream.write_all(nonsense).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.unwrap();
        assert!(answer.is_empty() || answer == [5, 0xff], "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_connect_opens_a_tunnel() {
    let (proxy, _peer) = http().await;
    for target in ["web:80", "web.mesh.example:80", "100.64.0.2:80", "[fd7a:115c:a1e0::2]:80"] {
        let mut stream = TcpStream::connect(proxy).await.unwrap();
        let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(!head.to_ascii_lowercase().contains("content-length"), "RFC 9110 §9.3.6: {head}");
        let answer = exchange(&mut stream, "GET /through HTTP/1.1\r\n\r\n").await;
        assert!(answer.ends_with("GET /through HTTP/1.1\r\n\r\n"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_http_is_passed_on_in_origin_form() {
    let (proxy, _peer) = http().await;
    let mut stream = TcpStream::connect(proxy).await.unwrap();
    let request = "POST http://web/form?q=1 HTTP/1.1\r\nHost: other\r\nProxy-Connection: keep-alive\r\n\
                   Connection: X-Hop, close\r\nX-Hop: 1\r\nX-End: 2\r\nContent-Length: 8\r\n\r\nthe  end";
    let answer = exchange(&mut stream, request).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    let (_, seen) = answer.split_once("\r\n\r\n").unwrap();
    let lower = seen.to_ascii_lowercase();
    assert!(seen.starts_with("POST /form?q=1 HTTP/1.1\r\n") && seen.ends_with("\r\n\r\nthe  end"), "{seen}");
    assert!(lower.contains("host: web\r\n") && lower.contains("x-end: 2"), "{seen}");
    assert!(!lower.contains("x-hop") && !lower.contains("proxy-connection"), "{seen}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_says_what_is_wrong() {
    let (proxy, _peer) = http().await;
    let expected = [
        ("GET http://nobody.mesh.example/ HTTP/1.1", "502", "no node of the mesh is named \"nobody.mesh.example\""),
        ("GET http://192.0.2.1/ HTTP/1.1", "502", "192.0.2.1 is not an address of the mesh"),
        ("GET http://web:81/ HTTP/1.1", "502", "refuses the connection"),
        ("GET http://silent/ HTTP/1.1", "504", "100.64.0.3:80 does not answer"),
        ("CONNECT silent:80 HTTP/1.1", "504", "does not answer"),
        ("CONNECT web HTTP/1.1", "400", ""),
        ("GET /page HTTP/1.1", "400", "this is a proxy"),
        ("GET https://web/ HTTP/1.1", "400", "this is a proxy"),
    ];
    for (request, status, text) in expected {
        let mut stream = TcpStream::connect(proxy).await.unwrap();
        let answer = exchange(&mut stream, &format!("{request}\r\nHost: web\r\nConnection: close\r\n\r\n")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(text), "{request}: {answer}");
    }
}
