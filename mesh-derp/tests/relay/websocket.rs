//! Relay connections inside WebSocket messages.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _};
use mesh_derp::frame::{Decoder, Frame};
use mesh_derp::login::ClientInfo;
use mesh_derp::tls::server_name;
use mesh_noise::key::NodePrivate;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_websockets::{ClientBuilder, Message, WebSocketStream};

use crate::harness::{PATIENCE, TestRelay, client, connected, node_key, packet, trusting};

/// A relay connection by an implementation of WebSocket that is not ours.
struct Foreign<S> {
    socket: WebSocketStream<S>,
    decoder: Decoder,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Foreign<S> {
    async fn open(stream: S, key: &NodePrivate) -> Self {
        let uri = "ws://localhost/derp".parse().unwrap();
        let builder = ClientBuilder::from_uri(uri)
            .add_header("sec-websocket-protocol".parse().unwrap(), "derp".parse().unwrap())
            .unwrap()
            .add_header("origin".parse().unwrap(), "https://elsewhere.example".parse().unwrap())
            .unwrap();
        let (socket, response) = builder.connect_on(stream).await.unwrap();
        assert_eq!(response.headers()["sec-websocket-protocol"], "derp");
        assert!(response.headers().get("sec-websocket-extensions").is_none());
        let mut foreign = Self { socket, decoder: Decoder::new() };
        let Frame::ServerKey(relay) = foreign.frame().await else { panic!("no ServerKey") };
        let shared = key.box_with_relay(&relay);
        let login = ClientInfo::default().seal(key.public(), &shared, &mut StdRng::seed_from_u64(7)).to_bytes();
        // Where messages begin means nothing.
        foreign.send(login.slice(..9)).await;
        foreign.send(Bytes::new()).await;
        foreign.send(login.slice(9..)).await;
        assert!(matches!(foreign.frame().await, Frame::ServerInfo { .. }));
        foreign
    }

    async fn send(&mut self, bytes: Bytes) {
        self.socket.send(Message::binary(bytes)).await.unwrap();
    }

    async fn frame(&mut self) -> Frame {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return frame;
            }
            let message = tokio::time::timeout(PATIENCE, self.socket.next()).await.unwrap().unwrap().unwrap();
            assert!(message.is_binary() || message.is_pong(), "{message:?}");
            if message.is_binary() {
                self.decoder.extend(message.as_payload());
            }
        }
    }
}

async fn tls_to(relay: &TestRelay) -> tokio_rustls::client::TlsStream<TcpStream> {
    let config = trusting().for_node(&relay.region().nodes[0]).unwrap();
    let tcp = TcpStream::connect(relay.address).await.unwrap();
    tokio_rustls::TlsConnector::from(Arc::clone(&config)).connect(server_name("localhost").unwrap(), tcp).await.unwrap()
}

#[tokio::test]
async fn a_foreign_websocket_client_over_tls_and_one_of_ours_exchange_packets() {
    let relay = TestRelay::start().await;
    let mut foreign = Foreign::open(tls_to(&relay).await, &node_key(1)).await;
    let mut ours = client(relay.region(), trusting(), 2);
    connected(&mut ours).await;
    let large: Bytes = (0..60_000u32).map(|n| n.to_le_bytes()[0]).collect::<Vec<_>>().into();
    let mut bytes = BytesMut::new();
    Frame::SendPacket { destination: node_key(2).public(), payload: large.clone() }.encode(&mut bytes);
    Frame::SendPacket { destination: node_key(2).public(), payload: Bytes::from_static(b"small") }.encode(&mut bytes);
    foreign.send(bytes.freeze()).await;
    assert!(packet(&mut ours).await == (node_key(1).public(), large.clone()));
    assert_eq!(packet(&mut ours).await.1, "small");
    ours.outbox().try_send(node_key(1).public(), large.clone());
    let back = tokio::select! {
        frame = foreign.frame() => frame,
        event = ours.next_event() => panic!("{event:?}"),
    };
    assert!(back == Frame::RecvPacket { source: node_key(2).public(), payload: large });
}

#[tokio::test]
async fn a_websocket_ping_and_a_relay_ping_are_both_answered() {
    let relay = TestRelay::start().await;
    let stream = TcpStream::connect(relay.address).await.unwrap();
    let mut foreign = Foreign::open(stream, &node_key(1)).await;
    foreign.socket.send(Message::ping(Bytes::from_static(b"websocket"))).await.unwrap();
    let answer = foreign.socket.next().await.unwrap().unwrap();
    assert!(answer.is_pong() && answer.as_payload()[..] == b"websocket"[..], "{answer:?}");
    foreign.send(Frame::Ping(*b"therelay").to_bytes()).await;
    assert_eq!(foreign.frame().await, Frame::Pong(*b"therelay"));
}

#[tokio::test]
async fn a_websocket_request_that_is_none_is_refused_and_says_why() {
    let relay = TestRelay::start().await;
    let mut stream = TcpStream::connect(relay.address).await.unwrap();
    let request =
        b"GET /derp HTTP/1.1\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: derp\r\nSec-WebSocket-Version: 8\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("Sec-WebSocket-Version: 13\r\n"), "{answer}");
    assert!(answer.ends_with("websocket handshake: the version must be 13\n"), "{answer}");
}
