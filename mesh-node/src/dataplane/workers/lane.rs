//! A bounded line of jobs: worked on by anyone in any order, released in the order they came in.
//!
//! ```text
//!   submit ─► queued ─► taken by any thread, worked on ─► done ─┐ released one after another, by whichever thread
//!     ▲                                                         │ has finished the one whose turn it is
//!     └──────────────────────── spare ◄─────────────────────────┘
//! ```
//!
//! At most `capacity` jobs are between submission and release. The lock is held to move a job, never to work on one.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The line. `J` is moved, and so should be a few pointers to what it is about.
#[derive(Debug)]
pub(super) struct Lane<J> {
    state: Mutex<State<J>>,
    /// A job was released.
    released: Condvar,
    capacity: usize,
}

#[derive(Debug)]
struct State<J> {
    queued: VecDeque<(u64, J)>,
    /// Worked on, by number modulo the capacity.
    done: Vec<Option<J>>,
    spare: Vec<J>,
    /// The number of the next job submitted.
    next: u64,
    /// The number of the next job released.
    first: u64,
    /// Whether a thread is releasing; it goes on while there is something to release.
    releasing: bool,
}

/// A job's place in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket(u64);

impl<J> Lane<J> {
    /// A line for up to `capacity` jobs, at least one.
    pub(super) fn new(capacity: usize) -> Self {
        let capacity = capacity.max(1);
        let state = State {
            queued: VecDeque::with_capacity(capacity),
            done: (0..capacity).map(|_| None).collect(),
            spare: Vec::with_capacity(capacity + 1),
            next: 0,
            first: 0,
            releasing: false,
        };
        Self { state: Mutex::new(state), released: Condvar::new(), capacity }
    }

    /// Puts a job at the end of the line, or gives it back if the line is full.
    pub(super) fn submit(&self, job: J) -> Result<(), J> {
        let mut state = self.lock();
        if state.in_line() >= self.capacity {
            return Err(job);
        }
        let number = state.next;
        state.next += 1;
        state.queued.push_back((number, job));
        Ok(())
    }

    /// The oldest job that nobody works on. It must come back by [`Lane::finish`]: those after it wait.
    pub(super) fn take(&self) -> Option<(Ticket, J)> {
        self.lock().queued.pop_front().map(|(number, job)| (Ticket(number), job))
    }

    /// Whether [`Lane::take`] would find something.
    pub(super) fn has_work(&self) -> bool {
        !self.lock().queued.is_empty()
    }

    /// Brings a job back, and releases it and those behind it if it is their turn and nobody else is at it.
    pub(super) fn finish(&self, ticket: Ticket, job: J, mut release: impl FnMut(&mut J)) {
        let mut state = self.lock();
        let slot = self.slot(ticket.0);
        state.done[slot] = Some(job);
        if state.releasing {
            // That thread looks again after each release, under the lock.
            return;
        }
        state.releasing = true;
        loop {
            let slot = self.slot(state.first);
            let Some(mut job) = state.done[slot].take() else { break };
            drop(state);
            release(&mut job);
            state = self.lock();
            state.first += 1;
            state.spare.push(job);
            self.released.notify_all();
        }
        state.releasing = false;
    }

    /// Adds a job that has not been in the line yet to the spare ones.
    pub(super) fn stock(&self, job: J) {
        self.lock().spare.push(job);
    }

    /// A released job, to be filled again.
    pub(super) fn spare(&self) -> Option<J> {
        self.lock().spare.pop()
    }

