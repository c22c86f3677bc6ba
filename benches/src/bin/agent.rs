//! What a thousand active peers cost the path agent: the share of one core, and bytes a peer. Every peer is behind an
//! address of its own 40 ms away, sends data and pings like ours, and is sent data all the time.
//!
//! ```text
//! agent [--check] [PEERS [SECONDS]]      1,000 peers for 60 seconds of virtual time
//! ```
//!
//! With `--check` it fails if a bar is missed: 2 % of one core, 4 KiB a peer.
//!
//! Only the agent under test is timed, by the clock of this thread: the peers are a few lines that answer. Memory is what
//! the process has gained, so it counts what the allocator adds.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context;
use mesh_derp::map::RegionId;
use mesh_nat::agent::{PeerConfig, Source, Transmit};
use mesh_nat::disco::message::{Message, Ping, Pong, TxId};
use mesh_nat::disco::seal;
use mesh_nat::{Agent, Family, Path, SocketId};
use mesh_noise::key::{DiscoPrivate, DiscoPublic, NodePublic, SharedBox};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::time::{ClockId, clock_gettime};

const SOCKET: SocketId = SocketId(0);
/// As often an engine tells the agent of data.
const LOOK: Duration = Duration::from_millis(200);
const ROUND_TRIP: Duration = Duration::from_millis(40);
const HEARTBEAT: Duration = Duration::from_secs(3);
/// Until every peer has been found and its path measured.
const WARM_UP: Duration = Duration::from_secs(30);
/// The bar for processor time, in percent of one core.
const MOST_SHARE: f64 = 2.0;
/// The bar for memory, in bytes a peer.
const MOST_BYTES: u64 = 4096;

/// The other end: answers pings, and sends one every three seconds.
struct Peer {
    node: NodePublic,
    disco: DiscoPublic,
    shared: SharedBox,
    address: SocketAddr,
    next_ping: Duration,
}

impl Peer {
    fn new(number: u32, hub: &DiscoPublic) -> Self {
        let mut secret = [3; 32];
        secret[..4].copy_from_slice(&number.to_be_bytes());
        let disco = DiscoPrivate::from_bytes(secret);
        let address = SocketAddr::from((Ipv4Addr::from_bits(0xcb00_0000 + number), 41641));
        let next_ping = Duration::from_millis(u64::from(number * 7919 % 3000));
        let (node, shared) = (NodePublic::from_bytes(secret), disco.box_with(hub));
        Self { node, disco: disco.public(), shared, address, next_ping }
    }

    fn seal(&self, message: &Message, rng: &mut StdRng) -> Vec<u8> {
        let mut plaintext = Vec::new();
        message.encode(&mut plaintext);
        seal::seal(&self.disco, &self.shared, rng, &plaintext)
    }

    /// The answer to a ping of the agent's.
    fn answer(&self, transmit: &Transmit, rng: &mut StdRng) -> Option<Vec<u8>> {
        let Path::Direct { remote, .. } = transmit.path else { return None };
        let plaintext = seal::open(&self.shared, &transmit.datagram).filter(|_| remote == self.address)?;
        let Ok(Message::Ping(Ping { tx, .. })) = Message::decode(&plaintext) else { return None };
        Some(self.seal(&Message::Pong(Pong { tx, observed: ([198, 51, 100, 1], 41641).into() }), rng))
    }
}

/// The agent under test, its peers, and what is on its way to it.
struct Crowd {
    start: Instant,
    now: Duration,
    agent: Agent,
    peers: Vec<Peer>,
    by_node: BTreeMap<NodePublic, usize>,
    arriving: BTreeMap<(Duration, u64), (usize, Vec<u8>)>,
    counter: u64,
    rng: StdRng,
    /// What the agent has used.
    used: Duration,
    sent: u64,
}

impl Crowd {
    #[expect(clippy::disallowed_methods, reason = "an instant can only come from the clock; it never moves here")]
    fn new(count: u32) -> anyhow::Result<(Self, u64)> {
        let (start, hub) = (Instant::now(), DiscoPrivate::from_bytes([9; 32]));
        let peers: Vec<_> = (1..=count).map(|number| Peer::new(number, &hub.public())).collect();
        let by_node = peers.iter().enumerate().map(|(index, peer)| (peer.node, index)).collect();
        let rng = StdRng::seed_from_u64(1);
        let before = resident()?;
        let mut agent = Agent::new(start, hub, NodePublic::from_bytes([8; 32]), [7; 32]);
        agent.set_sockets(vec![(SOCKET, Family::V4)]);
        agent.set_endpoints(start, vec![([198, 51, 100, 1], 41641).into(), ([10, 0, 0, 1], 41641).into()]);
        agent.set_wanted_length(start, Some(1312));
        for peer in &peers {
            // As most have: one address that works, and two within their own networks.
            let endpoints = vec![peer.address, ([192, 168, 1, 9], 41641).into(), ([172, 17, 0, 1], 41641).into()];
            let (node, disco, home) = (peer.node, peer.disco, RegionId::new(1));
            agent.set_peer(start, PeerConfig { node, disco, home, endpoints, ..PeerConfig::default() });
        }
        let (now, used, arriving) = (Duration::ZERO, Duration::ZERO, BTreeMap::new());
        Ok((Self { start, now, agent, peers, by_node, arriving, counter: 0, rng, used, sent: 0 }, before))
    }

