//! Our epochs: which first messages may still be taken, and which were.
//!
//! In: ephemeral keys of first messages that verified, instances that went for good. Out: whether a first message is new.
//! The current and the previous epoch count; each remembers what was taken under it until it counts no more. So whatever
//! is forgotten could not be brought back: a first message under a forgotten epoch does not verify.
//! Bounds: [`MAX_REMEMBERED`] first messages for each epoch; a new epoch at three quarters of that, or at its age.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use rand_core::CryptoRng;

use super::Address;
use crate::presence::Epoch;

/// Most first messages remembered for one epoch; further ones are dropped, and their senders come back under the new epoch,
/// which is made before it comes to that. 32 bytes each: 256 KiB.
pub const MAX_REMEMBERED: usize = 8_192;

/// Least age of an epoch that is replaced because of its age: what a relay held back can be delivered for two epochs.
const MIN_AGE: Duration = Duration::from_secs(3600);

/// The epoch's age is drawn from [`MIN_AGE`] to as much more, so that a room does not publish all its epochs at once.
const AGE_JITTER_MS: u64 = 3600 * 1000;

/// The current and the previous epoch.
pub(super) struct Epochs {
    current: Generation,
    previous: Option<Generation>,
}

struct Generation {
    epoch: Epoch,
    seen: BTreeSet<[u8; 32]>,
    /// Instances that were forgotten while this was current, and one above the highest number of their asks.
    departed: BTreeMap<Address, u64>,
}

/// Why a first message is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotNew {
    Repeated,
    Full,
}

impl Epochs {
    pub(super) fn new(rng: &mut impl CryptoRng) -> Self {
        Self { current: Generation::new(rng), previous: None }
    }

    pub(super) fn current(&self) -> Epoch {
        self.current.epoch
    }

    /// The epochs that count, the likelier first.
    pub(super) fn accepted(&self) -> impl Iterator<Item = Epoch> + use<> {
        [Some(self.current.epoch), self.previous.as_ref().map(|previous| previous.epoch)].into_iter().flatten()
    }

    pub(super) fn accepts(&self, epoch: Epoch) -> bool {
        self.accepted().any(|accepted| accepted == epoch)
    }

    /// Takes the ephemeral key of a first message that verified under this epoch, once.
    pub(super) fn take(&mut self, epoch: Epoch, ephemeral: &[u8; 32]) -> Result<(), NotNew> {
        let generation = if epoch == self.current.epoch { Some(&mut self.current) } else { self.previous.as_mut() };
        let generation = generation.filter(|generation| generation.epoch == epoch).ok_or(NotNew::Repeated)?;
        if generation.seen.contains(ephemeral) {
            return Err(NotNew::Repeated);
        }
        if generation.seen.len() >= MAX_REMEMBERED {
            return Err(NotNew::Full);
        }
        generation.seen.insert(*ephemeral);
        Ok(())
    }

    /// An instance whose asks were taken is forgotten, but for the end of their numbers.
    pub(super) fn depart(&mut self, address: Address, end: u64) {
        self.current.departed.insert(address, end);
    }

    /// The end of the numbers of an instance that comes back; 0 if it never asked, or nothing it sent then still counts.
    pub(super) fn return_of(&mut self, address: Address) -> u64 {
        let in_current = self.current.departed.remove(&address);
        let in_previous = self.previous.as_mut().and_then(|previous| previous.departed.remove(&address));
        in_current.max(in_previous).unwrap_or(0)
    }

    /// Whether it is time for a new epoch, whatever the age of this one.
    pub(super) fn is_filling(&self) -> bool {
        self.current.seen.len().max(self.current.departed.len()) >= MAX_REMEMBERED / 4 * 3
    }

    pub(super) fn rotate(&mut self, rng: &mut impl CryptoRng) {
        self.previous = Some(std::mem::replace(&mut self.current, Generation::new(rng)));
    }
}

impl Generation {
    fn new(rng: &mut impl CryptoRng) -> Self {
        let mut epoch = Epoch([0; 16]);
        rng.fill_bytes(&mut epoch.0);
        Self { epoch, seen: BTreeSet::new(), departed: BTreeMap::new() }
    }
}

/// When an epoch that begins now is replaced.
pub(super) fn end_of_age(now: Instant, rng: &mut impl CryptoRng) -> Instant {
    now + MIN_AGE + Duration::from_millis(rng.next_u64() % AGE_JITTER_MS)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use rand_core::{TryCryptoRng, TryRng};

    use super::*;
    use crate::id::{InstanceId, PeerId};

    const ADDRESS: Address = Address { peer: PeerId::from_bytes([1; 32]), instance: InstanceId::from_bytes([2; 16]) };

    #[test]
    fn a_first_message_is_taken_once_until_its_epoch_counts_no_more() {
        let mut epochs = Epochs::new(&mut Counting(0));
        let born = epochs.current();
        assert_eq!(epochs.take(born, &[7; 32]), Ok(()));
        assert_eq!(epochs.take(born, &[7; 32]), Err(NotNew::Repeated));
        epochs.rotate(&mut Counting(1));
        assert_eq!(epochs.take(born, &[7; 32]), Err(NotNew::Repeated));
        assert_eq!(epochs.take(born, &[8; 32]), Ok(()));
        epochs.rotate(&mut Counting(2));
        assert!(!epochs.accepts(born));
        assert_eq!(epochs.take(born, &[9; 32]), Err(NotNew::Repeated));
    }

    #[test]
    fn an_epoch_fills_up_and_takes_no_more_than_it_remembers() {
        let mut epochs = Epochs::new(&mut Counting(0));
        let born = epochs.current();
        let key = |number: usize| *blake3::hash(&number.to_be_bytes()).as_bytes();
        for number in 0..MAX_REMEMBERED {
            assert_eq!(epochs.is_filling(), number >= MAX_REMEMBERED / 4 * 3);
            assert_eq!(epochs.take(born, &key(number)), Ok(()));
        }
        assert_eq!(epochs.take(born, &key(MAX_REMEMBERED)), Err(NotNew::Full));
        epochs.rotate(&mut Counting(1));
        assert!(!epochs.is_filling());
        assert_eq!(epochs.take(epochs.current(), &key(MAX_REMEMBERED)), Ok(()));
    }

    #[test]
    fn who_departed_is_remembered_for_two_epochs() {
        let mut epochs = Epochs::new(&mut Counting(0));
        epochs.depart(ADDRESS, 9);
        epochs.rotate(&mut Counting(1));
        assert_eq!(epochs.return_of(ADDRESS), 9);
        epochs.depart(ADDRESS, 10);
        epochs.rotate(&mut Counting(2));
        epochs.rotate(&mut Counting(3));
        assert_eq!(epochs.return_of(ADDRESS), 0);
    }

    /// Other bytes for each number.
    struct Counting(u8);

    impl TryRng for Counting {
        type Error = Infallible;

        fn try_next_u32(&mut self) -> Result<u32, Infallible> {
            Ok(self.0.into())
        }

        fn try_next_u64(&mut self) -> Result<u64, Infallible> {
            Ok(self.0.into())
        }

        fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
            bytes.fill(self.0);
            Ok(())
        }
    }

    impl TryCryptoRng for Counting {}
}
