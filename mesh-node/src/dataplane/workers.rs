//! Help for one hot flow: threads that seal and open whole batches for an I/O thread that is saturated.
//!
//! ```text
//!   off:   read ─► seal ─► send                      one thread, run to completion
//!
//!   on:    read ─► Lane ─► seal (any worker) ─► Lane ─► send, in the order read, by one worker at a time
//! ```
//!
//! The I/O thread still reads, routes, and reserves counters in order; opening is the same the other way round, with the
//! replay window, the filter and the device behind the second arrow. Batches change hands whole and are used again, so
//! that the steady state allocates nothing and locks a few times a batch. A lane holds a few batches and no more: when it
//! is full the I/O thread works too, and what it does not read waits, and is dropped, in the kernel.
//!
//! Whether to switch is judged by [`saturation`]; switching off waits until the lane is empty, so that order holds there
//! as well. The threads start when first wanted and sleep when not. On up to two cores there are none, and the I/O
//! threads pay one branch a batch.
//!
//! A relay's datagrams, and packets parked for want of a session, are not handed over.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_tun::linux::queues;
use rustix::time::{ClockId, clock_gettime};

use super::Shared;

mod inbound;
mod lane;
mod outbound;
mod saturation;

pub(super) use inbound::Inbound;
use lane::Lane;
pub(super) use outbound::{Outbound, Run};
use saturation::{Sample, Saturation};

/// The most threads that [`Workers::Auto`] asks for.
const MAX_WORKERS: usize = 8;

/// The most batches in a lane: of them nonces are taken already, and a receiver's window is 8,192 wide.
const MAX_LANE: usize = 16;

/// Every so many batches a thread asks for the time. A saturated one has thousands a second.
const NOTES_A_LOOK: u32 = 16;

/// How long a full lane is waited for before looking whether all has come to an end.
const PATIENCE: Duration = Duration::from_millis(100);

/// Whether a saturated I/O thread hands sealing and opening to other threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Workers {
    /// Where there are more than two cores: as many threads as the others, up to eight, when they are needed.
    #[default]
    Auto,
    /// Never.
    Off,
    /// When they are needed, up to so many threads.
    UpTo(usize),
    /// With so many threads, always, whatever the load.
    Always(usize),
}

impl Workers {
    fn threads(self, cores: usize) -> usize {
        match self {
            Self::Auto => cores.saturating_sub(2).min(MAX_WORKERS),
            Self::Off => 0,
            Self::UpTo(threads) | Self::Always(threads) => threads,
        }
    }
}

/// A batch that can be handed over.
pub(super) trait Job: Send + Sized + 'static {
    /// The part that any thread may do at any time.
    fn work(&mut self, shared: &Shared);
    /// The part that is done in order; leaves the batch empty.
    fn release(&mut self, shared: &Shared);
}

/// A lane, whatever its jobs are.
trait Work: Send + Sync {
    fn has_work(&self) -> bool;
    /// Does one job, and what can be released after it; false if there is none.
    fn help(&self, shared: &Shared) -> bool;
}

impl<J: Job> Work for Lane<J> {
    fn has_work(&self) -> bool {
        Self::has_work(self)
    }

    fn help(&self, shared: &Shared) -> bool {
        let Some((ticket, mut job)) = self.take() else { return false };
        job.work(shared);
        self.finish(ticket, job, |job| job.release(shared));
        true
    }
}

/// The threads, and the lanes they look after.
pub(super) struct Pool {
    policy: Workers,
    limit: usize,
    state: Mutex<State>,
    wanted: Condvar,
    handed_over: AtomicU64,
}

#[derive(Default)]
struct State {
    /// A lane ends with its I/O thread, or when that has no more need of it.
    lanes: Vec<Weak<dyn Work>>,
    threads: Vec<JoinHandle<()>>,
    /// Which lane is looked at first: each has its turn.
    turn: usize,
    closed: bool,
}

impl Pool {
    pub(super) fn new(policy: Workers) -> Self {
        let limit = policy.threads(queues::cores());
        Self { policy, limit, state: Mutex::default(), wanted: Condvar::new(), handed_over: AtomicU64::new(0) }
    }

    /// How many batches were handed over.
    pub(super) fn handed_over(&self) -> u64 {
        self.handed_over.load(Ordering::Relaxed)
    }

