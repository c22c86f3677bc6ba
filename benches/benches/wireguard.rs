//! Sealing and opening transport data beside the bare cipher, and whole handshakes.
//! `cargo bench -p mesh-benches`
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "criterion's macros make public items; a benchmark may fail loudly"
)]

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mesh_benches::Pair;

const SIZES: [usize; 3] = [64, 1420, 16384];

fn seal_and_open(criterion: &mut Criterion) {
    let [sender, receiver] = Pair::new().handshake();
    let bare = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[5; 32]).unwrap());
    let mut group = criterion.benchmark_group("packet");
    for size in SIZES {
        group.throughput(Throughput::Bytes(size as u64));
        let mut buffer = vec![0; size + 64];
        group.bench_function(BenchmarkId::new("seal", size), |bencher| {
            bencher.iter(|| {
                // One counter for all, so that a long run does not use a session up; nothing of it leaves here.
                sender.seal(0, &mut buffer, size)
            });
        });
        group.bench_function(BenchmarkId::new("seal, bare cipher", size), |bencher| {
            bencher.iter(|| {
                let nonce = Nonce::assume_unique_for_key([0; 12]);
                bare.seal_in_place_separate_tag(nonce, Aad::empty(), &mut buffer[..size]).unwrap()
            });
        });
        let length = sender.seal(0, &mut buffer, size);
        let sealed = buffer[..length].to_vec();
        group.bench_function(BenchmarkId::new("open", size), |bencher| {
            bencher.iter_batched_ref(
                || sealed.clone(),
                |datagram| receiver.open(datagram).unwrap().counter,
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn handshake(criterion: &mut Criterion) {
    criterion.bench_function("handshake, both sides", |bencher| {
        bencher.iter_batched(Pair::new, |mut pair| pair.handshake(), BatchSize::SmallInput);
    });
}

criterion_group!(benches, seal_and_open, handshake);
criterion_main!(benches);
