//! What a node has found out about the network under it: the JSON of `mesh netcheck --json`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use mesh_derp::map::RegionId;
use mesh_nat::report::Report;
use mesh_nat::{Allocation, Behaviour, Filtering, Mapping};
use serde::{Deserialize, Serialize};

use crate::status::PortMappingStatus;

/// A [`Report`] in the form that scripts read.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct NetcheckReport {
    /// Whether a datagram came back at all.
    pub udp: bool,
    /// Whether one came back over IPv4.
    pub ipv4: bool,
    /// Whether one came back over IPv6.
    pub ipv6: bool,
    /// Our IPv4 address as the outside sees it.
    pub global_v4: Option<SocketAddr>,
    /// Our IPv6 address as the outside sees it.
    pub global_v6: Option<SocketAddr>,
    /// Whether our address looks different to different destinations; unknown with fewer than two answers.
    pub mapping_varies_by_dest_ip: Option<bool>,
    /// Whether a NAT stands between us and the outside; unknown if nobody has told.
    #[serde(default)]
    pub behind_nat: Option<bool>,
    /// What the NAT does with IPv4.
    #[serde(default)]
    pub nat_v4: NatReport,
    /// What the NAT does with IPv6.
    #[serde(default)]
    pub nat_v6: NatReport,
    /// Whether somebody answers HTTP requests in others' place until one has signed in; none if it was not asked.
    #[serde(default)]
    pub captive_portal: Option<bool>,
    /// How long it took, in milliseconds.
    #[serde(default)]
    pub took_ms: f64,
    /// Round trips by region, in milliseconds.
    pub region_latency_ms: BTreeMap<RegionId, f64>,
    /// The nearest region.
    pub preferred_region: Option<RegionId>,
    /// What the gateway speaks and has given; nothing without a node that runs.
    #[serde(default)]
    pub port_mapping: PortMappingStatus,
}

/// What a NAT does, in the words of RFC 4787. Absent is unknown.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NatReport {
    /// Whether one outside address is good for all peers.
    pub easy: Option<bool>,
    /// What an outside port depends on: `endpoint-independent`, `address-dependent`, `address-and-port-dependent`.
    pub mapping: Option<String>,
    /// Where that is not known, whether two ports of the only STUN server saw the same.
    pub steady: bool,
    /// Who may send to an outside port, in the same words.
    pub filtering: Option<String>,
    /// Which ports are given: `preserving`, `sequential`, `block`, `random`.
    pub allocation: Option<String>,
    /// From one port to the next, where they are given in order.
    pub stride: Option<i16>,
    /// The lowest and the highest port that may be given: an estimate.
    pub ports: Option<(u16, u16)>,
    /// Whether hosts behind the NAT reach each other by their outside addresses.
    pub hairpin: Option<bool>,
}

impl From<&Behaviour> for NatReport {
    fn from(nat: &Behaviour) -> Self {
        let mapping = |mapping| match mapping {
            Mapping::EndpointIndependent => INDEPENDENT,
            Mapping::AddressDependent => BY_ADDRESS,
            Mapping::AddressAndPortDependent => BY_PORT,
        };
        let filtering = |filtering| match filtering {
            Filtering::EndpointIndependent => INDEPENDENT,
            Filtering::AddressDependent => BY_ADDRESS,
            Filtering::AddressAndPortDependent => BY_PORT,
        };
        let (allocation, stride) = match nat.allocation {
            None => (None, None),
            Some(Allocation::Preserving) => (Some("preserving"), None),
            Some(Allocation::Sequential { stride }) => (Some("sequential"), Some(stride)),
            Some(Allocation::Block) => (Some("block"), None),
            Some(Allocation::Random) => (Some("random"), None),
        };
        Self {
            easy: nat.is_easy(),
            mapping: nat.mapping.map(mapping).map(str::to_owned),
            steady: nat.steady,
            filtering: nat.filtering.map(filtering).map(str::to_owned),
            allocation: allocation.map(str::to_owned),
            stride,
            ports: nat.ports.map(|ports| (ports.first, ports.last)),
            hairpin: nat.hairpin,
        }
    }
}

/// RFC 4787's words.
const INDEPENDENT: &str = "endpoint-independent";
const BY_ADDRESS: &str = "address-dependent";
const BY_PORT: &str = "address-and-port-dependent";

