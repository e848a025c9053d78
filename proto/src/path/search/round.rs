//! One round of a search: what is sent when, from which socket to which address.
//!
//! In: sockets and addresses, where the other side's checks came, `now`. Out: the next packet to send, and when. It makes no
//! packet, and decides neither when a round begins nor what came of it.
//! The plan is sent in passes, packet by packet; where a check came, a burst goes back first, and the plan pauses.
//! Bounds: a packet every [`PACE`], [`PASSES`], [`MAX_MET`] bursts, [`ROUND`].

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::SocketId;
use crate::path::check::Plan;

/// Time between two packets of a search: 500 in a second, which home routers bear; a browser that opens a page makes as many.
pub const PACE: Duration = Duration::from_millis(2);

/// How often all is sent in a round by whoever opens, or has few ports to probe.
pub const PASSES: usize = 3;

/// Time between two passes: the longest takes 2.1 s.
pub const PASS_EVERY: Duration = Duration::from_secs(3);

/// Most ports that are probed in several passes.
const FEW_PROBES: usize = 256;

/// How long a round lasts, most of it in wait for the other side: when a path is lost, the two notice up to 7 s apart
/// ([`crate::path::direct`]). NATs keep what was opened for 30 s at least.
pub const ROUND: Duration = Duration::from_secs(15);

/// Most sockets that are checked back from in a round, or addresses; four are to be expected.
pub const MAX_MET: usize = 16;

/// How long probing pauses after one of the other side's checks came, which it takes a round trip or two to build on.
const HUSH: Duration = Duration::from_secs(2);

/// How far a search that is called too late catches up; beyond it, the rest of the round comes later.
const CATCH_UP: Duration = Duration::from_millis(16);

/// One round: what is sent, in which order, and how far it has come.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) began: Instant,
    pub(super) ends: Instant,
    from: Vec<Option<SocketId>>,
    to: Vec<SocketAddr>,
    head_start: Duration,
    passes: usize,
    next: usize,
    /// Nothing but checks back is sent before.
    hush: Instant,
    met: BTreeMap<SocketId, (SocketAddr, Plan)>,
    /// Packets sent so far, answers included.
    pub(super) sent: u32,
}

impl Round {
    /// Everything is sent from each of `from` to each of `to`, one of which is a single one.
    pub(super) fn new(from: Vec<Option<SocketId>>, to: Vec<SocketAddr>, head_start: Duration, now: Instant) -> Self {
        let passes = if from.len() > 1 || to.len() <= FEW_PROBES { PASSES } else { 1 };
        let (met, ends) = (BTreeMap::new(), now + ROUND);
        Self { began: now, ends, from, to, head_start, passes, next: 0, hush: now, met, sent: 0 }
    }

    /// When something is to be done.
    pub(super) fn next_due(&self) -> Instant {
        let back = self.met.values().filter_map(|(_, plan)| plan.due()).min();
        [self.next_shot(), back].into_iter().flatten().fold(self.ends, Instant::min)
    }

    /// When the next packet of the plan is due.
    fn next_shot(&self) -> Option<Instant> {
        let (pass, at) = (self.next / self.shots(), self.next % self.shots());
        if pass >= self.passes {
            return None;
        }
        let offset = self.head_start + PASS_EVERY * u32::try_from(pass).ok()? + PACE * u32::try_from(at).ok()?;
        Some((self.began + offset).max(self.hush))
    }

    fn shots(&self) -> usize {
        self.from.len().max(self.to.len())
    }

    /// From where and where to a check is to be sent now: first back to where one came from.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<(Option<SocketId>, SocketAddr)> {
        let back = self.met.iter_mut().find(|(_, (_, plan))| plan.due().is_some_and(|due| due <= now));
        if let Some((socket, (to, plan))) = back {
            plan.sent(now);
            return Some((Some(*socket), *to));
        }
        let due = self.next_shot().filter(|due| *due <= now)?;
        let late = now.saturating_duration_since(due).saturating_sub(CATCH_UP);
        self.began += late;
        self.ends += late;
        let at = self.next % self.shots();
        self.next += 1;
        Some((self.from[at % self.from.len()], self.to[at % self.to.len()]))
    }

    /// One of the other side's checks came to this socket.
    pub(super) fn meet(&mut self, via: Option<SocketId>, from: SocketAddr, now: Instant) {
        self.hush = now + HUSH;
        let Some(socket) = via.filter(|socket| self.from.contains(&Some(*socket))) else { return };
        if self.met.len() < MAX_MET || self.met.contains_key(&socket) {
            self.met.entry(socket).or_insert_with(|| (from, Plan::default())).1.ensure(now);
        }
    }
}
