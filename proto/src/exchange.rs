//! Sessions of sealed messages, asks, and answers of one instance.
//!
//! In: who is in the room, sealed messages that the relay brings, what the instance asks and answers, `now`. Out: frames for
//! the relay and [`Event`]s. Never runs anything, never believes the relay: a slot is only where to send, who speaks is
//! what the seal proves.
//!
//! ```text
//! an ask of ours     Waiting ──sent──▶ Sent ──Accepted──▶ Accepted ──▶ Answered | Failed
//!                       ▲               │ repeated 1, 2, 4 … 10 s   │ polled every 10 s
//!                       └─ slot unknown ┘
//! a session to ask   none ──initiation, with the first ask──▶ opening ──response──▶ open ──worn, old or mute──▶ none
//! an ask of others   (new number) ──▶ in progress ──answer──▶ answered ──settled, old, or too many──▶ forgotten
//! ```
//!
//! **At most once.** A relay can hold a repeated ask back for as long as it likes, so remembering ids for some time is not
//! enough. Each asker numbers its asks; a host remembers which numbers it saw (`numbers`, bounded) for as long as it knows
//! the instance, and their end for two epochs more (`epochs`). An ask names the epoch that it was born under, and is new
//! only under that one and the next. So a host either remembers that it saw an ask, or can tell that it might have.
//!
//! Bounds for each remote instance, so that a hostile member harms only itself: few sessions, the newest kept (`sessions`); a
//! budget of handshakes (`remote`); [`MAX_IN_PROGRESS`] asks under way; [`MAX_CALLER_OUTCOMES`] and [`MAX_CALLER_BYTES`] of
//! outcomes. For all: [`MAX_IN_PROGRESS_OVERALL`], [`MAX_OUTCOMES`], [`MAX_OUTCOME_BYTES`], [`MAX_REMEMBERED`].

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand_core::CryptoRng;
use serde::{Deserialize, Serialize};
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use self::{
    answers::Outcomes,
    asks::Ask,
    epochs::Epochs,
    remote::Remote,
    sessions::Sessions,
    timers::{Timer, Timers},
};
use crate::{
    fault::{Malformed, Misbehaved},
    id::{InstanceId, PeerId, RequestId, RoomId, Slot},
    limits::{ASK_LOST_AFTER, ASK_RETRY_FIRST, ASK_RETRY_MAX},
    presence::Epoch,
    request::{Outcome, Request},
    sealed::noise::Identity,
    wire::relay::{RefusalReason, Refused, message},
};

mod answers;
mod asks;
mod epochs;
mod multicast;
mod numbers;
mod remote;
mod sessions;
mod timers;

pub use answers::{MAX_CALLER_BYTES, MAX_CALLER_OUTCOMES, MAX_OUTCOME_BYTES, MAX_OUTCOMES};
pub use epochs::MAX_REMEMBERED;

/// Time after which a caller is told that its ask was taken, unless it is answered by then: a quick answer is one frame.
/// Well below [`ASK_RETRY_FIRST`], so that a round trip of 0.8 s costs no repeat.
pub const ACCEPT_AFTER: Duration = Duration::from_millis(100);

/// Most asks of one caller under way here; a further one is told that this host is busy.
pub const MAX_IN_PROGRESS: usize = 256;

/// Most asks of all callers under way here.
pub const MAX_IN_PROGRESS_OVERALL: usize = 8_192;

/// Most asks of ours under way to one instance; a further one fails as busy.
pub const MAX_OUTSTANDING: usize = 1024;

/// Handshakes under way to one instance: an answer to an earlier one may still come when the next was begun.
const OPENINGS: usize = 3;

/// Sessions with one instance in each role: the one in use, and those that answers may still come by.
const SESSIONS: usize = 4;

/// Pause after which something is sent again that a full queue turned away, so that not all come back at once.
const QUEUE_FULL_PAUSE_MS: std::ops::Range<u64> = 100..400;

/// Who an instance is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The identity.
    pub peer: PeerId,
    /// The process.
    pub instance: InstanceId,
}

/// Who this instance is, and the room's secret.
pub struct Config {
    /// The identity's key.
    pub identity: StaticSecret,
    /// This instance.
    pub me: Address,
    /// The room.
    pub room: RoomId,
    /// The room's pre-shared key.
    pub psk: Zeroizing<[u8; 32]>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Somebody asks; say [`Exchange::answer`]. Never twice the same.
    Asked {
        /// Who, as proved.
        caller: Address,
        /// The caller's name for the ask: another caller may use the same.
        id: RequestId,
        /// What to do.
        request: Request,
    },
    /// The host has our ask, and is working on it.
    Accepted {
        /// The ask.
        id: RequestId,
    },
    /// The host answered; the ask is over.
    Answered {
        /// The ask.
        id: RequestId,
        /// How it ended.
        outcome: Outcome,
    },
    /// There will be no outcome; the ask is over.
    Failed {
        /// The ask.
        id: RequestId,
        /// Why.
        fault: AskFault,
    },
    /// The instance has a new epoch, which its presence must say at once.
    EpochChanged(Epoch),
}

