//! The threads on which relay connections run.
//!
//! Each shard is one thread with a scheduler of its own; a connection stays on the shard it was given to. TLS handshakes,
//! logins and everything else of a relay happen elsewhere, on the runtime of whoever accepts, so that a thousand clients
//! that come back at once do not hold up those that are there.
//!
//! # Whose turn it is
//! Below its capacity a relay has no queue of connections that wait to be read. Above it, who is read next decides
//! everything. A connection that has had little to say is read at once when it has something. All others are *bulk*
//! connections and take turns: one of them at a time is read, for one [`UNIT`](super::slab::UNIT). So a connection with
//! little to say waits for a unit or two of the others, however many they are and whatever they offer (RFC 8290 does the
//! same with packets). Writing never waits for a turn: what has been read is written before more is read, and a relay that
//! is offered thrice what it can pass on passes on what it can.
//!
//! Whose turn it is also waits while the process has used nearly all the CPU time that its control group allows it, if that
//! is limited ([`Headroom`]): a relay that the system stops for the rest of a period stops for everybody.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle};
use tokio::sync::{Semaphore, oneshot};

use super::cpu::{self, LimitFiles};
use super::moderation::Moderation;
use crate::server::Headroom;

/// Tasks that run before the shard looks for new events, at most: bulk connections let it look before each unit anyway.
const TASKS_BETWEEN_EVENTS: u32 = 16;
/// How often the limit of CPU time is looked up.
const LIMIT_AGE: Duration = Duration::from_millis(100);

/// The turns of bulk connections.
#[derive(Debug)]
pub(super) struct Turns {
    /// One for each connection that may be read at the same time: one a shard.
    free: Arc<Semaphore>,
    /// One for all shards, since the limit is for all.
    budget: Arc<Mutex<Budget>>,
    moderation: Arc<Moderation>,
}

#[derive(Debug)]
struct Budget {
    headroom: Headroom,
    files: LimitFiles,
    read_at: Option<Instant>,
}

impl Turns {
    fn new(budget: &Arc<Mutex<Budget>>) -> Arc<Self> {
        let (free, moderation) = (Arc::new(Semaphore::new(1)), Arc::default());
        Arc::new(Self { free, budget: Arc::clone(budget), moderation })
    }

    /// A unit has been read.
    pub(super) fn note_unit(&self) {
        self.moderation.note_unit();
    }

    /// What a bulk connection has to hold while it is read.
    pub(super) const fn free(&self) -> &Arc<Semaphore> {
        &self.free
    }

    /// Until when whoever has the turn is to wait with it, if at all.
    pub(super) fn wait(&self, now: Instant) -> Option<Instant> {
        let mut budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner);
        if budget.read_at.is_none_or(|at| now.saturating_duration_since(at) >= LIMIT_AGE) {
            budget.read_at = Some(now);
            let limit = budget.files.read();
            budget.headroom.set_limit(limit);
        }
        let limited = budget.headroom.is_limited();
        self.moderation.set_short(limited);
        if limited { budget.headroom.wait(now, cpu::used()) } else { None }
    }
}

/// One thread that runs connections.
#[derive(Debug)]
pub(super) struct Shard {
    runtime: Handle,
    turns: Arc<Turns>,
    /// Dropped with the shard, which ends the thread.
    _stop: Option<oneshot::Sender<()>>,
}

impl Shard {
    fn start(number: usize, budget: &Arc<Mutex<Budget>>) -> io::Result<Self> {
        let turns = Turns::new(budget);
        let moderation = Arc::clone(&turns.moderation);
        let runtime = Builder::new_current_thread()
            .enable_all()
            .on_thread_park(move || moderation.before_park())
            .event_interval(TASKS_BETWEEN_EVENTS)
            .global_queue_interval(TASKS_BETWEEN_EVENTS)
            .build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new().name(format!("relay-{number}"));
        thread.spawn(move || {
            let _ = runtime.block_on(stopped);
        })?;
        Ok(Self { runtime: handle, turns, _stop: Some(stop) })
    }

    /// The caller's runtime.
    fn here(budget: &Arc<Mutex<Budget>>) -> Self {
        Self { runtime: Handle::current(), turns: Turns::new(budget), _stop: None }
    }

    /// The scheduler to spawn on.
    pub(super) const fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Whose turn it is there.
    pub(super) const fn turns(&self) -> &Arc<Turns> {
        &self.turns
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
        let budget = Budget { headroom: Headroom::new(), files: LimitFiles::open(), read_at: None };
        let budget = Arc::new(Mutex::new(budget));
        let start = |number| Shard::start(number, &budget);
        let started = (0..count.max(1)).map(start).collect::<io::Result<Vec<_>>>();
        let shards = started.unwrap_or_else(|error| {
            tracing::warn!(%error, "no threads for the relay's connections; they share those of the rest");
            vec![Shard::here(&budget)]
        });
        Self { shards, next: AtomicUsize::new(0) }
    }

    /// The shard for the next connection: each in turn.
    pub(super) fn pick(&self) -> &Shard {
        &self.shards[self.next.fetch_add(1, Ordering::Relaxed) % self.shards.len()]
    }
}
