//! The TCP socket beneath a WebSocket, with buffers that exist only while bytes flow.
//!
//! In: frames ready for the wire, through the [`Outbox`]; what tungstenite writes (pongs, closes); bytes from the peer.
//! Out: the same, in few large system calls; Datagram frames, past tungstenite. tungstenite reads, unmasks and checks all else
//! that comes in. Data frames go out past it too, because a server's frame is a header and the payload as it is, and tungstenite
//! would keep a buffer of the largest frame for each idle peer.
//! Never splits a frame with another, and never holds more than [`OUTBOX_BYTES`] and one frame that goes out, nor more
//! than a turn's bytes and one frame that came in.
//! What comes is read [`AHEAD_BYTES`] at once, the rest of a large frame right to where it is kept; after [`TURN_BYTES`]
//! reading pauses until the owner's next turn, so that one busy sender leaves time to all others.

use std::{
    cell::RefCell,
    future::Future,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use bytes::{BufMut, Bytes, BytesMut};
use peerfleet_proto::wire::websocket::{MAX_HEADER_BYTES, Outbox, Separator, Side, Taken, put_header};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Bytes that are taken from the queues before the socket has to take some: one large write, and little that a more
/// important frame has to wait for.
pub(crate) const OUTBOX_BYTES: usize = 64 * 1024;

/// Bytes read ahead at once: with less, a busy sender costs a system call for each few frames.
const AHEAD_BYTES: usize = 64 * 1024;

/// A Datagram frame of this size is worth two system calls: one for its first bytes, one that reads the rest to where it
/// is kept. Smaller ones are read many at once and copied.
const LARGE_BYTES: usize = 32 * 1024;

/// Bytes read per turn of the owner: some hundred small frames or a few of the largest, a fraction of a millisecond.
const TURN_BYTES: usize = 256 * 1024;

/// A frame ready for the wire: the header of an unmasked binary WebSocket message, then the payload.
pub(crate) fn wire(payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(MAX_HEADER_BYTES + payload.len());
    put_header(&mut frame, payload.len(), None);
    frame.put_slice(payload);
    frame.freeze()
}

/// What was read and is tungstenite's.
#[derive(Debug, Default)]
struct Passed {
    bytes: Vec<u8>,
    at: usize,
}

impl Passed {
    /// Gives as much as fits; whether that was anything.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let waiting = &self.bytes[self.at..];
        let count = waiting.len().min(buffer.remaining());
        buffer.put_slice(&waiting[..count]);
        self.at += count;
        if self.at == self.bytes.len() {
            *self = Self::default();
        }
        count > 0
    }
}

/// A TCP socket with an [`Outbox`], as tungstenite sees it.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: TcpStream,
    outbox: Outbox,
    separator: Separator,
    passed: Passed,
    taken: Vec<Taken>,
    /// Whether the frame before was large, so that the next one probably is.
    large: bool,
    /// Bytes that the operating system has taken, ever: a writer that makes progress is not stalled.
    sent: u64,
    /// Bytes that may still be read in this turn.
    allowance: usize,
}

thread_local! {
    /// Where what is read lands first; what is kept is kept in its exact size.
    static LANDING: RefCell<Vec<u8>> = RefCell::new(vec![0; AHEAD_BYTES]);
}

impl Socket {
    /// `rest` was read already, behind the request for the WebSocket.
    pub(crate) fn new(stream: TcpStream, rest: &[u8]) -> Self {
        let mut socket = Self {
            stream,
            outbox: Outbox::default(),
            separator: Separator::new(Side::Server),
            passed: Passed::default(),
            taken: Vec::new(),
            large: false,
            sent: 0,
            allowance: TURN_BYTES,
        };
        socket.separator.feed(rest, &mut socket.passed.bytes, &mut socket.taken);
        socket
    }

    /// The port that the peer came in at.
    pub(crate) fn local_port(&self) -> Option<u16> {
        self.stream.local_addr().ok().map(|address| address.port())
    }

    pub(crate) fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// From now on Datagram frames go past tungstenite: see [`Self::taken`].
    pub(crate) fn take_datagrams(&mut self) {
        self.separator.take_datagrams();
    }

    /// Datagram frames that came since the last call.
    pub(crate) fn taken(&mut self) -> Vec<Taken> {
        std::mem::take(&mut self.taken)
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
        let Self { stream, outbox, .. } = self;
        while !outbox.is_empty() {
            let written = ready!(outbox.write(|slices| Pin::new(&mut *stream).poll_write_vectored(cx, slices)))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written as u64;
            outbox.written(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once and sorts what came; how many bytes that were.
    fn poll_sort(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Self { stream, separator, passed: library, taken, large, .. } = self;
        if let Some(rest) = separator.rest() {
            let count = ready!(pin!(stream.read_buf(rest)).poll(cx))?;
            if let Some(frame) = separator.settle() {
                *large = frame.payload().len() >= LARGE_BYTES;
                taken.push(frame);
            }
            return Poll::Ready(Ok(count));
        }
        LANDING.with_borrow_mut(|landing| {
            let room = if *large { MAX_HEADER_BYTES + 1 } else { landing.len() };
            let mut read = ReadBuf::new(&mut landing[..room]);
            ready!(Pin::new(stream).poll_read(cx, &mut read))?;
            separator.feed(read.filled(), &mut library.bytes, taken);
            *large = *large && separator.rest().is_some_and(|rest| rest.remaining_mut() >= LARGE_BYTES / 2);
            Poll::Ready(Ok(read.filled().len()))
        })
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.allowance == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if self.passed.give(buffer) {
                break;
            }
            let count = ready!(self.poll_sort(cx))?;
            if count == 0 {
                break;
            }
            self.charge(count);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    /// Takes all of `bytes` or nothing, so that a pong never lands inside a data frame.
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        while self.outbox.bytes() >= OUTBOX_BYTES {
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
