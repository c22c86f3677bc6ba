//! What the coordinator remembers: users, auth keys, approval codes, pending logins and nodes.
//!
//! Records are plain data with a JSON form, which is what the store keeps. Every one belongs to one tailnet, which the
//! [`State`](super::State) that holds it names.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_derp::map::RegionId;
use mesh_noise::key::{DiscoPublic, MachinePublic, NodePublic};
use serde::{Deserialize, Serialize};

use super::address::Addresses;
use super::secret::SecretHash;
use crate::wire::Hostinfo;

pub use crate::wire::{NodeId, UserId};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// Names a tailnet: a set of users and nodes that sees nothing of any other.
    TailnetId
);
number!(
    /// Names an auth key; the part of its text that is no secret.
    AuthKeyId
);
/// The pseudo-user that owns every tagged node, by the number that other servers give it.
pub const TAGGED_DEVICES: UserId = UserId(2_147_455_555);

/// A moment as the coordinator records it: milliseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Moment(u64);

impl Moment {
    /// Takes milliseconds since the epoch.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the epoch.
    #[must_use]
    pub const fn millis(self) -> u64 {
        self.0
    }

    /// This moment and `later` more.
    #[must_use]
    pub fn plus(self, later: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(later.as_millis()).unwrap_or(u64::MAX)))
    }

    /// The time from `earlier` to this moment; zero if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl From<SystemTime> for Moment {
    /// Moments before 1970 become 1970.
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

impl From<Moment> for SystemTime {
    fn from(time: Moment) -> Self {
        UNIX_EPOCH.checked_add(Duration::from_millis(time.0)).unwrap_or(UNIX_EPOCH)
    }
}

/// Who asks for a change. Recorded with every event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Actor {
    /// A machine, over its authenticated Noise channel.
    Machine(MachinePublic),
    /// A person at the coordinator's host, by the user id that the kernel vouches for.
    Operator {
        /// The Unix user id at the other end of the admin socket.
        uid: u32,
    },
    /// Somebody at a sign-in page, known only by address.
    Visitor(IpAddr),
    /// The coordinator itself: time passing.
    Coordinator,
}

/// A person who owns nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// The user's number.
    pub id: UserId,
    /// The unique name to sign in as, and what people see.
    pub name: String,
    /// When it was created.
    pub created: Moment,
}

/// A label that stands in for a user as a node's owner: `tag:` and an ASCII letter, then letters, digits and `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tag(String);

impl Tag {
    /// The whole text, prefix included.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text is not a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a tag is \"tag:\", a letter, then letters, digits and \"-\" (at most 64)")]
pub struct TagError;

impl TryFrom<String> for Tag {
    type Error = TagError;

    fn try_from(text: String) -> Result<Self, TagError> {
        let name = text.strip_prefix("tag:").ok_or(TagError)?;
        let fits = name.len() <= 64
            && name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        if fits { Ok(Self(text)) } else { Err(TagError) }
    }
}

impl From<Tag> for String {
    fn from(tag: Tag) -> Self {
        tag.0
    }
}

/// Whom a node belongs to. A machine may be one node for each owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// A person.
    User(UserId),
    /// Nobody: the node is what its tags say.
    Tags,
}

impl Owner {
    /// The user id that maps show for this owner.
    #[must_use]
    pub const fn user_id(self) -> UserId {
        match self {
            Self::User(id) => id,
            Self::Tags => TAGGED_DEVICES,
        }
    }
}

/// A pre-auth key: whoever shows it may register a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthKey {
    /// Its number, part of the key's text.
    pub id: AuthKeyId,
    /// The user who gets the node; with tags, the user who vouched for it.
    pub user: UserId,
    /// SHA-256 of the secret part. The text itself is never stored.
    pub secret: SecretHash,
    /// Whether it may register more than one machine.
    pub reusable: bool,
    /// Whether nodes that it registers are deleted when they leave.
    pub ephemeral: bool,
    /// Tags of the nodes that it registers. Not empty: the nodes belong to the tags.
    pub tags: Vec<Tag>,
    /// When it was created.
    pub created: Moment,
    /// From when on it is refused.
    pub expires: Moment,
    /// When it last registered a machine.
    pub used: Option<Moment>,
}

/// Names an approval code: the part of its text that is no secret.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CodeId(pub String);

