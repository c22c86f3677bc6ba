//! What the network around this node is like: which families work, which address others see, how far each relay
//! region is, and so which one to call home.
//!
//! [`Netcheck`] is a core: it asks the STUN servers of a DERP map over the node's own sockets, so that the addresses it
//! finds are those of the sockets that carry data. When no server answers, it asks the caller to measure relays by
//! HTTPS instead ([`Event::WantHttpsLatency`]).
//!
//! ```text
//!  start ──► requests per plan ──► enough regions answered, twice the slowest waited ──► Finished
//!                    │ 500 ms without any answer
//!                    └──► WantHttpsLatency for every region ──► all told, or 5 s ──► Finished (udp: false)
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_derp::map::{DerpMap, DerpNode, FamilyAddress, RegionId};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::path::{Family, SocketId};
use crate::stun::message::{Response, StunError, TransactionId, request};

mod home;
mod plan;

pub use home::fallback as fallback_home;

/// STUN has this long.
const STUN_LIMIT: Duration = Duration::from_secs(3);
/// Everything has this long.
const REPORT_LIMIT: Duration = Duration::from_secs(5);
/// Without an answer by then, HTTPS is tried beside.
const HTTPS_AFTER: Duration = Duration::from_millis(500);
/// A network is not called UDP-blocked before this.
const BLOCKED_AFTER: Duration = Duration::from_secs(1);
/// Regions that suffice.
const ENOUGH: usize = 3;
/// The least time between the answer that suffices and the end.
const LINGER: Duration = Duration::from_millis(50);
/// The same while a second server's answer would tell how the NAT maps.
const LINGER_FOR_MAPPING: Duration = Duration::from_millis(250);
/// Every so often all regions are asked.
const FULL_INTERVAL: Duration = Duration::from_secs(300);

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Any STUN server answered.
    pub udp: bool,
    /// IPv4 works: STUN answered over it, or a relay by HTTPS.
    pub ipv4: bool,
    /// IPv6 works, likewise.
    pub ipv6: bool,
    /// Our IPv4 address as the first server to answer saw it.
    pub global_v4: Option<SocketAddr>,
    /// Our IPv6 address as the latest server saw it.
    pub global_v6: Option<SocketAddr>,
    /// All addresses that servers saw, and how many saw each.
    pub seen: BTreeMap<SocketAddr, u32>,
    /// Whether two servers saw different IPv4 addresses: the NAT maps per destination. `None` if fewer than two answered.
    pub mapping_varies_by_dest_ip: Option<bool>,
    /// Latency of each region that answered, the better family's.
    pub region_latency: BTreeMap<RegionId, Duration>,
    /// Latency over IPv4.
    pub region_latency_v4: BTreeMap<RegionId, Duration>,
    /// Latency over IPv6.
    pub region_latency_v6: BTreeMap<RegionId, Duration>,
    /// The region to be home in. `None` if nothing could be measured and the home has been silent for two minutes:
    /// then keep what you have, or take [`fallback_home`].
    pub preferred: Option<RegionId>,
    /// Whether all regions were asked.
    pub full: bool,
    /// How long it took.
    pub took: Duration,
}

impl Report {
    /// Our addresses as servers see them, for control and peers. An IPv4 address that only one server saw, other than
    /// the first, is a NAT's mapping towards that server and of use to nobody.
    #[must_use]
    pub fn endpoints(&self) -> Vec<SocketAddr> {
        let mut found: Vec<_> = self.global_v4.into_iter().chain(self.global_v6).collect();
        for (address, times) in &self.seen {
            if *times > 1 && !found.contains(address) {
                found.push(*address);
            }
        }
        found
    }
}

/// A STUN request to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// From this socket.
    pub socket: SocketId,
    /// To this server.
    pub remote: SocketAddr,
    /// The request.
    pub datagram: Vec<u8>,
}

