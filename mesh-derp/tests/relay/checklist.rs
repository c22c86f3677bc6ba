//! What relays and clients have to do to get on with those in the field, and which test shows it.
//!
//! | what | tests |
//! |---|---|
//! | 1 the relay's key comes first, even under fast start; a client that knows it skips it | `fast_start_gets_frames_without_any_http_response`, `fast_start_logs_in_at_once_and_skips_the_repeated_key` |
//! | 2 a client takes longer keys, unknown frames and PeerPresent and PeerGone of every length | `a_client_takes_what_relays_of_any_age_send`, `tails_are_ignored_and_missing_members_have_defaults` |
//! | 3 `Upgrade: derp`, `DERP` and `WebSocket` without a sub-protocol are DERP; with `derp` it is WebSocket | `each_upgrade_that_clients_ask_for_is_served`, `upgrade_tokens_are_told_apart`, `a_foreign_websocket_client_over_tls_and_one_of_ours_exchange_packets` |
//! | 4 meta-certificate: name, serial, TLS 1.3 only, last in the chain, skipped by pins; without it the 101 path | `the_meta_certificate_carries_the_key_and_the_version`, `a_round_trip_is_saved_only_where_the_key_is_told_in_secret`, `the_pinned_leaf_with_a_meta_certificate_is_accepted`, `the_pinned_certificate_has_to_be_the_leaf` |
//! | 5 ClientInfo of 56 bytes to 256 KiB; a wrong box ends the connection | `the_login_has_a_least_and_a_greatest_length`, `logins_that_prove_nothing_are_turned_away` |
//! | 6 NotePreferred of 1 byte, WatchConns of 0, ClosePeer of 32; what only relays may do ends the connection | `each_malformed_frame_ends_its_own_connection_only`, `each_forbidden_frame_ends_the_connection_with_its_own_reason`, `only_who_shows_the_mesh_key_may_ask_what_relays_ask`, `a_relay_of_the_region_ends_all_connections_of_a_node` |
//! | 7 a packet of 65,536 bytes passes, 65,537 or no whole key end the connection | `the_longest_packet_and_unknown_frames_are_fine`, `each_malformed_frame_ends_its_own_connection_only` |
//! | 8 Ping of 8 to 1000 bytes is answered, 7 or 1001 end the connection | `the_longest_packet_and_unknown_frames_are_fine`, `each_malformed_frame_ends_its_own_connection_only` |
//! | 9 PeerGone(NotHere) for disco only, three at once and one a second; PeerGone(Disconnected) to past receivers only, when the last connection ends | `leaving_and_missing_peers_are_reported`, `missing_peers_are_reported_three_times_and_then_once_a_second`, `departures_are_told_to_past_receivers_when_the_last_connection_ends` |
//! | 10 of several connections of a node the newest is active, then the one that speaks; another takes over when it ends | `of_two_connections_of_one_node_the_one_that_speaks_receives`, `the_newest_connection_is_active_until_another_speaks` |
//! | 11 the oldest packets are dropped, nobody waits for a slow receiver, data displaces no disco | `a_receiver_that_does_not_read_loses_old_packets_and_nobody_else_does`, `a_flood_from_one_sender_takes_nothing_from_another`, `disco_overtakes_data_and_is_not_displaced_by_it`, `it_serves_and_drops_as_the_slow_model_does` |
//! | 12 several relays of a region: who is there, changes, one hop, the oldest link first, a broken link clears and comes back | `a_watcher_is_told_who_is_there_and_then_of_every_change`, `what_was_forwarded_is_delivered_here_or_answered_but_never_forwarded_again`, `the_oldest_link_that_has_a_node_gets_its_packets`, `a_link_that_breaks_is_made_again_and_restores_what_was_known` |
//! | 13 a rate limit delays, drops nothing, spares relays, and lets 64 KiB pass with the least burst | `a_rate_limit_delays_and_drops_nothing`, `relays_of_the_region_have_no_rate_limit`, `the_longest_frame_passes_with_the_smallest_burst` |
//! | 14 admission: allowed, denied, nobody to ask (let in or turned away, as chosen), another status than 200, too long an answer | `only_listed_nodes_are_admitted_and_one_can_be_removed`, `each_answer_of_a_url_has_its_verdict`, `who_cannot_be_asked_about_is_let_in_only_if_that_was_chosen`, `a_relay_counts_each_verdict_and_asks_nobody_about_relays` |
//! | 15 `/generate_204` filters challenges; `/derp/probe` has CORS and 405 | `challenges_are_echoed_only_when_harmless`, `every_path_answers_as_documented` |
//! | 16 STUN requests without SOFTWARE and FINGERPRINT are ignored | `strangers_are_answered_only_on_request` |
//! | 17 a client gives up after 120 s of silence, which keep-alives prevent; it waits ever longer; it tells its home anew | `silence_ends_it_and_keep_alives_prevent_that`, `waiting_grows_with_the_square_of_failures_up_to_five_seconds`, `home_is_told_anew_after_a_reconnect` |
//! | 18 a client of TLS 1.2 is served by the 101 path | `a_client_of_tls_1_2_takes_the_slow_start` |

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use mesh_derp::client::{Connection, Event};
use mesh_derp::driver::client::RelayEvent;
use mesh_derp::frame::{Frame, GoneReason};
use mesh_derp::login::ServerInfo;
use mesh_derp::map::{DerpNode, DerpRegion, RegionId};
use mesh_derp::tls::ServerTls;
use mesh_derp::x509;
use mesh_noise::key::NodePublic;
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::harness::{
    Raw, TestRelay, client, connected, disco, event, eventually, node_key, packet, relay_key, trusting,
};

