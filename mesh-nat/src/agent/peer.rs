//! What the agent remembers about one peer.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_noise::key::{DiscoPublic, SharedBox};

use super::doubt::Doubt;
use super::pulse::Pulse;
use super::relay::Relayed;
use super::{Counters, Mode, Timing};
use crate::behaviour::Behaviour;
use crate::path::candidate::{Candidates, Target, usable};
use crate::path::mtu::MtuSearch;
use crate::path::probe::{Budget, Flight, Purpose};
use crate::path::select::{Incumbent, select};
use crate::path::{Family, Path, SocketId};

/// How long after a call-me-maybe of ours we take part in a search without traffic of our own.
const CALL_ENGAGES: Duration = Duration::from_secs(10);
/// How long an address lives that nobody lists.
const UNLISTED_LIFE: Duration = Duration::from_secs(45);

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) disco: DiscoPublic,
    /// Computed when first needed: it costs a scalar multiplication.
    pub(super) shared: Option<SharedBox>,
    pub(super) home: Option<RegionId>,
    /// The region it was last heard through.
    pub(super) heard: Option<RegionId>,
    /// What control lists, kept for when the sockets change.
    pub(super) listed: Box<[SocketAddr]>,
    pub(super) candidates: Candidates,
    /// Pings that wait for their pongs.
    pub(super) flight: Flight,
    pub(super) best: Option<Target>,
    /// The way through a peer relay, while it is proven.
    pub(super) relayed: Option<Relayed>,
    /// The path that the caller knows of.
    pub(super) published: Option<Path>,
    pub(super) since: Instant,
    /// Where the caller sends data as well.
    pub(super) published_backup: Option<Path>,
    /// What control says of its NATs.
    pub(super) behaviour: Behaviour,
    /// Whether it understands our own messages.
    pub(super) ours: bool,
    /// When data was last sent.
    pub(super) sent: Option<Instant>,
    /// When the steady flow of data began that `sent` belongs to.
    pub(super) flowing: Option<Instant>,
    pub(super) searched: Option<Instant>,
    /// When the search for a direct path began, if there is none.
    pub(super) sought: Option<Instant>,
    /// When we last sent a call-me-maybe.
    pub(super) called: Option<Instant>,
    pub(super) budget: Budget,
    /// How far the direct path in use is doubted.
    pub(super) doubt: Doubt,
    /// How seldom that path may be pinged.
    pub(super) pulse: Pulse,
    /// When one direct path last gave way to another.
    pub(super) switched: Option<Instant>,
    /// When what was not answered was last tried again.
    pub(super) repeated: Option<Instant>,
    /// Whether the latest call-me-maybe is to be repeated if nothing comes of it.
    pub(super) call_again: bool,
    /// The search for the limit of the path in use under way.
    pub(super) mtu: Option<MtuSearch>,
    /// The limit that the caller knows of.
    pub(super) told_limit: Option<usize>,
}

impl Peer {
    pub(super) fn new(now: Instant, disco: DiscoPublic) -> Self {
        Self {
            disco,
            shared: None,
            home: None,
            heard: None,
            listed: Box::default(),
            candidates: Candidates::default(),
            flight: Flight::default(),
            best: None,
            relayed: None,
            published: None,
            since: now,
            published_backup: None,
            behaviour: Behaviour::default(),
            ours: false,
            sent: None,
            flowing: None,
            searched: None,
            sought: None,
            called: None,
            budget: Budget::full(now),
            doubt: Doubt::default(),
            pulse: Pulse::default(),
            switched: None,
            repeated: None,
            call_again: false,
            mtu: None,
            told_limit: None,
        }
    }

    /// The region whose relay reaches the peer.
    pub(super) fn region(&self) -> Option<RegionId> {
        self.home.or(self.heard)
    }

    /// Where data goes. `best` is always proven: it is chosen anew when its trust ends.
    pub(super) fn path(&self, mode: Mode) -> Option<Path> {
        let relay = self.region().map(|region| Path::Relay { region });
        let direct = self.best.map(Path::from);
        match mode {
            Mode::Auto => direct.or(self.relayed.map(|relayed| relayed.place.into())).or(relay),
            Mode::Relay => relay,
            Mode::Direct => direct,
        }
    }

