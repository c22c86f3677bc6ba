//! What can go wrong with the host, grouped by what the caller would do about it.

use std::io;
use std::net::SocketAddr;

/// A device, a socket or the host's network configuration could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The process lacks the privilege; the text says how to get it or do without.
    #[error("no permission to {what}: run as root or with CAP_NET_ADMIN, or use --tun userspace")]
    NoPermission {
        /// What was attempted, as a phrase after "to".
        what: String,
    },
    /// The kernel offers no TUN device at all.
    #[error(
        "no TUN device on this machine: load the kernel module (modprobe tun) or give the container /dev/net/tun, \
         or use --tun userspace"
    )]
    NoTun,
    /// Another process holds the TUN device of this name.
    #[error("TUN device {name} is in use by another process: choose another name with --tun NAME, or end that process")]
    DeviceBusy {
        /// The interface name asked for.
        name: String,
    },
    /// The interface name cannot be one (1 to 15 bytes, no slash, no space).
    #[error("{name:?} is no interface name: use 1 to 15 letters and digits")]
    BadName {
        /// The name as given.
        name: String,
    },
    /// A socket address is taken.
    #[error("UDP address {address} is in use by another process: choose another with --port, or end that process")]
    AddressInUse {
        /// The address asked for.
        address: SocketAddr,
    },
    /// The system refused for some other reason.
    #[error("cannot {what}: {source}")]
    System {
        /// What was attempted, as a phrase after "cannot".
        what: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    /// Files a system error under what was attempted; privilege errors become [`Error::NoPermission`].
    pub(crate) fn system(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        if source.kind() == io::ErrorKind::PermissionDenied {
            return Self::NoPermission { what };
        }
        Self::System { what, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_privilege_says_what_to_do() {
        let error = Error::system("open the TUN device", io::Error::from_raw_os_error(libc::EPERM));
        let text = error.to_string();
        assert!(text.contains("CAP_NET_ADMIN") && text.contains("--tun userspace"), "{text}");
        assert!(!text.contains('\n'), "one line: {text}");
    }

    #[test]
    fn other_errors_keep_their_cause() {
        let error = Error::system("bind", io::Error::from_raw_os_error(libc::EADDRNOTAVAIL));
        assert!(std::error::Error::source(&error).is_some());
    }
}
