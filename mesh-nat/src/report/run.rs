//! One report in the making: what has been asked and answered, and when it may end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_derp::map::{DerpMap, RegionId};

use super::plan::Step;
use super::probing::Probing;
use super::servers::{Server, server};
use super::sightings::{Sighting, Sightings};
use super::types::Report;
use crate::behaviour::Behaviour;
use crate::path::{Family, SocketId};
use crate::stun::message::TransactionId;

/// STUN has this long.
const STUN_LIMIT: Duration = Duration::from_millis(1200);
/// Everything has this long.
pub(super) const REPORT_LIMIT: Duration = Duration::from_millis(1400);
/// Without an answer by then, HTTPS is tried beside, and captive portals are looked for.
const SILENT_AFTER: Duration = Duration::from_millis(200);
/// A network is not called UDP-blocked before this.
const BLOCKED_AFTER: Duration = Duration::from_millis(700);
/// Once a relay has answered by HTTPS, others are not waited for any longer than this.
const BLOCKED_LIMIT: Duration = Duration::from_millis(950);
/// Regions that suffice.
const ENOUGH: usize = 3;
/// The least time between the answer that suffices and the end.
const LINGER: Duration = Duration::from_millis(50);
/// The same while a second server's answer would tell how the NAT maps.
const LINGER_FOR_MAPPING: Duration = Duration::from_millis(250);

/// Whether captive portals have been looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Portal {
    /// Not yet.
    Open,
    /// The answer is awaited.
    Asked,
    /// It was told, or will not be asked.
    Closed,
}

pub(super) struct Run {
    pub(super) map: Arc<DerpMap>,
    pub(super) started: Instant,
    pub(super) full: bool,
    pub(super) home: Option<RegionId>,
    /// In order of time.
    pub(super) steps: VecDeque<Step>,
    /// What waits for a name.
    pub(super) waiting: BTreeMap<String, Vec<Step>>,
    pub(super) sent: BTreeMap<TransactionId, Sent>,
    /// First requests of a socket to a server so far.
    pub(super) asked: BTreeMap<(SocketId, SocketAddr), u32>,
    /// Region and family pairs that were asked or will be.
    wanted: BTreeSet<(RegionId, Family)>,
    answered: BTreeSet<(RegionId, Family)>,
    /// Servers that were asked or will be.
    servers: BTreeSet<SocketAddr>,
    /// Servers that answer from their other port on request.
    pub(super) paired: BTreeSet<SocketAddr>,
    pub(super) sightings: Sightings,
    /// Servers that have answered, and how long they took.
    heard: BTreeMap<SocketAddr, Duration>,
    /// How many servers' addresses saw each of our addresses.
    seen: BTreeMap<SocketAddr, BTreeSet<IpAddr>>,
    /// Regions whose HTTPS latency is awaited.
    pub(super) https: BTreeSet<RegionId>,
    /// Whether all regions were asked by HTTPS because UDP is silent.
    pub(super) fell_back: bool,
    pub(super) portal: Portal,
    /// When enough had answered.
    enough: Option<Instant>,
    /// What follows once latencies and addresses are known.
    pub(super) probing: Option<Probing>,
    pub(super) report: Report,
}

/// A request under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    /// The region asked about; none where the question is about the NAT.
    pub(super) region: Option<RegionId>,
    pub(super) socket: SocketId,
    pub(super) own: u16,
    pub(super) server: SocketAddr,
    pub(super) at: Instant,
}

impl Run {
    pub(super) fn new(map: Arc<DerpMap>, started: Instant, full: bool, own: BTreeSet<IpAddr>) -> Self {
        Self {
            map,
            started,
            full,
            home: None,
            steps: VecDeque::new(),
            waiting: BTreeMap::new(),
            sent: BTreeMap::new(),
            asked: BTreeMap::new(),
            wanted: BTreeSet::new(),
            answered: BTreeSet::new(),
            servers: BTreeSet::new(),
            paired: BTreeSet::new(),
            sightings: Sightings::new(own),
            heard: BTreeMap::new(),
            seen: BTreeMap::new(),
            https: BTreeSet::new(),
            fell_back: false,
            portal: if full { Portal::Open } else { Portal::Closed },
            enough: None,
            probing: None,
            report: Report { full, ..Report::default() },
        }
    }

