//! Capability versions: the single number by which both sides say how much of the protocol they know.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// How much of the control protocol a side understands.
///
/// Sent in `/key?v=`, in the Noise initiation (as a `u16`, where it is part of the prologue), in every request body, and
/// shown to peers as `Node.Cap`. A server gates features on it. 0 means unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
#[serde(transparent)]
pub struct CapabilityVersion(pub u16);

impl CapabilityVersion {
    /// What we announce: the level of the Go client 1.90 and of the official Rust client.
    pub const CURRENT: Self = Self(130);
    /// The oldest that a current server answers (Go client 1.80).
    pub const MINIMUM: Self = Self(113);
    /// From here on a streaming map request does not update Hostinfo or endpoints.
    pub const SEPARATE_UPDATES: Self = Self(68);
}

impl fmt::Display for CapabilityVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl<'de> Deserialize<'de> for CapabilityVersion {
    /// A number that does not fit reads as the greatest that does: a later version than any we know.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(u16::try_from(u64::deserialize(deserializer)?).unwrap_or(u16::MAX)))
    }
}