/// What the caller should do or know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Look `host` up and call [`Netcheck::handle_resolved`].
    Resolve {
        /// The name.
        host: String,
    },
    /// UDP is silent: measure the region by HTTPS and call [`Netcheck::handle_https_latency`].
    WantHttpsLatency {
        /// The region.
        region: RegionId,
    },
    /// It is done.
    Finished(Report),
}

/// How much to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scope {
    /// The nearest regions, and all of them every five minutes.
    #[default]
    Auto,
    /// All regions.
    Full,
}

/// Makes reports, one after the other, and remembers what it takes to choose a home steadily.
pub struct Netcheck {
    rng: StdRng,
    sockets: Vec<(SocketId, Family)>,
    names: BTreeMap<String, Vec<IpAddr>>,
    history: home::History,
    home: Option<RegionId>,
    last: Option<Report>,
    last_full: Option<Instant>,
    run: Option<Run>,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl std::fmt::Debug for Netcheck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netcheck")
            .field("home", &self.home)
            .field("running", &self.run.is_some())
            .finish_non_exhaustive()
    }
}

struct Run {
    map: Arc<DerpMap>,
    started: Instant,
    full: bool,
    /// In order of time.
    steps: VecDeque<plan::Step>,
    /// What waits for a name.
    waiting: BTreeMap<String, Vec<plan::Step>>,
    sent: BTreeMap<TransactionId, Sent>,
    /// Region and family pairs that were asked or will be.
    wanted: BTreeSet<(RegionId, Family)>,
    answered: BTreeSet<(RegionId, Family)>,
    servers_v4: BTreeSet<SocketAddr>,
    answered_v4: BTreeMap<SocketAddr, SocketAddr>,
    https: Option<BTreeSet<RegionId>>,
    /// When enough had answered.
    enough: Option<Instant>,
    report: Report,
}

struct Sent {
    region: RegionId,
    server: SocketAddr,
    at: Instant,
}

impl Netcheck {
    /// A netcheck whose transaction ids come from `seed`.
    #[must_use]
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            rng: StdRng::from_seed(seed),
            sockets: Vec::new(),
            names: BTreeMap::new(),
            history: home::History::default(),
            home: None,
            last: None,
            last_full: None,
            run: None,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Our sockets; the first of each family asks.
    pub fn set_sockets(&mut self, sockets: Vec<(SocketId, Family)>) {
        self.sockets = sockets;
    }

    /// The home in use, if it is not the one that the last report preferred.
    pub const fn set_home(&mut self, home: Option<RegionId>) {
        self.home = home;
    }

    /// Learns that the relay of `region` delivered something: it is alive.
    pub fn heard_by_relay(&mut self, now: Instant, region: RegionId) {
        self.history.note_heard(now, region);
    }

    /// Forgets the names looked up, after a link change.
    pub fn forget_names(&mut self) {
        self.names.clear();
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
        let mut run = Run {
            map,
            started: now,
            full,
            steps: VecDeque::new(),
            waiting: BTreeMap::new(),
            sent: BTreeMap::new(),
            wanted: BTreeSet::new(),
            answered: BTreeSet::new(),
            servers_v4: BTreeSet::new(),
            answered_v4: BTreeMap::new(),
            https: None,
            enough: None,
            report: Report { full, ..Report::default() },
        };
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
        self.run = Some(run);
        self.handle_timeout(now);
        true
    }

    /// Takes a STUN datagram that arrived at `now`.
    ///
    /// # Errors
    /// Says why it is no answer to this report.
    pub fn handle_datagram(&mut self, now: Instant, datagram: &[u8]) -> Result<(), StunError> {
        let response = Response::decode(datagram)?;
        let run = self.run.as_mut().ok_or(StunError::UnknownTransaction)?;
        let sent = run.sent.remove(&response.tx).ok_or(StunError::UnknownTransaction)?;
        run.answered(now, &sent, response.mapped);
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
        let Some(run) = &mut self.run else { return };
        let Some(pending) = &mut run.https else { return };
        if pending.remove(&region)
            && let Some((latency, family)) = measured
        {
            run.report.region_latency.entry(region).or_insert(latency);
            match family {
                Family::V4 => run.report.ipv4 = true,
                Family::V6 => run.report.ipv6 = true,
            }
        }
        self.handle_timeout(now);
    }

