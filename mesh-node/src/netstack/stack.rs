//! The stack's core: packets in, packets out, sockets in between; no thread, no clock.
//!
//! Every TCP connection lives in a socket set of its own, found by its [`Flow`]. smoltcp offers each packet to all the
//! sockets of the set it is given, so a set of one makes the cost of a packet independent of how many connections are
//! idle; and only connections that were touched, or whose timer is due, are asked whether they have something to send.
//!
//! ```text
//!  handle_packet ─► parse ─► flow known ──► that connection's socket ─┐
//!                      │ SYN, listener ───► new socket ───────────────┤
//!                      │ SYN, none ───────► parked, Event::TcpRequest │   admit / refuse answers it
//!                      │ UDP, bound ──────► that socket's queue       │
//!                      │ UDP, none ───────► Event::UdpDatagram        │
//!                      └ anything else ───► smoltcp: echo, RST, …     │
//!  poll_transmit ◄─ flush: round robin over touched connections ◄─────┘
//! ```

mod ports;
mod tcp;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use smoltcp::iface::{Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::wire::{HardwareAddress, IpCidr};

use ipnet::IpNet;
use mesh_tun::batch::Batch;
use mesh_tun::offload::Coalescer;
use ports::{Listener, Udp};

use super::packet::{self, Ack, Checksum, Flow, Parsed, Sent};
use super::parcel::{LONGEST, Parcel};
use super::phy::Phy;
use super::recovery::{DUPLICATES, Recovery};
use super::window::Window;
use super::{Bind, Config, is_service_address};

/// Packets one connection may send before the next one has its turn.
const BURST: usize = 16;
/// Packets received for one connection before it may answer.
const SEGMENTS_PER_ACK: usize = 2;
/// IPv4 and TCP headers.
const HEADERS: usize = 40;
/// Full packets that one acknowledgement may count for when the congestion window grows (as RFC 3465 §2.3, which is about
/// a peer that acknowledges less often than every second one; ours does that for what it has joined).
const MOST_ACKED: usize = 64;
/// Inbound connections whose handshake has not finished, at most; further SYNs are dropped and come again.
const MAX_HALF_OPEN: usize = 256;
/// How long an inbound handshake may take.
const HALF_OPEN_TIME: Duration = Duration::from_secs(30);
/// SYNs that wait for an answer to [`Event::TcpRequest`], at most.
const MAX_PARKED: usize = 256;
/// How long a closed connection may take to deliver what is left; a silent peer is given up sooner.
const LINGER_TIME: Duration = Duration::from_secs(600);
/// How long a connection that we have closed waits for the peer to close, too.
const FIN_WAIT_TIME: Duration = Duration::from_secs(60);
/// Connections in TIME-WAIT, at most: the oldest go first. They hold their buffers.
const MAX_TIME_WAIT: usize = 32;
/// smoltcp forgets unread data when TIME-WAIT ends after 10 s, so its timer is stopped before for streams still read.
const TIME_WAIT_SERVICE: Duration = Duration::from_secs(5);
/// Events that wait to be taken, at most; then datagrams without a socket are dropped and SYNs come again.
const MAX_EVENTS: usize = 512;
/// Dynamic ports, RFC 6335 §6.
const DYNAMIC_PORTS: std::ops::RangeInclusive<u16> = 49152..=65535;
/// Shortest time between two looks at a connection whose timer asks for one at once.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

/// Names one connection for its lifetime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ConnId(u64);

/// Names one UDP socket for its lifetime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct UdpId(u64);

/// What somebody outside has to decide.
#[derive(Debug)]
pub(super) enum Event {
    /// A SYN for a port without listener waits for [`Stack::admit`], [`Stack::refuse_tcp`] or [`Stack::forget`].
    TcpRequest(Flow),
    /// A datagram for a port without socket; `packet` is the whole packet, for [`Stack::refuse_packet`].
    UdpDatagram { flow: Flow, payload: std::ops::Range<usize>, packet: Vec<u8> },
    /// An echo request for an address of a subnet, and where in the packet its message stands.
    Echo { packet: Vec<u8>, message: std::ops::Range<usize> },
}

/// What the stack dropped, and why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Drops {
    /// Not IP, a fragment, or damaged.
    pub malformed: u64,
    /// Not for one of our addresses or subnets.
    pub misaddressed: u64,
    /// A SYN beyond the bounds on connections, handshakes or parked requests.
    pub connections: u64,
    /// A datagram for a full socket queue, or with nobody to take it; an echo request likewise.
    pub datagrams: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Dialed,
    Listener(Bind),
    Admitted,
}

