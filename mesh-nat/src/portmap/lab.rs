//! Port mappings in the [laboratory](crate::sim): a gateway that gives them, and a program that asks for one.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use super::gateway::{Config as GatewayConfig, Gateway, Quirks};
use super::{Config, Event, ExchangeId, Mapper, Network, Protocol, Status, Transmit, http};
use crate::path::{Family, SocketId};
use crate::sim::{Io, Program, RequestId, Router, Service};

/// How many ports that the NAT has given to others are avoided in one request.
const MAX_CONFLICTS: usize = 8;

/// A [`Gateway`] inside a laboratory's gateway: what it maps, the NAT forwards.
#[derive(Debug)]
pub struct MapsPorts {
    speaks: Vec<Protocol>,
    quirks: Quirks,
    gateway: Option<Gateway>,
    forwarded: BTreeMap<u16, SocketAddr>,
}

impl MapsPorts {
    /// A gateway that speaks these protocols.
    #[must_use]
    pub fn speaking(protocols: &[Protocol], quirks: Quirks) -> Self {
        Self { speaks: protocols.to_vec(), quirks, gateway: None, forwarded: BTreeMap::new() }
    }

    /// Calls the gateway, and again without the port if the NAT has it in use for another flow.
    fn call<T>(&mut self, now: Instant, router: &mut Router<'_>, call: impl Fn(&mut Gateway) -> T) -> Option<T> {
        let IpAddr::V4(outside) = router.outside? else { return None };
        let nat = router.nat.as_deref_mut()?;
        let gateway = self.gateway.get_or_insert_with(|| {
            let mut config = GatewayConfig::new(router.inside, outside).speaking(&self.speaks);
            config.quirks = self.quirks.clone();
            Gateway::new(now, config)
        });
        for _ in 0..MAX_CONFLICTS {
            let answer = call(gateway);
            let wanted: Vec<_> = gateway.forwards(now).collect();
            let forwards = |port: u16, inside| wanted.iter().any(|(held, to, _)| (*held, *to) == (port, inside));
            self.forwarded.retain(|port, inside| {
                let kept = forwards(*port, *inside);
                if !kept {
                    nat.unforward(*port);
                }
                kept
            });
            let mut conflict = None;
            for (port, inside, left) in wanted {
                if nat.forward(now, port, inside, left) {
                    self.forwarded.insert(port, inside);
                } else {
                    conflict = Some(port);
                }
            }
            let Some(port) = conflict else { return Some(answer) };
            gateway.take_away(port);
        }
        None
    }
}

impl Service for MapsPorts {
    fn handle_datagram(
        &mut self,
        now: Instant,
        router: &mut Router<'_>,
        from: SocketAddr,
        to: SocketAddr,
        datagram: &[u8],
    ) -> Vec<(u16, SocketAddr, Vec<u8>)> {
        let answers = self.call(now, router, |gateway| gateway.handle_datagram(now, from, to.port(), datagram));
        answers.unwrap_or_default().into_iter().map(|answer| (to.port(), from, answer)).collect()
    }

    fn handle_request(
        &mut self,
        now: Instant,
        router: &mut Router<'_>,
        from: IpAddr,
        to: SocketAddr,
        request: &[u8],
    ) -> Option<Vec<u8>> {
        if to.port() != super::gateway::HTTP_PORT {
            return None;
        }
        self.call(now, router, |gateway| gateway.handle_http(now, from, request))?
    }
}

/// A [`Mapper`] on a host of the laboratory.
#[derive(Debug)]
pub struct MapperProgram {
    mapper: Mapper,
    port: u16,
    socket: Option<SocketId>,
    requests: BTreeMap<RequestId, ExchangeId>,
    changes: Vec<Status>,
    closed: bool,
}

impl MapperProgram {
    /// A program that wants `port` to be reachable from outside.
    #[must_use]
    pub fn new(port: u16, seed: [u8; 32]) -> Self {
        Self {
            mapper: Mapper::new(Config::default(), seed),
            port,
            socket: None,
            requests: BTreeMap::new(),
            changes: Vec::new(),
            closed: false,
        }
    }

    /// What it knows.
    #[must_use]
    pub fn status(&self) -> Status {
        self.mapper.status()
    }

    /// Everything that it has told so far.
    #[must_use]
    pub fn changes(&self) -> &[Status] {
        &self.changes
    }

    /// Gives the mapping back.
    pub fn close(&mut self, io: &mut Io<'_>) {
        self.closed = true;
        self.mapper.close(io.now);
        self.drain(io);
    }

    fn drain(&mut self, io: &mut Io<'_>) {
        let Some(socket) = self.socket else { return };
        while let Some(transmit) = self.mapper.poll_transmit() {
            match transmit {
                Transmit::Datagram { remote, datagram } => io.send(socket, remote, datagram),
                Transmit::Http { id, remote, request } => {
                    self.requests.insert(io.request(remote, request), id);
                }
            }
        }
        while let Some(event) = self.mapper.poll_event() {
            if let Event::Changed(status) = event {
                self.changes.push(status);
            }
        }
    }
}

impl Program for MapperProgram {
    fn handle_datagram(&mut self, io: &mut Io<'_>, socket: SocketId, from: SocketAddr, datagram: &[u8]) -> bool {
        let ours = self.socket == Some(socket);
        if ours {
            // What the mapper refuses is not for anybody else either.
            let _ = self.mapper.handle_datagram(io.now, from, datagram);
            self.drain(io);
        }
        ours
    }

    fn handle_reply(&mut self, io: &mut Io<'_>, id: RequestId, reply: Option<&[u8]>) {
        let Some(exchange) = self.requests.remove(&id) else { return };
        let response = reply.and_then(|bytes| http::response(bytes, true).ok().flatten());
        self.mapper.handle_http(io.now, exchange, response.as_ref());
        self.drain(io);
    }

    fn handle_timeout(&mut self, io: &mut Io<'_>) {
        if self.socket.is_none() {
            self.socket = Some(io.open(Family::V4, 0));
        }
        let client = io.addresses().iter().find(|address| address.is_ipv4()).copied();
        let gateway = io.gateway().filter(IpAddr::is_ipv4);
        let network = gateway.zip(client).map(|(gateway, client)| Network { gateway, scope: 0, client });
        self.mapper.set_network(io.now, network);
        self.mapper.set_port(io.now, Some(self.port).filter(|_| !self.closed));
        self.mapper.handle_timeout(io.now);
        self.drain(io);
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.mapper.poll_timeout()
    }
}
