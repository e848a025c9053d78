//! Asking and being asked through sealed messages: one instance's sessions with all others, over a relay that may drop,
//! repeat, reorder, redirect or change anything.
//!
//! In: who is in the room, sealed messages as the relay brings them, asks and answers of this instance, `now`, randomness.
//! Out: frames for the relay ([`Exchange::poll_transmit`]) and [`Event`]s. Never does a request twice, never delivers it to
//! another than it was meant for, never ends an ask twice: every ask ends in one [`Event::Answered`] or [`Event::Failed`].
//!
//! An ask to an instance without a session rides in the first message of a handshake; others wait for its answer, which
//! comes at once. Asks are repeated under the same id until accepted, then asked after now and then; an answer that was
//! lost is fetched by that.
//! Bounds: see [`crate::limits`] and the parts: `answers`, `epochs`, `remote`.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand_core::CryptoRng;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use self::{
    answers::Answers,
    ask::Ask,
    epochs::Epochs,
    remote::{Pending, Remote, Session},
};
use crate::{
    id::{InstanceId, PeerId, RequestId, RoomId, Slot},
    limits::{MAX_MESSAGE_BYTES, OUTCOME_MEMORY_MIN},
    presence::Epoch,
    request::{Failure, FailureKind, Outcome, Request},
    sealed::noise::Identity,
    wire::{
        encode,
        message::Message,
        relay::{RefusalReason, Refused},
    },
};

mod answers;
mod ask;
mod asking;
mod delivery;
mod epochs;
mod remote;
mod sessions;

/// Bound to what a multicast shares.
const SHARED_LABEL: &[u8] = b"peerfleet multicast v1";

/// Time after which a request that is still being done is acknowledged, so that it is not repeated. Well below
/// [`crate::limits::ASK_RETRY_FIRST`]; what is done sooner is answered without a message more.
const ACCEPT_AFTER: Duration = Duration::from_millis(300);

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

/// Why an ask led to no outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AskFault {
    /// Nobody took it in time.
    #[error("it cannot be reached")]
    Unreachable,
    /// It was taken; then the host went away or silent.
    #[error("it went away while working on the request")]
    Lost,
    /// It was taken, but there was no outcome in time.
    #[error("it gave no answer in time")]
    DeadlineExceeded,
    /// It is too large for a message.
    #[error("the request is too large for a message")]
    TooLarge,
    /// The host has too much to do; it did nothing.
    #[error("it is too busy")]
    Busy,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Somebody asks; say [`Exchange::answer`].
    Asked {
        /// Who, as proved.
        caller: Address,
        /// The id, which comes only once.
        id: RequestId,
        /// What.
        request: Request,
    },
    /// The host has our ask.
    Accepted {
        /// The ask.
        id: RequestId,
    },
    /// The host's outcome of our ask.
    Answered {
        /// The ask.
        id: RequestId,
        /// How it ended.
        outcome: Outcome,
    },
    /// Our ask led to no outcome.
    Failed {
        /// The ask.
        id: RequestId,
        /// Why.
        fault: AskFault,
    },
    /// Others must be told this epoch.
    EpochChanged(Epoch),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// Repeat an ask, or give it up.
    Ask(RequestId),
    /// Acknowledge a request that is still being done.
    Accept(InstanceId, RequestId),
    /// Forget an instance that did not come back.
    Forget(InstanceId),
}

/// All sessions, asks and answers of one instance. Call order: see [`crate`].
pub struct Exchange {
    config: Config,
    identity: Identity,
    epochs: Epochs,
    remotes: BTreeMap<InstanceId, Remote>,
    slots: BTreeMap<Slot, InstanceId>,
    sessions: BTreeMap<u32, Session>,
    pending: BTreeMap<u32, Pending>,
    asks: BTreeMap<RequestId, Ask>,
    tags: BTreeMap<(u32, Slot), RequestId>,
    answers: Answers,
    timers: BTreeSet<(Instant, Timer)>,
    next_tag: u32,
    transmits: VecDeque<Bytes>,
    events: VecDeque<Event>,
}

