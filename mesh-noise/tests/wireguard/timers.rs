//! Every deadline of the whitepaper's section 6, to the millisecond.

use std::time::Duration;

use mesh_noise::wireguard::message::MessageKind;
use mesh_noise::wireguard::{PeerConfig, Timing};
use proptest::prelude::*;

use crate::pair::{A, B, DATA, Fate, LATENCY, Pair, Sent, millis, same_kind, secs};

/// Deadlines count from whole milliseconds, so they may come this much early.
const GRAIN: Duration = Duration::from_millis(1);

fn is_at(actual: Duration, expected: Duration) {
    assert!(actual <= expected && actual + GRAIN > expected, "{actual:?}, expected {expected:?}");
}

#[test]
fn an_unanswered_initiation_is_repeated_after_5_s_with_jitter_and_given_up_after_90_s() {
    let mut pair = Pair::new();
    pair.fate = Box::new(|_| Fate::Drop);
    pair.send(A, b"ping");
    pair.run(secs(89));
    assert_eq!(pair.nodes[A].failures, 0);
    pair.run(secs(2));
    assert_eq!(pair.nodes[A].failures, 1);
    let times = pair.initiations(A);
    assert!((16..=18).contains(&times.len()), "{times:?}");
    let gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.iter().all(|gap| (secs(5)..millis(5334)).contains(gap)), "{gaps:?}");
    assert!(gaps.iter().any(|gap| *gap != gaps[0]), "the jitter varies");
    pair.run(secs(100));
    assert_eq!(pair.initiations(A).len(), times.len(), "silence until the next packet");
    pair.send(A, b"again");
    assert_eq!(pair.initiations(A).len(), times.len() + 1);
}

#[test]
fn a_way_that_is_found_hastens_the_next_try_but_never_within_50_ms() {
    let mut pair = Pair::new();
    pair.fate = Box::new(|_| Fate::Drop);
    pair.send(A, b"ping");
    for _ in 0..3 {
        pair.retry(A, Duration::ZERO);
    }
    pair.run(secs(1));
    assert_eq!(pair.initiations(A).len(), 2);
    is_at(pair.initiations(A)[1], pair.initiations(A)[0] + millis(50));
    pair.fate = Box::new(|_| Fate::Deliver);
    pair.retry(A, millis(500));
    pair.run(secs(1));
    assert!(pair.nodes[A].sending().is_some(), "half a second later the handshake is done");
    pair.retry(A, Duration::ZERO);
    pair.run(secs(1));
    assert_eq!(pair.initiations(A).len(), 3, "nothing is being tried, nothing is hastened");
}

#[test]
fn the_initiator_rekeys_when_it_sends_after_120_s() {
    let mut pair = Pair::connected();
    pair.run(secs(119) - pair.elapsed());
    pair.send(A, b"early");
    pair.run(millis(900));
    assert_eq!(pair.initiations(A), []);
    // Half a round trip after the start: the session counts from the response's arrival.
    pair.run(secs(121) - pair.elapsed());
    assert_eq!(pair.initiations(A), [], "time alone does nothing");
    pair.send(A, b"late");
    assert_eq!(pair.initiations(A), [secs(121)], "the packet itself starts it");
    let before = pair.nodes[A].sending().unwrap().clone();
    pair.run(secs(1));
    let after = pair.nodes[A].sending().unwrap().clone();
    assert_ne!(before.receiver_index(), after.receiver_index());
    assert!(!before.has_ended(), "the previous session still receives");
    assert_eq!(pair.nodes[A].sessions(), 2);
    assert_eq!(pair.nodes[B].received.last().unwrap(), b"late");
}

#[test]
fn the_responder_leaves_rekeying_to_the_initiator() {
    let mut pair = Pair::connected();
    pair.run(secs(130) - pair.elapsed());
    pair.send(B, b"late");
    pair.run(secs(1));
    assert_eq!((pair.initiations(A), pair.initiations(B)), (vec![], vec![]));
}

#[test]
fn the_initiator_rekeys_when_it_receives_after_165_s() {
    let mut pair = Pair::connected();
    pair.run(secs(160) - pair.elapsed());
    pair.send(B, b"early");
    pair.run(secs(1));
    assert_eq!(pair.initiations(A), []);
    pair.run(secs(166) - pair.elapsed());
    pair.send(B, b"late");
    pair.run(secs(1));
    assert_eq!(pair.initiations(A), [secs(166) + LATENCY]);
}

