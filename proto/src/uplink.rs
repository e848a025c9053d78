//! The life of one instance's connection to the relay, and who it says is in the room.
//!
//! In: what the connection brings (`handle_*`) and `now`. Out: frames and pings to send, and [`Event`]s: connect, drop
//! the connection, who came, moved or went. Never gives up: every end leads to another try after a pause.
//!
//! ```text
//! Waiting ──pause over──▶ Connecting ──upgraded──▶ Joining ──Welcome──▶ Joined
//!    ▲                        │                       │                    │
//!    └──────── refused, closed, silent or drained: jittered back-off ──────┘
//! ```
//!
//! Members are told apart by instance, not by slot: after a rejoin only those that really went are reported as gone,
//! and an instance that came back before its old connection was reaped has simply moved. An instance id belongs to the
//! identity that was first seen with it, for as long as that one is known: nobody takes the place of another. Bounds:
//! pauses [`REJOIN_MIN`] to [`REJOIN_MAX`]; silence [`DEAD_AFTER`], or [`MOVED_PATIENCE`] after this machine moved; members [`MAX_MEMBERS`], each with a presence of at
//! most [`MAX_PRESENCE_BYTES`].

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand_core::CryptoRng;
use x25519_dalek::StaticSecret;

use crate::{
    admission,
    id::{InstanceId, PeerId, Slot},
    limits::{JOIN_DEADLINE, MAX_PRESENCE_BYTES, REJOIN_MAX, REJOIN_MIN, UPLINK_KEEPALIVE},
    token::RoomKeys,
    wire::relay::{Challenge, ClosingReason, Member, PeerToRelay, RelayToPeer, Welcome, control},
};

mod roster;

use roster::Roster;

/// Silence after which the connection counts as dead: two keep-alives unanswered, and 10 s for a slow network.
pub const DEAD_AFTER: Duration = UPLINK_KEEPALIVE.saturating_mul(2).saturating_add(Duration::from_secs(10));

/// Silence after which the connection counts as dead if this machine moved: three round trips of a satellite link.
pub const MOVED_PATIENCE: Duration = Duration::from_secs(2);

/// Time for DNS, TCP and the upgrade; a SYN that is lost twice comes through within 7 s (RFC 6298 §2).
pub const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Shortest interval of keep-alives, however soon the relay says that it reaps: a hostile one could ask for a flood.
const KEEPALIVE_MIN: Duration = Duration::from_secs(1);

/// Time in the room after which the next pause is the shortest again.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Failures in a row after which the pause has its full length.
const FAILURES_TO_FULL_PAUSE: u32 = (REJOIN_MAX.as_millis() / REJOIN_MIN.as_millis()).ilog2() + 1;

/// Most members that are remembered: a hostile relay could name peers without end. Ten times the relay's default.
pub const MAX_MEMBERS: usize = 10_000;

/// What the instance proves when it joins.
pub struct Credentials {
    /// The room's keys.
    pub keys: Arc<RoomKeys>,
    /// The machine's identity.
    pub identity: StaticSecret,
    /// This process.
    pub instance: InstanceId,
}

/// One connection after the other to the relay.
///
/// 1. On [`Event::Connect`] open a connection; say [`Uplink::handle_connected`] when the upgrade is done, or
///    [`Uplink::handle_disconnected`] when it cannot be made, and later when it ends.
/// 2. Say [`Uplink::handle_heard`] for whatever arrives, pongs included, and [`Uplink::handle_control`] for control frames.
/// 3. On [`Event::Disconnect`] drop the connection or the try; nothing more of it may be handed in.
/// 4. After every call drain [`Uplink::poll_transmit`] and [`Uplink::poll_event`], then sleep until
///    [`Uplink::poll_timeout`] and say [`Uplink::handle_timeout`].
pub struct Uplink {
    credentials: Credentials,
    presence: Vec<u8>,
    /// Whether the relay of this connection was told the newest presence.
    presence_told: bool,
    state: State,
    failures: u32,
    heard: Instant,
    /// When something must have been heard, if this machine moved.
    answer_by: Option<Instant>,
    roster: Roster,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting { until: Instant },
    Connecting { deadline: Instant },
    Joining { deadline: Instant, answered: bool },
    Joined { since: Instant, keepalive: Duration, ping_at: Instant, roster_complete: bool },
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
    /// A known instance has another slot; or after a rejoin one at all, be it the same number.
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
            presence_told: false,
            state: State::Waiting { until: now },
            failures: 0,
            heard: now,
            answer_by: None,
            roster: Roster::default(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Whether the instance is in the room and knows who else is.
    pub fn is_joined(&self) -> bool {
        matches!(self.state, State::Joined { roster_complete: true, .. })
    }

    /// The instance behind a slot of this connection.
    pub fn instance(&self, slot: Slot) -> Option<InstanceId> {
        self.roster.instance(slot)
    }

    /// The identity of a known instance, as the relay proved it.
    pub fn identity(&self, instance: InstanceId) -> Option<PeerId> {
        self.roster.identity(instance)
    }

    /// Who is in the room, as far as this connection was told.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.roster.members()
    }

