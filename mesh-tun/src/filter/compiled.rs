//! Rules in the form that is asked once a packet.
//!
//! ```text
//!   source ──► prefixes that cover it ──► group of each ─┐
//!                                                        ├─► opening of (group, destination): ports by protocol
//!   destination ──► prefixes that cover it ──────────────┘
//! ```
//!
//! Sources that occur in the same rules form one group, so a rule with many sources and many destinations costs their
//! sum, not their product. All that a group's rules open of one destination prefix is merged into one opening. A question
//! therefore costs a search for the source, one for the destination, and a probe for each pair of prefixes found: its
//! cost depends on how many prefixes cover the two addresses, which in practice are one to three, and not on the number
//! of rules.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::prefixes::{Prefixes, Slots, index};
use super::rule::{ALL_PORTS, Addresses, Rule};
use crate::packet::Protocol;

/// From so many ranges on, a bitmap of all ports is quicker, and at most twice the size.
const RANGES_MAX: usize = 1024;

/// Compiled rules.
#[derive(Debug, Default)]
pub(super) struct Compiled {
    /// Gives groups.
    sources: Prefixes,
    /// Gives numbers of destination prefixes.
    destinations: Prefixes,
    /// From group and destination to a position in `openings`.
    pairs: Slots<(u32, u32)>,
    openings: Vec<Opening>,
    lists: PortLists,
}

/// What is open of a destination prefix to a group of sources.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Opening {
    tcp: Ports,
    udp: Ports,
    sctp: Ports,
    /// The protocols that are open as a whole, one bit each; a position in [`PortLists::whole`].
    whole: u32,
}

/// A set of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Ports {
    None,
    Range(u16, u16),
    /// A position in [`PortLists::ranges`].
    Ranges(u32),
    /// A position in [`PortLists::bitmaps`].
    Bitmap(u32),
}

/// What openings share.
#[derive(Debug, Default)]
struct PortLists {
    whole: Vec<[u64; 4]>,
    /// Disjoint and in order.
    ranges: Vec<Box<[(u16, u16)]>>,
    bitmaps: Vec<Box<[u64]>>,
}

/// What rules open, as they are read.
#[derive(Debug, Default)]
struct Draft {
    tcp: Vec<(u16, u16)>,
    udp: Vec<(u16, u16)>,
    sctp: Vec<(u16, u16)>,
    whole: [u64; 4],
}

impl Compiled {
    /// Compiles what `rules` open of the prefixes in `local`.
    pub(super) fn new(rules: &[Rule], local: &[IpNet]) -> Self {
        let mut compiled = Self::default();
        let mut numbers = HashMap::new();
        let mut by_source: BTreeMap<IpNet, Vec<usize>> = BTreeMap::new();
        let mut destinations = Vec::with_capacity(rules.len());
        for (position, rule) in rules.iter().enumerate() {
            let found = numbered_destinations(rule, local, &mut numbers);
            if !found.is_empty() {
                for prefix in rule.sources.iter().flat_map(Addresses::prefixes) {
                    let list = by_source.entry(prefix).or_default();
                    // Overlapping sources of one rule would list it twice.
                    if list.last() != Some(&position) {
                        list.push(position);
                    }
                }
            }
            destinations.push(found);
        }
        let mut groups: HashMap<Vec<usize>, u32> = HashMap::new();
        let mut sources = Vec::with_capacity(by_source.len());
        for (prefix, list) in by_source {
            let next = index(groups.len());
            sources.push((prefix, *groups.entry(list).or_insert(next)));
        }
        compiled.sources = Prefixes::new(sources);
        compiled.destinations = Prefixes::new(numbers);
        let groups = groups.into_iter().map(|(list, group)| (group, list)).collect();
        compiled.open(rules, &destinations, groups);
        compiled
    }

    /// Fills in what each group's rules open.
    fn open(&mut self, rules: &[Rule], destinations: &[NumberedDestinations], groups: BTreeMap<u32, Vec<usize>>) {
        let mut interner = Interner::default();
        let mut pairs = Vec::new();
        for (group, list) in groups {
            let mut drafts: BTreeMap<u32, Draft> = BTreeMap::new();
            for position in list {
                for (destination, ports) in &destinations[position] {
                    drafts.entry(*destination).or_default().add(&rules[position], ports);
                }
            }
            for (destination, draft) in drafts {
                pairs.push(((group, destination), interner.opening(draft, self)));
            }
        }
        self.pairs = Slots::with_room(pairs.len());
        for (pair, opening) in pairs {
            self.pairs.insert(pair, opening);
        }
    }

