//! Who sends and who receives: as much of QUIC (RFC 9002, with quinn's pacing) as congestion control can see.
//!
//! In: acknowledgements, time. Out: packets' numbers, when to wake. What is lost is simply sent anew under another number.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use peerfleet_proto::congestion::RateModel;

/// What decides how much may be in flight.
pub(super) trait Control {
    fn sent(&mut self, now: Instant);
    fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, limited: bool, rtt: Duration);
    fn end_of_acks(&mut self, now: Instant, in_flight: u64, limited: bool);
    fn lost(&mut self, now: Instant, sent: Instant, bytes: u64, persistent: bool);
    fn marked(&mut self, now: Instant, sent: Instant);
    fn window(&self) -> u64;
}

impl Control for RateModel {
    fn sent(&mut self, now: Instant) {
        self.handle_sent(now);
    }

    fn acked(&mut self, _now: Instant, sent: Instant, bytes: u64, _limited: bool, _rtt: Duration) {
        self.handle_ack(sent, bytes);
    }

    fn end_of_acks(&mut self, now: Instant, in_flight: u64, limited: bool) {
        self.handle_end_of_acks(now, in_flight, limited);
    }

    fn lost(&mut self, _now: Instant, _sent: Instant, bytes: u64, persistent: bool) {
        self.handle_loss(bytes, persistent);
    }

    fn marked(&mut self, _now: Instant, _sent: Instant) {
        self.handle_mark();
    }

    fn window(&self) -> u64 {
        Self::window(self)
    }
}

/// The sender of one flow, which never runs out of data unless it is told to.
pub(super) struct Sender {
    pub(super) packet: u64,
    control: Box<dyn Control>,
    next_number: u64,
    in_flight: BTreeMap<u64, Instant>,
    largest_acked: Option<u64>,
    smoothed: Option<Duration>,
    latest: Duration,
    variation: Duration,
    tokens: u64,
    refilled: Instant,
    pace_until: Option<Instant>,
    /// Probes that may leave beyond the window.
    probes: u32,
    timeouts: u32,
    heard: Instant,
    limited: bool,
    /// Bytes that there are to send; `None` is no end.
    pub(super) pending: Option<u64>,
    marks: u64,
    woken_at: Option<Instant>,
}

impl Sender {
    pub(super) fn new(control: Box<dyn Control>, packet: u64, now: Instant) -> Self {
        Self {
            packet,
            control,
            next_number: 0,
            in_flight: BTreeMap::new(),
            largest_acked: None,
            smoothed: None,
            latest: Duration::from_millis(100),
            variation: Duration::from_millis(50),
            tokens: 10 * packet,
            refilled: now,
            pace_until: None,
            probes: 0,
            timeouts: 0,
            heard: now,
            limited: false,
            pending: None,
            marks: 0,
            woken_at: None,
        }
    }

    fn bytes_in_flight(&self) -> u64 {
        self.in_flight.len() as u64 * self.packet
    }

    fn rtt(&self) -> Duration {
        self.smoothed.unwrap_or(self.latest)
    }

    /// The next packet to send now.
    pub(super) fn next(&mut self, now: Instant) -> Option<u64> {
        self.pace_until = None;
        self.limited = self.pending.is_some_and(|pending| pending < self.packet);
        if self.probes > 0 {
            self.probes -= 1;
        } else {
            if self.limited {
                return None;
            }
            if self.bytes_in_flight() + self.packet >= self.control.window() {
                return None;
            }
            if let Some(until) = self.pace(now) {
                self.pace_until = Some(until);
                return None;
            }
        }
        if let Some(pending) = &mut self.pending {
            *pending = pending.saturating_sub(self.packet);
        }
        self.tokens = self.tokens.saturating_sub(self.packet);
        let number = self.next_number;
        self.next_number += 1;
        self.in_flight.insert(number, now);
        self.control.sent(now);
        Some(number)
    }

    /// Tokens for 2 ms, but 10 packets at least and 256 at most; 1.25 windows a round trip.
    fn pace(&mut self, now: Instant) -> Option<Instant> {
        if self.tokens >= self.packet {
            return None;
        }
        let (rtt, window) = (self.rtt().as_secs_f64(), self.control.window() as f64);
        let capacity = ((window * 0.002 / rtt) as u64).clamp(10 * self.packet, 256 * self.packet);
        let refill = (now - self.refilled).as_secs_f64() / rtt * window * 1.25;
        self.tokens = (self.tokens + refill as u64).min(capacity);
        self.refilled = now;
        if self.tokens >= self.packet {
            return None;
        }
        let wait = rtt * (capacity - self.tokens) as f64 / window * 0.8;
        // Timers are as coarse as a millisecond.
        Some(now + Duration::from_secs_f64((wait * 1000.0).ceil().max(1.0) / 1000.0))
    }

