//! The search for a path through a hard NAT: where nobody can be asked for the port, many are tried at once.
//!
//! In: what both sides know of their NATs and addresses, the sockets that were opened, STUN datagrams and the socket each came
//! to, whether there is a path, `now`. Out: how many sockets to open, checks and answers with the socket to send each from,
//! which socket to keep, the next wake-up. It opens no socket, and sends to nothing but the other side's public address.
//!
//! A NAT whose mapping depends on the destination gives every flow another port, which the other side cannot know; the other
//! side's NAT lets in only what was sent to. So the side behind the hard NAT *opens* many flows to the other's one public
//! address, from a socket each, and the other side *probes* many ports of the hard one's address: by the birthday paradox
//! some of them meet ([`plan`] has the numbers). Whichever comes second passes both NATs. What then comes to one of the many
//! sockets is checked back from there; the first that is answered is proved, and kept. The opening side alone decides, so that
//! the two never keep different ones; the probing side answers, and its [`Agent`](super::Agent) learns the address from
//! the checks that the other's sends from the socket it kept.
//!
//! States: `Idle` (no use, or there is a path) -> `Waiting` -> `Opening` -> `Searching` -> `Found` -> `Idle`; a round that finds nothing
//! leads to `Waiting` again ([`PAUSES`]), the last of [`ROUNDS`] to `GivenUp` until the network of either side changes.
//!
//! Two traps of Linux routers. A packet that comes before anything was sent to its source may, if the router takes it for
//! itself, leave an entry in its table that keeps the port from the host behind it. Whether the router of one side or that of
//! the other does so is not known: in every other round the probing side goes first, else the one that opens ([`HEAD_START`]).
//! And one packet that came back does not open every NAT for good: a socket that was met sends a whole burst of checks.
//! Bounds: a packet every [`round::PACE`]; in a round [`plan::MAX_SOCKETS`] in [`round::PASSES`] passes or
//! [`plan::MAX_PROBES`], and [`round::MAX_MET`] bursts; [`ROUNDS`] rounds. A router's table has room for 4,096 flows at
//! least, and forgets these in 30 s.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{
    Handled, Ignored, MAX_QUEUED,
    candidate::{canonical, is_usable},
    check::{CheckKey, Codec, Role},
    transaction::{Transactions, Unasked},
};
use crate::stun::{Class, Message};

pub mod plan;
pub mod round;
pub mod side;

pub use plan::{Duty, NoSearch};
pub use side::Side;

use round::Round;

/// How long a link is given to find a path without a search, from its beginning, the loss of its path or a change of network:
/// its first burst of checks takes 0.8 s, and by then both sides usually know what their NATs do.
pub const SETTLE: Duration = Duration::from_secs(1);

/// How much later than the other side's opening the probing begins in the first and third round: opening 256 flows takes
/// half a second. In the second the one that opens is so much later than the other, whose probes take 2.1 s.
pub const HEAD_START: [Duration; 2] = [Duration::from_millis(600), Duration::from_millis(2200)];

/// Rounds without success after which no more are made: 97.6 % of all successes come with the first try, beyond the third
/// there are none to speak of (arXiv 2510.27500), and each of ours misses 2 % if it can succeed at all.
pub const ROUNDS: u32 = 3;

/// Time between the beginnings of rounds, after the first and after the second. The first is the least time between any two,
/// whatever happens: by then routers have forgotten the round before.
pub const PAUSES: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(300)];

/// Time for a path to come of a socket that was found.
const CONFIRM: Duration = Duration::from_secs(5);

/// One of the sockets opened for searches, by a number that the caller gives and never gives twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketId(pub u32);

/// What a [`Search`] is made of.
#[derive(Debug)]
pub struct Config {
    /// The link's key; searches derive their own from it.
    pub key: CheckKey,
    /// The lower id controls.
    pub role: Role,
    /// 32 random bytes, used here alone: transaction ids and the ports to probe are drawn from them.
    pub seed: [u8; 32],
    /// What became of searches for the same instance before.
    pub history: History,
}

