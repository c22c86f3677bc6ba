//! One node's connection to the relays of a region, kept up for as long as it is wanted.
//!
//! [`RelayClient`] connects to the relay of the region that is first to be reached, the map's first one by preference (see
//! [`dialling`](crate::client::dialling)), logs in, and passes packets both ways. When the connection ends, for whatever
//! reason, it connects again: at once after one that had been working, then ever later (at most about 5 s, with jitter).
//! [`Outbox`] is where packets go in, from any thread; what is put in while there is no connection waits, newest first
//! served by displacing the oldest.
//!
//! While connected it moves to another relay of the region without a gap when its own announces a restart, and when the
//! region's first relay is back.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::random::SystemRng;

use super::{now, random_fraction};
use crate::client::dialling::{History, ideal};
use crate::client::{Connection, Event, Timing};
use crate::frame::GoneReason;
use crate::map::DerpRegion;
use crate::proxy::Proxies;
use crate::queue::Depth;
use crate::tls::ClientTls;

mod dial;
mod moving;
mod open;
mod outbox;

pub use dial::{Carriage, DialError, latency_check};
use dial::{Link, Reach};
#[cfg(feature = "server")]
pub(crate) use dial::{Link as Dialled, dial};
use moving::{Former, Next, RESTART_RETRY, Restart};
use open::Open;
#[cfg(feature = "server")]
pub(crate) use open::write_some;
pub use outbox::{Outbox, OutboxCounters};

/// What a client needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// The region to connect to.
    pub region: DerpRegion,
    /// The node's key.
    pub key: NodePrivate,
    /// How connections are secured.
    pub tls: ClientTls,
    /// Through which HTTP proxy relays are reached, if any.
    pub proxies: Proxies,
    /// How frames travel.
    pub carriage: Carriage,
    /// Whether this is the node's home region.
    pub home: bool,
    /// How much waits to be sent.
    pub queue: Depth,
    /// Waiting times of a connection.
    pub timing: Timing,
}

impl Options {
    /// The usual settings: no proxy, not home, and the usual depth of queue.
    #[must_use]
    pub fn new(region: DerpRegion, key: NodePrivate, tls: ClientTls) -> Self {
        Self {
            region,
            key,
            tls,
            proxies: Proxies::none(),
            carriage: Carriage::default(),
            home: false,
            queue: Depth::default(),
            timing: Timing::default(),
        }
    }
}

/// What happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum RelayEvent {
    /// A relay has accepted the login. Without a [`RelayEvent::Disconnected`] in between, the client has moved to this relay
    /// from another one.
    Connected {
        /// Its name in the DERP map.
        node: String,
    },
    /// A connection ended or could not be made. Another attempt follows by itself.
    Disconnected {
        /// Why, in one line.
        reason: String,
    },
    /// A packet came.
    Packet {
        /// From whom.
        source: NodePublic,
        /// The packet.
        payload: Bytes,
    },
    /// A peer cannot be reached through this region.
    PeerGone {
        /// Which.
        peer: NodePublic,
        /// Why.
        reason: GoneReason,
    },
    /// The relay reports a problem; an empty text says that it is over, or that the connection it was about is.
    Health(String),
    /// The relay is about to restart. The client sees to that by itself.
    Restarting {
        /// When it will connect anew.
        reconnect_in: Duration,
    },
}

type Dialling = Pin<Box<dyn Future<Output = Result<Link, DialError>> + Send>>;

enum State {
    /// Not asked for anything yet.
    Idle,
    Waiting(Pin<Box<tokio::time::Sleep>>),
    Dialling(Dialling),
    Connected(Box<Open>),
}

/// One node's connection to a region. See the [module doc](self).
pub struct RelayClient {
    reach: Arc<Reach>,
    key: NodePrivate,
    home: bool,
    timing: Timing,
    outbox: Outbox,
    state: State,
    next: Option<Next>,
    former: Option<Former>,
    /// When to try the region's first relay, while connected to another.
    return_at: Option<Instant>,
    restart: Option<Restart>,
    history: History,
    health: Option<String>,
    events: VecDeque<RelayEvent>,
    failures: u32,
    /// When the present round of attempts began: the login has to be over within the time it has.
    dialled_at: Instant,
    connected_at: Option<Instant>,
    last_sent: Option<Instant>,
}

impl std::fmt::Debug for RelayClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RelayClient").field("region", &self.reach.region.id).finish_non_exhaustive()
    }
}

/// A connection that lasted this long was a success: the next attempt follows at once.
const SETTLED: Duration = Duration::from_secs(5);
/// How soon a relay has to answer after the network has changed.
const CHECK_PATIENCE: Duration = Duration::from_secs(1);
/// What was done while connected.
enum Step {
    Present(Result<(), String>),
    Dialled(Result<Link, DialError>),
    LoggingIn(Result<(), String>),
    Former(Result<(), String>),
    MoveDue,
}

