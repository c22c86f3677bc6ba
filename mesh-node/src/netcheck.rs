//! What a node has found out about the network under it: the JSON of `mesh netcheck --json`.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use mesh_derp::map::RegionId;
use mesh_nat::report::Report;
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
    /// Round trips by region, in milliseconds.
    pub region_latency_ms: BTreeMap<RegionId, f64>,
    /// The nearest region.
    pub preferred_region: Option<RegionId>,
    /// What the gateway speaks and has given; nothing without a node that runs.
    #[serde(default)]
    pub port_mapping: PortMappingStatus,
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
