//! What happens to a node's paths, as it happens: for programs that show it, log it or act on it.
//!
//! ```no_run
//! # async fn example(node: mesh_node::Node) {
//! use mesh_node::events::Change;
//! let mut events = node.events();
//! while let Some(event) = events.next().await {
//!     if let Change::Path { peer, to, why, .. } = event.change {
//!         println!("{peer}: {:?}, because {}", to.kind, to.because(&why));
//!     }
//! }
//! println!("{} events came too fast", events.lost());
//! # }
//! ```
//!
//! What is true at the moment of subscribing is in [`Node::status`](crate::Node::status): subscribe first, then read it, and
//! nothing falls in between.

use std::time::{Duration, SystemTime};

use mesh_nat::agent::Why;
use mesh_noise::key::NodePublic;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::engine::LinkChange;
use crate::status::PathStatus;

/// Events that are kept for a reader that is slow; older ones are lost to it, and counted.
pub const KEPT: usize = 256;

/// One change and its time.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// When, by the wall clock.
    pub at: SystemTime,
    /// What.
    pub change: Change,
}

impl Event {
    pub(crate) const fn new(at: SystemTime, change: Change) -> Self {
        Self { at, change }
    }
}

/// What has changed.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Change {
    /// Packets to a peer take another way.
    #[non_exhaustive]
    Path {
        /// The peer.
        peer: NodePublic,
        /// The way until now.
        from: PathStatus,
        /// The way from now on.
        to: PathStatus,
        /// The round trip there, smoothed; none through a relay region.
        rtt: Option<Duration>,
        /// The longest packet that arrives there, in bytes; none if the device sets the only limit as far as is known.
        mtu: Option<usize>,
        /// Why the new way is what it is; [`PathStatus::because`] says it in words.
        why: Why,
    },
    /// The direct path to a peer has left pings unanswered, or it answers again.
    #[non_exhaustive]
    Doubt {
        /// The peer.
        peer: NodePublic,
        /// The way that packets take as well as the direct one; none from when it answers again or is given up.
        backup: Option<PathStatus>,
    },
    /// The longest packet that arrives at a peer has been found out, or has changed with its path.
    #[non_exhaustive]
    Mtu {
        /// The peer.
        peer: NodePublic,
        /// In bytes; none if the device sets the only limit.
        mtu: Option<usize>,
    },
    /// A peer has not answered handshakes for 90 seconds.
    #[non_exhaustive]
    Silent {
        /// The peer.
        peer: NodePublic,
    },
    /// The host's network has changed.
    Link(LinkChange),
}

/// A reader of a node's events; see [`Node::events`](crate::Node::events).
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
    lost: u64,
}

impl Events {
    pub(crate) const fn new(receiver: broadcast::Receiver<Event>) -> Self {
        Self { receiver, lost: 0 }
    }

    /// The next event; none once the node has ended. Safe to cancel.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            match self.receiver.recv().await {
                Ok(event) => return Some(event),
                Err(RecvError::Lagged(missed)) => self.lost += missed,
                Err(RecvError::Closed) => return None,
            }
        }
    }

    /// How many events this reader has not seen because more than [`KEPT`] waited for it. After a loss,
    /// [`Node::status`](crate::Node::status) tells what is true now.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silent(number: usize) -> Event {
        let peer = NodePublic::from_bytes([u8::try_from(number % 256).unwrap(); 32]);
        Event::new(SystemTime::UNIX_EPOCH, Change::Silent { peer })
    }

    #[tokio::test]
    async fn a_slow_reader_loses_the_oldest_events_and_knows_how_many() {
        let (sender, receiver) = broadcast::channel(KEPT);
        let (mut slow, mut quick) = (Events::new(receiver.resubscribe()), Events::new(receiver));
        for number in 0..KEPT + 10 {
            sender.send(silent(number)).unwrap();
            assert_eq!(quick.next().await, Some(silent(number)));
        }
        assert_eq!(slow.lost(), 0, "it has not looked yet");
        assert_eq!(slow.next().await, Some(silent(10)));
        assert_eq!((slow.lost(), quick.lost()), (10, 0));
        drop(sender);
        for number in 11..KEPT + 10 {
            assert_eq!(slow.next().await, Some(silent(number)), "what was sent before the end still comes");
        }
        assert_eq!((slow.next().await, slow.lost()), (None, 10));
    }
}
