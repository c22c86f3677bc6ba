//! The relay: what answers the requests that a [`listener`](super::listener) has read.
//!
//! `http` answers what a listener has read, `login` lets a client in, `session` runs its connection on one of the `shards`,
//! `outlet` is what waits for it, and the [`Registry`] between them says who is where; `region` is this relay among others.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use mesh_noise::key::{NodePublic, RelayPrivate, RelayPublic};
use tokio::sync::Notify;

use crate::driver::now;
use crate::login::MeshKey;
use crate::metrics::Source;
use crate::queue::Depth;
use crate::server::{RateLimit, Registry};
use crate::upgrade::RequestHead;

mod admission;
mod counters;
mod cpu;
mod http;
mod key;
mod login;
mod moderation;
mod outlet;
mod region;
mod restart;
mod routes;
mod session;
mod shards;
mod slab;

pub use admission::{Admission, AllOf, AllowAll, AllowList, AllowListFile, Applicant, BadAllowList, Deciding, Verdict};
#[cfg(feature = "verify")]
pub use admission::{BadVerifyUrl, Unreachable, Verify};
use counters::Atomics;
pub use counters::Counters;
pub use http::{BootstrapDns, Public};
pub use key::{load_or_generate_key, load_or_generate_mesh_key};
use outlet::Outlet;
use region::link::Link;
pub use region::{BadSibling, RegionStatus, Sibling};
use shards::Shards;

/// A relay's settings. The defaults suit a public relay.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who may use it. Everybody, by default.
    pub admission: Arc<dyn Admission>,
    /// The secret that the relays of the region share. Who shows it is another of them: it is let in whatever
    /// [`Config::admission`] says, learns who is connected, and may forward packets and end connections. None by default,
    /// and then nobody may.
    pub mesh_key: Option<MeshKey>,
    /// How much waits for each receiver.
    pub queue: Depth,
    /// How often something is sent, so that clients know the connection is alive; up to 5 s are added at random, once a
    /// connection. Official clients give up after 120 s without a frame. 60 s.
    pub keep_alive: Duration,
    /// How long a receiver may take no byte before it is let go. 10 s.
    pub write_stall: Duration,
    /// How long an answered HTTP connection may be silent. 30 s.
    pub idle_http: Duration,
    /// Threads that pass packets on. Half as many as there are cores, and at least one: TLS handshakes, and the system's
    /// share of every packet, need the others.
    pub threads: usize,
    /// How much each client may send. No limit.
    pub rate: RateLimit,
    /// What its HTTP surface shows besides the relay.
    pub public: Public,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            admission: Arc::new(AllowAll),
            mesh_key: None,
            queue: Depth::default(),
            keep_alive: Duration::from_secs(60),
            write_stall: Duration::from_secs(10),
            idle_http: Duration::from_secs(30),
            threads: std::thread::available_parallelism().map_or(1, |cores| cores.get() / 2).max(1),
            rate: RateLimit::default(),
            public: Public::default(),
        }
    }
}

/// Who is where: connections by what waits for them, other relays by what waits for the link.
type Everybody = Registry<Arc<Outlet>, Arc<Link>>;

/// A relay. See the [module doc](self).
#[derive(Debug)]
pub struct RelayServer {
    key: RelayPrivate,
    public: RelayPublic,
    config: Config,
    registry: RwLock<Everybody>,
    /// How often somebody has come, gone, or become another connection: what was read before may be out of date.
    generation: AtomicU64,
    /// Nobody is let in any more.
    ending: AtomicBool,
    /// When departures from the region are due may have changed.
    region_changed: Notify,
    counters: Atomics,
    shards: OnceLock<Shards>,
    rate: Mutex<RateLimit>,
    /// How often that has changed.
    rate_version: AtomicU64,
    started: Instant,
    /// What else is shown at `/metrics`.
    sources: RwLock<Vec<Box<dyn Source>>>,
}

impl RelayServer {
    /// A relay with that identity and nobody connected.
    #[must_use]
    pub fn new(key: RelayPrivate, config: Config) -> Arc<Self> {
        let public = key.public();
        Arc::new(Self {
            key,
            public,
            registry: RwLock::default(),
            generation: AtomicU64::new(0),
            ending: AtomicBool::new(false),
            region_changed: Notify::new(),
            counters: Atomics::default(),
            shards: OnceLock::new(),
            rate: Mutex::new(config.rate),
            rate_version: AtomicU64::new(0),
            started: now(),
            sources: RwLock::default(),
            config,
        })
    }

    /// Limits what each client may send from now on, those that are connected as well.
    pub fn set_rate_limit(&self, rate: RateLimit) {
        *self.rate.lock().unwrap_or_else(PoisonError::into_inner) = rate;
        self.rate_version.fetch_add(1, Ordering::Release);
    }

    fn rate(&self) -> (u64, RateLimit) {
        let version = self.rate_version.load(Ordering::Acquire);
        (version, *self.rate.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Its public key.
    #[must_use]
    pub const fn public(&self) -> &RelayPublic {
        &self.public
    }

    /// Whether a request is the relay's to answer, for a port that serves other things as well.
    #[must_use]
    pub fn handles(head: &RequestHead) -> bool {
        matches!(
            head.path(),
            "/derp"
                | "/derp/probe"
                | "/derp/latency-check"
                | "/generate_204"
                | "/bootstrap-dns"
                | "/robots.txt"
                | "/healthz"
                | "/metrics"
        )
    }

    /// What has been counted since the start.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let registry = self.registry();
        let (connections, nodes) = (registry.connections() as u64, registry.nodes() as u64);
        Counters { connections, nodes, ..self.counters.snapshot() }
    }

    /// Whether a node is connected.
    #[must_use]
    pub fn is_connected(&self, node: &NodePublic) -> bool {
        self.registry().route(node).is_some()
    }

    /// Ends all relay connections, and with them their [`RelayServer::serve`] futures.
    ///
    /// Other relays of the region see their links break, and hear nothing of the clients: those may well be on their way
    /// to them.
    pub fn close_all(&self) {
        for outlet in self.registry().handles() {
            outlet.close_with_all();
        }
    }

    /// Ends the connections of nodes that may no longer use the relay; those of other relays of the region stay.
    pub fn retain(&self, keep: impl Fn(&NodePublic) -> bool) {
        for outlet in self.registry().handles() {
            if !outlet.guest().is_relay() && !keep(&outlet.guest().node) {
                outlet.close();
            }
        }
    }

    /// Ends the connections of a node that may no longer use the relay.
    pub fn disconnect(&self, node: &NodePublic) {
        for outlet in self.registry().handles() {
            if outlet.guest().node == *node {
                outlet.close();
            }
        }
    }

    fn registry(&self) -> RwLockReadGuard<'_, Everybody> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The threads of the connections, started when they are first needed.
    fn shards(&self) -> &Shards {
        self.shards.get_or_init(|| Shards::start(self.config.threads))
    }

    /// Changes who is where, and lets all connections forget what they remember of it.
    fn change_registry<R>(&self, change: impl FnOnce(&mut Everybody) -> R) -> R {
        let mut registry = self.registry_mut();
        let result = change(&mut registry);
        self.generation.fetch_add(1, Ordering::Release);
        result
    }

    fn registry_mut(&self) -> RwLockWriteGuard<'_, Everybody> {
        self.registry.write().unwrap_or_else(PoisonError::into_inner)
    }
}
