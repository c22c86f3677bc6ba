//! What TLS costs: to be run by hand, in a release build.
//!
//! `cargo test --release -p mesh-derp --lib tls_stream::measure -- --ignored --nocapture --test-threads=1`

use std::time::Duration;

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use rustls::SupportedCipherSuite;
use rustls::crypto::aws_lc_rs::cipher_suite as suites;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::tests::{configs, localhost};
use super::*;
use crate::driver::{Duplex, now};

const GIGABYTE: usize = 1_000_000_000;

/// CPU time of this process.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/schedstat").ok();
    let tasks = std::fs::read_dir("/proc/self/task").ok();
    let of = |text: String| text.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0);
    let all = tasks.into_iter().flatten().flatten().filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        Some(of(stat))
    });
    Duration::from_nanos(all.sum::<u64>().max(stat.map_or(0, of)))
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    client.set_nodelay(true).unwrap();
    (listener.accept().await.unwrap().0, client)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ours,
    Rustls,
    Plain,
}

async fn ends(kind: Kind, suite: SupportedCipherSuite) -> (Box<dyn Duplex>, Box<dyn Duplex>) {
    let (server_config, client_config) = configs(suite);
    let (near, far) = tcp_pair().await;
    match kind {
        Kind::Plain => (Box::new(near), Box::new(far)),
        Kind::Ours => {
            let (server, client) = tokio::try_join!(
                TlsStream::accept(server_config, near),
                TlsStream::connect(client_config, localhost(), far)
            )
            .unwrap();
            (Box::new(server.0), Box::new(client.0))
        }
        Kind::Rustls => {
            let (acceptor, connector) = (TlsAcceptor::from(server_config), TlsConnector::from(client_config));
            let (server, client) =
                tokio::try_join!(acceptor.accept(near), connector.connect(localhost(), far)).unwrap();
            (Box::new(server), Box::new(client))
        }
    }
}

/// CPU time of sender and receiver together for a gigabyte, the kernel's included.
fn transfer(kind: Kind, suite: SupportedCipherSuite, write: usize) -> Duration {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    runtime.block_on(async {
        let (mut sender, mut receiver) = ends(kind, suite).await;
        let before = cpu();
        let send = async {
            let bytes = vec![0x55; write];
            for _ in 0..GIGABYTE / write {
                sender.write_all(&bytes).await.unwrap();
            }
            sender.shutdown().await.unwrap();
        };
        let receive = async {
            let mut buffer = bytes::BytesMut::with_capacity(64 * 1024);
            let mut total = 0;
            loop {
                buffer.clear();
                match receiver.read_buf(&mut buffer).await.unwrap() {
                    0 => break,
                    length => total += length,
                }
            }
            assert_eq!(total, GIGABYTE / write * write);
        };
        tokio::join!(send, receive);
        cpu().saturating_sub(before)
    })
}

#[test]
#[ignore = "a measurement"]
fn cpu_time_of_a_gigabyte() {
    println!("CPU seconds per GB, sender and receiver and kernel together");
    for suite in [suites::TLS13_AES_256_GCM_SHA384, suites::TLS13_CHACHA20_POLY1305_SHA256] {
        for write in [1400, 65_536] {
            for kind in [Kind::Rustls, Kind::Ours, Kind::Plain, Kind::Rustls, Kind::Ours, Kind::Plain] {
                let spent = transfer(kind, suite, write);
                println!("{:?} {write:>6} B writes {kind:?}: {:.3} s", suite.suite(), spent.as_secs_f64());
            }
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn the_ceiling() {
    for (name, algorithm) in [
        ("AES-128-GCM", &aead::AES_128_GCM),
        ("AES-256-GCM", &aead::AES_256_GCM),
        ("ChaCha20-Poly1305", &aead::CHACHA20_POLY1305),
    ] {
        let key = LessSafeKey::new(UnboundKey::new(algorithm, &vec![7; algorithm.key_len()]).unwrap());
        let mut record = vec![0; 16 * 1024];
        for length in [1400, 16 * 1024] {
            let (rounds, before) = (GIGABYTE / length, now());
            for _ in 0..rounds {
                let nonce = Nonce::assume_unique_for_key([0; 12]);
                let tag = key.seal_in_place_separate_tag(nonce, Aad::from([0; 5]), &mut record[..length]).unwrap();
                let _ = std::hint::black_box(tag);
            }
            let rate = (rounds * length) as f64 / before.elapsed().as_secs_f64() / 1e9;
            println!("{name} sealing {length} B: {rate:.2} GB/s");
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn memory_of_idle_connections() {
    const CONNECTIONS: usize = 2000;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    for kind in [Kind::Plain, Kind::Ours, Kind::Rustls] {
        runtime.block_on(async {
            let (mut config, client_config) = configs(suites::TLS13_AES_256_GCM_SHA384);
            config = lean_config(config);
            let (mut kept, mut before) = (Vec::with_capacity(CONNECTIONS), 0);
            // The clients' memory would be counted too: theirs is TCP alone, once the handshake is over.
            let mut clients = Vec::with_capacity(CONNECTIONS);
            for at in 0..CONNECTIONS + 100 {
                if at == 100 {
                    before = resident();
                }
                let (near, far) = tcp_pair().await;
                let server: Box<dyn Duplex> = match kind {
                    Kind::Plain => {
                        clients.push(far);
                        Box::new(near)
                    }
                    Kind::Ours => {
                        let connect = TlsStream::connect(Arc::clone(&client_config), localhost(), far);
                        let accept = TlsStream::accept(Arc::clone(&config), near);
                        let (mut server, client) = tokio::try_join!(accept, connect).unwrap();
                        let mut client = client.0;
                        client.write_all(b"hello").await.unwrap();
                        server.0.read_exact(&mut [0; 5]).await.unwrap();
                        clients.push(client.into_parts().0);
                        Box::new(server.0)
                    }
                    Kind::Rustls => {
                        let acceptor = TlsAcceptor::from(Arc::clone(&config));
                        let connect = TlsStream::connect(Arc::clone(&client_config), localhost(), far);
                        let (mut server, client) = tokio::try_join!(acceptor.accept(near), connect).unwrap();
                        let mut client = client.0;
                        client.write_all(b"hello").await.unwrap();
                        server.read_exact(&mut [0; 5]).await.unwrap();
                        clients.push(client.into_parts().0);
                        Box::new(server)
                    }
                };
                kept.push(server);
            }
            println!("{kind:?}: {} B of memory per idle connection", (resident() - before) / CONNECTIONS);
        });
    }
    println!("TlsStream itself: {} B", size_of::<TlsStream<TcpStream>>());
}
