//! WireGuard as a protocol core: one private key, its peers, their sessions.
//!
//! The [whitepaper](https://www.wireguard.com/papers/wireguard.pdf) defines the protocol; the words and the constants
//! here are its own. The work is divided so that a packet never waits for a decision:
//!
//! - [`Interface`] takes handshake messages and the time, and decides everything: when to start a handshake, which
//!   session is in use, when a keepalive is due, when a session dies. It is a plain struct without I/O.
//! - [`Session`] seals and opens transport data in the caller's buffer, from any thread, without allocating. It is
//!   shared between the interface and whoever moves packets.
//! - [`Activity`] is a handful of atomics per peer, in which the packet path leaves the times and the amounts that
//!   the interface's timers need. The interface reads them when a deadline falls due.
//! - [`AllowedIps`] is the routing table from prefix to peer, for both directions (cryptokey routing).
//!
//! ```text
//!  packets ──► AllowedIps ──► Session::seal ──────────────────────────────► datagrams
//!                    no session │    │ note_sent                   ▲
//!                               ▼    ▼                             │ poll_transmit
//!                        want_session / Activity ──► Interface ────┘
//!                                                     ▲    │ poll_event: SessionOpened, SessionReady, …
//!                              handle_datagram        │    ▼
//!  datagrams ──► message::kind ──► handshake, cookie ─┘   the table of sessions by receiver index
//!                     └─ transport data ──► Session::open ──► Replay::accept ──► AllowedIps ──► packets
//! ```
//!
//! What the caller owes the core:
//!
//! - Drain `poll_transmit` and `poll_event` after every call that takes `&mut Interface`.
//! - Register a session under its receiver index at [`Event::SessionOpened`], forget it at [`Event::SessionClosed`],
//!   send on the one last named by [`Event::SessionReady`].
//! - Call [`Interface::session_used`] when a session that is not ready yet opens its first datagram: this is how a
//!   responder learns that the initiator has the keys.
//! - Call [`Interface::peer_active`] when [`Activity::note_sent`] or [`Activity::note_received`] returns true.
//! - Call [`Interface::want_session`] when a packet waits for a peer without a session.

mod activity;
mod allowed_ips;
mod cookie;
mod handshake;
mod interface;
pub mod message;
mod peer;
mod replay;
mod session;
mod timers;
mod timestamp;
pub mod uapi;

pub use activity::Activity;
pub use allowed_ips::AllowedIps;
pub use interface::{Event, Interface, PeerConfig, PeerStatus, Transmit};
pub use replay::{Replay, WINDOW};
pub use session::{HEADER_LEN, MAX_RESERVE, Opened, Session, TAG_LEN, padded_len};
pub use timers::{Timer, Timing};

/// Why a datagram was not accepted. Counted by the caller, never fatal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Reject {
    /// Not one of the four messages, or not as long as that message has to be.
    #[error("not a WireGuard message")]
    Malformed,
    /// Transport data, which belongs to [`Session::open`], or the reverse.
    #[error("a message of another kind belongs here")]
    WrongKind,
    /// mac1 does not fit: the sender does not know our public key.
    #[error("mac1 does not fit: meant for another key")]
    Mac1,
    /// Under load, a cookie reply was sent instead of an answer.
    #[error("under load: the sender was asked for a cookie")]
    CookieRequired,
    /// Under load, this source sends more handshakes than its share.
    #[error("under load: too many handshakes from this source")]
    RateLimited,
    /// The cipher refused the message: another key, or changed on the way.
    #[error("authentication failed")]
    Authentication,
    /// The message holds a low-order point.
    #[error("a public key is a low-order point")]
    LowOrder,
    /// An initiation by a key that is no peer of ours.
    #[error("the initiator is no peer")]
    UnknownPeer,
    /// An initiation whose timestamp is not later than the last one: a replay, or a clock that went back.
    #[error("the initiation is older than the last one")]
    OldTimestamp,
    /// Two initiations by one peer within 20 ms.
    #[error("initiations follow each other too closely")]
    Flood,
    /// Names an index that is not ours, or not any more.
    #[error("unknown receiver index")]
    UnknownIndex,
    /// The session has ended, by age or by count.
    #[error("the session has ended")]
    SessionEnded,
    /// The counter was seen before, or is too far behind to tell.
    #[error("the counter was seen before or is too old")]
    Replayed,
}
