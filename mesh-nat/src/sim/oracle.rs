//! Can these two ever be direct, and how long may it take? Answered from how their NATs are configured, without trying.
//!
//! Where one side has an address that is good for everyone, and the other one's datagrams pass its filter, plain punching
//! suffices (RFC 5128 §3.3). Else somebody's port has to be guessed:
//!
//! - One side is easy, the other maps per destination over `R` ports: `H` sockets of the hard side and `N` guesses of
//!   the easy one meet with `1 − e^(−HN/R)`. With 256 sockets and 2,048 guesses that is certain for every `R`.
//! - Both map per destination, but one of them filters loosely or keeps one port towards an address: the same sum.
//! - Both map per destination and port and filter likewise: each of `F` flows meets each of the other side's with
//!   `1 / (R·R')`. Of a side whose next ports are known, only the other side's range counts.
//!
//! Where both sides map per destination, an attempt is held to 1,024 flows a side, so that some fail; the oracle's time
//! has room for as many attempts, with the waits between them, as leave one pair in a thousand.

use std::time::Duration;

use super::host::HostId;
use super::nat::NatConfig;
use super::world::World;
use crate::behaviour::{Allocation, Filtering, Mapping};

/// What the oracle says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// They can be direct, both ways.
    Direct {
        /// By what.
        how: Method,
        /// The least that it takes, in round trips to the relay.
        round_trips: f64,
        /// How long it may take at most where nothing is lost, from the first packet on.
        within: Duration,
    },
    /// They need not.
    Excused(Excuse),
}

/// How a direct path comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// One of them can be reached without further ado.
    Open,
    /// Both send to each other's known address.
    Punch,
    /// A port follows from those before it.
    Predict,
    /// Many sockets of one side against many guesses of the other.
    Birthday,
    /// Many flows of both sides.
    BothGuess,
}

/// Why two nodes need not be direct.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Excuse {
    /// No UDP on a side.
    UdpBlocked,
    /// One has only IPv4, the other only IPv6.
    NoCommonFamily,
    /// Both map per destination, at random over more than 512 ports.
    RandomOnBothSides,
    /// Both map per destination and port and filter by both, and one of them at random over more ports than there may be
    /// flows: knowing the other's ports does not help, as each of them leads to one address and port only.
    MorePortsThanFlows,
}

/// Ports at random beyond which two sides that map per destination are excused.
const WIDE: u32 = 512;
/// Flows that one side may open to one peer.
const FLOWS: f64 = 1024.0;
/// Meetings that must be expected for a pair not to be excused: all but one in seven attempts succeed.
const ENOUGH: f64 = 2.0;
/// Sockets that one side may open to one peer.
const SOCKETS: f64 = 256.0;
/// What one attempt may take, and the wait before the second one; it doubles each time.
const ATTEMPT: Duration = Duration::from_secs(30);
const BACK_OFF: Duration = Duration::from_secs(60);
/// Attempts are granted until all but this share of pairs has met.
const LEFT: f64 = 0.001;

/// Can `a` and `b` ever be direct? Looks at where they are now and at the NATs above them.
#[must_use]
pub fn oracle(world: &World, a: HostId, b: HostId) -> Verdict {
    if world.udp_blocked_at(a) || world.udp_blocked_at(b) {
        return Verdict::Excused(Excuse::UdpBlocked);
    }
    let has = |host, v4| world.addresses(host).iter().any(|address| address.is_ipv4() == v4);
    let sides = |v4: bool| (has(a, v4) && has(b, v4)).then(|| [side(world, a, v4), side(world, b, v4)]);
    let relay = world.relay_round_trip(a, world.home());
    let verdicts = [true, false].into_iter().filter_map(sides).map(|[a, b]| judge(&a, &b, relay));
    let best = verdicts.min_by_key(|verdict| match verdict {
        Verdict::Direct { within, .. } => *within,
        Verdict::Excused(_) => Duration::MAX,
    });
    let together = world.network_of(a).is_some() && world.network_of(a) == world.network_of(b);
    match best {
        Some(_) if together => verdict(Method::Open, relay),
        Some(verdict) => verdict,
        None => Verdict::Excused(Excuse::NoCommonFamily),
    }
}

/// What counts of one side, all gateways above it taken together.
#[derive(Debug, Clone, Copy)]
struct Side {
    mapping: Mapping,
    filtering: Filtering,
    /// How many ports a new flow may get; `None` if it can be foreseen.
    spread: Option<u32>,
    /// How many flows may be open at a time.
    flows: f64,
}

