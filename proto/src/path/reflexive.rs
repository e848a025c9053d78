//! Server-reflexive discovery: what our socket's address looks like from outside, as a STUN responder sees it.
//!
//! In: responders' addresses, their answers, whether any link needs the address, `now`. Out: binding requests, the addresses
//! found, the next wake-up. It contacts nobody but the responders it was given, and trusts an answer only from the address
//! that was asked and with the random id of a request that waits; every request has an id of its own.
//! Witnesses are responders that are asked once: if they see another address, the NAT maps each destination anew.
//! Per responder: asking ([`RETRANSMIT`]) -> known (asked again after [`REFRESH`] while a link needs it) or silent (asked again
//! after [`RETRY_MIN`], doubling to [`RETRY_MAX`]).
//! Bounds: [`MAX_RESPONDERS`]; requests as in [`super::transaction`].

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{
    Handled, Ignored, Transmit,
    answer::Answer,
    candidate::{canonical, is_usable},
    mapping::{Mapping, mapping},
    transaction::Transactions,
};
use crate::{
    request::network::ResponderReport,
    stun::{Class, Draft},
};

/// When a request is sent, after the first: RFC 8489 §6.2.1 with its RTO of 500 ms, but five requests in place of seven.
/// Whoever does not answer within 12 s is better asked afresh, from the mapping that there is then.
pub const RETRANSMIT: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(500),
    Duration::from_millis(1500),
    Duration::from_millis(3500),
    Duration::from_millis(7500),
];

/// Time between two askings while a link needs the address: below the 30 s after which common NATs forget a mapping.
pub const REFRESH: Duration = Duration::from_secs(25);

/// First pause after a responder gave no answer.
pub const RETRY_MIN: Duration = Duration::from_secs(15);

/// Longest pause after a responder gave no answer.
pub const RETRY_MAX: Duration = Duration::from_secs(300);

/// Most responders, and as many witnesses; further ones are ignored. A relay has an address of each family, perhaps two;
/// the others are those that a user may name.
pub const MAX_RESPONDERS: usize = 8;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReflexiveEvent {
    /// A responder sees us at this address, and did not say so before: [`Reflexive::addresses`] has changed.
    Found(SocketAddr),
    /// The answers tell something else of the NAT than before, as [`Reflexive::mapping`] does.
    Mapping(Mapping),
}

/// Finds our server-reflexive addresses. It asks once when it gets responders, and keeps asking while it is active.
///
/// After every call that takes `now` drain [`Reflexive::poll_transmit`] and [`Reflexive::poll_event`], then sleep until
/// [`Reflexive::poll_timeout`] and call [`Reflexive::handle_timeout`].
#[derive(Debug)]
pub struct Reflexive {
    responders: BTreeMap<SocketAddr, Responder>,
    chosen: BTreeSet<SocketAddr>,
    witnesses: BTreeSet<SocketAddr>,
    mapping: Mapping,
    active: bool,
    transactions: Transactions,
    outbox: VecDeque<Transmit>,
    events: VecDeque<ReflexiveEvent>,
    now: Instant,
}

#[derive(Debug)]
struct Responder {
    state: State,
    seen: Option<SocketAddr>,
    /// Round trip of the last answer.
    rtt: Option<Duration>,
    /// Requests sent since the last answer, or since it was asked afresh.
    unanswered: u32,
}

#[derive(Debug)]
enum State {
    Asking { since: Instant, step: usize, pause: Duration },
    Known { at: Instant },
    Silent { until: Instant, pause: Duration },
}

impl Reflexive {
    /// No responders. `seed`: 32 random bytes, used here alone.
    pub fn new(seed: [u8; 32], now: Instant) -> Self {
        Self {
            responders: BTreeMap::new(),
            chosen: BTreeSet::new(),
            witnesses: BTreeSet::new(),
            mapping: Mapping::Unknown,
            active: false,
            transactions: Transactions::new(seed),
            outbox: VecDeque::new(),
            events: VecDeque::new(),
            now,
        }
    }

