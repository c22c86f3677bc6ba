//! What the queue promises, one by one and against a slow model.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use proptest::prelude::*;

use super::codel::Thinning;
use super::*;

fn data(number: u8) -> Bytes {
    Bytes::from(vec![4, 0, 0, 0, number])
}

fn disco(number: u8) -> Bytes {
    let mut packet = b"TS\xF0\x9F\x92\xAC".to_vec();
    packet.resize(62, number);
    packet.into()
}

#[expect(clippy::disallowed_methods, reason = "a point to count from")]
fn start() -> Instant {
    Instant::now()
}

fn numbers(queue: &mut PacketQueue) -> Vec<u8> {
    std::iter::from_fn(|| queue.pop(start())).map(|packet| *packet.payload.last().unwrap()).collect()
}

const SMALL: Depth = Depth { data: 3, disco: 2, bytes: 10_000 };

#[test]
fn the_newest_packets_stay_and_the_rest_is_counted() {
    let mut queue = PacketQueue::new(SMALL);
    for number in 0..10 {
        queue.push(start(), NodePublic::ZERO, data(number));
    }
    assert_eq!(queue.displaced(), Displaced { data: 7, disco: 0 });
    assert_eq!(numbers(&mut queue), [7, 8, 9]);
}

#[test]
fn disco_overtakes_data_and_is_not_displaced_by_it() {
    let mut queue = PacketQueue::new(SMALL);
    queue.push(start(), NodePublic::ZERO, data(1));
    queue.push(start(), NodePublic::ZERO, disco(2));
    for number in 3..9 {
        queue.push(start(), NodePublic::ZERO, data(number));
    }
    assert_eq!(queue.displaced(), Displaced { data: 4, disco: 0 });
    assert_eq!(numbers(&mut queue), [2, 6, 7, 8]);
}

#[test]
fn bytes_are_bounded_and_one_packet_always_fits() {
    let mut queue = PacketQueue::new(Depth { data: 100, disco: 100, bytes: 1000 });
    let mut push = |length| {
        let pushed = queue.push(start(), NodePublic::ZERO, Bytes::from(vec![0; length]));
        (pushed.lane, pushed.displaced, pushed.own_dropped)
    };
    assert_eq!(push(5000), (Lane::Data, 0, 0));
    assert_eq!(push(600), (Lane::Data, 1, 1));
    assert_eq!(push(400), (Lane::Data, 0, 0));
    assert_eq!(push(1), (Lane::Data, 1, 1));
    assert_eq!(queue.len(), 2);
}

/// Puts a packet in every `gap` and takes one every `pause`; how many were dropped, and how long the last ones waited.
fn standing(gap: Duration, pause: Duration, packets: u32) -> (u64, Duration) {
    let mut queue = PacketQueue::new(Depth { bytes: 1 << 30, data: 1 << 20, ..Depth::default() });
    let (start, mut pushed, mut now) = (start(), 0, start());
    let mut waited = Duration::ZERO;
    while pushed < packets || !queue.is_empty() {
        while pushed < packets && start + gap * pushed <= now {
            queue.push(start + gap * pushed, NodePublic::ZERO, Bytes::copy_from_slice(&pushed.to_be_bytes()));
            pushed += 1;
        }
        if let Some(packet) = queue.pop(now) {
            let number = u32::from_be_bytes(*packet.payload.first_chunk().unwrap());
            waited = now - (start + gap * number);
        }
        now += pause;
    }
    (queue.displaced().data, waited)
}

#[test]
fn a_burst_that_drains_in_time_is_kept_whole() {
    // 500 packets at once, and 10 a millisecond: empty after 50 ms.
    assert_eq!(standing(Duration::ZERO, Duration::from_micros(100), 500).0, 0);
}

