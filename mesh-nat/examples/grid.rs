//! Prints how long it takes any two kinds of NAT to be got through, and fails if a pair that should be direct is not.
//!
//! `cargo run --release -p mesh-nat --features sim --example grid [SEED]`

#![allow(clippy::print_stdout, reason = "printing is what it is for")]

use std::process::ExitCode;

use mesh_nat::sim::scenario::{self, Grid, label};
use mesh_nat::sim::{Excuse, Method, Verdict};

fn main() -> ExitCode {
    let seed = match std::env::args().nth(1).map(|seed| seed.parse()) {
        None => 1,
        Some(Ok(seed)) => seed,
        Some(Err(_)) => {
            println!("usage: grid [SEED]");
            return ExitCode::from(2);
        }
    };
    let grid = Grid::run(seed, scenario::nats());
    println!("Seconds from the first packet to a direct path in both directions; seed {seed}.");
    println!("Rows send first. Mapping, filtering, allocation:");
    println!("e endpoint-independent, a address-dependent, p address-and-port-dependent;");
    println!("p preserving, s sequential, b a block of 512, r random over 64,512.\n");
    println!("{}", grid.table());
    for (method, name) in [
        (Method::Open, "one side is open"),
        (Method::Punch, "plain punching"),
        (Method::Predict, "ports foreseen"),
        (Method::Birthday, "many sockets against many guesses"),
        (Method::BothGuess, "both sides guess"),
    ] {
        let mut took: Vec<_> = grid
            .pairs()
            .filter(|(_, _, outcome)| matches!(outcome.verdict, Verdict::Direct { how, .. } if how == method))
            .map(|(_, _, outcome)| outcome.took)
            .collect();
        // None, which is never, sorts first; it should be last.
        took.sort_by_key(|took| took.unwrap_or(std::time::Duration::MAX));
        let seconds = |at: usize| took.get(at).copied().flatten().map_or("never".into(), |took| format!("{took:.2?}"));
        println!(
            "{name:>34}: {:4} pairs, {:4} direct, median {}, slowest {}",
            took.len(),
            took.iter().flatten().count(),
            seconds(took.len() / 2),
            seconds(took.len().saturating_sub(1)),
        );
    }
    for (excuse, name) in [
        (Excuse::UdpBlocked, "UDP blocked"),
        (Excuse::NoCommonFamily, "no common address family"),
        (Excuse::RandomOnBothSides, "random over more than 512 on both"),
        (Excuse::MorePortsThanFlows, "more random ports than flows"),
    ] {
        println!("{name:>34}: {:4} pairs excused", grid.excused(excuse));
    }
    let failures: Vec<_> = grid.failures().collect();
    for (a, b, outcome) in &failures {
        println!("FAILED: {} to {}, seed {}: {:?}", label(a), label(b), outcome.seed, outcome.verdict);
    }
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
