//! The source's side of one lane: whether what the receiver asks for can be meant.
//!
//! In: requests as they come and replies as they leave. Out: the span to read, or the rule that the receiver broke.
//! Bounds: [`MAX_ASKED`] requests unanswered, so that no receiver makes the source queue without end.

use super::{plan::Span, span_of};
use crate::{fault::Misbehaved, request::transfer::RangeRequest};

/// Most requests of one lane that wait for their reply; one more ends the lane. Twice what a receiver of ours asks.
pub const MAX_ASKED: usize = 16;

/// One lane as the source sees it.
#[derive(Debug)]
pub struct Source {
    size: u64,
    asked: usize,
}

/// What to answer with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// These bytes of the file.
    Range {
        /// The number of the range.
        index: u64,
        /// Where it lies.
        span: Span,
    },
    /// The hash of the whole.
    Sha256,
}

impl Source {
    /// A lane of a file of this size.
    pub fn new(size: u64) -> Self {
        Self { size, asked: 0 }
    }

    /// A request came.
    ///
    /// # Errors
    /// [`Misbehaved::OverLimit`] for a range that the file does not have, or for too many requests at a time.
    pub fn handle_request(&mut self, request: RangeRequest) -> Result<Wanted, Misbehaved> {
        if self.asked >= MAX_ASKED {
            return Err(Misbehaved::OverLimit);
        }
        let wanted = match request {
            RangeRequest::Range(index) => {
                let span = span_of(self.size, index).ok_or(Misbehaved::OverLimit)?;
                Wanted::Range { index, span }
            }
            RangeRequest::Sha256 => Wanted::Sha256,
        };
        self.asked += 1;
        Ok(wanted)
    }

    /// The oldest request was answered.
    pub fn handle_answered(&mut self) {
        self.asked = self.asked.saturating_sub(1);
    }
}
