//! Receivers that do not keep up.

use std::time::Duration;

use bytes::Bytes;
use mesh_derp::driver::server::Config;
use mesh_derp::frame::Frame;
use mesh_derp::queue::Depth;

use crate::harness::{TestRelay, client, connected, disco, eventually, node_key, trusting};

fn numbered(number: u32) -> Bytes {
    let mut packet = vec![4; 1400];
    packet[..4].copy_from_slice(&number.to_be_bytes());
    packet.into()
}

#[tokio::test]
async fn a_receiver_that_does_not_read_loses_old_packets_and_nobody_else_does() {
    const SENT: u32 = 20_000;
    let config = Config { write_stall: Duration::from_secs(60), ..Config::default() };
    let relay = TestRelay::start_with(config, "127.0.0.1:0".parse().unwrap()).await;
    let (slow, quick) = (node_key(1).public(), node_key(2).public());
    let mut slow_side = relay.raw(&node_key(1)).await;
    let mut quick_side = relay.raw(&node_key(2)).await;
    let mut sender = relay.raw(&node_key(3)).await;
    let reading = tokio::spawn(async move {
        for expected in 0..SENT / 100 {
            let Some(Frame::RecvPacket { payload, .. }) = quick_side.frame().await else { panic!("no packet") };
            assert_eq!(payload, numbered(expected * 100));
        }
    });
    for number in 0..SENT {
        sender.send(Frame::SendPacket { destination: slow, payload: numbered(number) }).await;
        if number % 100 == 0 {
            sender.send(Frame::SendPacket { destination: quick, payload: numbered(number) }).await;
        }
    }
    sender.send(Frame::SendPacket { destination: slow, payload: disco("late but first") }).await;
    reading.await.unwrap();
    let taken = u64::from(SENT + SENT / 100 + 1);
    let counters = eventually("all taken", || Some(relay.counters()).filter(|c| c.packets_in == taken)).await;
    assert!(counters.dropped_queue_data > 0, "{counters:?}");
    assert_eq!((counters.dropped_queue_disco, counters.dropped_unknown, counters.dropped_gone), (0, 0, 0));
    // What the slow side finds when it reads at last: old packets that the kernel held, a gap, the newest packets; and
    // the disco packet before those that were queued with it.
    let (mut numbers, mut queued_behind_disco) = (Vec::new(), None);
    loop {
        let Some(Frame::RecvPacket { payload, .. }) = slow_side.frame().await else { panic!("no packet") };
        if payload == disco("late but first") {
            queued_behind_disco = Some(0);
        } else {
            numbers.push(u32::from_be_bytes(*payload.first_chunk().unwrap()));
            queued_behind_disco = queued_behind_disco.map(|n| n + 1);
        }
        if numbers.last() == Some(&(SENT - 1)) && queued_behind_disco.is_some() {
            break;
        }
    }
    assert!(numbers.is_sorted(), "packets stay in order");
    assert!(queued_behind_disco.unwrap() >= 100, "disco overtook {queued_behind_disco:?} packets");
    let counters = relay.counters();
    assert_eq!(numbers.len() as u64 + counters.dropped_queue_data, u64::from(SENT));
}

#[tokio::test]
async fn a_flood_from_one_sender_takes_nothing_from_another() {
    const TRICKLE: u32 = 200;
    let relay = TestRelay::start().await;
    // A receiver that reads some 3 MB/s, and for which the kernel holds little.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 * 1024).unwrap();
    let mut receiver = TestRelay::upgrade(socket.connect(relay.address).await.unwrap()).await;
    receiver.log_in(&node_key(1)).await;
    let to = node_key(1).public();
    let (mut flooding, mut trickling) = (relay.raw(&node_key(2)).await, relay.raw(&node_key(3)).await);
    let flood = tokio::spawn(async move {
        for number in 0.. {
            flooding.send(Frame::SendPacket { destination: to, payload: numbered(number) }).await;
        }
    });
    let trickle = tokio::spawn(async move {
        for number in 0..TRICKLE {
            trickling.send(Frame::SendPacket { destination: to, payload: numbered(number) }).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        trickling
    });
    let (mut came, mut flooded, mut read) = (0, 0u32, 0);
    while came < TRICKLE {
        let Some(Frame::RecvPacket { source, payload }) = receiver.frame().await else { panic!("no packet") };
        if source == node_key(3).public() {
            assert_eq!(payload, numbered(came), "the trickle is whole and in order");
            came += 1;
        } else {
            flooded += 1;
        }
        read += payload.len();
        if read >= 32 * 1024 {
            read = 0;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    flood.abort();
    drop(trickle.await.unwrap());
    let counters = relay.counters();
    assert!(counters.dropped_queue_data > 0 && flooded > TRICKLE, "{flooded} of the flood, {counters:?}");
}

#[tokio::test]
async fn a_receiver_that_takes_nothing_is_let_go() {
    let config = Config { write_stall: Duration::from_millis(300), ..Config::default() };
    let relay = TestRelay::start_with(config, "127.0.0.1:0".parse().unwrap()).await;
    let stuck = relay.raw(&node_key(1)).await;
    let mut sender = relay.raw(&node_key(3)).await;
    let mut number = 0;
    while relay.counters().stalled == 0 {
        sender.send(Frame::SendPacket { destination: node_key(1).public(), payload: numbered(number) }).await;
        number += 1;
        assert!(number < 200_000, "{:?}", relay.counters());
    }
    eventually("only the sender stays", || (relay.counters().nodes == 1).then_some(())).await;
    assert!(relay.counters().dropped_gone > 0);
    drop(stuck);
}

#[tokio::test]
async fn an_outbox_without_a_connection_keeps_the_newest() {
    let relay = TestRelay::start().await;
    let mut options = mesh_derp::driver::client::Options::new(relay.region(), node_key(1), trusting());
    options.queue = Depth { data: 4, disco: 2, bytes: 100_000 };
    let mut a = mesh_derp::driver::client::RelayClient::new(options);
    let outbox = a.outbox();
    assert_eq!(outbox.try_send_all((0..10).map(|n| (node_key(1).public(), numbered(n)))), 10);
    assert!(outbox.try_send(node_key(1).public(), disco("first")));
    assert!(!outbox.try_send(node_key(1).public(), Bytes::from(vec![0; 65_537])));
    let counters = outbox.counters();
    assert_eq!((counters.displaced.data, counters.displaced.disco, counters.too_long), (6, 0, 1));
    connected(&mut a).await;
    let mut got = Vec::new();
    for _ in 0..5 {
        got.push(crate::harness::packet(&mut a).await.1);
    }
    assert_eq!(got, [disco("first"), numbered(6), numbered(7), numbered(8), numbered(9)]);
}

#[tokio::test]
async fn a_keep_alive_comes_without_traffic() {
    let config = Config { keep_alive: Duration::from_millis(50), ..Config::default() };
    let relay = TestRelay::start_with(config, "127.0.0.1:0".parse().unwrap()).await;
    let mut raw = relay.raw(&node_key(1)).await;
    assert_eq!(raw.frame().await, Some(Frame::KeepAlive));
    let mut client = client(relay.region(), trusting(), 2);
    connected(&mut client).await;
}
