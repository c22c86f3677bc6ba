//! What STUN servers saw of our sockets, and what follows about the NAT in between (RFC 5780 §4, RFC 4787).
//!
//! One socket asks several servers. What they see decides how the NAT maps:
//!
//! | another address of a server | another port of the same server | mapping |
//! |---|---|---|
//! | same | | endpoint-independent |
//! | differs | same | address-dependent |
//! | | differs | address-and-port-dependent |
//! | differs | not asked | depends on the destination, unknown how far |
//! | not asked | same | unknown, likely endpoint-independent |
//!
//! A server inside our own network sees our own address; where others are outside, it says nothing about the NAT.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::allocation::{self, Given};
use crate::behaviour::{Behaviour, Mapping};
use crate::path::{Family, SocketId};

/// Sockets that were opened for this beside, from which ports are judged by themselves.
const ENOUGH_EXTRA: usize = 3;

/// One server's view of one socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sighting {
    pub(super) socket: SocketId,
    /// The socket's own port; 0 if unknown.
    pub(super) own: u16,
    /// Whether the socket was opened for this report.
    pub(super) extra: bool,
    /// Counts first requests of a socket to a server, in the order in which they left.
    pub(super) order: u32,
    pub(super) server: SocketAddr,
    pub(super) mapped: SocketAddr,
}

/// All that was seen in one report.
#[derive(Debug, Default)]
pub(super) struct Sightings {
    seen: Vec<Sighting>,
    /// This host's own addresses.
    own: BTreeSet<IpAddr>,
}

/// What is known about a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Compared {
    other_ip_same: bool,
    other_ip_differs: bool,
    other_port_same: bool,
    other_port_differs: bool,
}

impl Compared {
    const fn differs(&self) -> bool {
        self.other_ip_differs || self.other_port_differs
    }
}

impl Sightings {
    pub(super) fn new(own: BTreeSet<IpAddr>) -> Self {
        Self { seen: Vec::new(), own }
    }

    /// Adds one; a socket's second answer from the same server is not news.
    pub(super) fn add(&mut self, sighting: Sighting) {
        let known = |seen: &Sighting| seen.socket == sighting.socket && seen.server == sighting.server;
        if !self.seen.iter().any(known) {
            self.seen.push(sighting);
        }
    }

    /// What servers saw of sockets of `family`, in the order of the requests.
    fn of(&self, family: Family) -> Vec<Sighting> {
        let ours = |seen: &&Sighting| Family::of(&seen.server) == family;
        let mut found: Vec<_> = self.seen.iter().filter(ours).copied().collect();
        let inside = |seen: &Sighting| self.own.contains(&seen.mapped.ip());
        if found.iter().any(|seen| !inside(seen)) {
            found.retain(|seen| !inside(seen));
        }
        found.sort_by_key(|seen| seen.order);
        found
    }

    /// The servers that have seen `socket`.
    pub(super) fn servers(&self, socket: SocketId) -> impl Iterator<Item = SocketAddr> {
        self.seen.iter().filter(move |seen| seen.socket == socket).map(|seen| seen.server)
    }

    /// `socket` as `server` saw it.
    pub(super) fn mapped(&self, socket: SocketId, server: SocketAddr) -> Option<SocketAddr> {
        self.seen.iter().find(|seen| seen.socket == socket && seen.server == server).map(|seen| seen.mapped)
    }

    /// Whether an address of ours looks different from outside; `None` if nobody has told.
    pub(super) fn translated(&self, family: Family) -> Option<bool> {
        if self.own.is_empty() {
            return None;
        }
        self.of(family).first().map(|seen| !self.own.contains(&seen.mapped.ip()))
    }

    /// Whether an answer of `server` could tell how the NAT maps, where that is not known yet.
    pub(super) fn could_tell(&self, family: Family, server: SocketAddr) -> bool {
        let found = self.of(family);
        let compared = compare(&found);
        if mapping(&compared, self.translated(family)).is_some() || found.iter().any(|seen| seen.server == server) {
            return false;
        }
        let same_ip = found.iter().any(|seen| seen.server.ip() == server.ip());
        if compared.other_ip_differs { same_ip } else { true }
    }

