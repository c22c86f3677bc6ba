//! The thread, the queues and the lock around [`Stack`].

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use mesh_noise::random::SystemRng;
use mesh_tun::batch::Batch;
use tokio::sync::mpsc;

use super::packet;
use super::parcel::{Cutting, Parcel};
use super::stack::{Drops, Event, Stack};
use super::{Config, Flow, StackDevice, TcpStream};

/// Requests waiting to be taken.
const REQUEST_QUEUE: usize = 256;

/// Packets and drops of a stack since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StackCounters {
    /// Packets from the mesh.
    pub received: u64,
    /// Packets to the mesh.
    pub sent: u64,
    /// What the stack itself dropped.
    pub drops: Drops,
    /// TCP connections that exist now, in whatever state.
    pub connections: usize,
}

/// Traffic for a port that nobody serves.
#[derive(Debug)]
#[non_exhaustive]
pub enum Request {
    /// Somebody wants to connect.
    Tcp(TcpRequest),
    /// Somebody has sent a datagram.
    Udp(UdpRequest),
    /// Somebody wants an echo from an address of a subnet.
    Ping(PingRequest),
}

/// The stream of [`Request`]s; bounded, and what does not fit is dropped (a SYN comes again).
#[derive(Debug)]
pub struct Requests {
    receiver: mpsc::Receiver<Request>,
}

impl Requests {
    /// The next request; `None` once the stack has ended. Safe to cancel.
    pub async fn next(&mut self) -> Option<Request> {
        self.receiver.recv().await
    }
}

/// A SYN that waits for an answer. Dropping it leaves the SYN unanswered.
#[derive(Debug)]
pub struct TcpRequest {
    flow: Flow,
    shared: Option<Arc<Shared>>,
}

impl TcpRequest {
    /// Both ends.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// Finishes the handshake.
    ///
    /// # Errors
    /// `ResourceBusy` when there are too many connections, `ConnectionReset` when the peer has gone.
    pub async fn accept(mut self) -> io::Result<TcpStream> {
        let shared = self.shared.take().ok_or(io::ErrorKind::NotConnected)?;
        let id = shared.with(|stack, now| stack.admit(now, self.flow))?;
        let stream = TcpStream::new(shared, id)?;
        stream.established().await.map_err(|_| io::ErrorKind::ConnectionReset)?;
        Ok(stream)
    }

    /// Answers with a reset: connection refused.
    pub fn refuse(mut self) {
        if let Some(shared) = self.shared.take() {
            shared.with(|stack, now| stack.refuse_tcp(now, self.flow));
        }
    }
}

impl Drop for TcpRequest {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            shared.with(|stack, _| stack.forget(self.flow));
        }
    }
}

/// A datagram for a port without socket.
#[derive(Debug)]
pub struct UdpRequest {
    flow: Flow,
    payload: std::ops::Range<usize>,
    packet: Vec<u8>,
    shared: Arc<Shared>,
}

impl UdpRequest {
    /// Both ends.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// What was sent.
    pub fn payload(&self) -> &[u8] {
        self.packet.get(self.payload.clone()).unwrap_or_default()
    }

    /// Answers with an ICMP port unreachable.
    pub fn refuse(self) {
        let Self { packet, shared, .. } = self;
        shared.with(|stack, now| stack.refuse_packet(now, &packet));
    }
}

/// An echo request for an address that is not ours. Dropping it leaves it unanswered.
#[derive(Debug)]
pub struct PingRequest {
    packet: Vec<u8>,
    message: std::ops::Range<usize>,
    shared: Arc<Shared>,
}

impl PingRequest {
    /// Who shall answer.
    pub fn destination(&self) -> Option<IpAddr> {
        packet::destination(&self.packet)
    }

    /// The ICMP or ICMPv6 message: type, code, checksum, identifier, sequence number, data.
    pub fn message(&self) -> &[u8] {
        self.packet.get(self.message.clone()).unwrap_or_default()
    }

    /// Answers in the name of the destination.
    pub fn answer(self) {
        let Self { packet, message, shared } = self;
        shared.with(|stack, _| stack.answer_echo(packet, message.start));
    }
}

/// A stack and its thread; dropping it ends both.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) shared: Arc<Shared>,
    requests: Mutex<Option<Requests>>,
}

