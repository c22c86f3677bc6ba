//! What stands between two networks: a NAT, a firewall, services for those inside.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;

use super::link::Link;
use super::nat::{Nat, NatConfig};
use super::route::NetworkId;
use crate::behaviour::Filtering;
use crate::path::Family;

/// Names one gateway of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GatewayId(pub(super) usize);

/// How a gateway behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatewayConfig {
    /// How it translates IPv4. Without, hosts behind it have addresses that are good outside as well.
    pub nat: Option<NatConfig>,
    /// Whom the firewall lets in to what is not translated: those who were sent to, by this rule. Without one, everybody.
    pub firewall: Option<Filtering>,
    /// How long the firewall remembers who was sent to.
    pub firewall_timeout: Duration,
    /// Whether the inner network has IPv6.
    pub ipv6: bool,
    /// The wire between the gateway and the outer network.
    pub uplink: Link,
}

impl Default for GatewayConfig {
    /// A router that does nothing to what it forwards, without IPv6.
    fn default() -> Self {
        Self {
            nat: None,
            firewall: None,
            firewall_timeout: Duration::from_secs(120),
            ipv6: false,
            uplink: Link::default(),
        }
    }
}

impl GatewayConfig {
    /// No NAT; only those who were sent to may answer.
    #[must_use]
    pub fn firewall() -> Self {
        Self { firewall: Some(Filtering::AddressAndPortDependent), ..Self::default() }
    }

    /// IPv6 beside what there is, behind a firewall that lets in only those who were sent to.
    #[must_use]
    pub fn and_ipv6(self) -> Self {
        Self { ipv6: true, firewall: Some(Filtering::AddressAndPortDependent), ..self }
    }
}

impl From<NatConfig> for GatewayConfig {
    fn from(nat: NatConfig) -> Self {
        Self { nat: Some(nat), ..Self::default() }
    }
}

/// Something that a gateway does for those inside, such as PCP, NAT-PMP or UPnP-IGD.
pub trait Service {
    /// A datagram from `from` to the gateway's address `to`, or to a multicast address. Returns the answers: the port
    /// that each comes from, to whom, and what.
    fn handle_datagram(
        &mut self,
        now: Instant,
        router: &mut Router<'_>,
        from: SocketAddr,
        to: SocketAddr,
        datagram: &[u8],
    ) -> Vec<(u16, SocketAddr, Vec<u8>)>;

    /// A request over a stream to the gateway's address `to`, all at once. `None`: nobody listens there.
    fn handle_request(
        &mut self,
        now: Instant,
        router: &mut Router<'_>,
        from: IpAddr,
        to: SocketAddr,
        request: &[u8],
    ) -> Option<Vec<u8>> {
        let _ = (now, router, from, to, request);
        None
    }
}

/// What a [`Service`] may look at and change.
#[derive(Debug)]
pub struct Router<'a> {
    /// The gateway's address inside.
    pub inside: IpAddr,
    /// Its address outside, if it translates.
    pub outside: Option<IpAddr>,
    /// The NAT, if it has one.
    pub nat: Option<&'a mut Nat>,
}

pub(super) struct Gateway {
    pub(super) config: GatewayConfig,
    pub(super) outer: NetworkId,
    pub(super) inner: NetworkId,
    /// Its address in the outer network, if it translates.
    pub(super) outside: Option<IpAddr>,
    /// Its address in the inner network.
    pub(super) inside: IpAddr,
    pub(super) nat: Option<Nat>,
    /// Who was sent to, by those inside, and when last.
    firewall: BTreeMap<SocketAddr, BTreeMap<SocketAddr, Instant>>,
    pub(super) services: Vec<Box<dyn Service>>,
    pub(super) udp_blocked: bool,
}

impl Gateway {
    pub(super) fn new(
        config: GatewayConfig,
        outer: NetworkId,
        inner: NetworkId,
        outside: Option<IpAddr>,
        inside: IpAddr,
    ) -> Self {
        Self {
            config,
            outer,
            inner,
            outside,
            inside,
            nat: config.nat.map(Nat::new),
            firewall: BTreeMap::new(),
            services: Vec::new(),
            udp_blocked: false,
        }
    }

    pub(super) fn reboot(&mut self) {
        self.firewall.clear();
        if let Some(nat) = &mut self.nat {
            nat.reboot();
        }
    }

    /// A datagram leaves. Returns the source that it has outside.
    pub(super) fn outbound(
        &mut self,
        now: Instant,
        rng: &mut StdRng,
        from: SocketAddr,
        to: SocketAddr,
    ) -> Option<SocketAddr> {
        if Family::of(&from) == Family::V4
            && let (Some(nat), Some(outside)) = (&mut self.nat, self.outside)
        {
            return nat.outbound(now, rng, from, to).map(|port| SocketAddr::new(outside, port));
        }
        self.firewall.entry(from).or_default().insert(to, now);
        Some(from)
    }

    /// A datagram arrives from outside. Returns to whom it goes.
    pub(super) fn inbound(&mut self, now: Instant, from: SocketAddr, to: SocketAddr) -> Option<SocketAddr> {
        if self.outside == Some(to.ip()) {
            return self.nat.as_mut()?.inbound(now, to.port(), from);
        }
        let Some(filtering) = self.config.firewall else { return Some(to) };
        let timeout = self.config.firewall_timeout;
        let sent = self.firewall.get_mut(&to)?;
        sent.retain(|_, at| now.saturating_duration_since(*at) < timeout);
        let known = match filtering {
            Filtering::EndpointIndependent => !sent.is_empty(),
            Filtering::AddressDependent => sent.keys().any(|remote| remote.ip() == from.ip()),
            Filtering::AddressAndPortDependent => sent.contains_key(&from),
        };
        if let Some(at) = sent.get_mut(&from) {
            *at = now;
        }
        known.then_some(to)
    }

    /// Asks each service in turn.
    pub(super) fn serve(
        &mut self,
        now: Instant,
        from: SocketAddr,
        to: SocketAddr,
        datagram: &[u8],
    ) -> Vec<(u16, SocketAddr, Vec<u8>)> {
        let mut router = Router { inside: self.inside, outside: self.outside, nat: self.nat.as_mut() };
        let answers =
            self.services.iter_mut().map(|service| service.handle_datagram(now, &mut router, from, to, datagram));
        answers.flatten().collect()
    }

    pub(super) fn request(&mut self, now: Instant, from: IpAddr, to: SocketAddr, request: &[u8]) -> Option<Vec<u8>> {
        let mut router = Router { inside: self.inside, outside: self.outside, nat: self.nat.as_mut() };
        self.services.iter_mut().find_map(|service| service.handle_request(now, &mut router, from, to, request))
    }
}
