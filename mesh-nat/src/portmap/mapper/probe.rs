//! Finding out what the gateway speaks, and choosing.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::ask::nat_pmp_refusal;
use super::{Each, Mapper, Network, Protocol, Reject, Standing, Timer, epoch};
use crate::portmap::pcp::{self, Body, ResultCode};
use crate::portmap::status::Refusal;
use crate::portmap::{nat_pmp, ssdp};

/// Whom nobody has heard from is asked again after so long, and again; after the last, nobody is waited for. Devices may
/// take a second to answer a search.
const STEPS: [Duration; 3] = [Duration::from_millis(250), Duration::from_millis(500), Duration::from_millis(1750)];
/// How long NAT-PMP waits for PCP, which comes from the same server.
const NAT_PMP_WAITS: Duration = Duration::from_millis(100);
/// How long UPnP waits for the others, from the beginning.
const UPNP_WAITS: Duration = Duration::from_millis(400);
/// How long the first device found waits for a better one.
const SEARCH_WAITS: Duration = Duration::from_millis(50);

/// A probe under way.
#[derive(Debug)]
pub(super) struct Probe {
    started: Instant,
    step: usize,
}

impl Mapper {
    pub(super) fn start_probe(&mut self, now: Instant, network: Network) {
        self.standings = Each([Standing::Unknown; 3]);
        if network.gateway.is_ipv6() {
            self.standings[Protocol::NatPmp] = Standing::Absent;
        }
        self.found.search_again();
        self.probe = Some(Probe { started: now, step: 0 });
        self.timers.clear(Timer::Decide);
        self.send_probes(network);
        self.timers.set(Timer::Probe, now + STEPS[0]);
    }

    fn send_probes(&mut self, network: Network) {
        let unknown = |mapper: &Self, protocol: Protocol| mapper.standings[protocol] == Standing::Unknown;
        let server = network.server();
        if unknown(self, Protocol::Pcp) {
            self.send(server, announce(network));
        }
        if unknown(self, Protocol::NatPmp) {
            self.send(server, nat_pmp::Request::Address.encode());
        }
        if unknown(self, Protocol::Upnp) {
            let (group, wanted) = match network.gateway {
                IpAddr::V4(_) => (ssdp::GROUP, ssdp::GATEWAY),
                IpAddr::V6(_) => (ssdp::GROUP_V6, ssdp::FIREWALL),
            };
            let everybody = Network { gateway: group, ..network }.gateway_at(ssdp::PORT);
            for target in [wanted, ssdp::GATEWAY_2] {
                self.send(everybody, ssdp::search(group, target));
            }
            for target in [wanted, ssdp::ALL] {
                self.send(network.gateway_at(ssdp::PORT), ssdp::search(group, target));
            }
        }
    }

    pub(super) fn probe_step(&mut self, now: Instant) {
        let (Some(probe), Some(network)) = (&mut self.probe, self.network) else { return };
        probe.step += 1;
        let known = !self.standings.0.contains(&Standing::Unknown);
        match STEPS.get(probe.step).filter(|_| !known) {
            Some(step) => {
                self.timers.set(Timer::Probe, now + *step);
                self.send_probes(network);
            }
            None => {
                self.probe = None;
                for standing in &mut self.standings.0 {
                    if *standing == Standing::Unknown {
                        *standing = Standing::Absent;
                    }
                }
            }
        }
        self.decide(now);
    }

    /// Notes that the gateway speaks `protocol`, unless more is known already.
    pub(super) fn heard(&mut self, now: Instant, protocol: Protocol) {
        let standing = &mut self.standings[protocol];
        if matches!(standing, Standing::Unknown | Standing::Absent) {
            *standing = Standing::Present(now);
        }
        self.decide(now);
    }

    /// Asks the best protocol, as soon as it is clear which one that is.
    pub(super) fn decide(&mut self, now: Instant) {
        if self.ask.is_some() || self.lease.is_some() || self.port.is_none() || self.network.is_none() {
            return;
        }
        let started = self.probe.as_ref().map(|probe| probe.started);
        let mut open = false;
        for protocol in Protocol::ALL {
            match self.standings[protocol] {
                Standing::Unknown => open = true,
                Standing::Absent | Standing::Refused(_) => {}
                Standing::Present(since) => {
                    let ready = match (protocol, started) {
                        (Protocol::Pcp, _) => since,
                        (Protocol::NatPmp, _) if open => since + NAT_PMP_WAITS,
                        (Protocol::Upnp, Some(started)) if open => (started + UPNP_WAITS).max(since + SEARCH_WAITS),
                        (Protocol::Upnp, Some(_)) => since + SEARCH_WAITS,
                        (Protocol::NatPmp | Protocol::Upnp, _) => since,
                    };
                    if ready <= now {
                        self.timers.clear(Timer::Decide);
                        self.start_ask(now, protocol);
                    } else {
                        self.timers.set(Timer::Decide, ready);
                    }
                    return;
                }
            }
        }
        if !open {
            self.exhausted(now);
        }
    }

