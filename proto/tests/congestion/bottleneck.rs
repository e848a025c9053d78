//! One bottleneck that flows share, in virtual time: a rate, a queue, a way there and back, dice.
//!
//! In: what the path is like, who sends over it. Out: what arrived of each, was lost, and waited how long. The same seed gives
//! the same run. Acknowledgements may be lost as well; they never wait in a queue.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    time::{Duration, Instant},
};

use super::sender::{Control, Receiver, Sender};

/// What a path is like.
#[derive(Debug, Clone, Copy)]
pub(super) struct Path {
    /// Megabits a second.
    pub(super) megabit: f64,
    /// There and back without a queue.
    pub(super) round_trip: Duration,
    /// Bytes that wait at most.
    pub(super) queue: u64,
    /// Packets in a thousand that are lost by chance, each way.
    pub(super) loss_permille: u64,
    /// Acknowledgements are held until the next multiple of this.
    pub(super) bunches: Duration,
    /// One acknowledgement in 64 is held for up to so long, and what comes after it too: somebody else had the processor.
    pub(super) jitter: Duration,
    /// A queue longer than this marks packets (ECN); `None` never does.
    pub(super) mark_above: Option<u64>,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives { flow: usize, number: u64, marked: bool },
    Acked { flow: usize, numbers: Vec<u64>, marks: u64 },
    Wakes { flow: usize },
    AckDelayed { flow: usize },
}

/// What became of one flow.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum {
    pub(super) sent: u64,
    pub(super) delivered: u64,
    /// Dropped by the full queue.
    pub(super) dropped: u64,
    pub(super) packets: u64,
    /// Sum of the time that each packet waited in the queue.
    pub(super) waited: Duration,
}

/// The world of one bottleneck.
pub(super) struct World {
    pub(super) path: Path,
    start: Instant,
    now: Instant,
    events: BinaryHeap<Reverse<(Instant, u64, Event)>>,
    count: u64,
    senders: Vec<Sender>,
    receivers: Vec<Receiver>,
    sums: Vec<Sum>,
    /// When the queue's packets leave, and their size.
    queue: VecDeque<(Instant, u64)>,
    queued: u64,
    free_at: Instant,
    /// When the latest acknowledgement arrives that is late by chance.
    last_acked: Instant,
    dice: u64,
}

impl World {
    pub(super) fn new(path: Path, seed: u64) -> Self {
        let start = beginning();
        Self {
            path,
            start,
            now: start,
            events: BinaryHeap::new(),
            count: 0,
            senders: Vec::new(),
            receivers: Vec::new(),
            sums: Vec::new(),
            queue: VecDeque::new(),
            queued: 0,
            free_at: start,
            last_acked: start,
            dice: 0x9e37_79b9_7f4a_7c15 ^ seed.wrapping_mul(0x2545_f491_4f6c_dd1d).max(1),
        }
    }

    /// One more flow, which begins now. Gives its number.
    pub(super) fn add(&mut self, control: Box<dyn Control>, packet: u64) -> usize {
        let flow = self.senders.len();
        self.senders.push(Sender::new(control, packet, self.now));
        self.receivers.push(Receiver::default());
        self.sums.push(Sum::default());
        self.put(self.now, Event::Wakes { flow });
        flow
    }

    pub(super) fn sender(&mut self, flow: usize) -> &mut Sender {
        &mut self.senders[flow]
    }

    /// Lets time pass, and says what became of each flow in it.
    pub(super) fn run(&mut self, time: Duration) -> Vec<Sum> {
        let before = self.sums.clone();
        let end = self.now + time;
        while self.events.peek().is_some_and(|Reverse((at, ..))| *at <= end) {
            let Some(Reverse((at, _, event))) = self.events.pop() else { break };
            self.now = at;
            self.happen(event);
        }
        self.now = end;
        for flow in 0..self.senders.len() {
            self.put(end, Event::Wakes { flow });
        }
        let since = |(now, before): (&Sum, &Sum)| Sum {
            sent: now.sent - before.sent,
            delivered: now.delivered - before.delivered,
            dropped: now.dropped - before.dropped,
            packets: now.packets - before.packets,
            waited: now.waited - before.waited,
        };
        self.sums.iter().zip(&before).map(since).collect()
    }

