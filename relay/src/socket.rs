//! The TCP socket beneath a WebSocket, with buffers that exist only while bytes flow.
//!
//! In: frames ready for the wire, through the [`Outbox`]; what tungstenite writes (pongs, closes); bytes from the peer.
//! Out: the same, in few large system calls. tungstenite reads, unmasks and checks all that comes in; data frames go out
//! past it, because a server's frame is a header and the payload as it is, and tungstenite would keep a buffer of the
//! largest frame for each idle peer.
//! Never splits a frame with another, and never holds more than [`OUTBOX_BYTES`] and one frame.
//! A read that fills the caller's small buffer makes the next one read ahead, [`AHEAD_BYTES`] at most; after
//! [`TURN_BYTES`] reading pauses until the owner's next turn, so that one busy sender leaves time to all others.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Bytes that are taken from the queues before the socket has to take some: one large write, and little that a more
/// important frame has to wait for.
pub(crate) const OUTBOX_BYTES: usize = 64 * 1024;

/// Bytes read ahead at once: with less, a busy sender costs a system call for each few frames.
const AHEAD_BYTES: usize = 64 * 1024;

/// Bytes read per turn of the owner: some hundred small frames or a few of the largest, a fraction of a millisecond.
const TURN_BYTES: usize = 256 * 1024;

/// Longest header of a frame that a server sends (RFC 6455 §5.2: two bytes, and eight of length).
pub(crate) const MAX_HEADER_BYTES: usize = 10;

/// Frames in one write; Linux takes 1,024, and 64 of 1 KiB fill the outbox.
const SLICES: usize = 64;

/// A frame ready for the wire: the header of an unmasked binary WebSocket message, then the payload.
pub(crate) fn wire(payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(MAX_HEADER_BYTES + payload.len());
    put_header(&mut frame, payload.len());
    frame.put_slice(payload);
    frame.freeze()
}

/// Writes the header of an unmasked, unfragmented binary message (RFC 6455 §5.2).
pub(crate) fn put_header(frame: &mut BytesMut, len: usize) {
    const FINAL_BINARY: u8 = 0x82;
    frame.put_u8(FINAL_BINARY);
    match (u8::try_from(len), u16::try_from(len)) {
        (Ok(len), _) if len < 126 => frame.put_u8(len),
        (_, Ok(len)) => {
            frame.put_u8(126);
            frame.put_u16(len);
        }
        _ => {
            frame.put_u8(127);
            frame.put_u64(len as u64);
        }
    }
}

/// What is on its way into the socket.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    frames: VecDeque<Bytes>,
    bytes: usize,
}

impl Outbox {
    pub(crate) fn has_room(&self) -> bool {
        self.bytes < OUTBOX_BYTES
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(crate) fn push(&mut self, frame: Bytes) {
        self.bytes += frame.len();
        self.frames.push_back(frame);
    }

    fn written(&mut self, mut count: usize) {
        self.bytes -= count;
        while let Some(front) = self.frames.front_mut() {
            if count < front.len() {
                bytes::Buf::advance(front, count);
                return;
            }
            count -= front.len();
            self.frames.pop_front();
        }
        self.frames = VecDeque::new();
    }
}

/// Bytes that were read before anybody asked.
#[derive(Debug, Default)]
struct Ahead {
    bytes: Vec<u8>,
    at: usize,
}

/// A TCP socket with an [`Outbox`], as tungstenite sees it.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: TcpStream,
    outbox: Outbox,
    ahead: Ahead,
    /// Whether the last read filled its buffer, so that more is probably waiting.
    busy: bool,
    /// Bytes that the operating system has taken, ever: a writer that makes progress is not stalled.
    sent: u64,
    /// Bytes that may still be read in this turn.
    allowance: usize,
}

thread_local! {
    /// Where reads ahead land first; what is left over is kept in its exact size.
    static LANDING: RefCell<Vec<u8>> = RefCell::new(vec![0; AHEAD_BYTES]);
}

