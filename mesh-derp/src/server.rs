//! The relay's half, without any I/O: one [`Connection`] per client, and a [`Registry`] that routes between them.
//!
//! What a relay does with a packet from A to B:
//!
//! 1. A's [`Connection`] cuts it out of A's byte stream and hands it over as [`Input::Packet`].
//! 2. [`Registry::route`] names B's active connection, or nothing.
//! 3. It goes into that connection's [`PacketQueue`](crate::queue::PacketQueue), where the oldest packet makes room if B
//!    reads too slowly. A never waits for B.
//! 4. B's writer takes what is queued, disco first, and sends it as RecvPacket frames.
//!
//! If nobody is there, A is told with PeerGone(NotHere), but only for disco packets and at most three times in a burst
//! and once a second. When B leaves, everyone who had received a packet from B on their present connection is told with
//! PeerGone(Disconnected).
//!
//! Two things make A be read more slowly, and neither drops anything: [`Pressure`], while most of what it sends is in
//! vain, and a [`RateLimiter`], if the relay has a limit. An [`AcceptLimiter`] holds back new connections.
//!
//! # Several relays in one region
//! share a secret, the mesh key, and each keeps a *link* to each other one: a client's connection, logged in with the
//! relay's own key and the mesh key. Over its link to A, B learns who is at A ([`Watch`] is A's side of that) and forwards
//! what its own clients send to those. What was forwarded once is delivered or dropped, never forwarded again. When A
//! dies, B's link breaks; A's nodes are in doubt for [`DOUBT`], in which they find their way to B or another relay, and
//! only then count as gone.

mod backlog;
mod connection;
mod forwarders;
mod headroom;
mod lobby;
mod pressure;
mod rate;
mod registry;
mod watch;

pub use backlog::Backlog;
pub use connection::{Connection, Input, LOGIN_TIMEOUT, Regional, ServerError};
pub use forwarders::{DOUBT, LinkId};
pub use headroom::{CpuLimit, Headroom};
pub use lobby::{Crowded, Dismissal, Guest, Limits, Lobby, Stage};
pub use pressure::{Outcome, Pressure};
pub use rate::{AcceptLimit, AcceptLimiter, MIN_BURST, RateLimit, RateLimiter};
pub use registry::{ConnectionId, Departure, Registry};
pub use watch::{Presence, Watch};