fn side(world: &World, host: HostId, v4: bool) -> Side {
    let mut side = Side {
        mapping: Mapping::EndpointIndependent,
        filtering: Filtering::EndpointIndependent,
        spread: None,
        flows: FLOWS,
    };
    for gateway in world.network_of(host).map(|network| world.gateways_above(network)).unwrap_or_default() {
        let config = world.gateway_config(gateway);
        match config.nat.filter(|_| v4) {
            Some(nat) => side.behind(&nat),
            None => side.filtering = side.filtering.max(config.firewall.unwrap_or(Filtering::EndpointIndependent)),
        }
    }
    side
}

impl Side {
    fn behind(&mut self, nat: &NatConfig) {
        // A socket that keeps its own port towards everyone has one address, whatever the rule is called.
        let keeps = nat.allocation == Allocation::Preserving && nat.overload;
        if !keeps {
            self.mapping = self.mapping.max(nat.mapping);
        }
        self.filtering = self.filtering.max(nat.filtering);
        match nat.allocation {
            Allocation::Preserving => {}
            Allocation::Sequential { .. } => self.spread = None,
            Allocation::Block => self.spread = Some(u32::from(nat.block)),
            Allocation::Random => self.spread = Some(nat.ports.len()),
        }
        if let (Some(spread), false) = (self.spread, nat.overload) {
            self.flows = self.flows.min(f64::from(spread / 2));
        }
    }

    const fn is_easy(&self) -> bool {
        matches!(self.mapping, Mapping::EndpointIndependent)
    }

    fn is_wide(&self) -> bool {
        self.spread.is_some_and(|ports| ports > WIDE)
    }

    /// Whether a datagram to this side's known address comes through if this side has sent to the other's known address.
    fn admits(&self, other: &Self) -> bool {
        match self.filtering {
            Filtering::EndpointIndependent => true,
            Filtering::AddressDependent => self.is_easy(),
            Filtering::AddressAndPortDependent => self.is_easy() && other.is_easy(),
        }
    }

    /// Whether what this side answers to such a datagram comes through as well.
    fn is_heard_by(&self, other: &Self) -> bool {
        self.is_easy() || other.filtering != Filtering::AddressAndPortDependent
    }

    /// Whether one of many ports of this side need only be hit by the other, from wherever.
    fn is_hit_by(&self, other: &Self) -> bool {
        let one_port = self.mapping == Mapping::AddressDependent;
        let loose = self.filtering != Filtering::AddressAndPortDependent
            && (other.filtering != Filtering::AddressAndPortDependent || one_port);
        // Its flows are to be opened towards the one port that the other will use.
        let known = other.mapping == Mapping::AddressDependent && other.spread.is_none();
        loose || known
    }
}

fn judge(a: &Side, b: &Side, relay: Duration) -> Verdict {
    let open = |side: &Side| side.is_easy() && side.filtering == Filtering::EndpointIndependent;
    if open(a) || open(b) {
        return verdict(Method::Open, relay);
    }
    if (a.admits(b) && a.is_heard_by(b)) || (b.admits(a) && b.is_heard_by(a)) {
        return verdict(Method::Punch, relay);
    }
    let foreseen = |side: &Side| side.spread.is_none();
    if a.is_easy() || b.is_easy() {
        let hard = if a.is_easy() { b } else { a };
        return verdict(if foreseen(hard) { Method::Predict } else { Method::Birthday }, relay);
    }
    if a.is_wide() && b.is_wide() {
        return Verdict::Excused(Excuse::RandomOnBothSides);
    }
    if foreseen(a) && foreseen(b) {
        return verdict(Method::Predict, relay);
    }
    let open = |side: &Side| side.spread.map_or(1.0, |ports| side.flows.min(SOCKETS) / f64::from(ports));
    let one = |side: &Side, other: &Side| if side.is_hit_by(other) { open(side) * other.flows } else { 0.0 };
    let share = |side: &Side| side.spread.map_or(1.0, |ports| side.flows / f64::from(ports));
    let (one, both) = (one(a, b).max(one(b, a)), share(a) * share(b));
    if one.max(both) < ENOUGH {
        return Verdict::Excused(Excuse::MorePortsThanFlows);
    }
    let how = if one >= both { Method::Birthday } else { Method::BothGuess };
    Verdict::Direct { how, round_trips: 2.5, within: attempts(one.max(both)) }
}

/// How long it takes until nearly all pairs have met, where so many meetings are expected of each attempt.
fn attempts(expected: f64) -> Duration {
    let missed = (-expected).exp();
    let (mut left, mut took, mut wait) = (missed, ATTEMPT, BACK_OFF);
    while left > LEFT {
        left *= missed;
        took += wait + ATTEMPT;
        wait *= 2;
    }
    took
}

