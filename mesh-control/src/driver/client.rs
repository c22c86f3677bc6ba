//! [`Control`]: the [client core](crate::client) with a socket and a clock.

use std::fmt;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::Method;
use mesh_noise::key::{MachinePrivate, MachinePublic, NodePublic};
use mesh_noise::random::SeededRng;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::rustls::ClientConfig;

use crate::client::{Action, Client, Config, Description, Problem, RequestId};
use crate::netmap::Netmap;
use crate::wire::{MapResponse, RegisterResponse};

mod dial;
mod exchange;

pub use crate::client::{ControlEvent, Registered};
pub use dial::check_url;
use dial::{Dialed, Dialer, Server};
use exchange::Exchange;

const USER_AGENT_TEXT: &str = concat!("mesh/", env!("CARGO_PKG_VERSION"));
/// Map messages that may wait to be applied; the stream is read no faster.
const MAP_QUEUE: usize = 16;

/// What a [`Control`] needs to know.
#[derive(Clone)]
pub struct Options {
    /// The coordinator: `http://HOST[:PORT]` or `https://HOST[:PORT]`.
    pub url: String,
    /// This machine's key, for life.
    pub machine: MachinePrivate,
    /// The coordinator's key from when this node joined; a coordinator with another one is refused. Default: none, the
    /// key that it shows first is trusted, as TLS vouches for it or nobody does.
    pub control: Option<MachinePublic>,
    /// How to verify an `https` coordinator: `ClientTls::https(&[])` of mesh-derp makes one. No ALPN must be offered.
    /// Default: none, so that only `http` URLs work.
    pub tls: Option<Arc<ClientConfig>>,
    /// The node.
    pub client: Config,
}

impl Options {
    /// The defaults for a coordinator without TLS.
    #[must_use]
    pub fn new(url: impl Into<String>, machine: MachinePrivate, client: Config) -> Self {
        Self { url: url.into(), machine, control: None, tls: None, client }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("url", &self.url).field("client", &self.client).finish_non_exhaustive()
    }
}

/// What a job has come to.
enum Done {
    Dialed(u64, Result<Box<Dialed>, Problem>),
    ConnectionEnded(u64, String),
    Registered(RequestId, Result<RegisterResponse, Problem>),
    Updated(RequestId, Result<(), Problem>),
    Other,
}

/// A node's connection to its coordinator.
///
/// It does nothing until [`login`](Self::login), and works only while [`next_event`](Self::next_event) is being awaited.
/// Dropping it closes the connection.
pub struct Control {
    core: Client,
    dialer: Dialer,
    rng: SeededRng,
    jobs: JoinSet<Done>,
    /// Counts connections, so that the end of an old one is told from that of this one.
    generation: u64,
    exchange: Option<Exchange>,
    stream: Option<(RequestId, AbortHandle)>,
    messages: mpsc::Receiver<(RequestId, Result<Box<MapResponse>, Problem>)>,
    message_sender: mpsc::Sender<(RequestId, Result<Box<MapResponse>, Problem>)>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("url", &self.dialer.server.url)
            .field("core", &self.core)
            .finish_non_exhaustive()
    }
}

impl Control {
    /// A connection at rest. `seed` is 32 bytes of the operating system's randomness.
    ///
    /// # Errors
    /// [`Problem::NotACoordinator`] if the URL cannot be one.
    pub fn new(options: Options, seed: [u8; 32]) -> Result<Self, Problem> {
        let Options { url, machine, control, tls, client } = options;
        let mut rng = SeededRng::from_seed(seed);
        let dialer = Dialer { server: Server::parse(&url)?, machine, control, tls, version: client.version };
        let core = Client::new(now(), wall(), client, rng.array());
        let (message_sender, messages) = mpsc::channel(MAP_QUEUE);
        Ok(Self {
            core,
            dialer,
            rng,
            jobs: JoinSet::new(),
            generation: 0,
            exchange: None,
            stream: None,
            messages,
            message_sender,
        })
    }

    /// Joins, or goes on after a stop or an error; see [`Client::login`].
    pub fn login(&mut self, auth_key: Option<String>) {
        self.core.login(now(), auth_key);
    }

    /// Signs in anew with a new node key; see [`Client::reauthenticate`].
    pub fn reauthenticate(&mut self, auth_key: Option<String>) {
        self.core.reauthenticate(now(), auth_key);
    }

    /// Closes the connection and rests.
    pub fn stop(&mut self) {
        self.core.stop(now());
    }

    /// Logs out; await [`ControlEvent::LoggedOut`].
    pub fn logout(&mut self) {
        self.core.logout(now());
    }

    /// Tells the coordinator about the node: endpoints, host, network, disco key. Cheap if nothing is different.
    pub fn update(&mut self, description: Description) {
        self.core.describe(now(), description);
    }

    /// Tries again at once, if it was waiting: the network came back.
    pub fn retry_now(&mut self) {
        self.core.retry_now(now());
    }

    /// The netmap as it is known.
    #[must_use]
    pub fn netmap(&self) -> &Arc<Netmap> {
        self.core.netmap()
    }

    /// The coordinator's key: the one given, or the one that it showed first. To be stored.
    #[must_use]
    pub fn control_key(&self) -> Option<MachinePublic> {
        self.dialer.control
    }

