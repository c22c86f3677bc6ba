//! Accepting connections: TLS and plain HTTP on one port.
//!
//! The first byte tells which it is: 0x16 opens a TLS handshake and no HTTP request. TLS handshake and request head are
//! read beside the accepting, many at a time and each within [`Settings`], so a client that dawdles delays nobody.
//!
//! A connection that says nothing costs its socket, one small task and its place in the [`Lobby`](crate::server::Lobby),
//! which decides who goes when there are too many; nothing is set up for TLS before the first byte is there. It keeps that
//! place beyond this module, until it has logged in: [`Incoming`] carries it on.
//!
//! Behind a load balancer that speaks the [PROXY protocol](crate::proxied), clients have the addresses that it announces.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use ipnet::IpNet;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::now;
use super::stream::{Rewind, Transport};
use super::tls_stream;
use crate::server::{AcceptLimit, AcceptLimiter, Limits};
#[cfg(feature = "acme")]
use crate::tls::CurrentCertificate;
use crate::upgrade::RequestHead;

mod counters;
mod door;
mod open;

pub use counters::{ListenerCounters, Watch};
pub use door::Place;

use door::Door;

/// How long a new connection may take, and how many may be on their way at once. The defaults suit a public relay.
#[derive(Debug, Clone)]
pub struct Settings {
    /// From accepting to the first byte, and from there to the end of the TLS handshake. 20 s, since some clients open a
    /// connection ahead of its use.
    pub handshake: Duration,
    /// From there to the end of the request head. 20 s.
    pub head: Duration,
    /// How many connections may be underway to a login.
    pub limits: Limits,
    /// How many connections are served in a second; what is beyond is closed at once. No limit by default.
    pub accept: AcceptLimit,
    /// Proxies that announce their clients with the PROXY protocol. Every connection from there has to begin with such a
    /// header, and none from elsewhere may. Default none.
    pub proxies: Vec<IpNet>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(20),
            head: Duration::from_secs(20),
            limits: Limits::default(),
            accept: AcceptLimit { per_second: 0, burst: 0 },
            proxies: Vec::new(),
        }
    }
}

impl Settings {
    fn is_proxy(&self, address: IpAddr) -> bool {
        contains(&self.proxies, address)
    }
}

/// Whether one of `networks` holds `address`, also where an IPv4 address is written as one of IPv6.
pub(crate) fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

/// A connection whose request head has been read.
#[derive(Debug)]
pub struct Incoming {
    /// The head.
    pub head: RequestHead,
    /// What follows it.
    pub stream: Rewind<Transport>,
    /// The client's address; the announced one if it came through a trusted proxy.
    pub peer_addr: SocketAddr,
    /// Our address it connected to.
    pub local_addr: SocketAddr,
    /// Whether it came over TLS.
    pub tls: bool,
    /// The head as it came.
    pub head_bytes: Bytes,
    /// Its place among those that have not logged in, given up when dropped.
    pub place: Place,
}

impl Incoming {
    /// The connection from its first HTTP byte, for a server that reads the head itself.
    #[must_use]
    pub fn into_replay(mut self) -> Rewind<Transport> {
        self.stream.unread(self.head_bytes);
        self.stream
    }
}

/// Accepts connections on any number of addresses. See the [module doc](self).
#[derive(Debug)]
pub struct Acceptor {
    listeners: Vec<TcpListener>,
    tls: Option<Arc<ServerConfig>>,
    settings: Arc<Settings>,
    limiter: AcceptLimiter,
    door: Arc<Door>,
    underway: JoinSet<Option<Box<Incoming>>>,
    /// Whose answers to authorities are given.
    #[cfg(feature = "acme")]
    answering: Option<Arc<CurrentCertificate>>,
}

