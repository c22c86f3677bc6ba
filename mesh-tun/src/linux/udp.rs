//! UDP sockets that move datagrams in batches, shared by any number of threads.
//!
//! One system call moves up to 64 messages, and where the kernel helps, a message is up to 64 datagrams:
//!
//! ```text
//! send:     neighbours in the batch with one receiver and one length ─► one message with UDP_SEGMENT
//!           (the last may be shorter), gathered from where they lie; up to 64 and 65,000 bytes
//! receive:  UDP_GRO joins neighbours of one sender ─► one buffer of 64 KiB, seen as many packets of the batch
//! ```
//!
//! The order of datagrams never changes. A driver that cannot segment answers EIO or EINVAL: from then on the socket sends
//! one datagram a message, and the refused ones first.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

use super::wait::{Closer, Woken};
use super::{kernel, sys};
use crate::Error;
use crate::batch::Batch;
use crate::device::closed;

mod receive;
mod send;
#[cfg(test)]
mod tests;

pub use receive::RecvBatch;
use send::Runs;

/// How long a full send buffer may hold a sender up before the rest of its batch is dropped.
const SEND_PATIENCE: Duration = Duration::from_millis(20);

/// The most datagrams and bytes that the kernel segments a message into, with room for the headers of the outer packet.
const MAX_SEGMENTS: usize = 64;
const MAX_SEGMENTED: usize = 65_000;

/// Buffers with [`Config::gather`], and the bytes of each: whatever the kernel joins fits. Memory is touched only as far
/// as something was received there.
const GATHERED: usize = sys::MAX_MESSAGES;
const GATHERED_SIZE: usize = 1 << 16;

/// What the kernel is trusted with when it segments for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Segmentation {
    /// Nothing: each message is one datagram.
    Off = 0,
    /// Datagrams of one length. Linux 7.0 to 7.1.4 damage a shorter last one.
    Equal = 1,
    /// Datagrams of one length and a shorter last one.
    Full = 2,
}

impl Segmentation {
    /// What the running kernel does right.
    #[must_use]
    pub fn of_this_kernel() -> Self {
        kernel::running().map_or(Self::Full, Self::of_kernel)
    }

    fn of_kernel(version: kernel::Version) -> Self {
        if ((7, 0, 0)..=(7, 1, 4)).contains(&version) { Self::Equal } else { Self::Full }
    }

    fn from_word(word: u8) -> Self {
        match word {
            0 => Self::Off,
            1 => Self::Equal,
            _ => Self::Full,
        }
    }
}

/// How a socket is made. The defaults run well.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// The address to bind; port 0 (default, with the IPv4 wildcard) lets the system choose. An IPv6 socket carries IPv6
    /// only.
    pub bind: SocketAddr,
    /// Bytes of receive buffer asked for; default 2 MiB. More hides bursts and adds delay.
    pub receive_buffer: usize,
    /// Bytes of send buffer asked for; default 2 MiB.
    pub send_buffer: usize,
    /// The `SO_MARK` for policy routing; default none. Without the privilege it is left off, see [`UdpBatch::is_marked`].
    pub mark: Option<u32>,
    /// The longest datagram expected, in bytes; longer ones are dropped and counted as truncated. Default 2048.
    pub datagram_size: usize,
    /// How far the kernel segments what is sent (`UDP_SEGMENT`); default what the running kernel does right.
    pub segmentation: Segmentation,
    /// Whether the kernel joins what is received (`UDP_GRO`), where it can; default true.
    pub gather: bool,
    /// Whether datagrams must arrive in one piece; default false, which lets the system fragment them to what it has
    /// learnt about the path. True suits those who find out lengths themselves: what is longer than the interface's MTU is
    /// refused, and what is longer than the path's is lost.
    pub dont_fragment: bool,
    /// Sockets on the one address (`SO_REUSEPORT`), among which the kernel spreads senders; default 1. With more,
    /// [`UdpBatch::others`] has the rest, and all have to be read. See [`super::queues`].
    pub sockets: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
            receive_buffer: 2 << 20,
            send_buffer: 2 << 20,
            mark: None,
            datagram_size: 2048,
            segmentation: Segmentation::of_this_kernel(),
            gather: true,
            dont_fragment: false,
            sockets: 1,
        }
    }
}