struct Conn {
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    flow: Flow,
    origin: Origin,
    /// A stream, or a listener's queue, still holds this connection.
    attached: bool,
    /// The handshake is done.
    established: bool,
    /// Our side was shut down.
    shut: bool,
    /// Waits in `ready`.
    queued: bool,
    /// When to look again; stands in `deadlines`.
    deadline: Option<Instant>,
    /// When to abort.
    expires: Option<Instant>,
    time_wait_since: Option<Instant>,
    recovery: Recovery,
    /// What we offer the peer, and what we take from the program.
    receives: Window,
    sends: Window,
    /// The peer scales windows, ours by this.
    scale: Option<u32>,
    /// Bytes that the buffers span.
    buffers: usize,
    /// Bytes read and written by the program.
    moved: usize,
    /// Packets received since it was asked what it has to send.
    unanswered: usize,
}

impl Conn {
    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    fn state(&self) -> State {
        self.sockets.get::<Socket<'_>>(self.handle).state()
    }

    /// Notes what the peer's SYN says of windows.
    fn note_syn(&mut self, packet: &[u8]) {
        let capacity = self.socket().recv_capacity();
        // As smoltcp chooses it: so much that the whole buffer fits the field.
        let bits = usize::BITS - capacity.leading_zeros();
        self.scale = packet::offers_scaling(packet).then(|| bits.saturating_sub(u16::BITS));
    }

    /// The largest window to offer, unscaled; `None` leaves it to smoltcp, which offers all that is free.
    fn window(&self) -> Option<u16> {
        let limit = self.receives.limit() >> self.scale?;
        Some(u16::try_from(limit).unwrap_or(u16::MAX))
    }
}

/// What has arrived in one piece: a packet, or several that were joined.
#[derive(Clone, Copy)]
struct Arrival<'a> {
    packet: &'a [u8],
    count: usize,
}

impl<'a> Arrival<'a> {
    fn one(packet: &'a [u8]) -> Self {
        Self { packet, count: 1 }
    }
}

/// A TCP/IP stack without I/O.
pub(super) struct Stack {
    epoch: Instant,
    config: Config,
    iface: Interface,
    phy: Phy,
    rng: StdRng,
    addresses: Vec<IpAddr>,
    /// The set for packets that no connection wants.
    nobody: SocketSet<'static>,
    next_id: u64,
    conns: BTreeMap<ConnId, Conn>,
    flows: HashMap<Flow, ConnId>,
    deadlines: BTreeSet<(Instant, ConnId)>,
    ready: VecDeque<ConnId>,
    half_open: usize,
    time_wait: BTreeSet<ConnId>,
    parked: BTreeMap<Flow, Vec<u8>>,
    listeners: BTreeMap<Bind, Listener>,
    udp: BTreeMap<UdpId, Udp>,
    udp_ports: BTreeMap<Bind, UdpId>,
    events: VecDeque<Event>,
    drops: Drops,
    /// Bytes that the buffers of all connections span.
    buffers: usize,
    /// Sockets of connections that were short.
    spare: Vec<Socket<'static>>,
    coalescer: Coalescer,
    /// Where packets are joined.
    joined: Vec<u8>,
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack")
            .field("addresses", &self.addresses)
            .field("connections", &self.conns.len())
            .field("drops", &self.drops)
            .finish_non_exhaustive()
    }
}

