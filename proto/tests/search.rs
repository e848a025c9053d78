//! The search through hard NATs: how often it finds a path, what it costs, when it stops, and what it refuses.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    path::{
        Candidate, CandidateKind, CheckKey, Handled, Ignored, Role,
        search::{
            Config, Ending, Event, History, NoSearch, PAUSES, ROUNDS, SETTLE, Search, Shot, Side, SocketId, Standing,
            plan::{AHEAD, MAX_PROBES, MAX_SOCKETS},
            round::{MAX_MET, PACE, PASSES, ROUND},
        },
    },
    request::link::{Mapping, Nat, Ports},
};
use proptest::prelude::*;

/// Where the world sees the two sides' main sockets.
const PUBLIC: [&str; 2] = ["203.0.113.11:40000", "203.0.113.22:50000"];

/// One way between the two.
const DELAY: Duration = Duration::from_millis(20);

const EASY: Nat = Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving };

// What it finds.

#[test]
fn the_first_round_passes_nineteen_in_twenty_hard_nats() {
    let report = many(400, |seed| World::new(seed, [hard(Ports::Random), EASY]));
    assert!(report.share() >= 0.95, "{report:?}");
    assert!(report.median() < Duration::from_millis(2500), "{report:?}");
    assert!(
        report.most_packets <= [MAX_SOCKETS * PASSES + 6 * MAX_MET, MAX_PROBES + 6 * MAX_MET].map(|most| most as u64),
        "{report:?}"
    );
}

#[test]
fn one_packet_in_ten_may_be_lost() {
    let report = many(200, |seed| World { loss: 10, ..World::new(seed, [hard(Ports::Random), EASY]) });
    assert!(report.share() >= 0.95, "{report:?}");
}

#[test]
fn the_sides_may_begin_ten_seconds_apart() {
    for late in [0, 1] {
        let report = many(100, |seed| {
            let mut world = World::new(seed, [hard(Ports::Random), EASY]);
            world.starts[late] += Duration::from_secs(10);
            world
        });
        assert!(report.share() >= 0.93, "{late}: {report:?}");
    }
}

#[test]
fn a_block_of_ports_is_passed_with_a_tenth_of_the_packets() {
    for (first, last) in [(30_720, 31_231), (30_720, 31_743), (20_480, 22_527)] {
        let report = many(300, |seed| World::new(seed, [hard(Ports::Block { first, last }), EASY]));
        assert!(report.share() >= 0.95, "{first} to {last}: {report:?}");
        assert!(report.median_packets < 300, "{first} to {last}: {report:?}");
    }
}

#[test]
fn a_block_that_was_guessed_wrongly_is_found_out_in_the_second_round() {
    let told = hard(Ports::Block { first: 30_720, last: 31_743 });
    let report = many(100, |seed| {
        let mut world = World::new(seed, [told, EASY]);
        world.nats[0].nat.ports = Ports::Random;
        World { rounds: 2, ..world }
    });
    assert!(report.share() >= 0.95, "{report:?}");
}

#[test]
fn ports_that_are_counted_are_foreseen() {
    let counted = |seed: u64, step| hard(Ports::Sequential { last: 2000 + (seed * 631 % 60_000) as u16, step });
    for step in [1, 2, -1] {
        let report = many(200, |seed| World { others: 10, ..World::new(seed, [counted(seed, step), EASY]) });
        assert_eq!(report.share(), 1.0, "{step}: {report:?}");
        assert!(report.median_packets < 400, "{report:?}");
        let both = many(200, |seed| World {
            others: u32::from(AHEAD) - 2,
            ..World::new(seed, [counted(seed, step), counted(seed + 7, 1)])
        });
        assert_eq!(both.share(), 1.0, "{step}: {both:?}");
    }
}

#[test]
fn a_router_that_keeps_ports_for_what_came_unasked_is_passed_in_one_of_two_rounds() {
    for side in [0, 1] {
        let report = many(100, |seed| {
            let mut world = World::new(seed, [hard(Ports::Random), EASY]);
            world.nats[side].keeps_unasked = true;
            World { rounds: 2, ..world }
        });
        assert!(report.share() >= 0.95, "{side}: {report:?}");
    }
}