impl Handle {
    pub(super) fn start(config: Config) -> io::Result<(Self, StackDevice)> {
        let seed = SystemRng.array();
        let (sender, receiver) = mpsc::channel(REQUEST_QUEUE);
        let shared = Arc::new(Shared {
            connect_timeout: config.connect_timeout,
            mtu: config.mtu,
            outbox_capacity: config.transmit_queue.max(1),
            stack: Mutex::new(Stack::new(now(), config, seed)),
            signals: Mutex::new(Signals::default()),
            signalled: Condvar::new(),
            outbox: Mutex::new(Outbox::default()),
            outbox_ready: Condvar::new(),
            pump: OnceLock::new(),
            outbox_len: AtomicUsize::new(0),
            reader: Mutex::new(Reader::default()),
            unread: AtomicBool::new(false),
            wakes_at: Mutex::new(None),
            closed: AtomicBool::new(false),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        });
        let worker = Arc::clone(&shared);
        std::thread::Builder::new().name("mesh-netstack".into()).spawn(move || {
            let ending = Ending(&worker);
            ending.0.run(&sender);
        })?;
        let device = StackDevice::new(Arc::clone(&shared));
        Ok((Self { shared, requests: Mutex::new(Some(Requests { receiver })) }, device))
    }

    pub(super) fn requests(&self) -> Option<Requests> {
        lock(&self.requests).take()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// What the thread sleeps for, besides time.
#[derive(Debug, Default)]
struct Signals {
    kicked: bool,
    /// Tasks that wait for the end.
    ending: Vec<Waker>,
}

/// What the stack has sent and the device side has not read.
#[derive(Debug, Default)]
struct Outbox {
    parcels: VecDeque<Parcel>,
    /// How many packets they are.
    packets: usize,
    /// Buffers on their way back to the stack.
    used: Vec<Vec<u8>>,
    /// The device side waits for packets.
    awaited: bool,
    /// It is to be left waiting: somebody else reads.
    hushed: bool,
    /// The stack waits for room.
    starved: bool,
    /// Nothing more will come.
    finished: bool,
}

/// What the device side has taken and not passed on.
#[derive(Debug, Default)]
struct Reader {
    parcels: VecDeque<Cutting>,
    used: Vec<Vec<u8>>,
}

/// Reads the device, if nobody else does; says whether it has.
struct Pump(Box<dyn Fn() -> bool + Send + Sync>);

impl fmt::Debug for Pump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pump")
    }
}

/// What streams, the thread and the device side share.
#[derive(Debug)]
pub(super) struct Shared {
    connect_timeout: Duration,
    mtu: usize,
    outbox_capacity: usize,
    stack: Mutex<Stack>,
    signals: Mutex<Signals>,
    signalled: Condvar,
    outbox: Mutex<Outbox>,
    outbox_ready: Condvar,
    pump: OnceLock<Pump>,
    /// Packets in the outbox, readable without its lock.
    outbox_len: AtomicUsize,
    /// One thread reads; the lock is for those that do not keep to it.
    reader: Mutex<Reader>,
    /// Whether the reader has kept something; written under its lock.
    unread: AtomicBool,
    /// The timer that the thread sleeps for; written under the stack's lock.
    wakes_at: Mutex<Option<Instant>>,
    closed: AtomicBool,
    received: AtomicU64,
    sent: AtomicU64,
}

