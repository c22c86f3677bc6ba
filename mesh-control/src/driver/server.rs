//! The coordination server: clocks, sockets, disk and randomness around [`crate::server`].
//!
//! A [`Coordinator`] is handed connections that somebody else has accepted, so that a relay can share its port:
//!
//! ```text
//! Incoming ─► HTTP/1.1 ─┬─ GET  /key               the Noise key
//!                       ├─ POST /ts2021 ─► Noise ─► HTTP/2 ─┬─ POST /machine/register
//!                       │                                   └─ POST /machine/map ─► stream task
//!                       ├─ /register/<id>          the page behind a printed URL
//!                       ├─ POST /verify            may this node use a relay?
//!                       └─ GET  /health
//! ```
//!
//! Two states are kept. Commands are decided against the one that is *ahead*; the store makes their events durable, and
//! only then are they applied to the *visible* one, which maps are made of. So nobody is told what a crash could undo.

mod http;
mod key_file;
mod machine;
mod map;
mod page;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use mesh_derp::driver::listener::Incoming;
use mesh_derp::driver::server::RelayServer;
use mesh_derp::map::DerpMap;
use mesh_noise::key::{MachinePrivate, MachinePublic, NodePublic};
use tokio::sync::{Notify, oneshot, watch};

use crate::server::mapper::{Changelog, Notice, Settings, View};
use crate::server::presence::{GRACE, Presence};
use crate::server::state::{Context, Decision, Refusal, Rules, State};
use crate::server::store::{Batch, SqliteStore, Store, StoreError};
use crate::server::{Actor, Event, Moment, TailnetId};

use mesh_noise::random::SystemRng;

/// How many notices streams may be behind before they get a full map.
const CHANGELOG: usize = 4096;
/// How often lapsed codes, logins and ephemeral nodes are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// What a coordinator needs to know. [`Config::new`] has the defaults.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the database, the Noise key and the admin socket live. Created if missing.
    pub state_dir: PathBuf,
    /// The URL that clients use, without a slash at the end. Printed URLs begin with it.
    pub url: String,
    /// The suffix of node names. Default `tailnet.mesh.internal`.
    pub domain: String,
    /// The relays. Default none; [`Coordinator::set_derp_map`] changes it.
    pub derp_map: DerpMap,
    /// Lifetimes and limits.
    pub rules: Rules,
    /// Idle time before a keep-alive, to which up to a fifth is added at random. Default 50 s, as clients give up after
    /// 120 s.
    pub keep_alive: Duration,
    /// How long after its last map poll a node still counts as online. Default 10 s.
    pub offline_grace: Duration,
    /// How long a request that waits for approval is held before it is answered "not yet". Default 5 minutes.
    pub followup_hold: Duration,
}

impl Config {
    /// A coordinator on `state_dir` that clients reach at `url`.
    #[must_use]
    pub fn new(state_dir: impl Into<PathBuf>, url: impl Into<String>) -> Self {
        let mut url: String = url.into();
        url.truncate(url.trim_end_matches('/').len());
        Self {
            state_dir: state_dir.into(),
            url,
            domain: "tailnet.mesh.internal".to_owned(),
            derp_map: DerpMap::default(),
            rules: Rules::default(),
            keep_alive: Duration::from_secs(50),
            offline_grace: GRACE,
            followup_hold: Duration::from_secs(5 * 60),
        }
    }
}

/// Why a coordinator cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file with the Noise key is not what it should be.
    #[error("{path} does not hold a private key: restore it from a backup (without it no client can connect)")]
    KeyFile {
        /// The file.
        path: PathBuf,
    },
    /// A file or the admin socket cannot be used.
    #[error("cannot use {path}: {error}")]
    Io {
        /// What was tried.
        path: PathBuf,
        /// Why it failed.
        error: std::io::Error,
    },
}

/// Why a command has no effect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// The rules forbid it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The store has failed; nothing more is accepted until a restart.
    #[error("the coordinator cannot write its state; see its log, then restart it")]
    StoreFailed,
}

/// What changes, behind one lock that is never held across an await.
struct Core {
    ahead: State,
    visible: State,
    presence: Presence,
    log: Changelog,
    settings: Settings,
    expiries_seen: Moment,
}

/// How to read the relays again.
pub type DerpMapLoader = Box<dyn Fn() -> Result<DerpMap, String> + Send + Sync>;

