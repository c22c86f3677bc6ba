//! The envelope: who sent it, and the box around the message.

use mesh_noise::key::{DiscoPublic, KEY_LEN, SharedBox};
use rand_core::CryptoRng;

/// The first bytes of every disco datagram: "TS" and U+1F4AC.
pub const MAGIC: [u8; 6] = [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac];
/// Bytes before the box: magic and the sender's key.
pub const HEADER_LEN: usize = MAGIC.len() + KEY_LEN;
/// Bytes that the envelope adds to a message: header, nonce and tag.
pub const OVERHEAD: usize = HEADER_LEN + mesh_noise::key::BOX_OVERHEAD;

/// Who claims to have sent `datagram`; `None` if it is not disco. Nothing is verified yet.
#[must_use]
pub fn sender(datagram: &[u8]) -> Option<DiscoPublic> {
    let key = datagram.strip_prefix(&MAGIC)?.first_chunk::<KEY_LEN>()?;
    Some(DiscoPublic::from_bytes(*key))
}

/// Wraps `plaintext` for the holder of the other end of `shared`.
pub fn seal(
    sender: &DiscoPublic,
    shared: &SharedBox,
    rng: &mut (impl CryptoRng + ?Sized),
    plaintext: &[u8],
) -> Vec<u8> {
    let mut datagram = Vec::with_capacity(OVERHEAD + plaintext.len());
    datagram.extend_from_slice(&MAGIC);
    datagram.extend_from_slice(sender.as_bytes());
    shared.seal(rng, plaintext, &mut datagram);
    datagram
}

/// Unwraps `datagram` with the box shared with its [`sender`]. `None` if that sender did not seal it for us.
#[must_use]
pub fn open(shared: &SharedBox, datagram: &[u8]) -> Option<Vec<u8>> {
    shared.open(datagram.get(HEADER_LEN..)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disco::Message;
    use mesh_noise::key::DiscoPrivate;
    use rand_core::{TryCryptoRng, TryRng};
    use std::convert::Infallible;

    /// Plays back the nonce of a recorded datagram.
    struct Recorded<'a>(&'a [u8]);

    impl TryRng for Recorded<'_> {
        type Error = Infallible;

        fn try_next_u32(&mut self) -> Result<u32, Infallible> {
            let mut bytes = [0; 4];
            self.try_fill_bytes(&mut bytes).map(|()| u32::from_be_bytes(bytes))
        }

        fn try_next_u64(&mut self) -> Result<u64, Infallible> {
            let mut bytes = [0; 8];
            self.try_fill_bytes(&mut bytes).map(|()| u64::from_be_bytes(bytes))
        }

        fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
            let (head, rest) = self.0.split_at(out.len());
            out.copy_from_slice(head);
            self.0 = rest;
            Ok(())
        }
    }

    impl TryCryptoRng for Recorded<'_> {}

    fn bytes(value: &serde_json::Value) -> Vec<u8> {
        hex::decode(value.as_str().unwrap()).unwrap()
    }

    #[test]
    fn recorded_datagrams_open_and_come_out_the_same_again() {
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/data/disco-wireguard-to-known-peer.json")).unwrap();
        let private = DiscoPrivate::from_bytes(bytes(&vectors["ghost_disco_private"]).try_into().unwrap());
        let mut seen = 0;
        for packet in vectors["packets"].as_array().unwrap().iter().filter(|packet| packet["kind"] == "disco") {
            let datagram = bytes(&packet["packet_hex"]);
            let from = sender(&datagram).unwrap();
            assert_eq!(from.as_bytes().to_vec(), bytes(&packet["sender_disco"]));

            let shared = private.box_with(&from);
            let plaintext = open(&shared, &datagram).unwrap();
            assert_eq!(plaintext, bytes(&packet["plaintext_hex"]));

            let mut encoded = Vec::new();
            Message::decode(&plaintext).unwrap().encode(&mut encoded);
            assert_eq!(encoded, plaintext);
            let nonce = &datagram[HEADER_LEN..HEADER_LEN + mesh_noise::key::NONCE_LEN];
            assert_eq!(seal(&from, &shared, &mut Recorded(nonce), &encoded), datagram);
            seen += 1;
        }
        assert!(seen >= 3, "only {seen} disco datagrams in the recording");
    }

    #[test]
    fn a_datagram_for_someone_else_does_not_open() {
        let (ours, theirs) = (DiscoPrivate::from_bytes([1; 32]), DiscoPrivate::from_bytes([2; 32]));
        let other = DiscoPrivate::from_bytes([3; 32]);
        let datagram = seal(&theirs.public(), &theirs.box_with(&ours.public()), &mut Recorded(&[5; 24]), b"\x03\0");
        assert_eq!(open(&ours.box_with(&theirs.public()), &datagram).as_deref(), Some(&b"\x03\0"[..]));
        assert_eq!(open(&other.box_with(&theirs.public()), &datagram), None);
        assert_eq!(open(&ours.box_with(&theirs.public()), &datagram[..30]), None);
    }
}