// What it costs.

#[test]
fn no_side_sends_more_than_five_hundred_packets_in_a_second() {
    let mut world = World { loss: 100, ..World::new(3, [hard(Ports::Random), EASY]) };
    world.run();
    for side in 0..2 {
        let times: Vec<_> = world.sent.iter().filter(|(_, from)| *from == side).map(|(at, _)| *at).collect();
        assert!(times.len() >= MAX_SOCKETS * PASSES, "{}", times.len());
        assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= PACE));
    }
}

#[test]
fn a_caller_that_was_late_does_not_catch_up_in_a_burst() {
    let mut lone = Lone::new(hard(Ports::Random), EASY);
    lone.begin();
    lone.now += Duration::from_secs(2);
    let began = lone.now;
    let times = lone.shots_until(began + Duration::from_secs(1)).into_iter().map(|(at, _)| at);
    assert!(times.filter(|at| *at == began).count() <= 10);
}

#[test]
fn after_three_rounds_without_success_it_stops_until_a_network_changes() {
    let mut lone = Lone::new(hard(Ports::Random), EASY);
    let born = lone.now;
    let opened = lone.openings_within(Duration::from_secs(3600 * 24));
    let times: Vec<_> = opened.iter().map(|at| *at - born).collect();
    let second = SETTLE + PAUSES[0];
    assert_eq!(times, [SETTLE, second, second + PAUSES[1]]);
    assert_eq!((times.len(), lone.search.standing()), (ROUNDS as usize, Standing::GivenUp));
    lone.search.restart(lone.now);
    assert_eq!(lone.openings_within(Duration::from_secs(10)).len(), 1);
}

#[test]
fn another_link_to_the_same_instance_begins_where_the_last_one_stopped() {
    let mut lone = Lone::new(hard(Ports::Random), EASY);
    lone.openings_within(Duration::from_secs(3600));
    let mut next = Lone::after(lone.search.history(), hard(Ports::Random), EASY, lone.now);
    assert_eq!(next.openings_within(Duration::from_secs(3600)).len(), 0);
    assert_eq!(next.search.standing(), Standing::GivenUp);
}

#[test]
fn whatever_changes_rounds_are_half_a_minute_apart() {
    let mut lone = Lone::new(hard(Ports::Random), EASY);
    let mut opened = Vec::new();
    for flap in 0..200_u16 {
        let other = Side { nat: EASY, public: Some(SocketAddr::from(([203, 0, 113, 22], 2000 + flap))) };
        lone.search.set_sides(side(hard(Ports::Random), 0), other, lone.now);
        lone.search.set_path(flap % 3 == 0, lone.now);
        opened.extend(lone.openings_within(Duration::from_millis(1500)));
    }
    assert!(opened.windows(2).all(|pair| pair[1] - pair[0] >= PAUSES[0]), "{opened:?}");
    assert!(opened.len() > 5);
}

// When it does not search.

#[test]
fn there_is_no_search_where_it_is_no_use() {
    let cases = [
        (Nat::default(), EASY, NoSearch::Unknown),
        (EASY, EASY, NoSearch::NotNeeded),
        (hard(Ports::Random), hard(Ports::Random), NoSearch::BothHard),
        (hard(Ports::Block { first: 2048, last: 3071 }), hard(Ports::Random), NoSearch::BothHard),
    ];
    for (ours, theirs, why) in cases {
        let mut lone = Lone::new(ours, theirs);
        assert_eq!(lone.search.poll_timeout(), None);
        assert!(lone.openings_within(Duration::from_secs(600)).is_empty());
        assert_eq!(lone.search.standing(), Standing::NoUse(why));
    }
}