#[test]
fn every_test_of_the_table_exists() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = String::new();
    for folder in ["src", "tests", "../mesh-nat/src/stun", "../mesh-node/src"] {
        gather(&here.join(folder), &mut sources);
    }
    let table = include_str!("checklist.rs").lines().take_while(|line| line.starts_with("//!"));
    let rows: Vec<&str> = table.filter(|line| line.contains("| `") && line.contains("` |")).collect();
    let numbers: BTreeSet<u32> =
        rows.iter().filter_map(|row| row["//! | ".len()..].split(' ').next()?.parse().ok()).collect();
    assert_eq!(numbers, (1..=18).collect());
    for row in rows {
        let names = row.rsplit("| ").next().unwrap();
        for name in names.split(", ").map(|name| name.trim_matches(['`', ' ', '|'])) {
            assert!(sources.contains(&format!("fn {name}(")), "no test is called {name}");
        }
    }
}

fn gather(folder: &Path, into: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            gather(&path, into);
        } else if path.extension().is_some_and(|end| end == "rs") {
            into.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn a_client_takes_what_relays_of_any_age_send() {
    let (relay, node) = (relay_key(), node_key(1));
    let rng = &mut StdRng::seed_from_u64(1);
    #[expect(clippy::disallowed_methods, reason = "a point to count from")]
    let now = std::time::Instant::now();
    let framed = |kind: u8, parts: &[&[u8]]| {
        let body = parts.concat();
        [&[kind][..], &u32::try_from(body.len()).unwrap().to_be_bytes(), &body].concat()
    };
    let Frame::ServerInfo { sealed } = ServerInfo::default().seal(&relay.box_with_node(&node.public()), rng) else {
        unreachable!()
    };
    let peer = [9; 32];
    let frames = [
        framed(0x01, &[b"DERP\xF0\x9F\x94\x91", relay.public().as_bytes(), b"from the future"]),
        framed(0x03, &[&sealed]),
        framed(0x66, &[b"unknown"]),
        framed(0x09, &[&peer]),
        framed(0x09, &[&peer, &[0; 16], &[1, 2]]),
        framed(0x09, &[&peer, &[0; 16], &[1, 2], &[1]]),
        framed(0x08, &[&peer]),
        framed(0x08, &[&peer, &[1]]),
        framed(0x14, &[]),
        framed(0x15, &[&[0, 0, 0, 1, 0, 0, 0, 2]]),
        framed(0x05, &[&peer, b"packet"]),
    ];
    let mut client = Connection::new(now, node, None, false, rng);
    for frame in frames {
        client.handle_bytes(now, &frame).unwrap();
    }
    let peer = NodePublic::from_bytes(peer);
    let mut events: Vec<Event> = std::iter::from_fn(|| client.poll_event()).collect();
    assert!(matches!(events.remove(0), Event::Connected { .. }));
    events.retain(|event| matches!(event, Event::PeerGone { .. } | Event::Packet { .. }));
    let gone = |reason| Event::PeerGone { peer, reason };
    let came = Event::Packet { source: peer, payload: Bytes::from_static(b"packet") };
    assert_eq!(events, [gone(GoneReason::Disconnected), gone(GoneReason::NotHere), came]);
}

#[tokio::test]
async fn each_upgrade_that_clients_ask_for_is_served() {
    let relay = TestRelay::start().await;
    for (number, upgrade) in ["derp", "DERP", "Derp", "WebSocket", "websocket"].into_iter().enumerate() {
        for (method, target) in [("GET", "/derp"), ("POST", "https://relay.example/derp")] {
            let mut raw = Raw::new(TcpStream::connect(relay.address).await.unwrap());
            raw.write(format!("{method} {target} HTTP/1.1\r\nHost: x\r\nUpgrade: {upgrade}\r\n\r\n").as_bytes()).await;
            let head = raw.read_head().await;
            assert!(head.starts_with("HTTP/1.1 101 Switching Protocols\r\n"), "{upgrade}: {head}");
            assert!(head.contains("Derp-Version: 2\r\n") && head.contains("Upgrade: DERP\r\n"), "{upgrade}: {head}");
            raw.log_in(&node_key(number as u64)).await;
        }
    }
}

/// Accepts one TLS connection after another as a relay would, and says whether it asked for a fast start.
async fn asked_for_fast_start(config: rustls::ServerConfig, pin: &str) -> bool {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let id = RegionId::new(900).unwrap();
    let mut region = DerpRegion::new(id, "test", "Test");
    region.nodes.push(DerpNode {
        ipv4: "127.0.0.1".into(),
        ipv6: "none".into(),
        derp_port: listener.local_addr().unwrap().port(),
        cert_name: pin.to_owned(),
        ..DerpNode::new("900a", id, "localhost")
    });
    let mut client = client(region, trusting(), 1);
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let serve = async {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            // Races of several dials end some of them early.
            let Ok(mut stream) = acceptor.accept(tcp).await else { continue };
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else { break };
                head.push(byte);
            }
            let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
            if head.contains("upgrade: derp\r\n") {
                return head.contains("derp-fast-start: 1\r\n");
            }
        }
    };
    tokio::select! {
        asked = serve => asked,
        () = async { loop { let _ = client.next_event().await; } } => unreachable!(),
    }
}

