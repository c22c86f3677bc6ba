//! Asking a UPnP gateway, one HTTP exchange after the other: its description, its external address, a mapping; or for an
//! IPv6 address a pinhole in its firewall, which is extended by its number as long as the gateway knows that.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use rand_core::Rng;

use super::ask::{Ask, Grant};
use super::{ExchangeId, Mapper, Network, Protocol, Timer};
use crate::portmap::http::{self, Url};
use crate::portmap::ssdp;
use crate::portmap::status::Refusal;
use crate::portmap::upnp::{Action, Answer, Fault, Pinhole, PortMapping, Service, ServiceKind, services};

/// How long one exchange may take.
const PATIENCE: Duration = Duration::from_secs(4);
/// So many devices are remembered.
const MAX_FOUND: usize = 4;
/// How many other ports are tried when one is taken.
const MAX_PORTS: u8 = 8;
/// Ports below are left alone.
const LOWEST_PORT: u16 = 1024;

/// What searches have found.
#[derive(Debug, Default)]
pub(super) struct Found {
    devices: Vec<ssdp::Found>,
    /// A new search is under way: its first answer replaces the devices.
    stale: bool,
    /// Of the device that was described last.
    services: Vec<Service>,
}

impl Found {
    pub(super) fn add(&mut self, device: ssdp::Found) {
        if std::mem::take(&mut self.stale) {
            self.devices.clear();
        }
        if !self.devices.contains(&device) && self.devices.len() < MAX_FOUND {
            self.devices.push(device);
            // The second version first, otherwise as they came.
            self.devices.sort_by_key(|device| !device.second);
        }
    }

    pub(super) const fn search_again(&mut self) {
        self.stale = true;
    }

    pub(super) fn describe_again(&mut self) {
        self.services.clear();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Fetching the description of this device.
    Describe(usize),
    /// Asking this service for the external address.
    Address(usize),
    /// Asking it for a mapping.
    Add(usize, Ipv4Addr),
    /// Asking it for a pinhole.
    Open(usize),
    /// Asking it to keep the pinhole of this number open.
    Extend(usize, u16),
}

/// A request under way.
#[derive(Debug)]
pub(super) struct SoapAsk {
    step: Step,
    exchange: ExchangeId,
    port: u16,
    /// The gateway knows only mappings without an end.
    permanent: bool,
    /// The gateway may choose the port.
    any: bool,
    ports_tried: u8,
    /// The last thing that went wrong.
    why: Refusal,
}

impl Mapper {
    pub(super) fn start_soap(&mut self, now: Instant) {
        if self.is_firewall() && self.config.exactly.is_some_and(|wanted| Some(wanted) != self.port) {
            // A pinhole translates nothing.
            return self.refused(now, Protocol::Upnp, Refusal::PortTaken, None);
        }
        let step = if self.found.services.is_empty() { Step::Describe(0) } else { self.first_step(0) };
        self.ask = Some(Ask::Upnp(SoapAsk {
            step,
            exchange: ExchangeId(0),
            port: self.wanted_port(),
            permanent: false,
            any: true,
            ports_tried: 0,
            why: Refusal::NoAddress,
        }));
        self.take_step(now, step);
    }

    fn is_firewall(&self) -> bool {
        self.network.is_some_and(|network| network.client.is_ipv6())
    }

    /// What this service is asked first.
    fn first_step(&self, service: usize) -> Step {
        match self.lease.as_ref().and_then(|lease| lease.pinhole) {
            Some(id) if service == 0 => Step::Extend(service, id),
            Some(_) | None if self.is_firewall() => Step::Open(service),
            Some(_) | None => Step::Address(service),
        }
    }

