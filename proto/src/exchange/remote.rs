//! What is kept of one other instance: where it is, our asks of it, its asks of us, and the sessions for both.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::{Address, answers::Caller};
use crate::{
    id::{RequestId, Slot},
    presence::Epoch,
};

/// One other instance.
pub(super) struct Remote {
    pub(super) address: Address,
    /// Where the relay says it is.
    pub(super) slot: Option<Slot>,
    /// Under which sessions with it are begun.
    pub(super) epoch: Epoch,
    /// It stayed out of the room for long.
    pub(super) is_forsaken: bool,
    /// Our asks under way, by number.
    pub(super) outstanding: BTreeMap<u64, RequestId>,
    pub(super) next_number: u64,
    /// Sessions that we are opening, the newest last.
    pub(super) openings: Vec<u32>,
    /// How many were begun since one was last established.
    pub(super) begun: u32,
    /// Sessions that we opened, the newest last.
    pub(super) opened: Vec<u32>,
    /// Sessions that it opened, the newest last.
    pub(super) accepted: Vec<u32>,
    /// Sessions that it may yet open.
    pub(super) budget: Budget,
    /// Its asks.
    pub(super) caller: Caller,
}

impl Remote {
    pub(super) fn new(address: Address, epoch: Epoch, next_number: u64, seen_below: u64) -> Self {
        Self {
            address,
            slot: None,
            epoch,
            is_forsaken: false,
            outstanding: BTreeMap::new(),
            next_number,
            openings: Vec::new(),
            begun: 0,
            opened: Vec::new(),
            accepted: Vec::new(),
            budget: Budget::default(),
            caller: Caller::new(seen_below),
        }
    }

    /// The number below which none of our asks is under way.
    pub(super) fn settled(&self) -> u64 {
        self.outstanding.first_key_value().map_or(self.next_number, |(number, _)| *number)
    }
}

/// First messages that one instance may send: each costs us four key agreements.
#[derive(Debug, Default)]
pub(super) struct Budget {
    /// Used up, less what time has given back since `at`.
    used: u32,
    at: Option<Instant>,
}

impl Budget {
    /// At once. An asker whose messages all get lost begins about five sessions in [`crate::limits::ASK_CONNECT_DEADLINE`].
    const MOST: u32 = 16;

    /// One more in this time: more often than repeats that are answered by nobody for long.
    const REFILL: Duration = Duration::from_secs(2);

    pub(super) fn take(&mut self, now: Instant) -> bool {
        let at = *self.at.get_or_insert(now);
        let back = now.saturating_duration_since(at).as_millis() / Self::REFILL.as_millis();
        let back = u32::try_from(back).unwrap_or(u32::MAX);
        self.used = self.used.saturating_sub(back);
        self.at = Some(if self.used == 0 { now } else { at + Self::REFILL * back });
        let is_left = self.used < Self::MOST;
        self.used += u32::from(is_left);
        is_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "an instant can only be had from the clock")]
    fn a_budget_is_used_up_and_comes_back() {
        let (mut budget, start) = (Budget::default(), Instant::now());
        assert_eq!((0..100).filter(|_| budget.take(start)).count(), Budget::MOST as usize);
        assert!(!budget.take(start + Budget::REFILL / 2));
        assert!(budget.take(start + Budget::REFILL));
        assert!(!budget.take(start + Budget::REFILL));
        let later = start + Duration::from_secs(3600);
        assert_eq!((0..100).filter(|_| budget.take(later)).count(), Budget::MOST as usize);
    }
}