impl NetcheckReport {
    /// What it means, one sentence a line, for people.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.udp {
            lines.push("UDP: blocked; packets to peers go through relays".to_owned());
        }
        if self.captive_portal == Some(true) {
            lines.push("HTTP: answered by a portal of this network; sign in with a browser".to_owned());
        }
        if self.udp {
            lines.extend(self.nat_words());
        }
        lines
    }

    fn nat_words(&self) -> Vec<String> {
        let nat = &self.nat_v4;
        if self.behind_nat == Some(false) {
            return vec!["NAT: none over IPv4".to_owned()];
        }
        let mut lines = Vec::new();
        lines.push(match (nat.easy, nat.mapping.as_deref()) {
            (Some(true), _) => "NAT: easy; one outside port is good for all peers".to_owned(),
            (Some(false), Some(BY_ADDRESS)) => "NAT: hard; another outside port for each address".to_owned(),
            (Some(false), Some(_)) => "NAT: hard; another outside port for each address and port".to_owned(),
            (Some(false), None) => "NAT: hard; outside ports depend on the destination".to_owned(),
            (None, _) if nat.steady => {
                "NAT: likely easy; both ports of the STUN server saw one outside port, another address would tell"
                    .to_owned()
            }
            (None, _) => "NAT: unknown; it takes two STUN servers at different addresses to tell".to_owned(),
        });
        let ports = nat.ports.map_or_else(String::new, |(first, last)| format!(", about {first} to {last}"));
        match (nat.allocation.as_deref(), nat.stride) {
            (Some("preserving"), _) => lines.push("outside ports: the inside port where it is free".to_owned()),
            (Some("sequential"), Some(stride)) => lines.push(format!("outside ports: in order, {stride:+} each")),
            (Some("block"), _) => lines.push(format!("outside ports: any of a block{ports}")),
            (Some("random"), _) => lines.push(format!("outside ports: random{ports}")),
            _ => {}
        }
        lines.extend(nat.filtering.as_deref().map(|filtering| match filtering {
            INDEPENDENT => "lets in: everyone".to_owned(),
            BY_ADDRESS => "lets in: addresses that were sent to".to_owned(),
            _ => "lets in: addresses and ports that were sent to".to_owned(),
        }));
        lines.extend(nat.hairpin.map(|works| {
            format!(
                "hairpinning: {}; hosts behind it {} each other by outside addresses",
                if works { "yes" } else { "no" },
                if works { "reach" } else { "do not reach" }
            )
        }));
        lines
    }
}

impl From<&Report> for NetcheckReport {
    fn from(report: &Report) -> Self {
        Self {
            udp: report.udp,
            ipv4: report.ipv4,
            ipv6: report.ipv6,
            global_v4: report.global_v4,
            global_v6: report.global_v6,
            mapping_varies_by_dest_ip: report.mapping_varies_by_dest_ip,
            behind_nat: report.translated_v4,
            nat_v4: NatReport::from(&report.nat_v4),
            nat_v6: NatReport::from(&report.nat_v6),
            captive_portal: report.captive_portal,
            took_ms: report.took.as_secs_f64() * 1e3,
            region_latency_ms: report
                .region_latency
                .iter()
                .map(|(region, latency)| (*region, latency.as_secs_f64() * 1e3))
                .collect(),
            preferred_region: report.preferred,
            port_mapping: PortMappingStatus::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reads_what_the_nat_does() {
        let nat_v4 = Behaviour {
            mapping: Some(Mapping::AddressAndPortDependent),
            filtering: Some(Filtering::AddressAndPortDependent),
            allocation: Some(Allocation::Sequential { stride: 2 }),
            ..Behaviour::default()
        };
        let report = Report { udp: true, translated_v4: Some(true), nat_v4, ..Report::default() };
        let words = NetcheckReport::from(&report).words();
        assert_eq!(
            words,
            [
                "NAT: hard; another outside port for each address and port",
                "outside ports: in order, +2 each",
                "lets in: addresses and ports that were sent to"
            ]
        );
        let json = serde_json::to_value(NetcheckReport::from(&report)).unwrap();
        assert_eq!(json["nat_v4"]["mapping"], "address-and-port-dependent");
        assert_eq!(json["nat_v4"]["stride"], 2);
    }

    #[test]
    fn one_server_with_two_ports_makes_a_nat_likely_easy_and_no_more() {
        let nat_v4 = Behaviour { steady: true, ..Behaviour::default() };
        let report =
            NetcheckReport::from(&Report { udp: true, translated_v4: Some(true), nat_v4, ..Report::default() });
        assert_eq!((report.nat_v4.easy, report.nat_v4.steady), (None, true));
        assert!(report.words()[0].starts_with("NAT: likely easy"));
    }

    #[test]
    fn a_blocked_network_and_a_portal_are_named() {
        let report = Report { captive_portal: Some(true), ..Report::default() };
        let words = NetcheckReport::from(&report).words();
        assert_eq!(words.len(), 2);
        assert!(words[0].contains("blocked") && words[1].contains("portal"), "{words:?}");
        let open = Report { udp: true, translated_v4: Some(false), ..Report::default() };
        assert_eq!(NetcheckReport::from(&open).words(), ["NAT: none over IPv4"]);
    }
}
