//! Linux: batched UDP sockets, the TUN device, and the network configuration over netlink.

#[cfg(feature = "tokio")]
pub mod interfaces;
mod kernel;
#[cfg(feature = "tokio")]
pub mod monitor;
#[cfg(feature = "tokio")]
pub mod netlink;
mod qdisc;
pub mod queues;
mod sys;
pub mod tun;
pub mod udp;
mod wait;

/// The mark that our own sockets carry (`SO_MARK`), so that policy rules keep their traffic out of the tunnel.
pub const BYPASS_MARK: u32 = 0x8_0000;

/// The bits of a mark that [`BYPASS_MARK`] is compared in; the others belong to other programs.
pub const BYPASS_MASK: u32 = 0xff_0000;
