//! A laboratory: hosts, NATs, links, relays and STUN servers in virtual time, all under one seed.
//!
//! Nothing in it waits and nothing touches a socket: a minute of a small network passes in milliseconds, and the same
//! seed makes the same run, byte for byte. Nodes are real [`Agent`](crate::Agent)s; whatever else listens on a host is a
//! [`Program`], so other cores (a netcheck, a port-mapping client, a relay) run in here as they are.
//!
//! ```text
//!   host ── network ── gateway ── network ── gateway ── the internet ── relay, STUN
//!            (LAN)      (NAT)    (carrier)    (NAT)          │
//!                                                         gateway ── network ── host
//! ```
//!
//! - [`World`]: what there is, and time
//! - [`NatConfig`]: a NAT in the words of RFC 4787
//! - [`GatewayConfig`]: what stands between two networks: a NAT, a firewall, or both; a [`Service`] makes it answer
//!   requests for port mappings
//! - [`Link`]: delay, jitter, loss, MTU
//! - [`Program`]: what listens on a host
//! - [`oracle`](oracle()): can these two ever be direct, and how long may it take?
//! - [`scenario`]: the kinds of places a node may be in, and the grid of all their pairs
//!
//! Two nodes behind the kind of NAT that most homes have:
//!
//! ```
//! use std::time::Duration;
//! use mesh_nat::sim::{NatConfig, World};
//!
//! let mut world = World::seeded(7);
//! let (a, b) = (world.node_behind(NatConfig::easy()), world.node_behind(NatConfig::easy()));
//! world.introduce(a, b);
//! world.send_data(a, b, Duration::from_millis(100));
//! let took = world.run_until(Duration::from_secs(5), |world| world.is_direct(a, b) && world.is_direct(b, a));
//! assert!(took.is_some_and(|took| took <= Duration::from_millis(140)), "{took:?}");
//! ```

mod chatter;
mod gateway;
mod host;
mod link;
mod nat;
mod node;
mod oracle;
mod outside;
mod packet;
mod peer_relay;
mod program;
mod relay;
mod route;
pub mod scenario;
mod sockets;
mod stream;
mod world;

pub use chatter::Chatter;
pub use gateway::{GatewayConfig, GatewayId, Router, Service};
pub use host::{HostId, Sent};
pub use link::Link;
pub use nat::{Nat, NatConfig, NatCounters};
pub use oracle::{Excuse, Method, Verdict, oracle};
pub use packet::Record;
pub use program::{Io, Program, RequestId, StunServer};
pub use route::NetworkId;
pub use stream::{Stream, StreamId};
pub use world::World;
