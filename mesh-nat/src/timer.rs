//! A table of named deadlines.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// At most one deadline per name, in order of time and then of name.
#[derive(Debug, Clone)]
pub(crate) struct TimerTable<K> {
    by_name: BTreeMap<K, Instant>,
    by_time: BTreeSet<(Instant, K)>,
}

impl<K: Ord + Copy> TimerTable<K> {
    pub(crate) const fn new() -> Self {
        Self { by_name: BTreeMap::new(), by_time: BTreeSet::new() }
    }

    /// Sets or moves a deadline.
    pub(crate) fn set(&mut self, name: K, at: Instant) {
        if let Some(old) = self.by_name.insert(name, at) {
            self.by_time.remove(&(old, name));
        }
        self.by_time.insert((at, name));
    }

    /// Sets a deadline unless the name has one already.
    pub(crate) fn set_if_absent(&mut self, name: K, at: Instant) {
        if !self.is_set(name) {
            self.set(name, at);
        }
    }

    pub(crate) fn clear(&mut self, name: K) {
        if let Some(old) = self.by_name.remove(&name) {
            self.by_time.remove(&(old, name));
        }
    }

    pub(crate) fn is_set(&self, name: K) -> bool {
        self.by_name.contains_key(&name)
    }

    pub(crate) fn get(&self, name: K) -> Option<Instant> {
        self.by_name.get(&name).copied()
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes the earliest deadline that is due at `now`.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<K> {
        let (at, name) = *self.by_time.first()?;
        if at > now {
            return None;
        }
        self.clear(name);
        Some(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn deadlines_come_in_order_and_a_name_has_one() {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut table = TimerTable::new();
        table.set("b", at(2));
        table.set("a", at(5));
        table.set("a", at(1));
        table.set_if_absent("a", at(9));
        assert_eq!(table.next(), Some(at(1)));
        assert_eq!(table.pop_due(start), None);
        assert_eq!(table.pop_due(at(3)), Some("a"));
        assert_eq!(table.pop_due(at(3)), Some("b"));
        assert_eq!((table.pop_due(at(9)), table.next()), (None, None));
    }
}
