//! Sealing and opening transport data: ours beside the bare ciphers of aws-lc-rs and ring, and snow's transport state.
//! `cargo bench -p mesh-benches --bench packet`
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "criterion's macros make public items; a benchmark may fail loudly"
)]

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mesh_benches::Pair;

const SIZES: [usize; 3] = [64, 1420, 16384];
const KEY: [u8; 32] = [5; 32];

fn seal_and_open(criterion: &mut Criterion) {
    for size in SIZES {
        let mut group = criterion.benchmark_group(format!("packet of {size} bytes"));
        group.throughput(Throughput::Bytes(size as u64));
        ours(&mut group, size);
        aws_lc(&mut group, size);
        with_ring(&mut group, size);
        with_snow(&mut group, size);
    }
}

fn ours(group: &mut BenchmarkGroup<'_, WallTime>, size: usize) {
    let [sender, receiver] = Pair::new().handshake();
    let mut buffer = vec![0; size + 64];
    // One counter for all, so that a long run does not use a session up; nothing of it leaves here.
    group.bench_function(BenchmarkId::new("seal", "ours"), |bencher| {
        bencher.iter(|| sender.seal(0, &mut buffer, size));
    });
    let length = sender.seal(0, &mut buffer, size);
    let sealed = buffer[..length].to_vec();
    group.bench_function(BenchmarkId::new("open", "ours"), |bencher| {
        let open = |datagram: &mut Vec<u8>| receiver.open(datagram).unwrap().counter;
        bencher.iter_batched_ref(|| sealed.clone(), open, BatchSize::SmallInput);
    });
}

fn aws_lc(group: &mut BenchmarkGroup<'_, WallTime>, size: usize) {
    use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &KEY).unwrap());
    let nonce = || Nonce::assume_unique_for_key([0; 12]);
    let mut buffer = vec![0; size];
    group.bench_function(BenchmarkId::new("seal", "aws-lc-rs"), |bencher| {
        bencher.iter(|| key.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut buffer).unwrap());
    });
    key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut buffer).unwrap();
    group.bench_function(BenchmarkId::new("open", "aws-lc-rs"), |bencher| {
        let open = |datagram: &mut Vec<u8>| key.open_in_place(nonce(), Aad::empty(), datagram).unwrap().len();
        bencher.iter_batched_ref(|| buffer.clone(), open, BatchSize::SmallInput);
    });
}

fn with_ring(group: &mut BenchmarkGroup<'_, WallTime>, size: usize) {
    use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &KEY).unwrap());
    let nonce = || Nonce::assume_unique_for_key([0; 12]);
    let mut buffer = vec![0; size];
    group.bench_function(BenchmarkId::new("seal", "ring"), |bencher| {
        bencher.iter(|| key.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut buffer).unwrap());
    });
    key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut buffer).unwrap();
    group.bench_function(BenchmarkId::new("open", "ring"), |bencher| {
        let open = |datagram: &mut Vec<u8>| key.open_in_place(nonce(), Aad::empty(), datagram).unwrap().len();
        bencher.iter_batched_ref(|| buffer.clone(), open, BatchSize::SmallInput);
    });
}

fn with_snow(group: &mut BenchmarkGroup<'_, WallTime>, size: usize) {
    let [sender, receiver] = mesh_benches::SnowExchange::new().into_transport();
    let (packet, mut sealed, mut opened) = (vec![0; size], vec![0; size + 16], vec![0; size + 16]);
    group.bench_function(BenchmarkId::new("seal", "snow"), |bencher| {
        bencher.iter(|| sender.write_message(0, &packet, &mut sealed).unwrap());
    });
    sender.write_message(0, &packet, &mut sealed).unwrap();
    group.bench_function(BenchmarkId::new("open", "snow"), |bencher| {
        bencher.iter(|| receiver.read_message(0, &sealed, &mut opened).unwrap());
    });
}

criterion_group!(benches, seal_and_open);
criterion_main!(benches);