#[tokio::test]
async fn a_round_trip_is_saved_only_where_the_key_is_told_in_secret() {
    let tls = ServerTls::generate(&["localhost".to_owned()]).unwrap();
    let relay = relay_key().public();
    let speaking = |versions: &[&'static rustls::SupportedProtocolVersion], key| {
        rustls::ServerConfig::builder_with_provider(mesh_derp::tls::provider())
            .with_protocol_versions(versions)
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&tls.config(key).unwrap().cert_resolver))
    };
    let (tls12, tls13) = (&rustls::version::TLS12, &rustls::version::TLS13);
    assert!(asked_for_fast_start(speaking(&[tls13], Some(&relay)), &tls.pin()).await);
    assert!(!asked_for_fast_start(speaking(&[tls12], Some(&relay)), &tls.pin()).await, "TLS 1.2 tells the world");
    assert!(!asked_for_fast_start(speaking(&[tls13], None), &tls.pin()).await, "it does not know the key");

    // The chain as it is shown: the relay's own certificate, and the one with its key last.
    let test_relay = TestRelay::start().await;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(test_relay.leaf.clone()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(mesh_derp::tls::provider())
        .with_protocol_versions(&[tls13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = TcpStream::connect(test_relay.address).await.unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect("localhost".try_into().unwrap(), tcp).await.unwrap();
    let chain = stream.get_ref().1.peer_certificates().unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!((x509::meta(&chain[0]), x509::meta(&chain[1])), (None, Some((*test_relay.server.public(), 2))));
}

#[tokio::test]
async fn the_login_has_a_least_and_a_greatest_length() {
    let relay = TestRelay::start().await;
    let fast = async || {
        let mut raw = Raw::new(TcpStream::connect(relay.address).await.unwrap());
        raw.write(b"GET /derp HTTP/1.1\r\nUpgrade: DERP\r\nDerp-Fast-Start: 1\r\n\r\n").await;
        assert!(matches!(raw.frame().await, Some(Frame::ServerKey(_))));
        raw
    };
    let header = |length: u32| [&[0x02][..], &length.to_be_bytes()].concat();
    let counted = || (relay.counters().protocol_errors, relay.counters().logins_refused);
    for (bytes, expected) in [
        ([header(55), vec![0; 55]].concat(), (1, 0)),
        // Long enough to be a login; the box is empty.
        ([header(56), vec![1; 56]].concat(), (1, 1)),
        // Refused before a byte of it is read.
        (header(256 * 1024 + 1), (2, 1)),
    ] {
        let mut raw = fast().await;
        raw.write(&bytes).await;
        assert_eq!(raw.frame().await, None);
        eventually("refusal", || (counted() == expected).then_some(())).await;
    }
    // The longest login: JSON may be padded with spaces.
    let (key, rng) = (node_key(1), &mut StdRng::seed_from_u64(1));
    let mut info = b"{\"version\":2,\"CanAckPings\":true}".to_vec();
    info.resize(256 * 1024 - 32 - 24 - 16, b' ');
    let mut sealed = Vec::new();
    key.box_with_relay(relay.server.public()).seal(rng, &info, &mut sealed);
    assert_eq!(sealed.len() + 32, 256 * 1024);
    let mut raw = fast().await;
    raw.send(Frame::ClientInfo { node: key.public(), sealed: sealed.into() }).await;
    assert!(matches!(raw.frame().await, Some(Frame::ServerInfo { .. })));
    assert_eq!(counted(), (2, 1));
    // A mesh key that is no key is no login, not an ordinary client.
    let mut sealed = Vec::new();
    key.box_with_relay(relay.server.public()).seal(rng, b"{\"meshKey\":\"\",\"version\":2}", &mut sealed);
    let mut raw = fast().await;
    raw.send(Frame::ClientInfo { node: key.public(), sealed: sealed.into() }).await;
    assert_eq!(raw.frame().await, None);
    assert_eq!(counted(), (2, 2));
}

#[tokio::test]
async fn departures_are_told_to_past_receivers_when_the_last_connection_ends() {
    let relay = TestRelay::start().await;
    let key = node_key(1);
    let (first, mut second) = (relay.raw(&key).await, relay.raw(&key).await);
    let (mut receiver, mut stranger) = (relay.raw(&node_key(2)).await, relay.raw(&node_key(3)).await);
    // The stranger has sent to the node, but received nothing from it.
    stranger.send(Frame::SendPacket { destination: key.public(), payload: disco("hello") }).await;
    assert!(matches!(second.frame().await, Some(Frame::RecvPacket { .. })));
    second.send(Frame::SendPacket { destination: node_key(2).public(), payload: disco("hello") }).await;
    assert!(matches!(receiver.frame().await, Some(Frame::RecvPacket { .. })));
    drop(first);
    eventually("one has ended", || (relay.counters().connections == 3).then_some(())).await;
    for raw in [&mut receiver, &mut stranger] {
        raw.send(Frame::Ping(*b"anything")).await;
        assert_eq!(raw.frame().await, Some(Frame::Pong(*b"anything")), "the node is still there");
    }
    drop(second);
    let gone = Frame::PeerGone { peer: key.public(), reason: GoneReason::Disconnected };
    assert_eq!(receiver.frame().await, Some(gone));
    stranger.send(Frame::Ping(*b"anything")).await;
    assert_eq!(stranger.frame().await, Some(Frame::Pong(*b"anything")), "it is not told");
    assert_eq!(relay.counters().peer_gone, 1);
}

#[tokio::test]
async fn home_is_told_anew_after_a_reconnect() {
    let relay = TestRelay::start().await;
    let mut a = client(relay.region(), trusting(), 1);
    a.set_home(true);
    for round in 0..2 {
        connected(&mut a).await;
        // The answer shows that everything before it has been read.
        a.outbox().try_send(node_key(1).public(), Bytes::from_static(b"to myself"));
        assert_eq!(packet(&mut a).await.1, b"to myself"[..]);
        assert_eq!(relay.counters().homes, 1, "in round {round}");
        relay.server.close_all();
        assert!(matches!(event(&mut a).await, RelayEvent::Disconnected { .. }));
        eventually("nobody", || (relay.counters().homes == 0).then_some(())).await;
    }
}