/// What became of the searches for one instance. It outlives the link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct History {
    /// Rounds in a row that found nothing.
    pub failed: u32,
    /// When the last one began.
    pub began: Option<Instant>,
    /// What they were for: as what, and where the other side was.
    pub aim: Option<(Duty, SocketAddr)>,
}

/// A datagram to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shot {
    /// From which socket; `None` is the one that everything else goes through.
    pub from: Option<SocketId>,
    /// Where to.
    pub to: SocketAddr,
    /// What.
    pub bytes: Vec<u8>,
}

/// What happened, or is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Open so many sockets, and call [`Search::opened`]. What was kept of an earlier search is of no use any more.
    Open(usize),
    /// Packets between this socket and this address pass both NATs: keep it, and let the agent check the address from there.
    Found {
        /// The socket.
        socket: SocketId,
        /// The other side's address.
        remote: SocketAddr,
    },
    /// A round is over. Sockets opened for it and not kept can be closed.
    Ended {
        /// How.
        how: Ending,
        /// Packets that were sent in it, answers included.
        sent: u32,
        /// How long it took.
        took: Duration,
    },
}

/// How a round ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// A socket was found, or there is a path.
    Found,
    /// Nothing was found.
    Nothing,
    /// The sides are elsewhere now, or behind other NATs.
    Moved,
}

/// How the search stands, for who wants to know why there is no path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// There is a path.
    NotNeeded,
    /// There is nothing to search for.
    NoUse(NoSearch),
    /// It will begin.
    Waiting,
    /// It is going on.
    Searching,
    /// It found nothing, and will not be tried again before a network changes.
    GivenUp,
}

/// The search for a path to one instance.
///
/// After every call that takes `now` drain [`Search::poll_transmit`] and [`Search::poll_event`], then sleep until
/// [`Search::poll_timeout`] and call [`Search::handle_timeout`]. One call sends one packet at most, so that a caller with
/// several searches can space their packets.
#[derive(Debug)]
pub struct Search {
    // Where things stand.
    ours: Side,
    theirs: Side,
    has_path: bool,
    history: History,
    state: State,
    /// Since when there could be a path without a search.
    since: Instant,
    // How packets are made.
    codec: Codec,
    transactions: Transactions,
    seed: [u8; 32],
    rounds: u32,
    // What the caller has not fetched.
    outbox: VecDeque<Shot>,
    events: VecDeque<Event>,
    now: Instant,
}

#[derive(Debug)]
enum State {
    Idle,
    Waiting { at: Instant },
    Opening,
    Searching(Round),
    Found { until: Instant },
    GivenUp,
}

impl Search {
    /// A search that knows nothing of either side.
    pub fn new(config: Config, now: Instant) -> Self {
        Self {
            ours: Side::default(),
            theirs: Side::default(),
            has_path: false,
            history: config.history,
            state: State::Idle,
            since: now,
            codec: Codec::new(&config.key.for_searches(), config.role),
            transactions: Transactions::new(*blake3::keyed_hash(&config.seed, b"transactions").as_bytes()),
            seed: config.seed,
            rounds: 0,
            outbox: VecDeque::new(),
            events: VecDeque::new(),
            now,
        }
    }

    /// Where both sides are, in place of what was known before. If that makes another search of it, it begins anew.
    pub fn set_sides(&mut self, ours: Side, theirs: Side, now: Instant) {
        self.now = self.now.max(now);
        let before = self.aim();
        (self.ours, self.theirs) = (ours, theirs);
        let aim = self.aim();
        if aim == before {
            return;
        }
        if aim.is_ok() && self.history.aim != aim.ok() {
            (self.history.aim, self.history.failed) = (aim.ok(), 0);
        }
        self.end_round(Ending::Moved, now);
        self.plan_next(now);
    }

    /// Whether the link has a direct path.
    pub fn set_path(&mut self, has_path: bool, now: Instant) {
        self.now = self.now.max(now);
        if self.has_path == has_path {
            return;
        }
        self.has_path = has_path;
        self.history.failed = 0;
        self.since = now;
        self.end_round(Ending::Found, now);
        self.plan_next(now);
    }

