//! Accepting connections: TLS and plain HTTP on one port.
//!
//! The first byte tells which it is: 0x16 opens a TLS handshake and no HTTP request. TLS handshake and request head are
//! read beside the accepting, many at a time and each within [`Timing`], so a client that dawdles delays nobody.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::stream::{Rewind, Transport, read_request_head};
use super::tls_stream::{self, TlsStream};
use crate::upgrade::RequestHead;

/// How long a new connection may take, and how many may be on their way at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// From accepting to the first byte and the end of the TLS handshake.
    pub handshake: Duration,
    /// From there to the end of the request head.
    pub head: Duration,
    /// Connections between accepting and the end of the head. Further ones wait in the kernel's queue.
    pub underway: usize,
}

impl Default for Timing {
    /// 20 s for each step, since some clients open a connection ahead of its use; 1024 at once.
    fn default() -> Self {
        Self { handshake: Duration::from_secs(20), head: Duration::from_secs(20), underway: 1024 }
    }
}

/// A connection whose request head has been read.
#[derive(Debug)]
pub struct Incoming {
    /// The head.
    pub head: RequestHead,
    /// What follows it.
    pub stream: Rewind<Transport>,
    /// The client's address.
    pub peer_addr: SocketAddr,
    /// Our address it connected to.
    pub local_addr: SocketAddr,
    /// Whether it came over TLS.
    pub tls: bool,
    /// The head as it came.
    pub head_bytes: Bytes,
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
    timing: Timing,
    underway: JoinSet<Option<Incoming>>,
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
        let tls = tls.map(tls_stream::lean_config);
        Self { listeners, tls, timing: Timing::default(), underway: JoinSet::new() }
    }

    /// The same with other limits.
    #[must_use]
    pub fn with_timing(mut self, timing: Timing) -> Self {
        self.timing = timing;
        self
    }

    /// The addresses listened on, with the ports that the system chose for port 0.
    ///
    /// # Errors
    /// Those of the sockets.
    pub fn local_addrs(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// The next connection whose request head is there. Connections that fail before that are dropped with a trace
    /// line. Safe to cancel. Has to be polled for connections to make progress.
    pub async fn next(&mut self) -> Incoming {
        loop {
            let room = self.underway.len() < self.timing.underway;
            tokio::select! {
                Some(finished) = self.underway.join_next(), if !self.underway.is_empty() => {
                    match finished {
                        Ok(Some(incoming)) => return incoming,
                        Ok(None) => {}
                        Err(error) => tracing::error!(%error, "reading a request head failed"),
                    }
                }
                accepted = accept_any(&self.listeners), if room => match accepted {
                    Ok((stream, peer)) => {
                        let (tls, timing) = (self.tls.clone(), self.timing);
                        self.underway.spawn(async move {
                            open(stream, peer, tls, timing).await.unwrap_or_else(|error| {
                                tracing::debug!(%peer, %error, "connection dropped before its request");
                                None
                            })
                        });
                    }
                    Err(error) => {
                        // Out of descriptors, mostly: accepting at once again would spin.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                },
            }
        }
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

async fn open(
    stream: TcpStream,
    peer_addr: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    timing: Timing,
) -> io::Result<Option<Incoming>> {
    super::tune(&stream, super::SERVER_PATIENCE);
    let local_addr = stream.local_addr()?;
    let mut transport = tokio::time::timeout(timing.handshake, secure(stream, tls)).await??;
    let head = tokio::time::timeout(timing.head, read_request_head(&mut transport)).await??;
    let Some((head, head_bytes, rest)) = head else { return Ok(None) };
    let tls = matches!(transport, Transport::Tls(_));
    Ok(Some(Incoming { head, stream: Rewind::new(rest, transport), peer_addr, local_addr, tls, head_bytes }))
}

async fn secure(stream: TcpStream, tls: Option<Arc<ServerConfig>>) -> io::Result<Transport> {
    const TLS_HANDSHAKE: u8 = 0x16;
    let mut first = [0; 1];
    let is_tls = stream.peek(&mut first).await? == 1 && first[0] == TLS_HANDSHAKE;
    match tls {
        Some(config) if is_tls => {
            let (secured, _) = TlsStream::accept(config, stream).await?;
            Ok(Transport::Tls(Box::new(secured)))
        }
        None if is_tls => Err(io::Error::new(io::ErrorKind::InvalidData, "a TLS client on a port without TLS")),
        Some(_) | None => Ok(Transport::Plain(stream)),
    }
}
