//! A connection that sits in a room: what it says goes to others, what others say comes to it.
//!
//! In: the WebSocket, and the mailbox of the seat. Out: frames into other members' mailboxes, and why it ended.
//! Never waits for another peer, and never looks behind a frame's header.
//! Roster -> news and frames, until the peer goes, breaks a rule or misses a deadline, or the relay cuts it.
//! Bounds: `TURN_BYTES` read and [`WRITES_PER_TURN`] writes in a turn; idle and write timeout from the configuration.

use std::{
    net::SocketAddr,
    ops::ControlFlow,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use peerfleet_proto::{
    id::Slot,
    limits::MAX_PRESENCE_BYTES,
    wire::{
        decode,
        relay::{
            ClosingReason, Member, Multicast, PeerFrame, PeerToRelay, RefusalReason, Refused, RelayToPeer, SLOT_OFFSET,
            Welcome, control,
        },
        websocket::{MAX_HEADER_BYTES, Taken, put_header},
    },
};
use tokio::time::{Instant, Sleep};
use tokio_tungstenite::tungstenite::Message;
use tracing::debug;

use super::{MAX_CONTROL_BYTES, WebSocket, blame, say_goodbye, short};
use crate::{
    Core,
    metrics::{CloseReason, DropReason, Forwarded},
    rooms::Seat,
    socket::{OUTBOX_BYTES, wire},
};

/// Members are told to a newcomer in frames of about this size: small enough not to keep large buffers anywhere.
const ROSTER_FRAME_BYTES: usize = 4 * 1024;

/// Shortest time between two presences of one member that are passed on. Each goes to everybody in the room; of several
/// within this time the newest wins.
const PRESENCE_INTERVAL: Duration = Duration::from_millis(250);

/// Writes per turn: a peer that takes everything at once must not keep the thread from others.
const WRITES_PER_TURN: usize = 8;

/// A connection that sits in a room.
pub(super) struct Membership {
    // What it is.
    core: Arc<Core>,
    pub(super) seat: Seat,
    ws: WebSocket,
    // What it still has to say.
    roster: Option<std::vec::IntoIter<Arc<Member>>>,
    presence: Option<Vec<u8>>,
    // When something happened last, and when to look next.
    heard: Instant,
    published: Option<Instant>,
    stalled: Option<Stall>,
    timer: Pin<Box<Sleep>>,
}

/// Since when the socket has taken nothing, and how much it had taken before.
#[derive(Debug, Clone, Copy)]
struct Stall {
    sent: u64,
    since: Instant,
}

impl Membership {
    pub(super) fn new(
        core: Arc<Core>,
        mut ws: WebSocket,
        seat: Seat,
        others: Vec<Arc<Member>>,
        remote: SocketAddr,
    ) -> Box<Self> {
        let now = Instant::now();
        let idle_timeout = core.config.idle_timeout;
        let welcome = RelayToPeer::Welcome(Welcome {
            slot: seat.slot(),
            observed: SocketAddr::new(remote.ip().to_canonical(), remote.port()),
            idle_timeout_ms: idle_timeout.as_millis().try_into().unwrap_or(u32::MAX),
            stun: core.config.stun.then(|| ws.get_ref().local_port()).flatten(),
            stun_alternate: ws.get_ref().local_port().and_then(|port| core.alternate(port)),
        });
        ws.get_mut().outbox().push(wire(&control(&welcome)));
        ws.get_mut().take_datagrams();
        debug!(%remote, room = short(seat.room()), slot = %seat.slot(), "joined");
        Box::new(Self {
            core,
            seat,
            ws,
            roster: Some(others.into_iter()),
            presence: None,
            heard: now,
            published: None,
            stalled: None,
            timer: Box::pin(tokio::time::sleep_until(now + idle_timeout)),
        })
    }

    pub(super) async fn run(mut self: Box<Self>) -> CloseReason {
        let reason = std::future::poll_fn(|cx| self.poll_turn(cx)).await;
        let Self { seat, ws, .. } = *self;
        drop(seat);
        Box::pin(say_goodbye(ws, reason)).await;
        reason
    }

    /// One turn. Its blocks are in the order of what must not wait for what.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        let now = Instant::now();
        // Before looking into the mailbox: what comes later wakes us again.
        self.seat.mailbox().register(cx.waker());
        // 1. What the peer says: at most `TURN_BYTES`.
        if let ControlFlow::Break(reason) = self.read(cx, now) {
            return Poll::Ready(reason);
        }
        // 2. What others say to the peer, answers to what it just said included.
        if let ControlFlow::Break(reason) = self.write(cx, now) {
            return Poll::Ready(reason);
        }
        // 3. What time it is.
        while self.timer.as_mut().poll(cx).is_ready() {
            if let ControlFlow::Break(reason) = self.keep_deadlines(Instant::now()) {
                return Poll::Ready(reason);
            }
        }
        Poll::Pending
    }

    fn read(&mut self, cx: &mut Context<'_>, now: Instant) -> ControlFlow<CloseReason> {
        self.ws.get_mut().begin_turn();
        loop {
            let next = self.ws.poll_next_unpin(cx);
            for taken in self.ws.get_mut().taken() {
                self.heard = now;
                self.pass_on(taken, now)?;
            }
            let Poll::Ready(next) = next else { return ControlFlow::Continue(()) };
            self.heard = now;
            match next {
                Some(Ok(Message::Binary(frame))) => self.handle(&frame, now)?,
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Text(_) | Message::Frame(_))) => return ControlFlow::Break(CloseReason::Malformed),
                Some(Ok(Message::Close(_))) | None => return ControlFlow::Break(CloseReason::Left),
                Some(Err(fault)) => return ControlFlow::Break(blame(&fault)),
            }
        }
    }

    /// A Datagram frame that tungstenite did not see.
    fn pass_on(&mut self, taken: Taken, now: Instant) -> ControlFlow<CloseReason> {
        let Ok(PeerFrame::Datagram { to }) = PeerFrame::split(taken.payload()) else {
            return ControlFlow::Break(CloseReason::Malformed);
        };
        let bytes = taken.payload().len();
        let sent = self.seat.send_datagram(to, taken.readdressed(self.seat.slot()), now.into_std());
        self.account_datagram(bytes, sent);
        ControlFlow::Continue(())
    }

    fn handle(&mut self, frame: &[u8], now: Instant) -> ControlFlow<CloseReason> {
        match PeerFrame::split(frame) {
            Ok(PeerFrame::Message { to, tag }) => {
                let sent = self.seat.send_message(to, readdress(frame, self.seat.slot()));
                self.account_message(to, tag, Forwarded::Message, frame.len(), sent);
            }
            Ok(PeerFrame::Datagram { to }) => {
                let sent = self.seat.send_datagram(to, readdress(frame, self.seat.slot()), now.into_std());
                self.account_datagram(frame.len(), sent);
            }
            Ok(PeerFrame::Multicast(multicast)) => self.multicast(&multicast),
            Ok(PeerFrame::Control(word)) => return self.control(word, now),
            Err(_) => return ControlFlow::Break(CloseReason::Malformed),
        }
        ControlFlow::Continue(())
    }

    fn multicast(&mut self, multicast: &Multicast<'_>) {
        let own = self.seat.slot();
        for (to, part) in multicast.parts() {
            let share = multicast.share(own, part);
            // One frame can make 256 large ones.
            self.ws.get_mut().charge(share.len());
            let sent = self.seat.send_message(to, wire(&share));
            self.account_message(to, multicast.tag, Forwarded::Share, share.len(), sent);
        }
    }

    fn account_message(&self, to: Slot, tag: u32, what: Forwarded, bytes: usize, sent: Result<(), DropReason>) {
        match sent {
            Ok(()) => self.core.metrics.forwarded(what, bytes),
            Err(reason) => {
                self.core.metrics.dropped(reason, 1);
                let gone = reason == DropReason::MessageGone;
                let reason = if gone { RefusalReason::Gone } else { RefusalReason::QueueFull };
                self.seat.mailbox().tell(&RelayToPeer::Refused(Refused { slot: to, tag, reason }));
            }
        }
    }

    fn account_datagram(&self, bytes: usize, sent: Result<u64, DropReason>) {
        match sent {
            Ok(dropped) => {
                self.core.metrics.forwarded(Forwarded::Datagram, bytes);
                self.core.metrics.dropped(DropReason::DatagramQueueFull, dropped);
            }
            Err(reason) => self.core.metrics.dropped(reason, 1),
        }
    }

    fn control(&mut self, word: &[u8], now: Instant) -> ControlFlow<CloseReason> {
        match decode(word, MAX_CONTROL_BYTES) {
            Ok(PeerToRelay::Presence(sealed)) if sealed.len() <= MAX_PRESENCE_BYTES => {
                self.presence = Some(sealed);
                self.publish(now);
                ControlFlow::Continue(())
            }
            Ok(PeerToRelay::Presence(_)) | Err(_) => ControlFlow::Break(CloseReason::Malformed),
            Ok(PeerToRelay::Join(_)) => ControlFlow::Break(CloseReason::OutOfTurn),
        }
    }

    /// Passes the newest presence on, or sees to it that this happens as soon as it may.
    fn publish(&mut self, now: Instant) {
        let due = self.published.map_or(now, |last| last + PRESENCE_INTERVAL);
        if due > now {
            self.wake_at(due);
        } else if let Some(sealed) = self.presence.take() {
            self.seat.publish(sealed);
            self.published = Some(now);
        }
    }

    fn write(&mut self, cx: &mut Context<'_>, now: Instant) -> ControlFlow<CloseReason> {
        for _ in 0..WRITES_PER_TURN {
            let cut = self.fill();
            if cut == Some(ClosingReason::SlowReader) {
                return ControlFlow::Break(CloseReason::SlowReader);
            }
            let socket = self.ws.get_mut();
            if socket.outbox().is_empty() {
                self.stalled = None;
                return cut.map_or(ControlFlow::Continue(()), |reason| ControlFlow::Break(reason.into()));
            }
            match socket.poll_drain(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return ControlFlow::Break(CloseReason::Lost),
                Poll::Pending => {
                    self.stall(now);
                    return ControlFlow::Continue(());
                }
            }
        }
        cx.waker().wake_by_ref();
        ControlFlow::Continue(())
    }

    /// Fills the outbox: the roster first, since all news in the mailbox come after it.
    fn fill(&mut self) -> Option<ClosingReason> {
        let outbox = self.ws.get_mut().outbox();
        while let Some(members) = &mut self.roster {
            if outbox.bytes() >= OUTBOX_BYTES {
                break;
            }
            let (frame, last) = roster_frame(members);
            outbox.push(frame);
            if last {
                self.roster = None;
            }
        }
        self.seat.mailbox().fill(outbox)
    }

    fn stall(&mut self, now: Instant) {
        let sent = self.ws.get_ref().sent();
        if self.stalled.is_none_or(|stall| stall.sent != sent) {
            self.stalled = Some(Stall { sent, since: now });
            self.wake_at(now + self.core.config.write_timeout);
        }
    }

    fn wake_at(&mut self, at: Instant) {
        if at < self.timer.deadline() {
            self.timer.as_mut().reset(at);
        }
    }

    /// Does what is due, and sets the timer to what is due next.
    fn keep_deadlines(&mut self, now: Instant) -> ControlFlow<CloseReason> {
        let idle = self.heard + self.core.config.idle_timeout;
        if idle <= now {
            return ControlFlow::Break(CloseReason::Idle);
        }
        self.timer.as_mut().reset(idle);
        if let Some(stall) = self.stalled {
            let until = stall.since + self.core.config.write_timeout;
            if until <= now {
                return ControlFlow::Break(CloseReason::SlowReader);
            }
            self.wake_at(until);
        }
        if self.presence.is_some() {
            self.publish(now);
        }
        ControlFlow::Continue(())
    }
}

