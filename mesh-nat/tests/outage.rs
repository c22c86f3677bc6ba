//! What happens to data when paths die, appear, or lose some of what they carry. Peers and relays are 40 ms away, there
//! and back.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that cannot go on fails, and prints its figures")]

use std::time::Duration;

use mesh_nat::agent::Event;
use mesh_nat::sim::{HostId, Link, NatConfig, StreamId, World};
use mesh_nat::{Family, Path};

/// Between two packets of data.
const EVERY: Duration = Duration::from_millis(20);
/// After this long, data that has not arrived is lost.
const SETTLE: Duration = Duration::from_millis(500);

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn both_direct(world: &World, a: HostId, b: HostId) -> bool {
    world.is_direct(a, b) && world.is_direct(b, a)
}

struct Pair {
    world: World,
    a: HostId,
    b: HostId,
    /// From a to b, and if b answers, back.
    streams: Vec<StreamId>,
}

impl Pair {
    fn new(seed: u64, loss: f64, answered: bool) -> Self {
        let mut world = World::seeded(seed);
        let (a, b) = (world.node_behind(NatConfig::easy()), world.node_behind(NatConfig::easy()));
        world.introduce(a, b);
        let internet = world.internet();
        world.set_link(internet, Link { loss, ..Link::with_delay(millis(20)) });
        let stream = if answered { world.converse(a, b, EVERY) } else { world.send_data(a, b, EVERY) };
        let streams = std::iter::once(stream).chain(world.stream(stream).answers()).collect();
        Self { world, a, b, streams }
    }

    /// A pair that has been direct for a while.
    fn settled(seed: u64, answered: bool) -> Self {
        let mut pair = Self::new(seed, 0.0, answered);
        pair.until_direct(secs(5)).expect("a direct path");
        pair.world.run_for(secs(20) + millis(seed * 137));
        pair
    }

    fn until_direct(&mut self, limit: Duration) -> Option<Duration> {
        let (a, b) = (self.a, self.b);
        self.world.run_until(limit, |world| both_direct(world, a, b))
    }

    /// Lets `change` happen, and `span` pass. Returns the longest time of which the data sent never arrived.
    fn outage(&mut self, change: impl FnOnce(&mut World), span: Duration) -> Duration {
        let since = self.world.now();
        change(&mut self.world);
        self.world.run_for(span);
        let outage = |id: &StreamId| self.world.stream(*id).outage(since, self.world.now(), SETTLE);
        self.streams.iter().map(outage).max().unwrap()
    }

    /// Packets that came by the relay so far, alone or as well.
    fn relayed(&self) -> u64 {
        self.streams.iter().map(|id| self.world.stream(*id).relayed()).sum()
    }
}

fn print(what: &str, mut outages: Vec<Duration>) -> Duration {
    outages.sort_unstable();
    let (median, worst) = (outages[outages.len() / 2], outages[outages.len() - 1]);
    println!("{what}: data lost for {median:?} (median), {worst:?} (worst of {})", outages.len());
    worst
}

#[test]
fn data_is_lost_for_less_than_a_second_when_the_direct_path_dies() {
    let run = |seed, answered| {
        let mut pair = Pair::settled(seed, answered);
        let (a, b) = (pair.a, pair.b);
        let outage = pair.outage(|world| world.cut(a, b, true), secs(15));
        assert!(!pair.world.is_direct(a, b), "seed {seed}: given up");
        outage
    };
    let worst = print("path dies, data both ways", (0..20).map(|seed| run(seed, true)).collect());
    assert!(worst <= millis(600), "{worst:?}");
    let worst = print("path dies, data one way", (0..20).map(|seed| run(seed, false)).collect());
    assert!(worst <= secs(1), "{worst:?}");
}

#[test]
fn a_path_that_dies_in_one_direction_is_left_at_both_ends() {
    let outages = (0..20).map(|seed| {
        let mut pair = Pair::settled(seed, true);
        let (from, to) = if seed % 2 == 0 { (pair.a, pair.b) } else { (pair.b, pair.a) };
        pair.outage(|world| world.cut_one_way(from, to, true), secs(10))
    });
    let worst = print("path dies in one direction", outages.collect());
    assert!(worst <= secs(1), "{worst:?}");
}

