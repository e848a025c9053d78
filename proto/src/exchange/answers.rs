//! Asks of others: each taken at most once, and answered as often as its caller asks how it stands.
//!
//! An outcome is remembered until its caller has settled the ask, for [`OUTCOME_MEMORY`] at most, within bounds for one caller and
//! for all. Forgetting an outcome never makes an ask new again: a caller that comes for it later learns that it is lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::{
    ACCEPT_AFTER, Dropped, Event, Exchange, MAX_IN_PROGRESS, MAX_IN_PROGRESS_OVERALL, numbers::Numbers, remote::Remote,
    timers::Timer,
};
use crate::{
    fault::Misbehaved,
    id::{InstanceId, RequestId},
    limits::{MAX_MESSAGE_BYTES, OUTCOME_MEMORY},
    request::{Failure, FailureKind, Outcome, Request},
    wire::{
        encode,
        message::{Message, Numbering},
    },
};

/// Most bytes of outcomes remembered for one caller: 34 of the largest.
pub const MAX_CALLER_BYTES: usize = 2 * 1024 * 1024;

/// Most outcomes remembered for one caller.
pub const MAX_CALLER_OUTCOMES: usize = 1024;

/// Most bytes of outcomes remembered in all.
pub const MAX_OUTCOME_BYTES: usize = 8 * 1024 * 1024;

/// Most outcomes remembered in all.
pub const MAX_OUTCOMES: usize = 4096;

/// An answer is not repeated sooner than this, so that a small poll cannot draw large answers without end.
const REPEAT_AFTER: Duration = Duration::from_millis(500);

/// How often an answer is sent again because a queue was full; then it waits for its caller to ask.
const RESENDS: u32 = 6;

/// What one other instance has asked.
pub(super) struct Caller {
    pub(super) seen: Numbers,
    /// Asks that are known, by number: under way, or with an outcome.
    pub(super) entries: BTreeMap<u64, Entry>,
    numbers: BTreeMap<RequestId, u64>,
    in_progress: usize,
    outcome_bytes: usize,
}

/// One ask of a caller.
pub(super) struct Entry {
    id: RequestId,
    /// The session by which it came last.
    via: u32,
    /// The sealed words of its answer, once there is one, and since when.
    answer: Option<(Vec<u8>, Instant)>,
    /// The caller no longer waits.
    is_settled: bool,
    tag: Option<u32>,
    told: Option<Instant>,
    resends: u32,
}

/// An ask as it came.
pub(super) struct NewAsk {
    pub(super) id: RequestId,
    pub(super) numbering: Numbering,
    pub(super) request: Request,
}

/// Which outcomes are remembered, the oldest first.
#[derive(Default)]
pub(super) struct Outcomes {
    by_age: BTreeSet<(Instant, InstanceId, u64)>,
    bytes: usize,
}

impl Exchange {
    /// Answers what [`Event::Asked`] said. An outcome that does not fit a message is replaced by a failure that says so.
    pub fn answer(&mut self, caller: InstanceId, id: RequestId, outcome: Outcome, now: Instant) {
        let Some(known) = self.remotes.get_mut(&caller).map(|remote| &mut remote.caller) else { return };
        let Some(&number) = known.numbers.get(&id) else { return };
        let Some(entry) = known.entries.get_mut(&number).filter(|entry| entry.answer.is_none()) else { return };
        let words = answer_words(id, outcome);
        known.in_progress -= 1;
        known.outcome_bytes += words.len();
        self.in_progress -= 1;
        self.outcomes.bytes += words.len();
        self.outcomes.by_age.insert((now, caller, number));
        entry.answer = Some((words, now));
        entry.resends = 0;
        if entry.is_settled {
            self.forget_outcome(caller, number);
        } else {
            self.tell(caller, number, now);
            self.bound_outcomes(caller);
        }
        self.forget_forsaken(caller);
        self.arm_outcomes();
    }

