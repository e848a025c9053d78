//! One WebSocket to the relay, read and written by one task.
//!
//! In: frames of the mesh (before everything else), Datagram frames from the links. Out: frames from the relay, of which
//! Datagrams go straight to the links and all others to the mesh.
//! Never holds more than the WebSocket's own buffers: when the relay does not read, messages wait with the mesh and links are held
//! back; when the mesh does not read, the relay is not read.
//! Bounds: [`READ_BUDGET`] frames a turn before writing gets its turn; those of [`super::carrier`].

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{Sink, Stream};
use peerfleet_proto::{
    fault::Malformed,
    wire::{relay::RelayFrame, websocket::Taken},
};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::{self, Message};

use super::{dial::RelaySocket, socket::Switch};

/// Frames read in one turn before writing gets its turn.
const READ_BUDGET: usize = 64;

/// Frames from the relay that may wait for the mesh.
pub(super) const INBOUND_FRAMES: usize = 256;

/// What the mesh says to the relay.
#[derive(Debug)]
pub(super) enum ToRelay {
    /// A frame.
    Frame(Bytes),
    /// A WebSocket ping.
    Ping,
}

/// What the relay says to the mesh.
#[derive(Debug)]
pub(super) enum FromRelay {
    /// A frame.
    Frame(RelayFrame),
    /// A sign of life; the round trip, if it answers the last ping.
    Heard(Option<Duration>),
}