/// Why an ask led to no outcome. Commands hear of it from the daemon of their machine, so variants are append-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum AskFault {
    /// It is not known here, or there was no way to it: the ask never left, so it was not carried out.
    #[error("it cannot be reached")]
    Unreachable,
    /// The host took it, or may have; then it went away, said nothing in time, or knows nothing of it any more.
    #[error("it gave no answer")]
    Lost,
    /// The host took it, but gave no outcome in time.
    #[error("it gave no answer in time")]
    DeadlineExceeded,
    /// It is too large for a message.
    #[error("the request is too large for a message")]
    TooLarge,
    /// The host has too much to do, or too much was asked of it from here; nothing was done.
    #[error("it is too busy")]
    Busy,
}

/// Why a sealed message was dropped. Nothing else came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Dropped {
    /// It does not read as what it should be.
    #[error("malformed")]
    Malformed,
    /// It does not verify, or was opened before.
    #[error("forged or repeated")]
    Forged,
    /// It verifies, but breaks the protocol.
    #[error("out of turn")]
    OutOfTurn,
    /// Nobody known has that slot.
    #[error("from an unknown slot")]
    UnknownSender,
    /// There is no such session (any more).
    #[error("for an unknown session")]
    UnknownSession,
    /// A first message that was taken before.
    #[error("a repeated first message")]
    Repeated,
    /// The sender begins too many sessions.
    #[error("too many sessions begun")]
    OverBudget,
}

