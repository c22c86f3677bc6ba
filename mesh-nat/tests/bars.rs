//! How long things may take, over 200 seeded runs each, in virtual time. The curves are printed.

#![allow(clippy::print_stdout, reason = "the curves are there to be read, with --nocapture or when a test fails")]

use std::time::Duration;

use mesh_nat::sim::scenario::{Curve, better_path, outage, to_direct};

const RUNS: u64 = 200;
/// A node's round trip to its relay, and to its peer.
const ROUND_TRIP: Duration = Duration::from_millis(40);
const SECOND: Duration = Duration::from_secs(1);
/// Data may go both ways or one way only.
const TALKS: [(&str, bool); 2] = [("answered", true), ("one-way", false)];

fn curve(name: &str, run: impl Fn(u64) -> Option<Duration>) -> Curve {
    let curve: Curve = (0..RUNS).map(run).collect();
    println!("{name}, seeds 0 to {}: {curve}", RUNS - 1);
    curve
}

#[test]
fn both_directions_are_direct_within_three_and_a_half_round_trips() {
    for (name, answered) in TALKS {
        let curve = curve(&format!("{name} data, no loss"), |seed| to_direct(seed, answered, 0.0));
        assert!(curve.median().is_some_and(|took| took <= ROUND_TRIP * 3), "{curve}");
        assert!(curve.slowest().is_some_and(|took| took <= ROUND_TRIP * 7 / 2), "{curve}");
    }
}

#[test]
fn a_loss_of_two_percent_costs_a_second_once_in_a_hundred_times_at_most() {
    for (name, answered) in TALKS {
        let curve = curve(&format!("{name} data, 2 % loss"), |seed| to_direct(seed, answered, 0.02));
        assert!(curve.quantile(0.99).is_some_and(|took| took <= SECOND), "{curve}");
    }
}

#[test]
fn data_is_lost_for_a_second_at_most_when_a_direct_path_dies() {
    for (name, answered) in TALKS {
        let curve = curve(&format!("outage of {name} data"), |seed| Some(outage(seed, answered)));
        assert!(curve.slowest().is_some_and(|took| took <= SECOND), "{curve}");
    }
}

#[test]
fn a_network_in_common_is_used_within_a_second() {
    let curve = curve("joining the peer's network", better_path);
    assert!(curve.slowest().is_some_and(|took| took <= SECOND), "{curve}");
}
