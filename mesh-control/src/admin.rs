//! What operators can do: a typed service layer, where authorisation is decided, and the Unix socket in front of it.
//!
//! Every operation goes through [`Admin`], which knows who asks. Command line, pages and any later API are front ends of
//! it and decide nothing. The socket `admin.sock` in the coordinator's state directory speaks HTTP/1.1 and JSON; the
//! kernel vouches for the user at its other end, who must be the coordinator's own user or root. [`Client`] is its
//! other half.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /v1/users` | | [`UserInfo`] list |
//! | `POST /v1/users` | `{"name"}` | [`UserInfo`] |
//! | `POST /v1/codes` | `{"user"?}` | [`CodeInfo`] |
//! | `GET /v1/keys` | | [`KeyInfo`] list, without the keys themselves |
//! | `POST /v1/keys` | [`CreateKey`] | [`KeyInfo`] |
//! | `GET /v1/nodes` | | [`NodeInfo`] list |
//! | `POST /v1/nodes/rename` | `{"node","name"}` | [`NodeInfo`] |
//! | `POST /v1/nodes/expire`, `…/delete` | `{"node"}` | [`NodeInfo`] |
//! | `GET /v1/logins` | | [`LoginInfo`] list |
//! | `POST /v1/logins/approve` | `{"login","user"}` | [`LoginInfo`] |
//! | `GET /v1/relay` | | [`Counters`](mesh_derp::driver::server::Counters) of the relay in the same process |
//! | `POST /v1/derp-map/reload` | | `{"regions"}` |
//!
//! A failure is a 4xx or 5xx status with `{"error": "one line"}`.

mod client;
pub(crate) mod http;
mod model;
mod service;

pub use client::{Client, ClientError};
pub use model::{
    Approve, CodeInfo, CreateCode, CreateKey, CreateUser, KeyInfo, LoginInfo, NodeInfo, NodeRef, Reloaded, Rename,
    UserInfo,
};
pub use service::{Admin, AdminError};

/// The socket's name in the state directory.
pub const SOCKET_NAME: &str = "admin.sock";
