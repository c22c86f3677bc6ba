//! The program as a person uses it: real processes on loopback, no root, and every way to get it wrong.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::missing_panics_doc,
    reason = "tests fail by panicking and read the real clock"
)]

mod acme;
mod garbage;
mod http;
mod keys;
mod mistakes;
mod net;
mod outage;
mod process;
mod relays;
mod sign_in;
mod state;
mod tls;
mod traffic;