impl Shared {
    pub(super) fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }

    pub(super) fn mtu(&self) -> usize {
        self.mtu
    }

    pub(super) fn counters(&self) -> StackCounters {
        let stack = lock(&self.stack);
        StackCounters {
            received: self.received.load(Ordering::Relaxed),
            sent: self.sent.load(Ordering::Relaxed),
            drops: stack.drops(),
            connections: stack.connections(),
        }
    }

    /// Runs `f` on the stack and sends what that has made.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut Stack, Instant) -> R) -> R {
        let mut stack = lock(&self.stack);
        let now = now();
        stack.set_transmit_limit(self.room());
        let result = f(&mut stack, now);
        let awaited = self.send_out(&mut stack, now);
        let woken = stack.take_woken();
        let next = stack.poll_timeout();
        let sooner = match (next, *lock(&self.wakes_at)) {
            (Some(next), Some(planned)) => next < planned,
            (Some(_), None) => true,
            (None, _) => false,
        };
        let kick = sooner || stack.has_events();
        drop(stack);
        if kick {
            self.kick();
        }
        woken.into_iter().for_each(Waker::wake);
        if awaited {
            self.pass_on();
        }
        result
    }

    /// Has packets read that somebody waits for: by this very thread if it may, or by the one that waits.
    fn pass_on(&self) {
        if self.pump.get().is_some_and(|pump| (pump.0)()) {
            return;
        }
        let mut outbox = lock(&self.outbox);
        // Whoever has read it by now may wait again, for what is to come.
        if self.is_readable(&outbox) && std::mem::take(&mut outbox.awaited) {
            drop(outbox);
            self.outbox_ready.notify_one();
        }
    }

    /// Has `pump` called by threads that have made the device readable while nobody reads; see
    /// [`Waits::lend`](mesh_tun::device::Waits::lend).
    pub(super) fn set_pump(&self, pump: Box<dyn Fn() -> bool + Send + Sync>) {
        // A second data plane on the same device is woken instead.
        let _ = self.pump.set(Pump(pump));
    }

    fn room(&self) -> usize {
        self.outbox_capacity.saturating_sub(self.outbox_len.load(Ordering::Acquire))
    }

    /// Lets sockets send until they are done or the outbox is full. Order is kept: the caller holds the stack's lock. Says
    /// whether somebody waits for what there is to read now.
    #[must_use]
    fn send_out(&self, stack: &mut Stack, now: Instant) -> bool {
        loop {
            stack.flush(now);
            let mut outbox = lock(&self.outbox);
            outbox.used.drain(..).for_each(|buffer| stack.recycle(buffer));
            let before = outbox.packets;
            while let Some(parcel) = stack.poll_transmit() {
                outbox.packets += parcel.count();
                outbox.parcels.push_back(parcel);
            }
            let len = outbox.packets;
            if len > before {
                self.sent.fetch_add((len - before) as u64, Ordering::Relaxed);
                self.outbox_len.store(len, Ordering::Release);
            }
            let full = len >= self.outbox_capacity;
            outbox.starved = full && stack.is_blocked();
            let awaited = len > 0 && !outbox.hushed && outbox.awaited;
            drop(outbox);
            stack.set_transmit_limit(self.room());
            if full || !stack.is_blocked() {
                return awaited;
            }
        }
    }

    fn kick(&self) {
        lock(&self.signals).kicked = true;
        self.signalled.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(super) fn close(&self) {
        if !self.closed.swap(true, Ordering::AcqRel) {
            self.kick();
        }
    }

    /// Whether the thread has ended; `waker` is woken when it does.
    pub(super) fn poll_closed(&self, waker: &Waker) -> bool {
        let mut signals = lock(&self.signals);
        let finished = lock(&self.outbox).finished;
        if !finished {
            signals.ending.push(waker.clone());
        }
        finished
    }

    // --- the device side -----------------------------------------------------------------------------------------

    /// Hands packets to the stack one by one. Says how many.
    pub(super) fn deliver(&self, packets: &mut dyn Iterator<Item = Vec<u8>>) -> usize {
        if self.is_closed() {
            return 0;
        }
        let taken = self.with(|stack, now| packets.map(|packet| stack.handle_packet(now, &packet)).count());
        self.received.fetch_add(taken as u64, Ordering::Relaxed);
        taken
    }

    /// Hands the packets of a batch to the stack. Says how many; `None` once the stack has ended.
    pub(super) fn deliver_batch(&self, batch: &mut Batch) -> Option<usize> {
        if self.is_closed() {
            return None;
        }
        let taken = self.with(|stack, now| stack.handle_batch(now, batch));
        self.received.fetch_add(taken as u64, Ordering::Relaxed);
        Some(taken)
    }

    /// Waits up to `timeout` for packets and has `write` cut off up to `limit` of them, until it refuses. `None` once the
    /// stack has ended.
    pub(super) fn collect(
        &self,
        limit: usize,
        timeout: Duration,
        write: &mut dyn FnMut(&mut Cutting) -> bool,
    ) -> Option<usize> {
        let mut reader = lock(&self.reader);
        let ended = self.fetch(&mut reader, limit, timeout);
        let mut count = 0;
        while let Some(parcel) = reader.parcels.front_mut() {
            while count < limit && parcel.remaining() > 0 && write(parcel) {
                count += 1;
            }
            if count == limit {
                break;
            }
            // Cut to the end, or not fit to be cut at all.
            if let Some(parcel) = reader.parcels.pop_front() {
                reader.used.push(parcel.into_buffer());
            }
        }
        self.unread.store(reader.parcels.iter().any(|parcel| parcel.remaining() > 0), Ordering::Release);
        if count == 0 && ended { None } else { Some(count) }
    }

    /// Waits up to `timeout` until there is something to read, or the stack has ended.
    pub(super) fn wait_for_packets(&self, timeout: Duration) {
        // Whoever notifies takes the flag down, and a waiter that finds itself hushed goes on waiting: so it is put up again.
        let idle = |outbox: &mut Outbox| {
            outbox.awaited = (outbox.hushed || !self.is_readable(outbox)) && !outbox.finished;
            outbox.awaited
        };
        let waited = self.outbox_ready.wait_timeout_while(lock(&self.outbox), timeout, idle);
        waited.unwrap_or_else(PoisonError::into_inner).0.awaited = false;
    }

    /// Leaves those who wait for packets alone, or wakes them for what there is.
    pub(super) fn hush(&self, hushed: bool) {
        let mut outbox = lock(&self.outbox);
        outbox.hushed = hushed;
        let wake = !hushed && self.is_readable(&outbox) && std::mem::take(&mut outbox.awaited);
        drop(outbox);
        if wake {
            self.outbox_ready.notify_one();
        }
    }

    fn is_readable(&self, outbox: &Outbox) -> bool {
        !outbox.parcels.is_empty() || self.unread.load(Ordering::Acquire)
    }

    /// Moves parcels from the outbox to the reader until that has `limit` packets, and waits if it has none. Says whether
    /// the stack has ended.
    fn fetch(&self, reader: &mut Reader, limit: usize, timeout: Duration) -> bool {
        let mut packets: usize = reader.parcels.iter().map(Cutting::remaining).sum();
        let mut outbox = lock(&self.outbox);
        outbox.used.append(&mut reader.used);
        // Without time to wait nothing is touched that another thread's waiting rests on.
        if packets == 0 && outbox.parcels.is_empty() && !outbox.finished && !timeout.is_zero() {
            outbox.awaited = true;
            outbox = self
                .outbox_ready
                .wait_timeout_while(outbox, timeout, |outbox| outbox.parcels.is_empty() && !outbox.finished)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            outbox.awaited = false;
        }
        while packets < limit
            && let Some(parcel) = outbox.parcels.pop_front()
        {
            packets += parcel.count();
            outbox.packets -= parcel.count();
            reader.parcels.push_back(parcel.cut());
        }
        self.outbox_len.store(outbox.packets, Ordering::Release);
        let refill = outbox.starved && outbox.packets <= self.outbox_capacity / 2;
        if refill {
            outbox.starved = false;
        }
        let ended = outbox.finished;
        drop(outbox);
        if refill {
            self.kick();
        }
        ended
    }

    // --- the thread ----------------------------------------------------------------------------------------------

    fn run(self: &Arc<Self>, requests: &mpsc::Sender<Request>) {
        let mut deadline = None;
        loop {
            self.wait(deadline);
            let mut stack = lock(&self.stack);
            let started = now();
            if self.is_closed() {
                stack.set_transmit_limit(usize::MAX);
                stack.close(started);
                self.finish(&mut stack);
                let woken = stack.take_woken();
                drop(stack);
                woken.into_iter().for_each(Waker::wake);
                return;
            }
            stack.set_transmit_limit(self.room());
            stack.handle_timeout(started);
            let awaited = self.send_out(&mut stack, started);
            let woken = stack.take_woken();
            let dropped = self.offer(&mut stack, requests);
            deadline = stack.poll_timeout();
            *lock(&self.wakes_at) = deadline;
            drop(stack);
            woken.into_iter().for_each(Waker::wake);
            if awaited {
                self.pass_on();
            }
            // A request that nobody takes reaches for the stack when it is dropped.
            drop(dropped);
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self, deadline: Option<Instant>) {
        let mut signals = lock(&self.signals);
        while !signals.kicked && !self.is_closed() {
            signals = match deadline {
                None => self.signalled.wait(signals).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let left = at.saturating_duration_since(now());
                    if left.is_zero() {
                        break;
                    }
                    self.signalled.wait_timeout(signals, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        signals.kicked = false;
    }

    /// Passes the stack's events on; gives back what nobody takes.
    fn offer(self: &Arc<Self>, stack: &mut Stack, requests: &mpsc::Sender<Request>) -> Vec<Request> {
        let mut refused = Vec::new();
        while let Some(event) = stack.poll_event() {
            let request = match event {
                Event::TcpRequest(flow) => Request::Tcp(TcpRequest { flow, shared: Some(Arc::clone(self)) }),
                Event::UdpDatagram { flow, payload, packet } => {
                    Request::Udp(UdpRequest { flow, payload, packet, shared: Arc::clone(self) })
                }
                Event::Echo { packet, message } => {
                    Request::Ping(PingRequest { packet, message, shared: Arc::clone(self) })
                }
            };
            if let Err(error) = requests.try_send(request) {
                refused.push(error.into_inner());
            }
        }
        refused
    }

    fn finish(&self, stack: &mut Stack) {
        let mut outbox = lock(&self.outbox);
        while let Some(parcel) = stack.poll_transmit() {
            outbox.packets += parcel.count();
            outbox.parcels.push_back(parcel);
        }
    }
}

/// Ends the device side with the thread, however that ends: nobody waits for a stack that has panicked.
struct Ending<'a>(&'a Arc<Shared>);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Release);
        lock(&self.0.outbox).finished = true;
        self.0.outbox_ready.notify_all();
        let ending = std::mem::take(&mut lock(&self.0.signals).ending);
        for waker in ending {
            waker.wake();
        }
    }
}

/// A poisoned lock means that a thread has panicked; the stack's state is still as good as any packet loss.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(clippy::disallowed_methods, reason = "the driver's clock")]
fn now() -> Instant {
    Instant::now()
}