    /// Does whatever is due at `now`. Calling early, late or twice is harmless.
    pub fn handle_timeout(&mut self, now: Instant) {
        let Some(run) = &mut self.run else { return };
        while let Some(step) = run.steps.front().filter(|step| run.started + step.after <= now).copied() {
            run.steps.pop_front();
            let socket = self.sockets.iter().find(|(_, family)| *family == step.family).map(|(socket, _)| *socket);
            if let (Some(socket), Server::At(remote)) = (socket, run.server(&step, &self.names))
                && run.helps(&step, remote)
            {
                let tx = TransactionId::generate(&mut self.rng);
                run.sent.insert(tx, Sent { region: step.region, server: remote, at: now });
                self.transmits.push_back(Transmit { socket, remote, datagram: request(tx) });
            }
        }
        if run.https.is_none() && !run.report.udp && now >= run.https_at() {
            let regions: BTreeSet<_> = run
                .map
                .regions
                .iter()
                .filter(|(_, region)| !region.no_measure_no_home && region.relays().next().is_some())
                .map(|(id, _)| *id)
                .collect();
            self.events.extend(regions.iter().map(|region| Event::WantHttpsLatency { region: *region }));
            run.https = Some(regions);
        }
        if run.end() <= now {
            self.finish(now);
        }
    }

    /// The next request to send.
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
        let step = run.steps.front().map(|step| run.started + step.after);
        let https = (run.https.is_none() && !run.report.udp).then(|| run.https_at());
        [step, https, Some(run.end())].into_iter().flatten().min()
    }

    fn socket(&self, family: Family) -> Option<SocketId> {
        self.sockets.iter().find(|(_, other)| *other == family).map(|(socket, _)| *socket)
    }

    fn finish(&mut self, now: Instant) {
        let Some(run) = self.run.take() else { return };
        let mut report = run.report;
        report.took = now.saturating_duration_since(run.started);
        self.history.add(now, report.region_latency.clone());
        report.preferred = self.history.choose(now, run.started, &run.map, self.home);
        self.home = report.preferred.or(self.home);
        if run.full {
            self.last_full = Some(now);
        }
        self.last = Some(report.clone());
        self.events.push_back(Event::Finished(report));
    }
}

enum Server {
    At(SocketAddr),
    /// To be looked up first.
    Named(String),
    None,
}

impl Run {
    fn server(&self, step: &plan::Step, names: &BTreeMap<String, Vec<IpAddr>>) -> Server {
        let node = self.map.regions.get(&step.region).and_then(|region| region.nodes.get(step.node));
        node.map_or(Server::None, |node| server(node, step.family, names))
    }

    fn plan(&mut self, step: plan::Step, server: SocketAddr) {
        self.wanted.insert((step.region, step.family));
        if step.family == Family::V4 {
            self.servers_v4.insert(server);
        }
        let after = self.steps.partition_point(|other| other.after <= step.after);
        self.steps.insert(after, step);
    }

    /// Whether a request would tell something new.
    fn helps(&self, step: &plan::Step, server: SocketAddr) -> bool {
        if !self.answered.contains(&(step.region, step.family)) {
            return true;
        }
        step.family == Family::V4 && self.mapping_open() && !self.answered_v4.contains_key(&server)
    }

    /// Whether another server could still tell how the NAT maps.
    fn mapping_open(&self) -> bool {
        self.answered_v4.len() < 2 && self.servers_v4.len() > self.answered_v4.len()
    }

