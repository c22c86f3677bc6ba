use super::*;
use crate::map::RegionId;
use proptest::prelude::*;

const BUDGET: Duration = Duration::from_secs(10);

#[expect(clippy::disallowed_methods, reason = "a point to count from")]
fn start() -> Instant {
    Instant::now()
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Nodes `a`, `b`, …, the first with addresses 192.0.2.1 and 2001:db8::1, and so on.
fn region(nodes: u8) -> DerpRegion {
    let id = RegionId::new(900).unwrap();
    let mut region = DerpRegion::new(id, "t", "T");
    for number in 1..=nodes {
        let name = char::from(b'a' + number - 1).to_string();
        region.nodes.push(DerpNode {
            ipv4: format!("192.0.2.{number}"),
            ipv6: format!("2001:db8::{number}"),
            ..DerpNode::new(name, id, "relay.example")
        });
    }
    region
}

fn to(node: usize, v6: bool) -> Attempt {
    let address = if v6 { format!("[2001:db8::{}]:443", node + 1) } else { format!("192.0.2.{}:443", node + 1) };
    Attempt { node, target: Target::Address(address.parse().unwrap()) }
}

fn dial(now: Instant, region: &DerpRegion, history: &History) -> Dialling {
    Dialling::new(now, region, history, |_| false, BUDGET)
}

fn actions(dialling: &mut Dialling) -> Vec<Action> {
    std::iter::from_fn(|| dialling.poll_action()).collect()
}

/// Lets time pass, and says what began when, in milliseconds from `from`.
fn watch(dialling: &mut Dialling, from: Instant, until: Duration) -> Vec<(u128, Action)> {
    let (mut seen, mut at) = (Vec::new(), from);
    loop {
        seen.extend(actions(dialling).into_iter().map(|action| ((at - from).as_millis(), action)));
        match dialling.poll_timeout() {
            Some(next) if next <= from + until => at = next,
            Some(_) | None => return seen,
        }
        dialling.handle_timeout(at);
    }
}

#[test]
fn silent_nodes_overlap_a_quarter_of_a_second_apart_and_families_alternate() {
    let now = start();
    let mut dialling = dial(now, &region(2), &History::default());
    let expected = [
        (0, Action::Connect(to(0, true))),
        (125, Action::Connect(to(0, false))),
        (250, Action::Connect(to(1, true))),
        (375, Action::Connect(to(1, false))),
        (10_000, Action::GiveUp),
    ];
    assert_eq!(watch(&mut dialling, now, BUDGET), expected);
    assert_eq!(dialling.poll_timeout(), None);
}

#[test]
fn what_refuses_makes_the_next_begin_at_once() {
    let now = start();
    let mut dialling = dial(now, &region(2), &History::default());
    let mut order = Vec::new();
    while let Some(action) = dialling.poll_action() {
        order.push(action);
        if let Action::Connect(attempt) = action {
            dialling.handle_failure(now + millis(1), attempt);
        }
    }
    let tried = [to(0, true), to(0, false), to(1, true), to(1, false)].map(Action::Connect);
    assert_eq!(order[..4], tried);
    assert_eq!(order[4..], [Action::GiveUp]);
}

#[test]
fn a_node_that_has_accepted_gets_a_second_before_others_are_tried() {
    let now = start();
    let mut dialling = dial(now, &region(2), &History::default());
    assert_eq!(actions(&mut dialling).len(), 1);
    assert!(dialling.handle_connected(now + millis(100), to(0, true)));
    let began = watch(&mut dialling, now, millis(2000));
    assert_eq!(began, [(1100, Action::Connect(to(1, true))), (1225, Action::Connect(to(1, false)))]);
}

#[test]
fn a_failure_after_tcp_leads_to_the_next_node_and_not_to_the_same_by_another_address() {
    let now = start();
    let mut dialling = dial(now, &region(2), &History::default());
    watch(&mut dialling, now, millis(125));
    assert!(dialling.handle_connected(now + millis(130), to(0, true)));
    assert!(!dialling.handle_connected(now + millis(131), to(0, false)), "one connection to a node is enough");
    dialling.handle_failure(now + millis(131), to(0, false));
    assert_eq!(actions(&mut dialling), []);
    dialling.handle_failure(now + millis(140), to(0, true));
    assert_eq!(actions(&mut dialling), [Action::Connect(to(1, true))]);
}

#[test]
fn a_slow_name_delays_neither_the_addresses_that_are_known_nor_other_nodes() {
    let now = start();
    let mut region = region(2);
    region.nodes[0].ipv6 = String::new();
    let mut dialling = dial(now, &region, &History::default());
    assert_eq!(actions(&mut dialling), [Action::LookUp { node: 0 }, Action::Connect(to(0, false))]);
    dialling.handle_failure(now, to(0, false));
    assert_eq!(actions(&mut dialling), [], "the name may still give an address");
    assert_eq!(watch(&mut dialling, now, millis(250)), [(250, Action::Connect(to(1, true)))]);
    let found = ["2001:db8::1", "192.0.2.77"].map(|ip| ip.parse().unwrap());
    dialling.handle_addresses(now + millis(300), 0, &found);
    assert_eq!(actions(&mut dialling), [Action::Connect(to(0, true))], "IPv4 is what the map says");
}

#[test]
fn names_without_addresses_and_regions_without_relays_end_at_once() {
    let now = start();
    let mut region = region(1);
    region.nodes[0].ipv4 = String::new();
    region.nodes[0].ipv6 = "none".into();
    let mut dialling = dial(now, &region, &History::default());
    assert_eq!(actions(&mut dialling), [Action::LookUp { node: 0 }]);
    dialling.handle_addresses(now, 0, &[]);
    assert_eq!(actions(&mut dialling), [Action::GiveUp]);
    region.nodes[0].stun_only = true;
    assert_eq!(actions(&mut dial(now, &region, &History::default())), [Action::GiveUp]);
}

#[test]
fn through_a_proxy_a_node_is_tried_once_and_never_looked_up() {
    let now = start();
    let mut region = region(2);
    region.nodes[0].ipv4 = String::new();
    let mut dialling = Dialling::new(now, &region, &History::default(), |_| true, BUDGET);
    let by_proxy = |node| Action::Connect(Attempt { node, target: Target::Proxy });
    assert_eq!(watch(&mut dialling, now, BUDGET), [(0, by_proxy(0)), (250, by_proxy(1)), (10_000, Action::GiveUp)]);
}

#[test]
fn the_node_that_last_worked_comes_first_for_ten_minutes_and_by_the_family_that_worked() {
    let now = start();
    let mut history = History::default();
    history.note_good(now, "b", Via { v6: Some(false), websocket: true });
    assert_eq!(history.order(now + REMEMBERED - millis(1), &region(3)), [1, 0, 2]);
    assert_eq!(history.order(now + REMEMBERED, &region(3)), [0, 1, 2]);
    assert_eq!(actions(&mut dial(now, &region(3), &history)), [Action::Connect(to(1, false))]);
    assert!(history.prefers_websocket("b") && !history.prefers_websocket("a"));
}

#[test]
fn nodes_that_refused_the_login_come_last_for_half_a_minute_the_longest_ago_first() {
    let now = start();
    let mut history = History::default();
    history.note_good(now, "a", Via::default());
    history.note_failed(now, "a");
    history.note_failed(now + millis(5), "b");
    assert_eq!(history.order(now + millis(10), &region(3)), [2, 0, 1]);
    assert_eq!(history.order(now + FORGIVEN, &region(3)), [0, 2, 1]);
    history.note_good(now + millis(20), "b", Via::default());
    assert_eq!(history.order(now + millis(20), &region(3)), [1, 2, 0]);
}

#[test]
fn stun_only_nodes_are_skipped_and_the_first_relay_is_ideal() {
    let mut region = region(3);
    region.nodes[0].stun_only = true;
    assert_eq!(History::default().order(start(), &region), [1, 2]);
    assert_eq!(ideal(&region), Some(1));
}

#[test]
fn the_way_back_is_tried_ever_less_often_until_it_works() {
    let mut history = History::default();
    let waits: Vec<u64> = (0..7)
        .map(|_| {
            let wait = history.return_after().as_secs();
            history.note_return();
            wait
        })
        .collect();
    assert_eq!(waits, [30, 60, 120, 240, 480, 600, 600]);
    history.note_returned();
    assert_eq!(history.return_after().as_secs(), 30);
}

proptest! {
    #[test]
    fn every_round_ends_and_every_deadline_lies_ahead(
        nodes in 0u8..5,
        unknown in any::<u8>(),
        steps in proptest::collection::vec((0usize..6, any::<bool>(), 0u64..400, 0u8..4), 0..40),
    ) {
        let now = start();
        let mut region = region(nodes);
        for (at, node) in region.nodes.iter_mut().enumerate() {
            if unknown >> at & 1 == 1 {
                node.ipv4 = String::new();
            }
        }
        let (mut dialling, mut at) = (dial(now, &region, &History::default()), now);
        let (mut attempts, mut ended) = (0, false);
        for (node, v6, wait, what) in steps.into_iter().chain((0..4000).map(|_| (9, false, 100, 0))) {
            at += millis(wait);
            match what {
                0 => {}
                1 => dialling.handle_addresses(at, node, &["192.0.2.9".parse().unwrap()]),
                2 => drop(dialling.handle_connected(at, to(node, v6))),
                _ => dialling.handle_failure(at, to(node, v6)),
            }
            dialling.handle_timeout(at);
            for action in actions(&mut dialling) {
                prop_assert!(!ended, "{:?} after the end", action);
                attempts += usize::from(matches!(action, Action::Connect(_)));
                ended |= action == Action::GiveUp;
            }
            prop_assert!(dialling.poll_timeout().is_none_or(|next| next > at));
            prop_assert_eq!(dialling.poll_timeout().is_none(), ended);
            if ended {
                break;
            }
        }
        prop_assert!(ended && at <= now + BUDGET + millis(400) && attempts <= usize::from(nodes) * 3);
    }
}
