//! Paths through peer relays: seals and opens what [`relay::Client`](crate::relay::Client) says and hears.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Instant;

use mesh_noise::key::{DiscoPublic, NodePublic};

use super::{Agent, Event, MAX_TRANSMITS, Mode, Reject, Source, Transmit};
use crate::disco::message::{AllocateRequest, AllocateResponse, Message, Ping, RelayEndpoint};
use crate::disco::seal;
use crate::path::{Family, Path, Vni};
use crate::relay::client::{Output, Place};
use crate::relay::geneve::{self, Content};

/// The longest WireGuard datagram that is sent through a peer relay before a longer ping has been answered, in bytes: what
/// a tunnel of 1,280 needs. With the relay's header that makes packets of 1,348 bytes, or 1,368 by IPv6, which all but the
/// narrowest links carry; those are found like narrow direct paths.
const RELAYED_LIMIT: usize = 1312;
/// Shared keys with servers that are kept.
const MAX_BOXES: usize = 64;

/// Who may relay for whom, as the packet filter's grants say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Relays {
    /// Nodes that may be asked to relay; our own key is among them if we serve.
    pub servers: BTreeSet<NodePublic>,
    /// Peers that may ask us.
    pub clients: BTreeSet<NodePublic>,
}

/// The way to a peer through a peer relay, while it is proven.
#[derive(Debug, Clone, Copy)]
pub(super) struct Relayed {
    pub(super) place: Place,
    /// Whether a region carries copies, since it may have stopped working.
    pub(super) doubted: bool,
    /// The longest datagram that is known to pass; none if everything that is wanted does.
    pub(super) limit: Option<usize>,
}

impl Relayed {
    const fn new(place: Place) -> Self {
        Self { place, doubted: false, limit: Some(RELAYED_LIMIT) }
    }

    /// What is wanted has changed: nothing is known about it.
    pub(super) const fn forget_limit(&mut self) {
        self.limit = Some(RELAYED_LIMIT);
    }
}

impl From<Place> for Path {
    fn from(place: Place) -> Self {
        Self::PeerRelay { server: place.server, vni: place.vni }
    }
}

impl Agent {
    /// Says who may relay for whom. Paths in use last while they work.
    pub fn set_relays(&mut self, relays: Relays) {
        self.relay.set_servers(relays.servers);
        self.relay_clients = relays.clients;
    }

    /// Answers [`Event::AllocationAsked`].
    pub fn allocated(&mut self, now: Instant, to: NodePublic, response: AllocateResponse) {
        self.tick(now);
        if to == self.node {
            self.relay.allocated(now, response);
        } else if let Some(region) = self.peers.get(&to).and_then(|peer| peer.region()) {
            self.send(to, Path::Relay { region }, &Message::AllocateResponse(response));
        }
    }

    /// Tells the client of peer relays how data for `node` goes.
    pub(super) fn relay_traffic(&mut self, node: NodePublic) {
        let Some(peer) = self.peers.get(&node) else { return };
        if self.mode == Mode::Auto && !self.sockets.is_empty() && !peer.disco.is_zero() {
            self.relay.traffic(self.now, node, peer.disco, peer.best.is_some());
        }
    }

    /// Does what the client of peer relays wants.
    pub(super) fn drain_relay(&mut self) {
        while let Some(output) = self.relay.poll_output() {
            match output {
                Output::Signal { to, message } => {
                    if let Some(region) = self.peers.get(&to).and_then(|peer| peer.region()) {
                        self.send(to, Path::Relay { region }, &message);
                    }
                }
                Output::Allocate(AllocateRequest { clients, generation }) => {
                    self.events.push_back(Event::AllocationAsked { from: self.node, clients, generation });
                }
                Output::Control { key, place, message } => self.send_control(key, place, &message),
                Output::Ping { peer, place, tx } => {
                    let ping = Message::Ping(Ping { tx, node: Some(self.node), padding: 0 });
                    self.send(peer, place.into(), &ping);
                }
                Output::Path { peer, place } => {
                    if let Some(state) = self.peers.get_mut(&peer) {
                        state.relayed = place.map(Relayed::new);
                        self.refresh(peer);
                        self.length_through_relay(peer);
                    }
                }
                Output::Doubt { peer, doubted } => {
                    if let Some(relayed) = self.peers.get_mut(&peer).and_then(|state| state.relayed.as_mut()) {
                        relayed.doubted = doubted;
                        self.refresh(peer);
                        if !doubted {
                            // It may lead by another network now.
                            self.length_through_relay(peer);
                        }
                    }
                }
            }
        }
    }