/// A one-time code that approves a pending login from its web page.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Code {
    /// The code's first part.
    pub id: CodeId,
    /// SHA-256 of its second part.
    pub secret: SecretHash,
    /// The user who gets the node; none: the page names one.
    pub user: Option<UserId>,
    /// When it stops working.
    pub expires: Moment,
    /// How many more wrong attempts it survives.
    pub tries_left: u8,
}

/// Names a pending login: the last part of the URL that the node prints. 80 random bits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LoginId(pub String);

impl LoginId {
    /// Reads an id from a whole URL, a path or the bare id. `None` if no id can stand there.
    #[must_use]
    pub fn from_url(text: &str) -> Option<Self> {
        let path = text.trim().split(['?', '#']).next().unwrap_or_default().trim_end_matches('/');
        let id = path.rsplit('/').next().unwrap_or_default();
        let fits = !id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric());
        fits.then(|| Self(id.to_ascii_lowercase()))
    }
}

impl fmt::Display for LoginId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How far a pending login has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoginStatus {
    /// Nobody has decided yet.
    Waiting,
    /// Approved for this user; the machine's next request makes the node.
    Approved(UserId),
}

/// A machine that asks to join without an auth key (control.md §4.3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Login {
    /// Its name, in the URL.
    pub id: LoginId,
    /// The machine that asks. Only it can complete the login.
    pub machine: MachinePublic,
    /// The node key that it asks for.
    pub node_key: NodePublic,
    /// What it says it is called.
    pub hostname: String,
    /// What it says it runs on.
    pub os: String,
    /// The address that it asks from.
    pub from: Option<IpAddr>,
    /// How far it has come.
    pub status: LoginStatus,
    /// When it lapses.
    pub expires: Moment,
    /// How many more wrong codes its page survives.
    pub tries_left: u8,
}

/// One registered node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// The machine that it runs on. With the owner, what identifies the node.
    pub machine: MachinePublic,
    /// Whom it belongs to.
    pub owner: Owner,
    /// Its tags; empty unless tags own it.
    pub tags: Vec<Tag>,
    /// Its current node key.
    pub node_key: NodePublic,
    /// When the node key stops being accepted; none: never.
    pub expires: Option<Moment>,
    /// Whether it is deleted when it leaves.
    pub ephemeral: bool,
    /// Its permanent addresses.
    pub addresses: Addresses,
    /// Its unique name in the tailnet, one DNS label.
    pub name: String,
    /// Whether an operator chose the name, so that the node's own host name no longer matters.
    pub name_is_chosen: bool,
    /// The capability version that it last spoke.
    pub version: u16,
    /// Its current disco key; zero until the first map request.
    pub disco_key: DiscoPublic,
    /// Where it thinks it can be reached, in its order.
    pub endpoints: Vec<SocketAddr>,
    /// Its home region.
    pub home: Option<RegionId>,
    /// What it last said about itself.
    pub hostinfo: Hostinfo,
    /// When it first registered.
    pub created: Moment,
    /// When its last map poll ended.
    pub last_seen: Option<Moment>,
}

impl Node {
    /// Whether the node key has stopped being accepted.
    #[must_use]
    pub fn is_expired(&self, now: Moment) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }

    /// The opaque, permanent text id that maps carry.
    #[must_use]
    pub fn stable_id(&self) -> String {
        format!("n{}MESH", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_checked() {
        for good in ["tag:web", "tag:a", "tag:A-1"] {
            assert!(Tag::try_from(good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["web", "tag:", "tag:1a", "tag:a b", "tag:é"] {
            assert_eq!(Tag::try_from(bad.to_owned()), Err(TagError), "{bad}");
        }
    }

    #[test]
    fn a_login_is_found_by_url_path_or_bare_id() {
        for text in
            ["http://10.0.0.1:8080/register/abc234", "/register/ABC234/", "abc234", " abc234\n", "x/abc234?y=/1"]
        {
            assert_eq!(LoginId::from_url(text), Some(LoginId("abc234".into())), "{text}");
        }
        for text in ["", "/", "http://h/register/<script>", "a b"] {
            assert_eq!(LoginId::from_url(text), None, "{text}");
        }
    }

    #[test]
    fn timestamps_survive_the_way_to_the_clock_and_back() {
        let time = Moment::from_millis(1_790_000_000_123);
        assert_eq!(Moment::from(SystemTime::from(time)), time);
        assert_eq!(time.plus(Duration::from_secs(1)).since(time), Duration::from_secs(1));
        assert_eq!(time.since(time.plus(Duration::from_secs(1))), Duration::ZERO);
    }
}
