//! Why a peer's data goes where it goes, in a form that programs can match and people can read.

use std::fmt;

use mesh_noise::key::NodePublic;

use super::peer::{Peer, within};
use super::{Agent, Mode};
use crate::behaviour::{Allocation, Behaviour, Filtering, Mapping};
use crate::hard::{Hopeless, Outcome};

/// Why the data for a peer goes the way it goes, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Why {
    /// Direct: it answers there.
    Answers,
    /// Direct, but pings there go unanswered at the moment: data goes through the relay as well.
    InDoubt,
    /// Only relays may be used.
    RelayOnly,
    /// We have no socket, so nothing can be sent by UDP.
    NoSocket,
    /// The peer takes no part in path discovery, or has not told its key yet.
    NoDisco,
    /// Nothing was sent to it lately, so no direct path is looked for.
    Idle,
    /// A search for a direct path has begun and may still succeed.
    Searching,
    /// Neither control nor the peer itself has told an address of it.
    NoAddress,
    /// NATs as they are here and there do not let a direct path through.
    Nats {
        /// What ours do.
        ours: Behaviour,
        /// What the peer's do.
        theirs: Behaviour,
        /// How it stands with guessing their ports. `None` if that was not tried yet, or is switched off.
        guessing: Option<Outcome>,
    },
    /// No address of the peer answers, and nothing that is known explains it.
    Silence,
}

/// Whether NATs that do this and that let no plain ping through in either direction. Unknown behaviour excuses nothing.
fn excludes(one: &Behaviour, other: &Behaviour) -> bool {
    let hard = |side: &Behaviour| side.is_easy() == Some(false);
    let strict = |side: &Behaviour| match side.filtering {
        Some(Filtering::EndpointIndependent) => false,
        Some(Filtering::AddressAndPortDependent) => true,
        Some(Filtering::AddressDependent) | None => hard(side),
    };
    (hard(one) && strict(other)) || (hard(other) && strict(one))
}

impl Agent {
    /// What our own NATs do, as far as it has been found out. It explains paths in [`Why::Nats`].
    pub fn set_behaviour(&mut self, ours: Behaviour) {
        self.behaviour = ours;
        self.tell_behaviour();
    }

    pub(super) fn why(&self, node: &NodePublic, peer: &Peer) -> Why {
        let (now, timing) = (self.now, &self.timing);
        if self.mode == Mode::Relay {
            return Why::RelayOnly;
        }
        if peer.best.is_some() {
            return if peer.published_backup.is_some() { Why::InDoubt } else { Why::Answers };
        }
        if peer.disco.is_zero() {
            return Why::NoDisco;
        }
        if self.sockets.is_empty() {
            return Why::NoSocket;
        }
        if !peer.engaged(now, timing) {
            return Why::Idle;
        }
        if excludes(&self.behaviour, &peer.behaviour) {
            let guessing = self.guesser.outcome(node);
            return Why::Nats { ours: self.behaviour, theirs: peer.behaviour, guessing };
        }
        if within(peer.sought, now, timing.ping_timeout) {
            return Why::Searching;
        }
        if peer.candidates.is_empty() { Why::NoAddress } else { Why::Silence }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Answers => "it answers there",
            Self::InDoubt => "it does not answer there at the moment, so the relay is used as well",
            Self::RelayOnly => "only relays may be used",
            Self::NoSocket => "there is no socket to send from",
            Self::NoDisco => "it takes no part in path discovery",
            Self::Idle => "nothing was sent to it lately",
            Self::Searching => "a direct path is being looked for",
            Self::NoAddress => "no address of it is known",
            Self::Nats { ours, theirs, guessing } => {
                nats(f, ours, theirs)?;
                return guesses(f, *guessing);
            }
            Self::Silence => "none of its addresses answers",
        };
        f.write_str(text)
    }
}

