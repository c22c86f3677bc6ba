//! Our own peer relay: UDP that we forward for two other nodes.
//!
//! ```text
//!                 ┌── thread per socket ────────────────────────────────┐
//!   datagrams ───►│ pair by VNI ► source is one leg ► to the other leg  │───► datagrams, as they came
//!                 └───────┬─────────────────────────────────▲───────────┘
//!                 control │                                 │ pairs, swapped by pointer
//!                 bit set ▼                                 │
//!                    relay::Server, behind a lock: bind, challenge, answer, expiry ◄─── allocate (from the engine)
//! ```
//!
//! Forwarding takes batches: what the kernel has joined on the way in it splits again on the way out, and nothing is copied,
//! allocated or locked for a datagram. Neighbours of one sender are looked up once. Datagrams whose receiver has the other
//! family leave by the socket of that family.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fmt, io};

use arc_swap::ArcSwap;
use mesh_nat::Vni;
use mesh_nat::disco::message::RelayEndpoint;
use mesh_nat::relay::Server;
use mesh_nat::relay::geneve;
use mesh_nat::relay::server::{Config, Counters, Event, Leg, Pair, Refused, Session};
use mesh_noise::key::{DiscoPrivate, DiscoPublic};
use mesh_noise::random::SystemRng;
use mesh_tun::linux::udp::{Outgoing, RecvBatch, UdpBatch};

/// Datagrams taken in one go.
const BATCH: usize = 128;
/// How long a thread waits for datagrams before it looks what has expired.
const IDLE: Duration = Duration::from_secs(10);

/// Where a relay's time comes from.
pub type Now = Arc<dyn Fn() -> Instant + Send + Sync>;

/// What was dropped on the way, and why.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Not for a relay, or not from a leg of the pair it names.
    pub unknown: u64,
    /// For an address of a family that we have no socket of.
    pub no_socket: u64,
    /// The system refused to send it, or the send buffer stayed full.
    pub not_sent: u64,
}

/// A running relay. Ends when dropped.
pub struct PeerRelay {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    server: Mutex<Server>,
    pairs: ArcSwap<BTreeMap<Vni, Arc<Pair>>>,
    /// One a family.
    sockets: Vec<Arc<UdpBatch>>,
    now: Now,
    unknown: AtomicU64,
    no_socket: AtomicU64,
    not_sent: AtomicU64,
    stopped: AtomicBool,
}

impl PeerRelay {
    /// Serves on these sockets, at most one a family.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start(sockets: Vec<Arc<UdpBatch>>, now: Now) -> io::Result<Self> {
        let server = Server::new(now(), DiscoPrivate::generate(&mut SystemRng), SystemRng.array(), Config::default());
        let shared = Arc::new(Shared {
            server: Mutex::new(server),
            pairs: ArcSwap::default(),
            sockets,
            now,
            unknown: AtomicU64::new(0),
            no_socket: AtomicU64::new(0),
            not_sent: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
        });
        let mut relay = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        for (family, socket) in shared.sockets.iter().enumerate() {
            for number in 0..=socket.others().len() {
                let shared = Arc::clone(&shared);
                let name = format!("mesh-relay-{family}.{number}");
                let run = move || Forwarder::new(&shared, family, number).run();
                relay.threads.push(std::thread::Builder::new().name(name).spawn(run)?);
            }
        }
        Ok(relay)
    }

    /// What the sockets are bound to.
    pub fn bound(&self) -> impl Iterator<Item = SocketAddr> {
        self.shared.sockets.iter().map(|socket| socket.local_addr())
    }

    /// Where the relay can be reached; without any address nothing is allocated.
    pub fn set_addresses(&self, addresses: Vec<SocketAddr>) {
        self.shared.server().set_addresses(addresses);
    }

    /// An allocation for two clients, who may have it.
    ///
    /// # Errors
    /// [`Refused`] says why there is none.
    pub fn allocate(&self, clients: [DiscoPublic; 2]) -> Result<RelayEndpoint, Refused> {
        let now = (self.shared.now)();
        let mut server = self.shared.server();
        let endpoint = server.allocate(now, clients);
        self.shared.publish(&mut server);
        endpoint
    }

    /// What the relay has done.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.server().counters()
    }

    /// All allocations.
    #[must_use]
    pub fn sessions(&self) -> Vec<Session> {
        self.shared.server().sessions().collect()
    }

    /// What was not forwarded.
    #[must_use]
    pub fn dropped(&self) -> Dropped {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Shared { unknown, no_socket, not_sent, .. } = &*self.shared;
        Dropped { unknown: read(unknown), no_socket: read(no_socket), not_sent: read(not_sent) }
    }
}

impl Drop for PeerRelay {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.sockets.iter().for_each(|socket| socket.close());
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so on its own.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for PeerRelay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerRelay").field("sockets", &self.shared.sockets).finish_non_exhaustive()
    }
}