impl Stack {
    /// A stack with `config.addresses`; `seed` decides ports and initial sequence numbers.
    pub(super) fn new(now: Instant, config: Config, seed: [u8; 32]) -> Self {
        let mut rng = StdRng::from_seed(seed);
        let mut phy = Phy::new(config.mtu, config.transmit_queue);
        let mut settings = smoltcp::iface::Config::new(HardwareAddress::Ip);
        settings.random_seed = rng.random();
        let iface = Interface::new(settings, &mut phy.port(None), smoltcp::time::Instant::ZERO);
        let mut stack = Self {
            epoch: now,
            iface,
            phy,
            rng,
            addresses: Vec::new(),
            nobody: SocketSet::new(Vec::new()),
            next_id: 0,
            conns: BTreeMap::new(),
            flows: HashMap::new(),
            deadlines: BTreeSet::new(),
            ready: VecDeque::new(),
            half_open: 0,
            time_wait: BTreeSet::new(),
            parked: BTreeMap::new(),
            listeners: BTreeMap::new(),
            udp: BTreeMap::new(),
            udp_ports: BTreeMap::new(),
            events: VecDeque::new(),
            drops: Drops::default(),
            buffers: 0,
            spare: Vec::new(),
            coalescer: Coalescer::default(),
            joined: Vec::with_capacity(LONGEST),
            config,
        };
        let (addresses, subnets) = (stack.config.addresses.clone(), stack.config.subnets.clone());
        stack.set_addresses(&addresses);
        stack.set_subnets(now, &subnets);
        stack
    }

    /// Replaces our addresses; connections from an address that is gone end with an error. At most eight are used.
    pub(super) fn set_addresses(&mut self, addresses: &[IpAddr]) {
        self.addresses.clear();
        for address in addresses {
            let usable = !address.is_unspecified() && !address.is_multicast();
            if usable && !self.addresses.contains(address) && self.addresses.len() < 8 {
                self.addresses.push(*address);
            }
        }
        self.phy.set_own(self.addresses.clone());
        let own = &self.addresses;
        self.iface.update_ip_addrs(|list| {
            list.clear();
            for address in own {
                let bits = if address.is_ipv4() { 32 } else { 128 };
                // The list holds eight, as many as are let in above.
                let _ = list.push(IpCidr::new((*address).into(), bits));
            }
        });
        // On an IP medium a route only has to exist: its gateway is never asked for.
        let routes = self.iface.routes_mut();
        routes.remove_default_ipv4_route();
        routes.remove_default_ipv6_route();
        for address in own {
            let _ = match address {
                IpAddr::V4(v4) => routes.add_default_ipv4_route(*v4),
                IpAddr::V6(v6) => routes.add_default_ipv6_route(*v6),
            };
        }
        self.end_strangers();
    }

    /// Replaces the prefixes that we take packets for without having their addresses.
    pub(super) fn set_subnets(&mut self, now: Instant, subnets: &[IpNet]) {
        self.config.subnets = subnets.to_vec();
        self.end_strangers();
        self.flush(now);
        // Who gets what is decided here, before smoltcp sees it.
        self.iface.set_any_ip(!subnets.is_empty());
    }

    /// Whether packets for `address` are for somebody behind us.
    fn is_behind_us(&self, address: IpAddr) -> bool {
        !self.addresses.contains(&address) && self.config.subnets.iter().any(|subnet| subnet.contains(&address))
    }

    /// Ends connections from addresses that are not ours any more.
    fn end_strangers(&mut self) {
        let is_known = |address| self.addresses.contains(&address) || self.is_behind_us(address);
        let lost: Vec<ConnId> =
            self.conns.iter().filter(|(_, c)| !is_known(c.flow.local.ip())).map(|(id, _)| *id).collect();
        for id in lost {
            if let Some(conn) = self.conns.get_mut(&id) {
                conn.socket().abort();
            }
            self.touch(id);
        }
    }

    pub(super) fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// Whether [`poll_event`](Self::poll_event) has something.
    pub(super) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    pub(super) fn drops(&self) -> Drops {
        self.drops
    }

    /// Connections that exist, in whatever state.
    pub(super) fn connections(&self) -> usize {
        self.conns.len()
    }

    // --- packets -------------------------------------------------------------------------------------------------

    /// Takes the packets of a batch from the mesh, those that follow in order in a flow as one. Says how many. Call
    /// [`flush`](Self::flush) afterwards.
    pub(super) fn handle_batch(&mut self, now: Instant, batch: &mut Batch) -> usize {
        let mut coalescer = std::mem::take(&mut self.coalescer);
        let mut joined = std::mem::take(&mut self.joined);
        coalescer.plan(batch, false);
        let mut taken = 0;
        for group in coalescer.groups() {
            taken += group.count();
            if group.count() == 1 {
                self.handle_packet(now, batch.packet(group.first()));
                continue;
            }
            group.join(batch);
            joined.clear();
            joined.extend_from_slice(batch.packet(group.first()));
            for index in coalescer.packets(group).skip(1) {
                joined.extend_from_slice(batch.packet(index).get(group.payload_at()..).unwrap_or_default());
            }
            self.handle(now, &joined, group.count(), Checksum::Right);
        }
        (self.coalescer, self.joined) = (coalescer, joined);
        taken
    }

