//! What a NAT does with ports (RFC 4787 §4.1 and §4.2), told from how responders see us.
//!
//! In: the addresses that responders saw, answers to requests from sockets made for asking, `now`. Out: [`Mapping`] and
//! [`Ports`], requests to send and from which socket, the next wake-up. It opens no socket, and asks nobody but the one
//! responder that it was given, and our own mapped address once.
//! One socket that two responders see alike is mapped independently of where it sends. If not, [`SOCKETS`] sockets ask the
//! same responder, one every [`SPACING`], and the ports that it sees tell how the NAT picks them: the socket's own, one
//! behind the other, from a block, or any.
//! States of [`Sampling`]: asking -> done, when all are answered or [`PATIENCE`] is over. Of [`Hairpin`]: idle -> asked ->
//! known, likewise.
//! Bounds: [`SOCKETS`] sockets of two requests each; two requests to ourselves.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{Handled, Ignored, Transmit, answer::Answer, candidate::canonical, transaction::Transactions};
use crate::stun::{Class, Draft, Message};

pub use crate::request::link::{Mapping, Nat, Ports};

/// Sockets that ask when a NAT maps each destination anew.
/// 16: should the NAT pick any of 64,512 ports, they all fall within [`LONGEST_BLOCK`] once in 10^17 times; should it pick
/// from an aligned block, they leave one half of it empty once in 33,000 times.
pub const SOCKETS: usize = 16;

/// Answers below which nothing is said: half of the sockets.
pub const ENOUGH: usize = SOCKETS / 2;

/// Time between the first requests of two sockets: a NAT that picks one port behind the other is seen to do so, and 50
/// new mappings in a second worry no router.
pub const SPACING: Duration = Duration::from_millis(20);

/// When a request that is not answered is repeated, once: RFC 8489 §6.2.1 has the same 500 ms.
pub const REPEAT: Duration = Duration::from_millis(500);

/// How long answers are waited for, from the last socket's first request.
pub const PATIENCE: Duration = Duration::from_millis(1500);

/// Longest block of ports that is taken for one. Carriers give a customer 64 to 4,032 at a time (RFC 7422 §2 counts with
/// about 1,000 to 4,000).
pub const LONGEST_BLOCK: u16 = 4096;

/// Shortest block of ports that is given out anywhere.
const SHORTEST_BLOCK: u16 = 64;

/// Largest step between two ports that is taken for one: NATs count by 1 or 2; beyond it, steps that are alike are chance.
const LONGEST_STEP: i32 = 16;

/// One socket of ours, as a responder sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Its port.
    pub local: u16,
    /// The port that the responder sees.
    pub seen: u16,
}

/// What the addresses tell that one socket is seen under, by several responders of one address family.
pub fn mapping(seen: &[SocketAddr]) -> Mapping {
    match seen {
        [] | [_] => Mapping::Unknown,
        [first, others @ ..] if others.iter().all(|other| other == first) => Mapping::EndpointIndependent,
        [..] => Mapping::Dependent,
    }
}

/// How a NAT picks ports, from sockets that sent to one place, in the order in which they did.
pub fn ports(samples: &[Sample]) -> Ports {
    if samples.len() < ENOUGH {
        return Ports::Unknown;
    }
    let preserved = samples.iter().filter(|sample| sample.local == sample.seen).count();
    if preserved * 4 >= samples.len() * 3 {
        return Ports::Preserving;
    }
    sequence(samples).or_else(|| block(samples)).unwrap_or(Ports::Random)
}

/// Ports that grow or shrink by a step of which most are alike: others behind the same NAT take some between.
fn sequence(samples: &[Sample]) -> Option<Ports> {
    let steps: Vec<_> = samples.windows(2).map(|two| i32::from(two[1].seen) - i32::from(two[0].seen)).collect();
    let alike = |step: i32| steps.iter().filter(|other| **other == step).count();
    let usual = *steps.iter().max_by_key(|step| (alike(**step), -step.abs()))?;
    let same_way = steps.iter().filter(|step| step.signum() == usual.signum()).count();
    // One step may go the other way: where the range of ports ends and begins again.
    let is_one = usual != 0 && usual.abs() <= LONGEST_STEP && alike(usual) * 2 >= steps.len();
    let step = i16::try_from(usual).ok().filter(|_| is_one && same_way + 1 >= steps.len())?;
    Some(Ports::Sequential { last: samples.last()?.seen, step })
}

