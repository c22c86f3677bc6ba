//! The tokio part: sockets, clocks and nothing else that decides.

#[cfg(feature = "server")]
pub mod server;
pub mod stream;
