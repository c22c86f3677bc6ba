#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod aead;
pub mod key;
pub mod noise;
pub mod random;
pub mod wireguard;
