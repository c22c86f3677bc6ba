//! The login: the two boxes that open a relay connection.
//!
//! A box is a NaCl `crypto_box` between the client's node key and the relay's key: nonce (24) ‖ tag (16) ‖ ciphertext
//! of a JSON object. A relay that opens a ClientInfo knows that the client holds the private half of the node key it
//! names. There is no replay protection at this layer; the TLS connection underneath provides it.
//!
//! | ClientInfo member | type | sent | meaning |
//! |---|---|---|---|
//! | `meshKey` | 64 hex digits | when set | secret shared by the relays of a region |
//! | `version` | int | always | 2 |
//! | `CanAckPings` | bool | always | this client answers Ping frames |
//! | `IsProber` | bool | when true | a monitor, not a node |
//! | `AppName` | string | when set | label for statistics |
//!
//! | ServerInfo member | type | sent | meaning |
//! |---|---|---|---|
//! | `version` | int | always | 2 |
//! | `TokenBucketBytesPerSecond`, `TokenBucketBytesBurst` | int | when not 0 | what the client may send |
//!
//! Members match without regard to case and unknown ones are ignored: the official Rust client spells its members in
//! snake case (`can_ack_pings`, and `mesh_key` with the text `none`), which therefore mean nothing here, as they mean
//! nothing to the official server. A `meshKey` that is no key is refused, even an empty one.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use mesh_noise::key::{KEY_LEN, NodePublic, SharedBox};
use rand_core::CryptoRng;
use serde::{Deserialize, Serialize};

use crate::frame::{Frame, PROTOCOL_VERSION};
use crate::json;

/// Why a login failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoginError {
    /// The box was not sealed by the holder of the key it names, or not for us.
    #[error("login box does not open with the key it names")]
    Sealed,
    /// What was in the box cannot be read.
    #[error("login cannot be read: {0}")]
    Content(#[from] json::Error),
}

/// The secret that the relays of one region share. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct MeshKey([u8; KEY_LEN]);

impl MeshKey {
    /// Takes the 32 raw bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// Draws a new key.
    pub fn generate(rng: &mut (impl CryptoRng + ?Sized)) -> Self {
        let mut bytes = [0; KEY_LEN];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// The secret as 64 digits, for a key file.
    #[must_use]
    pub fn to_secret_text(&self) -> String {
        hex::encode(self.0)
    }

    /// Whether two keys are the same, in a time that does not depend on where they differ.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl fmt::Debug for MeshKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MeshKey(…)")
    }
}

/// A text that is no mesh key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected 64 hexadecimal digits, not all of them 0, as mesh key")]
pub struct BadMeshKey;

impl FromStr for MeshKey {
    type Err = BadMeshKey;

    fn from_str(text: &str) -> Result<Self, BadMeshKey> {
        let mut key = [0; KEY_LEN];
        hex::decode_to_slice(text, &mut key).map_err(|_| BadMeshKey)?;
        if key == [0; KEY_LEN] { Err(BadMeshKey) } else { Ok(Self(key)) }
    }
}

impl Serialize for MeshKey {
    fn serialize<S: serde::Serializer>(&self, writer: S) -> Result<S::Ok, S::Error> {
        writer.serialize_str(&hex::encode(self.0))
    }
}

impl<'de> Deserialize<'de> for MeshKey {
    fn deserialize<D: serde::Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        let text = String::deserialize(reader)?;
        let mut key = [0; KEY_LEN];
        hex::decode_to_slice(&text, &mut key)
            .map_err(|_| serde::de::Error::custom("expected 64 hexadecimal digits as meshKey"))?;
        Ok(Self(key))
    }
}

/// What a client says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClientInfo {
    /// Makes the client a relay of the same region. An all-zero key counts as none.
    #[serde(rename = "meshKey", skip_serializing_if = "Option::is_none")]
    pub mesh_key: Option<MeshKey>,
    /// Version of the protocol.
    pub version: u32,
    /// Whether it answers Ping frames.
    #[serde(rename = "CanAckPings")]
    pub can_ack_pings: bool,
    /// Whether it is a monitor.
    #[serde(rename = "IsProber", skip_serializing_if = "std::ops::Not::not")]
    pub is_prober: bool,
    /// A label for statistics.
    #[serde(rename = "AppName", skip_serializing_if = "String::is_empty")]
    pub app_name: String,
}

impl Default for ClientInfo {
    fn default() -> Self {
        Self {
            mesh_key: None,
            version: PROTOCOL_VERSION,
            can_ack_pings: false,
            is_prober: false,
            app_name: String::new(),
        }
    }
}

impl ClientInfo {
    /// Seals this as `node`'s login. `shared` is the box between its private key and the relay.
    pub fn seal(&self, node: NodePublic, shared: &SharedBox, rng: &mut (impl CryptoRng + ?Sized)) -> Frame {
        Frame::ClientInfo { node, sealed: seal(self, shared, rng) }
    }

