//! The tokio part: sockets, clocks and nothing else that decides.

pub mod stream;
