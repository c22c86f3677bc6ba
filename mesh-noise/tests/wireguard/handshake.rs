//! Who may talk to whom, and what a handshake survives.

use mesh_noise::key::NodePrivate;
use mesh_noise::random::SeededRng;
use mesh_noise::wireguard::message::MessageKind;
use mesh_noise::wireguard::{Interface, PeerConfig, Reject, Timing};

use crate::pair::{A, B, Fate, LATENCY, Pair, keys, millis, origin, same_kind, secs, wall};

#[test]
fn the_first_packet_brings_up_a_session_and_arrives() {
    let mut pair = Pair::new();
    pair.send(A, b"ping");
    pair.run(LATENCY * 3);
    assert_eq!(pair.nodes[B].received, [b"ping"]);
    pair.send(B, b"pong");
    pair.run(LATENCY);
    assert_eq!(pair.nodes[A].received, [b"pong"]);
    assert_eq!((pair.initiations(A).len(), pair.initiations(B).len()), (1, 0));
    let [a, b] = &pair.nodes;
    let (a, b) = (a.sending().unwrap(), b.sending().unwrap());
    assert_eq!((a.receiver_index(), a.sender_index()), (b.sender_index(), b.receiver_index()));
    assert_eq!(a.activity().sent_packets(), 1);
    assert_eq!(a.activity().received_bytes(), 92 + 32 + 16);
}

#[test]
fn both_sides_may_initiate_at_once() {
    let mut pair = Pair::new();
    pair.send(A, b"from a");
    pair.send(B, b"from b");
    pair.run(secs(1));
    assert_eq!(pair.nodes[A].received, [b"from b"]);
    assert_eq!(pair.nodes[B].received, [b"from a"]);
    for _ in 0..20 {
        pair.send(A, b"more");
        pair.send(B, b"more");
        pair.run(secs(5));
    }
    assert_eq!((pair.nodes[A].received.len(), pair.nodes[B].received.len()), (21, 21));
    assert_eq!((pair.initiations(A).len(), pair.initiations(B).len()), (1, 1), "no handshake storm");
}

#[test]
fn preshared_keys_have_to_agree() {
    let mut equal = Pair::with_psk([[7; 32], [7; 32]]);
    equal.send(A, b"secret");
    equal.run(secs(1));
    assert_eq!(equal.nodes[B].received, [b"secret"]);

    let mut different = Pair::with_psk([[7; 32], [8; 32]]);
    different.send(A, b"secret");
    different.run(secs(1));
    assert_eq!(different.nodes[A].rejects, [Reject::Authentication]);
    assert!(different.nodes[A].sending().is_none() && different.nodes[B].received.is_empty());
}

#[test]
fn a_replayed_initiation_is_refused_and_changes_nothing() {
    let mut pair = Pair::new();
    pair.send(A, b"ping");
    let initiation = pair.log[0].datagram.clone();
    pair.run(secs(1));
    assert_eq!(pair.deliver(B, 99, initiation), Err(Reject::OldTimestamp));
    assert_eq!(pair.nodes[B].path, 10, "a replay does not move the peer");
    pair.send(A, b"still");
    pair.run(secs(1));
    assert_eq!(pair.nodes[B].received.len(), 2);
}

#[test]
fn a_replayed_response_and_replayed_data_are_refused() {
    let mut pair = Pair::new();
    pair.send(A, b"ping");
    pair.run(secs(1));
    let find = |which: MessageKind| {
        pair.log.iter().find(|sent| same_kind(sent.kind, which)).map(|sent| sent.datagram.clone()).unwrap()
    };
    let (response, data) = (find(MessageKind::Response), find(MessageKind::TransportData { receiver: 0 }));
    assert_eq!(pair.deliver(A, 20, response), Err(Reject::UnknownIndex));
    assert_eq!(pair.deliver(B, 99, data), Err(Reject::Replayed));
    assert_eq!(pair.nodes[B].path, 10);
}

