//! Randomness that is the same on every run.

use std::convert::Infallible;

use rand_core::{TryCryptoRng, TryRng};

/// Randomness of tests: the same from the same seed.
#[derive(Debug, Clone)]
pub(crate) struct Hashes(pub(crate) u64);

impl TryRng for Hashes {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.try_next_u64()? as u32)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        self.0 = self.0.wrapping_add(1 << 32);
        blake3::Hasher::new().update(&self.0.to_le_bytes()).finalize_xof().fill(bytes);
        Ok(())
    }
}

impl TryCryptoRng for Hashes {}
