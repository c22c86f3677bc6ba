//! NAT-PMP, the NAT Port Mapping Protocol (RFC 6886): PCP's forerunner, for IPv4 alone.
//!
//! ```text
//! request, address (§3.2):  00 | 00
//! request, mapping (§3.3):  00 | 01 UDP, 02 TCP | reserved 2 | internal port 2 | external port 2 | lifetime 4
//! response, address:        00 | 80 | result 2 | epoch 4 | external address 4
//! response, mapping:        00 | 81, 82 | result 2 | epoch 4 | internal port 2 | external port 2 | lifetime 4
//! ```

use std::net::Ipv4Addr;

const VERSION: u8 = 0;
const RESPONSE: u8 = 0x80;
const OPCODE_ADDRESS: u8 = 0;
const OPCODE_MAP_UDP: u8 = 1;

/// What a gateway made of a request (§3.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResultCode {
    /// Done.
    Success,
    /// The request was of another version, such as PCP's.
    UnsupportedVersion,
    /// The gateway's owner does not want it.
    NotAuthorized,
    /// The gateway has no external address at present.
    NetworkFailure,
    /// The gateway is full.
    OutOfResources,
    /// No such operation.
    UnsupportedOpcode,
    /// One that is newer than this list.
    Other(u16),
}

impl From<u16> for ResultCode {
    fn from(code: u16) -> Self {
        match code {
            0 => Self::Success,
            1 => Self::UnsupportedVersion,
            2 => Self::NotAuthorized,
            3 => Self::NetworkFailure,
            4 => Self::OutOfResources,
            5 => Self::UnsupportedOpcode,
            other => Self::Other(other),
        }
    }
}

impl From<ResultCode> for u16 {
    fn from(code: ResultCode) -> Self {
        match code {
            ResultCode::Success => 0,
            ResultCode::UnsupportedVersion => 1,
            ResultCode::NotAuthorized => 2,
            ResultCode::NetworkFailure => 3,
            ResultCode::OutOfResources => 4,
            ResultCode::UnsupportedOpcode => 5,
            ResultCode::Other(code) => code,
        }
    }
}

/// Why bytes are not the message that was wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NatPmpError {
    /// Shorter than its kind requires.
    #[error("nat-pmp message of {0} bytes")]
    Length(usize),
    /// Another version, as in the first byte.
    #[error("nat-pmp version {0}")]
    Version(u8),
    /// A request where a response was wanted, or the other way round.
    #[error("a nat-pmp message in the wrong direction")]
    Direction,
    /// An operation that is not known here.
    #[error("nat-pmp opcode {0}")]
    Opcode(u8),
}

/// What a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Request {
    /// Which external address do you have?
    Address,
    /// Map a UDP port.
    Map {
        /// The client's port.
        internal_port: u16,
        /// The port that it would like outside; 0 if it does not care, and to delete.
        external_port: u16,
        /// For how long, in seconds; 0 deletes.
        lifetime: u32,
    },
}

/// What a gateway answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Response {
    /// What came of it.
    pub result: ResultCode,
    /// Seconds since the gateway lost its state.
    pub epoch: u32,
    /// What it says; without meaning unless the result is success.
    pub body: Body,
}

/// A response's contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Body {
    /// The external address.
    Address(Ipv4Addr),
    /// A mapping of a UDP port.
    Map {
        /// The client's port.
        internal_port: u16,
        /// The port outside; 0 if the mapping was deleted.
        external_port: u16,
        /// How long it lives, in seconds.
        lifetime: u32,
    },
}

impl Request {
    /// The message: 2 or 12 bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match *self {
            Self::Address => vec![VERSION, OPCODE_ADDRESS],
            Self::Map { internal_port, external_port, lifetime } => {
                let mut out = vec![VERSION, OPCODE_MAP_UDP, 0, 0];
                out.extend(internal_port.to_be_bytes());
                out.extend(external_port.to_be_bytes());
                out.extend(lifetime.to_be_bytes());
                out
            }
        }
    }

    /// Reads a request, as a gateway does.
    ///
    /// # Errors
    /// [`NatPmpError`]; mappings of TCP ports count as an unknown operation.
    pub fn decode(datagram: &[u8]) -> Result<Self, NatPmpError> {
        let (opcode, rest) = split(datagram)?;
        match opcode {
            OPCODE_ADDRESS => Ok(Self::Address),
            OPCODE_MAP_UDP => {
                let &[_, _, i0, i1, e0, e1, l0, l1, l2, l3] =
                    rest.first_chunk::<10>().ok_or(NatPmpError::Length(datagram.len()))?;
                Ok(Self::Map {
                    internal_port: u16::from_be_bytes([i0, i1]),
                    external_port: u16::from_be_bytes([e0, e1]),
                    lifetime: u32::from_be_bytes([l0, l1, l2, l3]),
                })
            }
            RESPONSE.. => Err(NatPmpError::Direction),
            other => Err(NatPmpError::Opcode(other)),
        }
    }
}

