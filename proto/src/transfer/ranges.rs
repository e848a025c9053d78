//! A set of range numbers, as few spans: its memory grows with the gaps in it, not with the file.

use std::collections::BTreeMap;

/// A set of range numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// First number of a span → the number behind its last. Spans neither touch nor overlap.
    spans: BTreeMap<u64, u64>,
    count: u64,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many numbers are in it.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether this number is in it.
    pub fn contains(&self, index: u64) -> bool {
        self.spans.range(..=index).next_back().is_some_and(|(_, &end)| index < end)
    }

    /// The lowest number from `from` on that is not in it.
    pub fn first_missing(&self, from: u64) -> u64 {
        match self.spans.range(..=from).next_back() {
            Some((_, &end)) if from < end => end,
            Some(_) | None => from,
        }
    }

    /// Puts a number below `u64::MAX` in; whether it was not there before.
    pub fn insert(&mut self, index: u64) -> bool {
        if self.contains(index) {
            return false;
        }
        let before = self.spans.range(..index).next_back().filter(|(_, end)| **end == index).map(|(&start, _)| start);
        let end = self.spans.remove(&(index + 1)).unwrap_or(index + 1);
        self.spans.insert(before.unwrap_or(index), end);
        self.count += 1;
        true
    }

    /// The numbers in it, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.spans.iter().flat_map(|(&start, &end)| start..end)
    }
}

impl FromIterator<u64> for RangeSet {
    fn from_iter<T: IntoIterator<Item = u64>>(indexes: T) -> Self {
        let mut set = Self::new();
        for index in indexes {
            set.insert(index);
        }
        set
    }
}