    /// Takes an ask that a session of this caller proved, if it is new.
    pub(super) fn take_ask(&mut self, from: InstanceId, via: u32, ask: NewAsk, now: Instant) -> Result<(), Dropped> {
        let NewAsk { id, numbering: Numbering { number, settled, born }, request } = ask;
        self.settle(from, settled);
        let Some(Remote { address, caller, .. }) = self.remotes.get_mut(&from) else { return Ok(()) };
        let address = *address;
        if caller.entries.contains_key(&number) {
            return self.tell_again(from, via, number, id, now);
        }
        if caller.numbers.contains_key(&id) {
            return Err(Misbehaved::OutOfTurn.into());
        }
        if caller.seen.contains(number) || !self.epochs.accepts(born) {
            self.say(from, via, &Message::Forgotten { id });
            return Ok(());
        }
        caller.seen.take(number);
        if caller.in_progress >= MAX_IN_PROGRESS || self.in_progress >= MAX_IN_PROGRESS_OVERALL {
            self.say(from, via, &Message::Busy { id });
            return Ok(());
        }
        caller.in_progress += 1;
        caller.numbers.insert(id, number);
        caller.entries.insert(number, Entry::new(id, via));
        self.in_progress += 1;
        self.timers.set(Timer::Tell(from, number), now + ACCEPT_AFTER);
        self.events.push_back(Event::Asked { caller: address, id, request });
        Ok(())
    }

    /// Tells a caller how its ask stands.
    pub(super) fn take_poll(
        &mut self,
        from: InstanceId,
        via: u32,
        id: RequestId,
        number: u64,
        settled: u64,
        now: Instant,
    ) -> Result<(), Dropped> {
        self.settle(from, settled);
        if self.remotes.get(&from).is_some_and(|remote| remote.caller.entries.contains_key(&number)) {
            return self.tell_again(from, via, number, id, now);
        }
        self.say(from, via, &Message::Forgotten { id });
        Ok(())
    }

    /// A caller repeats an ask that is known.
    fn tell_again(
        &mut self,
        caller: InstanceId,
        via: u32,
        number: u64,
        id: RequestId,
        now: Instant,
    ) -> Result<(), Dropped> {
        let entry = self.entry(caller, number).filter(|entry| entry.id == id).ok_or(Misbehaved::OutOfTurn)?;
        entry.via = via;
        entry.resends = 0;
        match entry.told.map(|told| told + REPEAT_AFTER).filter(|soonest| *soonest > now) {
            Some(soonest) => self.timers.set_sooner(Timer::Tell(caller, number), soonest),
            None => self.tell(caller, number, now),
        }
        Ok(())
    }

    /// Tells a caller how its ask stands, if it is there: that it was taken, or its outcome.
    pub(super) fn tell(&mut self, caller: InstanceId, number: u64, now: Instant) {
        self.timers.cancel(Timer::Tell(caller, number));
        let Some(entry) = self.entry(caller, number).filter(|entry| !entry.is_settled) else { return };
        entry.told = Some(now);
        let (id, via) = (entry.id, entry.via);
        let tag = match entry.answer.take() {
            None => self.say(caller, via, &Message::Accepted { id }),
            Some((words, since)) => {
                let tag = self.say_words(caller, via, &words);
                if let Some(entry) = self.entry(caller, number) {
                    entry.answer = Some((words, since));
                }
                tag
            }
        };
        if let Some(entry) = self.entry(caller, number) {
            entry.tag = tag;
        }
    }

    /// The relay's queue for a caller was full: tell it again then.
    pub(super) fn answer_refused(&mut self, caller: InstanceId, tag: u32, again: Instant) {
        let Some(remote) = self.remotes.get_mut(&caller) else { return };
        let refused = remote.caller.entries.iter_mut().find(|(_, entry)| entry.tag == Some(tag));
        let Some((number, entry)) = refused else { return };
        entry.tag = None;
        if entry.resends < RESENDS {
            let more = again + REPEAT_AFTER / 5 * ((1 << entry.resends) - 1);
            entry.resends += 1;
            self.timers.set(Timer::Tell(caller, *number), more);
        }
    }

