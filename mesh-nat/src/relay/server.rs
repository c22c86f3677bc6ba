//! The serving side: allocations, the binding handshake, and where a datagram goes.
//!
//! [`Server`] is the whole of it, in one thread. Where more is wanted, threads forward by the [`Pair`]s that its events
//! hand out, which never change, and bring it only what has the control bit.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_noise::key::{DiscoPrivate, DiscoPublic, SharedBox};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::geneve::{self, Content};
use crate::disco::message::{Binding, DecodeError, Message, RelayEndpoint};
use crate::disco::seal;
use crate::path::Vni;
use crate::path::probe::Budget;

mod challenge;
mod pair;
#[cfg(test)]
mod tests;

pub use pair::{Forwarded, Leg, Pair};

/// Between two looks for allocations that have ended.
const SWEEP: Duration = Duration::from_secs(30);
/// The number after the last.
const VNI_END: u32 = 1 << 24;
/// Challenges that wait to be polled; more are dropped.
const MAX_TRANSMITS: usize = 1024;

/// How much a server takes on. The lifetimes are those of deployed servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// How long an allocation waits for its clients. 30 s.
    pub bind_lifetime: Duration,
    /// How long either client of an open one may be silent. 5 min.
    pub steady_lifetime: Duration,
    /// Allocations at a time. 4,096.
    pub max_pairs: usize,
    /// Allocations that one client may be part of. 256.
    pub max_pairs_of_client: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind_lifetime: Duration::from_secs(30),
            steady_lifetime: Duration::from_secs(300),
            max_pairs: 4096,
            max_pairs_of_client: 256,
        }
    }
}

/// Why there is no allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// The server knows no address of its own yet. Clients ask again.
    #[error("the server knows no address of its own yet")]
    NoAddress,
    /// Both clients are one, or have no key.
    #[error("not two clients")]
    NotTwoClients,
    /// There are too many, in all or for one of these clients.
    #[error("too many allocations")]
    Full,
}

/// Why a datagram was dropped. Nothing has changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reject {
    /// No Geneve header.
    #[error("not behind a Geneve header")]
    NotGeneve,
    /// No such allocation.
    #[error("no allocation has this number")]
    UnknownPair,
    /// Data before both legs are bound.
    #[error("not both legs are bound")]
    NotOpen,
    /// Data from an address that no leg is bound to.
    #[error("no leg is bound to the source")]
    UnknownSource,
    /// Control that is not disco, or from neither client. No cryptography was attempted.
    #[error("the sender is neither client")]
    UnknownSender,
    /// The box does not open.
    #[error("box does not open")]
    Unsealed,
    /// The box holds no message.
    #[error("malformed message: {0}")]
    Malformed(#[from] DecodeError),
    /// A message that is no part of the handshake.
    #[error("message is no part of the handshake")]
    Unexpected,
    /// The handshake names another allocation, another peer, or no generation.
    #[error("the handshake is about something else")]
    Mismatch,
    /// An answer to no challenge of ours, or from another address.
    #[error("the answer is not the one asked for")]
    WrongAnswer,
    /// This client binds more often than anybody has to.
    #[error("too many binds")]
    TooOften,
}

/// What became of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// It was for the server. There may be something to transmit, or an event.
    Consumed,
    /// It goes to this address, byte for byte.
    Forward(SocketAddr),
}

/// What threads that forward should know.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// Both legs are bound, or one has moved: this replaces what was known under its VNI.
    Open(Arc<Pair>),
    /// Nothing is forwarded under this VNI any more.
    Closed(Vni),
}

/// What a server has done since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Allocations made.
    pub allocated: u64,
    /// Requests refused because there were too many.
    pub refused: u64,
    /// Challenges sent.
    pub challenged: u64,
    /// Legs bound, moves included.
    pub bound: u64,
    /// Allocations that have ended.
    pub expired: u64,
    /// Datagrams for the server itself that were dropped.
    pub rejected: u64,
}

/// One allocation, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Its number.
    pub vni: Vni,
    /// The two clients, the lower key first.
    pub clients: [DiscoPublic; 2],
    /// What each is bound to.
    pub bound: [Option<SocketAddr>; 2],
    /// What came from each.
    pub forwarded: [Forwarded; 2],
}

