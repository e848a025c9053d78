//! What others asked of this instance: each id once, and the outcomes for who asks again.
//!
//! Working → Done → forgotten: when the caller has settled the id, or after [`OUTCOME_MEMORY`]. An outcome younger than
//! [`OUTCOME_MEMORY_MIN`] is never forgotten for want of memory: new asks are refused as busy instead, because a forgotten id
//! that comes again would run again.
//! Bounds: [`MAX_ENTRIES`], [`MAX_BYTES`], and [`MAX_WORKING`] of one caller.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use crate::{
    id::{InstanceId, RequestId},
    limits::{OUTCOME_MEMORY, OUTCOME_MEMORY_MIN},
};

/// Ids that are remembered. Callers settle what they have, so only lost answers and crashed callers fill this.
const MAX_ENTRIES: usize = 16_384;

/// Bytes of outcomes that are remembered: about 250 of the largest.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// Requests of one caller that may be under way: more than any fan-in of honest work, little enough for a hostile member.
const MAX_WORKING: usize = 256;

type Key = (InstanceId, RequestId);

/// Every id that is remembered.
#[derive(Default)]
pub(super) struct Answers {
    entries: BTreeMap<Key, Entry>,
    /// Ended ids, oldest first; some may be forgotten already.
    ended: VecDeque<(Instant, Key)>,
    working: BTreeMap<InstanceId, usize>,
    bytes: usize,
}

struct Entry {
    /// The session by which the ask came last: the answer goes there.
    session: u32,
    /// The sealed message's plaintext, once there is an outcome.
    answer: Option<Vec<u8>>,
}

/// What to do with an ask.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is new: do it.
    New,
    /// It is being done.
    Working,
    /// It was done, with this answer.
    Done(Vec<u8>),
    /// Too much is going on.
    Busy,
}

impl Answers {
    /// Takes an ask that came by this session.
    pub(super) fn begin(&mut self, caller: InstanceId, id: RequestId, session: u32, now: Instant) -> Verdict {
        if let Some(entry) = self.entries.get_mut(&(caller, id)) {
            entry.session = session;
            return entry.answer.clone().map_or(Verdict::Working, Verdict::Done);
        }
        let working = self.working.get(&caller).copied().unwrap_or_default();
        if working >= MAX_WORKING || !self.make_room(now) {
            return Verdict::Busy;
        }
        self.working.insert(caller, working + 1);
        self.entries.insert((caller, id), Entry { session, answer: None });
        Verdict::New
    }

    /// Remembers the answer; the session to send it by, unless the id is unknown or was answered before.
    pub(super) fn end(&mut self, caller: InstanceId, id: RequestId, answer: Vec<u8>, now: Instant) -> Option<u32> {
        let entry = self.entries.get_mut(&(caller, id)).filter(|entry| entry.answer.is_none())?;
        self.bytes += answer.len();
        entry.answer = Some(answer);
        let session = entry.session;
        self.ended.push_back((now, (caller, id)));
        if let Some(working) = self.working.get_mut(&caller) {
            *working -= 1;
            if *working == 0 {
                self.working.remove(&caller);
            }
        }
        Some(session)
    }

    /// The session of an ask that is being done.
    pub(super) fn working_session(&self, caller: InstanceId, id: RequestId) -> Option<u32> {
        self.entries.get(&(caller, id)).filter(|entry| entry.answer.is_none()).map(|entry| entry.session)
    }

    /// The caller has these answers and sent these ids only once: nobody will ask again.
    pub(super) fn settle(&mut self, caller: InstanceId, ids: &[RequestId]) {
        ids.iter().for_each(|id| self.forget((caller, *id)));
    }

    /// When something is to be forgotten by age.
    pub(super) fn due(&self) -> Option<Instant> {
        self.ended.front().map(|(ended, _)| *ended + OUTCOME_MEMORY)
    }

    /// Forgets what is too old.
    pub(super) fn expire(&mut self, now: Instant) {
        while self.ended.front().is_some_and(|(ended, _)| *ended + OUTCOME_MEMORY <= now) {
            self.forget_oldest();
        }
    }

