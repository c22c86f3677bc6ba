//! The fast plane: threads that carry packets between the device and the peers, and decide nothing.
//!
//! ```text
//!            ┌───────────── TX thread ──────────────┐
//!  device ──►│ peer by destination ► seal in place  │──► socket (direct) or RelaySink
//!            └──────────┬───────────────────────────┘
//!                       │ no session: park, WantSession
//!                       ▼
//!                    Notices ──► engine ──► set_peer, set_path, session_opened, session_ready, set_filter
//!                       ▲
//!                       │ everything that is not transport data
//!            ┌──────────┴───────────────────────────┐
//!  device ◄──│ filter ◄ source check ◄ replay ◄ open│◄── socket; inject (relay)
//!            └─ RX thread per socket, one for relays┘
//! ```
//!
//! There is a TX thread for each queue of the device.
//!
//! What threads read is immutable and swapped by pointer (prefix to peer, filter), or one cell per peer (session, path),
//! so that publishing costs what changed. Packets are worked on where they were read: no allocation and no lock a packet;
//! counters are reserved, the replay window is locked and the activity words are written once a batch and session.
//!
//! Order within a flow is kept: one thread reads each queue of the device, packets that were parked for want of a session
//! leave before any that come after them, and each socket has one reader. Where a device has several queues or an address
//! several sockets, all packets of a flow come by the same one.
//!
//! The relay is a transport like a socket: sealed batches go to a [`RelaySink`], and what comes from it is handed to
//! [`Dataplane::inject`] and opened by the same code.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use ipnet::IpNet;
use mesh_derp::map::RegionId;
use mesh_nat::{Path, SocketId};
use mesh_noise::key::NodePublic;
use mesh_noise::wireguard::{AllowedIps, Session};
use mesh_tun::batch::Batch;
use mesh_tun::device::Device;
use mesh_tun::filter::{Filter, Flows, Standing};
use mesh_tun::linux::udp::UdpBatch;
use mesh_tun::masquerade::Masquerade;
use tokio::sync::mpsc;

mod counters;
mod fit;
mod peer;
mod receive;
mod sessions;
mod transmit;
mod workers;

pub use counters::{DropReason, Drops};
pub use peer::{PeerTraffic, Traffic};
pub use workers::Workers;

use counters::DropCounters;
use peer::PeerCell;
use sessions::{SessionCell, Sessions};
use transmit::Transmitter;

/// Packets moved in one go: two super-packets of 64 KiB from a TUN device, few enough to stay in the cache.
const BATCH: usize = 128;

/// How long a thread waits before it looks around; closing wakes it at once.
const IDLE: Duration = Duration::from_secs(10);

/// Relayed datagrams that wait to be opened; more are dropped and counted.
const RELAY_QUEUE: usize = 2048;

/// Notices that wait for the engine; more are dropped and counted. Whoever lost one asks again.
const NOTICES: usize = 1024;

/// Sealed datagrams bound for a relay.
pub trait RelaySink: Send + Sync + fmt::Debug {
    /// Takes datagrams for `to` by way of `region` in order, and returns how many; the others are dropped.
    ///
    /// Must not block.
    fn send(&self, region: RegionId, to: NodePublic, datagrams: &mut dyn Iterator<Item = &[u8]>) -> usize;
}

/// A sink for nodes without relays: drops everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoRelay;

impl RelaySink for NoRelay {
    fn send(&self, _: RegionId, _: NodePublic, _: &mut dyn Iterator<Item = &[u8]>) -> usize {
        0
    }
}

/// What a data plane is made of.
pub struct Config {
    /// Where packets come from and go to.
    pub device: Arc<dyn Device>,
    /// The sockets that carry datagrams, each with its number in [`Path::Direct`].
    pub sockets: Vec<(SocketId, Arc<UdpBatch>)>,
    /// Where relayed datagrams go.
    pub relay: Arc<dyn RelaySink>,
    /// A random seed for the filter's flow table.
    pub flow_seed: [u8; 16],
    /// The time in milliseconds, as [`Interface::clock_ms`](mesh_noise::wireguard::Interface::clock_ms) counts it. Called
    /// once a batch.
    pub clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Whether other threads help where one is saturated; default [`Workers::Auto`].
    pub workers: Workers,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config").field("device", &self.device).field("sockets", &self.sockets).finish_non_exhaustive()
    }
}

