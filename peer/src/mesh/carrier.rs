//! The bytes beneath the WebSocket to the relay: Datagram frames go past the WebSocket library both ways.
//!
//! In: what the library writes (the upgrade's request, messages, pongs, a close); Datagram frames ready for the wire; bytes
//! from the relay. Out: the same in few large writes; Datagram frames as they came; for the library all else.
//! Never splits a frame with another, and looks at no frame before the relay has answered that it speaks WebSocket: of
//! another answer every byte is the library's.
//! Upgrade -> frames, or an answer that is none.
//! Bounds: [`OUTBOX_BYTES`] and one frame that go out; [`TURN_BYTES`] and one frame that came in, and then the owner's turn.

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use bytes::{BufMut, Bytes};
use peerfleet_proto::wire::websocket::{MAX_HEADER_BYTES, Outbox, Separator, Side, Taken};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::dial::Transport;

/// Bytes that wait to be written before more are taken: the socket's own send buffer is of this order.
const OUTBOX_BYTES: usize = 256 * 1024;

/// Bytes read at once: four batches of the usual packets.
const AHEAD_BYTES: usize = 64 * 1024;

/// A Datagram frame of this size is worth two reads: its first bytes, then the rest to where it is kept. Smaller ones are
/// read many at once and copied.
const LARGE_BYTES: usize = 32 * 1024;

/// Bytes read before the owner's other work gets its turn.
const TURN_BYTES: usize = 512 * 1024;

/// Longest answer to the upgrade that is waited for, in bytes; of a longer one the library sees the beginning.
const MAX_ANSWER_BYTES: usize = 16 * 1024;

/// How an answer begins that lets us speak WebSocket (RFC 6455 §4.1).
const SWITCHING: &[u8] = b"HTTP/1.1 101";

/// A stream of bytes to the relay, as the WebSocket library sees it.
#[derive(Debug)]
pub(super) struct Carrier {
    transport: Transport,
    reading: Reading,
    landing: Box<[u8]>,
    passed: Vec<u8>,
    given: usize,
    taken: Vec<Taken>,
    /// Whether the frame before was large, so that the next one probably is.
    large: bool,
    /// Bytes that may still be read in this turn.
    allowance: usize,
    outbox: Outbox,
    /// Whether all that was written has left: TLS keeps what its socket did not take.
    is_flushed: bool,
}

#[derive(Debug)]
enum Reading {
    /// The answer to the upgrade, as far as it came.
    Upgrade(Vec<u8>),
    /// Frames.
    Frames(Separator),
    /// An answer that lets nobody speak WebSocket.
    Answer,
}

impl Carrier {
    /// Over this stream, on which nothing was asked yet.
    pub(super) fn new(transport: Transport) -> Self {
        Self {
            transport,
            reading: Reading::Upgrade(Vec::new()),
            landing: vec![0; AHEAD_BYTES].into_boxed_slice(),
            passed: Vec::new(),
            given: 0,
            taken: Vec::new(),
            large: false,
            allowance: TURN_BYTES,
            outbox: Outbox::default(),
            is_flushed: true,
        }
    }

    /// The owner begins a turn: reading may go on.
    pub(super) fn begin_turn(&mut self) {
        self.allowance = TURN_BYTES;
    }

    /// Datagram frames that came since the last call.
    pub(super) fn taken(&mut self) -> Vec<Taken> {
        std::mem::take(&mut self.taken)
    }

    /// Whether more may be written before a flush.
    pub(super) fn has_room(&self) -> bool {
        self.outbox.bytes() < OUTBOX_BYTES
    }

    /// Whether something waits to be flushed.
    pub(super) fn is_waiting(&self) -> bool {
        !self.is_flushed
    }