    /// Everything about the NAT that can be concluded for `family`.
    pub(super) fn behaviour(&self, family: Family) -> Behaviour {
        let found = self.of(family);
        let compared = compare(&found);
        let translated = self.translated(family);
        let (allocation, ports) =
            if translated == Some(false) { (None, None) } else { allocation::estimate(&given(&found)) };
        let mapping = mapping(&compared, translated);
        Behaviour {
            mapping,
            varies: mapping.is_none() && compared.differs(),
            steady: mapping.is_none() && compared.other_port_same && !compared.differs(),
            allocation,
            ports,
            ..Behaviour::default()
        }
    }
}

fn compare(found: &[Sighting]) -> Compared {
    let mut compared = Compared::default();
    for (index, one) in found.iter().enumerate() {
        for other in found[index + 1..].iter().filter(|other| other.socket == one.socket) {
            let same = one.mapped == other.mapped;
            let fact = match (one.server.ip() == other.server.ip(), same) {
                (true, true) => &mut compared.other_port_same,
                (true, false) => &mut compared.other_port_differs,
                (false, true) => &mut compared.other_ip_same,
                (false, false) => &mut compared.other_ip_differs,
            };
            *fact = true;
        }
    }
    compared
}

fn mapping(compared: &Compared, translated: Option<bool>) -> Option<Mapping> {
    let Compared { other_ip_same, other_ip_differs, other_port_same, other_port_differs } = *compared;
    if translated == Some(false) && !other_ip_differs && !other_port_differs {
        return Some(Mapping::EndpointIndependent);
    }
    match (other_ip_same, other_ip_differs, other_port_same, other_port_differs) {
        // One port towards two addresses, and another towards a third: no behaviour that has a name.
        (true, true, ..) | (true, _, _, true) | (_, _, true, true) => None,
        (_, _, _, true) => Some(Mapping::AddressAndPortDependent),
        (true, ..) => Some(Mapping::EndpointIndependent),
        (_, true, true, _) => Some(Mapping::AddressDependent),
        _ => None,
    }
}

