//! What deployed peers expect of us, each line with the tests that hold us to it. Tests without a place are below.
//!
//! | what | tests |
//! |---|---|
//! | the envelope's bytes; boxes made by deployed peers open, ours are made the same | `disco::seal`: `recorded_datagrams_open_and_come_out_the_same_again` |
//! | pings of 12 and 44 bytes and padded ones; trailing bytes; other versions | `disco::message`: `bodies_have_the_documented_sizes`, `what_follows_a_fixed_body_is_ignored`; `traversal`: `a_ping_without_a_node_key_…`; [`pings_of_every_age_are_answered`] |
//! | call-me-maybes that are empty, of odd length, with mapped, link-local and too many addresses; only through a relay, only from the key's holder | `disco::message`: `an_unreadable_call_me_maybe_is_an_empty_list`; `path::candidate`: `addresses_that_lead_nowhere_are_dropped`; `traversal`: `a_flood_of_addresses_is_bounded`, `call_me_maybe_is_believed_only_…` |
//! | several node keys on one disco key | `traversal`: `a_ping_without_a_node_key_…`; [`a_pong_serves_whoever_of_those_sharing_a_disco_key_was_pinged`] |
//! | a pong from another address than was pinged | [`a_pong_from_elsewhere_proves_the_address_that_was_pinged`] |
//! | what shares one socket is told apart, the padding byte of batches too | `classify`: all |
//! | Geneve's control bit; nothing forwarded before both are bound; binding again moves | `relay::geneve`, `relay::server`, `relay::client` |
//! | sizes, generations and Lamport ids of relay records; none without addresses | `disco::message`: `bodies_have_the_documented_sizes`, `relay_endpoints_without_addresses_are_refused`; `relay::client`: `the_newest_record_of_a_server_holds` |
//! | every call-me-maybe lists all addresses that work | [`every_call_me_maybe_lists_what_the_peer_sees_of_us`] |
//! | 6.5 s of trust; both copies of a packet are borne | [`an_address_is_trusted_for_six_and_a_half_seconds_after_a_pong`]; `mesh-node`: `a_datagram_seen_before_is_dropped_and_counted`, `while_a_path_is_in_doubt_packets_go_by_the_relay_too_and_arrive_once` |
//! | STUN requests as deployed relays want them | `stun::message`: `requests_equal_the_recorded_ones_byte_for_byte`, `a_changed_request_is_refused` |
//! | when the home region may move | `report::home`: all |
//! | endpoints' kinds and order, and the network report to control | `mesh-node`: `engine::endpoints`, `driver::control` |
//! | a peer that sends no heartbeats keeps its path | [`a_peer_without_heartbeats_keeps_its_path`] |
//! | a rotated disco key | `traversal`: `a_peer_that_restarts_with_a_new_disco_key_is_found_again`. Keys told inside the tunnel: `mesh-node`, `engine/tests/restart.rs` |

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_derp::map::RegionId;
use mesh_nat::agent::{PeerConfig, Source};
use mesh_nat::disco::message::{Message, Ping, Pong, TxId};
use mesh_nat::disco::seal;
use mesh_nat::{Agent, Family, Path, SocketId};
use mesh_noise::key::{DiscoPrivate, NodePublic};
use rand::SeedableRng;
use rand::rngs::StdRng;

const SOCKET: SocketId = SocketId(0);

/// Our agent, and a deployed peer by hand: it does what a test says.
struct Lab {
    now: Instant,
    agent: Agent,
    disco: DiscoPrivate,
    node: NodePublic,
    rng: StdRng,
}

