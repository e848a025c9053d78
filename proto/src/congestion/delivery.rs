//! How fast a path delivers, from acknowledgements alone.
//!
//! In: when packets left and which of them arrived. Out: one [`Sample`] for each batch of acknowledgements: bytes delivered
//! in the time between a packet's departure and its acknowledgement, over the longer of that time as the receiver and
//! as the sender saw it, so that acknowledgements that come in a bunch do not look like a fast path. A sample of a time
//! in which the sender had nothing to send is marked: it says what was sent, not what could have been.
//! Bounds: [`MAX_POINTS`] points in time are remembered, no two closer than a [`SPACING`]th of a round trip.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Points remembered. Sixteen round trips at [`SPACING`]: a queue that made them longer than that is full.
const MAX_POINTS: usize = 512;

/// Points in the shortest round trip: a sample's time is wrong by 3 % at most, in both directions alike.
const SPACING: u32 = 32;

/// Highest rate that is believed, in bytes a second: no link is faster, and sums stay far below what a number holds.
const MAX_RATE: u128 = 1_000_000_000_000;

/// What had been delivered at one moment.
#[derive(Debug, Clone, Copy)]
struct Point {
    at: Instant,
    delivered: u64,
    /// When the latest packet left that had arrived by then.
    sent: Instant,
    limited: bool,
}

/// What one batch of acknowledgements says of the path.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// Bytes a second.
    pub(super) rate: u64,
    /// The sender had nothing more to send for a part of it.
    pub(super) limited: bool,
    /// Bytes that had been delivered when the packet left.
    pub(super) delivered_before: u64,
    /// Round trip of the packet.
    pub(super) rtt: Duration,
    /// Bytes that the batch acknowledged.
    pub(super) acked: u64,
}

/// Remembers what had been delivered when.
#[derive(Debug, Clone, Default)]
pub(super) struct Delivery {
    delivered: u64,
    points: VecDeque<Point>,
    /// When the latest packet left that arrived.
    latest_sent: Option<Instant>,
    /// Of the batch of now: its bytes, and when its latest packet left.
    batch: (u64, Option<Instant>),
    /// What is delivered up to here was sent while there was nothing more to send.
    limited_until: Option<u64>,
    is_busy: bool,
}

impl Delivery {
    /// Bytes delivered so far.
    pub(super) fn total(&self) -> u64 {
        self.delivered
    }

    /// A packet leaves.
    pub(super) fn sent(&mut self, now: Instant) {
        if !self.is_busy {
            self.is_busy = true;
            self.remember(Point { at: now, delivered: self.delivered, sent: now, limited: self.is_limited() });
        }
    }

    /// A packet arrived.
    pub(super) fn acked(&mut self, sent: Instant, bytes: u64) {
        self.delivered = self.delivered.saturating_add(bytes);
        let (acked, latest) = self.batch;
        self.batch = (acked.saturating_add(bytes), latest.max(Some(sent)));
    }

    /// What is in flight now, and what arrives of it, was sent by somebody who had no more to send.
    pub(super) fn limit(&mut self, in_flight: u64) {
        self.limited_until = Some(self.delivered.saturating_add(in_flight));
    }

    /// A batch is complete. A sample spans `shortest` at least.
    pub(super) fn end_batch(&mut self, now: Instant, in_flight: u64, shortest: Duration) -> Option<Sample> {
        let (acked, latest) = std::mem::take(&mut self.batch);
        self.is_busy = in_flight > 0;
        let sent = latest?;
        let rtt = now.saturating_duration_since(sent);
        // An acknowledgement that comes out of order says nothing new.
        let sample = (Some(sent) >= self.latest_sent).then(|| self.sample(now, sent, acked, shortest)).flatten();
        self.latest_sent = self.latest_sent.max(Some(sent));
        let sent = self.latest_sent.unwrap_or(sent);
        let is_close = |point: &Point| now.saturating_duration_since(point.at) < rtt / SPACING;
        if self.points.iter().nth_back(1).is_some_and(is_close) {
            self.points.pop_back();
        }
        self.remember(Point { at: now, delivered: self.delivered, sent, limited: self.is_limited() });
        sample
    }

    fn sample(&mut self, now: Instant, sent: Instant, acked: u64, shortest: Duration) -> Option<Sample> {
        let from = now.checked_sub(shortest).map_or(sent, |latest| latest.min(sent));
        while self.points.get(1).is_some_and(|point| point.at <= from) {
            self.points.pop_front();
        }
        let before = self.points.front()?;
        let as_received = now.saturating_duration_since(before.at);
        let as_sent = sent.saturating_duration_since(before.sent);
        // A packet that left before anything that is remembered (the model was made anew) still took its round trip.
        let nanos = as_received.max(as_sent).max(now.saturating_duration_since(sent)).as_nanos();
        let bytes = u128::from(self.delivered - before.delivered);
        let rate = (bytes * 1_000_000_000).checked_div(nanos)?;
        Some(Sample {
            rate: u64::try_from(rate.min(MAX_RATE)).expect("it is below MAX_RATE"),
            limited: before.limited,
            delivered_before: before.delivered,
            rtt: now.saturating_duration_since(sent),
            acked,
        })
    }

    fn is_limited(&self) -> bool {
        self.limited_until.is_some_and(|until| self.delivered <= until)
    }

    fn remember(&mut self, point: Point) {
        if self.points.len() == MAX_POINTS {
            self.points.pop_front();
        }
        self.points.push_back(point);
    }
}