    /// Whom to ask, in place of those before; new ones are asked at once.
    pub fn set_responders(&mut self, responders: &[SocketAddr], now: Instant) {
        self.chosen = usable(responders);
        self.reconcile(now);
    }

    /// Whom to ask besides, but only once until something changes, in place of those before. What they see is not offered to
    /// anybody: it only says whether the NAT maps each destination anew.
    pub fn set_witnesses(&mut self, witnesses: &[SocketAddr], now: Instant) {
        self.witnesses = usable(witnesses);
        self.reconcile(now);
    }

    fn reconcile(&mut self, now: Instant) {
        self.witnesses.retain(|addr| !self.chosen.contains(addr));
        self.responders.retain(|addr, _| self.chosen.contains(addr) || self.witnesses.contains(addr));
        for addr in self.chosen.iter().chain(&self.witnesses) {
            let state = State::asking(now, RETRY_MIN);
            self.responders.entry(*addr).or_insert(Responder { state, seen: None, rtt: None, unanswered: 0 });
        }
        self.compare();
        self.drive(now);
    }

    /// Whether any link needs the address. What is too old to be trusted is asked anew at once.
    pub fn set_active(&mut self, active: bool, now: Instant) {
        self.active = active;
        self.drive(now);
    }

    /// Asks anew: a path was lost, and perhaps because the NAT forgot us.
    pub fn refresh(&mut self, now: Instant) {
        for responder in self.responders.values_mut() {
            responder.state = State::asking(now, RETRY_MIN);
            responder.rtt = None;
            responder.unanswered = 0;
        }
        self.drive(now);
    }

    /// Forgets what was found and asks anew: an interface changed.
    pub fn restart(&mut self, now: Instant) {
        self.responders.values_mut().for_each(|responder| responder.seen = None);
        self.compare();
        self.refresh(now);
    }