    /// Whether all that was submitted has been released.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().in_line() == 0
    }

    /// Waits until fewer than `jobs` are in the line; false if that has not come about after `timeout`.
    pub(super) fn wait_below(&self, jobs: usize, timeout: Duration) -> bool {
        let waited = self.released.wait_timeout_while(self.lock(), timeout, |state| state.in_line() >= jobs);
        let (state, outcome) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(state);
        !outcome.timed_out()
    }

    /// How many jobs may be in the line.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    fn slot(&self, number: u64) -> usize {
        // The remainder is below the capacity.
        usize::try_from(number % self.capacity as u64).unwrap_or(0)
    }

    /// Nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<J> State<J> {
    fn in_line(&self) -> usize {
        usize::try_from(self.next - self.first).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[test]
    fn a_job_that_is_done_early_waits_for_those_before_it() {
        let lane = Lane::new(3);
        for job in 0..3 {
            lane.submit(job).unwrap();
        }
        assert_eq!(lane.submit(3), Err(3), "the line is full");
        let taken: Vec<_> = (0..3).map(|_| lane.take().unwrap()).collect();
        assert!(!lane.has_work() && lane.take().is_none());
        let mut released = Vec::new();
        for at in [2, 0, 1] {
            lane.finish(taken[at].0, taken[at].1, |job| released.push(*job));
        }
        assert_eq!(released, [0, 1, 2]);
        assert!(lane.is_empty() && lane.spare().is_some());
    }

    #[test]
    fn waiting_ends_with_a_release_or_in_time() {
        let lane = Lane::new(1);
        lane.submit(()).unwrap();
        assert!(!lane.wait_below(1, Duration::from_millis(1)));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (ticket, job) = lane.take().unwrap();
                lane.finish(ticket, job, |()| std::thread::sleep(Duration::from_millis(5)));
            });
            assert!(lane.wait_below(1, Duration::from_secs(60)));
        });
    }

    /// Counts how many there are of it at once.
    struct Counted<'a> {
        number: u64,
        worked: bool,
        alive: &'a AtomicUsize,
    }

    impl Drop for Counted<'_> {
        fn drop(&mut self) {
            self.alive.fetch_sub(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn threads_in_a_hurry_change_no_order_and_lose_nothing() {
        const JOBS: u64 = 3_000;
        const CAPACITY: usize = 5;
        let (stop, alive) = (AtomicBool::new(false), AtomicUsize::new(0));
        let lane = Lane::<Counted<'_>>::new(CAPACITY);
        let released = Mutex::new(0_u64);
        let release = |job: &mut Counted<'_>| {
            let mut next = released.try_lock().expect("one release at a time");
            assert!(std::mem::take(&mut job.worked), "worked on before it was released");
            assert_eq!(job.number, *next);
            *next += 1;
        };
        let help = |seed: u64| {
            let Some((ticket, mut job)) = lane.take() else { return false };
            job.worked = true;
            // Some take longer than others.
            if (job.number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed).is_multiple_of(7) {
                std::thread::sleep(Duration::from_micros(50));
            }
            lane.finish(ticket, job, release);
            true
        };
        std::thread::scope(|scope| {
            for seed in 0..3 {
                let (help, stop) = (&help, &stop);
                scope.spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        if !help(seed) {
                            std::thread::sleep(Duration::from_micros(20));
                        }
                    }
                });
            }
            for number in 0..JOBS {
                let mut job = lane.spare().unwrap_or_else(|| {
                    alive.fetch_add(1, Ordering::SeqCst);
                    Counted { number: 0, worked: false, alive: &alive }
                });
                job.number = number;
                while let Err(back) = lane.submit(job) {
                    job = back;
                    if !help(9) {
                        lane.wait_below(CAPACITY, Duration::from_millis(100));
                    }
                }
            }
            while !lane.is_empty() {
                lane.wait_below(1, Duration::from_millis(100));
            }
            stop.store(true, Ordering::SeqCst);
        });
        assert_eq!(*released.lock().unwrap(), JOBS);
        assert!(alive.load(Ordering::SeqCst) <= CAPACITY + 1, "jobs are used again");
        drop(lane);
        assert_eq!(alive.load(Ordering::SeqCst), 0);
    }

    proptest! {
        #[test]
        fn whatever_the_interleaving_the_order_stays(
            capacity in 1_usize..6,
            steps in proptest::collection::vec(0_usize..12, 0..200),
        ) {
            let lane = Lane::new(capacity);
            let (mut submitted, mut released, mut taken) = (0_u32, Vec::new(), Vec::new());
            for step in steps {
                match step {
                    0..=3 => submitted += u32::from(lane.submit(submitted).is_ok()),
                    4..=6 => taken.extend(lane.take()),
                    which if !taken.is_empty() => {
                        let (ticket, job) = taken.swap_remove(which % taken.len());
                        lane.finish(ticket, job, |job| released.push(*job));
                    }
                    _ => {}
                }
                prop_assert!(submitted as usize - released.len() <= capacity);
            }
            while let Some((ticket, job)) = taken.pop().or_else(|| lane.take()) {
                lane.finish(ticket, job, |job| released.push(*job));
            }
            prop_assert_eq!(released, (0..submitted).collect::<Vec<_>>());
        }
    }
}