impl Config {
    /// The defaults, bound to `bind`.
    #[must_use]
    pub fn bound_to(bind: SocketAddr) -> Self {
        Self { bind, ..Self::default() }
    }

    /// The defaults, bound to `port` on all IPv4 addresses.
    #[must_use]
    pub fn ipv4(port: u16) -> Self {
        Self::bound_to((Ipv4Addr::UNSPECIFIED, port).into())
    }

    /// The defaults, bound to `port` on all IPv6 addresses.
    #[must_use]
    pub fn ipv6(port: u16) -> Self {
        Self::bound_to((Ipv6Addr::UNSPECIFIED, port).into())
    }
}

/// A bound UDP socket of one address family, or the first of several on one address.
#[derive(Debug)]
pub struct UdpBatch {
    socket: Socket,
    /// The same for all on the address.
    closer: Arc<Closer>,
    others: Vec<Arc<Self>>,
    local: SocketAddr,
    marked: bool,
    datagram_size: usize,
    /// A [`Segmentation`], lowered when the system refuses.
    segmentation: AtomicU8,
    gather: bool,
}

/// What became of a batch that was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Datagrams handed to the system.
    pub sent: usize,
    /// Datagrams that the system refused: no route, too long, forbidden.
    pub failed: usize,
    /// Datagrams dropped because the send buffer stayed full.
    pub dropped: usize,
}

/// One datagram of a [`Batch`] and where it shall go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outgoing {
    /// The receiver; of the socket's family.
    pub to: SocketAddr,
    /// Which packet of the batch.
    pub index: usize,
}

impl UdpBatch {
    /// Makes and binds a socket, or as many as asked for.
    ///
    /// # Errors
    /// [`Error::AddressInUse`] if another socket has the address, [`Error::System`] otherwise.
    pub fn bind(config: &Config) -> Result<Arc<Self>, Error> {
        let what = |error| Error::system(format!("open a UDP socket on {}", config.bind), error);
        let closer = Arc::new(Closer::new().map_err(what)?);
        let mut first = Self::bind_one(config, &closer, false)?;
        if config.sockets > 1 {
            // Only now, so that an address that somebody else shares with others of their own was refused.
            first.socket.set_reuse_port(true).map_err(what)?;
            let config = Config { bind: first.local, ..config.clone() };
            let others = (1..config.sockets).map(|_| Self::bind_one(&config, &closer, true).map(Arc::new));
            first.others = others.collect::<Result<_, _>>()?;
        }
        Ok(Arc::new(first))
    }

    /// Makes the most of a socket that [`plain`] has bound, as `config` says but for the address. It takes a descriptor of
    /// its own; what the socket has not received yet stays in its buffer.
    ///
    /// # Errors
    /// [`Error::System`] if the system refuses.
    pub fn adopt(socket: &impl AsFd, config: &Config) -> Result<Arc<Self>, Error> {
        let adopt = || {
            let socket = Socket::from(socket.as_fd().try_clone_to_owned()?);
            let local = socket.local_addr()?.as_socket().ok_or_else(|| io::Error::other("not an IP socket"))?;
            Ok(Arc::new(Self::equip(socket, local, config, &Arc::new(Closer::new()?))))
        };
        adopt().map_err(|error| Error::system("adopt a UDP socket", error))
    }

    fn bind_one(config: &Config, closer: &Arc<Closer>, reuse_port: bool) -> Result<Self, Error> {
        let (socket, local) = open(config, reuse_port)?;
        Ok(Self::equip(socket, local, config, closer))
    }