/// A frame ready for the wire that differs from what came in nothing but the slot: the source for the destination.
fn readdress(frame: &[u8], from: Slot) -> Bytes {
    let mut wire = BytesMut::with_capacity(MAX_HEADER_BYTES + frame.len());
    put_header(&mut wire, frame.len(), None);
    wire.put_slice(&frame[..SLOT_OFFSET]);
    wire.put_u32(from.0);
    wire.put_slice(&frame[SLOT_OFFSET + 4..]);
    wire.freeze()
}

/// The next members that fit into one roster frame, and whether those were the last.
fn roster_frame(members: &mut std::vec::IntoIter<Arc<Member>>) -> (Bytes, bool) {
    let mut some = Vec::new();
    let mut bytes = 0;
    while bytes < ROSTER_FRAME_BYTES {
        let Some(member) = members.next() else { break };
        bytes += member.presence.len() + size_of::<Member>();
        some.push(Member::clone(&member));
    }
    let last = members.len() == 0;
    (wire(&control(&RelayToPeer::Roster { members: some, last })), last)
}

#[cfg(test)]
mod tests {
    use peerfleet_proto::{
        id::{InstanceId, PeerId},
        wire::relay::{RelayFrame, message},
    };

    use super::*;

    #[test]
    fn readdressed_frame_differs_in_its_slot_only() {
        for len in [0, 100, 200, 60_000, 70_000] {
            let sealed = vec![7; len];
            let wire = readdress(&message(Slot(1), 9, &sealed), Slot(2));
            let expected = message(Slot(2), 9, &sealed);
            assert_eq!(wire[wire.len() - expected.len()..], expected);
        }
    }

    #[test]
    fn roster_is_told_whole_in_bounded_frames() {
        let member = |slot| {
            let (peer, instance) = (PeerId::from_bytes([1; 32]), InstanceId::from_bytes([2; 16]));
            Arc::new(Member { slot: Slot(slot), peer, instance, presence: vec![3; MAX_PRESENCE_BYTES] })
        };
        let mut members = (0..100).map(member).collect::<Vec<_>>().into_iter();
        let mut told = 0;
        loop {
            let (frame, last) = roster_frame(&mut members);
            assert!(frame.len() <= ROSTER_FRAME_BYTES + MAX_PRESENCE_BYTES + 256);
            let header = if frame[1] < 126 { 2 } else { 4 };
            let Ok(RelayFrame::Control(RelayToPeer::Roster { members, last: said })) =
                RelayFrame::read(&frame.slice(header..))
            else {
                panic!("no roster frame")
            };
            assert!(members.iter().zip(told..).all(|(member, slot)| member.slot == Slot(slot)));
            told += u32::try_from(members.len()).unwrap();
            assert_eq!(said, last);
            if last {
                break;
            }
        }
        assert_eq!(told, 100);
    }
}
