//! The RX threads: datagrams from a socket or from relays, opened, judged and written to the device.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use bytes::Bytes;
use mesh_derp::map::RegionId;
use mesh_nat::classify::GENEVE_LEN;
use mesh_nat::{Class, Path, SocketId, Vni, classify};
use mesh_noise::key::NodePublic;
use mesh_noise::wireguard::HEADER_LEN;
use mesh_noise::wireguard::message::{self, MessageKind};
use mesh_tun::batch::Batch;
use mesh_tun::filter::Verdict;
use mesh_tun::linux::udp::UdpBatch;
use mesh_tun::mtu;
use mesh_tun::packet::{self, Packet, Protocol};

use super::peer::PeerCell;
use super::sessions::SessionCell;
use super::workers::{Handover, Inbound};
use super::{BATCH, DropReason, IDLE, Injected, Notice, Shared, transmit};

/// Longest datagram that a relay hands over: what fits a DERP frame is far above any MTU.
const RELAYED_SIZE: usize = 2048;
/// Between two notices about sessions that are not known.
const UNKNOWN_INTERVAL_MS: u64 = 200;

/// Carries datagrams from `socket`, which is the one with this number on its address, until it is closed.
pub(super) fn run_socket(shared: &Shared, id: SocketId, socket: &UdpBatch, number: usize) {
    let mut room = socket.recv_room(BATCH);
    let mut opener = Opener::new(shared, number);
    let mut handover = Handover::new(shared);
    let mut origins = Vec::with_capacity(BATCH);
    while !shared.is_stopped() {
        let truncated = room.truncated();
        match socket.recv_batch(&mut room, IDLE) {
            Ok(0) => {
                handover.note(shared, 0);
                continue;
            }
            Ok(count) => handover.note(shared, count),
            Err(error) => {
                if error.kind() != io::ErrorKind::BrokenPipe {
                    shared.notify(Notice::Failed { what: format!("socket {}: {error}", socket.local_addr()) });
                }
                return;
            }
        }
        if room.truncated() != truncated {
            shared.drops.add(DropReason::Oversized, usize::try_from(room.truncated() - truncated).unwrap_or(1));
        }
        origins.clear();
        for index in 0..room.len() {
            let remote = room.source(index);
            let path = match behind_peer_relay(room.batch_mut(), index) {
                Some(vni) => Path::PeerRelay { server: remote, vni },
                None => Path::Direct { socket: id, remote },
            };
            origins.push(Origin { path, source: None });
        }
        if handover.is_on() {
            let mut job = handover.job(|| Inbound::new(number, socket.recv_room(BATCH)));
            std::mem::swap(&mut job.room, &mut room);
            std::mem::swap(&mut job.origins, &mut origins);
            handover.submit(shared, job);
        } else {
            opener.take(room.batch_mut(), &origins);
        }
    }
}

/// Carries datagrams from relays until told to stop.
pub(super) fn run_relay(shared: &Shared, relayed: &Receiver<Injected>) {
    let mut batch = Batch::new(BATCH, RELAYED_SIZE);
    let mut opener = Opener::new(shared, 0);
    let mut origins = Vec::with_capacity(BATCH);
    // The sender lives in `shared`, so this ends by message or by flag.
    while let Ok(Some(first)) = relayed.recv() {
        if shared.is_stopped() {
            return;
        }
        batch.clear();
        origins.clear();
        let mut push = |(region, source, datagram): (RegionId, NodePublic, Bytes)| {
            if batch.push(&datagram) {
                origins.push(Origin { path: Path::Relay { region }, source: Some(source) });
            } else {
                shared.drops.add(DropReason::Oversized, 1);
            }
        };
        push(first);
        for _ in 1..BATCH {
            match relayed.try_recv() {
                Ok(Some(next)) => push(next),
                Ok(None) => return,
                Err(_) => break,
            }
        }
        opener.take(&mut batch, &origins);
    }
}

/// Takes the header of a peer relay off WireGuard's messages, and returns the number in it.
fn behind_peer_relay(batch: &mut Batch, index: usize) -> Option<Vni> {
    let datagram = batch.packet(index);
    // Bytes that are zero in every message of WireGuard's own: most datagrams are seen no closer than this.
    if datagram.get(2..4) != Some(&[0x7a, 0x12]) {
        return None;
    }
    let Class::RelayedWireGuard { vni } = classify(datagram) else { return None };
    let len = datagram.len();
    batch.narrow(index, GENEVE_LEN..len);
    Some(vni)
}

/// How a datagram came.
#[derive(Clone, Copy)]
pub(super) struct Origin {
    path: Path,
    source: Option<NodePublic>,
}

