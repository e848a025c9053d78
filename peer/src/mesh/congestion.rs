//! Congestion control of a link that changes its path: what was learnt of one path says nothing of the next.
//!
//! In: what QUIC sends and hears acknowledged, and the count of path changes. Out: the window. Beneath is the core's model of
//! a path ([`RateModel`]), made anew with each path.
//! Never takes a loss on the path before for congestion of the path now, and never waits for the old path's packets to
//! be given up before it uses the new one: what was in flight there is allowed on top of the new window.
//! Old path -> new path with an allowance -> new path alone (the old packets were acknowledged or lost).

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use peerfleet_proto::congestion::RateModel;
use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

/// Round trips after which nothing of the old path can be in flight any more.
const ALLOWANCE_ROUND_TRIPS: u32 = 4;

/// Makes the controllers of one link.
#[derive(Debug)]
pub struct PathAwareFactory {
    path_changes: Arc<AtomicU64>,
    delivered: Arc<AtomicU64>,
}

impl PathAwareFactory {
    /// For the link whose changes of path are counted there. What is acknowledged of the path of now is counted in `delivered`.
    pub fn new(path_changes: Arc<AtomicU64>, delivered: Arc<AtomicU64>) -> Self {
        Self { path_changes, delivered }
    }
}

impl ControllerFactory for PathAwareFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let inner = RateModel::new(current_mtu);
        Box::new(PathAware {
            seen: self.path_changes.load(Ordering::Relaxed),
            most: inner.window(),
            inner,
            factory: self,
            mtu: current_mtu,
            since: now,
            allowance: 0,
        })
    }
}

/// Packets that may be in flight beyond every window: two for each probe timeout, of which no more than eight, each twice
/// as long as the one before, pass until a dead path is left.
const PROBES: u64 = 16;

#[derive(Clone)]
struct PathAware {
    factory: Arc<PathAwareFactory>,
    inner: RateModel,
    mtu: u16,
    /// The count of changes that `inner` was made at.
    seen: u64,
    /// When `inner` was made.
    since: Instant,
    /// Bytes that may still be in flight on the path before.
    allowance: u64,
    /// Most bytes that may be in flight, probes aside: the largest window since the last acknowledgement. A loss shrinks
    /// the window at once, and what is in flight only bit by bit.
    most: u64,
}

impl PathAware {
    fn follow_path(&mut self, now: Instant) {
        let changes = self.factory.path_changes.load(Ordering::Relaxed);
        if changes == self.seen {
            return;
        }
        self.allowance = self.left_behind();
        self.inner = RateModel::new(self.mtu);
        self.most = self.allowance.saturating_add(self.inner.window());
        self.seen = changes;
        self.since = now;
    }

    /// Bytes that may be in flight on a path that is left now.
    fn left_behind(&self) -> u64 {
        self.most.saturating_add(PROBES * u64::from(self.mtu))
    }
}

impl Controller for PathAware {
    fn on_sent(&mut self, now: Instant, _bytes: u64, _last_packet_number: u64) {
        self.follow_path(now);
        self.inner.handle_sent(now);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool, rtt: &RttEstimator) {
        self.follow_path(now);
        if sent < self.since {
            self.allowance = self.allowance.saturating_sub(bytes);
            return;
        }
        self.factory.delivered.fetch_add(1, Ordering::Relaxed);
        if now.saturating_duration_since(self.since) > rtt.get() * ALLOWANCE_ROUND_TRIPS {
            self.allowance = 0;
        }
        self.inner.handle_ack(sent, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _largest_acked: Option<u64>) {
        self.inner.handle_end_of_acks(now, in_flight.saturating_sub(self.allowance), app_limited);
        self.most = self.window().max(in_flight);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        self.follow_path(now);
        if sent < self.since {
            self.allowance = self.allowance.saturating_sub(lost_bytes);
            return;
        }
        // QUIC tells of marks as of losses of nothing.
        match lost_bytes {
            0 => self.inner.handle_mark(),
            lost => self.inner.handle_loss(lost, is_persistent_congestion),
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu;
        self.inner.set_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        if self.factory.path_changes.load(Ordering::Relaxed) == self.seen {
            return self.inner.window().saturating_add(self.allowance);
        }
        self.left_behind().saturating_add(self.inner.initial_window())
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn controller() -> (Arc<AtomicU64>, Box<dyn Controller>, Instant) {
        let changes: Arc<AtomicU64> = Arc::default();
        let now = Instant::now();
        let factory = Arc::new(PathAwareFactory::new(Arc::clone(&changes), Arc::default()));
        (changes, factory.build(now, 1200), now)
    }

    #[test]
    fn a_new_path_may_be_used_although_the_old_one_is_full() {
        let (changes, controller, _) = controller();
        let full = controller.window();
        changes.fetch_add(1, Ordering::Relaxed);
        assert!(controller.window() >= full + controller.initial_window());
    }

    #[test]
    fn a_new_path_may_be_used_although_the_old_one_holds_more_than_its_window() {
        let (changes, mut controller, start) = controller();
        let (in_flight, probes) = (controller.window(), 12 * 1200);
        controller.on_sent(start, in_flight, 9);
        controller.on_congestion_event(start + Duration::from_millis(20), start, false, 0);
        assert!(controller.window() < in_flight);
        changes.fetch_add(1, Ordering::Relaxed);
        assert!(controller.window() >= in_flight + probes + controller.initial_window());
        controller.on_sent(start + Duration::from_millis(30), 1200, 10);
        assert!(controller.window() >= in_flight + probes + controller.initial_window());
    }

    #[test]
    fn a_new_path_has_room_for_two_packets_however_large_they_are() {
        let (changes, mut controller, start) = controller();
        let large = 16_250;
        controller.on_mtu_update(large);
        controller.on_sent(start, 20_000, 1);
        controller.on_end_acks(start, 0, false, Some(1));
        let before = controller.window();
        changes.fetch_add(1, Ordering::Relaxed);
        assert!(controller.window() >= before + 2 * u64::from(large));
        let later = start + Duration::from_millis(10);
        controller.on_sent(later, 1200, 2);
        // What was in flight before is lost, and its allowance with it.
        controller.on_congestion_event(later, start, false, u64::from(u32::MAX));
        assert!(controller.window() >= 2 * u64::from(large));
    }

    #[test]
    fn loss_on_the_old_path_does_not_shrink_the_window_of_the_new_one() {
        let (changes, mut controller, start) = controller();
        changes.fetch_add(1, Ordering::Relaxed);
        let later = start + Duration::from_millis(10);
        controller.on_sent(later, 1200, 1);
        controller.on_congestion_event(later, start, true, u64::from(u32::MAX));
        assert_eq!(controller.window(), controller.initial_window());
    }

    #[test]
    fn loss_on_the_new_path_shrinks_its_window() {
        let (changes, mut controller, start) = controller();
        changes.fetch_add(1, Ordering::Relaxed);
        let later = start + Duration::from_millis(10);
        controller.on_sent(later, 1200, 1);
        controller.on_congestion_event(later + Duration::from_millis(20), later, false, 1200);
        controller.on_congestion_event(later + Duration::from_millis(20), start, false, u64::from(u32::MAX));
        assert!(controller.window() < controller.initial_window());
    }
}
