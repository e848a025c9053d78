//! What an agent knows, for people: every address of the other side with what checking it brought, the path taken and why.
//!
//! In: an [`Agent`] and `now`. Out: a [`PathReport`]. It changes nothing, so looking disturbs no link.
//! Bounds: [`MAX_REPORTED_CHECKS`]; there are no more pairs than that.

use std::{net::SocketAddr, time::Instant};

use super::{
    Agent,
    candidate::CandidateKind,
    direct::GRACE,
    pair::{Pair, Tally},
    transaction::ANSWER_DEADLINE,
};
use crate::request::network::{CheckOutcome, CheckReport, Choice, MAX_REPORTED_CHECKS, PathReport, TakenPath};

/// Checks that must have gone unanswered, and [`GRACE`] have passed, before an address that answered once is told as lost.
const LOST_CHECKS: u32 = 2;

impl Agent {
    /// How looking for a direct path stands.
    pub fn report(&self, now: Instant) -> PathReport {
        let tried = self.pairs.iter().map(|(addr, pair)| self.check_of(addr, pair, now));
        let untried = self.pairs.untried().map(|(addr, kind)| self.no_check_of(addr, kind));
        let mut checks: Vec<CheckReport> = tried.chain(untried).collect();
        checks.sort_by_key(|check| (check.reach, check.kind, check.addr));
        checks.truncate(MAX_REPORTED_CHECKS);
        PathReport { age: now.saturating_duration_since(self.began), checks, taken: self.taken(now), search: None }
    }

    fn check_of(&self, addr: SocketAddr, pair: &Pair, now: Instant) -> CheckReport {
        let Tally { sent, answered, heard, .. } = pair.tally;
        CheckReport {
            addr,
            kind: pair.kind,
            reach: self.pairs.reach(&addr),
            sent,
            answered,
            heard,
            rtt: self.pairs.rtt(&addr),
            outcome: outcome(pair, now),
        }
    }

    fn no_check_of(&self, addr: SocketAddr, kind: CandidateKind) -> CheckReport {
        CheckReport {
            addr,
            kind,
            reach: self.pairs.reach(&addr),
            sent: 0,
            answered: 0,
            heard: 0,
            rtt: None,
            outcome: CheckOutcome::NotTried,
        }
    }

    fn taken(&self, now: Instant) -> Option<TakenPath> {
        let path = self.path()?;
        let age = now.saturating_duration_since(self.watched()?.taken_at());
        Some(TakenPath { addr: path.addr, rtt: path.rtt, age, why: self.choice(path.addr, now) })
    }

    /// Why this path, and none of the others that answer.
    fn choice(&self, taken: SocketAddr, now: Instant) -> Choice {
        let answers = |pair: &Pair| outcome(pair, now) == CheckOutcome::Answered;
        let others = self.pairs.iter().filter(|(addr, pair)| *addr != taken && answers(pair));
        let best = others.filter_map(|(addr, _)| Some((self.pairs.score(&addr)?, addr))).min();
        let Some((score, (best_score, best))) = self.pairs.score(&taken).zip(best) else { return Choice::Only };
        if best_score < score {
            return Choice::Kept(best);
        }
        let rtt = |addr| self.pairs.rtt(addr).unwrap_or_default();
        if self.pairs.reach(&taken) < self.pairs.reach(&best) {
            Choice::Nearer(best)
        } else if rtt(&taken) < rtt(&best) {
            Choice::Faster(best)
        } else if taken.is_ipv6() && best.is_ipv4() {
            Choice::Ipv6(best)
        } else {
            Choice::Kind(best)
        }
    }
}

fn outcome(pair: &Pair, now: Instant) -> CheckOutcome {
    let Tally { sent: _, answered: _, unanswered, heard: _, forged, sent_at } = pair.tally;
    let Some(sent_at) = sent_at else { return CheckOutcome::Planned };
    match pair.proved_at() {
        Some(_) if !pair.is_trusted(now) => CheckOutcome::Distrusted,
        Some(at) if unanswered >= LOST_CHECKS && at + GRACE <= now => CheckOutcome::Lost,
        Some(_) => CheckOutcome::Answered,
        None if forged => CheckOutcome::Forged,
        None if now < sent_at + ANSWER_DEADLINE => CheckOutcome::Waiting,
        None => CheckOutcome::Silent,
    }
}
