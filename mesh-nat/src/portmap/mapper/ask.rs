//! Asking one protocol for a mapping: the first time, and to renew.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::soap::SoapAsk;
use super::{Mapper, Protocol, Reject, Timer};
use crate::portmap::pcp::{self, Body, Map, ResultCode};
use crate::portmap::status::{Network, Refusal};
use crate::portmap::{nat_pmp, upnp};

/// How long an answer is waited for, twice as long each time, before the request is repeated. Gateways are near, and the
/// RFCs' patience of minutes (RFC 6887 §8.1.1) would keep the next protocol waiting.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// How often a request is sent.
const TRIES: u32 = 4;

/// A request under way.
#[derive(Debug)]
pub(super) enum Ask {
    Pcp { tries: u32 },
    NatPmp { tries: u32, granted: Option<(u16, u32)>, addressed: bool },
    Upnp(SoapAsk),
}

impl Ask {
    const fn protocol(&self) -> Protocol {
        match self {
            Self::Pcp { .. } => Protocol::Pcp,
            Self::NatPmp { .. } => Protocol::NatPmp,
            Self::Upnp(_) => Protocol::Upnp,
        }
    }
}

/// What a gateway has given.
#[derive(Debug, Clone)]
pub(super) struct Grant {
    pub(super) protocol: Protocol,
    pub(super) external: SocketAddr,
    /// `None`: until it is deleted.
    pub(super) lifetime: Option<Duration>,
    pub(super) service: Option<upnp::Service>,
    /// The number of the pinhole that it is.
    pub(super) pinhole: Option<u16>,
}

impl Grant {
    /// By PCP or NAT-PMP.
    const fn datagram(protocol: Protocol, external: SocketAddr, lifetime: Duration) -> Self {
        Self { protocol, external, lifetime: Some(lifetime), service: None, pinhole: None }
    }
}

impl Mapper {
    pub(super) fn start_ask(&mut self, now: Instant, protocol: Protocol) {
        match protocol {
            Protocol::Pcp => self.ask = Some(Ask::Pcp { tries: 0 }),
            Protocol::NatPmp => self.ask = Some(Ask::NatPmp { tries: 0, granted: None, addressed: false }),
            Protocol::Upnp => return self.start_soap(now),
        }
        self.send_ask(now);
    }

    /// The external port to ask for.
    pub(super) fn wanted_port(&self) -> u16 {
        self.config.exactly.or(self.former).or(self.port).unwrap_or(0)
    }

    pub(super) fn lifetime(&self) -> u32 {
        u32::try_from(self.config.lifetime.as_secs()).unwrap_or(u32::MAX).max(1)
    }

    fn send_ask(&mut self, now: Instant) {
        let (Some(network), Some(port)) = (self.network, self.port) else { return };
        let server = network.server();
        let (external_port, lifetime) = (self.wanted_port(), self.lifetime());
        let tries = match &mut self.ask {
            Some(Ask::Pcp { tries }) => {
                *tries += 1;
                let tries = *tries;
                self.send(server, self.pcp_map(network, port, lifetime).encode());
                tries
            }
            Some(Ask::NatPmp { tries, granted, addressed }) => {
                *tries += 1;
                let (tries, granted, addressed) = (*tries, granted.is_some(), *addressed);
                if !addressed {
                    self.send(server, nat_pmp::Request::Address.encode());
                }
                if !granted {
                    let map = nat_pmp::Request::Map { internal_port: port, external_port, lifetime };
                    self.send(server, map.encode());
                }
                tries
            }
            Some(Ask::Upnp(_)) | None => return,
        };
        self.timers.set(Timer::Ask, now + FIRST_WAIT * 2u32.pow(tries - 1));
    }

    pub(super) fn pcp_map(&self, network: Network, port: u16, lifetime: u32) -> pcp::Request {
        let former = self.lease.as_ref().filter(|lease| lease.protocol == Protocol::Pcp && lifetime > 0);
        let address = former.map_or(pcp::any_address(network.client), |lease| lease.external.ip());
        let external = SocketAddr::new(address, if lifetime == 0 { 0 } else { self.wanted_port() });
        let map = Map {
            nonce: self.nonce,
            protocol: pcp::UDP,
            internal_port: port,
            external,
            prefer_failure: self.config.exactly.is_some() && lifetime > 0,
        };
        pcp::Request { client: network.client, lifetime, body: Body::Map(map) }
    }

    /// The timer of whatever was asked has fired.
    pub(super) fn ask_late(&mut self, now: Instant) {
        let Some(ask) = &self.ask else { return };
        let protocol = ask.protocol();
        match ask {
            Ask::Pcp { tries } | Ask::NatPmp { tries, .. } if *tries < TRIES => self.send_ask(now),
            Ask::Pcp { .. } | Ask::NatPmp { .. } => self.refused(now, protocol, Refusal::Silent, None),
            Ask::Upnp(_) => self.soap_failed(now),
        }
    }