impl Exchange {
    /// An exchange that knows nobody yet.
    pub fn new(config: Config, rng: &mut impl CryptoRng, now: Instant) -> Self {
        Self {
            identity: Identity::new(config.identity.clone()),
            config,
            epochs: Epochs::new(rng, now),
            remotes: BTreeMap::new(),
            slots: BTreeMap::new(),
            sessions: BTreeMap::new(),
            pending: BTreeMap::new(),
            asks: BTreeMap::new(),
            tags: BTreeMap::new(),
            answers: Answers::default(),
            timers: BTreeSet::new(),
            next_tag: 1,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The epoch to publish in this instance's presence.
    pub fn epoch(&self) -> Epoch {
        self.epochs.current()
    }

    /// An instance is in the room, or has another slot or epoch. What waits for it goes out.
    pub fn member_joined(
        &mut self,
        address: Address,
        slot: Slot,
        epoch: Epoch,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) {
        let instance = address.instance;
        let remote = self.remotes.entry(instance).or_insert_with(|| Remote::new(address, slot, epoch, now));
        // The relay may lie about who an instance is; the first word counts, and the handshake needs the right key.
        if remote.address != address {
            return;
        }
        let before = remote.slot.replace(slot);
        remote.epoch = epoch;
        if let Some(before) = before {
            self.slots.remove(&before);
        }
        self.slots.insert(slot, instance);
        self.timers.retain(|(_, timer)| *timer != Timer::Forget(instance));
        if before != Some(slot) {
            self.drop_pending(instance);
            for id in self.asks_to(instance) {
                self.with_ask(id, |ask| ask.set_gone(false, now));
                self.send(id, now, rng);
            }
        }
    }

    /// An instance left the room. Its sessions are kept for a while: it may only have lost its relay.
    pub fn member_left(&mut self, instance: InstanceId, now: Instant) {
        let Some(remote) = self.remotes.get_mut(&instance) else { return };
        if let Some(slot) = remote.slot.take() {
            self.slots.remove(&slot);
        }
        self.timers.insert((now + OUTCOME_MEMORY_MIN, Timer::Forget(instance)));
        for id in self.asks_to(instance) {
            self.with_ask(id, |ask| ask.set_gone(true, now));
            self.reschedule(id, now);
        }
    }

    /// This instance's own connection was lost: nobody can be reached until they join anew.
    pub fn uplink_lost(&mut self) {
        self.slots.clear();
        self.remotes.values_mut().for_each(|remote| remote.slot = None);
        self.transmits.clear();
    }

    /// Asks one instance. Its end is an event; without a session the request rides in the first message.
    pub fn ask(
        &mut self,
        to: InstanceId,
        request: Request,
        deadline: Duration,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> RequestId {
        let id = self.begin_ask(to, Arc::new(request), deadline, now, rng);
        self.send(id, now, rng);
        id
    }

    /// Asks many instances the same, with one upload for all who are in the room.
    pub fn ask_many(
        &mut self,
        to: &[InstanceId],
        request: Request,
        deadline: Duration,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> Vec<(InstanceId, RequestId)> {
        let request = Arc::new(request);
        let asks: Vec<_> = to
            .iter()
            .map(|instance| (*instance, self.begin_ask(*instance, request.clone(), deadline, now, rng)))
            .collect();
        let ids: Vec<_> = asks.iter().map(|(_, id)| *id).filter(|id| self.asks.contains_key(id)).collect();
        if let [id] = ids[..] {
            self.send(id, now, rng);
        } else if !ids.is_empty() {
            self.multicast(&ids, &request, now, rng);
        }
        asks
    }

    /// The caller no longer wants the outcome; there will be no event for it.
    pub fn forget(&mut self, id: RequestId) {
        self.end_ask(id);
    }

    /// The outcome of a request that [`Event::Asked`] reported. A second one for the same id is ignored.
    pub fn answer(&mut self, caller: InstanceId, id: RequestId, outcome: Outcome, now: Instant) {
        let mut answer = encode(&Message::Answer { id, outcome });
        if answer.len() > MAX_MESSAGE_BYTES {
            let what = format!("the answer has {} bytes; a message carries {MAX_MESSAGE_BYTES}", answer.len());
            let outcome = Outcome::Failed(Failure::new(FailureKind::Invalid, what, "ask for less at once"));
            answer = encode(&Message::Answer { id, outcome });
        }
        if let Some(session) = self.answers.end(caller, id, answer.clone(), now) {
            self.reply(session, &answer);
        }
    }

    /// The relay brought a sealed message.
    pub fn handle_message(&mut self, from: Slot, sealed: &[u8], now: Instant, rng: &mut impl CryptoRng) {
        self.handle_sealed(from, sealed, None, now, rng);
    }

    /// The relay brought this instance's share of a multicast.
    pub fn handle_share(&mut self, from: Slot, part: &[u8], shared: &[u8], now: Instant, rng: &mut impl CryptoRng) {
        self.handle_sealed(from, part, Some(shared), now, rng);
    }

    /// The relay did not deliver a message.
    pub fn handle_refused(&mut self, refused: Refused, now: Instant, rng: &mut impl CryptoRng) {
        let Some(id) = self.tags.get(&(refused.tag, refused.slot)).copied() else { return };
        // If the message was to begin a session, nobody will answer it.
        if let Some(to) = self.asks.get(&id).map(|ask| ask.to) {
            self.drop_pending(to);
        }
        match refused.reason {
            RefusalReason::QueueFull => {
                let pause = Duration::from_millis(100 + u64::from(rng.next_u32() % 300));
                self.wake_ask_at(id, now + pause);
            }
            // The roster tells when it comes back.
            RefusalReason::Gone => {}
        }
    }

    /// When [`Exchange::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        let timer = self.timers.first().map(|(at, _)| *at);
        [timer, self.answers.due()].into_iter().flatten().fold(self.epochs.due(), Instant::min)
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant, rng: &mut impl CryptoRng) {
        self.answers.expire(now);
        self.renew_epoch_if_due(now, rng);
        while let Some((_, timer)) = self.timers.first().copied().filter(|(at, _)| *at <= now) {
            self.timers.pop_first();
            match timer {
                Timer::Ask(id) => self.look_after(id, now, rng),
                Timer::Accept(caller, id) => {
                    if let Some(session) = self.answers.working_session(caller, id) {
                        self.reply(session, &encode(&Message::Accepted { id }));
                    }
                }
                Timer::Forget(instance) => self.forget_remote(instance),
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
}
