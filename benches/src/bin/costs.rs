//! What single things cost on this machine, for `benches/dataplane.sh` and `benches/relay.sh`. Prints one figure a line: its
//! name, a tab, a number.
//!
//! ```text
//! costs cipher      CPU seconds that aws-lc-rs takes to seal and open 1,420-byte packets with 1 GB of TCP payload
//! costs handshake   CPU microseconds of a responder, ours and snow's with its default resolver
//! costs memory      bytes that a node keeps per peer, and per peer with a live session; 10,000 of them
//! costs relay       CPU seconds to open and seal 1 GB in TLS records, and to read it from one loopback connection and
//!                   write it to another: what no relay can do without
//! ```

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use mesh_benches::{Pair, SnowExchange};
use mesh_nat::{Path, SocketId};
use mesh_node::dataplane::{self, Dataplane, NoRelay};
use mesh_noise::key::NodePrivate;
use mesh_noise::wireguard::{Event, Interface, PeerConfig, Timing};
use mesh_tun::filter::Standing;
use rustix::time::{ClockId, clock_gettime};

/// Bytes of TCP payload in a packet of 1,420: less the headers of IPv4 and TCP with timestamps.
const PACKET: usize = 1420;
const PAYLOAD: f64 = 1420.0 - 20.0 - 32.0;

const PEERS: u32 = 10_000;

/// Bytes of a full TLS record.
const RECORD: usize = 16 * 1024;

fn main() -> anyhow::Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("cipher") => cipher(),
        Some("handshake") => handshake(),
        Some("memory") => memory(),
        Some("relay") => relay(),
        _ => bail!("costs cipher | handshake | memory | relay"),
    }
}

fn print(name: &str, value: f64) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{name}\t{value}")?)
}

/// The time this thread has run for: what others use meanwhile does not count.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default().as_secs_f64()
}

/// The median of five measurements of the seconds that one of `count` calls takes.
fn seconds_each(count: u32, mut measure: impl FnMut(u32) -> f64) -> f64 {
    let mut runs: [f64; 5] = std::array::from_fn(|_| measure(count) / f64::from(count));
    runs.sort_by(f64::total_cmp);
    runs[2]
}

/// Seconds to seal and open one message of that length.
fn seal_and_open(algorithm: &'static Algorithm, length: usize, count: u32) -> anyhow::Result<f64> {
    let key = LessSafeKey::new(UnboundKey::new(algorithm, &[5; 32][..algorithm.key_len()])?);
    let mut buffer = vec![0; length + algorithm.tag_len()];
    Ok(seconds_each(count, |count| {
        let before = cpu_seconds();
        for _ in 0..count {
            let nonce = || Nonce::assume_unique_for_key([0; 12]);
            let sealed = key.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut buffer[..length]);
            let tag = sealed.expect("a message is short enough");
            buffer[length..].copy_from_slice(tag.as_ref());
            key.open_in_place(nonce(), Aad::empty(), &mut buffer).expect("it was just sealed");
        }
        cpu_seconds() - before
    }))
}

fn cipher() -> anyhow::Result<()> {
    let each = seal_and_open(&CHACHA20_POLY1305, PACKET, 50_000)?;
    print("cipher, CPU s/GB", each * 1e9 / PAYLOAD)
}

fn relay() -> anyhow::Result<()> {
    for (name, algorithm) in
        [("AES-128-GCM", &AES_128_GCM), ("AES-256-GCM", &AES_256_GCM), ("ChaCha20-Poly1305", &CHACHA20_POLY1305)]
    {
        print(&format!("{name}, CPU s/GB"), seal_and_open(algorithm, RECORD, 5_000)? * 1e9 / RECORD as f64)?;
    }
    let mut runs = [passing_on()?, passing_on()?, passing_on()?];
    runs.sort_by(f64::total_cmp);
    print("loopback TCP in and out, CPU s/GB", runs[1])
}

/// CPU seconds for 1 GB that one thread reads from a connection and writes to another, 64 KiB at a time.
fn passing_on() -> anyhow::Result<f64> {
    const BYTES: u64 = 1_000_000_000;
    let pair = || -> std::io::Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        Ok((near, listener.accept()?.0))
    };
    let ((mut source, mut inlet), (mut outlet, mut sink)) = (pair()?, pair()?);
    std::thread::scope(|scope| {
        scope.spawn(move || std::io::copy(&mut std::io::repeat(7).take(BYTES), &mut source));
        scope.spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while matches!(sink.read(&mut buffer), Ok(length) if length > 0) {}
        });
        let passing = scope.spawn(move || -> anyhow::Result<f64> {
            let mut buffer = vec![0; 64 * 1024];
            let before = cpu_seconds();
            loop {
                let length = inlet.read(&mut buffer)?;
                if length == 0 {
                    return Ok((cpu_seconds() - before) * 1e9 / BYTES as f64);
                }
                outlet.write_all(&buffer[..length])?;
            }
        });
        passing.join().unwrap_or_else(|_| bail!("the passing thread panicked"))
    })
}

