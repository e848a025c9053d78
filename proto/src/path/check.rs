//! Connectivity checks: how one is written and recognised, and when a pair is checked.
//!
//! In: the key that both sides agreed, the numbers of checks that came, and `now`. Out: datagrams, whether a check is fresh,
//! and the time of the next check of a pair. It never decides which path is taken.
//! A check is a STUN binding request with the other side's USERNAME, a rising number and MESSAGE-INTEGRITY-SHA256. Each
//! direction has a key of its own, so that a reflected check is nobody's; a number counts once, so that a repeated check
//! is nothing. The request is longer than its answer, so that nobody gains by borrowing our answers.
//! A pair's plan: idle -> burst (six checks in 0.8 s) -> idle; a trigger adds one check, and a proof ends the burst.
//! Bounds: [`BUDGET`] checks of a pair in [`BUDGET_WINDOW`], `HEARD_WINDOW` numbers remembered.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use zeroize::{Zeroize, ZeroizeOnDrop};

use super::Ignored;
use crate::stun::{Class, Draft, IntegrityKey, Message, TransactionId};

/// When a pair is checked, after the start of a burst. The two sides begin up to a second apart, because the relay brings
/// candidates to one of them later; the doubling covers that, and the first checks find an open path at once.
pub const BURST: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
];

/// Most checks of one pair in [`BUDGET_WINDOW`], for whatever reason; further ones wait. A burst, one in answer to each of the
/// other side's, and four to look after a path that was taken and fell silent at once.
pub const BUDGET: usize = 16;

/// See [`BUDGET`].
pub const BUDGET_WINDOW: Duration = Duration::from_secs(4);

/// Age of a pair's newest check below which none is sent in answer to the other side's: its own answer is under way.
/// 20 ms: longer than the two sides' first checks of one pair are apart, shorter than the round trips that matter.
const JUST_CHECKED: Duration = Duration::from_millis(20);

/// Numbers of checks that are remembered; an older one counts as repeated. A slow path's check may be overtaken by as many
/// of a fast one's: more than 2 s at full pace.
const HEARD_WINDOW: u64 = 512;

/// Whose checks these are: the instance with the lower id controls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The lower (`PeerId`, `InstanceId`).
    Controlling,
    /// The higher one.
    Controlled,
}

/// What both sides of a link authenticate checks with. Used for one [`super::Agent`], since numbers begin at 0 with it.
/// Debug never prints it.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct CheckKey([u8; 32]);

impl CheckKey {
    /// The key that follows from both sides' shares: that of the lower id first, whoever offered.
    pub fn agree(lower_share: &[u8; 32], higher_share: &[u8; 32]) -> Self {
        let mut shares = [0; 64];
        shares[..32].copy_from_slice(lower_share);
        shares[32..].copy_from_slice(higher_share);
        let key = Self(blake3::derive_key("peerfleet v1 connectivity check key", &shares));
        shares.zeroize();
        key
    }

    /// The key of searches: their checks are numbered apart from the agent's.
    pub(super) fn for_searches(&self) -> Self {
        Self(blake3::derive_key("peerfleet v1 search key", &self.0))
    }

    fn integrity(&self, sender: Role) -> IntegrityKey {
        IntegrityKey::new(&blake3::derive_key(
            match sender {
                Role::Controlling => "peerfleet v1 checks of the controlling side",
                Role::Controlled => "peerfleet v1 checks of the controlled side",
            },
            &self.0,
        ))
    }

    fn username(&self, sender: Role) -> Name {
        let name = blake3::derive_key(
            match sender {
                Role::Controlling => "peerfleet v1 name of the controlling side's checks",
                Role::Controlled => "peerfleet v1 name of the controlled side's checks",
            },
            &self.0,
        );
        let mut text = [0; 16];
        for (at, symbol) in text.iter_mut().enumerate() {
            *symbol = b"0123456789abcdef"[usize::from(name[at] & 0xF)];
        }
        text
    }
}

impl std::fmt::Debug for CheckKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CheckKey(…)")
    }
}

/// Writes our checks and answers, and recognises the other side's.
#[derive(Debug)]
pub(super) struct Codec {
    ours: Direction,
    theirs: Direction,
    next_number: u64,
    heard: Heard,
}

/// What one side signs with, and how it names its requests so that others are told from them without a MAC.
#[derive(Debug)]
struct Direction {
    key: IntegrityKey,
    username: Name,
}

/// How one side of one link names its requests: 64 bits of a hash of the check key, in hexadecimal.
pub(super) type Name = [u8; 16];

