//! A relay on a loopback port, and clients of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use mesh_derp::driver::client::{Options, RelayClient, RelayEvent};
use mesh_derp::driver::listener::{Acceptor, Settings, Watch};
use mesh_derp::driver::server::{Config, Counters, RelayServer};
use mesh_derp::frame::{Decoder, Frame};
use mesh_derp::login::ClientInfo;
use mesh_derp::map::{DerpNode, DerpRegion, RegionId};
use mesh_derp::tls::{ClientTls, ServerTls};
use mesh_noise::key::{NodePrivate, NodePublic, RelayPrivate};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn node_key(seed: u64) -> NodePrivate {
    NodePrivate::generate(&mut StdRng::seed_from_u64(seed))
}

pub(crate) fn relay_key() -> RelayPrivate {
    RelayPrivate::generate(&mut StdRng::seed_from_u64(999))
}

pub(crate) fn disco(text: &str) -> Bytes {
    let mut packet = b"TS\xF0\x9F\x92\xAC".to_vec();
    packet.extend_from_slice(text.as_bytes());
    packet.resize(80, 0);
    packet.into()
}

/// Waits for what a closure finds.
pub(crate) async fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    for _ in 0..1000 {
        if let Some(value) = found() {
            return value;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not happen within 10 s");
}

/// A relay that serves until it is dropped, and then breaks every connection.
pub(crate) struct TestRelay {
    pub(crate) server: Arc<RelayServer>,
    pub(crate) address: SocketAddr,
    pub(crate) pin: String,
    pub(crate) leaf: rustls::pki_types::CertificateDer<'static>,
    pub(crate) listener: Watch,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for TestRelay {
    fn drop(&mut self) {
        self.server.close_all();
        self.accepting.abort();
    }
}

impl TestRelay {
    pub(crate) async fn start() -> Self {
        Self::start_with(Config::default(), "127.0.0.1:0".parse().unwrap()).await
    }

    pub(crate) async fn start_with(config: Config, address: SocketAddr) -> Self {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let tls = ServerTls::generate(&names).unwrap();
        Self::start_showing(&tls, config, address).await
    }

    pub(crate) async fn start_showing(tls: &ServerTls, config: Config, address: SocketAddr) -> Self {
        Self::start_as(relay_key(), tls, config, address).await
    }

    pub(crate) async fn start_as(key: RelayPrivate, tls: &ServerTls, config: Config, address: SocketAddr) -> Self {
        Self::start_listening(key, tls, config, Settings::default(), address).await
    }

    /// One with other limits on what comes before a relay connection.
    pub(crate) async fn start_timed(settings: Settings) -> Self {
        Self::start_with_settings(Config::default(), settings).await
    }

    pub(crate) async fn start_with_settings(config: Config, settings: Settings) -> Self {
        let tls = ServerTls::generate(&["localhost".to_owned()]).unwrap();
        Self::start_listening(relay_key(), &tls, config, settings, "127.0.0.1:0".parse().unwrap()).await
    }

    async fn start_listening(
        key: RelayPrivate,
        tls: &ServerTls,
        config: Config,
        settings: Settings,
        address: SocketAddr,
    ) -> Self {
        let server = RelayServer::new(key, config);
        let tls_config = tls.config(Some(server.public())).unwrap();
        let mut acceptor = Acceptor::bind(&[address], Some(tls_config)).await.unwrap().with_settings(settings);
        let address = acceptor.local_addrs().unwrap()[0];
        let listener = acceptor.watch();
        server.show(listener.clone());
        let serving = Arc::clone(&server);
        let accepting = tokio::spawn(async move {
            // Aborted together with this task.
            let mut connections = JoinSet::new();
            loop {
                let incoming = acceptor.next().await;
                connections.spawn(Arc::clone(&serving).serve(incoming));
            }
        });
        Self { server, address, pin: tls.pin(), leaf: tls.leaf().clone(), listener, accepting }
    }

    /// The relay as the only node of region 900, pinned.
    pub(crate) fn region(&self) -> DerpRegion {
        let id = RegionId::new(900).unwrap();
        let mut region = DerpRegion::new(id, "test", "Test");
        let mut node = DerpNode::new("900a", id, "localhost");
        node.ipv4 = "127.0.0.1".into();
        node.ipv6 = "none".into();
        node.derp_port = self.address.port();
        node.cert_name = self.pin.clone();
        region.nodes.push(node);
        region
    }

    pub(crate) fn counters(&self) -> Counters {
        self.server.counters()
    }

    /// A raw connection over plain HTTP, logged in as `key`.
    pub(crate) async fn raw(&self, key: &NodePrivate) -> Raw<TcpStream> {
        let mut raw = self.upgraded().await;
        raw.log_in(key).await;
        raw
    }

    /// A raw connection over plain HTTP, not logged in.
    pub(crate) async fn upgraded(&self) -> Raw<TcpStream> {
        Self::upgrade(TcpStream::connect(self.address).await.unwrap()).await
    }

    /// The same over a connection that has been made.
    pub(crate) async fn upgrade(stream: TcpStream) -> Raw<TcpStream> {
        let mut raw = Raw::new(stream);
        raw.write(b"GET /derp HTTP/1.1\r\nHost: x\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n").await;
        let head = raw.read_head().await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        raw
    }
}

/// A hand-driven connection.
pub(crate) struct Raw<S> {
    pub(crate) stream: S,
    pub(crate) decoder: Decoder,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, decoder: Decoder::new() }
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub(crate) async fn send(&mut self, frame: Frame) {
        self.write(&frame.to_bytes()).await;
    }

    pub(crate) async fn read_head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(tokio::time::timeout(PATIENCE, self.stream.read_u8()).await.unwrap().unwrap());
        }
        String::from_utf8(head).unwrap()
    }

    /// The next frame; `None` once the relay has closed the connection.
    pub(crate) async fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            let buffer: &mut BytesMut = self.decoder.buffer();
            buffer.reserve(4096);
            let read = tokio::time::timeout(PATIENCE, self.stream.read_buf(buffer)).await.expect("a frame or the end");
            if !matches!(read, Ok(1..)) {
                return None;
            }
        }
    }

    pub(crate) async fn log_in(&mut self, key: &NodePrivate) {
        self.log_in_with(key, &ClientInfo::default()).await;
        assert!(matches!(self.frame().await, Some(Frame::ServerInfo { .. })));
    }

    /// Sends a login and leaves the answer to be read.
    pub(crate) async fn log_in_with(&mut self, key: &NodePrivate, info: &ClientInfo) {
        let Some(Frame::ServerKey(relay)) = self.frame().await else { panic!("no ServerKey") };
        let shared = key.box_with_relay(&relay);
        let login = info.seal(key.public(), &shared, &mut StdRng::seed_from_u64(7));
        self.send(login).await;
    }
}

pub(crate) fn client(region: DerpRegion, tls: ClientTls, seed: u64) -> RelayClient {
    RelayClient::new(Options::new(region, node_key(seed), tls))
}

pub(crate) fn trusting() -> ClientTls {
    ClientTls::system().unwrap()
}

pub(crate) async fn event(client: &mut RelayClient) -> RelayEvent {
    tokio::time::timeout(PATIENCE, client.next_event()).await.expect("an event within 10 s")
}

pub(crate) async fn connected(client: &mut RelayClient) {
    loop {
        let event = event(client).await;
        if matches!(event, RelayEvent::Connected { .. }) {
            return;
        }
        assert!(matches!(event, RelayEvent::Disconnected { .. }), "{event:?} before Connected");
    }
}

pub(crate) async fn packet(client: &mut RelayClient) -> (NodePublic, Bytes) {
    let event = event(client).await;
    let RelayEvent::Packet { source, payload } = event else { panic!("{event:?} where a packet was expected") };
    (source, payload)
}
