//! What an agent does with a datagram: the other side's checks are answered, answers to ours are measured.
//!
//! In: datagrams and where they came from. Out: answers, and word of proved pairs for [`super::watch`]. What is not
//! authentic, fresh and from where it can be from moves nothing.

use std::{net::SocketAddr, time::Instant};

use super::{Agent, Handled, Ignored, MAX_QUEUED, State, Transmit, candidate, transaction::Unasked};
use crate::stun::{Class, Message};

impl Agent {
    /// Takes a datagram whose first byte says STUN ([`crate::stun::is_stun`]).
    pub fn handle_packet(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> Handled {
        self.receive(from, bytes, false, now)
    }

    /// Takes a check that came before this agent was made: the other side knew the key first. It is checked back and not answered,
    /// for it would show a longer round trip than there is.
    pub fn handle_early_packet(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> Handled {
        self.receive(from, bytes, true, now)
    }

    fn receive(&mut self, from: SocketAddr, bytes: &[u8], is_early: bool, now: Instant) -> Handled {
        let from = candidate::canonical(from);
        let handled = match Message::parse(bytes) {
            Err(fault) => Err(Ignored::Malformed(fault)),
            Ok(message) if !message.is_binding() => Err(Ignored::NotOurs),
            Ok(message) => match message.class() {
                Class::Request if is_early => self.handle_early_check(from, &message, now),
                Class::Request => self.handle_check(from, &message, bytes.len(), now),
                Class::Success => self.handle_answer(from, &message, now),
                Class::Indication | Class::Error => Err(Ignored::NotOurs),
            },
        };
        if let (Err(Ignored::Forged), Some(pair)) = (&handled, self.pairs.get_mut(&from)) {
            pair.tally.forged = true;
        }
        self.drive(now);
        handled.unwrap_or_else(Handled::Ignored)
    }

    fn handle_check(
        &mut self,
        from: SocketAddr,
        check: &Message<'_>,
        length: usize,
        now: Instant,
    ) -> Result<Handled, Ignored> {
        self.codec.admit(check)?;
        if !candidate::is_usable(from) {
            return Err(Ignored::WrongSource);
        }
        let bytes = self.codec.answer(check.transaction(), from);
        if self.outbox.len() >= MAX_QUEUED || bytes.len() > length {
            return Err(Ignored::NoAnswer);
        }
        self.outbox.push_back(Transmit { to: from, bytes });
        self.check_back(from, now);
        Ok(Handled::Check)
    }

    fn handle_early_check(&mut self, from: SocketAddr, check: &Message<'_>, now: Instant) -> Result<Handled, Ignored> {
        self.codec.admit(check)?;
        if !candidate::is_usable(from) {
            return Err(Ignored::WrongSource);
        }
        self.check_back(from, now);
        Ok(Handled::Check)
    }

    /// The other side can send from there: can we send to there?
    fn check_back(&mut self, from: SocketAddr, now: Instant) {
        let current = self.current();
        let Some(pair) = self.pairs.learn(from, current, now) else { return };
        pair.tally.heard = pair.tally.heard.saturating_add(1);
        let is_new = !pair.is_proved();
        match &mut self.state {
            State::Punching { .. } => pair.plan.check_back(now),
            State::Direct { current, .. } if current.addr == from => current.on_heard(now),
            State::Direct { current, .. } => {
                if !pair.is_fresh(now) {
                    pair.plan.trigger(now);
                }
                // It may have come to be seen from elsewhere, and then it is no longer where it was.
                let current = current.addr;
                if is_new && let Some(pair) = self.pairs.get_mut(&current) {
                    pair.plan.trigger(now);
                }
            }
        }
    }

    fn handle_answer(&mut self, from: SocketAddr, answer: &Message<'_>, now: Instant) -> Result<Handled, Ignored> {
        let asked_at = self.transactions.find(answer.transaction(), from, now).map_err(|unasked| match unasked {
            Unasked::Unknown => Ignored::NotOurs,
            Unasked::WrongSource => Ignored::WrongSource,
        })?;
        if !self.codec.is_authentic(answer) {
            return Err(Ignored::Forged);
        }
        if answer.unknown_required().is_some() {
            return Err(Ignored::UnknownAttribute);
        }
        self.transactions.end(answer.transaction());
        // The pair may be gone, if the other side no longer names it.
        if let Some(pair) = self.pairs.get_mut(&from) {
            let was_proved = pair.is_proved();
            pair.proved(now.saturating_duration_since(asked_at), now);
            let is_seen_anew = pair.is_seen_anew(answer.mapped_address().map(candidate::canonical));
            if self.current() == Some(from) {
                self.path_answered(is_seen_anew, now);
            } else {
                self.consider(from, was_proved, now);
            }
        }
        Ok(Handled::Answer)
    }
}
