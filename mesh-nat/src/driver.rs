//! The tokio part: sockets and the clock.
//!
//! - [`StunServer`]: a STUN responder on a UDP socket
//! - [`netcheck_once`]: one report about a DERP map, over sockets of its own
//! - [`PortMapper`]: a port mapping of the host's gateway, got and kept
//! - [`SpareSockets`], [`look_for_portal`]: what a report asks of its caller
//!
//! The [`Agent`](crate::Agent) has no driver here: a node drives it from the sockets that carry its data.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

mod netcheck;
mod portal;
mod portmap;
mod spare;
mod stun;

pub use netcheck::{netcheck_once, netcheck_with};
pub use portal::look_for_portal;
pub use portmap::{Clock, PortMapper};
pub use spare::SpareSockets;
pub use stun::StunServer;

#[expect(clippy::disallowed_methods, reason = "the drivers' one clock")]
fn now() -> Instant {
    Instant::now()
}

/// Binds a UDP socket. One for IPv6 leaves IPv4 alone, so that both families can have the same port.
fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}
