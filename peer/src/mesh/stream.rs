//! One ordered byte stream between two instances, whatever carries it.
//!
//! A stream within this process (a host asked by itself) is a pair of pipes; one to another instance is a QUIC stream;
//! one through the local door is a Unix socket. Services and front doors see no difference.
//! Typed frames are a big-endian u32 length and postcard of at most [`MAX_HEAD_BYTES`].

use std::{
    io,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
};

use bytes::Bytes;
use peerfleet_proto::{limits::MAX_HEAD_BYTES, wire};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, ReadHalf, WriteHalf},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
};

/// Bytes that a stream within this process holds in each direction before its writer waits.
const LOCAL_PIPE_BYTES: usize = 256 * 1024;

/// QUIC's application code of a stream whose writer went away before the end.
const CODE_DROPPED: quinn::VarInt = quinn::VarInt::from_u32(1);

/// Both directions of a stream.
#[derive(Debug)]
pub struct Stream {
    /// Towards the other side.
    pub send: SendHalf,
    /// From the other side.
    pub recv: RecvHalf,
}

/// Towards the other side. Dropping it without [`SendHalf::finish`] tells the other side that something broke.
#[derive(Debug)]
pub enum SendHalf {
    /// To another instance.
    Quic(QuicSend),
    /// Within this process.
    Local(WriteHalf<DuplexStream>),
    /// Through the local door.
    Door(OwnedWriteHalf),
}

/// From the other side.
#[derive(Debug)]
pub enum RecvHalf {
    /// From another instance.
    Quic(QuicRecv),
    /// Within this process.
    Local(ReadHalf<DuplexStream>),
    /// Through the local door.
    Door(OwnedReadHalf),
}

/// Keeps a link open for as long as somebody holds it.
#[derive(Debug, Clone, Default)]
pub struct Lease(Arc<()>);

impl Lease {
    /// Whether anybody else holds it too.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// What can make more of it, without holding the link open itself.
    pub(super) fn maker(&self) -> LeaseMaker {
        LeaseMaker(Arc::downgrade(&self.0))
    }
}

/// Makes leases of a link for as long as there is a link.
#[derive(Debug, Clone)]
pub(super) struct LeaseMaker(Weak<()>);

impl LeaseMaker {
    /// One more lease; `None` if the link is gone.
    pub(super) fn make(&self) -> Option<Lease> {
        self.0.upgrade().map(Lease)
    }
}

/// Towards another instance, over a link.
#[derive(Debug)]
pub struct QuicSend {
    stream: quinn::SendStream,
    is_finished: bool,
    _lease: Lease,
}

/// From another instance, over a link.
#[derive(Debug)]
pub struct QuicRecv {
    stream: quinn::RecvStream,
    _lease: Lease,
}

impl Drop for QuicSend {
    fn drop(&mut self) {
        // QUIC itself takes a dropped stream for a finished one.
        if !self.is_finished && self.stream.reset(CODE_DROPPED).is_err() {
            tracing::trace!("a stream was dropped that had ended already");
        }
    }
}

impl Stream {
    /// A stream of a link, which stays open for as long as either half lives.
    pub(super) fn over(send: quinn::SendStream, recv: quinn::RecvStream, lease: Lease) -> Self {
        Self {
            send: SendHalf::Quic(QuicSend { stream: send, is_finished: false, _lease: lease.clone() }),
            recv: RecvHalf::Quic(QuicRecv { stream: recv, _lease: lease }),
        }
    }

    /// Two ends of a stream within this process.
    pub fn local_pair() -> (Self, Self) {
        let (one, other) = tokio::io::duplex(LOCAL_PIPE_BYTES);
        (Self::local(one), Self::local(other))
    }

    fn local(pipe: DuplexStream) -> Self {
        let (recv, send) = tokio::io::split(pipe);
        Self { send: SendHalf::Local(send), recv: RecvHalf::Local(recv) }
    }
}

impl SendHalf {
    /// Writes one typed frame; the caller flushes nothing.
    ///
    /// # Errors
    /// Those of the carrier.
    pub async fn write_frame<T: Serialize>(&mut self, value: &T) -> io::Result<()> {
        let body = wire::encode(value);
        let len = u32::try_from(body.len()).expect("frames are bounded by MAX_HEAD_BYTES");
        let mut frame = Vec::with_capacity(4 + body.len());
        frame.extend(len.to_be_bytes());
        frame.extend(body);
        self.write_all(&frame).await
    }

    /// Writes bytes without copying them where the carrier can.
    ///
    /// # Errors
    /// Those of the carrier.
    pub async fn write_chunk(&mut self, chunk: Bytes) -> io::Result<()> {
        match self {
            Self::Quic(quic) => quic.stream.write_chunk(chunk).await.map_err(io::Error::from),
            Self::Local(pipe) => pipe.write_all(&chunk).await,
            Self::Door(socket) => socket.write_all(&chunk).await,
        }
    }

    /// Ends the stream in good order: the other side reads all that was written, then the end.
    ///
    /// # Errors
    /// Those of the carrier.
    pub async fn finish(&mut self) -> io::Result<()> {
        self.shutdown().await
    }
}

impl RecvHalf {
    /// Reads one typed frame; `None` at the end of the stream.
    ///
    /// # Errors
    /// Those of the carrier; `InvalidData` for a frame that is too long or does not decode.
    pub async fn read_frame<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut len = [0; 4];
        match self.read_exact(&mut len).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let len = u32::from_be_bytes(len) as usize;
        if len > MAX_HEAD_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame longer than its limit"));
        }
        let mut body = vec![0; len];
        self.read_exact(&mut body).await?;
        wire::decode(&body, MAX_HEAD_BYTES).map(Some).map_err(|fault| io::Error::new(io::ErrorKind::InvalidData, fault))
    }

    /// Reads the next bytes, at most `max`, without copying them where the carrier can; `None` at the end.
    ///
    /// # Errors
    /// Those of the carrier.
    pub async fn read_chunk(&mut self, max: usize) -> io::Result<Option<Bytes>> {
        if let Self::Quic(quic) = self {
            let chunk = quic.stream.read_chunk(max, true).await.map_err(io::Error::from)?;
            return Ok(chunk.map(|chunk| chunk.bytes));
        }
        let mut chunk = vec![0; max.min(LOCAL_PIPE_BYTES)];
        let len = self.read(&mut chunk).await?;
        chunk.truncate(len);
        Ok((len > 0).then(|| chunk.into()))
    }
}

impl AsyncWrite for SendHalf {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Quic(quic) => AsyncWrite::poll_write(Pin::new(&mut quic.stream), cx, bytes),
            Self::Local(pipe) => Pin::new(pipe).poll_write(cx, bytes),
            Self::Door(socket) => Pin::new(socket).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Quic(quic) => AsyncWrite::poll_flush(Pin::new(&mut quic.stream), cx),
            Self::Local(pipe) => Pin::new(pipe).poll_flush(cx),
            Self::Door(socket) => Pin::new(socket).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Quic(quic) => {
                quic.is_finished = true;
                AsyncWrite::poll_shutdown(Pin::new(&mut quic.stream), cx)
            }
            Self::Local(pipe) => Pin::new(pipe).poll_shutdown(cx),
            Self::Door(socket) => Pin::new(socket).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for RecvHalf {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Quic(quic) => AsyncRead::poll_read(Pin::new(&mut quic.stream), cx, buf),
            Self::Local(pipe) => Pin::new(pipe).poll_read(cx, buf),
            Self::Door(socket) => Pin::new(socket).poll_read(cx, buf),
        }
    }
}
