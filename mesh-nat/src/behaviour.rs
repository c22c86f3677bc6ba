//! What a NAT does, in the words of RFC 4787: how it maps, which ports it gives, whom it lets in.
//!
//! The three are independent of each other. Which of two NATs can be punched through, and how, follows from them:
//! whoever maps independently of the destination has one address that all peers can use; whoever does not has ports that
//! a peer must guess, which is easy where they are given in order, possible where they are few, and a matter of luck
//! where they are many.

use std::time::Duration;

/// What the outside port of a flow depends on, besides the socket it comes from (RFC 4787 §4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mapping {
    /// Nothing: one port towards everyone. Also where there is no NAT.
    EndpointIndependent,
    /// The destination's address.
    AddressDependent,
    /// The destination's address and port.
    AddressAndPortDependent,
}

/// Who may send to an outside port (RFC 4787 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Filtering {
    /// Everyone.
    EndpointIndependent,
    /// Addresses that were sent to, from any port.
    AddressDependent,
    /// Addresses and ports that were sent to.
    AddressAndPortDependent,
}

/// Which outside port a new mapping gets (RFC 4787 §4.2, RFC 7422).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Allocation {
    /// The inside port where it is free.
    Preserving,
    /// The previous one plus `stride`, which may be negative and is never zero.
    Sequential {
        /// From one mapping to the next.
        stride: i16,
    },
    /// Any of a block of ports that this subscriber has to itself.
    Block,
    /// Any of all.
    Random,
}

/// Ports from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest; never below `first`.
    pub last: u16,
}

impl PortRange {
    /// The ports that a NAT may give at all: the well-known ones are left out.
    pub const ALL: Self = Self { first: 1024, last: u16::MAX };

    /// The range between two ports in either order.
    #[must_use]
    pub const fn between(one: u16, other: u16) -> Self {
        if one <= other { Self { first: one, last: other } } else { Self { first: other, last: one } }
    }

    /// How many ports it has, from 1 to 65,536.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a range of ports is never empty")]
    pub const fn len(&self) -> u32 {
        self.last.abs_diff(self.first) as u32 + 1
    }

    /// Whether `port` is one of them.
    #[must_use]
    pub const fn contains(&self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// What has been found out about the NATs between a socket and the internet. `None` is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Behaviour {
    /// How it maps.
    pub mapping: Option<Mapping>,
    /// Where `mapping` is not known, whether it was seen to depend on the destination all the same: a server with a second
    /// port would tell whether on its address alone.
    pub varies: bool,
    /// Where `mapping` is not known, whether two ports of one server saw the same: it depends on nothing, or on the
    /// destination's address alone, which is rare. A server at another address would tell.
    pub steady: bool,
    /// Whom it lets in.
    pub filtering: Option<Filtering>,
    /// Which ports it gives.
    pub allocation: Option<Allocation>,
    /// From which ports, as far as those seen tell: an estimate.
    pub ports: Option<PortRange>,
    /// Whether two hosts behind it reach each other by their outside addresses.
    pub hairpin: Option<bool>,
    /// For how long it remembers a silent flow: the longest silence that was survived.
    pub lifetime: Option<Duration>,
}

impl Behaviour {
    /// Whether one address is good for all peers. `None` while unknown.
    #[must_use]
    pub fn is_easy(&self) -> Option<bool> {
        match self.mapping {
            Some(mapping) => Some(mapping == Mapping::EndpointIndependent),
            None => self.varies.then_some(false),
        }
    }

    /// What to act on where trying costs little: the likelier mapping where only one server could be asked.
    #[must_use]
    pub fn presumed(self) -> Self {
        let mapping = self.mapping.or(self.steady.then_some(Mapping::EndpointIndependent));
        Self { mapping, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_varies_is_not_easy_even_if_nothing_else_is_known() {
        let unknown = Behaviour::default();
        assert_eq!(unknown.is_easy(), None);
        assert_eq!(Behaviour { varies: true, ..unknown }.is_easy(), Some(false));
        assert_eq!(Behaviour { mapping: Some(Mapping::EndpointIndependent), ..unknown }.is_easy(), Some(true));
        assert_eq!(Behaviour { mapping: Some(Mapping::AddressDependent), ..unknown }.is_easy(), Some(false));
    }

    #[test]
    fn what_two_ports_of_one_server_see_alike_is_presumed_easy_but_not_known_to_be() {
        let steady = Behaviour { steady: true, ..Behaviour::default() };
        assert_eq!((steady.is_easy(), steady.presumed().is_easy()), (None, Some(true)));
        let hard = Behaviour { mapping: Some(Mapping::AddressDependent), ..Behaviour::default() };
        assert_eq!(hard.presumed(), hard);
        assert_eq!(Behaviour::default().presumed().is_easy(), None);
    }

    #[test]
    fn a_range_counts_both_ends() {
        assert_eq!(PortRange::ALL.len(), 64_512);
        assert_eq!(PortRange::between(9, 5), PortRange { first: 5, last: 9 });
        assert_eq!(PortRange { first: 0, last: u16::MAX }.len(), 65_536);
        assert!(PortRange::between(5, 9).contains(9) && !PortRange::between(5, 9).contains(10));
    }
}