impl Socket {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, outbox: Outbox::default(), ahead: Ahead::default(), busy: false, sent: 0, allowance: TURN_BYTES }
    }

    /// The port that the peer came in at.
    pub(crate) fn local_port(&self) -> Option<u16> {
        self.stream.local_addr().ok().map(|address| address.port())
    }

    pub(crate) fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// The owner begins a turn: reading may go on.
    pub(crate) fn begin_turn(&mut self) {
        self.allowance = TURN_BYTES;
    }

    /// What was read made work as if it had been this many bytes more.
    pub(crate) fn charge(&mut self, bytes: usize) {
        self.allowance = self.allowance.saturating_sub(bytes);
    }

    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    pub(crate) fn into_stream(self) -> TcpStream {
        self.stream
    }

    /// Writes until the outbox is empty or the socket takes no more.
    pub(crate) fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outbox.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut count = 0;
            for (slice, frame) in slices.iter_mut().zip(&self.outbox.frames) {
                *slice = IoSlice::new(frame);
                count += 1;
            }
            let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &slices[..count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written as u64;
            self.outbox.written(written);
        }
        Poll::Ready(Ok(()))
    }

    fn take_ahead(&mut self, buffer: &mut ReadBuf<'_>) {
        let waiting = &self.ahead.bytes[self.ahead.at..];
        let count = waiting.len().min(buffer.remaining());
        buffer.put_slice(&waiting[..count]);
        self.ahead.at += count;
        if self.ahead.at == self.ahead.bytes.len() {
            self.ahead = Ahead::default();
        }
    }

    fn poll_read_ahead(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        LANDING.with_borrow_mut(|landing| {
            let mut read = ReadBuf::new(landing);
            let polled = Pin::new(&mut self.stream).poll_read(cx, &mut read);
            self.busy = false;
            ready!(polled)?;
            let filled = read.filled();
            let (now, later) = filled.split_at(filled.len().min(buffer.remaining()));
            buffer.put_slice(now);
            self.busy = !later.is_empty();
            self.ahead = Ahead { bytes: later.to_vec(), at: 0 };
            Poll::Ready(Ok(()))
        })
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.allowance == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        if self.ahead.at < self.ahead.bytes.len() {
            self.take_ahead(buffer);
        } else if self.busy {
            ready!(self.poll_read_ahead(cx, buffer))?;
        } else {
            ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
            self.busy = buffer.remaining() == 0;
        }
        self.allowance = self.allowance.saturating_sub(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    /// Takes all of `bytes` or nothing, so that a pong never lands inside a data frame.
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        while !self.outbox.has_room() {
            ready!(self.poll_drain(cx))?;
        }
        self.outbox.push(Bytes::copy_from_slice(bytes));
        Poll::Ready(Ok(bytes.len()))
    }

    /// Nothing: the owner drains the outbox at the end of each of its turns.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_the_shortest_of_its_length() {
        for (len, header) in [
            (0, &[0x82, 0][..]),
            (125, &[0x82, 125]),
            (126, &[0x82, 126, 0, 126]),
            (65_535, &[0x82, 126, 0xff, 0xff]),
            (65_536, &[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            assert_eq!(&wire(&vec![7; len])[..header.len()], header);
            assert_eq!(wire(&vec![7; len]).len(), header.len() + len);
        }
    }

    #[test]
    fn outbox_forgets_exactly_what_was_written() {
        let mut outbox = Outbox::default();
        for byte in 0..3_u8 {
            outbox.push(vec![byte; 10].into());
        }
        outbox.written(15);
        assert_eq!((outbox.bytes, outbox.frames.len()), (15, 2));
        assert_eq!(outbox.frames[0], [1; 5][..]);
        outbox.written(15);
        assert!(outbox.is_empty() && outbox.has_room());
    }
}