#[test]
fn a_queue_that_never_empties_is_thinned_out() {
    // A tenth too much for 20 s: without drops the last packet would wait for 2 s.
    let (dropped, waited) = standing(Duration::from_micros(900), Duration::from_millis(1), 22_222);
    assert!(dropped > 1000, "{dropped}");
    assert!(waited < Duration::from_millis(300), "{waited:?}");
}

#[test]
fn disco_is_never_thinned_out() {
    let mut queue = PacketQueue::new(Depth::default());
    let begin = start();
    for number in 0..32 {
        queue.push(begin, NodePublic::ZERO, disco(number));
    }
    for second in 1..=32 {
        assert!(queue.pop(begin + Duration::from_secs(second)).is_some());
    }
    assert_eq!(queue.displaced(), Displaced::default());
}

fn node(number: u8) -> NodePublic {
    NodePublic::from_bytes([number; 32])
}

fn millis(number: u64) -> Duration {
    Duration::from_millis(number)
}

fn all(queue: &mut PacketQueue, now: Instant) -> Vec<(NodePublic, usize)> {
    std::iter::from_fn(|| queue.pop(now)).map(|packet| (packet.node, packet.payload.len())).collect()
}

#[test]
fn a_flood_leaves_the_trickle_of_another_node_alone() {
    // 1 flooding node fills the queue many times over, 1 packet of the other comes every 100 of them.
    let (mut queue, now) = (PacketQueue::new(Depth { data: 500, ..Depth::default() }), start());
    let (mut flood_lost, mut served) = (0, 0);
    for round in 0..1000u32 {
        for _ in 0..100 {
            flood_lost += queue.push(now, node(1), Bytes::from(vec![0; 1400])).own_dropped;
        }
        let pushed = queue.push(now, node(2), Bytes::from(round.to_be_bytes().to_vec()));
        assert_eq!(pushed.own_dropped, 0, "in round {round}");
        // The receiver takes 10 for every 100. At first both are new and take turns; then the trickle goes first.
        let taken: Vec<_> = (0..10).map(|_| queue.pop(now).unwrap()).collect();
        let place = taken.iter().position(|packet| packet.node == node(2));
        let place = place.expect("what came now is taken now");
        assert!(place <= if round == 0 { 2 } else { 0 }, "behind {place} packets of the flood in round {round}");
        assert_eq!(taken[place].payload[..], round.to_be_bytes());
        served += 9;
    }
    let (waiting, lost) = (queue.len() as u64, queue.displaced().data);
    assert_eq!(lost + waiting + served, 100_000);
    assert!(lost - flood_lost <= 1, "all but what the last packet of the other displaced was told");
}

#[test]
fn nodes_share_by_bytes_and_not_by_packets() {
    let (mut queue, now) = (PacketQueue::new(Depth::default()), start());
    for _ in 0..1000 {
        queue.push(now, node(1), Bytes::from(vec![0; 1363]));
        queue.push(now, node(2), Bytes::from(vec![0; 103]));
    }
    let mut bytes = [0usize; 3];
    for _ in 0..600 {
        let packet = queue.pop(now).unwrap();
        bytes[usize::from(packet.node.as_bytes()[0])] += packet.payload.len() + 37;
    }
    assert!(bytes[1].abs_diff(bytes[2]) <= 2 * 1600, "{bytes:?}");
}

#[test]
fn long_packets_are_paid_for_in_turns() {
    let (mut queue, now) = (PacketQueue::new(Depth::default()), start());
    for _ in 0..4 {
        queue.push(now, node(1), Bytes::from(vec![0; 64_000]));
    }
    for _ in 0..400 {
        queue.push(now, node(2), Bytes::from(vec![0; 1563]));
    }
    let order = all(&mut queue, now);
    let long: Vec<usize> = order.iter().enumerate().filter(|(_, (_, len))| *len > 2000).map(|(at, _)| at).collect();
    assert_eq!(long, [0, 41, 82, 123], "40 packets of 1600 bytes for every one of 64,000");
}

