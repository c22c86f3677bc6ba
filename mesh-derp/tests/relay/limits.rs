//! Clients that are read more slowly than they send.

use std::time::Duration;

use bytes::Bytes;
use mesh_derp::driver::server::{Config, Counters};
use mesh_derp::frame::Frame;
use mesh_derp::login::{ClientInfo, MeshKey};
use mesh_derp::server::RateLimit;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::Instant;

use crate::harness::{Raw, TestRelay, node_key};

const LONGEST: usize = 65_536;

fn packet(number: u32, length: usize) -> Bytes {
    let mut packet = vec![4; length];
    packet[..4].copy_from_slice(&number.to_be_bytes());
    packet.into()
}

fn limited(bytes_per_second: u64) -> Config {
    Config { rate: RateLimit { bytes_per_second, burst: 0 }, ..Config::default() }
}

async fn relay(config: Config) -> TestRelay {
    TestRelay::start_with(config, "127.0.0.1:0".parse().unwrap()).await
}

/// Sends a packet of the greatest length and a hundred of the usual one; how long it takes until all have come.
async fn time(sender: &mut Raw<TcpStream>, frames: impl Fn(Bytes) -> Frame, receiver: &mut Raw<TcpStream>) -> Duration {
    let begin = Instant::now();
    let sending = async {
        sender.send(frames(packet(0, LONGEST))).await;
        for number in 1..=100 {
            sender.send(frames(packet(number, 1400))).await;
        }
    };
    let receiving = async {
        for expected in 0..=100 {
            let Some(Frame::RecvPacket { payload, .. }) = receiver.frame().await else { panic!("no packet") };
            assert_eq!(payload, packet(expected, if expected == 0 { LONGEST } else { 1400 }));
        }
    };
    tokio::join!(sending, receiving);
    begin.elapsed()
}

#[tokio::test]
async fn a_rate_limit_delays_and_drops_nothing() {
    let relay = relay(limited(300_000)).await;
    let (mut sender, mut receiver) = (relay.raw(&node_key(1)).await, relay.raw(&node_key(2)).await);
    let to = |payload| Frame::SendPacket { destination: node_key(2).public(), payload };
    // The longest packet takes up the burst; 143,200 bytes of frames follow. What is read at once is passed on at once.
    let taken = time(&mut sender, to, &mut receiver).await;
    assert!(taken > Duration::from_millis(250) && taken < Duration::from_secs(3), "{taken:?}");
    let counters = relay.counters();
    assert_eq!((counters.packets_out, counters.dropped_queue_data), (101, 0));
    assert!(counters.pauses > 0);
    // Pings wait as well, and nothing else does.
    receiver.send(Frame::Ping(*b"anything")).await;
    assert_eq!(receiver.frame().await, Some(Frame::Pong(*b"anything")));
}

#[tokio::test]
async fn a_rate_limit_reaches_clients_that_are_connected() {
    let relay = relay(Config::default()).await;
    let (mut sender, mut receiver) = (relay.raw(&node_key(1)).await, relay.raw(&node_key(2)).await);
    let to = |payload| Frame::SendPacket { destination: node_key(2).public(), payload };
    time(&mut sender, to, &mut receiver).await;
    assert_eq!(relay.counters().pauses, 0, "there is no limit yet");
    relay.server.set_rate_limit(RateLimit { bytes_per_second: 300_000, burst: 0 });
    let taken = time(&mut sender, to, &mut receiver).await;
    assert!(taken > Duration::from_millis(250), "{taken:?}");
    relay.server.set_rate_limit(RateLimit::default());
    // The pause that was under way ends as it was to.
    time(&mut sender, to, &mut receiver).await;
    let pauses = relay.counters().pauses;
    time(&mut sender, to, &mut receiver).await;
    assert_eq!(relay.counters().pauses, pauses, "the limit is gone");
}

#[tokio::test]
async fn relays_of_the_region_have_no_rate_limit() {
    let mesh_key = MeshKey::from_bytes([5; 32]);
    let relay = relay(Config { mesh_key: Some(mesh_key.clone()), ..limited(1000) }).await;
    let mut sender = relay.upgraded().await;
    sender.log_in_with(&node_key(1), &ClientInfo { mesh_key: Some(mesh_key), ..ClientInfo::default() }).await;
    let mut receiver = relay.raw(&node_key(2)).await;
    let forwarded =
        |payload| Frame::ForwardPacket { source: node_key(3).public(), destination: node_key(2).public(), payload };
    // A client would need more than two minutes.
    let taken = time(&mut sender, forwarded, &mut receiver).await;
    assert!(taken < Duration::from_secs(60), "{taken:?}");
    assert_eq!(relay.counters().pauses, 0);
}

/// Sends in turns to each of `to` for a time: as much as the relay takes, or a packet to each in every `pause`. Returns what
/// is counted once a second has passed.
async fn flood(relay: &TestRelay, to: &[u64], time: Duration, pause: Option<Duration>) -> Counters {
    let mut sender = relay.raw(&node_key(1)).await;
    let frames: Vec<Bytes> = to
        .iter()
        .map(|to| Frame::SendPacket { destination: node_key(*to).public(), payload: packet(0, 1400) }.to_bytes())
        .collect();
    let (batch, begin) = (frames.concat(), Instant::now());
    let flooding = async {
        for round in 0.. {
            sender.write(&batch).await;
            if let Some(pause) = pause {
                tokio::time::sleep_until(begin + pause * round).await;
            }
        }
    };
    tokio::pin!(flooding);
    let _ = tokio::time::timeout(Duration::from_secs(1), &mut flooding).await;
    let before = relay.counters();
    let _ = tokio::time::timeout(time, flooding).await;
    let mut counters = relay.counters();
    counters.packets_in -= before.packets_in;
    counters.packets_out -= before.packets_out;
    counters
}

/// Reads all that comes, some 3 MB/s of it if `slowly`.
async fn read(relay: &TestRelay, seed: u64, slowly: bool) -> tokio::task::JoinHandle<()> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 * 1024).unwrap();
    let mut raw = TestRelay::upgrade(socket.connect(relay.address).await.unwrap()).await;
    raw.log_in(&node_key(seed)).await;
    tokio::spawn(async move {
        let mut read = 0;
        while let Some(frame) = raw.frame().await {
            let Frame::RecvPacket { payload, .. } = frame else { continue };
            read += payload.len();
            if slowly && read >= 32 * 1024 {
                read = 0;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    })
}

#[tokio::test]
async fn a_sender_whose_packets_are_in_vain_is_read_more_slowly() {
    let relay = relay(Config::default()).await;
    let reader = read(&relay, 2, true).await;
    let counters = flood(&relay, &[2], Duration::from_secs(2), None).await;
    assert!(counters.pauses > 0, "{counters:?}");
    assert!(counters.packets_in < 2 * counters.packets_out, "{counters:?}");
    reader.abort();
}

#[tokio::test]
async fn one_slow_receiver_of_two_does_not_pause_their_sender() {
    let relay = relay(Config::default()).await;
    let readers = [read(&relay, 2, true).await, read(&relay, 3, false).await];
    // Twice of what the slow one takes, for each; the other one has no difficulty with that.
    let counters = flood(&relay, &[2, 3], Duration::from_secs(3), Some(Duration::from_micros(250))).await;
    assert!(counters.dropped_queue_data > 0, "{counters:?}");
    // On a machine that is busy with other things the other one may be slow for a moment, too.
    assert!(counters.pauses < 10, "{counters:?}");
    for reader in readers {
        reader.abort();
    }
}
