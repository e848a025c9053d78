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
//! Bounds: see [`crate::limits`] and the parts: [`Answers`], [`Epochs`], [`Remote`].

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use aes_gcm::aead::{Aead, Payload};
use bytes::Bytes;
use rand_core::CryptoRng;
use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use self::{
    answers::{Answers, Verdict},
    ask::Ask,
    epochs::Epochs,
    remote::{MAX_INCOMING, MAX_PENDING, Pending, Remote, Role, Session},
};
use crate::{
    id::{InstanceId, PeerId, RequestId, RoomId, Slot},
    limits::{ASK_RETRY_FIRST, MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, MAX_MULTICAST, OUTCOME_MEMORY_MIN},
    presence::Epoch,
    request::{Failure, FailureKind, Outcome, Request},
    sealed::{
        OpenKey, SealKey, Sealed, initiation,
        noise::{Handshake, Identity, Initiator, Responder, cipher, nonce},
        response,
    },
    wire::{
        decode, encode,
        message::Message,
        relay::{self, RefusalReason, Refused},
    },
};

mod answers;
mod ask;
mod epochs;
mod remote;

const PROLOGUE_LABEL: &[u8] = b"peerfleet sealed messages v1";

/// Time after which a request that is still being done is acknowledged, so that it is not repeated. Well below
/// [`ASK_RETRY_FIRST`]; what is done sooner is answered without a message more.
const ACCEPT_AFTER: Duration = Duration::from_millis(300);

/// Bytes that a multicast takes for each recipient: slot, length, and a share that begins a session.
const SHARE_BYTES: usize = 6 + 256;

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

