//! Which of the tricks fits two NATs, how large it may grow, and when it is not worth trying.
//!
//! `R` is how many ports a side's flows may come from, `H` how many of them are open, `N` how many are tried:
//!
//! | ours, theirs | what is done | odds |
//! |---|---|---|
//! | one port for all, in order or preserved | a window of 64 around the next port | near certain |
//! | one port for all, at random | birthday, in [`BIRTHDAY`] stages | 1 − e^(−HN/R) a stage |
//! | both in order or preserved | both sweep, one twice as fast as the other | near certain |
//! | in order or preserved per address, at random | as the first two: towards one peer it is one port | as there |
//! | both at random, or one | both send `F` flows | 1 − e^(−F·F′/(R·R′)) |
//!
//! The last is worth it for small `R` only: with two NATs of 512 ports that let 1,024 flows share them it is 98 %, with
//! two of 64,512 it is one in four thousand. Where a filter looks at addresses alone, a probe needs to hit a port only,
//! and the odds are those of the birthday.

use crate::behaviour::{Allocation, Behaviour, Filtering, Mapping, PortRange};

/// Probes that a node sends in any second, all attempts together.
pub const MAX_PER_SECOND: u32 = 200;
/// Probes that one side sends in one attempt.
pub const MAX_PROBES: u32 = 2048;
/// Sockets that a node opens besides its ordinary ones, all attempts together.
pub const MAX_SOCKETS: usize = 256;
/// Flows that one side lets its NAT remember in one attempt of two hard NATs, questions to STUN servers included.
pub const MAX_FLOWS: u32 = 1024;

/// A stage: how many sockets the one side has open, and how many ports the other tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stage {
    pub(super) sockets: usize,
    pub(super) probes: u32,
}

/// Hard with easy where ports are random. Together the probes are [`MAX_PROBES`]; over 64,512 ports one pair in a
/// thousand is left.
pub(super) const BIRTHDAY: [Stage; 4] = [
    Stage { sockets: 32, probes: 128 },
    Stage { sockets: 128, probes: 512 },
    Stage { sockets: 256, probes: 1024 },
    Stage { sockets: 256, probes: 384 },
];
/// Hard with easy where the next ports are known.
pub(super) const PREDICTED: [Stage; 3] =
    [Stage { sockets: 16, probes: 64 }, Stage { sockets: 32, probes: 64 }, Stage { sockets: 48, probes: 64 }];
/// We are hard, the peer is easy and not one of ours: it probes whatever we list, at once and as often as it likes, so
/// lists are shorter, and there are more of them. Over 64,512 ports two pairs in a thousand are left.
pub(super) const LISTED: [Stage; 8] = [
    Stage { sockets: 32, probes: 64 },
    Stage { sockets: 128, probes: 256 },
    Stage { sockets: 256, probes: 256 },
    Stage { sockets: 256, probes: 256 },
    Stage { sockets: 256, probes: 256 },
    Stage { sockets: 256, probes: 256 },
    Stage { sockets: 256, probes: 256 },
    Stage { sockets: 256, probes: 256 },
];
/// Flows of one sweep. It copes with so many foreign flows in between as a third of it.
pub(super) const SWEEP: usize = 128;
/// Sweeps in one attempt.
pub(super) const SWEEPS: u8 = 3;

/// Flows that our ordinary socket is likely to have.
pub(super) const ORDINARY: u32 = 8;

/// Expected hits below which two hard NATs are left alone.
const WORTH_TRYING: f64 = 0.2;
/// The same once both sides know how many flows they may have.
const WORTH_GOING_ON: f64 = 0.05;

/// What to do about a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// Nothing: both have one address for everyone.
    Nothing,
    /// We open ports, the peer tries them.
    Open,
    /// The peer opens ports, we try them.
    Spray,
    /// Both know their own next ports.
    Sweep,
    /// Both send many flows.
    Flood,
}

/// Why no attempt is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Hopeless {
    /// Both NATs map per destination, to ports that cannot be told in advance and are too many.
    #[error("both sides map per destination with random ports ({ours} ports here, {theirs} there)")]
    TooManyPorts {
        /// Ports that our flows may come from.
        ours: u32,
        /// Ports that the peer's may come from.
        theirs: u32,
    },
    /// The peer does not want to.
    #[error("the peer does not guess ports")]
    Refused,
}

