//! What two of our own nodes tell each other while one guesses the other's ports.
//!
//! It travels as a disco message of a type that deployed peers do not know and therefore ignore, through the relay only,
//! and is sent only to peers known to be ours. Body, behind type `C0` and version 0 (integers big-endian):
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | attempt, chosen by whoever proposes |
//! | 4 | 1 | step: 0 propose, 1 accept, 2 ready, 3 more, 4 stop |
//! | 5 | 1 | its argument: the stage for ready and more, the reason for stop, else 0 |
//! | 6 | 1 | mapping: 0 unknown, 1 endpoint-independent, 2 address-dependent, 3 address-and-port-dependent, 4 depends on the destination, unknown how |
//! | 7 | 1 | filtering, likewise |
//! | 8 | 1 | allocation: 0 unknown, 1 preserving, 2 sequential, 3 block, 4 random |
//! | 9 | 2 | stride, signed, not 0 if sequential |
//! | 11 | 4 | first and last port of the range; 0 and 0 if unknown |
//! | 15 | 1 | hairpin: 0 unknown, 1 no, 2 yes |
//! | 16 | 4 | lifetime of a silent mapping in milliseconds; 0 if unknown |
//! | 20 | 18 | the sender's address as others see it; port 0 if unknown |
//! | 38 | 1 | guess: 0 none, 1 a range, 2 a list |
//! | 39 | 1 | with a list, its length less one |
//! | 40 | 4 | with a range, its first and last port |
//! | 40 | 2 k | with a list, the ports, the likeliest first |
//!
//! What follows is ignored.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::behaviour::{Allocation, Behaviour, Filtering, Mapping, PortRange};
use crate::disco::DecodeError;

/// The disco message type.
pub const KIND: u8 = 0xc0;
/// Ports that one message can list.
pub const MAX_LISTED: usize = 256;

/// One message about an attempt to guess ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Punch {
    /// Names the attempt.
    pub attempt: u32,
    /// What it says.
    pub step: Step,
    /// How the sender's NATs behave, [as presumed](Behaviour::presumed).
    pub behaviour: Behaviour,
    /// Where others see the sender's ordinary socket.
    pub outside: Option<SocketAddr>,
    /// Where datagrams from the sender's extra sockets will come from.
    pub guess: Guess,
}

/// What a message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Shall we? An answer is expected: accept, ready or stop.
    Propose,
    /// We shall, and you begin.
    Accept,
    /// The sender's ports of this stage are open: send.
    Ready {
        /// Counted from 0.
        stage: u8,
    },
    /// Nothing was hit so far: open the ports of this stage.
    More {
        /// Counted from 0.
        stage: u8,
    },
    /// It is over.
    Stop(Why),
}

/// Why an attempt ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A datagram came through.
    Hit,
    /// Everything was tried.
    Failed,
    /// The sender is at work on another one; ask again later.
    Busy,
    /// The sender does not take part: switched off, hopeless in its eyes, or tried too lately.
    Refused,
}

/// Which ports of the sender's address are worth sending to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Guess {
    /// Nothing is known.
    #[default]
    None,
    /// Any of these.
    Range(PortRange),
    /// These, the likeliest first; at least one and at most [`MAX_LISTED`].
    Ports(Vec<u16>),
}

