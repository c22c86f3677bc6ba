//! Port mappings: asking the gateway for a port that leads to us from everywhere.
//!
//! Behind a NAT that maps and filters per destination, a mapping is worth more than all guessing: it makes the node one
//! that everybody can reach. Three protocols ask for it, and gateways speak any of them, or none:
//!
//! | module | protocol |
//! |---|---|
//! | [`pcp`] | PCP (RFC 6887), which also opens IPv6 firewalls |
//! | [`nat_pmp`] | NAT-PMP (RFC 6886) |
//! | [`ssdp`], [`http`], [`upnp`] | UPnP Internet Gateway Device 1 and 2: found by multicast, described in XML, called by SOAP; the second opens IPv6 firewalls too |
//!
//! [`Mapper`] speaks all three and keeps one mapping; a `Gateway` (feature `sim`) is the other side, for laboratories.
//! Both are cores without I/O. `driver::PortMapper` runs a mapper on real sockets.
//!
//! What gateways say is not trusted further than it must be: answers count only from the gateway's own address, PCP's only
//! with the nonce of the request, hosts in URLs are replaced by the gateway, and everything has a limit.

#[cfg(any(test, feature = "sim"))]
pub mod gateway;
pub mod http;
#[cfg(feature = "sim")]
pub mod lab;
mod mapper;
pub mod nat_pmp;
pub mod pcp;
pub mod ssdp;
mod status;
pub mod upnp;
mod xml;

#[cfg(any(test, feature = "sim"))]
pub use gateway::Gateway;
pub use mapper::{Event, ExchangeId, Mapper, Reject, Transmit};
pub use status::{Config, Mapping, Network, Problem, Protocol, Refusal, Status, is_public};
