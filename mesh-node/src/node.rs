//! A node as a library: build it, start it, dial and listen within the mesh.

mod builder;
mod service;

pub use builder::{Builder, Device};

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::directory::{Directory, Entry};
use crate::driver::{Request, Shared};
use crate::error::Error;
use crate::events::{Event, Events};
use crate::local_api::Pong;
use crate::netcheck::NetcheckReport;
use crate::netstack::{Netstack, TcpListener, TcpStream};
use crate::prefs::PathMode;
use crate::status::{NodeState, Status};

/// What [`Node::up`] asks for. Absent members keep what was asked for last time.
#[derive(Clone, Default)]
pub struct UpOptions {
    /// The coordinator's URL.
    pub control_url: Option<String>,
    /// A key that approves the node at once. Used for this registration and not stored.
    pub auth_key: Option<String>,
    /// The name to ask for.
    pub hostname: Option<String>,
    /// Sign in again with a new node key, even if the present one is good.
    pub fresh_key: bool,
}

impl std::fmt::Debug for UpOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UpOptions")
            .field("control_url", &self.control_url)
            .field("auth_key", &self.auth_key.as_ref().map(|_| "…"))
            .field("hostname", &self.hostname)
            .field("fresh_key", &self.fresh_key)
            .finish()
    }
}