#[test]
fn strangers_and_noise_are_met_with_silence() {
    let mut pair = Pair::new();
    let stranger = NodePrivate::generate(&mut SeededRng::from_seed([9; 32]));
    let now = pair.now;
    let mut core: Interface<u8> = Interface::new(now, wall(), &stranger, [9; 32]);
    core.set_peer(now, keys()[B].public(), PeerConfig::default());
    core.want_session(now, &keys()[B].public());
    let initiation = core.poll_transmit().unwrap().datagram;
    assert_eq!(pair.deliver(B, 99, initiation.clone()), Err(Reject::UnknownPeer));
    assert_eq!(pair.deliver(A, 99, initiation), Err(Reject::Mac1), "meant for somebody else");
    assert_eq!(pair.deliver(A, 99, vec![1; 148]), Err(Reject::Malformed));
    assert_eq!(pair.deliver(A, 99, vec![]), Err(Reject::Malformed));
    assert!(pair.log.is_empty());
}

#[test]
fn any_changed_byte_of_a_handshake_message_is_refused() {
    let mut pair = Pair::new();
    pair.fate = Box::new(|_| Fate::Drop);
    pair.send(A, b"ping");
    let initiation = pair.log[0].datagram.clone();
    // mac2 is looked at under load only.
    for at in 0..132 {
        let mut changed = initiation.clone();
        changed[at] ^= 0x40;
        assert!(pair.deliver(B, 10, changed).is_err(), "initiation byte {at}");
    }
    assert_eq!(pair.deliver(B, 10, initiation), Ok(()));
    let response = pair.log[1].datagram.clone();
    for at in 0..76 {
        let mut changed = response.clone();
        changed[at] ^= 0x40;
        assert!(pair.deliver(A, 20, changed).is_err(), "response byte {at}");
    }
    assert_eq!(pair.deliver(A, 20, response), Ok(()), "forgeries do not spoil the handshake");
}

#[test]
fn a_peer_whose_key_is_no_key_fails_at_once() {
    let now = origin();
    let mut core: Interface<u8> = Interface::new(now, wall(), &keys()[A], [1; 32]);
    let zero = mesh_noise::key::NodePublic::ZERO;
    core.set_peer(now, zero, PeerConfig::default());
    core.want_session(now, &zero);
    assert_eq!(core.poll_transmit(), None);
    assert!(matches!(core.poll_event(), Some(mesh_noise::wireguard::Event::HandshakeFailed { .. })));
}

#[test]
fn under_load_the_initiator_brings_a_cookie() {
    let timing = Timing { load_limit: 1, ..Timing::default() };
    let mut pair = Pair::with(timing, [PeerConfig::default(), PeerConfig::default()]);
    pair.fate = Box::new(|_| Fate::Drop);
    pair.send(A, b"ping");
    let initiation = pair.log[0].datagram.clone();
    // Spend B's allowance: one a second, and a second of memory.
    let mut forged = initiation.clone();
    forged[100] ^= 1;
    assert_eq!(pair.deliver(B, 66, forged.clone()), Err(Reject::Mac1), "which only counts with mac1");
    let _ = pair.deliver(B, 66, initiation.clone());
    assert_eq!(pair.deliver(B, 10, initiation), Err(Reject::CookieRequired));
    let reply = pair.log.last().unwrap().clone();
    assert!(same_kind(reply.kind, MessageKind::CookieReply));
    assert_eq!(pair.deliver(A, 20, reply.datagram), Ok(()));
    pair.run(secs(6));
    let retry = pair.log.iter().rfind(|sent| sent.from == A).unwrap().clone();
    assert!(same_kind(retry.kind, MessageKind::Initiation));
    assert_ne!(retry.datagram[132..], [0; 16], "mac2 is there");
    // Spend B's allowance again: a cookie is good for its address, and lets its bearer in.
    let _ = pair.deliver(B, 66, retry.datagram.clone());
    let elsewhere = pair.nodes[B].rejects.len();
    assert_eq!(pair.deliver(B, 67, retry.datagram.clone()), Err(Reject::CookieRequired));
    assert_eq!(pair.nodes[B].rejects.len(), elsewhere + 1);
    assert_eq!(pair.deliver(B, 10, retry.datagram), Err(Reject::OldTimestamp), "past the cookie, it is a replay");
}

