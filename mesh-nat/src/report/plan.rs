//! Which STUN servers are asked, over which family, and when.
//!
//! A *full* plan asks every region: three tries at 0, 100 and 200 ms over each family, going round the region's
//! servers. An *incremental* one asks the three regions that were nearest last time and the home: one try each, two for
//! the two nearest, four for the home, spaced by what the last answer took; over IPv6 only what answered over it.
//!
//! In a map of one or two regions a full plan asks all servers of a region at once. There are few packets to save, and
//! two servers are what it takes to see whether a NAT maps per destination.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_derp::map::{DerpMap, DerpRegion, RegionId};

use super::Report;
use crate::path::Family;

/// Between two tries of a full plan.
const STEP: Duration = Duration::from_millis(100);
/// What an answer is taken to take where none is known.
const UNKNOWN: Duration = Duration::from_millis(200);
/// Servers of one region that are asked.
const MAX_SERVERS: usize = 4;

/// One request to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) after: Duration,
    pub(super) region: RegionId,
    /// Which of the region's nodes.
    pub(super) node: usize,
    pub(super) family: Family,
}

/// Every region, over the families that there are sockets for.
pub(super) fn full(map: &DerpMap, families: &[Family]) -> Vec<Step> {
    let mut steps = Vec::new();
    let few = measurable(map).count() < 3;
    for (region, servers) in measurable(map) {
        for &family in families {
            for lap in 0..3u32 {
                let count = if few { servers.len().min(MAX_SERVERS) } else { 1 };
                for index in 0..count {
                    let turn = if few { index } else { usize::try_from(lap).unwrap_or(0) };
                    steps.push(Step { after: STEP * lap, region, node: servers[turn % servers.len()], family });
                }
            }
        }
    }
    ordered(steps)
}

/// The nearest regions of `last`, and the home.
pub(super) fn incremental(map: &DerpMap, families: &[Family], last: &Report, home: Option<RegionId>) -> Vec<Step> {
    let servers: BTreeMap<_, _> = measurable(map).collect();
    let mut near: Vec<_> = last.region_latency.iter().filter(|(region, _)| servers.contains_key(region)).collect();
    near.sort_by_key(|(_, latency)| **latency);
    let mut regions: Vec<RegionId> = near.into_iter().take(3).map(|(region, _)| *region).collect();
    if let Some(home) = home.filter(|home| servers.contains_key(home) && !regions.contains(home)) {
        regions.push(home);
    }
    let mut steps = Vec::new();
    for (rank, region) in regions.iter().enumerate() {
        let tries = if Some(*region) == home {
            4
        } else if rank < 2 {
            2
        } else {
            1
        };
        let latency = last.region_latency.get(region).copied().unwrap_or(UNKNOWN);
        let nodes = &servers[region];
        for &family in families {
            if family == Family::V6 && !last.ipv6 && (rank > 0 || !families.contains(&Family::V4)) {
                continue;
            }
            for attempt in 0..tries {
                if family == Family::V6 && !last.ipv6 && attempt > 0 {
                    continue;
                }
                let extra = if attempt > 1 { Duration::from_millis(50) * attempt } else { Duration::ZERO };
                let node = nodes[usize::try_from(attempt).unwrap_or(0) % nodes.len()];
                steps.push(Step { after: latency * 6 / 5 * attempt + extra, region: *region, node, family });
            }
        }
    }
    ordered(steps)
}

/// The regions that can only be measured by HTTPS.
pub(super) fn without_stun(map: &DerpMap) -> impl Iterator<Item = RegionId> {
    let silent =
        |region: &RegionId| map.regions.get(region).is_some_and(|region| stun_servers(region).next().is_none());
    relays(map).filter(silent)
}

/// The regions that can be measured by HTTPS.
pub(super) fn relays(map: &DerpMap) -> impl Iterator<Item = RegionId> {
    let open = |region: &DerpRegion| !region.no_measure_no_home && region.relays().next().is_some();
    map.regions.iter().filter(move |(_, region)| open(region)).map(|(id, _)| *id)
}

/// The indices of a region's STUN servers.
fn stun_servers(region: &DerpRegion) -> impl Iterator<Item = usize> {
    (0..region.nodes.len()).filter(|node| region.nodes[*node].stun_udp_port().is_some())
}

/// The regions that may be measured, each with the indices of its STUN servers.
fn measurable(map: &DerpMap) -> impl Iterator<Item = (RegionId, Vec<usize>)> {
    map.regions.iter().filter(|(_, region)| !region.no_measure_no_home).filter_map(|(id, region)| {
        let servers: Vec<_> = stun_servers(region).collect();
        (!servers.is_empty()).then_some((*id, servers))
    })
}

fn ordered(mut steps: Vec<Step>) -> Vec<Step> {
    steps.sort_by_key(|step| step.after);
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_derp::map::DerpNode;

    fn map(regions: u16, nodes: usize) -> DerpMap {
        let mut map = DerpMap::default();
        for number in 1..=regions {
            let id = RegionId::new(number).unwrap();
            let mut region = DerpRegion::new(id, "r", "R");
            region.nodes = (0..nodes).map(|node| DerpNode::new(format!("{number}{node}"), id, "192.0.2.1")).collect();
            map.regions.insert(id, region);
        }
        map
    }

    #[test]
    fn a_full_plan_tries_every_region_three_times_a_family() {
        let steps = full(&map(5, 2), &[Family::V4, Family::V6]);
        assert_eq!(steps.len(), 5 * 2 * 3);
        assert!(steps.is_sorted_by_key(|step| step.after));
        let nodes: Vec<_> = steps
            .iter()
            .filter(|step| step.region.get() == 4 && step.family == Family::V6)
            .map(|step| (step.after.as_millis(), step.node))
            .collect();
        assert_eq!(nodes, [(0, 0), (100, 1), (200, 0)]);
    }

    #[test]
    fn in_a_small_map_all_servers_are_asked_at_once() {
        let steps = full(&map(1, 2), &[Family::V4]);
        let at_once: Vec<_> = steps.iter().filter(|step| step.after.is_zero()).map(|step| step.node).collect();
        assert_eq!(at_once, [0, 1]);
    }

    #[test]
    fn servers_without_stun_and_regions_not_to_be_measured_are_left_out() {
        let mut map = map(3, 1);
        map.regions.get_mut(&RegionId::new(1).unwrap()).unwrap().nodes[0].stun_port = -1;
        map.regions.get_mut(&RegionId::new(2).unwrap()).unwrap().no_measure_no_home = true;
        assert!(full(&map, &[Family::V4]).iter().all(|step| step.region.get() == 3));
    }

    #[test]
    fn an_incremental_plan_asks_the_nearest_three_and_the_home() {
        let id = |number| RegionId::new(number).unwrap();
        let mut last = Report::default();
        for number in 1..=6 {
            last.region_latency.insert(id(number), Duration::from_millis(u64::from(number) * 10));
        }
        let steps = incremental(&map(6, 1), &[Family::V4, Family::V6], &last, Some(id(6)));
        let count =
            |number, family| steps.iter().filter(|step| step.region == id(number) && step.family == family).count();
        let v4: Vec<_> = (1..=6).map(|number| count(number, Family::V4)).collect();
        assert_eq!(v4, [2, 2, 1, 0, 0, 4]);
        let v6: Vec<_> = (1..=6).map(|number| count(number, Family::V6)).collect();
        assert_eq!(v6, [1, 0, 0, 0, 0, 0], "once, to see whether it works by now");
    }
}
