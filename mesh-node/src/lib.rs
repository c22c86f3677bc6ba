#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod dns;
pub mod dataplane;
pub mod forward;
pub mod netstack;
pub mod proxy;
