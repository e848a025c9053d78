//! Sessions: begun, answered, replaced, forgotten.

use std::time::Instant;

use rand_core::CryptoRng;
use x25519_dalek::StaticSecret;

use super::{
    Address, AskFault, Event, Exchange,
    remote::{MAX_INCOMING, MAX_PENDING, Pending, Role, Session},
};
use crate::{
    id::{InstanceId, RequestId, RoomId, Slot},
    limits::ASK_RETRY_FIRST,
    presence::Epoch,
    sealed::{
        OpenKey, SealKey, Sealed, initiation,
        noise::{Handshake, Initiator, Responder},
        response,
    },
    wire::relay::message,
};

const PROLOGUE_LABEL: &[u8] = b"peerfleet sealed messages v1";

impl Exchange {
    /// Seals by the outgoing session, or in the first message of a new one; `None` if one is being made already.
    pub(super) fn seal(
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

    /// The other side may have forgotten the session: what was sent by it got no word back. Answers it may still bring.
    pub(super) fn retire_if_silent(&mut self, to: InstanceId, since: Instant) {
        let Some(remote) = self.remotes.get_mut(&to) else { return };
        let session = remote.outgoing.and_then(|index| self.sessions.get(&index));
        if session.is_some_and(|session| session.heard <= since) {
            let before = remote.outgoing.take();
            if let Some(oldest) = std::mem::replace(&mut remote.outgoing_before, before) {
                self.sessions.remove(&oldest);
            }
        }
    }

    pub(super) fn begin_session(
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
    pub(super) fn drop_pending(&mut self, instance: InstanceId) {
        let Some(remote) = self.remotes.get_mut(&instance) else { return };
        for index in remote.pending.drain(..) {
            self.pending.remove(&index);
        }
    }

    /// Random, so that an index tells nothing and old messages meet no new session by chance.
    pub(super) fn free_index(&self, rng: &mut impl CryptoRng) -> u32 {
        loop {
            let index = rng.next_u32();
            if !self.sessions.contains_key(&index) && !self.pending.contains_key(&index) {
                return index;
            }
        }
    }

    pub(super) fn handle_sealed(
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
                    session.heard = now;
                    self.deliver(receiver, &plain, shared, now);
                }
            }
            // Whoever sent it repeats what it wanted.
            Err(_) => {}
        }
    }

    pub(super) fn handle_initiation(
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
        let session = Session { remote: address.instance, role: Role::Responder, seal, open, since: now, heard: now };
        self.sessions.insert(index, session);
        if let Some(remote) = self.remotes.get_mut(&address.instance) {
            remote.incoming.push_back(index);
            if remote.incoming.len() > MAX_INCOMING {
                remote.incoming.pop_front().and_then(|oldest| self.sessions.remove(&oldest));
            }
        }
        self.transmits.push_back(message(from, 0, &response(sender, index, &answer)));
        self.deliver(index, &plain, shared, now);
        self.renew_epoch_if_due(now, rng);
    }

    /// The relay says who sent it; under another prologue than the sender's nothing verifies.
    pub(super) fn read_initiation(&self, sender: &Address, noise: &[u8]) -> Option<(Epoch, Responder, Vec<u8>)> {
        self.epochs.accepted().find_map(|epoch| {
            let prologue = prologue(&self.config.room, sender, &self.config.me, epoch);
            let handshake = Handshake { prologue: &prologue, psk: &self.config.psk, identity: &self.identity };
            let (responder, plain) = Responder::read(&handshake, noise).ok()?;
            Some((epoch, responder, plain))
        })
    }

    pub(super) fn handle_response(
        &mut self,
        receiver: u32,
        sender: u32,
        noise: &[u8],
        now: Instant,
        rng: &mut impl CryptoRng,
    ) {
        let Some(pending) = self.pending.get(&receiver) else { return };
        let Ok((_, keys)) = pending.initiator.finish(noise) else { return };
        let instance = pending.remote;
        self.pending.remove(&receiver);
        let (seal, open) = (SealKey::new(&keys.forward, sender), OpenKey::new(&keys.backward));
        self.sessions
            .insert(receiver, Session { remote: instance, role: Role::Initiator, seal, open, since: now, heard: now });
        let Some(remote) = self.remotes.get_mut(&instance) else { return };
        remote.pending.retain(|index| *index != receiver);
        if let Some(before) = remote.outgoing.replace(receiver)
            && let Some(oldest) = remote.outgoing_before.replace(before)
        {
            self.sessions.remove(&oldest);
        }
        for id in std::mem::take(&mut remote.waiting) {
            self.send(id, now, rng);
        }
    }

    /// Sends a reply by the session that the request came by; if that is gone, the asking side asks again by another.
    pub(super) fn reply(&mut self, session: u32, plain: &[u8]) {
        let Some(session) = self.sessions.get_mut(&session) else { return };
        let Some(slot) = self.remotes.get(&session.remote).and_then(|remote| remote.slot) else { return };
        if let Some(sealed) = session.seal.seal(plain) {
            self.transmits.push_back(message(slot, 0, &sealed));
        }
    }

    pub(super) fn forget_remote(&mut self, instance: InstanceId) {
        self.remotes.remove(&instance);
        self.sessions.retain(|_, session| session.remote != instance);
        self.pending.retain(|_, pending| pending.remote != instance);
        self.asks_to(instance).into_iter().for_each(|id| self.fail(id, AskFault::Lost));
    }

    pub(super) fn renew_epoch_if_due(&mut self, now: Instant, rng: &mut impl CryptoRng) {
        if self.epochs.is_due(now) {
            let epoch = self.epochs.renew(rng, now);
            self.events.push_back(Event::EpochChanged(epoch));
        }
    }
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
