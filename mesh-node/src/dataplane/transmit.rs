//! The TX thread: packets from the device, sealed and sent.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use mesh_nat::Path;
use mesh_nat::classify::GENEVE_LEN;
use mesh_nat::relay::geneve::{self, Content};
use mesh_noise::wireguard::{HEADER_LEN, Session, padded_len};
use mesh_tun::batch::Batch;
use mesh_tun::device::Waits;
use mesh_tun::filter::Filter;
use mesh_tun::linux::udp::{Outgoing, UdpBatch};
use mesh_tun::mtu;
use mesh_tun::packet::{self, Packet, Transport};

use super::fit::Fit;
use super::peer::PeerCell;
use super::workers::{Handover, Outbound, Run};
use super::{BATCH, DropReason, IDLE, Notice, NumberedSocket, Shared};

/// Batches that a borrower sends before it gives the transmitter back.
const LENT_STEPS: usize = 4;

/// Carries packets from a queue of the device until it is closed.
pub(super) fn run(shared: &Shared, queue: usize) {
    shared.transmitter(queue).handover = Handover::new(shared);
    let waits = shared.queues[queue].waits();
    while !shared.is_stopped() {
        // A device that lets us wait apart is read by whoever has the transmitter: see `Lent`.
        let patience = if waits.is_some() { Duration::ZERO } else { IDLE };
        let read = {
            let mut transmitter = shared.transmitter(queue);
            let read = transmitter.step(shared, patience);
            transmitter.handover.note(shared, *read.as_ref().unwrap_or(&0));
            read
        };
        let outcome = match (read, waits) {
            (Ok(0), Some(device)) => device.wait(IDLE),
            (read, _) => read.map(drop),
        };
        if let Err(error) = outcome {
            if error.kind() != io::ErrorKind::BrokenPipe {
                shared.notify(Notice::Failed { what: format!("device: {error}") });
            }
            return;
        }
    }
}

/// The transmitter in the hands of a thread that is about to write to the device, while the TX thread is left asleep.
///
/// Most of what is written is answered at once, by the host's network stack within the very call. The thread that wrote
/// reads the answers and sends them, which saves waking the TX thread for them: the longest part of a ping's way.
pub(super) struct Lent<'a> {
    shared: &'a Shared,
    device: &'a dyn Waits,
    transmitter: MutexGuard<'a, Transmitter>,
}

impl<'a> Lent<'a> {
    /// None if the TX thread is at work or has help, or the device knows no waiting. With several queues nobody knows
    /// which one the answer will be in.
    pub(super) fn take(shared: &'a Shared) -> Option<Self> {
        let ([queue], [transmitter]) = (&*shared.queues, &*shared.transmitters) else { return None };
        let device = queue.waits()?;
        let transmitter = transmitter.try_lock().ok().filter(|transmitter| !transmitter.handover.is_on())?;
        device.hush(true);
        Some(Self { shared, device, transmitter })
    }

    /// Sends what can be read by now, a few batches at most; the TX thread goes on with the rest.
    pub(super) fn step_and_return(mut self) {
        for _ in 0..LENT_STEPS {
            // A device that has failed says so to the TX thread too.
            match self.transmitter.step(self.shared, Duration::ZERO) {
                Ok(BATCH..) => {}
                Ok(_) | Err(_) => break,
            }
        }
        let (device, transmitter) = (self.device, self.transmitter);
        drop(transmitter);
        device.hush(false);
    }
}

/// Sends what can be read by now, if this thread may; says whether it has.
pub(super) fn read_now(shared: &Shared) -> bool {
    let lent = if shared.is_stopped() { None } else { Lent::take(shared) };
    lent.map(Lent::step_and_return).is_some()
}

