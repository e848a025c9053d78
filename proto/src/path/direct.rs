//! Watching the path that is taken: when it is checked, and when it is given up.
//!
//! In: checks sent and answered, word of other traffic, `now`. Out: whether to check, whether it is lost. It sends nothing.
//! Quiet (a check every [`KEEP_ALIVE`]) -> suspected (we send, and hear nothing for [`SUSPICION`]) -> unanswered (a check every
//! [`RECHECK`]) -> lost ([`GRACE`] after the first unanswered check, and at least two), or quiet again with any answer.
//! Bounds: a path that dies beneath traffic is lost 2.5 s later, an idle one 7 s, at round trips below half a second.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

/// Time between checks of a path that is taken: both NATs keep their mapping (RFC 4787 REQ-5: 2 min; seen in the wild: 30 s),
/// and five are missed before any forgets it.
pub const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// How long we send without hearing anything before the path is checked out of turn. A quiet link has its answers sooner:
/// QUIC acknowledges within 25 ms and a round trip.
pub const SUSPICION: Duration = Duration::from_millis(500);

/// Time between checks while one is unanswered: six of them in [`GRACE`] get through a loss of 20 % with 99.8 %.
pub const RECHECK: Duration = Duration::from_millis(350);

/// How long checks may go unanswered before the path is lost; four round trips, if that is longer.
/// With [`SUSPICION`] it makes 2.5 s: a person waits, but does not give up.
pub const GRACE: Duration = Duration::from_secs(2);

/// Checks that must have gone unanswered before the path is lost.
const MIN_UNANSWERED: u32 = 2;

/// Least time between an answer and the next suspicion: the other side may well use another path than we.
const TRUST: Duration = Duration::from_secs(1);

/// The path taken.
#[derive(Debug)]
pub(super) struct Current {
    /// Where we send.
    pub(super) addr: SocketAddr,
    answered_at: Instant,
    /// The first packet sent since anything came.
    silent_since: Option<Instant>,
    unanswered: Option<Unanswered>,
}

/// Checks since the last answer.
#[derive(Debug)]
struct Unanswered {
    first: Instant,
    last: Instant,
    count: u32,
    lost_at: Option<Instant>,
}

impl Current {
    /// The path to `addr`, proved now.
    pub(super) fn new(addr: SocketAddr, now: Instant) -> Self {
        Self { addr, answered_at: now, silent_since: None, unanswered: None }
    }

    /// Other packets were sent.
    pub(super) fn on_sent(&mut self, now: Instant) {
        self.silent_since.get_or_insert(now);
    }

    /// Other packets came.
    pub(super) fn on_received(&mut self) {
        self.silent_since = None;
    }

    /// A check was sent.
    pub(super) fn checked(&mut self, rtt: Duration, now: Instant) {
        let unanswered = self.unanswered.get_or_insert(Unanswered { first: now, last: now, count: 0, lost_at: None });
        unanswered.last = now;
        unanswered.count += 1;
        if unanswered.count == MIN_UNANSWERED {
            let grace = unanswered.first + GRACE.max(rtt * 4);
            unanswered.lost_at = Some(grace.max(now + recheck(rtt)));
        }
    }

    /// A check was answered.
    pub(super) fn answered(&mut self, now: Instant) {
        self.answered_at = now;
        self.silent_since = None;
        self.unanswered = None;
    }

    /// Whether the path is lost.
    pub(super) fn is_lost(&self, now: Instant) -> bool {
        self.lost_at().is_some_and(|lost_at| lost_at <= now)
    }

    /// Whether a check is due.
    pub(super) fn wants_check(&self, rtt: Duration, now: Instant) -> bool {
        self.next_check(rtt) <= now
    }

    /// When something is due; while a check is `planned`, that it is due needs no waking.
    pub(super) fn next_wake(&self, rtt: Duration, planned: bool) -> Option<Instant> {
        let check = (!planned).then(|| self.next_check(rtt));
        [check, self.lost_at()].into_iter().flatten().min()
    }

    fn lost_at(&self) -> Option<Instant> {
        self.unanswered.as_ref().and_then(|unanswered| unanswered.lost_at)
    }

    fn next_check(&self, rtt: Duration) -> Instant {
        if let Some(unanswered) = &self.unanswered {
            return unanswered.last + recheck(rtt);
        }
        let suspected = self.silent_since.map(|since| (since + SUSPICION.max(rtt * 2)).max(self.answered_at + TRUST));
        let keep_alive = self.answered_at + KEEP_ALIVE;
        suspected.map_or(keep_alive, |suspected| suspected.min(keep_alive))
    }
}

/// Time between checks while one is unanswered: an answer on its way is waited for.
fn recheck(rtt: Duration) -> Duration {
    RECHECK.max(rtt * 2)
}