/// Ports so near each other that they must be of one block: the aligned one if there is one that fits closely, else those
/// between the lowest and the highest, and as many beside them as are likely to have been missed.
fn block(samples: &[Sample]) -> Option<Ports> {
    let (lowest, highest) = (samples.iter().map(|one| one.seen).min()?, samples.iter().map(|one| one.seen).max()?);
    let spread = highest - lowest;
    if spread >= LONGEST_BLOCK {
        return None;
    }
    let sizes = (SHORTEST_BLOCK.ilog2()..=LONGEST_BLOCK.ilog2()).map(|bits| 1_u16 << bits);
    let aligned =
        sizes.filter(|size| lowest / size == highest / size).find(|size| *size / 4 <= spread.max(SHORTEST_BLOCK));
    if let Some(size) = aligned {
        let first = lowest / size * size;
        return Some(Ports::Block { first: first.max(1), last: first + (size - 1) });
    }
    let gaps = u16::try_from(samples.len() - 1).unwrap_or(u16::MAX).max(1);
    let missed = (spread / gaps).saturating_mul(2);
    Some(Ports::Block { first: lowest.saturating_sub(missed).max(1), last: highest.saturating_add(missed) })
}

/// Asks one responder from several sockets, to learn how the NAT picks ports.
///
/// After [`Sampling::new`] and every call that takes `now` drain [`Sampling::poll_transmit`], then sleep until
/// [`Sampling::poll_timeout`] and call [`Sampling::handle_timeout`]; when [`Sampling::outcome`] is there, close the sockets.
#[derive(Debug)]
pub struct Sampling {
    responder: SocketAddr,
    sockets: Vec<Asking>,
    transactions: Transactions,
    outbox: VecDeque<(usize, Transmit)>,
    until: Instant,
    now: Instant,
}

#[derive(Debug)]
struct Asking {
    local: u16,
    /// When to ask, and whether that is the second time.
    next: Option<(Instant, bool)>,
    seen: Option<u16>,
}

impl Sampling {
    /// Asks `responder` from sockets of these local ports, of which the first [`SOCKETS`] count. `seed`: 32 random bytes,
    /// used here alone.
    pub fn new(responder: SocketAddr, locals: &[u16], seed: [u8; 32], now: Instant) -> Self {
        let mut at = now;
        let mut sockets = Vec::with_capacity(locals.len().min(SOCKETS));
        for local in locals.iter().take(SOCKETS) {
            sockets.push(Asking { local: *local, next: Some((at, false)), seen: None });
            at += SPACING;
        }
        let mut sampling = Self {
            responder: canonical(responder),
            sockets,
            transactions: Transactions::new(seed),
            outbox: VecDeque::new(),
            until: at + PATIENCE,
            now,
        };
        sampling.drive(now);
        sampling
    }

    /// Takes a datagram that came to the socket of this number.
    pub fn handle_packet(&mut self, socket: usize, from: SocketAddr, bytes: &[u8], now: Instant) -> Handled {
        let handled = self.handle_answer(socket, canonical(from), bytes, now);
        self.drive(now);
        handled.map_or_else(Handled::Ignored, |()| Handled::Answer)
    }

    /// What to send, and from which socket.
    pub fn poll_transmit(&mut self) -> Option<(usize, Transmit)> {
        self.outbox.pop_front()
    }

    /// When to call [`Sampling::handle_timeout`]; never again when it is done.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.outbox.is_empty() {
            return Some(self.now);
        }
        let asking = self.sockets.iter().filter_map(|socket| Some(socket.next?.0)).min();
        (!self.is_done()).then(|| asking.map_or(self.until, |at| at.min(self.until)))
    }

    /// The time is now.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.drive(now);
    }

    /// How the NAT picks ports, when that is known or never will be.
    pub fn outcome(&self) -> Option<Ports> {
        let known = self.sockets.iter().filter_map(|socket| Some(Sample { local: socket.local, seen: socket.seen? }));
        self.is_done().then(|| ports(&known.collect::<Vec<_>>()))
    }

    fn is_done(&self) -> bool {
        self.now >= self.until || self.sockets.iter().all(|socket| socket.seen.is_some())
    }

    fn handle_answer(&mut self, socket: usize, from: SocketAddr, bytes: &[u8], now: Instant) -> Result<(), Ignored> {
        let Answer { transaction, seen, .. } = Answer::read(&mut self.transactions, from, bytes, now)?;
        let asking = self.sockets.get_mut(socket).ok_or(Ignored::NotOurs)?;
        self.transactions.end(transaction);
        asking.next = None;
        asking.seen.get_or_insert(seen.port());
        Ok(())
    }

    fn drive(&mut self, now: Instant) {
        self.now = self.now.max(now);
        if self.is_done() {
            self.outbox.clear();
            return;
        }
        for (number, socket) in self.sockets.iter_mut().enumerate() {
            let Some((_, is_second)) = socket.next.filter(|(at, _)| *at <= now) else { continue };
            socket.next = (!is_second).then(|| (now + REPEAT, true));
            let bytes = Draft::new(Class::Request, self.transactions.begin(self.responder, now)).padding().finish();
            self.outbox.push_back((number, Transmit { to: self.responder, bytes }));
        }
    }
}

