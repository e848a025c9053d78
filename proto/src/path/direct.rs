//! Watching the path that is taken: when it is checked, and when it is given up.
//!
//! In: checks sent and answered, word of other traffic, `now`. Out: whether to check, and a [`Verdict`]. It sends nothing.
//! An answered check and acknowledged data prove the path. Packets that came prove nothing, for anybody can send them; they
//! only put off suspicion. Checks that are answered while data is not acknowledged show a path that carries no data.
//! Quiet (checked when nothing proved it for the interval of its [`Binding`](super::binding)) -> suspected (for [`SUSPICION`] we
//! send and hear nothing, data is not acknowledged, or what came steadily has stopped) -> unanswered (a check every [`RECHECK`])
//! -> lost, or quiet again with any proof. From the first check that had its chance to be answered to either end the path is in doubt.
//! Bounds: a path that dies beneath traffic is lost 0.9 s later, one that carries no data 1.2 s later, an idle one within
//! [`KEEP_ALIVE`] and [`GRACE`]; each at round trips up to 0.1 s, above which every wait is a number of them.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use super::binding::KEEP_ALIVE_LEAST;

/// Longest time between two proofs of a path that is taken: common NATs forget a flow after 30 s, some after 20 s (RFC 4787
/// REQ-5 asks for 2 min), and the side that controls checks after 7/8 of it. [`super::binding`] makes it shorter where a NAT
/// forgets sooner.
pub const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// How long we send without hearing anything before the path is checked out of turn; two round trips, if that is longer.
/// QUIC acknowledges within 25 ms and a round trip, and a check too many costs 150 bytes.
pub const SUSPICION: Duration = Duration::from_millis(250);

/// Time between checks while one is unanswered; two round trips, if that is longer.
/// 200 ms: ten of them in [`GRACE`] get through a loss of 20 % in 99.99 of 100 cases.
pub const RECHECK: Duration = Duration::from_millis(200);

/// How long checks may go unanswered before the path is lost; four round trips, if that is longer.
/// 2 s: nobody waits for this path, so there is time to be sure.
pub const GRACE: Duration = Duration::from_secs(2);

/// How long checks may go unanswered before the path is lost, where traffic went unheard as well or the path's ground is known
/// to have changed. With [`SUSPICION`] it makes 0.85 s, within which three checks and all packets were lost.
pub const SHORT_GRACE: Duration = Duration::from_millis(600);

/// How long data may go unacknowledged, while checks are answered, before the path counts as one that carries none; six
/// round trips, if that is longer. Within 1.2 s QUIC sends four times (RFC 9002 §6.2 at a round trip of 40 ms).
pub const DATA_GRACE: Duration = Duration::from_millis(1200);

/// The same for a path that has not carried any data yet.
pub const TRIAL: Duration = Duration::from_secs(1);

/// What a steady flow is: words of packets no further apart than this, at least [`FLOW_WORDS`] of them.
const FLOW_GAP: Duration = Duration::from_millis(200);

/// See [`FLOW_GAP`].
const FLOW_WORDS: u32 = 4;

/// Slack for an answer that is a little late, when two paths are asked at once which of them is alive.
const LATE: Duration = Duration::from_millis(20);

/// What to do with the path taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Stay on it.
    Keep,
    /// Checks went unanswered.
    Lost,
    /// Checks are answered and data is not acknowledged.
    CarriesNothing,
    /// It is silent, and this one, from which the other side checks now, was proved instead.
    Succeeded(SocketAddr),
}

/// The path taken.
#[derive(Debug)]
pub(super) struct Current {
    /// Where we send.
    pub(super) addr: SocketAddr,
    /// Our own address that packets leave from, if anybody said so.
    source: Option<IpAddr>,
    taken_at: Instant,
    // What proves it.
    answered_at: Instant,
    proved_at: Instant,
    /// When the other side was heard for certain; the answer kept our NAT's memory fresh.
    heard_at: Instant,
    // What makes it suspect.
    sent_at: Instant,
    /// The longest time since the last proof in which nothing was sent.
    idle: Duration,
    /// The first packet sent since anything came.
    silent_since: Option<Instant>,
    flow: Flow,
    data: Data,
    unanswered: Option<Unanswered>,
    hurried: bool,
    shunned: bool,
    rival: Option<SocketAddr>,
}

/// What came of late.
#[derive(Debug, Default)]
struct Flow {
    last: Option<Instant>,
    words: u32,
}

impl Flow {
    fn received(&mut self, now: Instant) {
        let steady = self.last.is_some_and(|last| now.saturating_duration_since(last) <= FLOW_GAP);
        self.words = if steady { self.words.saturating_add(1) } else { 1 };
        self.last = Some(now);
    }

    /// The newest packet of a steady flow.
    fn newest(&self) -> Option<Instant> {
        self.last.filter(|_| self.words >= FLOW_WORDS)
    }
}

