//! MagicDNS: the names of the mesh, answered at 100.100.100.100 and `fd7a:115c:a1e0::53`.
//!
//! [`MagicDns`] is the table and answers one message at a time, without I/O. [`Names`] shares the newest table with
//! whoever answers: [`serve`] over a [`Netstack`](crate::netstack::Netstack), and [`Interceptor`] where a TUN device
//! carries the packets of this host's own resolver.
//!
//! What is answered (control protocol notes §8):
//!
//! | question | answer |
//! |---|---|
//! | A, AAAA of a node, full or bare name | its addresses; no data where it has none of that family |
//! | PTR of a node's address | its name |
//! | anything else below the tailnet's domain or in its reverse zones | no such name |
//! | below a split-DNS suffix | that suffix's resolvers; none given: no such name |
//! | everything else | the configured resolvers; none given: refused |
//!
//! Not done: resolvers other than plain DNS on an IP address (DoH, DoT).

mod answer;
mod intercept;
mod serve;

pub use answer::{Decision, MagicDns, Transport};
pub use intercept::{Interceptor, is_service_packet};
pub use serve::{Names, SERVICE_PORT, serve};
