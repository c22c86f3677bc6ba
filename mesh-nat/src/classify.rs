//! What a UDP datagram is: one socket carries STUN, disco and WireGuard, bare and through peer relays.
//!
//! The tests are made in this order; the first that holds decides:
//!
//! | test | class |
//! |---|---|
//! | ≥ 20 bytes, top two bits clear, bytes 4..8 = `2112A442`, byte 1 = 01 | [`Class::Stun`] |
//! | Geneve header (below) with protocol `7A11`, then disco magic and a key | [`Class::RelayedDisco`] |
//! | Geneve header with protocol `7A12` | [`Class::RelayedWireGuard`] |
//! | disco magic and a key (≥ 38 bytes) | [`Class::Disco`] |
//! | anything else | [`Class::WireGuard`], which judges for itself |
//!
//! The Geneve header that peer relays use (RFC 8926 §3.4 without options):
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | version (top 2 bits) and option length, of which only the version 0 is asked for |
//! | 1 | 1 | bit 7: control; the low 6 bits are zero |
//! | 2 | 2 | protocol: `7A11` disco, `7A12` WireGuard |
//! | 4 | 3 | VNI |
//! | 7 | 1 | zero |
//!
//! The order is unambiguous: WireGuard messages have zeros in bytes 1 to 3, disco has `F09F` where Geneve has its
//! protocol, and STUN's byte 1 sets a bit that is reserved in Geneve.

use crate::disco::seal::{HEADER_LEN, MAGIC};
use crate::path::Vni;

/// Length of the encapsulation that peer relays add, in bytes.
pub const GENEVE_LEN: usize = 8;

/// What a datagram is, and so who handles it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Class {
    /// A STUN binding request or response.
    Stun,
    /// A bare disco message.
    Disco,
    /// WireGuard, or something that WireGuard will reject.
    WireGuard,
    /// Disco that came through a peer relay, behind [`GENEVE_LEN`] bytes.
    RelayedDisco {
        /// The pair's number at the relay.
        vni: Vni,
        /// Whether it belongs to the binding handshake with the relay itself.
        control: bool,
    },
    /// WireGuard that came through a peer relay, behind [`GENEVE_LEN`] bytes.
    RelayedWireGuard {
        /// The pair's number at the relay.
        vni: Vni,
    },
}

/// Tells what `datagram` is. Looks at no more than the first 46 bytes.
#[must_use]
pub fn classify(datagram: &[u8]) -> Class {
    if is_stun(datagram) {
        return Class::Stun;
    }
    if let Some((header, inner)) = datagram.split_first_chunk::<GENEVE_LEN>()
        && header[0] & 0xc0 == 0
        && header[1] & 0x3f == 0
        && header[7] == 0
    {
        let vni = Vni::from_bytes([header[4], header[5], header[6]]);
        match [header[2], header[3]] {
            [0x7a, 0x11] if is_disco(inner) => return Class::RelayedDisco { vni, control: header[1] & 0x80 != 0 },
            [0x7a, 0x12] => return Class::RelayedWireGuard { vni },
            _ => {}
        }
    }
    if is_disco(datagram) { Class::Disco } else { Class::WireGuard }
}

fn is_stun(datagram: &[u8]) -> bool {
    datagram.len() >= 20
        && datagram[0] & 0xc0 == 0
        && datagram[1] == 1
        && datagram[4..8] == crate::stun::message::COOKIE.to_be_bytes()
}

fn is_disco(datagram: &[u8]) -> bool {
    datagram.len() >= HEADER_LEN && datagram.starts_with(&MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geneve(flags: u8, protocol: u16, inner: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0, flags];
        datagram.extend(protocol.to_be_bytes());
        datagram.extend([1, 2, 3, 0]);
        datagram.extend(inner);
        datagram
    }

    fn disco() -> Vec<u8> {
        let mut datagram = MAGIC.to_vec();
        datagram.extend([9; 74]);
        datagram
    }

    #[test]
    fn each_kind_is_told_apart() {
        let vni = Vni::new(0x01_02_03).unwrap();
        let request = crate::stun::message::request(crate::stun::message::TransactionId([7; 12]));
        assert_eq!(classify(&request), Class::Stun);
        assert_eq!(classify(&disco()), Class::Disco);
        assert_eq!(classify(&geneve(0, 0x7a11, &disco())), Class::RelayedDisco { vni, control: false });
        assert_eq!(classify(&geneve(0x80, 0x7a11, &disco())), Class::RelayedDisco { vni, control: true });
        assert_eq!(classify(&geneve(0, 0x7a12, &[4, 0, 0, 0])), Class::RelayedWireGuard { vni });
        for kind in 1..=4 {
            let mut message = vec![kind, 0, 0, 0];
            message.extend([0xaa; 144]);
            assert_eq!(classify(&message), Class::WireGuard);
        }
    }

    #[test]
    fn what_only_looks_like_geneve_is_wireguard() {
        assert_eq!(classify(&geneve(0, 0x7a11, &[0; 80])), Class::WireGuard, "no magic behind the header");
        assert_eq!(classify(&geneve(1, 0x7a12, &[0; 80])), Class::WireGuard, "a reserved bit");
        assert_eq!(classify(&geneve(0, 0x7a13, &disco())), Class::WireGuard, "another protocol");
    }

    #[test]
    fn short_datagrams_are_left_to_wireguard() {
        assert_eq!(classify(&[]), Class::WireGuard);
        assert_eq!(classify(&[7]), Class::WireGuard, "the padding datagram of batched senders");
        assert_eq!(classify(&disco()[..37]), Class::WireGuard);
    }

    proptest! {
        #[test]
        fn any_bytes_get_a_class(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = classify(&bytes);
        }
    }
}