    fn timed(&mut self, call: impl FnOnce(&mut Agent, Instant)) {
        let (before, now) = (cpu(), self.start + self.now);
        call(&mut self.agent, now);
        let transmits: Vec<_> = std::iter::from_fn(|| self.agent.poll_transmit()).collect();
        let news = std::iter::from_fn(|| self.agent.poll_event()).count();
        self.used += cpu().saturating_sub(before);
        std::hint::black_box(news);
        self.sent += transmits.len() as u64;
        for transmit in transmits {
            let Some(index) = self.by_node.get(&transmit.peer).copied() else { continue };
            if let Some(answer) = self.peers[index].answer(&transmit, &mut self.rng) {
                self.deliver(self.now + ROUND_TRIP, index, answer);
            }
        }
    }

    fn deliver(&mut self, at: Duration, index: usize, datagram: Vec<u8>) {
        self.counter += 1;
        self.arriving.insert((at, self.counter), (index, datagram));
    }

    fn run(&mut self, span: Duration) {
        let end = self.now + span;
        while self.now < end {
            // Time passes in milliseconds, as for an engine with much to do.
            self.now += Duration::from_millis(1);
            while self.arriving.first_key_value().is_some_and(|((at, _), _)| *at <= self.now) {
                let Some((_, (index, datagram))) = self.arriving.pop_first() else { break };
                let source = Source::direct(SOCKET, self.peers[index].address);
                self.timed(|agent, now| {
                    let _ = agent.handle_datagram(now, source, &datagram);
                });
            }
            if self.agent.poll_timeout().is_some_and(|due| due <= self.start + self.now) {
                self.timed(Agent::handle_timeout);
            }
            if self.now.as_millis().is_multiple_of(LOOK.as_millis()) {
                let nodes: Vec<_> = self.peers.iter().map(|peer| peer.node).collect();
                self.timed(|agent, now| {
                    for node in &nodes {
                        agent.traffic(now, node);
                        agent.unanswered(now, node, now);
                    }
                });
            }
            self.ping();
        }
    }

    fn ping(&mut self) {
        for index in 0..self.peers.len() {
            if self.peers[index].next_ping <= self.now {
                self.peers[index].next_ping += HEARTBEAT;
                let ping = Ping { tx: TxId(self.rng.random()), node: Some(self.peers[index].node), padding: 0 };
                let datagram = self.peers[index].seal(&Message::Ping(ping), &mut self.rng);
                self.deliver(self.now, index, datagram);
            }
        }
    }
}

fn main() -> anyhow::Result<()> {
    let mut arguments: Vec<_> = std::env::args().skip(1).collect();
    let check = arguments.iter().any(|argument| argument == "--check");
    arguments.retain(|argument| argument != "--check");
    let mut arguments = arguments.into_iter();
    let count: u32 = arguments.next().map_or(Ok(1000), |text| text.parse()).context("how many peers?")?;
    let seconds: u64 = arguments.next().map_or(Ok(60), |text| text.parse()).context("for how many seconds?")?;
    let (mut crowd, empty) = Crowd::new(count)?;
    crowd.run(WARM_UP);
    let direct = crowd.peers.iter().filter(|peer| crowd.agent.path(&peer.node).is_some_and(|path| path.is_direct()));
    anyhow::ensure!(direct.count() == crowd.peers.len(), "not every peer was found");
    let waiting: usize = crowd.arriving.values().map(|(_, datagram)| datagram.capacity() + 64).sum();
    let each = resident()?.saturating_sub(empty).saturating_sub(waiting as u64) / u64::from(count);
    (crowd.used, crowd.sent) = (Duration::ZERO, 0);
    crowd.run(Duration::from_secs(seconds));
    let share = crowd.used.as_secs_f64() / seconds as f64 * 100.0;
    let rate = crowd.sent as f64 / seconds as f64;
    let mut out = std::io::stdout();
    writeln!(out, "{count} active peers, {seconds} s of virtual time")?;
    writeln!(out, "agent: {share:.2} % of one core, {rate:.0} datagrams a second, {each} bytes a peer")?;
    if check {
        anyhow::ensure!(share < MOST_SHARE, "{share:.2} % of one core, the bar is {MOST_SHARE} %");
        anyhow::ensure!(each < MOST_BYTES, "{each} bytes a peer, the bar is {MOST_BYTES}");
    }
    Ok(())
}

/// The time this thread has run for: what others use meanwhile does not count.
fn cpu() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// Bytes of memory that this process has.
fn resident() -> anyhow::Result<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split_whitespace().nth(1).context("/proc/self/statm")?.parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}