    /// Takes a new sealed presence, for the room now and for later joins.
    pub fn set_presence(&mut self, sealed: Vec<u8>) {
        self.presence = sealed;
        self.presence_told = false;
        self.tell_presence();
    }

    fn tell_presence(&mut self) {
        if matches!(self.state, State::Joined { .. }) && !self.presence_told {
            self.presence_told = true;
            self.transmits.push_back(Transmit::Frame(control(&PeerToRelay::Presence(self.presence.clone()))));
        }
    }

    /// The connection stands and was upgraded; the relay speaks first.
    pub fn handle_connected(&mut self, now: Instant) {
        if matches!(self.state, State::Connecting { .. }) {
            self.heard = now;
            self.state = State::Joining { deadline: now + JOIN_DEADLINE, answered: false };
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
        self.answer_by = None;
    }

    /// This machine is in another place of the network now, or slept. `is_cut`: the address that the connection was made from
    /// is gone, so nothing will ever come over it again; otherwise the relay is asked whether it still hears us.
    pub fn handle_moved(&mut self, is_cut: bool, now: Instant, rng: &mut impl CryptoRng) {
        match &mut self.state {
            State::Waiting { until } => {
                // Whatever failed before failed elsewhere.
                *until = now;
                self.failures = 0;
            }
            State::Connecting { .. } | State::Joining { .. } | State::Joined { .. } if is_cut => {
                self.break_off(LostReason::Broken, now, rng);
                self.come_back(now);
            }
            State::Joined { ping_at, .. } => {
                *ping_at = now;
                self.answer_by = Some(now + MOVED_PATIENCE);
            }
            State::Connecting { .. } | State::Joining { .. } => {}
        }
    }

    /// Joins again at once, if this is no connection that keeps breaking.
    fn come_back(&mut self, now: Instant) {
        if let State::Waiting { until } = &mut self.state
            && self.failures <= 1
        {
            *until = now;
        }
    }

    /// The relay itself said something.
    pub fn handle_control(&mut self, word: RelayToPeer, now: Instant, rng: &mut impl CryptoRng) {
        self.handle_heard(now);
        match (self.state, word) {
            (State::Waiting { .. } | State::Connecting { .. }, _) => {}
            (_, RelayToPeer::Closing(reason)) => self.break_off(LostReason::Closed(reason), now, rng),
            (_, RelayToPeer::Drain { jitter_ms }) => self.handle_drain(jitter_ms, now, rng),
            (State::Joining { deadline, answered: false }, RelayToPeer::Challenge(challenge)) => {
                self.state = State::Joining { deadline, answered: true };
                self.handle_challenge(&challenge, now, rng);
            }
            (State::Joining { answered: true, .. }, RelayToPeer::Welcome(welcome)) => self.handle_welcome(welcome, now),
            (State::Joined { roster_complete, .. }, word) => self.handle_room(word, roster_complete, now, rng),
            (State::Joining { .. }, _) => self.break_off(LostReason::Misbehaved, now, rng),
        }
    }

    fn handle_room(&mut self, word: RelayToPeer, roster_complete: bool, now: Instant, rng: &mut impl CryptoRng) {
        match word {
            RelayToPeer::Roster { members, last } if !roster_complete => {
                for member in members {
                    self.add(member, now, rng);
                }
                if last {
                    self.complete_roster();
                }
            }
            RelayToPeer::Joined(member) => self.add(member, now, rng),
            RelayToPeer::Left(slot) => self.roster.remove(slot, &mut self.events),
            RelayToPeer::Presence { sealed, .. } if sealed.len() > MAX_PRESENCE_BYTES => {
                self.break_off(LostReason::Misbehaved, now, rng);
            }
            RelayToPeer::Presence { slot, sealed } => self.roster.change_presence(slot, sealed, &mut self.events),
            // Refusals are for who sent the message: the exchange.
            RelayToPeer::Refused(_) => {}
            RelayToPeer::Roster { .. }
            | RelayToPeer::Challenge(_)
            | RelayToPeer::Welcome(_)
            | RelayToPeer::Closing(_)
            | RelayToPeer::Drain { .. } => self.break_off(LostReason::Misbehaved, now, rng),
        }
    }

    fn handle_challenge(&mut self, challenge: &Challenge, now: Instant, rng: &mut impl CryptoRng) {
        let Credentials { keys, identity, instance } = &self.credentials;
        self.presence_told = true;
        match admission::join(challenge, keys, identity, *instance, self.presence.clone()) {
            Ok(join) => self.transmits.push_back(Transmit::Frame(control(&PeerToRelay::Join(join)))),
            Err(_) => self.break_off(LostReason::Misbehaved, now, rng),
        }
    }

    fn handle_welcome(&mut self, welcome: Welcome, now: Instant) {
        // A third, so that two lost pings in a row do not end the connection.
        let reaped_after = Duration::from_millis(welcome.idle_timeout_ms.into());
        let keepalive = (reaped_after / 3).clamp(KEEPALIVE_MIN, UPLINK_KEEPALIVE);
        self.state = State::Joined { since: now, keepalive, ping_at: now + keepalive, roster_complete: false };
        self.events.push_back(Event::Joined(welcome));
        self.tell_presence();
    }

    fn handle_drain(&mut self, jitter_ms: u32, now: Instant, rng: &mut impl CryptoRng) {
        let jitter = Duration::from_millis(jitter_ms.into()).min(REJOIN_MAX);
        self.break_off(LostReason::Drained, now, rng);
        // The back-off stays the least: a relay that drains everybody at once, over and over, is not flooded with
        // joins.
        if let State::Waiting { until } = &mut self.state {
            *until = (*until).max(now + random_up_to(jitter, rng));
        }
    }

    fn add(&mut self, member: Member, now: Instant, rng: &mut impl CryptoRng) {
        if !matches!(self.state, State::Joined { .. }) || member.instance == self.credentials.instance {
            return;
        }
        if member.presence.len() > MAX_PRESENCE_BYTES {
            return self.break_off(LostReason::Misbehaved, now, rng);
        }
        self.roster.add(member, &mut self.events);
    }

    fn complete_roster(&mut self) {
        if let State::Joined { roster_complete, .. } = &mut self.state {
            *roster_complete = true;
            self.roster.complete(&mut self.events);
            self.events.push_back(Event::RosterComplete);
        }
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
        if reason.lasts() {
            self.failures = self.failures.max(FAILURES_TO_FULL_PAUSE);
        }
        self.state = State::Waiting { until: now + pause(self.failures, rng) };
        self.answer_by = None;
        self.failures = self.failures.saturating_add(1);
        self.transmits.clear();
        self.roster.begin_anew(&mut self.events);
        self.events.push_back(Event::Lost(reason));
    }

    /// When [`Uplink::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        match self.state {
            State::Waiting { until } => until,
            State::Connecting { deadline } | State::Joining { deadline, .. } => deadline,
            State::Joined { ping_at, .. } => ping_at.min(self.dead_at()),
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: Instant, rng: &mut impl CryptoRng) {
        let dead_at = self.dead_at();
        match &mut self.state {
            State::Waiting { until } if now >= *until => {
                self.state = State::Connecting { deadline: now + CONNECT_DEADLINE };
                self.events.push_back(Event::Connect);
            }
            State::Connecting { deadline } if now >= *deadline => self.break_off(LostReason::NoConnection, now, rng),
            State::Joining { deadline, .. } if now >= *deadline => self.break_off(LostReason::Silent, now, rng),
            State::Joined { .. } if now >= dead_at => {
                let has_moved = self.answer_by.take().is_some();
                self.break_off(LostReason::Silent, now, rng);
                if has_moved {
                    self.come_back(now);
                }
            }
            State::Joined { keepalive, ping_at, .. } if now >= *ping_at => {
                *ping_at = now + *keepalive;
                self.transmits.push_back(Transmit::Ping);
            }
            State::Waiting { .. } | State::Connecting { .. } | State::Joining { .. } | State::Joined { .. } => {}
        }
    }