    /// The node key in use, or being registered.
    #[must_use]
    pub fn node_key(&self) -> NodePublic {
        self.core.node_key()
    }

    /// The coordinator's URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.dialer.server.url
    }

    /// Whether a map stream is open.
    #[must_use]
    pub fn is_online(&self) -> bool {
        self.core.is_polling()
    }

    /// Runs until there is something to know. Safe to cancel: nothing is lost.
    ///
    /// At rest it waits for ever: select over it and whatever may give a command.
    pub async fn next_event(&mut self) -> ControlEvent {
        loop {
            while let Some(action) = self.core.poll_action() {
                self.perform(action);
            }
            if let Some(event) = self.core.poll_event() {
                return event;
            }
            let deadline = self.core.poll_timeout();
            tokio::select! {
                Some((id, message)) = self.messages.recv() => match message {
                    Ok(message) => self.core.map_received(now(), id, *message),
                    Err(problem) => self.request_failed(id, problem),
                },
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => {
                    // A job that was aborted has nothing to say.
                    if let Ok(done) = done {
                        self.finish(done);
                    }
                }
                () = sleep_until(deadline) => self.core.handle_timeout(now()),
            }
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Connect => {
                self.generation += 1;
                let (generation, dialer) = (self.generation, self.dialer.clone());
                let rng = SeededRng::from_seed(self.rng.array());
                self.jobs.spawn(async move { Done::Dialed(generation, dialer.dial(rng).await.map(Box::new)) });
            }
            Action::Disconnect => {
                self.generation += 1;
                self.exchange = None;
                self.stream = None;
                self.jobs.abort_all();
            }
            Action::Register(id, request) => {
                self.ask(id, |exchange| async move { Done::Registered(id, exchange.register(*request).await) });
            }
            Action::Update(id, request) => {
                self.ask(id, |exchange| async move { Done::Updated(id, exchange.update(*request).await) });
            }
            Action::OpenMap(id, request) => {
                let messages = self.message_sender.clone();
                let job = self.ask(id, |exchange| async move {
                    exchange.map(id, *request, messages).await;
                    Done::Other
                });
                self.stream = job.map(|job| (id, job));
            }
            Action::CloseMap(id) => {
                if let Some((_, job)) = self.stream.take_if(|(stream, _)| *stream == id) {
                    job.abort();
                }
            }
            Action::Post { path, body } => self.answer(Method::POST, path, body),
            Action::Head { path } => self.answer(Method::HEAD, path, Vec::new()),
        }
    }

    /// Starts a job that asks something. Without a connection the request has failed already.
    fn ask<F>(&mut self, id: RequestId, job: impl FnOnce(Exchange) -> F) -> Option<AbortHandle>
    where
        F: Future<Output = Done> + Send + 'static,
    {
        if let Some(exchange) = self.exchange.clone() {
            return Some(self.jobs.spawn(job(exchange)));
        }
        let problem = self.dialer.server.unreachable("the connection is closed");
        self.core.request_failed(now(), id, problem);
        None
    }

    fn answer(&mut self, method: Method, path: String, body: Vec<u8>) {
        if let Some(exchange) = self.exchange.clone() {
            self.jobs.spawn(async move {
                exchange.answer(method, path, body).await;
                Done::Other
            });
        }
    }

    fn finish(&mut self, done: Done) {
        match done {
            Done::Dialed(generation, _) | Done::ConnectionEnded(generation, _) if generation != self.generation => {}
            Done::Dialed(generation, Ok(dialed)) => {
                let Dialed { sender, connection, control } = *dialed;
                self.dialer.control = Some(control);
                self.exchange = Some(Exchange { sender, server: self.dialer.server.clone() });
                self.jobs.spawn(async move {
                    let ended = match connection.await {
                        Ok(()) => "the connection was closed".to_owned(),
                        Err(error) => dial::reason(&error),
                    };
                    Done::ConnectionEnded(generation, ended)
                });
                self.core.connected(now());
            }
            Done::Dialed(_, Err(problem)) => self.core.connection_failed(now(), problem),
            Done::ConnectionEnded(_, reason) => self.connection_ended(self.dialer.server.unreachable(reason)),
            Done::Registered(id, Ok(response)) => self.core.register_answered(now(), id, response),
            Done::Updated(id, Ok(())) => self.core.update_answered(now(), id),
            Done::Registered(id, Err(problem)) | Done::Updated(id, Err(problem)) => self.request_failed(id, problem),
            Done::Other => {}
        }
    }

    /// A request failed; if that is because the connection is gone, say so at once and once.
    fn request_failed(&mut self, id: RequestId, problem: Problem) {
        let gone = self.exchange.as_ref().is_some_and(|exchange| exchange.sender.is_closed());
        if gone && matches!(problem, Problem::Unreachable { .. } | Problem::MapEnded) {
            self.connection_ended(problem);
        } else {
            self.core.request_failed(now(), id, problem);
        }
    }

    fn connection_ended(&mut self, problem: Problem) {
        self.generation += 1;
        self.exchange = None;
        self.stream = None;
        self.core.connection_failed(now(), problem);
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[expect(clippy::disallowed_methods, reason = "the driver's clock")]
fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "the driver's clock")]
fn wall() -> SystemTime {
    SystemTime::now()
}
