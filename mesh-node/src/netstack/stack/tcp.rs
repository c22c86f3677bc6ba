//! What a TCP stream asks of the stack.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::task::{Poll, Waker};
use std::time::Instant;

use rand::RngExt as _;
use smoltcp::iface::SocketSet;
use smoltcp::socket::Socket as AnySocket;
use smoltcp::socket::tcp::{CongestionControl, RecvError, Socket, SocketBuffer, State};
use smoltcp::wire::{IpEndpoint, IpListenEndpoint};

use super::{Arrival, Conn, ConnId, DYNAMIC_PORTS, HALF_OPEN_TIME, LINGER_TIME, MAX_HALF_OPEN, Origin, Stack};
use crate::netstack::is_service_address;
use crate::netstack::packet::Flow;
use crate::netstack::recovery::Recovery;
use crate::netstack::window::Window;

/// Buffers, each way, of connections beyond the budget.
const SMALL_BUFFER: usize = 512 * 1024;
/// Sockets kept for the next connections.
const SPARE_SOCKETS: usize = 32;
/// What a short connection moves at most: so much memory a spare socket may hold.
const MOVED_BY_SHORT: usize = 256 * 1024;

impl Stack {
    /// Starts connecting; [`poll_connected`](Self::poll_connected) tells how it went.
    pub(in crate::netstack) fn connect(&mut self, remote: SocketAddr) -> Result<ConnId, ErrorKind> {
        if remote.port() == 0 || remote.ip().is_unspecified() || remote.ip().is_multicast() {
            return Err(ErrorKind::InvalidInput);
        }
        let source = self.source_for(remote.ip()).ok_or(ErrorKind::NetworkUnreachable)?;
        let local = self.free_port(|stack, port| {
            let flow = Flow { local: SocketAddr::new(source, port), remote };
            !stack.flows.contains_key(&flow)
        });
        let local = SocketAddr::new(source, local.ok_or(ErrorKind::AddrInUse)?);
        if !self.make_room() {
            return Err(ErrorKind::ResourceBusy);
        }
        let mut socket = self.socket();
        let (to, from) = (IpEndpoint::from(remote), IpEndpoint::from(local));
        socket.connect(self.iface.context(), to, from).map_err(|_| ErrorKind::InvalidInput)?;
        let id = self.insert(Flow { local, remote }, Origin::Dialed, socket);
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.attached = true;
        }
        self.touch(id);
        Ok(id)
    }

    /// Admits a parked SYN: the handshake goes on, the connection is the caller's.
    pub(in crate::netstack) fn admit(&mut self, now: Instant, flow: Flow) -> Result<ConnId, ErrorKind> {
        let syn = self.parked.remove(&flow).ok_or(ErrorKind::NotFound)?;
        if self.flows.contains_key(&flow) || !self.open_passive(now, flow, Origin::Admitted, &syn) {
            return Err(ErrorKind::ResourceBusy);
        }
        let id = *self.flows.get(&flow).ok_or(ErrorKind::ConnectionReset)?;
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.attached = true;
        }
        Ok(id)
    }

    /// Answers a parked SYN with a reset.
    pub(in crate::netstack) fn refuse_tcp(&mut self, now: Instant, flow: Flow) {
        if let Some(syn) = self.parked.remove(&flow) {
            self.feed(now, None, Arrival::one(&syn));
        }
    }

    /// Drops a parked SYN without an answer; the peer will ask again.
    pub(in crate::netstack) fn forget(&mut self, flow: Flow) {
        self.parked.remove(&flow);
    }

    /// Answers a whole packet as a stack without that socket does: port unreachable, or reset.
    pub(in crate::netstack) fn refuse_packet(&mut self, now: Instant, packet: &[u8]) {
        self.feed(now, None, Arrival::one(packet));
    }

    pub(super) fn open_passive(&mut self, now: Instant, flow: Flow, origin: Origin, syn: &[u8]) -> bool {
        if self.half_open >= MAX_HALF_OPEN || !self.make_room() {
            return false;
        }
        let mut socket = self.socket();
        if socket.listen(IpListenEndpoint::from(IpEndpoint::from(flow.local))).is_err() {
            return false;
        }
        let id = self.insert(flow, origin, socket);
        self.half_open += 1;
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.expires = Some(now + HALF_OPEN_TIME);
        }
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.note_syn(syn);
        }
        self.feed(now, Some(id), Arrival::one(syn));
        true
    }

    pub(super) fn insert(&mut self, flow: Flow, origin: Origin, socket: Socket<'static>) -> ConnId {
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let (receives, sends) = (socket.recv_capacity(), socket.send_capacity());
        self.buffers += receives + sends;
        let handle = sockets.add(socket);
        let id = ConnId(self.next_id);
        self.next_id += 1;
        let conn = Conn {
            sockets,
            handle,
            flow,
            origin,
            attached: false,
            established: false,
            shut: false,
            queued: false,
            deadline: None,
            expires: None,
            time_wait_since: None,
            recovery: Recovery::default(),
            receives: Window::new(receives),
            sends: Window::new(sends),
            scale: None,
            buffers: receives + sends,
            moved: 0,
            unanswered: 0,
            splice: None,
        };
        self.conns.insert(id, conn);
        self.flows.insert(flow, id);
        id
    }

    /// A socket with buffers as large as the budget allows; one that was used before if there is one.
    pub(super) fn socket(&mut self) -> Socket<'static> {
        let (receive, send) = (self.config.receive_buffer, self.config.send_buffer);
        let large = self.buffers + receive + send <= self.config.buffer_budget;
        let buffer = |size: usize| SocketBuffer::new(vec![0; if large { size } else { size.min(SMALL_BUFFER) }]);
        let spare = if large { self.spare.pop() } else { None };
        let mut socket = spare.unwrap_or_else(|| Socket::new(buffer(receive), buffer(send)));
        socket.set_congestion_control(CongestionControl::Cubic);
        socket.set_nagle_enabled(false);
        socket.set_timeout(Some(self.config.silence.into()));
        socket.set_keep_alive(self.config.keep_alive.map(Into::into));
        socket
    }

    /// Keeps the socket of a connection that was short: zeroing megabytes for the next one takes longer than it may last.
    /// Those whose buffers hold memory are given back.
    pub(super) fn keep_socket(&mut self, conn: &mut Conn) {
        let large = conn.buffers == self.config.receive_buffer + self.config.send_buffer;
        if large
            && conn.moved <= MOVED_BY_SHORT
            && self.spare.len() < SPARE_SOCKETS
            && let AnySocket::Tcp(mut socket) = conn.sockets.remove(conn.handle)
        {
            socket.abort();
            self.spare.push(socket);
        }
    }

    /// Whether one more connection fits, letting an old one in TIME-WAIT go if it must.
    pub(super) fn make_room(&mut self) -> bool {
        if self.conns.len() >= self.config.max_connections
            && let Some(oldest) = self.time_wait.first().copied()
        {
            self.remove(oldest);
        }
        self.conns.len() < self.config.max_connections
    }

    /// The address to talk to `remote` from.
    pub(super) fn source_for(&self, remote: IpAddr) -> Option<IpAddr> {
        let family = |address: &&IpAddr| address.is_ipv4() == remote.is_ipv4();
        let mut own = self.addresses.iter().filter(family);
        own.find(|address| !is_service_address(**address)).or_else(|| self.addresses.iter().find(family)).copied()
    }

    pub(super) fn free_port(&mut self, free: impl Fn(&Self, u16) -> bool) -> Option<u16> {
        (0..256).find_map(|_| {
            let port = self.rng.random_range(DYNAMIC_PORTS);
            free(self, port).then_some(port)
        })
    }

    /// Ready when the handshake is done, or has failed.
    pub(in crate::netstack) fn poll_connected(&mut self, id: ConnId, waker: &Waker) -> Poll<Result<(), ErrorKind>> {
        let Some(conn) = self.conns.get_mut(&id) else { return Poll::Ready(Err(ErrorKind::NotConnected)) };
        match conn.state() {
            State::SynSent | State::SynReceived => {
                conn.socket().register_send_waker(waker);
                Poll::Pending
            }
            State::Closed | State::Listen if !conn.established => Poll::Ready(Err(ErrorKind::ConnectionRefused)),
            State::Closed
            | State::Listen
            | State::Established
            | State::FinWait1
            | State::FinWait2
            | State::CloseWait
            | State::Closing
            | State::LastAck
            | State::TimeWait => Poll::Ready(Ok(())),
        }
    }

    /// Reads into `buffer`; zero bytes mean that the peer has closed its side.
    pub(in crate::netstack) fn poll_read(
        &mut self,
        id: ConnId,
        now: Instant,
        waker: &Waker,
        buffer: &mut [u8],
    ) -> Poll<Result<usize, ErrorKind>> {
        let Some(conn) = self.conns.get_mut(&id) else { return Poll::Ready(Err(ErrorKind::NotConnected)) };
        let connecting = matches!(conn.state(), State::SynSent | State::SynReceived);
        let socket = conn.socket();
        if connecting {
            socket.register_recv_waker(waker);
            return Poll::Pending;
        }
        match socket.recv_slice(buffer) {
            Ok(0) => {
                socket.register_recv_waker(waker);
                Poll::Pending
            }
            Ok(read) => {
                conn.moved += read;
                conn.receives.pass(now, read, conn.recovery.shortest_round_trip());
                self.touch(id);
                Poll::Ready(Ok(read))
            }
            Err(RecvError::Finished) => Poll::Ready(Ok(0)),
            Err(RecvError::InvalidState) => Poll::Ready(Err(ErrorKind::ConnectionReset)),
        }
    }

    /// Queues as much of `bytes` as there is room for.
    pub(in crate::netstack) fn poll_write(
        &mut self,
        id: ConnId,
        waker: &Waker,
        bytes: &[u8],
    ) -> Poll<Result<usize, ErrorKind>> {
        let Some(conn) = self.conns.get_mut(&id) else { return Poll::Ready(Err(ErrorKind::NotConnected)) };
        if conn.shut {
            return Poll::Ready(Err(ErrorKind::BrokenPipe));
        }
        match conn.state() {
            State::SynSent | State::SynReceived => {
                conn.socket().register_send_waker(waker);
                Poll::Pending
            }
            State::Established | State::CloseWait => {
                let room = conn.sends.limit().saturating_sub(conn.socket().send_queue());
                match conn.socket().send_slice(&bytes[..bytes.len().min(room)]) {
                    Ok(0) => {
                        conn.socket().register_send_waker(waker);
                        Poll::Pending
                    }
                    Ok(written) => {
                        conn.moved += written;
                        self.touch(id);
                        Poll::Ready(Ok(written))
                    }
                    Err(_) => Poll::Ready(Err(ErrorKind::BrokenPipe)),
                }
            }
            State::Closed
            | State::Listen
            | State::FinWait1
            | State::FinWait2
            | State::Closing
            | State::LastAck
            | State::TimeWait => Poll::Ready(Err(ErrorKind::ConnectionReset)),
        }
    }

    /// Closes our side: the peer reads to the end of what was written.
    pub(in crate::netstack) fn shut_down(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(&id)
            && !conn.shut
        {
            conn.shut = true;
            conn.socket().close();
            self.touch(id);
        }
    }

    /// Ends the connection with a reset.
    pub(in crate::netstack) fn reset(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.shut = true;
            if conn.state() != State::TimeWait {
                conn.socket().abort();
            }
            self.touch(id);
        }
    }

    /// The caller lets go: what was written is still delivered.
    pub(in crate::netstack) fn release(&mut self, now: Instant, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.attached = false;
        conn.splice = None;
        conn.expires = Some(now + LINGER_TIME);
        if conn.socket().can_recv() && conn.state() != State::Closed {
            conn.socket().abort();
        } else {
            conn.socket().close();
        }
        self.touch(id);
    }

    /// Both ends of a connection.
    pub(in crate::netstack) fn flow(&self, id: ConnId) -> Option<Flow> {
        self.conns.get(&id).map(|conn| conn.flow)
    }
}
