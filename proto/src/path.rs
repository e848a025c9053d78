//! Hole punching: finds and keeps the best direct path to one instance.
//!
//! In: both sides' candidates, STUN datagrams, word of other traffic, `now`. Out: checks and answers to send, `PathChanged`,
//! the next wake-up. It opens no socket and ends no link: without a direct path the relay carries on.
//! Each side takes its own best path, so nothing is negotiated. A path is proved by an authenticated answer, from the address
//! that was asked, to a check of ours; what anybody else sends moves nothing and is not answered.
//!
//! States: `Punching` (every pair is checked in rounds, 5 s apart at first and 5 min at last, for ever) -> `Direct` (an
//! answer was measured) -> `Punching` (checks of the path went unanswered, data was not acknowledged although they were
//! answered, or the address that packets left from is gone: [`direct`]). New candidates or a changed interface begin a new
//! round at once, in either state. Rounds are not jittered: the two sides' should meet. A path moves without a pause where
//! another pair is proved to be better ([`score`]), or is proved while the path is silent.
//!
//! Bounds: [`MAX_CANDIDATES`](crate::limits::MAX_CANDIDATES) and [`pair::MAX_PEER_REFLEXIVE`] pairs, [`check::BUDGET`] checks a pair,
//! one check in [`PACE`], [`transaction::MAX_WAITING`] unanswered, [`MAX_QUEUED`] datagrams to be sent. [`Agents`] holds all
//! agents of a process to one [`Budget`].

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use crate::stun::StunFault;

pub mod agents;
mod answer;
pub mod binding;
pub mod budget;
pub mod candidate;
pub mod check;
pub mod direct;
pub mod filtering;
pub mod mapping;
pub mod nat64;
pub mod pair;
mod receive;
pub mod reflexive;
pub mod report;
pub mod score;
pub mod search;
pub mod transaction;
mod watch;

pub use agents::Agents;
pub use budget::Budget;
pub use candidate::{Candidate, CandidateKind, Network, Reach};
pub use check::{CheckKey, Role};
pub use filtering::FilterTrial;
pub use mapping::{Hairpin, Sampling};
pub use reflexive::{Reflexive, ReflexiveEvent};