#[test]
fn a_path_ends_the_search_and_its_loss_begins_another() {
    let mut lone = Lone::new(EASY, hard(Ports::Random));
    lone.shots_until(lone.now + Duration::from_millis(1800));
    lone.search.set_path(true, lone.now);
    assert!(matches!(lone.search.poll_event(), Some(Event::Ended { how: Ending::Found, sent: 1.., .. })));
    assert!(lone.shots_until(lone.now + Duration::from_secs(3600)).is_empty());
    assert_eq!(lone.search.standing(), Standing::NotNeeded);
    lone.search.set_path(false, lone.now);
    assert!(!lone.shots_until(lone.now + Duration::from_secs(3)).is_empty());
}

#[test]
fn without_a_socket_the_round_has_failed() {
    let mut lone = Lone::new(hard(Ports::Random), EASY);
    lone.sockets = 0;
    assert_eq!(lone.openings_within(Duration::from_secs(3600)).len(), ROUNDS as usize);
    assert_eq!(lone.search.standing(), Standing::GivenUp);
}

#[test]
fn a_socket_that_becomes_no_path_is_a_failure() {
    let mut world = World { rounds: ROUNDS as usize, confirms: false, ..World::new(5, [hard(Ports::Random), EASY]) };
    world.run();
    assert!(world.found.is_some());
    assert_eq!(world.searches[0].standing(), Standing::GivenUp);
}

// Where the other side is.

#[test]
fn the_address_that_a_responder_saw_is_the_one_to_search_at() {
    let candidate = |kind, addr: &str| Candidate { kind, addr: addr.parse().unwrap() };
    let public = |candidates: &[Candidate]| Side::new(EASY, candidates).public.map(|addr| addr.to_string());
    let lan = candidate(CandidateKind::Host, "192.168.1.4:7");
    let own = candidate(CandidateKind::Host, "203.0.113.9:7");
    let seen = candidate(CandidateKind::ServerReflexive, "203.0.113.8:7");
    assert_eq!(public(&[lan, own, seen]).as_deref(), Some("203.0.113.8:7"));
    assert_eq!(public(&[lan, own]).as_deref(), Some("203.0.113.9:7"));
    assert_eq!(public(&[lan, candidate(CandidateKind::Host, "100.64.1.2:7")]), None);
    for nowhere in ["[2001:db8::1]:7", "127.0.0.1:7", "169.254.1.1:7", "0.0.0.0:7", "203.0.113.1:0"] {
        assert_eq!(public(&[candidate(CandidateKind::ServerReflexive, nowhere)]), None, "{nowhere}");
    }
}

#[test]
fn only_the_other_sides_public_address_is_sent_to() {
    let mut lone = Lone::new(EASY, hard(Ports::Random));
    let shots = lone.shots_until(lone.now + Duration::from_secs(3600));
    assert_eq!(shots.len(), MAX_PROBES * ROUNDS as usize);
    let there: SocketAddr = PUBLIC[1].parse().unwrap();
    assert!(shots.iter().all(|(_, shot)| shot.to.ip() == there.ip() && shot.to.port() >= 1024 && shot.from.is_none()));
}

// Hostile input.

#[test]
fn a_check_of_somebody_else_meets_no_socket() {
    let mut lone = Lone::new(hard(Ports::Random), EASY);
    lone.begin();
    let mut stranger = Lone::keyed(9, Role::Controlled, EASY, hard(Ports::Random));
    let forged = stranger.shots_until(stranger.now + Duration::from_secs(2)).pop().unwrap().1;
    let from = PUBLIC[1].parse().unwrap();
    let handled = lone.search.handle_packet(Some(SocketId(1)), from, &forged.bytes, lone.now);
    assert_eq!(handled, Handled::Ignored(Ignored::NotOurs));
    assert_eq!(lone.search.poll_transmit(), None);
}

#[test]
fn a_check_counts_once_and_only_from_where_the_other_side_is() {
    let mut lone = Lone::new(hard(Ports::Random), EASY);
    lone.begin();
    let mut other = Lone::keyed(1, Role::Controlled, EASY, hard(Ports::Random));
    let shots = other.shots_until(other.now + Duration::from_secs(2));
    let (there, elsewhere) = (PUBLIC[1].parse().unwrap(), "198.51.100.1:50000".parse().unwrap());
    let mut handle =
        |shot: usize, from| lone.search.handle_packet(Some(SocketId(1)), from, &shots[shot].1.bytes, lone.now);
    assert_eq!(handle(0, elsewhere), Handled::Ignored(Ignored::WrongSource));
    assert_eq!(handle(1, there), Handled::Check);
    assert_eq!(handle(1, there), Handled::Ignored(Ignored::Repeated));
    assert_eq!(lone.search.poll_transmit().unwrap().from, Some(SocketId(1)), "the answer leaves by the same socket");
}

