//! Listeners and UDP sockets: what is found by a port.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::task::{Poll, Waker};
use std::time::Instant;

use super::{ConnId, Stack, UdpId};
use crate::netstack::Bind;
use crate::netstack::packet::{self, Flow};
use crate::netstack::parcel::Parcel;

/// Connections that wait for `accept`.
#[derive(Debug, Default)]
pub(super) struct Listener {
    pub(super) queue: VecDeque<ConnId>,
    pub(super) backlog: usize,
    pub(super) waker: Option<Waker>,
}

/// Datagrams that wait to be received.
#[derive(Debug)]
pub(super) struct Udp {
    pub(super) bind: Bind,
    pub(super) queue: VecDeque<(Flow, Vec<u8>)>,
    pub(super) waker: Option<Waker>,
}

impl Stack {
    /// Starts listening; port 0 takes a free one. Says where.
    pub(in crate::netstack) fn listen(&mut self, bind: Bind, backlog: usize) -> Result<Bind, ErrorKind> {
        let bind = match bind.port {
            0 => {
                let port = self.free_port(|stack, port| !stack.listeners.keys().any(|b| b.port == port));
                Bind { port: port.ok_or(ErrorKind::AddrInUse)?, ..bind }
            }
            _ => bind,
        };
        if self.listeners.contains_key(&bind) {
            return Err(ErrorKind::AddrInUse);
        }
        self.listeners.insert(bind, Listener { backlog: backlog.max(1), ..Listener::default() });
        Ok(bind)
    }

    pub(super) fn listener_for(&self, local: SocketAddr) -> Option<Bind> {
        let candidates = [Bind::exactly(local), Bind::port(local.port())];
        candidates.into_iter().find(|bind| self.listeners.contains_key(bind))
    }

    /// The next established connection.
    pub(in crate::netstack) fn poll_accept(
        &mut self,
        bind: Bind,
        waker: &Waker,
    ) -> Poll<Result<(ConnId, Flow), ErrorKind>> {
        let Some(listener) = self.listeners.get_mut(&bind) else { return Poll::Ready(Err(ErrorKind::NotConnected)) };
        while let Some(id) = listener.queue.pop_front() {
            if let Some(conn) = self.conns.get(&id) {
                return Poll::Ready(Ok((id, conn.flow)));
            }
        }
        listener.waker = Some(waker.clone());
        Poll::Pending
    }

    /// Stops listening; connections that nobody accepted are reset.
    pub(in crate::netstack) fn unlisten(&mut self, now: Instant, bind: Bind) {
        let Some(listener) = self.listeners.remove(&bind) else { return };
        for id in listener.queue {
            self.reset(id);
            self.release(now, id);
        }
    }

    /// Binds a UDP socket; port 0 takes a free one.
    pub(in crate::netstack) fn bind_udp(&mut self, bind: Bind) -> Result<(UdpId, Bind), ErrorKind> {
        let bind = match bind.port {
            0 => {
                let port = self.free_port(|stack, port| !stack.udp_ports.keys().any(|b| b.port == port));
                Bind { port: port.ok_or(ErrorKind::AddrInUse)?, ..bind }
            }
            _ => bind,
        };
        if self.udp_ports.contains_key(&bind) {
            return Err(ErrorKind::AddrInUse);
        }
        let id = UdpId(self.next_id);
        self.next_id += 1;
        self.udp_ports.insert(bind, id);
        self.udp.insert(id, Udp { bind, queue: VecDeque::new(), waker: None });
        Ok((id, bind))
    }

    /// Sends one datagram from a bound socket.
    pub(in crate::netstack) fn send_udp(
        &mut self,
        id: UdpId,
        remote: SocketAddr,
        payload: &[u8],
    ) -> Result<(), ErrorKind> {
        let bind = self.udp.get(&id).ok_or(ErrorKind::NotConnected)?.bind;
        let source = match bind.address {
            Some(address) => address,
            None => self.source_for(remote.ip()).ok_or(ErrorKind::NetworkUnreachable)?,
        };
        self.send_datagram(Flow { local: SocketAddr::new(source, bind.port), remote }, payload)
    }

    /// Sends one datagram from any of our addresses and ports.
    pub(in crate::netstack) fn send_datagram(&mut self, flow: Flow, payload: &[u8]) -> Result<(), ErrorKind> {
        if flow.remote.port() == 0 || flow.remote.ip().is_unspecified() || flow.remote.ip().is_multicast() {
            return Err(ErrorKind::InvalidInput);
        }
        let packet = packet::build_udp(flow, payload, self.phy.mtu()).ok_or(ErrorKind::InvalidInput)?;
        if !self.phy.has_room() {
            self.drops.datagrams += 1;
            return Err(ErrorKind::WouldBlock);
        }
        self.phy.push(Parcel::whole(packet));
        Ok(())
    }

    /// Answers an echo request in the name of its destination.
    pub(in crate::netstack) fn answer_echo(&mut self, mut packet: Vec<u8>, message: usize) {
        if self.phy.has_room() {
            packet::echo_reply(&mut packet, message);
            self.phy.push(Parcel::whole(packet));
        } else {
            self.drops.datagrams += 1;
        }
    }

    /// The next datagram.
    pub(in crate::netstack) fn poll_recv_udp(
        &mut self,
        id: UdpId,
        waker: &Waker,
    ) -> Poll<Result<(Flow, Vec<u8>), ErrorKind>> {
        let Some(socket) = self.udp.get_mut(&id) else { return Poll::Ready(Err(ErrorKind::NotConnected)) };
        match socket.queue.pop_front() {
            Some(datagram) => Poll::Ready(Ok(datagram)),
            None => {
                socket.waker = Some(waker.clone());
                Poll::Pending
            }
        }
    }

    /// Frees a UDP socket's port.
    pub(in crate::netstack) fn close_udp(&mut self, id: UdpId) {
        if let Some(socket) = self.udp.remove(&id) {
            self.udp_ports.remove(&socket.bind);
        }
    }
}
