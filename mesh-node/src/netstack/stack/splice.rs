//! Connections that are spliced to a local socket: bytes go between the two without a task, or a buffer, in between.
//!
//! Whoever brings news moves the bytes: the thread whose packets have brought data writes it out of the receive buffer,
//! and the thread whose packets have acknowledged some fills the send buffer again. A task is woken only to wait for the
//! local socket, and when there is something to say about the end.

use std::fmt::Debug;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::task::Waker;
use std::time::Instant;

use smoltcp::socket::tcp::{RecvError, State};

use super::{Conn, ConnId, Stack};

#[cfg(test)]
mod tests;

/// Bytes moved each way before others have their turn.
const MOST_AT_ONCE: usize = 256 * 1024;

/// Bytes read ahead of what may be sent: as many as one batch of acknowledgements lets go, and no more, since what is
/// read long before it is sent has left the cache by then.
const MOST_UNSENT: usize = 512 * 1024;

/// A local socket. Nothing here waits: what would, is [`ErrorKind::WouldBlock`].
pub(in crate::netstack) trait Local: Debug + Send + Sync {
    /// Reads into `room`, which is not empty; 0 is the end.
    fn read(&self, room: &mut [u8]) -> io::Result<usize>;

    /// Writes a part of `bytes`, which are not empty.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;

    /// Says that nothing more will be written.
    fn end(&self) -> io::Result<()>;
}

/// What one direction waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::netstack) enum Half {
    /// The connection: for data, or for room.
    #[default]
    Mesh,
    /// The local socket: for data, or for room.
    Local,
    /// Its turn.
    Turn,
    /// Nothing: it has ended.
    Done,
}

/// Both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::netstack) struct Halves {
    pub(in crate::netstack) inward: Half,
    pub(in crate::netstack) outward: Half,
}

#[derive(Debug)]
pub(super) struct Splice {
    local: Arc<dyn Local>,
    halves: Halves,
    failed: Option<io::Error>,
    /// The task, to be woken when it has something to do.
    waker: Option<Waker>,
    /// Waits in `stirred`.
    pub(super) stirred: bool,
}

impl Splice {
    /// Moves what can be moved in the directions that are in none of these states.
    fn run(&mut self, conn: &mut Conn, now: Instant, but: &[Half]) {
        let mut both = || -> io::Result<()> {
            if !but.contains(&self.halves.inward) {
                self.halves.inward = inward(conn, &*self.local, now)?;
            }
            if !but.contains(&self.halves.outward) {
                self.halves.outward = outward(conn, &*self.local)?;
            }
            Ok(())
        };
        if self.failed.is_none() {
            self.failed = both().err();
        }
    }
}

/// From the mesh to the local socket.
fn inward(conn: &mut Conn, local: &dyn Local, now: Instant) -> io::Result<Half> {
    let mut left = MOST_AT_ONCE;
    while left > 0 {
        let mut written: io::Result<usize> = Ok(0);
        let outcome = conn.socket().recv(|bytes| {
            let bytes = &bytes[..bytes.len().min(left)];
            if !bytes.is_empty() {
                written = local.write(bytes).and_then(|count| match count {
                    0 => Err(ErrorKind::WriteZero.into()),
                    count => Ok(count),
                });
            }
            (*written.as_ref().unwrap_or(&0), ())
        });
        match (outcome, written) {
            (Ok(()), Ok(0)) => return Ok(Half::Mesh),
            (Ok(()), Ok(count)) => {
                left -= count;
                conn.moved += count;
                conn.receives.pass(now, count, conn.recovery.shortest_round_trip());
            }
            (Ok(()), Err(error)) if error.kind() == ErrorKind::WouldBlock => return Ok(Half::Local),
            (Ok(()), Err(error)) => return Err(error),
            (Err(RecvError::Finished), _) => return local.end().map(|()| Half::Done),
            (Err(RecvError::InvalidState), _) => return Err(ErrorKind::ConnectionReset.into()),
        }
    }
    Ok(Half::Turn)
}