/// Each new mapping's port, oldest first. Empty where the outside address itself changes.
fn given(found: &[Sighting]) -> Vec<Given> {
    let mut outside = found.iter().map(|seen| seen.mapped.ip());
    let first = outside.next();
    if outside.any(|ip| Some(ip) != first) {
        return Vec::new();
    }
    let extra: BTreeSet<_> = found.iter().filter(|seen| seen.extra).map(|seen| seen.socket).collect();
    let only_extra = extra.len() >= ENOUGH_EXTRA;
    let mut known: BTreeMap<SocketId, BTreeSet<SocketAddr>> = BTreeMap::new();
    let mut given = Vec::new();
    for seen in found.iter().filter(|seen| seen.extra || !only_extra) {
        let mappings = known.entry(seen.socket).or_default();
        let first = mappings.is_empty();
        if mappings.insert(seen.mapped) {
            let own = Some(seen.own).filter(|own| first && *own != 0);
            given.push(Given { own, port: seen.mapped.port() });
        }
    }
    given
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::behaviour::Allocation;

    /// Sightings of one socket, each `(server, mapped)`.
    fn seen(pairs: &[(&str, &str)]) -> Sightings {
        let mut sightings = Sightings::new(["10.0.0.2".parse().unwrap()].into());
        for (order, (server, mapped)) in (0..).zip(pairs) {
            sightings.add(Sighting {
                socket: SocketId(0),
                own: 41641,
                extra: false,
                order,
                server: server.parse().unwrap(),
                mapped: mapped.parse().unwrap(),
            });
        }
        sightings
    }

    fn behaviour(pairs: &[(&str, &str)]) -> Behaviour {
        seen(pairs).behaviour(Family::V4)
    }

    const A1: &str = "192.0.2.1:3478";
    const A2: &str = "192.0.2.1:3479";
    const B1: &str = "192.0.2.2:3478";
    const C1: &str = "192.0.2.3:3478";

    #[test]
    fn what_other_addresses_and_ports_see_tells_how_a_nat_maps() {
        let (x, y, z) = ("203.0.113.5:1", "203.0.113.5:2", "203.0.113.5:3");
        let cases = [
            (vec![(A1, x), (B1, x)], Some(Mapping::EndpointIndependent), false),
            (vec![(A1, x), (A2, x), (B1, x)], Some(Mapping::EndpointIndependent), false),
            (vec![(A1, x), (A2, x), (B1, y)], Some(Mapping::AddressDependent), false),
            (vec![(A1, x), (A2, y), (B1, z)], Some(Mapping::AddressAndPortDependent), false),
            (vec![(A1, x), (A2, y)], Some(Mapping::AddressAndPortDependent), false),
            (vec![(A1, x), (B1, y)], None, true),
            (vec![(A1, x), (A2, x)], None, false),
            (vec![(A1, x)], None, false),
            (vec![(A1, x), (B1, x), (C1, y)], None, true),
        ];
        for (pairs, mapping, varies) in cases {
            let found = behaviour(&pairs);
            assert_eq!((found.mapping, found.varies), (mapping, varies), "{pairs:?}");
            assert_eq!(found.steady, pairs == [(A1, x), (A2, x)], "{pairs:?}");
        }
    }

    #[test]
    fn without_a_nat_one_server_is_enough() {
        let own = "10.0.0.2:41641";
        let found = seen(&[(A1, own)]);
        assert_eq!(found.translated(Family::V4), Some(false));
        assert_eq!(found.behaviour(Family::V4).mapping, Some(Mapping::EndpointIndependent));
        assert_eq!(found.behaviour(Family::V4).allocation, None);
        assert_eq!(found.translated(Family::V6), None);
    }

    #[test]
    fn a_server_in_our_own_network_does_not_make_a_nat_look_hard() {
        let found = seen(&[(A1, "10.0.0.2:41641"), (B1, "203.0.113.5:9"), (C1, "203.0.113.5:9")]);
        assert_eq!(found.translated(Family::V4), Some(true));
        assert_eq!(found.behaviour(Family::V4).mapping, Some(Mapping::EndpointIndependent));
    }

    #[test]
    fn only_servers_that_could_tell_are_worth_waiting_for() {
        let (x, y) = ("203.0.113.5:1", "203.0.113.5:2");
        let could = |found: &Sightings, server: &str| found.could_tell(Family::V4, server.parse().unwrap());
        let one = seen(&[(A1, x)]);
        assert!(could(&one, A2) && could(&one, B1) && !could(&one, A1));
        let differs = seen(&[(A1, x), (B1, y)]);
        assert!(could(&differs, A2) && !could(&differs, C1));
        assert!(!could(&seen(&[(A1, x), (B1, x)]), C1));
    }

    #[test]
    fn a_pool_of_outside_addresses_hides_the_order_of_ports() {
        let found = behaviour(&[(A1, "203.0.113.5:1000"), (A2, "203.0.113.6:40000"), (B1, "203.0.113.7:20000")]);
        assert_eq!(found.is_easy(), Some(false));
        assert_eq!((found.allocation, found.ports), (None, None));
    }

    #[test]
    fn ports_of_the_socket_in_use_count_only_where_too_few_others_were_opened() {
        let mut found = seen(&[(A1, "203.0.113.5:41641")]);
        assert_eq!(found.behaviour(Family::V4).allocation, Some(Allocation::Preserving));
        for number in 0..4u16 {
            let mapped = SocketAddr::from(([203, 0, 113, 5], 7000 + number));
            let (socket, server) = (SocketId(10 + number), A1.parse().unwrap());
            let order = u32::from(number) + 1;
            found.add(Sighting { socket, own: 9, extra: true, order, server, mapped });
        }
        assert_eq!(found.behaviour(Family::V4).allocation, Some(Allocation::Sequential { stride: 1 }));
    }
}
