//! `/key`, the early payload, `/machine/register`, and the question a relay asks before it admits a client.

use std::fmt;

use mesh_noise::key::{ChallengePublic, MachinePublic, NodePublic};
use serde::{Deserialize, Serialize};

use super::hostinfo::Hostinfo;
use super::ids::{Base64, LoginId, UserId};
use super::time::Timestamp;
use crate::version::CapabilityVersion;

message! {
    /// The answer to `GET /key?v=N`: the keys that the Noise handshake trusts.
    pub struct KeyResponse {
        /// The key of the transport before 2022; zero today. One client needs the member to be there.
        legacy_public_key: MachinePublic = "legacyPublicKey" always,
        /// The control server's Noise key.
        public_key: MachinePublic = "publicKey" always,
    }
}

message! {
    /// The JSON of the [early payload](crate::channel), a server's first bytes inside Noise.
    pub struct EarlyNoise {
        /// A key made for this connection; current clients ignore it.
        node_key_challenge: ChallengePublic = "nodeKeyChallenge" always,
    }
}

message! {
    /// Asks to register, re-register, rotate or log out a node key.
    pub struct RegisterRequest {
        /// What the client understands.
        version: CapabilityVersion = "Version" always,
        /// The key being registered.
        node_key: NodePublic = "NodeKey" always,
        /// The key that it replaces; zero if none.
        old_node_key: NodePublic = "OldNodeKey" always,
        /// The device's tailnet-lock key (`nlpub:…`); empty if it has none.
        nl_key: String = "NLKey",
        /// How the client proves that it may join; absent for an interactive login or a restart.
        auth: Option<RegisterAuth> = "Auth",
        /// Zero normally; past: log out; future: expire at that time.
        expiry: Timestamp = "Expiry" always,
        /// The AuthURL of the pending login that this request waits for, or empty.
        followup: String = "Followup" always,
        /// The device as it describes itself.
        hostinfo: Option<Box<Hostinfo>> = "Hostinfo",
        /// Asks for a node that is forgotten once it is offline.
        ephemeral: bool = "Ephemeral",
        /// Tailnet lock: the signature of `node_key`.
        node_key_signature: Option<Base64> = "NodeKeySignature" always,
        /// A tailnet that the device's policy demands.
        tailnet: String = "Tailnet",
    }
}

/// The credential in a [`RegisterRequest`]. Does not print.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RegisterAuth {
    /// A pre-authentication key.
    #[serde(
        rename = "AuthKey",
        default,
        deserialize_with = "crate::wire::lenient::or_default",
        skip_serializing_if = "crate::wire::lenient::is_default"
    )]
    pub auth_key: String,
}

impl fmt::Debug for RegisterAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegisterAuth(…)")
    }
}

message! {
    /// The answer to a [`RegisterRequest`], with HTTP status 200 also for a refusal.
    ///
    /// A client looks at `error`, then `node_key_signature`, then `node_key_expired`, then `auth_url`; if none of them
    /// is set it is registered. One client reads all of it only if `machine_authorized` is false, so refusals and
    /// pending logins leave that false.
    pub struct RegisterResponse {
        /// Who owns the node.
        user: User = "User" always,
        /// How they signed in.
        login: Login = "Login" always,
        /// Make a new node key and register again.
        node_key_expired: bool = "NodeKeyExpired" always,
        /// Whether the node may run.
        machine_authorized: bool = "MachineAuthorized" always,
        /// A page where somebody must approve; empty if none.
        auth_url: String = "AuthURL" always,
        /// Tailnet lock: re-sign this and try again.
        node_key_signature: Option<Base64> = "NodeKeySignature",
        /// A refusal, for people to read; empty if none.
        error: String = "Error" always,
    }
}

message! {
    /// A user, as a registration answers.
    pub struct User {
        /// The number.
        id: UserId = "ID" always,
        /// The name for people.
        display_name: String = "DisplayName" always,
        /// A picture's address.
        profile_pic_url: String = "ProfilePicURL",
        /// Since when.
        created: Timestamp = "Created",
    }
}

message! {
    /// A user's account at an identity provider.
    pub struct Login {
        /// The number.
        id: LoginId = "ID" always,
        /// The provider's name.
        provider: String = "Provider" always,
        /// The name they sign in with, often an e-mail address.
        login_name: String = "LoginName" always,
        /// The name for people.
        display_name: String = "DisplayName" always,
        /// A picture's address.
        profile_pic_url: String = "ProfilePicURL",
    }
}

message! {
    /// What a relay asks its verify URL before it admits a client.
    pub struct RelayAdmissionRequest {
        /// The client's node key.
        node_public: NodePublic = "NodePublic" always,
        /// Where it connects from, an IP address.
        source: String = "Source" always,
    }
}

message! {
    /// The answer to a [`RelayAdmissionRequest`].
    pub struct RelayAdmission {
        /// Whether to admit it.
        allow: bool = "Allow" always,
    }
}