#[test]
fn traffic_flows_through_many_rekeys_without_a_loss() {
    let mut pair = Pair::connected();
    for _ in 0..6000 {
        pair.send(A, b"up");
        pair.send(B, b"down");
        pair.run(millis(100));
    }
    assert_eq!((pair.nodes[A].received.len(), pair.nodes[B].received.len()), (6000, 6001));
    let times = pair.initiations(A);
    assert_eq!(times.len(), 5, "600 s at 120 s a session, {times:?}");
    assert_eq!(pair.initiations(B).len(), 0);
}

#[test]
fn a_session_ends_at_180_s_exactly() {
    let mut pair = Pair::connected();
    let made = LATENCY * 2;
    pair.run(made + secs(180) - GRAIN - pair.elapsed());
    assert!(pair.nodes[A].sending().is_some());
    pair.run(GRAIN);
    assert!(pair.nodes[A].sending().is_none());
    // B made its session one latency earlier.
    assert!(pair.nodes[B].sending().is_none());
    assert_eq!((pair.nodes[A].sessions(), pair.nodes[B].sessions()), (0, 0));
    pair.run(secs(1000));
    assert_eq!(pair.log.len(), 1, "only the keepalive that answered the first packet: {:?}", pair.log);
    assert_eq!(pair.nodes[A].core.poll_timeout(), None);
}

#[test]
fn data_that_gets_no_answer_is_answered_by_a_keepalive_after_10_s() {
    let mut pair = Pair::connected();
    pair.run(secs(50) - pair.elapsed());
    pair.log.clear();
    pair.send(A, b"one way");
    pair.run(secs(30));
    let times = pair.keepalives(B);
    assert_eq!(times.len(), 1, "{times:?}");
    is_at(times[0], secs(60) + LATENCY);
    assert_eq!(pair.keepalives(A), [], "keepalives are not answered");
    assert_eq!(pair.initiations(A), []);
}

#[test]
fn steady_data_one_way_is_answered_every_10_s() {
    let mut pair = Pair::connected();
    pair.run(secs(20) - pair.elapsed());
    pair.log.clear();
    for _ in 0..600 {
        pair.send(A, b"stream");
        pair.run(millis(100));
    }
    let times = pair.keepalives(B);
    assert!((5..=6).contains(&times.len()), "{times:?}");
    assert!(times.windows(2).all(|pair| (secs(9)..secs(11)).contains(&(pair[1] - pair[0]))), "{times:?}");
}

#[test]
fn silence_after_data_starts_a_handshake_after_15_s() {
    let mut pair = Pair::connected();
    pair.run(secs(50) - pair.elapsed());
    pair.fate = Box::new(|sent| if sent.from == A { Fate::Drop } else { Fate::Deliver });
    pair.send(A, b"lost");
    pair.run(secs(3));
    pair.send(A, b"lost too");
    pair.run(secs(16));
    let times = pair.initiations(A);
    is_at(times[0], secs(65));
}

#[test]
fn an_answer_of_any_kind_ends_the_silence() {
    let mut pair = Pair::connected();
    pair.run(secs(50) - pair.elapsed());
    pair.send(A, b"question");
    pair.run(secs(40));
    assert_eq!(pair.initiations(A), [], "B's keepalive was answer enough");
}

#[test]
fn packets_that_are_answered_wake_nobody() {
    let mut pair = Pair::connected();
    pair.run(secs(50) - pair.elapsed());
    (pair.nodes[A].woken, pair.nodes[B].woken) = (0, 0);
    for _ in 0..600 {
        pair.send(A, b"question");
        pair.run(millis(50));
        pair.send(B, b"answer");
        pair.run(millis(50));
    }
    assert!(pair.elapsed() < secs(119), "no rekey comes into it");
    let woken = [pair.nodes[A].woken, pair.nodes[B].woken];
    assert!(woken.iter().all(|woken| *woken <= 2), "once after the silence before, in each direction: {woken:?}");
    // What starts among them still falls due at its time: B's last answer was not followed by a question.
    pair.fate = Box::new(|sent| if sent.from == A { Fate::Drop } else { Fate::Deliver });
    let last_answer = pair.elapsed() - millis(50);
    pair.send(A, b"lost");
    pair.run(secs(16));
    is_at(pair.initiations(B)[0], last_answer + secs(15));
}