#[test]
fn empty_packets_are_not_free() {
    let (mut queue, now) = (PacketQueue::new(Depth::default()), start());
    for _ in 0..100 {
        queue.push(now, node(1), Bytes::new());
    }
    queue.push(now, node(2), Bytes::from_static(b"one"));
    let place = all(&mut queue, now).iter().position(|(from, _)| *from == node(2)).unwrap();
    assert!(place <= 44, "{place}");
}

#[test]
fn a_node_that_sends_whenever_it_is_served_gets_no_precedence() {
    let (mut queue, now) = (PacketQueue::new(Depth::default()), start());
    for _ in 0..100 {
        queue.push(now, node(1), Bytes::from(vec![0; 1563]));
        queue.push(now, node(2), Bytes::from(vec![0; 1563]));
    }
    let mut served = [0; 4];
    for _ in 0..120 {
        if queue.len() < 400 && served[3] + 1 > served[0] {
            queue.push(now, node(3), Bytes::from(vec![0; 1563]));
            served[0] += 1;
        }
        let from = queue.pop(now).unwrap().node.as_bytes()[0];
        served[usize::from(from)] += 1;
    }
    assert!(served[1] >= 38 && served[2] >= 38, "{served:?}");
}

#[test]
fn many_small_packets_do_not_push_out_a_few_long_ones() {
    let (mut queue, now) = (PacketQueue::new(Depth { data: 1000, disco: 32, bytes: 1_000_000 }), start());
    for _ in 0..300 {
        queue.push(now, node(1), Bytes::from(vec![0; 1400]));
    }
    for _ in 0..10_000 {
        queue.push(now, node(2), Bytes::from_static(b"small"));
    }
    assert_eq!(queue.push(now, node(1), data(1)).own_dropped, 0);
}

#[test]
fn disco_of_one_node_does_not_push_out_that_of_another() {
    let (mut queue, now) = (PacketQueue::new(Depth::default()), start());
    let mut long = disco(9).to_vec();
    long.resize(1000, 9);
    queue.push(now, node(9), long.into());
    for _ in 0..1000 {
        queue.push(now, node(1), disco(1));
    }
    let pushed = queue.push(now, node(9), disco(2));
    assert_eq!((pushed.lane, pushed.displaced, pushed.own_dropped), (Lane::Disco, 1, 0));
    assert_eq!((queue.len(), queue.displaced().disco), (32, 970));
    let order = all(&mut queue, now);
    assert_eq!(order.iter().filter(|(from, _)| *from == node(9)).count(), 2);
}

#[test]
fn a_node_learns_what_it_lost_since_its_last_packet() {
    let (mut queue, now) = (PacketQueue::new(SMALL), start());
    for number in 0..3 {
        queue.push(now, node(1), data(number));
    }
    let pushed = queue.push(now, node(2), data(3));
    assert_eq!((pushed.displaced, pushed.own_dropped), (1, 0));
    let pushed = queue.push(now, node(2), data(4));
    assert_eq!((pushed.displaced, pushed.own_dropped), (1, 0));
    // 2 for the other node's, 1 for its own: the other one now has more.
    let pushed = queue.push(now, node(1), data(5));
    assert_eq!((pushed.displaced, pushed.own_dropped), (1, 2));
    assert_eq!(queue.push(now, node(2), data(6)).own_dropped, 1);
}

#[test]
fn a_node_learns_what_was_thinned_out_even_once_its_packets_are_gone() {
    let (mut queue, begin) = (PacketQueue::new(Depth::default()), start());
    for number in 0..100 {
        queue.push(begin, node(1), data(number));
    }
    let taken = (0..u64::MAX).map_while(|n| queue.pop(begin + millis(20 + 10 * n))).count() as u64;
    assert!(taken < 100);
    assert_eq!(queue.push(begin + millis(2000), node(1), data(0)).own_dropped, 100 - taken);
    assert_eq!(queue.displaced().data, 100 - taken);
}

