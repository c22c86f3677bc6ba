//! Binding requests and responses as bytes.
//!
//! Deployed relays answer only requests that carry SOFTWARE "tailnode" and a right FINGERPRINT, so that is what
//! [`request`] sends, always 40 bytes:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 2 | type: `0001` request, `0101` success response |
//! | 2 | 2 | length of the attributes |
//! | 4 | 4 | magic cookie `2112A442` |
//! | 8 | 12 | transaction id |
//! | 20 | 4 + 8 | SOFTWARE (`8022`), "tailnode" |
//! | 32 | 4 + 4 | FINGERPRINT (`8028`), CRC-32 of all before it, xor `5354554E` |
//!
//! A response carries XOR-MAPPED-ADDRESS (`0020`, RFC 8489 §14.2). Some servers send it as `8020`, ancient ones only
//! the plain MAPPED-ADDRESS (`0001`); [`Response::decode`] takes all three, in this order of preference, and does not
//! mind what else a server adds.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rand_core::CryptoRng;
use stun_rs::attributes::discovery::{ChangeRequest, ChangeRequestFlags};
use stun_rs::attributes::stun::{Fingerprint, Software, XorMappedAddress};
use stun_rs::methods::BINDING;
use stun_rs::{
    DecoderContextBuilder, MessageClass, MessageDecoderBuilder, MessageEncoderBuilder, StunMessage, StunMessageBuilder,
};

/// The number that makes STUN recognisable (RFC 8489 §5).
pub const COOKIE: u32 = 0x2112_a442;
/// What members of a mesh call themselves.
const SOFTWARE: &str = "tailnode";

const MAPPED_ADDRESS: u16 = 0x0001;
const XOR_MAPPED_ADDRESS: u16 = 0x0020;
const XOR_MAPPED_ADDRESS_ALT: u16 = 0x8020;
const HEADER_LEN: usize = 20;

/// Names one request; its response carries the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransactionId(pub [u8; 12]);

impl TransactionId {
    /// Draws a new one.
    pub fn generate(rng: &mut (impl CryptoRng + ?Sized)) -> Self {
        let mut bytes = [0; 12];
        rng.fill_bytes(&mut bytes);
        Self(bytes)
    }
}

/// Why a datagram is not the STUN message that was wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StunError {
    /// Not a STUN message, or cut short.
    #[error("not a well-formed stun message")]
    Malformed,
    /// A STUN message of another kind.
    #[error("not a binding request")]
    NotRequest,
    /// A STUN message of another kind.
    #[error("not a successful binding response")]
    NotResponse,
    /// The fingerprint is missing or wrong.
    #[error("fingerprint is missing or wrong")]
    Fingerprint,
    /// The sender is not a member of a mesh.
    #[error("request does not name the mesh's software")]
    Stranger,
    /// A response without an address.
    #[error("response carries no address")]
    NoAddress,
    /// A response to no question of ours.
    #[error("response to an unknown transaction")]
    UnknownTransaction,
}

/// A binding request that names the mesh's software: 40 bytes.
#[must_use]
pub fn request(tx: TransactionId) -> Vec<u8> {
    encode(&member_request(tx).with_attribute(Fingerprint::default()).build())
}

/// The same with the wish that the answer comes from the server's other port (CHANGE-REQUEST, RFC 5780 §7.2): 48 bytes.
/// Servers that do not know the wish answer from the same port.
#[must_use]
pub fn request_from_other_port(tx: TransactionId) -> Vec<u8> {
    let wish = ChangeRequest::new(Some(ChangeRequestFlags::ChangePort.into()));
    encode(&member_request(tx).with_attribute(wish).with_attribute(Fingerprint::default()).build())
}

fn member_request(tx: TransactionId) -> StunMessageBuilder {
    let builder = StunMessageBuilder::new(BINDING, MessageClass::Request).with_transaction_id(tx.0.into());
    match Software::new(SOFTWARE) {
        Ok(software) => builder.with_attribute(software),
        Err(_) => builder,
    }
}

/// A success response that tells `mapped`. IPv4-mapped IPv6 addresses are told as IPv4.
#[must_use]
pub fn response(tx: TransactionId, mapped: SocketAddr) -> Vec<u8> {
    let address = XorMappedAddress::from(SocketAddr::new(mapped.ip().to_canonical(), mapped.port()));
    encode(
        &StunMessageBuilder::new(BINDING, MessageClass::SuccessResponse)
            .with_transaction_id(tx.0.into())
            .with_attribute(address)
            .build(),
    )
}

