//! The epochs under which sessions with this instance can be begun, and every initiation that was accepted under them.
//!
//! A repeated initiation is either remembered or under an epoch that is no longer accepted: refused with bounded memory
//! and no clock that two sides would have to agree on. Bounds: [`MEMORY`] initiations for each of two epochs.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use rand_core::CryptoRng;

use crate::presence::Epoch;

/// Initiations that are remembered of one epoch: 32 bytes each. A room of 1,000 that all join at once fits many times.
pub(super) const MEMORY: usize = 8192;

/// Age after which a new epoch is made.
const MAX_AGE: Duration = Duration::from_secs(3600);

type Ephemeral = [u8; 32];

/// The current epoch and the one before.
pub(super) struct Epochs {
    current: (Epoch, BTreeSet<Ephemeral>),
    previous: Option<(Epoch, BTreeSet<Ephemeral>)>,
    made: Instant,
}

impl Epochs {
    pub(super) fn new(rng: &mut impl CryptoRng, now: Instant) -> Self {
        Self { current: (random(rng), BTreeSet::new()), previous: None, made: now }
    }

    /// The epoch that others are told.
    pub(super) fn current(&self) -> Epoch {
        self.current.0
    }

    /// The epochs under which an initiation may come, the likelier first.
    pub(super) fn accepted(&self) -> impl Iterator<Item = Epoch> + use<> {
        [Some(self.current.0), self.previous.as_ref().map(|(epoch, _)| *epoch)].into_iter().flatten()
    }

    /// Takes an initiation that verified under this epoch; false if it came before, or nothing more can be remembered.
    pub(super) fn take(&mut self, epoch: Epoch, ephemeral: Ephemeral) -> bool {
        let previous = self.previous.as_mut().filter(|(previous, _)| *previous == epoch);
        let (_, seen) = previous.unwrap_or(&mut self.current);
        seen.len() < MEMORY && seen.insert(ephemeral)
    }

    /// When a new epoch is due by age.
    pub(super) fn due(&self) -> Instant {
        self.made + MAX_AGE
    }

    /// Whether a new epoch is due, by age or because the memory fills.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        now >= self.due() || self.current.1.len() >= MEMORY / 4 * 3
    }

    /// Makes a new epoch; the one before the last is no longer accepted.
    pub(super) fn renew(&mut self, rng: &mut impl CryptoRng, now: Instant) -> Epoch {
        let last = std::mem::replace(&mut self.current, (random(rng), BTreeSet::new()));
        self.previous = Some(last);
        self.made = now;
        self.current.0
    }
}

fn random(rng: &mut impl CryptoRng) -> Epoch {
    let mut bytes = [0; 16];
    rng.fill_bytes(&mut bytes);
    Epoch(bytes)
}