fn handshake() -> anyhow::Result<()> {
    let ours = seconds_each(200, |count| {
        (0..count).map(|_| Pair::new().initiate()).map(|mut exchange| timed(|| exchange.respond())).sum()
    });
    let theirs = seconds_each(200, |count| {
        (0..count).map(|_| SnowExchange::new()).map(|mut exchange| timed(|| exchange.respond())).sum()
    });
    print("responder, CPU us", ours * 1e6)?;
    print("responder by snow's default resolver, CPU us", theirs * 1e6)
}

fn timed(respond: impl FnOnce() -> Vec<u8>) -> f64 {
    let before = cpu_seconds();
    std::hint::black_box(respond());
    cpu_seconds() - before
}

/// A node with peers, as `mesh` and `mesh-wireguard` hold them: the interface (slow plane) and the data plane.
struct Node {
    now: Instant,
    interface: Interface<Path>,
    plane: Dataplane,
    private: NodePrivate,
}

impl Node {
    #[expect(clippy::disallowed_methods, reason = "an instant can only come from the clock")]
    fn new() -> anyhow::Result<Self> {
        let (now, private) = (Instant::now(), NodePrivate::from_bytes([7; 32]));
        // Ten thousand handshakes at once are what this is about, not an attack.
        let timing = Timing { load_limit: u32::MAX, ..Timing::default() };
        let interface = Interface::new(now, SystemTime::UNIX_EPOCH, &private, [8; 32]).with_timing(timing);
        let (device, _) = mesh_tun::channel::pair(1280, 1);
        let (plane, _notices) = Dataplane::start(dataplane::Config {
            device: Arc::new(device),
            sockets: Vec::new(),
            relay: Arc::new(NoRelay),
            flow_seed: [9; 16],
            clock: Arc::new(|| 1),
            workers: dataplane::Workers::Off,
        })?;
        Ok(Self { now, interface, plane, private })
    }

    /// Sets all peers, each with an address and a path.
    fn configure(&mut self, peers: &[NodePrivate]) {
        let configs: Vec<_> = (0..)
            .zip(peers)
            .map(|(number, private)| dataplane::PeerConfig {
                key: private.public(),
                allowed_ips: vec![IpAddr::from(Ipv4Addr::from_bits(0x6440_0000 + number)).into()],
                standing: Standing::Ordinary,
            })
            .collect();
        for config in &configs {
            self.interface.set_peer(self.now, config.key, PeerConfig::default());
        }
        self.plane.set_peers(&configs);
        for config in &configs {
            self.plane.set_path(&config.key, Some(path()));
        }
    }

    /// Gives a peer a session, made and confirmed.
    fn connect(&mut self, private: &NodePrivate) -> anyhow::Result<()> {
        let (now, here) = (self.now, self.private.public());
        let mut peer = Interface::<Path>::new(now, SystemTime::UNIX_EPOCH, private, [1; 32]);
        peer.set_peer(now, here, PeerConfig::default());
        peer.want_session(now, &here);
        let initiation = peer.poll_transmit().context("an initiation")?;
        self.interface.handle_datagram(now, &path(), None, &initiation.datagram)?;
        self.interface.poll_transmit().context("a response")?;
        self.take_events();
        Ok(())
    }

    fn take_events(&mut self) {
        while let Some(event) = self.interface.poll_event() {
            match event {
                Event::SessionOpened { session, .. } => {
                    self.plane.session_opened(&session);
                    // As when the peer's first packet arrives.
                    self.interface.session_used(self.now, session.receiver_index());
                }
                Event::SessionReady { session, .. } => self.plane.session_ready(&session),
                Event::SessionClosed { peer, receiver_index } => self.plane.session_closed(&peer, receiver_index),
                Event::HandshakeFailed { .. } | Event::Authenticated { .. } => {}
            }
        }
    }
}

fn path() -> Path {
    Path::Direct { socket: SocketId(0), remote: (Ipv4Addr::LOCALHOST, 51820).into() }
}

fn memory() -> anyhow::Result<()> {
    let peers: Vec<_> = (1..=PEERS).map(secret).collect();
    let mut node = Node::new()?;
    // Memory that is needed once, and that a handshake's other side needs for a moment, is not what a peer costs.
    node.configure(&peers[..1]);
    node.connect(&peers[0])?;
    let empty = resident()?;
    node.configure(&peers);
    let configured = resident()?;
    for private in &peers[1..] {
        node.connect(private)?;
    }
    let connected = resident()?;
    print("memory per configured peer, bytes", (configured - empty) / f64::from(PEERS))?;
    print("memory per peer with a live session, bytes", (connected - empty) / f64::from(PEERS))
}

fn secret(number: u32) -> NodePrivate {
    let mut bytes = [3; 32];
    // The first and the last byte have bits that do not count (RFC 7748 §5).
    bytes[8..12].copy_from_slice(&number.to_le_bytes());
    NodePrivate::from_bytes(bytes)
}

/// Bytes of this process in memory.
fn resident() -> anyhow::Result<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: f64 = statm.split(' ').nth(1).context("/proc/self/statm")?.parse()?;
    Ok(pages * f64::from(u32::try_from(rustix::param::page_size())?))
}
