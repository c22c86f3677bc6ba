//! Peer relays: a node that can be reached forwards UDP for two that cannot reach each other.
//!
//! There is no RFC; this is the whole protocol. *Clients* are the two nodes that want to talk, the *server* is a third
//! one that both reach by UDP. The server has a disco key of its own, apart from the one of the node that runs it.
//! Messages are those of [`disco`](crate::disco); DERP, below, is a relay region that carries the signalling.
//!
//! ```text
//!   client A                              server                              client B
//!      │ ── allocate request (DERP) ────────►│                                    │
//!      │ ◄─ allocate response (DERP) ─────── │ VNI, Lamport id, addresses         │
//!      │ ── call-me-maybe-via (DERP) ────────────────────────────────────────────►│
//!      │ ── bind (UDP, to every address) ───►│◄──────────────────────────── bind ─│
//!      │ ◄─ challenge ────────────────────── │ ──────────────────────── challenge►│
//!      │ ── answer, and a ping ─────────────►│◄────────────── answer, and a ping ─│
//!      │                            both legs are bound                           │
//!      │ ◄═════════════ pings, pongs, WireGuard: forwarded as they are ══════════►│
//! ```
//!
//! # On the wire
//!
//! Everything by UDP stands behind a Geneve header of eight bytes ([`classify`](crate::classify())), whose VNI names the
//! pair of clients at this server and is the same both ways. Its control bit is set on bind, challenge and answer and on
//! nothing else; those are sealed between a client and the server, everything without the bit between the clients.
//!
//! # The server's rules
//!
//! - A pair has one allocation: whoever asks again gets the same answer. VNIs are handed out in order from 1 and free
//!   ones reused after all others; each allocation has a higher Lamport id than those before it.
//! - A bind names the *other* client and a generation that is not zero. It is answered with a challenge: a BLAKE2s MAC,
//!   under a secret that is renewed every two minutes, over VNI, generation, the other client's key and the address that
//!   the bind came from. The one before is accepted as well.
//! - An answer with the generation of the last bind and the right MAC binds that client's leg to its address. Binding
//!   again from elsewhere moves the leg.
//! - Once both legs are bound, a datagram without the control bit that comes from one leg's address goes to the other's,
//!   byte for byte. Everything else is dropped without an answer.
//! - An allocation whose legs are not both bound ends 30 s after it was last asked for; one that is open, when either
//!   client has been silent for five minutes.
//!
//! So nothing longer than what was received is ever sent, and only to addresses that have proven that they receive.
//!
//! # The client's rules
//!
//! - Every server that may be used is asked at once; the request is repeated after 3 s and given up after 10 s. What comes
//!   back is passed on to the peer, who binds as well.
//! - Of two records of one server, the one with the higher Lamport id holds; an equal one is the same.
//! - The first challenge chooses the server's address. The ping goes out with the answer; a ping that comes in is answered,
//!   and shows that the other leg is bound, so one goes back. The first pong proves the path, and its round trip is known.
//! - A path through a relay lives by pings like a direct one. It is never preferred to a direct path, always to a region.
//! - When the client's own network changes, it binds the same allocation again, at every address of the server and with a
//!   new generation. The peer need not hear of it. Meanwhile, and after a second ping without an answer, everything goes
//!   by the region as well.
//! - How long a datagram passes, pings padded to that length tell, header and both legs included. Until one longer has been
//!   answered, no datagram of WireGuard's is longer than 1,312 bytes.
//!
//! What deployed clients leave to chance we repeat: binds, answers and pings that may have been lost.

pub mod client;
pub mod geneve;
pub mod server;

pub use client::Client;
pub use server::{Pair, Server};
