//! A plain WireGuard tunnel: one interface, configured from outside, without a mesh around it.
//!
//! The same WireGuard core and the same data plane as a node's, driven by the standard configuration protocol instead
//! of a coordinator. This is what `mesh-wireguard` runs:
//!
//! ```text
//!  wg, wg-quick ──► ControlSocket ──► Tunnel ──► Dataplane ──► threads
//!   (set=1, get=1)                     │  ▲
//!                                      ▼  │ notices
//!                               wireguard::Interface
//! ```
//!
//! [`Tunnel`] decides as little as a driver should: it keeps what was set ([`uapi`](mesh_noise::wireguard::uapi)), moves
//! a peer to where it was last heard, and carries events from the WireGuard core to the data plane.

mod control;
mod tunnel;

pub use control::ControlSocket;
pub use tunnel::{Options, Tunnel};

use std::net::SocketAddr;

use mesh_tun::Error as TunError;

/// Why a tunnel could not start, or why it ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The process lacks the privilege.
    #[error("no permission to {what}: run as root or with CAP_NET_ADMIN")]
    NoPermission {
        /// What was attempted, as a phrase after "to".
        what: String,
    },
    /// The kernel offers no TUN device at all.
    #[error("no TUN device on this machine: load the kernel module (modprobe tun) or give the container /dev/net/tun")]
    NoTun,
    /// Another process holds an interface of this name.
    #[error("interface {name} is in use by another process: choose another name, or end that process")]
    DeviceBusy {
        /// The interface.
        name: String,
    },
    /// Another socket has the port.
    #[error("UDP address {address} is in use by another process")]
    AddressInUse {
        /// The address.
        address: SocketAddr,
    },
    /// A device or a socket could not be made for another reason.
    #[error(transparent)]
    Tun(TunError),
    /// The system refused something else.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted, as a phrase after "cannot".
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Another process answers on the control socket.
    #[error("interface {name} is in use: another process answers on {path}")]
    InUse {
        /// The interface.
        name: String,
        /// The control socket.
        path: String,
    },
    /// The device or a socket failed while running; the interface may have been deleted.
    #[error("the tunnel ended: {what}")]
    Ended {
        /// Which one and why.
        what: String,
    },
}

/// The same errors, in the words of a program that has neither `--tun` nor `--port`.
impl From<TunError> for Error {
    #[expect(clippy::wildcard_enum_match_arm, reason = "whatever else goes wrong says so itself")]
    fn from(error: TunError) -> Self {
        match error {
            TunError::NoPermission { what } => Self::NoPermission { what },
            TunError::NoTun => Self::NoTun,
            TunError::DeviceBusy { name } => Self::DeviceBusy { name },
            TunError::AddressInUse { address } => Self::AddressInUse { address },
            error => Self::Tun(error),
        }
    }
}

impl Error {
    fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}

#[cfg(test)]
mod tests;