/// A peer as the data plane sees it.
#[derive(Debug, Clone)]
pub struct PeerConfig {
    /// Its key.
    pub key: NodePublic,
    /// The addresses it may send from, and that are sent to it. A prefix belongs to the last peer it was given to.
    pub allowed_ips: Vec<IpNet>,
    /// How far it is trusted.
    pub standing: Standing,
}

/// What the data plane cannot do by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// A datagram that is not transport data: a handshake message, disco, STUN.
    Datagram {
        /// How it came.
        path: Path,
        /// Who handed it to the relay; none for other paths.
        source: Option<NodePublic>,
        /// Its bytes.
        datagram: Bytes,
    },
    /// Packets wait for a session with this peer. Told once, until there is one or [`Dataplane::handshake_failed`].
    WantSession {
        /// The peer.
        peer: NodePublic,
    },
    /// A session that had not been ready has opened its first datagram: for `Interface::session_used`.
    SessionUsed {
        /// The session's receiver index.
        receiver_index: u32,
    },
    /// The activity words ask for `Interface::peer_active`.
    PeerActive {
        /// The peer.
        peer: NodePublic,
    },
    /// Transport data of this peer was authentic and came by another direct path than before (roaming), or by a relay
    /// although ours goes directly: the direct path may have died.
    PathSeen {
        /// The peer.
        peer: NodePublic,
        /// The path it came by.
        path: Path,
    },
    /// Transport data of this peer's, by its relay's word, came by relay for a session that we do not have: one of us has
    /// restarted. Told at most every 200 ms, whoever it is about.
    SessionUnknown {
        /// The peer.
        peer: NodePublic,
    },
    /// A message between nodes themselves (IP protocol 99), past the source check and the filter.
    Tsmp {
        /// Who sent it.
        peer: NodePublic,
        /// The whole IP packet.
        packet: Bytes,
    },
    /// A device or a socket failed, and its thread has ended.
    Failed {
        /// Which one and why, for people.
        what: String,
    },
}

/// The notices of one [`Dataplane`], for the engine's task.
#[derive(Debug)]
pub struct Notices(mpsc::Receiver<Notice>);

impl Notices {
    /// The next notice; none once the data plane is gone. Safe to cancel.
    pub async fn next(&mut self) -> Option<Notice> {
        self.0.recv().await
    }

    /// The next notice if there is one.
    pub fn try_next(&mut self) -> Option<Notice> {
        self.0.try_recv().ok()
    }

    /// The next notice, waiting on this thread. Not inside a runtime.
    pub fn blocking_next(&mut self) -> Option<Notice> {
        self.0.blocking_recv()
    }
}

