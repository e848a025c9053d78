//! What the fuzz targets share: randomness from a seed, and a clock that begins somewhere.

use std::{convert::Infallible, sync::LazyLock, time::Instant};

use rand_core::{TryCryptoRng, TryRng};

/// Where every run's virtual time begins.
pub static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Randomness that is the same for the same seed.
#[derive(Debug, Clone)]
pub struct Seeded(pub u64);

impl TryRng for Seeded {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.try_next_u64()? as u32)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        // SplitMix64 (Steele, Lea, Flood 2014): even enough, and far quicker than a hash under the fuzzer.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        Ok(mixed ^ (mixed >> 31))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        for chunk in bytes.chunks_mut(8) {
            let random = self.try_next_u64()?.to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
        Ok(())
    }
}

impl TryCryptoRng for Seeded {}
