//! Which packets from outside a NAT or firewall lets in (RFC 4787 §5), learnt from one responder with two ports, in the way of
//! RFC 5780 §4.4.
//!
//! In: the responder and its other port, what comes to a socket made for asking, `now`. Out: requests to send from that socket, a
//! [`Filtering`], the next wake-up. It opens no socket, and contacts nobody but those two ports. The socket must be a new one:
//! one that has sent to the other port before would be let in from there by any filter.
//! Opening (the responder answers this socket, so there is a mapping) -> changing (it is asked to answer from its other port,
//! which this socket has never sent to) -> confirming (nothing came: is it the filter, or does that port answer nobody?) ->
//! known. A responder that answers from where it was asked, as those do that do not know the question, or that refuses it,
//! ends it: nothing is said then, because nothing is known.
//! What one address cannot tell is whether packets of any address would be let in: that is [`Filtering::PortIndependent`].
//! Bounds: three requests to open, [`CHANGES`] to change, three to confirm; some 5 s if nothing answers at the end.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{Handled, Ignored, Transmit, answer::Answer, candidate::canonical, transaction::Transactions};
use crate::stun::{Class, Draft, Message};

pub use crate::request::network::Filtering;

/// Requests for an answer from the other port. With one packet in ten lost each way, all of them or their answers get lost once
/// in 770 times; then the filter is told as stricter than it is.
pub const CHANGES: usize = 4;

/// Time between two of them: long against the burst in which a full queue drops packets.
pub const CHANGE_SPACING: Duration = Duration::from_millis(150);

/// How long an answer to the last of them is waited for at least.
pub const CHANGE_PATIENCE: Duration = Duration::from_millis(400);

/// How many round trips it is waited for, if that is longer.
pub const CHANGE_ROUND_TRIPS: u32 = 4;

/// Requests in the ordinary way, to open and to confirm, [`SPACING`] apart, the last of which is waited for twice as long.
pub const REQUESTS: usize = 3;

/// RFC 8489 §6.2.1: the first RTO.
pub const SPACING: Duration = Duration::from_millis(500);

/// Learns what is let in. It sends from one socket that nothing was sent from before.
///
/// After [`FilterTrial::new`] and every call that takes `now` drain [`FilterTrial::poll_transmit`], then sleep until
/// [`FilterTrial::poll_timeout`] and call [`FilterTrial::handle_timeout`]; when [`FilterTrial::outcome`] is there, close the socket.
#[derive(Debug)]
pub struct FilterTrial {
    responder: SocketAddr,
    other: SocketAddr,
    /// Requests of the ordinary kind.
    plain: Transactions,
    /// Requests for an answer from elsewhere; kept apart, because a late answer to one of them must confirm nothing.
    changed: Transactions,
    step: Step,
    rtt: Duration,
    outbox: VecDeque<Transmit>,
    now: Instant,
}

/// What is being done: so many requests were sent, and at that time something is due.
#[derive(Debug, Clone, Copy)]
enum Step {
    Opening { sent: usize, due: Instant },
    Changing { sent: usize, due: Instant },
    Confirming { sent: usize, due: Instant },
    Known(Filtering),
}

impl FilterTrial {
    /// Asks `responder`, which also answers on `other_port`. `seed`: 32 random bytes, used here alone.
    pub fn new(responder: SocketAddr, other_port: u16, seed: [u8; 32], now: Instant) -> Self {
        let responder = canonical(responder);
        let mut trial = Self {
            responder,
            other: SocketAddr::new(responder.ip(), other_port),
            plain: Transactions::new(blake3::derive_key("peerfleet v1 filter trial plain", &seed)),
            changed: Transactions::new(blake3::derive_key("peerfleet v1 filter trial changed", &seed)),
            step: Step::Opening { sent: 0, due: now },
            rtt: Duration::ZERO,
            outbox: VecDeque::new(),
            now,
        };
        trial.drive(now);
        trial
    }

    /// Takes a datagram that came to the socket.
    pub fn handle_packet(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> Handled {
        let from = canonical(from);
        let handled = match self.step {
            Step::Opening { .. } => self.opened(from, bytes, now),
            Step::Changing { .. } => self.changed(from, bytes, now),
            Step::Confirming { .. } => self.confirmed(from, bytes, now),
            Step::Known(_) => Err(Ignored::NotOurs),
        };
        self.drive(now);
        handled.map_or_else(Handled::Ignored, |()| Handled::Answer)
    }

    /// What to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.outbox.pop_front()
    }