/// Learns whether a NAT takes back what we send to our own mapped address (RFC 4787 §6): if it does, two hosts behind it reach
/// each other under the addresses that the world sees.
///
/// After every call that takes `now` drain [`Hairpin::poll_transmit`], then sleep until [`Hairpin::poll_timeout`] and call
/// [`Hairpin::handle_timeout`].
#[derive(Debug)]
pub struct Hairpin {
    transactions: Transactions,
    state: Trial,
    outbox: VecDeque<Transmit>,
    now: Instant,
}

#[derive(Debug, Clone, Copy)]
enum Trial {
    Idle,
    Asked { own: SocketAddr, repeat: Option<Instant>, until: Instant },
    Known(bool),
}

impl Hairpin {
    /// Nothing is tried yet. `seed`: 32 random bytes, used here alone.
    pub fn new(seed: [u8; 32], now: Instant) -> Self {
        Self { transactions: Transactions::new(seed), state: Trial::Idle, outbox: VecDeque::new(), now }
    }

    /// Tries it with the address that a responder sees; what was known before is forgotten.
    pub fn begin(&mut self, own: SocketAddr, now: Instant) {
        self.state = Trial::Asked { own: canonical(own), repeat: Some(now + REPEAT), until: now + PATIENCE };
        self.now = self.now.max(now);
        self.ask(now);
    }

    /// Forgets what is known: an interface changed.
    pub fn forget(&mut self) {
        self.state = Trial::Idle;
        self.outbox.clear();
    }

    /// Whether what we send to ourselves arrives; `None` while that is not known.
    pub fn outcome(&self) -> Option<bool> {
        match self.state {
            Trial::Known(outcome) => Some(outcome),
            Trial::Idle | Trial::Asked { .. } => None,
        }
    }

    /// Takes a datagram whose first byte says STUN, from wherever it came: a NAT may show any of our addresses. It is
    /// [`Ignored::NotOurs`] if we did not send it to ourselves.
    pub fn handle_packet(&mut self, bytes: &[u8], now: Instant) -> Handled {
        let Trial::Asked { own, .. } = self.state else { return Handled::Ignored(Ignored::NotOurs) };
        let message = match Message::parse(bytes) {
            Ok(message) => message,
            Err(fault) => return Handled::Ignored(Ignored::Malformed(fault)),
        };
        if message.class() != Class::Request || self.transactions.find(message.transaction(), own, now).is_err() {
            return Handled::Ignored(Ignored::NotOurs);
        }
        self.state = Trial::Known(true);
        self.outbox.clear();
        Handled::Check
    }

    /// What to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.outbox.pop_front()
    }

    /// When to call [`Hairpin::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.outbox.is_empty() {
            return Some(self.now);
        }
        match self.state {
            Trial::Asked { repeat, until, .. } => Some(repeat.unwrap_or(until).min(until)),
            Trial::Idle | Trial::Known(_) => None,
        }
    }

    /// The time is now.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.now = self.now.max(now);
        let Trial::Asked { own, repeat, until } = self.state else { return };
        if until <= now {
            self.state = Trial::Known(false);
        } else if repeat.is_some_and(|at| at <= now) {
            self.state = Trial::Asked { own, repeat: None, until };
            self.ask(now);
        }
    }

    fn ask(&mut self, now: Instant) {
        let Trial::Asked { own, .. } = self.state else { return };
        let bytes = Draft::new(Class::Request, self.transactions.begin(own, now)).padding().finish();
        self.outbox.push_back(Transmit { to: own, bytes });
    }
}
