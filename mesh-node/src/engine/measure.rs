//! Measuring the network, and what follows from it: endpoints and the home region.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_nat::report::{Report, Scope, fallback_home};
use rand_core::Rng;

use super::{Command, Engine, Event};

/// How long after the last packet a node counts as active: so long its addresses are kept fresh.
const ACTIVE: Duration = Duration::from_secs(45);
/// The least time between two measurements of an active node, below the 30 seconds after which NATs forget.
const MEASURE_AFTER: Duration = Duration::from_secs(20);
/// The most that is added to it.
const MEASURE_JITTER_MS: u64 = 6000;

impl Engine {
    pub(super) fn set_regions(&mut self, now: Instant) {
        let derp = Arc::clone(&self.map.derp);
        self.relays.retain(|region| derp.regions.contains_key(&region));
        self.announce = true;
        self.start_measuring(now, Scope::Full);
        self.commands.push_back(Command::Regions(derp));
    }

    /// Starts a measurement, or notes that another one is due after the present one.
    pub(super) fn start_measuring(&mut self, now: Instant, scope: Scope) {
        self.next_measure = None;
        self.measure_again = !self.netcheck.start(now, Arc::clone(&self.map.derp), scope);
    }

    pub(super) fn plan_measuring(&mut self, now: Instant) {
        let jitter = Duration::from_millis(self.rng.next_u64() % MEASURE_JITTER_MS);
        self.next_measure = Some(now + MEASURE_AFTER + jitter);
    }

    pub(super) fn is_active(&self, now: Instant) -> bool {
        self.last_active.is_some_and(|last| now.saturating_duration_since(last) < ACTIVE)
    }

    /// Home and addresses are known; what the NAT does is still being found out.
    pub(super) fn located(&mut self, now: Instant, report: Report) {
        let home = self.relays.home();
        let wanted = report.preferred.or(home).or_else(|| fallback_home(&self.map.derp, &self.me));
        if home.is_none() || self.control_connected {
            self.relays.set_home(now, wanted);
        }
        self.netcheck.set_home(self.relays.home());
        self.tell_agent(now, &report);
        self.sightings.note(now, &report, self.local.port_v4.filter(|_| self.fixed_port));
        self.report = Some(Box::new(report));
        self.gather(now, true);
    }

    pub(super) fn measured(&mut self, now: Instant, report: Report) {
        self.located(now, report.clone());
        self.commands.push_back(Command::CloseSockets);
        if std::mem::take(&mut self.measure_again) {
            self.start_measuring(now, Scope::Full);
        } else if self.is_active(now) {
            self.plan_measuring(now);
        }
        self.events.push_back(Event::Measured(Box::new(report)));
    }
}