    /// Writes a frame that is ready for the wire, with the next flush.
    pub(super) fn push(&mut self, frame: Bytes) {
        self.is_flushed = false;
        self.outbox.push(frame);
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { transport, outbox, .. } = self;
        while !outbox.is_empty() {
            let written = ready!(outbox.write(|slices| Pin::new(&mut *transport).poll_write_vectored(cx, slices)))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            outbox.written(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once and sorts what came; how many bytes that were.
    fn poll_sort(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Self { transport, reading, landing, taken, large, .. } = self;
        if let Reading::Frames(separator) = reading
            && let Some(rest) = separator.rest()
        {
            let count = ready!(pin!(transport.read_buf(rest)).poll(cx))?;
            if let Some(frame) = separator.settle() {
                *large = frame.payload().len() >= LARGE_BYTES;
                taken.push(frame);
            }
            return Poll::Ready(Ok(count));
        }
        let room = if *large { MAX_HEADER_BYTES + 1 } else { AHEAD_BYTES };
        let mut read = ReadBuf::new(&mut landing[..room]);
        ready!(Pin::new(transport).poll_read(cx, &mut read))?;
        let count = read.filled().len();
        self.sort(count);
        Poll::Ready(Ok(count))
    }

    /// Sorts what landed.
    fn sort(&mut self, count: usize) {
        let Self { reading, landing, passed: library, taken, large, .. } = self;
        let landed = &landing[..count];
        match reading {
            Reading::Frames(separator) => {
                separator.feed(landed, library, taken);
                *large = *large && separator.rest().is_some_and(|rest| rest.remaining_mut() >= LARGE_BYTES / 2);
            }
            Reading::Upgrade(answer) => {
                answer.extend_from_slice(landed);
                let end = end_of_head(answer);
                let may_switch = answer.iter().zip(SWITCHING).all(|(is, should)| is == should);
                if may_switch && end.is_none() && count > 0 && answer.len() < MAX_ANSWER_BYTES {
                    return;
                }
                let mut answer = std::mem::take(answer);
                *reading = Reading::Answer;
                if let Some(end) = end
                    && answer.starts_with(SWITCHING)
                {
                    let mut separator = Separator::new(Side::Client);
                    separator.take_datagrams();
                    let frames = answer.split_off(end);
                    library.append(&mut answer);
                    separator.feed(&frames, library, taken);
                    *reading = Reading::Frames(separator);
                } else {
                    library.append(&mut answer);
                }
            }
            Reading::Answer => library.extend_from_slice(landed),
        }
    }

    /// Gives the library as much as fits; whether that was anything.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let waiting = &self.passed[self.given..];
        let count = waiting.len().min(buffer.remaining());
        buffer.put_slice(&waiting[..count]);
        self.given += count;
        if self.given == self.passed.len() {
            (self.passed, self.given) = (Vec::new(), 0);
        }
        count > 0
    }
}

impl AsyncRead for Carrier {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while !self.give(buffer) {
            if self.allowance == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let count = ready!(self.poll_sort(cx))?;
            if count == 0 {
                self.give(buffer);
                break;
            }
            self.allowance = self.allowance.saturating_sub(count);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Carrier {
    /// Takes all of `bytes` or nothing, so that a pong never lands inside a data frame.
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        while !self.has_room() {
            ready!(self.poll_drain(cx))?;
        }
        self.push(Bytes::copy_from_slice(bytes));
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        ready!(Pin::new(&mut self.transport).poll_flush(cx))?;
        self.is_flushed = true;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.transport).poll_shutdown(cx)
    }
}

/// Where the head of an answer ends: behind an empty line, of which the CR may be missing (RFC 9112 §2.2).
fn end_of_head(answer: &[u8]) -> Option<usize> {
    let ends_head = |end: &usize| [&b"\n\n"[..], b"\n\r\n"].iter().any(|line| answer[..*end].ends_with(line));
    (1..=answer.len()).find(ends_head)
}

#[cfg(test)]
mod tests {
    use peerfleet_proto::{
        id::Slot,
        wire::{relay, websocket::put_header},
    };
    use tokio::{
        io::AsyncWriteExt,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    const ANSWER: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n";

    /// A carrier, and the relay's end.
    async fn connected() -> (Carrier, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (theirs, _) = listener.accept().await.unwrap();
        (Carrier::new(Transport::Plain(ours)), theirs)
    }

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        put_header(&mut frame, payload.len(), None);
        frame.extend_from_slice(payload);
        frame
    }

    /// What the library and the links read of a stream that is written in pieces of this length.
    async fn read(stream: Vec<u8>, piece: usize) -> (Vec<u8>, Vec<Bytes>) {
        let (mut carrier, mut relay) = connected().await;
        let writing = tokio::spawn(async move {
            for piece in stream.chunks(piece) {
                relay.write_all(piece).await.unwrap();
            }
        });
        let mut library = Vec::new();
        while carrier.read_buf(&mut library).await.unwrap() > 0 {
            carrier.begin_turn();
        }
        writing.await.unwrap();
        (library, carrier.taken().into_iter().map(Taken::into_payload).collect())
    }

    #[tokio::test]
    async fn datagrams_right_behind_the_answer_go_past_the_library() {
        let (control, datagram) = (frame(&[1, 2, 3]), relay::datagram(Slot(3), 0, 1200, &[7; 60_000]));
        let stream = [ANSWER, &control, &frame(&datagram), &frame(&datagram), &control].concat();
        for piece in [1_000_000, 1000, 7] {
            let (library, taken) = read(stream.clone(), piece).await;
            assert!(library == [ANSWER, &control, &control].concat());
            assert!(taken == [datagram.clone(), datagram.clone()]);
        }
    }

    #[tokio::test]
    async fn of_another_answer_the_library_sees_every_byte() {
        let datagram = frame(&relay::datagram(Slot(3), 0, 1200, &[7; 600]));
        let refusal = [b"HTTP/1.1 403 Forbidden\r\n\r\nwho are you?".as_slice(), &datagram].concat();
        let endless = vec![b'x'; 3 * MAX_ANSWER_BYTES];
        for stream in [refusal, endless, ANSWER[..20].to_vec()] {
            for piece in [1_000_000, 100] {
                let (library, taken) = read(stream.clone(), piece).await;
                assert!(library == stream && taken.is_empty());
            }
        }
    }

    #[tokio::test]
    async fn what_is_no_answer_of_http_is_not_waited_for() {
        let (mut carrier, mut relay) = connected().await;
        relay.write_all(b"220 mail").await.unwrap();
        let mut library = Vec::new();
        carrier.read_buf(&mut library).await.unwrap();
        assert_eq!(library, b"220 mail");
    }

    #[tokio::test]
    async fn an_answer_may_end_its_lines_without_carriage_returns() {
        let (answer, datagram) =
            (b"HTTP/1.1 101 Switching\nUpgrade: websocket\n\n", relay::datagram(Slot(3), 0, 9, &[7; 90]));
        let (library, taken) = read([answer.as_slice(), &frame(&datagram)].concat(), 11).await;
        assert!(library == answer && taken == [datagram]);
    }

    /// A carrier over TLS, and the relay's end of it.
    async fn connected_by_tls() -> (Carrier, tokio_rustls::server::TlsStream<TcpStream>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (theirs, _) = listener.accept().await.unwrap();
        let generated = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = generated.cert.der().clone();
        let key = rustls::pki_types::PrivateKeyDer::try_from(generated.signing_key.serialize_der()).unwrap();
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certificate.clone()).unwrap();
        let client = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(client));
        let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(server));
        let connecting = connector.connect("localhost".try_into().unwrap(), Transport::Plain(ours));
        let (ours, theirs) = tokio::join!(connecting, acceptor.accept(theirs));
        (Carrier::new(Transport::Tls(Box::new(ours.unwrap()))), theirs.unwrap())
    }

    #[tokio::test]
    async fn what_tls_kept_is_flushed_as_soon_as_its_socket_takes_it() {
        let (mut carrier, mut relay) = connected_by_tls().await;
        let piece = Bytes::from(vec![7; 8 * 1024]);
        let mut written = 0;
        let is_full = |carrier: &mut Carrier| {
            let flushing = Pin::new(carrier).poll_flush(&mut Context::from_waker(std::task::Waker::noop()));
            flushing.is_pending()
        };
        loop {
            carrier.push(piece.clone());
            written += piece.len();
            if is_full(&mut carrier) {
                break;
            }
        }
        assert!(carrier.outbox.is_empty(), "TLS keeps what its socket does not take");
        let reading = tokio::spawn(async move {
            let mut read = vec![0; written];
            relay.read_exact(&mut read).await
        });
        while carrier.is_waiting() {
            carrier.flush().await.unwrap();
        }
        let read = tokio::time::timeout(std::time::Duration::from_secs(30), reading).await;
        assert_eq!(read.expect("all arrives").unwrap().unwrap(), written);
    }

    #[tokio::test]
    async fn frames_are_written_whole_and_in_order() {
        let (mut carrier, mut relay) = connected().await;
        let reading = tokio::spawn(async move {
            let mut read = Vec::new();
            relay.read_to_end(&mut read).await.map(|_| read)
        });
        let mut expected = Vec::new();
        for at in 0..100_u8 {
            let frame = Bytes::from(vec![at; 5000]);
            expected.extend_from_slice(&frame);
            if at % 3 == 0 { carrier.write_all(&frame).await.unwrap() } else { carrier.push(frame) }
        }
        carrier.shutdown().await.unwrap();
        drop(carrier);
        assert!(reading.await.unwrap().unwrap() == expected);
    }
}
