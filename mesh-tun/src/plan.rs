//! What the host's network should look like, what it does look like, and the difference.
//!
//! Everything here is pure: a [`Host`] is what we own of the configuration of one machine, [`changes`] computes the
//! difference between found and wanted, and [`undo`] what takes it back. Applying changes is dull and belongs to the
//! system's module.

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The routing table that our routes live in, so that one rule puts them all in and out of force.
pub const TABLE: u32 = 52;

/// The main routing table.
pub const MAIN_TABLE: u32 = 254;

/// The table that the system consults last.
pub const DEFAULT_TABLE: u32 = 253;

/// The part of a host's network configuration that belongs to one tunnel interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Whether the interface is up. Removing what we own leaves this alone: the interface goes away with its device.
    pub up: bool,
    /// Addresses of the interface.
    pub addresses: BTreeSet<IpNet>,
    /// Routes through the interface.
    pub routes: BTreeSet<Route>,
    /// Policy rules.
    pub rules: BTreeSet<PolicyRule>,
}

/// A route through the tunnel interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Route {
    /// Where to.
    pub destination: IpNet,
    /// In which table.
    pub table: u32,
}

/// A rule that says which table packets are routed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyRule {
    /// The address family.
    pub family: Family,
    /// The order among rules: lower comes first.
    pub priority: u32,
    /// Only packets whose mark equals the first number in the bits of the second.
    pub mark: Option<(u32, u32)>,
    /// What happens to them.
    pub action: Action,
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What a policy rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Action {
    /// Look the route up in this table.
    Table(u32),
    /// There is no route.
    Unreachable,
}

/// One step from a configuration to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Bring the interface up.
    Up,
    /// Take the interface down.
    Down,
    /// Give the interface an address.
    AddAddress(IpNet),
    /// Take an address from the interface.
    RemoveAddress(IpNet),
    /// Add a route.
    AddRoute(Route),
    /// Remove a route.
    RemoveRoute(Route),
    /// Add a rule.
    AddRule(PolicyRule),
    /// Remove a rule.
    RemoveRule(PolicyRule),
}

/// How routes into the tunnel are kept from catching the tunnel's own datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// Routes in [`TABLE`], and rules that let packets with this mark (in the bits of the second number) pass it by.
    Policy {
        /// The mark and the bits it is compared in.
        mark: (u32, u32),
    },
    /// Routes in the main table, for systems without policy routing. Not for routes that cover other nodes' endpoints.
    Main,
}

/// The configuration of a node with these addresses and routes.
#[must_use]
pub fn wanted(addresses: &[IpNet], routes: &[IpNet], routing: Routing) -> Host {
    let table = match routing {
        Routing::Policy { .. } => TABLE,
        Routing::Main => MAIN_TABLE,
    };
    let rules = match routing {
        Routing::Policy { mark } => {
            [Family::V4, Family::V6].into_iter().flat_map(|family| rules(family, mark)).collect()
        }
        Routing::Main => BTreeSet::new(),
    };
    Host {
        up: true,
        addresses: addresses.iter().copied().collect(),
        routes: routes.iter().map(|destination| Route { destination: destination.trunc(), table }).collect(),
        rules,
    }
}

/// Marked packets see the tables that a machine without us has, and no others; the rest sees ours first.
fn rules(family: Family, mark: (u32, u32)) -> [PolicyRule; 4] {
    let rule = |priority, mark, action| PolicyRule { family, priority, mark, action };
    [
        rule(5210, Some(mark), Action::Table(MAIN_TABLE)),
        rule(5230, Some(mark), Action::Table(DEFAULT_TABLE)),
        rule(5250, Some(mark), Action::Unreachable),
        rule(5270, None, Action::Table(TABLE)),
    ]
}

/// The steps from `found` to `wanted`.
///
/// What is new comes first, from the interface upwards, so that routes find their interface up and rules their routes;
/// what goes comes after, in the opposite order.
#[must_use]
pub fn changes(found: &Host, wanted: &Host) -> Vec<Change> {
    let mut changes = Vec::new();
    if wanted.up && !found.up {
        changes.push(Change::Up);
    }
    changes.extend(wanted.addresses.difference(&found.addresses).copied().map(Change::AddAddress));
    changes.extend(wanted.routes.difference(&found.routes).copied().map(Change::AddRoute));
    changes.extend(wanted.rules.difference(&found.rules).copied().map(Change::AddRule));
    let mut removals = Vec::new();
    if found.up && !wanted.up {
        removals.push(Change::Down);
    }
    removals.extend(found.addresses.difference(&wanted.addresses).copied().map(Change::RemoveAddress));
    removals.extend(found.routes.difference(&wanted.routes).copied().map(Change::RemoveRoute));
    removals.extend(found.rules.difference(&wanted.rules).copied().map(Change::RemoveRule));
    changes.extend(removals.into_iter().rev());
    changes
}