    /// Takes one packet from the mesh. Call [`flush`](Self::flush) after a few.
    pub(super) fn handle_packet(&mut self, now: Instant, packet: &[u8]) {
        self.handle(now, packet, 1, Checksum::Unknown);
    }

    /// Takes a packet, or `count` packets joined to one.
    fn handle(&mut self, now: Instant, packet: &[u8], count: usize, checksum: Checksum) {
        let Some(parsed) = packet::parse(packet, checksum) else {
            self.drops.malformed += 1;
            return;
        };
        let behind_us = self.is_behind_us(parsed.destination());
        if !behind_us && !self.addresses.contains(&parsed.destination()) {
            self.drops.misaddressed += 1;
            return;
        }
        match parsed {
            Parsed::Tcp { flow, opens, ack } => self.handle_segment(now, flow, opens, ack, Arrival { packet, count }),
            Parsed::Udp { flow, payload } => self.handle_datagram(now, flow, payload, packet),
            Parsed::Other { echo, .. } if behind_us => match echo {
                Some(message) if self.events.len() < MAX_EVENTS => {
                    let packet = packet.get(..message.end).unwrap_or_default().to_vec();
                    self.events.push_back(Event::Echo { packet, message });
                }
                _ => self.drops.datagrams += 1,
            },
            Parsed::Other { .. } => self.feed(now, None, Arrival::one(packet)),
        }
    }

    fn handle_segment(&mut self, now: Instant, flow: Flow, opens: bool, ack: Option<Ack>, arrival: Arrival<'_>) {
        if let Some(id) = self.flows.get(&flow).copied() {
            let over = self.conns.get(&id).is_none_or(|c| matches!(c.state(), State::TimeWait | State::Closed));
            if !(opens && over) {
                // smoltcp stops its timer when only a FIN is left to repair, and never sends it again.
                let only_fin =
                    |ack: Ack, conn: &mut Conn| conn.recovery.is_repeat(ack) && conn.socket().send_queue() == 0;
                if ack.is_some_and(|ack| self.conns.get_mut(&id).is_some_and(|conn| only_fin(ack, conn))) {
                    return;
                }
                if let Some(ack) = ack {
                    self.acknowledge_by_steps(now, id, ack, arrival.packet);
                } else if let Some(conn) = self.conns.get_mut(&id).filter(|conn| conn.state() == State::SynSent) {
                    conn.note_syn(arrival.packet);
                    conn.recovery.connected(now);
                }
                self.feed(now, Some(id), arrival);
                if let Some(ack) = ack
                    && self.conns.get_mut(&id).is_some_and(|conn| conn.recovery.acknowledged(now, ack))
                {
                    self.repair(now, id);
                }
                return;
            }
            // The peer uses its port again: what is left of the old connection gives way (RFC 9293 §3.6.1).
            self.flows.remove(&flow);
            if self.conns.get(&id).is_some_and(|c| !c.attached) {
                self.remove(id);
            }
        }
        if !opens {
            self.feed(now, None, arrival);
            return;
        }
        let behind_us = self.is_behind_us(flow.local.ip());
        if let Some(bind) = self.listener_for(flow.local).filter(|_| !behind_us) {
            let full = self.listeners.get(&bind).is_none_or(|l| l.queue.len() >= l.backlog);
            if full || !self.open_passive(now, flow, Origin::Listener(bind), arrival.packet) {
                self.drops.connections += 1;
            }
        } else if behind_us || self.falls_back(flow.local.ip()) {
            if self.parked.contains_key(&flow) {
                return;
            }
            if self.parked.len() >= MAX_PARKED || self.events.len() >= MAX_EVENTS {
                self.drops.connections += 1;
                return;
            }
            self.parked.insert(flow, arrival.packet.to_vec());
            self.events.push_back(Event::TcpRequest(flow));
        } else {
            self.feed(now, None, arrival);
        }
    }

