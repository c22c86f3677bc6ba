//! A coordinator in a temporary directory, and machines that speak to it through pipes in memory.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_control::admin::{Client, CreateKey};
use mesh_control::channel::{ClientChannel, HANDSHAKE_HEADER, UPGRADE_PROTOCOL, initiation_to_header};
use mesh_control::driver::server::{Config, Coordinator};
use mesh_control::driver::stream::NoiseStream;
use mesh_control::version::CapabilityVersion;
use mesh_control::wire::frame::{Compression, FrameReader};
use mesh_control::wire::{MapResponse, RegisterRequest, RegisterResponse, decode, encode};
use mesh_noise::key::{MachinePrivate, NodePublic};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Documentation address from which all machines come.
const FROM: &str = "192.0.2.7:40000";

pub(super) struct Server {
    pub(super) coordinator: Arc<Coordinator>,
    pub(super) dir: tempfile::TempDir,
}

impl Server {
    /// A coordinator with a user called alice.
    pub(super) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub(super) async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new(dir.path(), "http://10.0.0.1:8080/");
        change(&mut config);
        let server = Self { coordinator: Coordinator::start(config).unwrap(), dir };
        server.admin().create_user("alice").await.unwrap();
        server
    }

    /// Stops it, and starts another on the same directory.
    pub(super) async fn restart(self) -> Self {
        self.coordinator.stop().await;
        let coordinator = Coordinator::start(Config::new(self.dir.path(), "http://10.0.0.1:8080")).unwrap();
        Self { coordinator, dir: self.dir }
    }

    pub(super) fn admin(&self) -> Client {
        Client::new(self.dir.path())
    }

    pub(super) fn reusable() -> CreateKey {
        CreateKey { user: "alice".into(), reusable: true, ..CreateKey::default() }
    }

    pub(super) async fn key(&self, wanted: CreateKey) -> String {
        self.admin().create_key(&wanted).await.unwrap().key.unwrap()
    }

    fn connect(&self) -> tokio::io::DuplexStream {
        let (near, far) = tokio::io::duplex(1 << 16);
        let from: SocketAddr = FROM.parse().unwrap();
        tokio::spawn(Arc::clone(&self.coordinator).serve_stream(far, from));
        near
    }

    /// Sends these bytes and reads until the server closes.
    pub(super) async fn raw(&self, request: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), async {
            let mut buffer = [0; 4096];
            loop {
                match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(count) => answer.extend_from_slice(&buffer[..count]),
                }
                // An answered bad request may leave the connection open; its head is all we want.
                if answer.starts_with(b"HTTP/1.1 4") && answer.ends_with(b"\n") {
                    break;
                }
            }
        });
        read.await.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// A machine with an open control channel. The same number is the same machine.
    pub(super) async fn machine(&self, number: u8) -> Machine {
        let mut rng = StdRng::seed_from_u64(u64::from(number));
        let key = MachinePrivate::generate(&mut rng);
        let (channel, initiation) =
            ClientChannel::start(CapabilityVersion::CURRENT, &key, &self.coordinator.public_key(), &mut rng).unwrap();
        let mut stream = self.connect();
        let request = format!(
            "POST /ts2021 HTTP/1.1\r\nHost: 10.0.0.1:8080\r\nUpgrade: {UPGRADE_PROTOCOL}\r\nConnection: upgrade\r\n\
             {HANDSHAKE_HEADER}: {}\r\nContent-Length: 0\r\n\r\n",
            initiation_to_header(&initiation)
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        let stream = NoiseStream::connect(stream, channel, &[]).await.unwrap();
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Machine { number, sender }
    }
}

pub(super) struct Machine {
    pub(super) number: u8,
    sender: SendRequest<Full<Bytes>>,
}

impl Machine {
    async fn send(&mut self, path: &str, body: Bytes) -> Response<Incoming> {
        // An authority that is not ours and a host header that differs from it, as a real client sends.
        let request = Request::post(format!("http://unused{path}")).header("host", "10.0.0.1").body(Full::new(body));
        self.sender.send_request(request.unwrap()).await.unwrap()
    }

    pub(super) async fn post(&mut self, path: &str, body: Bytes) -> (StatusCode, Bytes) {
        let response = self.send(path, body).await;
        (response.status(), response.into_body().collect().await.unwrap().to_bytes())
    }

    pub(super) async fn register(&mut self, request: &RegisterRequest) -> RegisterResponse {
        let (status, body) = self.post("/machine/register", encode(request).into()).await;
        assert_eq!(status, StatusCode::OK, "{}", String::from_utf8_lossy(&body));
        decode(&body).unwrap()
    }

    /// Registers by an auth key under the machine's own node key.
    pub(super) async fn join(&mut self, auth_key: &str) {
        let answer = self.register(&super::register(self, Some(auth_key))).await;
        assert!(answer.machine_authorized, "{answer:?}");
    }

    pub(super) async fn stream(&mut self, body: Bytes, zstd: bool) -> Maps {
        let response = self.send("/machine/map", body).await;
        assert_eq!(response.status(), StatusCode::OK);
        let compression = if zstd { Compression::Zstd } else { Compression::None };
        Maps { body: response.into_body(), reader: FrameReader::new(compression) }
    }
}

/// A map stream as a client reads it.
pub(super) struct Maps {
    body: Incoming,
    reader: FrameReader,
}

impl Maps {
    /// The next message, or `None` at the end.
    pub(super) async fn next(&mut self) -> Option<MapResponse> {
        tokio::time::timeout(Duration::from_secs(10), async {
            loop {
                if let Some(message) = self.reader.next_message().unwrap() {
                    return Some(message);
                }
                self.reader.push(self.body.frame().await?.unwrap().data_ref().unwrap());
            }
        })
        .await
        .unwrap()
    }

    /// The first message of a kind, which has to come.
    pub(super) async fn until(&mut self, wanted: impl Fn(&MapResponse) -> bool) -> MapResponse {
        loop {
            let message = self.next().await.unwrap();
            if wanted(&message) {
                return message;
            }
        }
    }
}

pub(super) fn node_key(number: u8) -> NodePublic {
    NodePublic::from_bytes([number; 32])
}

pub(super) fn golden(client: &str, name: &str) -> String {
    let path = format!("{}/tests/data/golden/{client}/{name}.json", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap()
}