/// A running coordination server.
pub struct Coordinator {
    url: String,
    keep_alive: Duration,
    followup_hold: Duration,
    admin_socket: PathBuf,
    key: MachinePrivate,
    public: MachinePublic,
    started: Moment,
    core: Mutex<Core>,
    store: Box<dyn Store>,
    failed: AtomicBool,
    /// Counts what has become visible; map polls and held requests wait on it.
    news: watch::Sender<u64>,
    /// Tells the timer that a deadline may have moved.
    timer: Arc<Notify>,
    stop: watch::Sender<bool>,
    loader: OnceLock<DerpMapLoader>,
    relay: OnceLock<Arc<RelayServer>>,
}

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Coordinator").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Coordinator {
    /// Opens the state directory and starts timers and the admin socket. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// A [`StartError`], one line that says what to do.
    pub fn start(config: Config) -> Result<Arc<Self>, StartError> {
        let store = SqliteStore::open(&config.state_dir)?;
        let key = key_file::load_or_create(&config.state_dir.join("control.key"))?;
        let tailnet = TailnetId(1);
        let state = State::load(tailnet, config.rules, store.load(tailnet)?);
        let started = now().1;
        let coordinator = Arc::new(Self {
            url: config.url,
            keep_alive: config.keep_alive,
            followup_hold: config.followup_hold,
            admin_socket: config.state_dir.join(crate::admin::SOCKET_NAME),
            public: key.public(),
            key,
            started,
            core: Mutex::new(Core {
                visible: state.clone(),
                ahead: state,
                presence: Presence::new(config.offline_grace),
                log: Changelog::new(CHANGELOG),
                settings: Settings { domain: config.domain, derp_map: config.derp_map },
                expiries_seen: started,
            }),
            store: Box::new(store),
            failed: AtomicBool::new(false),
            news: watch::Sender::new(0),
            timer: Arc::new(Notify::new()),
            stop: watch::Sender::new(false),
            loader: OnceLock::new(),
            relay: OnceLock::new(),
        });
        crate::admin::http::spawn(&coordinator)
            .map_err(|error| StartError::Io { path: coordinator.admin_socket.clone(), error })?;
        tokio::spawn(keep_time(Arc::downgrade(&coordinator)));
        Ok(coordinator)
    }

    /// Serves one connection until it ends. Requests for a relay are somebody else's: ask
    /// [`RelayServer::handles`](mesh_derp::driver::server::RelayServer::handles) first.
    pub async fn serve(self: Arc<Self>, incoming: Incoming) {
        let from = incoming.peer_addr;
        self.serve_stream(incoming.into_replay(), from).await;
    }

    /// The URL that clients use.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The Noise key that clients get from `/key`.
    #[must_use]
    pub fn public_key(&self) -> MachinePublic {
        self.public
    }

    /// Where operators connect.
    #[must_use]
    pub fn admin_socket(&self) -> &std::path::Path {
        &self.admin_socket
    }

    /// Whether a node may use relays: it is registered and its key has not expired.
    #[must_use]
    pub fn admits(&self, node: &NodePublic) -> bool {
        let now = now().1;
        self.core().visible.node_by_key(node).is_some_and(|node| !node.is_expired(now))
    }

    /// The relays as nodes are told of them.
    #[must_use]
    pub fn derp_map(&self) -> DerpMap {
        self.core().settings.derp_map.clone()
    }

    /// Replaces the relays and tells every connected node.
    pub fn set_derp_map(&self, map: DerpMap) {
        let mut core = self.core();
        if core.settings.derp_map != map {
            core.settings.derp_map = map;
            core.log.push(Notice::DerpMap);
            self.announce();
        }
    }

    /// Says how to read the relays again when an operator asks for it. Only the first call counts.
    pub fn on_reload(&self, loader: DerpMapLoader) {
        // A second loader is a mistake that changes nothing.
        let _ = self.loader.set(loader);
    }

    /// Says that this relay runs in the same process, so that operators can see its counters. Only the first call counts.
    pub fn embed_relay(&self, relay: Arc<RelayServer>) {
        // A second relay is a mistake that changes nothing.
        let _ = self.relay.set(relay);
    }

    /// The relay in the same process, if there is one.
    #[must_use]
    pub fn relay(&self) -> Option<&Arc<RelayServer>> {
        self.relay.get()
    }

    /// Reads the relays again and tells every connected node. Returns how many regions there are.
    ///
    /// # Errors
    /// What the loader says, or that there is none.
    pub fn reload_derp_map(&self) -> Result<usize, String> {
        let loader = self.loader.get().ok_or("this coordinator was started without a --derp-map file")?;
        let map = loader()?;
        let regions = map.regions.len();
        self.set_derp_map(map);
        Ok(regions)
    }

    /// Ends all map polls and the admin socket. Connections drain; the store writes what it has when the last reference
    /// goes.
    pub fn shutdown(&self) {
        self.stop.send_replace(true);
        self.announce();
    }

    /// [`shutdown`](Self::shutdown), and waits until everything has let go (at most five seconds), so that the state
    /// directory can be opened again.
    pub async fn stop(self: Arc<Self>) {
        self.shutdown();
        for _ in 0..500 {
            if Arc::strong_count(&self) == 1 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tracing::warn!("connections are still open after five seconds");
    }

    /// Resolves once [`shutdown`](Self::shutdown) was called.
    pub(crate) fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut stop = self.stop.subscribe();
        async move {
            // An error means that the coordinator itself is gone.
            let _ = stop.wait_for(|stop| *stop).await;
        }
    }

    /// Decides a command, makes it durable, makes it visible, and returns the answer.
    pub(crate) async fn execute<T: Send>(
        self: &Arc<Self>,
        by: Actor,
        decide: impl FnOnce(&State, &Context, &mut SystemRng) -> Result<Decision<T>, Refusal> + Send,
    ) -> Result<T, CommandError> {
        let (written, reply) = {
            let mut core = self.core();
            if self.failed.load(Ordering::Acquire) {
                return Err(CommandError::StoreFailed);
            }
            let context = Context { now: now().1, by };
            let decision = decide(&core.ahead, &context, &mut SystemRng)?;
            let (events, reply) = core.ahead.seal(&context, decision);
            // An answer that changes nothing may still rest on changes that are not durable yet.
            let settled = core.ahead.counters().event == core.visible.counters().event;
            if events.is_empty() && settled {
                return Ok(reply);
            }
            (self.write(&core, events), reply)
        };
        match written.await {
            Ok(true) => Ok(reply),
            Ok(false) | Err(_) => Err(CommandError::StoreFailed),
        }
    }

    /// Hands events to the store. The receiver learns whether they are durable, and then they are visible.
    fn write(self: &Arc<Self>, core: &Core, events: Vec<Event>) -> oneshot::Receiver<bool> {
        let (tell, told) = oneshot::channel();
        let batch = Batch { tailnet: core.ahead.tailnet(), events, counters: core.ahead.counters() };
        let this = Arc::downgrade(self);
        // May run right here when the store has stopped, so that branch must not take the lock.
        let done = move |outcome: Result<Batch, StoreError>| {
            if let Some(this) = this.upgrade() {
                match &outcome {
                    Ok(batch) => this.publish(&batch.events),
                    Err(_) => this.failed.store(true, Ordering::Release),
                }
            }
            // Nobody may be waiting any more.
            let _ = tell.send(outcome.is_ok());
        };
        self.store.append(batch, Box::new(done));
        told
    }

    /// Makes durable events visible, in order: the store's writer is the only caller.
    fn publish(&self, events: &[Event]) {
        let mut core = self.core();
        for event in events {
            tracing::debug!(id = %event.id, kind = event.change.kind(), "event");
            core.visible.apply(event);
            if let Some(notice) = Notice::of(&event.change) {
                if let Notice::Removed(node) = notice {
                    core.presence.forget(node);
                }
                core.log.push(notice);
            }
        }
        drop(core);
        self.announce();
    }

    fn announce(&self) {
        self.news.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        // Nothing panics while it holds the lock; if it did, the state is still a fold of whole events.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the visible state.
    pub(crate) fn read<T>(&self, f: impl FnOnce(&View<'_>) -> T) -> T {
        let core = self.core();
        f(&core.view())
    }
}

impl Core {
    fn view(&self) -> View<'_> {
        View { state: &self.visible, presence: &self.presence, settings: &self.settings, now: now().1 }
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.admin_socket);
    }
}

