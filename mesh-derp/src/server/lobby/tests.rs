use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

#[expect(clippy::disallowed_methods, reason = "a time to count from")]
fn start() -> Instant {
    Instant::now()
}

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn limits(total: usize, per_source: usize, handshakes: usize) -> Limits {
    Limits { total, per_source, handshakes, patience: seconds(2) }
}

fn address(n: u8) -> Option<IpAddr> {
    Some(IpAddr::from([192, 0, 2, n]))
}

fn dismissed(lobby: &mut Lobby<u64>) -> Vec<(u64, Dismissal)> {
    std::iter::from_fn(|| lobby.poll_dismissed()).collect()
}

#[test]
fn the_one_that_is_silent_longest_makes_room() {
    let (now, mut lobby) = (start(), Lobby::new(limits(3, 3, 3)));
    for n in 0..3 {
        lobby.enter(now + seconds(n), address(1), n).unwrap();
    }
    assert!(!lobby.has_room(now + seconds(1)));
    assert_eq!(lobby.poll_timeout(), Some(now + seconds(2)));
    assert!(lobby.has_room(now + seconds(2)));
    lobby.enter(now + seconds(2), address(2), 9).unwrap();
    assert_eq!(dismissed(&mut lobby), [(0, Dismissal::Room)]);
    assert_eq!(lobby.len(), 3);
}

#[test]
fn whoever_waits_for_us_is_not_shown_out() {
    let (now, mut lobby) = (start(), Lobby::new(limits(2, 2, 1)));
    let first = lobby.enter(now, address(1), 1).unwrap();
    lobby.advance(now, first, Stage::Queued);
    let second = lobby.enter(now + seconds(1), address(2), 2).unwrap();
    lobby.advance(now + seconds(1), second, Stage::Queued);
    assert!(!lobby.has_room(now + seconds(60)));
    assert_eq!(lobby.poll_timeout(), None);
    lobby.leave(first);
    assert!(lobby.has_room(now + seconds(60)));
}

#[test]
fn a_crowded_source_pushes_out_its_own() {
    let (now, mut lobby) = (start(), Lobby::new(limits(10, 2, 10)));
    lobby.enter(now, address(1), 0).unwrap();
    for n in 1..3 {
        lobby.enter(now + seconds(n), address(2), n).unwrap();
    }
    assert_eq!(lobby.enter(now + seconds(2), address(2), 3), Err(Crowded));
    lobby.enter(now + seconds(3), address(2), 4).unwrap();
    assert_eq!(dismissed(&mut lobby), [(1, Dismissal::Source)]);
}

#[test]
fn the_addresses_of_one_ipv6_network_are_one_source() {
    let (now, mut lobby) = (start(), Lobby::new(limits(10, 1, 10)));
    lobby.enter(now, "2001:db8::1".parse().ok(), 1).unwrap();
    assert_eq!(lobby.enter(now, "2001:db8::ffff:2".parse().ok(), 2), Err(Crowded));
    lobby.enter(now, "2001:db8:0:1::1".parse().ok(), 3).unwrap();
    lobby.enter(now, "::ffff:192.0.2.1".parse().ok(), 4).unwrap();
    assert_eq!(lobby.enter(now, address(1), 5), Err(Crowded));
}

#[test]
fn a_proxied_connection_counts_to_its_client() {
    let (now, mut lobby) = (start(), Lobby::new(limits(10, 1, 10)));
    let first = lobby.enter(now, None, 1).unwrap();
    lobby.rename(now, first, address(7).unwrap()).unwrap();
    let second = lobby.enter(now, None, 2).unwrap();
    assert_eq!(lobby.rename(now, second, address(7).unwrap()), Err(Crowded));
    lobby.leave(first);
    lobby.rename(now, second, address(7).unwrap()).unwrap();
    lobby.enter(now, address(1), 3).unwrap();
}

