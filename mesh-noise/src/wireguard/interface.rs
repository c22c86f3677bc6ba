//! An interface: one private key and its peers. The one place where WireGuard decides anything.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Debug;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::cookie::Checker;
use super::handshake::{Asked, Identity};
use super::message::{self, CookieReply, Initiation, MessageKind, Response};
use super::peer::Peer;
use super::timestamp::WallClock;
use super::{Activity, Reject, Session, Timing};
use crate::key::{NodePrivate, NodePublic, PresharedKey};
use crate::random::SeededRng;

/// A datagram to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit<P> {
    /// For whom; none for a cookie reply, whose sender was not authenticated.
    pub peer: Option<NodePublic>,
    /// Where to: along this path, or along the caller's present path to `peer` if none. One of the two is always there.
    pub path: Option<P>,
    /// The bytes.
    pub datagram: Vec<u8>,
}

/// A fact that the caller should know.
#[derive(Debug, Clone)]
pub enum Event<P> {
    /// Datagrams may arrive on this session from now on: file it under its receiver index.
    SessionOpened {
        /// Whose session.
        peer: NodePublic,
        /// The session.
        session: Arc<Session>,
    },
    /// This session is the one to send on from now on. It was opened before.
    SessionReady {
        /// Whose session.
        peer: NodePublic,
        /// The session.
        session: Arc<Session>,
    },
    /// The session is gone: forget it, and stop sending on it.
    SessionClosed {
        /// Whose session.
        peer: NodePublic,
        /// Its receiver index.
        receiver_index: u32,
    },
    /// No answer within `REKEY-ATTEMPT-TIME` of the last wish for a session; packets that wait may be dropped.
    HandshakeFailed {
        /// The silent peer.
        peer: NodePublic,
    },
    /// A handshake message that came along `path` was authentic: the peer can be reached there (roaming).
    Authenticated {
        /// The peer.
        peer: NodePublic,
        /// Where its message came from.
        path: P,
    },
}

/// What is set per peer.
#[derive(Debug, Clone, Default)]
pub struct PeerConfig {
    /// Mixed into the handshake; all zero is the same as none.
    pub preshared: PresharedKey,
    /// Send at least one datagram per interval, so that a NAT on the way keeps its mapping. Default: off.
    pub persistent_keepalive: Option<Duration>,
}

/// What is known of a peer, for people.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PeerStatus {
    /// When the last handshake was completed.
    pub last_handshake: Option<SystemTime>,
    /// As it was set.
    pub config: PeerConfig,
    /// Traffic, as counted by the packet path.
    pub activity: Arc<Activity>,
    /// The session to send on, if there is one.
    pub session: Option<Arc<Session>>,
}

/// What all peers of an interface share.
#[derive(Debug)]
pub(super) struct Shared<P> {
    epoch: Instant,
    pub(super) wall: WallClock,
    pub(super) timing: Timing,
    pub(super) identity: Identity,
    pub(super) rng: SeededRng,
    /// Every index in use, by a session or by an initiation in flight.
    pub(super) indices: BTreeMap<u32, NodePublic>,
    pub(super) transmits: VecDeque<Transmit<P>>,
    pub(super) events: VecDeque<Event<P>>,
}

impl<P> Shared<P> {
    pub(super) fn clock_ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX - 1) + 1
    }

    /// The reverse of [`clock_ms`](Self::clock_ms); none for "never".
    pub(super) fn instant(&self, ms: u64) -> Option<Instant> {
        self.epoch.checked_add(Duration::from_millis(ms.checked_sub(1)?))
    }

    pub(super) fn new_index(&mut self, peer: NodePublic) -> u32 {
        loop {
            let index = u32::from_le_bytes(self.rng.array());
            if let std::collections::btree_map::Entry::Vacant(free) = self.indices.entry(index) {
                free.insert(peer);
                return index;
            }
        }
    }
}

