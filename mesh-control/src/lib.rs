#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod channel;
#[cfg(feature = "tokio")]
pub mod driver;
pub mod netmap;
pub mod version;
pub mod wire;
