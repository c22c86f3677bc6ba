//! The other side: a gateway that maps ports, for laboratories and tests.
//!
//! [`Gateway`] is a core: datagrams and HTTP requests go in, answers come out, and whoever plays the NAT asks it with
//! [`Gateway::inside`] which host an outside port belongs to. It speaks PCP, NAT-PMP and UPnP, each of which can be left
//! out, and has the faults of real ones to choose from ([`Quirks`]).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use super::nat_pmp::{self, NatPmpError};
use super::pcp::{self, Body, Map, Nonce, PcpError, ResultCode};
use super::status::Protocol;
use super::{http, ssdp};

mod description;
mod soap;

/// The port of its HTTP server.
pub const HTTP_PORT: u16 = 5000;
/// How long errors are likely to last.
const ERROR_LIFETIME: u32 = 30;
/// Where other ports are looked for when the wanted one is taken.
const FIRST_PORT: u16 = 1024;

/// Faults and peculiarities; none by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quirks {
    /// Protocols that are spoken, but refuse every mapping.
    pub refuses: Vec<Protocol>,
    /// UPnP of the first version only.
    pub first_version: bool,
    /// UPnP mappings have no end (error 725).
    pub permanent_only: bool,
    /// UPnP maps the same port only (error 724).
    pub same_ports: bool,
    /// Outside ports that are taken.
    pub taken: Vec<u16>,
}

/// What a gateway is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Its inside address.
    pub inside: IpAddr,
    /// Its outside address.
    pub outside: Ipv4Addr,
    /// What it speaks.
    pub speaks: Vec<Protocol>,
    /// No mapping lives longer.
    pub max_lifetime: Duration,
    /// What is odd about it.
    pub quirks: Quirks,
}

impl Config {
    /// A gateway that speaks everything, and gives mappings for a day at most.
    #[must_use]
    pub fn new(inside: IpAddr, outside: Ipv4Addr) -> Self {
        let max_lifetime = Duration::from_secs(86_400);
        Self { inside, outside, speaks: Protocol::ALL.to_vec(), max_lifetime, quirks: Quirks::default() }
    }

    /// The same, speaking only these.
    #[must_use]
    pub fn speaking(mut self, protocols: &[Protocol]) -> Self {
        self.speaks = protocols.to_vec();
        self
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    inside: SocketAddr,
    expires: Option<Instant>,
    /// Who made it with PCP may change it with PCP.
    nonce: Option<Nonce>,
    /// The number of a pinhole that UPnP has opened.
    id: Option<u16>,
}

/// A gateway and the mappings that it has given.
#[derive(Debug)]
pub struct Gateway {
    config: Config,
    started: Instant,
    /// By outside port.
    ports: BTreeMap<u16, Entry>,
    /// Holes for IPv6, by the inside address.
    pinholes: BTreeMap<SocketAddr, Entry>,
    /// So many pinholes has UPnP opened.
    holes: u16,
}

impl Gateway {
    /// A gateway without mappings.
    #[must_use]
    pub const fn new(now: Instant, config: Config) -> Self {
        Self { config, started: now, ports: BTreeMap::new(), pinholes: BTreeMap::new(), holes: 0 }
    }

    /// The host that an outside port leads to.
    #[must_use]
    pub fn inside(&self, now: Instant, outside_port: u16) -> Option<SocketAddr> {
        self.ports.get(&outside_port).filter(|entry| entry.lives(now)).map(|entry| entry.inside)
    }

    /// The outside address that packets from `inside` leave with, if that port is mapped.
    #[must_use]
    pub fn outside(&self, now: Instant, inside: SocketAddr) -> Option<SocketAddr> {
        let (port, _) = self.ports.iter().find(|(_, entry)| entry.inside == inside && entry.lives(now))?;
        Some(SocketAddr::new(self.config.outside.into(), *port))
    }

    /// Whether packets from outside may reach this IPv6 address and port.
    #[must_use]
    pub fn is_open(&self, now: Instant, inside: SocketAddr) -> bool {
        self.pinholes.get(&inside).is_some_and(|entry| entry.lives(now))
    }

    /// How many mappings live.
    #[must_use]
    pub fn count(&self, now: Instant) -> usize {
        self.ports.values().chain(self.pinholes.values()).filter(|entry| entry.lives(now)).count()
    }

    /// Forgets everything, as a power cut does. Returns what is told to all hosts inside: datagrams to 224.0.0.1, port
    /// [`pcp::ANNOUNCE_PORT`], from [`pcp::SERVER_PORT`].
    pub fn restart(&mut self, now: Instant) -> Vec<Vec<u8>> {
        self.started = now;
        self.ports.clear();
        self.pinholes.clear();
        let mut told = Vec::new();
        if self.speaks(Protocol::Pcp) {
            told.push(self.pcp_response(now, ResultCode::Success, 0, Body::Announce));
        }
        if self.speaks(Protocol::NatPmp) {
            told.push(self.nat_pmp_address(now));
        }
        told
    }