/// A datagram that opened, as numbers into the batch and the sessions of it.
pub(super) struct Opened {
    index: usize,
    session: usize,
    counter: u64,
    datagram_len: usize,
    fresh: bool,
}

/// Opens batches. The lists are kept from batch to batch for their memory alone.
pub(super) struct Opener<'a> {
    pub(super) shared: &'a Shared,
    /// Decides which queue of the device is written to.
    pub(super) number: usize,
    pub(super) sessions: Vec<Arc<SessionCell>>,
    pub(super) opened: Vec<Opened>,
}

impl<'a> Opener<'a> {
    fn new(shared: &'a Shared, number: usize) -> Self {
        Self { shared, number, sessions: Vec::with_capacity(BATCH), opened: Vec::with_capacity(BATCH) }
    }

    /// Opens the datagrams of `batch`, which came from `origins`, and writes what may pass to the device.
    fn take(&mut self, batch: &mut Batch, origins: &[Origin]) {
        self.open_all(batch, origins);
        self.pass(batch, origins);
    }

    /// The first part, which may be done by any thread: opens all, and takes out what is not transport data.
    pub(super) fn open_all(&mut self, batch: &mut Batch, origins: &[Origin]) {
        for (index, origin) in origins.iter().enumerate() {
            self.open(batch, index, origin);
        }
    }

    /// The second part, batch after batch: writes what may pass to the device.
    pub(super) fn pass(&mut self, batch: &mut Batch, origins: &[Origin]) {
        if !self.opened.is_empty() {
            self.refuse_replays();
            let now_ms = self.shared.now_ms();
            self.note_activity(origins, now_ms);
            let passed = self.judge(batch, now_ms);
            let lent = if passed > 0 { transmit::Lent::take(self.shared) } else { None };
            match self.shared.queue_of(self.number).write_batch(batch) {
                Ok(taken) => self.shared.drops.add(DropReason::DeviceRefused, passed.saturating_sub(taken)),
                Err(_) => self.shared.drops.add(DropReason::DeviceRefused, passed),
            }
            if let Some(lent) = lent {
                lent.step_and_return();
            }
        }
        self.opened.clear();
        // Not kept over an idle time: a session's keys are wiped when the last user lets go.
        self.sessions.clear();
    }

    /// Opens one datagram in place; everything else leaves the batch.
    fn open(&mut self, batch: &mut Batch, index: usize, origin: &Origin) {
        let datagram = batch.packet_mut(index);
        let datagram_len = datagram.len();
        if datagram_len == 0 {
            return;
        }
        let outcome = match message::kind(datagram) {
            Some(MessageKind::TransportData { receiver }) => match self.session(receiver) {
                Some(session) => match self.sessions[session].session.open(datagram) {
                    Ok(opened) => Ok((session, opened.counter, opened.packet.len())),
                    Err(_) => Err(DropReason::NotAuthentic),
                },
                None => {
                    if let Some(peer) = origin.source {
                        self.tell_unknown_session(peer);
                    }
                    Err(DropReason::UnknownSession)
                }
            },
            Some(MessageKind::Initiation | MessageKind::Response | MessageKind::CookieReply) | None => {
                self.forward(datagram, origin);
                batch.discard(index);
                return;
            }
        };
        match outcome {
            Ok((session, counter, len)) => {
                batch.narrow(index, HEADER_LEN..HEADER_LEN + len);
                self.opened.push(Opened { index, session, counter, datagram_len, fresh: false });
            }
            Err(reason) => {
                self.shared.drops.add(reason, 1);
                batch.discard(index);
            }
        }
    }

    /// Which of this batch's sessions has the receiver index.
    fn session(&mut self, receiver: u32) -> Option<usize> {
        let known = self.sessions.iter().rposition(|cell| cell.session.receiver_index() == receiver);
        known.or_else(|| {
            self.sessions.push(self.shared.sessions.get(receiver)?);
            Some(self.sessions.len() - 1)
        })
    }

    /// Somebody sends on a session that is gone, and will until it hears of that: one notice now and then is enough.
    fn tell_unknown_session(&self, peer: NodePublic) {
        let now_ms = self.shared.now_ms();
        let told = self.shared.unknown_told.load(Ordering::Relaxed);
        if told == 0 || now_ms.saturating_sub(told) >= UNKNOWN_INTERVAL_MS {
            self.shared.unknown_told.store(now_ms, Ordering::Relaxed);
            self.shared.notify(Notice::SessionUnknown { peer });
        }
    }

    /// Hands the engine what is not transport data, unless nobody would know what to do with it.
    fn forward(&self, datagram: &[u8], origin: &Origin) {
        if classify(datagram) == Class::WireGuard && message::kind(datagram).is_none() {
            self.shared.drops.add(DropReason::NotAuthentic, 1);
            return;
        }
        let Origin { path, source } = *origin;
        self.shared.notify(Notice::Datagram { path, source, datagram: Bytes::copy_from_slice(datagram) });
    }

