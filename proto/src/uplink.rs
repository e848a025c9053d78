//! The life of one instance's connection to the relay, and who it says is in the room.
//!
//! In: what the connection brings (`handle_*`) and `now`. Out: frames and pings to send, and [`Event`]s: connect, drop the
//! connection, who came, moved or went. Never gives up: every end leads to another try after a pause.
//!
//! ```text
//! Waiting ──pause over──▶ Connecting ──upgraded──▶ Joining ──Welcome──▶ Joined
//!    ▲                        │                       │                    │
//!    └──────── refused, closed, silent or drained: jittered back-off ──────┘
//! ```
//!
//! Members are told apart by instance, not by slot: after a rejoin only those that really went are reported as gone, and
//! an instance that came back before its old connection was reaped has simply moved.
//! Bounds: pauses [`REJOIN_MIN`] to [`REJOIN_MAX`]; silence [`DEAD_AFTER`]; members [`MAX_MEMBERS`].

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand_core::CryptoRng;
use x25519_dalek::StaticSecret;

use crate::{
    admission,
    id::{InstanceId, PeerId, Slot},
    limits::{JOIN_DEADLINE, REJOIN_MAX, REJOIN_MIN, UPLINK_KEEPALIVE},
    token::RoomKeys,
    wire::relay::{Challenge, ClosingReason, Member, PeerToRelay, RelayToPeer, Welcome, control},
};

/// Silence after which the connection counts as dead: two keep-alives unanswered, and 10 s for a slow network.
pub const DEAD_AFTER: Duration = Duration::from_secs(2 * 25 + 10);

/// Time for DNS, TCP and the upgrade; a SYN that is lost twice comes through within 7 s (RFC 6298 §2).
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Time in the room after which the next pause is the shortest again.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Most members that are remembered: a hostile relay could name peers without end. Ten times the relay's default.
pub const MAX_MEMBERS: usize = 10_000;

/// What the instance proves when it joins.
pub struct Credentials {
    /// The room's keys.
    pub keys: std::sync::Arc<RoomKeys>,
    /// The machine's identity.
    pub identity: StaticSecret,
    /// This process.
    pub instance: InstanceId,
}

/// One connection after the other to the relay. Call order: see [`crate`].
pub struct Uplink {
    credentials: Credentials,
    presence: Vec<u8>,
    state: State,
    failures: u32,
    heard: Instant,
    ping_at: Option<Instant>,
    members: BTreeMap<InstanceId, Member>,
    /// Members known from the connection before, until the new roster is complete.
    unconfirmed: BTreeMap<InstanceId, Member>,
    slots: BTreeMap<Slot, InstanceId>,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting { until: Instant },
    Connecting { deadline: Instant },
    Joining { deadline: Instant },
    Joined { since: Instant, roster_complete: bool },
}

/// What to send to the relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transmit {
    /// A control frame.
    Frame(Bytes),
    /// A WebSocket ping.
    Ping,
}

/// What happened, or is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Open a connection; say [`Uplink::handle_connected`] or [`Uplink::handle_disconnected`].
    Connect,
    /// Drop the connection, or the try to make one; nothing needs to be said of that.
    Disconnect,
    /// In the room, under this slot.
    Joined(Welcome),
    /// All who were in the room at joining are known.
    RosterComplete,
    /// Somebody is in the room who was not known.
    MemberJoined(Member),
    /// A known instance has another slot.
    MemberMoved(Member),
    /// A known instance has another presence.
    PresenceChanged(Member),
    /// A known instance is no longer in the room.
    MemberLeft(Member),
    /// Out of the room; who is in it is unknown until [`Event::RosterComplete`].
    Lost(LostReason),
}

/// Why the connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LostReason {
    /// It could not be made.
    #[error("the relay cannot be reached")]
    NoConnection,
    /// It broke, or the relay closed it without a word.
    #[error("the connection broke")]
    Broken,
    /// Nothing was heard for [`DEAD_AFTER`], or the join took longer than [`JOIN_DEADLINE`].
    #[error("the relay went silent")]
    Silent,
    /// The relay said why it closes.
    #[error("{0}")]
    Closed(ClosingReason),
    /// The relay is restarting.
    #[error("the relay is restarting")]
    Drained,
    /// The relay broke the protocol.
    #[error("the relay broke the protocol")]
    Misbehaved,
}

