//! Pace: when many peers are to be searched for at once, those with the latest traffic go first and the others wait.
//!
//! A node that starts, wakes or changes its network has all its peers to find. A few dozen are looked for at once; for
//! the rest there is one search every two milliseconds, which is 500 peers and some 2,500 datagrams a second.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use mesh_noise::key::NodePublic;

use super::{Agent, Timer, search::Urgency};
use crate::path::probe::{Budget, Rate};

/// Between two looks at who waits.
const TICK: Duration = Duration::from_millis(16);

/// Searches that wait for their turn.
#[derive(Debug)]
pub(super) struct Pace {
    budget: Budget,
    waiting: VecDeque<NodePublic>,
    /// The same again, to find out quickly who waits already.
    known: BTreeSet<NodePublic>,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { budget: Budget::full_of(now, Rate::SEARCHES), waiting: VecDeque::new(), known: BTreeSet::new() }
    }

    /// Whether a search may be made now. Those that wait go first.
    fn admits(&mut self, now: Instant) -> bool {
        self.waiting.is_empty() && self.budget.take_of(now, Rate::SEARCHES)
    }

    fn wait(&mut self, node: NodePublic) {
        if self.known.insert(node) {
            self.waiting.push_back(node);
        }
    }

    fn next(&mut self, now: Instant) -> Option<NodePublic> {
        if self.waiting.is_empty() || !self.budget.take_of(now, Rate::SEARCHES) {
            return None;
        }
        let node = self.waiting.pop_front()?;
        self.known.remove(&node);
        Some(node)
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty()
    }
}

impl Agent {
    /// Whether `node` may be searched for now. If not, it is when its turn comes.
    pub(super) fn admit_search(&mut self, node: NodePublic) -> bool {
        let admitted = self.pace.admits(self.now);
        if !admitted {
            self.pace.wait(node);
            self.timers.set_if_absent(Timer::Pace, self.now + TICK);
        }
        admitted
    }

    /// Makes the searches whose turn has come.
    pub(super) fn pace_due(&mut self) {
        while let Some(node) = self.pace.next(self.now) {
            // Whoever had to wait did so for an event, or for the first time.
            self.search_now(node, Urgency::Event);
        }
        if !self.pace.is_idle() {
            self.timers.set(Timer::Pace, self.now + TICK);
        }
    }
}
