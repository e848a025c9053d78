//! Pairs: the addresses of the other side that are checked, and what checking them brought.
//!
//! In: both sides' candidates, addresses that checks came from, proofs. Out: which pair to check when, and their scores. It
//! sends nothing. A pair is what we send to: which of our addresses a packet leaves from is the system's choice.
//! A pair is named (a candidate of the other side) or learnt (a check came from it), and proved or not yet.
//! Bounds: [`MAX_CANDIDATES`](crate::limits::MAX_CANDIDATES) named, [`MAX_PEER_REFLEXIVE`] learnt.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use super::{
    candidate::{self, Candidate, CandidateKind, Ground, Local, Network, Reach},
    check::{Ledger, Plan},
    score::Score,
};

/// Most addresses learnt from checks that came from them, beside the candidates. Beyond it checks are answered, but the
/// address is not checked. A NAT shows one or two; only two NATs that map every pair anew would show ever more.
pub const MAX_PEER_REFLEXIVE: usize = 8;

/// Age beyond which a measured round trip is replaced rather than smoothed by the next one.
const RTT_FRESH: Duration = Duration::from_secs(10);

/// Age of its proof beyond which a learnt address makes room for another.
const STALE: Duration = Duration::from_secs(60);

/// First time for which a pair is not taken that answered checks and carried no data; it doubles up to [`DISTRUST_MAX`].
/// 30 s: each try costs those who use the link a pause of [`TRIAL`](super::direct::TRIAL).
pub const DISTRUST_MIN: Duration = Duration::from_secs(30);

/// Longest time for which such a pair is not taken: two pauses of a second in an hour.
pub const DISTRUST_MAX: Duration = Duration::from_secs(1800);

/// An address of the other side, and what checking it brought.
#[derive(Debug)]
pub(super) struct Pair {
    /// How the address is known.
    pub(super) kind: CandidateKind,
    /// When it is checked.
    pub(super) plan: Plan,
    /// What was sent to it and came from it.
    pub(super) tally: Tally,
    proof: Option<Proof>,
    /// How the other side sees us on this path.
    seen_as: Option<SocketAddr>,
    distrust: Option<Distrust>,
}

/// It answered checks and carried no data.
#[derive(Debug, Clone, Copy)]
struct Distrust {
    until: Instant,
    pause: Duration,
}

/// What was sent to an address and came from it; for people, nothing is decided by it.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Checks sent.
    pub(super) sent: u32,
    /// How many of them were answered.
    pub(super) answered: u32,
    /// Checks since the last answer.
    pub(super) unanswered: u32,
    /// The other side's checks.
    pub(super) heard: u32,
    /// Whether something came that the other side did not sign.
    pub(super) forged: bool,
    /// When the last check was sent.
    pub(super) sent_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Proof {
    rtt: Duration,
    at: Instant,
}

impl Pair {
    fn new(kind: CandidateKind) -> Self {
        Self { kind, plan: Plan::default(), tally: Tally::default(), proof: None, seen_as: None, distrust: None }
    }

    /// Whether it was ever proved.
    pub(super) fn is_proved(&self) -> bool {
        self.proof.is_some()
    }

    /// The other side says how it sees us. Says whether that was another address before.
    pub(super) fn is_seen_anew(&mut self, seen_as: Option<SocketAddr>) -> bool {
        let before = std::mem::replace(&mut self.seen_as, seen_as);
        before.is_some() && seen_as.is_some() && before != seen_as
    }

    /// It answered checks and carried no data: it is not to be taken for a while.
    pub(super) fn distrust(&mut self, now: Instant) {
        let pause = self.distrust.map_or(DISTRUST_MIN, |before| (before.pause * 2).min(DISTRUST_MAX));
        self.distrust = Some(Distrust { until: now + pause, pause });
    }

    /// It carried data for so long: as long as it was not taken before is enough.
    pub(super) fn carried_data(&mut self, time: Duration) {
        self.distrust = self.distrust.filter(|distrust| time < distrust.pause);
    }

    /// It stands on other ground than when it carried none.
    fn trust(&mut self) {
        self.distrust = None;
    }

    /// Whether it may be taken.
    pub(super) fn is_trusted(&self, now: Instant) -> bool {
        self.distrust.is_none_or(|distrust| distrust.until <= now)
    }

    /// Whether it was proved lately.
    pub(super) fn is_fresh(&self, now: Instant) -> bool {
        self.proof.is_some_and(|proof| proof.at + RTT_FRESH > now)
    }

