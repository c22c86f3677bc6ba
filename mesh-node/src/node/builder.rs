//! Settings of a node, and how it is put together.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use mesh_derp::proxy::Proxies;
use mesh_derp::tls::ClientTls;
use mesh_noise::random::SystemRng;
use mesh_noise::wireguard::Timing;
use mesh_tun::device::Device as PacketDevice;
use mesh_tun::linux::netlink::Netlink;
use mesh_tun::linux::queues;
use mesh_tun::linux::tun::{self, Tun};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::service::ServiceDevice;
use super::{Inner, Node, UpOptions};
use crate::dns::{self, Names};
use crate::driver::{
    Clock, Driver, Fixed, HostNetwork, Plane, PortMaps, RelaySender, Shared, SleepWatch, Sockets, TunHost,
};
use crate::error::Error;
use crate::events;
use crate::forward::{self, Forwarder};
use crate::netstack::{self, Netstack, SERVICE_V4, SERVICE_V6};
use crate::peer_relay::PeerRelay;
use crate::prefs::PathMode;
use crate::proxy::{self, Dialer};
use crate::state::StateDir;
use crate::status::NodeState;

/// Requests that may wait for the driver.
const REQUEST_QUEUE: usize = 64;

/// Where packets of the mesh come from and go to on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// Our own TCP/IP stack; needs no privilege. The default.
    #[default]
    Userspace,
    /// A TUN device of this name; needs `CAP_NET_ADMIN`.
    Tun(String),
    /// A TUN device of this name where that is permitted, the userspace stack elsewhere.
    Auto(String),
}

/// Settings of a [`Node`]; every one has a default.
#[derive(Clone, Default)]
pub struct Builder {
    control_url: Option<String>,
    auth_key: Option<String>,
    hostname: Option<String>,
    state_dir: Option<PathBuf>,
    device: Device,
    port: u16,
    ca_file: Option<PathBuf>,
    static_endpoints: Vec<SocketAddr>,
    loopback_endpoints: bool,
    no_port_mapping: bool,
    no_port_guessing: bool,
    socks5: Option<SocketAddr>,
    http_proxy: Option<SocketAddr>,
    relay_proxies: Option<Proxies>,
    path_mode: Option<PathMode>,
    refuse_inbound: bool,
    relay_server_port: Option<u16>,
    relay_server_endpoints: Vec<SocketAddr>,
    timing: Option<Timing>,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("control_url", &self.control_url)
            .field("hostname", &self.hostname)
            .field("state_dir", &self.state_dir)
            .field("device", &self.device)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl Builder {
    /// The coordinator's URL. Without it, the node comes up where it was last, or waits for [`Node::up`].
    #[must_use]
    pub fn control_url(mut self, url: impl Into<String>) -> Self {
        self.control_url = Some(url.into());
        self
    }

    /// A key that approves the node at once. It is used for this registration and not stored.
    #[must_use]
    pub fn auth_key(mut self, key: impl Into<String>) -> Self {
        self.auth_key = Some(key.into());
        self
    }

    /// The name to ask for. Default: the system's host name.
    #[must_use]
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = Some(name.into());
        self
    }