    /// Asks the gateway that holds our mapping whether it still has its state. No answer is none.
    pub(super) fn check(&mut self, now: Instant) {
        let (Some(lease), Some(network)) = (&self.lease, self.network) else { return };
        let server = network.server();
        match lease.protocol {
            Protocol::Pcp => self.send(server, announce(network)),
            Protocol::NatPmp => self.send(server, nat_pmp::Request::Address.encode()),
            Protocol::Upnp => {}
        }
        self.timers.set(Timer::Check, now + super::CHECK_INTERVAL);
    }

    pub(super) fn handle_search_answer(&mut self, now: Instant, datagram: &[u8]) -> Result<(), Reject> {
        let found = ssdp::answer(datagram)?;
        self.found.add(found);
        self.heard(now, Protocol::Upnp);
        Ok(())
    }

    pub(super) fn handle_pcp(
        &mut self,
        now: Instant,
        response: &pcp::Response,
        from_gateway: bool,
    ) -> Result<(), Reject> {
        let kept = !from_gateway || self.has_kept(now, Protocol::Pcp, response.epoch);
        let outcome = match response.body {
            Body::Announce if response.result == ResultCode::UnsupportedVersion => {
                // What it answers to NAT-PMP.
                self.absent(now, Protocol::NatPmp);
                Ok(())
            }
            Body::Announce => Ok(()),
            Body::Map(map) => self.handle_pcp_map(now, response, &map),
        };
        if from_gateway {
            self.heard(now, Protocol::Pcp);
        }
        if !kept {
            self.state_lost(now);
        }
        outcome
    }

    pub(super) fn handle_nat_pmp(
        &mut self,
        now: Instant,
        response: &nat_pmp::Response,
        from_gateway: bool,
    ) -> Result<(), Reject> {
        if !from_gateway {
            return self.released_nat_pmp(response);
        }
        if response.result == nat_pmp::ResultCode::UnsupportedVersion {
            // What it answers to PCP.
            self.absent(now, Protocol::Pcp);
            return Ok(());
        }
        let kept = self.has_kept(now, Protocol::NatPmp, response.epoch);
        let outcome = self.handle_nat_pmp_answer(now, response);
        if !kept {
            self.state_lost(now);
        }
        outcome
    }

    /// Whether the gateway still has what it gave us, as far as the epoch in a response by `protocol` tells. A gateway's
    /// protocols start together, and not all of them announce it: miniupnpd does by PCP alone. So any of them counts, even
    /// one that was never heard before.
    fn has_kept(&mut self, now: Instant, protocol: Protocol, epoch: u32) -> bool {
        let goes_on = self.epochs[protocol].observe(now, epoch);
        goes_on && self.lease.as_ref().is_none_or(|lease| epoch::reaches_back(now, epoch, lease.given))
    }

    fn absent(&mut self, now: Instant, protocol: Protocol) {
        if self.standings[protocol] == Standing::Unknown {
            self.standings[protocol] = Standing::Absent;
            self.decide(now);
        }
    }

    /// What an address request brought: the probe's, the check's, or that which goes with a mapping.
    pub(super) fn note_nat_pmp_address(&mut self, now: Instant, response: &nat_pmp::Response) {
        let nat_pmp::Body::Address(address) = response.body else { return };
        let failed = response.result != nat_pmp::ResultCode::Success;
        let refusal = if failed {
            Some(nat_pmp_refusal(response.result))
        } else {
            address.is_unspecified().then_some(Refusal::NoAddress)
        };
        if let Some(why) = refusal {
            if self.lease.is_none() && self.ask.is_none() {
                self.refused(now, Protocol::NatPmp, why, None);
            }
            return;
        }
        self.nat_pmp_address = Some(address);
        if let Some(lease) = self.lease.as_mut().filter(|lease| lease.protocol == Protocol::NatPmp) {
            lease.external.set_ip(address.into());
        }
        self.heard(now, Protocol::NatPmp);
    }
}

fn announce(network: Network) -> Vec<u8> {
    pcp::Request { client: network.client, lifetime: 0, body: Body::Announce }.encode()
}
