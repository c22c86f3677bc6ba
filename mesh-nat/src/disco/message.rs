//! The nine disco messages of the protocol and one of our own, as values that cannot be wrong.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use mesh_noise::key::{DiscoPublic, KEY_LEN, NodePublic};

use crate::hard::message::{KIND as PUNCH, Punch};
use crate::path::Vni;

/// Names one ping; its pong carries the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TxId(pub [u8; 12]);

/// A disco message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// Asks for a pong along the same path.
    Ping(Ping),
    /// Answers a ping.
    Pong(Pong),
    /// Asks the receiver to ping the sender at these addresses.
    CallMeMaybe(CallMeMaybe),
    /// Opens one client's leg at a peer relay.
    Bind(Binding),
    /// The peer relay's proof-of-address question.
    BindChallenge(Binding),
    /// The client's answer to it.
    BindAnswer(Binding),
    /// Tells the other client about an allocation at a peer relay.
    CallMeMaybeVia(RelayEndpoint),
    /// Asks a peer relay for an allocation.
    AllocateRequest(AllocateRequest),
    /// Grants one.
    AllocateResponse(AllocateResponse),
    /// Arranges an attempt to guess ports; only our own nodes understand it.
    Punch(Punch),
}

/// Body of a ping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ping {
    /// Names this ping.
    pub tx: TxId,
    /// The sender's node key: a claim, to be compared with what control says. Ancient peers leave it out.
    pub node: Option<NodePublic>,
    /// Zero bytes at the end, to probe the path for size. Only sent together with a node key.
    pub padding: usize,
}

/// Body of a pong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pong {
    /// The ping's transaction.
    pub tx: TxId,
    /// Where the ping came from, as its receiver saw it. For relays `127.3.3.40` and the region as the port.
    pub observed: SocketAddr,
}

/// Body of a call-me-maybe.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CallMeMaybe {
    /// All addresses at which the sender can be reached. A receiver forgets those of earlier lists.
    pub endpoints: Vec<SocketAddr>,
}

/// Body of the three messages that bind a client to a peer relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The allocation.
    pub vni: Vni,
    /// Names this handshake; chosen by the client, not zero.
    pub generation: u32,
    /// The other client.
    pub remote: DiscoPublic,
    /// What the server asks for and the client echoes. Zero in a bind.
    pub challenge: [u8; 32],
}

/// An allocation at a peer relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayEndpoint {
    /// The server's disco key.
    pub server: DiscoPublic,
    /// The two clients.
    pub clients: [DiscoPublic; 2],
    /// Orders allocations of one server: the higher one is newer.
    pub lamport: u64,
    /// The allocation.
    pub vni: Vni,
    /// How long an allocation waits for its clients.
    pub bind_lifetime: Duration,
    /// How long a bound one may stay silent.
    pub steady_lifetime: Duration,
    /// Where the server listens; at least one.
    pub endpoints: Vec<SocketAddr>,
}

/// Body of an allocate request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocateRequest {
    /// The two clients, one of them the sender.
    pub clients: [DiscoPublic; 2],
    /// Names this request.
    pub generation: u32,
}

/// Body of an allocate response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocateResponse {
    /// The request's generation.
    pub generation: u32,
    /// The allocation.
    pub endpoint: RelayEndpoint,
}

/// Why a plaintext is not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Fewer bytes than the message's fixed part.
    #[error("message of type {kind} is too short: {len} bytes in the body")]
    Short {
        /// The message type; 0 if even that is missing.
        kind: u8,
        /// Bytes after the version.
        len: usize,
    },
    /// A type that this version of the protocol does not have.
    #[error("unknown message type {0}")]
    UnknownType(u8),
    /// A version other than zero where the layout depends on it.
    #[error("message of type {kind} has version {version}, expected 0")]
    Version {
        /// The message type.
        kind: u8,
        /// The version read.
        version: u8,
    },
    /// A field holds what it must not.
    #[error("field {0} is out of range")]
    Field(&'static str),
}

