//! The kinds of places that nodes are in, the grid of all their pairs, and what is measured over many runs.

mod curve;
mod grid;
mod measure;

pub use curve::Curve;
pub use grid::{Grid, Outcome, label, nats, run_pair};
pub use measure::{Guessing, better_path, guessing, outage, to_direct};
