//! Standard input on its way to a job: what the host has not taken yet is kept, to be sent again.

use std::{
    collections::VecDeque,
    io::Read,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use peerfleet_proto::request::exec::FromCaller;
use tokio::sync::{Notify, mpsc};

/// Most bytes that the host has not taken: what a host is ready to hold beside its other frames.
pub const STDIN_WINDOW_BYTES: usize = 256 * 1024;

/// Bytes read at once; a quarter of the window, so reading and sending overlap.
const CHUNK_BYTES: usize = 64 * 1024;

/// Pieces between the reading thread and the stream.
const READ_AHEAD: usize = 1;

/// A source of standard input and what of it is under way.
#[derive(Debug)]
pub struct Stdin {
    source: tokio::sync::Mutex<mpsc::Receiver<Bytes>>,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Offset of the first byte kept: the host has all before it.
    taken: u64,
    /// Offset of the first byte not sent on the present stream.
    sent: u64,
    /// The bytes from `taken` on.
    kept: VecDeque<Bytes>,
    /// Bytes in `kept`.
    kept_bytes: usize,
    /// Nothing more will come from the source.
    ended: bool,
    /// The end was said on the present stream.
    said_end: bool,
    /// The process reads no more.
    closed: bool,
}

impl Stdin {
    /// Reads this source on a thread of its own: no other way reads every kind of file without blocking the rest. The
    /// thread ends with the source or the process.
    pub fn from_reader(mut reader: impl Read + Send + 'static) -> Self {
        let (sender, receiver) = mpsc::channel(READ_AHEAD);
        std::thread::spawn(move || {
            let mut chunk = vec![0; CHUNK_BYTES];
            loop {
                match reader.read(&mut chunk) {
                    Ok(0) => return,
                    Ok(len) => {
                        if sender.blocking_send(Bytes::copy_from_slice(&chunk[..len])).is_err() {
                            return;
                        }
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        tracing::warn!(%error, "standard input cannot be read; the command sees its end");
                        return;
                    }
                }
            }
        });
        Self::from_channel(receiver)
    }

    /// Takes pieces of at most 64 KiB from a channel; its closing is the end of the input.
    pub fn from_channel(source: mpsc::Receiver<Bytes>) -> Self {
        Self { source: tokio::sync::Mutex::new(source), state: Mutex::default(), changed: Notify::new() }
    }

    /// A new stream stands, and the host has so much already: what lies behind is sent again.
    pub(super) fn resume_at(&self, taken: u64) {
        let mut state = self.state();
        state.take(taken);
        state.sent = state.taken;
        state.said_end = false;
    }

    /// The host has taken so much.
    pub(super) fn taken(&self, taken: u64) {
        let mut state = self.state();
        let believable = taken.min(state.sent);
        state.take(believable);
        drop(state);
        self.changed.notify_one();
    }

    /// The process reads no more: the rest is dropped.
    pub(super) fn close(&self) {
        self.state().closed = true;
    }

    /// The next word about standard input; waits for ever when there is none. Cancelling it loses nothing.
    pub(super) async fn next(&self) -> FromCaller {
        loop {
            let step = self.state().next();
            match step {
                Step::Say(word) => return word,
                Step::Wait => self.changed.notified().await,
                Step::Read => {
                    let chunk = self.source.lock().await.recv().await;
                    self.state().read(chunk);
                }
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Step {
    Say(FromCaller),
    Wait,
    Read,
}

impl State {
    fn next(&mut self) -> Step {
        if self.closed {
            return Step::Wait;
        }
        if let Some(chunk) = self.unsent() {
            self.sent += chunk.len() as u64;
            return Step::Say(FromCaller::Stdin(chunk.to_vec()));
        }
        if self.ended {
            if self.said_end {
                return Step::Wait;
            }
            self.said_end = true;
            return Step::Say(FromCaller::StdinEnd);
        }
        if self.kept_bytes + CHUNK_BYTES > STDIN_WINDOW_BYTES { Step::Wait } else { Step::Read }
    }

    /// The first kept bytes that were not sent on the present stream.
    fn unsent(&self) -> Option<Bytes> {
        let mut start = self.taken;
        for chunk in &self.kept {
            let end = start + chunk.len() as u64;
            if self.sent < end {
                let skip = usize::try_from(self.sent - start).expect("an offset within a chunk");
                return Some(chunk.slice(skip..));
            }
            start = end;
        }
        None
    }

    fn read(&mut self, chunk: Option<Bytes>) {
        match chunk {
            Some(chunk) => {
                self.kept_bytes += chunk.len();
                self.kept.push_back(chunk);
            }
            None => self.ended = true,
        }
    }

    /// Forgets what lies before `taken`.
    fn take(&mut self, taken: u64) {
        while self.taken < taken {
            let Some(first) = self.kept.front_mut() else { return };
            let len = first.len().min(usize::try_from(taken - self.taken).unwrap_or(usize::MAX));
            let _ = first.split_to(len);
            if first.is_empty() {
                self.kept.pop_front();
            }
            self.kept_bytes -= len;
            self.taken += len as u64;
        }
        self.sent = self.sent.max(self.taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stdin(pieces: &[&'static [u8]]) -> Stdin {
        let (sender, receiver) = mpsc::channel(pieces.len().max(1));
        for piece in pieces {
            sender.try_send(Bytes::from_static(piece)).expect("room for every piece");
        }
        Stdin::from_channel(receiver)
    }

    #[tokio::test]
    async fn a_new_stream_goes_on_at_the_byte_that_the_host_took_last() {
        let stdin = stdin(&[b"abc", b"def"]);
        assert_eq!(stdin.next().await, FromCaller::Stdin(b"abc".to_vec()));
        assert_eq!(stdin.next().await, FromCaller::Stdin(b"def".to_vec()));
        assert_eq!(stdin.next().await, FromCaller::StdinEnd);
        stdin.resume_at(2);
        assert_eq!(stdin.next().await, FromCaller::Stdin(b"c".to_vec()));
        assert_eq!(stdin.next().await, FromCaller::Stdin(b"def".to_vec()));
        assert_eq!(stdin.next().await, FromCaller::StdinEnd);
    }

    #[tokio::test]
    async fn no_more_than_the_window_is_read_ahead_of_the_host() {
        let stdin = stdin(&[&[7_u8; CHUNK_BYTES][..]; 6]);
        for _ in 0..STDIN_WINDOW_BYTES / CHUNK_BYTES {
            assert!(matches!(stdin.next().await, FromCaller::Stdin(_)));
        }
        let waits = tokio::time::timeout(std::time::Duration::from_millis(20), stdin.next()).await;
        assert!(waits.is_err());
        stdin.taken(CHUNK_BYTES as u64);
        assert!(matches!(stdin.next().await, FromCaller::Stdin(_)));
    }

    #[tokio::test]
    async fn a_host_that_claims_more_than_was_sent_breaks_nothing() {
        let stdin = stdin(&[b"abc"]);
        assert_eq!(stdin.next().await, FromCaller::Stdin(b"abc".to_vec()));
        stdin.taken(u64::MAX);
        assert_eq!(stdin.next().await, FromCaller::StdinEnd);
    }
}
