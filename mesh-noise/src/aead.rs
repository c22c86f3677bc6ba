//! ChaCha20-Poly1305 as the protocols here use it: 96-bit nonces made of four zero bytes and a 64-bit counter.

use aws_lc_rs::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

/// Bytes that sealing adds.
pub(crate) const TAG_LEN: usize = 16;

/// A key; whoever holds it counts the nonces.
pub(crate) struct Aead(LessSafeKey);

/// How the counter stands in the nonce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// As Noise (and so WireGuard) writes it.
    Little,
    /// As the control channel writes it.
    Big,
}

/// What was to be opened was not sealed by the holder of this key, or not with this nonce.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forged;

fn nonce(counter: u64, order: Order) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[4..].copy_from_slice(&match order {
        Order::Little => counter.to_le_bytes(),
        Order::Big => counter.to_be_bytes(),
    });
    Nonce::assume_unique_for_key(bytes)
}

impl Aead {
    pub(crate) fn new(key: &[u8; 32]) -> Self {
        let key = UnboundKey::new(&CHACHA20_POLY1305, key).expect("a ChaCha20 key is 32 bytes");
        Self(LessSafeKey::new(key))
    }

    /// Encrypts `text` in place and returns the tag.
    pub(crate) fn seal(&self, counter: u64, order: Order, authenticated: &[u8], text: &mut [u8]) -> [u8; TAG_LEN] {
        let tag = self
            .0
            .seal_in_place_separate_tag(nonce(counter, order), Aad::from(authenticated), text)
            .expect("a message in memory is shorter than 256 GiB");
        let mut bytes = [0; TAG_LEN];
        bytes.copy_from_slice(tag.as_ref());
        bytes
    }

    /// Decrypts ciphertext ‖ tag in place. On failure the buffer holds nothing of use.
    pub(crate) fn open<'a>(
        &self,
        counter: u64,
        order: Order,
        authenticated: &[u8],
        sealed: &'a mut [u8],
    ) -> Result<&'a mut [u8], Forged> {
        self.0.open_in_place(nonce(counter, order), Aad::from(authenticated), sealed).map_err(|_| Forged)
    }

    /// Decrypts into `out`, which must be exactly as long as the plaintext.
    pub(crate) fn open_into(
        &self,
        counter: u64,
        order: Order,
        authenticated: &[u8],
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), Forged> {
        let (ciphertext, tag) = sealed.split_last_chunk::<TAG_LEN>().ok_or(Forged)?;
        self.0
            .open_separate_gather(nonce(counter, order), Aad::from(authenticated), ciphertext, tag, out)
            .map_err(|_| Forged)
    }
}
