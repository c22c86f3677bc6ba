//! What there is, and time.

use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_noise::key::NodePublic;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::gateway::Gateway;
use super::host::{Host, HostId};
use super::link::Link;
use super::packet::{Happening, Record, Scheduled};
use super::route::Network;
use super::stream::Stream;
use crate::path::SocketId;

/// One-way delay across the internet, so 40 ms there and back: to a peer, and to a relay.
const INTERNET_DELAY: Duration = Duration::from_millis(20);

/// Everything: hosts, networks, and what is on its way between them. See the [module](super) for a picture.
///
/// Methods that name a node panic if the host was never started as one; ids of another world are nobody's fault but the
/// caller's, too.
pub struct World {
    pub(super) start: Instant,
    pub(super) now: Instant,
    pub(super) rng: StdRng,
    pub(super) hosts: Vec<Host>,
    pub(super) networks: Vec<Network>,
    pub(super) gateways: Vec<Gateway>,
    pub(super) relays: BTreeMap<RegionId, HostId>,
    pub(super) stun_servers: Vec<SocketAddr>,
    pub(super) by_key: BTreeMap<NodePublic, HostId>,
    pub(super) home: RegionId,
    pub(super) streams: Vec<Stream>,
    /// Whose datagrams to whom are lost.
    pub(super) cuts: BTreeSet<(HostId, HostId)>,
    /// Who was reached by whom, along which aim, and when last.
    pub(super) reached: BTreeMap<(HostId, HostId, (SocketId, SocketAddr)), Instant>,
    queue: BinaryHeap<Scheduled>,
    next: u64,
    pub(super) next_request: u64,
    pub(super) next_v6: u16,
    pub(super) lost: u64,
    pub(super) transcript: Option<Vec<Record>>,
    digest: DefaultHasher,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("at", &self.elapsed())
            .field("hosts", &self.hosts.len())
            .field("networks", &self.networks.len())
            .field("in_flight", &self.queue.len())
            .finish_non_exhaustive()
    }
}

impl World {
    /// A world with the internet and two relays on it, in regions 900 and 901, each a STUN server on two ports. Nodes'
    /// home is region 900. All that happens by chance follows from `seed`.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "virtual time starts at any instant")]
    pub fn seeded(seed: u64) -> Self {
        let start = Instant::now();
        let (home, other) = (Self::region(900), Self::region(901));
        let mut world = Self {
            start,
            now: start,
            rng: StdRng::seed_from_u64(seed),
            hosts: Vec::new(),
            networks: vec![Network::internet(INTERNET_DELAY)],
            gateways: Vec::new(),
            relays: BTreeMap::new(),
            stun_servers: Vec::new(),
            by_key: BTreeMap::new(),
            home,
            streams: Vec::new(),
            cuts: BTreeSet::new(),
            reached: BTreeMap::new(),
            queue: BinaryHeap::new(),
            next: 0,
            next_request: 0,
            next_v6: 0,
            lost: 0,
            transcript: None,
            digest: DefaultHasher::new(),
        };
        world.add_relay(home, Link::default());
        world.add_relay(other, Link::default());
        world
    }

    /// The region with a number.
    ///
    /// # Panics
    /// For 0, which is no region.
    #[must_use]
    pub fn region(number: u16) -> RegionId {
        RegionId::new(number).expect("0 is no region")
    }

    /// The home region of new nodes.
    #[must_use]
    pub const fn home(&self) -> RegionId {
        self.home
    }

    /// The time.
    #[must_use]
    pub const fn now(&self) -> Instant {
        self.now
    }

    /// The time since the world began.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.now.saturating_duration_since(self.start)
    }

    /// Datagrams that links have lost, or were too long for them.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Datagrams that one host sends to another by UDP vanish, in both directions, or do so no more. Nobody is told.
    pub fn cut(&mut self, a: HostId, b: HostId, cut: bool) {
        for pair in [(a, b), (b, a)] {
            if cut {
                self.cuts.insert(pair);
            } else {
                self.cuts.remove(&pair);
            }
        }
    }

    /// The same in one direction only.
    pub fn cut_one_way(&mut self, from: HostId, to: HostId, cut: bool) {
        if cut {
            self.cuts.insert((from, to));
        } else {
            self.cuts.remove(&(from, to));
        }
    }

    /// Keeps a copy of everything that is delivered from now on.
    pub fn keep_transcript(&mut self) {
        self.transcript.get_or_insert_default();
    }

    /// What has been delivered since [`Self::keep_transcript`].
    #[must_use]
    pub fn transcript(&self) -> &[Record] {
        self.transcript.as_deref().unwrap_or_default()
    }

    /// A number that two runs share if, and but for accidents only if, the same was delivered at the same times.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.digest.finish()
    }

    pub(super) fn digest(&mut self, at: Duration, host: HostId, datagram: &[u8]) {
        (at, host, datagram).hash(&mut self.digest);
    }

    /// Lets time pass.
    pub fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        while self.step(end) {}
        self.now = end;
    }

    /// Runs until `done`, at most for `limit`, and says how long it took.
    pub fn run_until(&mut self, limit: Duration, mut done: impl FnMut(&Self) -> bool) -> Option<Duration> {
        let (from, end) = (self.now, self.now + limit);
        while !done(self) {
            if !self.step(end) {
                self.now = end;
                return None;
            }
        }
        Some(self.now.saturating_duration_since(from))
    }

    /// Does the next thing that is due by `end`. `false` if there is none.
    fn step(&mut self, end: Instant) -> bool {
        if self.queue.peek().is_none_or(|next| next.at > end) {
            return false;
        }
        let Some(Scheduled { at, what, .. }) = self.queue.pop() else { return false };
        self.now = self.now.max(at);
        match what {
            Happening::Host(host, packet) => self.receive(host, &packet),
            Happening::Outbound(gateway, packet) => self.at_gateway_outbound(gateway, packet),
            Happening::Inbound(gateway, packet) => self.at_gateway_inbound(gateway, packet),
            Happening::Service(gateway, packet) => self.at_gateway_service(gateway, &packet),
            Happening::FrameUp { region, from, to, bytes } => self.relay_passes(region, from, &to, bytes),
            Happening::FrameDown { region, from, to, bytes } => self.frame_arrives(region, from, to, &bytes),
            Happening::Reply { to, id, reply } => {
                for index in 0..self.hosts[to.0].programs.len() {
                    self.call_program(to, index, |program, io| program.handle_reply(io, id, reply.as_deref()));
                }
                self.settle(to);
            }
            Happening::Wake(host) => self.wakes(host, at),
            Happening::Data(stream) => self.stream_due(stream),
        }
        true
    }

    pub(super) fn schedule(&mut self, at: Instant, what: Happening) {
        self.queue.push(Scheduled { at, number: self.next, what });
        self.next += 1;
    }
}
