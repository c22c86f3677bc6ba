//! The agent's deadlines. Most of them are some peer's, who has up to six: those lie together, and only the earliest of
//! each peer stands in the order of time. A thousand peers take a third of what one table for all would, and to move a
//! deadline that is not the next one changes no order.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use mesh_noise::key::NodePublic;

use super::PingId;
use crate::timer::TimerTable;

/// What is to be done at a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// The path in use may need a ping.
    Heartbeat(NodePublic),
    /// A ping along the path in use has not been answered.
    Retry(NodePublic),
    /// Pings of a search are to be repeated.
    Again(NodePublic),
    /// The path in use is not proven any more.
    Trust(NodePublic),
    /// Lengths are to be looked at.
    Mtu(NodePublic),
    /// The oldest ping in flight is given up.
    Flight(NodePublic),
    /// Searches wait for their turn.
    Pace,
    /// A user's ping is given up.
    UserPing(PingId),
    /// Our own addresses grow old.
    Endpoints,
    /// The guesser wants to be called.
    Guess,
}

/// Those that a peer has, in the order in which they are kept.
const OF_PEER: [fn(NodePublic) -> Timer; 6] =
    [Timer::Heartbeat, Timer::Retry, Timer::Again, Timer::Trust, Timer::Mtu, Timer::Flight];

impl Timer {
    /// Whose it is, and its place in [`OF_PEER`].
    fn of_peer(self) -> Option<(NodePublic, usize)> {
        match self {
            Self::Heartbeat(node) => Some((node, 0)),
            Self::Retry(node) => Some((node, 1)),
            Self::Again(node) => Some((node, 2)),
            Self::Trust(node) => Some((node, 3)),
            Self::Mtu(node) => Some((node, 4)),
            Self::Flight(node) => Some((node, 5)),
            Self::Pace | Self::UserPing(_) | Self::Endpoints | Self::Guess => None,
        }
    }
}

/// One peer's deadlines.
#[derive(Debug, Clone, Copy, Default)]
struct Deadlines([Option<Instant>; OF_PEER.len()]);

impl Deadlines {
    /// The earliest, and what it is for. Of two at one time, the one that comes first in [`OF_PEER`].
    fn first(&self) -> Option<(Instant, usize)> {
        self.0.iter().enumerate().filter_map(|(place, at)| Some(((*at)?, place))).min()
    }
}

/// At most one deadline per timer, in order of time.
#[derive(Debug)]
pub(super) struct Timers {
    peers: BTreeMap<NodePublic, Deadlines>,
    /// The earliest deadline of each peer that has any.
    next: BTreeSet<(Instant, NodePublic)>,
    others: TimerTable<Timer>,
}

impl Timers {
    pub(super) const fn new() -> Self {
        Self { peers: BTreeMap::new(), next: BTreeSet::new(), others: TimerTable::new() }
    }

    /// Sets or moves a deadline.
    pub(super) fn set(&mut self, timer: Timer, at: Instant) {
        match timer.of_peer() {
            Some((node, place)) => self.change(node, place, Some(at)),
            None => self.others.set(timer, at),
        }
    }

    /// Sets a deadline unless there is one already.
    pub(super) fn set_if_absent(&mut self, timer: Timer, at: Instant) {
        if !self.is_set(timer) {
            self.set(timer, at);
        }
    }

    /// Sets a deadline, or moves it if it is later.
    pub(super) fn set_by(&mut self, timer: Timer, at: Instant) {
        if self.get(timer).is_none_or(|held| at < held) {
            self.set(timer, at);
        }
    }

    pub(super) fn clear(&mut self, timer: Timer) {
        match timer.of_peer() {
            Some((node, place)) => self.change(node, place, None),
            None => self.others.clear(timer),
        }
    }

    /// Clears all of a peer's.
    pub(super) fn clear_peer(&mut self, node: &NodePublic) {
        if let Some((at, _)) = self.peers.remove(node).and_then(|deadlines| deadlines.first()) {
            self.next.remove(&(at, *node));
        }
    }

    pub(super) fn is_set(&self, timer: Timer) -> bool {
        self.get(timer).is_some()
    }

    /// The earliest deadline.
    pub(super) fn next(&self) -> Option<Instant> {
        self.next.first().map(|(at, _)| *at).into_iter().chain(self.others.next()).min()
    }

    /// Takes the earliest deadline that is due at `now`.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Timer> {
        let Some((at, node)) = self.next.first().copied() else { return self.others.pop_due(now) };
        if at > now || self.others.next().is_some_and(|other| other < at) {
            return self.others.pop_due(now);
        }
        let (_, place) = self.peers.get(&node)?.first()?;
        self.change(node, place, None);
        Some(OF_PEER[place](node))
    }

    fn get(&self, timer: Timer) -> Option<Instant> {
        match timer.of_peer() {
            Some((node, place)) => self.peers.get(&node)?.0[place],
            None => self.others.get(timer),
        }
    }

    fn change(&mut self, node: NodePublic, place: usize, at: Option<Instant>) {
        if at.is_none() && !self.peers.contains_key(&node) {
            return;
        }
        let deadlines = self.peers.entry(node).or_default();
        let before = deadlines.first();
        deadlines.0[place] = at;
        let after = deadlines.first();
        let (before, after) = (before.map(|(at, _)| at), after.map(|(at, _)| at));
        if before == after {
            return;
        }
        if let Some(before) = before {
            self.next.remove(&(before, node));
        }
        match after {
            Some(after) => {
                self.next.insert((after, node));
            }
            None => {
                self.peers.remove(&node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn deadlines_of_all_kinds_come_in_order_of_time() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let [a, b] = [1, 2].map(|n| NodePublic::from_bytes([n; 32]));
        let mut timers = Timers::new();
        timers.set(Timer::Trust(a), at(6));
        timers.set(Timer::Heartbeat(a), at(3));
        timers.set(Timer::Heartbeat(b), at(4));
        timers.set(Timer::Pace, at(5));
        timers.set(Timer::Mtu(b), at(1));
        timers.clear(Timer::Mtu(b));
        timers.set_if_absent(Timer::Heartbeat(b), at(9));
        timers.set_by(Timer::Trust(a), at(2));
        timers.set_by(Timer::Heartbeat(a), at(9));
        assert_eq!((timers.next(), timers.pop_due(at(1))), (Some(at(2)), None));
        let order = std::iter::from_fn(|| timers.pop_due(at(5))).collect::<Vec<_>>();
        assert_eq!(order, [Timer::Trust(a), Timer::Heartbeat(a), Timer::Heartbeat(b), Timer::Pace]);
        timers.set(Timer::Again(a), at(7));
        timers.set(Timer::Retry(a), at(8));
        timers.clear_peer(&a);
        assert_eq!((timers.next(), timers.peers.len()), (None, 0));
    }
}