    /// A network changed: what failed before may succeed now.
    pub fn restart(&mut self, now: Instant) {
        self.now = self.now.max(now);
        self.history.failed = 0;
        self.since = now;
        self.end_round(Ending::Moved, now);
        self.plan_next(now);
    }

    /// The sockets that [`Event::Open`] asked for, or as many as there could be.
    pub fn opened(&mut self, sockets: &[SocketId], now: Instant) {
        self.now = self.now.max(now);
        if !matches!(self.state, State::Opening) {
            return;
        }
        let Ok((duty, to)) = self.aim() else { return self.fail(now) };
        let port = if duty == Duty::Meet { plan::aim(self.theirs.nat.ports) } else { Some(to.port()) };
        let from: Vec<_> = sockets.iter().take(plan::MAX_SOCKETS).map(|socket| Some(*socket)).collect();
        match port {
            Some(port) if !from.is_empty() => {
                let to = SocketAddr::new(to.ip(), port);
                let wait = if self.goes_first(duty) { Duration::ZERO } else { HEAD_START[1] };
                self.state = State::Searching(Round::new(from, vec![to], wait, now));
            }
            _ => self.fail(now),
        }
    }

    /// Takes a datagram whose first byte says STUN, and the socket that it came to.
    pub fn handle_packet(&mut self, via: Option<SocketId>, from: SocketAddr, bytes: &[u8], now: Instant) -> Handled {
        self.now = self.now.max(now);
        let from = canonical(from);
        let handled = match Message::parse(bytes) {
            Err(fault) => Err(Ignored::Malformed(fault)),
            Ok(message) if !message.is_binding() => Err(Ignored::NotOurs),
            Ok(message) => match message.class() {
                Class::Request => self.handle_check(via, from, &message, bytes.len(), now),
                Class::Success => self.handle_answer(via, from, &message, now),
                Class::Indication | Class::Error => Err(Ignored::NotOurs),
            },
        };
        handled.unwrap_or_else(Handled::Ignored)
    }

