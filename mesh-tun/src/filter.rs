//! The packet filter between tunnel and device: what peers may send to this node.
//!
//! Outgoing packets are always allowed; flows they begin are remembered, so that answers come in. An incoming packet is
//! judged so:
//!
//! 1. A destination that is multicast, link-local or not one of ours is dropped, and so is anything malformed.
//! 2. Later fragments pass: without the first one they come to nothing. Those that would overlay a transport header
//!    (RFC 1858 §3) are dropped.
//! 3. By protocol:
//!
//! | packet | accepted |
//! |---|---|
//! | TCP that opens no connection | always: without a connection the host answers with a reset |
//! | TCP that opens one | if a rule opens the port |
//! | UDP, SCTP | if it answers a flow of ours ([`flow`]), or a rule opens the port |
//! | ICMP echo reply and errors | always |
//! | other ICMP | if a rule opens anything of the destination to the source |
//! | TSMP | always |
//! | other protocols | if a rule opens the whole protocol |
//!
//! Before any rules have been received, everything is dropped.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::packet::{Fragment, IcmpClass, Packet, Protocol, Transport};

mod compiled;
pub mod flow;
mod prefixes;
pub mod rule;

pub use flow::{Flow, Flows};
pub use rule::{ALL_PORTS, Addresses, BadAddresses, Destination, Rule};

use compiled::Compiled;
use prefixes::Prefixes;

/// No transport header with its IP options reaches further than this into a packet.
const HEADERS_END: usize = 80;

/// A compiled filter; replaced as a whole when rules change, while the flows live on.
#[derive(Debug)]
pub struct Filter {
    local: Prefixes,
    rules: Option<Compiled>,
    flows: Arc<Flows>,
    open: bool,
}

/// How far a peer is trusted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Standing {
    /// The rules decide.
    #[default]
    Ordinary,
    /// No rule counts: the peer may only answer.
    Jailed,
}

/// What to do with an incoming packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Hand it to the device.
    Accept,
    /// Drop it, for this reason.
    Drop(Reason),
}

/// Why a packet was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// No rules have been received yet.
    NoFilter,
    /// The destination is multicast or link-local.
    Scope,
    /// The destination is not one of ours.
    NotLocal,
    /// A later fragment that would overlay a transport header.
    Overlap,
    /// No rule allows it.
    NoRule,
}

impl Filter {
    /// The filter before any rules were received: it drops everything.
    #[must_use]
    pub fn closed(flows: Arc<Flows>) -> Self {
        Self { local: Prefixes::default(), rules: None, flows, open: false }
    }

    /// Compiles `rules` for a node that owns the prefixes `local`: its addresses and the routes it serves.
    ///
    /// An empty list of rules (shields up) lets only answers in.
    #[must_use]
    pub fn new(local: &[IpNet], rules: &[Rule], flows: Arc<Flows>) -> Self {
        let rules = Some(Compiled::new(rules, local));
        let local = Prefixes::new(local.iter().map(|prefix| (prefix.trunc(), 0)));
        Self { local, rules, flows, open: false }
    }

    /// No filter: accepts everything, as a plain WireGuard tunnel does.
    #[must_use]
    pub fn open(flows: Arc<Flows>) -> Self {
        Self { open: true, ..Self::closed(flows) }
    }

    /// The flows that answers are accepted for.
    #[must_use]
    pub fn flows(&self) -> &Arc<Flows> {
        &self.flows
    }

    /// Judges a packet from a peer. `now` counts from any fixed moment, the same for all calls.
    #[must_use]
    pub fn inbound(&self, packet: &Packet<'_>, standing: Standing, now: Duration) -> Verdict {
        match self.judge(packet, standing, now) {
            Ok(()) => Verdict::Accept,
            Err(reason) => Verdict::Drop(reason),
        }
    }

    /// Whether packets may go out in the name of `source`: it is one of ours, or it is not known which those are.
    #[must_use]
    pub fn owns(&self, source: IpAddr) -> bool {
        self.rules.is_none() || self.local.covering(source).next().is_some()
    }

    /// Remembers the flow of a packet that goes out.
    pub fn note_outbound(&self, packet: &Packet<'_>, now: Duration) {
        if self.open {
            return;
        }
        if let Transport::Udp { source, destination } | Transport::Sctp { source, destination } = packet.transport {
            let flow = Flow {
                protocol: packet.protocol,
                local: (packet.source, source),
                remote: (packet.destination, destination),
            };
            self.flows.note(&flow, now);
        }
    }

    fn judge(&self, packet: &Packet<'_>, standing: Standing, now: Duration) -> Result<(), Reason> {
        if self.open {
            return Ok(());
        }
        let rules = self.rules.as_ref().ok_or(Reason::NoFilter)?;
        let (source, destination, protocol) = (packet.source, packet.destination, packet.protocol);
        if is_out_of_scope(destination) {
            return Err(Reason::Scope);
        }
        if self.local.covering(destination).next().is_none() {
            return Err(Reason::NotLocal);
        }
        if let Fragment::Later { offset } = packet.fragment {
            return if offset < HEADERS_END { Err(Reason::Overlap) } else { Ok(()) };
        }
        let by_rule = |allowed: &dyn Fn(&Compiled) -> bool| {
            if standing == Standing::Ordinary && allowed(rules) { Ok(()) } else { Err(Reason::NoRule) }
        };
        match packet.transport {
            Transport::Tcp { flags, .. } if !flags.opens() => Ok(()),
            Transport::Tcp { destination: port, .. } => {
                by_rule(&|rules| rules.opens_port(source, destination, protocol, port))
            }
            Transport::Udp { source: from, destination: port }
            | Transport::Sctp { source: from, destination: port } => {
                let flow = Flow { protocol, local: (destination, port), remote: (source, from) };
                if self.flows.contains(&flow, now) {
                    return Ok(());
                }
                by_rule(&|rules| rules.opens_port(source, destination, protocol, port))
            }
            Transport::Icmp { class: IcmpClass::EchoReply | IcmpClass::Error, .. } => Ok(()),
            Transport::Icmp { .. } => by_rule(&|rules| rules.opens_anything(source, destination)),
            Transport::Unknown if protocol == Protocol::TSMP => Ok(()),
            Transport::Unknown => by_rule(&|rules| rules.opens_protocol(source, destination, protocol)),
        }
    }
}

fn is_out_of_scope(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_multicast() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_multicast() || v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests;
