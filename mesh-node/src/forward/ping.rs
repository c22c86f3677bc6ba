//! Asks a real host to echo, without privileges.
//!
//! Linux offers ICMP sockets to the groups in `net.ipv4.ping_group_range`. The kernel writes its own identifier and the
//! checksum, and hands a socket only the answers to its own requests.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use tokio::net::UdpSocket;

/// The longest answer that is read.
const LONGEST: usize = 65_535;
/// Where an echo message has its sequence number, and data behind it; the identifier before it is the kernel's.
const SEQUENCE: usize = 6;
/// What answers an echo request.
const REPLY_V4: u8 = 0;
const REPLY_V6: u8 = 129;

/// Sends the ICMP echo request `message` to `target` and waits until it is answered.
///
/// # Errors
/// `PermissionDenied` where this process may not open such a socket, `TimedOut` after `patience`, and what the network
/// says.
pub(super) async fn ping(target: IpAddr, message: &[u8], patience: Duration) -> io::Result<()> {
    let (family, protocol, any, reply): (_, _, IpAddr, _) = match target {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, Ipv4Addr::UNSPECIFIED.into(), REPLY_V4),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, Ipv6Addr::UNSPECIFIED.into(), REPLY_V6),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
    rustix::net::bind(&socket, &SocketAddr::new(any, 0))?;
    // A ping socket is used like a UDP socket: one message a datagram, errors told by the next call.
    let socket = UdpSocket::from_std(std::net::UdpSocket::from(socket))?;
    socket.connect(SocketAddr::new(target, 0)).await?;
    socket.send(message).await?;
    let answered = async {
        let mut answer = vec![0; LONGEST];
        loop {
            let len = socket.recv(&mut answer).await?;
            let answer = answer.get(..len).unwrap_or_default();
            if answer.first() == Some(&reply) && answer.get(SEQUENCE..) == message.get(SEQUENCE..) {
                return Ok(());
            }
        }
    };
    tokio::time::timeout(patience, answered).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