#[test]
fn only_who_stands_in_the_queue_is_thinned_out() {
    // Node 1 has a standing queue; node 2 sends one packet every 10 ms.
    let (mut queue, begin) = (PacketQueue::new(Depth::default()), start());
    let (mut lost, mut other_lost) = (0, 0);
    for at in 0..5000 {
        let now = begin + millis(at);
        for _ in 0..if at == 0 { 500 } else { 1 } {
            lost += queue.push(now, node(1), Bytes::from(vec![0; 1400])).own_dropped;
        }
        if at % 10 == 0 {
            other_lost += queue.push(now, node(2), data(2)).own_dropped;
        }
        queue.pop(now);
    }
    assert!(lost > 100, "{lost}");
    assert_eq!(other_lost, 0);
}

#[test]
fn a_queue_tells_how_long_nothing_has_been_taken() {
    let (mut queue, begin) = (PacketQueue::new(Depth::default()), start());
    let stuck = |queue: &mut PacketQueue, at| queue.push(begin + millis(at), node(1), data(1)).stuck;
    assert_eq!(stuck(&mut queue, 0), millis(0));
    assert_eq!(stuck(&mut queue, 700), millis(700));
    assert!(queue.pop(begin + millis(800)).is_some());
    assert_eq!(stuck(&mut queue, 1000), millis(200));
    while queue.pop(begin + millis(1000)).is_some() {}
    assert_eq!(stuck(&mut queue, 9000), millis(0), "it was empty");
}

#[test]
fn a_blocked_queue_holds_no_more_memory_than_its_packets_are_long() {
    let (mut queue, now) = (PacketQueue::new(Depth::default()), start());
    let slab = Bytes::from(vec![4; 64 * 1024]);
    let lies_in = |packet: &Bytes| slab.as_ptr_range().contains(&packet.as_ptr());
    queue.push(now, node(1), slab.slice(0..100));
    queue.push(now, node(1), slab.slice(100..40_100));
    queue.set_blocked(true);
    queue.push(now, node(1), slab.slice(200..300));
    queue.set_blocked(false);
    queue.push(now, node(1), slab.slice(300..400));
    let packets: Vec<Bytes> = std::iter::from_fn(|| queue.pop(now)).map(|packet| packet.payload).collect();
    assert_eq!(packets.iter().map(lies_in).collect::<Vec<_>>(), [false, true, false, true]);
    assert_eq!(packets.iter().map(Bytes::len).collect::<Vec<_>>(), [100, 40_000, 100, 100]);
    assert!(packets.iter().all(|packet| packet.iter().all(|byte| *byte == 4)));
}

#[test]
fn an_idle_queue_gives_its_memory_back() {
    let (mut queue, now) = (PacketQueue::new(Depth::default()), start());
    assert!(std::mem::size_of::<PacketQueue>() <= 88);
    queue.push(now, node(1), data(1));
    queue.push(now, node(1), disco(1));
    queue.shrink();
    assert_eq!(queue.len(), 2, "what waits is kept");
    assert_eq!(queue.bytes(), 67);
    assert_eq!(all(&mut queue, now).len(), 2);
    queue.shrink();
    assert!(queue.data.is_none() && queue.disco.is_none());
    queue.push(now, node(1), data(1));
    assert_eq!(queue.clear(), 1);
    assert!(queue.data.is_none());
}

#[test]
fn nodes_that_come_and_go_are_forgotten() {
    let (mut queue, now) = (PacketQueue::new(Depth { data: 10, ..Depth::default() }), start());
    for number in 0..10_000u32 {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_be_bytes());
        // Always something left, so that the queue never comes to rest.
        queue.push(now, NodePublic::from_bytes(key), data(0));
        if number % 3 != 0 {
            queue.push(now, node(255), data(0));
            queue.pop(now);
        }
    }
    let flows = queue.data.as_mut().unwrap().flows_in_memory();
    assert!(flows <= 10 + 2 * 32 + 2, "{flows}");
}