fn verdict(how: Method, relay: Duration) -> Verdict {
    let (round_trips, within) = match how {
        // One packet too late costs a round trip, a guess of who begins another half.
        Method::Open => (1.5, relay.mul_f64(3.5)),
        Method::Punch => (2.5, relay.mul_f64(3.5)),
        // Ask where the counter stands, tell the other side, send a window of guesses.
        Method::Predict => (3.5, Duration::from_secs(5)),
        // All of 2,048 guesses at 100 a second, which fail once in 3,000 times over 64,512 ports.
        Method::Birthday | Method::BothGuess => (2.5, Duration::from_secs(24)),
    };
    Verdict::Direct { how, round_trips, within }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::behaviour::PortRange;
    use crate::sim::GatewayConfig;

    fn pair(a: impl Into<GatewayConfig>, b: impl Into<GatewayConfig>) -> Verdict {
        let mut world = World::seeded(1);
        let (a, b) = (world.node_behind(a), world.node_behind(b));
        oracle(&world, a, b)
    }

    fn method(a: impl Into<GatewayConfig>, b: impl Into<GatewayConfig>) -> Option<Method> {
        match pair(a, b) {
            Verdict::Direct { how, .. } => Some(how),
            Verdict::Excused(_) => None,
        }
    }

    #[test]
    fn plain_punching_works_where_the_table_of_section_16_says() {
        use Filtering::{
            AddressAndPortDependent as ByPort, AddressDependent as ByAddress, EndpointIndependent as Anyone,
        };
        let easy = |filtering| NatConfig { filtering, ..NatConfig::easy() };
        let hard = |filtering| NatConfig { filtering, ..NatConfig::hard() };
        let plain = |a, b| matches!(method(a, b), Some(Method::Open | Method::Punch));
        for filtering in [Anyone, ByAddress, ByPort] {
            assert!(plain(easy(filtering), easy(ByPort)));
            assert!(plain(easy(Anyone), hard(filtering)));
            assert!(plain(easy(ByAddress), hard(filtering)));
            assert!(!plain(easy(ByPort), hard(filtering)));
        }
        assert!(plain(hard(Anyone), hard(Anyone)) && plain(hard(Anyone), hard(ByAddress)));
        assert!(!plain(hard(Anyone), hard(ByPort)) && !plain(hard(ByAddress), hard(ByAddress)));
    }

    #[test]
    fn guessing_is_asked_for_where_it_can_succeed() {
        let block = |overload| NatConfig { allocation: Allocation::Block, overload, ..NatConfig::hard() };
        let sequential = NatConfig { allocation: Allocation::Sequential { stride: 1 }, ..NatConfig::hard() };
        let few = NatConfig { ports: PortRange { first: 2000, last: 2511 }, ..NatConfig::hard() };
        assert_eq!(method(NatConfig::easy(), NatConfig::hard()), Some(Method::Birthday));
        assert_eq!(method(sequential, NatConfig::easy()), Some(Method::Predict));
        assert_eq!(method(sequential, sequential), Some(Method::Predict));
        assert_eq!(method(block(true), block(true)), Some(Method::BothGuess));
        assert_eq!(method(few, few), Some(Method::BothGuess));
        assert_eq!(pair(NatConfig::hard(), NatConfig::hard()), Verdict::Excused(Excuse::RandomOnBothSides));
        assert_eq!(pair(NatConfig::hard(), sequential), Verdict::Excused(Excuse::MorePortsThanFlows));
        assert_eq!(pair(block(false), block(false)), Verdict::Excused(Excuse::MorePortsThanFlows));
    }

    #[test]
    fn the_less_an_attempt_promises_the_more_are_granted() {
        assert_eq!(attempts(8.0), ATTEMPT);
        assert_eq!(attempts(4.0), ATTEMPT * 2 + BACK_OFF);
        assert_eq!(attempts(2.0), ATTEMPT * 4 + BACK_OFF * 7);
    }

    #[test]
    fn the_strictest_gateway_of_several_decides() {
        let mut world = World::seeded(1);
        let carrier = world.network_behind(world.internet(), NatConfig::hard());
        let home = world.network_behind(carrier, NatConfig::open());
        let (a, b) = (world.node_in(home), world.node_behind(NatConfig::hard()));
        assert_eq!(oracle(&world, a, b), Verdict::Excused(Excuse::RandomOnBothSides));
        let c = world.node_in(home);
        assert!(matches!(oracle(&world, a, c), Verdict::Direct { how: Method::Open, .. }), "they share a network");
        let v6 = GatewayConfig::from(NatConfig::hard()).and_ipv6();
        assert_eq!(method(v6, v6), Some(Method::Punch));
        world.block_host_udp(b, true);
        assert_eq!(oracle(&world, a, b), Verdict::Excused(Excuse::UdpBlocked));
    }
}
