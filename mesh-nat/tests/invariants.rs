//! What holds in every world, whatever happens in it.
//!
//! That deadlines move on is not tested here by name: a world asserts it each time that it calls a core.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh_nat::agent::Source;
use mesh_nat::disco::message::{CallMeMaybe, Message};
use mesh_nat::disco::seal;
use mesh_nat::sim::scenario::nats;
use mesh_nat::sim::{GatewayConfig, HostId, Link, NatConfig, World};
use mesh_nat::{Family, Path};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// While data goes along it, a pong proves a path for 6.5 s, and was on its way for a while itself.
const PROVEN: Duration = Duration::from_secs(8);
/// The same for a silent path, which may be silent for 24 s.
const PROVEN_SILENT: Duration = Duration::from_secs(29);

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Something that happens.
#[derive(Debug, Clone)]
enum Step {
    Talk(bool),
    Silence,
    Wait(u64),
    Roam(usize),
    Sleep(u64),
    Reboot(bool),
    Block(bool),
    Cut(bool),
    Loss(f64),
    Jitter(u64),
    /// A peer that lies: it lists addresses that are not its own.
    Lie(u16),
    NewAddress,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<bool>().prop_map(Step::Talk),
        Just(Step::Silence),
        (1..20_000u64).prop_map(Step::Wait),
        (0..36usize).prop_map(Step::Roam),
        (1..100_000u64).prop_map(Step::Sleep),
        any::<bool>().prop_map(Step::Reboot),
        any::<bool>().prop_map(Step::Block),
        any::<bool>().prop_map(Step::Cut),
        (0.0..0.4).prop_map(Step::Loss),
        (0..300u64).prop_map(Step::Jitter),
        (1..1000u16).prop_map(Step::Lie),
        Just(Step::NewAddress),
    ]
}

struct Story {
    world: World,
    hosts: [HostId; 3],
    /// Who has been sending data to whom, and since when.
    talking: BTreeMap<(HostId, HostId), Instant>,
}

impl Story {
    /// Two nodes that talk, and a third one that both know.
    fn new(seed: u64, nats: [NatConfig; 2], ipv6: bool) -> Self {
        let mut world = World::seeded(seed);
        let gateway = |nat: NatConfig| if ipv6 { GatewayConfig::from(nat).and_ipv6() } else { nat.into() };
        let (a, b) = (world.node_behind(gateway(nats[0])), world.node_behind(gateway(nats[1])));
        let internet = world.internet();
        let c = world.node_in(internet);
        for (one, other) in [(a, b), (a, c), (b, c)] {
            world.introduce(one, other);
        }
        Self { world, hosts: [a, b, c], talking: BTreeMap::new() }
    }

    fn happen(&mut self, step: &Step) {
        let ([a, b, c], world) = (self.hosts, &mut self.world);
        let internet = world.internet();
        match *step {
            Step::Talk(answered) => {
                let every = Duration::from_millis(100);
                if answered {
                    world.converse(a, b, every);
                } else {
                    world.send_data(b, a, every);
                }
                world.send_data(a, c, every);
                for pair in [if answered { (a, b) } else { (b, a) }, (a, c)] {
                    self.talking.entry(pair).or_insert(world.now());
                }
            }
            Step::Silence => {
                world.stop_all_data();
                self.talking.clear();
            }
            Step::Wait(millis) => self.wait(Duration::from_millis(millis)),
            Step::Roam(nat) => {
                let network = world.network_behind(internet, nats()[nat]);
                world.roam(a, network);
            }
            Step::Sleep(millis) => {
                world.sleep(b);
                self.wait(Duration::from_millis(millis));
                self.world.wake(b);
                let now = self.world.now();
                self.talking.iter_mut().filter(|((from, _), _)| *from == b).for_each(|(_, since)| *since = now);
            }
            Step::Reboot(first) => {
                let gateway = world.gateway_above(if first { a } else { b }).unwrap();
                world.reboot(gateway);
            }
            Step::Block(blocked) => world.block_host_udp(a, blocked),
            Step::Cut(cut) => world.cut(a, b, cut),
            Step::Loss(loss) => world.set_link(internet, Link { loss, ..world.link(internet) }),
            Step::Jitter(millis) => {
                let jitter = Duration::from_millis(millis);
                world.set_link(internet, Link { jitter, ..world.link(internet) });
            }
            Step::Lie(port) => {
                let endpoints = (port..port + 20).map(|port| ([198, 51, 100, 77], port).into()).collect();
                let mut plaintext = Vec::new();
                Message::CallMeMaybe(CallMeMaybe { endpoints }).encode(&mut plaintext);
                let shared = world.disco(b).box_with(&world.disco(a).public());
                let mut rng = StdRng::seed_from_u64(u64::from(port));
                let datagram = seal::seal(&world.disco(b).public(), &shared, &mut rng, &plaintext);
                let source = Source::relay(world.home(), world.key(b));
                let _ = world.inject(a, source, &datagram);
            }
            Step::NewAddress => {
                let network = world.network_of(a).unwrap();
                world.add_address(b, network, Family::V4);
                world.link_changed(b);
            }
        }
        self.look();
    }

