//! Which region a node makes its home, and when it moves.
//!
//! Moving costs: peers have to learn of it. So a node stays where it is unless another region is both 10 ms and a third
//! faster, judged by the best of the last five minutes against the home's latest measurement.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use mesh_derp::map::{DerpMap, RegionId};
use mesh_noise::key::NodePublic;

/// How long a measurement counts.
const MEMORY: Duration = Duration::from_secs(305);
/// A home heard within this time is alive even if it did not answer STUN.
const HEARD_RECENTLY: Duration = Duration::from_secs(8);
/// A home heard within this time is kept when nothing at all could be measured.
const HEARD_LATELY: Duration = Duration::from_secs(120);
/// A gain below this is no reason to move.
const GAIN: Duration = Duration::from_millis(10);

/// Measured latency by region.
pub(super) type Latencies = BTreeMap<RegionId, Duration>;

/// What past reports found.
#[derive(Debug, Default)]
pub(super) struct History {
    reports: VecDeque<(Instant, Latencies)>,
    /// When a region's relay last delivered something.
    heard: BTreeMap<RegionId, Instant>,
}

impl History {
    pub(super) fn note_heard(&mut self, now: Instant, region: RegionId) {
        self.heard.insert(region, now);
    }

    pub(super) fn add(&mut self, now: Instant, measured: Latencies) {
        self.reports.push_back((now, measured));
        self.reports.retain(|(at, _)| now.saturating_duration_since(*at) <= MEMORY);
    }

    /// The latest measurement has gone on.
    pub(super) fn amend(&mut self, measured: Latencies) {
        if let Some((_, latest)) = self.reports.back_mut() {
            *latest = measured;
        }
    }

    /// The home from now on, given the one until now and the one that was asked for. Call it after [`Self::add`] with the
    /// same measurement, which began at `started`.
    pub(super) fn choose(
        &self,
        now: Instant,
        started: Instant,
        map: &DerpMap,
        home: Option<RegionId>,
        forced: Option<RegionId>,
    ) -> Option<RegionId> {
        let empty = Latencies::new();
        let latest = self.reports.back().map_or(&empty, |(_, measured)| measured);
        let eligible = |region: &RegionId| map.regions.get(region).is_some_and(|found| found.may_be_home());
        let home = home.filter(eligible);
        let best = latest
            .keys()
            .filter(|region| eligible(region))
            .filter_map(|region| Some((scored(map, *region, self.minimum(*region)?), *region)))
            .min();
        let heard_within = |region: RegionId, span: Duration| {
            self.heard.get(&region).is_some_and(|at| now.saturating_duration_since(*at) <= span)
        };
        if let Some(forced) = forced.filter(eligible)
            && (latest.contains_key(&forced) || heard_within(forced, HEARD_LATELY))
        {
            return Some(forced);
        }
        let Some((best_latency, best)) = best else {
            return home.filter(|home| heard_within(*home, HEARD_LATELY));
        };
        let Some(home) = home.filter(|home| *home != best) else { return Some(best) };
        let heard = heard_within(home, HEARD_RECENTLY) || self.heard.get(&home).is_some_and(|at| *at >= started);
        let keep = match latest.get(&home) {
            Some(latency) => {
                let latency = scored(map, home, *latency);
                latency.saturating_sub(best_latency) < GAIN || best_latency * 3 > latency * 2
            }
            // Alive by what it delivers, though not measured: no reason to leave.
            None => heard,
        };
        Some(if keep { home } else { best })
    }

    fn minimum(&self, region: RegionId) -> Option<Duration> {
        self.reports.iter().filter_map(|(_, measured)| measured.get(&region)).min().copied()
    }
}

fn scored(map: &DerpMap, region: RegionId, latency: Duration) -> Duration {
    let score = map.home_params.as_ref().and_then(|params| params.region_score.get(&region)).copied();
    match score.filter(|score| score.is_finite() && *score > 0.0) {
        Some(score) => Duration::try_from_secs_f64(latency.as_secs_f64() * score).unwrap_or(Duration::MAX),
        None => latency,
    }
}

