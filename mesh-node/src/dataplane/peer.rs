//! What the threads know of one peer: the session to send on, the path, what is parked, counters.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;
use mesh_nat::Path;
use mesh_noise::key::NodePublic;
use mesh_noise::wireguard::Session;
use mesh_tun::batch::Batch;
use mesh_tun::filter::Standing;
use mesh_tun::masquerade::Masquerade;

/// Packets kept for a peer without a session: the latest, since what waits longest is retransmitted first.
const PARKED: usize = 64;

/// Between two notices that data comes by a relay though ours goes directly.
const RELAYED_INTERVAL_MS: u64 = 200;

/// Datagrams with transport data, and the bytes in them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Datagrams sent.
    pub tx_packets: u64,
    /// Bytes of the datagrams sent.
    pub tx_bytes: u64,
    /// Datagrams received.
    pub rx_packets: u64,
    /// Bytes of the datagrams received.
    pub rx_bytes: u64,
}

/// The traffic of a peer by kind of path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PeerTraffic {
    /// Between our sockets and the peer.
    pub direct: Traffic,
    /// Through a relay.
    pub relay: Traffic,
}

/// Where packets for a peer go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) path: Path,
    /// Where they go as well, because `path` is in doubt.
    pub(super) backup: Option<Path>,
}

/// One peer. Threads read it without locks; the engine changes it in place.
#[derive(Debug)]
pub(super) struct PeerCell {
    key: NodePublic,
    session: ArcSwapOption<Session>,
    route: ArcSwapOption<Route>,
    /// When the engine last heard that data comes by a relay though ours goes directly.
    relayed: AtomicU64,
    seen: ArcSwapOption<Path>,
    jailed: AtomicBool,
    /// The longest packet that arrives there.
    limit: AtomicUsize,
    /// Whether `masquerade` is set, which it hardly ever is.
    masqueraded: AtomicBool,
    masquerade: ArcSwapOption<Masquerade>,
    parked: Mutex<Parked>,
    direct: TrafficCounters,
    relay: TrafficCounters,
}

/// Packets that wait for a session.
#[derive(Debug, Default)]
pub(super) struct Parked {
    #[expect(clippy::box_collection, reason = "most peers park nothing, and a pointer is a quarter of the queue")]
    packets: Option<Box<VecDeque<Vec<u8>>>>,
    /// Whether the engine has been told.
    told: bool,
}

#[derive(Debug, Default)]
struct TrafficCounters {
    tx_packets: AtomicU64,
    tx_bytes: AtomicU64,
    rx_packets: AtomicU64,
    rx_bytes: AtomicU64,
}

impl PeerCell {
    pub(super) fn new(key: NodePublic) -> Self {
        Self {
            key,
            session: ArcSwapOption::empty(),
            route: ArcSwapOption::empty(),
            relayed: AtomicU64::new(0),
            seen: ArcSwapOption::empty(),
            jailed: AtomicBool::new(false),
            limit: AtomicUsize::new(usize::MAX),
            masqueraded: AtomicBool::new(false),
            masquerade: ArcSwapOption::empty(),
            parked: Mutex::default(),
            direct: TrafficCounters::default(),
            relay: TrafficCounters::default(),
        }
    }

    pub(super) fn key(&self) -> NodePublic {
        self.key
    }

    pub(super) fn standing(&self) -> Standing {
        if self.jailed.load(Ordering::Relaxed) { Standing::Jailed } else { Standing::Ordinary }
    }

    pub(super) fn set_standing(&self, standing: Standing) {
        self.jailed.store(standing == Standing::Jailed, Ordering::Relaxed);
    }

    /// The longest packet that arrives there; `usize::MAX` if that is not limited.
    pub(super) fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    pub(super) fn set_limit(&self, limit: Option<usize>) {
        self.limit.store(limit.unwrap_or(usize::MAX), Ordering::Relaxed);
    }

    /// By which other addresses it knows us.
    pub(super) fn masquerade(&self) -> Option<Arc<Masquerade>> {
        if self.masqueraded.load(Ordering::Relaxed) { self.masquerade.load_full() } else { None }
    }