    /// The path in use, if it goes by UDP.
    pub(super) fn udp_path(&self, mode: Mode) -> Option<Path> {
        self.path(mode).filter(|path| !path.is_relay())
    }

    /// The direct path to use now.
    pub(super) fn choose(&self, now: Instant, timing: &Timing) -> Option<Target> {
        let incumbent = self.best.map(|target| Incumbent {
            target,
            trust: self.trust(timing),
            doubted: self.doubt.since(),
            dwelling: within(self.switched, now, timing.dwell),
        });
        select(now, timing.trust, &self.candidates, incumbent)
    }

    pub(super) fn active(&self, now: Instant, timing: &Timing) -> bool {
        within(self.sent, now, timing.active)
    }

    /// Whether a search is worth something: there is traffic, or we have just asked the peer to search.
    pub(super) fn engaged(&self, now: Instant, timing: &Timing) -> bool {
        self.active(now, timing) || within(self.called, now, CALL_ENGAGES)
    }

    /// Forgets pings along direct paths that are under way, but for users' own: their answers would mislead.
    pub(super) fn forget_pings(&mut self) {
        self.flight.retain(|probe| !probe.path.is_direct() || matches!(probe.purpose, Purpose::User(_)));
    }

    /// Forgets what trying has shown of all addresses but the one in use.
    pub(super) fn forget_others(&mut self) {
        let best = self.best;
        let others = self.candidates.iter_mut().filter(|(target, _)| Some(*target) != best.as_ref());
        others.for_each(|(_, candidate)| candidate.forget());
    }

    /// Replaces what control lists. Returns the targets that are new.
    pub(super) fn set_listed(
        &mut self,
        now: Instant,
        sockets: &[(SocketId, Family)],
        endpoints: Box<[SocketAddr]>,
        counters: &mut Counters,
    ) -> Vec<Target> {
        self.candidates.values_mut().for_each(|candidate| candidate.listed = false);
        let mut fresh = Vec::new();
        for target in targets(sockets, &endpoints) {
            let known = self.candidates.get(&target).is_some();
            match self.candidates.admit(now, target) {
                Some(candidate) => {
                    candidate.listed = true;
                    if !known {
                        fresh.push(target);
                    }
                }
                None => counters.candidates_refused += 1,
            }
        }
        self.listed = endpoints;
        self.candidates.prune(now, UNLISTED_LIFE);
        fresh
    }

    /// Replaces what the peer itself lists. True if anything of it is new.
    pub(super) fn set_called(
        &mut self,
        now: Instant,
        sockets: &[(SocketId, Family)],
        endpoints: &[SocketAddr],
        counters: &mut Counters,
    ) -> bool {
        self.candidates.values_mut().for_each(|candidate| candidate.called = false);
        let mut fresh = false;
        for target in targets(sockets, endpoints) {
            fresh |= self.candidates.get(&target).is_none();
            match self.candidates.admit(now, target) {
                Some(candidate) => candidate.called = true,
                None => counters.candidates_refused += 1,
            }
        }
        self.candidates.prune(now, UNLISTED_LIFE);
        fresh
    }
}

/// Whether `at` lies within `span` before `now`.
pub(super) fn within(at: Option<Instant>, now: Instant, span: Duration) -> bool {
    at.is_some_and(|at| now.saturating_duration_since(at) < span)
}

/// The usable ones among `endpoints`, each from the first socket of its family.
fn targets(sockets: &[(SocketId, Family)], endpoints: &[SocketAddr]) -> Vec<Target> {
    endpoints
        .iter()
        .filter_map(|endpoint| {
            let remote = usable(*endpoint)?;
            let (socket, _) = sockets.iter().find(|(_, family)| *family == Family::of(&remote))?;
            Some(Target { socket: *socket, remote })
        })
        .collect()
}