    /// When to call [`FilterTrial::handle_timeout`]; never again when it is known.
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.step {
            Step::Opening { due, .. } | Step::Changing { due, .. } | Step::Confirming { due, .. } => {
                Some(if self.outbox.is_empty() { due } else { self.now })
            }
            Step::Known(_) => None,
        }
    }

    /// The time is now.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.drive(now);
    }

    /// What is let in, when that is known or never will be: [`Filtering::Unknown`] then.
    pub fn outcome(&self) -> Option<Filtering> {
        match self.step {
            Step::Known(filtering) => Some(filtering),
            Step::Opening { .. } | Step::Changing { .. } | Step::Confirming { .. } => None,
        }
    }

    fn opened(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> Result<(), Ignored> {
        let Answer { transaction, asked_at, .. } = Answer::read(&mut self.plain, from, bytes, now)?;
        self.plain.end(transaction);
        self.rtt = now.saturating_duration_since(asked_at);
        self.step = Step::Changing { sent: 0, due: now };
        Ok(())
    }

    /// An answer that was let in, from wherever it came: its random id proves that it is one.
    fn changed(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> Result<(), Ignored> {
        let answer = Message::parse(bytes).map_err(Ignored::Malformed)?;
        let is_answer = answer.is_binding() && matches!(answer.class(), Class::Success | Class::Error);
        // Whoever knows the id was sent the request. The address noted with it is the responder's, but it need not answer from there.
        if !is_answer || self.changed.find(answer.transaction(), self.responder, now).is_err() {
            return Err(Ignored::NotOurs);
        }
        self.step = Step::Known(if from == self.responder || answer.class() == Class::Error {
            Filtering::Unknown
        } else if from.ip() == self.responder.ip() {
            Filtering::PortIndependent
        } else {
            Filtering::EndpointIndependent
        });
        Ok(())
    }

    fn confirmed(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> Result<(), Ignored> {
        let Answer { transaction, .. } = Answer::read(&mut self.plain, from, bytes, now)?;
        if from != self.other {
            // A late answer to what opened the mapping.
            self.plain.end(transaction);
            return Err(Ignored::NotOurs);
        }
        self.step = Step::Known(Filtering::AddressAndPortDependent);
        Ok(())
    }

    fn drive(&mut self, now: Instant) {
        self.now = self.now.max(now);
        match self.step {
            Step::Opening { sent, due } if due <= now => match self.ask(sent, self.responder, now) {
                Some(due) => self.step = Step::Opening { sent: sent + 1, due },
                None => self.step = Step::Known(Filtering::Unknown),
            },
            Step::Changing { sent, due } if due <= now => self.step = self.change(sent, now),
            Step::Confirming { sent, due } if due <= now => match self.ask(sent, self.other, now) {
                Some(due) => self.step = Step::Confirming { sent: sent + 1, due },
                None => self.step = Step::Known(Filtering::Unknown),
            },
            Step::Opening { .. } | Step::Changing { .. } | Step::Confirming { .. } => {}
            Step::Known(_) => self.outbox.clear(),
        }
    }

    /// Sends an ordinary request after so many others; says when the next thing is due, or that there were enough.
    fn ask(&mut self, sent: usize, to: SocketAddr, now: Instant) -> Option<Instant> {
        if sent >= REQUESTS {
            return None;
        }
        let bytes = Draft::new(Class::Request, self.plain.begin(to, now)).padding().finish();
        self.outbox.push_back(Transmit { to, bytes });
        Some(now + if sent + 1 < REQUESTS { SPACING } else { 2 * SPACING })
    }

    fn change(&mut self, sent: usize, now: Instant) -> Step {
        if sent >= CHANGES {
            // What opens the other port is sent only after nothing more can be expected from there.
            let due = self.ask(0, self.other, now).unwrap_or(now);
            return Step::Confirming { sent: 1, due };
        }
        let transaction = self.changed.begin(self.responder, now);
        let bytes = Draft::new(Class::Request, transaction).change_port().padding().finish();
        self.outbox.push_back(Transmit { to: self.responder, bytes });
        let wait = if sent + 1 < CHANGES {
            CHANGE_SPACING
        } else {
            CHANGE_PATIENCE.max(self.rtt.saturating_mul(CHANGE_ROUND_TRIPS))
        };
        Step::Changing { sent: sent + 1, due: now + wait }
    }
}