#[test]
fn a_thousand_nodes_cost_little_more_than_one() {
    // Not a measurement, but a linear search for the longest of 1000 would take 100 times as long.
    let key = |number: u32| {
        let mut key = [7; 32];
        key[..4].copy_from_slice(&number.to_be_bytes());
        NodePublic::from_bytes(key)
    };
    let time = |nodes: u32| {
        let (mut queue, begin) = (PacketQueue::new(Depth::default()), start());
        for number in 0..40_000u32 {
            queue.push(begin, key(number % nodes), Bytes::from_static(&[0; 1400]));
            if number % 4 == 0 {
                queue.pop(begin);
            }
        }
        assert!(queue.displaced().data > 20_000);
        start().duration_since(begin)
    };
    let (few, many) = (time(2), time(1000));
    assert!(many < few * 20, "{few:?} for two, {many:?} for a thousand");
}

/// The same rules, written down without regard to speed.
#[derive(Debug, Default)]
struct Model {
    flows: BTreeMap<u8, ModelFlow>,
    new: VecDeque<u8>,
    old: VecDeque<u8>,
    arrivals: u64,
}

#[derive(Debug)]
struct ModelFlow {
    packets: VecDeque<(u64, Instant, usize)>,
    deficit: i64,
    thinning: Thinning,
    dropped: u64,
}

impl Model {
    fn waiting(&self) -> impl Iterator<Item = usize> {
        self.flows.values().flat_map(|flow| &flow.packets).map(|(_, _, len)| *len)
    }

    fn push(&mut self, now: Instant, from: u8, len: usize, packets: usize, bytes: usize) -> (u64, u64) {
        let mut displaced = 0;
        while self.waiting().count() > 0
            && (self.waiting().count() >= packets || self.waiting().sum::<usize>() + len > bytes)
        {
            let weight = |flow: &ModelFlow| flow.packets.iter().map(|(_, _, len)| (*len).max(bytes / packets)).sum();
            let longest = self.flows.iter_mut().filter(|(_, flow)| !flow.packets.is_empty());
            let (from, flow) =
                longest.max_by_key::<(usize, _), _>(|(_, f)| (weight(f), std::cmp::Reverse(f.packets[0].0))).unwrap();
            flow.packets.pop_front();
            flow.dropped += 1;
            displaced += 1;
            if flow.packets.is_empty() {
                self.new.retain(|other| other != from);
                self.old.retain(|other| other != from);
            }
        }
        let fresh = || ModelFlow { packets: VecDeque::new(), deficit: 1600, thinning: Thinning::default(), dropped: 0 };
        let flow = self.flows.entry(from).or_insert_with(fresh);
        if !self.new.contains(&from) && !self.old.contains(&from) {
            if flow.deficit > 0 {
                flow.deficit = 1600;
                self.new.push_back(from);
            } else {
                self.old.push_back(from);
            }
        }
        flow.packets.push_back((self.arrivals, now, len));
        self.arrivals += 1;
        (displaced, std::mem::take(&mut flow.dropped))
    }

