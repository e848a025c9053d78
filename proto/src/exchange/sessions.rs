//! Sessions with other instances: begun to ask, accepted to answer.
//!
//! A session is bound by its prologue to room, both instances, both identities, the responder's epoch and the initiator's
//! index. It carries its initiator's asks and the answers to them, and nothing else.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use rand_core::CryptoRng;
use x25519_dalek::StaticSecret;

use super::{
    Address, AskFault, Dropped, Exchange, OPENINGS, SESSIONS, answers::NewAsk, epochs::NotNew, multicast::Shared,
    remote::Remote, repeat_after, timers::Timer,
};
use crate::{
    fault::Misbehaved,
    id::{InstanceId, PeerId, RequestId, Slot},
    limits::{ASK_LOST_AFTER, MAX_MESSAGE_BYTES},
    presence::Epoch,
    sealed::{
        OpenKey, SOFT_AGE, SealKey, Sealed, initiation,
        noise::{Established, Handshake, Initiator, Responder},
        response,
    },
    wire::{decode, message::Message},
};

/// Age at which a session is dropped: an hour after its initiator stopped using it.
const DROPPED_AFTER: Duration = Duration::from_secs(2 * 3600);

/// Interval of looking for sessions to drop.
const SWEEP_EVERY: Duration = Duration::from_secs(600);

const LABEL: &[u8] = b"peerfleet sealed session v1";

/// All sessions, by our index.
pub(super) struct Sessions {
    by_index: BTreeMap<u32, Session>,
    next: u32,
}

/// One session, or what will be one.
struct Session {
    remote: InstanceId,
    state: State,
}

enum State {
    /// We began it, and `rider` travels in the first message.
    Opening {
        initiator: Initiator,
        rider: RequestId,
    },
    Open(Box<Open>),
}

/// An established session.
struct Open {
    role: Role,
    seal: SealKey,
    open: OpenKey,
    since: Instant,
    heard: Instant,
    /// The other side may have dropped it: a new one is begun for the next ask.
    is_retired: bool,
}

/// Who began a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// We did: we ask, the other side answers.
    Asker,
    /// The other side did.
    Host,
}

/// How to get a message of ours to an instance.
pub(super) enum Way {
    /// By this session.
    Session(u32),
    /// A session is being opened: wait for it.
    Opening,
    /// A session must be begun.
    None,
}

impl Sessions {
    pub(super) fn new(next: u32) -> Self {
        Self { by_index: BTreeMap::new(), next }
    }

    fn insert(&mut self, index: u32, remote: InstanceId, state: State) {
        self.by_index.insert(index, Session { remote, state });
    }

    /// An index that is not in use.
    fn draw_index(&mut self) -> u32 {
        loop {
            self.next = self.next.wrapping_add(1);
            if !self.by_index.contains_key(&self.next) {
                return self.next;
            }
        }
    }

    fn remove(&mut self, index: u32) {
        self.by_index.remove(&index);
    }

    fn open(&self, index: u32) -> Option<&Open> {
        match &self.by_index.get(&index)?.state {
            State::Opening { .. } => None,
            State::Open(open) => Some(open),
        }
    }

    fn open_mut(&mut self, index: u32) -> Option<(InstanceId, &mut Open)> {
        let session = self.by_index.get_mut(&index)?;
        match &mut session.state {
            State::Opening { .. } => None,
            State::Open(open) => Some((session.remote, open)),
        }
    }

    /// The ask that travels in the first message of a session being opened.
    pub(super) fn rider(&self, index: u32) -> Option<RequestId> {
        match self.by_index.get(&index)?.state {
            State::Opening { rider, .. } => Some(rider),
            State::Open(_) => None,
        }
    }
}

