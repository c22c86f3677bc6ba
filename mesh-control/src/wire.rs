//! The JSON messages of the control protocol, exactly as they are sent.
//!
//! Inside the ts2021 [channel](crate::channel) a client POSTs a [`RegisterRequest`] to `/machine/register` and a
//! [`MapRequest`] to `/machine/map`, whose answer is a stream of framed [`MapResponse`]s:
//!
//! | offset | size | content |
//! |---|---|---|
//! | 0 | 4 | length of the payload, little-endian |
//! | 4 | n | one `MapResponse`: one zstd frame if the request said `"Compress":"zstd"`, else JSON |
//!
//! Names leave in Go's spelling and are matched without regard to case when they arrive, since clients differ. Unknown
//! members are ignored; absent, `null` and zero are the same unless the field is an `Option` that says otherwise.
//! Zero values are left out when sending, because one of the clients refuses `null` where it expects a list or a map.
//!
//! | Go | here |
//! |---|---|
//! | `time.Time` | [`Timestamp`] |
//! | `[]byte` | [`Base64`] |
//! | `netip.AddrPort`, `netip.Prefix` | [`std::net::SocketAddr`], [`ipnet::IpNet`] |
//! | `opt.Bool` | `Option<bool>` |
//! | node, user and login IDs | [`NodeId`], [`UserId`], [`LoginId`] |

#[macro_use]
mod macros;

pub mod dns;
pub mod filter;
pub mod frame;
pub mod hostinfo;
mod ids;
mod lenient;
pub mod map;
pub mod node;
pub mod register;
mod time;

pub use dns::{DnsConfig, DnsRecord, Resolver};
pub use filter::{CapGrant, CapMap, FilterRule, NetPortRange, PortRange};
pub use hostinfo::{Hostinfo, Location, NetInfo, OURS, Service};
pub use ids::{Base64, LoginId, NodeId, UserId};
pub use map::{
    ClientVersion, ControlDialPlan, Debug, DialCandidate, DisplayMessage, DisplayMessageAction, EndpointType,
    MapRequest, MapResponse, PingRequest, PingResponse, TkaInfo,
};
pub use node::{Node, PeerChange, UserProfile};
pub use register::{
    EarlyNoise, KeyResponse, Login, RegisterAuth, RegisterRequest, RegisterResponse, RelayAdmission,
    RelayAdmissionRequest, User,
};
pub use time::{Timestamp, TimestampError};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why bytes are not the message that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Not JSON, or a member of the wrong type.
    #[error("expected a {message}: {detail}")]
    Json {
        /// The Rust name of the message.
        message: &'static str,
        /// What the parser found, and where.
        detail: String,
    },
    /// A framed message is longer than the reader allows.
    #[error("a map message of {length} bytes is longer than the limit of {limit}")]
    TooLong {
        /// What the frame header says, or the decompressed size.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// A compressed message is no zstd frame.
    #[error("a map message is not the zstd frame that was asked for")]
    Zstd,
}

/// Reads one message.
///
/// # Errors
/// [`WireError::Json`] if `bytes` are not JSON or a member has a type that cannot be read.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    mesh_derp::json::from_slice(bytes)
        .map_err(|error| WireError::Json { message: short_name::<T>(), detail: error.to_string() })
}

/// Writes one message as compact JSON.
///
/// # Panics
/// Never for the types of this module, all of whose map keys are texts or numbers.
#[must_use]
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    serde_json::to_vec(message).expect("wire types have text or number keys and writing to memory succeeds")
}

fn short_name<T>() -> &'static str {
    let name = std::any::type_name::<T>();
    name.rsplit("::").next().unwrap_or(name)
}