    /// When a check of it was answered last.
    pub(super) fn proved_at(&self) -> Option<Instant> {
        self.proof.map(|proof| proof.at)
    }

    /// A check of it was answered after `sample`.
    pub(super) fn proved(&mut self, sample: Duration, now: Instant) {
        let rtt = match self.proof {
            Some(proof) if self.is_fresh(now) => (proof.rtt * 7 + sample) / 8,
            _ => sample,
        };
        self.proof = Some(Proof { rtt, at: now });
        self.plan.finish();
        self.tally.answered = self.tally.answered.saturating_add(1);
        self.tally.unanswered = 0;
    }

    /// A check of it was sent.
    fn checked(&mut self, now: Instant) {
        self.plan.sent(now);
        self.tally.sent = self.tally.sent.saturating_add(1);
        self.tally.unanswered = self.tally.unanswered.saturating_add(1);
        self.tally.sent_at = Some(now);
    }
}

/// All pairs of one agent.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    networks: Vec<Network>,
    local: Local,
    remote: BTreeMap<SocketAddr, CandidateKind>,
    pairs: BTreeMap<SocketAddr, Pair>,
    ledger: Ledger,
}

impl Pairs {
    /// The networks that our interfaces are in; they count from the next [`Pairs::set_local`] on.
    pub(super) fn set_networks(&mut self, networks: &[Network]) {
        self.networks = networks.to_vec();
    }

    /// Our own candidates; gives those before, if they are others. `current` is the path taken.
    pub(super) fn set_local(
        &mut self,
        candidates: &[Candidate],
        current: Option<SocketAddr>,
        now: Instant,
    ) -> Option<Local> {
        let before = std::mem::replace(&mut self.local, Local::new(candidates, &self.networks));
        self.rebuild(current, now);
        (before != self.local).then_some(before)
    }

    /// What becomes of a path, since our own side was `before`.
    pub(super) fn ground(&self, before: &Local, addr: SocketAddr, source: Option<IpAddr>) -> Ground {
        self.local.ground(before, addr, source)
    }

    /// Whether our interfaces are others than `before`.
    pub(super) fn has_other_interfaces(&self, before: &Local) -> bool {
        !self.local.has_interfaces_of(before)
    }

    /// The other side's candidates; says whether they are others than before. New ones are checked.
    pub(super) fn set_remote(&mut self, candidates: &[Candidate], current: Option<SocketAddr>, now: Instant) -> bool {
        let remote = candidate::admit(candidates);
        let differs = remote != self.remote;
        self.remote = remote;
        self.rebuild(current, now);
        differs
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    pub(super) fn contains(&self, addr: &SocketAddr) -> bool {
        self.pairs.contains_key(addr)
    }

    pub(super) fn get_mut(&mut self, addr: &SocketAddr) -> Option<&mut Pair> {
        self.pairs.get_mut(addr)
    }

    /// The pair of an address that a check came from, learnt if there is room. `current` is the path taken.
    pub(super) fn learn(&mut self, from: SocketAddr, current: Option<SocketAddr>, now: Instant) -> Option<&mut Pair> {
        if !self.contains(&from) && !self.make_room(current, now) {
            return None;
        }
        Some(self.pairs.entry(from).or_insert_with(|| Pair::new(CandidateKind::PeerReflexive)))
    }

    /// Begins a burst of every pair that has none going on.
    pub(super) fn ensure_all(&mut self, now: Instant) {
        self.pairs.values_mut().for_each(|pair| pair.plan.ensure(now));
    }

    /// Forgets which pairs carried no data: they stand on other ground now.
    pub(super) fn trust_all(&mut self) {
        self.pairs.values_mut().for_each(Pair::trust);
    }

    /// Begins a burst of the pair of an address that is reached in another way than before, learnt if there is room.
    pub(super) fn begin_anew(&mut self, addr: SocketAddr, current: Option<SocketAddr>, now: Instant) {
        // What was spent on the old way says nothing of the new one, nor what it carried.
        self.ledger.forget(&addr);
        if let Some(pair) = self.learn(addr, current, now) {
            pair.trust();
            pair.plan.begin(now);
        }
    }

    /// Begins a burst of every pair.
    pub(super) fn begin_all(&mut self, now: Instant) {
        self.pairs.values_mut().for_each(|pair| pair.plan.begin(now));
    }

    /// Adds one check of every pair but this.
    pub(super) fn trigger_others(&mut self, than: SocketAddr, now: Instant) {
        let others = self.pairs.iter_mut().filter(|(addr, _)| **addr != than);
        others.for_each(|(_, pair)| pair.plan.trigger(now));
    }

    /// Drops the addresses that were learnt, checked and never proved, so that others can be learnt.
    pub(super) fn forget_unproved(&mut self) {
        let remote = &self.remote;
        self.pairs.retain(|addr, pair| remote.contains_key(addr) || pair.proof.is_some() || pair.plan.due().is_some());
    }

    /// When the next check is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due().map(|(due, ..)| due).min()
    }

