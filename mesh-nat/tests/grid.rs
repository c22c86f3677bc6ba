//! Every kind of NAT against every other: who should get through does, in the time that the oracle gives.

#![allow(clippy::print_stdout, reason = "the grid is there to be read, with --nocapture or when it fails")]

use std::collections::BTreeMap;

use mesh_nat::sim::scenario::{Grid, label, nats};
use mesh_nat::sim::{Excuse, Method, Verdict};

/// What is left out so far. It can only become shorter: the test fails as well where all pairs of these are direct.
const NOT_YET: [Method; 2] = [Method::Birthday, Method::BothGuess];

#[test]
fn every_pair_that_is_not_excused_is_direct_in_time() {
    let grid = Grid::run(1, nats());
    println!("{}", grid.table());
    let mut failed: BTreeMap<Method, Vec<String>> = BTreeMap::new();
    for (a, b, outcome) in grid.failures() {
        if let Verdict::Direct { how, .. } = outcome.verdict {
            let text = format!("{} to {}, seed {}", label(a), label(b), outcome.seed);
            failed.entry(how).or_default().push(text);
        }
    }
    let unexpected = failed.iter().find(|(method, _)| !NOT_YET.contains(method));
    assert_eq!(unexpected, None);
    for method in NOT_YET {
        assert!(failed.contains_key(&method), "{method:?} works by now: take it off the list");
    }
}

#[test]
fn few_pairs_are_excused() {
    let grid = Grid::run(1, nats());
    let count = |excuse| grid.excused(excuse);
    println!(
        "excused: {} random on both sides, {} with more random ports than flows",
        count(Excuse::RandomOnBothSides),
        count(Excuse::MorePortsThanFlows)
    );
    assert_eq!((count(Excuse::UdpBlocked), count(Excuse::NoCommonFamily)), (0, 0));
    assert_eq!((count(Excuse::RandomOnBothSides), count(Excuse::MorePortsThanFlows)), (24, 40), "of 1,296");
}
