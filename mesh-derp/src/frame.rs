//! Frames: what the two ends of a relay connection say to each other.
//!
//! ```text
//!  0        1                    5
//!  +--------+--------------------+------------- - - -
//!  | kind   | length u32 BE      | body (length bytes)
//!  +--------+--------------------+------------- - - -
//! ```
//!
//! All integers are big-endian, keys are 32 raw bytes, `‖` joins. `C` is the client, `S` the relay.
//!
//! | kind | name | from | body | length |
//! |---|---|---|---|---|
//! | 0x01 | ServerKey | S | magic8 ‖ relay key [‖ future] | 40 … 1 KiB |
//! | 0x02 | ClientInfo | C | node key ‖ box (see [`login`](crate::login)) | 56 … 256 KiB |
//! | 0x03 | ServerInfo | S | box | 24 … 1 MiB |
//! | 0x04 | SendPacket | C | destination ‖ packet | 32 … 32 + 64 KiB |
//! | 0x05 | RecvPacket | S | source ‖ packet | 32 … 32 + 64 KiB |
//! | 0x06 | KeepAlive | S | | 0 [tail ignored] |
//! | 0x07 | NotePreferred | C | 01 home, 00 not | 1 |
//! | 0x08 | PeerGone | S | node key [‖ reason1] | 32 … 1 KiB |
//! | 0x09 | PeerPresent | S | node key [‖ ip16 ‖ port2 [‖ flags1]] | 32 … 1 KiB |
//! | 0x0a | ForwardPacket | C | source ‖ destination ‖ packet | 64 … 64 + 64 KiB |
//! | 0x10 | WatchConns | C | | 0 |
//! | 0x11 | ClosePeer | C | node key | 32 |
//! | 0x12 | Ping | both | 8 bytes [‖ tail] | 8 … 1000 |
//! | 0x13 | Pong | both | the same 8 bytes | 8 … 1000 |
//! | 0x14 | Health | S | UTF-8; empty is healthy | 0 … 1 MiB |
//! | 0x15 | Restarting | S | reconnect in, ms u32 ‖ try for, ms u32 | 8 … 1 KiB |
//!
//! Other kinds up to 1 MiB are skipped by both ends; that is how the protocol grows. The magic is
//! `44 45 52 50 F0 9F 94 91`. A packet is opaque: WireGuard or disco. An IPv4 address stands in its v6-mapped form.
//!
//! [`Decoder`] turns a byte stream in any pieces into [`Frame`]s; [`Frame::encode`] goes the other way.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use mesh_noise::key::{KEY_LEN, NodePublic, RelayPublic};

mod decoder;

pub use decoder::Decoder;

/// Bytes before a frame's body.
pub const HEADER_LEN: usize = 5;
/// The longest packet that may be relayed, without keys.
pub const MAX_PACKET_LEN: usize = 64 * 1024;
/// The longest frame of a kind we do not know that is skipped; a longer one ends the connection.
pub const MAX_UNKNOWN_LEN: usize = 1024 * 1024;
/// How a ServerKey frame begins.
pub const MAGIC: [u8; 8] = *b"DERP\xF0\x9F\x94\x91";
/// The version of the protocol spoken here.
pub const PROTOCOL_VERSION: u32 = 2;

/// The kind byte of each known frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
#[expect(missing_docs, reason = "the table in the module doc explains each")]
pub enum Kind {
    ServerKey = 0x01,
    ClientInfo = 0x02,
    ServerInfo = 0x03,
    SendPacket = 0x04,
    RecvPacket = 0x05,
    KeepAlive = 0x06,
    NotePreferred = 0x07,
    PeerGone = 0x08,
    PeerPresent = 0x09,
    ForwardPacket = 0x0a,
    WatchConns = 0x10,
    ClosePeer = 0x11,
    Ping = 0x12,
    Pong = 0x13,
    Health = 0x14,
    Restarting = 0x15,
}