    /// The way of a datagram to a peer relay at `server`: by our first socket of its family.
    #[must_use]
    pub fn way_to(&self, server: SocketAddr) -> Option<Path> {
        let family = Family::of(&server);
        let (socket, _) = self.sockets.iter().find(|(_, other)| *other == family)?;
        Some(Path::Direct { socket: *socket, remote: server })
    }

    fn send_control(&mut self, key: DiscoPublic, place: Place, message: &Message) {
        let Some(path) = self.way_to(place.server) else { return };
        if self.transmits.len() >= MAX_TRANSMITS {
            self.counters.transmits_dropped += 1;
            return;
        }
        if self.server_boxes.len() >= MAX_BOXES && !self.server_boxes.contains_key(&key) {
            self.server_boxes.clear();
        }
        let shared = self.server_boxes.entry(key).or_insert_with(|| self.disco.box_with(&key));
        let mut plaintext = Vec::new();
        message.encode(&mut plaintext);
        let sealed = seal::seal(&self.disco_public, shared, &mut self.rng, &plaintext);
        let datagram = geneve::encapsulate(place.vni, Content::Control, &sealed);
        // Whom the relay is for does not matter to whoever sends it.
        self.transmits.push_back(Transmit { path, peer: NodePublic::default(), datagram });
    }

    /// Disco behind a Geneve header, from `server`.
    pub(super) fn handle_relayed(
        &mut self,
        server: SocketAddr,
        vni: Vni,
        control: bool,
        datagram: &[u8],
    ) -> Result<(), Reject> {
        if self.mode != Mode::Auto {
            return Err(Reject::Disabled);
        }
        if !control {
            let source = Source { path: Path::PeerRelay { server, vni }, node: None };
            return self.handle_disco(source, datagram);
        }
        // Only what a handshake waits for is worth opening.
        let sender = seal::sender(datagram).ok_or(Reject::NotDisco)?;
        if !self.relay.expects(&sender) {
            return Err(Reject::UnknownSender);
        }
        let shared = self.server_boxes.get(&sender).ok_or(Reject::UnknownSender)?;
        let plaintext = seal::open(shared, datagram).ok_or(Reject::Unsealed)?;
        match Message::decode(&plaintext)? {
            Message::BindChallenge(challenge) if challenge.vni == vni => {
                let expected = self.relay.challenge(self.now, sender, server, &challenge);
                if expected { Ok(()) } else { Err(Reject::Unasked) }
            }
            Message::BindChallenge(_)
            | Message::Bind(_)
            | Message::BindAnswer(_)
            | Message::Ping(_)
            | Message::Pong(_)
            | Message::CallMeMaybe(_)
            | Message::CallMeMaybeVia(_)
            | Message::AllocateRequest(_)
            | Message::AllocateResponse(_)
            | Message::Punch(_) => Err(Reject::Unasked),
        }
    }

    /// Who is meant by a message that only counts when a DERP relay vouches for the sender.
    fn vouched(&mut self, source: Source, holders: &[NodePublic]) -> Result<NodePublic, Reject> {
        let Path::Relay { region } = source.path else { return Err(Reject::NotOverRelay) };
        let node = source.node.filter(|node| holders.contains(node)).ok_or(Reject::WrongNode)?;
        self.heard_by_relay(&node, region);
        Ok(node)
    }

    pub(super) fn on_via(
        &mut self,
        source: Source,
        holders: &[NodePublic],
        endpoint: RelayEndpoint,
    ) -> Result<(), Reject> {
        let node = self.vouched(source, holders)?;
        if self.mode != Mode::Auto {
            return Err(Reject::Disabled);
        }
        let disco = self.peers.get(&node).map(|peer| peer.disco).ok_or(Reject::UnknownSender)?;
        self.relay.via(self.now, node, disco, endpoint);
        Ok(())
    }

    /// A peer asks us to relay. It must be one of the two, and allowed to.
    pub(super) fn on_allocate(
        &mut self,
        source: Source,
        holders: &[NodePublic],
        sender: DiscoPublic,
        request: &AllocateRequest,
    ) -> Result<(), Reject> {
        let from = self.vouched(source, holders)?;
        if !self.relay_clients.contains(&from) || !request.clients.contains(&sender) {
            return Err(Reject::NotAllowed);
        }
        let AllocateRequest { clients, generation } = *request;
        self.events.push_back(Event::AllocationAsked { from, clients, generation });
        Ok(())
    }

    pub(super) fn on_allocated(
        &mut self,
        source: Source,
        holders: &[NodePublic],
        response: AllocateResponse,
    ) -> Result<(), Reject> {
        let server = self.vouched(source, holders)?;
        self.relay.response(self.now, server, response);
        Ok(())
    }
}
