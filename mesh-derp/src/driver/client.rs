//! One node's connection to the relays of a region, kept up for as long as it is wanted.
//!
//! [`RelayClient`] connects to the first relay of the region that works, logs in, and passes packets both ways. When the
//! connection ends, for whatever reason, it connects again: at once after one that had been working, then ever later (at
//! most about 5 s, with jitter). [`Outbox`] is where packets go in, from any thread; what is put in while there is no
//! connection waits, newest first served by displacing the oldest.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use mesh_noise::key::{NodePrivate, NodePublic};
use mesh_noise::random::SystemRng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::Notify;

use super::stream::{Rewind, Transport};
use super::{make_room, now, random_fraction};
use crate::client::{Connection, Event, Timing};
use crate::frame::{GoneReason, HEADER_LEN, MAX_PACKET_LEN};
use crate::map::DerpRegion;
use crate::queue::{Depth, Displaced, PacketQueue};
use crate::tls::ClientTls;

mod dial;

#[cfg(not(feature = "server"))]
use dial::Link as Dialled;
pub use dial::{DialError, latency_check};
#[cfg(feature = "server")]
pub(crate) use dial::{Link as Dialled, dial};

/// What a client needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// The region to connect to.
    pub region: DerpRegion,
    /// The node's key.
    pub key: NodePrivate,
    /// How connections are secured.
    pub tls: ClientTls,
    /// Whether this is the node's home region.
    pub home: bool,
    /// How much waits to be sent.
    pub queue: Depth,
    /// Waiting times of a connection.
    pub timing: Timing,
}

impl Options {
    /// The usual settings: not home, and the usual depth of queue.
    #[must_use]
    pub fn new(region: DerpRegion, key: NodePrivate, tls: ClientTls) -> Self {
        Self { region, key, tls, home: false, queue: Depth::default(), timing: Timing::default() }
    }
}

/// What happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum RelayEvent {
    /// A relay has accepted the login.
    Connected {
        /// Its name in the DERP map.
        node: String,
    },
    /// A connection ended or could not be made. Another attempt follows by itself.
    Disconnected {
        /// Why, in one line.
        reason: String,
    },
    /// A packet came.
    Packet {
        /// From whom.
        source: NodePublic,
        /// The packet.
        payload: Bytes,
    },
    /// A peer cannot be reached through this region.
    PeerGone {
        /// Which.
        peer: NodePublic,
        /// Why.
        reason: GoneReason,
    },
    /// The relay reports a problem; an empty text says that it is over.
    Health(String),
}

/// What an outbox has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct OutboxCounters {
    /// Packets handed to a connection.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Packets that made room for newer ones.
    pub displaced: Displaced,
    /// Packets longer than a relay passes on.
    pub too_long: u64,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<PacketQueue>,
    ready: Notify,
    sent: AtomicU64,
    sent_bytes: AtomicU64,
    too_long: AtomicU64,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, PacketQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where packets for a region go in. Cheap to clone; usable from any thread; never blocks.
///
/// Disco overtakes data. When the queue is full, the oldest packet makes room and is counted; so are packets that are
/// dropped because all wait too long (see [`queue`](crate::queue)).
#[derive(Debug, Clone)]
pub struct Outbox(Arc<Shared>);

impl Outbox {
    /// Queues a packet for `destination`; `false` if it is longer than a relay passes on.
    pub fn try_send(&self, destination: NodePublic, payload: Bytes) -> bool {
        self.try_send_all([(destination, payload)]) == 1
    }

    /// Queues packets and says how many were taken.
    pub fn try_send_all(&self, packets: impl IntoIterator<Item = (NodePublic, Bytes)>) -> usize {
        let mut taken = 0;
        {
            let mut queue = self.0.queue();
            let at = now();
            for (destination, payload) in packets {
                if payload.len() > MAX_PACKET_LEN {
                    self.0.too_long.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                queue.push(at, destination, payload);
                taken += 1;
            }
        }
        if taken > 0 {
            self.0.ready.notify_one();
        }
        taken
    }

    /// What has been counted.
    #[must_use]
    pub fn counters(&self) -> OutboxCounters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        OutboxCounters {
            sent: load(&self.0.sent),
            sent_bytes: load(&self.0.sent_bytes),
            displaced: self.0.queue().displaced(),
            too_long: load(&self.0.too_long),
        }
    }
}

type Dialling = Pin<Box<dyn Future<Output = Result<Dialled, DialError>> + Send>>;

enum State {
    Waiting(Pin<Box<tokio::time::Sleep>>),
    Dialling(Dialling),
    Connected(Box<Open>),
}

