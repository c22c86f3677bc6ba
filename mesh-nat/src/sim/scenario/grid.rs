//! Every kind of NAT against every other.

use std::time::Duration;

use super::super::nat::NatConfig;
use super::super::oracle::{Excuse, Verdict, oracle};
use super::super::world::World;
use crate::behaviour::{Allocation, Filtering, Mapping};

/// All mappings with all filterings with all allocations: 36 NATs. Sequential ports go up by one, blocks have 512, random
/// ports are any of 64,512. Ports are given again for other destinations, but for sequential ones.
#[must_use]
pub fn nats() -> Vec<NatConfig> {
    let mut nats = Vec::new();
    for mapping in [Mapping::EndpointIndependent, Mapping::AddressDependent, Mapping::AddressAndPortDependent] {
        for filtering in
            [Filtering::EndpointIndependent, Filtering::AddressDependent, Filtering::AddressAndPortDependent]
        {
            for allocation in
                [Allocation::Preserving, Allocation::Sequential { stride: 1 }, Allocation::Block, Allocation::Random]
            {
                let overload = !matches!(allocation, Allocation::Sequential { .. });
                nats.push(NatConfig { mapping, filtering, allocation, overload, ..NatConfig::easy() });
            }
        }
    }
    nats
}

/// A NAT in three letters: mapping and filtering (`e`ndpoint-independent, `a`ddress-dependent, address-and-`p`ort-
/// dependent), then allocation (`p`reserving, `s`equential, `b`lock, `r`andom).
#[must_use]
pub fn label(nat: &NatConfig) -> String {
    let mapping = match nat.mapping {
        Mapping::EndpointIndependent => 'e',
        Mapping::AddressDependent => 'a',
        Mapping::AddressAndPortDependent => 'p',
    };
    let filtering = match nat.filtering {
        Filtering::EndpointIndependent => 'e',
        Filtering::AddressDependent => 'a',
        Filtering::AddressAndPortDependent => 'p',
    };
    let allocation = match nat.allocation {
        Allocation::Preserving => 'p',
        Allocation::Sequential { .. } => 's',
        Allocation::Block => 'b',
        Allocation::Random => 'r',
    };
    [mapping, filtering, allocation].into_iter().collect()
}

/// What became of a pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// What the oracle had said.
    pub verdict: Verdict,
    /// From the first packet until both were direct; `None` if that did not happen in time.
    pub took: Option<Duration>,
    /// The seed that shows it again.
    pub seed: u64,
}

impl Outcome {
    /// Whether it is as the oracle said.
    #[must_use]
    pub const fn is_as_foretold(&self) -> bool {
        matches!(self.verdict, Verdict::Excused(_)) || self.took.is_some()
    }
}

/// Puts a node behind each NAT and sends data from the first to the second, until both are direct or the oracle's time is
/// over. A pair that is excused is not tried.
#[must_use]
pub fn run_pair(seed: u64, a: NatConfig, b: NatConfig) -> Outcome {
    let mut world = World::seeded(seed);
    let (a, b) = (world.node_behind(a), world.node_behind(b));
    let verdict = oracle(&world, a, b);
    let took = match verdict {
        Verdict::Direct { within, .. } => {
            world.introduce(a, b);
            world.send_data(a, b, Duration::from_millis(100));
            world.run_until(within, |world| world.is_direct(a, b) && world.is_direct(b, a))
        }
        Verdict::Excused(_) => None,
    };
    Outcome { verdict, took, seed }
}

/// All pairs of some NATs, in both orders: rows send first.
#[derive(Debug, Clone)]
pub struct Grid {
    nats: Vec<NatConfig>,
    outcomes: Vec<Outcome>,
}

impl Grid {
    /// Runs every pair, each under a seed of its own that follows from `seed`.
    #[must_use]
    pub fn run(seed: u64, nats: Vec<NatConfig>) -> Self {
        let pairs = nats.iter().flat_map(|a| nats.iter().map(move |b| (*a, *b)));
        let outcomes = (seed * 1_000_000..).zip(pairs).map(|(seed, (a, b))| run_pair(seed, a, b)).collect();
        Self { nats, outcomes }
    }

    /// Every pair and what became of it.
    pub fn pairs(&self) -> impl Iterator<Item = (&NatConfig, &NatConfig, &Outcome)> {
        let pairs = self.nats.iter().flat_map(|a| self.nats.iter().map(move |b| (a, b)));
        pairs.zip(&self.outcomes).map(|((a, b), outcome)| (a, b, outcome))
    }

    /// Pairs that should be direct and are not.
    pub fn failures(&self) -> impl Iterator<Item = (&NatConfig, &NatConfig, &Outcome)> {
        self.pairs().filter(|(_, _, outcome)| !outcome.is_as_foretold())
    }

    /// How many pairs were excused for a reason.
    #[must_use]
    pub fn excused(&self, excuse: Excuse) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.verdict == Verdict::Excused(excuse)).count()
    }

    /// The grid as a table: seconds to direct, `--` where excused, `FAIL` where it should have been direct.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = String::from("first\\second");
        for nat in &self.nats {
            table += &format!(" {:>5}", label(nat));
        }
        for (row, nat) in self.nats.iter().enumerate() {
            table += &format!("\n{:>12}", label(nat));
            for outcome in self.outcomes.iter().skip(row * self.nats.len()).take(self.nats.len()) {
                table += &match (outcome.verdict, outcome.took) {
                    (Verdict::Excused(_), _) => format!(" {:>5}", "--"),
                    (Verdict::Direct { .. }, Some(took)) => format!(" {:>5.2}", took.as_secs_f64()),
                    (Verdict::Direct { .. }, None) => format!(" {:>5}", "FAIL"),
                };
            }
        }
        table + "\n"
    }
}