#[test]
fn a_persistent_keepalive_starts_at_once_and_keeps_its_interval() {
    let config = PeerConfig { persistent_keepalive: Some(secs(25)), ..PeerConfig::default() };
    let mut pair = Pair::with(Timing::default(), [config, PeerConfig::default()]);
    assert_eq!(pair.initiations(A), [Duration::ZERO], "nobody waits for a packet");
    pair.run(secs(110));
    let times = pair.keepalives(A);
    assert_eq!(times.len(), 5, "the confirmation and four more: {times:?}");
    assert!(times[1..].windows(2).all(|pair| pair[1] - pair[0] <= secs(25) && pair[1] - pair[0] > secs(24)));
    let peer = pair.nodes[A].peer;
    let now = pair.now;
    pair.nodes[A].core.set_peer(now, peer, PeerConfig::default());
    pair.log.clear();
    pair.run(secs(60));
    assert_eq!(pair.log.len(), 0, "switched off: {:?}", pair.log);
}

#[test]
fn a_persistent_keepalive_revives_a_dead_peer() {
    let config = PeerConfig { persistent_keepalive: Some(secs(25)), ..PeerConfig::default() };
    let mut pair = Pair::with(Timing::default(), [config, PeerConfig::default()]);
    pair.fate = Box::new(|_| Fate::Drop);
    pair.run(secs(400));
    assert!(pair.nodes[A].failures >= 2);
    pair.fate = Box::new(|_| Fate::Deliver);
    pair.run(secs(60));
    assert!(pair.nodes[A].sending().is_some() && pair.nodes[B].sending().is_some());
}

#[test]
fn a_worn_session_is_replaced_by_either_side() {
    let timing = Timing { rekey_after_messages: 50, reject_after_messages: 1000, ..Timing::default() };
    let mut pair = Pair::with(timing, [PeerConfig::default(), PeerConfig::default()]);
    pair.send(A, b"first");
    pair.run(secs(10));
    for _ in 0..60 {
        pair.send(B, b"down");
        pair.run(millis(10));
    }
    pair.run(secs(1));
    assert_eq!(pair.initiations(B).len(), 1);
    assert_eq!(pair.nodes[A].received.len(), 60);
}

#[test]
fn after_a_long_sleep_the_first_packet_makes_a_new_session() {
    let mut pair = Pair::connected();
    // The clock jumps while nobody looks.
    pair.now += secs(3600);
    pair.send(A, b"awake");
    pair.timeout(A);
    pair.timeout(B);
    pair.send(A, b"now");
    pair.run(secs(1));
    assert_eq!(pair.nodes[B].received.last().unwrap(), b"now");
}

#[test]
fn the_defaults_are_the_protocols_constants() {
    let timing = Timing::default();
    assert_eq!((timing.rekey_after, timing.reject_after, timing.rekey_attempt), (secs(120), secs(180), secs(90)));
    assert_eq!((timing.rekey_timeout, timing.keepalive_timeout), (secs(5), secs(10)));
    assert_eq!((timing.rekey_after_messages, timing.reject_after_messages), (1 << 60, u64::MAX - (1 << 13)));
}

#[test]
fn a_session_without_counters_left_makes_way_for_a_new_one() {
    let timing = Timing { rekey_after_messages: 20, reject_after_messages: 30, ..Timing::default() };
    let mut pair = Pair::with(timing, [PeerConfig::default(), PeerConfig::default()]);
    pair.send(A, b"first");
    pair.run(secs(1));
    // No new session comes about until the old one is used up and its replacement given up.
    let handshake = |sent: &Sent| !same_kind(sent.kind, DATA);
    pair.fate = Box::new(move |sent| if handshake(sent) { Fate::Drop } else { Fate::Deliver });
    for _ in 0..40 {
        pair.send(A, b"on and on");
        pair.run(secs(3));
    }
    assert!(pair.nodes[B].received.len() <= 30, "{} packets on 30 counters", pair.nodes[B].received.len());
    pair.fate = Box::new(|_| Fate::Deliver);
    let before = pair.nodes[A].handshakes;
    let (now, peer) = (pair.now, pair.nodes[A].peer);
    pair.nodes[A].core.want_session(now, &peer);
    pair.timeout(A);
    pair.run(secs(12));
    pair.send(A, b"again");
    pair.run(secs(1));
    assert!(pair.nodes[A].handshakes > before);
    assert_eq!(pair.nodes[B].received.last().unwrap(), b"again");
}