    /// Opens a login. `shared` is the box between the relay and the node key that the frame names.
    ///
    /// # Errors
    /// If it was not sealed with that node's private key, or its content cannot be read.
    pub fn open(shared: &SharedBox, sealed: &[u8]) -> Result<Self, LoginError> {
        let plain = shared.open(sealed).ok_or(LoginError::Sealed)?;
        let info: Self = json::from_slice(&plain)?;
        let zero = MeshKey([0; KEY_LEN]);
        Ok(Self { mesh_key: info.mesh_key.filter(|key| *key != zero), ..info })
    }
}

/// What a relay says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServerInfo {
    /// Version of the protocol.
    pub version: u32,
    /// How many bytes of frames a second the client may send; 0 is no limit.
    #[serde(rename = "TokenBucketBytesPerSecond", skip_serializing_if = "is_zero")]
    pub bytes_per_second: u64,
    /// How many bytes it may send at once.
    #[serde(rename = "TokenBucketBytesBurst", skip_serializing_if = "is_zero")]
    pub burst: u64,
}

impl Default for ServerInfo {
    fn default() -> Self {
        Self { version: PROTOCOL_VERSION, bytes_per_second: 0, burst: 0 }
    }
}

impl ServerInfo {
    /// Seals this for the client at the other end of `shared`.
    pub fn seal(&self, shared: &SharedBox, rng: &mut (impl CryptoRng + ?Sized)) -> Frame {
        Frame::ServerInfo { sealed: seal(self, shared, rng) }
    }

    /// Opens what a relay sent.
    ///
    /// # Errors
    /// If it was not sealed by that relay for us, or its content cannot be read.
    pub fn open(shared: &SharedBox, sealed: &[u8]) -> Result<Self, LoginError> {
        Ok(json::from_slice(&shared.open(sealed).ok_or(LoginError::Sealed)?)?)
    }
}

fn seal(info: &impl Serialize, shared: &SharedBox, rng: &mut (impl CryptoRng + ?Sized)) -> Bytes {
    let plain = serde_json::to_vec(info).expect("an object of numbers, flags and texts has a JSON form");
    let mut sealed = Vec::new();
    shared.seal(rng, &plain, &mut sealed);
    sealed.into()
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_noise::key::{NodePrivate, RelayPrivate};
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn both_boxes_open_for_the_other_side_only() {
        let mut rng = StdRng::seed_from_u64(1);
        let (node, other, relay) =
            (NodePrivate::generate(&mut rng), NodePrivate::generate(&mut rng), RelayPrivate::generate(&mut rng));
        let (ours, theirs) = (node.box_with_relay(&relay.public()), relay.box_with_node(&node.public()));
        let info = ClientInfo { can_ack_pings: true, app_name: "test".into(), ..ClientInfo::default() };
        let Frame::ClientInfo { node: named, sealed } = info.seal(node.public(), &ours, &mut rng) else { panic!() };
        assert_eq!(named, node.public());
        assert_eq!(ClientInfo::open(&theirs, &sealed).unwrap(), info);
        let wrong = relay.box_with_node(&other.public());
        assert!(matches!(ClientInfo::open(&wrong, &sealed), Err(LoginError::Sealed)));
        let Frame::ServerInfo { sealed } = ServerInfo::default().seal(&theirs, &mut rng) else { panic!() };
        assert_eq!(ServerInfo::open(&ours, &sealed).unwrap(), ServerInfo::default());
        assert!(matches!(ServerInfo::open(&ours, b"short"), Err(LoginError::Sealed)));
    }

    #[test]
    fn the_text_is_that_of_the_official_client() {
        let info = ClientInfo { can_ack_pings: true, ..ClientInfo::default() };
        assert_eq!(serde_json::to_string(&info).unwrap(), r#"{"version":2,"CanAckPings":true}"#);
        assert_eq!(serde_json::to_string(&ServerInfo::default()).unwrap(), r#"{"version":2}"#);
    }

    #[test]
    fn snake_case_members_mean_nothing_and_bad_mesh_keys_are_refused() {
        let read = json::from_str::<ClientInfo>;
        let rust = read(r#"{"can_ack_pings":true,"is_prober":true,"mesh_key":"none","version":2}"#).unwrap();
        assert_eq!(rust, ClientInfo::default());
        assert!(read(r#"{"meshKey":"none"}"#).is_err());
        assert!(read(r#"{"meshKey":""}"#).is_err());
        let key = "ab".repeat(32);
        let info = read(&format!(r#"{{"MESHKEY":"{key}","canackpings":true}}"#)).unwrap();
        assert!(info.mesh_key.unwrap().matches(&MeshKey::from_bytes([0xab; 32])));
        assert!(info.can_ack_pings);
    }
}