/// Whether ports can be told in advance.
pub(super) fn is_predictable(behaviour: &Behaviour) -> bool {
    matches!(behaviour.allocation, Some(Allocation::Preserving | Allocation::Sequential { .. }))
}

/// From how many ports flows may come.
pub(super) fn width(behaviour: &Behaviour) -> u32 {
    /// Hoped for where a block is known to be one, but not how large. It is measured before much is sent.
    const SOME_BLOCK: u32 = 512;
    match (behaviour.allocation, behaviour.ports) {
        (_, Some(ports)) => ports.len(),
        (Some(Allocation::Block), None) => SOME_BLOCK,
        (Some(Allocation::Preserving | Allocation::Sequential { .. } | Allocation::Random) | None, None) => {
            PortRange::ALL.len()
        }
    }
}

/// One side of two hard NATs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Side {
    /// Flows that it sends.
    pub(super) flows: u32,
    /// Ports that they come from.
    pub(super) width: u32,
    /// Whether its NAT lets in whoever was sent to, from any port.
    pub(super) lenient: bool,
    /// Whether a socket keeps its port towards an address.
    pub(super) per_address: bool,
}

impl Side {
    /// What a side can do at most.
    pub(super) fn of(behaviour: &Behaviour) -> Self {
        let per_address = behaviour.mapping == Some(Mapping::AddressDependent);
        let flows = if per_address { MAX_PROBES } else { MAX_FLOWS };
        // Ports that are known are as good as those of the flows alone.
        let width = if is_predictable(behaviour) { flows } else { width(behaviour) };
        let filter = behaviour.filtering;
        let lenient = matches!(filter, Some(Filtering::EndpointIndependent | Filtering::AddressDependent));
        Self { flows, width: width.max(1), lenient, per_address }
    }

    /// Ports that it has open.
    fn open(&self) -> f64 {
        if self.per_address { f64::from(self.flows.min(256)) } else { f64::from(self.flows) }
    }

    /// How often the two are expected to hit.
    pub(super) fn expected_hits(&self, other: &Self) -> f64 {
        self.expected_pairs(other).max(self.any_port_of(other)).max(other.any_port_of(self))
    }

    /// How often a flow of the one is expected to go where one of the other comes from, and the other way round.
    pub(super) fn expected_pairs(&self, other: &Self) -> f64 {
        let pairs = f64::from(self.flows) * f64::from(other.flows);
        pairs / (f64::from(self.width) * f64::from(other.width))
    }

    /// How often our probes are expected to hit any port that the other has open, where that gets in, and its answer too.
    pub(super) fn any_port_of(&self, other: &Self) -> f64 {
        let hits = f64::from(self.flows) * other.open() / f64::from(other.width);
        if other.lenient && (self.lenient || other.per_address) { hits } else { 0.0 }
    }

    /// Whether it makes sense to go on now that both are known as they are.
    pub(super) fn is_worth_going_on(&self, other: &Self) -> Result<(), Hopeless> {
        if self.expected_hits(other) < WORTH_GOING_ON {
            return Err(Hopeless::TooManyPorts { ours: self.width, theirs: other.width });
        }
        Ok(())
    }
}

/// Whether a socket has one port towards the peer, and it can be told in advance: hard for the world, easy for one peer.
pub(super) fn is_easy_for_one(behaviour: &Behaviour) -> bool {
    behaviour.mapping == Some(Mapping::AddressDependent) && is_predictable(behaviour)
}

/// What to do about NATs that behave like `ours` and `theirs`. An unknown mapping is `None`.
pub(super) fn plan(ours: &Behaviour, theirs: &Behaviour) -> Option<Result<Plan, Hopeless>> {
    Some(match (ours.is_easy()?, theirs.is_easy()?) {
        (true, true) => Ok(Plan::Nothing),
        (true, false) => Ok(Plan::Spray),
        (false, true) => Ok(Plan::Open),
        (false, false) if is_predictable(ours) && is_predictable(theirs) => Ok(Plan::Sweep),
        (false, false) if is_easy_for_one(ours) => Ok(Plan::Spray),
        (false, false) if is_easy_for_one(theirs) => Ok(Plan::Open),
        (false, false) => {
            let (us, them) = (Side::of(ours), Side::of(theirs));
            if us.expected_hits(&them) < WORTH_TRYING {
                Err(Hopeless::TooManyPorts { ours: width(ours), theirs: width(theirs) })
            } else {
                Ok(Plan::Flood)
            }
        }
    })
}

