//! The client driver against a small ts2021 server that the test scripts by hand, over loopback.

#![cfg(feature = "tokio")]
#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_control::channel::{HANDSHAKE_HEADER, UPGRADE_PROTOCOL, initiation_from_header};
use mesh_control::client::{Config, Description, Problem};
use mesh_control::driver::client::{Control, ControlEvent, Options};
use mesh_control::driver::stream::NoiseStream;
use mesh_control::wire::frame::{Compression, pack};
use mesh_control::wire::{
    Base64, EarlyNoise, EndpointType, KeyResponse, MapRequest, MapResponse, Node, NodeId, PingRequest, RegisterRequest,
    RegisterResponse, Timestamp, decode, encode,
};
use mesh_noise::key::{ChallengePublic, DiscoPublic, MachinePrivate, MachinePublic, NodePrivate, NodePublic};
use mesh_noise::random::SeededRng;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

#[tokio::test]
async fn a_node_joins_with_a_key_and_follows_the_map() {
    let mut server = TestServer::start().await;
    let mut control = server.control();
    control.login(Some("tskey-good".into()));
    let (mut events, _task) = run(control);

    let (request, answer) = server.register().await;
    assert_eq!(request.auth.unwrap().auth_key, "tskey-good");
    let node_key = request.node_key;
    answer.send(json(&registered())).unwrap();
    let ControlEvent::Registered(done) = events.next().await else { panic!("expected a registration") };
    assert_eq!((done.node_key.public(), done.login.login_name.as_str()), (node_key, "u@example.com"));

    let (update, map, stream) = server.map_poll().await;
    assert_eq!((update.disco_key, update.hostinfo.unwrap().hostname.as_str()), (DISCO, "host"));
    assert_eq!((map.compress.as_str(), map.keep_alive, map.version.0), ("zstd", true, 130));
    assert_eq!(map.endpoint_types, [EndpointType::Local]);

    stream.send(first_map(node_key, &[2])).await;
    let ControlEvent::Netmap { netmap, changes } = events.next().await else { panic!("expected a map") };
    assert!(changes.node && changes.updated.contains(&NodeId(2)));
    assert_eq!(netmap.node().unwrap().key, node_key);

    stream.send(MapResponse::keep_alive()).await;
    stream
        .send(MapResponse { peers_changed: vec![peer(3)], peers_removed: vec![NodeId(2)], ..Default::default() })
        .await;
    let ControlEvent::Netmap { netmap, changes } = events.next().await else { panic!("expected a delta") };
    assert_eq!((changes.updated.len(), changes.removed.len(), netmap.peers().len()), (1, 1, 1));

    let ping = PingRequest {
        url: "https://unused/machine/ping/1".into(),
        url_is_noise: true,
        types: "c2n".into(),
        payload: Base64(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc".to_vec()),
        ..PingRequest::default()
    };
    stream.send(MapResponse { ping_request: Some(ping), ..MapResponse::keep_alive() }).await;
    let asked = server.asked().await;
    assert_eq!((asked.method, asked.path.as_str()), (Method::POST, "/machine/ping/1"));
    assert!(asked.body.ends_with(b"\r\n\r\nabc"));
    assert_eq!(asked.machine, machine().public());
}

#[tokio::test]
async fn a_login_page_is_waited_for() {
    let mut server = TestServer::start().await;
    let mut control = server.control();
    control.login(None);
    let (mut events, _task) = run(control);

    let (request, answer) = server.register().await;
    assert!(request.auth.is_none());
    answer.send(json(&RegisterResponse { auth_url: "http://c/register/abc".into(), ..Default::default() })).unwrap();
    let ControlEvent::AuthUrl(url) = events.next().await else { panic!("expected a page") };
    assert_eq!(url, "http://c/register/abc");
    let (followup, answer) = server.register().await;
    assert_eq!((followup.followup, followup.node_key), (url, request.node_key));
    answer.send(json(&registered())).unwrap();
    assert!(matches!(events.next().await, ControlEvent::Registered(_)));
}

#[tokio::test]
async fn an_expired_node_key_is_rotated() {
    let mut server = TestServer::start().await;
    let mut control = server.control();
    control.login(None);
    let (mut events, _task) = run(control);
    let (old, answer) = server.register().await;
    answer.send(json(&RegisterResponse { node_key_expired: true, ..Default::default() })).unwrap();
    let (new, answer) = server.register().await;
    assert_eq!(new.old_node_key, old.node_key);
    assert_ne!(new.node_key, old.node_key);
    answer.send(json(&registered())).unwrap();
    let ControlEvent::Registered(done) = events.next().await else { panic!("expected a registration") };
    assert!(done.rotated && done.node_key.public() == new.node_key);
}

#[tokio::test]
async fn an_unknown_auth_key_is_final() {
    let mut server = TestServer::start().await;
    let mut control = server.control();
    control.login(Some("tskey-bad".into()));
    let (mut events, _task) = run(control);
    let (_, answer) = server.register().await;
    answer.send(json(&RegisterResponse { error: "unknown auth key".into(), ..Default::default() })).unwrap();
    let ControlEvent::Error(problem) = events.next().await else { panic!("expected an error") };
    assert_eq!(problem, Problem::Refused("unknown auth key".into()));
    assert!(problem.to_string().contains("unknown auth key") && !problem.to_string().contains("tskey"));
}

#[tokio::test]
async fn a_coordinator_that_comes_back_is_found_without_registering_again() {
    let mut server = TestServer::start().await;
    let mut control = server.control();
    control.login(None);
    let (mut events, _task) = run(control);
    let (request, answer) = server.register().await;
    answer.send(json(&registered())).unwrap();
    assert!(matches!(events.next().await, ControlEvent::Registered(_)));
    let (_, _, stream) = server.map_poll().await;
    stream.send(first_map(request.node_key, &[2, 3])).await;
    assert!(matches!(events.next().await, ControlEvent::Netmap { .. }));

    server.drop_connections().await;
    let ControlEvent::Unreachable { reason, .. } = events.next().await else { panic!("expected trouble") };
    assert!(!reason.needs_attention(), "{reason}");
    let (_, _, stream) = server.map_poll().await;
    stream.send(first_map(request.node_key, &[3])).await;
    let ControlEvent::Netmap { netmap, changes } = events.next().await else { panic!("expected a map") };
    assert!(changes.removed.contains(&NodeId(2)) && changes.updated.is_empty());
    assert_eq!(netmap.peers().len(), 1);
}

#[tokio::test]
async fn endpoints_are_told_without_touching_the_stream() {
    let mut server = TestServer::start().await;
    let mut control = server.control();
    control.login(None);
    let serve = async {
        let (request, answer) = server.register().await;
        answer.send(json(&registered())).unwrap();
        let (_, _, stream) = server.map_poll().await;
        stream.send(first_map(request.node_key, &[])).await;
        (stream, request)
    };
    let watch = async {
        while !matches!(control.next_event().await, ControlEvent::Netmap { .. }) {}
        control
    };
    let ((_stream, _), mut control) = tokio::join!(serve, watch);
    let endpoint: SocketAddr = "192.0.2.7:41641".parse().unwrap();
    control.update(Description { endpoints: vec![(endpoint, EndpointType::Stun)], ..description() });
    let told = tokio::select! {
        event = control.next_event() => panic!("the stream was disturbed: {event:?}"),
        told = server.asked() => told,
    };
    let request: MapRequest = decode(&told.body).unwrap();
    assert_eq!((request.endpoints, request.endpoint_types), (vec![endpoint], vec![EndpointType::Stun]));
    assert!(request.omit_peers && !request.stream && control.is_online());
}

#[tokio::test]
async fn a_logout_is_told_to_the_server() {
    let mut server = TestServer::start().await;
    let mut control = server.control();
    control.logout();
    let (mut events, _task) = run(control);
    let (request, answer) = server.register().await;
    assert_eq!(request.expiry, Timestamp::LOGOUT);
    answer.send(json(&RegisterResponse { node_key_expired: true, ..Default::default() })).unwrap();
    assert!(matches!(events.next().await, ControlEvent::LoggedOut(None)));
}

#[tokio::test]
async fn another_server_key_is_explained() {
    let server = TestServer::start().await;
    let expected = MachinePublic::from_bytes([8; 32]);
    let options = Options { control: Some(expected), ..server.options() };
    let mut control = Control::new(options, [1; 32]).unwrap();
    control.login(None);
    let ControlEvent::Unreachable { reason, .. } = next(&mut control).await else { panic!("expected trouble") };
    assert!(matches!(reason, Problem::WrongServerKey { expected: key, .. } if key == expected));
    assert!(reason.needs_attention() && reason.to_string().contains("log out and join again"), "{reason}");
}

#[tokio::test]
async fn nobody_listening_and_somebody_else_listening_are_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let options = |address: SocketAddr| Options::new(format!("http://{address}"), machine(), config());
    let mut control = Control::new(options(address), [1; 32]).unwrap();
    control.login(None);
    let ControlEvent::Unreachable { reason, .. } = next(&mut control).await else { panic!("expected trouble") };
    assert!(matches!(&reason, Problem::Unreachable { .. }), "{reason}");
    assert!(reason.to_string().contains("check that it runs"), "{reason}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let _other = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, b"SSH-2.0-x\r\n\r\n").await;
        }
    });
    let mut control = Control::new(options(address), [1; 32]).unwrap();
    control.login(None);
    let ControlEvent::Unreachable { reason, .. } = next(&mut control).await else { panic!("expected trouble") };
    assert!(matches!(&reason, Problem::NotACoordinator { .. }), "{reason}");
}