/// A private key and its peers, without I/O. `P` is whatever the caller calls a path.
///
/// Methods are of four kinds: getters; commands and `handle_*`, which take the time; `poll_*`, to be drained after
/// each of those. The queues behind `poll_*` grow by a few entries per peer and call at most.
///
/// ```
/// use std::time::{Instant, SystemTime};
/// use mesh_noise::key::NodePrivate;
/// use mesh_noise::random::SeededRng;
/// use mesh_noise::wireguard::{Event, Interface, PeerConfig};
///
/// # #[expect(clippy::disallowed_methods, reason = "an example is its own driver")]
/// let (now, wall) = (Instant::now(), SystemTime::now());
/// let mut rng = SeededRng::from_seed([1; 32]);
/// let (key_a, key_b) = (NodePrivate::generate(&mut rng), NodePrivate::generate(&mut rng));
/// let mut a = Interface::new(now, wall, &key_a, [2; 32]);
/// let mut b = Interface::new(now, wall, &key_b, [3; 32]);
/// a.set_peer(now, key_b.public(), PeerConfig::default());
/// b.set_peer(now, key_a.public(), PeerConfig::default());
///
/// a.want_session(now, &key_b.public());
/// let initiation = a.poll_transmit().expect("a packet waits");
/// b.handle_datagram(now, &"a's address", None, &initiation.datagram)?;
/// let response = b.poll_transmit().expect("b knows a");
/// a.handle_datagram(now, &"b's address", None, &response.datagram)?;
/// let ready = std::iter::from_fn(|| a.poll_event()).any(|event| matches!(event, Event::SessionReady { .. }));
/// assert!(ready);
/// # Ok::<(), mesh_noise::wireguard::Reject>(())
/// ```
#[derive(Debug)]
pub struct Interface<P> {
    shared: Shared<P>,
    checker: Checker,
    /// Boxed, since the nodes of a tree are never full.
    peers: BTreeMap<NodePublic, Box<Peer>>,
    schedule: BTreeSet<(Instant, NodePublic)>,
}

impl<P: Clone + Eq + Debug> Interface<P> {
    /// An interface without peers, at `now`, which is `wall` on the wall clock.
    ///
    /// All its randomness comes from `seed`, which has to be fresh for every interface of a key.
    #[must_use]
    pub fn new(now: Instant, wall: SystemTime, private: &NodePrivate, seed: [u8; 32]) -> Self {
        let (identity, timing) = (Identity::new(private), Timing::default());
        Self {
            checker: Checker::new(identity.public(), timing.load_limit),
            shared: Shared {
                epoch: now,
                wall: WallClock::new(now, wall),
                timing,
                identity,
                rng: SeededRng::from_seed(seed),
                indices: BTreeMap::new(),
                transmits: VecDeque::new(),
                events: VecDeque::new(),
            },
            peers: BTreeMap::new(),
            schedule: BTreeSet::new(),
        }
    }

    /// Replaces the protocol's constants. Both sides of a tunnel should use the same: this is for tests.
    #[must_use]
    pub fn with_timing(mut self, timing: Timing) -> Self {
        self.checker = Checker::new(self.shared.identity.public(), timing.load_limit);
        self.shared.timing = timing;
        self
    }

    // --- Getters

    /// Our public key.
    #[must_use]
    pub fn public(&self) -> NodePublic {
        *self.shared.identity.public()
    }

    /// The constants in use.
    #[must_use]
    pub fn timing(&self) -> &Timing {
        &self.shared.timing
    }

    /// `now` as the [`Activity`] words have it: milliseconds since the interface was made, plus one.
    #[must_use]
    pub fn clock_ms(&self, now: Instant) -> u64 {
        self.shared.clock_ms(now)
    }

    /// The reverse of [`clock_ms`](Self::clock_ms); none for 0, which means "never".
    #[must_use]
    pub fn clock_instant(&self, ms: u64) -> Option<Instant> {
        self.shared.instant(ms)
    }

    /// The peers, by key.
    pub fn peers(&self) -> impl Iterator<Item = &NodePublic> {
        self.peers.keys()
    }

    /// Whether `peer` is one of ours.
    #[must_use]
    pub fn has_peer(&self, peer: &NodePublic) -> bool {
        self.peers.contains_key(peer)
    }

    /// The words in which the packet path notes this peer's traffic.
    #[must_use]
    pub fn activity(&self, peer: &NodePublic) -> Option<Arc<Activity>> {
        self.peers.get(peer).map(|peer| Arc::clone(peer.activity()))
    }

