//! A TCP connection over the mesh, spliced to a local socket: see [`stack::splice`](super::stack).

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustix::net::Shutdown;

use super::TcpStream;
use super::driver::Shared;
use super::stack::{ConnId, Half, Local};

impl Local for tokio::net::TcpStream {
    fn read(&self, room: &mut [u8]) -> io::Result<usize> {
        self.try_read(room)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.try_write(bytes)
    }

    fn end(&self) -> io::Result<()> {
        match rustix::net::shutdown(self, Shutdown::Write) {
            // The other side has gone, and will not miss it.
            Err(rustix::io::Errno::NOTCONN) => Ok(()),
            outcome => outcome.map_err(Into::into),
        }
    }
}

/// Takes the local socket from the stack again, however the splicing ends.
struct Spliced<'a> {
    shared: &'a Shared,
    id: ConnId,
}

impl Drop for Spliced<'_> {
    fn drop(&mut self) {
        self.shared.with(|stack, _| stack.unsplice(self.id));
    }
}

impl TcpStream {
    /// Moves bytes both ways until both sides have ended, each by itself. Half-closed sides are told of each other.
    ///
    /// # Errors
    /// Those of either side, which leave the other one as it is.
    pub(crate) async fn splice(&self, local: &Arc<tokio::net::TcpStream>) -> io::Result<()> {
        let (shared, id) = self.parts();
        shared.with(|stack, _| stack.splice(id, Arc::clone(local) as Arc<dyn Local>));
        let spliced = Spliced { shared, id };
        poll_fn(|context| spliced.poll(context, local)).await
    }
}

impl Spliced<'_> {
    fn poll(&self, context: &mut Context<'_>, local: &tokio::net::TcpStream) -> Poll<io::Result<()>> {
        loop {
            let halves = self.shared.with(|stack, now| stack.poll_splice(now, self.id, context.waker()))?;
            let both = [halves.inward, halves.outward];
            if both == [Half::Done; 2] {
                return Poll::Ready(Ok(()));
            }
            // Whoever finds the local socket not ready in the meantime changes nothing here: this task is then woken.
            let writable = halves.inward == Half::Local && local.poll_write_ready(context)?.is_ready();
            let readable = halves.outward == Half::Local && local.poll_read_ready(context)?.is_ready();
            if both.contains(&Half::Turn) {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            if !writable && !readable {
                return Poll::Pending;
            }
        }
    }
}
