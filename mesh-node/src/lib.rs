#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[cfg(feature = "server")]
pub mod activation;
#[cfg(feature = "server")]
mod certificate;
#[cfg(feature = "server")]
pub mod coordinator;
pub mod dataplane;
pub mod directory;
pub mod dns;
pub mod engine;
pub mod error;
pub mod events;
pub mod forward;
#[cfg(feature = "server")]
pub mod front;
#[cfg(feature = "server")]
mod listen;
pub mod local_api;
pub mod netcheck;
pub mod netstack;
pub mod node;
pub mod peer_relay;
pub mod prefs;
#[cfg(feature = "server")]
pub mod privileges;
pub mod proxy;
#[cfg(feature = "server")]
pub mod relay;
#[cfg(feature = "server")]
pub mod sandbox;
pub mod state;
pub mod status;
pub mod wireguard;

mod driver;

#[cfg(feature = "server")]
pub use certificate::Certificate;
pub use error::Error;
#[cfg(feature = "server")]
pub use mesh_derp::{acme, driver::certificates::CertificateFiles};
pub use node::{Builder, Device, Node, UpOptions};
pub use prefs::PathMode;
pub use status::{NodeState, Status};

/// The version of this crate and of the protocol that it speaks with coordinators.
#[must_use]
pub fn version() -> local_api::Version {
    local_api::Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        capability_version: mesh_control::version::CapabilityVersion::CURRENT.0,
    }
}