    pub(super) fn set_masquerade(&self, masquerade: Masquerade) {
        let some = !masquerade.is_empty();
        self.masquerade.store(some.then(|| Arc::new(masquerade)));
        self.masqueraded.store(some, Ordering::Relaxed);
    }

    pub(super) fn path(&self) -> Option<Path> {
        self.route().map(|route| route.path)
    }

    /// Where packets go now.
    pub(super) fn route(&self) -> Option<Route> {
        self.route.load().as_deref().copied()
    }

    /// Data that goes on coming by another direct path is news again. What is in doubt stays so.
    pub(super) fn set_path(&self, path: Option<Path>) {
        self.seen.store(None);
        let backup = self.route().and_then(|route| route.backup);
        self.route.store(path.map(|path| Arc::new(Route { path, backup })));
    }

    /// Sends everything by `backup` too, while the path is in doubt.
    pub(super) fn set_backup(&self, backup: Option<Path>) {
        if let Some(Route { path, .. }) = self.route() {
            self.route.store(Some(Arc::new(Route { path, backup })));
        }
    }

    /// Notes the path that authentic data came by. True if that is news: another direct one than last time; or a relay
    /// though ours is direct, which is told every now and then.
    pub(super) fn note_seen(&self, path: Path, now_ms: u64) -> bool {
        if path.is_direct() {
            let news = self.seen.load().as_deref() != Some(&path);
            if news {
                self.seen.store(Some(Arc::new(path)));
            }
            return news;
        }
        let told = self.relayed.load(Ordering::Relaxed);
        if now_ms < told + RELAYED_INTERVAL_MS || !self.path().is_some_and(|own| own.is_direct()) {
            return false;
        }
        self.relayed.store(now_ms, Ordering::Relaxed);
        true
    }

    /// The session to send on, and the first of `count` counters of it.
    pub(super) fn reserve(&self, count: usize) -> Option<(Arc<Session>, u64)> {
        let session = self.session.load();
        let first = session.as_ref()?.reserve(count as u64)?;
        Some((Arc::clone(session.as_ref()?), first))
    }

    /// A poisoned queue holds whole packets all the same.
    pub(super) fn parked(&self) -> MutexGuard<'_, Parked> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends on `session` from now on. The caller holds the parked packets and has sent them.
    pub(super) fn set_session(&self, session: Arc<Session>, parked: &mut Parked) {
        self.session.store(Some(session));
        parked.told = false;
    }

    pub(super) fn forget_session(&self) {
        self.session.store(None);
    }

    /// Stops sending on the session with this receiver index, if it is the present one.
    pub(super) fn forget_session_if(&self, receiver_index: u32) {
        // Under the lock that `set_session` is called under, so that a newer session is not forgotten.
        let _parked = self.parked();
        if self.session.load().as_ref().is_some_and(|session| session.receiver_index() == receiver_index) {
            self.session.store(None);
        }
    }

    /// Drops what is parked and returns how many packets that were.
    pub(super) fn drop_parked(&self) -> usize {
        let mut parked = self.parked();
        parked.told = false;
        parked.packets.take().map_or(0, |packets| packets.len())
    }

    pub(super) fn traffic(&self) -> PeerTraffic {
        PeerTraffic { direct: self.direct.read(), relay: self.relay.read() }
    }

