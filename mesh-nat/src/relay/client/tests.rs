use super::*;
use crate::disco::message::Binding;
use mesh_noise::key::DiscoPrivate;

fn node(number: u8) -> NodePublic {
    NodePublic::from_bytes([number; 32])
}

fn disco(number: u8) -> DiscoPublic {
    DiscoPrivate::from_bytes([number; 32]).public()
}

const ME: u8 = 1;
const PEER: u8 = 2;
const SERVER: u8 = 3;

fn server_address() -> SocketAddr {
    SocketAddr::from(([203, 0, 113, 1], 7777))
}

struct World {
    now: Instant,
    client: Client,
    /// What has come out, and when.
    seen: Vec<Output>,
}

impl World {
    fn new() -> Self {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        let mut client = Client::new(now, node(ME), disco(ME), [7; 32]);
        client.set_servers(BTreeSet::from([node(SERVER)]));
        Self { now, client, seen: Vec::new() }
    }

    fn drain(&mut self) {
        self.seen.extend(std::iter::from_fn(|| self.client.poll_output()));
    }

    fn take(&mut self) -> Vec<Output> {
        self.drain();
        std::mem::take(&mut self.seen)
    }

    fn traffic(&mut self, direct: bool) {
        self.client.traffic(self.now, node(PEER), disco(PEER), direct);
    }

    /// Lets time pass, with traffic every half second if `direct` is something.
    fn run(&mut self, span: Duration, direct: Option<bool>) {
        let end = self.now + span;
        while self.now < end {
            if let Some(direct) = direct {
                self.traffic(direct);
            }
            let next = (self.now + Duration::from_millis(500)).min(end);
            while let Some(due) = self.client.poll_timeout().filter(|due| *due <= next) {
                self.now = self.now.max(due);
                self.client.handle_timeout(self.now);
                assert!(self.client.poll_timeout().is_none_or(|due| due > self.now), "a deadline stays due");
                self.drain();
            }
            self.now = next;
        }
    }

    fn endpoint(&self, vni: u32, lamport: u64) -> RelayEndpoint {
        RelayEndpoint {
            server: disco(SERVER),
            clients: [disco(PEER), disco(ME)],
            lamport,
            vni: Vni::new(vni).unwrap(),
            bind_lifetime: Duration::from_secs(30),
            steady_lifetime: Duration::from_secs(300),
            endpoints: vec![server_address(), SocketAddr::from(([10, 0, 0, 1], 7777))],
        }
    }

    fn place(vni: u32) -> Place {
        Place { server: server_address(), vni: Vni::new(vni).unwrap() }
    }

    /// The generation of the request that was sent last.
    fn request(&mut self) -> u32 {
        let asked = |output: &Output| {
            let Output::Signal { to, message: Message::AllocateRequest(request) } = output else { return None };
            assert!(*to == node(SERVER) && request.clients.is_sorted());
            Some(request.generation)
        };
        self.take().iter().rev().find_map(asked).expect("a request")
    }

    /// Answers the last bind and the ping that follows.
    fn bind_and_prove(&mut self, vni: u32) {
        let binds = binds(&self.take());
        let (_, bind) = binds.last().expect("a bind");
        let challenge = Binding { challenge: [9; 32], ..bind.clone() };
        assert!(self.client.challenge(self.now, disco(SERVER), server_address(), &challenge));
        let outputs = self.take();
        assert!(
            matches!(&outputs[..], [
            Output::Control { message: Message::BindAnswer(answer), place, .. }, Output::Ping { .. }
        ] if *answer == challenge && *place == Self::place(vni)),
            "{outputs:?}"
        );
        self.now += Duration::from_millis(30);
        self.pong(vni, &outputs);
    }

    fn pong(&mut self, vni: u32, outputs: &[Output]) {
        let tx = *pings(outputs).last().expect("a ping");
        assert!(self.client.pong(self.now, node(PEER), Self::place(vni), tx));
    }

    /// Looks, and ends with a path.
    fn with_path() -> Self {
        let mut world = Self::new();
        world.run(Duration::from_secs(1), Some(false));
        let generation = world.request();
        let response = AllocateResponse { generation, endpoint: world.endpoint(1, 1) };
        world.client.response(world.now, node(SERVER), response);
        world.bind_and_prove(1);
        assert_eq!(world.take(), [Output::Path { peer: node(PEER), place: Some(Self::place(1)) }]);
        world
    }
}

fn binds(outputs: &[Output]) -> Vec<(Place, Binding)> {
    let bind = |output: &Output| {
        let Output::Control { place, message: Message::Bind(binding), .. } = output else { return None };
        Some((*place, binding.clone()))
    };
    outputs.iter().filter_map(bind).collect()
}