impl Codec {
    /// The codec of the side that has this role.
    pub(super) fn new(key: &CheckKey, role: Role) -> Self {
        let of = |sender| Direction { key: key.integrity(sender), username: key.username(sender) };
        let (ours, theirs) = match role {
            Role::Controlling => (of(Role::Controlling), of(Role::Controlled)),
            Role::Controlled => (of(Role::Controlled), of(Role::Controlling)),
        };
        Self { ours, theirs, next_number: 0, heard: Heard::default() }
    }

    /// The next check.
    pub(super) fn request(&mut self, transaction: TransactionId) -> Vec<u8> {
        let number = self.next_number;
        self.next_number += 1;
        Draft::new(Class::Request, transaction)
            .username(&self.ours.username)
            .check_number(number)
            .sign(&self.ours.key)
            .finish()
    }

    /// The answer to a check that came from `from`.
    pub(super) fn answer(&self, transaction: TransactionId, from: SocketAddr) -> Vec<u8> {
        Draft::new(Class::Success, transaction).mapped_address(from).sign(&self.ours.key).finish()
    }

    /// How the other side names its requests.
    pub(super) fn their_name(&self) -> Name {
        self.theirs.username
    }

    /// Whether a check is the other side's, intact, understood and seen for the first time.
    ///
    /// # Errors
    /// The first of these that it is not; nothing is remembered of such a check.
    pub(super) fn admit(&mut self, check: &Message<'_>) -> Result<(), Ignored> {
        if !self.is_addressed(check) {
            return Err(Ignored::NotOurs);
        }
        if !self.is_authentic(check) {
            return Err(Ignored::Forged);
        }
        if check.unknown_required().is_some() {
            return Err(Ignored::UnknownAttribute);
        }
        if !self.is_fresh(check) {
            return Err(Ignored::Repeated);
        }
        Ok(())
    }

    /// Whether a request claims to be the other side's: cheap, and proves nothing.
    fn is_addressed(&self, request: &Message<'_>) -> bool {
        request.username() == Some(&self.theirs.username)
    }

    /// Whether the other side made this message.
    pub(super) fn is_authentic(&self, message: &Message<'_>) -> bool {
        message.is_signed_by(&self.theirs.key)
    }

    /// Whether an authentic request is one that did not come before. Says so once.
    fn is_fresh(&mut self, request: &Message<'_>) -> bool {
        request.check_number().is_some_and(|number| self.heard.accept(number))
    }
}

/// The numbers of checks that came: the highest, and a bit for each of the [`HEARD_WINDOW`] up to it.
#[derive(Debug, Default)]
struct Heard {
    highest: Option<u64>,
    bits: [u64; (HEARD_WINDOW / 64) as usize],
}

impl Heard {
    fn accept(&mut self, number: u64) -> bool {
        match self.highest {
            Some(highest) if number <= highest => {
                if highest - number >= HEARD_WINDOW {
                    return false;
                }
            }
            lower => {
                let skipped = lower.map_or(HEARD_WINDOW, |lower| (number - lower).min(HEARD_WINDOW));
                // Places repeat every HEARD_WINDOW, which divides 2^64: below 0 they are those at the top.
                (0..skipped).for_each(|back| self.clear(number.wrapping_sub(back)));
                self.highest = Some(number);
            }
        }
        self.mark(number)
    }

    fn mark(&mut self, number: u64) -> bool {
        let (word, bit) = Self::place(number);
        let fresh = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        fresh
    }

    fn clear(&mut self, number: u64) {
        let (word, bit) = Self::place(number);
        self.bits[word] &= !bit;
    }

    fn place(number: u64) -> (usize, u64) {
        let at = number % HEARD_WINDOW;
        ((at / 64) as usize, 1 << (at % 64))
    }
}

/// When one pair is checked.
#[derive(Debug, Default)]
pub(super) struct Plan {
    burst: Option<Burst>,
    triggered: Option<Instant>,
    sent_at: Option<Instant>,
}

#[derive(Debug)]
struct Burst {
    began: Instant,
    step: usize,
}

/// How much a check matters, most first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// Packets came from there just now, or a path depends on it.
    Triggered,
    /// The first of a burst: it may be all that it takes.
    First,
    /// A later one of a burst.
    Repeated,
}

impl Plan {
    /// Starts a burst, or starts it again.
    pub(super) fn begin(&mut self, now: Instant) {
        self.burst = Some(Burst { began: now, step: 0 });
    }

    /// Starts a burst unless one is going on.
    pub(super) fn ensure(&mut self, now: Instant) {
        if self.burst.is_none() {
            self.begin(now);
        }
    }

    /// Adds one check, as soon as the budget allows.
    pub(super) fn trigger(&mut self, now: Instant) {
        self.triggered.get_or_insert(now);
    }

