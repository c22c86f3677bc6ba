//! How seldom a path is pinged that carries nothing, and that it is there all the same when data goes again. Peers and
//! relays are 40 ms away, there and back.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test that cannot go on fails, and prints its figures")]

use std::time::Duration;

use mesh_nat::Path;
use mesh_nat::agent::Event;
use mesh_nat::sim::{HostId, NatConfig, StreamId, World};

/// Between two packets of an idle session: nearly as long as a peer counts as active.
const PAUSE: Duration = Duration::from_secs(40);
/// Until everything has been learnt.
const LEARNT: Duration = Duration::from_secs(240);
const HOUR: Duration = Duration::from_secs(3600);

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A NAT that maps per destination at random: a mapping that expires comes back with another port, which nobody misses.
fn telltale(seconds: u64) -> NatConfig {
    NatConfig { timeout: secs(seconds), ..NatConfig::hard() }
}

/// What most homes have.
fn easy(seconds: u64) -> NatConfig {
    NatConfig { timeout: secs(seconds), ..NatConfig::easy() }
}

/// Two nodes that say something every [`PAUSE`].
struct Session {
    world: World,
    hosts: [HostId; 2],
    streams: [StreamId; 2],
}

impl Session {
    /// One behind each NAT; `None` is no NAT.
    fn new(seed: u64, nats: [Option<NatConfig>; 2], stock: [bool; 2]) -> Self {
        let mut world = World::seeded(seed);
        let hosts = [0, 1].map(|index| {
            let host = match nats[index] {
                Some(nat) => world.node_behind(nat),
                None => world.node_in(world.internet()),
            };
            if stock[index] {
                world.make_stock(host);
            }
            host
        });
        world.introduce(hosts[0], hosts[1]);
        let stream = world.converse(hosts[0], hosts[1], PAUSE);
        let streams = [stream, world.stream(stream).answers().unwrap()];
        Self { world, hosts, streams }
    }

    fn ours(seed: u64, nats: [Option<NatConfig>; 2]) -> Self {
        Self::new(seed, nats, [false; 2])
    }

    /// Datagrams of both agents during `span`.
    fn sent_in(&mut self, span: Duration) -> u64 {
        let sent = |world: &World, hosts: [HostId; 2]| hosts.map(|host| world.sent(host).udp).iter().sum::<u64>();
        let before = sent(&self.world, self.hosts);
        self.world.run_for(span);
        sent(&self.world, self.hosts) - before
    }

    /// Where the paths of both have gone since `since`, that moment's not included.
    fn moves(&self, since: Duration) -> Vec<Option<Path>> {
        let events = self.hosts.iter().flat_map(|host| self.world.events(*host)).filter(|(at, _)| *at > since);
        let path = |event: &Event| if let Event::PathChanged { path, .. } = event { Some(*path) } else { None };
        events.filter_map(|(_, event)| path(event)).collect()
    }

    /// Packets that never arrived.
    fn lost(&mut self) -> usize {
        self.world.run_for(secs(1));
        self.streams.map(|id| self.world.stream(id)).iter().map(|stream| stream.sent() - stream.arrived()).sum()
    }
}

#[test]
fn mappings_of_thirty_seconds_never_expire_with_a_quarter_of_the_heartbeats() {
    for (what, nats) in [
        ("a random port for each destination, and open", [Some(telltale(30)), None]),
        ("easy NATs", [Some(easy(30)), Some(easy(30))]),
    ] {
        for seed in 0..5 {
            let mut stock = Session::new(seed, nats, [true; 2]);
            let mut ours = Session::ours(seed, nats);
            stock.world.run_for(LEARNT);
            ours.world.run_for(LEARNT);
            let (usual, sent) = (stock.sent_in(HOUR), ours.sent_in(HOUR));
            assert_eq!(ours.moves(LEARNT), [], "{what}, seed {seed}: a mapping was lost");
            assert_eq!(ours.lost(), 0, "{what}, seed {seed}");
            if seed == 0 {
                println!("{what}: {sent} datagrams an hour, {usual} with a heartbeat every 3 s");
            }
            assert!(sent * 4 <= usual, "{what}, seed {seed}: {sent} of {usual}");
        }
    }
}

