#![doc = include_str!("../README.md")]

pub mod batch;
pub mod channel;
pub mod device;
mod error;
pub mod filter;
#[cfg(target_os = "linux")]
pub mod linux;
pub mod masquerade;
pub mod mtu;
pub mod offload;
pub mod packet;
pub mod plan;

pub use error::Error;