    /// Whether a rule opens `port` of `destination` to `source`.
    pub(super) fn opens_port(&self, source: IpAddr, destination: IpAddr, protocol: Protocol, port: u16) -> bool {
        self.any(source, destination, |opening| match protocol {
            Protocol::TCP => self.lists.contains(opening.tcp, port),
            Protocol::UDP => self.lists.contains(opening.udp, port),
            Protocol::SCTP => self.lists.contains(opening.sctp, port),
            _ => false,
        })
    }

    /// Whether a rule opens the whole of `protocol` of `destination` to `source`.
    pub(super) fn opens_protocol(&self, source: IpAddr, destination: IpAddr, protocol: Protocol) -> bool {
        let (word, bit) = bit(protocol);
        self.any(source, destination, |opening| self.lists.whole[opening.whole as usize][word] & bit != 0)
    }

    /// Whether a rule opens anything of `destination` to `source`.
    pub(super) fn opens_anything(&self, source: IpAddr, destination: IpAddr) -> bool {
        self.any(source, destination, |_| true)
    }

    fn any(&self, source: IpAddr, destination: IpAddr, test: impl Fn(&Opening) -> bool) -> bool {
        let destinations = self.destinations.covering(destination);
        self.sources.covering(source).any(|group| {
            let mut openings = destinations.clone().filter_map(|destination| self.pairs.get((group, destination)));
            openings.any(|opening| test(&self.openings[opening as usize]))
        })
    }
}

/// The destination prefixes of one rule by number, with their ports.
type NumberedDestinations = Vec<(u32, RangeInclusive<u16>)>;

/// The destinations of `rule` that have to do with `local`; no packet for others is ever judged by rules.
fn numbered_destinations(rule: &Rule, local: &[IpNet], numbers: &mut HashMap<IpNet, u32>) -> NumberedDestinations {
    let mut found = Vec::new();
    for open in &rule.destinations {
        for prefix in open.addresses.prefixes() {
            if local.iter().any(|local| local.contains(&prefix) || prefix.contains(local)) {
                let next = index(numbers.len());
                found.push((*numbers.entry(prefix).or_insert(next), open.ports.clone()));
            }
        }
    }
    found
}

impl Draft {
    fn add(&mut self, rule: &Rule, ports: &RangeInclusive<u16>) {
        for (protocol, list) in
            [(Protocol::TCP, &mut self.tcp), (Protocol::UDP, &mut self.udp), (Protocol::SCTP, &mut self.sctp)]
        {
            if rule.covers(protocol) && !ports.is_empty() {
                list.push((*ports.start(), *ports.end()));
            }
        }
        if *ports == ALL_PORTS {
            for protocol in (0..=u8::MAX).map(Protocol).filter(|protocol| rule.covers(*protocol)) {
                let (word, bit) = bit(protocol);
                self.whole[word] |= bit;
            }
        }
    }
}

fn bit(protocol: Protocol) -> (usize, u64) {
    (usize::from(protocol.0 / 64), 1 << (protocol.0 % 64))
}

/// Finds equal openings again while rules are compiled.
#[derive(Debug, Default)]
struct Interner {
    openings: HashMap<Opening, u32>,
    whole: HashMap<[u64; 4], u32>,
    ports: HashMap<Vec<(u16, u16)>, Ports>,
}

impl Interner {
    fn opening(&mut self, draft: Draft, compiled: &mut Compiled) -> u32 {
        let lists = &mut compiled.lists;
        let whole = *self.whole.entry(draft.whole).or_insert_with(|| {
            lists.whole.push(draft.whole);
            index(lists.whole.len() - 1)
        });
        let [tcp, udp, sctp] = [draft.tcp, draft.udp, draft.sctp].map(|ranges| self.ports(merged(ranges), lists));
        let opening = Opening { tcp, udp, sctp, whole };
        *self.openings.entry(opening).or_insert_with_key(|opening| {
            compiled.openings.push(opening.clone());
            index(compiled.openings.len() - 1)
        })
    }