const PING: u8 = 1;
const PONG: u8 = 2;
const CALL_ME_MAYBE: u8 = 3;
const BIND: u8 = 4;
const BIND_CHALLENGE: u8 = 5;
const BIND_ANSWER: u8 = 6;
const CALL_ME_MAYBE_VIA: u8 = 7;
const ALLOCATE_REQUEST: u8 = 8;
const ALLOCATE_RESPONSE: u8 = 9;

const ADDRESS_LEN: usize = 18;
/// Length of a sealed ping's plaintext without padding: type, version, transaction, node key.
pub const PING_LEN: usize = 2 + 12 + KEY_LEN;

impl Message {
    /// Reads a message from an opened box.
    ///
    /// # Errors
    /// Says what is missing or out of range. A call-me-maybe of odd length or unknown version is an empty list, as
    /// deployed peers read it.
    pub fn decode(plaintext: &[u8]) -> Result<Self, DecodeError> {
        let Some((&[kind, version], body)) = plaintext.split_first_chunk::<2>() else {
            return Err(DecodeError::Short { kind: plaintext.first().copied().unwrap_or(0), len: 0 });
        };
        let mut reader = Reader { kind, len: body.len(), rest: body };
        Ok(match kind {
            PING => {
                let tx = TxId(reader.take()?);
                let node = reader.take::<KEY_LEN>().ok().map(NodePublic::from_bytes);
                let padding = if node.is_some() { reader.rest.len() } else { 0 };
                Self::Ping(Ping { tx, node, padding })
            }
            PONG => Self::Pong(Pong { tx: TxId(reader.take()?), observed: reader.address()? }),
            CALL_ME_MAYBE => {
                let readable = version == 0 && body.len().is_multiple_of(ADDRESS_LEN);
                let endpoints = if readable { reader.addresses() } else { Vec::new() };
                Self::CallMeMaybe(CallMeMaybe { endpoints })
            }
            BIND => Self::Bind(reader.binding()?),
            BIND_CHALLENGE => Self::BindChallenge(reader.binding()?),
            BIND_ANSWER => Self::BindAnswer(reader.binding()?),
            CALL_ME_MAYBE_VIA | ALLOCATE_REQUEST | ALLOCATE_RESPONSE if version != 0 => {
                return Err(DecodeError::Version { kind, version });
            }
            CALL_ME_MAYBE_VIA => Self::CallMeMaybeVia(reader.relay_endpoint()?),
            ALLOCATE_REQUEST => {
                let clients = [reader.disco()?, reader.disco()?];
                Self::AllocateRequest(AllocateRequest { clients, generation: reader.u32()? })
            }
            ALLOCATE_RESPONSE => {
                let generation = reader.u32()?;
                Self::AllocateResponse(AllocateResponse { generation, endpoint: reader.relay_endpoint()? })
            }
            PUNCH => Self::Punch(Punch::decode(version, body)?),
            unknown => return Err(DecodeError::UnknownType(unknown)),
        })
    }

    /// Appends type, version and body to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.kind(), 0]);
        match self {
            Self::Ping(ping) => {
                out.extend_from_slice(&ping.tx.0);
                if let Some(node) = &ping.node {
                    out.extend_from_slice(node.as_bytes());
                    out.resize(out.len() + ping.padding, 0);
                }
            }
            Self::Pong(pong) => {
                out.extend_from_slice(&pong.tx.0);
                put_address(out, &pong.observed);
            }
            Self::CallMeMaybe(call) => call.endpoints.iter().for_each(|endpoint| put_address(out, endpoint)),
            Self::Bind(binding) | Self::BindChallenge(binding) | Self::BindAnswer(binding) => {
                out.extend_from_slice(&binding.vni.get().to_be_bytes());
                out.extend_from_slice(&binding.generation.to_be_bytes());
                out.extend_from_slice(binding.remote.as_bytes());
                out.extend_from_slice(&binding.challenge);
            }
            Self::CallMeMaybeVia(endpoint) => put_relay_endpoint(out, endpoint),
            Self::AllocateRequest(request) => {
                request.clients.iter().for_each(|client| out.extend_from_slice(client.as_bytes()));
                out.extend_from_slice(&request.generation.to_be_bytes());
            }
            Self::AllocateResponse(response) => {
                out.extend_from_slice(&response.generation.to_be_bytes());
                put_relay_endpoint(out, &response.endpoint);
            }
            Self::Punch(punch) => punch.encode(out),
        }
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Ping(_) => PING,
            Self::Pong(_) => PONG,
            Self::CallMeMaybe(_) => CALL_ME_MAYBE,
            Self::Bind(_) => BIND,
            Self::BindChallenge(_) => BIND_CHALLENGE,
            Self::BindAnswer(_) => BIND_ANSWER,
            Self::CallMeMaybeVia(_) => CALL_ME_MAYBE_VIA,
            Self::AllocateRequest(_) => ALLOCATE_REQUEST,
            Self::AllocateResponse(_) => ALLOCATE_RESPONSE,
            Self::Punch(_) => PUNCH,
        }
    }
}

