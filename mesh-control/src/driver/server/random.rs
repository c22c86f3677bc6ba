//! The system's randomness, as cores ask for it.

use std::convert::Infallible;

use rand_core::{TryCryptoRng, TryRng};

/// Draws from the operating system by way of aws-lc.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct SystemRng;

impl TryRng for SystemRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_ne_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        aws_lc_rs::rand::fill(bytes).expect("the system's random number generator works, or nothing is safe");
        Ok(())
    }
}

impl TryCryptoRng for SystemRng {}