/// Asks of ours.
impl Exchange {
    fn begin_ask(
        &mut self,
        to: InstanceId,
        request: Arc<Request>,
        deadline: Duration,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> RequestId {
        let mut bytes = [0; RequestId::LEN];
        rng.fill_bytes(&mut bytes);
        let id = RequestId::from_bytes(bytes);
        if !self.remotes.contains_key(&to) {
            self.events.push_back(Event::Failed { id, fault: AskFault::Unreachable });
            return id;
        }
        let mut ask = Ask::new(to, request, deadline, now);
        ask.set_gone(self.remotes.get(&to).is_some_and(|remote| remote.slot.is_none()), now);
        self.timers.insert((ask.wake, Timer::Ask(id)));
        self.asks.insert(id, ask);
        id
    }

    fn asks_to(&self, instance: InstanceId) -> Vec<RequestId> {
        self.asks.iter().filter(|(_, ask)| ask.to == instance).map(|(id, _)| *id).collect()
    }

    fn with_ask(&mut self, id: RequestId, change: impl FnOnce(&mut Ask)) {
        if let Some(ask) = self.asks.get_mut(&id) {
            change(ask);
        }
    }

    fn look_after(&mut self, id: RequestId, now: Instant, rng: &mut impl CryptoRng) {
        let Some(ask) = self.asks.get(&id) else { return };
        match ask.fault(now) {
            Some(fault) => self.fail(id, fault),
            None => self.send(id, now, rng),
        }
    }

    fn fail(&mut self, id: RequestId, fault: AskFault) {
        if self.end_ask(id).is_some() {
            self.events.push_back(Event::Failed { id, fault });
        }
    }

    fn end_ask(&mut self, id: RequestId) -> Option<Ask> {
        let ask = self.asks.remove(&id)?;
        self.timers.remove(&(ask.wake, Timer::Ask(id)));
        ask.sent.and_then(|sent| self.tags.remove(&sent));
        Some(ask)
    }

    /// Sends an ask by a session, by beginning one, or leaves it to wait for one.
    fn send(&mut self, id: RequestId, now: Instant, rng: &mut impl CryptoRng) {
        let Some(ask) = self.asks.get(&id) else { return };
        let (to, request) = (ask.to, ask.request.clone());
        if let Some(slot) = self.remotes.get(&to).and_then(|remote| remote.slot) {
            let settled = self.remotes.get_mut(&to).map(Remote::take_settled).unwrap_or_default();
            let plain = encode(&Message::Ask { id, settled, request: (*request).clone() });
            if plain.len() > MAX_MESSAGE_BYTES {
                return self.fail(id, AskFault::TooLarge);
            }
            if let Some(sealed) = self.seal(to, &plain, id, now, rng) {
                let tag = self.take_tag();
                self.transmits.push_back(relay::message(slot, tag, &sealed));
                self.mark_sent(id, tag, slot);
            }
        }
        self.reschedule(id, now);
    }

    /// Sends one request to all who are in the room, sealed once; each gets the key in a part of its own.
    fn multicast(&mut self, ids: &[RequestId], request: &Request, now: Instant, rng: &mut impl CryptoRng) {
        let mut key = Zeroizing::new([0; 32]);
        rng.fill_bytes(key.as_mut());
        let payload = Payload { msg: &encode(request), aad: PROLOGUE_LABEL };
        let shared = cipher(&key).encrypt(&nonce(0).into(), payload).expect("a request is below the cipher's bound");
        if shared.len() > MAX_MESSAGE_BYTES {
            return ids.iter().for_each(|id| self.fail(*id, AskFault::TooLarge));
        }
        let digest = *blake3::hash(&shared).as_bytes();
        let fitting = ((MAX_FRAME_BYTES - shared.len()) / SHARE_BYTES).min(MAX_MULTICAST);
        for ids in ids.chunks(fitting) {
            let tag = self.take_tag();
            let mut parts = Vec::with_capacity(ids.len());
            for id in ids {
                let Some(to) = self.asks.get(id).map(|ask| ask.to) else { continue };
                let slot = self.remotes.get(&to).and_then(|remote| remote.slot);
                let plain = encode(&Message::AskShared { id: *id, key: *key, digest });
                if let Some(slot) = slot
                    && let Some(sealed) = self.seal(to, &plain, *id, now, rng)
                {
                    parts.push((slot, sealed));
                    self.mark_sent(*id, tag, slot);
                }
                self.reschedule(*id, now);
            }
            let parts = parts.iter().map(|(slot, sealed)| (*slot, &sealed[..]));
            self.transmits.push_back(relay::multicast(tag, parts, &shared));
        }
    }

    fn take_tag(&mut self) -> u32 {
        // Zero is what replies have: their refusal concerns nobody.
        self.next_tag = self.next_tag.checked_add(1).unwrap_or(1);
        self.next_tag
    }

    fn mark_sent(&mut self, id: RequestId, tag: u32, slot: Slot) {
        let Some(ask) = self.asks.get_mut(&id) else { return };
        ask.attempts += 1;
        if let Some(before) = ask.sent.replace((tag, slot)) {
            self.tags.remove(&before);
        }
        self.tags.insert((tag, slot), id);
    }

    fn reschedule(&mut self, id: RequestId, now: Instant) {
        let Some(ask) = self.asks.get_mut(&id) else { return };
        self.timers.remove(&(ask.wake, Timer::Ask(id)));
        ask.schedule(now);
        self.timers.insert((ask.wake, Timer::Ask(id)));
    }

    fn wake_ask_at(&mut self, id: RequestId, at: Instant) {
        let Some(ask) = self.asks.get_mut(&id) else { return };
        self.timers.remove(&(ask.wake, Timer::Ask(id)));
        ask.wake = ask.wake.min(at);
        self.timers.insert((ask.wake, Timer::Ask(id)));
    }
}

/// Sessions.
impl Exchange {
    /// Seals by the outgoing session, or in the first message of a new one; `None` if one is being made already.
    fn seal(
        &mut self,
        to: InstanceId,
        plain: &[u8],
        id: RequestId,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> Option<Vec<u8>> {
        let remote = self.remotes.get(&to)?;
        let newest = remote.pending.back().and_then(|index| self.pending.get(index));
        let is_pending = newest.is_some_and(|pending| now < pending.since + ASK_RETRY_FIRST);
        let session = remote.outgoing.and_then(|index| self.sessions.get_mut(&index));
        if let Some(session) = session
            && (is_pending || !session.is_worn(now))
            && let Some(sealed) = session.seal.seal(plain)
        {
            return Some(sealed);
        }
        if is_pending {
            let remote = self.remotes.get_mut(&to)?;
            if !remote.waiting.contains(&id) {
                remote.waiting.push(id);
            }
            return None;
        }
        self.begin_session(to, plain, now, rng)
    }

    fn begin_session(
        &mut self,
        to: InstanceId,
        plain: &[u8],
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> Option<Vec<u8>> {
        let index = self.free_index(rng);
        let remote = self.remotes.get_mut(&to)?;
        let prologue = prologue(&self.config.room, &self.config.me, &remote.address, remote.epoch);
        let handshake = Handshake { prologue: &prologue, psk: &self.config.psk, identity: &self.identity };
        let ephemeral = StaticSecret::random_from_rng(rng);
        let (initiator, noise) = Initiator::begin(&handshake, ephemeral, remote.address.peer.as_bytes(), plain).ok()?;
        remote.pending.push_back(index);
        if remote.pending.len() > MAX_PENDING {
            remote.pending.pop_front().and_then(|oldest| self.pending.remove(&oldest));
        }
        self.pending.insert(index, Pending { remote: to, initiator, since: now });
        Some(initiation(index, &noise))
    }

    /// Handshakes under way got lost: the next ask begins a new one at once.
    fn drop_pending(&mut self, instance: InstanceId) {
        let Some(remote) = self.remotes.get_mut(&instance) else { return };
        for index in remote.pending.drain(..) {
            self.pending.remove(&index);
        }
    }

    /// Random, so that an index tells nothing and old messages meet no new session by chance.
    fn free_index(&self, rng: &mut impl CryptoRng) -> u32 {
        loop {
            let index = rng.next_u32();
            if !self.sessions.contains_key(&index) && !self.pending.contains_key(&index) {
                return index;
            }
        }
    }

    fn handle_sealed(
        &mut self,
        from: Slot,
        sealed: &[u8],
        shared: Option<&[u8]>,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) {
        match Sealed::split(sealed) {
            Ok(Sealed::Initiation { sender, noise }) => self.handle_initiation(from, sender, noise, shared, now, rng),
            Ok(Sealed::Response { receiver, sender, noise }) => self.handle_response(receiver, sender, noise, now, rng),
            Ok(Sealed::Transport { receiver, counter, header, ciphertext }) => {
                let Some(session) = self.sessions.get_mut(&receiver) else { return };
                if let Ok(plain) = session.open.open(counter, header, ciphertext) {
                    self.deliver(receiver, &plain, shared, now);
                }
            }
            // Whoever sent it repeats what it wanted.
            Err(_) => {}
        }
    }

    fn handle_initiation(
        &mut self,
        from: Slot,
        sender: u32,
        noise: &[u8],
        shared: Option<&[u8]>,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) {
        let Some(remote) = self.slots.get(&from).and_then(|instance| self.remotes.get_mut(instance)) else { return };
        if !remote.may_begin(now) {
            return;
        }
        let address = remote.address;
        let Some((epoch, responder, plain)) = self.read_initiation(&address, noise) else { return };
        let Some(ephemeral) = noise.first_chunk() else { return };
        if responder.remote_identity() != address.peer.as_bytes() || !self.epochs.take(epoch, *ephemeral) {
            return;
        }
        let Ok((answer, keys)) = responder.answer(&StaticSecret::random_from_rng(rng), &[]) else { return };
        let index = self.free_index(rng);
        let (seal, open) = (SealKey::new(&keys.backward, sender), OpenKey::new(&keys.forward));
        let session = Session { remote: address.instance, role: Role::Responder, seal, open, since: now };
        self.sessions.insert(index, session);
        if let Some(remote) = self.remotes.get_mut(&address.instance) {
            remote.incoming.push_back(index);
            if remote.incoming.len() > MAX_INCOMING {
                remote.incoming.pop_front().and_then(|oldest| self.sessions.remove(&oldest));
            }
        }
        self.transmits.push_back(relay::message(from, 0, &response(sender, index, &answer)));
        self.deliver(index, &plain, shared, now);
        self.renew_epoch_if_due(now, rng);
    }

    /// The relay says who sent it; under another prologue than the sender's nothing verifies.
    fn read_initiation(&self, sender: &Address, noise: &[u8]) -> Option<(Epoch, Responder, Vec<u8>)> {
        self.epochs.accepted().find_map(|epoch| {
            let prologue = prologue(&self.config.room, sender, &self.config.me, epoch);
            let handshake = Handshake { prologue: &prologue, psk: &self.config.psk, identity: &self.identity };
            let (responder, plain) = Responder::read(&handshake, noise).ok()?;
            Some((epoch, responder, plain))
        })
    }

    fn handle_response(&mut self, receiver: u32, sender: u32, noise: &[u8], now: Instant, rng: &mut impl CryptoRng) {
        let Some(pending) = self.pending.get(&receiver) else { return };
        let Ok((_, keys)) = pending.initiator.finish(noise) else { return };
        let instance = pending.remote;
        self.pending.remove(&receiver);
        let (seal, open) = (SealKey::new(&keys.forward, sender), OpenKey::new(&keys.backward));
        self.sessions.insert(receiver, Session { remote: instance, role: Role::Initiator, seal, open, since: now });
        let Some(remote) = self.remotes.get_mut(&instance) else { return };
        remote.pending.retain(|index| *index != receiver);
        let before = remote.outgoing.replace(receiver);
        if let Some(oldest) = std::mem::replace(&mut remote.outgoing_before, before) {
            self.sessions.remove(&oldest);
        }
        for id in std::mem::take(&mut remote.waiting) {
            self.send(id, now, rng);
        }
    }

    /// Sends a reply by the session that the request came by; if that is gone, the asking side asks again by another.
    fn reply(&mut self, session: u32, plain: &[u8]) {
        let Some(session) = self.sessions.get_mut(&session) else { return };
        let Some(slot) = self.remotes.get(&session.remote).and_then(|remote| remote.slot) else { return };
        if let Some(sealed) = session.seal.seal(plain) {
            self.transmits.push_back(relay::message(slot, 0, &sealed));
        }
    }

    fn forget_remote(&mut self, instance: InstanceId) {
        self.remotes.remove(&instance);
        self.sessions.retain(|_, session| session.remote != instance);
        self.pending.retain(|_, pending| pending.remote != instance);
        self.asks_to(instance).into_iter().for_each(|id| self.fail(id, AskFault::Lost));
    }

    fn renew_epoch_if_due(&mut self, now: Instant, rng: &mut impl CryptoRng) {
        if self.epochs.is_due(now) {
            let epoch = self.epochs.renew(rng, now);
            self.events.push_back(Event::EpochChanged(epoch));
        }
    }
}

/// What sessions bring.
impl Exchange {
    fn deliver(&mut self, session: u32, plain: &[u8], shared: Option<&[u8]>, now: Instant) {
        let Some(Session { role, remote, .. }) = self.sessions.get(&session) else { return };
        let (role, remote) = (*role, *remote);
        let Ok(message) = decode(plain, MAX_MESSAGE_BYTES) else { return };
        match (role, message) {
            (Role::Responder, Message::Ask { id, settled, request }) => {
                self.answers.settle(remote, &settled);
                self.handle_ask(session, remote, id, request, now);
            }
            (Role::Responder, Message::AskShared { id, key, digest }) => {
                if let Some(request) = shared.and_then(|shared| open_shared(shared, &key, &digest)) {
                    self.handle_ask(session, remote, id, request, now);
                }
            }
            (Role::Initiator, Message::Accepted { id }) => self.handle_accepted(remote, id, now),
            (Role::Initiator, Message::Answer { id, outcome }) => self.handle_answer(remote, id, outcome),
            (Role::Initiator, Message::Busy { id }) => {
                if self.is_asked(remote, id) {
                    self.fail(id, AskFault::Busy);
                }
            }
            // A session carries its initiator's asks and the answers to them, nothing else.
            (Role::Initiator, Message::Ask { .. } | Message::AskShared { .. })
            | (Role::Responder, Message::Accepted { .. } | Message::Answer { .. } | Message::Busy { .. }) => {}
        }
    }

    fn handle_ask(&mut self, session: u32, caller: InstanceId, id: RequestId, request: Request, now: Instant) {
        match self.answers.begin(caller, id, session, now) {
            Verdict::New => {
                let Some(address) = self.remotes.get(&caller).map(|remote| remote.address) else { return };
                self.timers.insert((now + ACCEPT_AFTER, Timer::Accept(caller, id)));
                self.events.push_back(Event::Asked { caller: address, id, request });
            }
            Verdict::Working => self.reply(session, &encode(&Message::Accepted { id })),
            Verdict::Done(answer) => self.reply(session, &answer),
            Verdict::Busy => self.reply(session, &encode(&Message::Busy { id })),
        }
    }

    fn is_asked(&self, remote: InstanceId, id: RequestId) -> bool {
        self.asks.get(&id).is_some_and(|ask| ask.to == remote)
    }

    fn handle_accepted(&mut self, remote: InstanceId, id: RequestId, now: Instant) {
        let Some(ask) = self.asks.get_mut(&id).filter(|ask| ask.to == remote) else { return };
        if ask.accept(now) {
            self.events.push_back(Event::Accepted { id });
        }
        self.reschedule(id, now);
    }

    fn handle_answer(&mut self, remote: InstanceId, id: RequestId, outcome: Outcome) {
        if !self.is_asked(remote, id) {
            return;
        }
        let Some(ask) = self.end_ask(id) else { return };
        // What was sent once cannot come again behind the settling: its counter is used up.
        if ask.attempts == 1 {
            self.remotes.get_mut(&remote).into_iter().for_each(|remote| remote.settle(id));
        }
        self.events.push_back(Event::Answered { id, outcome });
    }
}

fn open_shared(shared: &[u8], key: &[u8; 32], digest: &[u8; 32]) -> Option<Request> {
    if blake3::hash(shared) != *digest {
        return None;
    }
    let payload = Payload { msg: shared, aad: PROLOGUE_LABEL };
    let plain = cipher(key).decrypt(&nonce(0).into(), payload).ok()?;
    decode(&plain, MAX_MESSAGE_BYTES).ok()
}

/// Everything that both sides must agree on, each part of fixed length.
fn prologue(room: &RoomId, initiator: &Address, responder: &Address, epoch: Epoch) -> Vec<u8> {
    [
        PROLOGUE_LABEL,
        room.as_bytes(),
        initiator.peer.as_bytes(),
        initiator.instance.as_bytes(),
        responder.peer.as_bytes(),
        responder.instance.as_bytes(),
        &epoch.0,
    ]
    .concat()
}
