//! The window of counters already seen (RFC 6479's bitmap): takes what a relay reorders, refuses what it repeats.
//!
//! In: a counter whose message verified. Out: whether it is new. Bounds: counters more than [`WINDOW`] behind the highest
//! count as seen; 1,024 messages are more than a relay's queue holds of one sender.

/// How far behind the highest a counter may be.
pub const WINDOW: u64 = 1024;

const WORD_BITS: u64 = u64::BITS as u64;

/// One word more than the window needs, so that a word can be cleared while all of the window stays.
const WORDS: usize = (WINDOW / WORD_BITS) as usize + 1;

/// Counters seen in one direction of a session.
#[derive(Debug, Clone, Default)]
pub struct ReplayWindow {
    /// One above the highest counter seen.
    next: u64,
    seen: [u64; WORDS],
}

impl ReplayWindow {
    /// Whether a counter may still be new: before the work of verifying it.
    pub fn may_be_new(&self, counter: u64) -> bool {
        counter >= self.next || (self.next - counter <= WINDOW && self.seen[word(counter)] & bit(counter) == 0)
    }

    /// Takes a counter whose message verified, once.
    pub fn take(&mut self, counter: u64) -> bool {
        if !self.may_be_new(counter) {
            return false;
        }
        if counter >= self.next {
            self.advance(counter);
        }
        self.seen[word(counter)] |= bit(counter);
        true
    }

    fn advance(&mut self, counter: u64) {
        let (from, to) = (self.next.saturating_sub(1) / WORD_BITS, counter / WORD_BITS);
        let fresh = (to - from).min(WORDS as u64);
        for step in 0..fresh {
            self.seen[((to - step) % WORDS as u64) as usize] = 0;
        }
        self.next = counter.saturating_add(1);
    }
}

fn word(counter: u64) -> usize {
    ((counter / WORD_BITS) % WORDS as u64) as usize
}

fn bit(counter: u64) -> u64 {
    1 << (counter % WORD_BITS)
}