/// Sends what is parked for `peer` on `session`, and from then on everything.
///
/// The queue stays locked meanwhile: a packet that the TX thread wants to park waits, and then finds the session.
pub(super) fn release(shared: &Shared, peer: &Arc<PeerCell>, session: &Arc<Session>) {
    let mut parked = peer.parked();
    let mut transmitter = Transmitter::new(0, parked.drain());
    let count = transmitter.batch.len();
    if count > 0 {
        if peer.limit() != usize::MAX {
            for index in 0..count {
                mtu::clamp_mss(transmitter.batch.packet_mut(index), peer.limit());
            }
        }
        if let Some(first) = session.reserve(count as u64) {
            let sockets = shared.sockets.load();
            transmitter.send_run(shared, &sockets, (peer, session, first), 0..count, shared.now_ms());
            transmitter.dispatch(shared, &sockets).flush();
        } else {
            shared.drops.add(DropReason::NoSession, count);
        }
    }
    peer.set_session(Arc::clone(session), &mut parked);
}

/// Source and destination of a packet.
fn ends(batch: &Batch, index: usize) -> (Option<IpAddr>, Option<IpAddr>) {
    let bytes = batch.packet(index);
    (packet::source(bytes), packet::destination(bytes))
}

/// A batch on its way from the device to sockets and relay.
pub(super) struct Transmitter {
    /// Which queue of the device is read, and which socket of an address is sent by.
    queue: usize,
    batch: Batch,
    /// By position among the sockets.
    outgoing: Vec<Vec<Outgoing>>,
    fit: Fit,
    handover: Handover<Outbound>,
    /// What of the batch is to be handed over.
    runs: Vec<Run>,
}

impl Transmitter {
    pub(super) fn new(queue: usize, batch: Batch) -> Self {
        let (fit, handover) = (Fit::default(), Handover::never());
        Self { queue, batch, outgoing: Vec::new(), fit, handover, runs: Vec::new() }
    }

    /// One batch, waiting up to `patience` for it. Returns how many packets that were.
    fn step(&mut self, shared: &Shared, patience: Duration) -> io::Result<usize> {
        self.batch.clear();
        let count = shared.queues[self.queue].read_batch(&mut self.batch, patience)?;
        if count == 0 {
            return Ok(0);
        }
        let sockets = shared.sockets.load();
        let now_ms = shared.now_ms();
        let routes = shared.routes.load();
        let filter = shared.filter.load();
        let route = |batch: &Batch, index: usize| {
            let (Some(source), Some(destination)) = ends(batch, index) else { return Err(DropReason::Malformed) };
            let peer = routes.lookup(destination).ok_or(DropReason::NoPeer)?;
            if filter.owns(source) { Ok(peer) } else { Err(DropReason::NotOurs) }
        };
        let mut start = 0;
        while start < count {
            if self.batch.packet(start).is_empty() {
                // The device has kept this one for itself.
                start += 1;
                continue;
            }
            let peer = match route(&self.batch, start) {
                Ok(peer) => peer,
                Err(reason) => {
                    shared.drops.add(reason, 1);
                    start += 1;
                    continue;
                }
            };
            // Neighbours for one peer share a session, a path and the counters' increments; most are of one flow.
            let first = ends(&self.batch, start);
            let same = |index| {
                ends(&self.batch, index) == first
                    || matches!(route(&self.batch, index), Ok(next) if Arc::ptr_eq(next, peer))
            };
            let mut end = (start + 1..count).find(|index| !same(*index)).unwrap_or(count);
            let limit = peer.limit();
            if limit != usize::MAX {
                end = self.fit.limit(shared, &mut self.batch, start..end, limit, now_ms);
                if end == start {
                    continue;
                }
            }
            self.note_flows(&filter, start..end, now_ms);
            if let Some(masquerade) = peer.masquerade() {
                for index in start..end {
                    masquerade.outgoing(self.batch.packet_mut(index));
                }
            }
            if let Some((session, first)) = peer.reserve(end - start).or_else(|| self.park(shared, peer, start..end)) {
                if self.handover.is_on() {
                    self.runs.push(Run { peer: Arc::clone(peer), session, first, range: start..end, bytes: 0 });
                } else {
                    self.send_run(shared, &sockets, (peer, &session, first), start..end, now_ms);
                }
            }
            start = end;
        }
        self.hand_over(shared);
        self.dispatch(shared, &sockets).flush();
        Ok(count)
    }

