//! Any loss, delay and duplication: what the link lets through later makes the tunnel work.

use mesh_noise::key::NodePublic;
use mesh_noise::wireguard::Timing;
use proptest::prelude::*;

use crate::pair::{A, B, Fate, Pair, keys, millis, secs};

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        3 => Just(Fate::Deliver),
        2 => Just(Fate::Drop),
        1 => Just(Fate::Twice),
        1 => (0u64..12_000).prop_map(|late| Fate::Late(millis(late))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_tunnel_recovers_from_any_weather(
        weather in proptest::collection::vec(fate(), 0..60),
        sends in proptest::collection::vec((0usize..2, 0u64..20_000), 1..25),
    ) {
        let mut pair = Pair::new();
        let mut weather = weather.into_iter();
        pair.fate = Box::new(move |_| weather.next().unwrap_or(Fate::Deliver));
        for (from, pause) in sends {
            pair.send(from, b"weather");
            pair.run(millis(pause));
        }
        pair.fate = Box::new(|_| Fate::Deliver);
        // Longer than any retry: whatever state the two are in, traffic both ways heals it.
        for _ in 0..5 {
            pair.send(A, b"a");
            pair.send(B, b"b");
            pair.run(secs(9));
        }
        pair.nodes[A].received.clear();
        pair.nodes[B].received.clear();
        pair.send(A, b"fine");
        pair.send(B, b"fine");
        pair.run(secs(1));
        prop_assert_eq!(&pair.nodes[A].received, &[b"fine".to_vec()]);
        prop_assert_eq!(&pair.nodes[B].received, &[b"fine".to_vec()]);
    }

    #[test]
    fn no_packet_is_delivered_twice(
        weather in proptest::collection::vec(fate(), 1..80),
    ) {
        let mut pair = Pair::connected();
        pair.nodes[B].received.clear();
        let mut weather = weather.into_iter().cycle();
        pair.fate = Box::new(move |_| weather.next().unwrap_or(Fate::Deliver));
        for n in 0..100u32 {
            pair.send(A, format!("packet {n}").as_bytes());
            pair.run(millis(300));
        }
        let mut seen = pair.nodes[B].received.clone();
        seen.sort();
        let total = seen.len();
        seen.dedup();
        prop_assert_eq!(seen.len(), total);
    }

    #[test]
    fn the_interface_survives_any_bytes(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..200), first in 1u8..4, cut: bool,
    ) {
        if bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&[first, 0, 0, 0]);
        }
        if cut {
            bytes.resize([148, 92, 64][usize::from(first) - 1], 0);
        }
        let mut pair = Pair::connected();
        prop_assert!(pair.deliver(A, 20, bytes).is_err());
    }
}

#[test]
fn a_hundred_peers_keep_their_own_deadlines() {
    let now = crate::pair::origin();
    let mut core: mesh_noise::wireguard::Interface<u8> =
        mesh_noise::wireguard::Interface::new(now, crate::pair::wall(), &keys()[A], [1; 32])
            .with_timing(Timing::default());
    let mut rng = mesh_noise::random::SeededRng::from_seed([3; 32]);
    let peers: Vec<NodePublic> = (0..100).map(|_| mesh_noise::key::NodePrivate::generate(&mut rng).public()).collect();
    for (n, peer) in (0..).zip(&peers) {
        core.set_peer(now, *peer, mesh_noise::wireguard::PeerConfig::default());
        core.want_session(now + millis(n), peer);
    }
    let mut initiations = 0;
    while core.poll_transmit().is_some() {
        initiations += 1;
    }
    assert_eq!(initiations, 100);
    while let Some(at) = core.poll_timeout().filter(|at| *at < now + secs(200)) {
        core.handle_timeout(at);
        assert!(core.poll_timeout().is_none_or(|next| next > at));
    }
    let failed = std::iter::from_fn(|| core.poll_event()).count();
    assert_eq!(failed, 100);
    assert_eq!(core.poll_timeout(), None);
}
