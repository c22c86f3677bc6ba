//! Proxies into the mesh for programs of this host: [`socks5`] and [`http`].
//!
//! In userspace mode the kernel knows no route to a peer, so a program reaches one through a listener on this host. Both
//! proxies dial through a [`Dialer`]: a [`Netstack`] and a [`Resolver`] that knows the names and the addresses of the
//! mesh. Nothing else is dialed: the proxies are a way into the mesh, not around this host's network.
//!
//! | what went wrong | SOCKS5 (RFC 1928 §6) | HTTP |
//! |---|---|---|
//! | no such name | 4, host unreachable | 502, the text says so |
//! | not an address of the mesh | 3, network unreachable | 502, the text says so |
//! | the peer refuses | 5, connection refused | 502, the text says so |
//! | the peer does not answer | 6, TTL expired (what clients show as a time-out) | 504 |
//! | too many connections here | 1, general failure | 503 |
//!
//! Not done: authentication (listen on the loopback address), SOCKS5 BIND and UDP ASSOCIATE.

pub mod http;
pub mod socks5;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::dns::Names;
use crate::netstack::{self, Netstack, is_service_address};

/// Connections that one proxy serves at a time, at most; further ones wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 512;
/// How long a client may take to say what it wants.
const REQUEST_TIME: Duration = Duration::from_secs(30);
/// How long to wait after the system has refused to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Knows the mesh's names and addresses.
pub trait Resolver: Send + Sync + 'static {
    /// The addresses of `name`: full, with or without a last dot, or bare. Empty when there is no such name.
    fn resolve(&self, name: &str) -> Vec<IpAddr>;

    /// Whether packets to `address` go to a peer, or to ourselves.
    fn reaches(&self, address: IpAddr) -> bool;
}

/// Names from MagicDNS; the addresses that have a name, and the service addresses, are reached.
impl Resolver for Names {
    fn resolve(&self, name: &str) -> Vec<IpAddr> {
        self.load().lookup(name).map(<[IpAddr]>::to_vec).unwrap_or_default()
    }

    fn reaches(&self, address: IpAddr) -> bool {
        is_service_address(address) || self.load().name_of(address).is_some()
    }
}

/// Why a target could not be dialed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DialError {
    /// No node has this name.
    #[error("no node of the mesh is named {0:?}")]
    UnknownName(String),
    /// Nobody in the mesh has this address.
    #[error("{0} is not an address of the mesh")]
    NotInMesh(IpAddr),
    /// The peer has no such port open.
    #[error("{0} refuses the connection")]
    Refused(SocketAddr),
    /// The peer does not answer.
    #[error("{0} does not answer")]
    TimedOut(SocketAddr),
    /// Anything else, on our side.
    #[error("{0} cannot be dialed: {1}")]
    Failed(SocketAddr, io::Error),
}

/// Dials peers by address or name.
#[derive(Clone)]
pub struct Dialer {
    netstack: Netstack,
    resolver: Arc<dyn Resolver>,
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialer").field("netstack", &self.netstack).finish_non_exhaustive()
    }
}

impl Dialer {
    /// Dials over `netstack` what `resolver` knows.
    pub fn new(netstack: Netstack, resolver: Arc<dyn Resolver>) -> Self {
        Self { netstack, resolver }
    }

    /// Connects to `host`, which is an address (IPv6 with or without brackets) or a name. A name's addresses are tried
    /// in order, IPv4 first, those of a family that we have no address of last.
    ///
    /// # Errors
    /// [`DialError`] says what is wrong with the target; with several addresses, with the last one tried.
    pub async fn dial(&self, host: &str, port: u16) -> Result<netstack::TcpStream, DialError> {
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return self.dial_address(SocketAddr::new(address, port)).await;
        }
        let mut addresses = self.resolver.resolve(host);
        let own = self.netstack.addresses();
        addresses.sort_by_key(|address| (!own.iter().any(|own| own.is_ipv4() == address.is_ipv4()), address.is_ipv6()));
        let mut last = DialError::UnknownName(host.to_owned());
        for address in addresses {
            match self.dial_address(SocketAddr::new(address, port)).await {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn dial_address(&self, target: SocketAddr) -> Result<netstack::TcpStream, DialError> {
        if !self.resolver.reaches(target.ip()) && !self.netstack.addresses().contains(&target.ip()) {
            return Err(DialError::NotInMesh(target.ip()));
        }
        #[expect(clippy::wildcard_enum_match_arm, reason = "the kind of an I/O error is an open set")]
        self.netstack.dial_tcp(target).await.map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => DialError::Refused(target),
            io::ErrorKind::TimedOut => DialError::TimedOut(target),
            _ => DialError::Failed(target, error),
        })
    }
}

/// Accepts until the listener is gone for good, and serves every client in a task of its own.
async fn accept_loop<F>(listener: TcpListener, serve: impl Fn(TcpStream) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                if stream.set_nodelay(true).is_err() {
                    continue;
                }
                let serving = serve(stream);
                tokio::spawn(async move {
                    serving.await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, or the client has gone: both pass.
                tracing::debug!(%error, "a proxy client could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
