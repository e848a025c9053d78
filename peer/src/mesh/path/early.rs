//! Checks that came before their link was agreed here: whoever answers an offer knows the key first, and its checks, which come
//! directly, may overtake the answer, which comes by way of the relay (RFC 8445 §7.3 asks for the same).
//!
//! In: checks that are nobody's yet, `now`. Out: the same, once there is one link more.
//! Never looks into them: who authenticates checks does so later, and finds most of a stranger's to be nobody's.
//! Bounds: [`MAX_KEPT`] checks of [`MAX_BYTES`], for [`KEPT_FOR`]; the oldest makes room.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Most checks that are kept: both sides' addresses are few, and a burst has six checks of each.
const MAX_KEPT: usize = 32;

/// Longest check that is kept, in bytes: ours have some 120.
const MAX_BYTES: usize = 256;

/// How long a check is kept: the answer to an offer is no later than that, and who waited longer has checked again.
const KEPT_FOR: Duration = Duration::from_millis(500);

/// A check of nobody's.
#[derive(Debug)]
pub(super) struct EarlyCheck {
    at: Instant,
    /// Where it came from.
    pub(super) from: SocketAddr,
    /// All of it.
    pub(super) packet: Vec<u8>,
}

/// Checks of nobody's, oldest first.
#[derive(Debug, Default)]
pub(super) struct EarlyChecks(VecDeque<EarlyCheck>);

impl EarlyChecks {
    /// Nobody took this one.
    pub(super) fn keep(&mut self, from: SocketAddr, packet: &[u8], now: Instant) {
        if packet.len() <= MAX_BYTES {
            self.put_back(EarlyCheck { at: now, from, packet: packet.to_vec() });
        }
    }

    /// Nobody took this one now either.
    pub(super) fn put_back(&mut self, check: EarlyCheck) {
        if self.0.len() == MAX_KEPT {
            self.0.pop_front();
        }
        self.0.push_back(check);
    }

    /// All that are not too old; none is kept any more.
    pub(super) fn take(&mut self, now: Instant) -> impl Iterator<Item = EarlyCheck> + use<> {
        std::mem::take(&mut self.0).into_iter().filter(move |check| check.at + KEPT_FOR > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    #[test]
    fn the_newest_checks_are_kept_for_half_a_second_and_given_once() {
        let (mut early, now) = (EarlyChecks::default(), Instant::now());
        (0..100).for_each(|port| early.keep(from(port), b"check", now));
        early.keep(from(100), b"check", now + KEPT_FOR);
        let taken: Vec<_> = early.take(now + KEPT_FOR).map(|check| check.from.port()).collect();
        assert_eq!(taken, [100]);
        (0..100).for_each(|port| early.keep(from(port), b"check", now));
        let taken: Vec<_> = early.take(now).map(|check| usize::from(check.from.port())).collect();
        assert_eq!(taken, (100 - MAX_KEPT..100).collect::<Vec<_>>());
        assert_eq!(early.take(now).count(), 0);
    }

    #[test]
    fn what_is_too_long_for_a_check_is_not_kept() {
        let (mut early, now) = (EarlyChecks::default(), Instant::now());
        early.keep(from(1), &[0; MAX_BYTES + 1], now);
        assert_eq!(early.take(now).count(), 0);
    }
}
