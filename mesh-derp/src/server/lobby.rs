//! Connections that have not logged in: how many there may be, and which one goes when there are too many.
//!
//! Whoever can connect can also say nothing afterwards, and a hundred thousand silent connections must not keep one client
//! out. So those that have not logged in have a limited number of places, and once those are taken, a new connection gets
//! the place of the one that has kept us waiting longest:
//!
//! ```text
//!            first byte            a handshake ends,           its client
//!  enter     has come              and a place is free         logs in, or leaves
//! ───────► Silent ──────► Queued ─────────────────► Handshake ──────► Login ──────► Admission ──► (gone)
//!            │                                          │               │
//!            └──────────────── may be shown out ────────┴───────────────┘
//! ```
//!
//! - Only who keeps *us* waiting is shown out, and only after [`Limits::patience`] in one stage. Sending a byte now and
//!   then gains nothing. Those that are queued, or wait to be admitted, wait for us; when nobody else is left, new
//!   connections wait in the system's queue, which is what a rush of reconnecting clients should do.
//! - One source may have [`Limits::per_source`] places. Beyond that it is its own oldest connection that goes, so one
//!   address cannot push out the others. Sources are IPv4 addresses and IPv6 networks of 64 bits.
//! - At most [`Limits::handshakes`] TLS handshakes are in memory at once; if others queue, one that is kept waiting by its
//!   client for longer than the patience goes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// How many connections may be on their way to a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// All of them. Default 8,192.
    pub total: usize,
    /// Those of one IPv4 address or one IPv6 network of 64 bits. Default 2,048: a building behind one address may come
    /// back at once, since clients that answer promptly need their place for less than a second.
    pub per_source: usize,
    /// Those with a TLS handshake or a request head underway. Default 512.
    pub handshakes: usize,
    /// How long a connection may stay in one stage when others need its place. Default 2 s.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { total: 8192, per_source: 2048, handshakes: 512, patience: Duration::from_secs(2) }
    }
}

/// What a connection is waiting for, in the order of its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Its first byte.
    Silent,
    /// A place among the handshakes.
    Queued,
    /// The end of its TLS handshake and request head.
    Handshake,
    /// Its login, or the end of its HTTP requests.
    Login,
    /// Our decision whether it is admitted.
    Admission,
}

impl Stage {
    const fn keeps_us_waiting(self) -> bool {
        matches!(self, Self::Silent | Self::Handshake | Self::Login)
    }
}

/// One connection in a [`Lobby`]. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Guest(u64);

/// Why a connection was shown out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dismissal {
    /// Another connection needs its place.
    Room,
    /// Another connection of its source needs its place.
    Source,
    /// Another handshake needs its place.
    Handshake,
}

/// Those that may not come in: their source has all its places, and none of them can be freed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("its address has too many connections that have not logged in")]
pub struct Crowded;

#[derive(Debug)]
struct Entry<T> {
    /// `None` as long as a trusted proxy has not said whom it brings; such connections count to no source.
    source: Option<IpAddr>,
    stage: Stage,
    since: Instant,
    handle: T,
}

/// The connections that have not logged in, each with a handle by which its owner ends it.
#[derive(Debug)]
pub struct Lobby<T> {
    limits: Limits,
    next: u64,
    entries: BTreeMap<Guest, Entry<T>>,
    /// Those that keep us waiting, longest first.
    waiting: BTreeSet<(Instant, Guest)>,
    waiting_of: BTreeSet<(Option<IpAddr>, Instant, Guest)>,
    handshaking: BTreeSet<(Instant, Guest)>,
    per_source: BTreeMap<IpAddr, usize>,
    queued: usize,
    dismissed: Vec<(T, Dismissal)>,
    /// When [`Lobby::handle_timeout`] was last called.
    checked: Option<Instant>,
}