    /// Lets time pass in small steps, and looks after each.
    fn wait(&mut self, span: Duration) {
        let end = self.world.now() + span;
        while self.world.now() < end {
            self.world.run_for(Duration::from_millis(100).min(end - self.world.now()));
            self.look();
        }
    }

    /// A direct path leads to where a datagram of ours has arrived lately.
    fn look(&self) {
        for (from, to) in self.hosts.iter().flat_map(|a| self.hosts.iter().map(move |b| (*a, *b))) {
            let Some(path) = self.world.path(from, to).filter(Path::is_direct) else { continue };
            let proven = self.world.reached(from, to, path);
            let age = proven.map(|at| self.world.now() - at);
            let asleep = self.world.is_asleep(from) || self.world.is_asleep(to);
            // Data that goes again along a path that has died shows it within a few seconds.
            let talking = self.talking.get(&(from, to)).is_some_and(|since| self.world.now() - *since >= PROVEN);
            let limit = if talking { PROVEN } else { PROVEN_SILENT };
            assert!(asleep || age.is_some_and(|age| age <= limit), "{path} was proven {age:?} ago");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_address_that_no_answer_has_proven_is_never_chosen(
        seed in any::<u64>(), a in 0..36usize, b in 0..36usize, ipv6 in any::<bool>(),
        steps in proptest::collection::vec(step(), 1..25),
    ) {
        let mut story = Story::new(seed, [nats()[a], nats()[b]], ipv6);
        story.happen(&Step::Talk(true));
        for step in &steps {
            story.happen(step);
        }
        story.wait(secs(10));
    }

    #[test]
    fn one_seed_makes_one_run(
        seed in any::<u64>(), a in 0..36usize, b in 0..36usize, steps in proptest::collection::vec(step(), 1..10),
    ) {
        let run = || {
            let mut story = Story::new(seed, [nats()[a], nats()[b]], false);
            story.happen(&Step::Talk(true));
            steps.iter().for_each(|step| story.happen(step));
            (story.world.fingerprint(), story.hosts.map(|host| story.world.sent(host)))
        };
        prop_assert_eq!(run(), run());
    }
}

/// A node with many peers, all of them open, to each of whom it says something every two seconds.
fn crowd(peers: usize) -> (World, HostId, Vec<HostId>) {
    let mut world = World::seeded(1);
    let internet = world.internet();
    let hub = world.node_behind(NatConfig::easy());
    let others: Vec<_> = (0..peers).map(|_| world.node_in(internet)).collect();
    for other in &others {
        world.introduce(hub, *other);
        world.send_data(hub, *other, secs(2));
    }
    (world, hub, others)
}

#[test]
fn a_thousand_active_peers_are_pinged_every_three_seconds_and_no_more() {
    let (mut world, hub, others) = crowd(1000);
    world.run_for(secs(20));
    assert!(others.iter().all(|other| world.is_direct(hub, *other)));
    let before = world.sent(hub);
    world.run_for(secs(60));
    let sent = world.sent(hub).udp - before.udp;
    // A ping and a pong for each peer every three seconds; and once a minute a search for something better.
    let fair = 1000 * (20 * 2 + 4);
    assert!(sent <= fair, "{sent} datagrams to 1,000 peers in a minute");
    assert!(world.sent(hub).relay - before.relay <= 2 * 1000);
}

#[test]
fn a_thousand_peers_at_rest_cost_nothing() {
    let (mut world, hub, _) = crowd(1000);
    world.run_for(secs(10));
    world.stop_all_data();
    world.run_for(secs(60));
    let before = world.sent(hub);
    world.run_for(secs(60));
    assert_eq!(world.sent(hub), before);
}