impl Lab {
    fn new() -> Self {
        #[expect(clippy::disallowed_methods, reason = "virtual time starts at any instant")]
        let now = Instant::now();
        let mut agent = Agent::new(now, DiscoPrivate::from_bytes([1; 32]), NodePublic::from_bytes([1; 32]), [1; 32]);
        agent.set_sockets(vec![(SOCKET, Family::V4)]);
        agent.set_endpoints(now, vec![address(1)]);
        let (disco, node) = (DiscoPrivate::from_bytes([2; 32]), NodePublic::from_bytes([2; 32]));
        let mut lab = Self { now, agent, disco, node, rng: StdRng::seed_from_u64(1) };
        lab.introduce(lab.node, vec![address(2)]);
        lab
    }

    fn introduce(&mut self, node: NodePublic, endpoints: Vec<SocketAddr>) {
        let disco = self.disco.public();
        let home = RegionId::new(1);
        self.agent.set_peer(self.now, PeerConfig { node, disco, home, endpoints, ..PeerConfig::default() });
    }

    /// What the peer receives from us by now: the way, and the message.
    fn received(&mut self) -> Vec<(Path, Message)> {
        let shared = self.disco.box_with(&self.agent.disco_public());
        std::iter::from_fn(|| self.agent.poll_transmit())
            .map(|transmit| {
                let plaintext = seal::open(&shared, &transmit.datagram).unwrap();
                (transmit.path, Message::decode(&plaintext).unwrap())
            })
            .collect()
    }

    /// The pings among them, and where they went.
    fn pings(&mut self) -> Vec<(SocketAddr, TxId)> {
        let of = |(path, message)| match (path, message) {
            (Path::Direct { remote, .. }, Message::Ping(ping)) => Some((remote, ping.tx)),
            _ => None,
        };
        self.received().into_iter().filter_map(of).collect()
    }

    fn deliver(&mut self, from: SocketAddr, message: &Message) {
        let mut plaintext = Vec::new();
        message.encode(&mut plaintext);
        self.deliver_bytes(from, &plaintext);
    }

    fn deliver_bytes(&mut self, from: SocketAddr, plaintext: &[u8]) {
        let shared = self.disco.box_with(&self.agent.disco_public());
        let datagram = seal::seal(&self.disco.public(), &shared, &mut self.rng, plaintext);
        self.agent.handle_datagram(self.now, Source::direct(SOCKET, from), &datagram).unwrap();
    }

    /// Answers pings to the peer's address for `span`, while we send data.
    fn run(&mut self, span: Duration, answers: bool) {
        let end = self.now + span;
        while self.now < end {
            let node = self.node;
            self.agent.traffic(self.now, &node);
            self.agent.handle_timeout(self.now);
            for (to, tx) in self.pings() {
                if answers && to == address(2) {
                    self.deliver(to, &pong(tx, address(9)));
                }
            }
            self.now += Duration::from_millis(50);
        }
    }

    fn path(&self) -> Option<Path> {
        self.agent.path(&self.node)
    }
}

fn address(number: u8) -> SocketAddr {
    ([192, 0, 2, number], 41641).into()
}

fn direct(number: u8) -> Option<Path> {
    Some(Path::Direct { socket: SOCKET, remote: address(number) })
}

fn pong(tx: TxId, observed: SocketAddr) -> Message {
    Message::Pong(Pong { tx, observed })
}

#[test]
fn pings_of_every_age_are_answered() {
    let mut lab = Lab::new();
    let mut answered = |plaintext: &[u8], tx: u8| {
        lab.deliver_bytes(address(2), plaintext);
        let pongs = lab.received().into_iter().filter_map(|(_, message)| {
            let Message::Pong(pong) = message else { return None };
            Some(pong)
        });
        assert_eq!(pongs.collect::<Vec<_>>(), [Pong { tx: TxId([tx; 12]), observed: address(2) }]);
    };
    let node = [2; 32];
    answered(&[&[1, 0][..], &[1; 12]].concat(), 1);
    answered(&[&[1, 0][..], &[2; 12], &node].concat(), 2);
    answered(&[&[1, 0][..], &[3; 12], &node, &[0; 1200]].concat(), 3);
    answered(&[&[1, 9][..], &[4; 12], &node, b"from the future"].concat(), 4);
}

