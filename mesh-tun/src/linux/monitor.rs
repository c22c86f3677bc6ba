//! Says when the host's network has changed: links, addresses, routes.
//!
//! Changes come in bursts (an interface that comes up has a dozen), so they are gathered until it is quiet.
#![expect(clippy::wildcard_enum_match_arm, reason = "the kernel sends more attributes than anyone reads, and new ones")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::netlink::interface;
use crate::Error;

/// How long nothing must happen for a burst to be over.
const QUIET: Duration = Duration::from_millis(150);

/// How long a burst that does not end is gathered.
const PATIENCE: Duration = Duration::from_secs(1);

const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];

/// A subscription to changes of the host's network; needs a tokio runtime.
#[derive(Debug)]
pub struct Monitor {
    changed: Arc<Notify>,
    ignored: Arc<AtomicU32>,
    tasks: [tokio::task::JoinHandle<()>; 2],
}

impl Monitor {
    /// Subscribes; changes from now on are told.
    ///
    /// # Errors
    /// [`Error::System`] if the kernel offers no netlink socket.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start() -> Result<Self, Error> {
        let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&GROUPS)
            .map_err(|error| Error::system("watch the network configuration", error))?;
        let (changed, ignored) = (Arc::new(Notify::new()), Arc::new(AtomicU32::new(0)));
        let (notify, ignore) = (Arc::clone(&changed), Arc::clone(&ignored));
        // Takes messages off at once, so that nothing piles up while nobody waits.
        let gather = async move {
            while let Some((message, _)) = messages.next().await {
                let ignored = ignore.load(Ordering::Relaxed);
                let about = match &message.payload {
                    NetlinkPayload::InnerMessage(message) => about(message),
                    // An overrun: something was missed, so something has changed.
                    _ => None,
                };
                if ignored == 0 || about != Some(ignored) {
                    notify.notify_one();
                }
            }
        };
        Ok(Self { changed, ignored, tasks: [tokio::spawn(connection), tokio::spawn(gather)] })
    }

    /// Leaves changes of the interface `index` out: our own tunnel.
    pub fn ignore(&self, index: u32) {
        self.ignored.store(index, Ordering::Relaxed);
    }

    /// Waits for a change and until the burst it belongs to is over. Safe to cancel.
    pub async fn changed(&mut self) {
        self.changed.notified().await;
        let quiet = async { while timeout(QUIET, self.changed.notified()).await.is_ok() {} };
        tokio::select! {
            () = quiet => {}
            () = sleep(PATIENCE) => {}
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// The interface a message is about.
fn about(message: &RouteNetlinkMessage) -> Option<u32> {
    match message {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => Some(link.header.index),
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            Some(address.header.index)
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => interface(route),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_burst_is_told_once() {
        let mut monitor = Monitor::start().unwrap();
        for _ in 0..3 {
            monitor.changed.notify_one();
        }
        assert!(timeout(PATIENCE * 3, monitor.changed()).await.is_ok());
        assert!(timeout(QUIET, monitor.changed()).await.is_err(), "nothing is left over");
    }
}
