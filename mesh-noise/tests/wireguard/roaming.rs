//! A peer is where its last authentic message came from.

use mesh_noise::wireguard::Reject;

use crate::pair::{A, B, Fate, Pair, secs};

#[test]
fn data_from_a_new_address_moves_the_peer() {
    let mut pair = Pair::connected();
    pair.nodes[A].address = 11;
    pair.send(A, b"moved");
    pair.run(secs(1));
    assert_eq!(pair.nodes[B].path, 11);
    pair.send(B, b"follows");
    pair.run(secs(1));
    assert_eq!(pair.nodes[A].received.last().unwrap(), b"follows");
    assert_eq!(pair.initiations(A), [], "no handshake is needed");
}

#[test]
fn a_handshake_is_answered_where_it_came_from() {
    let mut pair = Pair::new();
    pair.nodes[B].path = 77;
    pair.send(A, b"hello");
    pair.run(secs(1));
    assert_eq!(pair.nodes[B].received, [b"hello"]);
    assert_eq!(pair.nodes[B].path, 10);
}

#[test]
fn both_may_move_while_a_handshake_is_on_its_way() {
    let mut pair = Pair::connected();
    pair.run(secs(200));
    pair.send(A, b"new session");
    pair.nodes[A].address = 12;
    pair.run(secs(7));
    assert_eq!(pair.nodes[B].received.last().unwrap(), b"new session", "the retry came from the new address");
    assert_eq!(pair.nodes[B].path, 12);
}

#[test]
fn a_forger_moves_nobody() {
    let mut pair = Pair::connected();
    pair.fate = Box::new(|_| Fate::Drop);
    pair.send(A, b"data");
    let mut forged = pair.log.last().unwrap().datagram.clone();
    forged[20] ^= 1;
    assert_eq!(pair.deliver(B, 66, forged), Err(Reject::Authentication));
    assert_eq!(pair.nodes[B].path, 10);
}
