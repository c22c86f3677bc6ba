#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[cfg(feature = "server")]
pub mod admin;
pub mod channel;
pub mod client;
#[cfg(feature = "tokio")]
pub mod driver;
pub mod netmap;
#[cfg(feature = "server")]
pub mod server;
pub mod version;
pub mod wire;
