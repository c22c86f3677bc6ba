//! PCP, the Port Control Protocol (RFC 6887): MAP and ANNOUNCE.
//!
//! Every message starts with 24 bytes (§7):
//!
//! ```text
//! request:   version 1 | opcode 1 | reserved 2 | lifetime 4 | client's address 16
//! response:  version 1 | 80+opcode 1 | reserved 1 | result 1 | lifetime 4 | epoch 4 | reserved 12
//! MAP (§11): nonce 12 | protocol 1 | reserved 3 | internal port 2 | external port 2 | external address 16
//! option:    code 1 | reserved 1 | length 2 | data, padded to 4
//! ```
//!
//! ANNOUNCE (§14.1) has no body. All addresses have 16 bytes, IPv4 ones as `::ffff:a.b.c.d`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rand_core::CryptoRng;

/// Where servers listen, for PCP and NAT-PMP alike (§19.1).
pub const SERVER_PORT: u16 = 5351;
/// Where clients hear servers that have started anew (§14.1.2).
pub const ANNOUNCE_PORT: u16 = 5350;
/// UDP, as MAP names it (the IANA protocol number).
pub const UDP: u8 = 17;
/// No message is longer (§7).
pub const MAX_LEN: usize = 1100;

/// The version spoken here.
pub const VERSION: u8 = 2;
const RESPONSE: u8 = 0x80;
const OPCODE_ANNOUNCE: u8 = 0;
const OPCODE_MAP: u8 = 1;
const HEADER_LEN: usize = 24;
const MAP_LEN: usize = 36;
const OPTION_PREFER_FAILURE: u8 = 2;
/// From here on, a server may ignore options that it does not know (§7.3).
const OPTIONAL: u8 = 128;

/// Proves that a response, a renewal or a deletion belongs to a mapping (§11.2): who does not know it cannot have seen the
/// request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nonce(pub [u8; 12]);

impl Nonce {
    /// Draws a new one.
    pub fn generate(rng: &mut (impl CryptoRng + ?Sized)) -> Self {
        let mut bytes = [0; 12];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }
}

impl std::fmt::Debug for Nonce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nonce(..)")
    }
}

/// What a server made of a request (§7.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResultCode {
    /// Done.
    Success,
    /// The server speaks another version.
    UnsupportedVersion,
    /// The server's owner does not want it, or the nonce is another one's.
    NotAuthorized,
    /// The request cannot be read.
    MalformedRequest,
    /// No such operation.
    UnsupportedOpcode,
    /// An option that must be understood is not.
    UnsupportedOption,
    /// An option cannot be read.
    MalformedOption,
    /// The server has no external address at present.
    NetworkFailure,
    /// The server is full.
    NoResources,
    /// No mappings for this transport protocol.
    UnsupportedProtocol,
    /// This client has as many mappings as it may.
    UserExceededQuota,
    /// The wanted external port is taken, and no other would do.
    CannotProvideExternal,
    /// The request's source is not the address that it names: there is a NAT between client and server.
    AddressMismatch,
    /// Too many peers in filters.
    ExcessiveRemotePeers,
    /// One that is newer than this list.
    Other(u8),
}

impl From<u8> for ResultCode {
    fn from(code: u8) -> Self {
        match code {
            0 => Self::Success,
            1 => Self::UnsupportedVersion,
            2 => Self::NotAuthorized,
            3 => Self::MalformedRequest,
            4 => Self::UnsupportedOpcode,
            5 => Self::UnsupportedOption,
            6 => Self::MalformedOption,
            7 => Self::NetworkFailure,
            8 => Self::NoResources,
            9 => Self::UnsupportedProtocol,
            10 => Self::UserExceededQuota,
            11 => Self::CannotProvideExternal,
            12 => Self::AddressMismatch,
            13 => Self::ExcessiveRemotePeers,
            other => Self::Other(other),
        }
    }
}