    pub(super) fn server(&self, step: &Step, names: &BTreeMap<String, Vec<IpAddr>>) -> Server {
        let node = self.map.regions.get(&step.region).and_then(|region| region.nodes.get(step.node));
        node.map_or(Server::None, |node| server(node, step.family, names))
    }

    /// Adds a request to the plan.
    pub(super) fn plan(&mut self, step: Step, server: SocketAddr) {
        self.wanted.insert((step.region, step.family));
        self.servers.insert(server);
        let node = self.map.regions.get(&step.region).and_then(|region| region.nodes.get(step.node));
        // A node of this name is a second port of a server that answers from either.
        if node.is_some_and(|node| node.stun_only && node.name.ends_with(&format!("-stun-{}", server.port()))) {
            self.paired.insert(server);
        }
        let after = self.steps.partition_point(|other| other.after <= step.after);
        self.steps.insert(after, step);
    }

    /// Whether a request would tell something new.
    pub(super) fn helps(&self, step: &Step, server: SocketAddr) -> bool {
        !self.answered.contains(&(step.region, step.family)) || self.sightings.could_tell(step.family, server)
    }

    /// Counts a request, and says which one of its socket's first requests to servers it is.
    pub(super) fn count(&mut self, socket: SocketId, server: SocketAddr) {
        let order = u32::try_from(self.asked.len()).unwrap_or(u32::MAX);
        self.asked.entry((socket, server)).or_insert(order);
    }

    /// Notes what a server has seen.
    pub(super) fn saw(&mut self, sent: &Sent, mapped: SocketAddr, extra: bool) {
        let order = self.asked.get(&(sent.socket, sent.server)).copied().unwrap_or(u32::MAX);
        let Sent { socket, own, server, .. } = *sent;
        self.sightings.add(Sighting { socket, own, extra, order, server, mapped });
    }

    /// Takes a server's answer to the node's own socket.
    pub(super) fn answered(&mut self, now: Instant, sent: &Sent, mapped: SocketAddr) {
        let Some(region) = sent.region else { return };
        let latency = now.saturating_duration_since(sent.at);
        let family = Family::of(&sent.server);
        let report = &mut self.report;
        report.udp = true;
        self.seen.entry(mapped).or_default().insert(sent.server.ip());
        self.heard.entry(sent.server).or_insert(latency);
        let by_family = match family {
            Family::V4 => {
                report.ipv4 = true;
                report.global_v4.get_or_insert(mapped);
                &mut report.region_latency_v4
            }
            Family::V6 => {
                report.ipv6 = true;
                report.global_v6.get_or_insert(mapped);
                &mut report.region_latency_v6
            }
        };
        for table in [by_family, &mut report.region_latency] {
            let best = table.entry(region).or_insert(latency);
            *best = latency.min(*best);
        }
        self.saw(sent, mapped, false);
        self.answered.insert((region, family));
        let asked: BTreeSet<_> = self.wanted.iter().map(|(region, _)| *region).collect();
        if self.report.region_latency.len() >= asked.len().min(ENOUGH) {
            self.enough.get_or_insert(now);
        }
    }

    /// Puts what servers saw into the report, beside what earlier ones found.
    pub(super) fn conclude(&mut self, last: Option<&Report>) {
        let report = &mut self.report;
        report.seen = self.seen.iter().map(|(seen, by)| (*seen, u32::try_from(by.len()).unwrap_or(u32::MAX))).collect();
        for (now, before) in [
            (&mut report.global_v4, last.and_then(|last| last.global_v4)),
            (&mut report.global_v6, last.and_then(|last| last.global_v6)),
        ] {
            // Which server answers first is chance, and no reason to be reachable elsewhere.
            if before.is_some_and(|before| self.seen.contains_key(&before)) {
                *now = before;
            }
        }
        report.translated_v4 = self.sightings.translated(Family::V4);
        report.translated_v6 = self.sightings.translated(Family::V6);
        report.nat_v4 = self.sightings.behaviour(Family::V4);
        report.nat_v6 = self.sightings.behaviour(Family::V6);
        report.mapping_varies_by_dest_ip = report.nat_v4.is_easy().map(|easy| !easy);
        if let Some(last) = last.filter(|_| !self.full) {
            keep(&mut report.nat_v4, &last.nat_v4, report.global_v4, last.global_v4);
            keep(&mut report.nat_v6, &last.nat_v6, report.global_v6, last.global_v6);
            report.captive_portal = last.captive_portal;
        }
    }