fn encode(message: &StunMessage) -> Vec<u8> {
    let mut buffer = vec![0; 64];
    let len = MessageEncoderBuilder::default()
        .build()
        .encode(&mut buffer, message)
        .expect("64 bytes hold a header and the few short attributes that are ever added");
    buffer.truncate(len);
    buffer
}

/// A binding request, as a server reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// To be repeated in the response.
    pub tx: TransactionId,
    /// Whether it carries SOFTWARE "tailnode" and a right fingerprint.
    pub member: bool,
    /// Whether the answer is wanted from the server's other port.
    pub from_other_port: bool,
}

impl Request {
    /// Reads a binding request.
    ///
    /// # Errors
    /// [`StunError::Malformed`], [`StunError::NotRequest`], or [`StunError::Fingerprint`] if there is one and it is
    /// wrong.
    pub fn decode(datagram: &[u8]) -> Result<Self, StunError> {
        let decoder = MessageDecoderBuilder::default().with_context(DecoderContextBuilder::default().build()).build();
        let (message, len) = decoder.decode(datagram).map_err(|_| StunError::Malformed)?;
        if message.method() != BINDING || message.class() != MessageClass::Request {
            return Err(StunError::NotRequest);
        }
        let fingerprinted = message.get::<Fingerprint>().is_some();
        if fingerprinted {
            let strict = DecoderContextBuilder::default().with_validation().build();
            MessageDecoderBuilder::default()
                .with_context(strict)
                .build()
                .decode(&datagram[..len])
                .map_err(|_| StunError::Fingerprint)?;
        }
        let named = message.get::<Software>().and_then(|found| found.as_software().ok());
        Ok(Self {
            tx: TransactionId(*message.transaction_id().as_bytes()),
            member: fingerprinted && named.is_some_and(|software| *software == SOFTWARE),
            from_other_port: message
                .get::<ChangeRequest>()
                .and_then(|found| found.as_change_request().ok())
                .is_some_and(|wish| wish.flags().contains(ChangeRequestFlags::ChangePort)),
        })
    }
}

/// A success response, as a client reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    /// The request's.
    pub tx: TransactionId,
    /// The address that the server saw.
    pub mapped: SocketAddr,
}

impl Response {
    /// Reads a success response.
    ///
    /// # Errors
    /// [`StunError::Malformed`], [`StunError::NotResponse`] or [`StunError::NoAddress`].
    pub fn decode(datagram: &[u8]) -> Result<Self, StunError> {
        let (header, rest) = datagram.split_first_chunk::<HEADER_LEN>().ok_or(StunError::Malformed)?;
        if header[4..8] != COOKIE.to_be_bytes() {
            return Err(StunError::Malformed);
        }
        if header[..2] != [0x01, 0x01] {
            return Err(StunError::NotResponse);
        }
        let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let attributes = rest.get(..len).ok_or(StunError::Malformed)?;
        let mut tx = [0; 12];
        tx.copy_from_slice(&header[8..]);

        let (mut standard, mut alternative, mut plain) = (None, None, None);
        for (kind, value) in Attributes(attributes) {
            match kind {
                XOR_MAPPED_ADDRESS => standard = standard.or_else(|| address(value, &header[4..])),
                XOR_MAPPED_ADDRESS_ALT => alternative = alternative.or_else(|| address(value, &header[4..])),
                MAPPED_ADDRESS => plain = plain.or_else(|| address(value, &[0; 16])),
                _ => {}
            }
        }
        let mapped = standard.or(alternative).or(plain).ok_or(StunError::NoAddress)?;
        Ok(Self { tx: TransactionId(tx), mapped })
    }
}

/// Walks over type, length and value; ends at the first attribute that is cut short.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (&[k0, k1, l0, l1], rest) = self.0.split_first_chunk::<4>()?;
        let len = usize::from(u16::from_be_bytes([l0, l1]));
        let value = rest.get(..len)?;
        self.0 = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_be_bytes([k0, k1]), value))
    }
}