#[test]
fn checks_of_the_agent_are_none_of_the_search() {
    use peerfleet_proto::path::{Agent, Config};
    let mut lone = Lone::new(hard(Ports::Random), EASY);
    lone.begin();
    let mut agent = Agent::new(Config { key: key(1), role: Role::Controlled, seed: [4; 32] }, lone.now);
    let host = |addr: &str| Candidate { kind: CandidateKind::Host, addr: addr.parse().unwrap() };
    agent.set_local(vec![host(PUBLIC[1])], lone.now);
    agent.set_remote(vec![host(PUBLIC[0])], lone.now);
    let check = agent.poll_transmit().unwrap();
    let handled = lone.search.handle_packet(Some(SocketId(1)), PUBLIC[1].parse().unwrap(), &check.bytes, lone.now);
    assert_eq!(handled, Handled::Ignored(Ignored::NotOurs));
}

#[test]
fn more_checks_than_can_be_of_use_are_not_followed() {
    let mut lone = Lone::new(hard(Ports::Random), EASY);
    lone.begin();
    let mut other = Lone::keyed(1, Role::Controlled, EASY, hard(Ports::Random));
    let shots = other.shots_until(other.now + Duration::from_secs(4));
    for (socket, (_, shot)) in shots.iter().enumerate().take(200) {
        lone.search.handle_packet(Some(SocketId(socket as u32)), PUBLIC[1].parse().unwrap(), &shot.bytes, lone.now);
        while lone.search.poll_transmit().is_some() {}
    }
    // While checks come, nothing else is sent.
    let back = lone.shots_until(lone.now + Duration::from_millis(1900));
    let sockets: BTreeSet<_> = back.iter().map(|(_, shot)| shot.from).collect();
    assert_eq!(sockets.len(), MAX_MET);
}

proptest! {
    #[test]
    fn whatever_happens_it_keeps_its_bounds(seed: u8, steps in proptest::collection::vec(any::<[u8; 4]>(), 1..200)) {
        let mut lone = Lone::keyed(1, Role::Controlling, NATS[usize::from(seed) % NATS.len()], EASY);
        let mut other = Lone::keyed(1, Role::Controlled, EASY, hard(Ports::Random));
        let packets = other.shots_until(other.now + Duration::from_millis(2500));
        let (mut sent, began) = (0, lone.now);
        for [what, one, two, three] in steps {
            let nat = |index: u8| NATS[usize::from(index) % NATS.len()];
            match what % 6 {
                0 => lone.search.set_sides(side(nat(one), 0), side(nat(two), 1), lone.now),
                1 => lone.search.set_path(one % 2 == 0, lone.now),
                2 => lone.search.restart(lone.now),
                3 => {
                    let mut bytes = packets[usize::from(one) % packets.len()].1.bytes.clone();
                    let at = usize::from(three) % bytes.len();
                    bytes[at] ^= two & 1;
                    let from = PUBLIC[usize::from(three % 2)].parse().unwrap();
                    lone.search.handle_packet((two > 9).then_some(SocketId(two.into())), from, &bytes, lone.now);
                }
                4 => lone.search.opened(&[SocketId(one.into()), SocketId(two.into())], lone.now),
                _ => {}
            }
            let shots = lone.shots_until(lone.now + Duration::from_millis(u64::from(one) * u64::from(two)));
            let there: [SocketAddr; 2] = PUBLIC.map(|addr| addr.parse().unwrap());
            prop_assert!(shots.iter().all(|(_, shot)| shot.to.ip() == there[1].ip()));
            sent += shots.len();
            prop_assert!(lone.search.history().failed <= ROUNDS);
        }
        let rounds = (lone.now - began).as_secs() / PAUSES[0].as_secs() + 2;
        prop_assert!(sent as u64 <= rounds * (MAX_PROBES + 6 * MAX_MET) as u64 + 200);
    }
}