/// Why a connection to the relay ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireFault {
    /// The relay closed it, or the network did.
    #[error("the relay closed the connection")]
    Closed,
    /// The mesh wants it no more.
    #[error("left")]
    Left,
    /// The relay sent what is no frame.
    #[error("the relay sent something unreadable: {0}")]
    Malformed(#[from] Malformed),
    /// The WebSocket failed.
    #[error("the connection to the relay broke: {0}")]
    Broken(#[from] Box<tungstenite::Error>),
}

/// What goes out next.
enum Outgoing {
    /// By the WebSocket library.
    Message(Message),
    /// Past it: ready for the wire.
    Datagram(Bytes),
}

/// The task's state.
pub(super) struct Wire {
    socket: RelaySocket,
    switch: Arc<Switch>,
    outbound: mpsc::Receiver<ToRelay>,
    inbound: mpsc::Sender<FromRelay>,
    waiting: Option<FromRelay>,
    leaving: bool,
    /// Whether the relay said goodbye: nothing goes out behind the answer to that (RFC 6455 §5.5.1).
    closed: bool,
    /// The number of the last ping, and when it was written.
    pinged: (u32, Option<Instant>),
}

impl Wire {
    /// Takes a WebSocket; dropping the other end of `outbound` closes it in good order.
    pub(super) fn new(
        socket: RelaySocket,
        switch: Arc<Switch>,
        outbound: mpsc::Receiver<ToRelay>,
        inbound: mpsc::Sender<FromRelay>,
    ) -> Self {
        // What piled up for an earlier connection names slots that are gone.
        switch.to_relay.clear();
        Self { socket, switch, outbound, inbound, waiting: None, leaving: false, closed: false, pinged: (0, None) }
    }

    /// Reads and writes until the connection ends.
    pub(super) async fn run(mut self) -> WireFault {
        let mut reserve = Reserve::default();
        poll_fn(|cx| {
            loop {
                let read = self.read(cx, &mut reserve);
                if let Poll::Ready(Err(fault)) = read {
                    return Poll::Ready(fault);
                }
                let written = self.write(cx);
                if let Poll::Ready(Err(fault)) = written {
                    return Poll::Ready(fault);
                }
                if read.is_pending() {
                    return Poll::Pending;
                }
            }
        })
        .await
    }

    /// Reads up to the budget; pending when there is nothing more to read, or nobody to take it.
    fn read(&mut self, cx: &mut Context<'_>, reserve: &mut Reserve) -> Poll<Result<(), WireFault>> {
        self.socket.get_mut().begin_turn();
        for _ in 0..READ_BUDGET {
            if let Some(frame) = self.waiting.take() {
                match reserve.poll_send(&self.inbound, frame, cx) {
                    Ok(()) => {}
                    Err(Refusal::Full(frame)) => {
                        self.waiting = Some(frame);
                        return Poll::Pending;
                    }
                    Err(Refusal::Gone) => return Poll::Ready(Err(WireFault::Left)),
                }
            }
            let next = Pin::new(&mut self.socket).poll_next(cx);
            for taken in self.socket.get_mut().taken() {
                self.take(taken);
            }
            let Some(message) = ready!(next) else { return Poll::Ready(Err(WireFault::Closed)) };
            self.sort(message.map_err(Box::new)?)?;
        }
        Poll::Ready(Ok(()))
    }

    /// A Datagram frame that the WebSocket library did not see.
    fn take(&self, taken: Taken) {
        match RelayFrame::read(&taken.into_payload()) {
            Ok(RelayFrame::Datagram(datagram)) => self.switch.relayed(datagram),
            // Whoever sent it wants this connection to end.
            Ok(RelayFrame::Message { .. } | RelayFrame::MulticastShare { .. } | RelayFrame::Control(_)) | Err(_) => {
                self.switch.count_stray()
            }
        }
    }

    fn sort(&mut self, message: Message) -> Result<(), WireFault> {
        match message {
            // Copied where the mesh keeps it, because a small piece would keep the whole read buffer alive.
            Message::Binary(frame) => match RelayFrame::read(&frame)? {
                RelayFrame::Datagram(datagram) => self.switch.relayed(datagram),
                RelayFrame::Message { .. } | RelayFrame::MulticastShare { .. } | RelayFrame::Control(_) => {
                    self.waiting = Some(FromRelay::Frame(RelayFrame::read(&Bytes::copy_from_slice(&frame))?));
                }
            },
            Message::Pong(payload) => self.waiting = Some(FromRelay::Heard(self.round_trip(&payload))),
            Message::Ping(_) => self.waiting = Some(FromRelay::Heard(None)),
            Message::Close(_) => self.closed = true,
            Message::Text(_) | Message::Frame(_) => {}
        }
        Ok(())
    }

    /// Hands over all that is ready, messages first, then flushes once; pending when there is nothing or no room.
    fn write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), WireFault>> {
        loop {
            while self.socket.get_ref().has_room() {
                ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(Box::new)?;
                match self.next(cx) {
                    Some(Outgoing::Message(message)) => {
                        Pin::new(&mut self.socket).start_send(message).map_err(Box::new)?;
                    }
                    Some(Outgoing::Datagram(frame)) => self.socket.get_mut().push(frame),
                    None => break,
                }
            }
            if !self.socket.get_ref().is_waiting() {
                return if self.leaving { self.close(cx) } else { Poll::Pending };
            }
            ready!(Pin::new(&mut self.socket).poll_flush(cx)).map_err(Box::new)?;
        }
    }

    fn next(&mut self, cx: &mut Context<'_>) -> Option<Outgoing> {
        if self.closed {
            return None;
        }
        if !self.leaving {
            match self.outbound.poll_recv(cx) {
                Poll::Ready(Some(ToRelay::Frame(frame))) => return Some(Outgoing::Message(Message::Binary(frame))),
                Poll::Ready(Some(ToRelay::Ping)) => return Some(Outgoing::Message(self.ping())),
                Poll::Ready(None) => self.leaving = true,
                Poll::Pending => {}
            }
        }
        match self.switch.to_relay.poll_pop(cx) {
            Poll::Ready(frame) => Some(Outgoing::Datagram(frame)),
            Poll::Pending => None,
        }
    }

    /// A ping that its pong is known by: a relay answers several with the last one's (RFC 6455 §5.5.3).
    fn ping(&mut self) -> Message {
        let number = self.pinged.0.wrapping_add(1);
        self.pinged = (number, Some(Instant::now()));
        Message::Ping(Bytes::copy_from_slice(&number.to_be_bytes()))
    }

    fn round_trip(&mut self, payload: &[u8]) -> Option<Duration> {
        let (number, at) = &mut self.pinged;
        (payload == number.to_be_bytes()).then(|| at.take())?.map(|at| at.elapsed())
    }

    fn close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), WireFault>> {
        ready!(Pin::new(&mut self.socket).poll_close(cx)).map_err(Box::new)?;
        Poll::Ready(Err(WireFault::Left))
    }
}

type Room = Pin<Box<dyn Future<Output = Result<mpsc::OwnedPermit<FromRelay>, mpsc::error::SendError<()>>> + Send>>;

/// Waits for room in a channel from within a poll.
#[derive(Default)]
struct Reserve(Option<Room>);

enum Refusal {
    /// No room yet; the task is woken when there is.
    Full(FromRelay),
    /// Nobody will ever read.
    Gone,
}

impl Reserve {
    fn poll_send(
        &mut self,
        sender: &mpsc::Sender<FromRelay>,
        frame: FromRelay,
        cx: &mut Context<'_>,
    ) -> Result<(), Refusal> {
        let frame = if self.0.is_none() {
            match sender.try_send(frame) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::TrySendError::Full(frame)) => frame,
                Err(mpsc::error::TrySendError::Closed(_)) => return Err(Refusal::Gone),
            }
        } else {
            frame
        };
        let room = self.0.get_or_insert_with(|| Box::pin(sender.clone().reserve_owned()));
        match room.as_mut().poll(cx) {
            Poll::Pending => Err(Refusal::Full(frame)),
            Poll::Ready(Err(_)) => Err(Refusal::Gone),
            Poll::Ready(Ok(permit)) => {
                self.0 = None;
                permit.send(frame);
                Ok(())
            }
        }
    }
}
