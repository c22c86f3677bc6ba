//! The threads on which relay connections run.
//!
//! Each shard is one thread with a scheduler of its own; a connection stays on the shard it was given to. TLS handshakes,
//! logins and everything else of a relay happen elsewhere, on the runtime of whoever accepts, so that a thousand clients
//! that come back at once do not hold up those that are there.
//!
//! # Whose turn it is
//! Below its capacity a relay has no queue of connections that wait to be read. Above it, who is read next decides
//! everything. A connection that has just become readable is read at once, one [`UNIT`](super::slab::UNIT) at most. If there
//! is more after that, it is a *bulk* connection, and takes turns with all other bulk connections: one of them at a time is
//! read, for one unit. So a connection with little to say waits for a unit or two of the others, however many they are and
//! whatever they offer (RFC 8290 does the same with packets). Writing never waits for a turn: what has been read is
//! written before more is read, and a relay that is offered thrice what it can pass on passes on what it can.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::{Semaphore, oneshot};

/// Tasks that run before the shard looks for new events: few, so that a connection that has become readable while others
/// are busy is seen soon.
const TASKS_BETWEEN_EVENTS: u32 = 4;

/// One thread that runs connections.
#[derive(Debug)]
pub(super) struct Shard {
    runtime: Handle,
    /// The turn of the bulk connections.
    turn: Arc<Semaphore>,
    /// Dropped with the shard, which ends the thread.
    _stop: Option<oneshot::Sender<()>>,
}

impl Shard {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .event_interval(TASKS_BETWEEN_EVENTS)
            .global_queue_interval(TASKS_BETWEEN_EVENTS)
            .build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new().name(format!("relay-{number}"));
        thread.spawn(move || {
            let _ = runtime.block_on(stopped);
        })?;
        Ok(Self { runtime: handle, turn: Arc::new(Semaphore::new(1)), _stop: Some(stop) })
    }

    /// The caller's runtime.
    fn here() -> Self {
        Self { runtime: Handle::current(), turn: Arc::new(Semaphore::new(1)), _stop: None }
    }

    /// The scheduler to spawn on.
    pub(super) const fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// What a bulk connection has to hold while it is read.
    pub(super) const fn turn(&self) -> &Arc<Semaphore> {
        &self.turn
    }
}

/// All of a relay's shards.
#[derive(Debug)]
pub(super) struct Shards {
    shards: Vec<Shard>,
    next: AtomicUsize,
}

impl Shards {
    /// Starts `count` threads, at least one. Where the system has none to give, connections run on the caller's runtime.
    pub(super) fn start(count: usize) -> Self {
        let started = (0..count.max(1)).map(Shard::start).collect::<io::Result<Vec<_>>>();
        let shards = started.unwrap_or_else(|error| {
            tracing::warn!(%error, "no threads for the relay's connections; they share those of the rest");
            vec![Shard::here()]
        });
        Self { shards, next: AtomicUsize::new(0) }
    }

    /// The shard for the next connection: each in turn.
    pub(super) fn pick(&self) -> &Shard {
        &self.shards[self.next.fetch_add(1, Ordering::Relaxed) % self.shards.len()]
    }
}
