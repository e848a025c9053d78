//! Our asks: sent, repeated until accepted, polled until answered, and ended in any case.

use std::time::{Duration, Instant};

use bytes::Bytes;
use rand_core::CryptoRng;

use super::{
    AskFault, Dropped, Event, Exchange, MAX_OUTSTANDING, multicast::Shared, repeat_after, sessions::Way, timers::Timer,
};
use crate::{
    fault::Misbehaved,
    id::{InstanceId, RequestId, Slot},
    limits::{ASK_CONNECT_DEADLINE, ASK_RETRY_MAX, MAX_MESSAGE_BYTES},
    presence::Epoch,
    request::{Outcome, Request},
    wire::{
        encode,
        message::{Message, Numbering, encode_ask},
    },
};

/// Most bytes of an ask around its request: kind, id, two numbers of at most 10 bytes, and an epoch.
const AROUND_REQUEST: usize = 1 + 16 + 10 + 10 + 16;

/// Longer than any process runs.
const NEVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Sends that nothing came back for, after which a session is taken to be gone on the other side.
const MUTE_AFTER: u32 = 2;

/// One ask under way.
pub(super) struct Ask {
    to: InstanceId,
    number: u64,
    request: Bytes,
    /// The host's epoch when it was first sent; `None` as long as nothing of it has left.
    born: Option<Epoch>,
    pub(super) is_accepted: bool,
    deadline: Instant,
    connect_by: Instant,
    /// Sends since something was heard of it.
    tries: u32,
    /// When the last of those was.
    sent_at: Instant,
    /// When to send it again; `None` while it waits for a session or a slot.
    send_at: Option<Instant>,
    /// Under which it was sent last.
    tag: Option<u32>,
}

impl Ask {
    fn wake_at(&self) -> Instant {
        let end = if self.is_accepted { self.deadline } else { self.deadline.min(self.connect_by) };
        self.send_at.map_or(end, |send_at| send_at.min(end))
    }
}

/// In which words to ask.
#[derive(Clone, Copy)]
pub(super) enum Words<'a> {
    /// All of the ask, or how it stands once it was accepted.
    Whole,
    /// As a share of a multicast.
    Shared(&'a Shared),
}

/// A new name for an ask.
pub(super) fn draw_id(rng: &mut impl CryptoRng) -> RequestId {
    let mut id = [0; RequestId::LEN];
    rng.fill_bytes(&mut id);
    RequestId::from_bytes(id)
}

