//! Which numbers of a caller's asks were seen, in bounded memory.
//!
//! In: numbers. Out: whether one is new. A number that was seen is never new again; when more than [`MAX_GAPS`] gaps are open
//! the lowest is closed, so what would have filled it counts as seen: memory is saved by refusing, never by taking twice.

/// Most gaps between seen numbers that are kept open: as many asks as one asker may have under way.
pub(super) const MAX_GAPS: usize = 1024;

/// Numbers seen.
#[derive(Debug, Clone, Default)]
pub(super) struct Numbers {
    /// All numbers below were seen.
    below: u64,
    /// Runs `start..end` that were seen above, in order, with a gap before each.
    runs: Vec<(u64, u64)>,
}

impl Numbers {
    /// All numbers below this one count as seen.
    pub(super) fn all_below(below: u64) -> Self {
        Self { below, runs: Vec::new() }
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        let at = self.runs.partition_point(|(start, _)| *start <= number);
        number < self.below || number == u64::MAX || (at > 0 && number < self.runs[at - 1].1)
    }

    /// Takes a number, once.
    pub(super) fn take(&mut self, number: u64) -> bool {
        if self.contains(number) {
            return false;
        }
        let at = self.runs.partition_point(|(start, _)| *start <= number);
        let joins_next = self.runs.get(at).is_some_and(|(start, _)| *start == number + 1);
        match (at.checked_sub(1).filter(|before| self.runs[*before].1 == number), joins_next) {
            (Some(before), true) => self.runs[before].1 = self.runs.remove(at).1,
            (Some(before), false) => self.runs[before].1 = number + 1,
            (None, true) => self.runs[at].0 = number,
            (None, false) => self.runs.insert(at, (number, number + 1)),
        }
        let lowest = if self.runs.len() > MAX_GAPS { self.runs[0].1 } else { self.below };
        self.settle(lowest);
        true
    }

    /// All numbers below count as seen from now on.
    pub(super) fn settle(&mut self, below: u64) {
        self.below = self.below.max(below);
        let closed = self.runs.partition_point(|(start, _)| *start <= self.below);
        if let Some((_, end)) = closed.checked_sub(1).map(|last| self.runs[last]) {
            self.below = self.below.max(end);
        }
        self.runs.drain(..closed);
        // The run behind may begin where the last one has just moved the floor.
        if self.runs.first().is_some_and(|(start, _)| *start <= self.below) {
            self.settle(self.below);
        }
    }

    /// One above the highest number seen.
    pub(super) fn end(&self) -> u64 {
        self.runs.last().map_or(self.below, |(_, end)| *end)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Agrees with a plain set while few gaps are open.
        #[test]
        fn each_number_is_taken_once(numbers in prop::collection::vec((0u64..500, any::<bool>()), 1..300)) {
            let (mut seen, mut model, mut floor) = (Numbers::default(), BTreeSet::new(), 0);
            for (number, settle) in numbers {
                if settle && number % 16 == 0 {
                    seen.settle(number);
                    floor = floor.max(number);
                } else {
                    prop_assert_eq!(seen.take(number), number >= floor && model.insert(number));
                }
                prop_assert!(seen.runs.windows(2).all(|pair| pair[0].1 < pair[1].0));
            }
            for number in 0..510 {
                prop_assert_eq!(seen.contains(number), number < floor || model.contains(&number));
            }
        }
    }

    #[test]
    fn too_many_gaps_close_the_lowest_ones() {
        let mut seen = Numbers::default();
        for number in 0..3 * MAX_GAPS as u64 {
            assert!(seen.take(2 * number + 1));
        }
        assert_eq!(seen.runs.len(), MAX_GAPS);
        assert!(!seen.take(0), "a closed gap counts as seen");
        assert!(seen.take(2 * (3 * MAX_GAPS as u64 - 1)), "an open gap does not");
    }

    #[test]
    fn the_greatest_number_is_never_new() {
        let mut seen = Numbers::default();
        assert!(!seen.take(u64::MAX));
        assert!(seen.take(u64::MAX - 1));
        assert_eq!(seen.end(), u64::MAX);
    }
}
