//! What waits for one peer to read it: control frames, presences, messages and datagrams, each with its own bound.
//!
//! In: frames ready for the wire. Out: the same frames, the most important first, or the reason why one was not taken.
//! Never blocks a sender and never loses a message in silence: a push answers at once, with a [`DropReason`] if it must.
//! Open -> Cut (control frames piled up, or the relay says goodbye: nothing more is taken) -> Closed.
//! Datagrams are bounded in time as well: a burst that the peer is about to take is no queue.
//! Bounds, in bytes: [`QueueLimits`] per peer, and a [`Budget`] per room and for the relay over all queues of messages
//! and datagrams. An entry counts [`ENTRY_BYTES`] besides its frame, so that tiny frames are not free.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use peerfleet_proto::{id::Slot, wire::relay::ClosingReason};

use crate::metrics::DropReason;

/// What one queued frame costs besides its bytes: the handle in the queue, the allocation's header and its count.
pub const ENTRY_BYTES: usize = 96;

/// Capacity above which an emptied queue gives its memory back: a burst should not stay with an idle peer.
const KEPT_CAPACITY: usize = 8;

/// Datagrams that have waited no longer than this are a burst: between processes that share a processor one waits for its turn
/// some milliseconds while the other sends a megabyte. A queue that stands for longer only adds delay (RFC 8289 §3).
const BURST: Duration = Duration::from_millis(20);

/// How many times the bound of a standing queue of datagrams a burst may be: 2 MiB of 512 KiB, 5 ms at 400 MB/s.
const BURST_FACTOR: usize = 4;

/// Bounds of one peer's queues, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Control frames; beyond it the peer is cut, because it would miss who joined and left.
    pub control: usize,
    /// Messages; beyond it the sender is refused.
    pub messages: usize,
    /// Datagrams that wait for longer than a moment; beyond it the oldest are dropped. A burst may be four times that.
    pub datagrams: usize,
}

/// Bytes that many queues share.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
}

impl Budget {
    /// Nothing is used yet.
    pub fn new(limit: usize) -> Self {
        Self { used: AtomicUsize::new(0), limit }
    }

    /// Bytes that are used now.
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = self.used.fetch_add(bytes, Relaxed) + bytes <= self.limit;
        if !fits {
            self.give_back(bytes);
        }
        fits
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Relaxed);
    }
}

/// What all queues of one room share.
#[derive(Debug)]
pub struct RoomBounds {
    limits: QueueLimits,
    room: Budget,
    relay: Arc<Budget>,
}

/// Whose budget was used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exhausted {
    Room,
    Relay,
}

impl RoomBounds {
    /// Bounds of a new room's queues.
    pub fn new(limits: QueueLimits, room_bytes: usize, relay: Arc<Budget>) -> Self {
        Self { limits, room: Budget::new(room_bytes), relay }
    }

    fn take(&self, bytes: usize) -> Result<(), Exhausted> {
        if !self.room.take(bytes) {
            return Err(Exhausted::Room);
        }
        if !self.relay.take(bytes) {
            self.room.give_back(bytes);
            return Err(Exhausted::Relay);
        }
        Ok(())
    }

    fn give_back(&self, bytes: usize) {
        self.room.give_back(bytes);
        self.relay.give_back(bytes);
    }
}

/// First in, first out, and how many bytes that is.
#[derive(Debug, Default)]
struct Line {
    frames: VecDeque<Bytes>,
    bytes: usize,
}

impl Line {
    fn push(&mut self, frame: Bytes) {
        self.bytes += cost(&frame);
        self.frames.push_back(frame);
    }

    fn pop(&mut self) -> Option<Bytes> {
        let frame = self.frames.pop_front()?;
        self.bytes -= cost(&frame);
        if self.frames.is_empty() && self.frames.capacity() > KEPT_CAPACITY {
            self.frames = VecDeque::new();
        }
        Some(frame)
    }

    fn clear(&mut self) {
        *self = Self::default();
    }
}

fn cost(frame: &Bytes) -> usize {
    frame.len() + ENTRY_BYTES
}

/// What is left to happen to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Cut(ClosingReason),
    Closed,
}