/// The running threads and what they share; stops with [`Dataplane::shutdown`] or when dropped.
#[derive(Debug)]
pub struct Dataplane {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A relayed datagram on its way to be opened; none ends the thread.
type Injected = Option<(RegionId, NodePublic, Bytes)>;

/// A socket with its number.
type NumberedSocket = (SocketId, Arc<UdpBatch>);

/// A peer and the prefixes last given to it.
struct Known {
    cell: Arc<PeerCell>,
    allowed_ips: Box<[IpNet]>,
}

/// What the threads read.
struct Shared {
    /// For threads that are started later.
    me: Weak<Self>,
    device: Arc<dyn Device>,
    /// The device and its further queues: one for each TX thread to read, and for RX threads to write to by turns.
    queues: Vec<Arc<dyn Device>>,
    /// What reads each of them, one thread at a time.
    transmitters: Vec<Mutex<Transmitter>>,
    sockets: ArcSwap<Vec<NumberedSocket>>,
    relay: Arc<dyn RelaySink>,
    injected: SyncSender<Injected>,
    clock: Arc<dyn Fn() -> u64 + Send + Sync>,
    routes: ArcSwap<AllowedIps<Arc<PeerCell>>>,
    filter: ArcSwap<Filter>,
    sessions: Sessions,
    /// Only for commands; threads find peers by route and session.
    peers: Mutex<BTreeMap<NodePublic, Known>>,
    notices: mpsc::Sender<Notice>,
    drops: DropCounters,
    workers: workers::Pool,
    /// When [`Notice::SessionUnknown`] was last told, in milliseconds of the clock.
    unknown_told: AtomicU64,
    stopped: AtomicBool,
}

impl Dataplane {
    /// Starts the threads. Until peers and a filter are set, nothing passes.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start(config: Config) -> io::Result<(Self, Notices)> {
        let Config { device, sockets, relay, flow_seed, clock, workers } = config;
        let (notices, receiver) = mpsc::channel(NOTICES);
        let (injected, relayed) = sync_channel(RELAY_QUEUE);
        let queues: Vec<_> = std::iter::once(Arc::clone(&device)).chain(device.queues()).collect();
        let batch = || Batch::new(BATCH, device.packet_size());
        let transmitters = (0..queues.len()).map(|queue| Mutex::new(Transmitter::new(queue, batch()))).collect();
        let shared = Arc::new_cyclic(|me| Shared {
            me: Weak::clone(me),
            queues,
            transmitters,
            device,
            sockets: ArcSwap::default(),
            relay,
            injected,
            clock,
            routes: ArcSwap::default(),
            filter: ArcSwap::from_pointee(Filter::closed(Arc::new(Flows::new(flow_seed)))),
            sessions: Sessions::default(),
            peers: Mutex::default(),
            notices,
            drops: DropCounters::default(),
            workers: workers::Pool::new(workers),
            unknown_told: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
        });
        let plane = Self { shared, threads: Mutex::default() };
        if let Some(device) = plane.shared.device.waits() {
            let shared = Arc::downgrade(&plane.shared);
            device.lend(Box::new(move || shared.upgrade().is_some_and(|shared| transmit::read_now(&shared))));
        }
        for queue in 0..plane.shared.queues.len() {
            plane.spawn(&format!("mesh-tx-{queue}"), move |shared| transmit::run(shared, queue))?;
        }
        plane.spawn("mesh-rx-relay", move |shared| receive::run_relay(shared, &relayed))?;
        for (id, socket) in sockets {
            plane.add_socket(id, socket)?;
        }
        Ok((plane, Notices(receiver)))
    }

    // --- Peers

    /// Adds a peer, or changes what is set for it; its session, path and counters stay.
    pub fn set_peer(&self, peer: &PeerConfig) {
        self.set_peers(std::slice::from_ref(peer));
    }

    /// Adds or changes several peers, publishing once.
    pub fn set_peers(&self, configs: &[PeerConfig]) {
        let mut peers = self.shared.peers();
        let mut routes = AllowedIps::clone(&self.shared.routes.load());
        for config in configs {
            let known = peers
                .entry(config.key)
                .or_insert_with(|| Known { cell: Arc::new(PeerCell::new(config.key)), allowed_ips: Box::default() });
            known.cell.set_standing(config.standing);
            known.leave(&mut routes, &config.allowed_ips);
            for prefix in &config.allowed_ips {
                routes.insert(*prefix, Arc::clone(&known.cell));
            }
            known.allowed_ips = config.allowed_ips.as_slice().into();
        }
        self.shared.routes.store(Arc::new(routes));
    }

    /// Forgets a peer with its sessions and what is parked for it. False if there was none.
    pub fn remove_peer(&self, key: &NodePublic) -> bool {
        let mut peers = self.shared.peers();
        let Some(known) = peers.remove(key) else { return false };
        let mut routes = AllowedIps::clone(&self.shared.routes.load());
        known.leave(&mut routes, &[]);
        self.shared.routes.store(Arc::new(routes));
        let cell = known.cell;
        self.shared.sessions.remove_of(&cell);
        cell.forget_session();
        self.shared.drops.add(DropReason::NoSession, cell.drop_parked());
        true
    }

    /// The path that packets for a peer take from now on; none drops them. Unknown peers are ignored.
    pub fn set_path(&self, key: &NodePublic, path: Option<Path>) {
        if let Some(cell) = self.shared.peer(key) {
            cell.set_path(path);
        }
    }

    /// The path that packets for a peer take as well, one by one, while the other is in doubt; none once it is not. The
    /// receiver drops the second copy as a replay. Ignored for peers without a path.
    pub fn set_backup(&self, key: &NodePublic, backup: Option<Path>) {
        if let Some(cell) = self.shared.peer(key) {
            cell.set_backup(backup);
        }
    }

    /// The path that packets for a peer take.
    #[must_use]
    pub fn path(&self, key: &NodePublic) -> Option<Path> {
        self.shared.peer(key)?.path()
    }