const NATS: [Nat; 6] = [
    EASY,
    Nat { mapping: Mapping::Unknown, ports: Ports::Unknown },
    Nat { mapping: Mapping::Dependent, ports: Ports::Random },
    Nat { mapping: Mapping::Dependent, ports: Ports::Block { first: 9, last: 3 } },
    Nat { mapping: Mapping::Dependent, ports: Ports::Sequential { last: 7, step: -3 } },
    Nat { mapping: Mapping::Dependent, ports: Ports::Sequential { last: 7, step: 0 } },
];

// The two sides and the NATs between them.

fn hard(ports: Ports) -> Nat {
    Nat { mapping: Mapping::Dependent, ports }
}

fn side(nat: Nat, at: usize) -> Side {
    Side { nat, public: Some(PUBLIC[at].parse().unwrap()) }
}

fn key(seed: u8) -> CheckKey {
    CheckKey::agree(&[seed; 32], &[2; 32])
}

/// One search whose packets go nowhere.
struct Lone {
    search: Search,
    sockets: usize,
    now: Instant,
}

impl Lone {
    fn new(ours: Nat, theirs: Nat) -> Self {
        Self::keyed(1, Role::Controlling, ours, theirs)
    }

    fn keyed(seed: u8, role: Role, ours: Nat, theirs: Nat) -> Self {
        let config = Config { key: key(seed), role, seed: [seed; 32], history: History::default() };
        Self::of(config, ours, theirs, beginning())
    }

    fn after(history: History, ours: Nat, theirs: Nat, now: Instant) -> Self {
        Self::of(Config { key: key(1), role: Role::Controlling, seed: [8; 32], history }, ours, theirs, now)
    }

    fn of(config: Config, ours: Nat, theirs: Nat, now: Instant) -> Self {
        let mut search = Search::new(config, now);
        search.set_sides(side(ours, 0), side(theirs, 1), now);
        Self { search, sockets: MAX_SOCKETS, now }
    }

    /// Goes on until the sockets are open.
    fn begin(&mut self) {
        assert_eq!(self.openings_within(SETTLE + PACE * 5).len(), 1);
    }

    fn openings_within(&mut self, time: Duration) -> Vec<Instant> {
        let mut opened = Vec::new();
        self.run(self.now + time, |now, happened| {
            if matches!(happened, Happened::Open) {
                opened.push(now);
            }
        });
        opened
    }

    fn shots_until(&mut self, end: Instant) -> Vec<(Instant, Shot)> {
        let mut shots = Vec::new();
        self.run(end, |now, happened| {
            if let Happened::Shot(shot) = happened {
                shots.push((now, shot));
            }
        });
        shots
    }

    fn run(&mut self, end: Instant, mut tell: impl FnMut(Instant, Happened)) {
        loop {
            while let Some(shot) = self.search.poll_transmit() {
                tell(self.now, Happened::Shot(shot));
            }
            while let Some(event) = self.search.poll_event() {
                if let Event::Open(count) = event {
                    let sockets: Vec<_> = (0..count.min(self.sockets)).map(|at| SocketId(at as u32)).collect();
                    self.search.opened(&sockets, self.now);
                    tell(self.now, Happened::Open);
                }
            }
            match self.search.poll_timeout() {
                Some(at) if at <= end => self.now = self.now.max(at),
                _ => break,
            }
            self.search.handle_timeout(self.now);
        }
        self.now = end;
    }
}

enum Happened {
    Shot(Shot),
    Open,
}

/// A NAT that lets in only what was sent to.
struct Router {
    nat: Nat,
    public: SocketAddr,
    /// What comes without being asked for keeps its port from the host behind.
    keeps_unasked: bool,
    flows: BTreeMap<(Option<SocketId>, SocketAddr), u16>,
    open: BTreeMap<(u16, SocketAddr), Option<SocketId>>,
    kept: BTreeSet<(u16, SocketAddr)>,
    counted: i32,
}