    /// When silence is long enough to try something else.
    pub(super) fn silent_at(&self) -> Instant {
        if self.wanted.is_empty() && self.waiting.is_empty() { self.started } else { self.started + SILENT_AFTER }
    }

    /// Whether another server could still tell how the NAT maps.
    fn mapping_open(&self) -> bool {
        let could = |server: &SocketAddr| self.sightings.could_tell(Family::of(server), *server);
        // Where a family is silent altogether, it has no mapping.
        let speaks = |server: &&SocketAddr| self.heard.keys().any(|heard| Family::of(heard) == Family::of(server));
        self.servers.iter().filter(speaks).any(could)
    }

    /// When latencies and addresses will be known, as far as can be said now.
    pub(super) fn end(&self) -> Instant {
        let portal = self.portal == Portal::Asked;
        if self.report.udp {
            let limit = self.started + STUN_LIMIT;
            let home = !self.fell_back && self.home.is_some_and(|home| self.https.contains(&home));
            if home || portal {
                return limit;
            }
            if self.waiting.is_empty() && self.wanted.is_subset(&self.answered) && !self.mapping_open() {
                return self.started;
            }
            let Some(enough) = self.enough else { return limit };
            let slowest = self.report.region_latency.values().max().copied().unwrap_or_default();
            let wait = if self.full { slowest * 2 } else { slowest };
            let least = if self.mapping_open() { LINGER_FOR_MAPPING } else { LINGER };
            return limit.min(enough + wait.max(least));
        }
        let nothing_to_ask = self.wanted.is_empty() && self.waiting.is_empty();
        if !self.fell_back {
            return self.started + REPORT_LIMIT;
        }
        if self.https.is_empty() && !portal {
            let least = if self.report.region_latency.is_empty() { BLOCKED_LIMIT } else { BLOCKED_AFTER };
            return if nothing_to_ask { self.started } else { self.started + least };
        }
        let limit = if self.report.region_latency.is_empty() { REPORT_LIMIT } else { BLOCKED_LIMIT };
        self.started + limit
    }

    /// The servers to ask about the NAT, seen from `socket`: the fastest, and another, at another address if there is one.
    pub(super) fn references(&self, socket: SocketId) -> Vec<SocketAddr> {
        let mut heard: Vec<_> = self.sightings.servers(socket).collect();
        heard.sort_by_key(|server| (self.latency(*server), *server));
        let Some(first) = heard.first().copied() else { return Vec::new() };
        let second = heard.iter().find(|server| server.ip() != first.ip()).or_else(|| heard.get(1)).copied();
        std::iter::once(first).chain(second).collect()
    }

    /// How long `server` took to answer.
    pub(super) fn latency(&self, server: SocketAddr) -> Duration {
        self.heard.get(&server).copied().unwrap_or(Duration::MAX)
    }

    /// Whether `server` has another port and answers from there on request.
    pub(super) fn answers_elsewhere(&self, server: SocketAddr) -> bool {
        self.paired.iter().any(|other| other.ip() == server.ip() && other.port() != server.port())
    }
}

/// Keeps what an earlier report found out about the same NAT and this one could not see.
fn keep(now: &mut Behaviour, before: &Behaviour, here: Option<SocketAddr>, there: Option<SocketAddr>) {
    let same_address = here.map(|address| address.ip()) == there.map(|address| address.ip());
    let contradicts = now.mapping.is_some() && before.mapping.is_some() && now.mapping != before.mapping;
    let harder = now.is_easy() == Some(false) && before.presumed().is_easy() == Some(true);
    if !same_address || contradicts || harder {
        return;
    }
    let mapping = now.mapping.or(before.mapping);
    let varies = mapping.is_none() && (now.varies || before.varies);
    let steady = mapping.is_none() && !varies && (now.steady || before.steady);
    *now = Behaviour { mapping, varies, steady, ..*before };
}
