//! The tokio part: sockets, clocks and nothing else that decides.

pub mod client;
#[cfg(feature = "server")]
pub mod server;
pub mod stream;