    /// Gives itself another outside address.
    pub const fn set_outside(&mut self, outside: Ipv4Addr) {
        self.config.outside = outside;
    }

    /// Changes what is odd about it.
    pub fn set_quirks(&mut self, quirks: Quirks) {
        self.config.quirks = quirks;
    }

    /// Takes a datagram that came to one of its ports, or to the SSDP group; returns the answers, which go back to
    /// `source` from that port.
    pub fn handle_datagram(&mut self, now: Instant, source: SocketAddr, port: u16, datagram: &[u8]) -> Vec<Vec<u8>> {
        self.ports.retain(|_, entry| entry.lives(now));
        self.pinholes.retain(|_, entry| entry.lives(now));
        match (port, datagram.first()) {
            (ssdp::PORT, _) => self.search(datagram).into_iter().collect(),
            (pcp::SERVER_PORT, Some(0)) => self.nat_pmp(now, source, datagram).into_iter().collect(),
            (pcp::SERVER_PORT, Some(_)) => self.pcp(now, source, datagram).into_iter().collect(),
            _ => Vec::new(),
        }
    }

    /// Takes what has come so far over a TCP connection to [`HTTP_PORT`]. `None` while the request is not whole; then the
    /// response, after which the connection ends. An empty one means that it ends at once.
    pub fn handle_http(&mut self, now: Instant, source: IpAddr, bytes: &[u8]) -> Option<Vec<u8>> {
        self.ports.retain(|_, entry| entry.lives(now));
        self.pinholes.retain(|_, entry| entry.lives(now));
        match http::request(bytes) {
            Ok(None) => None,
            Ok(Some(request)) if self.speaks(Protocol::Upnp) => Some(self.soap(now, source, &request)),
            Ok(Some(_)) | Err(_) => Some(Vec::new()),
        }
    }

    /// What lives: outside port, inside address, and for how long.
    #[cfg(feature = "sim")]
    pub(super) fn forwards(&self, now: Instant) -> impl Iterator<Item = (u16, SocketAddr, Option<Duration>)> {
        let live = self.ports.iter().filter(move |(_, entry)| entry.lives(now));
        live.map(move |(port, entry)| {
            (*port, entry.inside, entry.expires.map(|expires| expires.saturating_duration_since(now)))
        })
    }

    /// The port is somebody else's after all.
    #[cfg(feature = "sim")]
    pub(super) fn take_away(&mut self, port: u16) {
        self.ports.remove(&port);
        self.config.quirks.taken.push(port);
    }

    fn speaks(&self, protocol: Protocol) -> bool {
        self.config.speaks.contains(&protocol)
    }

    fn refuses(&self, protocol: Protocol) -> bool {
        self.config.quirks.refuses.contains(&protocol)
    }

    fn epoch(&self, now: Instant) -> u32 {
        u32::try_from(now.saturating_duration_since(self.started).as_secs()).unwrap_or(u32::MAX)
    }

    fn lifetime(&self, wanted: u32) -> u32 {
        wanted.min(u32::try_from(self.config.max_lifetime.as_secs()).unwrap_or(u32::MAX))
    }

    /// Whether `port` is free, or leads to `inside` already.
    fn is_free(&self, port: u16, inside: SocketAddr) -> bool {
        let others = self.ports.get(&port).is_some_and(|entry| entry.inside != inside);
        port != 0 && !others && !self.config.quirks.taken.contains(&port)
    }

    /// The port that `inside` has, else the wanted one, else any.
    fn choose(&self, inside: SocketAddr, wanted: u16) -> Option<u16> {
        let had = self.ports.iter().find(|(_, entry)| entry.inside == inside).map(|(port, _)| *port);
        let mut candidates = had.into_iter().chain([wanted, inside.port()]).chain(FIRST_PORT..=u16::MAX);
        candidates.find(|port| self.is_free(*port, inside))
    }

    // --- PCP ---------------------------------------------------------------------------------------------------------

    fn pcp_response(&self, now: Instant, result: ResultCode, lifetime: u32, body: Body) -> Vec<u8> {
        pcp::Response { result, lifetime, epoch: self.epoch(now), body }.encode()
    }

    fn pcp(&mut self, now: Instant, source: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        if !self.speaks(Protocol::Pcp) {
            // What a NAT-PMP gateway makes of another version (RFC 6886 §3.5).
            let opcode = datagram.get(1).copied().unwrap_or_default();
            let refusal =
                || nat_pmp::Response::refusal(opcode, nat_pmp::ResultCode::UnsupportedVersion, self.epoch(now));
            return self.speaks(Protocol::NatPmp).then(refusal);
        }
        let request = match pcp::Request::decode(datagram) {
            Ok(request) => request,
            Err(PcpError::Direction) => return None,
            Err(error) => {
                let result = match error {
                    PcpError::Version(_) => ResultCode::UnsupportedVersion,
                    PcpError::Opcode(_) => ResultCode::UnsupportedOpcode,
                    PcpError::Option(_) => ResultCode::UnsupportedOption,
                    PcpError::MalformedOption => ResultCode::MalformedOption,
                    PcpError::Length(_) | PcpError::Direction => ResultCode::MalformedRequest,
                };
                return Some(pcp::Response::refusal(datagram, result, ERROR_LIFETIME, self.epoch(now)));
            }
        };
        if request.client != source.ip().to_canonical() {
            return Some(self.pcp_response(now, ResultCode::AddressMismatch, ERROR_LIFETIME, request.body));
        }
        let answer = match request.body {
            Body::Announce => self.pcp_response(now, ResultCode::Success, 0, Body::Announce),
            Body::Map(map) => match self.pcp_map(now, request.client, request.lifetime, map) {
                Ok((lifetime, map)) => self.pcp_response(now, ResultCode::Success, lifetime, Body::Map(map)),
                Err(result) => self.pcp_response(now, result, ERROR_LIFETIME, request.body),
            },
        };
        Some(answer)
    }