impl From<ResultCode> for u8 {
    fn from(code: ResultCode) -> Self {
        match code {
            ResultCode::Success => 0,
            ResultCode::UnsupportedVersion => 1,
            ResultCode::NotAuthorized => 2,
            ResultCode::MalformedRequest => 3,
            ResultCode::UnsupportedOpcode => 4,
            ResultCode::UnsupportedOption => 5,
            ResultCode::MalformedOption => 6,
            ResultCode::NetworkFailure => 7,
            ResultCode::NoResources => 8,
            ResultCode::UnsupportedProtocol => 9,
            ResultCode::UserExceededQuota => 10,
            ResultCode::CannotProvideExternal => 11,
            ResultCode::AddressMismatch => 12,
            ResultCode::ExcessiveRemotePeers => 13,
            ResultCode::Other(code) => code,
        }
    }
}

/// Why bytes are not the message that was wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PcpError {
    /// Shorter than its kind requires, or longer than any may be.
    #[error("pcp message of {0} bytes")]
    Length(usize),
    /// Another version, as in the first byte.
    #[error("pcp version {0}")]
    Version(u8),
    /// A request where a response was wanted, or the other way round.
    #[error("a pcp message in the wrong direction")]
    Direction,
    /// An operation that is not known here.
    #[error("pcp opcode {0}")]
    Opcode(u8),
    /// An option that must be understood and is not.
    #[error("pcp option {0}")]
    Option(u8),
    /// An option that is cut short or of the wrong length.
    #[error("a malformed pcp option")]
    MalformedOption,
}

/// A mapping as it is asked for, or as it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Map {
    /// The mapping's nonce.
    pub nonce: Nonce,
    /// The transport protocol's number; [`UDP`] here.
    pub protocol: u8,
    /// The client's port.
    pub internal_port: u16,
    /// The external address: suggested in a request, where an unspecified address or port 0 means "any", and assigned in
    /// a response.
    pub external: SocketAddr,
    /// PREFER_FAILURE (§13.2): rather no mapping than another external address.
    pub prefer_failure: bool,
}

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Body {
    /// Are you there? And from servers, unasked: I have lost all state.
    Announce,
    /// A mapping.
    Map(Map),
}

/// What a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Request {
    /// The address that the client sends from.
    pub client: IpAddr,
    /// For how long, in seconds; 0 deletes, and goes with ANNOUNCE.
    pub lifetime: u32,
    /// What it wants.
    pub body: Body,
}

/// What a server answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Response {
    /// What came of it.
    pub result: ResultCode,
    /// How long the mapping lives, or how long an error is likely to last, in seconds.
    pub lifetime: u32,
    /// Seconds since the server lost its state.
    pub epoch: u32,
    /// The request's body; a mapping with what was assigned.
    pub body: Body,
}

impl Request {
    /// The message: 24 bytes, 60 with a mapping, 64 with the option.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN + MAP_LEN + 4);
        out.extend([VERSION, self.body.opcode(), 0, 0]);
        out.extend(self.lifetime.to_be_bytes());
        out.extend(to_16(self.client));
        self.body.encode(&mut out);
        out
    }

    /// Reads a request, as a server does.
    ///
    /// # Errors
    /// [`PcpError`] says what is wrong with it; options that must be understood and are not count.
    pub fn decode(datagram: &[u8]) -> Result<Self, PcpError> {
        let (header, rest) = split(datagram)?;
        if header[1] & RESPONSE != 0 {
            return Err(PcpError::Direction);
        }
        let body = Body::decode(header[1], rest, true)?;
        Ok(Self { client: from_16(&header[8..24]), lifetime: be32(&header[4..8]), body })
    }
}

impl Response {
    /// The message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_LEN + MAP_LEN + 4);
        out.extend([VERSION, RESPONSE | self.body.opcode(), 0, self.result.into()]);
        out.extend(self.lifetime.to_be_bytes());
        out.extend(self.epoch.to_be_bytes());
        out.extend([0; 12]);
        self.body.encode(&mut out);
        out
    }

    /// What a server answers to a request that it cannot read (§8.2): the request with another head.
    #[must_use]
    pub fn refusal(request: &[u8], result: ResultCode, lifetime: u32, epoch: u32) -> Vec<u8> {
        let mut out = request[..request.len().min(MAX_LEN)].to_vec();
        out.resize(out.len().max(HEADER_LEN).next_multiple_of(4), 0);
        out[0] = VERSION;
        out[1] |= RESPONSE;
        out[2] = 0;
        out[3] = result.into();
        out[4..8].copy_from_slice(&lifetime.to_be_bytes());
        out[8..12].copy_from_slice(&epoch.to_be_bytes());
        out[12..24].fill(0);
        out
    }

    /// Reads a response, as a client does.
    ///
    /// # Errors
    /// [`PcpError`] says what is wrong with it. Options are none of a client's business.
    pub fn decode(datagram: &[u8]) -> Result<Self, PcpError> {
        let (header, rest) = split(datagram)?;
        if header[1] & RESPONSE == 0 {
            return Err(PcpError::Direction);
        }
        Ok(Self {
            result: header[3].into(),
            lifetime: be32(&header[4..8]),
            epoch: be32(&header[8..12]),
            body: Body::decode(header[1] & !RESPONSE, rest, false)?,
        })
    }
}