    pub(super) fn note_tx(&self, path: &Path, packets: usize, bytes: usize) {
        let counters = self.counters(path);
        counters.tx_packets.fetch_add(packets as u64, Ordering::Relaxed);
        counters.tx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn note_rx(&self, path: &Path, packets: usize, bytes: usize) {
        let counters = self.counters(path);
        counters.rx_packets.fetch_add(packets as u64, Ordering::Relaxed);
        counters.rx_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn counters(&self, path: &Path) -> &TrafficCounters {
        if path.is_relay() { &self.relay } else { &self.direct }
    }
}

impl Parked {
    /// Keeps a copy; true if the oldest had to go for it.
    pub(super) fn push(&mut self, packet: &[u8]) -> bool {
        let packets = self.packets.get_or_insert_default();
        let full = packets.len() == PARKED;
        if full {
            packets.pop_front();
        }
        packets.push_back(packet.to_vec());
        full
    }

    /// Takes everything, oldest first.
    pub(super) fn drain(&mut self) -> Batch {
        let packets = self.packets.take().unwrap_or_default();
        let longest = packets.iter().map(Vec::len).max().unwrap_or(0);
        let mut batch = Batch::new(packets.len(), longest);
        for packet in packets.iter() {
            let fits = batch.push(packet);
            debug_assert!(fits, "there is a slot for each, as long as the longest");
        }
        batch
    }

    /// Tells the engine by `tell` unless that was done; if it fails, the next packet tries again.
    pub(super) fn tell(&mut self, tell: impl FnOnce() -> bool) {
        if !self.told {
            self.told = tell();
        }
    }
}

impl TrafficCounters {
    fn read(&self) -> Traffic {
        Traffic {
            tx_packets: self.tx_packets.load(Ordering::Relaxed),
            tx_bytes: self.tx_bytes.load(Ordering::Relaxed),
            rx_packets: self.rx_packets.load(Ordering::Relaxed),
            rx_bytes: self.rx_bytes.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_nat::SocketId;

    #[test]
    fn the_latest_packets_are_kept() {
        let cell = PeerCell::new(NodePublic::default());
        let pushed_out = (0..PARKED + 3).filter(|n| cell.parked().push(&[u8::try_from(*n).unwrap()])).count();
        assert_eq!((pushed_out, cell.parked().drain().packet(0).to_vec()), (3, vec![3]));
        assert_eq!(cell.drop_parked(), 0);
    }

    #[test]
    fn the_engine_is_told_once_until_packets_are_dropped() {
        let cell = PeerCell::new(NodePublic::default());
        let tell = |outcome| {
            let mut told = false;
            cell.parked().tell(|| {
                told = true;
                outcome
            });
            told
        };
        assert!(tell(false), "no room for the notice");
        assert!(tell(true), "so it is tried again");
        assert!(!tell(true));
        cell.drop_parked();
        assert!(tell(true));
    }

    #[test]
    fn a_direct_path_is_seen_once() {
        let cell = PeerCell::new(NodePublic::default());
        let direct = |port| Path::Direct { socket: SocketId(0), remote: ([192, 0, 2, 1], port).into() };
        assert!(cell.note_seen(direct(1), 1));
        assert!(!cell.note_seen(direct(1), 1));
        assert!(cell.note_seen(direct(2), 1));
    }

    #[test]
    fn a_relay_is_news_while_our_own_path_is_direct() {
        let cell = PeerCell::new(NodePublic::default());
        let relay = Path::Relay { region: mesh_derp::map::RegionId::new(1).unwrap() };
        assert!(!cell.note_seen(relay, 1000), "we have no path");
        cell.set_path(Some(relay));
        assert!(!cell.note_seen(relay, 1000), "ours is a relay too");
        cell.set_path(Some(Path::Direct { socket: SocketId(0), remote: ([192, 0, 2, 1], 1).into() }));
        assert!(cell.note_seen(relay, 1000));
        assert!(!cell.note_seen(relay, 1100));
        assert!(cell.note_seen(relay, 1200));
    }

    #[test]
    fn a_backup_outlives_a_change_of_path_but_not_its_loss() {
        let cell = PeerCell::new(NodePublic::default());
        let relay = Path::Relay { region: mesh_derp::map::RegionId::new(1).unwrap() };
        let direct = |port| Path::Direct { socket: SocketId(0), remote: ([192, 0, 2, 1], port).into() };
        cell.set_backup(Some(relay));
        assert_eq!(cell.route(), None, "there is nothing to be in doubt");
        cell.set_path(Some(direct(1)));
        cell.set_backup(Some(relay));
        cell.set_path(Some(direct(2)));
        assert_eq!(cell.route(), Some(Route { path: direct(2), backup: Some(relay) }));
        cell.set_backup(None);
        assert_eq!(cell.route(), Some(Route { path: direct(2), backup: None }));
    }
}
