//! When an exchange must be woken, and why.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use crate::id::{InstanceId, RequestId};

/// Why to wake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// An ask of ours is to be sent or repeated, or its time is up.
    Ask(RequestId),
    /// A session with this instance is to be begun, because the last try went unanswered or could not be made.
    Begin(InstanceId),
    /// A caller is to be told how its ask stands: that we have it, or again its outcome.
    Tell(InstanceId, u64),
    /// An instance has been out of the room for long.
    Absent(InstanceId),
    /// The oldest outcome need no longer be remembered.
    Outcomes,
    /// Sessions may have become too old.
    Sessions,
}

/// At most one wake-up for each reason.
#[derive(Debug, Default)]
pub(super) struct Timers {
    queue: BTreeSet<(Instant, Timer)>,
    due: BTreeMap<Timer, Instant>,
}

impl Timers {
    /// Wakes then, in place of what was set before.
    pub(super) fn set(&mut self, timer: Timer, at: Instant) {
        match self.due.insert(timer, at) {
            Some(before) if before == at => return,
            Some(before) => _ = self.queue.remove(&(before, timer)),
            None => {}
        }
        self.queue.insert((at, timer));
    }

    /// Wakes then, unless it does so sooner.
    pub(super) fn set_sooner(&mut self, timer: Timer, at: Instant) {
        if self.due.get(&timer).is_none_or(|due| *due > at) {
            self.set(timer, at);
        }
    }

    pub(super) fn is_set(&self, timer: Timer) -> bool {
        self.due.contains_key(&timer)
    }

    pub(super) fn cancel(&mut self, timer: Timer) {
        if let Some(at) = self.due.remove(&timer) {
            self.queue.remove(&(at, timer));
        }
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.queue.first().map(|(at, _)| *at)
    }

    /// Takes one that is due.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Timer> {
        let (at, timer) = *self.queue.first().filter(|(at, _)| *at <= now)?;
        self.queue.remove(&(at, timer));
        self.due.remove(&timer);
        Some(timer)
    }
}
