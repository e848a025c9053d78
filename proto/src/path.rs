//! Hole punching: finds and keeps the best direct path to one instance.
//!
//! In: both sides' candidates, STUN datagrams, word of other traffic, `now`. Out: checks and answers to send, `PathChanged`,
//! the next wake-up. It opens no socket and ends no link: without a direct path the relay carries on.
//! Each side takes its own best path, so nothing is negotiated. A path is proved by an authenticated answer, from the address
//! that was asked, to a check of ours; what anybody else sends moves nothing and is not answered.
//!
//! States: `Punching` (every pair is checked in rounds, 5 s apart at first and 5 min at last, for ever) -> `Direct` (an
//! answer was measured) -> `Punching` (checks of the path went unanswered for [`direct::GRACE`]). New candidates or a changed
//! interface begin a new round at once, in either state. Rounds are not jittered: the two sides' should meet.
//!
//! Bounds: [`MAX_CANDIDATES`](crate::limits::MAX_CANDIDATES) and [`pair::MAX_PEER_REFLEXIVE`] pairs, [`check::BUDGET`] checks a pair,
//! one check in [`PACE`], [`transaction::MAX_WAITING`] unanswered, [`MAX_QUEUED`] datagrams to be sent.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::stun::{Class, Message, StunFault};

pub mod candidate;
pub mod check;
pub mod direct;
pub mod mapping;
pub mod nat64;
pub mod pair;
pub mod reflexive;
pub mod score;
pub mod transaction;

pub use candidate::{Candidate, CandidateKind, Network, Reach};
pub use check::{CheckKey, Role};
pub use mapping::{Hairpin, Sampling};
pub use reflexive::{Reflexive, ReflexiveEvent};

use check::Codec;
use direct::Current;
use pair::Pairs;
use transaction::{Transactions, Unasked};

/// Time between two checks of one agent: 200 in a second, which no home router minds.
pub const PACE: Duration = Duration::from_millis(5);

/// Time between the first two rounds; it doubles up to [`ROUND_MAX`].
pub const ROUND_MIN: Duration = Duration::from_secs(5);

/// Longest time between two rounds. 5 min: a path that opens by itself is found before anybody goes looking for it.
pub const ROUND_MAX: Duration = Duration::from_secs(300);

/// Time between two looks for a better path than the one taken.
/// 60 s: as others do; networks seldom improve without an interface changing.
pub const UPGRADE: Duration = Duration::from_secs(60);

/// Round trip below which no better path of the same reach is looked for: none could be better by
/// [`score::HYSTERESIS`].
pub const GOOD_ENOUGH: Duration = score::HYSTERESIS;

/// Most datagrams that wait for `poll_transmit`; checks that come beyond it are not answered.
pub const MAX_QUEUED: usize = 64;

/// What an [`Agent`] is made of.
#[derive(Debug)]
pub struct Config {
    /// Authenticates checks; from the link's offer and answer.
    pub key: CheckKey,
    /// The lower id controls.
    pub role: Role,
    /// 32 random bytes, used here alone: transaction ids are drawn from them.
    pub seed: [u8; 32],
}

/// A datagram to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// Where to; IPv4 is written as IPv4.
    pub to: SocketAddr,
    /// What.
    pub bytes: Vec<u8>,
}

/// A proved path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Direct {
    /// Where to send.
    pub addr: SocketAddr,
    /// The smoothed round trip.
    pub rtt: Duration,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Packets should now be sent there, or by way of the relay.
    PathChanged(Option<Direct>),
}

/// What became of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handled {
    /// It was the other side's check, and is answered.
    Check,
    /// It was the answer to one of our requests.
    Answer,
    /// It moved nothing and is not answered.
    Ignored(Ignored),
}

/// Why a datagram moved nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ignored {
    /// No STUN message.
    Malformed(StunFault),
    /// It neither names the other side of this agent nor answers a request of ours: perhaps another agent's.
    NotOurs,
    /// The MAC is wrong or missing.
    Forged,
    /// A check that came before, or too late.
    Repeated,
    /// An answer from elsewhere than the request went to, or a check from where nobody can be.
    WrongSource,
    /// It has an attribute that must be understood, and is not.
    UnknownAttribute,
    /// The answer does not say how we are seen.
    NoAddress,
    /// Too many datagrams wait to be sent, or the answer would be longer than the check.
    NoAnswer,
}