impl Acceptor {
    /// Listens on `addresses`. Without `tls`, TLS clients are turned away.
    ///
    /// # Errors
    /// If an address cannot be listened on; the message names it.
    pub async fn bind(addresses: &[SocketAddr], tls: Option<Arc<ServerConfig>>) -> io::Result<Self> {
        let mut listeners = Vec::with_capacity(addresses.len());
        for address in addresses {
            let listener = TcpListener::bind(address).await;
            listeners.push(
                listener
                    .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))?,
            );
        }
        Ok(Self::from_listeners(listeners, tls))
    }

    /// Takes sockets that already listen.
    #[must_use]
    pub fn from_listeners(listeners: Vec<TcpListener>, tls: Option<Arc<ServerConfig>>) -> Self {
        let none = Self {
            listeners,
            tls: tls.map(tls_stream::lean_config),
            settings: Arc::default(),
            limiter: AcceptLimiter::new(now(), AcceptLimit { per_second: 0, burst: 0 }),
            door: Door::new(Limits::default()),
            underway: JoinSet::new(),
            #[cfg(feature = "acme")]
            answering: None,
        };
        none.with_settings(Settings::default())
    }

    /// The same, answering authorities that validate the names of `current` by HTTP-01. Those that do by TLS-ALPN-01 are
    /// answered where the configuration is [`current`'s](CurrentCertificate::config).
    #[cfg(feature = "acme")]
    #[must_use]
    pub fn answering(mut self, current: Arc<CurrentCertificate>) -> Self {
        self.answering = Some(current);
        self
    }

    /// The same with other settings. Call it before the first connection.
    #[must_use]
    pub fn with_settings(mut self, settings: Settings) -> Self {
        self.door = Door::new(settings.limits);
        self.limiter = AcceptLimiter::new(now(), settings.accept);
        self.settings = Arc::new(settings);
        self
    }

    /// The addresses listened on, with the ports that the system chose for port 0.
    ///
    /// # Errors
    /// Those of the sockets.
    pub fn local_addrs(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// What it counts, to be looked at while it accepts.
    #[must_use]
    pub fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.door))
    }

    /// The next connection whose request head is there. Connections that fail before that are dropped with a trace
    /// line and a counter. Safe to cancel. Has to be polled for connections to make progress.
    pub async fn next(&mut self) -> Incoming {
        loop {
            let (room, wake) = self.door.plan(now());
            tokio::select! {
                Some(finished) = self.underway.join_next(), if !self.underway.is_empty() => {
                    match finished {
                        Ok(Some(incoming)) => return *incoming,
                        Ok(None) => {}
                        Err(error) => tracing::error!(%error, "reading a request head failed"),
                    }
                }
                accepted = accept_any(&self.listeners), if room => match accepted {
                    Ok((stream, peer)) => self.admit(stream, peer),
                    Err(error) => self.cannot_accept(&error).await,
                },
                () = self.door.changed(), if !room => {}
                () = sleep_until(wake), if wake.is_some() => {}
            }
        }
    }

    fn admit(&mut self, stream: TcpStream, peer: SocketAddr) {
        let counters = self.door.counters();
        counters.accepted.add(1);
        if !self.limiter.admits(now()) {
            counters.refused_rate.add(1);
            return;
        }
        let announced = self.settings.is_proxy(peer.ip());
        let Some(place) = self.door.enter((!announced).then(|| peer.ip())) else {
            counters.refused_source.add(1);
            tracing::debug!(%peer, "connection refused: its address has too many that have not logged in");
            return;
        };
        let opening = open::Opening {
            stream,
            peer,
            place,
            announced,
            #[cfg(feature = "acme")]
            answering: self.answering.clone(),
        };
        self.underway.spawn(open::open(opening, self.tls.clone(), Arc::clone(&self.settings)));
    }

    async fn cannot_accept(&self, error: &io::Error) {
        /// The process, and the system, have no descriptor left. The same numbers on Linux, the BSDs and macOS.
        const NO_DESCRIPTOR: [i32; 2] = [24, 23];
        self.door.counters().accept_errors.add(1);
        let freed = error.raw_os_error().is_some_and(|code| NO_DESCRIPTOR.contains(&code)) && self.door.make_room();
        if !freed {
            tracing::warn!(%error, "cannot accept a connection");
        }
        // Accepting at once again would spin; whoever is shown out needs a moment to go.
        tokio::time::sleep(Duration::from_millis(if freed { 1 } else { 50 })).await;
    }
}

async fn accept_any(listeners: &[TcpListener]) -> io::Result<(TcpStream, SocketAddr)> {
    std::future::poll_fn(|cx| {
        for listener in listeners {
            if let std::task::Poll::Ready(accepted) = listener.poll_accept(cx) {
                return std::task::Poll::Ready(accepted);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
