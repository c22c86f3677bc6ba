//! `relay_load HOST:PORT CERTIFICATE COMMAND…`: load for a DERP relay, ours or another.
//!
//! CERTIFICATE is `sha256-raw:HEX`, as a DERP map pins it, or `any`. The commands are those of `relay_load.rs` in the
//! library, and two for connections that never become clients:
//!
//! ```text
//! silent tcp|tls COUNT TOTAL   TOTAL connections, COUNT at a time, over which nothing is said once TCP, or TLS, stands.
//!                              Starts with a line of input, and prints how many the relay has ended meanwhile
//! ```

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use mesh_benches::relay_load::{self, now, say};
use mesh_derp::client::{Connection, Event};
use mesh_derp::map::{DerpNode, RegionId};
use mesh_derp::tls::{ClientTls, server_name};
use mesh_derp::upgrade;
use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::random::SystemRng;
use rustls::ClientConfig;
use rustls::client::Resumption;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// How much is read at once.
const READ_CHUNK: usize = 64 * 1024;
/// Loopback addresses that connections come from, so that ports suffice for those that are closed and opened again.
const SOURCES: usize = 8;

#[derive(Clone)]
struct Derp {
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    connections: Arc<AtomicUsize>,
}

struct Client {
    stream: TlsStream<TcpStream>,
    core: Connection,
    key: NodePublic,
    out: BytesMut,
}

impl Derp {
    fn new(address: SocketAddr, certificate: &str) -> anyhow::Result<Self> {
        let region = RegionId::new(1).context("1 is not 0")?;
        let mut node = DerpNode::new("1", region, address.ip().to_string());
        if certificate == "any" {
            node.insecure_for_tests = true;
        } else {
            certificate.clone_into(&mut node.cert_name);
        }
        let mut tls = ClientConfig::clone(&*ClientTls::system()?.for_node(&node)?);
        // Every connection is another client's.
        tls.resumption = Resumption::disabled();
        Ok(Self { address, tls: Arc::new(tls), connections: Arc::default() })
    }

    async fn tcp(&self) -> anyhow::Result<TcpStream> {
        let socket = if self.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if self.address.ip().is_loopback() && self.address.is_ipv4() {
            let last = u8::try_from(2 + self.connections.fetch_add(1, Ordering::Relaxed) % SOURCES)?;
            socket.bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 0, last)), 0))?;
        }
        let stream = socket.connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn tls(&self) -> anyhow::Result<TlsStream<TcpStream>> {
        let name = server_name(&self.address.ip().to_string())?;
        Ok(TlsConnector::from(Arc::clone(&self.tls)).connect(name, self.tcp().await?).await?)
    }
}

impl relay_load::Relay for Derp {
    type Client = Client;

    async fn connect(&self) -> anyhow::Result<Client> {
        let private = NodePrivate::generate(&mut SystemRng);
        let key = private.public();
        let mut stream = self.tls().await?;
        stream.write_all(&upgrade::request(&self.address.to_string(), false, None)).await?;
        stream.flush().await?;
        let mut core = Connection::new(now(), private, None, true, &mut SystemRng);
        let mut answer = BytesMut::new();
        let (head, length) = loop {
            if stream.read_buf(&mut answer).await? == 0 {
                bail!("the relay has closed the connection");
            }
            if let Some(found) = upgrade::parse_response(&answer)? {
                break found;
            }
        };
        if head.status != 101 {
            bail!("the relay has answered {}", head.status);
        }
        core.handle_bytes(now(), &answer[length..])?;
        let mut client = Client { stream, core, key, out: BytesMut::new() };
        while !matches!(client.core.poll_event(), Some(Event::Connected { .. })) {
            client.read().await?;
        }
        Ok(client)
    }
}

