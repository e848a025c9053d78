//! Standard input on its way from the owner to the process.
//!
//! In: bytes from the owner, at most [`STDIN_WINDOW_BYTES`] ahead of the process. Out: the same bytes into the pipe, and
//! how many the process has taken. Open -> Closed (its end was written, or the process no longer reads); after that
//! bytes count as taken and go nowhere. A new owner begins where the process is: what waited is discarded.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use peerfleet_proto::limits::STDIN_WINDOW_BYTES;
use tokio::io::AsyncWrite;

/// More input than the window allows.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overrun;

/// Standard input of one process.
#[derive(Debug)]
pub(super) struct Input {
    owner: u64,
    waiting: VecDeque<u8>,
    taken: u64,
    ends: bool,
    closed: bool,
}

impl Input {
    /// Input that comes from an owner if `open`; otherwise there is none.
    pub(super) fn new(open: bool) -> Self {
        Self { owner: 0, waiting: VecDeque::new(), taken: 0, ends: false, closed: !open }
    }

    /// Bytes taken so far.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Whether the process reads no more.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether the pipe is to be closed now.
    pub(super) fn is_over(&self) -> bool {
        self.closed || (self.ends && self.waiting.is_empty())
    }

    /// Whether bytes wait for the process.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the owner of that number may still speak. While the input is held, nobody takes over.
    pub(super) fn hears(&self, owner: u64) -> bool {
        self.owner == owner
    }

    /// The owner of that number goes on from what the process has taken; says how much that is.
    pub(super) fn restart(&mut self, owner: u64) -> u64 {
        self.owner = owner;
        self.waiting.clear();
        self.ends = false;
        self.taken
    }

    /// Takes the next bytes from the owner.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), Overrun> {
        if self.closed || self.ends {
            self.taken += bytes.len() as u64;
            return Ok(());
        }
        if self.waiting.len() + bytes.len() > STDIN_WINDOW_BYTES {
            return Err(Overrun);
        }
        self.waiting.extend(bytes);
        Ok(())
    }

    /// The owner sends no more.
    pub(super) fn finish(&mut self) {
        self.ends = true;
    }

    /// Writes what waits into the pipe, as much as it takes now; nothing if nothing waits.
    pub(super) fn poll_write(&mut self, pipe: Pin<&mut impl AsyncWrite>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.waiting.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let written = ready!(pipe.poll_write(cx, self.waiting.as_slices().0))?;
        self.waiting.drain(..written);
        self.taken += written as u64;
        Poll::Ready(Ok(()))
    }

    /// The process reads no more.
    pub(super) fn close(&mut self) {
        self.taken += self.waiting.len() as u64;
        self.waiting = VecDeque::new();
        self.closed = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_owner_goes_on_from_what_the_process_took() {
        let mut input = Input::new(true);
        input.push(b"abcdef").unwrap();
        input.finish();
        let (mut pipe, _reader) = tokio::io::duplex(4);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(input.poll_write(Pin::new(&mut pipe), &mut cx).is_ready());
        assert_eq!(input.restart(2), 4);
        assert!(input.hears(2) && !input.hears(1));
        assert!(!input.is_waiting() && !input.is_over());
    }

    #[test]
    fn rejects_more_than_the_window() {
        let mut input = Input::new(true);
        input.push(&vec![0; STDIN_WINDOW_BYTES]).unwrap();
        assert_eq!(input.push(&[0]), Err(Overrun));
    }

    #[test]
    fn input_that_nobody_reads_counts_as_taken() {
        let mut input = Input::new(true);
        input.push(b"abc").unwrap();
        input.close();
        input.push(b"de").unwrap();
        assert_eq!(input.taken(), 5);
        assert!(input.is_closed() && !input.is_waiting());
    }
}