    /// Lets answers to these packets in.
    fn note_flows(&self, filter: &Filter, run: Range<usize>, now_ms: u64) {
        for index in run {
            if let Ok(packet) = Packet::parse(self.batch.packet(index))
                && matches!(packet.transport, Transport::Udp { .. } | Transport::Sctp { .. })
            {
                filter.note_outbound(&packet, Duration::from_millis(now_ms));
            }
        }
    }

    /// Lets a worker seal and send the batch, if there is anything in it.
    fn hand_over(&mut self, shared: &Shared) {
        if !self.runs.is_empty() {
            let queue = self.queue;
            let mut job = self.handover.job(|| Outbound::new(shared, queue));
            std::mem::swap(&mut job.batch, &mut self.batch);
            std::mem::swap(&mut job.runs, &mut self.runs);
            self.handover.submit(shared, job);
        }
    }

    /// Keeps packets until there is a session, unless there is one by now.
    fn park(&self, shared: &Shared, peer: &Arc<PeerCell>, run: Range<usize>) -> Option<(Arc<Session>, u64)> {
        // What is parked leaves on its own, and must not pass what was read before.
        self.handover.settle(shared);
        let mut parked = peer.parked();
        if let Some(reserved) = peer.reserve(run.len()) {
            return Some(reserved);
        }
        let pushed_out = run.filter(|index| parked.push(self.batch.packet(*index))).count();
        shared.drops.add(DropReason::NoSession, pushed_out);
        parked.tell(|| shared.notify(Notice::WantSession { peer: peer.key() }));
        None
    }

    /// Seals the packets of a run and hands them to the peer's path; direct ones leave with [`Dispatch::flush`].
    fn send_run(
        &mut self,
        shared: &Shared,
        sockets: &[NumberedSocket],
        (peer, session, first): (&PeerCell, &Session, u64),
        run: Range<usize>,
        now_ms: u64,
    ) {
        let limit = shared.device.mtu().min(peer.limit());
        let bytes = seal_run(&mut self.batch, session, first, run.clone(), limit);
        self.dispatch(shared, sockets).forward_run(peer, session, run, bytes, now_ms);
    }

    fn dispatch<'a>(&'a mut self, shared: &'a Shared, sockets: &'a [NumberedSocket]) -> Dispatch<'a> {
        Dispatch::new(shared, self.queue, &mut self.batch, sockets, &mut self.outgoing)
    }
}

/// Seals packets in place, with counters from `first` on and no padding beyond `limit`, and returns the length of the
/// datagrams.
pub(super) fn seal_run(batch: &mut Batch, session: &Session, first: u64, run: Range<usize>, limit: usize) -> usize {
    let mut bytes = 0;
    for (index, counter) in run.zip(first..) {
        let len = batch.packet(index).len();
        let padded = padded_len(len, limit);
        let sealed = session.seal_padded(counter, batch.with_room(index, HEADER_LEN), len, padded);
        batch.grow(index, HEADER_LEN, sealed);
        bytes += sealed;
    }
    bytes
}

/// The way out for a batch that has been sealed.
pub(super) struct Dispatch<'a> {
    shared: &'a Shared,
    /// Which socket of an address is sent by.
    queue: usize,
    batch: &'a mut Batch,
    sockets: &'a [NumberedSocket],
    /// By position in `sockets`.
    outgoing: &'a mut [Vec<Outgoing>],
}