#[test]
fn nothing_is_sent_twice_while_the_path_is_sound() {
    for answered in [true, false] {
        let mut pair = Pair::settled(1, answered);
        let (relayed, before) = (pair.relayed(), pair.world.sent(pair.a));
        pair.world.run_for(secs(60));
        assert_eq!(pair.relayed(), relayed);
        // Silence is asked about where a flow goes one way, less than twice a second.
        let sent = pair.world.sent(pair.a).udp - before.udp;
        assert!(sent <= if answered { 46 } else { 160 }, "{sent}");
    }
}

#[test]
fn loss_of_a_fiftieth_costs_few_copies_and_no_path() {
    let (mut sent, mut copies) = (0, 0);
    for seed in 0..10 {
        let mut pair = Pair::settled(seed, true);
        let (internet, relayed, events) = (pair.world.internet(), pair.relayed(), pair.world.events(pair.a).len());
        pair.world.set_link(internet, Link { loss: 0.02, ..Link::with_delay(millis(20)) });
        pair.world.run_for(secs(60));
        copies += pair.relayed() - relayed;
        sent += 6000;
        let moved = pair.world.events(pair.a)[events..].iter();
        let moved = moved.filter(|(_, event)| matches!(event, Event::PathChanged { .. })).count();
        assert_eq!(moved, 0, "seed {seed}: the path was given up");
    }
    println!("2 % loss: {copies} of {sent} packets went by the relay as well");
    assert!(copies * 100 <= sent, "{copies} of {sent}");
}

#[test]
fn the_path_comes_back_when_it_works_again() {
    let mut pair = Pair::settled(3, true);
    let (a, b) = (pair.a, pair.b);
    pair.world.cut(a, b, true);
    pair.world.run_for(secs(5));
    pair.world.cut(a, b, false);
    let took = pair.until_direct(secs(10)).expect("a direct path");
    assert!(took < secs(6), "{took:?}");
    pair.world.run_for(secs(1));
    let relayed = pair.relayed();
    pair.world.run_for(secs(10));
    assert_eq!(pair.relayed(), relayed, "the relay is left");
}

#[test]
fn a_change_of_network_interrupts_data_for_less_than_half_a_second() {
    let outages = (0..20).map(|seed| {
        let mut pair = Pair::settled(seed, true);
        let a = pair.a;
        let change = |world: &mut World| {
            let gateway = world.gateway_above(a).unwrap();
            world.reboot(gateway);
            world.link_changed(a);
        };
        let outage = pair.outage(change, secs(8));
        assert!(both_direct(&pair.world, pair.a, pair.b), "seed {seed}");
        let relayed = pair.relayed();
        pair.world.run_for(secs(5));
        assert_eq!(pair.relayed(), relayed, "seed {seed}: the relay is left");
        outage
    });
    let worst = print("network changes", outages.collect());
    assert!(worst <= millis(500), "{worst:?}");
}

#[test]
fn a_common_network_is_used_within_a_second_of_joining_it() {
    let mut took: Vec<_> = (0..20)
        .map(|seed| {
            let mut pair = Pair::settled(seed, true);
            let (a, b) = (pair.a, pair.b);
            let network = pair.world.network_of(b).unwrap();
            let [here, there] = [pair.world.add_address(a, network, Family::V4), pair.world.addresses(b)[0]];
            pair.world.link_changed(a);
            let uses = |world: &World, from, to, address| {
                matches!(world.path(from, to), Some(Path::Direct { remote, .. }) if remote.ip() == address)
            };
            let both = |world: &World| uses(world, a, b, there) && uses(world, b, a, here);
            pair.world.run_until(secs(5), both).unwrap_or_else(|| panic!("seed {seed}: never"))
        })
        .collect();
    took.sort_unstable();
    println!("a common network: used by both after {:?} (median), {:?} (worst of 20)", took[10], took[19]);
    assert!(took[19] <= secs(1), "{took:?}");
}

#[test]
fn loss_of_a_fiftieth_delays_the_direct_path_by_less_than_a_second() {
    let mut took: Vec<_> =
        (0..1000).map(|seed| Pair::new(seed, 0.02, true).until_direct(secs(20)).unwrap_or(secs(20))).collect();
    took.sort_unstable();
    let (median, late, last) = (took[500], took[990], took[999]);
    println!("both direct under 2 % loss: {median:?} (median), {late:?} (99 of 100), {last:?} (last of 1,000)");
    assert!(median <= millis(120) && late <= secs(1), "{median:?} {late:?}");
}
