//! Nonsense thrown at every listener of a running mesh: nothing ends, nothing swells, and service goes on.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::http::{fetch_through, serve_page};
use crate::net::{Net, Running, eventually, mesh, text};

/// How often each kind of nonsense is sent.
const ROUNDS: usize = 40;
/// By how much a process may grow meanwhile, in kB: it may fill its pools, and it must not keep what it was sent.
const GROWTH_KB: u64 = 40_000;
/// How many lines it may log meanwhile, at its usual level.
const LOG_LINES: usize = 100;

/// What a process was like before.
struct Before<'a> {
    name: &'a str,
    process: &'a Running,
    resident_kb: u64,
    lines: usize,
}

impl<'a> Before<'a> {
    fn of(name: &'a str, process: &'a Running) -> Self {
        Self { name, process, resident_kb: process.resident_kb(), lines: process.text().lines().count() }
    }

    fn compare(&self) {
        let text = self.process.text();
        assert!(!text.contains("panicked"), "{}:\n{text}", self.name);
        let (grown, lines) =
            (self.process.resident_kb().saturating_sub(self.resident_kb), text.lines().count() - self.lines);
        assert!(grown < GROWTH_KB, "{} has grown by {grown} kB", self.name);
        assert!(lines < LOG_LINES, "{} has logged {lines} lines:\n{text}", self.name);
    }
}

#[test]
fn nonsense_at_every_port_ends_nothing_and_fills_nothing() {
    let net = Net::start();
    let relay_address: SocketAddr = format!("127.0.0.1:{}", crate::net::free_port()).parse().unwrap();
    let (state, listen) = (net.path("relay"), relay_address.to_string());
    let relay = Running::start(
        net.path("relay.log"),
        &["relay", "--state-dir", text(&state), "--listen", &listen, "--stun", &listen],
    );
    let (a, b) = (net.node("anna"), net.node("bert"));
    let page = serve_page("unmoved");
    eventually("a page", || fetch_through(a.http, "bert", page));
    a.ok("ping bert --until-direct --timeout 20s");

    let processes = [("coordinator", net.coordinator()), ("relay", &relay), ("anna", &a.running), ("bert", &b.running)];
    let before = processes.map(|(name, process)| Before::of(name, process));

    let mut rng = StdRng::seed_from_u64(1);
    for server in [net.address, relay_address, a.socks5, a.http] {
        for round in 0..ROUNDS {
            for bytes in streams(&mut rng, round) {
                throw(server, &bytes);
            }
        }
    }
    let node = |of: &crate::net::Daemon| {
        let port = u16::try_from(of.status()["self"]["port"].as_u64().expect("a port")).unwrap();
        SocketAddr::from(([127, 0, 0, 1], port))
    };
    let from = UdpSocket::bind("127.0.0.1:0").unwrap();
    for target in [net.address, relay_address, node(&a), node(&b)] {
        for round in 0..ROUNDS * 10 {
            for datagram in datagrams(&mut rng, round) {
                from.send_to(&datagram, target).unwrap();
            }
        }
    }

    assert_eq!(fetch_through(a.http, "bert", page).as_deref(), Ok("unmoved"));
    a.ok("ping bert --timeout 10s");
    let late = net.node("late");
    late.ok("ping bert --timeout 10s");
    net.admin("nodes list");
    assert!(mesh(&["--socket", text(&b.socket), "status"]).status.success());
    for before in before {
        before.compare();
    }
    relay.stop();
}

/// Opens a connection, sends `bytes` and goes away, without waiting for what may be said.
fn throw(server: SocketAddr, bytes: &[u8]) {
    let mut stream = TcpStream::connect(server).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    if stream.write_all(bytes).is_ok() {
        // What comes, if anything, does not matter: only that the server has had its turn.
        drop(stream.read(&mut [0; 1024]));
    }
}

/// Beginnings of connections that no client of ours makes, one for each thing that is parsed.
fn streams(rng: &mut StdRng, round: usize) -> Vec<Vec<u8>> {
    let mut random = vec![0; 1 + round * 7];
    rng.fill(&mut random[..]);
    // TLS: a record header, then noise; a hello that breaks off.
    let mut tls = vec![0x16, 3, 1, 2, 0];
    tls.extend(&random);
    let hello = vec![0x16, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3];
    let huge = format!("GET / HTTP/1.1\r\nX: {}", "y".repeat(100_000)).into_bytes();
    let many = format!("GET /key HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(5_000)).into_bytes();
    let lying = b"POST /verify HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{".to_vec();
    let upgrade = |header: &str| {
        let head = "POST /ts2021 HTTP/1.1\r\nHost: x\r\nUpgrade: tailscale-control-protocol\r\nConnection: upgrade\r\n";
        format!("{head}X-Tailscale-Handshake: {header}\r\n\r\n").into_bytes()
    };
    // 101 bytes that look like an initiation and are none.
    let mut initiation = upgrade(&format!("AAEBAGA{}", "A".repeat(129)));
    initiation.extend(&random);
    let mut relay =
        b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\nDerp-Fast-Start: 1\r\n\r\n".to_vec();
    let mut no_login = relay.clone();
    // A frame of a type that comes after the login, and one that claims four gigabytes.
    no_login.extend([4, 0, 0, 0, 40]);
    no_login.extend(&random);
    relay.extend([2, 0xff, 0xff, 0xff, 0xff]);
    relay.extend(&random);
    let page = b"POST /register/xx HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\ncode".to_vec();
    // For the proxies.
    let socks = vec![5, 1, 0, 5, 1, 0, 3, 255, b'x'];
    let connect = b"CONNECT :::::99999 HTTP/1.1\r\n\r\n".to_vec();
    vec![
        random,
        tls,
        hello,
        huge,
        many,
        lying,
        upgrade("%%%"),
        upgrade(""),
        initiation,
        no_login,
        relay,
        page,
        socks,
        connect,
    ]
}

/// Datagrams that begin like each protocol on a node's port, and go on differently.
fn datagrams(rng: &mut StdRng, round: usize) -> Vec<Vec<u8>> {
    let mut random = vec![0; round % 1400];
    rng.fill(&mut random[..]);
    let with = |prefix: &[u8]| [prefix, &random].concat();
    let padded = |prefix: &[u8], length: usize| {
        let mut datagram = with(prefix);
        datagram.resize(length, 0x55);
        datagram
    };
    vec![
        random.clone(),
        with(b"TS\xf0\x9f\x92\xac"),
        padded(b"TS\xf0\x9f\x92\xac", 62 + 24),
        with(&[0, 1, 0, 8, 0x21, 0x12, 0xa4, 0x42]),
        with(&[1, 1, 0xff, 0xff, 0x21, 0x12, 0xa4, 0x42]),
        padded(&[1, 0, 0, 0], 148),
        padded(&[2, 0, 0, 0], 92),
        padded(&[3, 0, 0, 0], 64),
        padded(&[4, 0, 0, 0], 32),
        with(&[4, 0, 0, 0]),
    ]
}