/// The steps that take `done` back, last one first.
#[must_use]
pub fn undo(done: &[Change]) -> Vec<Change> {
    done.iter()
        .rev()
        .map(|change| match *change {
            Change::Up => Change::Down,
            Change::Down => Change::Up,
            Change::AddAddress(address) => Change::RemoveAddress(address),
            Change::RemoveAddress(address) => Change::AddAddress(address),
            Change::AddRoute(route) => Change::RemoveRoute(route),
            Change::RemoveRoute(route) => Change::AddRoute(route),
            Change::AddRule(rule) => Change::RemoveRule(rule),
            Change::RemoveRule(rule) => Change::AddRule(rule),
        })
        .collect()
}

impl Host {
    /// The same without IPv6, for hosts that have none.
    #[must_use]
    pub fn ipv4_only(mut self) -> Self {
        self.addresses.retain(|address| address.addr().is_ipv4());
        self.routes.retain(|route| route.destination.addr().is_ipv4());
        self.rules.retain(|rule| rule.family == Family::V4);
        self
    }

    /// The configuration after `change`.
    pub fn apply(&mut self, change: &Change) {
        match *change {
            Change::Up => self.up = true,
            Change::Down => self.up = false,
            Change::AddAddress(address) => drop(self.addresses.insert(address)),
            Change::RemoveAddress(address) => drop(self.addresses.remove(&address)),
            Change::AddRoute(route) => drop(self.routes.insert(route)),
            Change::RemoveRoute(route) => drop(self.routes.remove(&route)),
            Change::AddRule(rule) => drop(self.rules.insert(rule)),
            Change::RemoveRule(rule) => drop(self.rules.remove(&rule)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POLICY: Routing = Routing::Policy { mark: (0x8_0000, 0xff_0000) };

    #[test]
    fn a_fresh_interface_is_built_from_the_bottom() {
        let wanted = wanted(&[net("100.64.0.1/32")], &[net("100.64.0.2/32")], POLICY);
        let changes = changes(&Host::default(), &wanted);
        assert_eq!(changes[0], Change::Up);
        assert_eq!(changes[1], Change::AddAddress(net("100.64.0.1/32")));
        assert_eq!(changes[2], Change::AddRoute(Route { destination: net("100.64.0.2/32"), table: TABLE }));
        assert_eq!(changes.len(), 3 + 8, "and four rules a family");
    }

    #[test]
    fn a_right_configuration_needs_no_change() {
        let host = wanted(&[net("100.64.0.1/32")], &[net("fd7a::/48")], POLICY);
        assert_eq!(changes(&host, &host), []);
    }

    #[test]
    fn one_more_peer_is_one_more_route() {
        let before = wanted(&[net("100.64.0.1/32")], &[net("100.64.0.2/32")], POLICY);
        let after = wanted(&[net("100.64.0.1/32")], &[net("100.64.0.2/32"), net("100.64.0.3/32")], POLICY);
        let route = Route { destination: net("100.64.0.3/32"), table: TABLE };
        assert_eq!(changes(&before, &after), [Change::AddRoute(route)]);
    }

    #[test]
    fn marked_packets_never_reach_our_table() {
        let host = wanted(&[], &[], POLICY);
        for family in [Family::V4, Family::V6] {
            let ours = host.rules.iter().find(|rule| rule.family == family && rule.action == Action::Table(TABLE));
            let stop = host.rules.iter().find(|rule| rule.family == family && rule.action == Action::Unreachable);
            let (ours, stop) = (ours.unwrap(), stop.unwrap());
            assert!(stop.priority < ours.priority && stop.mark.is_some() && ours.mark.is_none());
        }
        assert!(wanted(&[], &[], Routing::Main).rules.is_empty());
    }

    proptest! {
        #[test]
        fn applying_the_changes_gives_the_wanted_and_undoing_them_the_found(found in any_host(), wanted in any_host()) {
            let changes = changes(&found, &wanted);
            let mut host = found.clone();
            changes.iter().for_each(|change| host.apply(change));
            prop_assert_eq!(&host, &wanted);
            undo(&changes).iter().for_each(|change| host.apply(change));
            prop_assert_eq!(&host, &found);
        }
    }

    fn any_host() -> impl Strategy<Value = Host> {
        let nets = || proptest::collection::vec((0..4_u8).prop_map(|last| net(&format!("100.64.0.{last}/32"))), 0..4);
        (any::<bool>(), nets(), nets(), any::<bool>()).prop_map(|(up, addresses, routes, policy)| {
            let routing = if policy { POLICY } else { Routing::Main };
            Host { up, ..wanted(&addresses, &routes, routing) }
        })
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }
}