    fn equip(socket: Socket, local: SocketAddr, config: &Config, closer: &Arc<Closer>) -> Self {
        // The plain options are capped by the administrator's limit, the forced ones need privilege: take what we get.
        if sockopt::set_socket_recv_buffer_size_force(&socket, config.receive_buffer).is_err() {
            let _ = sockopt::set_socket_recv_buffer_size(&socket, config.receive_buffer);
        }
        if sockopt::set_socket_send_buffer_size_force(&socket, config.send_buffer).is_err() {
            let _ = sockopt::set_socket_send_buffer_size(&socket, config.send_buffer);
        }
        let marked = config.mark.is_some_and(|mark| socket.set_mark(mark).is_ok());
        let gather = config.gather && sys::set_udp_gro(socket.as_fd(), true).is_ok();
        let (segmentation, datagram_size) = (AtomicU8::new(config.segmentation as u8), config.datagram_size);
        let (closer, others) = (Arc::clone(closer), Vec::new());
        Self { socket, closer, others, local, marked, datagram_size, segmentation, gather }
    }

    /// The other sockets on this address, which close with this one; none unless [`Config::sockets`] asked for them.
    ///
    /// All datagrams of one sender arrive at the same socket of the address, as long as there are as many of them.
    #[must_use]
    pub fn others(&self) -> &[Arc<Self>] {
        &self.others
    }

    /// One of the sockets on this address to send by, this one or another: the same for the same `number`, which may be any.
    #[must_use]
    pub fn member(&self, number: usize) -> &Self {
        match number % (self.others.len() + 1) {
            0 => self,
            index => &self.others[index - 1],
        }
    }

    /// The address it is bound to, with the port the system chose.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Sets the `SO_MARK` of what is sent from now on; 0 is none.
    ///
    /// # Errors
    /// What the system says, for want of privilege mostly.
    pub fn set_mark(&self, mark: u32) -> io::Result<()> {
        self.others.iter().try_for_each(|other| other.set_mark(mark))?;
        self.socket.set_mark(mark)
    }

    /// Whether the mark asked for in [`Config`] was set.
    #[must_use]
    pub fn is_marked(&self) -> bool {
        self.marked
    }

    /// How far the kernel segments what is sent: less than asked for once it has refused.
    #[must_use]
    pub fn segmentation(&self) -> Segmentation {
        Segmentation::from_word(self.segmentation.load(Ordering::Relaxed))
    }

    /// Whether the kernel joins what is received.
    #[must_use]
    pub fn gathers(&self) -> bool {
        self.gather
    }

    /// Room for about `capacity` datagrams of this socket's size: fewer buffers, but larger ones, if it gathers.
    #[must_use]
    pub fn recv_room(&self, capacity: usize) -> RecvBatch {
        if self.gather {
            let batch = Batch::with_slots(capacity.clamp(1, GATHERED), GATHERED_SIZE, MAX_SEGMENTS);
            RecvBatch::with(batch, self.datagram_size)
        } else {
            RecvBatch::new(capacity, self.datagram_size)
        }
    }

    /// Replaces the content of `batch` by what has arrived, waiting up to `timeout` for the first datagram.
    ///
    /// Returns the number of datagrams; 0 means that `timeout` passed.
    ///
    /// # Errors
    /// [`io::ErrorKind::BrokenPipe`] for good after [`UdpBatch::close`]; other errors are the socket's, and a pending
    /// ICMP error is not one: it is skipped.
    pub fn recv_batch(&self, batch: &mut RecvBatch, timeout: Duration) -> io::Result<usize> {
        batch.clear();
        if let Some(count) = self.try_recv(batch)? {
            return if self.closer.is_closed() { Err(closed()) } else { Ok(count) };
        }
        match self.closer.readable(self.socket.as_fd(), timeout)? {
            Woken::Closed => Err(closed()),
            Woken::TimedOut => Ok(0),
            Woken::Ready => Ok(self.try_recv(batch)?.unwrap_or(0)),
        }
    }