impl<T> Lobby<T> {
    /// An empty one.
    #[must_use]
    pub const fn new(limits: Limits) -> Self {
        Self {
            limits,
            next: 0,
            entries: BTreeMap::new(),
            waiting: BTreeSet::new(),
            waiting_of: BTreeSet::new(),
            handshaking: BTreeSet::new(),
            per_source: BTreeMap::new(),
            queued: 0,
            dismissed: Vec::new(),
            checked: None,
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is nobody.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether another connection may be accepted: there is a place, or one that can be freed.
    #[must_use]
    pub fn has_room(&self, now: Instant) -> bool {
        self.entries.len() < self.limits.total || self.overdue(now).is_some()
    }

    /// Lets a connection in, from `address` or from a trusted proxy that will say for whom. Drain
    /// [`poll_dismissed`](Self::poll_dismissed) afterwards.
    ///
    /// # Errors
    /// If its source has all its places and none of them can be freed.
    pub fn enter(&mut self, now: Instant, address: Option<IpAddr>, handle: T) -> Result<Guest, Crowded> {
        let source = address.map(source);
        self.keep_place_for(now, source)?;
        if self.entries.len() >= self.limits.total {
            self.make_room(now);
        }
        let guest = Guest(self.next);
        self.next += 1;
        self.entries.insert(guest, Entry { source, stage: Stage::Silent, since: now, handle });
        self.count(source);
        self.note_waiting(guest, source, now);
        Ok(guest)
    }

    /// A connection comes from elsewhere than it seemed: a trusted proxy said so.
    ///
    /// # Errors
    /// As for [`enter`](Self::enter). The connection keeps its place until it leaves.
    pub fn rename(&mut self, now: Instant, guest: Guest, address: IpAddr) -> Result<(), Crowded> {
        let to = Some(source(address));
        let Some(entry) = self.entries.get(&guest) else { return Ok(()) };
        let (from, since, waits) = (entry.source, entry.since, entry.stage.keeps_us_waiting());
        if from == to {
            return Ok(());
        }
        self.keep_place_for(now, to)?;
        self.uncount(from);
        self.count(to);
        if waits {
            self.waiting_of.remove(&(from, since, guest));
            self.waiting_of.insert((to, since, guest));
        }
        if let Some(entry) = self.entries.get_mut(&guest) {
            entry.source = to;
        }
        Ok(())
    }

    /// A connection has come to another stage. Nothing happens if it has been shown out.
    pub fn advance(&mut self, now: Instant, guest: Guest, stage: Stage) {
        let Some(entry) = self.entries.get_mut(&guest) else { return };
        let (source, since) = (entry.source, entry.since);
        let before = std::mem::replace(&mut entry.stage, stage);
        entry.since = now;
        self.forget_waiting(guest, source, since, before);
        match stage {
            Stage::Queued => self.queued += 1,
            Stage::Admission => {}
            Stage::Silent | Stage::Login => self.note_waiting(guest, source, now),
            Stage::Handshake => {
                self.handshaking.insert((now, guest));
                self.note_waiting(guest, source, now);
            }
        }
    }

    /// A connection has logged in or ended. Nothing happens if it has been shown out.
    pub fn leave(&mut self, guest: Guest) {
        drop(self.remove(guest));
    }

    /// Shows out whoever is in the way of a queued handshake.
    pub fn handle_timeout(&mut self, now: Instant) {
        let mut queued = self.queued;
        while queued > 0
            && let Some(&(since, guest)) = self.handshaking.first()
            && since + self.limits.patience <= now
        {
            self.dismiss(guest, Dismissal::Handshake);
            queued -= 1;
        }
        self.checked = Some(now);
    }

    /// Shows out the connection that has kept us waiting longest, for a reason of the caller's such as a lack of
    /// descriptors. Says whether there was one.
    pub fn make_room(&mut self, now: Instant) -> bool {
        let Some(guest) = self.overdue(now) else { return false };
        self.dismiss(guest, Dismissal::Room);
        true
    }

    /// The handle of a connection that has to end, and why.
    pub fn poll_dismissed(&mut self) -> Option<(T, Dismissal)> {
        self.dismissed.pop()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout), or to ask [`has_room`](Self::has_room) again.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let patience = self.limits.patience;
        let due = |first: Option<&(Instant, Guest)>| first.map(|(since, _)| *since + patience);
        // Whoever was shown out for a handshake needs a moment to go.
        let soonest = self.checked.map(|at| at + patience / 8);
        let handshake =
            due(self.handshaking.first()).filter(|_| self.queued > 0).max(soonest.filter(|_| self.queued > 0));
        // Once somebody is overdue there is room, and nothing to wait for.
        let room =
            due(self.waiting.first()).filter(|at| self.entries.len() >= self.limits.total && Some(*at) > self.checked);
        handshake.filter(|_| !self.handshaking.is_empty()).into_iter().chain(room).min()
    }

    /// Who has kept us waiting longest, if that is too long.
    fn overdue(&self, now: Instant) -> Option<Guest> {
        self.waiting.first().filter(|(since, _)| *since + self.limits.patience <= now).map(|(_, guest)| *guest)
    }

    /// Makes sure that `source` may have one more.
    fn keep_place_for(&mut self, now: Instant, source: Option<IpAddr>) -> Result<(), Crowded> {
        let have = source.and_then(|source| self.per_source.get(&source)).copied().unwrap_or_default();
        if have < self.limits.per_source {
            return Ok(());
        }
        let earliest = self.waiting.first().ok_or(Crowded)?.0;
        let own = (source, earliest, Guest(0))..=(source, now, Guest(u64::MAX));
        let &(_, since, guest) = self.waiting_of.range(own).next().ok_or(Crowded)?;
        if since + self.limits.patience > now {
            return Err(Crowded);
        }
        self.dismiss(guest, Dismissal::Source);
        Ok(())
    }

    fn dismiss(&mut self, guest: Guest, why: Dismissal) {
        if let Some(entry) = self.remove(guest) {
            self.dismissed.push((entry.handle, why));
        }
    }

    fn remove(&mut self, guest: Guest) -> Option<Entry<T>> {
        let entry = self.entries.remove(&guest)?;
        self.forget_waiting(guest, entry.source, entry.since, entry.stage);
        self.uncount(entry.source);
        Some(entry)
    }

    fn note_waiting(&mut self, guest: Guest, source: Option<IpAddr>, since: Instant) {
        self.waiting.insert((since, guest));
        self.waiting_of.insert((source, since, guest));
    }

    fn forget_waiting(&mut self, guest: Guest, source: Option<IpAddr>, since: Instant, stage: Stage) {
        if stage == Stage::Queued {
            self.queued -= 1;
        }
        self.handshaking.remove(&(since, guest));
        self.waiting.remove(&(since, guest));
        self.waiting_of.remove(&(source, since, guest));
    }

    fn count(&mut self, source: Option<IpAddr>) {
        if let Some(source) = source {
            *self.per_source.entry(source).or_default() += 1;
        }
    }

    fn uncount(&mut self, source: Option<IpAddr>) {
        let Some(source) = source else { return };
        if let Some(count) = self.per_source.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                self.per_source.remove(&source);
            }
        }
    }
}

/// Whom a connection is counted to. Hosts have an IPv4 address, but a whole IPv6 network.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64)).into(),
    }
}

#[cfg(test)]
mod tests;