/// Data that was to travel on the path.
#[derive(Debug, Default)]
struct Data {
    /// When data was sent of which none was acknowledged.
    unacknowledged_since: Option<Instant>,
    /// Some was acknowledged on this path.
    is_delivered: bool,
}

/// Checks since the last proof.
#[derive(Debug)]
struct Unanswered {
    /// When the first three were sent; beyond `count` they mean nothing.
    times: [Instant; 3],
    last: Instant,
    count: usize,
}

impl Unanswered {
    fn first(&self) -> Instant {
        self.times[0]
    }

    fn nth(&self, number: usize) -> Option<Instant> {
        (self.count >= number).then(|| self.times[number - 1])
    }
}

impl Current {
    /// The path to `addr`, proved now.
    pub(super) fn new(addr: SocketAddr, now: Instant) -> Self {
        Self {
            addr,
            source: None,
            taken_at: now,
            answered_at: now,
            proved_at: now,
            heard_at: now,
            sent_at: now,
            idle: Duration::ZERO,
            silent_since: None,
            flow: Flow::default(),
            data: Data::default(),
            unanswered: None,
            hurried: false,
            shunned: false,
            rival: None,
        }
    }

    /// Other packets were sent.
    pub(super) fn on_sent(&mut self, now: Instant) {
        self.sent(now);
        self.silent_since.get_or_insert(now);
    }

    /// Other packets came.
    pub(super) fn on_received(&mut self, now: Instant) {
        self.silent_since = None;
        self.flow.received(now);
    }

    /// Data was sent that wants to be acknowledged.
    pub(super) fn on_data_sent(&mut self, now: Instant) {
        self.data.unacknowledged_since.get_or_insert(now);
    }

    /// Data that was sent on it was acknowledged. Gives the idle time that the path has outlived.
    pub(super) fn on_delivered(&mut self, now: Instant) -> Duration {
        self.data = Data { unacknowledged_since: None, is_delivered: true };
        self.proved(now)
    }

    /// Data was acknowledged that may have travelled by way of the relay too: it proves nothing.
    pub(super) fn on_delivered_somehow(&mut self) {
        self.data.unacknowledged_since = None;
    }

    fn sent(&mut self, now: Instant) {
        self.idle = self.idle.max(now.saturating_duration_since(self.sent_at));
        self.sent_at = now;
    }

    /// The other side checked it, or sent what only it can have made, and is answered.
    pub(super) fn on_heard(&mut self, now: Instant) {
        self.heard_at = now;
        // What was sent since was its acknowledgement, and nobody answers that.
        self.silent_since = None;
        self.sent(now);
    }

    /// The ground has changed: whether it is still there shall be known soon.
    pub(super) fn hurry(&mut self) {
        self.hurried = true;
    }

    /// Whether no check of it was answered for so long ([`KEEP_ALIVE_LEAST`]) that the other side may not know where we are
    /// seen.
    pub(super) fn was_checked_long_ago(&self, now: Instant) -> bool {
        self.unanswered.is_none() && self.answered_at + KEEP_ALIVE_LEAST <= now
    }

    /// The other side does not use it, or not alone; should a check be unanswered too, it is in doubt.
    pub(super) fn is_shunned(&mut self) {
        self.shunned = true;
    }

    /// Packets leave from this address of ours now. Says whether they left from another one before.
    pub(super) fn set_source(&mut self, source: Option<IpAddr>) -> bool {
        let before = std::mem::replace(&mut self.source, source);
        before.is_some() && before != source
    }

    /// Our own address that packets leave from, as far as anybody said.
    pub(super) fn source(&self) -> Option<IpAddr> {
        self.source
    }

    /// Some other address of the other side was proved, from which it had not been heard before.
    pub(super) fn rivalled(&mut self, rival: SocketAddr) {
        if self.unanswered.is_some() {
            self.rival = Some(rival);
        }
    }

    /// A check was sent.
    pub(super) fn checked(&mut self, now: Instant) {
        let unanswered = self.unanswered.get_or_insert(Unanswered { times: [now; 3], last: now, count: 0 });
        if let Some(time) = unanswered.times.get_mut(unanswered.count) {
            *time = now;
        }
        unanswered.last = now;
        unanswered.count += 1;
        self.sent(now);
        self.flow = Flow::default();
    }

    /// A check was answered. Gives the idle time that the path has outlived.
    pub(super) fn answered(&mut self, now: Instant) -> Duration {
        self.answered_at = now;
        self.proved(now)
    }

    fn proved(&mut self, now: Instant) -> Duration {
        self.proved_at = now;
        self.silent_since = None;
        self.hurried = false;
        self.shunned = false;
        self.rival = None;
        self.unanswered = None;
        std::mem::take(&mut self.idle)
    }

    /// Since when it is taken.
    pub(super) fn taken_at(&self) -> Instant {
        self.taken_at
    }

    /// Whether data was acknowledged on it.
    pub(super) fn is_delivering(&self) -> bool {
        self.data.is_delivered
    }

