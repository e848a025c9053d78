//! Asks of ours: sent, repeated, given up.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use aes_gcm::aead::{Aead, Payload};
use rand_core::CryptoRng;
use zeroize::Zeroizing;

use super::{AskFault, Event, Exchange, SHARED_LABEL, Timer, ask::Ask, remote::Remote};
use crate::{
    id::{InstanceId, RequestId, Slot},
    limits::{MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, MAX_MULTICAST},
    request::Request,
    sealed::noise::{cipher, nonce},
    wire::{
        encode,
        message::Message,
        relay::{message, multicast},
    },
};

/// Bytes that a multicast takes for each recipient: slot, length, and a share that begins a session.
const SHARE_BYTES: usize = 6 + 256;

impl Exchange {
    pub(super) fn begin_ask(
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

    pub(super) fn asks_to(&self, instance: InstanceId) -> Vec<RequestId> {
        self.asks.iter().filter(|(_, ask)| ask.to == instance).map(|(id, _)| *id).collect()
    }

    pub(super) fn with_ask(&mut self, id: RequestId, change: impl FnOnce(&mut Ask)) {
        if let Some(ask) = self.asks.get_mut(&id) {
            change(ask);
        }
    }

    pub(super) fn look_after(&mut self, id: RequestId, now: Instant, rng: &mut impl CryptoRng) {
        let Some(ask) = self.asks.get(&id) else { return };
        match ask.fault(now) {
            Some(fault) => self.fail(id, fault),
            None => self.send(id, now, rng),
        }
    }

    pub(super) fn fail(&mut self, id: RequestId, fault: AskFault) {
        if self.end_ask(id).is_some() {
            self.events.push_back(Event::Failed { id, fault });
        }
    }

    pub(super) fn end_ask(&mut self, id: RequestId) -> Option<Ask> {
        let ask = self.asks.remove(&id)?;
        self.timers.remove(&(ask.wake, Timer::Ask(id)));
        ask.sent.and_then(|sent| self.tags.remove(&sent));
        Some(ask)
    }

    /// Sends an ask by a session, by beginning one, or leaves it to wait for one.
    pub(super) fn send(&mut self, id: RequestId, now: Instant, rng: &mut impl CryptoRng) {
        let Some(ask) = self.asks.get(&id) else { return };
        let (to, request) = (ask.to, ask.request.clone());
        if let Some(last_sent) = ask.last_sent {
            self.retire_if_silent(to, last_sent);
        }
        if let Some(slot) = self.remotes.get(&to).and_then(|remote| remote.slot) {
            let settled = self.remotes.get_mut(&to).map(Remote::take_settled).unwrap_or_default();
            let plain = encode(&Message::Ask { id, settled, request: (*request).clone() });
            if plain.len() > MAX_MESSAGE_BYTES {
                return self.fail(id, AskFault::TooLarge);
            }
            if let Some(sealed) = self.seal(to, &plain, id, now, rng) {
                let tag = self.take_tag();
                self.transmits.push_back(message(slot, tag, &sealed));
                self.mark_sent(id, tag, slot, now);
            }
        }
        self.reschedule(id, now);
    }

    /// Sends one request to all who are in the room, sealed once; each gets the key in a part of its own.
    pub(super) fn multicast(&mut self, ids: &[RequestId], request: &Request, now: Instant, rng: &mut impl CryptoRng) {
        let mut key = Zeroizing::new([0; 32]);
        rng.fill_bytes(key.as_mut());
        let payload = Payload { msg: &encode(request), aad: SHARED_LABEL };
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
                    self.mark_sent(*id, tag, slot, now);
                }
                self.reschedule(*id, now);
            }
            let parts = parts.iter().map(|(slot, sealed)| (*slot, &sealed[..]));
            self.transmits.push_back(multicast(tag, parts, &shared));
        }
    }

    pub(super) fn take_tag(&mut self) -> u32 {
        // Zero is what replies have: their refusal concerns nobody.
        self.next_tag = self.next_tag.checked_add(1).unwrap_or(1);
        self.next_tag
    }

    pub(super) fn mark_sent(&mut self, id: RequestId, tag: u32, slot: Slot, now: Instant) {
        let Some(ask) = self.asks.get_mut(&id) else { return };
        ask.attempts += 1;
        ask.last_sent = Some(now);
        if let Some(before) = ask.sent.replace((tag, slot)) {
            self.tags.remove(&before);
        }
        self.tags.insert((tag, slot), id);
    }

    pub(super) fn reschedule(&mut self, id: RequestId, now: Instant) {
        let Some(ask) = self.asks.get_mut(&id) else { return };
        self.timers.remove(&(ask.wake, Timer::Ask(id)));
        ask.schedule(now);
        self.timers.insert((ask.wake, Timer::Ask(id)));
    }

    pub(super) fn wake_ask_at(&mut self, id: RequestId, at: Instant) {
        let Some(ask) = self.asks.get_mut(&id) else { return };
        self.timers.remove(&(ask.wake, Timer::Ask(id)));
        ask.wake = ask.wake.min(at);
        self.timers.insert((ask.wake, Timer::Ask(id)));
    }
}