impl Shared {
    /// The core is whole after each call, so one that panicked leaves nothing to distrust.
    fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the threads what has changed.
    fn publish(&self, server: &mut Server) {
        let Some(first) = server.poll_event() else { return };
        let mut pairs = BTreeMap::clone(&self.pairs.load());
        for event in std::iter::once(first).chain(std::iter::from_fn(|| server.poll_event())) {
            match event {
                Event::Open(pair) => {
                    pairs.insert(pair.vni(), pair);
                }
                Event::Closed(vni) => {
                    pairs.remove(&vni);
                }
                _ => {}
            }
        }
        self.pairs.store(Arc::new(pairs));
    }

    fn socket_to(&self, remote: SocketAddr) -> Option<usize> {
        self.sockets.iter().position(|socket| socket.local_addr().is_ipv4() == remote.is_ipv4())
    }
}

/// Neighbours in a batch: what one client of a pair has sent.
struct Run {
    pair: Arc<Pair>,
    source: SocketAddr,
    sender: Leg,
    to: SocketAddr,
    /// Which socket reaches `to`.
    out: Option<usize>,
    packets: u64,
    bytes: u64,
}

/// One thread.
struct Forwarder<'a> {
    shared: &'a Shared,
    /// Which socket, by family and by number on its address.
    family: usize,
    number: usize,
    /// By position among the sockets; kept for their memory alone.
    outgoing: Vec<Vec<Outgoing>>,
    swept: Instant,
}

impl<'a> Forwarder<'a> {
    fn new(shared: &'a Shared, family: usize, number: usize) -> Self {
        let outgoing = shared.sockets.iter().map(|_| Vec::with_capacity(BATCH)).collect();
        Self { shared, family, number, outgoing, swept: (shared.now)() }
    }

    fn run(mut self) {
        let socket = self.shared.sockets[self.family].member(self.number);
        let mut room = socket.recv_room(BATCH);
        while !self.shared.stopped.load(Ordering::Acquire) {
            match socket.recv_batch(&mut room, IDLE) {
                Ok(0) => {}
                Ok(_) => self.forward(socket, &room),
                Err(error) => {
                    if error.kind() != io::ErrorKind::BrokenPipe {
                        tracing::error!(%error, "the peer relay's socket has failed");
                    }
                    return;
                }
            }
            self.sweep();
        }
    }

    /// Ends what has expired, now and then.
    fn sweep(&mut self) {
        let now = (self.shared.now)();
        if now.saturating_duration_since(self.swept) >= IDLE {
            self.swept = now;
            let mut server = self.shared.server();
            server.handle_timeout(now);
            self.shared.publish(&mut server);
        }
    }

    fn forward(&mut self, socket: &UdpBatch, room: &RecvBatch) {
        let shared = self.shared;
        let now = (shared.now)();
        let mut pairs = shared.pairs.load();
        let batch = room.batch();
        let (mut run, mut runs_ms): (Option<Run>, Option<u64>) = (None, None);
        let mut settle = |run: Option<Run>| {
            if let Some(run) = run {
                let now_ms = *runs_ms.get_or_insert_with(|| shared.server().clock_ms(now));
                run.pair.note(run.sender, now_ms, run.packets, run.bytes);
            }
        };
        for index in 0..room.len() {
            let (datagram, source) = (batch.packet(index), room.source(index));
            let Some((header, _)) = geneve::split(datagram) else {
                shared.unknown.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            if header.control {
                settle(run.take());
                self.control(socket, now, source, datagram);
                // Deployed clients send their only ping right behind the answer that opens the pair, in the same batch.
                pairs = shared.pairs.load();
                continue;
            }
            if !run.as_ref().is_some_and(|run| run.source == source && run.pair.vni() == header.vni) {
                let found = pairs.get(&header.vni).and_then(|pair| {
                    let sender = pair.sender(source)?;
                    let to = pair.address(sender.other());
                    let out = shared.socket_to(to);
                    Some(Run { pair: Arc::clone(pair), source, sender, to, out, packets: 0, bytes: 0 })
                });
                settle(std::mem::replace(&mut run, found));
            }
            let Some(run) = &mut run else {
                shared.unknown.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            run.packets += 1;
            run.bytes += datagram.len() as u64;
            match run.out {
                Some(out) => self.outgoing[out].push(Outgoing { to: run.to, index }),
                None => {
                    shared.no_socket.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        settle(run);
        for (family, outgoing) in self.outgoing.iter_mut().enumerate().filter(|(_, outgoing)| !outgoing.is_empty()) {
            let sent = shared.sockets[family].member(self.number).send_batch(batch, outgoing);
            shared.not_sent.fetch_add((sent.failed + sent.dropped) as u64, Ordering::Relaxed);
            outgoing.clear();
        }
    }

    fn control(&self, socket: &UdpBatch, now: Instant, source: SocketAddr, datagram: &[u8]) {
        let mut server = self.shared.server();
        if let Err(reject) = server.handle_datagram(now, source, datagram) {
            tracing::trace!(%reject, "datagram for the peer relay refused");
        }
        while let Some((to, reply)) = server.poll_transmit() {
            if socket.send_to(&reply, to).is_err() {
                self.shared.not_sent.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.shared.publish(&mut server);
    }
}

#[cfg(test)]
mod tests;
