//! Getting through NATs that give every destination a port of its own, by telling or guessing those ports.
//!
//! ```text
//!        no direct path, search in vain
//!                    │
//!                    ▼                    X: hard                              E: easy
//!     ┌── propose ── accept ──┐           opens 32 sockets, pings E from each  │
//!     │ how each side's NAT   │           ── ready, stage 0, range ───────────►│ 128 pings to ports of the range
//!     │ behaves               │           │◄───────────────────── more, 1 ─────│ before they have all left
//!     └───────────┬───────────┘           opens 96 more ── ready, stage 1 ────►│ 512 pings
//!                 ▼                       …                                    …
//!   open, spray, sweep or flood           │◄────────── ping to an open port ───│
//!                 │                       ── pong, and a ping back ───────────►│ both are direct
//!                 ▼                       closes all sockets but that one
//!     hit: pinned to the socket
//!     else: back off, a minute to an hour
//! ```
//!
//! The relay carries the data meanwhile; nothing waits for an attempt. Signalling goes through the relay too
//! ([`message`]), and only to peers that are known to be ours. Towards others there are two tricks that need no help:
//! a deployed peer pings every address that a call-me-maybe lists, so a hard node opens ports and lists guesses of them
//! (always ending with a list of real addresses, since what is listed is what the peer repeats); and an easy node tries
//! the few ports that a peer's NAT is likely to give.
//!
//! # What it may cost
//!
//! Routers have small tables and operators give subscribers small blocks of ports, so all of it is bounded, together and
//! not per peer: [`MAX_PER_SECOND`], [`MAX_SOCKETS`], [`MAX_PROBES`] and [`MAX_FLOWS`]; never more than half of a small
//! range is opened; one attempt runs at a time; and after a failure the peer is left alone for a minute, then two, up to
//! an hour. All sockets but the winner are closed as soon as a path is proven.
//!
//! - `ladder`: which trick fits two NATs, its stages, when it is hopeless
//! - `attempt`: one attempt
//! - `survey`: what our own NAT gives right now
//! - `ports`, `pace`: orders of ports, budgets

mod attempt;
mod guesser;
mod ladder;
pub mod message;
mod pace;
mod ports;
mod survey;
#[cfg(test)]
mod tests;

pub use attempt::Extra;
pub use guesser::{Action, Guesser, Outcome, PeerFacts};
pub use ladder::{Hopeless, MAX_FLOWS, MAX_PER_SECOND, MAX_PROBES, MAX_SOCKETS};