/// Two searches, two routers, and what is on its way.
struct World {
    searches: [Search; 2],
    nats: [Router; 2],
    /// What the sides say of their NATs, which need not be so.
    told: [Nat; 2],
    starts: [Instant; 2],
    /// Of a hundred packets.
    loss: u64,
    /// Flows that other hosts behind a NAT that counts open before ours.
    others: u32,
    /// Rounds after which it is over.
    rounds: usize,
    /// Whether the agent makes a path of what is found.
    confirms: bool,
    dice: Dice,
    now: Instant,
    /// By when they arrive.
    flying: BTreeMap<(Instant, u64), Packet>,
    sent: Vec<(Instant, usize)>,
    found: Option<Duration>,
    next_socket: u32,
}

/// A packet on its way.
struct Packet {
    side: usize,
    source: SocketAddr,
    destination: SocketAddr,
    bytes: Vec<u8>,
}

impl World {
    fn new(seed: u64, nats: [Nat; 2]) -> Self {
        let now = beginning();
        let search = |role, at: u8| {
            let mut bytes = [at; 32];
            bytes[..8].copy_from_slice(&seed.to_be_bytes());
            Search::new(Config { key: key(1), role, seed: bytes, history: History::default() }, now)
        };
        let (mut at, told) = (0, nats);
        let nats = nats.map(|nat| {
            at += 1;
            Router {
                nat,
                public: PUBLIC[at - 1].parse().unwrap(),
                keeps_unasked: false,
                flows: BTreeMap::new(),
                open: BTreeMap::new(),
                kept: BTreeSet::new(),
                counted: 0,
            }
        });
        let mut dice = Dice::new(seed);
        // The answer that settles the link is half a round trip by relay old on one side.
        let starts = [now, now + Duration::from_millis(dice.below(60))];
        Self {
            searches: [search(Role::Controlling, 1), search(Role::Controlled, 2)],
            nats,
            told,
            starts,
            loss: 0,
            others: 0,
            rounds: 1,
            confirms: true,
            dice,
            now,
            flying: BTreeMap::new(),
            sent: Vec::new(),
            found: None,
            next_socket: 0,
        }
    }

    /// Runs until something is found, or the rounds are over. Gives when it was found.
    fn run(&mut self) -> Option<Duration> {
        let pauses: Duration = (1..self.rounds).map(|round| PAUSES[(round - 1).min(1)]).sum();
        let end = self.starts[0].max(self.starts[1]) + SETTLE + pauses + ROUND + Duration::from_secs(5);
        let mut waiting = self.starts.map(Some);
        loop {
            for (at, start) in waiting.iter_mut().enumerate() {
                if start.take_if(|start| *start <= self.now).is_some() {
                    let sides = [side(self.told[at], at), side(self.told[1 - at], 1 - at)];
                    self.searches[at].set_sides(sides[0], sides[1], self.now);
                }
                self.drain(at);
            }
            if self.found.is_some() && self.confirms {
                return self.found;
            }
            let timers = self.searches.iter().filter_map(Search::poll_timeout);
            let flying = self.flying.keys().map(|(at, _)| *at).take(1);
            match waiting.into_iter().flatten().chain(timers).chain(flying).min() {
                Some(next) if next <= end => self.now = self.now.max(next),
                _ => return self.found,
            }
            while let Some(entry) = self.flying.first_entry().filter(|entry| entry.key().0 <= self.now) {
                let packet = entry.remove();
                self.arrive(&packet);
            }
            for search in &mut self.searches {
                if search.poll_timeout().is_some_and(|at| at <= self.now) {
                    search.handle_timeout(self.now);
                }
            }
        }
    }