/// The queues of one peer.
#[derive(Debug)]
pub struct Queues {
    shared: Arc<RoomBounds>,
    control: Line,
    presences: BTreeMap<Slot, Bytes>,
    messages: Line,
    datagrams: Line,
    /// Since when each of the datagrams waits.
    waiting_since: VecDeque<Instant>,
    state: State,
}

impl Queues {
    /// Empty queues.
    pub fn new(shared: Arc<RoomBounds>) -> Self {
        Self {
            shared,
            control: Line::default(),
            presences: BTreeMap::new(),
            messages: Line::default(),
            datagrams: Line::default(),
            waiting_since: VecDeque::new(),
            state: State::Open,
        }
    }

    /// Queues a control frame. If there are too many, the peer is to be cut as a slow reader.
    pub fn push_control(&mut self, frame: Bytes) {
        if self.state != State::Open {
            return;
        }
        if self.control.bytes + cost(&frame) > self.shared.limits.control {
            self.cut(ClosingReason::SlowReader);
            return;
        }
        self.control.push(frame);
    }

    /// Queues a presence in place of an older one of the same slot. At most one per member, so no bound of its own.
    pub fn push_presence(&mut self, slot: Slot, frame: Bytes) {
        if self.state == State::Open {
            self.presences.insert(slot, frame);
        }
    }

    /// Queues the news that a slot is gone; its presence is news no longer.
    pub fn push_left(&mut self, slot: Slot, frame: Bytes) {
        self.presences.remove(&slot);
        self.push_control(frame);
    }

    /// Queues a message.
    ///
    /// # Errors
    /// Why not; the caller tells the sender.
    pub fn push_message(&mut self, frame: Bytes) -> Result<(), DropReason> {
        if self.state != State::Open {
            return Err(DropReason::MessageGone);
        }
        if self.messages.bytes + cost(&frame) > self.shared.limits.messages {
            return Err(DropReason::MessageQueueFull);
        }
        self.shared.take(cost(&frame)).map_err(|exhausted| match exhausted {
            Exhausted::Room => DropReason::MessageRoomFull,
            Exhausted::Relay => DropReason::MessageRelayFull,
        })?;
        self.messages.push(frame);
        Ok(())
    }

    /// Queues a datagram, dropping as many of the oldest as it takes; says how many those were.
    ///
    /// # Errors
    /// Why the datagram itself was not taken.
    pub fn push_datagram(&mut self, frame: Bytes, now: Instant) -> Result<u64, DropReason> {
        if self.state != State::Open {
            return Err(DropReason::DatagramGone);
        }
        let mut dropped = 0;
        while self.is_too_much(cost(&frame), now) && self.pop_datagram().is_some() {
            dropped += 1;
        }
        self.shared.take(cost(&frame)).map_err(|exhausted| match exhausted {
            Exhausted::Room => DropReason::DatagramRoomFull,
            Exhausted::Relay => DropReason::DatagramRelayFull,
        })?;
        self.datagrams.push(frame);
        self.waiting_since.push_back(now);
        Ok(dropped)
    }

    /// Whether the oldest datagram has to go for so many bytes more.
    fn is_too_much(&self, more: usize, now: Instant) -> bool {
        let (bytes, limit) = (self.datagrams.bytes + more, self.shared.limits.datagrams);
        let stands = || self.waiting_since.front().is_some_and(|since| now.saturating_duration_since(*since) > BURST);
        bytes > limit && (bytes > limit.saturating_mul(BURST_FACTOR) || stands())
    }

    /// The next frame: control frames, then presences, then messages, then datagrams.
    pub fn pop(&mut self) -> Option<Bytes> {
        if let Some(frame) = self.control.pop() {
            return Some(frame);
        }
        if let Some((_, frame)) = self.presences.pop_first() {
            return Some(frame);
        }
        if let Some(frame) = self.messages.pop() {
            self.shared.give_back(cost(&frame));
            return Some(frame);
        }
        self.pop_datagram()
    }

    fn pop_datagram(&mut self) -> Option<Bytes> {
        let frame = self.datagrams.pop()?;
        self.waiting_since.pop_front();
        if self.waiting_since.is_empty() && self.waiting_since.capacity() > KEPT_CAPACITY {
            self.waiting_since = VecDeque::new();
        }
        self.shared.give_back(cost(&frame));
        Some(frame)
    }

