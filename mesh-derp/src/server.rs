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

mod connection;
mod registry;

pub use connection::{Connection, Input, LOGIN_TIMEOUT, ServerError};
pub use registry::{ConnectionId, Departure, Registry};
