//! What the network around this node is like: which families work, which address others see, what the NAT does, how far
//! each relay region is, and so which one to call home.
//!
//! [`Netcheck`] is a core: it asks the STUN servers of a DERP map over the node's own sockets, so that the addresses it
//! finds are those of the sockets that carry data. When no server answers, it asks the caller to measure relays by
//! HTTPS instead ([`Event::WantHttpsLatency`]).
//!
//! ```text
//!  start ──► requests per plan ──► enough regions answered, twice the slowest waited ──► Located ──┐
//!                    │ 200 ms without any answer                            a full report asks the NAT │
//!                    ├──► WantHttpsLatency for every region ──► all told, or 0.95 s ──► Finished      ▼
//!                    └──► WantPortalCheck                                    (udp: false)         Finished
//! ```
//!
//! However the network is, a report takes at most 1.4 s; where UDP is blocked and relays can be reached, less than one.
//! What comes later by HTTPS, where nothing else is known, amends the report: it is finished a second time.
//!
//! What the NAT does is told as [`Behaviour`](crate::Behaviour): the mapping from what servers at several addresses and ports see of one
//! socket, the rest with a few sockets that the caller opens for a moment ([`Event::WantSockets`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_derp::map::{DerpMap, RegionId};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::path::{Family, SocketId};
use crate::stun::message::{Request, Response, StunError, TransactionId, request};

mod allocation;
mod home;
mod plan;
mod portal;
mod probing;
mod run;
mod servers;
mod sightings;
mod types;

pub use home::fallback as fallback_home;
pub use portal::PortalCheck;
pub use types::{Event, Report, Scope, Transmit};

use probing::{Probing, Stage};
use run::{Portal, Run, Sent};
use servers::Server;

/// Every so often all regions are asked.
const FULL_INTERVAL: Duration = Duration::from_secs(300);

/// Makes reports, one after the other, and remembers what it takes to choose a home steadily.
pub struct Netcheck {
    rng: StdRng,
    sockets: Vec<(SocketId, Family)>,
    /// The ports that our sockets are bound to, where known.
    ports: BTreeMap<SocketId, u16>,
    /// This host's addresses.
    interfaces: BTreeSet<IpAddr>,
    names: BTreeMap<String, Vec<IpAddr>>,
    history: home::History,
    home: Option<RegionId>,
    forced: Option<RegionId>,
    last: Option<Report>,
    last_full: Option<Instant>,
    run: Option<Run>,
    late: Option<Late>,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

/// What is still awaited after a report that found nothing.
struct Late {
    map: Arc<DerpMap>,
    started: Instant,
    pending: BTreeSet<RegionId>,
}

impl std::fmt::Debug for Netcheck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netcheck")
            .field("home", &self.home)
            .field("running", &self.run.is_some())
            .finish_non_exhaustive()
    }
}

impl Netcheck {
    /// A netcheck whose transaction ids come from `seed`.
    #[must_use]
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            rng: StdRng::from_seed(seed),
            sockets: Vec::new(),
            ports: BTreeMap::new(),
            interfaces: BTreeSet::new(),
            names: BTreeMap::new(),
            history: home::History::default(),
            home: None,
            forced: None,
            last: None,
            last_full: None,
            run: None,
            late: None,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    // Commands

    /// Our sockets; the first of each family asks.
    pub fn set_sockets(&mut self, sockets: Vec<(SocketId, Family)>) {
        self.sockets = sockets;
    }

    /// What our sockets are bound to: shows whether a NAT keeps their ports.
    pub fn set_ports(&mut self, bound: &[(SocketId, SocketAddr)]) {
        self.ports = bound.iter().map(|(socket, bound)| (*socket, bound.port())).collect();
    }

    /// This host's own addresses: a server that sees one of them sees no NAT. Without any, nothing is said about that.
    pub fn set_interfaces(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.interfaces = addresses.into_iter().collect();
    }

    /// The home in use, if it is not the one that the last report preferred.
    pub const fn set_home(&mut self, home: Option<RegionId>) {
        self.home = home;
    }

    /// Prefers `region` over all others, whatever they measure, as long as it answers or was heard lately.
    pub const fn force_home(&mut self, region: Option<RegionId>) {
        self.forced = region;
    }

    /// Learns that the relay of `region` delivered something: it is alive.
    pub fn heard_by_relay(&mut self, now: Instant, region: RegionId) {
        self.history.note_heard(now, region);
    }

    /// Forgets the names looked up, after a link change.
    pub fn forget_names(&mut self) {
        self.names.clear();
    }

