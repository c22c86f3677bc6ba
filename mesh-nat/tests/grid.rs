//! Every kind of NAT against every other: who should get through does, in the time that the oracle gives.

#![allow(clippy::print_stdout, reason = "the grid is there to be read, with --nocapture or when it fails")]

use mesh_nat::sim::Excuse;
use mesh_nat::sim::scenario::{Grid, label, nats};

#[test]
fn every_pair_that_is_not_excused_is_direct_in_time_and_few_are_excused() {
    let grid = Grid::run(1, nats());
    println!("{}", grid.table());
    let failed: Vec<_> = grid
        .failures()
        .map(|(a, b, outcome)| format!("{} to {}, seed {}: {:?}", label(a), label(b), outcome.seed, outcome.verdict))
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let count = |excuse| grid.excused(excuse);
    println!(
        "excused: {} random on both sides, {} with more random ports than flows",
        count(Excuse::RandomOnBothSides),
        count(Excuse::MorePortsThanFlows)
    );
    assert_eq!((count(Excuse::UdpBlocked), count(Excuse::NoCommonFamily)), (0, 0));
    assert_eq!((count(Excuse::RandomOnBothSides), count(Excuse::MorePortsThanFlows)), (24, 40), "of 1,296");
}