impl RelayClient {
    /// A client that begins to connect when [`RelayClient::next_event`] is first polled.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let Options { region, key, tls, proxies, carriage, home, queue, timing } = options;
        let reach = Arc::new(Reach { region, tls, proxies, carriage });
        Self {
            reach,
            key,
            home,
            timing,
            outbox: Outbox::new(queue),
            state: State::Idle,
            next: None,
            former: None,
            return_at: None,
            restart: None,
            history: History::default(),
            health: None,
            events: VecDeque::new(),
            failures: 0,
            dialled_at: now(),
            connected_at: None,
            last_sent: None,
        }
    }

    /// Where packets go in.
    #[must_use]
    pub fn outbox(&self) -> Outbox {
        self.outbox.clone()
    }

    /// Whether a relay has accepted the login and nothing has gone wrong since.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.connected_at.is_some()
    }

    /// The problem that the relay has reported, if it is not over.
    #[must_use]
    pub fn health(&self) -> Option<&str> {
        self.health.as_deref()
    }

    /// When a packet was last handed to a connection, for closing regions that are no longer used.
    #[must_use]
    pub const fn last_sent(&self) -> Option<Instant> {
        self.last_sent
    }

    /// Tells the relays whether this is the node's home region.
    pub fn set_home(&mut self, home: bool) {
        self.home = home;
        if let State::Connected(open) = &mut self.state {
            open.core.set_home(home);
        }
        if let Some(Next::LoggingIn(open)) = &mut self.next {
            open.core.set_home(home);
        }
    }

    /// Gives up the present connection and connects anew at once: the network has changed, and what was learnt in the old one
    /// says nothing about this one.
    pub fn reconnect(&mut self) {
        (self.failures, self.history, self.restart) = (0, History::default(), None);
        self.close();
        self.state = self.dialling();
    }

    /// The network has changed, but the present connection may have outlived that: asks the relay, and connects anew unless
    /// it answers within a second. Packets go on meanwhile. Without a connection, an attempt begins anew at once.
    pub fn check(&mut self) {
        match &mut self.state {
            State::Connected(open) => open.core.check(now(), CHECK_PATIENCE),
            State::Idle | State::Waiting(_) | State::Dialling(_) => self.reconnect(),
        }
    }

    /// What has already happened and has not been asked for yet; for taking packets in batches after
    /// [`RelayClient::next_event`] has returned one.
    pub fn try_next_event(&mut self) -> Option<RelayEvent> {
        self.events.pop_front()
    }

    /// Runs until something happens. Safe to cancel: nothing is lost, not even a connection attempt. The connection is
    /// read and written only while this is polled.
    pub async fn next_event(&mut self) -> RelayEvent {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            match &mut self.state {
                State::Idle => self.state = self.dialling(),
                State::Waiting(sleep) => {
                    sleep.as_mut().await;
                    self.state = self.dialling();
                }
                State::Dialling(dialling) => match dialling.as_mut().await {
                    Ok(link) => self.state = State::Connected(Box::new(self.log_in(link, self.dialled_at))),
                    Err(error) => self.failed(error.to_string()),
                },
                State::Connected(_) => {
                    let step = self.step().await;
                    self.handle_step(step);
                }
            }
        }
    }

    /// Does one thing on one of the connections. Safe to cancel.
    async fn step(&mut self) -> Step {
        let move_at = self.move_at();
        let State::Connected(open) = &mut self.state else { return Step::MoveDue };
        let next = async {
            match &mut self.next {
                Some(Next::Dialling(dialling)) => Step::Dialled(dialling.as_mut().await),
                Some(Next::LoggingIn(open)) => Step::LoggingIn(open.step_alone().await),
                None => std::future::pending().await,
            }
        };
        let former = async {
            match &mut self.former {
                Some(Former { open, until }) => {
                    let heard = tokio::time::timeout_at(*until, open.listen()).await;
                    Step::Former(heard.unwrap_or_else(|_| Err("replaced".to_owned())))
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            done = open.step(&self.outbox.0, &mut self.last_sent) => Step::Present(done),
            step = next => step,
            step = former => step,
            () = sleep_until(move_at.map(Into::into)) => Step::MoveDue,
        }
    }

    fn handle_step(&mut self, step: Step) {
        match step {
            Step::Present(Ok(())) => self.handle_events(),
            Step::Present(Err(reason)) => {
                // What it had to say before it ended.
                self.handle_events();
                self.failed(reason);
            }
            Step::MoveDue => self.begin_move(),
            Step::Dialled(Ok(link)) => {
                self.next = Some(Next::LoggingIn(Box::new(self.log_in(link, now()))));
            }
            Step::Dialled(Err(error)) => self.move_failed(&error.to_string()),
            Step::LoggingIn(Err(reason)) => {
                if let Some(Next::LoggingIn(open)) = &self.next {
                    self.history.note_failed(now(), &self.reach.region.nodes[open.node].name);
                }
                self.move_failed(&reason);
            }
            Step::LoggingIn(Ok(())) => self.finish_move(),
            Step::Former(heard) => {
                if let Some(former) = &mut self.former {
                    while let Some(event) = former.open.core.poll_event() {
                        if let Event::Packet { source, payload } = event {
                            self.events.push_back(RelayEvent::Packet { source, payload });
                        }
                    }
                }
                if heard.is_err() {
                    self.former = None;
                }
            }
        }
    }

    /// Passes on what the present connection has learnt.
    fn handle_events(&mut self) {
        while let State::Connected(open) = &mut self.state
            && let Some(event) = open.core.poll_event()
        {
            match event {
                Event::Connected { .. } => {
                    let (node, via, now) = (open.node, open.via, now());
                    let name = self.reach.region.nodes[node].name.clone();
                    self.history.note_good(now, &name, via);
                    self.connected_at = Some(now);
                    self.restart = None;
                    let elsewhere = ideal(&self.reach.region) != Some(node);
                    self.return_at = elsewhere.then(|| now + jittered(self.history.return_after()));
                    self.events.push_back(RelayEvent::Connected { node: name });
                }
                Event::Packet { source, payload } => {
                    self.events.push_back(RelayEvent::Packet { source, payload });
                }
                Event::PeerGone { peer, reason } => self.events.push_back(RelayEvent::PeerGone { peer, reason }),
                Event::PeerPresent { .. } => {}
                Event::Restarting { reconnect_in, try_for } => self.note_restart(reconnect_in, try_for),
                Event::Health(text) => {
                    self.health = Some(text.clone()).filter(|text| !text.is_empty());
                    self.events.push_back(RelayEvent::Health(text));
                }
            }
        }
    }

    fn dialling(&mut self) -> State {
        self.dialled_at = now();
        State::Dialling(self.dial(self.history.order(self.dialled_at, &self.reach.region)))
    }

    fn dial(&self, order: Vec<usize>) -> Dialling {
        Box::pin(dial::dial_in_order(Arc::clone(&self.reach), order, self.history.clone(), self.timing.login))
    }

    fn log_in(&self, link: Link, dialled_at: Instant) -> Open {
        // Connecting and logging in have one budget, of which the login gets a fifth at least.
        let spent = now().saturating_duration_since(dialled_at).min(self.timing.login * 4 / 5);
        let timing = Timing { login: self.timing.login - spent, ..self.timing };
        let core = Connection::new(now(), self.key.clone(), link.relay, self.home, &mut SystemRng).with_timing(timing);
        Open::new(link, core)
    }

    /// Forgets everything about the connections there are.
    fn close(&mut self) {
        (self.next, self.former, self.connected_at, self.return_at) = (None, None, None, None);
        self.forget_health();
    }

    fn forget_health(&mut self) {
        if self.health.take().is_some() {
            self.events.push_back(RelayEvent::Health(String::new()));
        }
    }

    fn failed(&mut self, reason: String) {
        let now = now();
        // A relay that lets clients in and drops them at once must not be asked at full speed.
        let settled = self.connected_at.is_some_and(|at| now.duration_since(at) >= SETTLED);
        self.failures = if settled { 0 } else { self.failures.saturating_add(1) };
        if let State::Connected(open) = &self.state {
            let node = &self.reach.region.nodes[open.node].name;
            if settled && self.restart.is_none() {
                self.history.note_good(now, node, open.via);
            } else if !settled {
                self.history.note_failed(now, node);
            }
            if settled && ideal(&self.reach.region) == Some(open.node) {
                self.history.note_returned();
            }
        }
        tracing::debug!(region = %self.reach.region.id, %reason, "relay connection failed");
        let next = self.next.take();
        self.close();
        self.events.push_back(RelayEvent::Disconnected { reason });
        self.state = match next {
            Some(Next::Dialling(dialling)) => {
                self.dialled_at = now;
                State::Dialling(dialling)
            }
            Some(Next::LoggingIn(open)) => State::Connected(open),
            None => {
                let wait = match self.restart {
                    Some(restart) if now < restart.at => restart.at - now,
                    Some(restart) if now < restart.until => jittered(RESTART_RETRY),
                    _ => {
                        self.restart = None;
                        jittered(backoff(self.failures))
                    }
                };
                State::Waiting(Box::pin(tokio::time::sleep(wait)))
            }
        };
    }
}

/// The time to wait after `failures` attempts in a row have failed, before jitter: n² × 10 ms, at most 5 s.
fn backoff(failures: u32) -> Duration {
    Duration::from_millis(10).saturating_mul(failures.saturating_mul(failures)).min(Duration::from_secs(5))
}

/// Half as long, or half as long again, or anything in between.
fn jittered(wait: Duration) -> Duration {
    wait.mul_f64(0.5 + random_fraction())
}

pub(crate) async fn sleep_until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[cfg(feature = "server")]
mod tests;