/// A running node. Clones are handles of the same one; it ends with [`shutdown`](Self::shutdown), or when the last clone
/// is dropped.
///
/// ```no_run
/// # async fn example() -> Result<(), mesh_node::Error> {
/// use std::time::Duration;
/// use mesh_node::Node;
/// let node = Node::builder()
///     .control_url("http://192.0.2.1:8080")
///     .auth_key("mesh-auth-…")
///     .hostname("reader")
///     .ephemeral()
///     .start()
///     .await?;
/// node.wait_running(Duration::from_secs(30)).await?;
/// let stream = node.dial("web", 80).await?;
/// # drop(stream);
/// node.shutdown().await;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    requests: mpsc::Sender<Request>,
    shared: Arc<Shared>,
    /// Never read: readers are made after it.
    events: broadcast::Receiver<Event>,
    netstack: Option<Netstack>,
    stop: CancellationToken,
    task: std::sync::Mutex<Option<JoinHandle<()>>>,
    port: u16,
    socks5: Option<SocketAddr>,
    http_proxy: Option<SocketAddr>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Node {
    /// A builder with its defaults: userspace stack, any port, nothing listening.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// How far the node is; the receiver sees every change.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<NodeState> {
        self.inner.shared.state.subscribe()
    }

    /// What happens to the node's paths from now on. Any number of readers each see everything, up to
    /// [`events::KEPT`](crate::events::KEPT) events back; who is slower loses the oldest and is told how many.
    #[must_use]
    pub fn events(&self) -> Events {
        Events::new(self.inner.events.resubscribe())
    }

    /// The node's addresses within the mesh, IPv4 first; empty before it runs.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        self.directory().this().map(|entry| entry.addresses.clone()).unwrap_or_default()
    }

    /// The names and addresses of all nodes, as of now.
    #[must_use]
    pub fn directory(&self) -> Arc<Directory> {
        self.inner.shared.directory.load_full()
    }

    /// The UDP port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.inner.port
    }

    /// Where the SOCKS5 proxy listens, if there is one.
    #[must_use]
    pub fn socks5(&self) -> Option<SocketAddr> {
        self.inner.socks5
    }

    /// Where the HTTP proxy listens, if there is one.
    #[must_use]
    pub fn http_proxy(&self) -> Option<SocketAddr> {
        self.inner.http_proxy
    }

    /// Waits until the node carries traffic.
    ///
    /// # Errors
    /// [`Error::Refused`] if the coordinator refuses it, or if somebody has to approve it first; [`Error::Timeout`] when
    /// the time is over, with the coordinator's last failure if there was one.
    pub async fn wait_running(&self, timeout: Duration) -> Result<(), Error> {
        match self.wait_for(timeout, |state| matches!(state, NodeState::NeedsLogin { .. })).await? {
            NodeState::NeedsLogin { url } => Err(Error::Refused(format!("approve this node first: {url}"))),
            NodeState::Stopped { .. } | NodeState::Starting { .. } | NodeState::Running => Ok(()),
        }
    }

    /// Waits until the node runs, or until `enough` says so.
    ///
    /// # Errors
    /// As [`wait_running`](Self::wait_running).
    pub async fn wait_for(&self, timeout: Duration, enough: impl Fn(&NodeState) -> bool) -> Result<NodeState, Error> {
        let mut states = self.state();
        let settled = |state: &NodeState| match state {
            NodeState::Running | NodeState::Stopped { .. } => true,
            NodeState::Starting { needs_attention, .. } => *needs_attention,
            NodeState::NeedsLogin { .. } => enough(state),
        };
        let waited =
            tokio::time::timeout(timeout, states.wait_for(settled)).await.map(|state| state.map(|state| state.clone()));
        match waited {
            Ok(Ok(NodeState::Stopped { error: Some(error) } | NodeState::Starting { error: Some(error), .. })) => {
                Err(Error::Refused(error))
            }
            Ok(Ok(NodeState::Stopped { error: None })) => Err(Error::NotRunning("run `mesh up`".to_owned())),
            Ok(Ok(state)) => Ok(state),
            Ok(Err(_)) => Err(Error::ShutDown),
            Err(_) => match &*states.borrow() {
                NodeState::Starting { error: Some(error), .. } => Err(Error::Refused(error.clone())),
                NodeState::NeedsLogin { url } => {
                    Err(Error::Refused(format!("nobody has approved this node yet: {url}")))
                }
                NodeState::Starting { error: None, .. } | NodeState::Stopped { .. } | NodeState::Running => {
                    Err(Error::Timeout(timeout))
                }
            },
        }
    }

    /// Connects to the coordinator. Returns at once; watch [`state`](Self::state), or wait with
    /// [`wait_running`](Self::wait_running).
    ///
    /// # Errors
    /// [`Error::Setting`] if no coordinator was ever named, or if its URL cannot be used.
    pub async fn up(&self, options: UpOptions) -> Result<(), Error> {
        self.ask(|reply| Request::Up(options, reply)).await
    }

    /// Disconnects; the registration stays.
    ///
    /// # Errors
    /// [`Error::ShutDown`].
    pub async fn down(&self) -> Result<(), Error> {
        self.ask(Request::Down).await
    }

    /// Signs out: gives the node key up and disconnects.
    ///
    /// # Errors
    /// [`Error::Timeout`] if the coordinator could not be told; the node has signed out all the same.
    pub async fn logout(&self) -> Result<(), Error> {
        self.ask(Request::Logout).await
    }

    /// The node and its peers at this moment.
    ///
    /// # Errors
    /// [`Error::ShutDown`].
    pub async fn status(&self) -> Result<Status, Error> {
        self.ask(Request::Status).await.map(|status| *status)
    }

    /// Probes a peer, named or addressed, once; `size` pads the probe to a datagram of that many bytes.
    ///
    /// # Errors
    /// [`Error::UnknownPeer`]; [`Error::Timeout`] if it does not answer.
    pub async fn ping(&self, peer: &str, size: Option<usize>, timeout: Duration) -> Result<Pong, Error> {
        let entry = self.find(peer)?;
        if self.directory().this().is_some_and(|this| this.key == entry.key) {
            return Err(Error::Setting(format!("{peer} is this node itself")));
        }
        let key = entry.key;
        let asked = self.ask(|reply| Request::Ping { peer: key, size, reply });
        let (via, latency) = tokio::time::timeout(timeout, asked).await.map_err(|_| Error::Timeout(timeout))??;
        let address = entry.addresses.first().copied();
        Ok(Pong { peer: entry.name, address, via, ms: latency.as_secs_f64() * 1e3 })
    }

    /// Measures the network under the node.
    ///
    /// # Errors
    /// [`Error::NotRunning`].
    pub async fn netcheck(&self) -> Result<NetcheckReport, Error> {
        self.ask(Request::Netcheck).await
    }

    /// Chooses which paths may be used.
    ///
    /// # Errors
    /// [`Error::ShutDown`].
    pub async fn set_path_mode(&self, mode: PathMode) -> Result<(), Error> {
        self.ask(|reply| Request::SetPathMode(mode, reply)).await
    }

    /// Sets the name to ask for at the next [`up`](Self::up).
    ///
    /// # Errors
    /// [`Error::ShutDown`].
    pub async fn set_hostname(&self, hostname: String) -> Result<(), Error> {
        self.ask(|reply| Request::SetHostname(hostname, reply)).await
    }

    /// Connects to a port of a peer, named (short or full) or addressed.
    ///
    /// # Errors
    /// [`Error::UnknownPeer`]; [`Error::Dial`] with the reason; [`Error::NotUserspace`] on a node with a TUN device.
    pub async fn dial(&self, peer: &str, port: u16) -> Result<TcpStream, Error> {
        let netstack = self.inner.netstack.as_ref().ok_or(Error::NotUserspace)?;
        let address = *self.find(peer)?.addresses.first().ok_or_else(|| Error::UnknownPeer(peer.to_owned()))?;
        let to = SocketAddr::new(address, port);
        netstack.dial_tcp(to).await.map_err(|source| Error::Dial { to, source })
    }

    /// Listens on a port of all our addresses within the mesh; 0 takes a free one.
    ///
    /// # Errors
    /// [`Error::Listen`] if the port is taken; [`Error::NotUserspace`] on a node with a TUN device.
    pub fn listen(&self, port: u16) -> Result<TcpListener, Error> {
        let netstack = self.inner.netstack.as_ref().ok_or(Error::NotUserspace)?;
        netstack.listen_tcp(port).map_err(|source| Error::Listen { what: format!("port {port} of the mesh"), source })
    }

    /// The userspace stack, for UDP and for listeners on single addresses; `None` on a node with a TUN device.
    #[must_use]
    pub fn netstack(&self) -> Option<&Netstack> {
        self.inner.netstack.as_ref()
    }

    /// Ends the node: closes tunnels and listeners, and leaves the registration as it is.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        let task = self.inner.task.lock().map(|mut task| task.take()).unwrap_or_default();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the node's task has failed");
        }
    }

    fn find(&self, peer: &str) -> Result<Entry, Error> {
        self.directory().find(peer).cloned().ok_or_else(|| Error::UnknownPeer(peer.to_owned()))
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.inner.requests.send(request(reply)).await.map_err(|_| Error::ShutDown)?;
        answer.await.map_err(|_| Error::ShutDown)?
    }
}