    /// When the connection counts as dead if nothing is heard.
    fn dead_at(&self) -> Instant {
        let usual = self.heard + DEAD_AFTER;
        self.answer_by.map_or(usual, |by| by.min(usual))
    }

    /// What to send next.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// What happened next.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }
}

impl LostReason {
    /// Whether trying again soon would only end the same way.
    fn lasts(self) -> bool {
        match self {
            Self::Closed(reason) => match reason {
                ClosingReason::BadProof
                | ClosingReason::RoomFull
                | ClosingReason::AddressLimit
                | ClosingReason::RelayFull => true,
                ClosingReason::JoinTimeout
                | ClosingReason::Malformed
                | ClosingReason::OutOfTurn
                | ClosingReason::Idle
                | ClosingReason::SlowReader
                | ClosingReason::ShuttingDown => false,
            },
            Self::NoConnection | Self::Broken | Self::Silent | Self::Drained | Self::Misbehaved => false,
        }
    }
}

/// Exponential back-off with full jitter above the half, so that peers of a relay that came back do not come at once.
fn pause(failures: u32, rng: &mut impl CryptoRng) -> Duration {
    let whole = REJOIN_MIN.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX)).min(REJOIN_MAX);
    let half = whole / 2;
    half + random_up_to(half, rng)
}

/// The bias of the remainder does not matter for pauses.
fn random_up_to(longest: Duration, rng: &mut impl CryptoRng) -> Duration {
    let bound = u64::try_from(longest.as_micros()).unwrap_or(u64::MAX - 1) + 1;
    Duration::from_micros(rng.next_u64() % bound)
}
