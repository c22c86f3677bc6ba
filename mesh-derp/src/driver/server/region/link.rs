//! The link to another relay of the region: a client's connection with this relay's own key and the mesh key.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::random::SystemRng;
use tokio::io::AsyncReadExt as _;
use tokio::sync::Notify;

use super::{RelayServer, Sibling};
use crate::client::{ClientError, Connection, Event, Timing};
use crate::driver::client::{self, DialError, Dialled};
use crate::driver::{make_room, now, random_fraction};
use crate::login::MeshKey;
use crate::server::{Backlog, LinkId, Presence};
use crate::tls::ClientTls;

/// How much waits for a link, for each of disco and data.
const BACKLOG: usize = 4 * 1024 * 1024;
/// How much is handed to the socket at once: four TLS records.
const BATCH: usize = 64 * 1024;
/// How much is read at once.
const READ_CHUNK: usize = 16 * 1024;
/// A link that lasted this long was a success: the next attempt follows at once.
const SETTLED: Duration = Duration::from_secs(5);
/// The longest pause between attempts, before jitter.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// A relay that is gone without a word is noticed within 5 s of something being forwarded to it.
const TIMING: Timing = Timing {
    login: Duration::from_secs(10),
    silence: Duration::from_secs(120),
    ping_after: Duration::from_secs(2),
    pong_within: Duration::from_secs(3),
};

/// Where packets for the nodes of another relay go in. Never blocks.
#[derive(Debug)]
pub(in super::super) struct Link {
    backlog: Mutex<Backlog>,
    ready: Notify,
}

impl Link {
    fn new() -> Arc<Self> {
        Arc::new(Self { backlog: Mutex::new(Backlog::new(BACKLOG)), ready: Notify::new() })
    }

    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues packets, and says how many others went for them.
    pub(super) fn push(
        &self,
        source: NodePublic,
        destination: NodePublic,
        packets: impl Iterator<Item = Bytes>,
    ) -> u64 {
        let mut backlog = self.backlog();
        let dropped = packets.map(|payload| backlog.push(source, destination, payload)).sum();
        drop(backlog);
        self.ready.notify_one();
        dropped
    }
}

/// Why a link is over.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("that is this relay itself")]
    Itself,
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
    #[error("closed by the other relay")]
    Closed,
    #[error("closed by the other relay right after the login: its --mesh-key-file is probably another one")]
    OtherKey,
}

/// A link's place in the registry, given up when the link breaks.
struct Joined<'a> {
    server: &'a RelayServer,
    id: LinkId,
    link: Arc<Link>,
}

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        self.server.registry_mut().remove_link(now(), self.id);
        self.server.region_changed.notify_waiters();
        self.server.counters.dropped_link.add(self.link.backlog().len() as u64);
    }
}

impl RelayServer {
    /// Keeps up a link to another relay of the region for as long as the future lives: learns who is connected there, and
    /// forwards to it. Needs [`Config::mesh_key`](super::super::Config::mesh_key), and the same one there. The other relay
    /// has to join this one as well, or its clients cannot reach this one's.
    ///
    /// Returns only if the other relay turns out to be this one, so that all relays may be given the same list, or if
    /// there is no mesh key.
    pub async fn join(self: Arc<Self>, other: Sibling, tls: ClientTls) {
        let Some(mesh_key) = self.config.mesh_key.clone() else {
            tracing::error!(relay = %other, "no link to the other relay: there is no mesh key");
            return;
        };
        if other.is_plain() {
            tracing::warn!(relay = %other, "the link is not encrypted: whoever is on the path learns the mesh key");
        }
        let tls = if other.is_plain() { ClientTls::plain() } else { tls };
        tokio::select! {
            () = self.keep_linked(&other, &tls, &mesh_key) => {}
            never = self.settle_departures() => match never {},
        }
    }

    async fn keep_linked(&self, other: &Sibling, tls: &ClientTls, mesh_key: &MeshKey) {
        let mut failures = 0;
        loop {
            let mut since = None;
            let Err(reason) = self.link(other, tls, mesh_key, &mut since).await;
            match (&reason, since) {
                (Broken::Itself, _) => {
                    tracing::info!(relay = %other, "no link: that is this relay itself");
                    return;
                }
                (_, Some(_)) => tracing::warn!(relay = %other, %reason, "link to another relay lost, trying again"),
                (_, None) if failures == 0 => tracing::warn!(relay = %other, %reason, "no link yet, trying on"),
                (_, None) => tracing::debug!(relay = %other, %reason, "no link yet"),
            }
            let lasted = since.is_some_and(|since| now().duration_since(since) >= SETTLED);
            failures = if lasted { 0 } else { failures + 1 };
            tokio::time::sleep(pause(failures).mul_f64(0.5 + random_fraction())).await;
        }
    }

