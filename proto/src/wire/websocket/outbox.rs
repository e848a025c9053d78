//! What is on its way into a connection: whole frames, written together in few large system calls.
//!
//! In: frames ready for the wire; how many bytes were written. Out: slices to be written. Never splits a frame with another.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, Bytes};

/// Frames in one write; Linux takes 1,024, and 64 of 1 KiB are as much as it takes well at once.
const SLICES: usize = 64;

/// Frames that wait to be written.
#[derive(Debug, Default)]
pub struct Outbox {
    frames: VecDeque<Bytes>,
    bytes: usize,
}

impl Outbox {
    /// How many bytes wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Adds a frame, ready for the wire.
    pub fn push(&mut self, frame: Bytes) {
        if !frame.is_empty() {
            self.bytes += frame.len();
            self.frames.push_back(frame);
        }
    }

    /// Lets something write what waits; it is given slices and says how many bytes of them it took.
    pub fn write<R>(&self, write: impl FnOnce(&[IoSlice<'_>]) -> R) -> R {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut count = 0;
        for (slice, frame) in slices.iter_mut().zip(&self.frames) {
            *slice = IoSlice::new(frame);
            count += 1;
        }
        write(&slices[..count])
    }

    /// So many bytes were written. The memory of an emptied outbox is given back.
    pub fn written(&mut self, mut count: usize) {
        self.bytes -= count;
        while let Some(front) = self.frames.front_mut() {
            if count < front.len() {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.frames.pop_front();
        }
        self.frames = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outbox_forgets_exactly_what_was_written() {
        let mut outbox = Outbox::default();
        for byte in 0..3_u8 {
            outbox.push(vec![byte; 10].into());
        }
        outbox.written(15);
        assert_eq!((outbox.bytes(), outbox.frames.len()), (15, 2));
        assert_eq!(outbox.frames[0], [1; 5][..]);
        outbox.written(15);
        assert!(outbox.is_empty() && outbox.bytes() == 0);
    }
}