use binding::Binding;
use check::Codec;
use direct::Current;
use pair::Pairs;
use transaction::Transactions;

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
    /// The path taken is in doubt, or no longer: packets should be sent there and, while it is in doubt, by way of the relay as
    /// well. A path is taken without doubt.
    Doubted(bool),
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
/// are set. Where there are many agents, [`Agents`] does all that.
#[derive(Debug)]
pub struct Agent {
    // Where things stand.
    pairs: Pairs,
    state: State,
    binding: Binding,
    codec: Codec,
    role: Role,
    transactions: Transactions,
    /// When the next check may be sent.
    pace: Instant,
    /// Checks are sent when [`Agents`] says so.
    is_metered: bool,
    // What the caller has not fetched.
    outbox: VecDeque<Transmit>,
    changed: bool,
    /// The caller knows that the path taken is in doubt.
    doubt_told: bool,
    began: Instant,
    now: Instant,
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one in an agent, which is never moved about")]
enum State {
    Punching {
        next_round: Instant,
        pause: Duration,
    },
    Direct {
        current: Current,
        next_upgrade: Instant,
        /// Other packets came one after the other since the last look for a better path; who does not use a path needs no
        /// better one.
        is_used: bool,
    },
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
            binding: Binding::default(),
            codec: Codec::new(&config.key, config.role),
            role: config.role,
            transactions: Transactions::hinted(config.seed),
            pace: now,
            is_metered: false,
            outbox: VecDeque::new(),
            changed: false,
            doubt_told: false,
            began: now,
            now,
        }
    }

    /// The networks that our interfaces are in, in place of those before: who is in one of them is near. They count from the
    /// next [`Agent::set_local`] on; until they are told, they are guessed from the addresses.
    pub fn set_networks(&mut self, networks: &[Network]) {
        self.pairs.set_networks(networks);
    }

    /// Our own candidates, in place of those before. If an interface changed, everything is checked anew, and a path whose ground
    /// is gone is left at once.
    pub fn set_local(&mut self, candidates: Vec<Candidate>, now: Instant) {
        if let Some(before) = self.pairs.set_local(&candidates, self.current(), now) {
            self.ground_changed(&before, now);
            self.drive(now);
        }
    }

    /// We are in another place of the network, or slept: both sides' candidates as they are now, all of which are checked anew,
    /// once. A path whose ground is gone is left at once.
    pub fn relocate(&mut self, local: &[Candidate], remote: &[Candidate], now: Instant) {
        self.pairs.set_remote(remote, self.current(), now);
        match self.pairs.set_local(local, self.current(), now) {
            Some(before) if self.pairs.has_other_interfaces(&before) => self.ground_changed(&before, now),
            Some(_) | None => self.restart(now),
        }
    }

    /// The other side's candidates, in place of those before. New ones are checked at once, and while there is no direct
    /// path the others too.
    pub fn set_remote(&mut self, candidates: Vec<Candidate>, now: Instant) {
        if self.pairs.set_remote(&candidates, self.current(), now) {
            match &mut self.state {
                State::Punching { .. } => {
                    self.pairs.ensure_all(now);
                    self.state = State::punching(now);
                }
                State::Direct { .. } => self.doubt(now),
            }
            self.drive(now);
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

    /// A search found that this address is reached from another socket than before: it is checked at once.
    pub fn try_address(&mut self, addr: SocketAddr, now: Instant) {
        let (addr, current) = (candidate::canonical(addr), self.current());
        if candidate::is_usable(addr) {
            self.pairs.begin_anew(addr, current, now);
        }
        self.drive(now);
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
            && let State::Direct { current, is_used, .. } = &mut self.state
        {
            current.on_received(now);
            *is_used |= current.is_flowing();
        }
        self.drive(now);
    }

    /// Packets came directly that only the other side can have made, and are acknowledged: it looks after the path itself, so
    /// that a keep-alive of ours can wait. What only one side sends from time to time keeps an idle path for both.
    pub fn on_heard(&mut self, now: Instant) {
        if let State::Direct { current, .. } = &mut self.state {
            current.on_heard(now);
        }
        self.drive(now);
    }

    /// Data that wants to be acknowledged was sent on the direct path. May be told coarsely, say every 250 ms. Whoever tells
    /// this must tell [`Agent::on_delivered`] too; whoever tells neither is not protected from a path that answers checks and
    /// carries no data.
    pub fn on_data_sent(&mut self, now: Instant) {
        if let State::Direct { current, .. } = &mut self.state {
            current.on_data_sent(now);
        }
        self.drive(now);
    }

    /// Data that was sent on the direct path was acknowledged, under keys that nobody else has: this proves it as an answered
    /// check does.
    /// While the path is in doubt it may have been acknowledged for what travelled by way of the relay, and proves nothing.
    pub fn on_delivered(&mut self, now: Instant) {
        let is_doubted = self.is_doubted() || self.doubt_told;
        if let State::Direct { current, .. } = &mut self.state {
            if is_doubted {
                return current.on_delivered_somehow();
            }
            let idle = current.on_delivered(now);
            if let Some(pair) = self.pairs.get_mut(&current.addr) {
                pair.carried_data(now.saturating_duration_since(current.taken_at()));
            }
            self.binding.lived(idle, now);
        }
        self.drive(now);
    }

    /// Packets came by way of the relay: the other side does not use the direct path, or doubts it. If a check of ours is unanswered
    /// too, so do we; if none is due, one is sent now and then, for the other side may not know where we are seen.
    pub fn on_relayed(&mut self, now: Instant) {
        if let State::Direct { current, .. } = &mut self.state {
            current.is_shunned();
            if current.was_checked_long_ago(now)
                && let Some(pair) = self.pairs.get_mut(&current.addr)
            {
                pair.plan.trigger(now);
            }
        }
        self.drive(now);
    }

    /// The address of ours that packets on the path taken leave from, as the system says; `None` if it knows no way there. To be
    /// told after [`Event::PathChanged`] and when an interface or a route changed. If it is another one than before, the
    /// path is left at once: its NAT, if there is one, has never heard of the new one.
    pub fn on_source(&mut self, source: Option<IpAddr>, now: Instant) {
        if let State::Direct { current, .. } = &mut self.state
            && current.set_source(source.map(|ip| ip.to_canonical()))
        {
            self.lose(now);
        }
        self.drive(now);
    }

    /// The path to send on; `None` is by way of the relay.
    pub fn path(&self) -> Option<Direct> {
        let addr = self.current()?;
        let rtt = self.pairs.rtt(&addr).expect("the path taken was proved, and its pair stays while it is taken");
        Some(Direct { addr, rtt })
    }

    /// Whether packets should go by way of the relay as well ([`Event::Doubted`]).
    pub fn is_doubted(&self) -> bool {
        self.doubted_at().is_some_and(|at| at <= self.now)
    }

    /// Whether data was acknowledged on the path taken, as far as anybody said ([`Agent::on_delivered`]).
    pub fn is_delivering(&self) -> bool {
        self.watched().is_some_and(Current::is_delivering)
    }

    /// What to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.outbox.pop_front()
    }

    /// What happened. Changes between two calls are told as one.
    pub fn poll_event(&mut self) -> Option<Event> {
        if std::mem::take(&mut self.changed) {
            self.doubt_told = false;
            return Some(Event::PathChanged(self.path()));
        }
        let is_doubted = self.is_doubted();
        (std::mem::replace(&mut self.doubt_told, is_doubted) != is_doubted).then_some(Event::Doubted(is_doubted))
    }

    /// When to call [`Agent::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        let check = if self.is_metered { None } else { self.next_check() };
        [check, self.next_wake()].into_iter().flatten().min()
    }

    /// The time is now.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.drive(now);
    }

    /// From now on checks are sent by [`Agent::send_check`] alone.
    fn meter(&mut self) {
        self.is_metered = true;
    }

    /// When a check is due.
    fn next_check(&self) -> Option<Instant> {
        self.pairs.next_due().map(|due| due.max(self.pace))
    }

    /// Whether the path taken is to be checked: this goes before looking for others.
    fn is_pressing(&self) -> bool {
        self.current().is_some_and(|addr| self.pairs.is_planned(&addr))
    }

    /// When something other than a check is due.
    fn next_wake(&self) -> Option<Instant> {
        if self.changed || !self.outbox.is_empty() || self.is_doubted() != self.doubt_told {
            return Some(self.now);
        }
        match &self.state {
            State::Punching { next_round, .. } => (!self.pairs.is_empty()).then_some(*next_round),
            State::Direct { current, next_upgrade, .. } => {
                let rtt = self.pairs.rtt(&current.addr).unwrap_or_default();
                let interval = self.binding.interval(self.role);
                let watch = current.next_wake(rtt, interval, self.pairs.is_planned(&current.addr));
                let doubt = self.doubted_at().filter(|_| !self.doubt_told);
                [watch, doubt, Some(*next_upgrade)].into_iter().flatten().min()
            }
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
        if !self.is_metered {
            self.send_check(now);
        }
    }

    /// Sends the check that is due, if the pace allows one.
    fn send_check(&mut self, now: Instant) {
        if self.pace > now {
            return;
        }
        let Some(to) = self.pairs.take_due(self.current(), now) else { return };
        let bytes = self.codec.request(self.transactions.begin(to, now));
        self.outbox.push_back(Transmit { to, bytes });
        self.pace = now + PACE;
        if let State::Direct { current, .. } = &mut self.state
            && current.addr == to
        {
            current.checked(now);
        }
    }

    fn watched(&self) -> Option<&Current> {
        match &self.state {
            State::Punching { .. } => None,
            State::Direct { current, .. } => Some(current),
        }
    }

    fn doubted_at(&self) -> Option<Instant> {
        let current = self.watched()?;
        current.doubted_at(self.pairs.rtt(&current.addr)?)
    }

    fn current(&self) -> Option<SocketAddr> {
        self.watched().map(|current| current.addr)
    }
}