    /// The caller no longer waits for what is below.
    fn settle(&mut self, from: InstanceId, below: u64) {
        let Some(caller) = self.remotes.get_mut(&from).map(|remote| &mut remote.caller) else { return };
        caller.seen.settle(below);
        let mut over = Vec::new();
        for (number, entry) in caller.entries.range_mut(..below) {
            entry.is_settled = true;
            if entry.answer.is_some() {
                over.push(*number);
            }
        }
        over.into_iter().for_each(|number| self.forget_outcome(from, number));
    }

    fn bound_outcomes(&mut self, caller: InstanceId) {
        while let Some(known) = self.remotes.get(&caller).map(|remote| &remote.caller)
            && (known.outcome_bytes > MAX_CALLER_BYTES || known.entries.len() - known.in_progress > MAX_CALLER_OUTCOMES)
        {
            let mut answered = known.entries.iter().filter(|(_, entry)| entry.answer.is_some());
            let Some((&number, _)) = answered.next() else { return };
            self.forget_outcome(caller, number);
        }
        while let Some(&(_, oldest, number)) = self.outcomes.by_age.first()
            && (self.outcomes.bytes > MAX_OUTCOME_BYTES || self.outcomes.by_age.len() > MAX_OUTCOMES)
        {
            self.forget_outcome(oldest, number);
            self.forget_forsaken(oldest);
        }
    }

    pub(super) fn forget_old_outcomes(&mut self, now: Instant) {
        while let Some(&(since, caller, number)) = self.outcomes.by_age.first()
            && since + OUTCOME_MEMORY <= now
        {
            self.forget_outcome(caller, number);
            self.forget_forsaken(caller);
        }
        self.arm_outcomes();
    }

    fn arm_outcomes(&mut self) {
        if let Some((oldest, ..)) = self.outcomes.by_age.first() {
            self.timers.set(Timer::Outcomes, *oldest + OUTCOME_MEMORY);
        }
    }

    fn forget_outcome(&mut self, caller: InstanceId, number: u64) {
        let Some(known) = self.remotes.get_mut(&caller).map(|remote| &mut remote.caller) else { return };
        let Some(Entry { id, answer: Some((words, since)), .. }) = known.entries.remove(&number) else { return };
        known.numbers.remove(&id);
        known.outcome_bytes -= words.len();
        self.outcomes.bytes -= words.len();
        self.outcomes.by_age.remove(&(since, caller, number));
        self.timers.cancel(Timer::Tell(caller, number));
    }

    fn entry(&mut self, caller: InstanceId, number: u64) -> Option<&mut Entry> {
        self.remotes.get_mut(&caller)?.caller.entries.get_mut(&number)
    }

    fn say(&mut self, caller: InstanceId, via: u32, message: &Message) -> Option<u32> {
        self.say_words(caller, via, &encode(message))
    }

    /// Sends words to a caller by the session that it used, or else its newest.
    fn say_words(&mut self, caller: InstanceId, via: u32, words: &[u8]) -> Option<u32> {
        let slot = self.remotes.get(&caller)?.slot?;
        let index = if self.is_session_of(via, caller) { via } else { self.newest_accepted(caller)? };
        let sealed = self.seal(index, words)?;
        Some(self.transmit(slot, &sealed))
    }
}

impl Caller {
    /// A caller of whose asks all numbers below count as seen.
    pub(super) fn new(seen_below: u64) -> Self {
        Self {
            seen: Numbers::all_below(seen_below),
            entries: BTreeMap::new(),
            numbers: BTreeMap::new(),
            in_progress: 0,
            outcome_bytes: 0,
        }
    }
}

impl Entry {
    fn new(id: RequestId, via: u32) -> Self {
        Self { id, via, answer: None, is_settled: false, tag: None, told: None, resends: 0 }
    }
}

fn answer_words(id: RequestId, outcome: Outcome) -> Vec<u8> {
    let words = encode(&Message::Answer { id, outcome });
    if words.len() <= MAX_MESSAGE_BYTES {
        return words;
    }
    let what = format!("the outcome takes {} bytes, and a message at most {MAX_MESSAGE_BYTES}", words.len());
    let failure = Failure::new(FailureKind::Invalid, what, "ask for less at once");
    encode(&Message::Answer { id, outcome: Outcome::Failed(failure) })
}