    fn pcp_map(&mut self, now: Instant, client: IpAddr, wanted: u32, mut map: Map) -> Result<(u32, Map), ResultCode> {
        if map.protocol != pcp::UDP || map.internal_port == 0 {
            return Err(ResultCode::UnsupportedProtocol);
        }
        if self.refuses(Protocol::Pcp) {
            return Err(ResultCode::NotAuthorized);
        }
        let inside = SocketAddr::new(client, map.internal_port);
        let had = match client {
            IpAddr::V4(_) => self.ports.values().find(|entry| entry.inside == inside),
            IpAddr::V6(_) => self.pinholes.get(&inside),
        };
        if had.is_some_and(|entry| entry.nonce.is_some_and(|nonce| nonce != map.nonce)) {
            return Err(ResultCode::NotAuthorized);
        }
        if wanted == 0 {
            self.ports.retain(|_, entry| entry.inside != inside);
            self.pinholes.remove(&inside);
            return Ok((0, map));
        }
        let lifetime = self.lifetime(wanted);
        let expires = Some(now + Duration::from_secs(lifetime.into()));
        let entry = Entry { inside, expires, nonce: Some(map.nonce), id: None };
        if client.is_ipv6() {
            self.pinholes.insert(inside, entry);
            map.external = inside;
            return Ok((lifetime, map));
        }
        let suggested = map.external.port();
        let port = self.choose(inside, suggested).ok_or(ResultCode::NoResources)?;
        if map.prefer_failure && port != suggested {
            return Err(ResultCode::CannotProvideExternal);
        }
        self.ports.insert(port, entry);
        map.external = SocketAddr::new(self.config.outside.into(), port);
        Ok((lifetime, map))
    }

    // --- NAT-PMP -----------------------------------------------------------------------------------------------------

    fn nat_pmp_address(&self, now: Instant) -> Vec<u8> {
        nat_pmp::Response {
            result: nat_pmp::ResultCode::Success,
            epoch: self.epoch(now),
            body: nat_pmp::Body::Address(self.config.outside),
        }
        .encode()
    }

    fn nat_pmp(&mut self, now: Instant, source: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
        let epoch = self.epoch(now);
        if !self.speaks(Protocol::NatPmp) {
            let refusal = || pcp::Response::refusal(datagram, ResultCode::UnsupportedVersion, ERROR_LIFETIME, epoch);
            return self.speaks(Protocol::Pcp).then(refusal);
        }
        let (internal_port, wanted, lifetime) = match nat_pmp::Request::decode(datagram) {
            Ok(nat_pmp::Request::Address) => return Some(self.nat_pmp_address(now)),
            Ok(nat_pmp::Request::Map { internal_port, external_port, lifetime }) => {
                (internal_port, external_port, lifetime)
            }
            Err(NatPmpError::Opcode(opcode)) => {
                return Some(nat_pmp::Response::refusal(opcode, nat_pmp::ResultCode::UnsupportedOpcode, epoch));
            }
            Err(NatPmpError::Length(_) | NatPmpError::Version(_) | NatPmpError::Direction) => return None,
        };
        let inside = SocketAddr::new(source.ip(), internal_port);
        let answer = |result, external_port, lifetime| {
            let body = nat_pmp::Body::Map { internal_port, external_port, lifetime };
            Some(nat_pmp::Response { result, epoch, body }.encode())
        };
        if self.refuses(Protocol::NatPmp) {
            return answer(nat_pmp::ResultCode::NotAuthorized, 0, 0);
        }
        if lifetime == 0 {
            self.ports.retain(|_, entry| entry.inside != inside);
            return answer(nat_pmp::ResultCode::Success, 0, 0);
        }
        let Some(port) = self.choose(inside, wanted) else {
            return answer(nat_pmp::ResultCode::OutOfResources, 0, 0);
        };
        let lifetime = self.lifetime(lifetime);
        let expires = Some(now + Duration::from_secs(lifetime.into()));
        self.ports.insert(port, Entry { inside, expires, nonce: None, id: None });
        answer(nat_pmp::ResultCode::Success, port, lifetime)
    }
}

impl Entry {
    fn lives(&self, now: Instant) -> bool {
        self.expires.is_none_or(|expires| expires > now)
    }
}
