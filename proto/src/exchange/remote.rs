//! One other instance: where it is, and the sessions with it.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::Address;
use crate::{
    id::{InstanceId, RequestId, Slot},
    presence::Epoch,
    sealed::{OpenKey, SOFT_AGE, SealKey, noise::Initiator},
};

/// Handshakes with one instance that wait for an answer; an older one is given up for a newer.
pub(super) const MAX_PENDING: usize = 4;

/// Sessions that one instance may have begun; an older one is given up for a newer.
pub(super) const MAX_INCOMING: usize = 3;

/// Ids that are settled with one message.
const MAX_SETTLED: usize = 64;

/// Sessions that one instance may begin at once.
const BURST: u32 = 16;

/// Time in which one more may be begun.
const REFILL: Duration = Duration::from_millis(250);

/// Another instance.
pub(super) struct Remote {
    pub(super) address: Address,
    /// Where the relay has it, while it is in the room.
    pub(super) slot: Option<Slot>,
    pub(super) epoch: Epoch,
    /// The session that our asks go by.
    pub(super) outgoing: Option<u32>,
    /// The session before, which still brings answers.
    pub(super) outgoing_before: Option<u32>,
    /// Handshakes that wait for an answer, the newest last.
    pub(super) pending: VecDeque<u32>,
    /// Asks that wait for a session.
    pub(super) waiting: Vec<RequestId>,
    /// Sessions that it began, the newest last.
    pub(super) incoming: VecDeque<u32>,
    settled: Vec<RequestId>,
    budget: Budget,
}

impl Remote {
    pub(super) fn new(address: Address, slot: Slot, epoch: Epoch, now: Instant) -> Self {
        Self {
            address,
            slot: Some(slot),
            epoch,
            outgoing: None,
            outgoing_before: None,
            pending: VecDeque::new(),
            waiting: Vec::new(),
            incoming: VecDeque::new(),
            settled: Vec::new(),
            budget: Budget { left: BURST, since: now },
        }
    }

    /// Whether it may begin one more session now.
    pub(super) fn may_begin(&mut self, now: Instant) -> bool {
        self.budget.take(now)
    }

    /// The answer of an ask that was sent once has arrived: the next message says so.
    pub(super) fn settle(&mut self, id: RequestId) {
        if self.settled.len() < MAX_SETTLED {
            self.settled.push(id);
        }
    }

    /// The ids that the next message settles. Lost with that message, they are forgotten by age instead.
    pub(super) fn take_settled(&mut self) -> Vec<RequestId> {
        std::mem::take(&mut self.settled)
    }
}

/// Who began a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Initiator,
    Responder,
}

/// An established session.
pub(super) struct Session {
    pub(super) remote: InstanceId,
    pub(super) role: Role,
    pub(super) seal: SealKey,
    pub(super) open: OpenKey,
    pub(super) since: Instant,
    /// When it brought anything last.
    pub(super) heard: Instant,
}

impl Session {
    /// Whether the initiator should begin a new one.
    pub(super) fn is_worn(&self, now: Instant) -> bool {
        self.seal.is_worn() || now >= self.since + SOFT_AGE
    }
}

/// A handshake that waits for its answer.
pub(super) struct Pending {
    pub(super) remote: InstanceId,
    pub(super) initiator: Initiator,
    pub(super) since: Instant,
}

/// A token bucket: what a hostile member can make us compute is bounded.
struct Budget {
    left: u32,
    since: Instant,
}

impl Budget {
    fn take(&mut self, now: Instant) -> bool {
        let refills = now.saturating_duration_since(self.since).as_millis() / REFILL.as_millis();
        let refills = u32::try_from(refills).unwrap_or(u32::MAX);
        if refills > 0 {
            self.left = self.left.saturating_add(refills).min(BURST);
            self.since = now;
        }
        let taken = self.left.checked_sub(1);
        self.left = taken.unwrap_or(0);
        taken.is_some()
    }
}
