//! Randomness drawn ahead of its use.

use std::convert::Infallible;

use rand_core::{CryptoRng, Rng, TryCryptoRng, TryRng};

/// A generator that hands out bytes drawn when it was made, so that a core can seal its one box later without holding
/// its caller's generator.
#[derive(Debug)]
pub(crate) struct Prepared {
    bytes: [u8; mesh_noise::key::NONCE_LEN],
    used: usize,
}

impl Prepared {
    pub(crate) fn draw(rng: &mut impl CryptoRng) -> Self {
        let mut bytes = [0; mesh_noise::key::NONCE_LEN];
        rng.fill_bytes(&mut bytes);
        Self { bytes, used: 0 }
    }

    /// Hands out exactly these bytes; for replaying what was recorded.
    #[cfg(test)]
    pub(crate) const fn exactly(bytes: [u8; mesh_noise::key::NONCE_LEN]) -> Self {
        Self { bytes, used: 0 }
    }
}

impl TryRng for Prepared {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.fill_bytes(&mut bytes);
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.fill_bytes(&mut bytes);
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        let from = self.bytes.get(self.used..self.used + out.len());
        out.copy_from_slice(from.expect("one nonce is drawn for the one box that is sealed"));
        self.used += out.len();
        Ok(())
    }
}

impl TryCryptoRng for Prepared {}
