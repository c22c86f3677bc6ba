//! A node's side of control, without I/O: when to connect, what to ask, what to make of the answers.
//!
//! ```text
//!            start/login                    Connected            answered, no AuthURL
//!   Idle ───────────────► connecting ─────────────► registering ─────────────────────► polling
//!    ▲                        ▲                       │      ▲  AuthURL: ask again        │
//!    │ stop, LoggedOut,       │ back-off              │      └─ with Followup ──┐        │
//!    └── Error (auth key      └───────────────────────┴─────────────────────────┴────────┘
//!        refused)                  the connection broke, the stream ended or fell silent
//! ```
//!
//! - Registering again with the same key is how a node restarts. `NodeKeyExpired` makes it draw a new node key and name
//!   the old one; so does its own expiry in the netmap. The new key counts from [`ControlEvent::Registered`] on.
//! - A pending login is waited for by asking again with `Followup`: the server holds that request until somebody has
//!   approved, which may take as long as it takes.
//! - While the map stream is open, changes of the node's own [`Description`] are told in separate requests, one at a
//!   time, always the latest.
//! - A stream that says nothing for 120 s is given up, connection and all. Every failure waits twice as long as the one
//!   before, from 250 ms to 30 s, half of it at random; a map that arrives sets that back.
//!
//! Follow the drain rule: after each call, empty [`poll_action`](Client::poll_action) and
//! [`poll_event`](Client::poll_event), then ask [`poll_timeout`](Client::poll_timeout).

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::random::SeededRng;

use crate::netmap::Netmap;
use crate::wire::{MapRequest, MapResponse, PingRequest, RegisterAuth, RegisterRequest, RegisterResponse, Timestamp};

pub mod c2n;
mod model;
mod problem;

pub use model::{Action, Config, ControlEvent, Description, Registered, RequestId};
pub use problem::Problem;

/// How long a map stream may be silent. Servers send a keep-alive at least every minute.
pub const WATCHDOG: Duration = Duration::from_secs(120);
/// The first wait after a failure.
pub const FIRST_RETRY: Duration = Duration::from_millis(250);
/// The longest wait after a failure.
pub const LAST_RETRY: Duration = Duration::from_secs(30);
/// How far the two clocks may be apart before it is worth a word.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    Idle,
    Run,
    LogOut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Down,
    Connecting,
    Up,
}

/// Names the deadlines, so that a trace can say which one fell due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// Nothing new is begun before this.
    Retry,
    /// No update is sent before this.
    RetryUpdate,
    /// The map stream has been silent.
    Watchdog,
    /// Our key expires.
    KeyExpiry,
}

#[derive(Debug)]
struct MapStream {
    id: RequestId,
    /// Whether the first map, which must contain this node, has come.
    begun: bool,
}

/// The core of a control client. See the [module](self) for its states.
#[derive(Debug)]
pub struct Client {
    config: Config,
    rng: SeededRng,
    /// The monotonic clock and the wall clock at the same moment.
    epoch: (Instant, Timestamp),
    goal: Goal,
    link: Link,
    timers: BTreeMap<Timer, Instant>,
    failures: u32,
    next_id: u64,

    auth_key: Option<String>,
    old_key: NodePublic,
    fresh_key: bool,
    registered: bool,
    ever_registered: bool,
    followup: String,
    register: Option<RequestId>,

    stream: Option<MapStream>,
    update: Option<(RequestId, Description)>,
    told: Option<Description>,
    netmap: Arc<Netmap>,
    /// The server's clock, and when it was read.
    control_clock: Option<(Timestamp, Instant)>,
    skew_told: bool,
    last_ping: String,
    last_page: String,

    actions: VecDeque<Action>,
    events: VecDeque<ControlEvent>,
}