// ── helpers ─────────────────────────────────────────────────────────────────────────────────────────────────────────

const DISCO: DiscoPublic = DiscoPublic::from_bytes([5; 32]);
const PATIENCE: Duration = Duration::from_secs(20);

fn machine() -> MachinePrivate {
    MachinePrivate::from_bytes([0x48; 32])
}

fn description() -> Description {
    let mut description = Description { disco: DISCO, ..Description::default() };
    description.hostinfo.hostname = "host".into();
    description.endpoints = vec![("127.0.0.1:4000".parse().unwrap(), EndpointType::Local)];
    description
}

fn config() -> Config {
    Config::new(NodePrivate::from_bytes([0x50; 32]), description())
}

fn registered() -> RegisterResponse {
    let mut response = RegisterResponse { machine_authorized: true, ..RegisterResponse::default() };
    response.login.login_name = "u@example.com".into();
    response
}

fn peer(id: u64) -> Node {
    let key = NodePublic::from_bytes([u8::try_from(id).unwrap(); 32]);
    Node { id: NodeId(id), key, name: format!("n{id}.mesh.test."), ..Node::default() }
}

fn first_map(key: NodePublic, peers: &[u64]) -> MapResponse {
    let node = Node { key, name: "host.mesh.test.".into(), machine_authorized: true, ..peer(1) };
    MapResponse { node: Some(node), peers: peers.iter().copied().map(peer).collect(), ..MapResponse::default() }
}

