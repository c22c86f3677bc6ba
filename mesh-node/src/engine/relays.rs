//! Which relay connections are wanted: the home region always, others while they are used.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;

/// How long a connection to a foreign region outlives its last use.
const IDLE: Duration = Duration::from_secs(60);

/// The relay connections that should exist.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RelayPlan {
    /// Where we listen; told to that relay, so that it prefers us there.
    pub home: Option<RegionId>,
    /// All regions to be connected to, the home region included.
    pub regions: BTreeSet<RegionId>,
}

/// Keeps account of uses.
#[derive(Debug, Default)]
pub(super) struct Relays {
    home: Option<RegionId>,
    used: BTreeMap<RegionId, Instant>,
    connected: BTreeSet<RegionId>,
    planned: RelayPlan,
}

impl Relays {
    pub(super) fn home(&self) -> Option<RegionId> {
        self.home
    }

    /// Moves the home. The former one stays connected as a foreign region for as long as it would after a use: peers
    /// that have not yet heard of the move still send there.
    pub(super) fn set_home(&mut self, now: Instant, home: Option<RegionId>) {
        if let Some(former) = self.home.filter(|former| Some(*former) != home) {
            self.used.insert(former, now);
        }
        self.home = home;
    }

    pub(super) fn note_use(&mut self, now: Instant, region: RegionId) {
        if Some(region) != self.home {
            self.used.insert(region, now);
        }
    }

    pub(super) fn set_connected(&mut self, region: RegionId, connected: bool) {
        if connected {
            self.connected.insert(region);
        } else {
            self.connected.remove(&region);
        }
    }

    pub(super) fn is_connected(&self, region: RegionId) -> bool {
        self.connected.contains(&region)
    }

    /// Regions that the map no longer has are dropped.
    pub(super) fn retain(&mut self, exists: impl Fn(RegionId) -> bool) {
        self.used.retain(|region, _| exists(*region));
        self.connected.retain(|region| exists(*region));
        self.home = self.home.filter(|home| exists(*home));
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.used.retain(|_, last| now < *last + IDLE);
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.used.values().min().map(|last| *last + IDLE)
    }

    /// The plan, if it has changed since the last call.
    pub(super) fn poll_plan(&mut self) -> Option<RelayPlan> {
        let plan = RelayPlan { home: self.home, regions: self.used.keys().copied().chain(self.home).collect() };
        if plan == self.planned {
            return None;
        }
        self.planned.clone_from(&plan);
        Some(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::epoch;

    fn region(number: u16) -> RegionId {
        RegionId::new(number).unwrap()
    }

    #[test]
    fn a_foreign_region_is_connected_on_use_and_closed_when_idle() {
        let now = epoch();
        let mut relays = Relays::default();
        relays.set_home(now, Some(region(1)));
        assert_eq!(relays.poll_plan().unwrap().regions, BTreeSet::from([region(1)]));
        relays.note_use(now, region(2));
        assert_eq!(relays.poll_plan().unwrap().regions, BTreeSet::from([region(1), region(2)]));
        relays.note_use(now + Duration::from_secs(30), region(2));
        assert_eq!(relays.poll_plan(), None);
        relays.handle_timeout(now + Duration::from_secs(60));
        assert_eq!(relays.poll_plan(), None);
        let due = relays.poll_timeout().unwrap();
        assert_eq!(due, now + Duration::from_secs(90));
        relays.handle_timeout(due);
        assert_eq!(relays.poll_plan().unwrap().regions, BTreeSet::from([region(1)]));
        assert_eq!(relays.poll_timeout(), None);
    }

    #[test]
    fn the_former_home_lingers() {
        let now = epoch();
        let mut relays = Relays::default();
        relays.set_home(now, Some(region(1)));
        relays.set_home(now, Some(region(2)));
        let plan = relays.poll_plan().unwrap();
        assert_eq!((plan.home, plan.regions.len()), (Some(region(2)), 2));
    }
}
