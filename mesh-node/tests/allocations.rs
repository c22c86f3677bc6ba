//! The packet path takes no memory from the system once it runs: counted by the allocator of this test's own binary.
#![expect(clippy::unwrap_used, reason = "helpers outside test functions, in a test")]

mod counting;
mod planes;

use std::time::Duration;

use mesh_node::dataplane::Workers;
use mesh_tun::batch::Batch;
use mesh_tun::device::Device;
use planes::{A, B, End, pair};

const ROUNDS: u64 = 200;
const BURST: u64 = 32;

#[test]
fn packets_cost_no_allocations() {
    for workers in [Workers::Off, Workers::Always(2)] {
        let (allocations, packets, handed_over) = carry_packets(workers);
        println!("{allocations} allocations for {packets} packets through both data planes, workers {workers:?}");
        assert_eq!(allocations, 0);
        assert_eq!(handed_over > 0, workers != Workers::Off);
    }
}

/// The allocations made, the packets carried, and the batches that were handed over meanwhile.
fn carry_packets(workers: Workers) -> (u64, u64, u64) {
    let [a, b] = pair(workers);
    let mut batch = Batch::new(64, 1280);
    let mut carry = |from: &End, to: &End, packet: &[u8]| {
        for _ in 0..BURST {
            assert!(from.host.send(packet));
        }
        let mut arrived = 0;
        while arrived < BURST {
            batch.clear();
            let read = to.host.read_batch(&mut batch, Duration::from_secs(5)).unwrap();
            assert_ne!(read, 0, "{:?} and {:?}", from.plane.drops(), to.plane.drops());
            arrived += read as u64;
        }
    };
    let (there, back) = (packet(A, B), packet(B, A));
    let mut rounds = |count| {
        let before = counting::allocations();
        for _ in 0..count {
            carry(&a, &b, &there);
            carry(&b, &a, &back);
        }
        counting::allocations() - before
    };
    // Queues grow to what they need, and the first packets are news for the engine. With workers, the batches
    // that change hands are made with the first.
    rounds(20);
    (rounds(ROUNDS), 2 * ROUNDS * BURST, a.plane.handed_over())
}

fn packet(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0; 1200];
    (packet[0], packet[8], packet[9]) = (0x45, 64, 17);
    packet[2..4].copy_from_slice(&1200_u16.to_be_bytes());
    packet[12..16].copy_from_slice(&from);
    packet[16..20].copy_from_slice(&to);
    packet[20..24].copy_from_slice(&[4, 0, 4, 0]);
    packet[24..26].copy_from_slice(&1180_u16.to_be_bytes());
    packet
}
