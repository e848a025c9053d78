//! What sessions bring: asks of others, and what becomes of ours.

use std::time::Instant;

use aes_gcm::aead::{Aead, Payload};

use super::{
    ACCEPT_AFTER, AskFault, Event, Exchange, SHARED_LABEL, Timer,
    answers::Verdict,
    remote::{Role, Session},
};
use crate::{
    id::{InstanceId, RequestId},
    limits::MAX_MESSAGE_BYTES,
    request::{Outcome, Request},
    sealed::noise::{cipher, nonce},
    wire::{decode, encode, message::Message},
};

impl Exchange {
    pub(super) fn deliver(&mut self, session: u32, plain: &[u8], shared: Option<&[u8]>, now: Instant) {
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
    let payload = Payload { msg: shared, aad: SHARED_LABEL };
    let plain = cipher(key).decrypt(&nonce(0).into(), payload).ok()?;
    decode(&plain, MAX_MESSAGE_BYTES).ok()
}
