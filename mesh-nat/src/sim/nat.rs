//! A NAT: which outside port a flow gets, for how long, and whose datagrams come in by it (RFC 4787).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::RngExt;
use rand::rngs::StdRng;

use crate::behaviour::{Allocation, Filtering, Mapping, PortRange};

/// How a NAT behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NatConfig {
    /// What an outside port depends on.
    pub mapping: Mapping,
    /// Who may send to it.
    pub filtering: Filtering,
    /// Which one it is.
    pub allocation: Allocation,
    /// The ports that it gives.
    pub ports: PortRange,
    /// With [`Allocation::Block`]: how many of them one subscriber has.
    pub block: u16,
    /// Whether an outside port in use is given again for another destination. Otherwise every mapping has a port of its
    /// own. It makes a difference only where the mapping depends on the destination.
    pub overload: bool,
    /// Whether hosts behind it reach each other by their outside addresses.
    pub hairpin: bool,
    /// How long a silent mapping lives.
    pub timeout: Duration,
    /// Whether what comes in keeps a mapping alive, as what goes out always does (RFC 4787 §4.3).
    pub refreshed_by_inbound: bool,
    /// How many mappings it can hold; beyond that, new flows go nowhere.
    pub capacity: usize,
}

impl NatConfig {
    /// What most homes have: one port towards everyone, open to whoever was sent to.
    #[must_use]
    pub const fn easy() -> Self {
        Self {
            mapping: Mapping::EndpointIndependent,
            filtering: Filtering::AddressAndPortDependent,
            allocation: Allocation::Preserving,
            ports: PortRange::ALL,
            block: 512,
            overload: true,
            hairpin: false,
            timeout: Duration::from_secs(30),
            refreshed_by_inbound: true,
            capacity: 65_536,
        }
    }

    /// What offices and carriers have at their worst: a random port towards each destination, open to it alone.
    #[must_use]
    pub const fn hard() -> Self {
        Self { mapping: Mapping::AddressAndPortDependent, allocation: Allocation::Random, ..Self::easy() }
    }

    /// One port towards everyone, open to everyone.
    #[must_use]
    pub const fn open() -> Self {
        Self { filtering: Filtering::EndpointIndependent, ..Self::easy() }
    }
}

/// What a mapping depends on: nothing, an address, or an address and a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Toward(Option<(IpAddr, Option<u16>)>);

#[derive(Debug)]
struct Entry {
    inside: SocketAddr,
    toward: Toward,
    outside: u16,
    used: Instant,
    /// Who was sent to, and when last.
    remotes: BTreeMap<SocketAddr, Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Forward {
    inside: SocketAddr,
    until: Option<Instant>,
}

/// What a NAT has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NatCounters {
    /// Mappings made.
    pub opened: u64,
    /// The most mappings held at one time.
    pub peak_mappings: usize,
    /// The most outside ports in use at one time.
    pub peak_ports: usize,
    /// Datagrams that found no port or no room.
    pub exhausted: u64,
    /// Datagrams from outside that were not let in.
    pub refused: u64,
}

/// A NAT and what it remembers. It translates one address family to one outside address.
#[derive(Debug)]
pub struct Nat {
    config: NatConfig,
    entries: BTreeMap<u64, Entry>,
    next_entry: u64,
    by_inside: BTreeMap<(SocketAddr, Toward), u64>,
    by_port: BTreeMap<u16, Vec<u64>>,
    blocks: BTreeMap<IpAddr, PortRange>,
    /// Where sequential allocation goes on.
    next_port: Option<u16>,
    forwards: BTreeMap<u16, Forward>,
    swept: Option<Instant>,
    counters: NatCounters,
}

impl Nat {
    /// A NAT that remembers nothing yet.
    #[must_use]
    pub const fn new(config: NatConfig) -> Self {
        Self {
            config,
            entries: BTreeMap::new(),
            next_entry: 0,
            by_inside: BTreeMap::new(),
            by_port: BTreeMap::new(),
            blocks: BTreeMap::new(),
            next_port: None,
            forwards: BTreeMap::new(),
            swept: None,
            counters: NatCounters { opened: 0, peak_mappings: 0, peak_ports: 0, exhausted: 0, refused: 0 },
        }
    }

    /// How it behaves.
    #[must_use]
    pub const fn config(&self) -> &NatConfig {
        &self.config
    }

    /// What it has done so far.
    #[must_use]
    pub const fn counters(&self) -> NatCounters {
        self.counters
    }

    /// Mappings that live now.
    #[must_use]
    pub fn mappings(&self, now: Instant) -> usize {
        self.entries.values().filter(|entry| self.lives(entry, now)).count()
    }

