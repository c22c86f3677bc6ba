//! What is measured: one run under one seed each.

use std::net::SocketAddr;
use std::time::Duration;

use super::super::host::HostId;
use super::super::link::Link;
use super::super::nat::{NatConfig, NatCounters};
use super::super::world::World;
use crate::path::Path;

/// Between two datagrams of a stream.
const EVERY: Duration = Duration::from_millis(25);

fn pair(seed: u64, a: NatConfig, b: NatConfig) -> (World, HostId, HostId) {
    let mut world = World::seeded(seed);
    let (a, b) = (world.node_behind(a), world.node_behind(b));
    world.introduce(a, b);
    (world, a, b)
}

fn both_direct(world: &World, a: HostId, b: HostId) -> bool {
    world.is_direct(a, b) && world.is_direct(b, a)
}

fn talk(world: &mut World, a: HostId, b: HostId, answered: bool) {
    if answered {
        world.converse(a, b, EVERY);
    } else {
        world.send_data(a, b, EVERY);
    }
}

/// Two nodes behind easy NATs whose data, answered or not, has gone directly for some ten seconds.
fn settled(seed: u64, answered: bool) -> (World, HostId, HostId) {
    let (mut world, a, b) = pair(seed, NatConfig::easy(), NatConfig::easy());
    talk(&mut world, a, b, answered);
    world.run_for(Duration::from_secs(10) + Duration::from_millis(seed * 137 % 5000));
    (world, a, b)
}

/// From the first packet until both directions are direct behind easy NATs, with data that is answered or goes one way,
/// where the internet loses this share of all datagrams and delays as many segments of streams; at most a minute.
#[must_use]
pub fn to_direct(seed: u64, answered: bool, loss: f64) -> Option<Duration> {
    let (mut world, a, b) = pair(seed, NatConfig::easy(), NatConfig::easy());
    let internet = world.internet();
    world.set_link(internet, Link { loss, ..world.link(internet) });
    talk(&mut world, a, b, answered);
    world.run_until(Duration::from_secs(60), |world| both_direct(world, a, b))
}

/// For how long data is lost when a direct path in use dies in silence: the longest time during which whatever was sent
/// never arrived, in either direction.
#[must_use]
pub fn outage(seed: u64, answered: bool) -> Duration {
    let (mut world, a, b) = settled(seed, answered);
    let from = world.now();
    world.cut(a, b, true);
    world.run_for(Duration::from_secs(10));
    let streams = if answered { 0..2 } else { 0..1 };
    let outage = |id: usize| world.streams[id].outage(from, world.now(), Duration::from_secs(2));
    streams.map(outage).max().unwrap_or_default()
}

/// From the moment at which the second node joins the first one's network, beside its own, until both use it; at most a
/// minute.
#[must_use]
pub fn better_path(seed: u64) -> Option<Duration> {
    let (mut world, a, b) = settled(seed, true);
    let network = world.network_of(a)?;
    world.set_link(network, Link::with_delay(Duration::from_micros(500)));
    world.add_address(b, network, crate::path::Family::V4);
    world.link_changed(b);
    let here = |world: &World, from, to| match world.path(from, to) {
        Some(Path::Direct { remote: SocketAddr::V4(remote), .. }) => remote.ip().is_private(),
        Some(Path::Direct { .. } | Path::PeerRelay { .. } | Path::Relay { .. }) | None => false,
    };
    world.run_until(Duration::from_secs(60), |world| here(world, a, b) && here(world, b, a))
}

/// What guessing ports took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guessing {
    /// From the first packet until both directions are direct, if that happened in time.
    pub took: Option<Duration>,
    /// What the first node's NAT has done.
    pub first: NatCounters,
    /// What the second node's NAT has done.
    pub second: NatCounters,
    /// Datagrams of the first node's agent.
    pub first_sent: u64,
    /// Datagrams of the second node's agent.
    pub second_sent: u64,
}

/// Two nodes, one of which at least is behind a NAT that maps per destination, until both are direct or `limit` is over.
#[must_use]
pub fn guessing(seed: u64, a: NatConfig, b: NatConfig, limit: Duration) -> Guessing {
    let (mut world, a, b) = pair(seed, a, b);
    world.converse(a, b, EVERY);
    let took = world.run_until(limit, |world| both_direct(world, a, b));
    let nat = |host| world.gateway_above(host).and_then(|gateway| world.nat(gateway)).map(|nat| nat.counters());
    Guessing {
        took,
        first: nat(a).unwrap_or_default(),
        second: nat(b).unwrap_or_default(),
        first_sent: world.sent(a).udp,
        second_sent: world.sent(b).udp,
    }
}
