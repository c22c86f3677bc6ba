//! Fixtures shared by the benchmarks and the programs that measure.

pub mod handshake;
pub mod relay_load;

pub use handshake::{Exchange, Pair, SnowExchange};
