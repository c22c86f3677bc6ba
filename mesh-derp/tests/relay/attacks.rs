//! Strangers that want to be a burden. Each finds its limit and is counted, and those who are served do not notice.

use std::time::Duration;

use bytes::Bytes;
use mesh_derp::driver::listener::Settings;
use mesh_derp::frame::Frame;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::harness::{PATIENCE, Raw, TestRelay, client, connected, eventually, node_key, packet, trusting};

/// Two clients that are served: packets go from one to the other for as long as an attack lasts.
struct Served {
    sender: Raw<TcpStream>,
    receiver: Raw<TcpStream>,
    slowest: Duration,
}

impl Served {
    async fn new(relay: &TestRelay) -> Self {
        let (sender, receiver) = (relay.raw(&node_key(71)).await, relay.raw(&node_key(72)).await);
        Self { sender, receiver, slowest: Duration::ZERO }
    }

    async fn packet(&mut self) {
        let (begin, payload) = (Instant::now(), Bytes::from_static(b"to be served"));
        let destination = node_key(72).public();
        self.sender.send(Frame::SendPacket { destination, payload: payload.clone() }).await;
        let source = node_key(71).public();
        assert_eq!(self.receiver.frame().await, Some(Frame::RecvPacket { source, payload }));
        self.slowest = self.slowest.max(begin.elapsed());
    }

    /// A packet now and then, until every attacker has ended.
    async fn while_attacked(&mut self, attackers: &mut JoinSet<()>) {
        let end = sleep(2 * PATIENCE);
        tokio::pin!(end);
        let mut next = tokio::time::interval(Duration::from_millis(20));
        loop {
            tokio::select! {
                ended = attackers.join_next() => match ended {
                    Some(ended) => ended.unwrap(),
                    None => return,
                },
                _ = next.tick() => self.packet().await,
                () = &mut end => panic!("{} attackers are still connected", attackers.len()),
            }
        }
    }

    fn assert_undisturbed(&self) {
        // Far above what it takes, and far below what waiting for an attacker would.
        assert!(self.slowest < Duration::from_secs(1), "a packet took {:?}", self.slowest);
    }
}

/// Writes `bytes` one by one, and then `more` for ever, until the relay has had enough.
async fn drip(mut stream: TcpStream, bytes: Vec<u8>, more: u8, every: Duration) {
    for byte in bytes.into_iter().chain(std::iter::repeat(more)) {
        let mut answer = [0; 512];
        let ended = tokio::select! {
            read = stream.read(&mut answer) => !matches!(read, Ok(1..)),
            () = sleep(every) => stream.write_all(&[byte]).await.is_err(),
        };
        if ended {
            return;
        }
    }
}

/// Resident memory of this process. Other tests run in it too, so only great differences mean anything.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
}

const MIB: usize = 1024 * 1024;
const FAST: &[u8] = b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n";

fn brief() -> Settings {
    Settings { handshake: Duration::from_secs(1), head: Duration::from_secs(1), ..Settings::default() }
}

#[tokio::test]
async fn request_heads_that_come_byte_by_byte_are_cut_off() {
    let relay = TestRelay::start_timed(brief()).await;
    let mut served = Served::new(&relay).await;
    let mut attackers = JoinSet::new();
    for number in 0..60 {
        let stream = TcpStream::connect(relay.address).await.unwrap();
        let opening = match number % 3 {
            0 => b"GET /derp HTTP/1.1\r\nX: ".to_vec(),
            // A TLS handshake that is as slow.
            1 => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
            _ => Vec::new(),
        };
        attackers.spawn(drip(stream, opening, b'x', Duration::from_millis(20)));
    }
    let begin = Instant::now();
    served.while_attacked(&mut attackers).await;
    assert!(begin.elapsed() >= Duration::from_millis(900), "they had their time");
    served.assert_undisturbed();
    assert_eq!((relay.listener.counters().dropped_late, relay.listener.underway()), (60, 0));
    assert_eq!(relay.counters().connections, 2);
}

#[tokio::test]
async fn logins_that_come_byte_by_byte_are_cut_off_after_ten_seconds() {
    let relay = TestRelay::start().await;
    let mut served = Served::new(&relay).await;
    let mut attackers = JoinSet::new();
    for _ in 0..30 {
        let mut stream = TcpStream::connect(relay.address).await.unwrap();
        stream.write_all(FAST).await.unwrap();
        let login = [&[0x02, 0, 0, 1, 0][..], node_key(9).public().as_bytes()].concat();
        attackers.spawn(drip(stream, login, b'x', Duration::from_millis(100)));
    }
    let begin = Instant::now();
    served.while_attacked(&mut attackers).await;
    assert!(begin.elapsed() >= Duration::from_millis(9500), "they had their time");
    served.assert_undisturbed();
    let counters = relay.counters();
    assert_eq!((counters.logins_late, counters.logins_refused, counters.connections), (30, 0, 2));
}

