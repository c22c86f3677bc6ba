//! Giving mappings back. Nothing waits for it, and nothing but the gateway's table depends on it.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::{ExchangeId, Mapper, Protocol, Reject, soap};
use crate::portmap::nat_pmp;
use crate::portmap::pcp::{Map, Nonce};
use crate::portmap::upnp::Action;

/// A deletion is repeated after so long without an answer.
const WAIT: Duration = Duration::from_millis(250);
/// How often it is sent.
const TRIES: u32 = 3;
/// How long a gateway may take over HTTP.
const HTTP_PATIENCE: Duration = Duration::from_secs(2);
/// Port changes in quick succession leave no more than so many.
const MAX: usize = 4;

/// A deletion under way.
#[derive(Debug)]
pub(super) struct Release {
    remote: SocketAddr,
    kind: Kind,
    tries: u32,
    next: Instant,
}

#[derive(Debug)]
enum Kind {
    Pcp { datagram: Vec<u8>, nonce: Nonce, port: u16 },
    NatPmp { datagram: Vec<u8>, port: u16 },
    Upnp { exchange: ExchangeId },
}

impl Release {
    pub(super) const fn next(&self) -> Instant {
        self.next
    }

    pub(super) fn is_for(&self, gateway: IpAddr) -> bool {
        self.remote.ip() == gateway
    }

    pub(super) fn is_exchange(&self, id: ExchangeId) -> bool {
        matches!(self.kind, Kind::Upnp { exchange } if exchange == id)
    }
}

impl Mapper {
    /// Gives the mapping back that we have, or may be about to get.
    pub(super) fn release(&mut self, now: Instant) {
        let (Some(network), Some(port)) = (self.network, self.port) else { return };
        let protocol = match (&self.lease, &self.ask) {
            (Some(lease), _) => lease.protocol,
            (None, Some(super::ask::Ask::Pcp { .. })) => Protocol::Pcp,
            (None, Some(super::ask::Ask::NatPmp { .. })) => Protocol::NatPmp,
            (None, _) => return,
        };
        match protocol {
            Protocol::Pcp => {
                let datagram = self.pcp_map(network, port, 0).encode();
                let kind = Kind::Pcp { datagram, nonce: self.nonce, port };
                self.add_release(now, network.server(), kind);
                // The next mapping is another one.
                self.nonce = Nonce::generate(&mut self.rng);
            }
            Protocol::NatPmp => self.release_nat_pmp(now),
            Protocol::Upnp => {
                let Some(lease) = &self.lease else { return };
                let Some(service) = &lease.service else { return };
                let delete = match lease.pinhole {
                    Some(id) => Action::DeletePinhole { id },
                    None => Action::DeletePortMapping { external_port: lease.external.port() },
                };
                let (remote, request) = soap::call(network, service, &delete);
                let exchange = self.exchange(remote, request);
                self.add_release(now, remote, Kind::Upnp { exchange });
            }
        }
        self.release_step(now);
    }

    pub(super) fn release_nat_pmp(&mut self, now: Instant) {
        let (Some(network), Some(port)) = (self.network, self.port) else { return };
        let datagram = nat_pmp::Request::Map { internal_port: port, external_port: 0, lifetime: 0 }.encode();
        self.add_release(now, network.server(), Kind::NatPmp { datagram, port });
    }

    fn add_release(&mut self, now: Instant, remote: SocketAddr, kind: Kind) {
        if self.releases.len() == MAX {
            self.releases.remove(0);
        }
        self.releases.push(Release { remote, kind, tries: 0, next: now });
    }

    /// Repeats what is due, and gives up what was repeated often enough.
    pub(super) fn release_step(&mut self, now: Instant) {
        let mut send = Vec::new();
        self.releases.retain_mut(|release| {
            if release.next > now {
                return true;
            }
            let (most, wait) = match &release.kind {
                Kind::Pcp { datagram, .. } | Kind::NatPmp { datagram, .. } => {
                    if release.tries < TRIES {
                        send.push((release.remote, datagram.clone()));
                    }
                    (TRIES, WAIT * 2u32.pow(release.tries))
                }
                Kind::Upnp { .. } => (1, HTTP_PATIENCE),
            };
            release.tries += 1;
            release.next = now + wait;
            release.tries <= most
        });
        for (remote, datagram) in send {
            self.send(remote, datagram);
        }
    }

    /// Whether this answers a deletion.
    pub(super) fn released_pcp(&mut self, map: &Map) -> bool {
        let before = self.releases.len();
        self.releases.retain(|release| match &release.kind {
            Kind::Pcp { nonce, port, .. } => *nonce != map.nonce || *port != map.internal_port,
            Kind::NatPmp { .. } | Kind::Upnp { .. } => true,
        });
        self.releases.len() < before
    }

    pub(super) fn released_nat_pmp(&mut self, response: &nat_pmp::Response) -> Result<(), Reject> {
        let nat_pmp::Body::Map { internal_port, lifetime: 0, .. } = response.body else {
            return Err(Reject::Unasked);
        };
        let before = self.releases.len();
        self.releases.retain(|release| match &release.kind {
            Kind::NatPmp { port, .. } => *port != internal_port,
            Kind::Pcp { .. } | Kind::Upnp { .. } => true,
        });
        if self.releases.len() < before { Ok(()) } else { Err(Reject::Unasked) }
    }
}