    /// Forgets every mapping, as when it is switched off and on. Forwards stay, they are configuration, and so does each
    /// subscriber's block.
    pub fn reboot(&mut self) {
        self.entries.clear();
        self.by_inside.clear();
        self.by_port.clear();
        self.next_port = None;
    }

    /// Forwards the outside port `port` to `inside` whoever sends, for `lifetime` or for ever, and gives it to what
    /// `inside` sends. `false` if the port is another's; again for the same `inside` renews.
    pub fn forward(&mut self, now: Instant, port: u16, inside: SocketAddr, lifetime: Option<Duration>) -> bool {
        self.expire_forwards(now);
        let taken = self.forwards.get(&port).is_some_and(|held| held.inside != inside)
            || self
                .by_port
                .get(&port)
                .into_iter()
                .flatten()
                .filter_map(|id| self.entries.get(id))
                .any(|entry| self.lives(entry, now) && entry.inside != inside);
        if !taken && port != 0 {
            self.forwards.insert(port, Forward { inside, until: lifetime.map(|lifetime| now + lifetime) });
        }
        !taken && port != 0
    }

    /// Ends a forward. Returns to whom it led.
    pub fn unforward(&mut self, port: u16) -> Option<SocketAddr> {
        self.forwards.remove(&port).map(|forward| forward.inside)
    }

    /// The outside port that is forwarded to `inside`.
    #[must_use]
    pub fn forwarded(&self, now: Instant, inside: SocketAddr) -> Option<u16> {
        let lives = |forward: &Forward| forward.until.is_none_or(|until| until > now);
        self.forwards.iter().find(|(_, forward)| forward.inside == inside && lives(forward)).map(|(port, _)| *port)
    }

    /// Where an outside port is forwarded to.
    #[must_use]
    pub fn forward_of(&self, now: Instant, port: u16) -> Option<SocketAddr> {
        let forward = self.forwards.get(&port)?;
        forward.until.is_none_or(|until| until > now).then_some(forward.inside)
    }

    /// A datagram leaves `inside` for `to`: the outside port that it gets, unless there is none.
    pub(super) fn outbound(
        &mut self,
        now: Instant,
        rng: &mut StdRng,
        inside: SocketAddr,
        to: SocketAddr,
    ) -> Option<u16> {
        if let Some(port) = self.forwarded(now, inside) {
            return Some(port);
        }
        let toward = self.toward(to);
        if let Some(id) = self.by_inside.get(&(inside, toward)).copied() {
            match self.entries.get_mut(&id) {
                Some(entry) if now.saturating_duration_since(entry.used) < self.config.timeout => {
                    entry.used = now;
                    entry.remotes.insert(to, now);
                    return Some(entry.outside);
                }
                Some(_) | None => self.remove(id),
            }
        }
        self.sweep(now);
        let room = self.entries.len() < self.config.capacity;
        let Some(outside) = room.then(|| self.allocate(now, rng, inside, toward)).flatten() else {
            self.counters.exhausted += 1;
            return None;
        };
        let id = self.next_entry;
        self.next_entry += 1;
        self.entries.insert(id, Entry { inside, toward, outside, used: now, remotes: BTreeMap::from([(to, now)]) });
        self.by_inside.insert((inside, toward), id);
        self.by_port.entry(outside).or_default().push(id);
        self.counters.opened += 1;
        self.counters.peak_mappings = self.counters.peak_mappings.max(self.entries.len());
        self.counters.peak_ports = self.counters.peak_ports.max(self.by_port.len());
        Some(outside)
    }

    /// A datagram from `from` arrives at the outside port `port`: to whom it goes, if it may.
    pub(super) fn inbound(&mut self, now: Instant, port: u16, from: SocketAddr) -> Option<SocketAddr> {
        if let Some(inside) = self.forward_of(now, port) {
            return Some(inside);
        }
        let held = self.by_port.get(&port).into_iter().flatten();
        let live: Vec<(u64, &Entry)> = held
            .filter_map(|id| Some((*id, self.entries.get(id)?)))
            .filter(|(_, entry)| self.lives(entry, now))
            .collect();
        let exact = live.iter().find(|(_, entry)| self.admits(entry, now, from, Filtering::AddressAndPortDependent));
        let found =
            exact.or_else(|| live.iter().find(|(_, entry)| self.admits(entry, now, from, self.config.filtering)));
        let Some((id, inside)) = found.map(|(id, entry)| (*id, entry.inside)) else {
            self.counters.refused += 1;
            return None;
        };
        if self.config.refreshed_by_inbound
            && let Some(entry) = self.entries.get_mut(&id)
        {
            entry.used = now;
            if let Some(used) = entry.remotes.get_mut(&from) {
                *used = now;
            }
        }
        Some(inside)
    }

