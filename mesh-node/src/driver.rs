//! The tasks around an [`Engine`]: sockets, relays, the coordinator, the host, the clock.
//!
//! One task owns the engine and everything that follows from its commands; it does no work of its own and waits for
//! nothing but its inputs. Relay connections and the coordinator's stream are tasks beside it that send it events, the
//! data plane is threads that send it notices. What the embedding API asks for arrives as [`Request`]s.
//!
//! While a node is down, there is no engine, no relay and no coordinator: device, sockets and data plane stay, with no
//! peers in them, so that listeners and local addresses outlive a `down` and an `up`.

mod clock;
mod control;
mod extra;
mod host;
mod plane;
mod portmaps;
mod relays;
mod report;
mod session;

pub(crate) use clock::{Clock, SleepWatch};
pub(crate) use host::{HostNetwork, Sockets, TunHost};
pub(crate) use plane::Plane;
pub(crate) use portmaps::PortMaps;
pub(crate) use relays::RelaySender;
pub(crate) use session::Session;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use mesh_control::driver::client::check_url;
use mesh_derp::proxy::Proxies;
use mesh_derp::tls::ClientTls;
use mesh_noise::key::{MachinePrivate, NodePublic};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::dataplane::Notices;
use crate::directory::Directory;
use crate::dns::Names;
use crate::error::Error;
use crate::events::Event;
use crate::local_api::Via;
use crate::netcheck::NetcheckReport;
use crate::node::UpOptions;
use crate::peer_relay::PeerRelay;
use crate::prefs::{PathMode, Prefs};
use crate::state::StateDir;
use crate::status::{NodeState, Status};

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What the embedding API asks of the driver.
#[derive(Debug)]
pub(crate) enum Request {
    Up(UpOptions, Reply<()>),
    Down(Reply<()>),
    Logout(Reply<()>),
    Status(Reply<Box<Status>>),
    Ping { peer: NodePublic, size: Option<usize>, reply: Reply<(Via, Duration)> },
    Netcheck(Reply<NetcheckReport>),
    SetPathMode(PathMode, Reply<()>),
    SetHostname(String, Reply<()>),
}

/// What the driver shows to the embedding API.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) state: watch::Sender<NodeState>,
    pub(crate) directory: ArcSwap<Directory>,
}

/// Settings that do not change while the node lives.
#[derive(Debug)]
pub(crate) struct Fixed {
    pub(crate) machine: MachinePrivate,
    pub(crate) relay_tls: ClientTls,
    pub(crate) relay_proxies: Proxies,
    pub(crate) static_endpoints: Vec<std::net::SocketAddr>,
    pub(crate) peer_relay_addresses: Vec<std::net::SocketAddr>,
    pub(crate) loopback_endpoints: bool,
    pub(crate) port_guessing: bool,
    /// Whether the user has chosen the UDP port.
    pub(crate) port_is_chosen: bool,
    pub(crate) timing: mesh_noise::wireguard::Timing,
    pub(crate) device: &'static str,
    pub(crate) ephemeral: bool,
}

/// Everything that the driver task owns.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) clock: Clock,
    pub(crate) state: StateDir,
    pub(crate) prefs: Prefs,
    pub(crate) fixed: Fixed,
    pub(crate) shared: Arc<Shared>,
    /// Readers learn of the node's end by the end of this.
    pub(crate) events: broadcast::Sender<Event>,
    pub(crate) names: Names,
    pub(crate) plane: Plane,
    pub(crate) host: HostNetwork,
    pub(crate) portmaps: PortMaps,
    pub(crate) relay_sender: RelaySender,
    /// Our own peer relay, if we offer one.
    pub(crate) peer_relay: Option<Arc<PeerRelay>>,
    pub(crate) session: Option<Session>,
    pub(crate) sleep: SleepWatch,
}

