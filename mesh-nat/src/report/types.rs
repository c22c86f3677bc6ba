//! What goes into a report and what comes out of making one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_derp::map::RegionId;

use super::portal::PortalCheck;
use crate::behaviour::Behaviour;
use crate::path::{Family, SocketId};

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Any STUN server answered.
    pub udp: bool,
    /// IPv4 works: STUN answered over it, or a relay by HTTPS.
    pub ipv4: bool,
    /// IPv6 works, likewise.
    pub ipv6: bool,
    /// Our IPv4 address as servers see it: the one of the last report if any server still sees it, else the first that
    /// was told.
    pub global_v4: Option<SocketAddr>,
    /// Our IPv6 address, likewise.
    pub global_v6: Option<SocketAddr>,
    /// All addresses that servers saw, and how many saw each. The ports of one server count once.
    pub seen: BTreeMap<SocketAddr, u32>,
    /// Whether servers saw different IPv4 addresses: the NAT maps per destination. `None` if there was nothing to compare.
    pub mapping_varies_by_dest_ip: Option<bool>,
    /// Whether our IPv4 address differs from what servers see: a NAT is in between. `None` if nobody told, or our own
    /// addresses are not known ([`Netcheck::set_interfaces`](super::Netcheck::set_interfaces)).
    pub translated_v4: Option<bool>,
    /// The same for IPv6.
    pub translated_v6: Option<bool>,
    /// What the NAT does with IPv4. Full reports find out all of it; those in between keep what they cannot see.
    pub nat_v4: Behaviour,
    /// What the NAT does with IPv6: its mapping, for the rest is asked over IPv4 only.
    pub nat_v6: Behaviour,
    /// Whether something on the way answers HTTP requests in the place of those that were asked, as hotels do until one
    /// has signed in. `None` if it was not asked: STUN answered first, or no relay offers port 80.
    pub captive_portal: Option<bool>,
    /// Latency of each region that answered, the better family's.
    pub region_latency: BTreeMap<RegionId, Duration>,
    /// Latency over IPv4.
    pub region_latency_v4: BTreeMap<RegionId, Duration>,
    /// Latency over IPv6.
    pub region_latency_v6: BTreeMap<RegionId, Duration>,
    /// The region to be home in. `None` if nothing could be measured and the home has been silent for two minutes:
    /// then keep what you have, or take [`fallback_home`](super::fallback_home).
    pub preferred: Option<RegionId>,
    /// Whether all regions were asked.
    pub full: bool,
    /// How long it took.
    pub took: Duration,
}

impl Report {
    /// Our addresses as servers see them, for control and peers. An IPv4 address that only one server saw, other than
    /// the first, is a NAT's mapping towards that server and of use to nobody.
    #[must_use]
    pub fn endpoints(&self) -> Vec<SocketAddr> {
        let mut found: Vec<_> = self.global_v4.into_iter().chain(self.global_v6).collect();
        for (address, times) in &self.seen {
            if *times > 1 && !found.contains(address) {
                found.push(*address);
            }
        }
        found
    }

    /// What is known about the NAT for `family`.
    #[must_use]
    pub const fn nat(&self, family: Family) -> &Behaviour {
        match family {
            Family::V4 => &self.nat_v4,
            Family::V6 => &self.nat_v6,
        }
    }
}

/// A datagram to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// From this socket: one of the node's, or one that was opened for [`Event::WantSockets`].
    pub socket: SocketId,
    /// To this server, or to an outside address of our own.
    pub remote: SocketAddr,
    /// The request.
    pub datagram: Vec<u8>,
}

/// What the caller should do or know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Look `host` up and call [`Netcheck::handle_resolved`](super::Netcheck::handle_resolved).
    Resolve {
        /// The name.
        host: String,
    },
    /// UDP is silent, or the region has no STUN: measure it by HTTPS and call
    /// [`Netcheck::handle_https_latency`](super::Netcheck::handle_https_latency).
    WantHttpsLatency {
        /// The region.
        region: RegionId,
    },
    /// Ask by plain HTTP whether something answers in others' place, and call
    /// [`Netcheck::handle_portal`](super::Netcheck::handle_portal).
    WantPortalCheck(Vec<PortalCheck>),
    /// Open so many IPv4 sockets on any port and call [`Netcheck::handle_sockets`](super::Netcheck::handle_sockets). Who
    /// cannot may call it with none, or not at all. They may be closed at [`Event::Finished`].
    WantSockets {
        /// How many.
        count: usize,
    },
    /// Latencies, addresses and home are known; what the NAT does is still being found out.
    Located(Report),
    /// It is done.
    Finished(Report),
}

/// How much to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scope {
    /// The nearest regions, and all of them every five minutes and after a change of address.
    #[default]
    Auto,
    /// All regions, and everything about the NAT.
    Full,
}