    fn answered(&mut self, now: Instant, sent: &Sent, mapped: SocketAddr) {
        let latency = now.saturating_duration_since(sent.at);
        let family = Family::of(&sent.server);
        let report = &mut self.report;
        report.udp = true;
        *report.seen.entry(mapped).or_default() += 1;
        let by_family = match family {
            Family::V4 => {
                report.ipv4 = true;
                let first = *report.global_v4.get_or_insert(mapped);
                self.answered_v4.insert(sent.server, mapped);
                if self.answered_v4.len() > 1 {
                    let varies = report.mapping_varies_by_dest_ip.unwrap_or(false) || mapped != first;
                    report.mapping_varies_by_dest_ip = Some(varies);
                }
                &mut report.region_latency_v4
            }
            Family::V6 => {
                report.ipv6 = true;
                report.global_v6 = Some(mapped);
                &mut report.region_latency_v6
            }
        };
        for table in [by_family, &mut report.region_latency] {
            let best = table.entry(sent.region).or_insert(latency);
            *best = latency.min(*best);
        }
        self.answered.insert((sent.region, family));
        let asked: BTreeSet<_> = self.wanted.iter().map(|(region, _)| *region).collect();
        if self.report.region_latency_v4.len().max(self.report.region_latency.len()) >= asked.len().min(ENOUGH) {
            self.enough.get_or_insert(now);
        }
    }

    fn https_at(&self) -> Instant {
        if self.wanted.is_empty() && self.waiting.is_empty() { self.started } else { self.started + HTTPS_AFTER }
    }

    /// When this report ends, as far as is known now.
    fn end(&self) -> Instant {
        if self.report.udp {
            let complete = self.waiting.is_empty() && self.wanted.is_subset(&self.answered) && !self.mapping_open();
            if complete {
                return self.started;
            }
            let limit = self.started + STUN_LIMIT;
            let Some(enough) = self.enough else { return limit };
            let slowest = self.report.region_latency.values().max().copied().unwrap_or_default();
            let wait = if self.full { slowest * 2 } else { slowest };
            let least = if self.mapping_open() { LINGER_FOR_MAPPING } else { LINGER };
            return limit.min(enough + wait.max(least));
        }
        match &self.https {
            Some(pending) if pending.is_empty() && self.wanted.is_empty() && self.waiting.is_empty() => self.started,
            Some(pending) if pending.is_empty() => self.started + BLOCKED_AFTER,
            Some(_) | None => self.started + REPORT_LIMIT,
        }
    }
}

/// Where a node answers STUN over `family`.
fn server(node: &DerpNode, family: Family, names: &BTreeMap<String, Vec<IpAddr>>) -> Server {
    let Some(port) = node.stun_udp_port() else { return Server::None };
    let fits = |ip: &IpAddr| Family::of(&SocketAddr::new(*ip, port)) == family;
    let at = |ip: IpAddr| Server::At(SocketAddr::new(ip, port));
    if let Ok(ip) = node.stun_test_ip.parse::<IpAddr>() {
        return if fits(&ip) { at(ip) } else { Server::None };
    }
    let given = match family {
        Family::V4 => match node.v4() {
            FamilyAddress::At(ip) => Some(IpAddr::V4(ip)),
            FamilyAddress::Disabled => return Server::None,
            FamilyAddress::Lookup => None,
        },
        Family::V6 => match node.v6() {
            FamilyAddress::At(ip) => Some(IpAddr::V6(ip)),
            FamilyAddress::Disabled => return Server::None,
            FamilyAddress::Lookup => None,
        },
    };
    // A host name may be an address itself.
    let given = given.or_else(|| node.host_name.trim_matches(['[', ']']).parse().ok());
    match (given, names.get(&node.host_name)) {
        (Some(ip), _) => {
            if fits(&ip) {
                at(ip)
            } else {
                Server::None
            }
        }
        (None, Some(found)) => found.iter().find(|ip| fits(ip)).map_or(Server::None, |ip| at(*ip)),
        (None, None) if node.host_name.is_empty() => Server::None,
        (None, None) => Server::Named(node.host_name.clone()),
    }
}

#[cfg(test)]
mod tests;