    pub(super) fn handle_pcp_map(&mut self, now: Instant, response: &pcp::Response, map: &Map) -> Result<(), Reject> {
        if self.released_pcp(map) {
            return Ok(());
        }
        let ours = map.nonce == self.nonce && map.protocol == pcp::UDP && Some(map.internal_port) == self.port;
        if !ours || !matches!(self.ask, Some(Ask::Pcp { .. })) {
            return Err(Reject::Unasked);
        }
        let lasting = Duration::from_secs(response.lifetime.into());
        if response.result != ResultCode::Success {
            self.refused(now, Protocol::Pcp, pcp_refusal(response.result), Some(lasting));
            return Ok(());
        }
        if response.lifetime == 0 || map.external.port() == 0 || map.external.ip().is_unspecified() {
            self.refused(now, Protocol::Pcp, Refusal::NoAddress, None);
            return Ok(());
        }
        self.granted(now, Grant::datagram(Protocol::Pcp, map.external, lasting));
        Ok(())
    }

    pub(super) fn handle_nat_pmp_answer(&mut self, now: Instant, response: &nat_pmp::Response) -> Result<(), Reject> {
        match response.body {
            nat_pmp::Body::Address(_) => {
                self.note_nat_pmp_address(now, response);
                if let Some(Ask::NatPmp { addressed, .. }) = &mut self.ask {
                    *addressed |= response.result == nat_pmp::ResultCode::Success;
                }
            }
            nat_pmp::Body::Map { internal_port, external_port, lifetime } => {
                if self.released_nat_pmp(response).is_ok() {
                    return Ok(());
                }
                let failed = response.result != nat_pmp::ResultCode::Success;
                let Some(Ask::NatPmp { granted, .. }) = &mut self.ask else { return Err(Reject::Unasked) };
                if failed {
                    self.refused(now, Protocol::NatPmp, nat_pmp_refusal(response.result), None);
                    return Ok(());
                }
                if Some(internal_port) != self.port || lifetime == 0 || external_port == 0 {
                    return Err(Reject::Unasked);
                }
                *granted = Some((external_port, lifetime));
            }
        }
        self.finish_nat_pmp(now);
        Ok(())
    }

    fn finish_nat_pmp(&mut self, now: Instant) {
        let Some(Ask::NatPmp { granted: Some((port, lifetime)), addressed: true, .. }) = self.ask else { return };
        let Some(address) = self.nat_pmp_address else { return };
        if self.config.exactly.is_some_and(|wanted| wanted != port) {
            // NAT-PMP cannot be told that no other port would do.
            self.release_nat_pmp(now);
            return self.refused(now, Protocol::NatPmp, Refusal::PortTaken, None);
        }
        let external = SocketAddr::new(IpAddr::V4(address), port);
        self.granted(now, Grant::datagram(Protocol::NatPmp, external, Duration::from_secs(lifetime.into())));
    }
}

fn pcp_refusal(result: ResultCode) -> Refusal {
    match result {
        ResultCode::NotAuthorized => Refusal::NotAuthorized,
        ResultCode::NetworkFailure => Refusal::NoAddress,
        ResultCode::NoResources | ResultCode::UserExceededQuota => Refusal::Full,
        ResultCode::CannotProvideExternal => Refusal::PortTaken,
        ResultCode::AddressMismatch => Refusal::NotOurGateway,
        ResultCode::Success
        | ResultCode::UnsupportedVersion
        | ResultCode::MalformedRequest
        | ResultCode::UnsupportedOpcode
        | ResultCode::UnsupportedOption
        | ResultCode::MalformedOption
        | ResultCode::UnsupportedProtocol
        | ResultCode::ExcessiveRemotePeers
        | ResultCode::Other(_) => Refusal::Other(u8::from(result).into()),
    }
}

pub(super) fn nat_pmp_refusal(result: nat_pmp::ResultCode) -> Refusal {
    match result {
        nat_pmp::ResultCode::NotAuthorized => Refusal::NotAuthorized,
        nat_pmp::ResultCode::NetworkFailure => Refusal::NoAddress,
        nat_pmp::ResultCode::OutOfResources => Refusal::Full,
        nat_pmp::ResultCode::Success
        | nat_pmp::ResultCode::UnsupportedVersion
        | nat_pmp::ResultCode::UnsupportedOpcode
        | nat_pmp::ResultCode::Other(_) => Refusal::Other(result.into()),
    }
}