fn nats(f: &mut fmt::Formatter<'_>, ours: &Behaviour, theirs: &Behaviour) -> fmt::Result {
    let hard = |side: &Behaviour| side.is_easy() == Some(false);
    match (hard(ours), hard(theirs)) {
        (true, true) if ports(ours) == ports(theirs) => {
            write!(f, "both sides map per destination with {}", ports(ours))
        }
        (true, true) => {
            write!(f, "both sides map per destination, with {} here and {} there", ports(ours), ports(theirs))
        }
        (true, false) => write!(
            f,
            "our side maps per {} with {}, and theirs lets in nobody else than it has sent to",
            destination(ours),
            ports(ours)
        ),
        (false, _) => write!(
            f,
            "their side maps per {} with {}, and ours lets in nobody else than it has sent to",
            destination(theirs),
            ports(theirs)
        ),
    }
}

fn guesses(f: &mut fmt::Formatter<'_>, guessing: Option<Outcome>) -> fmt::Result {
    match guessing {
        None | Some(Outcome::Direct) => Ok(()),
        Some(Outcome::Trying) => f.write_str("; they are being guessed"),
        Some(Outcome::Failed(1)) => f.write_str("; guessing them has failed once, and is tried again"),
        Some(Outcome::Failed(times)) => write!(f, "; guessing them has failed {times} times, and is tried again"),
        Some(Outcome::Hopeless(Hopeless::TooManyPorts { ours, theirs })) => {
            write!(f, "; {ours} here and {theirs} there are too many to guess")
        }
        Some(Outcome::Hopeless(Hopeless::Refused)) => f.write_str("; the peer does not guess ports"),
    }
}

const fn destination(side: &Behaviour) -> &'static str {
    match side.mapping {
        Some(Mapping::AddressDependent) => "address",
        Some(Mapping::AddressAndPortDependent | Mapping::EndpointIndependent) | None => "destination",
    }
}

const fn ports(side: &Behaviour) -> &'static str {
    match side.allocation {
        Some(Allocation::Preserving) => "the ports that are asked for",
        Some(Allocation::Sequential { .. }) => "ports in order",
        Some(Allocation::Block) => "ports from a block",
        Some(Allocation::Random) => "random ports",
        None => "unknown ports",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(mapping: Mapping, filtering: Option<Filtering>, allocation: Allocation) -> Behaviour {
        Behaviour { mapping: Some(mapping), filtering, allocation: Some(allocation), ..Behaviour::default() }
    }

    #[test]
    fn nats_explain_a_relay_only_where_both_are_known_to_be_in_the_way() {
        let hard = side(Mapping::AddressAndPortDependent, None, Allocation::Random);
        let strict =
            side(Mapping::EndpointIndependent, Some(Filtering::AddressAndPortDependent), Allocation::Preserving);
        let lenient = side(Mapping::EndpointIndependent, Some(Filtering::AddressDependent), Allocation::Preserving);
        let open = side(Mapping::EndpointIndependent, Some(Filtering::EndpointIndependent), Allocation::Preserving);
        let unknown = Behaviour::default();
        assert!(excludes(&hard, &hard) && excludes(&hard, &strict) && excludes(&strict, &hard));
        for other in [lenient, open, unknown] {
            assert!(!excludes(&hard, &other) && !excludes(&other, &hard), "{other:?}");
        }
        assert!(!excludes(&strict, &strict));
    }

    #[test]
    fn the_reason_reads_as_a_sentence() {
        let hard = side(Mapping::AddressAndPortDependent, None, Allocation::Random);
        let strict =
            side(Mapping::EndpointIndependent, Some(Filtering::AddressAndPortDependent), Allocation::Preserving);
        let both = |guessing| Why::Nats { ours: hard, theirs: hard, guessing }.to_string();
        assert_eq!(both(None), "both sides map per destination with random ports");
        let hopeless = Outcome::Hopeless(Hopeless::TooManyPorts { ours: 64_512, theirs: 512 });
        let text = "both sides map per destination with random ports; 64512 here and 512 there are too many to guess";
        assert_eq!(both(Some(hopeless)), text);
        let ours = Why::Nats { ours: hard, theirs: strict, guessing: Some(Outcome::Trying) };
        let text = "our side maps per destination with random ports, and theirs lets in nobody else than it has sent to; \
             they are being guessed";
        assert_eq!(ours.to_string(), text);
    }
}