    /// The network is another one: forgets the names looked up and what was found out about the NAT, so that the next
    /// report is a full one. A report that is being made is given up, for half of it would be about either network.
    pub fn forget_network(&mut self) {
        self.run = None;
        self.late = None;
        self.names.clear();
        self.last = None;
        self.last_full = None;
    }

    /// Whether a report is being made.
    #[must_use]
    pub const fn is_running(&self) -> bool {
        self.run.is_some()
    }

    /// The latest report.
    #[must_use]
    pub const fn last(&self) -> Option<&Report> {
        self.last.as_ref()
    }

    /// Starts a report about `map`. Returns `false`, and does nothing, while one is being made.
    pub fn start(&mut self, now: Instant, map: Arc<DerpMap>, scope: Scope) -> bool {
        if self.run.is_some() {
            return false;
        }
        self.late = None;
        let families: Vec<_> =
            [Family::V4, Family::V6].into_iter().filter(|family| self.socket(*family).is_some()).collect();
        let due = self.last_full.is_none_or(|at| now.saturating_duration_since(at) >= FULL_INTERVAL);
        let last = self.last.as_ref().filter(|last| scope == Scope::Auto && !due && last.udp);
        let steps = match last {
            Some(last) => plan::incremental(&map, &families, last, self.home),
            None => plan::full(&map, &families),
        };
        let full = last.is_none() || steps.is_empty();
        let steps = if steps.is_empty() { plan::full(&map, &families) } else { steps };
        let mut run = Run::new(map, now, full, self.interfaces.clone());
        run.home = self.home;
        let mut unknown = BTreeSet::new();
        for step in steps {
            match run.server(&step, &self.names) {
                Server::At(server) => run.plan(step, server),
                Server::Named(host) => {
                    unknown.insert(host.clone());
                    run.waiting.entry(host).or_default().push(step);
                }
                Server::None => {}
            }
        }
        self.events.extend(unknown.into_iter().map(|host| Event::Resolve { host }));
        // Regions without STUN are measured by HTTPS from the start: all, or the one that we live in.
        run.https = plan::without_stun(&run.map).filter(|region| full || Some(*region) == self.home).collect();
        self.events.extend(run.https.iter().map(|region| Event::WantHttpsLatency { region: *region }));
        self.run = Some(run);
        self.handle_timeout(now);
        true
    }

    // Inputs

    /// Takes a STUN datagram that arrived at `now`, where its sender is not known: [`Self::handle_datagram_from`] learns
    /// more from it.
    ///
    /// # Errors
    /// Says why it has nothing to do with this report.
    pub fn handle_datagram(&mut self, now: Instant, datagram: &[u8]) -> Result<(), StunError> {
        self.take(now, None, datagram)
    }

    /// Takes a STUN datagram that arrived at `now` from `source`, on whichever socket.
    ///
    /// # Errors
    /// Says why it has nothing to do with this report.
    pub fn handle_datagram_from(&mut self, now: Instant, source: SocketAddr, datagram: &[u8]) -> Result<(), StunError> {
        self.take(now, Some(source), datagram)
    }

    fn take(&mut self, now: Instant, source: Option<SocketAddr>, datagram: &[u8]) -> Result<(), StunError> {
        let run = self.run.as_mut().ok_or(StunError::UnknownTransaction)?;
        let response = match Response::decode(datagram) {
            Ok(response) => response,
            Err(error) => {
                let tx = Request::decode(datagram).map_err(|_| error)?.tx;
                let ours = run.probing.as_mut().is_some_and(|probing| probing.crossed(tx));
                if ours {
                    self.handle_timeout(now);
                }
                return if ours { Ok(()) } else { Err(StunError::UnknownTransaction) };
            }
        };
        let changed = |probing: &mut Probing| source.is_some_and(|source| probing.changed(source, response.tx));
        if run.probing.as_mut().is_some_and(changed) {
            self.handle_timeout(now);
            return Ok(());
        }
        let sent = run.sent.remove(&response.tx).ok_or(StunError::UnknownTransaction)?;
        match &mut run.probing {
            None => run.answered(now, &sent, response.mapped),
            Some(probing) => {
                probing.told(response.tx);
                let extra = probing.own(sent.socket).is_some();
                run.saw(&sent, response.mapped, extra);
            }
        }
        self.handle_timeout(now);
        Ok(())
    }