struct Open {
    node: String,
    reader: ReadHalf<Rewind<Transport>>,
    writer: WriteHalf<Rewind<Transport>>,
    core: Connection,
    out: BytesMut,
    unflushed: bool,
}

/// One node's connection to a region. See the [module doc](self).
pub struct RelayClient {
    options: Options,
    outbox: Outbox,
    state: State,
    events: VecDeque<RelayEvent>,
    failures: u32,
    connected_at: Option<Instant>,
    last_sent: Option<Instant>,
}

impl std::fmt::Debug for RelayClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RelayClient").field("region", &self.options.region.id).finish_non_exhaustive()
    }
}

const CLOSED: &str = "relay closed the connection";
/// How much is handed to the socket at once: four TLS records.
const BATCH: usize = 64 * 1024;
/// A connection that lasted this long was a success: the next attempt follows at once.
const SETTLED: Duration = Duration::from_secs(5);
/// How soon a relay has to answer after the network has changed.
const CHECK_PATIENCE: Duration = Duration::from_secs(1);
/// How much is read at once.
const READ_CHUNK: usize = 32 * 1024;

impl RelayClient {
    /// A client that begins to connect when [`RelayClient::next_event`] is first polled.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let outbox = Outbox(Arc::new(Shared {
            queue: Mutex::new(PacketQueue::new(options.queue)),
            ready: Notify::new(),
            sent: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            too_long: AtomicU64::new(0),
        }));
        let state = State::Dialling(Box::pin(dial::dial(options.region.clone(), options.tls.clone())));
        Self { options, outbox, state, events: VecDeque::new(), failures: 0, connected_at: None, last_sent: None }
    }

    /// Where packets go in.
    #[must_use]
    pub fn outbox(&self) -> Outbox {
        self.outbox.clone()
    }

    /// Whether a relay has accepted the login and nothing has gone wrong since.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.connected_at.is_some()
    }

    /// When a packet was last handed to a connection, for closing regions that are no longer used.
    #[must_use]
    pub const fn last_sent(&self) -> Option<Instant> {
        self.last_sent
    }

    /// Tells the relays whether this is the node's home region.
    pub fn set_home(&mut self, home: bool) {
        self.options.home = home;
        if let State::Connected(open) = &mut self.state {
            open.core.set_home(home);
        }
    }

    /// Gives up the present connection and connects anew at once: the network has changed.
    pub fn reconnect(&mut self) {
        self.failures = 0;
        self.connected_at = None;
        self.state = self.dialling();
    }

    /// The network has changed, but the present connection may have outlived that: asks the relay, and connects anew unless
    /// it answers within a second. Packets go on meanwhile. Without a connection, an attempt begins anew at once.
    pub fn check(&mut self) {
        match &mut self.state {
            State::Connected(open) => open.core.check(now(), CHECK_PATIENCE),
            State::Waiting(_) | State::Dialling(_) => self.reconnect(),
        }
    }

    /// What has already happened and has not been asked for yet; for taking packets in batches after
    /// [`RelayClient::next_event`] has returned one.
    pub fn try_next_event(&mut self) -> Option<RelayEvent> {
        self.events.pop_front()
    }

    /// Runs until something happens. Safe to cancel: nothing is lost, not even a connection attempt. The connection is
    /// read and written only while this is polled.
    pub async fn next_event(&mut self) -> RelayEvent {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            match &mut self.state {
                State::Waiting(sleep) => {
                    sleep.as_mut().await;
                    self.state = self.dialling();
                }
                State::Dialling(dialling) => match dialling.as_mut().await {
                    Ok(link) => self.open(link),
                    Err(error) => self.failed(error.to_string()),
                },
                State::Connected(open) => {
                    if let Err(reason) = open.step(&self.outbox.0, &mut self.last_sent).await {
                        self.failed(reason);
                        continue;
                    }
                    while let Some(event) = open.core.poll_event() {
                        match event {
                            Event::Connected { .. } => {
                                self.connected_at = Some(now());
                                self.events.push_back(RelayEvent::Connected { node: open.node.clone() });
                            }
                            Event::Packet { source, payload } => {
                                self.events.push_back(RelayEvent::Packet { source, payload });
                            }
                            Event::PeerGone { peer, reason } => {
                                self.events.push_back(RelayEvent::PeerGone { peer, reason });
                            }
                            Event::PeerPresent { .. } => {}
                            Event::Health(text) => self.events.push_back(RelayEvent::Health(text)),
                            Event::Restarting { reconnect_in, .. } => {
                                tracing::info!(?reconnect_in, "relay is about to restart");
                            }
                        }
                    }
                }
            }
        }
    }

    fn dialling(&self) -> State {
        State::Dialling(Box::pin(dial::dial(self.options.region.clone(), self.options.tls.clone())))
    }

    fn open(&mut self, link: Dialled) {
        let Options { key, home, timing, .. } = &self.options;
        let core = Connection::new(now(), key.clone(), link.relay, *home, &mut SystemRng).with_timing(*timing);
        let (reader, writer) = tokio::io::split(link.stream);
        let out = BytesMut::from(&link.first[..]);
        let open = Open { node: link.node, reader, writer, core, out, unflushed: false };
        self.state = State::Connected(Box::new(open));
    }

    fn failed(&mut self, reason: String) {
        // A relay that lets clients in and drops them at once must not be asked at full speed.
        let lasted = self.connected_at.take().map(|at| now().duration_since(at));
        self.failures =
            if lasted.is_some_and(|lasted| lasted >= SETTLED) { 0 } else { self.failures.saturating_add(1) };
        tracing::debug!(region = %self.options.region.id, %reason, "relay connection failed");
        let wait = backoff(self.failures).mul_f64(0.5 + random_fraction());
        self.state = State::Waiting(Box::pin(tokio::time::sleep(wait)));
        self.events.push_back(RelayEvent::Disconnected { reason });
    }
}