    fn drain(&mut self, at: usize) {
        while let Some(event) = self.searches[at].poll_event() {
            match event {
                Event::Open(count) => {
                    let first = self.next_socket;
                    self.next_socket += count as u32;
                    let sockets: Vec<_> = (first..self.next_socket).map(SocketId).collect();
                    let skipped = self.dice.below(u64::from(self.others) + 1) as i32;
                    self.nats[at].counted += skipped;
                    self.searches[at].opened(&sockets, self.now);
                }
                Event::Found { .. } => {
                    let since = self.now - self.starts[0].max(self.starts[1]);
                    self.found.get_or_insert(since);
                }
                Event::Ended { .. } => {}
            }
        }
        while let Some(Shot { from, to, bytes }) = self.searches[at].poll_transmit() {
            self.sent.push((self.now, at));
            let source = self.nats[at].send(from, to, &mut self.dice);
            if !self.dice.percent(self.loss) && to.ip() == self.nats[1 - at].public.ip() {
                let sequence = self.sent.len() as u64;
                self.flying
                    .insert((self.now + DELAY, sequence), Packet { side: 1 - at, source, destination: to, bytes });
            }
        }
    }

    fn arrive(&mut self, packet: &Packet) {
        let Packet { side, source, destination, bytes } = packet;
        if let Some(via) = self.nats[*side].receive(*source, destination.port()) {
            self.searches[*side].handle_packet(via, *source, bytes, self.now);
        }
    }
}

impl Router {
    /// Where a packet leaves from.
    fn send(&mut self, from: Option<SocketId>, to: SocketAddr, dice: &mut Dice) -> SocketAddr {
        let port = match self.flows.get(&(from, to)) {
            Some(port) => *port,
            None => {
                let port = self.map(to, dice);
                self.flows.insert((from, to), port);
                port
            }
        };
        self.open.insert((port, to), from);
        SocketAddr::new(self.public.ip(), port)
    }

    fn map(&mut self, to: SocketAddr, dice: &mut Dice) -> u16 {
        let own = self.public.port();
        if self.nat.mapping == Mapping::EndpointIndependent && !self.kept.contains(&(own, to)) {
            return own;
        }
        loop {
            let port = match self.nat.ports {
                Ports::Block { first, last } => first + dice.below(u64::from(last - first) + 1) as u16,
                Ports::Sequential { last, step } => {
                    self.counted += 1;
                    let port = i32::from(last) - 1024 + i32::from(step) * self.counted;
                    (port.rem_euclid(64_512) + 1024) as u16
                }
                Ports::Unknown | Ports::Preserving | Ports::Random => 1024 + dice.below(64_512) as u16,
            };
            if !self.open.contains_key(&(port, to)) && !self.kept.contains(&(port, to)) {
                return port;
            }
        }
    }

    /// The socket that gets what came to a port; none if it is not let in.
    fn receive(&mut self, source: SocketAddr, port: u16) -> Option<Option<SocketId>> {
        let socket = self.open.get(&(port, source)).copied();
        if socket.is_none() && self.keeps_unasked {
            self.kept.insert((port, source));
        }
        socket
    }
}

/// What became of many worlds.
#[derive(Debug)]
struct Report {
    worlds: usize,
    times: Vec<Duration>,
    median_packets: u64,
    most_packets: [u64; 2],
}

impl Report {
    fn share(&self) -> f64 {
        self.times.len() as f64 / self.worlds as f64
    }

    fn median(&self) -> Duration {
        self.times[self.times.len() / 2]
    }
}

fn many(worlds: usize, make: impl Fn(u64) -> World) -> Report {
    let (mut times, mut packets, mut most_packets) = (Vec::new(), Vec::new(), [0; 2]);
    for seed in 0..worlds as u64 {
        let mut world = make(seed);
        times.extend(world.run());
        packets.push(world.sent.len() as u64);
        for (side, most) in most_packets.iter_mut().enumerate() {
            *most = (*most).max(world.sent.iter().filter(|(_, from)| *from == side).count() as u64);
        }
    }
    times.sort_unstable();
    packets.sort_unstable();
    Report { worlds, times, median_packets: packets[packets.len() / 2], most_packets }
}

/// Random numbers that a seed repeats (xorshift64*).
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % bound
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

#[expect(clippy::disallowed_methods, reason = "an Instant cannot be made in any other way")]
fn beginning() -> Instant {
    Instant::now()
}