    fn ports(&mut self, ranges: Vec<(u16, u16)>, lists: &mut PortLists) -> Ports {
        match *ranges {
            [] => Ports::None,
            [(first, last)] => Ports::Range(first, last),
            _ => *self.ports.entry(ranges).or_insert_with_key(|ranges| lists.add(ranges)),
        }
    }
}

/// The same ports as disjoint ranges in order.
fn merged(mut ranges: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if u32::from(first) <= u32::from(before.1) + 1 => before.1 = before.1.max(last),
            Some(_) | None => merged.push((first, last)),
        }
    }
    merged
}

impl PortLists {
    fn add(&mut self, ranges: &[(u16, u16)]) -> Ports {
        if ranges.len() < RANGES_MAX {
            self.ranges.push(ranges.into());
            return Ports::Ranges(index(self.ranges.len() - 1));
        }
        let mut bitmap = vec![0_u64; 1024];
        for port in ranges.iter().flat_map(|(first, last)| *first..=*last) {
            bitmap[usize::from(port / 64)] |= 1 << (port % 64);
        }
        self.bitmaps.push(bitmap.into());
        Ports::Bitmap(index(self.bitmaps.len() - 1))
    }

    fn contains(&self, ports: Ports, port: u16) -> bool {
        match ports {
            Ports::None => false,
            Ports::Range(first, last) => (first..=last).contains(&port),
            Ports::Ranges(at) => {
                let ranges = &self.ranges[at as usize];
                let begun = ranges.partition_point(|(first, _)| *first <= port);
                begun.checked_sub(1).is_some_and(|last| port <= ranges[last].1)
            }
            Ports::Bitmap(at) => self.bitmaps[at as usize][usize::from(port / 64)] & 1 << (port % 64) != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::Destination;
    use proptest::prelude::*;

    #[test]
    fn sources_of_the_same_rules_share_their_openings() {
        let sources = (0..=255).map(|last| IpAddr::from([100, 64, 1, last]).into()).collect();
        let destinations = (0..=255).map(|last| open(&format!("10.0.0.{last}"), 22..=22)).collect();
        let rule = Rule { sources, destinations, protocols: vec![Protocol::TCP] };
        let compiled = Compiled::new(&[rule], &["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(compiled.openings.len(), 1);
        let pairs = (0..256).filter(|destination| compiled.pairs.get((0, *destination)).is_some()).count();
        assert_eq!(pairs, 256);
        assert!(compiled.opens_port(ip("100.64.1.9"), ip("10.0.0.200"), Protocol::TCP, 22));
    }

    #[test]
    fn destinations_elsewhere_are_left_out() {
        let rule =
            Rule { sources: vec![Addresses::ANY], destinations: vec![open("10.0.0.1", 22..=22)], protocols: vec![] };
        let compiled = Compiled::new(&[rule], &["100.64.0.1/32".parse().unwrap()]);
        assert!(!compiled.opens_anything(ip("100.64.0.2"), ip("10.0.0.1")));
        assert!(compiled.openings.is_empty());
    }

    proptest! {
        #[test]
        fn merged_ranges_hold_the_same_ports(
            ranges in proptest::collection::vec((0..40_u16, 0..6_u16), 0..12), many: bool,
        ) {
            let mut ranges: Vec<_> = ranges.into_iter().map(|(first, more)| (first, first + more)).collect();
            if many {
                // Enough of them, each alone, for a bitmap.
                ranges.extend((0..2000).map(|n| (100 + 2 * n, 100 + 2 * n)));
            }
            let (mut lists, mut interner) = (PortLists::default(), Interner::default());
            let ports = interner.ports(merged(ranges.clone()), &mut lists);
            prop_assert_eq!(matches!(ports, Ports::Bitmap(_)), many);
            for port in (0..200).chain([4000, 4101, u16::MAX]) {
                let expected = ranges.iter().any(|(first, last)| (*first..=*last).contains(&port));
                prop_assert_eq!(lists.contains(ports, port), expected, "{}", port);
            }
        }
    }

    fn open(addresses: &str, ports: RangeInclusive<u16>) -> Destination {
        Destination { addresses: addresses.parse().unwrap(), ports }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }
}
