//! Handshakes a second, and the responder's side alone: ours beside snow with the resolver it brings.
//! `cargo bench -p mesh-benches --bench handshake`
#![allow(missing_docs, reason = "criterion's macros make public items")]

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mesh_benches::{Pair, SnowExchange};

fn whole(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("handshake, both sides");
    group.throughput(Throughput::Elements(1));
    group.bench_function("ours", |bencher| {
        bencher.iter_batched(Pair::new, Pair::handshake, BatchSize::SmallInput);
    });
    group.bench_function("snow", |bencher| {
        bencher.iter(|| {
            let mut exchange = SnowExchange::new();
            let response = exchange.respond();
            exchange.finish(&response);
        });
    });
}

fn responder(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("handshake, responder");
    group.throughput(Throughput::Elements(1));
    group.bench_function("ours", |bencher| {
        let initiated = || Pair::new().initiate();
        bencher.iter_batched(initiated, |mut exchange| exchange.respond(), BatchSize::SmallInput);
    });
    group.bench_function("snow", |bencher| {
        bencher.iter_batched(SnowExchange::new, |mut exchange| exchange.respond(), BatchSize::SmallInput);
    });
}

criterion_group!(benches, whole, responder);
criterion_main!(benches);
