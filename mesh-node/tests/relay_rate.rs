//! How fast one stream gets through a relay, between nodes with the userspace stack on the loopback interface.
//!
//! Prints figures and asserts nothing about speed: `cargo test -p mesh-node --test relay_rate -- --nocapture`.

#![expect(clippy::unwrap_used, reason = "a lab that cannot be built is a failed test")]

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use mesh_control::admin::{self, CreateKey};
use mesh_node::coordinator::{self, Coordinator};
use mesh_node::{Node, PathMode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PATIENCE: Duration = Duration::from_secs(30);
const PORT: u16 = 80;
const ROUNDS: usize = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_comes_through_the_relay_whole() {
    let directory = tempfile::tempdir().unwrap();
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let url = format!("http://{address}");
    let config = coordinator::Config::new(directory.path().join("coordinator"), vec![address], &url);
    let coordinator = Coordinator::start(config).await.unwrap();
    let admin = admin::Client::new(&directory.path().join("coordinator"));
    admin.create_user("alice").await.unwrap();
    let key = CreateKey { user: "alice".into(), reusable: true, ..CreateKey::default() };
    let key = admin.create_key(&key).await.unwrap().key.unwrap();
    let start = async |name: &str| {
        let builder = Node::builder()
            .control_url(&url)
            .auth_key(&key)
            .hostname(name)
            .path_mode(PathMode::Relay)
            .port_mapping(false);
        let node = builder.start().await.unwrap();
        node.wait_running(PATIENCE).await.unwrap();
        node
    };
    let (server, client) = (start("server").await, start("client").await);
    serve(&server);
    fetch(&client, 1000).await;

    for len in [1_000_000, 8_000_000] {
        let mut took = Vec::new();
        for _ in 0..ROUNDS {
            took.push(fetch(&client, len).await);
        }
        took.sort();
        let ms: Vec<_> = took.iter().map(Duration::as_millis).collect();
        let rate = f64::from(len) / 1e6 / took[ROUNDS / 2].as_secs_f64();
        println!("{} MB by the relay in {ms:?} ms, median {rate:.1} MB/s", len / 1_000_000);
    }
    let relay = coordinator.relay().unwrap().counters();
    println!("relay: {} packets in, {} out, {} dropped", relay.packets_in, relay.packets_out, relay.dropped_queue_data);
    for (name, node) in [("server", &server), ("client", &client)] {
        println!("{name}: dropped {:?}", node.status().await.unwrap().drops);
    }
}

/// Answers a length with that many bytes.
fn serve(node: &Node) {
    let listener = node.listen(PORT).unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let len = stream.read_u32().await.unwrap();
                let body: Vec<u8> = (0..len).map(|at| at.to_le_bytes()[0]).collect();
                stream.write_all(&body).await.unwrap();
                stream.shutdown().await.unwrap();
            });
        }
    });
}

#[expect(clippy::disallowed_methods, reason = "these tests run in real time")]
async fn fetch(node: &Node, len: u32) -> Duration {
    let start = Instant::now();
    let mut stream = loop {
        match node.dial("server", PORT).await {
            Ok(stream) => break stream,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let start = Instant::now();
    stream.write_u32(len).await.unwrap();
    let mut body = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut body)).await.unwrap().unwrap();
    let took = start.elapsed();
    assert_eq!(body.len(), len as usize);
    assert!(body.iter().zip(0_u32..).all(|(byte, at)| *byte == at.to_le_bytes()[0]), "the bytes are out of order");
    took
}
