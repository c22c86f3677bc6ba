//! TCP streams and listeners, for tokio.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::driver::Shared;
use super::stack::ConnId;
use super::{Bind, Flow};

/// One TCP connection over the mesh.
///
/// Shutting the write side down leaves the read side open. Dropping the stream closes it in the background, as a kernel
/// does: what was written is delivered, and data that nobody will read is answered with a reset.
pub struct TcpStream {
    shared: Arc<Shared>,
    id: ConnId,
    flow: Flow,
}

impl TcpStream {
    /// Takes over `id`, which is released with the stream.
    pub(super) fn new(shared: Arc<Shared>, id: ConnId) -> io::Result<Self> {
        let flow = shared.with(|stack, _| stack.flow(id)).ok_or(io::ErrorKind::NotConnected)?;
        Ok(Self { shared, id, flow })
    }

    /// Waits for the handshake.
    pub(super) async fn established(&self) -> io::Result<()> {
        poll_fn(|context| self.shared.with(|stack, _| stack.poll_connected(self.id, context.waker())))
            .await
            .map_err(|kind| self.error(kind))
    }

    /// The stack, and what this connection is called there.
    pub(super) fn parts(&self) -> (&Shared, ConnId) {
        (&self.shared, self.id)
    }

    /// Our end.
    pub fn local_addr(&self) -> SocketAddr {
        self.flow.local
    }

    /// The peer's end.
    pub fn peer_addr(&self) -> SocketAddr {
        self.flow.remote
    }

    /// Ends the connection with a reset: the peer learns that it did not end well.
    pub fn reset(&self) {
        self.shared.with(|stack, _| stack.reset(self.id));
    }

    fn error(&self, kind: io::ErrorKind) -> io::Error {
        if self.shared.is_closed() {
            return io::Error::new(io::ErrorKind::NotConnected, "the stack has ended");
        }
        io::Error::new(kind, format!("{}: {kind}", self.flow.remote))
    }
}

impl fmt::Debug for TcpStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpStream").field("flow", &self.flow).finish_non_exhaustive()
    }
}

impl Drop for TcpStream {
    fn drop(&mut self) {
        self.shared.with(|stack, now| stack.release(now, self.id));
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let room = buffer.initialize_unfilled();
        match self.shared.with(|stack, now| stack.poll_read(self.id, now, context.waker(), room)) {
            Poll::Ready(Ok(read)) => {
                buffer.advance(read);
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(kind)) => Poll::Ready(Err(self.error(kind))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.shared.with(|stack, _| stack.poll_write(self.id, context.waker(), bytes)).map_err(|kind| self.error(kind))
    }

    /// Bytes are on their way as soon as they are written.
    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|stack, _| stack.shut_down(self.id));
        Poll::Ready(Ok(()))
    }
}

/// Accepts connections on one port; dropping it stops listening.
pub struct TcpListener {
    shared: Arc<Shared>,
    bind: Bind,
}

impl TcpListener {
    pub(super) fn new(shared: Arc<Shared>, bind: Bind) -> Self {
        Self { shared, bind }
    }

    /// Where this listens; the port is the one that was found for port 0.
    pub fn bind(&self) -> Bind {
        self.bind
    }

    /// The next established connection, and who made it. Safe to cancel.
    ///
    /// # Errors
    /// `NotConnected` when the stack has ended.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (id, flow) =
            poll_fn(|context| self.shared.with(|stack, _| stack.poll_accept(self.bind, context.waker()))).await?;
        Ok((TcpStream { shared: Arc::clone(&self.shared), id, flow }, flow.remote))
    }
}

impl fmt::Debug for TcpListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpListener").field("bind", &self.bind).finish_non_exhaustive()
    }
}

impl Drop for TcpListener {
    fn drop(&mut self) {
        self.shared.with(|stack, now| stack.unlisten(now, self.bind));
    }
}
