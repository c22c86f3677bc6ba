//! Super-packets cut into packets, and packets put together again.
//! `cargo bench -p mesh-benches --bench offload`
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "criterion's macros make public items; a benchmark may fail loudly"
)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mesh_tun::batch::Batch;
use mesh_tun::offload::{Coalescer, Header, Kind, Segments};

const HEADERS: usize = 52;
const SEGMENT: usize = 1228;

/// A TCP super-packet of `count` segments, as the kernel hands it over.
fn super_packet(count: usize) -> (Header, Vec<u8>) {
    let len = HEADERS + count * SEGMENT;
    let mut packet = vec![0x5a; len];
    packet[..HEADERS].fill(0);
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&u16::try_from(len).unwrap().to_be_bytes());
    packet[8] = 64;
    packet[9] = 6;
    packet[12..16].copy_from_slice(&[100, 64, 0, 1]);
    packet[16..20].copy_from_slice(&[100, 64, 0, 2]);
    packet[20..24].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    packet[32] = 0x80;
    packet[33] = 0x10;
    packet[40..44].copy_from_slice(&[1, 1, 8, 10]);
    let header = Header {
        kind: Kind::Tcp4,
        needs_checksum: true,
        header_len: 52,
        segment_size: u16::try_from(SEGMENT).unwrap(),
        checksum_start: 20,
        checksum_offset: 16,
    };
    (header, packet)
}

fn cut(header: Header, packet: &[u8], batch: &mut Batch) {
    batch.clear();
    let mut segments = Segments::new(header, packet).unwrap();
    while let Some(mut vacant) = batch.vacant() {
        let Some(written) = segments.write_next(packet, vacant.buffer()) else { return };
        vacant.commit(written.unwrap());
    }
}

fn segment(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("segment");
    for count in [2, 50] {
        let (header, packet) = super_packet(count);
        let mut batch = Batch::new(count + 1, 1280);
        cut(header, &packet, &mut batch);
        assert_eq!(batch.len(), count);
        group.throughput(Throughput::Bytes(packet.len() as u64));
        group.bench_function(BenchmarkId::new("TCP", count), |bencher| {
            bencher.iter(|| cut(header, &packet, &mut batch));
        });
    }
}

fn coalesce(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("coalesce");
    for count in [2, 50] {
        let (header, packet) = super_packet(count);
        let mut batch = Batch::new(count + 1, 1280);
        cut(header, &packet, &mut batch);
        let mut coalescer = Coalescer::default();
        group.throughput(Throughput::Bytes(packet.len() as u64));
        group.bench_function(BenchmarkId::new("TCP", count), |bencher| {
            bencher.iter(|| {
                coalescer.plan(&batch, true);
                let [group] = coalescer.groups() else { unreachable!("one flow in order is one group") };
                let (header, saved) = group.join(&mut batch);
                // Joining changes the first packet; the next turn wants it as it was.
                group.restore(&mut batch, &saved);
                header
            });
        });
    }
}

criterion_group!(benches, segment, coalesce);
criterion_main!(benches);
