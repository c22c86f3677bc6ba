//! UDP sockets that move datagrams in batches, one system call for up to 64, shared by any number of threads.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

use super::sys;
use super::wait::{Closer, Woken};
use crate::Error;
use crate::batch::Batch;
use crate::device::closed;

/// How long a full send buffer may hold a sender up before the rest of its batch is dropped.
const SEND_PATIENCE: Duration = Duration::from_millis(20);

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
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
            receive_buffer: 2 << 20,
            send_buffer: 2 << 20,
            mark: None,
            datagram_size: 2048,
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

/// A bound UDP socket of one address family.
#[derive(Debug)]
pub struct UdpBatch {
    socket: Socket,
    closer: Closer,
    local: SocketAddr,
    marked: bool,
    datagram_size: usize,
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
    truncated: u64,
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
    /// Makes and binds a socket.
    ///
    /// # Errors
    /// [`Error::AddressInUse`] if another socket has the address, [`Error::System`] otherwise.
    pub fn bind(config: &Config) -> Result<Arc<Self>, Error> {
        let address = config.bind;
        let what = || format!("open a UDP socket on {address}");
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))
            .map_err(|error| Error::system(what(), error))?;
        let prepare = || {
            if address.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.set_nonblocking(true)?;
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
        let closer = Closer::new().map_err(|error| Error::system(what(), error))?;
        Ok(Arc::new(Self { socket, closer, local, marked, datagram_size: config.datagram_size }))
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
        self.socket.set_mark(mark)
    }

    /// Whether the mark asked for in [`Config`] was set.
    #[must_use]
    pub fn is_marked(&self) -> bool {
        self.marked
    }

    /// Room for `capacity` datagrams of this socket's size.
    #[must_use]
    pub fn recv_room(&self, capacity: usize) -> RecvBatch {
        RecvBatch::new(capacity, self.datagram_size)
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
            let messages = rest.iter().map(|outgoing| sys::Message {
                to: outgoing.to,
                datagram: &batch.storage()[batch.range(outgoing.index)],
            });
            match sys::sendmmsg(self.socket.as_fd(), messages) {
                Ok(count) => {
                    outcome.sent += count;
                    rest = rest.get(count.max(1)..).unwrap_or_default();
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
                Err(_) => {
                    outcome.failed += 1;
                    rest = &rest[1..];
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
        sys::sendmmsg(self.socket.as_fd(), std::iter::once(sys::Message { to, datagram })).map(drop)
    }

    /// Ends the socket for all threads: blocked receivers wake at once.
    pub fn close(&self) {
        self.closer.close();
    }
}

impl RecvBatch {
    /// Room for `capacity` datagrams of up to `datagram_size` bytes.
    #[must_use]
    pub fn new(capacity: usize, datagram_size: usize) -> Self {
        Self { batch: Batch::new(capacity, datagram_size), sources: Vec::with_capacity(capacity), truncated: 0 }
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

    fn fill(&mut self, socket: &Socket) -> io::Result<usize> {
        let mut lens = [(0, None); sys::MAX_MESSAGES];
        let mut filled = lens.iter_mut();
        let size = self.batch.packet_size();
        let count = sys::recvmmsg(socket.as_fd(), self.batch.vacancies(), |received| {
            if let Some(slot) = filled.next() {
                let whole = !received.truncated && received.len <= size;
                *slot = (received.len.min(size), received.from.filter(|_| whole));
            }
        })?;
        for (len, from) in lens.into_iter().take(count) {
            self.batch.commit(len);
            self.sources.push(from.unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)));
            if from.is_none() {
                self.truncated += 1;
                self.batch.discard(self.batch.len() - 1);
            }
        }
        Ok(count)
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

    #[test]
    fn too_long_datagrams_are_dropped_and_counted() {
        let receiver = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
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