fn pings(outputs: &[Output]) -> Vec<TxId> {
    outputs.iter().filter_map(|output| if let Output::Ping { tx, .. } = output { Some(*tx) } else { None }).collect()
}

fn requests(outputs: &[Output]) -> usize {
    let is_request = |output: &&Output| matches!(output, Output::Signal { message: Message::AllocateRequest(_), .. });
    outputs.iter().filter(is_request).count()
}

#[test]
fn a_peer_that_becomes_direct_soon_costs_nothing() {
    let mut world = World::new();
    world.run(Duration::from_millis(300), Some(false));
    world.run(Duration::from_secs(100), Some(true));
    assert_eq!(world.take(), []);
}

#[test]
fn servers_are_asked_again_after_three_seconds_and_given_up_after_ten() {
    let mut world = World::new();
    world.client.set_servers(BTreeSet::from([node(SERVER), node(4)]));
    world.run(Duration::from_millis(2500), Some(false));
    assert_eq!(requests(&world.take()), 2, "both at once");
    world.run(Duration::from_millis(1500), Some(false));
    assert_eq!(requests(&world.take()), 2, "once more");
    world.run(Duration::from_secs(25), Some(false));
    assert_eq!(requests(&world.take()), 0);
    world.run(Duration::from_secs(2), Some(false));
    assert_eq!(requests(&world.take()), 2, "half a minute later");
}

#[test]
fn a_late_or_foreign_response_is_ignored() {
    let mut world = World::new();
    world.run(Duration::from_secs(1), Some(false));
    let generation = world.request();
    let endpoint = world.endpoint(1, 1);
    let response = |generation, endpoint: &RelayEndpoint| AllocateResponse { generation, endpoint: endpoint.clone() };
    world.client.response(world.now, node(SERVER), response(generation + 1, &endpoint));
    world.client.response(world.now, node(9), response(generation, &endpoint));
    let foreign = RelayEndpoint { clients: [disco(PEER), disco(9)], ..endpoint.clone() };
    world.client.response(world.now, node(SERVER), response(generation, &foreign));
    assert_eq!(world.take(), []);
    world.run(Duration::from_secs(11), None);
    world.take();
    world.client.response(world.now, node(SERVER), response(generation, &endpoint));
    assert_eq!(world.take(), [], "given up");
}

#[test]
fn a_response_is_passed_on_and_bound_at_every_address() {
    let mut world = World::new();
    world.run(Duration::from_secs(1), Some(false));
    let generation = world.request();
    let endpoint = world.endpoint(1, 1);
    world.client.response(world.now, node(SERVER), AllocateResponse { generation, endpoint: endpoint.clone() });
    let outputs = world.take();
    let via = Output::Signal { to: node(PEER), message: Message::CallMeMaybeVia(endpoint.clone()) };
    assert_eq!(outputs[0], via);
    let bound: Vec<_> = binds(&outputs).iter().map(|(place, _)| place.server).collect();
    assert_eq!(bound, endpoint.endpoints);
    assert!(binds(&outputs).iter().all(|(_, bind)| bind.generation != 0 && bind.remote == disco(PEER)));
}

#[test]
fn the_first_challenge_chooses_the_address() {
    let mut world = World::with_path();
    let status = world.client.status(&node(PEER)).unwrap();
    assert_eq!((status.place, status.latency), (World::place(1), Duration::from_millis(30)));
    assert!(!world.client.expects(&disco(SERVER)), "the handshake is over");
    world.traffic(false);
    assert_eq!(world.take(), []);
}

#[test]
fn what_is_lost_in_a_handshake_is_repeated_and_ends() {
    let mut world = World::new();
    world.client.via(world.now, node(PEER), disco(PEER), world.endpoint(1, 1));
    assert_eq!(binds(&world.take()).len(), 2);
    world.run(Duration::from_secs(2), None);
    let again = binds(&world.take());
    assert_eq!(again.len(), 4, "after 0.5 s and 1.5 s");
    let challenge = Binding { challenge: [9; 32], ..again[0].1.clone() };
    assert!(world.client.challenge(world.now, disco(SERVER), server_address(), &challenge));
    world.run(Duration::from_secs(4), None);
    let outputs = world.take();
    assert!(pings(&outputs).len() >= 3 && binds(&outputs).is_empty(), "{outputs:?}");
    world.run(Duration::from_secs(100), None);
    assert!(pings(&world.take()).len() <= 10);
    assert_eq!((world.client.peers(), world.client.poll_timeout()), (0, None));
}

