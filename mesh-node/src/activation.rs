//! The sockets of a server: bound here, or passed by systemd; and what systemd is told.
//!
//! Sockets are made before there is a runtime, so that a process can give up root in between. systemd passes sockets as
//! descriptors from 3 on and says so in `LISTEN_PID` and `LISTEN_FDS` (sd_listen_fds(3)). Which is for what is told by
//! their kind: TCP that listens takes clients, UDP answers STUN.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use listenfd::ListenFd;
use sd_notify::NotifyState;
use socket2::{Domain, Protocol, Socket, Type};

use crate::error::Error;
use crate::listen::listen_error;

/// Connections that may wait to be accepted. The system has a limit of its own, often 4,096.
const BACKLOG: i32 = 4096;

/// Sockets that are bound and not served yet.
#[derive(Debug, Default)]
pub struct Sockets {
    /// Those that accept TLS and plain HTTP.
    pub tcp: Vec<TcpListener>,
    /// Those that answer STUN.
    pub udp: Vec<UdpSocket>,
}

impl Sockets {
    /// Binds addresses for TCP and for STUN.
    ///
    /// # Errors
    /// Names the address that cannot be had.
    pub fn bind(listen: &[SocketAddr], stun: &[SocketAddr]) -> Result<Self, Error> {
        let tcp = |address: &SocketAddr| -> io::Result<TcpListener> {
            let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.bind(&(*address).into())?;
            socket.listen(BACKLOG)?;
            socket.set_nonblocking(true)?;
            Ok(socket.into())
        };
        let udp = |address: &SocketAddr| -> io::Result<UdpSocket> {
            let socket = Socket::new(Domain::for_address(*address), Type::DGRAM, Some(Protocol::UDP))?;
            if address.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.bind(&(*address).into())?;
            socket.set_nonblocking(true)?;
            Ok(socket.into())
        };
        Ok(Self { tcp: each(listen, "HTTP and TLS", tcp)?, udp: each(stun, "STUN", udp)? })
    }

    /// What systemd has passed to this process; `None` if it has passed nothing.
    ///
    /// # Errors
    /// If something was passed that is neither a listening TCP nor a UDP socket.
    pub fn passed() -> Result<Option<Self>, Error> {
        let mut all = ListenFd::from_env();
        if all.len() == 0 {
            return Ok(None);
        }
        let mut sockets = Self::default();
        for index in 0..all.len() {
            let passed = |source| Error::System { what: "a socket passed by systemd", source };
            if let Ok(Some(listener)) = all.take_tcp_listener(index) {
                listener.set_nonblocking(true).map_err(passed)?;
                sockets.tcp.push(listener);
            } else if let Ok(Some(socket)) = all.take_udp_socket(index) {
                socket.set_nonblocking(true).map_err(passed)?;
                sockets.udp.push(socket);
            } else {
                let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
                let name = names.split(':').nth(index).unwrap_or("unnamed");
                return Err(Error::Setting(format!(
                    "socket {} ({name}) that systemd passes is neither TCP nor UDP: use ListenStream= and ListenDatagram= \
                     with ports in the .socket unit",
                    index + 1
                )));
            }
        }
        Ok(Some(sockets))
    }

    /// The addresses of TCP and of STUN.
    ///
    /// # Errors
    /// Those of the system.
    pub fn addresses(&self) -> Result<(Vec<SocketAddr>, Vec<SocketAddr>), Error> {
        let told = |source| Error::System { what: "asking a socket for its address", source };
        let tcp = self.tcp.iter().map(TcpListener::local_addr).collect::<Result<_, _>>().map_err(told)?;
        let udp = self.udp.iter().map(UdpSocket::local_addr).collect::<Result<_, _>>().map_err(told)?;
        Ok((tcp, udp))
    }
}

fn each<T>(addresses: &[SocketAddr], what: &str, make: impl Fn(&SocketAddr) -> io::Result<T>) -> Result<Vec<T>, Error> {
    addresses.iter().map(|address| make(address).map_err(|source| listen_error(what, *address, source))).collect()
}

/// What a service tells systemd; nothing happens without systemd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It serves.
    Ready,
    /// It reads its settings and certificates again; [`Phase::Ready`] follows.
    Reloading,
    /// It is about to end.
    Stopping,
}

/// Tells systemd. Failures are a line in the log: the service runs on.
pub fn notify(phase: Phase) {
    let told = match phase {
        Phase::Ready => sd_notify::notify(&[NotifyState::Ready]),
        Phase::Reloading => {
            NotifyState::monotonic_usec_now().and_then(|at| sd_notify::notify(&[NotifyState::Reloading, at]))
        }
        Phase::Stopping => sd_notify::notify(&[NotifyState::Stopping]),
    };
    if let Err(error) = told {
        tracing::warn!(%error, "cannot tell systemd how things are");
    }
}