impl Exchange {
    pub(super) fn handle_sealed(
        &mut self,
        from: Slot,
        sealed: &[u8],
        shared: Option<&[u8]>,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> Result<(), Dropped> {
        match Sealed::split(sealed)? {
            Sealed::Initiation { sender, noise } => {
                let (remote, via, words) = self.accept_session(from, sender, noise, now, rng)?;
                self.handle_words(remote, Role::Host, via, &words, shared, now)
            }
            Sealed::Response { receiver, sender, noise } => self.establish(receiver, sender, noise, now, rng),
            Sealed::Transport { receiver, counter, header, ciphertext } => {
                let (remote, open) = self.sessions.open_mut(receiver).ok_or(Dropped::UnknownSession)?;
                let words = open.open.open(counter, header, ciphertext)?;
                open.heard = now;
                let role = open.role;
                self.handle_words(remote, role, receiver, &words, shared, now)
            }
        }
    }

    fn handle_words(
        &mut self,
        remote: InstanceId,
        role: Role,
        via: u32,
        words: &[u8],
        shared: Option<&[u8]>,
        now: Instant,
    ) -> Result<(), Dropped> {
        let message = decode(words, MAX_MESSAGE_BYTES)?;
        match (role, message) {
            (Role::Host, Message::Ask { id, numbering, request }) if shared.is_none() => {
                self.take_ask(remote, via, NewAsk { id, numbering, request }, now)
            }
            (Role::Host, Message::AskShared { id, numbering, key, digest }) => {
                let request = Shared::open(&key, &digest, shared.ok_or(Misbehaved::OutOfTurn)?)?;
                self.take_ask(remote, via, NewAsk { id, numbering, request }, now)
            }
            (Role::Host, Message::Poll { id, number, settled }) => {
                self.take_poll(remote, via, id, number, settled, now)
            }
            (Role::Asker, Message::Accepted { id }) => self.take_accepted(remote, id, now),
            (Role::Asker, Message::Answer { id, outcome }) => self.take_answer(remote, id, outcome),
            (Role::Asker, Message::Busy { id }) => self.take_refusal(remote, id, AskFault::Busy),
            (Role::Asker, Message::Forgotten { id }) => self.take_refusal(remote, id, AskFault::Lost),
            (Role::Host | Role::Asker, _) => Err(Misbehaved::OutOfTurn.into()),
        }
    }

    /// Reads a first message, answers it, and gives what it carries.
    fn accept_session(
        &mut self,
        from: Slot,
        sender: u32,
        noise: &[u8],
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> Result<(InstanceId, u32, Vec<u8>), Dropped> {
        let initiator = *self.slots.get(&from).ok_or(Dropped::UnknownSender)?;
        let remote = self.remotes.get_mut(&initiator).ok_or(Dropped::UnknownSender)?;
        if !remote.budget.take(now) {
            return Err(Dropped::OverBudget);
        }
        let address = remote.address;
        let (epoch, responder, payload) = self.read_initiation(address, sender, noise)?;
        // The prologue binds both already; that what is proved is what the roster says is checked all the same.
        let (instance, words) = payload.split_first_chunk().ok_or(Misbehaved::Forged)?;
        let peer = PeerId::from_bytes(*responder.remote_identity());
        if address != (Address { peer, instance: InstanceId::from_bytes(*instance) }) {
            return Err(Dropped::Forged);
        }
        self.epochs.take(epoch, responder.remote_ephemeral()).map_err(|not_new| match not_new {
            NotNew::Repeated => Dropped::Repeated,
            NotNew::Full => Dropped::OverBudget,
        })?;
        if self.epochs.is_filling() {
            self.new_epoch(now, rng);
        }
        let index = self.sessions.draw_index();
        let ephemeral = StaticSecret::random_from_rng(rng);
        // The responder's index is repeated where it is proved: a relay cannot point the session elsewhere.
        let (answer, keys) = responder.answer(&ephemeral, &index.to_be_bytes())?;
        self.transmit(from, &response(sender, index, &answer));
        self.keep_session(index, initiator, Role::Host, &keys, sender, now);
        Ok((initiator, index, words.to_vec()))
    }

    fn read_initiation(
        &self,
        initiator: Address,
        sender: u32,
        noise: &[u8],
    ) -> Result<(Epoch, Responder, Vec<u8>), Dropped> {
        let mut fault = Misbehaved::Forged;
        for epoch in self.epochs.accepted() {
            let prologue = self.prologue(initiator, self.me, epoch, sender);
            let handshake = Handshake { prologue: &prologue, psk: &self.psk, identity: &self.identity };
            match Responder::read(&handshake, noise) {
                Ok((responder, payload)) => return Ok((epoch, responder, payload)),
                Err(other) => fault = other,
            }
        }
        Err(fault.into())
    }

    /// Reads the answer to a first message of ours, and sends what waited for the session.
    fn establish(
        &mut self,
        index: u32,
        sender: u32,
        noise: &[u8],
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> Result<(), Dropped> {
        let session = self.sessions.by_index.get(&index).ok_or(Dropped::UnknownSession)?;
        let State::Opening { initiator, rider } = &session.state else { return Err(Misbehaved::OutOfTurn.into()) };
        let (payload, keys) = initiator.finish(noise)?;
        if payload != sender.to_be_bytes() {
            return Err(Misbehaved::Forged.into());
        }
        let (remote, rider) = (session.remote, *rider);
        self.stop_opening(remote);
        self.keep_session(index, remote, Role::Asker, &keys, sender, now);
        self.session_opened(remote, rider, now, rng);
        Ok(())
    }

    fn keep_session(
        &mut self,
        index: u32,
        remote: InstanceId,
        role: Role,
        keys: &Established,
        receiver: u32,
        now: Instant,
    ) {
        let (ours, theirs) = match role {
            Role::Asker => (&keys.forward, &keys.backward),
            Role::Host => (&keys.backward, &keys.forward),
        };
        let open = Open {
            role,
            seal: SealKey::new(ours, receiver),
            open: OpenKey::new(theirs),
            since: now,
            heard: now,
            is_retired: false,
        };
        self.sessions.insert(index, remote, State::Open(Box::new(open)));
        let Some(known) = self.remotes.get_mut(&remote) else { return };
        let sessions = match role {
            Role::Asker => &mut known.opened,
            Role::Host => &mut known.accepted,
        };
        sessions.push(index);
        if sessions.len() > SESSIONS {
            self.sessions.remove(sessions.remove(0));
        }
        if !self.timers.is_set(Timer::Sessions) {
            self.timers.set(Timer::Sessions, now + SWEEP_EVERY);
        }
    }

    /// How a message of ours gets to an instance now. `mute_since`: what was sent then came to nothing, and what was sent
    /// before; so a session by which nothing else was heard since is given up.
    pub(super) fn way_to(&self, to: InstanceId, mute_since: Option<Instant>, now: Instant) -> Way {
        let Some(remote) = self.remotes.get(&to) else { return Way::None };
        if !remote.openings.is_empty() {
            return Way::Opening;
        }
        let newest = remote.opened.last().and_then(|index| Some((*index, self.sessions.open(*index)?)));
        match newest {
            Some((index, open))
                if !open.is_retired
                    && !open.seal.is_worn()
                    && now.saturating_duration_since(open.since) < SOFT_AGE
                    && mute_since.is_none_or(|since| open.heard > since) =>
            {
                Way::Session(index)
            }
            Some(_) | None => Way::None,
        }
    }

    /// An instance came back. If nothing was heard by the session with it for so long that it may have forgotten us, the
    /// next ask begins a new one, which costs no round trip; the old one may still bring answers.
    pub(super) fn retire_quiet_session(&mut self, with: InstanceId, now: Instant) {
        let newest = self.remotes.get(&with).and_then(|remote| remote.opened.last().copied());
        if let Some((_, open)) = newest.and_then(|index| self.sessions.open_mut(index)) {
            open.is_retired |= now.saturating_duration_since(open.heard) >= ASK_LOST_AFTER;
        }
    }

    /// Seals a message for a session; `None` if there is no such session, or its key is used up.
    pub(super) fn seal(&mut self, index: u32, words: &[u8]) -> Option<Vec<u8>> {
        self.sessions.open_mut(index)?.1.seal.seal(words)
    }

    /// The session that an instance began last.
    pub(super) fn newest_accepted(&self, remote: InstanceId) -> Option<u32> {
        self.remotes.get(&remote)?.accepted.last().copied()
    }

    pub(super) fn is_session_of(&self, index: u32, remote: InstanceId) -> bool {
        self.sessions.by_index.get(&index).is_some_and(|session| session.remote == remote)
    }

    /// The first message of a new session, which carries these words of an ask.
    pub(super) fn begin_session(
        &mut self,
        to: InstanceId,
        rider: RequestId,
        words: &[u8],
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> Option<Vec<u8>> {
        let index = self.sessions.draw_index();
        let Remote { address, epoch, .. } = self.remotes.get(&to)?;
        let prologue = self.prologue(self.me, *address, *epoch, index);
        let handshake = Handshake { prologue: &prologue, psk: &self.psk, identity: &self.identity };
        let payload = [self.me.instance.as_bytes(), words].concat();
        let ephemeral = StaticSecret::random_from_rng(rng);
        // An identity of low order proved nothing to the relay: whoever it is, there is no asking it.
        let (initiator, noise) = Initiator::begin(&handshake, ephemeral, address.peer.as_bytes(), &payload).ok()?;
        self.sessions.insert(index, to, State::Opening { initiator, rider });
        let remote = self.remotes.get_mut(&to)?;
        remote.openings.push(index);
        remote.begun = remote.begun.saturating_add(1);
        self.timers.set(Timer::Begin(to), now + repeat_after(remote.begun));
        if remote.openings.len() > OPENINGS {
            self.sessions.remove(remote.openings.remove(0));
        }
        Some(initiation(index, &noise))
    }

    /// Gives up the sessions being opened to an instance.
    pub(super) fn stop_opening(&mut self, to: InstanceId) {
        self.timers.cancel(Timer::Begin(to));
        let Some(remote) = self.remotes.get_mut(&to) else { return };
        remote.begun = 0;
        for index in remote.openings.drain(..) {
            self.sessions.remove(index);
        }
    }

    pub(super) fn close_sessions(&mut self, with: InstanceId) {
        self.stop_opening(with);
        let Some(remote) = self.remotes.get_mut(&with) else { return };
        for index in remote.opened.drain(..).chain(remote.accepted.drain(..)) {
            self.sessions.remove(index);
        }
    }

    pub(super) fn drop_old_sessions(&mut self, now: Instant) {
        self.sessions.by_index.retain(|_, session| match &session.state {
            State::Opening { .. } => true,
            State::Open(open) => now.saturating_duration_since(open.since) < DROPPED_AFTER,
        });
        let sessions = &self.sessions.by_index;
        for remote in self.remotes.values_mut() {
            remote.opened.retain(|index| sessions.contains_key(index));
            remote.accepted.retain(|index| sessions.contains_key(index));
        }
        if !sessions.is_empty() {
            self.timers.set(Timer::Sessions, now + SWEEP_EVERY);
        }
    }

    fn prologue(&self, initiator: Address, responder: Address, epoch: Epoch, index: u32) -> Vec<u8> {
        [
            LABEL,
            self.room.as_bytes(),
            initiator.peer.as_bytes(),
            initiator.instance.as_bytes(),
            responder.peer.as_bytes(),
            responder.instance.as_bytes(),
            &epoch.0,
            &index.to_be_bytes(),
        ]
        .concat()
    }
}
