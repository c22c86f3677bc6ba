//! The end of a relay that will be back, or whose region has others.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::RelayServer;
use super::outlet::Outlet;
use crate::driver::random_fraction;
use crate::frame::Frame;

/// What each client adds to the time over which they are sent away: a thousand a second log in elsewhere without trouble.
const EACH: Duration = Duration::from_millis(1);
/// How long before its connection ends a client is told, so that it hears of it.
const NOTICE: Duration = Duration::from_millis(100);
/// For how long clients are told to keep trying.
const TRY_FOR: Duration = Duration::from_secs(5);

impl RelayServer {
    /// Nobody is let in any more, which `/healthz` says, so that nobody new is sent here.
    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Ends the relay gently: lets nobody in any more, tells every client that understands it when to reconnect, each at
    /// a time of its own, and ends each connection at that time. Returns when all are asked to end, after 0.1 s and a
    /// millisecond a client, but `grace` at most: at once if nobody is connected. Packets flow until a connection ends, also to and from
    /// other relays of the region, whose connections end last.
    ///
    /// Dropping the future leaves the relay letting nobody in and those who are connected where they are; the caller then
    /// has [`RelayServer::close_all`].
    pub async fn shutdown(&self, grace: Duration) {
        self.ending.store(true, Ordering::Release);
        let (relays, clients): (Vec<_>, Vec<_>) =
            self.registry().handles().into_iter().partition(|outlet| outlet.guest().is_relay());
        let window = EACH.saturating_mul(u32::try_from(clients.len()).unwrap_or(u32::MAX));
        let window = window.min(grace.saturating_sub(NOTICE));
        let at_random = || (NOTICE + window.mul_f64(random_fraction())).min(grace);
        let mut goodbyes: Vec<(Duration, Arc<Outlet>)> =
            clients.into_iter().map(|outlet| (at_random(), outlet)).collect();
        goodbyes.sort_unstable_by_key(|(after, _)| *after);
        for (after, outlet) in goodbyes.iter().filter(|(_, outlet)| outlet.guest().takes_notices) {
            self.counters.restarting.add(1);
            outlet.tell(Frame::Restarting { reconnect_in: *after, try_for: TRY_FOR });
        }
        tracing::info!(clients = goodbyes.len(), relays = relays.len(), ?window, "sending everybody away");
        let start = tokio::time::Instant::now();
        for (after, outlet) in goodbyes {
            tokio::time::sleep_until(start + after).await;
            outlet.close();
        }
        self.close_all();
    }
}