    /// Tells the addresses of a host; none if it has none.
    pub fn handle_resolved(&mut self, now: Instant, host: &str, addresses: Vec<IpAddr>) {
        if let Some(run) = &mut self.run {
            let steps = run.waiting.remove(host).unwrap_or_default();
            self.names.insert(host.to_owned(), addresses);
            for step in steps {
                if let Server::At(server) = run.server(&step, &self.names) {
                    run.plan(step, server);
                }
            }
            self.handle_timeout(now);
        }
    }

    /// Tells how long a region took by HTTPS, and over which family; `None` if it cannot be reached.
    pub fn handle_https_latency(&mut self, now: Instant, region: RegionId, measured: Option<(Duration, Family)>) {
        match &mut self.run {
            Some(run) => {
                if run.https.remove(&region) {
                    note_https(&mut run.report, region, measured);
                }
            }
            None => self.amend(now, region, measured),
        }
        self.handle_timeout(now);
    }

    /// Tells whether somebody else answers HTTP requests ([`PortalCheck::judge`]); `None` if nobody answers.
    pub fn handle_portal(&mut self, now: Instant, found: Option<bool>) {
        if let Some(run) = self.run.as_mut().filter(|run| run.portal == Portal::Asked) {
            run.portal = Portal::Closed;
            run.report.captive_portal = Some(found == Some(true));
        }
        self.handle_timeout(now);
    }

    /// Hands over the sockets asked for by [`Event::WantSockets`] and what they are bound to. Datagrams that they receive
    /// come to [`Self::handle_datagram_from`].
    pub fn handle_sockets(&mut self, now: Instant, sockets: &[(SocketId, SocketAddr)]) {
        let Self { run: Some(run), rng, transmits, .. } = self else { return };
        if let Some(mut probing) = run.probing.take() {
            if matches!(probing.stage, Stage::Wanted) {
                transmits.extend(probing.open(now, run, sockets, || TransactionId::generate(rng)));
            }
            run.probing = Some(probing);
        }
        self.handle_timeout(now);
    }