#[tokio::test]
async fn what_is_announced_is_not_set_aside_and_what_is_too_long_is_refused_at_once() {
    let relay = TestRelay::start().await;
    let mut served = Served::new(&relay).await;
    let before = resident();
    // 300 logins of the greatest length, of which nothing but the header comes: 75 MiB if they were believed.
    let mut announced = Vec::new();
    for _ in 0..300 {
        let mut stream = TcpStream::connect(relay.address).await.unwrap();
        stream.write_all(&[FAST, &[0x02, 0, 4, 0, 0]].concat()).await.unwrap();
        announced.push(stream);
    }
    served.packet().await;
    eventually("all accepted", || (relay.counters().accepts == 302).then_some(())).await;
    let grown = resident().saturating_sub(before);
    assert!(grown < 40 * MIB, "{} MiB for announcements", grown / MIB);
    drop(announced);
    // Frames longer than their kind may be end their connection with the header: no client gets to send the rest.
    let headers = [&[0x04, 0, 1, 0, 33][..], &[0x04, 0xff, 0xff, 0xff, 0xff], &[0x77, 0xff, 0xff, 0xff, 0xff]];
    for (refused, header) in (1..).zip(headers) {
        let mut raw = relay.raw(&node_key(80)).await;
        raw.write(header).await;
        assert_eq!(raw.frame().await, None, "{header:?}");
        eventually("counted", || (relay.counters().protocol_errors == refused).then_some(())).await;
        served.packet().await;
    }
    served.assert_undisturbed();
}

#[tokio::test]
async fn logins_in_the_name_of_others_get_nowhere() {
    let relay = TestRelay::start().await;
    let mut served = Served::new(&relay).await;
    let mut attackers = JoinSet::new();
    for number in 0..50u8 {
        let mut raw = Raw::new(TcpStream::connect(relay.address).await.unwrap());
        attackers.spawn(async move {
            raw.write(FAST).await;
            assert!(matches!(raw.frame().await, Some(Frame::ServerKey(_))));
            // In the name of one that is connected.
            let forged = Frame::ClientInfo { node: node_key(72).public(), sealed: vec![number; 100].into() };
            raw.send(forged).await;
            assert_eq!(raw.frame().await, None);
        });
    }
    served.while_attacked(&mut attackers).await;
    served.assert_undisturbed();
    eventually("all counted", || (relay.counters().logins_refused == 50).then_some(())).await;
    served.packet().await;
    assert_eq!(relay.counters().nodes, 2);
}

#[tokio::test]
async fn garbage_in_place_of_tls_and_within_it_ends_its_own_connection() {
    let relay = TestRelay::start().await;
    let mut served = Served::new(&relay).await;
    let mut attackers = JoinSet::new();
    for number in 0..40u8 {
        let mut stream = TcpStream::connect(relay.address).await.unwrap();
        let mut garbage: Vec<u8> = (0..=255u8).cycle().take(4000).map(|at| at.wrapping_mul(31) ^ number).collect();
        let opening: &[u8] = match number % 4 {
            0 => b"\x16\x03\x01\x0f\x00",
            // A record longer than any may be.
            1 => b"\x16\x03\x01\xff\xff",
            // A handshake message of 16 MiB.
            2 => b"\x16\x03\x01\x0f\x00\x01\xff\xff\xff",
            _ => b"\x16\x16\x16\x16\x16",
        };
        garbage[..opening.len()].copy_from_slice(opening);
        attackers.spawn(async move {
            let _ = stream.write_all(&garbage).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the end").unwrap_or_default();
            assert!(!answer.windows(4).any(|window| window == b"DERP"), "served after all");
        });
    }
    served.while_attacked(&mut attackers).await;
    served.assert_undisturbed();
    let counters = relay.listener.counters();
    assert_eq!((counters.tls_failures + counters.ended_early, relay.listener.underway()), (40, 0), "{counters:?}");
    assert!(counters.tls_failures >= 20, "{counters:?}");
    // A client that has logged in over TLS, and whose stream is then tampered with.
    let mut victim = client(relay.region(), trusting(), 1);
    connected(&mut victim).await;
    victim.outbox().try_send(node_key(1).public(), Bytes::from_static(b"to myself"));
    assert_eq!(packet(&mut victim).await.1, b"to myself"[..]);
    let mut tampered = tls_login(&relay, 2).await;
    eventually("logged in", || (relay.counters().connections == 4).then_some(())).await;
    tampered.stream.get_mut().0.write_all(&[0x17, 3, 3, 0, 40]).await.unwrap();
    tampered.stream.get_mut().0.write_all(&[7; 40]).await.unwrap();
    eventually("ended", || (relay.counters().connections == 3).then_some(())).await;
    victim.outbox().try_send(node_key(1).public(), Bytes::from_static(b"still here"));
    assert_eq!(packet(&mut victim).await.1, b"still here"[..]);
}

async fn tls_login(relay: &TestRelay, seed: u64) -> Raw<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(relay.leaf.clone()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(mesh_derp::tls::provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(relay.address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let mut raw = Raw::new(connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap());
    raw.write(FAST).await;
    raw.log_in(&node_key(seed)).await;
    raw
}