impl Exchange {
    /// Asks one instance. It ends with [`Event::Answered`] or [`Event::Failed`], unless it is forgotten before.
    pub fn ask(
        &mut self,
        to: InstanceId,
        request: Request,
        deadline: Duration,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> RequestId {
        let id = draw_id(rng);
        if self.take_on(id, to, encode(&request).into(), deadline, now) {
            self.send_ask(id, now, rng);
        }
        id
    }

    /// The outcome of an ask is no longer wanted. The other side may carry it out all the same.
    pub fn forget(&mut self, id: RequestId) {
        self.end(id);
    }

    /// Makes an ask, or says why not.
    pub(super) fn take_on(
        &mut self,
        id: RequestId,
        to: InstanceId,
        request: Bytes,
        deadline: Duration,
        now: Instant,
    ) -> bool {
        let fault = match self.remotes.get_mut(&to) {
            None => AskFault::Unreachable,
            Some(_) if request.len() + AROUND_REQUEST > MAX_MESSAGE_BYTES => AskFault::TooLarge,
            Some(remote) if remote.outstanding.len() >= MAX_OUTSTANDING => AskFault::Busy,
            Some(remote) => {
                let number = remote.next_number;
                remote.next_number += 1;
                remote.outstanding.insert(number, id);
                self.next_number = self.next_number.max(remote.next_number);
                let ask = Ask {
                    to,
                    number,
                    request,
                    born: None,
                    is_accepted: false,
                    // An end that cannot be represented is as good as never.
                    deadline: now.checked_add(deadline).unwrap_or(now + NEVER),
                    connect_by: now + ASK_CONNECT_DEADLINE,
                    tries: 0,
                    sent_at: now,
                    send_at: None,
                    tag: None,
                };
                self.timers.set(Timer::Ask(id), ask.wake_at());
                self.asks.insert(id, ask);
                return true;
            }
        };
        self.events.push_back(Event::Failed { id, fault });
        false
    }

    /// Whether something can be sent to an instance at once: neither its slot nor a session is waited for.
    pub(super) fn can_send_to(&self, to: InstanceId) -> bool {
        self.remotes.get(&to).is_some_and(|remote| remote.slot.is_some() && remote.openings.is_empty())
    }

    /// Sends an ask, or again, if that can be done now.
    pub(super) fn send_ask(&mut self, id: RequestId, now: Instant, rng: &mut impl CryptoRng) {
        if let Some((slot, sealed)) = self.seal_ask(id, Words::Whole, now, rng) {
            let tag = self.transmit(slot, &sealed);
            self.ask_sent(id, tag, now);
        }
    }

    /// Seals an ask for the way that it can go now; `None` if it must wait for that.
    pub(super) fn seal_ask(
        &mut self,
        id: RequestId,
        words: Words<'_>,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> Option<(Slot, Vec<u8>)> {
        let ask = self.asks.get_mut(&id)?;
        ask.send_at = None;
        self.timers.set(Timer::Ask(id), ask.wake_at());
        let (to, mute_since) = (ask.to, (ask.tries >= MUTE_AFTER).then_some(ask.sent_at));
        let slot = self.remotes.get(&to)?.slot?;
        let sealed = match self.way_to(to, mute_since, now) {
            Way::Opening => None,
            Way::Session(index) => {
                let words = self.words(id, words)?;
                self.seal(index, &words)
            }
            Way::None => {
                let words = self.words(id, words)?;
                self.begin_session(to, id, &words, now, rng)
            }
        };
        Some((slot, sealed?))
    }

    fn words(&mut self, id: RequestId, words: Words<'_>) -> Option<Vec<u8>> {
        let ask = self.asks.get_mut(&id)?;
        let remote = self.remotes.get(&ask.to)?;
        let (number, settled) = (ask.number, remote.settled());
        if ask.is_accepted {
            return Some(encode(&Message::Poll { id, number, settled }));
        }
        let numbering = Numbering { number, settled, born: *ask.born.get_or_insert(remote.epoch) };
        Some(match words {
            Words::Whole => encode_ask(id, &numbering, &ask.request),
            Words::Shared(Shared { key, digest, .. }) => {
                encode(&Message::AskShared { id, numbering, key: **key, digest: *digest })
            }
        })
    }

    /// An ask was put on its way under this tag.
    pub(super) fn ask_sent(&mut self, id: RequestId, tag: u32, now: Instant) {
        let Some(ask) = self.asks.get_mut(&id) else { return };
        ask.sent_at = now;
        ask.tries = ask.tries.saturating_add(1);
        ask.tag = Some(tag);
        // What rides in a first message is repeated with it.
        let is_opening = self.remotes.get(&ask.to).is_some_and(|remote| !remote.openings.is_empty());
        let pause = if ask.is_accepted { ASK_RETRY_MAX } else { repeat_after(ask.tries) };
        ask.send_at = (!is_opening).then_some(now + pause);
        self.timers.set(Timer::Ask(id), ask.wake_at());
    }

    /// The relay's queue for the receiver was full: try again then.
    pub(super) fn ask_refused(&mut self, to: InstanceId, tag: u32, again: Instant) {
        let Some(remote) = self.remotes.get_mut(&to) else { return };
        for id in remote.outstanding.values() {
            let Some(ask) = self.asks.get_mut(id).filter(|ask| ask.tag == Some(tag)) else { continue };
            ask.tag = None;
            ask.tries = ask.tries.saturating_sub(1);
            if remote.openings.iter().any(|index| self.sessions.rider(*index) == Some(*id)) {
                remote.begun = remote.begun.saturating_sub(1);
                self.timers.set_sooner(Timer::Begin(to), again);
            } else {
                ask.send_at = Some(again);
                self.timers.set(Timer::Ask(*id), ask.wake_at());
            }
            return;
        }
    }

    /// An instance can be sent to (again): everything under way to it is sent (again).
    pub(super) fn resume(&mut self, to: InstanceId, now: Instant, rng: &mut impl CryptoRng) {
        self.retire_quiet_session(to, now);
        let Some(remote) = self.remotes.get(&to) else { return };
        if !remote.openings.is_empty() {
            self.begin_due(to, now, rng);
            return;
        }
        let under_way: Vec<RequestId> = remote.outstanding.values().copied().collect();
        for id in under_way {
            self.asks.get_mut(&id).into_iter().for_each(|ask| ask.tries = 0);
            self.send_ask(id, now, rng);
        }
    }

    /// An instance has a new epoch: first messages that went unanswered for long may have been under one that no longer
    /// counts.
    pub(super) fn retry_opening(&mut self, to: InstanceId, now: Instant, rng: &mut impl CryptoRng) {
        if self.remotes.get(&to).is_some_and(|remote| remote.begun >= 2 && !remote.openings.is_empty()) {
            self.begin_due(to, now, rng);
        }
    }

    /// A session was established with this rider in its first message: everything that waited for it is sent.
    pub(super) fn session_opened(
        &mut self,
        with: InstanceId,
        rider: RequestId,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) {
        let Some(remote) = self.remotes.get(&with) else { return };
        let waiting: Vec<RequestId> = remote.outstanding.values().copied().collect();
        for id in waiting {
            let Some(ask) = self.asks.get_mut(&id) else { continue };
            let has_arrived = id == rider && ask.tries > 0;
            ask.tries = u32::from(has_arrived);
            ask.sent_at = now;
            if has_arrived {
                ask.send_at = Some(now + repeat_after(1));
                self.timers.set(Timer::Ask(id), ask.wake_at());
            } else if ask.send_at.is_none() || !ask.is_accepted {
                self.send_ask(id, now, rng);
            }
        }
    }

    pub(super) fn ask_due(&mut self, id: RequestId, now: Instant, rng: &mut impl CryptoRng) {
        let Some(ask) = self.asks.get(&id) else { return };
        if ask.is_accepted && now >= ask.deadline {
            self.fail(id, AskFault::DeadlineExceeded);
        } else if !ask.is_accepted && now >= ask.deadline.min(ask.connect_by) {
            self.give_up(id);
        } else {
            self.send_ask(id, now, rng);
        }
    }

    /// A first message went unanswered, or its time has come: it is sent anew, with the oldest ask that is not accepted.
    pub(super) fn begin_due(&mut self, to: InstanceId, now: Instant, rng: &mut impl CryptoRng) {
        let Some(remote) = self.remotes.get(&to) else { return };
        let mut asks = remote.outstanding.values().filter_map(|id| Some((*id, self.asks.get(id)?)));
        let waiting = asks.clone().find(|(_, ask)| !ask.is_accepted).or_else(|| asks.next());
        let (Some((rider, _)), Some(slot)) = (waiting, remote.slot) else {
            // Nobody to ask for, or nowhere to send: the next ask or the next slot begins anew.
            self.stop_opening(to);
            return;
        };
        let Some(words) = self.words(rider, Words::Whole) else { return };
        if let Some(sealed) = self.begin_session(to, rider, &words, now, rng) {
            let tag = self.transmit(slot, &sealed);
            self.ask_sent(rider, tag, now);
        }
    }

    pub(super) fn take_accepted(&mut self, from: InstanceId, id: RequestId, now: Instant) -> Result<(), Dropped> {
        let ask = self.ask_of(from, id)?;
        (ask.tries, ask.send_at) = (0, Some(now + ASK_RETRY_MAX));
        let is_news = !std::mem::replace(&mut ask.is_accepted, true);
        let wake_at = ask.wake_at();
        self.timers.set(Timer::Ask(id), wake_at);
        if is_news {
            self.events.push_back(Event::Accepted { id });
        }
        Ok(())
    }

    pub(super) fn take_answer(&mut self, from: InstanceId, id: RequestId, outcome: Outcome) -> Result<(), Dropped> {
        self.ask_of(from, id)?;
        self.end(id);
        self.events.push_back(Event::Answered { id, outcome });
        Ok(())
    }

    pub(super) fn take_refusal(&mut self, from: InstanceId, id: RequestId, fault: AskFault) -> Result<(), Dropped> {
        self.ask_of(from, id)?;
        self.fail(id, fault);
        Ok(())
    }

    /// An ask of ours to this instance; others' answers are none.
    fn ask_of(&mut self, from: InstanceId, id: RequestId) -> Result<&mut Ask, Dropped> {
        self.asks.get_mut(&id).filter(|ask| ask.to == from).ok_or(Misbehaved::OutOfTurn.into())
    }

    /// Nothing more can be expected of an ask. What was sent once may have been taken, whatever came back: a relay can
    /// deliver an ask, say that it did not, and drop every word of the host.
    pub(super) fn give_up(&mut self, id: RequestId) {
        let was_sent = self.asks.get(&id).is_some_and(|ask| ask.born.is_some());
        self.fail(id, if was_sent { AskFault::Lost } else { AskFault::Unreachable });
    }

    pub(super) fn fail(&mut self, id: RequestId, fault: AskFault) {
        if self.end(id) {
            self.events.push_back(Event::Failed { id, fault });
        }
    }

    fn end(&mut self, id: RequestId) -> bool {
        let Some(ask) = self.asks.remove(&id) else { return false };
        self.timers.cancel(Timer::Ask(id));
        if let Some(remote) = self.remotes.get_mut(&ask.to) {
            remote.outstanding.remove(&ask.number);
        }
        true
    }
}
