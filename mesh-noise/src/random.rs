//! A seeded generator for cores, and the system's randomness for drivers: the same seed, the same run.
//!
//! Cores draw nothing from the system. A long-lived core is given 32 bytes once and expands them with [`SeededRng`];
//! a driver takes those bytes from the operating system, a test writes them down.

use std::fmt;

use blake2::Blake2sMac256;
use blake2::digest::{FixedOutput, KeyInit, Update};
use rand_core::{Infallible, TryCryptoRng, TryRng};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// A cryptographic generator that expands 32 bytes of seed with keyed BLAKE2s.
///
/// Every request replaces the inner key, so that a later look at the memory does not tell what was drawn before.
///
/// ```
/// use mesh_noise::random::SeededRng;
/// use rand_core::Rng;
///
/// let (mut a, mut b) = (SeededRng::from_seed([7; 32]), SeededRng::from_seed([7; 32]));
/// assert_eq!(a.next_u64(), b.next_u64());
/// ```
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct SeededRng {
    key: [u8; 32],
}

impl SeededRng {
    /// Starts from `seed`.
    #[must_use]
    pub const fn from_seed(seed: [u8; 32]) -> Self {
        Self { key: seed }
    }

    /// Draws an array.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.expand(&mut bytes);
        bytes
    }

    fn block(&self, counter: u64) -> [u8; 32] {
        let mut mac = Blake2sMac256::new(&self.key.into());
        mac.update(&counter.to_le_bytes());
        mac.finalize_fixed().into()
    }

    fn expand(&mut self, out: &mut [u8]) {
        for (counter, chunk) in (1..).zip(out.chunks_mut(32)) {
            let mut block = self.block(counter);
            chunk.copy_from_slice(&block[..chunk.len()]);
            block.zeroize();
        }
        self.key = self.block(0);
    }
}

impl fmt::Debug for SeededRng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SeededRng(…)")
    }
}

impl TryRng for SeededRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from_le_bytes(self.array()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from_le_bytes(self.array()))
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        self.expand(out);
        Ok(())
    }
}

impl TryCryptoRng for SeededRng {}

/// The operating system's randomness, by way of aws-lc. For drivers; a core is given a seed.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemRng;

impl SystemRng {
    /// Draws an array, such as the seed of a core.
    ///
    /// # Panics
    /// If the system has no randomness to give, since nothing is safe then.
    #[must_use]
    pub fn array<const N: usize>(self) -> [u8; N] {
        let mut bytes = [0; N];
        aws_lc_rs::rand::fill(&mut bytes).expect("the system's randomness does not fail once it has begun");
        bytes
    }
}

impl TryRng for SystemRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from_le_bytes(self.array()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from_le_bytes(self.array()))
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        aws_lc_rs::rand::fill(out).expect("the system's randomness does not fail once it has begun");
        Ok(())
    }
}

impl TryCryptoRng for SystemRng {}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_core::Rng;

    #[test]
    fn a_seed_decides_the_run_and_draws_differ() {
        let (mut a, mut b) = (SeededRng::from_seed([1; 32]), SeededRng::from_seed([1; 32]));
        let first: [u8; 48] = a.array();
        assert_eq!(first, b.array::<48>());
        assert_ne!(first, a.array::<48>());
        assert_ne!(first[..32], SeededRng::from_seed([2; 32]).array::<32>());
        assert_ne!(a.next_u32(), a.next_u32());
    }
}
