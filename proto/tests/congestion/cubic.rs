//! CUBIC (RFC 9438), as most of the internet's flows have it: whom ours shares a path with.

use std::time::{Duration, Instant};

use super::sender::Control;

const C: f64 = 0.4;
const BETA: f64 = 0.7;

pub(super) struct Cubic {
    packet: f64,
    window: f64,
    threshold: f64,
    most: f64,
    epoch: Option<Instant>,
    reno: f64,
    recovery: Option<Instant>,
}

impl Cubic {
    pub(super) fn new(packet: u64) -> Self {
        let packet = packet as f64;
        Self { packet, window: 10.0, threshold: f64::MAX, most: 0.0, epoch: None, reno: 0.0, recovery: None }
    }

    fn shrink(&mut self, now: Instant, sent: Instant) {
        if self.recovery.is_some_and(|recovery| sent <= recovery) {
            return;
        }
        self.recovery = Some(now);
        self.most = if self.window < self.most { self.window * (1.0 + BETA) / 2.0 } else { self.window };
        self.window = (self.window * BETA).max(2.0);
        self.threshold = self.window;
        self.epoch = None;
    }
}

impl Control for Cubic {
    fn sent(&mut self, _now: Instant) {}

    fn acked(&mut self, now: Instant, sent: Instant, _bytes: u64, limited: bool, rtt: Duration) {
        if limited || self.recovery.is_some_and(|recovery| sent <= recovery) {
            return;
        }
        if self.window < self.threshold {
            self.window += 1.0;
            return;
        }
        if self.epoch.is_none() {
            self.reno = self.window;
        }
        let epoch = *self.epoch.get_or_insert(now);
        let k = ((self.most - self.window.min(self.most)).max(0.0) / C).cbrt();
        let k = if self.most > 0.0 { (self.most * (1.0 - BETA) / C).cbrt().max(k.min(0.0)) } else { 0.0 };
        let t = (now - epoch + rtt).as_secs_f64();
        let wanted = (C * (t - k).powi(3) + self.most.max(self.threshold)).min(1.5 * self.window);
        self.reno += 3.0 * (1.0 - BETA) / (1.0 + BETA) / self.window;
        if wanted > self.window {
            self.window += (wanted - self.window) / self.window;
        }
        self.window = self.window.max(self.reno);
    }

    fn end_of_acks(&mut self, _now: Instant, _in_flight: u64, _limited: bool) {}

    fn lost(&mut self, now: Instant, sent: Instant, _bytes: u64, persistent: bool) {
        self.shrink(now, sent);
        if persistent {
            self.window = 2.0;
        }
    }

    fn marked(&mut self, now: Instant, sent: Instant) {
        self.shrink(now, sent);
    }

    fn window(&self) -> u64 {
        (self.window * self.packet) as u64
    }
}