/// A home for a node that could measure nothing: always the same one for the same node, spread over all regions.
#[must_use]
pub fn fallback(map: &DerpMap, node: &NodePublic) -> Option<RegionId> {
    let regions: Vec<_> = map.regions.iter().filter(|(_, region)| region.may_be_home()).map(|(id, _)| *id).collect();
    let number = node.as_bytes().first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes));
    let index = usize::try_from(number).unwrap_or(0).checked_rem(regions.len())?;
    regions.get(index).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_derp::map::{DerpNode, DerpRegion, HomeParams};

    fn id(number: u16) -> RegionId {
        RegionId::new(number).unwrap()
    }

    fn map(regions: u16) -> DerpMap {
        let mut map = DerpMap::default();
        for number in 1..=regions {
            let mut region = DerpRegion::new(id(number), "r", "R");
            region.nodes.push(DerpNode::new(format!("{number}a"), id(number), "192.0.2.1"));
            map.regions.insert(id(number), region);
        }
        map
    }

    fn measured(pairs: &[(u16, u64)]) -> Latencies {
        pairs.iter().map(|(region, millis)| (id(*region), Duration::from_millis(*millis))).collect()
    }

    fn start() -> Instant {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        Instant::now()
    }

    fn choose(pairs: &[(u16, u64)], home: Option<u16>) -> Option<RegionId> {
        let (now, mut history) = (start(), History::default());
        history.add(now, measured(pairs));
        history.choose(now, now, &map(3), home.map(id), None)
    }

    #[test]
    fn the_nearest_region_becomes_home() {
        assert_eq!(choose(&[(1, 30), (2, 20), (3, 40)], None), Some(id(2)));
        assert_eq!(choose(&[], None), None);
    }

    #[test]
    fn moving_needs_ten_milliseconds_and_a_third() {
        assert_eq!(choose(&[(1, 20), (2, 11)], Some(1)), Some(id(1)), "9 ms better");
        assert_eq!(choose(&[(1, 100), (2, 70)], Some(1)), Some(id(1)), "less than a third better");
        assert_eq!(choose(&[(1, 100), (2, 60)], Some(1)), Some(id(2)));
    }

    #[test]
    fn a_home_that_does_not_answer_is_left_unless_its_relay_was_heard() {
        let (now, mut history) = (start(), History::default());
        history.add(now, measured(&[(2, 60)]));
        assert_eq!(history.choose(now, now, &map(3), Some(id(1)), None), Some(id(2)));
        history.note_heard(now, id(1));
        assert_eq!(history.choose(now, now, &map(3), Some(id(1)), None), Some(id(1)));
    }

    #[test]
    fn without_any_measurement_a_home_heard_lately_is_kept() {
        let (now, mut history) = (start(), History::default());
        history.note_heard(now, id(1));
        history.add(now + HEARD_LATELY, Latencies::new());
        assert_eq!(history.choose(now + HEARD_LATELY, now, &map(3), Some(id(1)), None), Some(id(1)));
        assert_eq!(history.choose(now + HEARD_LATELY * 2, now, &map(3), Some(id(1)), None), None);
    }

    #[test]
    fn the_best_of_five_minutes_counts() {
        let (now, mut history) = (start(), History::default());
        history.add(now, measured(&[(1, 50), (2, 20)]));
        let later = now + Duration::from_secs(60);
        history.add(later, measured(&[(1, 50), (2, 200)]));
        assert_eq!(history.choose(later, later, &map(3), None, None), Some(id(2)));
        let much_later = later + Duration::from_secs(400);
        history.add(much_later, measured(&[(1, 50), (2, 200)]));
        assert_eq!(history.choose(much_later, much_later, &map(3), None, None), Some(id(1)));
    }

    #[test]
    fn scores_and_closed_regions_are_heeded() {
        let (now, mut history) = (start(), History::default());
        history.add(now, measured(&[(1, 30), (2, 20)]));
        let mut map = map(2);
        map.home_params = Some(HomeParams { region_score: BTreeMap::from([(id(2), 2.0)]) });
        assert_eq!(history.choose(now, now, &map, None, None), Some(id(1)));
        map.regions.get_mut(&id(1)).unwrap().no_measure_no_home = true;
        assert_eq!(history.choose(now, now, &map, None, None), Some(id(2)));
    }

    #[test]
    fn the_fallback_is_stable_and_spread() {
        let nodes = (0..100u8).map(|byte| NodePublic::from_bytes([byte; 32]));
        let homes: std::collections::BTreeSet<_> = nodes.map(|node| fallback(&map(3), &node)).collect();
        assert_eq!(homes.len(), 3);
        assert_eq!(fallback(&DerpMap::default(), &NodePublic::ZERO), None);
    }
}
