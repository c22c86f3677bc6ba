//! What goes over the admin socket, both ways.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::wire::Timestamp;

/// A user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserInfo {
    /// The user's number.
    pub id: u64,
    /// The user's name.
    pub name: String,
    /// Since when.
    pub created: Timestamp,
}

/// Asks for a user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateUser {
    /// The name.
    pub name: String,
}

/// Asks for an approval code.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CreateCode {
    /// Whose nodes it approves, by name. None: whoever types it says so.
    #[serde(default)]
    pub user: Option<String>,
}

/// A new approval code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeInfo {
    /// What to type.
    pub code: String,
    /// When it stops working.
    pub expires: Timestamp,
}

/// Asks for an auth key.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CreateKey {
    /// Whose nodes it registers, by name.
    pub user: String,
    /// May register more than one machine.
    #[serde(default)]
    pub reusable: bool,
    /// Its nodes are deleted when they leave.
    #[serde(default)]
    pub ephemeral: bool,
    /// Tags that own its nodes, each `tag:…`.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Seconds for which it works. None: 90 days.
    #[serde(default)]
    pub expiry_seconds: Option<u64>,
}

/// An auth key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyInfo {
    /// The key's number.
    pub id: u64,
    /// The key itself: only in the answer to its creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The user's name.
    pub user: String,
    /// May register more than one machine.
    pub reusable: bool,
    /// Its nodes are deleted when they leave.
    pub ephemeral: bool,
    /// Tags that own its nodes.
    pub tags: Vec<String>,
    /// Since when.
    pub created: Timestamp,
    /// When it stops working.
    pub expires: Timestamp,
    /// When it last registered a machine.
    pub used: Option<Timestamp>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// The node's number.
    pub id: u64,
    /// Its name, one label.
    pub name: String,
    /// Its full DNS name, without a dot at the end.
    pub fqdn: String,
    /// Its owner's name; `tagged-devices` if tags own it.
    pub user: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Connected, or gone for less than ten seconds.
    pub online: bool,
    /// Its key has expired.
    pub expired: bool,
    /// When its key expires; none: never.
    pub expires: Option<Timestamp>,
    /// Deleted when it leaves.
    pub ephemeral: bool,
    /// Since when.
    pub created: Timestamp,
    /// When it was last connected, unless it is now.
    pub last_seen: Option<Timestamp>,
    /// What it runs on.
    pub os: String,
    /// Its client's version, as it says.
    pub client: String,
    /// The capability version that it speaks.
    pub capability: u16,
    /// Where it thinks it can be reached.
    pub endpoints: Vec<SocketAddr>,
    /// Its home region.
    pub home_region: Option<u16>,
    /// Its node key.
    pub node_key: String,
    /// Its machine key.
    pub machine_key: String,
}

/// Names a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRef {
    /// Its name, number or one of its addresses.
    pub node: String,
}

/// Asks for another node name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rename {
    /// The node's name, number or one of its addresses.
    pub node: String,
    /// The new name, one DNS label.
    pub name: String,
}

/// Asks to let a waiting machine in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approve {
    /// The URL that the machine prints, or its last part.
    pub login: String,
    /// Who owns the node, by name.
    pub user: String,
}

/// A machine that waits for approval.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoginInfo {
    /// The last part of the URL that it prints.
    pub id: String,
    /// The whole URL.
    pub url: String,
    /// What it says it is called.
    pub hostname: String,
    /// What it says it runs on.
    pub os: String,
    /// The address that it asks from.
    pub from: Option<IpAddr>,
    /// Its node key.
    pub node_key: String,
    /// For whom it was approved; none: it waits.
    pub approved_for: Option<String>,
    /// When it lapses.
    pub expires: Timestamp,
}

/// The relays were read again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// How many regions there are now.
    pub regions: usize,
}