impl Kind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 16] = [
        Self::ServerKey,
        Self::ClientInfo,
        Self::ServerInfo,
        Self::SendPacket,
        Self::RecvPacket,
        Self::KeepAlive,
        Self::NotePreferred,
        Self::PeerGone,
        Self::PeerPresent,
        Self::ForwardPacket,
        Self::WatchConns,
        Self::ClosePeer,
        Self::Ping,
        Self::Pong,
        Self::Health,
        Self::Restarting,
    ];

    /// The kind that a byte names, if it is known.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// The shortest and the longest body.
    #[must_use]
    pub const fn body_len(self) -> (usize, usize) {
        match self {
            Self::ServerKey => (MAGIC.len() + KEY_LEN, 1024),
            Self::ClientInfo => (KEY_LEN + 24, 256 * 1024),
            Self::ServerInfo => (24, 1024 * 1024),
            Self::SendPacket | Self::RecvPacket => (KEY_LEN, KEY_LEN + MAX_PACKET_LEN),
            Self::KeepAlive => (0, 1024),
            Self::NotePreferred => (1, 1),
            Self::PeerGone | Self::PeerPresent => (KEY_LEN, 1024),
            Self::ForwardPacket => (2 * KEY_LEN, 2 * KEY_LEN + MAX_PACKET_LEN),
            Self::WatchConns => (0, 0),
            Self::ClosePeer => (KEY_LEN, KEY_LEN),
            Self::Ping | Self::Pong => (8, 1000),
            Self::Health => (0, 1024 * 1024),
            Self::Restarting => (8, 1024),
        }
    }
}

/// Why bytes are not a frame. The connection they came on cannot be read any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A body is shorter or longer than its kind allows.
    #[error("{kind:?} frame of {length} bytes, expected {min} to {max}")]
    Length {
        /// The kind that was announced.
        kind: Kind,
        /// The length that was announced.
        length: usize,
        /// The shortest allowed.
        min: usize,
        /// The longest allowed.
        max: usize,
    },
    /// A frame of an unknown kind is too long to be skipped.
    #[error("frame of unknown kind {kind:#04x} and {length} bytes, expected at most {MAX_UNKNOWN_LEN}")]
    UnknownTooLong {
        /// The kind that was announced.
        kind: u8,
        /// The length that was announced.
        length: usize,
    },
    /// A ServerKey frame does not begin with the magic.
    #[error("server key frame without the protocol's magic")]
    Magic,
    /// A member holds a value that means nothing.
    #[error("{kind:?} frame with a meaningless {field}")]
    Value {
        /// The kind of the frame.
        kind: Kind,
        /// The member.
        field: &'static str,
    },
}

/// Why a peer cannot be reached through the relay any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GoneReason {
    /// It was connected and has left.
    Disconnected,
    /// The relay does not know it.
    NotHere,
    /// A reason this version does not know.
    Other(u8),
}

impl GoneReason {
    const fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Disconnected,
            1 => Self::NotHere,
            other => Self::Other(other),
        }
    }

    const fn to_byte(self) -> u8 {
        match self {
            Self::Disconnected => 0,
            Self::NotHere => 1,
            Self::Other(byte) => byte,
        }
    }
}

/// One unit of the protocol. See the table in the [module doc](self).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Frame {
    /// The relay's public key, its first frame always.
    ServerKey(RelayPublic),
    /// Who the client is, and proof of it.
    ClientInfo {
        /// The client's node key.
        node: NodePublic,
        /// A box that only the holder of that key can have sealed.
        sealed: Bytes,
    },
    /// The relay's settings for this client.
    ServerInfo {
        /// A box for the client.
        sealed: Bytes,
    },
    /// A packet to be passed on.
    SendPacket {
        /// For whom.
        destination: NodePublic,
        /// The packet.
        payload: Bytes,
    },
    /// A packet that was passed on.
    RecvPacket {
        /// From whom.
        source: NodePublic,
        /// The packet.
        payload: Bytes,
    },
    /// Nothing, so that the connection is seen to be alive.
    KeepAlive,
    /// Whether this relay is the client's home.
    NotePreferred(bool),
    /// A peer cannot be reached here.
    PeerGone {
        /// Which.
        peer: NodePublic,
        /// Why.
        reason: GoneReason,
    },
    /// A peer has connected; only relays of the same region are told.
    PeerPresent {
        /// Which.
        peer: NodePublic,
        /// Its address, if the sender tells.
        address: Option<SocketAddr>,
        /// Bit 0 regular, 1 relay, 2 prober, 3 not on its preferred relay; 0 if the sender does not tell.
        flags: u8,
    },
    /// A packet passed between relays of a region.
    ForwardPacket {
        /// From whom.
        source: NodePublic,
        /// For whom.
        destination: NodePublic,
        /// The packet.
        payload: Bytes,
    },
    /// Asks for PeerPresent and PeerGone about everybody; relays only.
    WatchConns,
    /// Asks to disconnect a node; relays only.
    ClosePeer(NodePublic),
    /// Asks for a Pong.
    Ping([u8; 8]),
    /// Answers a Ping.
    Pong([u8; 8]),
    /// What is wrong with the connection, for people; empty: nothing.
    Health(String),
    /// The relay is about to restart.
    Restarting {
        /// When to reconnect.
        reconnect_in: Duration,
        /// For how long to keep trying.
        try_for: Duration,
    },
}

