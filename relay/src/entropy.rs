//! The operating system's randomness, in the form that the core asks for.
//!
//! In: nothing. Out: bytes that nobody can predict.
//! Never falls back to anything else: without randomness there are no challenges, and the relay stops.
//! It has no state and no bound.

use std::convert::Infallible;

use rand_core::{TryCryptoRng, TryRng};

/// The operating system's randomness.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entropy;

impl TryRng for Entropy {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        getrandom::fill(bytes).expect("every system that has sockets has a source of randomness");
        Ok(())
    }
}

impl TryCryptoRng for Entropy {}