#[derive(Debug)]
struct Allocation {
    clients: [DiscoPublic; 2],
    lamport: u64,
    /// When it was last asked for.
    asked: Instant,
    legs: [Side; 2],
    pair: Option<Arc<Pair>>,
    meter: Arc<pair::Meter>,
    binds: Budget,
}

#[derive(Debug, Default)]
struct Side {
    /// Made when first needed: it costs a scalar multiplication.
    shared: Option<SharedBox>,
    /// The generation of the last bind, until it is answered.
    generation: Option<u32>,
    bound: Option<SocketAddr>,
}

/// A peer relay without its sockets.
pub struct Server {
    disco: DiscoPrivate,
    public: DiscoPublic,
    config: Config,
    rng: StdRng,
    epoch: Instant,
    now: Instant,
    addresses: Vec<SocketAddr>,
    secrets: challenge::Secrets,
    lamport: u64,
    next_vni: u32,
    pairs: BTreeMap<Vni, Allocation>,
    by_clients: BTreeMap<[DiscoPublic; 2], Vni>,
    /// How many allocations a client is part of.
    load: BTreeMap<DiscoPublic, usize>,
    sweep: Option<Instant>,
    transmits: VecDeque<(SocketAddr, Vec<u8>)>,
    events: VecDeque<Event>,
    counters: Counters,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("public", &self.public)
            .field("addresses", &self.addresses)
            .field("pairs", &self.pairs.len())
            .finish_non_exhaustive()
    }
}

impl Server {
    /// A server with a key of its own. All its random numbers come from `seed`.
    #[must_use]
    pub fn new(now: Instant, disco: DiscoPrivate, seed: [u8; 32], config: Config) -> Self {
        let mut rng = StdRng::from_seed(seed);
        Self {
            public: disco.public(),
            disco,
            config,
            secrets: challenge::Secrets::new(now, &mut rng),
            rng,
            epoch: now,
            now,
            addresses: Vec::new(),
            lamport: 0,
            next_vni: 1,
            pairs: BTreeMap::new(),
            by_clients: BTreeMap::new(),
            load: BTreeMap::new(),
            sweep: None,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    // Commands

    /// Where the server can be reached, best first. Without any, nothing is allocated.
    pub fn set_addresses(&mut self, addresses: Vec<SocketAddr>) {
        self.addresses = addresses;
    }

    /// The allocation of two clients, a new one if they have none. The caller has made sure that they may.
    ///
    /// # Errors
    /// Says why there is none.
    pub fn allocate(&mut self, now: Instant, clients: [DiscoPublic; 2]) -> Result<RelayEndpoint, Refused> {
        self.tick(now);
        if self.addresses.is_empty() {
            return Err(Refused::NoAddress);
        }
        let [low, high] = clients;
        let clients = [low.min(high), low.max(high)];
        if low == high || clients.iter().any(DiscoPublic::is_zero) {
            return Err(Refused::NotTwoClients);
        }
        let known = self.by_clients.get(&clients).copied();
        let vni = match known.filter(|vni| !self.has_ended(*vni)) {
            Some(vni) => vni,
            None => {
                if let Some(ended) = known {
                    self.remove(ended);
                }
                self.add(clients)?
            }
        };
        let allocation = self.pairs.get_mut(&vni).ok_or(Refused::Full)?;
        allocation.asked = self.now;
        Ok(RelayEndpoint {
            server: self.public,
            clients,
            lamport: allocation.lamport,
            vni,
            bind_lifetime: self.config.bind_lifetime,
            steady_lifetime: self.config.steady_lifetime,
            endpoints: self.addresses.clone(),
        })
    }

    // Inputs

    /// Consumes one datagram, or says where it goes.
    ///
    /// # Errors
    /// Says why it was dropped.
    pub fn handle_datagram(&mut self, now: Instant, source: SocketAddr, datagram: &[u8]) -> Result<Handled, Reject> {
        self.tick(now);
        let (header, payload) = geneve::split(datagram).ok_or(Reject::NotGeneve)?;
        if header.control {
            let outcome = self.control(header.vni, source, payload);
            self.counters.rejected += u64::from(outcome.is_err());
            return outcome.map(|()| Handled::Consumed);
        }
        let now_ms = self.clock_ms(now);
        let allocation = self.pairs.get(&header.vni).ok_or(Reject::UnknownPair)?;
        let pair = allocation.pair.as_ref().ok_or(Reject::NotOpen)?;
        let sender = pair.sender(source).ok_or(Reject::UnknownSource)?;
        pair.note(sender, now_ms, 1, datagram.len() as u64);
        Ok(Handled::Forward(pair.address(sender.other())))
    }

    /// Ends what has expired. Calling early, late or twice is harmless.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.tick(now);
        if self.sweep.is_none_or(|due| due > self.now) {
            return;
        }
        let ended: Vec<Vni> = self.pairs.keys().copied().filter(|vni| self.has_ended(*vni)).collect();
        for vni in ended {
            self.remove(vni);
        }
        self.sweep = (!self.pairs.is_empty()).then(|| self.now + SWEEP);
    }

    // Outputs

    /// The next datagram to send, and where.
    pub fn poll_transmit(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        self.transmits.pop_front()
    }

    /// The next change for threads that forward.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub const fn poll_timeout(&self) -> Option<Instant> {
        self.sweep
    }

