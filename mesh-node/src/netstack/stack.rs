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

mod incoming;
mod outgoing;
mod ports;
mod splice;
mod tcp;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::task::Waker;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use smoltcp::iface::{Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::wire::{HardwareAddress, IpCidr};

use ipnet::IpNet;
use mesh_tun::offload::Coalescer;
use ports::{Listener, Udp};
use splice::Splice;
pub(super) use splice::{Half, Halves, Local};

use super::packet::{self, Flow};
use super::parcel::LONGEST;
use super::phy::Phy;
use super::recovery::Recovery;
use super::window::Window;
use super::{Bind, Config};

/// Packets one connection may send before the next one has its turn.
const BURST: usize = 16;
/// Packets received for one connection before it may answer.
const SEGMENTS_PER_ACK: usize = 2;
/// How long a single packet waits for another one, or for data to go along with its answer.
const ACK_DELAY: Duration = Duration::from_millis(10);
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
    /// The local socket that it is spliced to.
    splice: Option<Box<Splice>>,
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
    /// Spliced connections that packets have come for, and tasks to be woken.
    stirred: Vec<ConnId>,
    woken: Vec<Waker>,
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
            stirred: Vec::new(),
            woken: Vec::new(),
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