/// Finds and keeps the best direct path to one instance.
///
/// After every `handle_*`, `set_*`, `on_*` and [`Agent::restart`] drain [`Agent::poll_transmit`] and [`Agent::poll_event`], then
/// sleep until [`Agent::poll_timeout`] and call [`Agent::handle_timeout`]. Nothing is checked until both sides' candidates
/// are set.
#[derive(Debug)]
pub struct Agent {
    // Where things stand.
    pairs: Pairs,
    state: State,
    codec: Codec,
    transactions: Transactions,
    /// When the next check may be sent.
    pace: Instant,
    // What the caller has not fetched.
    outbox: VecDeque<Transmit>,
    changed: bool,
    now: Instant,
}

#[derive(Debug)]
enum State {
    Punching { next_round: Instant, pause: Duration },
    Direct { current: Current, next_upgrade: Instant },
}

impl State {
    /// The first round begins now.
    fn punching(now: Instant) -> Self {
        Self::Punching { next_round: now + ROUND_MIN, pause: ROUND_MIN * 2 }
    }
}

impl Agent {
    /// An agent without candidates.
    pub fn new(config: Config, now: Instant) -> Self {
        Self {
            pairs: Pairs::default(),
            state: State::punching(now),
            codec: Codec::new(&config.key, config.role),
            transactions: Transactions::new(config.seed),
            pace: now,
            outbox: VecDeque::new(),
            changed: false,
            now,
        }
    }

    /// The networks that our interfaces are in, in place of those before: who is in one of them is near. They count from the
    /// next [`Agent::set_local`] on; until they are told, they are guessed from the addresses.
    pub fn set_networks(&mut self, networks: &[Network]) {
        self.pairs.set_networks(networks);
    }

    /// Our own candidates, in place of those before. If they differ, everything is checked anew.
    pub fn set_local(&mut self, candidates: Vec<Candidate>, now: Instant) {
        if self.pairs.set_local(&candidates, self.current(), now) {
            self.restart(now);
        }
    }

    /// The other side's candidates, in place of those before. New ones are checked at once, and while there is no direct
    /// path the others too.
    pub fn set_remote(&mut self, candidates: Vec<Candidate>, now: Instant) {
        if self.pairs.set_remote(&candidates, self.current(), now) {
            match self.state {
                State::Punching { .. } => self.restart(now),
                State::Direct { .. } => self.drive(now),
            }
        }
    }

    /// Checks everything anew: an interface changed, or the other side says that its did.
    pub fn restart(&mut self, now: Instant) {
        self.pairs.begin_all(now);
        match &mut self.state {
            State::Punching { .. } => self.state = State::punching(now),
            State::Direct { next_upgrade, .. } => *next_upgrade = now + UPGRADE,
        }
        self.drive(now);
    }

    /// Takes a datagram whose first byte says STUN ([`crate::stun::is_stun`]).
    pub fn handle_packet(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) -> Handled {
        let from = candidate::canonical(from);
        let handled = match Message::parse(bytes) {
            Err(fault) => Err(Ignored::Malformed(fault)),
            Ok(message) if !message.is_binding() => Err(Ignored::NotOurs),
            Ok(message) => match message.class() {
                Class::Request => self.handle_check(from, &message, bytes.len(), now),
                Class::Success => self.handle_answer(from, &message, now),
                Class::Indication | Class::Error => Err(Ignored::NotOurs),
            },
        };
        self.drive(now);
        handled.unwrap_or_else(Handled::Ignored)
    }

    /// Other packets were sent on the direct path. May be told coarsely, say every 50 ms.
    pub fn on_sent(&mut self, now: Instant) {
        if let State::Direct { current, .. } = &mut self.state {
            current.on_sent(now);
        }
        self.drive(now);
    }

    /// Other packets came from `from`. They prove nothing, for anybody can send them; they only put off suspicion.
    pub fn on_received(&mut self, from: SocketAddr, now: Instant) {
        if self.pairs.contains(&candidate::canonical(from))
            && let State::Direct { current, .. } = &mut self.state
        {
            current.on_received();
        }
        self.drive(now);
    }

    /// The path to send on; `None` is by way of the relay.
    pub fn path(&self) -> Option<Direct> {
        let addr = self.current()?;
        let rtt = self.pairs.rtt(&addr).expect("the path taken was proved, and its pair stays while it is taken");
        Some(Direct { addr, rtt })
    }