    /// Shows a socket the acknowledgements that a peer would have sent for every second packet: smoltcp's congestion
    /// window grows by the number of acknowledgements, and a peer that joins packets sends few.
    fn acknowledge_by_steps(&mut self, now: Instant, id: ConnId, ack: Ack, packet: &[u8]) {
        let at = self.smol(now);
        let step = SEGMENTS_PER_ACK * self.phy.mtu().saturating_sub(HEADERS).max(1);
        let Some(conn) = self.conns.get_mut(&id).filter(|_| ack.bare) else { return };
        let Some(acked) = conn.recovery.newly_acknowledged(ack) else { return };
        conn.sends.pass(now, acked, conn.recovery.round_trip());
        let mut room = [0; 128];
        for done in (step..acked).step_by(step).take(MOST_ACKED / SEGMENTS_PER_ACK) {
            let Some(less) = packet::acknowledge_less(packet, ack.number - (acked - done), &mut room) else { return };
            self.iface.poll_ingress_single(at, &mut self.phy.port(Some(less)), &mut conn.sockets);
        }
    }

    fn handle_datagram(&mut self, now: Instant, flow: Flow, payload: std::ops::Range<usize>, packet: &[u8]) {
        let bound = [Bind::exactly(flow.local), Bind::port(flow.local.port())];
        let behind_us = self.is_behind_us(flow.local.ip());
        if let Some(id) = bound.iter().find_map(|bind| self.udp_ports.get(bind)).filter(|_| !behind_us) {
            let Some(socket) = self.udp.get_mut(id) else { return };
            let room = socket.queue.len() < self.config.udp_queue;
            match packet.get(payload) {
                Some(body) if room => {
                    socket.queue.push_back((flow, body.to_vec()));
                    if let Some(waker) = socket.waker.take() {
                        waker.wake();
                    }
                }
                _ => self.drops.datagrams += 1,
            }
        } else if behind_us || self.falls_back(flow.local.ip()) {
            if self.events.len() >= MAX_EVENTS {
                self.drops.datagrams += 1;
                return;
            }
            self.events.push_back(Event::UdpDatagram { flow, payload, packet: packet.to_vec() });
        } else {
            self.feed(now, None, Arrival::one(packet));
        }
    }

    /// Whether traffic for a port of `address` that nobody serves is offered as an event.
    fn falls_back(&self, address: IpAddr) -> bool {
        self.config.fallback && !is_service_address(address)
    }

    /// Hands a packet to one connection's socket, or to none: then smoltcp answers echo requests, resets and errors.
    fn feed(&mut self, now: Instant, id: Option<ConnId>, arrival: Arrival<'_>) {
        let at = self.smol(now);
        let conn = id.and_then(|id| Some((id, self.conns.get_mut(&id)?)));
        let Some((id, conn)) = conn else {
            self.iface.poll_ingress_single(at, &mut self.phy.port(Some(arrival.packet)), &mut self.nobody);
            self.phy.take_sent();
            return;
        };
        self.phy.set_window(conn.window());
        self.iface.poll_ingress_single(at, &mut self.phy.port(Some(arrival.packet)), &mut conn.sockets);
        self.phy.set_window(None);
        if let Some(answer) = self.phy.take_sent() {
            // An answer at once says that something is missing before this; a loss is told by several.
            let repeats = conn.recovery.ours().is_some_and(|(acks, _)| acks == answer.acks);
            if repeats && answer.start == answer.end {
                (1..arrival.count.min(usize::from(DUPLICATES))).for_each(|_| self.phy.repeat());
            }
            conn.recovery.sent(now, answer);
        }
        // The peer's window grows by acknowledgements, not by bytes (RFC 9293 §3.8.6.3): a long batch gets several.
        conn.unanswered += arrival.count;
        if conn.unanswered >= SEGMENTS_PER_ACK && self.phy.has_room() {
            self.send_burst(now, id);
        } else {
            self.touch(id);
        }
    }