#[test]
fn a_pong_serves_whoever_of_those_sharing_a_disco_key_was_pinged() {
    let mut lab = Lab::new();
    let twin = NodePublic::from_bytes([3; 32]);
    lab.introduce(twin, vec![address(3)]);
    let now = lab.now;
    lab.agent.traffic(now, &twin);
    let pings = lab.pings();
    assert_eq!(pings.iter().map(|(to, _)| *to).collect::<Vec<_>>(), [address(3)]);
    lab.deliver(address(3), &pong(pings[0].1, address(1)));
    assert_eq!(lab.agent.path(&twin), direct(3));
    assert!(!lab.path().unwrap().is_direct(), "the other one has proven nothing");
}

#[test]
fn a_pong_from_elsewhere_proves_the_address_that_was_pinged() {
    let mut lab = Lab::new();
    let (now, node) = (lab.now, lab.node);
    lab.agent.traffic(now, &node);
    let (to, tx) = lab.pings()[0];
    assert_eq!(to, address(2));
    lab.deliver(address(7), &pong(tx, address(1)));
    assert_eq!(lab.path(), direct(2));
}

#[test]
fn every_call_me_maybe_lists_what_the_peer_sees_of_us() {
    let mut lab = Lab::new();
    lab.run(Duration::from_secs(2), true);
    // The path dies, so that the peer is called.
    let mut calls = Vec::new();
    for _ in 0..200 {
        let (now, node) = (lab.now, lab.node);
        lab.agent.traffic(now, &node);
        lab.agent.handle_timeout(now);
        let of = |(path, message)| match (path, message) {
            (Path::Relay { .. }, Message::CallMeMaybe(call)) => Some(call.endpoints),
            _ => None,
        };
        calls.extend(lab.received().into_iter().filter_map(of));
        lab.now += Duration::from_millis(50);
    }
    assert_eq!(calls[0], [address(1), address(9)], "our own list, and the address that only the peer can see");
}

#[test]
fn an_address_is_trusted_for_six_and_a_half_seconds_after_a_pong() {
    let mut lab = Lab::new();
    lab.run(Duration::from_secs(1), true);
    assert_eq!(lab.path(), direct(2));
    // Nothing is sent, so nothing is asked.
    lab.now += Duration::from_millis(5400);
    lab.agent.handle_timeout(lab.now);
    lab.pings();
    assert!(lab.path().unwrap().is_direct());
    lab.now += Duration::from_millis(1200);
    lab.agent.handle_timeout(lab.now);
    assert!(lab.path().unwrap().is_relay());
}

#[test]
fn a_peer_without_heartbeats_keeps_its_path() {
    let mut lab = Lab::new();
    lab.run(Duration::from_secs(1), true);
    let since = lab.agent.status(&lab.node).unwrap().since;
    lab.run(Duration::from_secs(60), true);
    assert_eq!(lab.path(), direct(2));
    assert_eq!(lab.agent.status(&lab.node).unwrap().since, since, "it never left it");
}

#[test]
fn a_ping_through_the_relay_is_answered_through_it() {
    let mut lab = Lab::new();
    let shared = lab.disco.box_with(&lab.agent.disco_public());
    let mut plaintext = Vec::new();
    Message::Ping(Ping { tx: TxId([5; 12]), node: Some(lab.node), padding: 0 }).encode(&mut plaintext);
    let datagram = seal::seal(&lab.disco.public(), &shared, &mut lab.rng, &plaintext);
    let region = RegionId::new(1).unwrap();
    lab.agent.handle_datagram(lab.now, Source::relay(region, lab.node), &datagram).unwrap();
    let observed = ([127, 3, 3, 40], 1).into();
    assert_eq!(lab.received(), [(Path::Relay { region }, pong(TxId([5; 12]), observed))]);
}
