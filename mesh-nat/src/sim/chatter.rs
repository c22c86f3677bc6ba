//! Others behind the same NAT, who move its counters on and use its ports.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::RngExt;

use super::host::HostId;
use super::program::{Io, Program};
use super::route::NetworkId;
use super::world::World;
use crate::path::{Family, SocketId};

/// Sends from a new socket to a new destination again and again, as a household's browsers do. Nobody answers.
#[derive(Debug)]
pub struct Chatter {
    every: Duration,
    next: Option<Instant>,
    sockets: u64,
}

impl Chatter {
    /// One flow per `every` on average, at random times.
    #[must_use]
    pub const fn new(every: Duration) -> Self {
        Self { every, next: None, sockets: 0 }
    }

    /// Flows opened so far.
    #[must_use]
    pub const fn flows(&self) -> u64 {
        self.sockets
    }
}

impl Program for Chatter {
    fn handle_datagram(&mut self, _: &mut Io<'_>, _: SocketId, _: SocketAddr, _: &[u8]) -> bool {
        true
    }

    fn handle_timeout(&mut self, io: &mut Io<'_>) {
        if self.next.is_some() {
            self.sockets += 1;
            let socket = io.open(Family::V4, 0);
            let to = SocketAddr::from(([203, 0, 113, io.rng.random()], io.rng.random_range(1..=u16::MAX)));
            io.send(socket, to, b"chatter".to_vec());
            io.close(socket);
        }
        // Waits between events that come at random are distributed like this.
        let share: f64 = io.rng.random_range(f64::EPSILON..1.0);
        self.next = Some(io.now + self.every.mul_f64(-share.ln()) + Duration::from_nanos(1));
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.next
    }
}

impl World {
    /// Adds a host that opens a flow per `every` on average.
    pub fn add_chatter(&mut self, network: NetworkId, every: Duration) -> HostId {
        let host = self.add_host(network, &[Family::V4]);
        self.add_program(host, Chatter::new(every));
        host
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::NatConfig;

    #[test]
    fn chatter_opens_flows_at_its_rate() {
        let mut world = World::seeded(1);
        let network = world.network_behind(world.internet(), NatConfig::hard());
        let host = world.add_chatter(network, Duration::from_millis(100));
        world.run_for(Duration::from_secs(20));
        let opened = world.nat(world.gateway_of(network).unwrap()).unwrap().counters().opened;
        assert_eq!(world.program::<Chatter>(host).unwrap().flows(), opened);
        assert!((150..250).contains(&opened), "{opened}");
    }
}