/// The time to wait after `failures` attempts in a row have failed, before jitter: n² × 10 ms, at most 5 s.
fn backoff(failures: u32) -> Duration {
    Duration::from_millis(10).saturating_mul(failures.saturating_mul(failures)).min(Duration::from_secs(5))
}

impl Open {
    /// Does one thing: reads, writes, flushes, or lets time pass.
    async fn step(&mut self, shared: &Shared, last_sent: &mut Option<Instant>) -> Result<(), String> {
        self.fill(shared, last_sent);
        let io = |error: std::io::Error| {
            // TLS reports an end without farewell this way.
            let ended = error.kind() == std::io::ErrorKind::UnexpectedEof;
            if ended { CLOSED.to_owned() } else { format!("connection lost: {error}") }
        };
        let deadline = self.core.poll_timeout().map(tokio::time::Instant::from_std);
        make_room(self.core.read_buffer(), READ_CHUNK);
        tokio::select! {
            read = self.reader.read_buf(self.core.read_buffer()) => {
                if read.map_err(io)? == 0 {
                    return Err(CLOSED.to_owned());
                }
                self.core.handle_buffered(now()).map_err(|error| error.to_string())?;
            }
            written = write_some(&mut self.writer, &mut self.out), if !self.out.is_empty() || self.unflushed => {
                self.unflushed = written.map_err(io)?;
            }
            () = shared.ready.notified(), if self.out.is_empty() && self.core.accepts_packets() => {}
            () = sleep_until(deadline) => self.core.handle_timeout(now()).map_err(|error| error.to_string())?,
        }
        Ok(())
    }

    /// Moves what is to be sent into `out`, up to one batch.
    fn fill(&mut self, shared: &Shared, last_sent: &mut Option<Instant>) {
        if !self.out.is_empty() {
            return;
        }
        let mut length = 0;
        if self.core.accepts_packets() {
            let (mut queue, at) = (shared.queue(), now());
            while length < BATCH
                && let Some(packet) = queue.pop(at)
            {
                length += HEADER_LEN + 32 + packet.payload.len();
                shared.sent.fetch_add(1, Ordering::Relaxed);
                shared.sent_bytes.fetch_add(packet.payload.len() as u64, Ordering::Relaxed);
                *last_sent = Some(at);
                self.core.send(at, packet.node, packet.payload);
            }
        }
        while let Some(bytes) = self.core.poll_transmit() {
            if self.out.is_empty() {
                self.out = bytes.try_into_mut().unwrap_or_else(|bytes| BytesMut::from(&bytes[..]));
            } else {
                self.out.extend_from_slice(&bytes);
            }
        }
    }
}

/// Writes some of `out`, or flushes if there is none; says whether a flush is still due. Safe to cancel.
pub(crate) async fn write_some(writer: &mut WriteHalf<Rewind<Transport>>, out: &mut BytesMut) -> std::io::Result<bool> {
    if out.is_empty() {
        return writer.flush().await.map(|()| false);
    }
    match writer.write_buf(out).await? {
        0 => Err(std::io::ErrorKind::WriteZero.into()),
        _ => Ok(true),
    }
}

pub(crate) async fn sleep_until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_grows_with_the_square_of_failures_up_to_five_seconds() {
        let millis: Vec<u128> = [0, 1, 2, 10, 22, 23, 1_000_000].map(|n| backoff(n).as_millis()).to_vec();
        assert_eq!(millis, [0, 10, 40, 1000, 4840, 5000, 5000]);
    }
}