fn put_address(out: &mut Vec<u8>, address: &SocketAddr) {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    out.extend_from_slice(&ip.octets());
    out.extend_from_slice(&address.port().to_be_bytes());
}

fn put_relay_endpoint(out: &mut Vec<u8>, endpoint: &RelayEndpoint) {
    let nanos = |lifetime: Duration| i64::try_from(lifetime.as_nanos()).unwrap_or(i64::MAX).to_be_bytes();
    out.extend_from_slice(endpoint.server.as_bytes());
    endpoint.clients.iter().for_each(|client| out.extend_from_slice(client.as_bytes()));
    out.extend_from_slice(&endpoint.lamport.to_be_bytes());
    out.extend_from_slice(&endpoint.vni.get().to_be_bytes());
    out.extend_from_slice(&nanos(endpoint.bind_lifetime));
    out.extend_from_slice(&nanos(endpoint.steady_lifetime));
    endpoint.endpoints.iter().for_each(|address| put_address(out, address));
}

/// Walks over a body.
struct Reader<'a> {
    kind: u8,
    len: usize,
    rest: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) =
            self.rest.split_first_chunk::<N>().ok_or(DecodeError::Short { kind: self.kind, len: self.len })?;
        self.rest = rest;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.take().map(u32::from_be_bytes)
    }

    fn disco(&mut self) -> Result<DiscoPublic, DecodeError> {
        self.take().map(DiscoPublic::from_bytes)
    }

    fn vni(&mut self) -> Result<Vni, DecodeError> {
        Vni::new(self.u32()?).ok_or(DecodeError::Field("vni"))
    }

    fn address(&mut self) -> Result<SocketAddr, DecodeError> {
        let ip = Ipv6Addr::from(self.take::<16>()?).to_canonical();
        Ok(SocketAddr::new(ip, u16::from_be_bytes(self.take()?)))
    }

    /// All whole addresses that are left.
    fn addresses(&mut self) -> Vec<SocketAddr> {
        std::iter::from_fn(|| self.address().ok()).collect()
    }

    fn lifetime(&mut self, field: &'static str) -> Result<Duration, DecodeError> {
        let nanos = i64::from_be_bytes(self.take()?);
        u64::try_from(nanos).map(Duration::from_nanos).map_err(|_| DecodeError::Field(field))
    }

    fn binding(&mut self) -> Result<Binding, DecodeError> {
        Ok(Binding { vni: self.vni()?, generation: self.u32()?, remote: self.disco()?, challenge: self.take()? })
    }

    fn relay_endpoint(&mut self) -> Result<RelayEndpoint, DecodeError> {
        let endpoint = RelayEndpoint {
            server: self.disco()?,
            clients: [self.disco()?, self.disco()?],
            lamport: u64::from_be_bytes(self.take()?),
            vni: self.vni()?,
            bind_lifetime: self.lifetime("bind lifetime")?,
            steady_lifetime: self.lifetime("steady-state lifetime")?,
            endpoints: {
                if self.rest.is_empty() || !self.rest.len().is_multiple_of(ADDRESS_LEN) {
                    return Err(DecodeError::Field("relay addresses"));
                }
                self.addresses()
            },
        };
        Ok(endpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn endpoint() -> RelayEndpoint {
        RelayEndpoint {
            server: DiscoPublic::from_bytes([1; 32]),
            clients: [DiscoPublic::from_bytes([2; 32]), DiscoPublic::from_bytes([3; 32])],
            lamport: 4,
            vni: Vni::new(5).unwrap(),
            bind_lifetime: Duration::from_secs(30),
            steady_lifetime: Duration::from_secs(300),
            endpoints: vec!["192.0.2.1:7".parse().unwrap()],
        }
    }

    fn encoded(message: &Message) -> Vec<u8> {
        let mut out = Vec::new();
        message.encode(&mut out);
        out
    }

    #[test]
    fn bodies_have_the_documented_sizes() {
        let tx = TxId([9; 12]);
        let binding = Binding {
            vni: Vni::new(1).unwrap(),
            generation: 2,
            remote: DiscoPublic::from_bytes([3; 32]),
            challenge: [4; 32],
        };
        let sizes = [
            (Message::Ping(Ping { tx, node: None, padding: 0 }), 12),
            (Message::Ping(Ping { tx, node: Some(NodePublic::from_bytes([1; 32])), padding: 6 }), 50),
            (Message::Pong(Pong { tx, observed: "192.0.2.1:9".parse().unwrap() }), 30),
            (Message::CallMeMaybe(CallMeMaybe { endpoints: vec!["[2001:db8::1]:9".parse().unwrap(); 3] }), 54),
            (Message::Bind(binding.clone()), 72),
            (Message::BindChallenge(binding.clone()), 72),
            (Message::BindAnswer(binding), 72),
            (Message::CallMeMaybeVia(endpoint()), 142),
            (Message::AllocateRequest(AllocateRequest { clients: endpoint().clients, generation: 1 }), 68),
            (Message::AllocateResponse(AllocateResponse { generation: 1, endpoint: endpoint() }), 146),
        ];
        for (number, (message, size)) in sizes.into_iter().enumerate() {
            let bytes = encoded(&message);
            assert_eq!(bytes.len(), 2 + size, "message {number}");
            assert_eq!(Message::decode(&bytes).as_ref(), Ok(&message));
        }
    }

    #[test]
    fn ipv4_travels_mapped_and_arrives_plain() {
        let bytes = encoded(&Message::CallMeMaybe(CallMeMaybe { endpoints: vec!["192.0.2.1:258".parse().unwrap()] }));
        assert_eq!(hex::encode(&bytes), "030000000000000000000000ffffc00002010102");
        let Message::CallMeMaybe(call) = Message::decode(&bytes).unwrap() else { panic!("another message") };
        assert_eq!(call.endpoints, ["192.0.2.1:258".parse().unwrap()]);
    }

    #[test]
    fn what_follows_a_fixed_body_is_ignored() {
        let pong = Message::Pong(Pong { tx: TxId([1; 12]), observed: "192.0.2.1:9".parse().unwrap() });
        let mut bytes = encoded(&pong);
        bytes.extend([7; 5]);
        bytes[1] = 3;
        assert_eq!(Message::decode(&bytes), Ok(pong));
    }

    #[test]
    fn an_unreadable_call_me_maybe_is_an_empty_list() {
        let empty = Ok(Message::CallMeMaybe(CallMeMaybe::default()));
        assert_eq!(Message::decode(&[3, 0]), empty);
        assert_eq!(Message::decode(&[&[3, 0][..], &[1; 19]].concat()), empty);
        assert_eq!(Message::decode(&[&[3, 1][..], &[1; 18]].concat()), empty);
    }

    #[test]
    fn relay_endpoints_without_addresses_are_refused() {
        let mut bytes = encoded(&Message::CallMeMaybeVia(endpoint()));
        bytes.truncate(2 + 124);
        assert_eq!(Message::decode(&bytes), Err(DecodeError::Field("relay addresses")));
        bytes[1] = 1;
        assert_eq!(Message::decode(&bytes), Err(DecodeError::Version { kind: 7, version: 1 }));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(kind in 0u8..12, version in 0u8..2, body in vec(any::<u8>(), 0..200)) {
            let bytes = [&[kind, version][..], &body].concat();
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(Message::decode(&encoded(&message)), Ok(message));
            }
        }
    }
}
