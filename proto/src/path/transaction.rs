//! Requests that wait for an answer, and the random ids that tie the two together.
//!
//! In: a seed, what is sent where, and `now`. Out: ids, and when the request of an answer was sent. It never sends.
//! The ids of an agent's requests begin with a hint of whose they are, since an answer says nothing else of it: 64 random bits
//! are left, and an answer is authenticated besides. An onlooker learns nothing new, for requests bear a name.
//! Waiting -> answered (from the address that was asked) or given up after [`ANSWER_DEADLINE`].
//! Bounds: [`MAX_WAITING`] requests; the oldest is given up for one more.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use zeroize::Zeroizing;

use crate::stun::TransactionId;

/// How long an answer is waited for; a later one counts for nothing.
/// 4 s: above the round trip of any path worth taking, queues included, and the window of the budget of checks.
pub const ANSWER_DEADLINE: Duration = Duration::from_secs(4);

/// Most requests that wait at one time. 40 pairs of 9 checks in [`ANSWER_DEADLINE`] are 360.
pub const MAX_WAITING: usize = 512;

/// The requests of one machine that wait for an answer.
#[derive(Debug)]
pub(super) struct Transactions {
    seed: Zeroizing<[u8; 32]>,
    hint: Option<Hint>,
    drawn: u64,
    waiting: BTreeMap<TransactionId, Waiting>,
    /// Oldest first; answered ones are still in it.
    order: VecDeque<(Instant, TransactionId)>,
}

/// The first bytes of an agent's ids: random, but the same in all of them.
pub(super) type Hint = [u8; 4];

/// The hint in an id, if its request was an agent's.
pub(super) fn hint_of(id: TransactionId) -> Hint {
    let [a, b, c, d, ..] = id.0;
    [a, b, c, d]
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    asked: SocketAddr,
    at: Instant,
}

/// Why an answer counts for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unasked {
    /// Nothing with its id waits.
    Unknown,
    /// Somebody else was asked.
    WrongSource,
}

impl Transactions {
    /// No requests; their ids will be drawn from `seed`, which must be random and used here alone.
    pub(super) fn new(seed: [u8; 32]) -> Self {
        Self { seed: Zeroizing::new(seed), hint: None, drawn: 0, waiting: BTreeMap::new(), order: VecDeque::new() }
    }

    /// The same, with ids that begin with a hint.
    pub(super) fn hinted(seed: [u8; 32]) -> Self {
        let mut transactions = Self::new(seed);
        transactions.hint = Some(hint_of(transactions.draw()));
        transactions
    }

    /// What all ids begin with, if anything.
    pub(super) fn hint(&self) -> Option<Hint> {
        self.hint
    }

    /// The id of a request that is sent to `asked` now.
    pub(super) fn begin(&mut self, asked: SocketAddr, now: Instant) -> TransactionId {
        self.expire(now);
        if self.order.len() >= MAX_WAITING {
            self.give_up_oldest();
        }
        let mut id = self.draw();
        if let Some(hint) = self.hint {
            id.0[..hint.len()].copy_from_slice(&hint);
        }
        self.waiting.insert(id, Waiting { asked, at: now });
        self.order.push_back((now, id));
        id
    }

    fn draw(&mut self) -> TransactionId {
        let hash = blake3::keyed_hash(&self.seed, &self.drawn.to_be_bytes());
        self.drawn += 1;
        let mut id = TransactionId([0; 12]);
        id.0.copy_from_slice(&hash.as_bytes()[..12]);
        id
    }

    /// When the request was sent that this answer belongs to; it goes on waiting.
    pub(super) fn find(&mut self, id: TransactionId, from: SocketAddr, now: Instant) -> Result<Instant, Unasked> {
        self.expire(now);
        let waiting = self.waiting.get(&id).ok_or(Unasked::Unknown)?;
        if waiting.asked == from { Ok(waiting.at) } else { Err(Unasked::WrongSource) }
    }

    /// The request is answered.
    pub(super) fn end(&mut self, id: TransactionId) {
        self.waiting.remove(&id);
    }

    fn expire(&mut self, now: Instant) {
        while self.order.front().is_some_and(|(at, _)| *at + ANSWER_DEADLINE <= now) {
            self.give_up_oldest();
        }
    }

    fn give_up_oldest(&mut self) {
        if let Some((_, id)) = self.order.pop_front() {
            self.waiting.remove(&id);
        }
    }
}
