//! Random bytes of the operating system, in the shape that the core takes them.

use rand_core::{Infallible, TryCryptoRng, TryRng};

/// The operating system's source of randomness.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemRandom;

impl TryRng for SystemRandom {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from_le_bytes(bytes()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from_le_bytes(bytes()))
    }

    fn try_fill_bytes(&mut self, target: &mut [u8]) -> Result<(), Infallible> {
        fill(target);
        Ok(())
    }
}

impl TryCryptoRng for SystemRandom {}

/// As many random bytes as the caller's type wants.
///
/// # Panics
/// If the operating system has no randomness to give: without it no key can be made, and going on would be unsafe.
pub fn bytes<const LEN: usize>() -> [u8; LEN] {
    let mut bytes = [0; LEN];
    fill(&mut bytes);
    bytes
}

fn fill(target: &mut [u8]) {
    getrandom::fill(target).expect("the operating system has a source of randomness");
}