    fn happen(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Arrives { flow, number, marked } => {
                let size = self.senders[flow].packet;
                self.sums[flow].delivered += size;
                let receiver = &mut self.receivers[flow];
                if receiver.receive(number, marked) {
                    self.acknowledge(flow);
                } else {
                    self.put(now + Receiver::DELAY, Event::AckDelayed { flow });
                }
            }
            Event::AckDelayed { flow } => {
                if self.receivers[flow].has_waiting() {
                    self.acknowledge(flow);
                }
            }
            Event::Acked { flow, numbers, marks } => {
                self.senders[flow].acknowledged(now, &numbers, marks);
                self.send(flow);
            }
            Event::Wakes { flow } => {
                self.senders[flow].woken(now);
                self.send(flow);
            }
        }
    }

    fn acknowledge(&mut self, flow: usize) {
        let (numbers, marks) = self.receivers[flow].acknowledgement();
        if self.is_unlucky() {
            return;
        }
        let mut at = self.now + self.path.round_trip / 2;
        if !self.path.bunches.is_zero() {
            let since = at.saturating_duration_since(self.start).as_nanos();
            let step = self.path.bunches.as_nanos();
            at = self.start + Duration::from_nanos((since.div_ceil(step) * step) as u64);
        }
        if !self.path.jitter.is_zero() {
            let is_held = self.roll().is_multiple_of(64);
            let late = self.roll() % u64::try_from(self.path.jitter.as_nanos()).expect("it is short");
            at = (at + Duration::from_nanos(if is_held { late } else { 0 })).max(self.last_acked);
            self.last_acked = at;
        }
        self.put(at, Event::Acked { flow, numbers, marks });
    }

    fn send(&mut self, flow: usize) {
        let now = self.now;
        while let Some(number) = self.senders[flow].next(now) {
            self.carry(flow, number);
        }
        if let Some(at) = self.senders[flow].wakes_at(now) {
            self.put(at, Event::Wakes { flow });
        }
    }

    fn carry(&mut self, flow: usize, number: u64) {
        let size = self.senders[flow].packet;
        self.sums[flow].sent += size;
        self.sums[flow].packets += 1;
        while self.queue.front().is_some_and(|(leaves, _)| *leaves <= self.now) {
            let Some((_, size)) = self.queue.pop_front() else { break };
            self.queued -= size;
        }
        if self.is_unlucky() {
            return;
        }
        if self.queued + size > self.path.queue {
            self.sums[flow].dropped += size;
            return;
        }
        let begins = self.free_at.max(self.now);
        self.sums[flow].waited += begins - self.now;
        let leaves = begins + Duration::from_secs_f64(size as f64 / (self.path.megabit * 125_000.0));
        self.free_at = leaves;
        let marked = self.path.mark_above.is_some_and(|most| self.queued > most);
        self.queue.push_back((leaves, size));
        self.queued += size;
        self.put(leaves + self.path.round_trip / 2, Event::Arrives { flow, number, marked });
    }

    fn is_unlucky(&mut self) -> bool {
        self.roll() % 1000 < self.path.loss_permille
    }

    fn roll(&mut self) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        self.dice
    }

    fn put(&mut self, at: Instant, event: Event) {
        self.count += 1;
        self.events.push(Reverse((at, self.count, event)));
    }
}

/// When a simulation begins. Only differences from it count.
#[expect(clippy::disallowed_methods, reason = "an Instant cannot be made in any other way")]
pub(super) fn beginning() -> Instant {
    Instant::now()
}