#[test]
fn a_handshake_that_stands_still_gives_its_place_to_one_that_waits() {
    let (now, mut lobby) = (start(), Lobby::new(limits(10, 10, 1)));
    let slow = lobby.enter(now, address(1), 1).unwrap();
    lobby.advance(now, slow, Stage::Handshake);
    lobby.handle_timeout(now + seconds(5));
    assert_eq!(dismissed(&mut lobby), [], "nobody needs its place");
    let waits = lobby.enter(now + seconds(5), address(2), 2).unwrap();
    lobby.advance(now + seconds(5), waits, Stage::Queued);
    let due = lobby.poll_timeout().unwrap();
    assert!(due <= now + seconds(6));
    lobby.handle_timeout(due);
    assert_eq!(dismissed(&mut lobby), [(1, Dismissal::Handshake)]);
    assert_eq!(lobby.poll_timeout(), None);
}

#[test]
fn a_byte_now_and_then_gains_nothing() {
    let (now, mut lobby) = (start(), Lobby::new(limits(1, 1, 1)));
    let drip = lobby.enter(now, address(1), 1).unwrap();
    lobby.advance(now + seconds(1), drip, Stage::Handshake);
    assert!(!lobby.has_room(now + seconds(2)));
    assert!(lobby.has_room(now + seconds(3)), "two seconds in one stage");
}

#[derive(Debug, Clone)]
enum Step {
    Enter(u8),
    Advance(usize, Stage),
    Rename(usize, u8),
    Leave(usize),
    Wait(u64),
    Room,
}

fn step() -> impl Strategy<Value = Step> {
    let stage = prop_oneof![Just(Stage::Queued), Just(Stage::Handshake), Just(Stage::Login), Just(Stage::Admission)];
    prop_oneof![
        4 => (0..5u8).prop_map(Step::Enter),
        3 => (0..20usize, stage).prop_map(|(who, stage)| Step::Advance(who, stage)),
        1 => (0..20usize, 0..5u8).prop_map(|(who, to)| Step::Rename(who, to)),
        2 => (0..20usize).prop_map(Step::Leave),
        2 => (0..3000u64).prop_map(Step::Wait),
        1 => Just(Step::Room),
    ]
}

proptest! {
    #[test]
    fn limits_hold_and_the_books_balance(steps in proptest::collection::vec(step(), 0..200)) {
        let (mut now, mut lobby) = (start(), Lobby::new(limits(6, 3, 2)));
        let (mut inside, mut number) = (BTreeMap::new(), 0u64);
        for step in steps {
            let nth = |inside: &BTreeMap<u64, Guest>, who: usize| inside.values().nth(who % inside.len().max(1)).copied();
            match step {
                Step::Enter(from) if lobby.has_room(now) => {
                    if let Ok(guest) = lobby.enter(now, address(from).filter(|_| from > 0), number) {
                        inside.insert(number, guest);
                    }
                    number += 1;
                }
                Step::Advance(who, stage) => if let Some(guest) = nth(&inside, who) { lobby.advance(now, guest, stage) },
                Step::Rename(who, to) => if let Some(guest) = nth(&inside, who) { let _ = lobby.rename(now, guest, address(to).unwrap()); },
                Step::Leave(who) => if let Some(guest) = nth(&inside, who) {
                    lobby.leave(guest);
                    inside.retain(|_, have| *have != guest);
                },
                Step::Wait(ms) => {
                    now += Duration::from_millis(ms);
                    lobby.handle_timeout(now);
                    prop_assert!(lobby.poll_timeout().is_none_or(|at| at > now));
                }
                Step::Room => { let _ = lobby.make_room(now); }
                Step::Enter(_) => {}
            }
            while let Some((who, _)) = lobby.poll_dismissed() {
                prop_assert!(inside.remove(&who).is_some(), "shown out twice");
            }
            prop_assert_eq!(lobby.len(), inside.len());
            prop_assert!(lobby.len() <= 6);
            prop_assert!(lobby.per_source.values().all(|have| (1..=3).contains(have)));
            let of_a_source = lobby.entries.values().filter(|entry| entry.source.is_some()).count();
            prop_assert_eq!(lobby.per_source.values().sum::<usize>(), of_a_source);
            let waits = |entry: &&Entry<u64>| entry.stage.keeps_us_waiting();
            prop_assert_eq!(lobby.waiting.len(), lobby.entries.values().filter(waits).count());
            prop_assert_eq!(lobby.waiting.len(), lobby.waiting_of.len());
        }
        for guest in inside.into_values() {
            lobby.leave(guest);
        }
        prop_assert!(lobby.is_empty() && lobby.per_source.is_empty() && lobby.queued == 0);
    }
}