    /// Goes to `step`, or to what comes instead if its device or service does not exist.
    fn take_step(&mut self, now: Instant, step: Step) {
        let (Some(network), Some(Ask::Upnp(ask))) = (self.network, &mut self.ask) else { return };
        ask.step = step;
        let calls = |index: usize, action: &dyn Fn(&Service) -> Option<Action>| {
            let service = self.found.services.get(index)?;
            Some(call(network, service, &action(service)?))
        };
        let request = match step {
            Step::Describe(device) => self.found.devices.get(device).map(|device| {
                let remote = network.gateway_at(device.location.port);
                (remote, http::get(remote, &device.location.path))
            }),
            Step::Address(service) => calls(service, &|_| Some(Action::GetExternalIpAddress)),
            Step::Add(service, _) => calls(service, &|service| self.add_action(service)),
            Step::Open(service) => calls(service, &|_| self.open_action()),
            Step::Extend(service, id) => {
                calls(service, &|_| Some(Action::UpdatePinhole { id, lease: self.hole_lifetime() }))
            }
        };
        let Some((remote, request)) = request else {
            // Nobody is left to ask.
            let why = match &self.ask {
                Some(Ask::Upnp(ask)) => ask.why,
                Some(Ask::Pcp { .. } | Ask::NatPmp { .. }) | None => Refusal::Silent,
            };
            self.found.services.clear();
            return self.refused(now, Protocol::Upnp, why, None);
        };
        let id = self.exchange(remote, request);
        if let Some(Ask::Upnp(ask)) = &mut self.ask {
            ask.exchange = id;
        }
        self.timers.set(Timer::Ask, now + PATIENCE);
    }

    fn add_action(&self, service: &Service) -> Option<Action> {
        let (Some(Ask::Upnp(ask)), Some(internal_port)) = (&self.ask, self.port) else { return None };
        let IpAddr::V4(client) = self.network?.client else { return None };
        let lease = if ask.permanent { 0 } else { self.lifetime() };
        let map = PortMapping { external_port: ask.port, internal_port, client, lease };
        let any = service.kind == ServiceKind::WanIp2 && ask.any && self.config.exactly.is_none();
        Some(if any { Action::AddAnyPortMapping(map) } else { Action::AddPortMapping(map) })
    }

    fn open_action(&self) -> Option<Action> {
        let IpAddr::V6(client) = self.network?.client else { return None };
        Some(Action::AddPinhole(Pinhole { client, port: self.port?, lease: self.hole_lifetime() }))
    }

    fn hole_lifetime(&self) -> u32 {
        self.lifetime().min(Pinhole::MAX_LEASE)
    }

    /// The exchange under way came to nothing.
    pub(super) fn soap_failed(&mut self, now: Instant) {
        let Some(Ask::Upnp(ask)) = &mut self.ask else { return };
        ask.why = Refusal::Silent;
        let next = match ask.step {
            Step::Describe(device) => Step::Describe(device + 1),
            Step::Address(service) | Step::Add(service, _) | Step::Open(service) | Step::Extend(service, _) => {
                self.first_step(service + 1)
            }
        };
        self.take_step(now, next);
    }

    pub(super) fn handle_ask_http(&mut self, now: Instant, id: ExchangeId, response: Option<&http::Response>) {
        let Some(Ask::Upnp(ask)) = &mut self.ask else { return };
        if ask.exchange != id {
            return;
        }
        let step = ask.step;
        let Some(response) = response else { return self.soap_failed(now) };
        match step {
            Step::Describe(device) => self.described(now, device, response),
            Step::Address(service) => {
                let next = match Answer::decode(response.status, &response.body) {
                    Ok(Answer { external: Some(address), .. }) => Step::Add(service, address),
                    Ok(_) => {
                        ask.why = Refusal::NoAddress;
                        Step::Address(service + 1)
                    }
                    Err(fault) => {
                        ask.why = refusal(fault);
                        Step::Address(service + 1)
                    }
                };
                self.take_step(now, next);
            }
            Step::Add(service, address) => match Answer::decode(response.status, &response.body) {
                Ok(answer) => self.added(now, service, address, answer.reserved_port),
                Err(fault) => self.not_added(now, service, address, fault),
            },
            Step::Open(service) => match Answer::decode(response.status, &response.body) {
                Ok(Answer { pinhole: Some(id), .. }) => self.opened(now, service, id),
                Ok(_) => self.soap_failed(now),
                Err(fault) => {
                    ask.why = refusal(fault);
                    let next = self.first_step(service + 1);
                    self.take_step(now, next);
                }
            },
            Step::Extend(service, id) => match Answer::decode(response.status, &response.body) {
                Ok(_) => self.opened(now, service, id),
                // It has forgotten the number, or given it to another.
                Err(_) => self.take_step(now, Step::Open(service)),
            },
        }
    }