impl Driver {
    /// Runs until `stop`, then takes everything down.
    pub(crate) async fn run(
        mut self,
        mut requests: mpsc::Receiver<Request>,
        mut notices: Notices,
        stop: CancellationToken,
    ) {
        self.portmaps.set_host(&self.host.found());
        loop {
            let deadline = self.session.as_ref().and_then(Session::poll_timeout);
            tokio::select! {
                () = stop.cancelled() => break,
                request = requests.recv() => match request {
                    Some(request) => self.handle_request(request).await,
                    None => break,
                },
                notice = notices.next() => match (notice, &mut self.session) {
                    (Some(notice), Some(session)) => session.handle_notice(self.clock.now(), notice),
                    (Some(_), None) => {}
                    (None, _) => {
                        self.shared.state.send_replace(NodeState::Stopped {
                            error: Some("the device has failed; restart the node".to_owned()),
                        });
                        break;
                    }
                },
                () = self.portmaps.changed() => {}
                () = self.host.changed() => {
                    self.portmaps.set_host(&self.host.found());
                    let local = self.host.local(self.fixed.loopback_endpoints);
                    if let Some(session) = &mut self.session {
                        session.set_local(self.clock.now(), local, &self.host);
                    }
                }
                event = next_event(&mut self.session) => {
                    if let Some(session) = &mut self.session {
                        session.handle_event(self.clock.now(), event);
                    }
                }
                () = self.clock.sleep_until(deadline) => {
                    if let Some(session) = &mut self.session {
                        session.handle_timeout(self.clock.now());
                    }
                }
            }
            if let Some(slept) = self.sleep.slept(self.clock.passed()) {
                tracing::info!(?slept, "this machine was suspended; connecting anew");
                if let Some(session) = &mut self.session {
                    session.resumed(self.clock.now());
                }
            }
            self.settle();
        }
        if self.fixed.ephemeral && self.session.as_ref().is_some_and(|session| session.control_connected) {
            // The coordinator would find out by itself, later.
            if let Err(error) = self.logout().await {
                tracing::debug!(%error, "ephemeral node");
            }
        }
        self.end_session();
        self.portmaps.close().await;
        // While the interface is there: rules and routes refer to it.
        self.host.close().await;
        self.plane.close();
        self.shared.state.send_if_modified(|state| {
            let running = !matches!(state, NodeState::Stopped { .. });
            if running {
                *state = NodeState::Stopped { error: None };
            }
            running
        });
    }

    /// Carries out what the session has decided.
    fn settle(&mut self) {
        self.portmaps.set_sockets(self.session.as_ref().map(|_| &self.host.sockets));
        let Some(session) = &mut self.session else { return };
        self.portmaps.exchange(self.clock, &mut session.engine);
        session.drain(&mut self.plane, &mut self.host);
        if let Some((node, control)) = session.take_accepted_keys() {
            let stored = self.state.set_node_key(&node).and_then(|()| match control {
                Some(key) => self.state.set_control_key(&key),
                None => Ok(()),
            });
            if let Err(error) = stored {
                tracing::error!(%error, "keys cannot be stored; the node will have to sign in again after a restart");
            }
        }
        if let Some(names) = session.take_names() {
            self.names.store(names);
        }
        if let Some(directory) = session.take_directory() {
            self.shared.directory.store(Arc::new(directory));
        }
        let state = session.state().clone();
        let ended = matches!(state, NodeState::Stopped { .. });
        self.set_state(state);
        if ended {
            self.end_session();
        }
    }

    fn set_state(&self, new: NodeState) {
        self.shared.state.send_if_modified(|state| {
            let changed = *state != new;
            if changed {
                tracing::info!(state = ?new, "node");
                *state = new;
            }
            changed
        });
    }

    fn set_want_running(&mut self, want: bool) {
        self.prefs.want_running = want;
        self.store_prefs();
    }

    fn store_prefs(&self) {
        if let Err(error) = self.state.set_prefs(&self.prefs) {
            tracing::error!(%error, "the preferences cannot be stored");
        }
    }

    fn end_session(&mut self) {
        if self.session.take().is_some() {
            self.plane.clear();
            self.host.clear();
            self.shared.directory.store(Arc::default());
        }
    }

