//! The checks that one process may send in a second, whatever the number of its links.
//!
//! In: `now`, each time a check is to be sent. Out: yes, or from when on. It knows no agent: [`super::agents`] shares it out.
//! A bucket that holds [`CHECKS_AT_ONCE`] and is filled at [`CHECKS_PER_SECOND`].

use std::time::{Duration, Instant};

/// Checks of one process in a second. Two agents at full pace: a home router makes that many flows without noticing, and at 152
/// bytes on the wire they take 0.5 Mbit/s, half of a slow line's uplink.
pub const CHECKS_PER_SECOND: u32 = 400;

/// Checks that may leave at once after a pause: a tenth of a second's worth.
pub const CHECKS_AT_ONCE: u32 = 40;

/// Time in which one check is earned.
const EACH: Duration = Duration::from_nanos(1_000_000_000 / CHECKS_PER_SECOND as u64);

/// A full bucket, at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// When the bucket is full.
    full_at: Instant,
}

impl Budget {
    /// A full bucket.
    pub fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// Takes one check out of the bucket, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        let granted = self.next() <= now;
        if granted {
            self.full_at = self.full_at.max(now) + EACH;
        }
        granted
    }

    /// When there will be a check in the bucket, or since when there is.
    pub fn next(&self) -> Instant {
        // An instant may not reach that far back: then the machine has only just begun to run.
        self.full_at.checked_sub(EACH * (CHECKS_AT_ONCE - 1)).unwrap_or(self.full_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "an Instant cannot be made in any other way")]
    fn beginning() -> Instant {
        Instant::now() + Duration::from_secs(3600)
    }

    #[test]
    fn a_full_bucket_gives_so_many_at_once_and_no_more() {
        let now = beginning();
        let mut budget = Budget::new(now);
        assert_eq!((0..1000).filter(|_| budget.take(now)).count(), CHECKS_AT_ONCE as usize);
        assert!(budget.next() > now && budget.take(budget.next()));
    }

    #[test]
    fn over_a_long_time_no_more_is_given_than_is_earned() {
        let start = beginning();
        let mut budget = Budget::new(start);
        let taken = (0..10_000).filter(|at| budget.take(start + Duration::from_millis(*at))).count();
        let most = (10 * CHECKS_PER_SECOND + CHECKS_AT_ONCE) as usize;
        assert!((most - 10..=most).contains(&taken), "{taken}");
    }

    #[test]
    fn a_pause_earns_no_more_than_the_bucket_holds() {
        let start = beginning();
        let mut budget = Budget::new(start);
        let later = start + Duration::from_secs(3600);
        assert_eq!((0..1000).filter(|_| budget.take(later)).count(), CHECKS_AT_ONCE as usize);
    }
}
