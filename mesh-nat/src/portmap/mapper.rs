//! The core: finds out what the gateway speaks, gets a mapping, keeps it, and gives it back.
//!
//! ```text
//!            set_network, set_port
//!                     │
//!                 ┌───▼────┐  answers   ┌────────┐ granted ┌──────┐ half of its life, or the gateway
//!   ┌────────────►│ probe  ├───────────►│  ask   ├────────►│ hold ├─ has lost its state: ask again,
//!   │             └───┬────┘ PCP first  └───┬────┘         └──┬───┘  for the same port
//!   │                 │ nobody              │ refused: next   │ refused, expired
//!   │             ┌───▼────┐◄───────────────┘ protocol; none  │
//!   └─────────────┤  wait  │                  left            │
//!    30 s to      └────────┘                                  │
//!    30 min, or a new network ◄───────────────────────────────┘
//! ```
//!
//! All protocols are probed together. The first answer of the best one is acted on at once; a lesser one waits for its
//! betters a little. What a refused or silent protocol cannot give is asked of the next one in the same round.

mod ask;
mod epoch;
mod probe;
mod release;
mod soap;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::{Index, IndexMut};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::nat_pmp::{self, NatPmpError};
use super::pcp::{self, Nonce, PcpError};
use super::ssdp::SsdpError;
use super::status::{Config, Mapping, Network, Problem, Protocol, Refusal, Status, is_public};
use super::{http, upnp};
use crate::timer::TimerTable;
use epoch::Epoch;

/// The first wait after a round in which nobody mapped.
const RETRY_FIRST: Duration = Duration::from_secs(30);
/// The longest.
const RETRY_LAST: Duration = Duration::from_secs(30 * 60);
/// How often a gateway that holds a mapping of ours is asked whether it still has its state.
const CHECK_INTERVAL: Duration = Duration::from_secs(120);
/// The longest time between renewals with UPnP, which has no other way to notice that a gateway has started anew.
const UPNP_RENEW_AT_MOST: Duration = Duration::from_secs(20 * 60);
/// The least time between two renewals.
const RENEW_AT_LEAST: Duration = Duration::from_secs(5);

/// Names one HTTP exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExchangeId(u64);

/// What should be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transmit {
    /// A datagram, from our address in [`Network::client`]. Answers go to [`Mapper::handle_datagram`].
    Datagram {
        /// To whom.
        remote: SocketAddr,
        /// The datagram.
        datagram: Vec<u8>,
    },
    /// One HTTP request over a TCP connection of its own; what comes of it goes to [`Mapper::handle_http`]. See
    /// [`http::response`] for when the answer is whole.
    Http {
        /// Which exchange this is.
        id: ExchangeId,
        /// The server.
        remote: SocketAddr,
        /// The whole request.
        request: Vec<u8>,
    },
}

/// What the caller should know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// This is how things are now.
    Changed(Status),
    /// After [`Mapper::close`]: everything is given back, or could not be.
    Closed,
}