    /// The other side's check came: ours may get through now (RFC 8445 §7.3.1.4).
    pub(super) fn check_back(&mut self, now: Instant) {
        self.ensure(now);
        if self.sent_at.is_none_or(|sent_at| sent_at + JUST_CHECKED <= now) {
            self.trigger(now);
        }
    }

    /// The pair is proved: nothing more is to be found out.
    pub(super) fn finish(&mut self) {
        self.burst = None;
        self.triggered = None;
    }

    /// When the next check is wanted.
    pub(super) fn due(&self) -> Option<Instant> {
        let step = self.burst.as_ref().map(|burst| burst.began + BURST[burst.step]);
        [step, self.triggered].into_iter().flatten().min()
    }

    /// How much the next check matters.
    pub(super) fn urgency(&self) -> Urgency {
        match (&self.triggered, &self.burst) {
            (Some(_), _) => Urgency::Triggered,
            (None, Some(burst)) if burst.step == 0 => Urgency::First,
            (None, _) => Urgency::Repeated,
        }
    }

    /// A check was sent. Steps of the burst that it comes too late for count as taken.
    pub(super) fn sent(&mut self, now: Instant) {
        self.triggered = None;
        self.sent_at = Some(now);
        if let Some(burst) = &mut self.burst {
            burst.step = BURST.partition_point(|offset| burst.began + *offset <= now);
            if burst.step == BURST.len() {
                self.burst = None;
            }
        }
    }
}

/// What was spent of each address's [`BUDGET`]: it outlives the pair, which may be forgotten and learnt again.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Times of the newest checks, oldest first; at most [`BUDGET`] an address.
    spent: BTreeMap<SocketAddr, VecDeque<Instant>>,
}

impl Ledger {
    /// When a check that is wanted at `wanted` may be sent.
    pub(super) fn allowed(&self, to: &SocketAddr, wanted: Instant) -> Instant {
        let spent = self.spent.get(to).filter(|spent| spent.len() == BUDGET);
        let renewed = spent.and_then(VecDeque::front).map(|oldest| *oldest + BUDGET_WINDOW);
        renewed.map_or(wanted, |renewed| wanted.max(renewed))
    }

    /// Nothing was spent on this address.
    pub(super) fn forget(&mut self, to: &SocketAddr) {
        self.spent.remove(to);
    }

    /// A check was sent.
    pub(super) fn spend(&mut self, to: SocketAddr, now: Instant) {
        self.spent.retain(|_, spent| spent.back().is_some_and(|newest| *newest + BUDGET_WINDOW > now));
        let spent = self.spent.entry(to).or_default();
        if spent.len() == BUDGET {
            spent.pop_front();
        }
        spent.push_back(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codecs() -> [Codec; 2] {
        let key = CheckKey::agree(&[1; 32], &[2; 32]);
        [Role::Controlling, Role::Controlled].map(|role| Codec::new(&key, role))
    }

    #[test]
    fn a_number_counts_once_whatever_the_order() {
        let mut heard = Heard::default();
        let numbers = [0, 3, 1, 2, 700, 699, 189, 5000, 4489];
        assert!(numbers.into_iter().all(|number| heard.accept(number)));
        assert!(!numbers.into_iter().any(|number| heard.accept(number)));
        assert!(!heard.accept(5000 - HEARD_WINDOW), "too late to tell");
        assert!(heard.accept(5000 - HEARD_WINDOW + 2));
        assert!(heard.accept(u64::MAX) && !heard.accept(u64::MAX) && heard.accept(u64::MAX - 1));
    }

    #[test]
    fn a_check_is_the_other_sides_alone() {
        let [mut one, other] = codecs();
        let bytes = one.request(TransactionId([3; 12]));
        let check = Message::parse(&bytes).unwrap();
        assert!(other.is_addressed(&check) && other.is_authentic(&check));
        assert!(!one.is_addressed(&check) && !one.is_authentic(&check));
    }

    #[test]
    fn an_answer_is_not_longer_than_a_check() {
        let [mut one, other] = codecs();
        let check = one.request(TransactionId([3; 12]));
        assert!(other.answer(TransactionId([3; 12]), "[2001:db8::1]:9".parse().unwrap()).len() <= check.len());
    }

    #[test]
    fn shares_in_another_order_are_another_key() {
        let swapped = Codec::new(&CheckKey::agree(&[2; 32], &[1; 32]), Role::Controlled);
        let bytes = codecs()[0].request(TransactionId([3; 12]));
        assert!(!swapped.is_authentic(&Message::parse(&bytes).unwrap()));
    }

    #[test]
    fn nothing_secret_is_printed() {
        assert_eq!(format!("{:?}", CheckKey([0xAB; 32])), "CheckKey(…)");
        assert!(!format!("{:?}", codecs()[0]).contains("171"));
    }
}