    async fn link(
        &self,
        other: &Sibling,
        tls: &ClientTls,
        mesh_key: &MeshKey,
        since: &mut Option<Instant>,
    ) -> Result<Infallible, Broken> {
        let dialled: Dialled = client::dial(other.region(), tls.clone()).await?;
        let own = NodePrivate::from_bytes(*self.key.expose_secret());
        let core = Connection::for_relay(now(), own, dialled.relay, mesh_key.clone(), &mut SystemRng);
        let mut core = core.with_timing(TIMING);
        let (mut reader, mut writer) = tokio::io::split(dialled.stream);
        let (mut out, mut unflushed) = (BytesMut::from(&dialled.first[..]), false);
        let mut joined: Option<Joined<'_>> = None;
        // The first thing that a watcher is told is its own presence, so none at all means that it may not watch.
        let mut watching = false;
        let nothing = Notify::new();
        loop {
            if out.is_empty()
                && let Some(joined) = &joined
                && joined.link.backlog().take(&mut out, BATCH) > 0
            {
                core.note_sent(now());
            }
            while let Some(bytes) = core.poll_transmit() {
                out.extend_from_slice(&bytes);
            }
            let ready = joined.as_ref().map_or(&nothing, |joined| &joined.link.ready);
            let closed = || if since.is_some() && !watching { Broken::OtherKey } else { Broken::Closed };
            let deadline = core.poll_timeout().map(Into::into);
            make_room(core.read_buffer(), READ_CHUNK);
            tokio::select! {
                read = reader.read_buf(core.read_buffer()) => match read {
                    Ok(0) => return Err(closed()),
                    // TLS reports an end without farewell this way.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(closed()),
                    Err(error) => return Err(error.into()),
                    Ok(_) => core.handle_buffered(now())?,
                },
                written = client::write_some(&mut writer, &mut out), if !out.is_empty() || unflushed => {
                    unflushed = written?;
                    continue;
                }
                () = ready.notified(), if out.is_empty() => continue,
                () = client::sleep_until(deadline) => core.handle_timeout(now())?,
            }
            watching |= self.learn(&mut core, other, &mut joined)?;
            if since.is_none() && joined.is_some() {
                *since = Some(now());
            }
        }
    }

    /// Takes in what the other relay has said; says whether it has told of anybody.
    fn learn<'a>(
        &'a self,
        core: &mut Connection,
        other: &Sibling,
        joined: &mut Option<Joined<'a>>,
    ) -> Result<bool, Broken> {
        let (mut told, mut lost) = (false, false);
        let Some(mut event) = core.poll_event() else { return Ok(false) };
        let mut registry = self.registry_mut();
        loop {
            match (event, joined.as_ref().map(|joined| joined.id)) {
                (Event::Connected { relay, .. }, _) if relay == self.public => return Err(Broken::Itself),
                (Event::Connected { .. }, None) => {
                    tracing::info!(relay = %other, "linked to another relay of the region");
                    let link = Link::new();
                    let id = registry.add_link(Arc::clone(&link));
                    *joined = Some(Joined { server: self, id, link });
                }
                (Event::PeerPresent { peer, flags }, Some(link)) => {
                    told = true;
                    let relay = flags & Presence::RELAY != 0 || peer.as_bytes() == self.public.as_bytes();
                    if !relay {
                        registry.link_present(link, peer);
                    }
                }
                (Event::PeerGone { peer, .. }, Some(link)) => {
                    registry.link_gone(now(), link, &peer);
                    lost = true;
                }
                (
                    Event::Connected { .. }
                    | Event::Packet { .. }
                    | Event::PeerGone { .. }
                    | Event::PeerPresent { .. }
                    | Event::Health(_)
                    | Event::Restarting { .. },
                    _,
                ) => {}
            }
            match core.poll_event() {
                Some(next) => event = next,
                None => break,
            }
        }
        drop(registry);
        if lost {
            self.region_changed.notify_waiters();
        }
        Ok(told)
    }

    /// Tells of nodes that have not come back to any relay of the region in time. Any number may do so at once.
    async fn settle_departures(&self) -> Infallible {
        loop {
            let changed = self.region_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let due = self.registry().poll_timeout();
            tokio::select! {
                () = changed => continue,
                () = client::sleep_until(due.map(Into::into)) => {}
            }
            loop {
                let departure = self.registry_mut().poll_departure(now());
                let Some(departure) = departure else { break };
                self.tell_of(departure);
            }
        }
    }
}

/// The time to wait after so many attempts in a row have failed, before jitter.
fn pause(failures: u32) -> Duration {
    Duration::from_millis(50).saturating_mul(2u32.saturating_pow(failures)).min(MAX_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_follow_quickly_at_first_and_every_five_seconds_in_the_end() {
        let millis: Vec<u128> = [0, 1, 2, 5, 7, 40].map(|n| pause(n).as_millis()).to_vec();
        assert_eq!(millis, [50, 100, 200, 1600, 5000, 5000]);
    }
}
