//! Batches handed over to other threads: nothing is lost, and the order inside a flow stays.
#![expect(clippy::unwrap_used, reason = "helpers outside test functions, in a test")]

mod planes;

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_node::dataplane::Workers;
use mesh_tun::batch::Batch;
use mesh_tun::channel::ChannelDevice;
use mesh_tun::device::Device;
use planes::{A, B, End, now, pair};
use rustix::time::{ClockId, clock_gettime};

const FLOWS: u16 = 4;
const PACKETS: u32 = 100_000;
/// Packets under way at once: what the queues and buffers between the hosts hold even when nobody is scheduled.
const WINDOW: u64 = 1024;

#[test]
fn four_flows_of_100000_packets_arrive_whole_and_in_order() {
    let [a, b] = pair(Workers::Always(3));
    carry(&a, &b);
    assert!(a.plane.handed_over() > 0 && b.plane.handed_over() > 0, "batches were handed over at both ends");
    for end in [&a, &b] {
        assert_eq!(end.plane.drops(), BTreeMap::new());
    }
}

/// Sends all flows from one host to the other, with no more than the window on the way.
fn carry(a: &End, b: &End) {
    let mut batch = Batch::new(128, 1280);
    let (mut sent, mut arrived) = (0_u64, 0_u64);
    let mut next = [0_u32; FLOWS as usize];
    for sequence in 0..PACKETS {
        for flow in 0..FLOWS {
            let packet = packet(flow, sequence);
            while !send_if(&a.host, &packet, sent - arrived < WINDOW) {
                arrived += receive(&b.host, &mut batch, &mut next);
            }
            sent += 1;
        }
    }
    while arrived < sent {
        arrived += receive(&b.host, &mut batch, &mut next);
    }
    assert_eq!(next, [PACKETS; FLOWS as usize]);
}

fn send_if(host: &ChannelDevice, packet: &[u8], room: bool) -> bool {
    room && host.send(packet)
}

/// Reads what has arrived, which must be the next packets of their flows, and returns how many there were.
fn receive(host: &ChannelDevice, batch: &mut Batch, next: &mut [u32; FLOWS as usize]) -> u64 {
    batch.clear();
    let count = host.read_batch(batch, Duration::from_secs(20)).unwrap();
    assert_ne!(count, 0, "packets are missing: {next:?}");
    for packet in batch.iter() {
        let flow = usize::from(u16::from_be_bytes([packet[20], packet[21]]));
        let sequence = u32::from_be_bytes(*packet.last_chunk().unwrap());
        assert_eq!(sequence, next[flow], "flow {flow}");
        next[flow] += 1;
    }
    count as u64
}

#[test]
fn a_data_plane_stops_at_once_with_batches_under_way() {
    let [a, b] = pair(Workers::Always(2));
    for sequence in 0..WINDOW {
        assert!(a.host.send(&packet(0, u32::try_from(sequence).unwrap())));
    }
    let started = now();
    a.plane.shutdown();
    b.plane.shutdown();
    a.plane.shutdown();
    assert!(started.elapsed() < Duration::from_secs(5), "took {:?}", started.elapsed());
}

/// A figure for `benches/RESULTS.md`, from a release build.
#[test]
#[ignore = "wants a release build and a quiet machine"]
fn help_that_is_not_needed_costs_a_hundredth_at_most() {
    // Pairs are made anew now and then: where their memory lies is luck.
    let mut turns = Vec::new();
    for _ in 0..10 {
        let (off, ready) = (pair(Workers::Off), pair(Workers::UpTo(2)));
        turns.extend((0..30).map(|turn| turn_of(turn % 2 == 0, &off, &ready)));
        assert_eq!(ready[0].plane.handed_over() + ready[1].plane.handed_over(), 0, "nothing was handed over");
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let each = [0, 1].map(|which: usize| median(turns.iter().map(|turn: &[f64; 2]| turn[which]).collect()) * 1e9);
    let ratio = median(turns.into_iter().map(|[off, ready]| ready / off).collect());
    println!(
        "CPU of a packet: {:.0} ns without workers, {:.0} ns with workers that sleep; ratio {ratio:.4}",
        each[0], each[1]
    );
    assert!(ratio <= 1.01, "{ratio}");
}

/// The figures of both, whichever comes first.
fn turn_of(off_first: bool, off: &[End; 2], ready: &[End; 2]) -> [f64; 2] {
    if off_first {
        return [cpu_of_bursts(off), cpu_of_bursts(ready)];
    }
    let ready = cpu_of_bursts(ready);
    [cpu_of_bursts(off), ready]
}

/// CPU seconds of the process for each packet of some bursts, which leave the threads time to sleep.
fn cpu_of_bursts([a, b]: &[End; 2]) -> f64 {
    const BURSTS: u32 = 400;
    const BURST: u64 = 32;
    let mut batch = Batch::new(128, 1280);
    let before = process_time();
    for sequence in 0..BURSTS {
        for _ in 0..BURST {
            assert!(a.host.send(&packet(0, sequence)));
        }
        let mut arrived = 0;
        while arrived < BURST {
            batch.clear();
            let count = b.host.read_batch(&mut batch, Duration::from_secs(20)).unwrap();
            assert_ne!(count, 0, "packets are missing");
            arrived += count as u64;
        }
    }
    (process_time() - before).as_secs_f64() / f64::from(BURSTS) / BURST as f64
}

fn process_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap()
}

/// A UDP packet of 33 to 96 bytes.
fn packet(flow: u16, sequence: u32) -> Vec<u8> {
    let payload = 5 + sequence % 64;
    let mut bytes = vec![0x45, 0];
    bytes.extend(u16::try_from(28 + payload).unwrap().to_be_bytes());
    bytes.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    bytes.extend(A);
    bytes.extend(B);
    bytes.extend(flow.to_be_bytes());
    bytes.extend(flow.to_be_bytes());
    bytes.extend(u16::try_from(8 + payload).unwrap().to_be_bytes());
    bytes.extend([0, 0]);
    bytes.resize(28 + payload as usize - 4, 0xff);
    bytes.extend(sequence.to_be_bytes());
    bytes
}