    fn make_room(&mut self, now: Instant) -> bool {
        while self.entries.len() >= MAX_ENTRIES || self.bytes >= MAX_BYTES {
            if self.ended.front().is_none_or(|(ended, _)| *ended + OUTCOME_MEMORY_MIN > now) {
                return false;
            }
            self.forget_oldest();
        }
        true
    }

    fn forget_oldest(&mut self) {
        if let Some((_, key)) = self.ended.pop_front() {
            self.forget(key);
        }
    }

    /// Forgets an ended id.
    fn forget(&mut self, key: Key) {
        let Some(len) = self.entries.get(&key).and_then(|entry| entry.answer.as_ref()).map(Vec::len) else { return };
        self.entries.remove(&key);
        self.bytes -= len;
        // Settled ids leave their place in the order behind; it is swept when it outgrows what it orders.
        if self.ended.len() > 2 * self.entries.len() + 64 {
            self.ended.retain(|(_, key)| self.entries.contains_key(key));
        }
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "virtual time begins somewhere")]
mod tests {
    use std::time::Duration;

    use super::*;

    const CALLER: InstanceId = InstanceId::from_bytes([1; 16]);

    fn id(number: u32) -> RequestId {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&number.to_be_bytes());
        RequestId::from_bytes(bytes)
    }

    #[test]
    fn a_repeated_id_gets_the_first_answer() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        assert_eq!(answers.begin(CALLER, id(1), 7, now), Verdict::New);
        assert_eq!(answers.begin(CALLER, id(1), 8, now), Verdict::Working);
        assert_eq!(answers.end(CALLER, id(1), vec![1], now), Some(8));
        assert_eq!(answers.end(CALLER, id(1), vec![2], now), None);
        assert_eq!(answers.begin(CALLER, id(1), 9, now), Verdict::Done(vec![1]));
    }

    #[test]
    fn outcomes_are_forgotten_by_age() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        answers.begin(CALLER, id(1), 7, now);
        answers.end(CALLER, id(1), vec![1], now);
        assert_eq!(answers.due(), Some(now + OUTCOME_MEMORY));
        answers.expire(now + OUTCOME_MEMORY);
        assert_eq!((answers.entries.len(), answers.bytes, answers.due()), (0, 0, None));
    }

    #[test]
    fn one_caller_has_so_many_requests_under_way_and_others_feel_nothing() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        for number in 0..MAX_WORKING as u32 {
            assert_eq!(answers.begin(CALLER, id(number), 7, now), Verdict::New);
        }
        assert_eq!(answers.begin(CALLER, id(9999), 7, now), Verdict::Busy);
        assert_eq!(answers.begin(InstanceId::from_bytes([2; 16]), id(9999), 8, now), Verdict::New);
    }

    #[test]
    fn a_fresh_outcome_is_never_forgotten_for_want_of_memory() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        for number in 0..MAX_ENTRIES as u32 {
            assert_eq!(answers.begin(CALLER, id(number), 7, now), Verdict::New);
            answers.end(CALLER, id(number), vec![1], now);
        }
        assert_eq!(answers.begin(CALLER, id(u32::MAX), 7, now), Verdict::Busy);
        let later = now + OUTCOME_MEMORY_MIN + Duration::from_secs(1);
        assert_eq!(answers.begin(CALLER, id(u32::MAX), 7, later), Verdict::New);
        assert!(answers.entries.len() <= MAX_ENTRIES);
    }

    #[test]
    fn settled_ids_leave_nothing_behind() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        for number in 0..100_000 {
            answers.begin(CALLER, id(number), 7, now);
            answers.end(CALLER, id(number), vec![1], now);
            answers.settle(CALLER, &[id(number)]);
        }
        assert_eq!((answers.entries.len(), answers.bytes), (0, 0));
        assert!(answers.ended.len() <= 128 && answers.working.is_empty());
    }
}