    // Getters

    /// The server's disco key.
    #[must_use]
    pub const fn public(&self) -> DiscoPublic {
        self.public
    }

    /// The clock of [`Pair::note`], in milliseconds.
    #[must_use]
    pub fn clock_ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX)
    }

    /// What it has done.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// All allocations, by number.
    pub fn sessions(&self) -> impl Iterator<Item = Session> {
        self.pairs.iter().map(|(vni, allocation)| Session {
            vni: *vni,
            clients: allocation.clients,
            bound: [0, 1].map(|leg: usize| allocation.legs[leg].bound),
            forwarded: allocation.meter.forwarded(),
        })
    }

    fn tick(&mut self, now: Instant) {
        self.now = self.now.max(now);
        self.secrets.tick(self.now, &mut self.rng);
    }

    fn add(&mut self, clients: [DiscoPublic; 2]) -> Result<Vni, Refused> {
        let crowded =
            |client: &DiscoPublic| self.load.get(client).is_some_and(|count| *count >= self.config.max_pairs_of_client);
        if self.pairs.len() >= self.config.max_pairs || clients.iter().any(crowded) {
            self.counters.refused += 1;
            return Err(Refused::Full);
        }
        let vni = self.free_vni().ok_or(Refused::Full)?;
        self.lamport += 1;
        self.counters.allocated += 1;
        let allocation = Allocation {
            clients,
            lamport: self.lamport,
            asked: self.now,
            legs: Default::default(),
            pair: None,
            meter: Arc::default(),
            binds: Budget::full(self.now),
        };
        self.pairs.insert(vni, allocation);
        self.by_clients.insert(clients, vni);
        for client in clients {
            *self.load.entry(client).or_default() += 1;
        }
        self.sweep.get_or_insert(self.now + SWEEP);
        Ok(vni)
    }

    /// The next number that is not taken: an old one comes back as late as possible.
    fn free_vni(&mut self) -> Option<Vni> {
        for _ in 0..=self.pairs.len() {
            let vni = Vni::new(self.next_vni)?;
            self.next_vni = if self.next_vni + 1 == VNI_END { 1 } else { self.next_vni + 1 };
            if !self.pairs.contains_key(&vni) {
                return Some(vni);
            }
        }
        None
    }

    fn has_ended(&self, vni: Vni) -> bool {
        let Some(allocation) = self.pairs.get(&vni) else { return true };
        let (silent, life) = if allocation.pair.is_some() {
            let seen = self.epoch + Duration::from_millis(allocation.meter.seen());
            (self.now.saturating_duration_since(seen), self.config.steady_lifetime)
        } else {
            (self.now.saturating_duration_since(allocation.asked), self.config.bind_lifetime)
        };
        silent > life
    }

    fn remove(&mut self, vni: Vni) {
        let Some(allocation) = self.pairs.remove(&vni) else { return };
        self.by_clients.remove(&allocation.clients);
        for client in allocation.clients {
            if let Some(count) = self.load.get_mut(&client) {
                *count -= 1;
                if *count == 0 {
                    self.load.remove(&client);
                }
            }
        }
        self.counters.expired += 1;
        if allocation.pair.is_some() {
            self.events.push_back(Event::Closed(vni));
        }
    }

    /// A message for the server itself.
    fn control(&mut self, vni: Vni, source: SocketAddr, payload: &[u8]) -> Result<(), Reject> {
        let allocation = self.pairs.get_mut(&vni).ok_or(Reject::UnknownPair)?;
        let sender = seal::sender(payload).ok_or(Reject::UnknownSender)?;
        let leg = match allocation.clients.iter().position(|client| *client == sender) {
            Some(0) => Leg::Low,
            Some(_) => Leg::High,
            None => return Err(Reject::UnknownSender),
        };
        let shared = allocation.legs[leg.index()].shared.get_or_insert_with(|| self.disco.box_with(&sender));
        let plaintext = seal::open(shared, payload).ok_or(Reject::Unsealed)?;
        let about = |binding: &Binding| {
            let other = allocation.clients[leg.other().index()];
            binding.vni == vni && binding.remote == other && binding.generation != 0
        };
        match Message::decode(&plaintext)? {
            Message::Bind(binding) if about(&binding) => self.bind(leg, source, binding),
            Message::BindAnswer(binding) if about(&binding) => self.answer(leg, source, &binding),
            Message::Bind(_) | Message::BindAnswer(_) => Err(Reject::Mismatch),
            Message::BindChallenge(_)
            | Message::Ping(_)
            | Message::Pong(_)
            | Message::CallMeMaybe(_)
            | Message::CallMeMaybeVia(_)
            | Message::AllocateRequest(_)
            | Message::AllocateResponse(_)
            | Message::Punch(_) => Err(Reject::Unexpected),
        }
    }

    /// Asks whoever is at `source` to prove it. What is sent is as long as what came.
    fn bind(&mut self, leg: Leg, source: SocketAddr, mut binding: Binding) -> Result<(), Reject> {
        let allocation = self.pairs.get_mut(&binding.vni).ok_or(Reject::UnknownPair)?;
        if !allocation.binds.take(self.now) || self.transmits.len() >= MAX_TRANSMITS {
            return Err(Reject::TooOften);
        }
        let side = &mut allocation.legs[leg.index()];
        let shared = side.shared.as_ref().ok_or(Reject::Unsealed)?;
        side.generation = Some(binding.generation);
        binding.challenge = self.secrets.challenge(&binding, source);
        let vni = binding.vni;
        let mut plaintext = Vec::new();
        Message::BindChallenge(binding).encode(&mut plaintext);
        let sealed = seal::seal(&self.public, shared, &mut self.rng, &plaintext);
        self.transmits.push_back((source, geneve::encapsulate(vni, Content::Control, &sealed)));
        self.counters.challenged += 1;
        Ok(())
    }

    /// Binds a leg to where its client has proven to be.
    fn answer(&mut self, leg: Leg, source: SocketAddr, binding: &Binding) -> Result<(), Reject> {
        let now_ms = self.clock_ms(self.now);
        let allocation = self.pairs.get_mut(&binding.vni).ok_or(Reject::UnknownPair)?;
        let side = &mut allocation.legs[leg.index()];
        if side.generation != Some(binding.generation) || !self.secrets.accept(binding, source) {
            return Err(Reject::WrongAnswer);
        }
        side.generation = None;
        let moved = side.bound.replace(source) != Some(source);
        allocation.meter.touch(leg, now_ms);
        self.counters.bound += 1;
        if let ([Some(low), Some(high)], true) = ([0, 1].map(|leg: usize| allocation.legs[leg].bound), moved) {
            let pair = Arc::new(Pair::new(binding.vni, [low, high], Arc::clone(&allocation.meter)));
            allocation.pair = Some(Arc::clone(&pair));
            self.events.push_back(Event::Open(pair));
        }
        Ok(())
    }
}
