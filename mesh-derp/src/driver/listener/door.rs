//! The lobby with its tasks: what the accepting, the opening and the serving of connections share.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use super::counters::Atomics;
use crate::driver::now;
use crate::server::{Dismissal, Guest, Limits, Lobby, Stage};

/// Dropping it ends the connection.
type Handle = oneshot::Sender<()>;

#[derive(Debug)]
pub(super) struct Door {
    lobby: Mutex<Lobby<Handle>>,
    /// Somebody has left.
    changed: Notify,
    handshakes: Arc<Semaphore>,
    counters: Atomics,
}

impl Door {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            lobby: Mutex::new(Lobby::new(limits)),
            changed: Notify::new(),
            handshakes: Arc::new(Semaphore::new(limits.handshakes)),
            counters: Atomics::default(),
        })
    }

    pub(super) const fn counters(&self) -> &Atomics {
        &self.counters
    }

    /// How many have not logged in.
    pub(super) fn len(&self) -> usize {
        self.lobby().len()
    }

    /// Does what is due: whether to accept, and when to ask again.
    pub(super) fn plan(&self, now: Instant) -> (bool, Option<Instant>) {
        let mut lobby = self.lobby();
        lobby.handle_timeout(now);
        self.show_out(&mut lobby);
        (lobby.has_room(now), lobby.poll_timeout())
    }

    /// Waits until somebody has left.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Shows out one connection that keeps us waiting. Says whether there was one.
    pub(super) fn make_room(&self) -> bool {
        let mut lobby = self.lobby();
        let made = lobby.make_room(now());
        self.show_out(&mut lobby);
        made
    }

    /// A place for a connection from `address`; without one, for one whose address a proxy will say.
    pub(super) fn enter(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Place> {
        let (handle, shown_out) = oneshot::channel();
        let mut lobby = self.lobby();
        let guest = lobby.enter(now(), address, handle);
        self.show_out(&mut lobby);
        drop(lobby);
        Some(Place { door: Arc::clone(self), guest: guest.ok()?, shown_out })
    }

    fn show_out(&self, lobby: &mut Lobby<Handle>) {
        while let Some((handle, why)) = lobby.poll_dismissed() {
            drop(handle);
            match why {
                Dismissal::Room => self.counters.dropped_room.add(1),
                Dismissal::Source => self.counters.dropped_source.add(1),
                Dismissal::Handshake => self.counters.dropped_handshake.add(1),
            }
        }
    }

    fn lobby(&self) -> MutexGuard<'_, Lobby<Handle>> {
        self.lobby.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place among those that have not logged in. Dropping it frees the place.
#[derive(Debug)]
pub struct Place {
    door: Arc<Door>,
    guest: Guest,
    shown_out: oneshot::Receiver<()>,
}

impl Place {
    /// Waits until the place is needed for another connection, and this one has to end. Safe to cancel.
    pub async fn shown_out(&mut self) {
        // Nothing is ever sent: the sender is dropped.
        let _ = (&mut self.shown_out).await;
    }

    /// The same for a connection that may have none.
    pub(crate) async fn needed(place: &mut Option<Self>) {
        match place {
            Some(place) => place.shown_out().await,
            None => std::future::pending().await,
        }
    }

    /// The connection waits for us now, and not we for it.
    pub fn awaits_admission(&self) {
        self.advance(Stage::Admission);
    }

    pub(super) fn advance(&self, stage: Stage) {
        self.door.lobby().advance(now(), self.guest, stage);
    }

    /// A proxy has said where the connection comes from. Says whether it may stay.
    pub(super) fn rename(&self, address: IpAddr) -> bool {
        let mut lobby = self.door.lobby();
        let renamed = lobby.rename(now(), self.guest, address);
        self.door.show_out(&mut lobby);
        renamed.is_ok()
    }

    /// Waits for a place among the handshakes.
    pub(super) async fn begin_handshake(&self) -> Option<OwnedSemaphorePermit> {
        let handshakes = &self.door.handshakes;
        let permit = match Arc::clone(handshakes).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                self.advance(Stage::Queued);
                // Handshakes that stand still are shown out from there.
                self.door.changed.notify_one();
                Arc::clone(handshakes).acquire_owned().await.ok()?
            }
        };
        self.advance(Stage::Handshake);
        Some(permit)
    }

    pub(super) fn counters(&self) -> &Atomics {
        &self.door.counters
    }

    pub(super) fn door(&self) -> Arc<Door> {
        Arc::clone(&self.door)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.door.lobby().leave(self.guest);
        self.door.changed.notify_one();
    }
}
