//! UDP sockets, for tokio.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use super::driver::Shared;
use super::stack::UdpId;
use super::{Bind, Flow};

/// One UDP port over the mesh; dropping it frees the port.
pub struct UdpSocket {
    shared: Arc<Shared>,
    id: UdpId,
    bind: Bind,
}

impl UdpSocket {
    pub(super) fn new(shared: Arc<Shared>, id: UdpId, bind: Bind) -> Self {
        Self { shared, id, bind }
    }

    /// Where this is bound; the port is the one that was found for port 0.
    pub fn bind(&self) -> Bind {
        self.bind
    }

    /// Sends one datagram; never waits.
    ///
    /// # Errors
    /// `InvalidInput` when it exceeds the MTU, `NetworkUnreachable` when we have no address of that family,
    /// `WouldBlock` when the outbox is full.
    pub fn send_to(&self, payload: &[u8], remote: SocketAddr) -> io::Result<()> {
        self.shared.with(|stack, _| stack.send_udp(self.id, remote, payload)).map_err(Into::into)
    }

    /// The next datagram, cut to `buffer`, and who sent it. Safe to cancel.
    ///
    /// # Errors
    /// `NotConnected` when the stack has ended.
    pub async fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let (flow, payload) = self.recv().await?;
        let len = payload.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..len), payload.get(..len)) {
            to.copy_from_slice(from);
        }
        Ok((len, flow.remote))
    }

    /// The next datagram with both of its ends. Safe to cancel.
    ///
    /// # Errors
    /// `NotConnected` when the stack has ended.
    pub async fn recv(&self) -> io::Result<(Flow, Vec<u8>)> {
        let received = poll_fn(|context| self.shared.with(|stack, _| stack.poll_recv_udp(self.id, context.waker())));
        Ok(received.await?)
    }
}

impl fmt::Debug for UdpSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UdpSocket").field("bind", &self.bind).finish_non_exhaustive()
    }
}

impl Drop for UdpSocket {
    fn drop(&mut self) {
        self.shared.with(|stack, _| stack.close_udp(self.id));
    }
}