/// Lets time pass: nodes go offline, what has lapsed is removed, expired keys are announced.
async fn keep_time(coordinator: Weak<Coordinator>) {
    loop {
        let Some(this) = coordinator.upgrade() else { return };
        if *this.stop.borrow() {
            return;
        }
        let (instant, moment) = now();
        let (gone, ephemeral) = {
            let mut core = this.core();
            let gone = core.presence.handle_timeout(instant);
            let before = std::mem::replace(&mut core.expiries_seen, moment);
            let expired: Vec<_> = core.visible.expired_between(before, moment).collect();
            for node in &expired {
                core.log.push(Notice::Node(*node, crate::server::NodeChange::Whole));
            }
            if !expired.is_empty() {
                this.announce();
            }
            let offline_since = |node: &crate::server::Node| {
                let since = core.presence.offline_since(node.id);
                let since = since.map(|since| {
                    Moment::from_millis(
                        moment
                            .millis()
                            .saturating_sub(u64::try_from((instant - since).as_millis()).unwrap_or(u64::MAX)),
                    )
                });
                (!core.presence.is_online(node.id)).then(|| since.unwrap_or(this.started.max(node.created)))
            };
            (gone, core.visible.sweep(moment, offline_since))
        };
        for node in gone {
            // A node that was deleted meanwhile has no last moment to note.
            let _ = this.execute(Actor::Coordinator, |state, context, _| state.seen(context, node)).await;
        }
        if !ephemeral.changes.is_empty()
            && let Err(error) = this.execute(Actor::Coordinator, |state, _, _| Ok(state.still_due(ephemeral))).await
        {
            tracing::warn!(%error, "cannot tidy up");
        }
        let next = this.core().presence.poll_timeout();
        let pause = next.map_or(SWEEP, |at| at.saturating_duration_since(now().0)).min(SWEEP);
        let (timer, stopped) = (Arc::clone(&this.timer), this.stopped());
        drop(this);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = timer.notified() => {}
            () = stopped => return,
        }
    }
}

/// The clocks.
#[expect(clippy::disallowed_methods, reason = "the server's one place that reads the clocks")]
fn now() -> (Instant, Moment) {
    (Instant::now(), Moment::from(SystemTime::now()))
}