impl Client {
    /// A client at rest. `wall` is the wall clock at `now`; `seed` makes node keys and jitter.
    #[must_use]
    pub fn new(now: Instant, wall: SystemTime, config: Config, seed: [u8; 32]) -> Self {
        Self {
            config,
            rng: SeededRng::from_seed(seed),
            epoch: (now, wall.into()),
            goal: Goal::Idle,
            link: Link::Down,
            timers: BTreeMap::new(),
            failures: 0,
            next_id: 0,
            auth_key: None,
            old_key: NodePublic::ZERO,
            fresh_key: false,
            registered: false,
            ever_registered: false,
            followup: String::new(),
            register: None,
            stream: None,
            update: None,
            told: None,
            netmap: Arc::default(),
            control_clock: None,
            skew_told: false,
            last_ping: String::new(),
            last_page: String::new(),
            actions: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The netmap as it is known.
    #[must_use]
    pub fn netmap(&self) -> &Arc<Netmap> {
        &self.netmap
    }

    /// The public half of the node key in use, or being registered.
    #[must_use]
    pub fn node_key(&self) -> NodePublic {
        self.config.node_key.public()
    }

    /// Whether the map stream is open and has brought a map.
    #[must_use]
    pub fn is_polling(&self) -> bool {
        self.stream.as_ref().is_some_and(|stream| stream.begun)
    }

    /// The server's clock at `now` as far as it is known, else this machine's.
    #[must_use]
    pub fn control_now(&self, now: Instant) -> Timestamp {
        let (at, since) = self.control_clock.unwrap_or((self.epoch.1, self.epoch.0));
        later(at, now.saturating_duration_since(since))
    }

    // ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────

    /// Joins, or goes on with what was being done; with `auth_key` instead of a page to approve on. Does nothing if it
    /// runs already and no key is given.
    pub fn login(&mut self, now: Instant, auth_key: Option<String>) {
        if self.goal == Goal::Run && auth_key.is_none() {
            return;
        }
        if auth_key.is_some() {
            self.auth_key = auth_key;
            self.followup.clear();
            if !self.registered {
                // A pending interactive login is overtaken by the key.
                self.register = None;
            }
        }
        self.goal = Goal::Run;
        self.again_at_once();
        self.advance(now);
    }

    /// Signs in anew with a new node key, even though the present one may be good.
    pub fn reauthenticate(&mut self, now: Instant, auth_key: Option<String>) {
        self.auth_key = auth_key;
        self.goal = Goal::Run;
        self.again_at_once();
        self.rotate();
        self.begin_registration();
        self.advance(now);
    }

    /// Closes the connection and rests. Control sees the node go offline.
    pub fn stop(&mut self, _now: Instant) {
        self.goal = Goal::Idle;
        self.rest();
    }

    /// Logs out: the node key expires at once. Ends in [`ControlEvent::LoggedOut`].
    pub fn logout(&mut self, now: Instant) {
        self.close_stream();
        self.goal = Goal::LogOut;
        self.register = None;
        self.again_at_once();
        self.advance(now);
    }

    /// Sets what the node says of itself, and tells the server if that is different.
    pub fn describe(&mut self, now: Instant, description: Description) {
        self.config.description = description;
        self.advance(now);
    }

    /// The network came back or changed: whatever waits need not wait any longer.
    pub fn retry_now(&mut self, now: Instant) {
        self.again_at_once();
        self.advance(now);
    }

    // ── inputs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    /// The channel that [`Action::Connect`] asked for is open.
    pub fn connected(&mut self, now: Instant) {
        if self.link == Link::Connecting {
            self.link = Link::Up;
            self.advance(now);
        }
    }

    /// There is no channel, or it broke.
    pub fn connection_failed(&mut self, now: Instant, problem: Problem) {
        if self.link != Link::Down {
            self.drop_link();
            self.failed(now, problem);
        }
    }

    /// The answer to [`Action::Register`].
    pub fn register_answered(&mut self, now: Instant, id: RequestId, response: RegisterResponse) {
        if self.register != Some(id) {
            return;
        }
        self.register = None;
        if self.goal == Goal::LogOut {
            let refused = (!response.error.is_empty()).then_some(Problem::Refused(response.error));
            self.logged_out(refused);
            return;
        }
        if !response.error.is_empty() {
            self.refused(now, response.error);
        } else if response.node_key_expired {
            if self.fresh_key {
                self.failed(now, Problem::FreshKeyExpired);
            } else {
                self.rotate();
                self.followup.clear();
            }
        } else if response.auth_url.is_empty() {
            self.complete_registration(response);
        } else if self.followup == response.auth_url {
            // Nobody has approved within the server's patience: ask again, but not in a tight loop.
            self.hold(now, FIRST_RETRY);
        } else {
            self.followup.clone_from(&response.auth_url);
            self.failures = 0;
            self.events.push_back(ControlEvent::AuthUrl(response.auth_url));
        }
        self.advance(now);
    }

    /// One message of the stream that [`Action::OpenMap`] opened.
    pub fn map_received(&mut self, now: Instant, id: RequestId, mut message: MapResponse) {
        if self.stream.as_ref().is_none_or(|stream| stream.id != id) {
            return;
        }
        self.timers.insert(Timer::Watchdog, now + WATCHDOG);
        self.note_clock(now, message.control_time);
        if let Some(ping) = message.ping_request.take() {
            self.answer_ping(ping);
        }
        if !message.pop_browser_url.is_empty() && message.pop_browser_url != self.last_page {
            self.last_page.clone_from(&message.pop_browser_url);
            self.events.push_back(ControlEvent::OpenBrowser(std::mem::take(&mut message.pop_browser_url)));
        }
        let Some(stream) = &mut self.stream else { return };
        let first = !message.keep_alive && !stream.begun;
        if first {
            if message.node.is_none() {
                self.close_stream();
                self.failed(now, Problem::NoNode);
                return;
            }
            stream.begun = true;
            Arc::make_mut(&mut self.netmap).restart();
        }
        if !message.keep_alive {
            self.failures = 0;
        }
        let changes = Arc::make_mut(&mut self.netmap).apply(message);
        if first || !changes.is_empty() {
            self.events.push_back(ControlEvent::Netmap { netmap: Arc::clone(&self.netmap), changes });
        }
        self.watch_expiry(now);
        self.advance(now);
    }

    /// The server took what [`Action::Update`] told it.
    pub fn update_answered(&mut self, now: Instant, id: RequestId) {
        if let Some((_, told)) = self.update.take_if(|(update, _)| *update == id) {
            self.told = Some(told);
            self.advance(now);
        }
    }

    /// A request failed, or the map stream ended.
    pub fn request_failed(&mut self, now: Instant, id: RequestId, problem: Problem) {
        if self.register == Some(id) {
            self.register = None;
            if self.goal == Goal::LogOut {
                self.logged_out(Some(problem));
                return;
            }
            self.failed(now, problem);
        } else if self.stream.as_ref().is_some_and(|stream| stream.id == id) {
            self.end_stream();
            if matches!(problem, Problem::Status { status: 401 | 404, .. }) {
                // The server does not know this node key (any more): introduce ourselves again.
                self.registered = false;
            }
            self.failed(now, problem);
        } else if self.update.take_if(|(update, _)| *update == id).is_some() {
            let wait = problem.retry_after().unwrap_or_else(|| self.backoff());
            self.timers.insert(Timer::RetryUpdate, now + wait);
        }
    }

    /// Does whatever is due at `now`. Calling early, late or twice is harmless.
    pub fn handle_timeout(&mut self, now: Instant) {
        let due: Vec<Timer> = self.timers.iter().filter(|(_, at)| **at <= now).map(|(timer, _)| *timer).collect();
        for timer in due {
            self.timers.remove(&timer);
            match timer {
                Timer::Retry | Timer::RetryUpdate => {}
                Timer::Watchdog => {
                    self.disconnect();
                    self.failed(now, Problem::Stalled(WATCHDOG));
                }
                Timer::KeyExpiry => self.watch_expiry(now),
            }
        }
        self.advance(now);
    }

    // ── outputs ─────────────────────────────────────────────────────────────────────────────────────────────────────

    /// What the driver should do next.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// What the owner should know.
    pub fn poll_event(&mut self) -> Option<ControlEvent> {
        self.events.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.values().min().copied()
    }

    // ── inside ──────────────────────────────────────────────────────────────────────────────────────────────────────

    /// Begins whatever the goal needs next and nothing forbids.
    fn advance(&mut self, now: Instant) {
        if self.goal == Goal::Idle || self.timers.contains_key(&Timer::Retry) {
            return;
        }
        match self.link {
            Link::Connecting => return,
            Link::Down => {
                self.link = Link::Connecting;
                self.actions.push_back(Action::Connect);
                return;
            }
            Link::Up => {}
        }
        if self.goal == Goal::LogOut || !self.registered {
            if self.register.is_none() {
                let id = self.id();
                self.register = Some(id);
                let request = self.register_request();
                self.actions.push_back(Action::Register(id, Box::new(request)));
            }
            return;
        }
        let open = self.stream.is_none();
        if open {
            self.told = None;
        }
        let description = &self.config.description;
        if self.update.is_none()
            && self.told.as_ref() != Some(description)
            && !self.timers.contains_key(&Timer::RetryUpdate)
        {
            let description = description.clone();
            let id = self.id();
            let request = MapRequest { omit_peers: true, ..self.map_request() };
            self.actions.push_back(Action::Update(id, Box::new(request)));
            self.update = Some((id, description));
        }
        if open {
            let id = self.id();
            self.stream = Some(MapStream { id, begun: false });
            self.timers.insert(Timer::Watchdog, now + WATCHDOG);
            let request = MapRequest { stream: true, ..self.map_request() };
            self.actions.push_back(Action::OpenMap(id, Box::new(request)));
        }
    }

    fn register_request(&self) -> RegisterRequest {
        let logout = self.goal == Goal::LogOut;
        RegisterRequest {
            version: self.config.version,
            node_key: self.node_key(),
            old_node_key: if logout { NodePublic::ZERO } else { self.old_key },
            auth: self.auth_key.clone().filter(|_| !logout).map(|auth_key| RegisterAuth { auth_key }),
            expiry: if logout { Timestamp::LOGOUT } else { Timestamp::ZERO },
            followup: if logout { String::new() } else { self.followup.clone() },
            hostinfo: Some(Box::new(self.config.description.hostinfo.clone())),
            ephemeral: self.config.ephemeral,
            ..RegisterRequest::default()
        }
    }

    fn map_request(&self) -> MapRequest {
        let Description { hostinfo, endpoints, disco } = &self.config.description;
        MapRequest {
            version: self.config.version,
            compress: if self.config.compress { "zstd".into() } else { String::new() },
            keep_alive: true,
            node_key: self.node_key(),
            disco_key: *disco,
            hostinfo: Some(Box::new(hostinfo.clone())),
            endpoints: endpoints.iter().map(|(address, _)| *address).collect(),
            endpoint_types: endpoints.iter().map(|(_, kind)| *kind).collect(),
            ..MapRequest::default()
        }
    }

    fn refused(&mut self, now: Instant, text: String) {
        let problem = Problem::Refused(text);
        if self.auth_key.take().is_none() {
            self.followup.clear();
            self.failed(now, problem);
        } else if self.ever_registered {
            // The key was good once and is spent; whoever owns the node can still approve it on a page.
            tracing::info!("the auth key is no longer accepted; asking for a login instead");
        } else {
            self.goal = Goal::Idle;
            self.rest();
            self.events.push_back(ControlEvent::Error(problem));
        }
    }

    fn complete_registration(&mut self, response: RegisterResponse) {
        self.registered = true;
        self.ever_registered = true;
        self.fresh_key = false;
        self.failures = 0;
        self.followup.clear();
        let rotated = !std::mem::take(&mut self.old_key).is_zero();
        self.events.push_back(ControlEvent::Registered(Box::new(Registered {
            node_key: self.config.node_key.clone(),
            rotated,
            user: response.user,
            login: response.login,
            machine_authorized: response.machine_authorized,
        })));
    }

    fn logged_out(&mut self, problem: Option<Problem>) {
        self.goal = Goal::Idle;
        self.rest();
        self.rotate();
        self.old_key = NodePublic::ZERO;
        self.fresh_key = false;
        self.auth_key = None;
        self.followup.clear();
        self.registered = false;
        self.ever_registered = false;
        self.told = None;
        self.netmap = Arc::default();
        self.events.push_back(ControlEvent::LoggedOut(problem));
    }

    /// Draws a new node key. The old one is remembered until the new one is registered.
    fn rotate(&mut self) {
        if self.old_key.is_zero() {
            self.old_key = self.node_key();
        }
        self.config.node_key = NodePrivate::generate(&mut self.rng);
        self.fresh_key = true;
    }

    /// Gives up the stream and whatever login was pending.
    fn begin_registration(&mut self) {
        self.close_stream();
        self.registered = false;
        self.register = None;
        self.followup.clear();
    }

    /// Looks at our own key's expiry: acts on it, or sets the alarm.
    fn watch_expiry(&mut self, now: Instant) {
        self.timers.remove(&Timer::KeyExpiry);
        // Between a rotation and the next map the netmap still shows the key before.
        let ours = self.netmap.node().filter(|node| node.key == self.node_key());
        let Some(expiry) = ours.map(|node| node.key_expiry).filter(|expiry| !expiry.is_zero()) else { return };
        let clock = self.control_now(now);
        match expiry.since(clock).filter(|left| !left.is_zero()) {
            // Far alarms overflow no clock: half a year is looked at again then.
            Some(left) => {
                self.timers.insert(Timer::KeyExpiry, now + left.min(Duration::from_secs(180 * 86_400)));
            }
            None => {
                self.events.push_back(ControlEvent::Expired);
                self.rotate();
                self.begin_registration();
            }
        }
    }

    fn note_clock(&mut self, now: Instant, control: Timestamp) {
        // Times before 2023 are a server without a clock, not a client with a wrong one.
        if control.unix_seconds() < 1_673_373_066 {
            return;
        }
        self.control_clock = Some((control, now));
        let ours = later(self.epoch.1, now.saturating_duration_since(self.epoch.0));
        let (by, ahead) = match ours.since(control) {
            Some(by) => (by, true),
            None => (control.since(ours).unwrap_or_default(), false),
        };
        let skewed = by > CLOCK_TOLERANCE;
        if skewed && !self.skew_told {
            self.events.push_back(ControlEvent::ClockSkew { by, ahead });
        }
        self.skew_told = skewed;
    }

    fn answer_ping(&mut self, ping: PingRequest) {
        if ping.url.is_empty() || ping.url == self.last_ping {
            return;
        }
        self.last_ping.clone_from(&ping.url);
        let path = path_of(&ping.url);
        if ping.types == "c2n" {
            self.actions.push_back(Action::Post { path, body: c2n::answer(&ping.payload.0) });
        } else if ping.types.is_empty() && ping.url_is_noise {
            self.actions.push_back(Action::Head { path });
        } else {
            self.events.push_back(ControlEvent::Ping(ping));
        }
    }

    fn failed(&mut self, now: Instant, problem: Problem) {
        let wait = match problem.retry_after() {
            Some(wait) => wait,
            None => self.backoff(),
        };
        if self.goal == Goal::LogOut {
            self.logged_out(Some(problem));
            return;
        }
        self.hold(now, wait);
        self.events.push_back(ControlEvent::Unreachable { reason: problem, retry_in: wait });
    }

    fn hold(&mut self, now: Instant, wait: Duration) {
        self.timers.insert(Timer::Retry, now + wait);
    }

    fn again_at_once(&mut self) {
        self.failures = 0;
        self.timers.remove(&Timer::Retry);
        self.timers.remove(&Timer::RetryUpdate);
    }

    /// How long to wait after one more failure: half fixed, half at random, so that a thousand nodes spread out.
    fn backoff(&mut self) -> Duration {
        let full = FIRST_RETRY.saturating_mul(1 << self.failures.min(10)).min(LAST_RETRY);
        self.failures = self.failures.saturating_add(1);
        let part = f64::from(u16::from_le_bytes(self.rng.array())) / f64::from(u16::MAX);
        full / 2 + (full / 2).mul_f64(part)
    }

    fn close_stream(&mut self) {
        if let Some(stream) = &self.stream {
            self.actions.push_back(Action::CloseMap(stream.id));
        }
        self.end_stream();
    }

    fn end_stream(&mut self) {
        self.stream = None;
        self.update = None;
        self.timers.remove(&Timer::Watchdog);
    }

    fn disconnect(&mut self) {
        if self.link != Link::Down {
            self.actions.push_back(Action::Disconnect);
        }
        self.drop_link();
    }

    fn drop_link(&mut self) {
        self.link = Link::Down;
        self.register = None;
        self.end_stream();
    }

    /// Lets go of everything but what is known.
    fn rest(&mut self) {
        self.disconnect();
        self.timers.clear();
        self.failures = 0;
    }

    fn id(&mut self) -> RequestId {
        self.next_id += 1;
        RequestId(self.next_id)
    }
}

fn later(time: Timestamp, by: Duration) -> Timestamp {
    let nanos = time.nanos() + by.subsec_nanos();
    let seconds = i64::try_from(by.as_secs()).unwrap_or(i64::MAX).saturating_add(i64::from(nanos / 1_000_000_000));
    Timestamp::from_unix(time.unix_seconds().saturating_add(seconds), nanos % 1_000_000_000)
}

/// The path and query of a URL whose host means nothing.
fn path_of(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    match rest.find('/') {
        Some(at) => rest[at..].to_owned(),
        None => "/".to_owned(),
    }
}

#[cfg(test)]
mod tests;