/// `stage` for a side whose flows come from `width` ports: never more than half of them are opened, and none is tried
/// twice.
pub(super) fn fitted(stage: Stage, width: u32) -> Stage {
    let half = (width / 2).saturating_sub(ORDINARY + asked(width)).max(1);
    let half = usize::try_from(half).unwrap_or(MAX_SOCKETS);
    Stage { sockets: stage.sockets.min(half), probes: stage.probes.min(width) }
}

/// How many questions a NAT with so many ports is asked before any of them is opened.
pub(super) fn asked(width: u32) -> u32 {
    (width / 8).min(32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hard(allocation: Option<Allocation>, ports: Option<PortRange>) -> Behaviour {
        Behaviour { mapping: Some(Mapping::AddressAndPortDependent), allocation, ports, ..Behaviour::default() }
    }

    fn block(size: u16) -> Behaviour {
        hard(Some(Allocation::Block), Some(PortRange { first: 4096, last: 4095 + size }))
    }

    #[test]
    fn stages_keep_within_the_limits() {
        for stages in [&BIRTHDAY[..], &PREDICTED, &LISTED] {
            assert!(stages.iter().all(|stage| stage.sockets <= MAX_SOCKETS));
            assert!(stages.windows(2).all(|pair| pair[0].sockets <= pair[1].sockets));
            assert!(stages.iter().map(|stage| stage.probes).sum::<u32>() <= MAX_PROBES);
        }
        assert!(u32::try_from(SWEEP).unwrap() * u32::from(SWEEPS) <= MAX_FLOWS);
    }

    #[test]
    fn the_stages_against_random_ports_leave_a_few_pairs_in_a_thousand() {
        for stages in [&BIRTHDAY[..], &LISTED] {
            let missed: f64 = stages
                .iter()
                .map(|stage| {
                    (0..stage.probes).fold(1.0, |left, tried| {
                        let closed = f64::from(64_512 - tried) - stage.sockets as f64;
                        left * closed / f64::from(64_512 - tried)
                    })
                })
                .product();
            assert!(missed < 0.002, "{missed}");
        }
    }

    #[test]
    fn an_easy_side_makes_a_hard_one_worth_it_however_many_ports() {
        let easy = Behaviour { mapping: Some(Mapping::EndpointIndependent), ..Behaviour::default() };
        let wide = hard(Some(Allocation::Random), None);
        assert_eq!(plan(&easy, &wide), Some(Ok(Plan::Spray)));
        assert_eq!(plan(&wide, &easy), Some(Ok(Plan::Open)));
        assert_eq!(plan(&easy, &easy), Some(Ok(Plan::Nothing)));
        assert_eq!(plan(&easy, &Behaviour::default()), None);
    }

    #[test]
    fn two_hard_sides_are_tried_where_ports_are_few_or_known() {
        let in_order = hard(Some(Allocation::Sequential { stride: 1 }), None);
        let kept = hard(Some(Allocation::Preserving), None);
        assert_eq!(plan(&in_order, &kept), Some(Ok(Plan::Sweep)));
        assert_eq!(plan(&block(512), &block(512)), Some(Ok(Plan::Flood)));
        assert_eq!(plan(&block(512), &in_order), Some(Ok(Plan::Flood)));
        let wide = hard(Some(Allocation::Random), None);
        let per_address = Behaviour { mapping: Some(Mapping::AddressDependent), ..in_order };
        assert_eq!(plan(&wide, &per_address), Some(Ok(Plan::Open)));
        assert_eq!(plan(&per_address, &wide), Some(Ok(Plan::Spray)));
        let lenient = |side| Behaviour { filtering: Some(Filtering::AddressDependent), ..side };
        assert_eq!(plan(&lenient(wide), &lenient(block(512))), Some(Ok(Plan::Flood)));
        let too_many = |ours, theirs| Some(Err(Hopeless::TooManyPorts { ours, theirs }));
        assert_eq!(plan(&wide, &wide), too_many(64_512, 64_512));
        assert_eq!(plan(&wide, &block(512)), too_many(64_512, 512));
        assert_eq!(plan(&wide, &in_order), too_many(64_512, 64_512));
    }

    #[test]
    fn small_blocks_are_never_opened_by_more_than_half() {
        assert_eq!(fitted(BIRTHDAY[2], 64), Stage { sockets: 16, probes: 64 });
        assert_eq!(fitted(BIRTHDAY[2], 64_512), BIRTHDAY[2]);
    }
}
