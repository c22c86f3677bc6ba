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

/// How long a full send buffer may hold a sender up before the rest of its batch is dropped.
const SEND_PATIENCE: Duration = Duration::from_millis(20);

/// The most datagrams and bytes that the kernel segments a message into, with room for the headers of the outer packet.
const MAX_SEGMENTS: usize = 64;
const MAX_SEGMENTED: usize = 65_000;

/// Buffers with [`Config::gather`], and the bytes of each: whatever the kernel joins fits. Memory is touched only as far
/// as something was received there.
const GATHERED: usize = sys::MAX_MESSAGES;
const GATHERED_SIZE: usize = 1 << 16;

/// About as many bytes are received in one call: what is worked on at once stays in the cache, and what came first goes
/// on before the last is looked at.
const RECEIVED_AT_ONCE: usize = 128 << 10;
const MIN_OFFERED: usize = 2;

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

/// Datagrams received in one call, and whence each came.
#[derive(Debug)]
pub struct RecvBatch {
    batch: Batch,
    sources: Vec<SocketAddr>,
    datagram_size: usize,
    truncated: u64,
    /// How many buffers the next call gets: fewer while the kernel joins much.
    offered: usize,
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

    fn bind_one(config: &Config, closer: &Arc<Closer>, reuse_port: bool) -> Result<Self, Error> {
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
        Ok(Self { socket, closer, others, local, marked, datagram_size, segmentation, gather })
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

/// What is to be sent, cut into messages.
#[derive(Clone)]
struct Runs<'a> {
    batch: &'a Batch,
    rest: &'a [Outgoing],
    segmentation: Segmentation,
}

/// Datagrams that leave in one message.
struct Run<'a> {
    to: SocketAddr,
    datagrams: &'a [Outgoing],
    segment: Option<u16>,
}

impl Runs<'_> {
    /// Whether the system refused to segment the first run, rather than one of its datagrams.
    fn is_refused(&self, error: &io::Error) -> bool {
        let code = error.raw_os_error();
        matches!(code, Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE | libc::EOPNOTSUPP))
            && self.clone().next().is_some_and(|run| run.segment.is_some())
    }
}

impl<'a> Iterator for Runs<'a> {
    type Item = Run<'a>;

    fn next(&mut self) -> Option<Run<'a>> {
        let first = self.rest.first()?;
        let segment = self.batch.range(first.index).len();
        let (mut count, mut total) = (1, segment);
        if self.segmentation != Segmentation::Off {
            for next in &self.rest[1..] {
                let len = self.batch.range(next.index).len();
                let shorter = len != segment;
                let fits = next.to == first.to && count < MAX_SEGMENTS && total + len <= MAX_SEGMENTED;
                if !fits || len > segment || len == 0 || (shorter && self.segmentation == Segmentation::Equal) {
                    break;
                }
                (count, total) = (count + 1, total + len);
                if shorter {
                    break;
                }
            }
        }
        let (datagrams, rest) = self.rest.split_at(count);
        self.rest = rest;
        let segment = u16::try_from(segment).ok().filter(|_| count > 1);
        Some(Run { to: first.to, datagrams, segment })
    }
}

impl<'a> Run<'a> {
    fn message(self, batch: &'a Batch) -> sys::Message<impl ExactSizeIterator<Item = &'a [u8]>> {
        let datagrams = self.datagrams.iter().map(|outgoing| &batch.storage()[batch.range(outgoing.index)]);
        sys::Message { to: self.to, datagrams, segment: self.segment }
    }
}

impl RecvBatch {
    /// Room for `capacity` datagrams of up to `datagram_size` bytes.
    #[must_use]
    pub fn new(capacity: usize, datagram_size: usize) -> Self {
        Self::with(Batch::new(capacity, datagram_size), datagram_size)
    }

    fn with(batch: Batch, datagram_size: usize) -> Self {
        let sources = Vec::with_capacity(batch.capacity() * MAX_SEGMENTS);
        Self { batch, sources, datagram_size, truncated: 0, offered: MIN_OFFERED }
    }

    /// The datagrams, to be opened in place.
    #[must_use]
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// The datagrams, to be opened in place.
    pub fn batch_mut(&mut self) -> &mut Batch {
        &mut self.batch
    }