#[test]
fn the_same_seeds_give_the_same_bytes() {
    let run = || {
        let mut pair = Pair::new();
        pair.send(A, b"ping");
        pair.run(secs(200));
        pair.send(B, b"pong");
        pair.run(secs(1));
        pair.log.into_iter().map(|sent| sent.datagram).collect::<Vec<_>>()
    };
    assert_eq!(run(), run());
}

#[test]
fn a_responder_may_send_once_the_initiator_has() {
    let mut pair = Pair::connected();
    // A has lost everything and starts anew; B still has the old session.
    let (now, peer, old) = (pair.now, pair.nodes[A].peer, pair.nodes[B].sending().unwrap().receiver_index());
    pair.nodes[A].core.remove_peer(&peer);
    pair.nodes[A].core.set_peer(now, peer, PeerConfig::default());
    pair.timeout(A);
    pair.send(A, b"anew");
    pair.run(secs(6));
    let session = pair.nodes[B].sending().unwrap();
    assert_ne!(session.receiver_index(), old);
    assert!(!session.is_unconfirmed());
    pair.send(B, b"news");
    pair.run(secs(1));
    assert_eq!(pair.nodes[A].received, [b"news"]);
}

#[test]
fn asking_for_a_session_that_exists_tells_it_again() {
    let mut pair = Pair::connected();
    let (now, peer, handshakes) = (pair.now, pair.nodes[A].peer, pair.nodes[A].handshakes);
    pair.nodes[A].core.want_session(now, &peer);
    pair.timeout(A);
    assert_eq!(pair.nodes[A].handshakes, handshakes + 1);
    assert!(pair.log.is_empty(), "nothing is sent");
}

#[test]
fn removing_a_peer_ends_its_sessions() {
    let mut pair = Pair::connected();
    let peer = pair.nodes[A].peer;
    let session = pair.nodes[A].sending().unwrap().clone();
    assert!(pair.nodes[A].core.remove_peer(&peer));
    assert!(!pair.nodes[A].core.remove_peer(&peer));
    assert!(session.has_ended());
    assert_eq!(pair.nodes[A].core.poll_timeout(), None);
    assert_eq!(pair.nodes[A].core.peers().count(), 0);
}

#[test]
fn a_new_private_key_ends_every_session() {
    let mut pair = Pair::connected();
    let session = pair.nodes[A].sending().unwrap().clone();
    let fresh = NodePrivate::generate(&mut SeededRng::from_seed([77; 32]));
    let now = pair.now;
    pair.nodes[A].core.set_private_key(now, &fresh);
    assert!(session.has_ended());
    assert_eq!(pair.nodes[A].core.public(), fresh.public());
    pair.nodes[A].core.set_private_key(now, &keys()[B]);
    assert_eq!(pair.nodes[A].core.peers().count(), 0, "nobody is their own peer");
}

#[test]
fn nothing_secret_is_printed() {
    let psk = [0xc3; 32];
    let mut pair = Pair::with_psk([psk; 2]);
    pair.send(A, b"secret");
    pair.run(millis(30));
    let shown = format!("{:?}", pair.nodes[A].core) + &format!("{:?}", pair.nodes[B].core);
    assert!(shown.len() > 1000, "there is something to look at");
    for secret in [*keys()[A].expose_secret(), *keys()[B].expose_secret(), psk] {
        let numbers = format!("{:?}", &secret[..6]);
        let text = hex::encode(&secret[..6]);
        assert!(!shown.contains(numbers.trim_matches(['[', ']'])) && !shown.contains(&text), "{shown}");
    }
    // The seeds of the two generators, and what a cookie is made with.
    for name in ["seed", "secret", "cookie_key", "cookie: Some"] {
        assert!(!shown.contains(name), "{name} in {shown}");
    }
}