impl Punch {
    /// Reads the body.
    ///
    /// # Errors
    /// Says what is missing or out of range.
    pub fn decode(version: u8, body: &[u8]) -> Result<Self, DecodeError> {
        if version != 0 {
            return Err(DecodeError::Version { kind: KIND, version });
        }
        let mut reader = Reader { len: body.len(), rest: body };
        let attempt = u32::from_be_bytes(reader.take()?);
        let step = step(reader.take()?)?;
        let [mapping, filtering, allocation] = reader.take()?;
        let stride = i16::from_be_bytes(reader.take()?);
        let ports = range(reader.take()?)?;
        let [hairpin] = reader.take()?;
        let lifetime = u32::from_be_bytes(reader.take()?);
        let behaviour = Behaviour {
            mapping: match mapping {
                0 | 4 => None,
                1 => Some(Mapping::EndpointIndependent),
                2 => Some(Mapping::AddressDependent),
                3 => Some(Mapping::AddressAndPortDependent),
                _ => return Err(DecodeError::Field("mapping")),
            },
            varies: mapping == 4,
            steady: false,
            filtering: match filtering {
                0 => None,
                1 => Some(Filtering::EndpointIndependent),
                2 => Some(Filtering::AddressDependent),
                3 => Some(Filtering::AddressAndPortDependent),
                _ => return Err(DecodeError::Field("filtering")),
            },
            allocation: match allocation {
                0 => None,
                1 => Some(Allocation::Preserving),
                2 if stride != 0 => Some(Allocation::Sequential { stride }),
                3 => Some(Allocation::Block),
                4 => Some(Allocation::Random),
                _ => return Err(DecodeError::Field("allocation")),
            },
            ports,
            hairpin: match hairpin {
                0 => None,
                1 => Some(false),
                2 => Some(true),
                _ => return Err(DecodeError::Field("hairpin")),
            },
            lifetime: (lifetime != 0).then(|| Duration::from_millis(lifetime.into())),
        };
        let ip = Ipv6Addr::from(reader.take::<16>()?).to_canonical();
        let port = u16::from_be_bytes(reader.take()?);
        let outside = (port != 0).then(|| SocketAddr::new(ip, port));
        let [kind, count] = reader.take()?;
        let guess = match kind {
            0 => Guess::None,
            1 => Guess::Range(range(reader.take()?)?.ok_or(DecodeError::Field("range"))?),
            2 => {
                let mut ports = Vec::with_capacity(usize::from(count) + 1);
                for _ in 0..=count {
                    ports.push(u16::from_be_bytes(reader.take()?));
                }
                Guess::Ports(ports)
            }
            _ => return Err(DecodeError::Field("guess")),
        };
        Ok(Self { attempt, step, behaviour, outside, guess })
    }

    /// Appends the body. Ports beyond [`MAX_LISTED`] are left out; a list without any is none.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (step, argument) = match self.step {
            Step::Propose => (0, 0),
            Step::Accept => (1, 0),
            Step::Ready { stage } => (2, stage),
            Step::More { stage } => (3, stage),
            Step::Stop(why) => (4, why as u8),
        };
        let behaviour = &self.behaviour;
        out.extend_from_slice(&self.attempt.to_be_bytes());
        out.extend_from_slice(&[step, argument]);
        out.push(match behaviour.mapping {
            None if behaviour.varies => 4,
            None => 0,
            Some(Mapping::EndpointIndependent) => 1,
            Some(Mapping::AddressDependent) => 2,
            Some(Mapping::AddressAndPortDependent) => 3,
        });
        out.push(match behaviour.filtering {
            None => 0,
            Some(Filtering::EndpointIndependent) => 1,
            Some(Filtering::AddressDependent) => 2,
            Some(Filtering::AddressAndPortDependent) => 3,
        });
        let (allocation, stride) = match behaviour.allocation {
            None => (0, 0),
            Some(Allocation::Preserving) => (1, 0),
            Some(Allocation::Sequential { stride }) => (2, stride),
            Some(Allocation::Block) => (3, 0),
            Some(Allocation::Random) => (4, 0),
        };
        out.push(allocation);
        out.extend_from_slice(&stride.to_be_bytes());
        let ports = behaviour.ports.unwrap_or(PortRange { first: 0, last: 0 });
        out.extend_from_slice(&ports.first.to_be_bytes());
        out.extend_from_slice(&ports.last.to_be_bytes());
        out.push(match behaviour.hairpin {
            None => 0,
            Some(false) => 1,
            Some(true) => 2,
        });
        let lifetime = behaviour.lifetime.map_or(0, |life| u32::try_from(life.as_millis()).unwrap_or(u32::MAX));
        out.extend_from_slice(&lifetime.to_be_bytes());
        let ip = match self.outside.map(|outside| outside.ip()) {
            Some(IpAddr::V4(ip)) => ip.to_ipv6_mapped(),
            Some(IpAddr::V6(ip)) => ip,
            None => Ipv6Addr::UNSPECIFIED,
        };
        out.extend_from_slice(&ip.octets());
        out.extend_from_slice(&self.outside.map_or(0, |outside| outside.port()).to_be_bytes());
        match &self.guess {
            Guess::Range(range) => {
                out.extend_from_slice(&[1, 0]);
                out.extend_from_slice(&range.first.to_be_bytes());
                out.extend_from_slice(&range.last.to_be_bytes());
            }
            Guess::Ports(ports) if !ports.is_empty() => {
                let ports = &ports[..ports.len().min(MAX_LISTED)];
                out.extend_from_slice(&[2, u8::try_from(ports.len() - 1).unwrap_or(u8::MAX)]);
                ports.iter().for_each(|port| out.extend_from_slice(&port.to_be_bytes()));
            }
            Guess::None | Guess::Ports(_) => out.extend_from_slice(&[0, 0]),
        }
    }
}