    /// What to send.
    pub fn poll_transmit(&mut self) -> Option<Shot> {
        self.outbox.pop_front()
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`Search::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.outbox.is_empty() || !self.events.is_empty() {
            return Some(self.now);
        }
        match &self.state {
            State::Idle | State::Opening | State::GivenUp => None,
            State::Waiting { at } => Some(*at),
            State::Found { until } => Some(*until),
            State::Searching(round) => Some(round.next_due()),
        }
    }

    /// The time is now.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.now = self.now.max(now);
        match &mut self.state {
            State::Idle | State::Opening | State::GivenUp => {}
            State::Waiting { at } => {
                if *at <= now {
                    self.begin(now);
                }
            }
            State::Found { until } => {
                if *until <= now {
                    self.fail(now);
                }
            }
            State::Searching(round) => {
                // First what is due: a caller that is late makes the round longer.
                if let Some((from, to)) = round.take_due(now) {
                    let bytes = self.codec.request(self.transactions.begin(to, now));
                    self.send(Shot { from, to, bytes });
                } else if round.ends <= now {
                    self.end_round(Ending::Nothing, now);
                    self.fail(now);
                }
            }
        }
    }

    /// Whether a round is under way: it has, or wants, sockets and packets.
    pub fn is_searching(&self) -> bool {
        matches!(self.state, State::Opening | State::Searching(_))
    }

    /// How it stands.
    pub fn standing(&self) -> Standing {
        match (&self.state, self.aim()) {
            (State::Idle, _) if self.has_path => Standing::NotNeeded,
            (State::Idle, Err(why)) => Standing::NoUse(why),
            (State::Idle | State::Waiting { .. }, _) => Standing::Waiting,
            (State::Opening | State::Searching(_) | State::Found { .. }, _) => Standing::Searching,
            (State::GivenUp, _) => Standing::GivenUp,
        }
    }

    /// What to give to the next search for the same instance.
    pub fn history(&self) -> History {
        self.history
    }

    /// What this side does, and the address that it sends to; of a side that probes, the port is to be guessed.
    fn aim(&self) -> Result<(Duty, SocketAddr), NoSearch> {
        let duty = plan::duty(self.ours.nat, self.theirs.nat)?;
        let public = self.theirs.public.ok_or(NoSearch::NoAddress)?;
        let port = match duty {
            Duty::Open => public.port(),
            // Where the other side's ports have come to is looked up when a round begins: it changes all the time.
            Duty::Probe | Duty::Meet => 0,
        };
        Ok((duty, SocketAddr::new(public.ip(), port)))
    }

    fn plan_next(&mut self, now: Instant) {
        self.state = if self.has_path || self.aim().is_err() {
            State::Idle
        } else if self.history.failed >= ROUNDS {
            State::GivenUp
        } else {
            let pause = PAUSES[(self.history.failed.saturating_sub(1) as usize).min(PAUSES.len() - 1)];
            let settled = now.max(self.since + SETTLE);
            State::Waiting { at: self.history.began.map_or(settled, |began| settled.max(began + pause)) }
        };
    }

    fn begin(&mut self, now: Instant) {
        let Ok((duty, to)) = self.aim() else { return self.plan_next(now) };
        self.history.began = Some(now);
        self.rounds += 1;
        match duty {
            Duty::Open | Duty::Meet => {
                self.state = State::Opening;
                let sockets = match duty {
                    Duty::Meet => plan::COUNTED_SOCKETS,
                    Duty::Open | Duty::Probe => plan::sockets(self.ours.nat.ports, self.history.failed),
                };
                self.events.push_back(Event::Open(sockets));
            }
            Duty::Probe => {
                let round = self.history.failed;
                let seed = blake3::keyed_hash(&self.seed, &self.rounds.to_be_bytes());
                let ports = plan::probes(self.theirs.nat.ports, round, seed.as_bytes());
                let to = ports.into_iter().map(|port| SocketAddr::new(to.ip(), port)).collect();
                let wait = if self.goes_first(Duty::Probe) { Duration::ZERO } else { HEAD_START[0] };
                self.state = State::Searching(Round::new(vec![None], to, wait, now));
            }
        }
    }

    /// Whether who has this duty begins this round before the other.
    fn goes_first(&self, duty: Duty) -> bool {
        match duty {
            Duty::Open => self.history.failed.is_multiple_of(2),
            Duty::Probe => !self.history.failed.is_multiple_of(2),
            Duty::Meet => true,
        }
    }

    /// A round found nothing.
    fn fail(&mut self, now: Instant) {
        self.history.failed += 1;
        self.plan_next(now);
    }

    fn end_round(&mut self, how: Ending, now: Instant) {
        if let State::Searching(round) = &self.state {
            let took = now.saturating_duration_since(round.began);
            self.events.push_back(Event::Ended { how, sent: round.sent, took });
        }
    }

    fn send(&mut self, shot: Shot) {
        if let State::Searching(round) = &mut self.state {
            round.sent += 1;
        }
        self.outbox.push_back(shot);
    }

    fn handle_check(
        &mut self,
        via: Option<SocketId>,
        from: SocketAddr,
        check: &Message<'_>,
        length: usize,
        now: Instant,
    ) -> Result<Handled, Ignored> {
        self.codec.admit(check)?;
        if !is_usable(from) || self.theirs.public.is_none_or(|public| public.ip() != from.ip()) {
            return Err(Ignored::WrongSource);
        }
        let bytes = self.codec.answer(check.transaction(), from);
        if self.outbox.len() >= MAX_QUEUED || bytes.len() > length {
            return Err(Ignored::NoAnswer);
        }
        self.send(Shot { from: via, to: from, bytes });
        if let State::Searching(round) = &mut self.state {
            round.meet(via, from, now);
        }
        Ok(Handled::Check)
    }

    fn handle_answer(
        &mut self,
        via: Option<SocketId>,
        from: SocketAddr,
        answer: &Message<'_>,
        now: Instant,
    ) -> Result<Handled, Ignored> {
        self.transactions.find(answer.transaction(), from, now).map_err(|unasked| match unasked {
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
        if let (State::Searching(_), Some(socket)) = (&self.state, via) {
            self.events.push_back(Event::Found { socket, remote: from });
            self.end_round(Ending::Found, now);
            self.state = State::Found { until: now + CONFIRM };
        }
        Ok(Handled::Answer)
    }
}