    /// How many datagrams are in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.batch.len()
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Who sent the datagram at `index`.
    ///
    /// # Panics
    /// If `index` is not below [`RecvBatch::len`].
    #[must_use]
    pub fn source(&self, index: usize) -> SocketAddr {
        self.sources[index]
    }

    /// How many datagrams were dropped so far because they were longer than their slot.
    #[must_use]
    pub fn truncated(&self) -> u64 {
        self.truncated
    }

    fn clear(&mut self) {
        self.batch.clear();
        self.sources.clear();
    }

    /// One call; returns the number of datagrams.
    fn fill(&mut self, socket: &Socket) -> io::Result<usize> {
        let mut messages = [None; sys::MAX_MESSAGES];
        let mut filled = messages.iter_mut();
        let count = sys::recvmmsg(socket.as_fd(), self.batch.vacancies().take(self.offered), |received| {
            if let Some(slot) = filled.next() {
                *slot = Some(received);
            }
        })?;
        let before = self.batch.len();
        let bytes: usize = messages.iter().flatten().map(|received| received.len).sum();
        self.offered = (RECEIVED_AT_ONCE * count / bytes.max(1)).clamp(MIN_OFFERED, GATHERED);
        for received in messages.into_iter().take(count).flatten() {
            let segment = received.segment.unwrap_or(received.len).min(received.len);
            let whole = !received.truncated && segment <= self.datagram_size;
            match received.from.filter(|_| whole) {
                Some(from) if segment > 0 => {
                    self.batch.commit_many(received.len, segment);
                    self.sources.resize(self.batch.len(), from);
                }
                from => {
                    // An empty datagram says nothing either.
                    self.batch.commit(0);
                    self.sources.push(from.unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)));
                    self.truncated += u64::from(from.is_none());
                }
            }
        }
        Ok(self.batch.len() - before)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn a_batch_arrives_whole_and_in_order() {
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(receiver) = UdpBatch::bind(&Config::bound_to(bind.parse().unwrap())) else {
                assert!(bind.starts_with('['), "IPv4 loopback is always there");
                continue;
            };
            let sender = UdpBatch::bind(&Config::bound_to(bind.parse().unwrap())).unwrap();
            let mut batch = Batch::new(100, 2048);
            let outgoing: Vec<_> = (0..100)
                .map(|index| {
                    assert!(batch.push(&vec![u8::try_from(index).unwrap(); 10 + index]));
                    Outgoing { to: receiver.local_addr(), index }
                })
                .collect();
            assert_eq!(sender.send_batch(&batch, &outgoing), Sent { sent: 100, failed: 0, dropped: 0 });
            let (mut room, mut seen) = (receiver.recv_room(64), 0);
            while seen < 100 {
                let count = receiver.recv_batch(&mut room, SOON).unwrap();
                assert_ne!(count, 0, "{seen} of 100 arrived");
                for index in 0..count {
                    assert_eq!(room.batch().packet(index), batch.packet(seen));
                    assert_eq!(room.source(index), sender.local_addr());
                    seen += 1;
                }
            }
        }
    }

    /// Loopback sockets in every combination of what the kernel may do for us.
    fn pairs() -> impl Iterator<Item = (Arc<UdpBatch>, Arc<UdpBatch>)> {
        let modes = [Segmentation::Off, Segmentation::Equal, Segmentation::Full];
        modes.into_iter().flat_map(|segmentation| [false, true].map(|gather| (segmentation, gather))).map(
            |(segmentation, gather)| {
                let loopback = Config::bound_to("127.0.0.1:0".parse().unwrap());
                let sender = UdpBatch::bind(&Config { segmentation, ..loopback.clone() }).unwrap();
                (sender, UdpBatch::bind(&Config { gather, ..loopback }).unwrap())
            },
        )
    }

    /// Sends datagrams of these lengths and checks that they arrive whole and in order.
    fn exchange(sender: &UdpBatch, receiver: &UdpBatch, lens: &[usize]) {
        let mut batch = Batch::new(lens.len(), 2048);
        let mut outgoing = Vec::new();
        for (index, len) in lens.iter().enumerate() {
            let fill: Vec<_> = (0..*len).map(|at| u8::try_from((at + 31 * index) % 251).unwrap()).collect();
            assert!(batch.push(&fill));
            outgoing.push(Outgoing { to: receiver.local_addr(), index });
        }
        assert_eq!(sender.send_batch(&batch, &outgoing), Sent { sent: lens.len(), failed: 0, dropped: 0 });
        let (mut room, mut seen) = (receiver.recv_room(64), 0);
        while seen < lens.len() {
            let count = receiver.recv_batch(&mut room, SOON).unwrap();
            assert_ne!(count, 0, "{seen} of {} arrived", lens.len());
            assert_eq!(count, room.len());
            for index in 0..count {
                assert_eq!(room.batch().packet(index), batch.packet(seen), "datagram {seen}");
                assert_eq!(room.source(index), sender.local_addr());
                seen += 1;
            }
        }
    }

    #[test]
    fn whatever_the_kernel_does_for_us_datagrams_are_the_same() {
        for (sender, receiver) in pairs() {
            let asked = sender.segmentation();
            exchange(&sender, &receiver, &[1312; 60]);
            exchange(&sender, &receiver, &[1312, 1312, 1312, 400, 1312, 1312, 64, 64, 64, 65, 1312, 1311, 1312]);
            exchange(&sender, &receiver, &[&[32; 200][..], &[2048; 40], &[1], &[2, 1]].concat());
            assert_eq!(sender.segmentation(), asked, "nothing was refused");
        }
    }

    #[test]
    fn runs_end_with_receiver_length_and_what_the_kernel_takes() {
        let mut batch = Batch::new(200, 2048);
        let lens = [&[1000; 70][..], &[400, 400, 500], &[1500; 50]].concat();
        let to = |index| SocketAddr::from(([127, 0, 0, 1], if index == 1 { 9 } else { 8 }));
        let outgoing: Vec<_> = lens
            .iter()
            .enumerate()
            .map(|(index, len)| {
                assert!(batch.push(&vec![0; *len]));
                Outgoing { to: to(index), index }
            })
            .collect();
        let runs = |segmentation| {
            let runs = Runs { batch: &batch, rest: &outgoing, segmentation };
            runs.map(|run| (run.datagrams.len(), run.segment.unwrap_or(0))).collect::<Vec<_>>()
        };
        assert_eq!(
            runs(Segmentation::Full),
            [(1, 0), (1, 0), (64, 1000), (5, 1000), (1, 0), (1, 0), (43, 1500), (7, 1500)]
        );
        assert_eq!(
            runs(Segmentation::Equal),
            [(1, 0), (1, 0), (64, 1000), (4, 1000), (2, 400), (1, 0), (43, 1500), (7, 1500)]
        );
        assert_eq!(runs(Segmentation::Off), vec![(1, 0); lens.len()]);
    }

    #[test]
    fn refused_segments_are_sent_again_one_by_one_for_good() {
        // Loopback segments in software unless the socket sends without checksums: that, EIO refuses.
        let sender = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
        let receiver = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
        sys::set_no_check(sender.socket.as_fd()).unwrap();
        exchange(&sender, &receiver, &[700; 20]);
        assert_eq!(sender.segmentation(), Segmentation::Off);
        exchange(&sender, &receiver, &[700; 20]);
    }

    #[test]
    fn kernels_that_damage_a_shorter_last_segment_are_known() {
        for (release, expected) in [
            ("6.18.44-fc-v669", Segmentation::Full),
            ("7.0.0", Segmentation::Equal),
            ("7.0-rc3", Segmentation::Equal),
            ("7.1.4-1-arch", Segmentation::Equal),
            ("7.1.5", Segmentation::Full),
            ("7.2.0", Segmentation::Full),
            ("", Segmentation::Full),
        ] {
            assert_eq!(Segmentation::of_kernel(kernel::version(release)), expected, "{release}");
        }
    }

    #[test]
    fn too_long_datagrams_are_dropped_and_counted() {
        for gather in [false, true] {
            too_long_datagrams(gather);
        }
    }

    fn too_long_datagrams(gather: bool) {
        let loopback = Config::bound_to("127.0.0.1:0".parse().unwrap());
        let receiver = UdpBatch::bind(&Config { gather, ..loopback }).unwrap();
        let sender = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
        sender.send_to(&[1; 4000], receiver.local_addr()).unwrap();
        let mut room = receiver.recv_room(4);
        assert_eq!(receiver.recv_batch(&mut room, SOON).unwrap(), 1);
        assert_eq!((room.batch().packet(0), room.truncated()), (b"".as_slice(), 1));
    }

    #[test]
    fn closing_wakes_a_blocked_receiver_for_good() {
        let socket = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
        std::thread::scope(|scope| {
            let blocked = scope.spawn(|| socket.recv_batch(&mut socket.recv_room(1), Duration::from_secs(3600)));
            socket.close();
            assert_eq!(blocked.join().unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        });
        assert!(socket.recv_batch(&mut socket.recv_room(1), SOON).is_err());
    }

    #[test]
    fn an_idle_socket_times_out() {
        let socket = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
        assert_eq!(socket.recv_batch(&mut socket.recv_room(1), Duration::from_millis(1)).unwrap(), 0);
    }

    #[test]
    fn a_taken_port_says_so_and_what_to_do() {
        let taken = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
        let error = UdpBatch::bind(&Config::bound_to(taken.local_addr())).unwrap_err();
        assert!(matches!(error, Error::AddressInUse { .. }), "{error}");
        assert!(error.to_string().contains("--port"), "{error}");
    }

    #[test]
    fn senders_keep_to_one_of_the_sockets_on_an_address() {
        let config = Config { sockets: 3, ..Config::bound_to("127.0.0.1:0".parse().unwrap()) };
        let group = UdpBatch::bind(&config).unwrap();
        assert_eq!(group.others().len(), 2);
        let members: Vec<_> = (0..3).map(|number| group.member(number)).collect();
        assert!(members.iter().all(|member| member.local_addr() == group.local_addr()));
        assert!(std::ptr::eq(group.member(4), group.member(1)));
        let taken = UdpBatch::bind(&Config { bind: group.local_addr(), ..config }).unwrap_err();
        assert!(matches!(taken, Error::AddressInUse { .. }), "another group does not mix with this one: {taken}");
        let senders: Vec<_> = (0..24).map(|_| std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        for sequence in 0..5_u8 {
            for sender in &senders {
                sender.send_to(&[sequence], group.local_addr()).unwrap();
            }
        }
        let mut heard = std::collections::BTreeMap::<_, Vec<_>>::new();
        for (number, member) in members.iter().enumerate() {
            let mut room = member.recv_room(64);
            while member.recv_batch(&mut room, Duration::from_millis(20)).unwrap() > 0 {
                for index in 0..room.len() {
                    let sequence = room.batch().packet(index)[0];
                    heard.entry(room.source(index)).or_default().push((number, sequence));
                }
            }
        }
        assert_eq!(heard.len(), senders.len());
        for (sender, heard) in &heard {
            let expected: Vec<_> = (0..5).map(|sequence| (heard[0].0, sequence)).collect();
            assert_eq!(*heard, expected, "{sender}");
        }
        let used: std::collections::BTreeSet<_> = heard.values().map(|heard| heard[0].0).collect();
        assert!(used.len() > 1, "the kernel spreads senders");
        // Answers come from the common port, whichever socket sends them.
        members[2].send_to(b"answer", senders[0].local_addr().unwrap()).unwrap();
        assert_eq!(senders[0].recv_from(&mut [0; 9]).unwrap().1, group.local_addr());
        group.close();
        for member in members {
            assert!(member.recv_batch(&mut member.recv_room(1), Duration::from_secs(60)).is_err());
        }
    }

    #[test]
    fn a_refused_datagram_does_not_hold_up_the_others() {
        let socket = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
        let mut batch = Batch::new(2, 64);
        assert!(batch.push(b"one") && batch.push(b"two"));
        let to_v6 = Outgoing { to: "[::1]:9".parse().unwrap(), index: 0 };
        let good = Outgoing { to: socket.local_addr(), index: 1 };
        assert_eq!(socket.send_batch(&batch, &[to_v6, good]), Sent { sent: 1, failed: 1, dropped: 0 });
        let mut room = socket.recv_room(2);
        assert_eq!(socket.recv_batch(&mut room, SOON).unwrap(), 1);
        assert_eq!(room.batch().packet(0), b"two");
    }

    #[test]
    fn a_port_that_nobody_listens_on_does_not_end_the_socket() {
        let socket = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
        let gone = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap().local_addr();
        socket.send_to(b"anyone?", gone).unwrap();
        socket.send_to(b"me", socket.local_addr()).unwrap();
        let mut room = socket.recv_room(2);
        let count = (0..3).map(|_| socket.recv_batch(&mut room, SOON).unwrap()).find(|count| *count > 0);
        assert_eq!((count, room.batch().packet(0)), (Some(1), b"me".as_slice()));
    }
}