    /// What is known of this peer.
    #[must_use]
    pub fn status(&self, peer: &NodePublic) -> Option<PeerStatus> {
        self.peers.get(peer).map(|peer| PeerStatus {
            last_handshake: peer.last_handshake(),
            config: PeerConfig {
                preshared: peer.preshared().clone(),
                persistent_keepalive: peer.persistent_keepalive(),
            },
            activity: Arc::clone(peer.activity()),
            session: peer.current().map(Arc::clone),
        })
    }

    // --- Commands

    /// Adds a peer, or changes what is set for it; sessions stay. Our own key cannot be a peer and is ignored.
    pub fn set_peer(&mut self, now: Instant, peer: NodePublic, config: PeerConfig) {
        if peer == self.public() {
            return;
        }
        match self.peers.get_mut(&peer) {
            Some(known) => known.configure(now, config),
            None => {
                self.peers.insert(peer, Box::new(Peer::new(now, peer, config)));
            }
        }
        self.settle(now, &peer);
    }

    /// Removes a peer and ends its sessions. False if there was none.
    pub fn remove_peer(&mut self, peer: &NodePublic) -> bool {
        let Some(mut gone) = self.peers.remove(peer) else { return false };
        gone.reset(&mut self.shared);
        self.shared.identity.forget(peer);
        if let Some(at) = gone.scheduled {
            self.schedule.remove(&(at, *peer));
        }
        true
    }

    /// Becomes somebody else: ends every session. A peer with the new key is removed.
    pub fn set_private_key(&mut self, now: Instant, private: &NodePrivate) {
        let identity = Identity::new(private);
        if identity.public() == self.shared.identity.public() {
            return;
        }
        self.remove_peer(identity.public());
        self.checker = Checker::new(identity.public(), self.shared.timing.load_limit);
        self.shared.identity = identity;
        let peers: Vec<_> = self.peers.keys().copied().collect();
        for peer in peers {
            if let Some(peer) = self.peers.get_mut(&peer) {
                peer.reset(&mut self.shared);
            }
            self.settle(now, &peer);
        }
    }

    /// Pairs the two clocks again, after the system's wall clock was set.
    pub fn set_wall_clock(&mut self, now: Instant, wall: SystemTime) {
        self.shared.wall.set(now, wall);
    }

    /// A packet waits for this peer: starts a handshake unless there is a session to send on.
    ///
    /// Calling it again while the handshake is tried prolongs the trying. If there is a session after all,
    /// [`Event::SessionReady`] tells it again. Unknown peers are ignored.
    pub fn want_session(&mut self, now: Instant, peer: &NodePublic) {
        if let Some(known) = self.peers.get_mut(peer) {
            known.want_session(&mut self.shared, now);
            self.settle(now, peer);
        }
    }

    /// The way to this peer has changed, or its last initiation was reported as undeliverable: if a handshake is being
    /// tried, tries again no later than `after` from now, though never within 50 ms of the last initiation.
    ///
    /// The whitepaper's five seconds between tries (§6.4) spare a path that is known to work; a peer that has just
    /// appeared on its relay should not have to wait for them. Responders take up to 50 initiations a second.
    pub fn retry_handshake(&mut self, now: Instant, peer: &NodePublic, after: Duration) {
        if let Some(known) = self.peers.get_mut(peer) {
            known.retry_handshake(now, after);
            self.settle(now, peer);
        }
    }

    /// The peer has restarted, so it knows none of our sessions any more: starts a handshake at once, though never within
    /// 50 ms of the last initiation. Without this, silence would lead to one after 15 seconds (whitepaper §6.5). A session
    /// to send on stays until the new one takes its place, for the news may have been wrong.
    pub fn renew_session(&mut self, now: Instant, peer: &NodePublic) {
        if let Some(known) = self.peers.get_mut(peer) {
            known.renew_session(now);
            self.settle(now, peer);
        }
    }

    /// An [`Activity`] note returned true: looks at the peer's timers again.
    pub fn peer_active(&mut self, now: Instant, peer: &NodePublic) {
        self.settle(now, peer);
    }

