#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod agent;
pub mod behaviour;
pub mod classify;
pub mod disco;
#[cfg(feature = "tokio")]
pub mod driver;
pub mod hard;
pub mod path;
pub mod portmap;
pub mod relay;
pub mod report;
#[cfg(feature = "sim")]
pub mod sim;
pub mod stun;
mod timer;

pub use agent::{Agent, Reject};
pub use behaviour::{Allocation, Behaviour, Filtering, Mapping, PortRange};
pub use classify::{Class, classify};
pub use path::{Family, Path, SocketId, Vni};