impl Client {
    /// Writes what is due, and reads once. Can be cancelled without loss.
    async fn read(&mut self) -> anyhow::Result<()> {
        while let Some(bytes) = self.core.poll_transmit() {
            self.out.extend_from_slice(&bytes);
        }
        if !self.out.is_empty() {
            while !self.out.is_empty() {
                self.stream.write_buf(&mut self.out).await?;
            }
            self.stream.flush().await?;
        }
        self.core.read_buffer().reserve(READ_CHUNK);
        if self.stream.read_buf(self.core.read_buffer()).await? == 0 {
            bail!("the relay has closed the connection");
        }
        Ok(self.core.handle_buffered(now())?)
    }
}

impl relay_load::Client for Client {
    type Key = NodePublic;

    fn key(&self) -> NodePublic {
        self.key
    }

    async fn send(&mut self, to: &NodePublic, packets: &[Bytes]) -> anyhow::Result<()> {
        for packet in packets {
            self.core.send(now(), *to, packet.clone());
        }
        while let Some(bytes) = self.core.poll_transmit() {
            self.stream.write_all(&bytes).await?;
        }
        Ok(self.stream.flush().await?)
    }

    async fn receive(&mut self, see: &mut (impl FnMut(&[u8]) + Send)) -> anyhow::Result<()> {
        let mut seen = false;
        loop {
            while let Some(event) = self.core.poll_event() {
                if let Event::Packet { payload, .. } = event {
                    see(&payload);
                    seen = true;
                }
            }
            if seen {
                return Ok(());
            }
            self.read().await?;
        }
    }
}

/// How connections that say nothing fared.
#[derive(Default)]
struct Tally {
    made: AtomicUsize,
    /// By the relay.
    ended: AtomicUsize,
    refused: AtomicUsize,
}

/// Silent connections that are being made at the same time.
const CONNECTING: usize = 256;
/// How long a connection says nothing before it leaves.
const SILENCE: Duration = Duration::from_secs(3);

/// Connections that say nothing, `count` at a time until there were `total`.
async fn silent(relay: Derp, secured: bool, count: usize, total: usize) -> anyhow::Result<()> {
    say("connected")?;
    relay_load::input().next_line().await?;
    let (tally, start) = (Arc::new(Tally::default()), now());
    // More at once would wait for the system, which asks again only after a second.
    let connecting = Arc::new(Semaphore::new(CONNECTING));
    let mut tasks = JoinSet::new();
    for _ in 0..total {
        if tasks.len() >= count {
            tasks.join_next().await;
        }
        let (relay, tally, turn) = (relay.clone(), Arc::clone(&tally), Arc::clone(&connecting).acquire_owned().await?);
        tasks.spawn(async move {
            let outcome = if secured {
                let made = relay.tls().await;
                drop(turn);
                hold(made).await
            } else {
                let made = relay.tcp().await;
                drop(turn);
                hold(made).await
            };
            let (count, also) = match outcome {
                Some(ended) => (&tally.made, usize::from(ended)),
                None => (&tally.refused, 0),
            };
            count.fetch_add(1, Ordering::Relaxed);
            tally.ended.fetch_add(also, Ordering::Relaxed);
        });
    }
    while tasks.join_next().await.is_some() {}
    let [made, ended, refused] = [&tally.made, &tally.ended, &tally.refused].map(|count| count.load(Ordering::Relaxed));
    say(&format!("seconds={:.1} connected={made} ended={ended} refused={refused}", start.elapsed().as_secs_f64()))
}

/// Says nothing for a while; whether the relay has ended it meanwhile, or nothing if it was never made.
async fn hold<S: AsyncRead + Unpin>(made: anyhow::Result<S>) -> Option<bool> {
    let mut stream = made.ok()?;
    Some(tokio::time::timeout(SILENCE, stream.read_u8()).await.is_ok())
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let [address, certificate, command @ ..] = &arguments[..] else {
        bail!("relay_load HOST:PORT CERTIFICATE COMMAND…")
    };
    let relay = Derp::new(address.parse()?, certificate)?;
    match command {
        ["silent", kind @ ("tcp" | "tls"), count, total] => {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(silent(relay, *kind == "tls", count.parse()?, total.parse()?))
        }
        _ => relay_load::run(relay, command),
    }
}