#[test]
fn a_wall_clock_that_was_set_back_does_not_stop_handshakes() {
    let mut pair = Pair::connected();
    let now = pair.now;
    pair.nodes[A].core.set_wall_clock(now, crate::pair::wall() - secs(86_400));
    // Past the end of every session.
    pair.run(secs(300));
    assert_eq!(pair.nodes[A].sessions(), 0);
    pair.send(A, b"yesterday");
    pair.run(secs(1));
    assert_eq!(pair.nodes[B].received.last().unwrap(), b"yesterday");
}

#[test]
fn a_sleep_in_the_middle_of_a_handshake_ends_it_and_the_next_packet_starts_another() {
    let mut pair = Pair::new();
    pair.fate = Box::new(|_| Fate::Drop);
    pair.send(A, b"before");
    pair.run(secs(1));
    pair.now += secs(7200);
    pair.timeout(A);
    pair.timeout(B);
    assert_eq!((pair.nodes[A].failures, pair.nodes[A].core.poll_timeout()), (1, None));
    pair.fate = Box::new(|_| Fate::Deliver);
    pair.send(A, b"after");
    pair.run(secs(1));
    assert_eq!(pair.nodes[B].received, [b"after"]);
}

#[test]
fn initiations_to_one_peer_keep_5_s_apart() {
    let mut pair = Pair::new();
    pair.fate = Box::new(|sent| if same_kind(sent.kind, MessageKind::Response) { Fate::Drop } else { Fate::Deliver });
    for _ in 0..1000 {
        pair.send(A, b"impatient");
        pair.run(millis(20));
    }
    let times = pair.initiations(A);
    assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= secs(5)), "{times:?}");
}

#[derive(Debug, Clone)]
enum Step {
    Send(usize),
    Run(u64),
    Lose(bool),
    Persist(usize, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0usize..2).prop_map(Step::Send),
        (0u64..200_000).prop_map(Step::Run),
        (0u64..300).prop_map(Step::Run),
        any::<bool>().prop_map(Step::Lose),
        (0usize..2, 0u64..40).prop_map(|(node, interval)| Step::Persist(node, interval)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The harness checks after every `handle_timeout` that no deadline stays due; here it meets odd schedules.
    #[test]
    fn no_deadline_ever_stays_due(steps in proptest::collection::vec(step(), 1..40)) {
        let mut pair = Pair::new();
        for step in steps {
            match step {
                Step::Send(node) => pair.send(node, b"data"),
                Step::Run(time) => pair.run(millis(time)),
                Step::Lose(lose) => {
                    pair.fate = Box::new(move |_| if lose { Fate::Drop } else { Fate::Deliver });
                }
                Step::Persist(node, interval) => {
                    let (now, peer) = (pair.now, pair.nodes[node].peer);
                    let config = PeerConfig { persistent_keepalive: Some(secs(interval)), ..PeerConfig::default() };
                    pair.nodes[node].core.set_peer(now, peer, config);
                    pair.timeout(node);
                }
            }
            pair.timeout(A);
            pair.timeout(B);
        }
    }
}

#[test]
fn a_session_of_which_the_peer_knows_nothing_is_replaced_at_once_by_one_handshake() {
    let mut pair = Pair::connected();
    let (began, old) = (pair.elapsed(), pair.nodes[A].sending().unwrap().receiver_index());
    for _ in 0..5 {
        pair.renew(A);
    }
    assert_eq!(pair.nodes[A].sending().unwrap().receiver_index(), old, "it may still be good");
    pair.run(LATENCY * 2);
    assert_ne!(pair.nodes[A].sending().unwrap().receiver_index(), old);
    pair.run(secs(10));
    assert_eq!(pair.initiations(A), [began]);
    pair.fate = Box::new(|_| Fate::Drop);
    let began = pair.elapsed();
    for _ in 0..19 {
        pair.renew(A);
        pair.run(millis(10));
    }
    let spaced: Vec<_> = (0..4).map(|number| began + millis(50 * number)).collect();
    assert_eq!(pair.initiations(A)[1..], spaced);
}