#[test]
fn no_heartbeat_is_sent_more_often_than_before_while_lifetimes_are_learnt() {
    let nats = [Some(easy(30)), Some(easy(30))];
    let [ours, stock] = [[false; 2], [true; 2]].map(|stock| Session::new(1, nats, stock).sent_in(PAUSE));
    println!("{ours} datagrams in the first {PAUSE:?}, {stock} with a heartbeat every 3 s");
    assert!(ours * 3 <= stock * 2, "{ours} of {stock}");
}

#[test]
fn the_path_stays_where_mappings_live_shortly() {
    for lifetime in [5, 10, 15, 20] {
        for (what, nats) in [
            ("a random port for each destination, and open", [Some(telltale(lifetime)), None]),
            ("easy NATs", [Some(easy(lifetime)), Some(easy(lifetime))]),
            ("easy NAT and open", [Some(easy(lifetime)), None]),
        ] {
            for seed in 0..5 {
                let mut pair = Session::ours(seed, nats);
                pair.world.run_for(secs(5));
                let sent = pair.sent_in(HOUR);
                let moves = pair.moves(secs(5));
                assert!(moves.iter().flatten().all(Path::is_direct), "{what}, {lifetime} s, seed {seed}: {moves:?}");
                // Six times an hour a longer silence is tried, and not survived.
                assert!(moves.len() <= 8, "{what}, {lifetime} s, seed {seed}: {moves:?}");
                // Data that goes first after a silence that was too long goes to where the mapping was.
                let lost = pair.lost();
                assert!(lost <= 2, "{what}, {lifetime} s, seed {seed}: {lost} packets lost");
                if seed == 0 {
                    println!("{what}, {lifetime} s: {sent} datagrams an hour, {} other paths", moves.len());
                }
            }
        }
    }
}

#[test]
fn deployed_peers_hear_from_us_every_three_seconds() {
    let nats = [Some(easy(30)), Some(easy(30))];
    for stock in [[true, false], [false, true]] {
        let mut mixed = Session::new(2, nats, stock);
        let mut usual = Session::new(2, nats, [true; 2]);
        mixed.world.run_for(LEARNT);
        usual.world.run_for(LEARNT);
        let (mixed, usual) = (mixed.sent_in(HOUR), usual.sent_in(HOUR));
        assert!(mixed.abs_diff(usual) * 50 <= usual, "{mixed}, {usual}");
    }
}

#[test]
fn data_that_goes_again_along_a_path_that_has_died_is_lost_for_less_than_a_second() {
    let mut outages: Vec<_> = (0..20)
        .map(|seed| {
            let mut pair = Session::ours(seed, [Some(easy(30)), Some(easy(30))]);
            pair.world.run_for(LEARNT + secs(10) + millis(seed * 700));
            let ([a, b], from) = (pair.hosts, pair.world.now());
            assert!(pair.world.is_direct(a, b) && pair.world.is_direct(b, a), "seed {seed}");
            pair.world.cut(a, b, true);
            let stream = pair.world.converse(a, b, millis(20));
            pair.world.run_for(secs(15));
            assert!(!pair.world.is_direct(a, b), "seed {seed}: given up");
            let streams = [stream, pair.world.stream(stream).answers().unwrap()];
            streams.map(|id| pair.world.stream(id).outage(from, pair.world.now(), secs(1))).into_iter().max().unwrap()
        })
        .collect();
    outages.sort_unstable();
    println!("data lost for {:?} (median), {:?} (worst of 20)", outages[10], outages[19]);
    assert!(outages[19] < secs(1), "{outages:?}");
}

#[test]
fn data_that_goes_again_along_a_sound_path_goes_by_no_relay() {
    let mut pair = Session::ours(3, [Some(easy(30)), Some(easy(30))]);
    pair.world.run_for(LEARNT + secs(15));
    let [a, b] = pair.hosts;
    let stream = pair.world.converse(a, b, millis(20));
    pair.world.run_for(secs(30));
    let streams = [stream, pair.world.stream(stream).answers().unwrap()];
    assert_eq!(streams.map(|id| pair.world.stream(id).relayed()), [0; 2]);
}
