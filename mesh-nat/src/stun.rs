//! STUN binding (RFC 8489): asking a server which address it sees, and answering that question.
//!
//! - [`message`][]: the request and the response as bytes
//! - [`binding`][]: asks one server, again and again until it answers
//! - [`responder`][]: answers

pub mod binding;
pub mod message;
pub mod responder;

pub use binding::Binding;
pub use message::{StunError, TransactionId};
pub use responder::Responder;