    pub(super) fn acknowledged(&mut self, now: Instant, numbers: &[u64], marks: u64) {
        let mut latest = None;
        for number in numbers {
            let Some(sent) = self.in_flight.remove(number) else { continue };
            let (packet, rtt) = (self.packet, self.rtt());
            self.control.acked(now, sent, packet, self.limited, rtt);
            latest = latest.max(Some((*number, sent)));
        }
        let Some((number, sent)) = latest else { return };
        let in_flight = self.bytes_in_flight();
        self.control.end_of_acks(now, in_flight, self.limited);
        self.heard = now;
        self.timeouts = 0;
        if self.largest_acked.is_none_or(|largest| largest < number) {
            self.largest_acked = Some(number);
            self.measure(now - sent);
        }
        self.lose(now, true);
        if marks > self.marks {
            self.marks = marks;
            self.control.marked(now, sent);
        }
    }

    fn measure(&mut self, rtt: Duration) {
        self.latest = rtt;
        match self.smoothed {
            None => (self.smoothed, self.variation) = (Some(rtt), rtt / 2),
            Some(smoothed) => {
                self.variation = (3 * self.variation + smoothed.abs_diff(rtt)) / 4;
                self.smoothed = Some((7 * smoothed + rtt) / 8);
            }
        }
    }

    fn timeout(&self) -> Duration {
        self.rtt() + (4 * self.variation).max(Duration::from_millis(1)) + Duration::from_millis(25)
    }

    fn lose(&mut self, now: Instant, by_ack: bool) {
        let Some(largest) = self.largest_acked else { return };
        let too_old = (self.rtt().max(self.latest) * 9 / 8).max(Duration::from_millis(1));
        let is_lost = |(number, sent): (&u64, &Instant)| largest >= *number + 3 || now - *sent >= too_old;
        let below = self.in_flight.range(..largest);
        let lost: Vec<_> = below.filter(|entry| is_lost(*entry)).map(|(n, s)| (*n, *s)).collect();
        let (Some(first), Some(last)) = (lost.first(), lost.last()) else { return };
        let is_row = last.0 - first.0 + 1 == lost.len() as u64;
        let persistent = by_ack && is_row && last.1 - first.1 > self.timeout() * 3;
        for (number, _) in &lost {
            self.in_flight.remove(number);
        }
        self.control.lost(now, last.1, lost.len() as u64 * self.packet, persistent);
    }

    pub(super) fn woken(&mut self, now: Instant) {
        self.woken_at = None;
        self.lose(now, false);
        if !self.in_flight.is_empty() && now - self.heard >= self.timeout() * 2u32.pow(self.timeouts.min(8)) {
            self.probes = 2;
            self.timeouts += 1;
            self.heard = now;
        }
    }

    /// When to look again, unless that is known already.
    pub(super) fn wakes_at(&mut self, now: Instant) -> Option<Instant> {
        let patience = self.in_flight.values().next().map(|_| now + self.rtt() / 4 + Duration::from_millis(1));
        let at = self.pace_until.into_iter().chain(patience).min()?;
        if self.woken_at.is_some_and(|known| known <= at && known > now) {
            return None;
        }
        self.woken_at = Some(at);
        Some(at)
    }
}

/// Acknowledges every second packet, at once what is out of order, and the rest a little later.
#[derive(Default)]
pub(super) struct Receiver {
    waiting: Vec<u64>,
    next: u64,
    /// What the last acknowledgements held: one that is lost is made good by the next.
    told: VecDeque<Vec<u64>>,
    marks: u64,
}

impl Receiver {
    pub(super) const DELAY: Duration = Duration::from_millis(25);

    /// Whether to acknowledge at once.
    pub(super) fn receive(&mut self, number: u64, marked: bool) -> bool {
        self.marks += u64::from(marked);
        self.waiting.push(number);
        let in_order = number == self.next;
        self.next = self.next.max(number + 1);
        !in_order || self.waiting.len() > 1
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(super) fn acknowledgement(&mut self) -> (Vec<u64>, u64) {
        self.told.push_back(std::mem::take(&mut self.waiting));
        if self.told.len() > 8 {
            self.told.pop_front();
        }
        let mut numbers: Vec<_> = self.told.iter().flatten().copied().collect();
        numbers.sort_unstable();
        (numbers, self.marks)
    }
}