    /// Ends the threads and waits for them, but for the one that calls.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.lanes.clear();
        let threads = std::mem::take(&mut state.threads);
        drop(state);
        self.wanted.notify_all();
        let current = std::thread::current().id();
        for thread in threads.into_iter().filter(|thread| thread.thread().id() != current) {
            // A thread that panicked has said so on its own.
            let _ = thread.join();
        }
    }

    /// Adds a lane, and starts the threads if they do not run.
    fn open(&self, shared: &Shared, lane: Weak<dyn Work>) {
        let mut state = self.lock();
        state.lanes.retain(|lane| lane.strong_count() > 0);
        if state.closed {
            return;
        }
        state.lanes.push(lane);
        for number in state.threads.len()..self.limit {
            let Some(shared) = shared.me.upgrade() else { return };
            let name = format!("mesh-aead-{number}");
            match std::thread::Builder::new().name(name).spawn(move || run(&shared)) {
                Ok(thread) => state.threads.push(thread),
                // With fewer threads, or none, the I/O threads do more themselves.
                Err(error) => return tracing::warn!(%error, "no thread to help with encryption"),
            }
        }
    }

    /// There is a job in a lane.
    fn wake(&self) {
        self.handed_over.fetch_add(1, Ordering::Relaxed);
        // Whoever holds the lock has not looked at the lane yet, or is asleep when we get it.
        drop(self.lock());
        self.wanted.notify_one();
    }

    /// The next lane with a job; none once closed.
    fn next(&self) -> Option<Arc<dyn Work>> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let lanes = state.lanes.iter().cycle().skip(state.turn).take(state.lanes.len());
            let mut found = lanes.enumerate().filter_map(|(passed, lane)| Some((passed, lane.upgrade()?)));
            if let Some((passed, lane)) = found.find(|(_, lane)| lane.has_work()) {
                state.turn = (state.turn + passed + 1) % state.lanes.len();
                return Some(lane);
            }
            state = self.wanted.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What it guards is whole at every moment.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn run(shared: &Shared) {
    while let Some(lane) = shared.workers.next() {
        lane.help(shared);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("policy", &self.policy).field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// One I/O thread's end: judges its load, and hands its batches over while workers are on.
pub(super) struct Handover<J: Job> {
    /// Whether there will ever be workers.
    possible: bool,
    saturation: Saturation,
    packets: u64,
    /// Notes until the clock is looked at.
    unlooked: u32,
    lane: Option<Arc<Lane<J>>>,
    /// Whether the lane's jobs were made.
    stocked: bool,
}

impl<J: Job> Handover<J> {
    /// For a thread that does everything itself.
    pub(super) fn never() -> Self {
        Self { possible: false, saturation: Saturation::default(), packets: 0, unlooked: 0, lane: None, stocked: false }
    }

    /// For the calling thread, with workers off unless they are always on.
    pub(super) fn new(shared: &Shared) -> Self {
        let mut handover = Self { possible: shared.workers.limit > 0, ..Self::never() };
        if let Workers::Always(1..) = shared.workers.policy {
            handover.possible = false;
            handover.switch_on(shared);
        }
        handover
    }

    /// Whether the thread's batches are to be handed over.
    pub(super) fn is_on(&self) -> bool {
        self.lane.is_some()
    }

    /// Notes that `packets` were read, none if time has passed, and switches if that is due. For the thread itself.
    pub(super) fn note(&mut self, shared: &Shared, packets: usize) {
        if !self.possible {
            return;
        }
        self.packets += packets as u64;
        self.unlooked = self.unlooked.saturating_sub(1);
        if packets > 0 && self.unlooked > 0 {
            return;
        }
        self.unlooked = NOTES_A_LOOK;
        let now = Duration::from_millis(shared.now_ms());
        if now < self.saturation.due() {
            return;
        }
        let cpu = Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default();
        match self.saturation.judge(now, Sample { cpu, packets: self.packets }) {
            true if self.lane.is_none() => self.switch_on(shared),
            false if self.lane.is_some() => self.switch_off(shared),
            true | false => {}
        }
    }

    /// A job to be filled. They are made when the first is asked for: as many as the lane holds, and one more.
    pub(super) fn job(&mut self, fresh: impl Fn() -> J) -> J {
        if let Some(lane) = self.lane.as_ref().filter(|_| !self.stocked) {
            (0..=lane.capacity()).for_each(|_| lane.stock(fresh()));
            self.stocked = true;
        }
        self.lane.as_ref().and_then(|lane| lane.spare()).unwrap_or_else(fresh)
    }

    /// Hands a batch over; while there is no room, works on others.
    pub(super) fn submit(&self, shared: &Shared, mut job: J) {
        let Some(lane) = &self.lane else { return };
        while let Err(back) = lane.submit(job) {
            job = back;
            self.lend_a_hand(shared, lane.capacity());
            if shared.is_stopped() {
                return;
            }
        }
        shared.workers.wake();
    }

    /// Returns once everything handed over has been released: what comes now cannot pass it.
    pub(super) fn settle(&self, shared: &Shared) {
        while self.lane.as_ref().is_some_and(|lane| !lane.is_empty()) && !shared.is_stopped() {
            self.lend_a_hand(shared, 1);
        }
    }

    /// Works on one batch, or waits until there are fewer than `jobs`, for a while.
    fn lend_a_hand(&self, shared: &Shared, jobs: usize) {
        if let Some(lane) = &self.lane
            && !lane.help(shared)
        {
            lane.wait_below(jobs, PATIENCE);
        }
    }

    fn switch_on(&mut self, shared: &Shared) {
        let lane = Arc::new(Lane::new((2 * shared.workers.limit + 2).min(MAX_LANE)));
        shared.workers.open(shared, Arc::downgrade(&lane) as Weak<dyn Work>);
        self.lane = Some(lane);
    }

    fn switch_off(&mut self, shared: &Shared) {
        self.settle(shared);
        (self.lane, self.stocked) = (None, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_cores_have_no_workers_unless_told() {
        assert_eq!([1, 2, 3, 4, 16].map(|cores| Workers::Auto.threads(cores)), [0, 0, 1, 2, 8]);
        assert_eq!([Workers::Off, Workers::UpTo(2), Workers::Always(3)].map(|policy| policy.threads(2)), [0, 2, 3]);
    }
}