impl Body {
    const fn opcode(&self) -> u8 {
        match self {
            Self::Announce => OPCODE_ANNOUNCE,
            Self::Map(_) => OPCODE_MAP,
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let Self::Map(map) = self else { return };
        out.extend(map.nonce.0);
        out.extend([map.protocol, 0, 0, 0]);
        out.extend(map.internal_port.to_be_bytes());
        out.extend(map.external.port().to_be_bytes());
        out.extend(to_16(map.external.ip()));
        if map.prefer_failure {
            out.extend([OPTION_PREFER_FAILURE, 0, 0, 0]);
        }
    }

    fn decode(opcode: u8, bytes: &[u8], strict: bool) -> Result<Self, PcpError> {
        match opcode {
            OPCODE_ANNOUNCE => {
                options(bytes, strict)?;
                Ok(Self::Announce)
            }
            OPCODE_MAP => {
                let (map, rest) =
                    bytes.split_first_chunk::<MAP_LEN>().ok_or(PcpError::Length(HEADER_LEN + bytes.len()))?;
                let mut nonce = [0; 12];
                nonce.copy_from_slice(&map[..12]);
                let external = SocketAddr::new(from_16(&map[20..36]), be16(&map[18..20]));
                Ok(Self::Map(Map {
                    nonce: Nonce(nonce),
                    protocol: map[12],
                    internal_port: be16(&map[16..18]),
                    external,
                    prefer_failure: options(rest, strict)?,
                }))
            }
            other => Err(PcpError::Opcode(other)),
        }
    }
}

/// Walks over the options and says whether PREFER_FAILURE is among them.
fn options(mut bytes: &[u8], strict: bool) -> Result<bool, PcpError> {
    let mut prefer_failure = false;
    while let Some((&[code, _, high, low], rest)) = bytes.split_first_chunk::<4>() {
        let len = usize::from(u16::from_be_bytes([high, low]));
        let malformed = len.next_multiple_of(4) > rest.len() || (code == OPTION_PREFER_FAILURE && len != 0);
        match code {
            _ if malformed && strict => return Err(PcpError::MalformedOption),
            _ if malformed => return Ok(prefer_failure),
            OPTION_PREFER_FAILURE => prefer_failure = true,
            0..OPTIONAL if strict => return Err(PcpError::Option(code)),
            _ => {}
        }
        bytes = &rest[len.next_multiple_of(4)..];
    }
    Ok(prefer_failure)
}

fn split(datagram: &[u8]) -> Result<(&[u8; HEADER_LEN], &[u8]), PcpError> {
    let version = *datagram.first().ok_or(PcpError::Length(0))?;
    if version != VERSION {
        return Err(PcpError::Version(version));
    }
    if datagram.len() > MAX_LEN {
        return Err(PcpError::Length(datagram.len()));
    }
    datagram.split_first_chunk::<HEADER_LEN>().ok_or(PcpError::Length(datagram.len()))
}

fn to_16(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn from_16(bytes: &[u8]) -> IpAddr {
    let mut octets = [0; 16];
    octets.copy_from_slice(bytes);
    IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
}

/// "Any address" of a family, as requests suggest it (§11.2).
#[must_use]
pub const fn any_address(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}

fn be16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |number, byte| number << 8 | u16::from(*byte))
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    const NONCE: Nonce = Nonce([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);

    fn map(external: &str, prefer_failure: bool) -> Map {
        let external = external.parse().unwrap();
        Map { nonce: NONCE, protocol: UDP, internal_port: 41641, external, prefer_failure }
    }

    #[test]
    fn a_request_has_the_bytes_of_the_rfc() {
        let body = Body::Map(map("0.0.0.0:41641", false));
        let bytes = Request { client: "192.168.1.7".parse().unwrap(), lifetime: 7200, body }.encode();
        let expected = concat!(
            "0201000000001c20",
            "00000000000000000000ffffc0a80107",
            "0102030405060708090a0b0c",
            "11000000a2a9a2a9",
            "00000000000000000000ffff00000000",
        );
        assert_eq!(hex::encode(bytes), expected);
        let announce = Request { client: "fe80::1".parse().unwrap(), lifetime: 0, body: Body::Announce };
        assert_eq!(hex::encode(announce.encode()), "0200000000000000fe800000000000000000000000000001");
    }

    #[test]
    fn a_response_tells_what_was_assigned() {
        let text = concat!(
            "0281000000000e10",
            "000001f4",
            "000000000000000000000000",
            "0102030405060708090a0b0c",
            "11000000a2a9d431",
            "00000000000000000000ffffcb007105",
        );
        let read = Response::decode(&hex::decode(text).unwrap()).unwrap();
        let expected = Response {
            result: ResultCode::Success,
            lifetime: 3600,
            epoch: 500,
            body: Body::Map(map("203.0.113.5:54321", false)),
        };
        assert_eq!(read, expected);
        assert_eq!(hex::encode(expected.encode()), text);
    }

    #[test]
    fn what_was_written_is_read_back() {
        for external in ["0.0.0.0:0", "203.0.113.5:1", "[2001:db8::7]:41641"] {
            for prefer_failure in [false, true] {
                let client = "2001:db8::7".parse().unwrap();
                let request = Request { client, lifetime: 120, body: Body::Map(map(external, prefer_failure)) };
                assert_eq!(Request::decode(&request.encode()), Ok(request));
            }
        }
    }

    #[test]
    fn options_that_must_be_understood_are_refused_and_others_ignored() {
        let request =
            Request { client: "10.0.0.1".parse().unwrap(), lifetime: 9, body: Body::Map(map("0.0.0.0:0", false)) };
        let with = |option: &[u8]| [request.encode(), option.to_vec()].concat();
        assert_eq!(Request::decode(&with(&[1, 0, 0, 4, 0, 0, 0, 0])), Err(PcpError::Option(1)));
        assert_eq!(Request::decode(&with(&[200, 0, 0, 3, 0, 0, 0, 0])), Ok(request));
        assert_eq!(Request::decode(&with(&[200, 0, 0, 9, 0, 0, 0, 0])), Err(PcpError::MalformedOption));
    }

    #[test]
    fn a_refusal_repeats_the_request_behind_another_head() {
        let request =
            Request { client: "10.0.0.1".parse().unwrap(), lifetime: 9, body: Body::Map(map("0.0.0.0:5", false)) };
        let refusal = Response::refusal(&request.encode(), ResultCode::UnsupportedOption, 1800, 77);
        let read = Response::decode(&refusal).unwrap();
        assert_eq!((read.result, read.lifetime, read.epoch), (ResultCode::UnsupportedOption, 1800, 77));
        assert_eq!(read.body, request.body);
        assert_eq!(Response::refusal(&[9], ResultCode::UnsupportedVersion, 0, 0).len(), 24);
    }

    #[test]
    fn other_versions_and_directions_are_told_apart() {
        assert_eq!(Response::decode(&[0, 128, 0, 1, 0, 0, 0, 0]), Err(PcpError::Version(0)));
        let announce = Request { client: "10.0.0.1".parse().unwrap(), lifetime: 0, body: Body::Announce }.encode();
        assert_eq!(Response::decode(&announce), Err(PcpError::Direction));
        assert_eq!(Response::decode(&announce[..20]), Err(PcpError::Length(20)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(opcode in any::<u8>(), tail in vec(any::<u8>(), 0..90), cut in 0usize..100) {
            let mut bytes = vec![VERSION, opcode];
            bytes.extend(tail);
            bytes.truncate(cut);
            if let Ok(request) = Request::decode(&bytes) {
                prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
            }
            if let Ok(response) = Response::decode(&bytes) {
                prop_assert_eq!(Response::decode(&response.encode()), Ok(response));
            }
            let _ = Response::refusal(&bytes, ResultCode::MalformedRequest, 0, 0);
        }
    }
}