#[test]
fn challenges_count_once_and_only_for_what_was_asked() {
    let mut world = World::new();
    world.client.via(world.now, node(PEER), disco(PEER), world.endpoint(1, 1));
    let (_, bind) = binds(&world.take()).remove(0);
    let mut send = |change: fn(&mut Binding), server| {
        let mut challenge = Binding { challenge: [9; 32], ..bind.clone() };
        change(&mut challenge);
        world.client.challenge(world.now, server, server_address(), &challenge)
    };
    assert!(!send(|_| (), disco(9)), "another server");
    assert!(!send(|binding| binding.generation += 1, disco(SERVER)));
    assert!(!send(|binding| binding.remote = disco(9), disco(SERVER)));
    assert!(!send(|binding| binding.vni = Vni::new(2).unwrap(), disco(SERVER)));
    assert!(send(|_| (), disco(SERVER)));
    assert!(!send(|_| (), disco(SERVER)), "a second one, from another address maybe");
}

#[test]
fn a_ping_shows_that_the_other_leg_is_bound_and_at_most_ten_go_back() {
    let mut world = World::new();
    world.client.via(world.now, node(PEER), disco(PEER), world.endpoint(1, 1));
    let (_, bind) = binds(&world.take()).remove(0);
    let challenge = Binding { challenge: [9; 32], ..bind };
    world.client.pinged(world.now, node(PEER), World::place(1));
    assert_eq!(world.take(), [], "our own leg is not bound");
    assert!(world.client.challenge(world.now, disco(SERVER), server_address(), &challenge));
    for _ in 0..100 {
        world.client.pinged(world.now, node(PEER), World::place(1));
    }
    let outputs = world.take();
    assert_eq!(pings(&outputs).len(), 10);
    world.pong(1, &outputs);
    assert!(world.client.status(&node(PEER)).is_some());
}

#[test]
fn the_newest_record_of_a_server_holds() {
    let mut world = World::new();
    let mut via = |vni, lamport| {
        let endpoint = world.endpoint(vni, lamport);
        world.client.via(world.now, node(PEER), disco(PEER), endpoint);
        let outputs = std::iter::from_fn(|| world.client.poll_output()).collect::<Vec<_>>();
        binds(&outputs).first().map(|(place, _)| place.vni.get())
    };
    assert_eq!(via(5, 5), Some(5));
    assert_eq!(via(5, 5), None, "the same");
    assert_eq!(via(4, 4), None, "an older one");
    assert_eq!(via(6, 6), Some(6));
}

#[test]
fn a_record_of_the_path_in_use_starts_nothing() {
    let mut world = World::with_path();
    world.client.via(world.now, node(PEER), disco(PEER), world.endpoint(1, 1));
    assert_eq!(world.take(), []);
    world.client.via(world.now, node(PEER), disco(PEER), world.endpoint(2, 2));
    assert_eq!(binds(&world.take()).len(), 2, "after a restart of the server");
    world.client.via(world.now, node(PEER), disco(PEER), world.endpoint(0, 0));
    assert_eq!(world.take(), [], "from before");
}

#[test]
fn a_path_in_use_is_pinged_and_given_up_when_it_falls_silent() {
    let mut world = World::with_path();
    for _ in 0..5 {
        world.run(Duration::from_secs(3), Some(false));
        let outputs = world.take();
        assert_eq!(pings(&outputs).len(), 1);
        world.pong(1, &outputs);
        assert_eq!(world.take(), []);
    }
    let from = world.now;
    world.run(Duration::from_secs(8), Some(false));
    let outputs = world.take();
    assert!(outputs.contains(&Output::Path { peer: node(PEER), place: None }), "{outputs:?}");
    assert_eq!(pings(&outputs).len(), 4);
    assert!(requests(&outputs) >= 1, "another is looked for at once");
    assert!(world.now - from < Duration::from_secs(10));
}

#[test]
fn a_path_nobody_uses_is_left_to_die() {
    let mut world = World::with_path();
    for _ in 0..40 {
        world.run(Duration::from_secs(3), None);
        let outputs = world.take();
        if let Some(tx) = pings(&outputs).last() {
            assert!(world.client.pong(world.now, node(PEER), World::place(1), *tx));
        }
    }
    assert_eq!((world.client.peers(), world.client.poll_timeout()), (0, None));
}

