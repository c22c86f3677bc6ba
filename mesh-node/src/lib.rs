#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod dataplane;
pub mod dns;
pub mod forward;
pub mod netstack;
pub mod proxy;