    async fn handle_request(&mut self, request: Request) {
        match request {
            Request::Up(options, reply) => answer(reply, self.up(options)),
            Request::Down(reply) => {
                self.end_session();
                self.set_want_running(false);
                self.set_state(NodeState::Stopped { error: None });
                answer(reply, Ok(()));
            }
            Request::Logout(reply) => {
                let outcome = self.logout().await;
                answer(reply, outcome);
            }
            Request::Status(reply) => answer(reply, Ok(Box::new(self.status()))),
            Request::Ping { peer, size, reply } => match &mut self.session {
                Some(session) => session.ping(self.clock.now(), peer, size, reply),
                None => answer(reply, Err(not_up())),
            },
            Request::Netcheck(reply) => match &mut self.session {
                Some(session) => session.netcheck(self.clock.now(), reply),
                None => answer(reply, Err(not_up())),
            },
            Request::SetPathMode(mode, reply) => {
                self.prefs.path_mode = mode;
                self.store_prefs();
                if let Some(session) = &mut self.session {
                    session.set_mode(self.clock.now(), mode);
                }
                answer(reply, Ok(()));
            }
            Request::SetHostname(hostname, reply) => {
                self.prefs.hostname = Some(hostname);
                self.store_prefs();
                answer(reply, Ok(()));
            }
        }
    }

    fn up(&mut self, options: UpOptions) -> Result<(), Error> {
        let mut wanted = self.prefs.clone();
        wanted.want_running = true;
        if let Some(url) = options.control_url {
            check_url(&url).map_err(|why| Error::Setting(format!("--login-server {url:?}: {why}")))?;
            wanted.control_url = Some(url);
        }
        if let Some(hostname) = options.hostname {
            wanted.hostname = Some(hostname).filter(|name| !name.is_empty());
        }
        if wanted.control_url.is_none() {
            return Err(Error::Setting("which coordinator? name its URL (--login-server)".to_owned()));
        }
        let moved = self.prefs.control_url.is_some() && self.prefs.control_url != wanted.control_url;
        let goes_on = |session: &Session| session.goes_on(options.auth_key.is_some());
        if !options.fresh_key && wanted == self.prefs && self.session.as_ref().is_some_and(goes_on) {
            return Ok(());
        }
        self.end_session();
        // Another URL may lead to the same coordinator, and a mistyped one to none: only who brings a key, or asks to
        // sign in anew, gives the old registration up.
        let forget = options.fresh_key || (moved && options.auth_key.is_some());
        let started = self.start_session(wanted, forget, options.auth_key);
        self.set_state(match &started {
            Ok(()) => NodeState::STARTING,
            Err(error) => NodeState::Stopped { error: Some(error.to_string()) },
        });
        started
    }

    fn start_session(&mut self, wanted: Prefs, forget: bool, auth_key: Option<String>) -> Result<(), Error> {
        if forget {
            self.state.forget_registration()?;
        }
        self.state.set_prefs(&wanted)?;
        self.prefs = wanted;
        self.session = Some(Session::start(self, auth_key)?);
        Ok(())
    }

    async fn logout(&mut self) -> Result<(), Error> {
        let outcome = match &mut self.session {
            Some(session) => session.logout().await,
            None => Ok(()),
        };
        self.end_session();
        self.set_want_running(false);
        self.set_state(NodeState::Stopped { error: None });
        self.state.forget_registration()?;
        outcome
    }
}

async fn next_event(session: &mut Option<Session>) -> session::Input {
    match session {
        Some(session) => session.next_event().await,
        None => std::future::pending().await,
    }
}

fn not_up() -> Error {
    Error::NotRunning("run `mesh up`".to_owned())
}

/// Answers a request; nobody may be waiting any more.
pub(crate) fn answer<T>(reply: Reply<T>, outcome: Result<T, Error>) {
    if reply.send(outcome).is_err() {
        tracing::debug!("nobody waits for the answer any more");
    }
}