    fn described(&mut self, now: Instant, device: usize, response: &http::Response) {
        let location: Option<Url> = self.found.devices.get(device).map(|device| device.location.clone());
        let mut found = match location {
            Some(location) if response.status == 200 => services(&response.body, &location),
            _ => Vec::new(),
        };
        found.retain(|service| (service.kind == ServiceKind::Firewall6) == self.is_firewall());
        if found.is_empty() {
            return self.soap_failed(now);
        }
        self.found.services = found;
        let next = self.first_step(0);
        self.take_step(now, next);
    }

    fn added(&mut self, now: Instant, service: usize, address: Ipv4Addr, reserved: Option<u16>) {
        let Some(Ask::Upnp(ask)) = &self.ask else { return };
        let port = reserved.unwrap_or(ask.port);
        let lifetime = (!ask.permanent).then_some(self.config.lifetime);
        let service = self.found.services.get(service).cloned();
        let external = SocketAddr::new(address.into(), port);
        self.granted(now, Grant { protocol: Protocol::Upnp, external, lifetime, service, pinhole: None });
    }

    fn opened(&mut self, now: Instant, service: usize, id: u16) {
        let (Some(network), Some(port)) = (self.network, self.port) else { return };
        let lifetime = Some(Duration::from_secs(self.hole_lifetime().into()));
        let service = self.found.services.get(service).cloned();
        let external = SocketAddr::new(network.client, port);
        self.granted(now, Grant { protocol: Protocol::Upnp, external, lifetime, service, pinhole: Some(id) });
    }

    /// Tries what the fault hints at, if that has not been tried.
    fn not_added(&mut self, now: Instant, service: usize, address: Ipv4Addr, fault: Fault) {
        let other = self.rng.next_u32();
        let Some(Ask::Upnp(ask)) = &mut self.ask else { return };
        ask.why = refusal(fault);
        let any = ask.any
            && self.config.exactly.is_none()
            && self.found.services.get(service).is_some_and(|service| service.kind == ServiceKind::WanIp2);
        let again = match fault {
            Fault::OnlyPermanent | Fault::InvalidArguments | Fault::ActionFailed if !ask.permanent => {
                ask.permanent = true;
                true
            }
            Fault::Conflict | Fault::ConflictWithOther
                if self.config.exactly.is_none() && ask.ports_tried < MAX_PORTS =>
            {
                ask.ports_tried += 1;
                let span = u32::from(u16::MAX - LOWEST_PORT) + 1;
                ask.port = LOWEST_PORT + u16::try_from(other % span).unwrap_or_default();
                true
            }
            Fault::SamePorts if self.config.exactly.is_none() && Some(ask.port) != self.port => {
                ask.port = self.port.unwrap_or_default();
                true
            }
            // A gateway of the second version that knows only the first one's call, or permits only that.
            Fault::InvalidAction | Fault::NotAuthorized | Fault::Other(_) if any => {
                ask.any = false;
                true
            }
            Fault::InvalidAction
            | Fault::InvalidArguments
            | Fault::ActionFailed
            | Fault::NotAuthorized
            | Fault::NoPinholes
            | Fault::FirewallOff
            | Fault::PinholesOff
            | Fault::UnknownPinhole
            | Fault::Conflict
            | Fault::SamePorts
            | Fault::OnlyPermanent
            | Fault::NoPortMaps
            | Fault::ConflictWithOther
            | Fault::Other(_) => false,
        };
        let next = if again { Step::Add(service, address) } else { Step::Address(service + 1) };
        self.take_step(now, next);
    }
}

/// A call, and where it goes.
pub(super) fn call(network: Network, service: &Service, action: &Action) -> (SocketAddr, Vec<u8>) {
    let remote = network.gateway_at(service.control.port);
    (remote, http::post(remote, &service.control.path, &action.soap_action(service), &action.encode(service)))
}

fn refusal(fault: Fault) -> Refusal {
    match fault {
        Fault::NotAuthorized | Fault::PinholesOff => Refusal::NotAuthorized,
        Fault::Conflict | Fault::ConflictWithOther => Refusal::PortTaken,
        Fault::NoPortMaps | Fault::NoPinholes => Refusal::Full,
        Fault::InvalidAction
        | Fault::FirewallOff
        | Fault::UnknownPinhole
        | Fault::InvalidArguments
        | Fault::ActionFailed
        | Fault::SamePorts
        | Fault::OnlyPermanent
        | Fault::Other(_) => Refusal::Other(fault.into()),
    }
}