    /// Shows the counters to the replay windows, each locked once.
    fn refuse_replays(&mut self) {
        for (session, cell) in self.sessions.iter().enumerate() {
            let mut replay = cell.session.replay();
            for opened in self.opened.iter_mut().filter(|opened| opened.session == session) {
                opened.fresh = replay.accept(opened.counter);
            }
        }
    }

    /// Writes the words that the timers read, once a session.
    fn note_activity(&self, origins: &[Origin], now_ms: u64) {
        for (session, cell) in self.sessions.iter().enumerate() {
            let (mut packets, mut bytes, mut last) = (0_usize, 0_usize, None);
            let (mut run, mut run_bytes) = (0_usize, 0_usize);
            for opened in self.opened.iter().filter(|opened| opened.session == session && opened.fresh) {
                let path = origins[opened.index].path;
                if last.is_some_and(|last: Path| last.is_relay() != path.is_relay()) {
                    last.inspect(|last| cell.peer.note_rx(last, run, run_bytes));
                    (run, run_bytes) = (0, 0);
                }
                last = Some(path);
                // The shortest datagram is a keepalive: header and tag around nothing.
                packets += usize::from(opened.datagram_len > HEADER_LEN + mesh_noise::wireguard::TAG_LEN);
                bytes += opened.datagram_len;
                (run, run_bytes) = (run + 1, run_bytes + opened.datagram_len);
            }
            let Some(last) = last else { continue };
            cell.peer.note_rx(&last, run, run_bytes);
            let peer = cell.peer.key();
            if cell.is_first_use() {
                // The answer to this very datagram belongs on this session: the peer may have lost the one before.
                if cell.session.is_unconfirmed() {
                    transmit::release(self.shared, &cell.peer, &cell.session);
                }
                let receiver_index = cell.session.receiver_index();
                if !self.shared.notify(Notice::SessionUsed { receiver_index }) {
                    cell.unconfirm();
                }
            }
            if cell.session.activity().note_received(now_ms, packets as u64, bytes as u64) {
                self.shared.notify(Notice::PeerActive { peer });
            }
            if cell.peer.note_seen(last, now_ms) {
                self.shared.notify(Notice::PathSeen { peer, path: last });
            }
        }
    }

    /// Leaves in the batch what the device shall get, and returns how many packets that is.
    fn judge(&self, batch: &mut Batch, now_ms: u64) -> usize {
        let now = Duration::from_millis(now_ms);
        let routes = self.shared.routes.load();
        let filter = self.shared.filter.load();
        let mut passed = 0;
        // Neighbours mostly come from one address.
        let mut last: Option<(IpAddr, Option<&Arc<PeerCell>>)> = None;
        for opened in &self.opened {
            let index = opened.index;
            let peer = &self.sessions[opened.session].peer;
            if let Some(masquerade) = peer.masquerade() {
                masquerade.incoming(batch.packet_mut(index));
            }
            let bytes = batch.packet(index);
            let outcome = if !opened.fresh {
                Err(Some(DropReason::Replayed))
            } else if bytes.is_empty() {
                Err(None)
            } else {
                Packet::parse(bytes).map_err(|_| Some(DropReason::BadPacket)).and_then(|packet| {
                    let (_, owner) = match last {
                        Some(known) if known.0 == packet.source => known,
                        _ => *last.insert((packet.source, routes.lookup(packet.source))),
                    };
                    if !owner.is_some_and(|owner| Arc::ptr_eq(owner, peer)) {
                        return Err(Some(DropReason::ForeignSource));
                    }
                    match filter.inbound(&packet, peer.standing(), now) {
                        Verdict::Accept if packet.protocol == Protocol::TSMP => {
                            let packet = Bytes::copy_from_slice(bytes);
                            self.shared.notify(Notice::Tsmp { peer: peer.key(), packet });
                            Err(None)
                        }
                        // The padding ends where the IP header says.
                        Verdict::Accept => Ok(packet::claimed_len(bytes).unwrap_or(bytes.len())),
                        Verdict::Drop(reason) => Err(Some(reason.into())),
                    }
                })
            };
            match outcome {
                Ok(len) => {
                    batch.narrow(index, 0..len);
                    if peer.limit() != usize::MAX {
                        // What we answer must fit as well.
                        mtu::clamp_mss(batch.packet_mut(index), peer.limit());
                    }
                    passed += 1;
                }
                Err(reason) => {
                    if let Some(reason) = reason {
                        self.shared.drops.add(reason, 1);
                    }
                    batch.discard(index);
                }
            }
        }
        passed
    }
}