    /// Does whatever is due at `now`. Calling early, late or twice is harmless.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.ask(now);
        self.look_elsewhere(now);
        let located = self.run.as_ref().is_some_and(|run| run.probing.is_none() && run.end() <= now);
        if located {
            self.locate(now);
        }
        self.probe(now);
    }

    /// Sends the requests that are due.
    fn ask(&mut self, now: Instant) {
        let Some(run) = self.run.as_mut().filter(|run| run.probing.is_none()) else { return };
        while let Some(step) = run.steps.front().filter(|step| run.started + step.after <= now).copied() {
            run.steps.pop_front();
            if let (Some(socket), Server::At(server)) =
                (first(&self.sockets, step.family), run.server(&step, &self.names))
                && run.helps(&step, server)
            {
                let tx = TransactionId::generate(&mut self.rng);
                run.count(socket, server);
                let own = self.ports.get(&socket).copied().unwrap_or(0);
                run.sent.insert(tx, Sent { region: Some(step.region), socket, own, server, at: now });
                self.transmits.push_back(Transmit { socket, remote: server, datagram: request(tx) });
            }
        }
    }

    /// Where UDP is silent, tries HTTP and HTTPS.
    fn look_elsewhere(&mut self, now: Instant) {
        let Some(run) = self.run.as_mut().filter(|run| run.probing.is_none() && now >= run.silent_at()) else { return };
        if !run.fell_back && !run.report.udp {
            run.fell_back = true;
            let known =
                |region: &RegionId| run.https.contains(region) || run.report.region_latency.contains_key(region);
            let regions: Vec<_> = plan::relays(&run.map).filter(|region| !known(region)).collect();
            run.https.extend(&regions);
            self.events.extend(regions.into_iter().map(|region| Event::WantHttpsLatency { region }));
        }
        if run.portal == Portal::Open {
            let checks = portal::checks(&run.map, self.home);
            run.portal = if checks.is_empty() { Portal::Closed } else { Portal::Asked };
            if run.portal == Portal::Asked {
                self.events.push_back(Event::WantPortalCheck(checks));
            }
        }
    }

    /// Latencies and addresses are known: chooses a home, and goes on with what the NAT does.
    fn locate(&mut self, now: Instant) {
        let main = self.socket(Family::V4);
        let Some(mut run) = self.run.take() else { return };
        run.conclude(self.last.as_ref());
        run.report.took = now.saturating_duration_since(run.started);
        self.history.add(now, run.report.region_latency.clone());
        self.choose_home(now, run.started, &run.map, &mut run.report);
        let servers = main.map(|main| run.references(main)).unwrap_or_default();
        let main = main.filter(|_| run.full && !servers.is_empty());
        if let Some(main) = main {
            run.probing = Some(Probing::new(now, main, servers));
            self.events.push_back(Event::Located(run.report.clone()));
            self.events.push_back(Event::WantSockets { count: probing::SOCKETS });
        }
        self.run = Some(run);
        if main.is_none() {
            self.finish(now);
        }
    }

    /// Chooses a home by what a report that began at `started` has found.
    fn choose_home(&mut self, now: Instant, started: Instant, map: &DerpMap, report: &mut Report) {
        report.preferred = self.history.choose(now, started, map, self.home, self.forced);
        self.home = report.preferred.or(self.home);
    }

    /// Goes on with the questions that need sockets of their own.
    fn probe(&mut self, now: Instant) {
        let Self { run: Some(run), rng, transmits, .. } = self else { return };
        let Some(mut probing) = run.probing.take() else { return };
        let mut draw = || TransactionId::generate(rng);
        transmits.extend(probing.repeat(now, &mut draw));
        let limit = run.started + run::REPORT_LIMIT;
        let asked = matches!(probing.stage, Stage::Asking) && probing.is_over(now) && now < limit;
        if asked {
            transmits.extend(probing.cross(now, run, &mut draw));
        }
        probing.until = probing.until.min(limit);
        let over = probing.is_over(now);
        run.probing = Some(probing);
        if over {
            self.finish(now);
        }
    }

    fn finish(&mut self, now: Instant) {
        let Some(mut run) = self.run.take() else { return };
        if let Some(probing) = run.probing.take() {
            run.conclude(self.last.as_ref());
            run.report.nat_v4.hairpin = probing.hairpin();
            run.report.nat_v4.filtering = probing.filtering();
            self.history.amend(run.report.region_latency.clone());
            self.choose_home(now, run.started, &run.map, &mut run.report);
        }
        let mut report = run.report;
        report.took = now.saturating_duration_since(run.started);
        let address = |report: &Report| (report.global_v4.map(|v4| v4.ip()), report.global_v6.map(|v6| v6.ip()));
        let moved = self.last.as_ref().is_some_and(|last| address(last) != address(&report));
        if run.full {
            self.last_full = Some(now);
        } else if moved {
            self.last_full = None;
        }
        if report.region_latency.is_empty() && !run.https.is_empty() {
            self.late = Some(Late { map: run.map, started: run.started, pending: run.https });
        }
        self.last = Some(report.clone());
        self.events.push_back(Event::Finished(report));
    }

    /// Takes an answer that comes after a report that found nothing at all.
    fn amend(&mut self, now: Instant, region: RegionId, measured: Option<(Duration, Family)>) {
        let (Some(late), Some(last)) = (&mut self.late, &self.last) else { return };
        if !late.pending.remove(&region) || measured.is_none() {
            return;
        }
        let (started, map, mut report) = (late.started, Arc::clone(&late.map), last.clone());
        note_https(&mut report, region, measured);
        self.history.amend(report.region_latency.clone());
        self.choose_home(now, started, &map, &mut report);
        report.took = now.saturating_duration_since(started);
        self.last = Some(report.clone());
        self.events.push_back(Event::Finished(report));
    }

    // Outputs

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next thing to do or know.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`Self::handle_timeout`]; `None` while no report is being made.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let run = self.run.as_ref()?;
        if let Some(probing) = &run.probing {
            return Some(probing.next());
        }
        let step = run.steps.front().map(|step| run.started + step.after);
        let elsewhere = (!run.fell_back && !run.report.udp) || run.portal == Portal::Open;
        let elsewhere = elsewhere.then(|| run.silent_at());
        [step, elsewhere, Some(run.end())].into_iter().flatten().min()
    }

    fn socket(&self, family: Family) -> Option<SocketId> {
        first(&self.sockets, family)
    }
}

/// The socket of a family that asks.
fn first(sockets: &[(SocketId, Family)], family: Family) -> Option<SocketId> {
    sockets.iter().find(|(_, other)| *other == family).map(|(socket, _)| *socket)
}

fn note_https(report: &mut Report, region: RegionId, measured: Option<(Duration, Family)>) {
    let Some((latency, family)) = measured else { return };
    report.region_latency.entry(region).or_insert(latency);
    match family {
        Family::V4 => report.ipv4 = true,
        Family::V6 => report.ipv6 = true,
    }
}

#[cfg(test)]
mod tests;