    fn pop(&mut self, now: Instant) -> Option<(u8, u64)> {
        if self.waiting().count() == 0 {
            for from in self.new.drain(..).chain(self.old.drain(..)) {
                self.flows.get_mut(&from).unwrap().deficit = 1600;
            }
        }
        loop {
            let is_new = !self.new.is_empty();
            let from = *if is_new { self.new.front() } else { self.old.front() }?;
            let list = if is_new { &mut self.new } else { &mut self.old };
            let flow = self.flows.get_mut(&from).unwrap();
            if flow.deficit <= 0 {
                flow.deficit += 1600;
                list.pop_front();
                self.old.push_back(from);
            } else if let Some((number, since, len)) = flow.packets.pop_front() {
                if flow.thinning.drops(now, now - since, flow.packets.is_empty()) {
                    flow.dropped += 1;
                } else {
                    flow.deficit -= len as i64 + 37;
                    return Some((from, number));
                }
            } else {
                list.pop_front();
                if is_new && !self.old.is_empty() {
                    self.old.push_back(from);
                }
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Push(u8, usize),
    Pop,
    Wait(u64),
    Block(bool),
    Shrink,
}

fn any_step() -> impl Strategy<Value = Step> {
    let length = prop_oneof![6 => 8usize..120, 3 => 120usize..1600, 1 => 1600usize..5000];
    prop_oneof![
        12 => (0u8..8, length).prop_map(|(from, len)| Step::Push(from, len)),
        9 => Just(Step::Pop),
        2 => (0u64..60).prop_map(Step::Wait),
        1 => any::<bool>().prop_map(Step::Block),
        1 => Just(Step::Shrink),
    ]
}

proptest! {
    #[test]
    fn it_serves_and_drops_as_the_slow_model_does(
        steps in proptest::collection::vec(any_step(), 0..400),
        packets in 1usize..30,
        bytes in 100usize..20_000,
    ) {
        let (mut queue, mut model) = (PacketQueue::new(Depth { data: packets, disco: 1, bytes }), Model::default());
        let (mut now, mut displaced) = (start(), 0);
        let mut last = BTreeMap::new();
        let (mut pushed, mut popped) = (0, 0);
        for step in steps {
            match step {
                Step::Push(from, len) => {
                    let mut payload = vec![0; len];
                    payload[..8].copy_from_slice(&model.arrivals.to_be_bytes());
                    let expected = model.push(now, from, len, packets, bytes);
                    let got = queue.push(now, node(from), payload.into());
                    prop_assert_eq!((got.displaced, got.own_dropped), expected);
                    displaced += got.displaced;
                    pushed += 1;
                }
                Step::Pop => {
                    let got = queue.pop(now).map(|packet| {
                        (packet.node.as_bytes()[0], u64::from_be_bytes(*packet.payload.first_chunk().unwrap()))
                    });
                    prop_assert_eq!(got, model.pop(now));
                    if let Some((from, number)) = got {
                        prop_assert!(last.insert(from, number).is_none_or(|before| before < number), "out of order");
                        popped += 1;
                    }
                }
                Step::Wait(time) => now += millis(time),
                Step::Block(blocked) => queue.set_blocked(blocked),
                Step::Shrink => {
                    if queue.is_empty() {
                        model = Model { arrivals: model.arrivals, ..Model::default() };
                    }
                    queue.shrink();
                }
            }
            prop_assert_eq!(queue.len(), model.waiting().count());
            prop_assert_eq!(queue.bytes(), model.waiting().sum::<usize>());
            prop_assert!(queue.len() <= packets && (queue.len() <= 1 || queue.bytes() <= bytes));
            prop_assert_eq!(pushed, popped + queue.len() as u64 + queue.displaced().data);
        }
        prop_assert!(displaced <= queue.displaced().data);
    }

    #[test]
    fn nothing_is_lost_uncounted_in_either_lane(
        pushes in proptest::collection::vec((any::<bool>(), 0u8..100, 0usize..200, any::<bool>()), 0..300),
    ) {
        let depth = Depth { data: 5, disco: 4, bytes: 400 };
        let mut queue = PacketQueue::new(depth);
        let (mut pushed, mut popped) = (0u64, 0u64);
        for (is_disco, from, len, pop) in pushes {
            let payload = if is_disco { disco(0) } else { Bytes::from(vec![0; len]) };
            queue.push(start(), node(from), payload);
            pushed += 1;
            prop_assert!(queue.len() <= depth.data + depth.disco);
            popped += u64::from(pop && queue.pop(start()).is_some());
        }
        let displaced = queue.displaced();
        prop_assert_eq!(pushed, popped + queue.len() as u64 + displaced.data + displaced.disco);
        let waiting = queue.len();
        prop_assert_eq!(queue.clear(), waiting);
    }
}