async fn next(control: &mut Control) -> ControlEvent {
    tokio::time::timeout(PATIENCE, control.next_event()).await.expect("an event within reason")
}

struct Events(mpsc::UnboundedReceiver<ControlEvent>);

impl Events {
    async fn next(&mut self) -> ControlEvent {
        tokio::time::timeout(PATIENCE, self.0.recv()).await.expect("an event within reason").unwrap()
    }
}

/// Runs a client beside the test. It ends when the returned set is dropped.
fn run(mut control: Control) -> (Events, JoinSet<()>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { while sender.send(control.next_event().await).is_ok() {} });
    (Events(receiver), tasks)
}

/// A request that waits for the test's answer.
struct Asked {
    method: Method,
    path: String,
    body: Bytes,
    machine: MachinePublic,
    answer: oneshot::Sender<Answer>,
}

/// What the server answers: whole, or as a stream.
#[derive(Debug)]
struct Answer {
    chunks: mpsc::UnboundedReceiver<Bytes>,
}

fn json<T: serde::Serialize>(message: &T) -> Answer {
    let (sender, chunks) = mpsc::unbounded_channel();
    sender.send(Bytes::from(encode(message))).unwrap();
    Answer { chunks }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.chunks.poll_recv(cx).map(|chunk| chunk.map(|bytes| Ok(Frame::data(bytes))))
    }
}

struct Stream(mpsc::UnboundedSender<Bytes>);

impl Stream {
    /// Sends a message in two pieces, so that the reader has to join them.
    async fn send(&self, message: MapResponse) {
        let frame = pack(&encode(&message), Compression::Zstd).unwrap();
        let (head, tail) = frame.split_at(frame.len() / 2);
        self.0.send(Bytes::copy_from_slice(head)).unwrap();
        tokio::task::yield_now().await;
        self.0.send(Bytes::copy_from_slice(tail)).unwrap();
    }
}

struct TestServer {
    address: SocketAddr,
    requests: mpsc::UnboundedReceiver<Asked>,
    listener: Arc<TcpListener>,
    sender: mpsc::UnboundedSender<Asked>,
    tasks: JoinSet<()>,
}

fn control_key() -> MachinePrivate {
    MachinePrivate::from_bytes([0x60; 32])
}