impl From<Malformed> for Dropped {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl From<Misbehaved> for Dropped {
    fn from(fault: Misbehaved) -> Self {
        match fault {
            Misbehaved::Forged | Misbehaved::WeakKey => Self::Forged,
            Misbehaved::OutOfTurn | Misbehaved::OverLimit => Self::OutOfTurn,
        }
    }
}

/// All sessions, asks and answers of one instance. Call order: see [`crate`].
pub struct Exchange {
    identity: Identity,
    me: Address,
    room: RoomId,
    psk: Zeroizing<[u8; 32]>,
    epochs: Epochs,
    epoch_ends: Instant,
    remotes: BTreeMap<InstanceId, Remote>,
    slots: BTreeMap<Slot, InstanceId>,
    sessions: Sessions,
    asks: BTreeMap<RequestId, Ask>,
    /// Above every number used so far, for whichever host: an instance that comes back is never asked under an old one.
    next_number: u64,
    outcomes: Outcomes,
    in_progress: usize,
    timers: Timers,
    next_tag: u32,
    dropped: BTreeMap<Dropped, u64>,
    transmits: VecDeque<Bytes>,
    events: VecDeque<Event>,
}

impl Exchange {
    /// An exchange that knows nobody yet.
    pub fn new(config: Config, rng: &mut impl CryptoRng, now: Instant) -> Self {
        Self {
            identity: Identity::new(config.identity),
            me: config.me,
            room: config.room,
            psk: config.psk,
            epochs: Epochs::new(rng),
            epoch_ends: epochs::end_of_age(now, rng),
            remotes: BTreeMap::new(),
            slots: BTreeMap::new(),
            sessions: Sessions::new(rng.next_u32()),
            asks: BTreeMap::new(),
            next_number: 0,
            outcomes: Outcomes::default(),
            in_progress: 0,
            timers: Timers::default(),
            next_tag: 0,
            dropped: BTreeMap::new(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The epoch to publish in this instance's presence.
    pub fn epoch(&self) -> Epoch {
        self.epochs.current()
    }

    /// How many sealed messages were dropped, by reason.
    pub fn dropped(&self) -> &BTreeMap<Dropped, u64> {
        &self.dropped
    }

    /// An instance is in the room, or has another slot or epoch. What waits for it goes out.
    ///
    /// An instance belongs to the identity that it was first seen with, for as long as it is known: another that joins
    /// under its id is ignored.
    pub fn member_joined(
        &mut self,
        address: Address,
        slot: Slot,
        epoch: Epoch,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) {
        let instance = address.instance;
        if instance == self.me.instance {
            return;
        }
        let (epochs, number) = (&mut self.epochs, self.next_number);
        let remote = self
            .remotes
            .entry(instance)
            .or_insert_with(|| Remote::new(address, epoch, number, epochs.return_of(address)));
        if remote.address != address {
            return;
        }
        remote.is_forsaken = false;
        let has_new_epoch = std::mem::replace(&mut remote.epoch, epoch) != epoch;
        let before = remote.slot.replace(slot);
        self.timers.cancel(Timer::Absent(instance));
        if before != Some(slot) {
            before.map(|before| self.slots.remove(&before));
            if let Some(other) = self.slots.insert(slot, instance).and_then(|other| self.remotes.get_mut(&other)) {
                other.slot = None;
            }
            self.resume(instance, now, rng);
        } else if has_new_epoch {
            self.retry_opening(instance, now, rng);
        }
    }

    /// An instance left the room. What it accepted is lost unless it is back within [`ASK_LOST_AFTER`].
    pub fn member_left(&mut self, instance: InstanceId, now: Instant) {
        let Some(remote) = self.remotes.get_mut(&instance) else { return };
        if let Some(slot) = remote.slot.take() {
            self.slots.remove(&slot);
        }
        self.timers.set_sooner(Timer::Absent(instance), now + ASK_LOST_AFTER);
    }

    /// This instance's own connection was lost: nobody can be reached until they join anew. Nothing fails for that alone.
    pub fn uplink_lost(&mut self) {
        self.slots.clear();
        self.transmits.clear();
        self.remotes.values_mut().for_each(|remote| remote.slot = None);
    }

    /// The relay brought a sealed message.
    pub fn handle_message(&mut self, from: Slot, sealed: &[u8], now: Instant, rng: &mut impl CryptoRng) {
        let handled = self.handle_sealed(from, sealed, None, now, rng);
        self.count(handled);
    }

    /// The relay brought this instance's share of a multicast.
    pub fn handle_share(&mut self, from: Slot, part: &[u8], shared: &[u8], now: Instant, rng: &mut impl CryptoRng) {
        let handled = self.handle_sealed(from, part, Some(shared), now, rng);
        self.count(handled);
    }

    /// The relay did not deliver a message.
    pub fn handle_refused(&mut self, refused: Refused, now: Instant, rng: &mut impl CryptoRng) {
        let Some(&instance) = self.slots.get(&refused.slot) else { return };
        match refused.reason {
            // Whoever is gone is reported as gone by the relay; until then the usual repeats go on.
            RefusalReason::Gone => {}
            RefusalReason::QueueFull => {
                let spread = QUEUE_FULL_PAUSE_MS.end - QUEUE_FULL_PAUSE_MS.start;
                let pause = QUEUE_FULL_PAUSE_MS.start + rng.next_u64() % spread;
                let again = now + Duration::from_millis(pause);
                self.ask_refused(instance, refused.tag, again);
                self.answer_refused(instance, refused.tag, again);
            }
        }
    }

    /// The next frame for the relay.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        self.transmits.pop_front()
    }

    /// What happened next.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Exchange::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        self.timers.next().map_or(self.epoch_ends, |next| next.min(self.epoch_ends))
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant, rng: &mut impl CryptoRng) {
        if now >= self.epoch_ends {
            self.new_epoch(now, rng);
        }
        while let Some(timer) = self.timers.take_due(now) {
            match timer {
                Timer::Ask(id) => self.ask_due(id, now, rng),
                Timer::Begin(instance) => self.begin_due(instance, now, rng),
                Timer::Tell(caller, number) => self.tell(caller, number, now),
                Timer::Absent(instance) => self.forsake(instance),
                Timer::Outcomes => self.forget_old_outcomes(now),
                Timer::Sessions => self.drop_old_sessions(now),
            }
        }
    }

    fn new_epoch(&mut self, now: Instant, rng: &mut impl CryptoRng) {
        self.epochs.rotate(rng);
        self.epoch_ends = epochs::end_of_age(now, rng);
        self.events.push_back(Event::EpochChanged(self.epochs.current()));
    }

    /// An instance stayed away: nothing can be expected of it any more.
    fn forsake(&mut self, instance: InstanceId) {
        let Some(remote) = self.remotes.get_mut(&instance) else { return };
        remote.is_forsaken = true;
        let asks: Vec<RequestId> = remote.outstanding.values().copied().collect();
        for id in asks {
            self.give_up(id);
        }
        self.forget_forsaken(instance);
    }

    /// Lets go of a forsaken instance once nothing of it is in progress or remembered here.
    fn forget_forsaken(&mut self, instance: InstanceId) {
        let Some(remote) = self.remotes.get(&instance) else { return };
        if !remote.is_forsaken || !remote.caller.entries.is_empty() {
            return;
        }
        let end = remote.caller.seen.end();
        if end > 0 {
            self.epochs.depart(remote.address, end);
        }
        self.close_sessions(instance);
        self.remotes.remove(&instance);
    }

    fn count(&mut self, handled: Result<(), Dropped>) {
        if let Err(dropped) = handled {
            *self.dropped.entry(dropped).or_default() += 1;
        }
    }

    /// Puts a sealed message on its way; gives the tag under which it may be refused.
    fn transmit(&mut self, slot: Slot, sealed: &[u8]) -> u32 {
        let tag = self.draw_tag();
        self.transmits.push_back(message(slot, tag, sealed));
        tag
    }

    fn draw_tag(&mut self) -> u32 {
        self.next_tag = self.next_tag.wrapping_add(1);
        self.next_tag
    }
}

/// Pause before the next repeat: [`ASK_RETRY_FIRST`], doubled with each, up to [`ASK_RETRY_MAX`].
fn repeat_after(tries: u32) -> Duration {
    ASK_RETRY_FIRST.saturating_mul(1 << tries.saturating_sub(1).min(8)).min(ASK_RETRY_MAX)
}