    /// One call; none if nothing has arrived.
    fn try_recv(&self, batch: &mut RecvBatch) -> io::Result<Option<usize>> {
        match batch.fill(&self.socket) {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // An answer to an earlier datagram (port or host unreachable) or a signal; the next call receives again.
            Err(error) if is_transient(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends the datagrams of `batch` that `outgoing` names, in its order.
    ///
    /// Waits a little while the send buffer is full; a datagram that the system refuses is counted and skipped.
    ///
    /// # Panics
    /// If an index is not below the length of `batch`.
    pub fn send_batch(&self, batch: &Batch, outgoing: &[Outgoing]) -> Sent {
        let mut outcome = Sent::default();
        let mut rest = outgoing;
        while !rest.is_empty() {
            let runs = Runs { batch, rest, segmentation: self.segmentation() };
            match sys::sendmmsg(self.socket.as_fd(), runs.clone().map(|run| run.message(batch))) {
                Ok(count) => {
                    let count: usize = runs.take(count.max(1)).map(|run| run.datagrams.len()).sum();
                    outcome.sent += count;
                    rest = &rest[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match self.closer.writable(self.socket.as_fd(), SEND_PATIENCE) {
                        Ok(Woken::Ready) => {}
                        Ok(Woken::TimedOut | Woken::Closed) | Err(_) => {
                            outcome.dropped += rest.len();
                            return outcome;
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if runs.is_refused(&error) => {
                    // The kernel says the same of datagrams that are too long for the interface: one alone tells.
                    let alone = Runs { segmentation: Segmentation::Off, ..runs.clone() }.take(1);
                    match sys::sendmmsg(self.socket.as_fd(), alone.map(|run| run.message(batch))) {
                        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                            let count = runs.clone().next().map_or(1, |run| run.datagrams.len());
                            outcome.failed += count;
                            rest = &rest[count..];
                        }
                        other => {
                            self.segmentation.store(Segmentation::Off as u8, Ordering::Relaxed);
                            let count = usize::from(other.is_ok());
                            outcome.sent += count;
                            rest = &rest[count..];
                        }
                    }
                }
                Err(_) => {
                    let count = runs.clone().next().map_or(1, |run| run.datagrams.len());
                    outcome.failed += count;
                    rest = &rest[count..];
                }
            }
        }
        outcome
    }

    /// Sends one datagram without waiting.
    ///
    /// # Errors
    /// Whatever the system answers; [`io::ErrorKind::WouldBlock`] if the send buffer is full.
    pub fn send_to(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        let message = sys::Message { to, datagrams: std::iter::once(datagram), segment: None };
        sys::sendmmsg(self.socket.as_fd(), std::iter::once(message)).map(drop)
    }

    /// Ends the socket for all threads: blocked receivers wake at once.
    pub fn close(&self) {
        self.closer.close();
    }
}

/// A socket bound and marked as `config` says, and no more: for few datagrams, and with one descriptor. It does not block.
/// [`UdpBatch::adopt`] makes it fast.
///
/// # Errors
/// As [`UdpBatch::bind`].
pub fn plain(config: &Config) -> Result<std::net::UdpSocket, Error> {
    let (socket, _) = open(config, false)?;
    if let Some(mark) = config.mark {
        // Without the privilege it is left off.
        let _ = socket.set_mark(mark);
    }
    Ok(socket.into())
}

fn open(config: &Config, reuse_port: bool) -> Result<(Socket, SocketAddr), Error> {
    let address = config.bind;
    let what = || format!("open a UDP socket on {address}");
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
        .map_err(|error| Error::system(what(), error))?;
    let prepare = || {
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_nonblocking(true)?;
        if config.dont_fragment {
            sys::set_dont_fragment(socket.as_fd(), address.is_ipv6())?;
        }
        socket.set_reuse_port(reuse_port)?;
        socket.bind(&address.into())?;
        socket.local_addr()?.as_socket().ok_or_else(|| io::Error::other("the socket has no IP address"))
    };
    let local = prepare().map_err(|error| {
        if error.kind() == io::ErrorKind::AddrInUse {
            Error::AddressInUse { address }
        } else {
            Error::system(what(), error)
        }
    })?;
    Ok((socket, local))
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::ConnectionReset
    )
}