    /// The longest time since the last proof in which nothing was sent.
    pub(super) fn idle(&self) -> Duration {
        self.idle
    }

    /// Whether one check is unanswered, and no more than one.
    pub(super) fn is_asked_once(&self) -> bool {
        self.unanswered.as_ref().is_some_and(|unanswered| unanswered.count == 1)
    }

    /// Whether other packets come one after the other.
    pub(super) fn is_flowing(&self) -> bool {
        self.flow.words >= FLOW_WORDS
    }

    /// Whether there is enough against it to leave it for another that was proved now.
    pub(super) fn is_doubtful(&self, rtt: Duration, now: Instant) -> bool {
        let late = |asked: &Unanswered| asked.first() + chance(rtt) <= now;
        let unanswered =
            self.unanswered.as_ref().is_some_and(|asked| (asked.count >= 2 || self.hurried) && late(asked));
        let unheard = self.unheard_since().is_some_and(|since| since + patience(rtt) <= now);
        unanswered || unheard
    }

    /// From when on what is sent should go by way of the relay as well: a check had its chance to be answered, or none is
    /// answered while the other side sends by way of the relay.
    pub(super) fn doubted_at(&self, rtt: Duration) -> Option<Instant> {
        let asked = self.unanswered.as_ref()?;
        Some(if self.shunned { asked.first() } else { asked.first() + chance(rtt) })
    }

    /// What is to be done now.
    pub(super) fn verdict(&self, rtt: Duration, now: Instant) -> Verdict {
        if let (Some(rival), Some(at)) = (self.rival, self.succeeded_at(rtt))
            && at <= now
        {
            return Verdict::Succeeded(rival);
        }
        if self.lost_at(rtt).is_some_and(|at| at <= now) {
            return Verdict::Lost;
        }
        if self.carries_nothing_at(rtt).is_some_and(|at| at <= now) {
            return Verdict::CarriesNothing;
        }
        Verdict::Keep
    }

    /// Whether a check is due, which is so `interval` after the last proof or sooner.
    pub(super) fn wants_check(&self, rtt: Duration, interval: Duration, now: Instant) -> bool {
        self.next_check(rtt, interval) <= now
    }

    /// When something is due; while a check is `planned`, that it is due needs no waking.
    pub(super) fn next_wake(&self, rtt: Duration, interval: Duration, planned: bool) -> Option<Instant> {
        let check = (!planned).then(|| self.next_check(rtt, interval));
        let others = [check, self.lost_at(rtt), self.carries_nothing_at(rtt), self.succeeded_at(rtt)];
        others.into_iter().flatten().min()
    }

    fn unheard_since(&self) -> Option<Instant> {
        [self.silent_since, self.data.unacknowledged_since].into_iter().flatten().min()
    }

    fn lost_at(&self, rtt: Duration) -> Option<Instant> {
        let unanswered = self.unanswered.as_ref()?;
        let wait = recheck(rtt);
        let sure = unanswered.nth(2).map(|second| (unanswered.first() + GRACE.max(rtt * 4)).max(second + wait));
        let since = if self.hurried { Some(unanswered.first()) } else { self.unheard_since() };
        let soon = unanswered.nth(3).zip(since);
        let soon = soon.map(|(third, since)| (since.max(unanswered.first()) + SHORT_GRACE).max(third + wait));
        [sure, soon].into_iter().flatten().min()
    }

    /// When data has waited long enough, if checks were answered meanwhile.
    fn carries_nothing_at(&self, rtt: Duration) -> Option<Instant> {
        let since = self.data.unacknowledged_since.filter(|since| self.answered_at > *since)?;
        let grace = if self.data.is_delivered { DATA_GRACE } else { TRIAL };
        Some(since + grace.max(rtt * 6))
    }

    /// When the path had its chance to answer beside its rival.
    fn succeeded_at(&self, rtt: Duration) -> Option<Instant> {
        let asked = self.unanswered.as_ref().filter(|_| self.rival.is_some())?;
        Some(asked.first() + chance(rtt))
    }

    fn next_check(&self, rtt: Duration, interval: Duration) -> Instant {
        if let Some(unanswered) = &self.unanswered {
            return unanswered.last + recheck(rtt);
        }
        let keep_alive = self.proved_at.max(self.heard_at) + interval;
        let reasons = [self.unheard_since(), self.flow.newest()];
        let suspected = reasons.into_iter().flatten().min().map(|since| since.max(self.proved_at) + patience(rtt));
        suspected.map_or(keep_alive, |suspected| suspected.min(keep_alive))
    }
}

/// Time without word after which a path is suspected.
fn patience(rtt: Duration) -> Duration {
    SUSPICION.max(rtt * 2)
}

/// Time in which a path that is alive answers.
fn chance(rtt: Duration) -> Duration {
    rtt * 3 / 2 + LATE
}

/// Time between checks while one is unanswered: an answer on its way is waited for.
fn recheck(rtt: Duration) -> Duration {
    RECHECK.max(rtt * 2)
}