    /// Has the first hole repaired: see [`Recovery`].
    fn repair(&mut self, now: Instant, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let flow = conn.flow;
        let (Some(ack), Some((acks, window))) = (conn.recovery.last_ack(), conn.recovery.ours()) else { return };
        let closing = matches!(conn.state(), State::FinWait1 | State::Closing | State::LastAck);
        if conn.socket().send_queue() == 0 {
            if closing {
                // What is unacknowledged is our FIN.
                let numbers = Sent { start: ack.number, end: ack.number + 1, acks, window };
                self.phy.push(Parcel::whole(packet::build_fin(flow, numbers)));
            }
            return;
        }
        if !closing && !matches!(conn.state(), State::Established | State::CloseWait) {
            return;
        }
        // Another window makes the socket count anew.
        let other = Ack { window: ack.window.saturating_sub(1), ..ack };
        let duplicates = std::iter::repeat_n(other, 1 + usize::from(DUPLICATES));
        for ack in duplicates.chain(std::iter::once(ack)) {
            self.feed(now, Some(id), Arrival::one(&packet::build_ack(flow, ack)));
        }
    }

    /// How many packets [`poll_transmit`](Self::poll_transmit) may hold; sockets wait for room beyond it.
    pub(super) fn set_transmit_limit(&mut self, limit: usize) {
        self.phy.set_limit(limit);
    }

    /// The next parcel for the mesh.
    pub(super) fn poll_transmit(&mut self) -> Option<Parcel> {
        self.phy.pop()
    }

    /// Takes a parcel's buffer back for another one.
    pub(super) fn recycle(&mut self, buffer: Vec<u8>) {
        self.phy.recycle(buffer);
    }

    /// The next decision to make.
    pub(super) fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Whether a connection has something to send and no room for it.
    pub(super) fn is_blocked(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Does whatever is due at `now`.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        while let Some((at, id)) = self.deadlines.first().copied() {
            if at > now {
                break;
            }
            self.deadlines.pop_first();
            if let Some(conn) = self.conns.get_mut(&id) {
                conn.deadline = None;
                if conn.expires.is_some_and(|expires| expires <= now) {
                    conn.expires = None;
                    conn.socket().abort();
                } else if conn.recovery.probe(now) {
                    self.repair(now, id);
                }
            }
            self.touch(id);
        }
        self.flush(now);
    }