    /// The longest packet that arrives at a peer, in bytes; none for whatever the device sends. Longer ones are answered
    /// with "too big", and TCP agrees on segments that fit.
    pub fn set_limit(&self, key: &NodePublic, limit: Option<usize>) {
        if let Some(cell) = self.shared.peer(key) {
            cell.set_limit(limit);
        }
    }

    /// Shows this peer other addresses of ours from now on; an empty one shows our own. Unknown peers are ignored.
    pub fn set_masquerade(&self, key: &NodePublic, masquerade: Masquerade) {
        if let Some(cell) = self.shared.peer(key) {
            cell.set_masquerade(masquerade);
        }
    }

    /// The largest packet that the device has, in bytes.
    #[must_use]
    pub fn device_mtu(&self) -> usize {
        self.shared.device.mtu()
    }

    /// What was sent to and received from a peer, by kind of path.
    #[must_use]
    pub fn traffic(&self, key: &NodePublic) -> Option<PeerTraffic> {
        Some(self.shared.peer(key)?.traffic())
    }

    // --- Sessions, as the events of the WireGuard interface tell

    /// Datagrams may arrive on this session from now on.
    pub fn session_opened(&self, session: &Arc<Session>) {
        if let Some(peer) = self.shared.peer(&session.peer()) {
            self.shared.sessions.insert(SessionCell::new(Arc::clone(session), peer));
        }
    }

    /// Packets are sent on this session from now on; what was parked for its peer goes first, by the calling thread.
    pub fn session_ready(&self, session: &Arc<Session>) {
        if let Some(peer) = self.shared.peer(&session.peer()) {
            self.shared.sessions.confirm(session.receiver_index());
            transmit::release(&self.shared, &peer, session);
        }
    }

    /// The session is gone.
    pub fn session_closed(&self, key: &NodePublic, receiver_index: u32) {
        self.shared.sessions.remove(receiver_index);
        if let Some(peer) = self.shared.peer(key) {
            peer.forget_session_if(receiver_index);
        }
    }

    /// Drops what is parked for a peer that does not answer; the next packet raises [`Notice::WantSession`] again.
    pub fn handshake_failed(&self, key: &NodePublic) {
        if let Some(peer) = self.shared.peer(key) {
            self.shared.drops.add(DropReason::NoSession, peer.drop_parked());
        }
    }

    // --- Filter

    /// Judges incoming packets by `filter` from now on. Make it with [`Dataplane::flows`].
    pub fn set_filter(&self, filter: Filter) {
        self.shared.filter.store(Arc::new(filter));
    }

    /// The flows that answers are accepted for; they outlive each filter.
    #[must_use]
    pub fn flows(&self) -> Arc<Flows> {
        Arc::clone(self.shared.filter.load().flows())
    }

    // --- Transports

    /// Adds a socket with a thread of its own, or several on one address with a thread each, or replaces the one with this
    /// number, which is closed.
    ///
    /// # Errors
    /// If the system refuses the thread.
    pub fn add_socket(&self, id: SocketId, socket: Arc<UdpBatch>) -> io::Result<()> {
        for (number, receiver) in std::iter::once(&socket).chain(socket.others()).enumerate() {
            let (receiver, name) = (Arc::clone(receiver), format!("mesh-rx-{}.{number}", id.0));
            let spawned = self.spawn(&name, move |shared| receive::run_socket(shared, id, &receiver, number));
            // Those that run already end with it.
            spawned.inspect_err(|_| socket.close())?;
        }
        let peers = self.shared.peers();
        let (mut sockets, replaced) = self.shared.sockets_without(id);
        sockets.push((id, socket));
        self.shared.sockets.store(Arc::new(sockets));
        drop(peers);
        replaced.iter().for_each(|socket| socket.close());
        Ok(())
    }

    /// Closes the socket with this number and ends its thread.
    pub fn remove_socket(&self, id: SocketId) {
        let peers = self.shared.peers();
        let (sockets, removed) = self.shared.sockets_without(id);
        self.shared.sockets.store(Arc::new(sockets));
        drop(peers);
        removed.iter().for_each(|socket| socket.close());
    }

    /// Sends one datagram of the engine's own: handshake, disco, STUN. A relay path needs the receiver `to`.
    ///
    /// False if it was dropped: no such socket, no room, refused.
    pub fn send(&self, path: &Path, to: Option<NodePublic>, datagram: &[u8]) -> bool {
        match *path {
            Path::Direct { socket, remote } => self.send_to(socket, remote, datagram),
            Path::Relay { region } => {
                to.is_some_and(|to| self.shared.relay.send(region, to, &mut std::iter::once(datagram)) == 1)
            }
            // Only disco goes there on its own, and it comes with its header.
            Path::PeerRelay { .. } => false,
        }
    }

