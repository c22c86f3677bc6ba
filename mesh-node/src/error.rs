//! What can go wrong while a node starts or serves a request.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Why an operation of a [`Node`](crate::node::Node) failed. Each message says what to do where something can be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] crate::state::StateError),
    /// A UDP port, a proxy port or the local socket is taken.
    #[error("cannot listen on {what}: {source}{}", listen_hint(source))]
    Listen {
        /// What was to be opened.
        what: String,
        /// Why the system refused.
        source: io::Error,
    },
    /// The local API's socket cannot be made.
    #[error("cannot listen on {}: {source}", path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// Why the system refused.
        source: io::Error,
    },
    /// The TUN device or a UDP socket cannot be had.
    #[error(transparent)]
    Tun(#[from] mesh_tun::Error),
    /// The system failed in another way.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// Why the system refused.
        source: io::Error,
    },
    /// A setting cannot be used.
    #[error("{0}")]
    Setting(String),
    /// Certificates for TLS cannot be loaded.
    #[error("cannot load certificates: {0}")]
    Tls(String),
    /// The coordinator said no, or the sign-in needs something from the user.
    #[error("{0}")]
    Refused(String),
    /// No node of the mesh has this name or address.
    #[error("no peer is called or addressed {0:?}; see `mesh status`")]
    UnknownPeer(String),
    /// The operation needs the userspace stack, and this node runs with a TUN device.
    #[error("this node has a TUN device: use the system's own sockets")]
    NotUserspace,
    /// The node is not connected.
    #[error("the node is not up: {0}")]
    NotRunning(String),
    /// Nothing came back in time.
    #[error("no answer within {:.0?}", whole(*.0))]
    Timeout(Duration),
    /// The peer did not take the connection.
    #[error("cannot connect to {to}: {source}")]
    Dial {
        /// The address within the mesh.
        to: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The node has been shut down.
    #[error("the node has been shut down")]
    ShutDown,
}

impl From<mesh_derp::tls::TlsError> for Error {
    fn from(error: mesh_derp::tls::TlsError) -> Self {
        Self::Tls(error.to_string())
    }
}

fn listen_hint(error: &io::Error) -> &'static str {
    let hints = [
        (io::ErrorKind::AddrInUse, "; choose another port or stop what uses it"),
        (io::ErrorKind::AddrNotAvailable, "; choose an address that this host has"),
        (io::ErrorKind::PermissionDenied, "; choose a port from 1024 up, or run as root"),
    ];
    hints.iter().find(|(kind, _)| *kind == error.kind()).map_or("", |(_, hint)| hint)
}

/// `timeout` without the fraction that is left of it after other work.
fn whole(timeout: Duration) -> Duration {
    if timeout < Duration::from_secs(1) { timeout } else { Duration::from_secs_f64(timeout.as_secs_f64().round()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_listener_says_what_to_do_about_its_reason() {
        let line = |kind: io::ErrorKind| Error::Listen { what: "[::1]:80".to_owned(), source: kind.into() }.to_string();
        assert!(line(io::ErrorKind::AddrInUse).ends_with("stop what uses it"));
        assert!(line(io::ErrorKind::AddrNotAvailable).ends_with("an address that this host has"));
        assert!(line(io::ErrorKind::PermissionDenied).ends_with("run as root"));
    }

    #[test]
    fn a_timeout_is_told_as_it_was_asked_for() {
        assert_eq!(Error::Timeout(Duration::from_millis(9_874)).to_string(), "no answer within 10s");
        assert_eq!(Error::Timeout(Duration::from_millis(300)).to_string(), "no answer within 300ms");
    }
}