    fn admits(&self, entry: &Entry, now: Instant, from: SocketAddr, filtering: Filtering) -> bool {
        let fresh = |used: &Instant| now.saturating_duration_since(*used) < self.config.timeout;
        match filtering {
            Filtering::EndpointIndependent => true,
            Filtering::AddressDependent => {
                entry.remotes.iter().any(|(remote, used)| remote.ip() == from.ip() && fresh(used))
            }
            Filtering::AddressAndPortDependent => entry.remotes.get(&from).is_some_and(fresh),
        }
    }

    fn toward(&self, to: SocketAddr) -> Toward {
        Toward(match self.config.mapping {
            Mapping::EndpointIndependent => None,
            Mapping::AddressDependent => Some((to.ip(), None)),
            Mapping::AddressAndPortDependent => Some((to.ip(), Some(to.port()))),
        })
    }

    fn lives(&self, entry: &Entry, now: Instant) -> bool {
        now.saturating_duration_since(entry.used) < self.config.timeout
    }

    fn allocate(&mut self, now: Instant, rng: &mut StdRng, inside: SocketAddr, toward: Toward) -> Option<u16> {
        let range = match self.config.allocation {
            Allocation::Block => self.block_of(rng, inside.ip()),
            Allocation::Preserving | Allocation::Sequential { .. } | Allocation::Random => self.config.ports,
        };
        let any = |rng: &mut StdRng| rng.random_range(range.first..=range.last);
        let (start, stride) = match self.config.allocation {
            Allocation::Preserving if range.contains(inside.port()) => (inside.port(), 1),
            Allocation::Sequential { stride } => (self.next_port.unwrap_or_else(|| any(rng)), stride),
            Allocation::Preserving | Allocation::Block | Allocation::Random => {
                let lucky = (0..32).map(|_| any(rng)).find(|port| self.is_free(now, *port, toward));
                if lucky.is_some() {
                    return lucky;
                }
                (any(rng), 1)
            }
        };
        let mut port = start;
        for _ in 0..range.len() {
            let next = step(range, port, stride);
            if self.is_free(now, port, toward) {
                self.next_port = Some(next);
                return Some(port);
            }
            port = next;
        }
        None
    }

    fn is_free(&self, now: Instant, port: u16, toward: Toward) -> bool {
        let other = |entry: &Entry| self.config.overload && entry.toward != toward;
        let held = self.by_port.get(&port).into_iter().flatten();
        self.forward_of(now, port).is_none()
            && held.filter_map(|id| self.entries.get(id)).all(|entry| !self.lives(entry, now) || other(entry))
    }

    fn block_of(&mut self, rng: &mut StdRng, subscriber: IpAddr) -> PortRange {
        if let Some(block) = self.blocks.get(&subscriber) {
            return *block;
        }
        let (all, size) = (self.config.ports, u32::from(self.config.block.max(1)));
        let count = (all.len() / size).max(1);
        let free: Vec<PortRange> = (0..count)
            .filter_map(|number| {
                let first = u16::try_from(u32::from(all.first) + number * size).ok()?;
                let last = u16::try_from((u32::from(first) + size - 1).min(u32::from(all.last))).ok()?;
                Some(PortRange { first, last })
            })
            .filter(|block| !self.blocks.values().any(|held| held == block))
            .collect();
        // More subscribers than blocks: the last ones share everything.
        let block = if free.is_empty() { all } else { free[rng.random_range(0..free.len())] };
        self.blocks.insert(subscriber, block);
        block
    }

    /// Forgets what is long over, now and then.
    fn sweep(&mut self, now: Instant) {
        const EVERY: Duration = Duration::from_secs(1);
        if self.swept.is_some_and(|at| now.saturating_duration_since(at) < EVERY) {
            return;
        }
        self.swept = Some(now);
        self.expire_forwards(now);
        let over: Vec<u64> =
            self.entries.iter().filter(|(_, entry)| !self.lives(entry, now)).map(|(id, _)| *id).collect();
        over.into_iter().for_each(|id| self.remove(id));
    }

    fn expire_forwards(&mut self, now: Instant) {
        self.forwards.retain(|_, forward| forward.until.is_none_or(|until| until > now));
    }

    fn remove(&mut self, id: u64) {
        let Some(entry) = self.entries.remove(&id) else { return };
        self.by_inside.remove(&(entry.inside, entry.toward));
        if let Some(held) = self.by_port.get_mut(&entry.outside) {
            held.retain(|other| *other != id);
            if held.is_empty() {
                self.by_port.remove(&entry.outside);
            }
        }
    }
}

/// The port `stride` after `port`, around the end of `range`.
fn step(range: PortRange, port: u16, stride: i16) -> u16 {
    let length = i64::from(range.len());
    let offset = (i64::from(port) - i64::from(range.first) + i64::from(stride)).rem_euclid(length);
    u16::try_from(i64::from(range.first) + offset).unwrap_or(range.first)
}

#[cfg(test)]
mod tests;
