//! Prints how long things take in the laboratory, over many seeded runs each, beside the arithmetic where there is one.
//!
//! `cargo run --release -p mesh-nat --features sim --example curves [RUNS]`

#![allow(clippy::print_stdout, reason = "printing is what it is for")]
#![allow(clippy::cast_precision_loss, reason = "counts are small")]

use std::time::Duration;

use mesh_nat::sim::NatConfig;
use mesh_nat::sim::scenario::{Curve, Guessing, better_path, guessing, outage, to_direct};
use mesh_nat::{Allocation, PortRange};

fn main() {
    let runs = std::env::args().nth(1).and_then(|runs| runs.parse().ok()).unwrap_or(200_u64);
    println!("Seeds 0 to {}. Peers and relays are 40 ms away, there and back.\n", runs - 1);

    println!("From the first packet to a direct path in both directions, easy NATs:");
    for (loss, loss_name) in [(0.0, "no loss"), (0.02, "2 % loss")] {
        for (answered, name) in [(true, "answered"), (false, "one-way")] {
            print(&format!("{name} data, {loss_name}"), &curve(runs, |seed| to_direct(seed, answered, loss)));
        }
    }
    println!("\nOutage when a direct path dies in silence while data is sent:");
    for (answered, name) in [(true, "answered"), (false, "one-way")] {
        print(&format!("{name} data"), &curve(runs, |seed| Some(outage(seed, answered))));
    }
    println!("\nFrom joining the peer's network to using it in both directions:");
    print("a better path", &curve(runs, better_path));

    birthday(runs);
    both(runs, "blocks of 512 ports, given again for other destinations", true);
    both(runs, "blocks of 512 ports, every flow a port of its own", false);
}

fn curve(runs: u64, run: impl Fn(u64) -> Option<Duration>) -> Curve {
    (0..runs).map(run).collect()
}

fn print(name: &str, curve: &Curve) {
    println!("{name:>34}: {curve}");
}

fn share(count: usize, runs: u64) -> f64 {
    count as f64 * 100.0 / runs as f64
}

/// Hard with easy: measured success by guesses sent, beside the chance of having hit by then.
fn birthday(runs: u64) {
    let limit = Duration::from_secs(30);
    let results: Vec<Guessing> =
        (0..runs).map(|seed| guessing(seed, NatConfig::hard(), NatConfig::easy(), limit)).collect();
    let curve: Curve = results.iter().map(|result| result.took).collect();
    println!("\nHard with easy, ports random over {}:", PortRange::ALL.len());
    print("time", &curve);
    println!("{:>34}: {:.1} %", "direct within 12 s", curve.within(Duration::from_secs(12)) * 100.0);
    costs(&results);
    println!("{:>14} {:>10} {:>10} {:>16}", "guesses sent", "measured", "staged", "256 from start");
    for guesses in [64, 128, 256, 384, 640, 1024, 1664, 2048_u64] {
        let hit = results.iter().filter(|result| result.took.is_some() && result.second_sent <= guesses).count();
        println!(
            "{guesses:>14} {:>8.1} % {:>8.1} % {:>14.1} %",
            share(hit, runs),
            staged(guesses) * 100.0,
            chance(256.0, guesses as f64) * 100.0,
        );
    }
}

/// The chance that one of `guesses` finds one of `open` ports (section 19 of the arithmetic: 1 − e^(−HN/R)).
fn chance(open: f64, guesses: f64) -> f64 {
    1.0 - (-open * guesses / f64::from(PortRange::ALL.len())).exp()
}

/// The same where ports are opened in stages: 32 for the first 128 guesses, 128 for the next 512, then 256.
fn staged(guesses: u64) -> f64 {
    let stages = [(32.0, 128), (128.0, 512), (256.0, u64::MAX)];
    let mut left = guesses;
    let missed = stages.iter().fold(1.0, |missed, (open, most)| {
        let here = left.min(*most);
        left -= here;
        missed * (1.0 - chance(*open, here as f64))
    });
    1.0 - missed
}

/// Hard with hard behind blocks.
fn both(runs: u64, name: &str, overload: bool) {
    let limit = Duration::from_secs(30);
    let nat = NatConfig { allocation: Allocation::Block, overload, ..NatConfig::hard() };
    let results: Vec<Guessing> = (0..runs).map(|seed| guessing(seed, nat, nat, limit)).collect();
    let curve: Curve = results.iter().map(|result| result.took).collect();
    println!("\nHard with hard, {name}:");
    print("time", &curve);
    println!("{:>34}: {:.1} %", "direct within 30 s", curve.within(limit) * 100.0);
    costs(&results);
    for flows in [256.0, 512.0, 1024.0_f64] {
        let expected = 1.0 - (-flows * flows / 512.0 / 512.0).exp();
        println!("{:>34}: {:.0} % with {flows} flows a side", "arithmetic", expected * 100.0);
    }
}

fn costs(results: &[Guessing]) {
    let most = |of: fn(&Guessing) -> usize| results.iter().map(of).max().unwrap_or(0);
    println!(
        "{:>34}: {} mappings, {} ports, {} datagrams",
        "most on a side",
        most(|result| result.first.peak_mappings.max(result.second.peak_mappings)),
        most(|result| result.first.peak_ports.max(result.second.peak_ports)),
        results.iter().map(|result| result.first_sent.max(result.second_sent)).max().unwrap_or(0),
    );
}