/// Reads family, port and address, each combined with `mask` (cookie and transaction, or zeros).
fn address(value: &[u8], mask: &[u8]) -> Option<SocketAddr> {
    let (&[_, family, p0, p1], bytes) = value.split_first_chunk::<4>()?;
    let port = u16::from_be_bytes([p0 ^ mask[0], p1 ^ mask[1]]);
    let ip = match family {
        1 => IpAddr::V4(Ipv4Addr::from(unmasked::<4>(bytes, mask)?)),
        2 => IpAddr::V6(Ipv6Addr::from(unmasked::<16>(bytes, mask)?)),
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

fn unmasked<const N: usize>(bytes: &[u8], mask: &[u8]) -> Option<[u8; N]> {
    let mut out = *bytes.first_chunk::<N>()?;
    for (byte, mask) in out.iter_mut().zip(mask) {
        *byte ^= mask;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn requests_equal_the_recorded_ones_byte_for_byte() {
        let recorded: std::collections::BTreeMap<String, Vec<String>> =
            serde_json::from_str(include_str!("../../tests/data/stun-requests.json")).unwrap();
        assert!(recorded.len() >= 4);
        for datagram in recorded.values().flatten().map(|text| hex::decode(text).unwrap()) {
            let read = Request::decode(&datagram).unwrap();
            assert!(read.member);
            assert_eq!(request(read.tx), datagram);
        }
    }

    #[test]
    fn responses_tell_the_address_of_either_family() {
        for text in ["192.0.2.1:41641", "[2001:db8::7]:3478"] {
            let (tx, mapped) = (TransactionId([8; 12]), text.parse().unwrap());
            assert_eq!(Response::decode(&response(tx, mapped)), Ok(Response { tx, mapped }));
        }
        let mapped = response(TransactionId([8; 12]), "[::ffff:192.0.2.1]:9".parse().unwrap());
        assert_eq!(Response::decode(&mapped).unwrap().mapped, "192.0.2.1:9".parse().unwrap());
    }

    #[test]
    fn old_ways_to_tell_the_address_are_understood() {
        let tx = TransactionId([8; 12]);
        let right: SocketAddr = "192.0.2.1:41641".parse().unwrap();
        let mut alternative = response(tx, right);
        alternative[20..22].copy_from_slice(&XOR_MAPPED_ADDRESS_ALT.to_be_bytes());
        assert_eq!(Response::decode(&alternative).unwrap().mapped, right);

        let mut plain = response(tx, right)[..HEADER_LEN].to_vec();
        plain.extend([0, 1, 0, 8, 0, 1, 0xa2, 0xa9, 192, 0, 2, 1]);
        assert_eq!(Response::decode(&plain).unwrap().mapped, right);
    }

    #[test]
    fn the_standard_attribute_wins_and_strange_ones_do_no_harm() {
        let mut datagram = response(TransactionId([8; 12]), "192.0.2.1:41641".parse().unwrap());
        datagram.extend([0, 1, 0, 8, 0, 1, 0, 9, 203, 0, 113, 9]);
        datagram.extend([0x80, 0x22, 0, 2, 0xff, 0xfe, 0, 0]);
        datagram[3] += 20;
        assert_eq!(Response::decode(&datagram).unwrap().mapped, "192.0.2.1:41641".parse().unwrap());
    }

    #[test]
    fn the_wish_for_an_answer_from_elsewhere_is_understood() {
        let tx = TransactionId([8; 12]);
        let wish = request_from_other_port(tx);
        assert_eq!(wish.len(), 48);
        let read = Request::decode(&wish).unwrap();
        assert!(read.member && read.from_other_port && read.tx == tx);
        assert!(!Request::decode(&request(tx)).unwrap().from_other_port);
    }

    #[test]
    fn a_changed_request_is_refused() {
        let mut datagram = request(TransactionId([8; 12]));
        datagram[10] ^= 1;
        assert_eq!(Request::decode(&datagram), Err(StunError::Fingerprint));
        assert_eq!(Request::decode(&datagram[..30]), Err(StunError::Malformed));
        let answer = response(TransactionId([8; 12]), "192.0.2.1:1".parse().unwrap());
        assert_eq!(Request::decode(&answer), Err(StunError::NotRequest));
        assert_eq!(Response::decode(&request(TransactionId([8; 12]))), Err(StunError::NotResponse));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(tail in vec(any::<u8>(), 0..120), kind in 0u8..2, cut in 0usize..140) {
            let mut datagram = vec![kind, 1, 0, u8::try_from(tail.len()).unwrap()];
            datagram.extend(COOKIE.to_be_bytes());
            datagram.extend([5; 12]);
            datagram.extend(&tail);
            datagram.truncate(cut);
            let _ = (Request::decode(&datagram), Response::decode(&datagram));
        }
    }
}