/// Why a datagram was ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reject {
    /// Not from a gateway that was asked.
    #[error("not from the gateway")]
    Stranger,
    /// Well-formed, but no answer to anything.
    #[error("nobody asked")]
    Unasked,
    /// Not PCP.
    #[error(transparent)]
    Pcp(#[from] PcpError),
    /// Not NAT-PMP.
    #[error(transparent)]
    NatPmp(#[from] NatPmpError),
    /// Not the answer to a search.
    #[error(transparent)]
    Ssdp(#[from] SsdpError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// The probe's next round, or its end.
    Probe,
    /// Whether to go on with a lesser protocol.
    Decide,
    /// The answer to what was asked is late.
    Ask,
    Renew,
    Expire,
    Check,
    Retry,
}

/// How the gateway stands to one protocol, in this round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Unknown,
    Absent,
    /// Since then.
    Present(Instant),
    Refused(Refusal),
}

/// One for each protocol.
#[derive(Debug, Clone, Copy)]
struct Each<T>([T; Protocol::ALL.len()]);

impl<T> Index<Protocol> for Each<T> {
    type Output = T;

    fn index(&self, protocol: Protocol) -> &T {
        &self.0[protocol as usize]
    }
}

impl<T> IndexMut<Protocol> for Each<T> {
    fn index_mut(&mut self, protocol: Protocol) -> &mut T {
        &mut self.0[protocol as usize]
    }
}

#[derive(Debug, Clone)]
struct Lease {
    protocol: Protocol,
    internal_port: u16,
    external: SocketAddr,
    /// When it was given, or last found to be gone and asked for again.
    given: Instant,
    /// `None`: it lives until it is deleted.
    expires: Option<Instant>,
    /// For UPnP: who can delete it.
    service: Option<upnp::Service>,
    /// The number of the pinhole that it is.
    pinhole: Option<u16>,
}

/// Gets and keeps one port mapping. See the [module documentation](super).
#[derive(Debug)]
pub struct Mapper {
    rng: StdRng,
    config: Config,
    network: Option<Network>,
    port: Option<u16>,
    /// Our address as STUN servers see it.
    reflexive: Option<IpAddr>,
    nonce: Nonce,
    /// The external port that we had last.
    former: Option<u16>,
    standings: Each<Standing>,
    /// What the gateway speaks, as far as any round has told.
    spoken: Each<Option<bool>>,
    /// UPnP has none.
    epochs: Each<Epoch>,
    nat_pmp_address: Option<Ipv4Addr>,
    probe: Option<probe::Probe>,
    found: soap::Found,
    ask: Option<ask::Ask>,
    lease: Option<Lease>,
    releases: Vec<release::Release>,
    problem: Option<Problem>,
    wait: Duration,
    closing: bool,
    exchanges: u64,
    timers: TimerTable<Timer>,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
    told: Status,
}

impl Mapper {
    /// A mapper that does nothing before it knows [network](Self::set_network) and [port](Self::set_port). Nonces and
    /// ports come from `seed`.
    #[must_use]
    pub fn new(config: Config, seed: [u8; 32]) -> Self {
        let mut rng = StdRng::from_seed(seed);
        Self {
            nonce: Nonce::generate(&mut rng),
            rng,
            config,
            network: None,
            port: None,
            reflexive: None,
            former: None,
            standings: Each([Standing::Unknown; 3]),
            spoken: Each([None; 3]),
            epochs: Each([Epoch::default(); 3]),
            nat_pmp_address: None,
            probe: None,
            found: soap::Found::default(),
            ask: None,
            lease: None,
            releases: Vec::new(),
            problem: None,
            wait: RETRY_FIRST,
            closing: false,
            exchanges: 0,
            timers: TimerTable::new(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            told: Status::default(),
        }
    }

    // --- what is -----------------------------------------------------------------------------------------------------

    /// What is known.
    #[must_use]
    pub fn status(&self) -> Status {
        let mapping = self.lease.as_ref().map(|lease| Mapping {
            protocol: lease.protocol,
            internal_port: lease.internal_port,
            external: lease.external,
            double_nat: !is_public(lease.external.ip()) && self.reflexive != Some(lease.external.ip()),
        });
        Status {
            pcp: self.spoken[Protocol::Pcp],
            nat_pmp: self.spoken[Protocol::NatPmp],
            upnp: self.spoken[Protocol::Upnp],
            mapping,
            problem: self.problem.filter(|_| mapping.is_none()),
        }
    }

    /// When the mapping ends unless it is renewed; `None` without one, and for one that is permanent.
    #[must_use]
    pub fn expires(&self) -> Option<Instant> {
        self.lease.as_ref()?.expires
    }

    /// The gateway in use.
    #[must_use]
    pub const fn network(&self) -> Option<Network> {
        self.network
    }

    // --- what happens ------------------------------------------------------------------------------------------------

    /// The default route is this one now, or there is none. A mapping of the former gateway is given back if our address
    /// is still the same, for then it can be; otherwise it is forgotten.
    pub fn set_network(&mut self, now: Instant, network: Option<Network>) {
        if self.network == network {
            return;
        }
        let same_client = self.network.map(|network| network.client) == network.map(|network| network.client);
        if same_client {
            self.release(now);
        } else {
            self.releases.clear();
        }
        self.forget();
        self.network = network;
        self.former = None;
        self.found = soap::Found::default();
        self.spoken = Each([None; 3]);
        self.epochs = Each([Epoch::default(); 3]);
        self.nat_pmp_address = None;
        self.wait = RETRY_FIRST;
        self.start(now);
        self.settle();
    }

    /// The port that should be reachable from outside. Another one, or none, gives the former mapping back.
    pub fn set_port(&mut self, now: Instant, port: Option<u16>) {
        if self.port == port {
            return;
        }
        self.release(now);
        self.forget();
        self.port = port;
        self.former = None;
        self.start(now);
        self.settle();
    }

    /// Our address as STUN servers see it. A mapping's external address that is no public one is useful all the same if it
    /// is the one that the world sees; and when the two part, the gateway is asked whether it has lost its state.
    pub fn set_reflexive(&mut self, now: Instant, address: Option<IpAddr>) {
        if self.reflexive == address {
            return;
        }
        self.reflexive = address;
        let parted = |lease: &&Lease| address.is_some_and(|address| address != lease.external.ip());
        match self.lease.as_ref().filter(parted).map(|lease| lease.protocol) {
            Some(Protocol::Pcp | Protocol::NatPmp) => self.check(now),
            // It has no question as small as that.
            Some(Protocol::Upnp) => self.renew(now),
            None => {}
        }
        self.settle();
    }

    /// Gives the mapping back and stops. [`Event::Closed`] follows, within three seconds.
    pub fn close(&mut self, now: Instant) {
        self.closing = true;
        self.set_port(now, None);
        self.settle();
    }

    /// Takes a datagram that arrived at the socket we send from, or at [`pcp::ANNOUNCE_PORT`].
    ///
    /// # Errors
    /// Says why it was ignored.
    pub fn handle_datagram(&mut self, now: Instant, source: SocketAddr, datagram: &[u8]) -> Result<(), Reject> {
        let from_gateway = self.network.is_some_and(|network| network.gateway == source.ip());
        let search = source.port() != pcp::SERVER_PORT;
        let known = from_gateway
            || (search && self.network.is_some_and(|network| network.may_be_gateway(source.ip())))
            || self.releases.iter().any(|release| release.is_for(source.ip()));
        if !known {
            return Err(Reject::Stranger);
        }
        let outcome = if search {
            self.handle_search_answer(now, datagram)
        } else if datagram.first() == Some(&pcp::VERSION) {
            let response = pcp::Response::decode(datagram)?;
            self.handle_pcp(now, &response, from_gateway)
        } else {
            let response = nat_pmp::Response::decode(datagram)?;
            self.handle_nat_pmp(now, &response, from_gateway)
        };
        self.settle();
        outcome
    }

    /// Takes the answer of an HTTP exchange; `None` if there was none.
    pub fn handle_http(&mut self, now: Instant, id: ExchangeId, response: Option<&http::Response>) {
        self.releases.retain(|release| !release.is_exchange(id));
        self.handle_ask_http(now, id, response);
        self.settle();
    }

    /// Does whatever is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(timer) = self.timers.pop_due(now) {
            match timer {
                Timer::Probe => self.probe_step(now),
                Timer::Decide => self.decide(now),
                Timer::Ask => self.ask_late(now),
                Timer::Renew => self.renew(now),
                Timer::Expire => self.lost(now),
                Timer::Check => self.check(now),
                Timer::Retry => self.start(now),
            }
        }
        self.release_step(now);
        self.settle();
    }

    // --- what follows ------------------------------------------------------------------------------------------------

    /// The next thing to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next thing to know.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.releases.iter().map(release::Release::next).chain(self.timers.next()).min()
    }

    // --- inside ------------------------------------------------------------------------------------------------------

    /// Ends whatever is under way.
    fn forget(&mut self) {
        (self.probe, self.ask, self.lease, self.problem) = (None, None, None, None);
        self.standings = Each([Standing::Unknown; 3]);
        self.timers = TimerTable::new();
    }

    /// Begins a new round, if there is anything to ask and anybody to be asked.
    fn start(&mut self, now: Instant) {
        self.timers.clear(Timer::Retry);
        if let (Some(network), Some(_)) = (self.network, self.port) {
            self.start_probe(now, network);
        }
    }

    fn granted(&mut self, now: Instant, grant: ask::Grant) {
        let Some(internal_port) = self.port else { return };
        self.ask = None;
        self.timers.clear(Timer::Ask);
        self.timers.clear(Timer::Retry);
        self.timers.clear(Timer::Decide);
        self.former = Some(grant.external.port());
        self.wait = RETRY_FIRST;
        self.problem = None;
        let half = grant.lifetime.map_or(UPNP_RENEW_AT_MOST, |lifetime| lifetime / 2);
        let most = if grant.protocol == Protocol::Upnp { UPNP_RENEW_AT_MOST } else { half };
        self.timers.set(Timer::Renew, now + half.min(most).max(RENEW_AT_LEAST));
        let expires = grant.lifetime.map(|lifetime| now + lifetime);
        match expires {
            Some(at) => self.timers.set(Timer::Expire, at),
            None => self.timers.clear(Timer::Expire),
        }
        self.timers.set(Timer::Check, now + CHECK_INTERVAL);
        self.lease = Some(Lease {
            protocol: grant.protocol,
            internal_port,
            external: grant.external,
            given: now,
            expires,
            service: grant.service,
            pinhole: grant.pinhole,
        });
    }

    /// The protocol will not give a mapping now; `wait` is how long that is likely to last.
    fn refused(&mut self, now: Instant, protocol: Protocol, why: Refusal, wait: Option<Duration>) {
        self.ask = None;
        self.timers.clear(Timer::Ask);
        if self.lease.is_some() {
            if why == Refusal::Silent {
                return self.renew_later(now);
            }
            return self.lost(now);
        }
        self.standings[protocol] = Standing::Refused(why);
        if let Some(wait) = wait {
            self.wait = self.wait.max(wait.min(RETRY_LAST));
        }
        self.decide(now);
    }

    /// A renewal without an answer: half of what is left is waited, and the gateway searched anew beside.
    fn renew_later(&mut self, now: Instant) {
        let left = self.expires().map_or(UPNP_RENEW_AT_MOST, |expires| expires.saturating_duration_since(now));
        self.timers.set(Timer::Renew, now + (left / 2).max(RENEW_AT_LEAST));
        if let Some(network) = self.network {
            self.found.describe_again();
            self.start_probe(now, network);
        }
    }

    fn renew(&mut self, now: Instant) {
        if let Some(lease) = &self.lease {
            let protocol = lease.protocol;
            self.start_ask(now, protocol);
        }
    }

    /// The mapping is gone: everything begins again.
    fn lost(&mut self, now: Instant) {
        (self.lease, self.ask) = (None, None);
        for timer in [Timer::Ask, Timer::Renew, Timer::Expire, Timer::Check] {
            self.timers.clear(timer);
        }
        self.start(now);
    }

    /// All of the protocols have failed: waits, twice as long each time.
    fn exhausted(&mut self, now: Instant) {
        if self.timers.is_set(Timer::Retry) {
            return;
        }
        let last = Protocol::ALL.into_iter().rev().find_map(|protocol| match self.standings[protocol] {
            Standing::Refused(why) => Some(Problem::Refused(protocol, why)),
            Standing::Unknown | Standing::Absent | Standing::Present(_) => None,
        });
        self.problem = Some(last.unwrap_or(Problem::NoService));
        self.timers.set(Timer::Retry, now + self.wait);
        self.wait = (self.wait * 2).min(RETRY_LAST);
    }

    /// The gateway has forgotten the mapping.
    fn state_lost(&mut self, now: Instant) {
        let Some(lease) = &mut self.lease else { return };
        // A gateway whose epoch stands still does not make us ask all the time.
        lease.given = now;
        let protocol = lease.protocol;
        if self.ask.is_none() {
            self.start_ask(now, protocol);
        }
    }

    fn send(&mut self, remote: SocketAddr, datagram: Vec<u8>) {
        self.transmits.push_back(Transmit::Datagram { remote, datagram });
    }

    fn exchange(&mut self, remote: SocketAddr, request: Vec<u8>) -> ExchangeId {
        self.exchanges += 1;
        let id = ExchangeId(self.exchanges);
        self.transmits.push_back(Transmit::Http { id, remote, request });
        id
    }

    /// Tells what has changed.
    fn settle(&mut self) {
        for (spoken, standing) in self.spoken.0.iter_mut().zip(self.standings.0) {
            match standing {
                Standing::Unknown => {}
                Standing::Absent => *spoken = Some(false),
                Standing::Present(_) | Standing::Refused(_) => *spoken = Some(true),
            }
        }
        let status = self.status();
        if status != self.told {
            self.told = status;
            self.events.push_back(Event::Changed(status));
        }
        if self.closing && self.releases.is_empty() {
            self.closing = false;
            self.events.push_back(Event::Closed);
        }
    }
}