impl Uplink {
    /// An uplink that connects at once.
    pub fn new(credentials: Credentials, presence: Vec<u8>, now: Instant) -> Self {
        Self {
            credentials,
            presence,
            state: State::Waiting { until: now },
            failures: 0,
            heard: now,
            ping_at: None,
            members: BTreeMap::new(),
            unconfirmed: BTreeMap::new(),
            slots: BTreeMap::new(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Whether the instance is in the room and knows who else is.
    pub fn is_joined(&self) -> bool {
        matches!(self.state, State::Joined { roster_complete: true, .. })
    }

    /// The instance behind a slot.
    pub fn instance(&self, slot: Slot) -> Option<InstanceId> {
        self.slots.get(&slot).copied()
    }

    /// Takes a new sealed presence, for the room now and for later joins.
    pub fn set_presence(&mut self, sealed: Vec<u8>) {
        if matches!(self.state, State::Joined { .. }) {
            self.transmits.push_back(Transmit::Frame(control(&PeerToRelay::Presence(sealed.clone()))));
        }
        self.presence = sealed;
    }

    /// The connection stands and was upgraded; the relay speaks first.
    pub fn handle_connected(&mut self, now: Instant) {
        if matches!(self.state, State::Connecting { .. }) {
            self.heard = now;
            self.state = State::Joining { deadline: now + JOIN_DEADLINE };
        }
    }

    /// The connection ended, or could not be made.
    pub fn handle_disconnected(&mut self, now: Instant, rng: &mut impl CryptoRng) {
        match self.state {
            State::Waiting { .. } => {}
            State::Connecting { .. } => self.lose(LostReason::NoConnection, now, rng),
            State::Joining { .. } | State::Joined { .. } => self.lose(LostReason::Broken, now, rng),
        }
    }

    /// Something came over the connection, be it only a pong.
    pub fn handle_heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// The relay itself said something.
    pub fn handle_control(&mut self, word: RelayToPeer, now: Instant, rng: &mut impl CryptoRng) {
        self.heard = now;
        match (self.state, word) {
            (State::Waiting { .. } | State::Connecting { .. }, _) => {}
            (_, RelayToPeer::Closing(reason)) => self.handle_closing(reason, now, rng),
            (_, RelayToPeer::Drain { jitter_ms }) => self.handle_drain(jitter_ms, now, rng),
            (State::Joining { .. }, RelayToPeer::Challenge(challenge)) => self.handle_challenge(&challenge, now, rng),
            (State::Joining { .. }, RelayToPeer::Welcome(welcome)) => self.handle_welcome(welcome, now),
            (State::Joined { .. }, word) => self.handle_room(word, now, rng),
            (State::Joining { .. }, _) => self.break_off(LostReason::Misbehaved, now, rng),
        }
    }

    fn handle_room(&mut self, word: RelayToPeer, now: Instant, rng: &mut impl CryptoRng) {
        match word {
            RelayToPeer::Roster { members, last } => {
                members.into_iter().for_each(|member| self.add(member));
                if last {
                    self.complete_roster();
                }
            }
            RelayToPeer::Joined(member) => self.add(member),
            RelayToPeer::Left(slot) => self.remove(slot),
            RelayToPeer::Presence { slot, sealed } => self.change_presence(slot, sealed),
            // Refusals are for who sent the message: the exchange.
            RelayToPeer::Refused(_) => {}
            RelayToPeer::Challenge(_)
            | RelayToPeer::Welcome(_)
            | RelayToPeer::Closing(_)
            | RelayToPeer::Drain { .. } => self.break_off(LostReason::Misbehaved, now, rng),
        }
    }

    fn handle_challenge(&mut self, challenge: &Challenge, now: Instant, rng: &mut impl CryptoRng) {
        let Credentials { keys, identity, instance } = &self.credentials;
        match admission::join(challenge, keys, identity, *instance, self.presence.clone()) {
            Ok(join) => self.transmits.push_back(Transmit::Frame(control(&PeerToRelay::Join(join)))),
            Err(_) => self.break_off(LostReason::Misbehaved, now, rng),
        }
    }

    fn handle_welcome(&mut self, welcome: Welcome, now: Instant) {
        self.state = State::Joined { since: now, roster_complete: false };
        self.ping_at = Some(now + UPLINK_KEEPALIVE);
        self.unconfirmed.append(&mut self.members);
        self.slots.clear();
        self.events.push_back(Event::Joined(welcome));
    }

    fn handle_closing(&mut self, reason: ClosingReason, now: Instant, rng: &mut impl CryptoRng) {
        // Trying again at once would only be refused again.
        if matches!(reason, ClosingReason::BadProof | ClosingReason::RoomFull | ClosingReason::AddressLimit) {
            self.failures = self.failures.max(REJOIN_MAX.as_secs().ilog2() + 3);
        }
        self.break_off(LostReason::Closed(reason), now, rng);
    }

    fn handle_drain(&mut self, jitter_ms: u32, now: Instant, rng: &mut impl CryptoRng) {
        self.break_off(LostReason::Drained, now, rng);
        let pause = random_below(u64::from(jitter_ms) + 1, rng);
        self.state = State::Waiting { until: now + Duration::from_millis(pause) };
    }

    fn add(&mut self, member: Member) {
        if member.instance == self.credentials.instance {
            return;
        }
        self.slots.insert(member.slot, member.instance);
        let before = self.members.get(&member.instance).cloned();
        let Some(before) = before.or_else(|| self.unconfirmed.remove(&member.instance)) else {
            if self.members.len() < MAX_MEMBERS {
                self.members.insert(member.instance, member.clone());
                self.events.push_back(Event::MemberJoined(member));
            }
            return;
        };
        // The same instance under another identity would be a lie of the relay: the sealed presence tells, later on.
        self.slots.retain(|slot, instance| *instance != member.instance || *slot == member.slot);
        self.members.insert(member.instance, member.clone());
        if before.slot != member.slot {
            self.events.push_back(Event::MemberMoved(member.clone()));
        }
        if before.presence != member.presence {
            self.events.push_back(Event::PresenceChanged(member));
        }
    }

    fn remove(&mut self, slot: Slot) {
        let Some(instance) = self.slots.remove(&slot) else { return };
        if self.members.get(&instance).is_some_and(|member| member.slot == slot) {
            self.members
                .remove(&instance)
                .into_iter()
                .for_each(|member| self.events.push_back(Event::MemberLeft(member)));
        }
    }

    fn change_presence(&mut self, slot: Slot, sealed: Vec<u8>) {
        let Some(member) = self.slots.get(&slot).and_then(|instance| self.members.get_mut(instance)) else { return };
        if member.presence != sealed {
            member.presence = sealed;
            self.events.push_back(Event::PresenceChanged(member.clone()));
        }
    }

    fn complete_roster(&mut self) {
        let State::Joined { roster_complete, .. } = &mut self.state else { return };
        *roster_complete = true;
        let gone = std::mem::take(&mut self.unconfirmed);
        self.events.extend(gone.into_values().map(Event::MemberLeft));
        self.events.push_back(Event::RosterComplete);
    }

    /// Ends a connection that still stands.
    fn break_off(&mut self, reason: LostReason, now: Instant, rng: &mut impl CryptoRng) {
        self.events.push_back(Event::Disconnect);
        self.lose(reason, now, rng);
    }

    fn lose(&mut self, reason: LostReason, now: Instant, rng: &mut impl CryptoRng) {
        if let State::Joined { since, .. } = self.state
            && now.duration_since(since) >= STABLE_AFTER
        {
            self.failures = 0;
        }
        self.transmits.clear();
        self.ping_at = None;
        self.state = State::Waiting { until: now + pause(self.failures, rng) };
        self.failures = self.failures.saturating_add(1);
        self.events.push_back(Event::Lost(reason));
    }

    /// When [`Uplink::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        match self.state {
            State::Waiting { until } => until,
            State::Connecting { deadline } | State::Joining { deadline } => deadline,
            State::Joined { .. } => {
                let dead = self.heard + DEAD_AFTER;
                self.ping_at.map_or(dead, |ping| ping.min(dead))
            }
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant, rng: &mut impl CryptoRng) {
        match self.state {
            State::Waiting { until } if now >= until => {
                self.state = State::Connecting { deadline: now + CONNECT_DEADLINE };
                self.events.push_back(Event::Connect);
            }
            State::Connecting { deadline } if now >= deadline => self.break_off(LostReason::NoConnection, now, rng),
            State::Joining { deadline } if now >= deadline => self.break_off(LostReason::Silent, now, rng),
            State::Joined { .. } if now >= self.heard + DEAD_AFTER => self.break_off(LostReason::Silent, now, rng),
            State::Joined { .. } if self.ping_at.is_some_and(|ping| now >= ping) => {
                self.ping_at = Some(now + UPLINK_KEEPALIVE);
                self.transmits.push_back(Transmit::Ping);
            }
            State::Waiting { .. } | State::Connecting { .. } | State::Joining { .. } | State::Joined { .. } => {}
        }
    }

    /// What to send next.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// What happened next.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The identity of a known instance, as the relay proved it.
    pub fn identity(&self, instance: InstanceId) -> Option<PeerId> {
        let member = self.members.get(&instance).or_else(|| self.unconfirmed.get(&instance));
        member.map(|member| member.peer)
    }
}

/// Exponential back-off with full jitter above the half, so that peers of a relay that came back do not come at once.
fn pause(failures: u32, rng: &mut impl CryptoRng) -> Duration {
    let whole = REJOIN_MIN.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX)).min(REJOIN_MAX);
    let half = whole / 2;
    half + Duration::from_micros(random_below(u64::try_from(half.as_micros()).unwrap_or(u64::MAX) + 1, rng))
}

/// A number below `bound`; the bias of the remainder does not matter for pauses.
fn random_below(bound: u64, rng: &mut impl CryptoRng) -> u64 {
    rng.next_u64() % bound.max(1)
}
