//! A TCP connection over the mesh, spliced to a local socket: the task's part.
//!
//! The runtime watches the socket only while a direction waits for it. Watched all the time, each arrival there would wake
//! a thread for bytes that the next acknowledgement fetches anyhow.

use std::future::poll_fn;
use std::io;
use std::net::{Shutdown, TcpStream as LocalStream};
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::Interest;

use super::TcpStream;
use super::driver::Shared;
use super::stack::{ConnId, Half, Halves, Local};

/// One that does not block.
impl Local for LocalStream {
    fn read(&self, room: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &*self, room)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(&mut &*self, bytes)
    }

    fn end(&self) -> io::Result<()> {
        match self.shutdown(Shutdown::Write) {
            // The other side has gone, and will not miss it.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            outcome => outcome,
        }
    }
}

impl TcpStream {
    /// Moves bytes between this connection and `local`, which must not block, until both sides have ended, each by itself.
    /// Half-closed sides are told of each other.
    ///
    /// # Errors
    /// Those of either side, which leave the other one as it is.
    pub(crate) async fn splice(&self, local: &Arc<LocalStream>) -> io::Result<()> {
        let (shared, id) = self.parts();
        shared.with(|stack, _| stack.splice(id, Arc::clone(local) as Arc<dyn Local>));
        let mut spliced = Spliced { shared, id, local, watched: None };
        poll_fn(|context| spliced.poll(context)).await
    }
}

/// The task's view; takes the local socket from the stack again, however the splicing ends.
struct Spliced<'a> {
    shared: &'a Shared,
    id: ConnId,
    local: &'a Arc<LocalStream>,
    /// Another handle of it, for the runtime to look at.
    watched: Option<tokio::net::TcpStream>,
}

impl Spliced<'_> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let halves = self.shared.with(|stack, now| stack.poll_splice(now, self.id, context.waker()))?;
            if (halves.inward, halves.outward) == (Half::Done, Half::Done) {
                return Poll::Ready(Ok(()));
            }
            self.watch(halves)?;
            let ready = self.is_ready(context, halves)?;
            if halves.inward == Half::Turn || halves.outward == Half::Turn {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            if !ready {
                return Poll::Pending;
            }
        }
    }

    /// Has the runtime look at the socket if it is waited for.
    fn watch(&mut self, halves: Halves) -> io::Result<()> {
        if halves.inward != Half::Local && halves.outward != Half::Local {
            self.watched = None;
        } else if self.watched.is_none() {
            self.watched = Some(tokio::net::TcpStream::from_std(self.local.try_clone()?)?);
        }
        Ok(())
    }

    /// Whether the socket has become ready for what waits there, since this was asked.
    fn is_ready(&self, context: &mut Context<'_>, halves: Halves) -> io::Result<bool> {
        let Some(watched) = &self.watched else { return Ok(false) };
        let mut ready = false;
        // It is read and written elsewhere, so what has been said of it counts once.
        let forget = |interest| {
            let _ = watched.try_io(interest, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        };
        if halves.outward == Half::Local && watched.poll_read_ready(context)?.is_ready() {
            forget(Interest::READABLE);
            ready = true;
        }
        if halves.inward == Half::Local && watched.poll_write_ready(context)?.is_ready() {
            forget(Interest::WRITABLE);
            ready = true;
        }
        Ok(ready)
    }
}

impl Drop for Spliced<'_> {
    fn drop(&mut self) {
        self.shared.with(|stack, _| stack.unsplice(self.id));
    }
}
