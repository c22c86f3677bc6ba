//! What a mapper is told, and what it has to tell.

use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use super::pcp::SERVER_PORT;

/// The ways to ask for a mapping, the preferred first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// RFC 6887.
    Pcp,
    /// RFC 6886.
    NatPmp,
    /// UPnP Internet Gateway Device, 1 or 2.
    Upnp,
}

impl Protocol {
    /// All of them, in order of preference.
    pub const ALL: [Self; 3] = [Self::Pcp, Self::NatPmp, Self::Upnp];
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pcp => "PCP",
            Self::NatPmp => "NAT-PMP",
            Self::Upnp => "UPnP",
        })
    }
}

/// Settings of a [`Mapper`](super::Mapper).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// For how long a mapping is asked for. Default two hours, as deployed clients do.
    pub lifetime: Duration,
    /// The only external port that will do. Default `None`: the internal port is suggested, and any other accepted.
    pub exactly: Option<u16>,
}

impl Default for Config {
    fn default() -> Self {
        Self { lifetime: Duration::from_secs(7200), exactly: None }
    }
}

/// Where the gateway is, and who asks it. One mapper serves one address of this host: the IPv4 address that the default
/// route uses, or an IPv6 address, for which PCP or UPnP opens a pinhole in the gateway's firewall.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network {
    /// The default router.
    pub gateway: IpAddr,
    /// The interface's index with IPv6, which link-local addresses need; 0 otherwise.
    pub scope: u32,
    /// Our own address, of the gateway's family: requests have to be sent from it.
    pub client: IpAddr,
}

impl Network {
    /// A port of the gateway.
    #[must_use]
    pub fn gateway_at(&self, port: u16) -> SocketAddr {
        match self.gateway {
            IpAddr::V4(_) => SocketAddr::new(self.gateway, port),
            IpAddr::V6(v6) => SocketAddrV6::new(v6, port, 0, self.scope).into(),
        }
    }

    /// Where it hears PCP and NAT-PMP.
    pub(super) fn server(&self) -> SocketAddr {
        self.gateway_at(SERVER_PORT)
    }

    /// Whether what `address` says about a device may be the gateway's word: an IPv6 gateway that is asked at its
    /// link-local address may answer from the one that it has in our subnet.
    pub(super) fn may_be_gateway(&self, address: IpAddr) -> bool {
        match (self.client, address) {
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => ours.segments()[..4] == theirs.segments()[..4],
            (IpAddr::V4(_) | IpAddr::V6(_), _) => false,
        }
    }
}

/// A port of the gateway that leads to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// Who gave it.
    pub protocol: Protocol,
    /// The port of ours that it leads to.
    pub internal_port: u16,
    /// Where it can be reached from outside.
    pub external: SocketAddr,
    /// Whether there is another NAT outside: the external address is no public one, nor the one that the world sees us
    /// with. Such a mapping is kept, because it makes the inner NAT an easy one, but it is of no use to peers.
    pub double_nat: bool,
}

/// Why a gateway does not map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// Its owner does not want it.
    NotAuthorized,
    /// It has no external address at present.
    NoAddress,
    /// It has no more room, or we have as much as we may.
    Full,
    /// There is another NAT between it and us.
    NotOurGateway,
    /// The only port that would do is taken.
    PortTaken,
    /// It had answered, and then did not.
    Silent,
    /// Anything else, with the protocol's own number.
    Other(u16),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAuthorized => f.write_str("not permitted"),
            Self::NoAddress => f.write_str("the gateway has no external address"),
            Self::Full => f.write_str("the gateway has no room for more"),
            Self::NotOurGateway => f.write_str("there is another NAT between us and the gateway"),
            Self::PortTaken => f.write_str("the port is taken"),
            Self::Silent => f.write_str("no answer"),
            Self::Other(code) => write!(f, "error {code}"),
        }
    }
}

/// Why there is no mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Problem {
    /// The gateway answered to none of the protocols.
    NoService,
    /// The last of the protocols that it speaks was refused.
    Refused(Protocol, Refusal),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoService => f.write_str("the gateway speaks neither PCP nor NAT-PMP nor UPnP"),
            Self::Refused(protocol, why) => write!(f, "{protocol}: {why}"),
        }
    }
}

/// What is known at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status {
    /// Whether the gateway speaks PCP. `None` while unknown.
    pub pcp: Option<bool>,
    /// Whether it speaks NAT-PMP.
    pub nat_pmp: Option<bool>,
    /// Whether it is a UPnP gateway.
    pub upnp: Option<bool>,
    /// The mapping that we have.
    pub mapping: Option<Mapping>,
    /// Why we have none; `None` while that is not known, or nothing was asked for.
    pub problem: Option<Problem>,
}

impl Status {
    /// The address to tell peers: the mapping's, unless another NAT stands outside.
    #[must_use]
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.mapping.filter(|mapping| !mapping.double_nat).map(|mapping| mapping.external)
    }
}

/// Whether `address` can be reached from the whole internet, as far as its range tells. Those for documentation and
/// benchmarks count: no gateway outside of a laboratory has one.
#[must_use]
pub fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            // RFC 6598 (carriers), RFC 7335 (DS-Lite), and what is no unicast address.
            let special = (a == 100 && (64..128).contains(&b)) || (a, b, c) == (192, 0, 0) || a == 0 || a >= 224;
            !(special || v4.is_private() || v4.is_loopback() || v4.is_link_local())
        }
        IpAddr::V6(v6) => v6.segments()[0] & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_and_carriers_ranges_are_not_public() {
        let public = |text: &str| is_public(text.parse().unwrap());
        for address in ["203.0.113.5", "8.8.8.8", "100.63.0.1", "100.128.0.1", "2001:db8::1"] {
            assert!(public(address), "{address}");
        }
        for address in [
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "192.0.0.4",
            "169.254.0.1",
            "127.0.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ] {
            assert!(!public(address), "{address}");
        }
        for address in ["fd00::1", "fe80::1", "::1", "::ffff:10.0.0.1"] {
            assert!(!public(address), "{address}");
        }
    }
}
