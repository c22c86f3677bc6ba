//! Sessions by receiver index.
//!
//! Indices are random, so their low bits spread sessions evenly over shards; a change copies one shard.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use mesh_noise::wireguard::Session;

use super::peer::PeerCell;

const SHARDS: usize = 64;

/// A session that datagrams may arrive on.
#[derive(Debug)]
pub(super) struct SessionCell {
    pub(super) session: Arc<Session>,
    pub(super) peer: Arc<PeerCell>,
    confirmed: AtomicBool,
}

/// All sessions that datagrams may arrive on.
#[derive(Debug)]
pub(super) struct Sessions {
    shards: [ArcSwap<HashMap<u32, Arc<SessionCell>>>; SHARDS],
    /// One change at a time.
    changing: Mutex<()>,
}

impl SessionCell {
    pub(super) fn new(session: Arc<Session>, peer: Arc<PeerCell>) -> Self {
        Self { session, peer, confirmed: AtomicBool::new(false) }
    }

    /// Whether this is the first datagram of a session that was not ready; true once.
    pub(super) fn is_first_use(&self) -> bool {
        !self.confirmed.load(Ordering::Relaxed) && !self.confirmed.swap(true, Ordering::Relaxed)
    }

    /// Takes back [`SessionCell::is_first_use`] if it could not be told.
    pub(super) fn unconfirm(&self) {
        self.confirmed.store(false, Ordering::Relaxed);
    }
}

impl Default for Sessions {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| ArcSwap::default()), changing: Mutex::default() }
    }
}

impl Sessions {
    pub(super) fn get(&self, receiver_index: u32) -> Option<Arc<SessionCell>> {
        self.shard(receiver_index).load().get(&receiver_index).cloned()
    }

    pub(super) fn insert(&self, cell: SessionCell) {
        let index = cell.session.receiver_index();
        self.change(self.shard(index), |shard| drop(shard.insert(index, Arc::new(cell))));
    }

    /// The session is ready: its first datagram is no news.
    pub(super) fn confirm(&self, receiver_index: u32) {
        if let Some(cell) = self.get(receiver_index) {
            cell.confirmed.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn remove(&self, receiver_index: u32) {
        self.change(self.shard(receiver_index), |shard| drop(shard.remove(&receiver_index)));
    }

    /// Removes the sessions of a peer. Walks all: peers go seldom.
    pub(super) fn remove_of(&self, peer: &Arc<PeerCell>) {
        for shard in &self.shards {
            if shard.load().values().any(|cell| Arc::ptr_eq(&cell.peer, peer)) {
                self.change(shard, |shard| shard.retain(|_, cell| !Arc::ptr_eq(&cell.peer, peer)));
            }
        }
    }

    fn shard(&self, receiver_index: u32) -> &ArcSwap<HashMap<u32, Arc<SessionCell>>> {
        &self.shards[receiver_index as usize % SHARDS]
    }

    fn change(
        &self,
        shard: &ArcSwap<HashMap<u32, Arc<SessionCell>>>,
        change: impl FnOnce(&mut HashMap<u32, Arc<SessionCell>>),
    ) {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut copy = HashMap::clone(&shard.load());
        change(&mut copy);
        shard.store(Arc::new(copy));
    }
}
