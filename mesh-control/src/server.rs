//! The coordination server's mind: pure, numbered, rebuildable.
//!
//! ```text
//! register, map, admin ──► State::register, State::create_user, …   (validate, touch nothing)
//!                                   │ Decision { changes, reply }
//!                                   ▼
//!                          Event { id, at, by, change }              (one ordered log per tailnet)
//!                           │                     │
//!                     State::apply           Store::append           (acknowledged when durable)
//!                                                 │
//!                          Changelog ◄────────────┘
//!                           │ what a stream has not seen yet
//!                           ▼
//!                  mapper::full, mapper::delta ──► MapResponse
//! ```
//!
//! Nothing in this module knows a socket, a clock or a source of randomness; [`crate::driver::server`] brings them.
//! [`State`] is a fold over [`Event`]s, so that state read back from the [`store`] equals the state that was written.
//!
//! | question | where |
//! |---|---|
//! | who may join, and as what | [`State::register`] |
//! | what an operator may do | [`State::create_user`] and its neighbours; authorisation in [`crate::admin`] |
//! | which addresses a node gets | [`address`] |
//! | which name a node gets | [`name`] |
//! | who is online | [`presence`] |
//! | what a node is told | [`mapper`] |
//! | what survives a restart | [`store`] |

pub mod address;
pub mod event;
pub mod mapper;
pub mod name;
pub mod presence;
pub mod record;
pub mod secret;
pub mod state;
pub mod store;

pub use event::{Change, Event, EventId, NodeChange};
pub use record::{
    Actor, AuthKey, AuthKeyId, Code, CodeId, Login, LoginId, LoginStatus, Moment, Node, NodeId, Owner, Tag, TailnetId,
    User, UserId,
};
pub use state::{Context, Decision, Refusal, State};