    /// Lets every touched connection send, as far as there is room, and notes what has become of it.
    pub(super) fn flush(&mut self, now: Instant) {
        loop {
            while self.phy.has_room() {
                let Some(id) = self.ready.pop_front() else { break };
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.queued = false;
                    self.send_burst(now, id);
                }
            }
            let Some(parcel) = self.phy.pop_looped() else { break };
            self.handle(now, parcel.bytes(), parcel.count(), Checksum::Right);
            self.phy.recycle(parcel.into_buffer());
        }
    }

    /// Lets one connection send, and has it come again if it has more to send than it may, or than there is room for.
    fn send_burst(&mut self, now: Instant, id: ConnId) {
        let at = self.smol(now);
        let Some(conn) = self.conns.get_mut(&id) else { return };
        conn.unanswered = 0;
        let resting = conn.attached && conn.time_wait_since.is_some_and(|since| now >= since + TIME_WAIT_SERVICE);
        let mut more = !resting;
        self.phy.set_window(conn.window());
        for _ in 0..BURST {
            if !more || !self.phy.has_room() {
                break;
            }
            more = self.iface.poll_egress(at, &mut self.phy.port(None), &mut conn.sockets)
                == PollResult::SocketStateChanged;
            if let Some(sent) = self.phy.take_sent() {
                conn.recovery.sent(now, sent);
            }
        }
        self.phy.set_window(None);
        if more {
            self.touch(id);
        } else {
            self.settle(now, id, resting);
        }
    }

    /// Notes the state that `id` has come to, and when to look at it again.
    fn settle(&mut self, now: Instant, id: ConnId, resting: bool) {
        let at = self.smol(now);
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let passive = conn.origin != Origin::Dialed;
        match conn.state() {
            State::Listen => {
                // The handshake was reset.
                self.remove(id);
                return;
            }
            State::Closed if conn.socket().remote_endpoint().is_none() => {
                if conn.attached {
                    conn.expires = None;
                    if self.flows.get(&conn.flow) == Some(&id) {
                        self.flows.remove(&conn.flow);
                    }
                    self.set_deadline(id, None);
                } else {
                    self.remove(id);
                }
                return;
            }
            State::SynSent | State::SynReceived | State::Closed => {}
            state @ (State::Established
            | State::CloseWait
            | State::FinWait1
            | State::FinWait2
            | State::Closing
            | State::LastAck
            | State::TimeWait) => {
                if !conn.established {
                    conn.established = true;
                    conn.expires = None;
                    self.half_open -= usize::from(passive);
                    if let Origin::Listener(bind) = conn.origin {
                        match self.listeners.get_mut(&bind) {
                            Some(listener) => {
                                conn.attached = true;
                                listener.queue.push_back(id);
                                if let Some(waker) = listener.waker.take() {
                                    waker.wake();
                                }
                            }
                            None => conn.socket().abort(),
                        }
                    }
                }
                if state == State::TimeWait && conn.time_wait_since.is_none() {
                    conn.time_wait_since = Some(now);
                }
                if !conn.attached {
                    if conn.socket().can_recv() {
                        // Nobody will read this: tell the peer (RFC 1122 §4.2.2.13).
                        conn.socket().abort();
                    }
                    if state == State::FinWait2 {
                        let latest = now + FIN_WAIT_TIME;
                        conn.expires = Some(conn.expires.map_or(latest, |at| at.min(latest)));
                    }
                    if state == State::TimeWait {
                        conn.expires = None;
                        self.time_wait.insert(id);
                    }
                }
            }
        }
        let others = [conn.expires, conn.recovery.poll_timeout()];
        let timer = if resting { None } else { self.iface.poll_at(at, &conn.sockets) };
        let timer = timer.map(|at| self.real(at).max(now + SHORTEST_WAIT));
        let deadline = others.into_iter().chain([timer]).flatten().min();
        self.set_deadline(id, deadline);
        while self.time_wait.len() > MAX_TIME_WAIT {
            let Some(oldest) = self.time_wait.first().copied() else { break };
            self.remove(oldest);
        }
    }

    fn set_deadline(&mut self, id: ConnId, deadline: Option<Instant>) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if conn.deadline == deadline {
            return;
        }
        if let Some(old) = conn.deadline {
            self.deadlines.remove(&(old, id));
        }
        conn.deadline = deadline;
        if let Some(new) = deadline {
            self.deadlines.insert((new, id));
        }
    }

    fn touch(&mut self, id: ConnId) {
        if let Some(conn) = self.conns.get_mut(&id)
            && !conn.queued
        {
            conn.queued = true;
            self.ready.push_back(id);
        }
    }

    fn remove(&mut self, id: ConnId) {
        let Some(mut conn) = self.conns.remove(&id) else { return };
        self.buffers -= conn.buffers;
        self.keep_socket(&mut conn);
        if let Some(at) = conn.deadline {
            self.deadlines.remove(&(at, id));
        }
        if self.flows.get(&conn.flow) == Some(&id) {
            self.flows.remove(&conn.flow);
        }
        self.time_wait.remove(&id);
        if !conn.established && conn.origin != Origin::Dialed {
            self.half_open -= 1;
        }
    }

    /// Ends everything: connections are reset, and every waiting task is woken to an error.
    pub(super) fn close(&mut self, now: Instant) {
        for listener in std::mem::take(&mut self.listeners).into_values() {
            if let Some(waker) = listener.waker {
                waker.wake();
            }
        }
        for socket in std::mem::take(&mut self.udp).into_values() {
            if let Some(waker) = socket.waker {
                waker.wake();
            }
        }
        self.udp_ports.clear();
        self.parked.clear();
        let all: Vec<ConnId> = self.conns.keys().copied().collect();
        for id in all {
            self.reset(id);
        }
        self.flush(now);
    }

    // --- time ----------------------------------------------------------------------------------------------------

    /// smoltcp's clock starts at one second, since it takes zero for "at once".
    fn smol(&self, now: Instant) -> smoltcp::time::Instant {
        let since = now.saturating_duration_since(self.epoch) + Duration::from_secs(1);
        smoltcp::time::Instant::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }

    fn real(&self, at: smoltcp::time::Instant) -> Instant {
        let micros = u64::try_from(at.total_micros()).unwrap_or(0);
        self.epoch + Duration::from_micros(micros).saturating_sub(Duration::from_secs(1))
    }
}