/// From the local socket to the mesh.
fn outward(conn: &mut Conn, local: &dyn Local) -> io::Result<Half> {
    let mut left = MOST_AT_ONCE;
    while left > 0 {
        if !matches!(conn.state(), State::Established | State::CloseWait) {
            return Err(ErrorKind::ConnectionReset.into());
        }
        let queued = conn.socket().send_queue();
        let unsent = queued.saturating_sub(conn.recovery.flight());
        let room = conn.sends.limit().saturating_sub(queued).min(left).min(MOST_UNSENT.saturating_sub(unsent));
        if room == 0 {
            return Ok(Half::Mesh);
        }
        let mut read: io::Result<usize> = Err(ErrorKind::WouldBlock.into());
        let outcome = conn.socket().send(|bytes| {
            let len = bytes.len().min(room);
            read = local.read(&mut bytes[..len]);
            (*read.as_ref().unwrap_or(&0), ())
        });
        match read {
            _ if outcome.is_err() => return Err(ErrorKind::BrokenPipe.into()),
            Ok(0) => {
                conn.shut = true;
                conn.socket().close();
                return Ok(Half::Done);
            }
            Ok(count) => {
                left -= count;
                conn.moved += count;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Half::Local),
            Err(error) => return Err(error),
        }
    }
    Ok(Half::Turn)
}

impl Stack {
    /// Splices a connection to `local`. Nothing moves before [`poll_splice`](Self::poll_splice).
    pub(in crate::netstack) fn splice(&mut self, id: ConnId, local: Arc<dyn Local>) {
        if let Some(conn) = self.conns.get_mut(&id) {
            let halves = Halves::default();
            conn.splice = Some(Box::new(Splice { local, halves, failed: None, waker: None, stirred: false }));
        }
    }

    /// Lets go of the local socket.
    pub(in crate::netstack) fn unsplice(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.splice = None;
        }
    }

    /// Moves what can be moved and says what each direction waits for. `waker` is woken when that changes.
    pub(in crate::netstack) fn poll_splice(&mut self, now: Instant, id: ConnId, waker: &Waker) -> io::Result<Halves> {
        let conn = self.conns.get_mut(&id).ok_or(ErrorKind::NotConnected)?;
        let mut splice = conn.splice.take().ok_or(ErrorKind::NotConnected)?;
        splice.run(conn, now, &[Half::Done]);
        let outcome = match splice.failed.take() {
            Some(error) => Err(error),
            None => {
                splice.waker = Some(waker.clone());
                Ok(splice.halves)
            }
        };
        conn.splice = Some(splice);
        self.touch(id);
        outcome
    }

    /// Notes that packets have come for a spliced connection; false if it is not spliced.
    pub(super) fn stir(&mut self, id: ConnId) -> bool {
        let Some(splice) = self.conns.get_mut(&id).and_then(|conn| conn.splice.as_mut()) else { return false };
        if !splice.stirred {
            splice.stirred = true;
            self.stirred.push(id);
        }
        true
    }

    /// Moves the bytes of connections that packets have come for, and wakes tasks that have something to do now.
    pub(super) fn run_stirred(&mut self, now: Instant) {
        while let Some(id) = self.stirred.pop() {
            let Some(conn) = self.conns.get_mut(&id) else { continue };
            let Some(mut splice) = conn.splice.take() else { continue };
            splice.stirred = false;
            let before = splice.halves;
            // The task looks after those that wait for the local socket.
            splice.run(conn, now, &[Half::Done, Half::Local]);
            let news = |before, after| after == Half::Turn || (after != before && after != Half::Mesh);
            let after = splice.halves;
            let awaited =
                splice.failed.is_some() || news(before.inward, after.inward) || news(before.outward, after.outward);
            self.woken.extend(splice.waker.take_if(|_| awaited));
            conn.splice = Some(splice);
            self.touch(id);
        }
    }

    /// Wakes the task of a connection that has ended.
    pub(super) fn wake_splice(&mut self, id: ConnId) {
        let splice = self.conns.get_mut(&id).and_then(|conn| conn.splice.as_mut());
        self.woken.extend(splice.and_then(|splice| splice.waker.take()));
    }

    /// Tasks to be woken once the stack is free.
    pub(in crate::netstack) fn take_woken(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.woken)
    }
}
