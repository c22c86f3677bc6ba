#![doc = include_str!("../README.md")]

pub mod batch;
pub mod channel;
pub mod device;
mod error;
#[cfg(target_os = "linux")]
pub mod linux;
pub mod packet;

pub use error::Error;
