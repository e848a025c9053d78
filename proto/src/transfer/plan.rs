//! How a file is cut into ranges and shared out to lanes, from its size alone.

use super::RangeSet;
use crate::limits::RANGE_BYTES;

/// Lanes of a file with many ranges: enough that one slow reply holds nothing up, few enough to arrive nearly in order.
pub const LANES: usize = 4;

/// Most lanes that a source serves of one ticket: twice [`LANES`], for those opened in place of ones not yet known lost.
pub const MAX_LANES: usize = 2 * LANES;

/// Ranges that a new lane asks for: one that flows and one behind it.
pub(super) const FIRST_DEPTH: usize = 2;

/// Most ranges that one lane asks for, however large the file: with [`LANES`], 32 MiB on their way fill
/// 1 Gbit/s at 250 ms.
const MAX_DEPTH: usize = 8;

/// One range's place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Its first byte.
    pub offset: u64,
    /// How many bytes it has.
    pub len: u32,
}

/// How many ranges a file of this size has.
pub const fn range_count(size: u64) -> u64 {
    size.div_ceil(RANGE_BYTES)
}

/// Where a range lies; `None` if the file ends before it.
pub fn span_of(size: u64, index: u64) -> Option<Span> {
    let offset = index.checked_mul(RANGE_BYTES).filter(|&offset| offset < size)?;
    let len = u32::try_from((size - offset).min(RANGE_BYTES)).expect("RANGE_BYTES fits in 32 bits");
    Some(Span { offset, len })
}

/// How many lanes the missing ranges are worth; one for an empty file too, to learn its hash.
pub(super) fn lanes_for(size: u64, verified: &RangeSet) -> usize {
    let missing = range_count(size).saturating_sub(verified.count());
    usize::try_from(missing.div_ceil(FIRST_DEPTH as u64)).unwrap_or(LANES).clamp(1, LANES)
}

/// How many ranges one lane may ask for: all lanes together at most 4 % of the file, but [`FIRST_DEPTH`] always.
pub(super) fn depth_limit(size: u64) -> usize {
    let share = range_count(size) / 25 / LANES as u64;
    usize::try_from(share).unwrap_or(MAX_DEPTH).clamp(FIRST_DEPTH, MAX_DEPTH)
}

/// Bytes in these ranges of a file.
pub(super) fn bytes_in(size: u64, ranges: &RangeSet) -> u64 {
    let last = range_count(size).saturating_sub(1);
    let short_by = if ranges.contains(last) { range_count(size) * RANGE_BYTES - size } else { 0 };
    ranges.count() * RANGE_BYTES - short_by
}