#[test]
fn behind_a_direct_path_it_is_kept_warm_and_at_hand() {
    let mut world = World::with_path();
    let mut sent = 0;
    for _ in 0..100 {
        world.run(Duration::from_secs(1), Some(true));
        let outputs = world.take();
        assert_eq!(requests(&outputs), 0);
        if let Some(tx) = pings(&outputs).last() {
            sent += 1;
            assert!(world.client.pong(world.now, node(PEER), World::place(1), *tx));
        }
    }
    assert!((3..=6).contains(&sent), "{sent} pings in 100 s");
    while pings(&world.seen).is_empty() {
        world.run(Duration::from_secs(1), Some(true));
    }
    let outputs = world.take();
    world.pong(1, &outputs);
    world.run(Duration::from_secs(8), Some(true));
    assert_eq!(world.client.status(&node(PEER)), None, "not proven at the moment");
    world.take();
    world.traffic(false);
    world.client.handle_timeout(world.now);
    let outputs = world.take();
    world.pong(1, &outputs);
    assert_eq!(world.take(), [Output::Path { peer: node(PEER), place: Some(World::place(1)) }]);
}

#[test]
fn a_faster_relay_takes_over_and_a_little_faster_one_does_not() {
    let mut world = World::with_path();
    let mut other = |server: u8, millis| {
        let endpoint = RelayEndpoint { server: disco(server), ..world.endpoint(u32::from(server), 1) };
        world.client.via(world.now, node(PEER), disco(PEER), endpoint);
        let (place, bind) = binds(&world.take()).remove(0);
        assert!(world.client.challenge(world.now, disco(server), place.server, &bind));
        let tx = *pings(&world.take()).last().unwrap();
        world.now += Duration::from_millis(millis);
        assert!(world.client.pong(world.now, node(PEER), place, tx));
        world.client.status(&node(PEER)).unwrap().place.vni.get()
    };
    assert_eq!(other(4, 27), 1);
    assert_eq!(other(5, 10), 5);
}

#[test]
fn a_change_of_network_binds_the_same_allocation_again() {
    let mut world = World::with_path();
    world.traffic(false);
    world.client.rebind(world.now);
    assert_eq!(world.take(), [Output::Doubt { peer: node(PEER), doubted: true }], "and the path stays");
    world.client.handle_timeout(world.now);
    world.drain();
    assert_eq!((pings(&world.seen).len(), requests(&world.seen)), (1, 0));
    let bound: Vec<_> = binds(&world.seen).iter().map(|(place, bind)| (place.server, bind.vni.get())).collect();
    assert_eq!(bound, world.endpoint(1, 1).endpoints.iter().map(|server| (*server, 1)).collect::<Vec<_>>());
    world.bind_and_prove(1);
    assert_eq!(world.take(), [Output::Doubt { peer: node(PEER), doubted: false }]);
    assert!(!world.client.expects(&disco(SERVER)), "the handshake is over");
}

#[test]
fn a_path_that_answers_all_the_same_is_not_bound_again() {
    let mut world = World::with_path();
    let before = pings(&{
        world.run(Duration::from_secs(4), Some(false));
        world.take()
    });
    world.client.rebind(world.now);
    world.client.handle_timeout(world.now);
    let outputs = world.take();
    assert!(
        !world.client.pong(world.now, node(PEER), World::place(1), *before.last().unwrap()),
        "an answer from before"
    );
    world.pong(1, &outputs);
    assert_eq!(world.take(), [Output::Doubt { peer: node(PEER), doubted: false }]);
    world.run(Duration::from_secs(1), Some(false));
    assert_eq!(binds(&world.take()), []);
}

#[test]
fn a_handshake_under_way_starts_over_from_another_network() {
    let mut world = World::new();
    world.traffic(false);
    world.client.via(world.now, node(PEER), disco(PEER), world.endpoint(1, 1));
    let (_, first) = binds(&world.take()).remove(0);
    let challenge = Binding { challenge: [9; 32], ..first.clone() };
    assert!(world.client.challenge(world.now, disco(SERVER), server_address(), &challenge));
    world.take();
    world.client.rebind(world.now);
    world.client.handle_timeout(world.now);
    world.drain();
    assert!(binds(&world.seen).iter().all(|(_, bind)| bind.generation != first.generation));
    world.bind_and_prove(1);
    assert!(world.client.status(&node(PEER)).is_some());
}

