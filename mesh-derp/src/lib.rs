#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[cfg(feature = "acme")]
pub mod acme;
pub mod client;
#[cfg(feature = "tokio")]
pub mod driver;
pub mod frame;
pub mod json;
pub mod login;
pub mod map;
pub mod metrics;
pub mod proxied;
pub mod proxy;
pub mod queue;
mod random;
pub mod server;
#[cfg(feature = "tokio")]
pub mod tls;
pub mod upgrade;
pub mod websocket;
pub mod x509;

#[cfg(test)]
mod golden;