    /// Takes a datagram whose first byte says STUN; [`Ignored::NotOurs`] if it may be an agent's.
    pub fn handle_packet(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> Handled {
        let handled =
            self.handle_answer(canonical(from), bytes, now).map_or_else(Handled::Ignored, |()| Handled::Answer);
        self.drive(now);
        handled
    }

    /// The addresses found, each once. An address stays until it is known better.
    pub fn addresses(&self) -> BTreeSet<SocketAddr> {
        let chosen = self.responders.iter().filter(|(addr, _)| self.chosen.contains(*addr));
        chosen.filter_map(|(_, responder)| responder.seen).collect()
    }

    /// Whether one local port is seen as one address everywhere: by all who answered, of IPv4 if two of that family did.
    pub fn mapping(&self) -> Mapping {
        self.mapping
    }

    /// A responder of this family that answered, and the address that it sees.
    pub fn answered(&self, is_ipv4: bool) -> Option<(SocketAddr, SocketAddr)> {
        let family =
            self.responders.iter().filter(|(addr, _)| addr.is_ipv4() == is_ipv4 && self.chosen.contains(*addr));
        family.filter_map(|(addr, responder)| Some((*addr, responder.seen?))).next()
    }

    /// What asking brought, by responder.
    pub fn report(&self) -> Vec<ResponderReport> {
        let told = |(addr, responder): (&SocketAddr, &Responder)| {
            let Responder { state: _, seen, rtt, unanswered } = *responder;
            ResponderReport { addr: *addr, seen, rtt, unanswered }
        };
        self.responders.iter().map(told).collect()
    }

    /// What to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.outbox.pop_front()
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<ReflexiveEvent> {
        self.events.pop_front()
    }

    /// When to call [`Reflexive::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.outbox.is_empty() || !self.events.is_empty() {
            return Some(self.now);
        }
        let asks_again = |addr: &SocketAddr| self.active && !self.witnesses.contains(addr);
        let due = |(addr, responder): (&SocketAddr, &Responder)| responder.state.due(asks_again(addr));
        self.responders.iter().filter_map(due).min()
    }

    /// The time is now.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.drive(now);
    }

    fn handle_answer(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> Result<(), Ignored> {
        let Answer { transaction, asked_at, seen } = Answer::read(&mut self.transactions, from, bytes, now)?;
        self.transactions.end(transaction);
        if let Some(responder) = self.responders.get_mut(&from) {
            responder.state = State::Known { at: now };
            responder.rtt = Some(now.saturating_duration_since(asked_at));
            responder.unanswered = 0;
            let before = responder.seen.replace(seen);
            if before != Some(seen) && self.chosen.contains(&from) {
                self.events.push_back(ReflexiveEvent::Found(seen));
                if before.is_some() {
                    self.ask_witnesses(from.is_ipv4(), now);
                }
            }
        }
        self.compare();
        Ok(())
    }

    /// The NAT maps us anew: what witnesses saw was the mapping before.
    fn ask_witnesses(&mut self, is_ipv4: bool, now: Instant) {
        let witnesses = self.witnesses.iter().filter(|addr| addr.is_ipv4() == is_ipv4);
        for addr in witnesses {
            if let Some(witness) = self.responders.get_mut(addr) {
                witness.seen = None;
                witness.state = State::asking(now, RETRY_MIN);
            }
        }
    }

    fn compare(&mut self) {
        let told = [true, false].map(|is_ipv4| {
            let family = self.responders.iter().filter(|(addr, _)| addr.is_ipv4() == is_ipv4);
            mapping(&family.filter_map(|(_, responder)| responder.seen).collect::<Vec<_>>())
        });
        let now = told.into_iter().find(|told| *told != Mapping::Unknown).unwrap_or_default();
        if now != self.mapping {
            self.mapping = now;
            self.events.push_back(ReflexiveEvent::Mapping(now));
        }
    }

    fn drive(&mut self, now: Instant) {
        self.now = self.now.max(now);
        for (addr, responder) in &mut self.responders {
            let asks_again = self.active && !self.witnesses.contains(addr);
            if responder.state.due(asks_again).is_none_or(|due| due > now) {
                continue;
            }
            if responder.state.advance(now) {
                responder.unanswered = responder.unanswered.saturating_add(1);
                let bytes = Draft::new(Class::Request, self.transactions.begin(*addr, now)).padding().finish();
                self.outbox.push_back(Transmit { to: *addr, bytes });
            }
        }
    }
}

fn usable(responders: &[SocketAddr]) -> BTreeSet<SocketAddr> {
    let usable = responders.iter().filter(|addr| is_usable(**addr)).map(|addr| canonical(*addr));
    usable.take(MAX_RESPONDERS).collect()
}

impl State {
    fn asking(now: Instant, pause: Duration) -> Self {
        Self::Asking { since: now, step: 0, pause }
    }

    fn due(&self, active: bool) -> Option<Instant> {
        match self {
            // Behind the last request, its answer is waited for as long again (RFC 8489 §6.2.1: Rm).
            Self::Asking { since, step, .. } => {
                Some(*since + RETRANSMIT.get(*step).copied().unwrap_or(RETRANSMIT[RETRANSMIT.len() - 1] * 3 / 2))
            }
            Self::Known { at } => active.then(|| *at + REFRESH),
            Self::Silent { until, .. } => active.then_some(*until),
        }
    }

    /// Does what is due; says whether that is to send a request.
    fn advance(&mut self, now: Instant) -> bool {
        match self {
            Self::Asking { step, .. } if *step < RETRANSMIT.len() => {
                *step += 1;
                return true;
            }
            Self::Asking { pause, .. } => {
                *self = Self::Silent { until: now + *pause, pause: (*pause * 2).min(RETRY_MAX) };
                return false;
            }
            Self::Known { .. } => *self = Self::Asking { since: now, step: 1, pause: RETRY_MIN },
            Self::Silent { pause, .. } => *self = Self::Asking { since: now, step: 1, pause: *pause },
        }
        true
    }
}