impl<'a> Dispatch<'a> {
    /// The lists in `outgoing` are empty, and kept from batch to batch for their memory alone.
    pub(super) fn new(
        shared: &'a Shared,
        queue: usize,
        batch: &'a mut Batch,
        sockets: &'a [NumberedSocket],
        outgoing: &'a mut Vec<Vec<Outgoing>>,
    ) -> Self {
        outgoing.resize_with(sockets.len(), Vec::new);
        Self { shared, queue, batch, sockets, outgoing }
    }

    /// Hands sealed packets to the peer's path; direct ones leave with [`Dispatch::flush`].
    pub(super) fn forward_run(
        &mut self,
        peer: &PeerCell,
        session: &Session,
        run: Range<usize>,
        bytes: usize,
        now_ms: u64,
    ) {
        let count = run.len();
        if let Some(route) = peer.route() {
            if let Some(backup) = route.backup {
                // In doubt: one of the two will arrive. The relay copies, and first: a peer relay's path puts a header on.
                self.carry(peer, &backup, run.clone(), bytes);
            }
            self.carry(peer, &route.path, run, bytes);
        } else {
            self.shared.drops.add(DropReason::NoPath, count);
            return;
        }
        // Noted even if dropped here: to the timers it makes no difference where a datagram gets lost.
        if session.activity().note_sent(now_ms, count as u64, bytes as u64) {
            self.shared.notify(Notice::PeerActive { peer: peer.key() });
        }
    }

    fn carry(&mut self, peer: &PeerCell, path: &Path, run: Range<usize>, bytes: usize) {
        let drops = &self.shared.drops;
        let count = run.len();
        let sent = match *path {
            Path::Direct { socket, remote } => match self.sockets.iter().position(|(id, _)| *id == socket) {
                Some(at) => {
                    self.outgoing[at].extend(run.map(|index| Outgoing { to: remote, index }));
                    count
                }
                None => {
                    drops.add(DropReason::NoSocket, count);
                    0
                }
            },
            Path::Relay { region } => {
                let batch = &*self.batch;
                let mut datagrams = run.map(|index| batch.packet(index));
                let taken = self.shared.relay.send(region, peer.key(), &mut datagrams).min(count);
                drops.add(DropReason::RelayFull, count - taken);
                taken
            }
            Path::PeerRelay { server, vni } => match position_of_family(self.sockets, server) {
                Some(at) => {
                    let header = geneve::header(vni, Content::WireGuard);
                    for index in run {
                        let len = self.batch.packet(index).len();
                        self.batch.with_room(index, GENEVE_LEN)[..GENEVE_LEN].copy_from_slice(&header);
                        self.batch.grow(index, GENEVE_LEN, len + GENEVE_LEN);
                        self.outgoing[at].push(Outgoing { to: server, index });
                    }
                    count
                }
                None => {
                    drops.add(DropReason::NoSocket, count);
                    0
                }
            },
        };
        if sent > 0 {
            peer.note_tx(path, sent, bytes);
        }
    }

    /// Sends what has gathered for the sockets.
    pub(super) fn flush(&mut self) {
        for ((_, socket), outgoing) in self.sockets.iter().zip(self.outgoing.iter_mut()) {
            if !outgoing.is_empty() {
                self.shared.count_sent(socket.member(self.queue), self.batch, outgoing);
                outgoing.clear();
            }
        }
    }
}

/// The first socket that reaches `remote`, by position.
pub(super) fn position_of_family(sockets: &[NumberedSocket], remote: SocketAddr) -> Option<usize> {
    sockets.iter().position(|(_, socket)| socket.local_addr().is_ipv4() == remote.is_ipv4())
}

impl Shared {
    fn count_sent(&self, socket: &UdpBatch, batch: &Batch, outgoing: &[Outgoing]) {
        let sent = socket.send_batch(batch, outgoing);
        self.drops.add(DropReason::SendFailed, sent.failed);
        self.drops.add(DropReason::SendBufferFull, sent.dropped);
    }
}