    /// The session with this receiver index has opened a datagram. Needed only the first time, and harmless else.
    pub fn session_used(&mut self, now: Instant, receiver_index: u32) {
        let Some(peer) = self.shared.indices.get(&receiver_index).copied() else { return };
        if let Some(known) = self.peers.get_mut(&peer) {
            known.session_used(&mut self.shared, now, receiver_index);
            self.settle(now, &peer);
        }
    }

    // --- Input

    /// Takes a handshake message or a cookie reply that arrived along `path`.
    ///
    /// `source` is the sender's address, to bind cookies to; none when the message came through a relay.
    ///
    /// # Errors
    /// Says why the datagram was ignored. [`Reject::CookieRequired`] comes with a cookie reply to transmit.
    pub fn handle_datagram(
        &mut self,
        now: Instant,
        path: &P,
        source: Option<SocketAddr>,
        datagram: &[u8],
    ) -> Result<(), Reject> {
        match message::kind(datagram).ok_or(Reject::Malformed)? {
            MessageKind::Initiation => {
                let message = Initiation::parse(datagram)?;
                self.check(now, path, source, datagram, message.sender)?;
                self.handle_initiation(now, path, &message)
            }
            MessageKind::Response => {
                let message = Response::parse(datagram)?;
                self.check(now, path, source, datagram, message.sender)?;
                self.handle_response(now, path, &message)
            }
            MessageKind::CookieReply => {
                let reply = CookieReply::parse(datagram)?;
                let peer = self.shared.indices.get(&reply.receiver).ok_or(Reject::UnknownIndex)?;
                self.peers.get_mut(peer).ok_or(Reject::UnknownIndex)?.cookie(now, &reply)
            }
            MessageKind::TransportData { .. } => Err(Reject::WrongKind),
        }
    }

    fn check(
        &mut self,
        now: Instant,
        path: &P,
        source: Option<SocketAddr>,
        datagram: &[u8],
        sender: u32,
    ) -> Result<(), Reject> {
        let outcome = self.checker.check(now, source, datagram, &mut self.shared.rng);
        if let (Err(Reject::CookieRequired), Some(source)) = (outcome, source) {
            let reply = self.checker.reply(now, source, datagram, sender, &mut self.shared.rng);
            let datagram = reply.to_bytes().to_vec();
            self.shared.transmits.push_back(Transmit { peer: None, path: Some(path.clone()), datagram });
        }
        outcome
    }

    fn handle_initiation(&mut self, now: Instant, path: &P, message: &Initiation) -> Result<(), Reject> {
        let asked = Asked::read(&self.shared.identity, message, self.shared.rng.array())?;
        let peer = asked.peer;
        self.peers.get_mut(&peer).ok_or(Reject::UnknownPeer)?.asked(&mut self.shared, now, path, asked)?;
        self.settle(now, &peer);
        Ok(())
    }

    fn handle_response(&mut self, now: Instant, path: &P, message: &Response) -> Result<(), Reject> {
        let peer = self.shared.indices.get(&message.receiver).copied().ok_or(Reject::UnknownIndex)?;
        let known = self.peers.get_mut(&peer).ok_or(Reject::UnknownIndex)?;
        known.answered(&mut self.shared, now, path, message)?;
        self.settle(now, &peer);
        Ok(())
    }

    /// Does whatever is due at `now`. Calling early, late or twice is harmless.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((_, peer)) = self.schedule.first().copied().filter(|(at, _)| *at <= now) {
            self.settle(now, &peer);
        }
    }

    fn settle(&mut self, now: Instant, peer: &NodePublic) {
        let Some(known) = self.peers.get_mut(peer) else { return };
        let deadline = known.settle(&mut self.shared, now);
        if deadline != known.scheduled {
            if let Some(old) = std::mem::replace(&mut known.scheduled, deadline) {
                self.schedule.remove(&(old, *peer));
            }
            if let Some(new) = deadline {
                self.schedule.insert((new, *peer));
            }
        }
    }

    // --- Output

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit<P>> {
        self.shared.transmits.pop_front()
    }

    /// The next fact.
    pub fn poll_event(&mut self) -> Option<Event<P>> {
        self.shared.events.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.schedule.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Instant;

    /// Some instant to count from.
    #[expect(clippy::disallowed_methods, reason = "tests need an origin; everything after it is virtual")]
    pub(crate) fn start() -> Instant {
        Instant::now()
    }
}