fn step([step, argument]: [u8; 2]) -> Result<Step, DecodeError> {
    Ok(match (step, argument) {
        (0, _) => Step::Propose,
        (1, _) => Step::Accept,
        (2, stage) => Step::Ready { stage },
        (3, stage) => Step::More { stage },
        (4, 0) => Step::Stop(Why::Hit),
        (4, 1) => Step::Stop(Why::Failed),
        (4, 2) => Step::Stop(Why::Busy),
        // A reason that is new to us ends it all the same.
        (4, _) => Step::Stop(Why::Refused),
        _ => return Err(DecodeError::Field("step")),
    })
}

/// Two zeros are no range.
fn range(bytes: [u8; 4]) -> Result<Option<PortRange>, DecodeError> {
    let [a, b, c, d] = bytes;
    let (first, last) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    match (first, last) {
        (0, 0) => Ok(None),
        _ if first <= last => Ok(Some(PortRange { first, last })),
        _ => Err(DecodeError::Field("range")),
    }
}

struct Reader<'a> {
    len: usize,
    rest: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) =
            self.rest.split_first_chunk::<N>().ok_or(DecodeError::Short { kind: KIND, len: self.len })?;
        self.rest = rest;
        Ok(*head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn punch(step: Step, guess: Guess) -> Punch {
        let behaviour = Behaviour {
            mapping: Some(Mapping::AddressAndPortDependent),
            varies: false,
            steady: false,
            filtering: None,
            allocation: Some(Allocation::Sequential { stride: -2 }),
            ports: Some(PortRange { first: 1024, last: 2047 }),
            hairpin: Some(true),
            lifetime: Some(Duration::from_secs(30)),
        };
        Punch { attempt: 7, step, behaviour, outside: Some("192.0.2.1:258".parse().unwrap()), guess }
    }

    fn encoded(punch: &Punch) -> Vec<u8> {
        let mut out = Vec::new();
        punch.encode(&mut out);
        out
    }

    #[test]
    fn fields_lie_where_they_are_documented() {
        let bytes = encoded(&punch(Step::Ready { stage: 3 }, Guess::Ports(vec![5, 6])));
        let want =
            "00000007 0203 030002 fffe 040007ff 02 00007530 00000000000000000000ffffc0000201 0102 0201 0005 0006";
        assert_eq!(hex::encode(bytes), want.replace(' ', ""));
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        let steps = [Step::Propose, Step::Accept, Step::Ready { stage: 0 }, Step::More { stage: 9 }];
        let stops = [Why::Hit, Why::Failed, Why::Busy, Why::Refused].map(Step::Stop);
        for step in steps.into_iter().chain(stops) {
            for guess in [Guess::None, Guess::Range(PortRange::ALL), Guess::Ports(vec![9; MAX_LISTED])] {
                let punch = punch(step, guess);
                assert_eq!(Punch::decode(0, &encoded(&punch)), Ok(punch));
            }
        }
        let unknown = Punch { behaviour: Behaviour::default(), outside: None, ..punch(Step::Propose, Guess::None) };
        assert_eq!(Punch::decode(0, &encoded(&unknown)), Ok(unknown));
    }

    #[test]
    fn another_version_is_refused_and_a_longer_body_is_not() {
        let mut bytes = encoded(&punch(Step::Propose, Guess::None));
        bytes.extend([1; 40]);
        assert!(Punch::decode(0, &bytes).is_ok());
        assert_eq!(Punch::decode(1, &bytes), Err(DecodeError::Version { kind: KIND, version: 1 }));
        assert_eq!(Punch::decode(0, &bytes[..12]), Err(DecodeError::Short { kind: KIND, len: 12 }));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(
            head in proptest::collection::vec(0u8..5, 0..60),
            tail in proptest::collection::vec(any::<u8>(), 0..600),
        ) {
            for body in [[&head[..], &tail].concat(), tail] {
                if let Ok(punch) = Punch::decode(0, &body) {
                    prop_assert_eq!(Punch::decode(0, &encoded(&punch)), Ok(punch));
                }
            }
        }
    }
}