    /// What to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.outbox.pop_front()
    }

    /// What happened. Changes between two calls are told as one.
    pub fn poll_event(&mut self) -> Option<Event> {
        std::mem::take(&mut self.changed).then(|| Event::PathChanged(self.path()))
    }

    /// When to call [`Agent::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.changed || !self.outbox.is_empty() {
            return Some(self.now);
        }
        let check = self.pairs.next_due().map(|due| due.max(self.pace));
        let watch = self
            .path()
            .zip(self.watched())
            .and_then(|(path, current)| current.next_wake(path.rtt, self.pairs.is_planned(&path.addr)));
        let round = match &self.state {
            State::Punching { next_round, .. } => (!self.pairs.is_empty()).then_some(*next_round),
            State::Direct { next_upgrade, .. } => Some(*next_upgrade),
        };
        [check, watch, round].into_iter().flatten().min()
    }

    /// The time is now.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.drive(now);
    }

    fn handle_check(
        &mut self,
        from: SocketAddr,
        check: &Message<'_>,
        length: usize,
        now: Instant,
    ) -> Result<Handled, Ignored> {
        if !self.codec.is_addressed(check) {
            return Err(Ignored::NotOurs);
        }
        if !self.codec.is_authentic(check) {
            return Err(Ignored::Forged);
        }
        if check.unknown_required().is_some() {
            return Err(Ignored::UnknownAttribute);
        }
        if !self.codec.is_fresh(check) {
            return Err(Ignored::Repeated);
        }
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

    /// The other side can send from there: can we send to there?
    fn check_back(&mut self, from: SocketAddr, now: Instant) {
        let current = self.current();
        let Some(pair) = self.pairs.learn(from, current, now) else { return };
        match &self.state {
            State::Punching { .. } => pair.plan.ensure(now),
            State::Direct { .. } => {
                if current != Some(from) && !pair.is_fresh(now) {
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
            pair.proved(now.saturating_duration_since(asked_at), now);
            self.consider(from, now);
        }
        Ok(Handled::Answer)
    }

    /// A pair was proved: is it the path to take?
    fn consider(&mut self, addr: SocketAddr, now: Instant) {
        let better = match &mut self.state {
            State::Punching { .. } => true,
            State::Direct { current, .. } if current.addr == addr => {
                current.answered(now);
                false
            }
            State::Direct { current, .. } => {
                let scores = self.pairs.score(&addr).zip(self.pairs.score(&current.addr));
                scores.is_some_and(|(new, old)| new.displaces(&old))
            }
        };
        if better {
            self.state = State::Direct { current: Current::new(addr, now), next_upgrade: now + UPGRADE };
            self.changed = true;
        }
    }

    /// Does what is due, and queues the checks to send.
    fn drive(&mut self, now: Instant) {
        self.now = self.now.max(now);
        match &mut self.state {
            State::Punching { next_round, pause } if *next_round <= now => {
                *next_round = now + *pause;
                *pause = (*pause * 2).min(ROUND_MAX);
                self.pairs.forget_unproved();
                self.pairs.begin_all(now);
            }
            State::Punching { .. } => {}
            State::Direct { .. } => self.watch(now),
        }
        self.send_check(now);
    }

    /// Looks after the path taken.
    fn watch(&mut self, now: Instant) {
        let Some(path) = self.path() else { return };
        let State::Direct { current, next_upgrade } = &mut self.state else { return };
        if current.is_lost(now) {
            self.state = State::punching(now);
            self.changed = true;
            self.pairs.forget_unproved();
            self.pairs.begin_all(now);
            return;
        }
        if current.wants_check(path.rtt, now)
            && !self.pairs.is_planned(&path.addr)
            && let Some(pair) = self.pairs.get_mut(&path.addr)
        {
            pair.plan.trigger(now);
        }
        if *next_upgrade <= now {
            *next_upgrade = now + UPGRADE;
            self.pairs.forget_unproved();
            if self.pairs.reach(&path.addr) == Reach::Wide || path.rtt > GOOD_ENOUGH {
                self.pairs.trigger_others(path.addr, now);
            }
        }
    }

    fn send_check(&mut self, now: Instant) {
        if self.pace > now {
            return;
        }
        let Some(to) = self.pairs.take_due(now) else { return };
        let bytes = self.codec.request(self.transactions.begin(to, now));
        self.outbox.push_back(Transmit { to, bytes });
        self.pace = now + PACE;
        if let State::Direct { current, .. } = &mut self.state
            && current.addr == to
        {
            current.checked(self.pairs.rtt(&to).unwrap_or_default(), now);
        }
    }

    fn watched(&self) -> Option<&Current> {
        match &self.state {
            State::Punching { .. } => None,
            State::Direct { current, .. } => Some(current),
        }
    }

    fn current(&self) -> Option<SocketAddr> {
        self.watched().map(|current| current.addr)
    }
}