impl Frame {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::ServerKey(_) => Kind::ServerKey,
            Self::ClientInfo { .. } => Kind::ClientInfo,
            Self::ServerInfo { .. } => Kind::ServerInfo,
            Self::SendPacket { .. } => Kind::SendPacket,
            Self::RecvPacket { .. } => Kind::RecvPacket,
            Self::KeepAlive => Kind::KeepAlive,
            Self::NotePreferred(_) => Kind::NotePreferred,
            Self::PeerGone { .. } => Kind::PeerGone,
            Self::PeerPresent { .. } => Kind::PeerPresent,
            Self::ForwardPacket { .. } => Kind::ForwardPacket,
            Self::WatchConns => Kind::WatchConns,
            Self::ClosePeer(_) => Kind::ClosePeer,
            Self::Ping(_) => Kind::Ping,
            Self::Pong(_) => Kind::Pong,
            Self::Health(_) => Kind::Health,
            Self::Restarting { .. } => Kind::Restarting,
        }
    }

    /// Reads the body of a frame of `kind`. What follows the known members is ignored where the table allows a tail.
    ///
    /// # Errors
    /// If the length is not one that [`Kind::body_len`] allows, or a member means nothing.
    pub fn decode(kind: Kind, mut body: Bytes) -> Result<Self, FrameError> {
        let (min, max) = kind.body_len();
        if body.len() < min || body.len() > max {
            return Err(FrameError::Length { kind, length: body.len(), min, max });
        }
        Ok(match kind {
            Kind::ServerKey => {
                if body.split_to(MAGIC.len()) != MAGIC[..] {
                    return Err(FrameError::Magic);
                }
                Self::ServerKey(RelayPublic::from_bytes(take(&mut body)))
            }
            Kind::ClientInfo => Self::ClientInfo { node: node(&mut body), sealed: body },
            Kind::ServerInfo => Self::ServerInfo { sealed: body },
            Kind::SendPacket => Self::SendPacket { destination: node(&mut body), payload: body },
            Kind::RecvPacket => Self::RecvPacket { source: node(&mut body), payload: body },
            Kind::KeepAlive => Self::KeepAlive,
            Kind::NotePreferred => match body[0] {
                0 => Self::NotePreferred(false),
                1 => Self::NotePreferred(true),
                2.. => return Err(FrameError::Value { kind, field: "flag" }),
            },
            Kind::PeerGone => {
                let peer = node(&mut body);
                let reason = body.first().map_or(GoneReason::Disconnected, |byte| GoneReason::from_byte(*byte));
                Self::PeerGone { peer, reason }
            }
            Kind::PeerPresent => {
                let peer = node(&mut body);
                let address = (body.len() >= 18).then(|| {
                    let ip = Ipv6Addr::from(take::<16>(&mut body)).to_canonical();
                    SocketAddr::new(ip, body.get_u16())
                });
                Self::PeerPresent {
                    peer,
                    address,
                    flags: body.first().copied().filter(|_| address.is_some()).unwrap_or(0),
                }
            }
            Kind::ForwardPacket => {
                Self::ForwardPacket { source: node(&mut body), destination: node(&mut body), payload: body }
            }
            Kind::WatchConns => Self::WatchConns,
            Kind::ClosePeer => Self::ClosePeer(node(&mut body)),
            Kind::Ping => Self::Ping(take(&mut body)),
            Kind::Pong => Self::Pong(take(&mut body)),
            Kind::Health => match std::str::from_utf8(&body) {
                Ok(text) => Self::Health(text.to_owned()),
                Err(_) => return Err(FrameError::Value { kind, field: "text" }),
            },
            Kind::Restarting => Self::Restarting {
                reconnect_in: Duration::from_millis(body.get_u32().into()),
                try_for: Duration::from_millis(body.get_u32().into()),
            },
        })
    }

    /// Appends the frame, header and body, to `out`.
    ///
    /// Durations beyond 49 days and texts or boxes beyond their kind's limit are cut to what fits. Packets longer than
    /// [`MAX_PACKET_LEN`] are the caller's mistake: the other end refuses them.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::ServerKey(key) => put(out, Kind::ServerKey, &[&MAGIC, key.as_bytes()]),
            Self::ClientInfo { node, sealed } => put(out, Kind::ClientInfo, &[node.as_bytes(), sealed]),
            Self::ServerInfo { sealed } => put(out, Kind::ServerInfo, &[sealed]),
            Self::SendPacket { destination, payload } => put(out, Kind::SendPacket, &[destination.as_bytes(), payload]),
            Self::RecvPacket { source, payload } => put(out, Kind::RecvPacket, &[source.as_bytes(), payload]),
            Self::KeepAlive => put(out, Kind::KeepAlive, &[]),
            Self::NotePreferred(home) => put(out, Kind::NotePreferred, &[&[u8::from(*home)]]),
            Self::PeerGone { peer, reason } => put(out, Kind::PeerGone, &[peer.as_bytes(), &[reason.to_byte()]]),
            Self::PeerPresent { peer, address: None, .. } => put(out, Kind::PeerPresent, &[peer.as_bytes()]),
            Self::PeerPresent { peer, address: Some(address), flags } => {
                let ip = match address.ip() {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                let port = address.port().to_be_bytes();
                put(out, Kind::PeerPresent, &[peer.as_bytes(), &ip.octets(), &port, &[*flags]]);
            }
            Self::ForwardPacket { source, destination, payload } => {
                put(out, Kind::ForwardPacket, &[source.as_bytes(), destination.as_bytes(), payload]);
            }
            Self::WatchConns => put(out, Kind::WatchConns, &[]),
            Self::ClosePeer(peer) => put(out, Kind::ClosePeer, &[peer.as_bytes()]),
            Self::Ping(data) => put(out, Kind::Ping, &[data]),
            Self::Pong(data) => put(out, Kind::Pong, &[data]),
            Self::Health(text) => put(out, Kind::Health, &[text.as_bytes()]),
            Self::Restarting { reconnect_in, try_for } => {
                put(out, Kind::Restarting, &[&millis(*reconnect_in), &millis(*try_for)]);
            }
        }
    }

    /// The frame alone, as bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        let mut out = BytesMut::new();
        self.encode(&mut out);
        out.freeze()
    }
}