    /// Where keys and preferences are kept. Default: [`ephemeral`](Self::ephemeral).
    #[must_use]
    pub fn state_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.state_dir = Some(path.into());
        self
    }

    /// Keeps nothing: keys and preferences go away with the node. The default.
    #[must_use]
    pub fn ephemeral(mut self) -> Self {
        self.state_dir = None;
        self
    }

    /// Where packets come from and go to. Default: the userspace stack.
    #[must_use]
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// A TUN device of this name; short for [`device`](Self::device) with [`Device::Tun`].
    #[must_use]
    pub fn tun(self, name: impl Into<String>) -> Self {
        self.device(Device::Tun(name.into()))
    }

    /// The UDP port of both families. Default 0: any free one.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// A file of PEM certificates that coordinators and relays may be signed by, beside the system's. Default: none.
    #[must_use]
    pub fn ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(path.into());
        self
    }

    /// Adds an address at which peers reach this node: a port forwarded by hand.
    #[must_use]
    pub fn static_endpoint(mut self, endpoint: SocketAddr) -> Self {
        self.static_endpoints.push(endpoint);
        self
    }

    /// Tells peers of loopback addresses too, so that several nodes of one host reach each other directly. Default
    /// false: they are told only where the host has no other address.
    #[must_use]
    pub fn loopback_endpoints(mut self, yes: bool) -> Self {
        self.loopback_endpoints = yes;
        self
    }

    /// Whether the gateway is asked for a port that leads to this node, by PCP, NAT-PMP or UPnP. Default true; it is only
    /// asked where this host has a private address.
    #[must_use]
    pub fn port_mapping(mut self, yes: bool) -> Self {
        self.no_port_mapping = !yes;
        self
    }

    /// Whether ports of NATs that give every destination another one may be guessed, which takes up to 256 sockets and 200
    /// datagrams a second for seconds, while there is traffic and nothing else helps. Default: yes.
    #[must_use]
    pub fn port_guessing(mut self, yes: bool) -> Self {
        self.no_port_guessing = !yes;
        self
    }

    /// Listens for SOCKS5 clients. Userspace stack only. Default: no.
    #[must_use]
    pub fn socks5(mut self, listen: SocketAddr) -> Self {
        self.socks5 = Some(listen);
        self
    }

    /// Listens for clients of an HTTP proxy. Userspace stack only. Default: no.
    #[must_use]
    pub fn http_proxy(mut self, listen: SocketAddr) -> Self {
        self.http_proxy = Some(listen);
        self
    }

    /// Through which HTTP proxy the node reaches relays. Default: what `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` say (see
    /// [`mesh_derp::proxy`]); if they name no proxy that can be used, a warning says so and relays are reached directly.
    ///
    /// The coordinator is always reached directly.
    #[must_use]
    pub fn relay_proxies(mut self, proxies: Proxies) -> Self {
        self.relay_proxies = Some(proxies);
        self
    }

    /// Which paths may be used. Default: what was stored last, at first [`PathMode::Auto`].
    #[must_use]
    pub fn path_mode(mut self, mode: PathMode) -> Self {
        self.path_mode = Some(mode);
        self
    }

    /// Whether connections from peers to ports that [`Node::listen`] does not serve go to the same port of 127.0.0.1.
    /// Userspace stack only. Default true.
    #[must_use]
    pub fn forward_inbound(mut self, yes: bool) -> Self {
        self.refuse_inbound = !yes;
        self
    }

    /// Relays UDP for other nodes that cannot reach each other, on this port of both families; 0 takes any. The
    /// coordinator says who may use it. Only of use where the port can be reached. Default: what was stored last, at first
    /// no.
    #[must_use]
    pub fn relay_server_port(mut self, port: u16) -> Self {
        self.relay_server_port = Some(port);
        self
    }

    /// Adds an address at which the relay of [`relay_server_port`](Self::relay_server_port) is reached, beside its port at
    /// the addresses that the node finds out itself.
    #[must_use]
    pub fn relay_server_endpoint(mut self, endpoint: SocketAddr) -> Self {
        self.relay_server_endpoints.push(endpoint);
        self
    }

    /// Replaces WireGuard's timers, for tests.
    #[must_use]
    pub fn timing(mut self, timing: Timing) -> Self {
        self.timing = Some(timing);
        self
    }

    /// Starts the node. It connects at once if it knows where to; watch [`Node::state`] for how far it is.
    ///
    /// # Errors
    /// One clear line for each of: state directory in use or damaged, port in use, TUN device not permitted,
    /// certificates that cannot be read, a URL that cannot be used.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn start(self) -> Result<Node, Error> {
        let state = match &self.state_dir {
            Some(path) => StateDir::open(path)?,
            None => StateDir::ephemeral()?,
        };
        let mut prefs = state.prefs()?;
        if let Some(mode) = self.path_mode {
            prefs.path_mode = mode;
        }
        if let Some(port) = self.relay_server_port {
            prefs.relay_server_port = Some(port);
        }
        let machine = state.machine_key(&mut SystemRng)?;
        // Damage is told now, not when somebody runs `mesh up`.
        state.node_key()?;
        state.control_key()?;
        let relay_tls = match &self.ca_file {
            Some(path) => ClientTls::with_ca_file(path),
            None => ClientTls::system(),
        };
        let relay_tls = relay_tls?;
        let relay_proxies = self.relay_proxies.clone().unwrap_or_else(|| {
            Proxies::from_environment().unwrap_or_else(|error| {
                tracing::warn!(%error, "no proxy is used for relays");
                Proxies::none()
            })
        });
        let clock = Clock::start();
        let sockets = Sockets::bind(self.port)?;
        self.check_proxies()?;
        let names = Names::default();
        let Opened { device, netstack, tun, name } = self.open_device(&names)?;
        let peer_relay = match prefs.relay_server_port {
            Some(port) => {
                let relay = PeerRelay::start(Sockets::bind(port)?.into_all(), Arc::new(move || clock.now()));
                let error = |source| Error::System { what: "cannot start the peer relay's threads", source };
                Some(Arc::new(relay.map_err(error)?))
            }
            None => None,
        };
        let (relay_sender, stop) = (RelaySender::default(), CancellationToken::new());
        let (plane, notices) = Plane::start(device, &sockets, relay_sender.clone(), clock)?;
        let shared = Arc::new(Shared {
            state: watch::Sender::new(NodeState::Stopped { error: None }),
            directory: ArcSwap::default(),
        });
        let (events, unread) = broadcast::channel(events::KEPT);
        let serving = self.serve(netstack.as_ref(), &names, &stop).await?;
        let port = sockets.port();
        let fixed = Fixed {
            machine,
            relay_tls,
            relay_proxies,
            static_endpoints: self.static_endpoints.clone(),
            peer_relay_addresses: self.relay_server_endpoints.clone(),
            loopback_endpoints: self.loopback_endpoints,
            port_guessing: !self.no_port_guessing,
            port_is_chosen: self.port != 0,
            timing: self.timing.unwrap_or_default(),
            device: name,
            ephemeral: self.state_dir.is_none(),
        };
        let host = HostNetwork::start(sockets, tun, netstack.clone()).await;
        let comes_up = prefs.want_running || self.control_url.is_some();
        let driver = Driver {
            clock,
            state,
            prefs,
            fixed,
            shared: Arc::clone(&shared),
            events,
            names,
            plane,
            host,
            portmaps: PortMaps::new(clock, !self.no_port_mapping),
            relay_sender,
            peer_relay,
            session: None,
            sleep: SleepWatch::default(),
        };
        let (requests, wanted) = mpsc::channel(REQUEST_QUEUE);
        let task = tokio::spawn(driver.run(wanted, notices, stop.clone()));
        let inner = Inner {
            requests,
            shared,
            events: unread,
            netstack,
            stop,
            task: std::sync::Mutex::new(Some(task)),
            port,
            socks5: serving.socks5,
            http_proxy: serving.http_proxy,
        };
        let node = Node { inner: Arc::new(inner) };
        if comes_up {
            let options = UpOptions {
                control_url: self.control_url,
                auth_key: self.auth_key,
                hostname: self.hostname,
                fresh_key: false,
            };
            node.up(options).await?;
        }
        Ok(node)
    }

    fn wants_proxies(&self) -> bool {
        self.socks5.is_some() || self.http_proxy.is_some()
    }

    fn check_proxies(&self) -> Result<(), Error> {
        if self.wants_proxies() && matches!(self.device, Device::Tun(_)) {
            return Err(Error::Setting(
                "a node with a TUN device needs no proxy: leave --socks5 and --http-proxy out, or use --tun userspace"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    fn open_device(&self, names: &Names) -> Result<Opened, Error> {
        match &self.device {
            Device::Userspace => self.open_userspace(),
            Device::Tun(name) => open_tun(name, names),
            Device::Auto(_) if self.wants_proxies() => self.open_userspace(),
            Device::Auto(name) => match open_tun(name, names) {
                Err(Error::Tun(error @ (mesh_tun::Error::NoPermission { .. } | mesh_tun::Error::NoTun))) => {
                    tracing::info!(%error, "running in userspace mode");
                    self.open_userspace()
                }
                opened => opened,
            },
        }
    }

    fn open_userspace(&self) -> Result<Opened, Error> {
        let config = netstack::Config { fallback: !self.refuse_inbound, ..netstack::Config::default() };
        let (netstack, device) = Netstack::start(config)
            .map_err(|source| Error::System { what: "cannot start the userspace stack", source })?;
        Ok(Opened { device: Arc::new(device), netstack: Some(netstack), tun: None, name: "userspace" })
    }
}

struct Opened {
    device: Arc<dyn PacketDevice>,
    netstack: Option<Netstack>,
    tun: Option<TunHost>,
    name: &'static str,
}

fn open_tun(name: &str, names: &Names) -> Result<Opened, Error> {
    let mut config = tun::Config::named(name);
    config.queues = queues::for_this_machine();
    let tun = Tun::open(&config)?;
    let host = TunHost::start(tun.index(), Netlink::open()?);
    let device = ServiceDevice::start(Arc::new(tun), names)
        .map_err(|source| Error::System { what: "cannot start the name server", source })?;
    Ok(Opened { device: Arc::new(device), netstack: None, tun: Some(host), name: "tun" })
}

/// Where local listeners of the userspace mode are.
#[derive(Debug, Default)]
struct Serving {
    socks5: Option<SocketAddr>,
    http_proxy: Option<SocketAddr>,
}

impl Builder {
    /// Starts the proxies, the name server and the way in for peers.
    async fn serve(
        &self,
        netstack: Option<&Netstack>,
        names: &Names,
        stop: &CancellationToken,
    ) -> Result<Serving, Error> {
        let Some(netstack) = netstack else { return Ok(Serving::default()) };
        for address in [SERVICE_V4.into(), SERVICE_V6.into()] {
            let service = dns::serve(netstack, address, names)
                .map_err(|source| Error::System { what: "cannot start the name server", source })?;
            run_until(stop, async move {
                if let Err(error) = service.await {
                    tracing::debug!(%address, %error, "the name server has ended");
                }
            });
        }
        if !self.refuse_inbound {
            run_until(stop, Forwarder::new(netstack.clone(), forward::Config::default()).run());
        }
        let dialer = Dialer::new(netstack.clone(), Arc::new(names.clone()));
        let mut serving = Serving::default();
        if let Some(at) = self.socks5 {
            let (listener, bound) = listen(at).await?;
            serving.socks5 = Some(bound);
            run_until(stop, proxy::socks5::serve(listener, dialer.clone()));
        }
        if let Some(at) = self.http_proxy {
            let (listener, bound) = listen(at).await?;
            serving.http_proxy = Some(bound);
            run_until(stop, proxy::http::serve(listener, dialer));
        }
        Ok(serving)
    }
}

async fn listen(at: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let error = |source| Error::Listen { what: at.to_string(), source };
    let listener = TcpListener::bind(at).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    Ok((listener, bound))
}

/// Runs `job` in a task of its own that ends with the node.
fn run_until(stop: &CancellationToken, job: impl Future<Output = ()> + Send + 'static) {
    let stop = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = job => {}
        }
    });
}