impl TestServer {
    async fn start() -> Self {
        let listener = Arc::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let (sender, requests) = mpsc::unbounded_channel();
        let address = listener.local_addr().unwrap();
        let mut server = Self { address, requests, listener, sender, tasks: JoinSet::new() };
        server.serve();
        server
    }

    fn serve(&mut self) {
        let (listener, sender) = (Arc::clone(&self.listener), self.sender.clone());
        self.tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                connections.spawn(connection(tcp, sender.clone()));
            }
        });
    }

    /// Closes every connection and goes on listening.
    async fn drop_connections(&mut self) {
        self.tasks.shutdown().await;
        self.serve();
    }

    fn options(&self) -> Options {
        Options::new(format!("http://{}", self.address), machine(), config())
    }

    fn control(&self) -> Control {
        Control::new(self.options(), [1; 32]).unwrap()
    }

    async fn asked(&mut self) -> Asked {
        tokio::time::timeout(PATIENCE, self.requests.recv()).await.expect("a request within reason").unwrap()
    }

    async fn register(&mut self) -> (RegisterRequest, oneshot::Sender<Answer>) {
        let asked = self.asked().await;
        assert_eq!((asked.method, asked.path.as_str()), (Method::POST, "/machine/register"));
        (decode(&asked.body).unwrap(), asked.answer)
    }

    /// The lite update and the streaming poll, which come together and in any order.
    async fn map_poll(&mut self) -> (MapRequest, MapRequest, Stream) {
        let (mut update, mut poll) = (None, None);
        while update.is_none() || poll.is_none() {
            let asked = self.asked().await;
            assert_eq!(asked.path, "/machine/map");
            let request: MapRequest = decode(&asked.body).unwrap();
            let (sender, chunks) = mpsc::unbounded_channel();
            assert!(asked.answer.send(Answer { chunks }).is_ok());
            if request.stream {
                poll = Some((request, Stream(sender)));
            } else {
                assert!(request.omit_peers);
                update = Some(request);
            }
        }
        let (poll, stream) = poll.unwrap();
        (update.unwrap(), poll, stream)
    }
}

/// One HTTP/1.1 connection: `/key`, or the upgrade and all that follows.
async fn connection(tcp: tokio::net::TcpStream, sender: mpsc::UnboundedSender<Asked>) {
    let (upgraded_sender, mut upgraded) = mpsc::unbounded_channel();
    let service = service_fn(move |mut request: Request<Incoming>| {
        let upgraded = upgraded_sender.clone();
        async move {
            if request.uri().path() == "/key" {
                assert_eq!(request.uri().query(), Some("v=130"));
                let keys = KeyResponse { public_key: control_key().public(), ..KeyResponse::default() };
                return Ok::<_, Infallible>(Response::new(json(&keys)));
            }
            assert_eq!((request.method(), request.uri().path()), (&Method::POST, "/ts2021"));
            assert_eq!(request.headers()["upgrade"], UPGRADE_PROTOCOL);
            let initiation = initiation_from_header(request.headers()[HANDSHAKE_HEADER].as_bytes()).unwrap();
            upgraded.send((hyper::upgrade::on(&mut request), initiation)).unwrap();
            let (_, chunks) = mpsc::unbounded_channel();
            let response = Response::builder()
                .status(StatusCode::SWITCHING_PROTOCOLS)
                .header("upgrade", UPGRADE_PROTOCOL)
                .header("connection", "upgrade");
            Ok(response.body(Answer { chunks }).unwrap())
        }
    });
    let http = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(tcp), service).with_upgrades();
    let _ = http.await;
    let Ok((upgrade, initiation)) = upgraded.try_recv() else { return };
    let early = EarlyNoise { node_key_challenge: ChallengePublic::from_bytes([7; 32]) };
    let mut rng = SeededRng::from_seed([9; 32]);
    let inner = TokioIo::new(upgrade.await.unwrap());
    let accepted = NoiseStream::accept(inner, &control_key(), &initiation, Some(&early), &mut rng).await.unwrap();
    let machine = accepted.machine;
    let service = service_fn(move |request: Request<Incoming>| {
        let sender = sender.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let (answer, answered) = oneshot::channel();
            let path = head.uri.path().to_owned();
            sender.send(Asked { method: head.method, path, body, machine, answer }).unwrap();
            let answer = answered.await.unwrap_or_else(|_| Answer { chunks: mpsc::unbounded_channel().1 });
            Ok::<_, Infallible>(Response::new(answer))
        }
    });
    let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let _ = http.serve_connection(TokioIo::new(accepted.stream), service).await;
}