/// Whether a packet looks like disco, which overtakes other packets: long enough and beginning with its magic.
///
/// The relay cannot know more; the rest is sealed.
#[must_use]
pub fn looks_like_disco(packet: &[u8]) -> bool {
    const DISCO_MAGIC: &[u8] = b"TS\xF0\x9F\x92\xAC";
    packet.len() >= 62 && packet.starts_with(DISCO_MAGIC)
}

fn put(out: &mut BytesMut, kind: Kind, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.reserve(HEADER_LEN + length);
    out.put_u8(kind as u8);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    for part in parts {
        out.put_slice(part);
    }
}

fn millis(duration: Duration) -> [u8; 4] {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX).to_be_bytes()
}

/// Takes `N` bytes off the front. The caller has checked the length.
fn take<const N: usize>(body: &mut Bytes) -> [u8; N] {
    let mut bytes = [0; N];
    body.copy_to_slice(&mut bytes);
    bytes
}

fn node(body: &mut Bytes) -> NodePublic {
    NodePublic::from_bytes(take(body))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn any_node() -> impl Strategy<Value = NodePublic> {
        any::<[u8; 32]>().prop_map(NodePublic::from_bytes)
    }

    fn any_payload() -> impl Strategy<Value = Bytes> {
        proptest::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from)
    }

    pub(crate) fn any_frame() -> impl Strategy<Value = Frame> {
        let sealed = || proptest::collection::vec(any::<u8>(), 24..200).prop_map(Bytes::from);
        let pair = (any::<u32>(), any::<u32>());
        let address = proptest::option::of((any::<[u8; 4]>(), any::<[u8; 16]>(), any::<bool>(), any::<u16>()));
        prop_oneof![
            any::<[u8; 32]>().prop_map(|key| Frame::ServerKey(RelayPublic::from_bytes(key))),
            (any_node(), sealed()).prop_map(|(node, sealed)| Frame::ClientInfo { node, sealed }),
            sealed().prop_map(|sealed| Frame::ServerInfo { sealed }),
            (any_node(), any_payload()).prop_map(|(destination, payload)| Frame::SendPacket { destination, payload }),
            (any_node(), any_payload()).prop_map(|(source, payload)| Frame::RecvPacket { source, payload }),
            Just(Frame::KeepAlive),
            any::<bool>().prop_map(Frame::NotePreferred),
            (any_node(), any::<u8>())
                .prop_map(|(peer, reason)| Frame::PeerGone { peer, reason: GoneReason::from_byte(reason) }),
            (any_node(), address, any::<u8>()).prop_map(|(peer, address, flags)| {
                let address = address.map(|(v4, v6, four, port)| {
                    let ip = if four { IpAddr::from(v4) } else { Ipv6Addr::from(v6).to_canonical() };
                    SocketAddr::new(ip, port)
                });
                Frame::PeerPresent { peer, address, flags: if address.is_some() { flags } else { 0 } }
            }),
            (any_node(), any_node(), any_payload()).prop_map(|(source, destination, payload)| Frame::ForwardPacket {
                source,
                destination,
                payload
            }),
            Just(Frame::WatchConns),
            any_node().prop_map(Frame::ClosePeer),
            any::<[u8; 8]>().prop_map(Frame::Ping),
            any::<[u8; 8]>().prop_map(Frame::Pong),
            ".{0,40}".prop_map(Frame::Health),
            pair.prop_map(|(reconnect, limit)| Frame::Restarting {
                reconnect_in: Duration::from_millis(reconnect.into()),
                try_for: Duration::from_millis(limit.into()),
            }),
        ]
    }

    proptest! {
        #[test]
        fn decode_after_encode_is_identity(frame in any_frame()) {
            let mut bytes = frame.to_bytes();
            let kind = Kind::from_byte(bytes.get_u8()).unwrap();
            prop_assert_eq!(kind, frame.kind());
            prop_assert_eq!(bytes.get_u32() as usize, bytes.len());
            prop_assert_eq!(Frame::decode(kind, bytes), Ok(frame));
        }

        #[test]
        fn any_body_is_a_frame_or_an_error(kind in 0usize..16, body in proptest::collection::vec(any::<u8>(), 0..1100)) {
            let _ = Frame::decode(Kind::ALL[kind], Bytes::from(body));
        }
    }

    #[test]
    fn tails_are_ignored_and_missing_members_have_defaults() {
        let key = [7; 32];
        let peer = NodePublic::from_bytes(key);
        let body = |parts: &[&[u8]]| Bytes::from(parts.concat());
        let gone = |reason| Frame::PeerGone { peer, reason };
        assert_eq!(Frame::decode(Kind::PeerGone, body(&[&key])), Ok(gone(GoneReason::Disconnected)));
        assert_eq!(Frame::decode(Kind::PeerGone, body(&[&key, &[1]])), Ok(gone(GoneReason::NotHere)));
        let present = |address, flags| Frame::PeerPresent { peer, address, flags };
        let mapped = "::ffff:192.0.2.1".parse::<Ipv6Addr>().unwrap().octets();
        let address = Some("192.0.2.1:258".parse().unwrap());
        assert_eq!(Frame::decode(Kind::PeerPresent, body(&[&key])), Ok(present(None, 0)));
        assert_eq!(Frame::decode(Kind::PeerPresent, body(&[&key, &mapped, &[1, 2]])), Ok(present(address, 0)));
        assert_eq!(Frame::decode(Kind::PeerPresent, body(&[&key, &mapped, &[1, 2], &[4]])), Ok(present(address, 4)));
        assert_eq!(
            Frame::decode(Kind::ServerKey, body(&[&MAGIC, &key, b"future"])),
            Ok(Frame::ServerKey(RelayPublic::from_bytes(key)))
        );
        assert_eq!(Frame::decode(Kind::Ping, body(&[b"12345678", b"tail"])), Ok(Frame::Ping(*b"12345678")));
    }

    #[test]
    fn each_limit_is_exact() {
        for kind in Kind::ALL {
            let (min, max) = kind.body_len();
            let mut body = vec![0; max + 1];
            body[..MAGIC.len().min(max)].copy_from_slice(&MAGIC[..MAGIC.len().min(max)]);
            if kind == Kind::NotePreferred {
                body[0] = 1;
            }
            if kind == Kind::Health {
                body.fill(b'x');
            }
            let decode = |len: usize| Frame::decode(kind, Bytes::copy_from_slice(&body[..len]));
            assert!(decode(min).is_ok() && decode(max).is_ok(), "{kind:?}");
            assert!(matches!(decode(max + 1), Err(FrameError::Length { .. })), "{kind:?}");
            assert!(min == 0 || matches!(decode(min - 1), Err(FrameError::Length { .. })), "{kind:?}");
        }
    }

    #[test]
    fn disco_is_told_by_magic_and_length() {
        let mut packet = b"TS\xF0\x9F\x92\xAC".to_vec();
        packet.resize(62, 0);
        assert!(looks_like_disco(&packet));
        assert!(!looks_like_disco(&packet[..61]));
        packet[0] = 4;
        assert!(!looks_like_disco(&packet));
    }
}