#[test]
fn of_a_thousand_paths_those_with_the_latest_traffic_are_bound_again_first_and_not_all_at_once() {
    let mut world = World::new();
    let key = |number: u16| {
        let mut key = [7; 32];
        key[..2].copy_from_slice(&number.to_be_bytes());
        (NodePublic::from_bytes(key), DiscoPublic::from_bytes(key))
    };
    let mut now = world.now;
    for number in 0..1000_u16 {
        let (peer, theirs) = key(number);
        now += Duration::from_millis(1);
        world.client.traffic(now, peer, theirs, false);
        let endpoint = RelayEndpoint { clients: [theirs, disco(ME)], ..world.endpoint(1 + u32::from(number), 1) };
        world.client.via(now, peer, theirs, endpoint);
    }
    world.now = now;
    world.take();
    world.client.rebind(now);
    let mut count = |after| {
        world.client.handle_timeout(now + Duration::from_millis(after));
        let outputs = world.take();
        let newest = binds(&outputs).iter().map(|(place, _)| place.vni.get()).max();
        (binds(&outputs).len() / 2, newest)
    };
    let (at_once, newest) = count(0);
    assert!((64..=65).contains(&at_once) && newest == Some(1000), "{at_once} at once, {newest:?}");
    let (next, newest) = count(100);
    assert!((49..=51).contains(&next) && newest < Some(1000), "{next} in the next 100 ms, {newest:?}");
}

#[test]
fn a_ping_without_an_answer_makes_a_path_doubtful() {
    let mut world = World::with_path();
    world.run(Duration::from_secs(4), Some(false));
    let outputs = world.take();
    assert!(outputs.contains(&Output::Doubt { peer: node(PEER), doubted: true }), "{outputs:?}");
    world.pong(1, &outputs);
    assert_eq!(world.take(), [Output::Doubt { peer: node(PEER), doubted: false }]);
}

#[test]
fn a_server_asks_itself_without_a_detour() {
    let mut world = World::new();
    world.client.set_servers(BTreeSet::from([node(ME)]));
    world.run(Duration::from_secs(1), Some(false));
    let outputs = world.take();
    let [Output::Allocate(request)] = &outputs[..] else { panic!("{outputs:?}") };
    let response = AllocateResponse { generation: request.generation, endpoint: world.endpoint(1, 1) };
    world.client.allocated(world.now, response);
    assert_eq!(binds(&world.take()).len(), 2);
}

#[test]
fn a_peer_with_another_disco_key_is_another_peer() {
    let mut world = World::with_path();
    world.client.traffic(world.now, node(PEER), disco(9), false);
    assert_eq!(world.take(), [Output::Path { peer: node(PEER), place: None }]);
}

#[test]
fn a_peer_cannot_make_us_send_without_end() {
    let mut world = World::new();
    for lamport in 1..10_000 {
        world.client.via(world.now, node(PEER), disco(PEER), world.endpoint(1, lamport));
    }
    let sent = binds(&world.take()).len();
    assert!(sent <= 2 * 128, "{sent} binds");
}

proptest::proptest! {
    #[test]
    fn no_order_of_events_leaves_a_deadline_due(steps in proptest::collection::vec((0u8..9, 0u64..8000), 0..200)) {
        let mut world = World::new();
        let mut sent = Vec::new();
        for (step, millis) in steps {
            world.now += Duration::from_millis(millis);
            match step {
                0 => world.traffic(false),
                1 => world.traffic(true),
                2 => world.client.via(world.now, node(PEER), disco(PEER), world.endpoint(1 + (millis % 3) as u32, millis)),
                3 => world.client.pinged(world.now, node(PEER), World::place(1)),
                4 => {
                    if let Some((place, bind)) = binds(&sent).last() {
                        let _ = world.client.challenge(world.now, disco(SERVER), place.server, bind);
                    }
                }
                5 => {
                    for output in sent.iter().rev().take(3) {
                        if let Output::Ping { peer, place, tx } = output {
                            let _ = world.client.pong(world.now, *peer, *place, *tx);
                        }
                    }
                }
                6 => {
                    let asked = sent.iter().rev().find_map(|output| {
                        let Output::Signal { message: Message::AllocateRequest(request), .. } = output else {
                            return None;
                        };
                        Some(request.generation)
                    });
                    if let Some(generation) = asked {
                        let endpoint = world.endpoint(2, millis);
                        world.client.response(world.now, node(SERVER), AllocateResponse { generation, endpoint });
                    }
                }
                7 => world.client.rebind(world.now),
                _ => world.client.remove_peer(&node(PEER)),
            }
            world.client.handle_timeout(world.now);
            proptest::prop_assert!(world.client.poll_timeout().is_none_or(|due| due > world.now));
            sent.extend(world.take());
            if let Some(status) = world.client.status(&node(PEER)) {
                // Only what a pong has proven is ever named.
                proptest::prop_assert!(status.latency <= Duration::from_secs(45));
            }
        }
    }
}