impl Response {
    /// The message: 12 or 16 bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let opcode = match self.body {
            Body::Address(_) => OPCODE_ADDRESS,
            Body::Map { .. } => OPCODE_MAP_UDP,
        };
        let mut out = Self::refusal(opcode, self.result, self.epoch);
        match self.body {
            Body::Address(address) => out.extend(address.octets()),
            Body::Map { internal_port, external_port, lifetime } => {
                out.extend(internal_port.to_be_bytes());
                out.extend(external_port.to_be_bytes());
                out.extend(lifetime.to_be_bytes());
            }
        }
        out
    }

    /// The eight bytes with which a gateway refuses what it cannot read (§3.5).
    #[must_use]
    pub fn refusal(opcode: u8, result: ResultCode, epoch: u32) -> Vec<u8> {
        let mut out = vec![VERSION, RESPONSE | opcode];
        out.extend(u16::from(result).to_be_bytes());
        out.extend(epoch.to_be_bytes());
        out
    }

    /// Reads a response, as a client does. One that tells of a failure may end after the epoch.
    ///
    /// # Errors
    /// [`NatPmpError`] says what is wrong with it.
    pub fn decode(datagram: &[u8]) -> Result<Self, NatPmpError> {
        let (opcode, rest) = split(datagram)?;
        if opcode & RESPONSE == 0 {
            return Err(NatPmpError::Direction);
        }
        let short = NatPmpError::Length(datagram.len());
        let (&[r0, r1, e0, e1, e2, e3], rest) = rest.split_first_chunk::<6>().ok_or(short)?;
        let result = ResultCode::from(u16::from_be_bytes([r0, r1]));
        // Of a failure, nothing but the result counts.
        let failed = |len| if result == ResultCode::Success { None } else { Some(vec![0; len]) };
        let body = match opcode & !RESPONSE {
            OPCODE_ADDRESS => {
                let bytes = rest.first_chunk().copied().or_else(|| failed(4)?.first_chunk().copied()).ok_or(short)?;
                Body::Address(Ipv4Addr::from(bytes))
            }
            OPCODE_MAP_UDP => {
                let bytes: [u8; 8] =
                    rest.first_chunk().copied().or_else(|| failed(8)?.first_chunk().copied()).ok_or(short)?;
                let [i0, i1, e0, e1, l0, l1, l2, l3] = bytes;
                Body::Map {
                    internal_port: u16::from_be_bytes([i0, i1]),
                    external_port: u16::from_be_bytes([e0, e1]),
                    lifetime: u32::from_be_bytes([l0, l1, l2, l3]),
                }
            }
            other => return Err(NatPmpError::Opcode(other)),
        };
        Ok(Self { result, epoch: u32::from_be_bytes([e0, e1, e2, e3]), body })
    }
}

fn split(datagram: &[u8]) -> Result<(u8, &[u8]), NatPmpError> {
    let (&[version, opcode], rest) = datagram.split_first_chunk::<2>().ok_or(NatPmpError::Length(datagram.len()))?;
    if version != VERSION {
        return Err(NatPmpError::Version(version));
    }
    Ok((opcode, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn messages_have_the_bytes_of_the_rfc() {
        assert_eq!(Request::Address.encode(), [0, 0]);
        let map = Request::Map { internal_port: 41641, external_port: 54321, lifetime: 7200 };
        assert_eq!(hex::encode(map.encode()), "00010000a2a9d43100001c20");
        let address =
            Response { result: ResultCode::Success, epoch: 500, body: Body::Address(Ipv4Addr::new(203, 0, 113, 5)) };
        assert_eq!(hex::encode(address.encode()), "00800000000001f4cb007105");
        let mapped = Response {
            result: ResultCode::Success,
            epoch: 500,
            body: Body::Map { internal_port: 41641, external_port: 54321, lifetime: 3600 },
        };
        assert_eq!(hex::encode(mapped.encode()), "00810000000001f4a2a9d43100000e10");
    }

    #[test]
    fn a_failure_may_be_short_and_a_success_may_not() {
        let refusal = Response::refusal(OPCODE_MAP_UDP, ResultCode::NotAuthorized, 7);
        assert_eq!(Response::decode(&refusal).unwrap().result, ResultCode::NotAuthorized);
        let cut = Response::refusal(OPCODE_ADDRESS, ResultCode::Success, 7);
        assert_eq!(Response::decode(&cut), Err(NatPmpError::Length(8)));
    }

    #[test]
    fn other_versions_and_directions_are_told_apart() {
        assert_eq!(Request::decode(&[2, 0, 0]), Err(NatPmpError::Version(2)));
        assert_eq!(Request::decode(&[0, 0x80, 0, 0]), Err(NatPmpError::Direction));
        assert_eq!(Response::decode(&Request::Address.encode()), Err(NatPmpError::Direction));
        assert_eq!(Request::decode(&[0, 2]), Err(NatPmpError::Opcode(2)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(opcode in any::<u8>(), tail in vec(any::<u8>(), 0..20)) {
            let mut bytes = vec![VERSION, opcode];
            bytes.extend(tail);
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
            }
            if let Ok(response) = Response::decode(&bytes) {
                prop_assert_eq!(Response::decode(&response.encode()), Ok(response));
            }
            let _ = Response::decode(&bytes[..1]);
        }
    }
}