    /// Nothing but the control frames that are queued goes out any more, and then the peer is to be closed.
    pub fn cut(&mut self, reason: ClosingReason) {
        if self.state == State::Open {
            self.discard();
            self.state = State::Cut(reason);
        }
    }

    /// What is queued still goes out, nothing is taken any more, and then the peer is to be closed.
    pub fn finish(&mut self, reason: ClosingReason) {
        if self.state == State::Open {
            self.state = State::Cut(reason);
        }
    }

    /// Why the peer is to be closed, if it is.
    pub fn cut_for(&self) -> Option<ClosingReason> {
        match self.state {
            State::Cut(reason) => Some(reason),
            State::Open | State::Closed => None,
        }
    }

    /// The peer is gone: whatever is queued goes with it, and nothing is taken any more.
    pub fn close(&mut self) {
        self.discard();
        self.control.clear();
        self.state = State::Closed;
    }

    fn discard(&mut self) {
        self.shared.give_back(self.messages.bytes + self.datagrams.bytes);
        self.messages.clear();
        self.datagrams.clear();
        self.waiting_since = VecDeque::new();
        self.presences.clear();
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        self.discard();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: QueueLimits = QueueLimits { control: 1000, messages: 1000, datagrams: 1000 };

    fn queues(room: usize, relay: usize) -> (Queues, Arc<RoomBounds>) {
        let shared = Arc::new(RoomBounds::new(LIMITS, room, Arc::new(Budget::new(relay))));
        (Queues::new(shared.clone()), shared)
    }

    fn frame(byte: u8, len: usize) -> Bytes {
        vec![byte; len].into()
    }

    fn first_bytes(queues: &mut Queues) -> Vec<u8> {
        std::iter::from_fn(|| queues.pop()).map(|frame| frame[0]).collect()
    }

    #[test]
    fn control_goes_before_presences_before_messages_before_datagrams() {
        let (mut queues, _) = queues(10_000, 10_000);
        queues.push_datagram(frame(4, 1), Instant::now()).unwrap();
        queues.push_message(frame(3, 1)).unwrap();
        queues.push_presence(Slot(9), frame(2, 1));
        queues.push_control(frame(1, 1));
        queues.push_message(frame(3, 1)).unwrap();
        assert_eq!(first_bytes(&mut queues), [1, 2, 3, 3, 4]);
    }

    #[test]
    fn full_datagram_queue_drops_the_oldest() {
        let (mut queues, _) = queues(10_000, 10_000);
        let (start, step) = (Instant::now(), BURST + Duration::from_millis(1));
        let push = |byte: u8| queues.push_datagram(frame(byte, 104), start + step * byte.into()).unwrap();
        assert_eq!((0..20).map(push).sum::<u64>(), 15);
        assert_eq!(first_bytes(&mut queues), [15, 16, 17, 18, 19]);
    }

    #[test]
    fn a_burst_of_datagrams_may_be_four_times_what_may_stand() {
        let (mut queues, _) = queues(10_000, 10_000);
        let start = Instant::now();
        let dropped: u64 = (0..30).map(|byte| queues.push_datagram(frame(byte, 104), start).unwrap()).sum();
        assert_eq!(dropped, 10);
        let later = start + BURST + Duration::from_millis(1);
        assert_eq!(queues.push_datagram(frame(30, 104), later), Ok(16), "what stands by now is no burst");
        assert_eq!(first_bytes(&mut queues), [26, 27, 28, 29, 30]);
    }

    #[test]
    fn full_message_queue_refuses_the_newest() {
        let (mut queues, _) = queues(10_000, 10_000);
        for byte in 0..5 {
            queues.push_message(frame(byte, 104)).unwrap();
        }
        assert_eq!(queues.push_message(frame(5, 104)), Err(DropReason::MessageQueueFull));
        assert_eq!(queues.push_datagram(frame(9, 104), Instant::now()), Ok(0), "datagrams have a queue of their own");
        assert_eq!(first_bytes(&mut queues), [0, 1, 2, 3, 4, 9]);
    }

    #[test]
    fn full_control_queue_cuts_its_peer_but_keeps_what_is_queued() {
        let (mut queues, shared) = queues(10_000, 10_000);
        queues.push_message(frame(9, 1)).unwrap();
        for byte in 0..6 {
            queues.push_control(frame(byte, 104));
        }
        assert_eq!(queues.cut_for(), Some(ClosingReason::SlowReader));
        assert_eq!(queues.push_message(frame(9, 1)), Err(DropReason::MessageGone));
        assert_eq!(first_bytes(&mut queues), [0, 1, 2, 3, 4]);
        assert_eq!(shared.room.used(), 0);
    }

    #[test]
    fn newer_presence_replaces_the_older_and_leaving_removes_it() {
        let (mut queues, _) = queues(10_000, 10_000);
        queues.push_presence(Slot(1), frame(1, 1));
        queues.push_presence(Slot(2), frame(2, 1));
        queues.push_presence(Slot(1), frame(3, 1));
        queues.push_left(Slot(2), frame(4, 1));
        assert_eq!(first_bytes(&mut queues), [4, 3]);
    }

    #[test]
    fn budgets_of_room_and_relay_are_told_apart() {
        let (mut small_room, _) = queues(150, 10_000);
        small_room.push_message(frame(0, 10)).unwrap();
        assert_eq!(small_room.push_message(frame(0, 10)), Err(DropReason::MessageRoomFull));
        assert_eq!(small_room.push_datagram(frame(0, 10), Instant::now()), Err(DropReason::DatagramRoomFull));
        let (mut small_relay, shared) = queues(10_000, 150);
        small_relay.push_datagram(frame(0, 10), Instant::now()).unwrap();
        assert_eq!(small_relay.push_message(frame(0, 10)), Err(DropReason::MessageRelayFull));
        assert_eq!(small_relay.push_datagram(frame(0, 10), Instant::now()), Err(DropReason::DatagramRelayFull));
        assert_eq!(shared.room.used(), shared.relay.used());
    }

    #[test]
    fn emptied_queue_gives_its_memory_back() {
        let (mut queues, _) = queues(100_000, 100_000);
        for _ in 0..9 {
            queues.push_message(frame(0, 1)).unwrap();
        }
        while queues.pop().is_some() {}
        assert_eq!(queues.messages.frames.capacity(), 0);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Control(usize),
        Presence(u32, usize),
        Message(usize),
        Datagram(usize),
        Pop,
        Cut,
        Close,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..300_usize).prop_map(Step::Control),
            4 => (0..4_u32, 0..300_usize).prop_map(|(slot, len)| Step::Presence(slot, len)),
            8 => (0..600_usize).prop_map(Step::Message),
            8 => (0..600_usize).prop_map(Step::Datagram),
            8 => Just(Step::Pop),
            1 => Just(Step::Cut),
            1 => Just(Step::Close),
        ]
    }

    proptest! {
        #[test]
        fn no_bound_is_ever_passed_and_every_byte_is_given_back(steps in prop::collection::vec(step(), 0..200)) {
            let (mut queues, shared) = queues(1500, 1400);
            for step in steps {
                match step {
                    Step::Control(len) => queues.push_control(frame(0, len)),
                    Step::Presence(slot, len) => queues.push_presence(Slot(slot), frame(0, len)),
                    Step::Message(len) => drop(queues.push_message(frame(0, len))),
                    Step::Datagram(len) => drop(queues.push_datagram(frame(0, len), Instant::now())),
                    Step::Pop => drop(queues.pop()),
                    Step::Cut => queues.cut(ClosingReason::Idle),
                    Step::Close => queues.close(),
                }
                prop_assert!(queues.control.bytes <= LIMITS.control);
                prop_assert!(queues.messages.bytes <= LIMITS.messages);
                prop_assert!(queues.datagrams.bytes <= LIMITS.datagrams * BURST_FACTOR);
                prop_assert_eq!(queues.datagrams.frames.len(), queues.waiting_since.len());
                prop_assert_eq!(shared.room.used(), queues.messages.bytes + queues.datagrams.bytes);
                prop_assert_eq!(shared.relay.used(), shared.room.used());
            }
            drop(queues);
            prop_assert_eq!(shared.room.used(), 0);
        }
    }
}
