//! What one round trip showed, and what the last ones did.
//!
//! In: samples and losses. Out: their sums, and the highest of the last `N` rounds. Decides nothing.

use std::time::Duration;

use super::delivery::Sample;

/// One round: from the sending of a packet to its acknowledgement.
#[derive(Debug, Clone, Copy)]
pub(super) struct Round {
    /// The round ends with the acknowledgement of what is sent after so much was delivered.
    pub(super) end: u64,
    /// Bytes that arrived.
    pub(super) acked: u64,
    /// Bytes lost while the round trip was not longer than usual.
    pub(super) lost_alone: u64,
    /// Bytes lost while it was.
    pub(super) lost_in_queue: u64,
    /// The highest rate of a sample.
    pub(super) rate: u64,
    /// The shortest round trip.
    pub(super) lowest: Duration,
    /// The sender had nothing more to send, in every sample.
    pub(super) is_limited: bool,
    /// The widest window.
    pub(super) window: u64,
    /// The network marked packets, and that was answered.
    pub(super) is_marked: bool,
}

impl Round {
    /// One that begins when so much was delivered.
    pub(super) fn new(delivered: u64) -> Self {
        Self {
            end: delivered,
            acked: 0,
            rate: 0,
            lost_alone: 0,
            lost_in_queue: 0,
            lowest: Duration::MAX,
            is_limited: true,
            window: 0,
            is_marked: false,
        }
    }

    pub(super) fn add(&mut self, sample: Sample) {
        self.acked = self.acked.saturating_add(sample.acked);
        self.rate = self.rate.max(sample.rate);
        self.lowest = self.lowest.min(sample.rtt);
        self.is_limited &= sample.limited;
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost_alone.saturating_add(self.lost_in_queue)
    }

    /// Thousandths that so many lost bytes are of what was sent.
    pub(super) fn permille(&self, lost: u64) -> u64 {
        lost.saturating_mul(1000) / self.acked.saturating_add(self.lost()).max(1)
    }
}

/// The highest values of the last `N` rounds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recent<const N: usize> {
    rounds: [u64; N],
    now: usize,
}

impl<const N: usize> Default for Recent<N> {
    fn default() -> Self {
        Self { rounds: [0; N], now: 0 }
    }
}

impl<const N: usize> Recent<N> {
    /// The highest of all.
    pub(super) fn highest(&self) -> u64 {
        self.rounds.iter().copied().max().unwrap_or(0)
    }

    /// A value of this round.
    pub(super) fn raise(&mut self, value: u64) {
        let now = &mut self.rounds[self.now];
        *now = value.max(*now);
    }

    /// A new round begins; the oldest is forgotten.
    pub(super) fn advance(&mut self) {
        self.now = (self.now + 1) % N;
        self.rounds[self.now] = 0;
    }

    /// Forgets all rounds for this value.
    pub(super) fn set(&mut self, value: u64) {
        *self = Self::default();
        self.raise(value);
    }
}
