//! A stream through two userspace stacks takes no memory for its packets: counted by the allocator of this test's binary.
#![expect(clippy::unwrap_used, reason = "helpers outside test functions, in a test")]

mod counting;

use std::time::Duration;

use mesh_node::netstack::{Config, Netstack, StackDevice, TcpStream};
use mesh_tun::batch::Batch;
use mesh_tun::device::Device;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes sent before counting, and while.
const LEN: usize = 16 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_of_a_stream_cost_no_allocations() {
    let start = |address: &str| Netstack::start(Config::with_addresses([address.parse().unwrap()])).unwrap();
    let ((a, a_device), (b, b_device)) = (start("100.64.0.1"), start("100.64.0.2"));
    pump(a_device.clone(), b_device.clone());
    pump(b_device, a_device);
    let listener = b.listen_tcp(80).unwrap();
    let mut sender = a.dial_tcp("100.64.0.2:80".parse().unwrap()).await.unwrap();
    let (mut receiver, _) = listener.accept().await.unwrap();
    let (block, mut buffer) = (vec![7; 64 * 1024], vec![0; 64 * 1024]);
    carry(&mut sender, &mut receiver, &block, &mut buffer).await;

    let (packets, before) = (a.counters().sent, counting::allocations());
    carry(&mut sender, &mut receiver, &block, &mut buffer).await;
    let allocations = counting::allocations() - before;
    let packets = a.counters().sent - packets;
    println!("{allocations} allocations for {packets} packets");
    assert!(packets > (LEN / 1240) as u64);
    assert!(allocations * 100 < packets, "{allocations} allocations for {packets} packets");
}

async fn carry(sender: &mut TcpStream, receiver: &mut TcpStream, block: &[u8], buffer: &mut [u8]) {
    let sending = async {
        for _ in 0..LEN / block.len() {
            sender.write_all(block).await.unwrap();
        }
    };
    let receiving = async {
        let mut left = LEN;
        while left > 0 {
            left -= receiver.read(buffer).await.unwrap();
        }
    };
    tokio::join!(sending, receiving);
}

fn pump(from: StackDevice, to: StackDevice) {
    std::thread::spawn(move || {
        let mut batch = Batch::new(128, 1280);
        while from.read_batch(&mut batch, Duration::from_secs(5)).is_ok() && to.write_batch(&mut batch).is_ok() {
            batch.clear();
        }
    });
}