    /// Sends one datagram of the engine's own from a socket to an address.
    pub fn send_to(&self, socket: SocketId, remote: SocketAddr, datagram: &[u8]) -> bool {
        let sockets = self.shared.sockets.load();
        sockets.iter().any(|(id, udp)| *id == socket && udp.send_to(datagram, remote).is_ok())
    }

    /// Takes a datagram that came through a relay; false if it was dropped for lack of room.
    pub fn inject(&self, region: RegionId, source: NodePublic, datagram: Bytes) -> bool {
        match self.shared.injected.try_send(Some((region, source, datagram))) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.shared.drops.add(DropReason::RelayQueueFull, 1);
                false
            }
        }
    }

    // --- Everything else

    /// How many packets and datagrams were dropped, by reason.
    #[must_use]
    pub fn drops(&self) -> Drops {
        self.shared.drops.read()
    }

    /// How many batches a saturated thread has handed to another: see [`Workers`].
    #[must_use]
    pub fn handed_over(&self) -> u64 {
        self.shared.workers.handed_over()
    }

    /// Stops all threads and waits for them; closes the device and the sockets.
    pub fn shutdown(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.device.close();
        for (_, socket) in self.shared.sockets.load().iter() {
            socket.close();
        }
        // If the queue is full its thread is awake, and looks at `stopped`.
        let _ = self.shared.injected.try_send(None);
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        // A relay sink may hold the last reference, and let go of it on one of these very threads.
        let current = std::thread::current().id();
        for thread in threads.into_iter().filter(|thread| thread.thread().id() != current) {
            // A thread that panicked has said so on its own.
            let _ = thread.join();
        }
        self.shared.workers.close();
    }

    fn spawn(&self, name: &str, run: impl FnOnce(&Shared) + Send + 'static) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&shared))?;
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }
}

impl Drop for Dataplane {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Known {
    /// Takes the peer out of `routes`, but for the prefixes in `keep` and those that belong to another peer by now.
    fn leave(&self, routes: &mut AllowedIps<Arc<PeerCell>>, keep: &[IpNet]) {
        for prefix in self.allowed_ips.iter().filter(|prefix| !keep.contains(prefix)) {
            if let Some(owner) = routes.remove(prefix).filter(|owner| !Arc::ptr_eq(owner, &self.cell)) {
                routes.insert(*prefix, owner);
            }
        }
    }
}

impl Shared {
    /// The map is whole at every moment, so a command that panicked leaves nothing to distrust.
    fn peers(&self) -> MutexGuard<'_, BTreeMap<NodePublic, Known>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn peer(&self, key: &NodePublic) -> Option<Arc<PeerCell>> {
        self.peers().get(key).map(|known| Arc::clone(&known.cell))
    }

    fn sockets_without(&self, id: SocketId) -> (Vec<NumberedSocket>, Vec<Arc<UdpBatch>>) {
        let (removed, kept): (Vec<_>, Vec<_>) =
            self.sockets.load().iter().cloned().partition(|(other, _)| *other == id);
        (kept, removed.into_iter().map(|(_, socket)| socket).collect())
    }

    fn now_ms(&self) -> u64 {
        (self.clock)()
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Tells the engine; false, and counted, if it is too far behind.
    fn notify(&self, notice: Notice) -> bool {
        let sent = self.notices.try_send(notice).is_ok();
        if !sent {
            self.drops.add(DropReason::NoticeQueueFull, 1);
        }
        sent
    }

    /// The queue that the RX thread with this number writes to.
    fn queue_of(&self, number: usize) -> &dyn Device {
        &*self.queues[number % self.queues.len()]
    }

    /// A batch that a panic interrupted is cleared before it is used again.
    fn transmitter(&self, queue: usize) -> MutexGuard<'_, Transmitter> {
        self.transmitters[queue].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_batch(&self) -> Batch {
        Batch::new(BATCH, self.device.packet_size())
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("device", &self.device)
            .field("sockets", &self.sockets)
            .field("relay", &self.relay)
            .finish_non_exhaustive()
    }
}