    /// The pair to check now, which counts as checked: the path taken, then the most urgent, the likeliest, the longest due.
    pub(super) fn take_due(&mut self, current: Option<SocketAddr>, now: Instant) -> Option<SocketAddr> {
        let due = self.due().filter(|(due, ..)| *due <= now);
        let place = |addr: &SocketAddr, kind| candidate::order(*addr, kind, self.reach(addr));
        let first = due.min_by_key(|(due, addr, pair)| {
            (Some(**addr) != current, pair.plan.urgency(), place(addr, pair.kind), *due, **addr)
        });
        let to = first.map(|(_, addr, _)| *addr)?;
        self.ledger.spend(to, now);
        self.pairs.get_mut(&to)?.checked(now);
        Some(to)
    }

    /// Whether a check of this pair is planned already.
    pub(super) fn is_planned(&self, addr: &SocketAddr) -> bool {
        self.pairs.get(addr).is_some_and(|pair| pair.plan.due().is_some())
    }

    /// The smoothed round trip of a pair that was proved.
    pub(super) fn rtt(&self, addr: &SocketAddr) -> Option<Duration> {
        self.pairs.get(addr)?.proof.map(|proof| proof.rtt)
    }

    /// The score of a pair that was proved.
    pub(super) fn score(&self, addr: &SocketAddr) -> Option<Score> {
        let kind = self.pairs.get(addr)?.kind;
        Some(Score::new(*addr, kind, self.reach(addr), self.rtt(addr)?))
    }

    /// How near an address is.
    pub(super) fn reach(&self, addr: &SocketAddr) -> Reach {
        self.local.reach(*addr)
    }

    /// Every pair, by its address.
    pub(super) fn iter(&self) -> impl Iterator<Item = (SocketAddr, &Pair)> {
        self.pairs.iter().map(|(addr, pair)| (*addr, pair))
    }

    /// The other side's candidates that are not checked from here.
    pub(super) fn untried(&self) -> impl Iterator<Item = (SocketAddr, CandidateKind)> {
        self.remote.iter().filter(|(addr, _)| !self.contains(addr)).map(|(addr, kind)| (*addr, *kind))
    }

    fn due(&self) -> impl Iterator<Item = (Instant, &SocketAddr, &Pair)> {
        self.pairs.iter().filter_map(|(addr, pair)| {
            let wanted = pair.plan.due()?;
            Some((self.ledger.allowed(addr, wanted), addr, pair))
        })
    }

    /// Makes the pairs those that the candidates give, keeping what is known of them. The path taken stays, named or not,
    /// until its checks say otherwise; so do addresses that were learnt.
    fn rebuild(&mut self, current: Option<SocketAddr>, now: Instant) {
        let (local, remote) = (&self.local, &self.remote);
        self.pairs.retain(|addr, pair| {
            let named = remote.contains_key(addr) && local.can_reach(*addr);
            named || Some(*addr) == current || pair.kind == CandidateKind::PeerReflexive
        });
        for (addr, kind) in remote.iter().filter(|(addr, _)| local.can_reach(**addr)) {
            let pair = self.pairs.entry(*addr).or_insert_with(|| {
                let mut pair = Pair::new(*kind);
                pair.plan.begin(now);
                pair
            });
            pair.kind = *kind;
        }
    }

    /// Whether one more address may be learnt, for which one that proved itself long ago may have to go. Those that never
    /// did stay until the next round: otherwise two NATs that map every pair anew would chase each other for ever.
    fn make_room(&mut self, current: Option<SocketAddr>, now: Instant) -> bool {
        let learnt = self.pairs.iter().filter(|(addr, _)| !self.remote.contains_key(*addr));
        if learnt.clone().count() < MAX_PEER_REFLEXIVE {
            return true;
        }
        let stale = learnt
            .filter(|(addr, _)| Some(**addr) != current)
            .filter_map(|(addr, pair)| pair.proof.map(|proof| (proof.at, *addr)))
            .min()
            .filter(|(at, _)| *at + STALE <= now);
        stale.is_some_and(|(_, addr)| self.pairs.remove(&addr).is_some())
    }
}
