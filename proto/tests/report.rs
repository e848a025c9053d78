//! What an agent tells people: each address with what checking it brought, and why the path taken is the one.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    limits::{MAX_CANDIDATES, MAX_MESSAGE_BYTES},
    path::{Agent, Candidate, CandidateKind, CheckKey, Config, Reach, Reflexive, Role, check::BURST},
    request::{
        Outcome,
        network::{
            CheckOutcome, CheckReport, Choice, Filtering, MAX_REPORTED_CHECKS, MappingProtocol, NetworkReport,
            PathReport, PortMapping, ResponderReport, SearchReport, TakenPath,
        },
    },
    stun::{Class, Draft, IntegrityKey, Message},
    wire::encode,
};

#[path = "sim/clock.rs"]
#[expect(dead_code, reason = "chance plays no part here")]
mod clock;

const HERE: &str = "192.168.1.4:7";
const LAN: &str = "192.168.1.9:9";
const WIDE: &str = "198.51.100.9:9";
const V6: &str = "[2001:db8::9]:9";

/// One side that is looked at, and another that answers at some of its addresses after some time each.
struct Scene {
    ours: Agent,
    theirs: Agent,
    answering: Vec<(SocketAddr, Duration)>,
    arriving: Vec<(Instant, SocketAddr, Vec<u8>)>,
    began: Instant,
    now: Instant,
}

impl Scene {
    fn new(theirs: &[(&str, CandidateKind)], answering: &[(&str, u64)]) -> Self {
        let now = clock::beginning();
        let key = CheckKey::agree(&[1; 32], &[2; 32]);
        let agent = |role| Agent::new(Config { key: key.clone(), role, seed: [role as u8; 32] }, now);
        let mut scene = Self {
            ours: agent(Role::Controlling),
            theirs: agent(Role::Controlled),
            answering: answering.iter().map(|(to, ms)| (addr(to), Duration::from_millis(*ms))).collect(),
            arriving: Vec::new(),
            began: now,
            now,
        };
        scene.ours.set_local(vec![host(HERE), host("[2001:db8:7::4]:7")], now);
        scene.ours.set_remote(theirs.iter().map(|(at, kind)| Candidate { kind: *kind, addr: addr(at) }).collect(), now);
        scene
    }

    /// Lets time pass; answers arrive when they are due.
    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            while let Some(check) = self.ours.poll_transmit() {
                if let Some((to, delay)) = self.answering.iter().find(|(to, _)| *to == check.to) {
                    self.theirs.handle_packet(addr(HERE), &check.bytes, self.now);
                    while let Some(answer) = self.theirs.poll_transmit() {
                        if Message::parse(&answer.bytes).unwrap().class() == Class::Success {
                            self.arriving.push((self.now + *delay, *to, answer.bytes));
                        }
                    }
                }
            }
            while self.ours.poll_event().is_some() {}
            let due = self.arriving.iter().map(|(at, ..)| *at).chain(self.ours.poll_timeout()).min();
            let Some(due) = due.filter(|due| *due <= end) else { break };
            self.now = self.now.max(due);
            for (_, from, bytes) in self.arriving.extract_if(.., |(at, ..)| *at <= due).collect::<Vec<_>>() {
                self.ours.handle_packet(from, &bytes, self.now);
            }
            self.ours.handle_timeout(self.now);
        }
        self.now = end;
    }

    fn report(&self) -> PathReport {
        self.ours.report(self.now)
    }

    fn check(&self, of: &str) -> CheckReport {
        *self.report().checks.iter().find(|check| check.addr == addr(of)).unwrap()
    }

    fn taken(&self) -> TakenPath {
        self.report().taken.unwrap()
    }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn host(text: &str) -> Candidate {
    Candidate { kind: CandidateKind::Host, addr: addr(text) }
}

#[test]
fn a_silent_address_is_told_with_its_checks_and_only_after_the_answers_time() {
    let mut scene = Scene::new(&[(WIDE, CandidateKind::ServerReflexive)], &[]);
    assert_eq!(scene.check(WIDE).outcome, CheckOutcome::Waiting, "the first check went out");
    scene.run_for(Duration::from_secs(4));
    assert_eq!(scene.check(WIDE).outcome, CheckOutcome::Waiting);
    scene.run_for(Duration::from_millis(900));
    let check = scene.check(WIDE);
    let told = (check.outcome, check.sent as usize, check.answered, check.heard, check.rtt);
    assert_eq!(told, (CheckOutcome::Silent, BURST.len(), 0, 0, None));
    assert_eq!((check.reach, check.kind), (Reach::Wide, CandidateKind::ServerReflexive));
    assert_eq!(scene.report().taken, None);
    assert_eq!(scene.report().age, scene.now - scene.began);
}

#[test]
fn an_address_of_a_family_that_is_missing_here_is_told_as_not_tried() {
    let mut scene = Scene::new(&[(LAN, CandidateKind::Host), (V6, CandidateKind::Host)], &[]);
    scene.ours.set_local(vec![host(HERE)], scene.now);
    scene.run_for(Duration::from_secs(1));
    assert_eq!(scene.check(V6).outcome, CheckOutcome::NotTried);
    assert_eq!(scene.check(LAN).outcome, CheckOutcome::Waiting);
}

#[test]
fn an_address_that_answers_checks_and_carries_no_data_is_told_as_distrusted() {
    let mut scene = Scene::new(&[(LAN, CandidateKind::Host), (WIDE, CandidateKind::Host)], &[(LAN, 1), (WIDE, 20)]);
    scene.run_for(Duration::from_secs(1));
    assert_eq!((scene.taken().addr, scene.check(LAN).outcome), (addr(LAN), CheckOutcome::Answered));
    for _ in 0..200 {
        if scene.report().taken.is_none_or(|taken| taken.addr != addr(LAN)) {
            break;
        }
        scene.ours.on_data_sent(scene.now);
        scene.run_for(Duration::from_millis(50));
    }
    assert_eq!(scene.check(LAN).outcome, CheckOutcome::Distrusted);
    scene.run_for(Duration::from_secs(1));
    assert_eq!((scene.taken().addr, scene.taken().why), (addr(WIDE), Choice::Only), "the nearer one answers in vain");
}

#[test]
fn a_path_that_is_farther_and_much_faster_is_told_as_faster() {
    let scene_of = [(LAN, CandidateKind::Host), (WIDE, CandidateKind::Host)];
    let mut scene = Scene::new(&scene_of, &[(LAN, 60), (WIDE, 20)]);
    scene.run_for(Duration::from_secs(1));
    assert_eq!((scene.taken().addr, scene.taken().why), (addr(WIDE), Choice::Faster(addr(LAN))));
    assert!(scene.check(LAN).reach < scene.check(WIDE).reach);
}

#[test]
fn a_check_that_came_is_counted_at_its_source() {
    let mut scene = Scene::new(&[(LAN, CandidateKind::Host)], &[]);
    scene.theirs.set_local(vec![host(LAN)], scene.now);
    scene.theirs.set_remote(vec![host(HERE)], scene.now);
    let check = scene.theirs.poll_transmit().unwrap();
    scene.ours.handle_packet(addr(WIDE), &check.bytes, scene.now);
    assert_eq!((scene.check(WIDE).heard, scene.check(WIDE).kind), (1, CandidateKind::PeerReflexive));
    assert_eq!(scene.check(LAN).heard, 0);
}

#[test]
fn an_answer_signed_by_somebody_else_is_told_as_forged() {
    let mut scene = Scene::new(&[(LAN, CandidateKind::Host)], &[]);
    let check = scene.ours.poll_transmit().unwrap();
    let transaction = Message::parse(&check.bytes).unwrap().transaction();
    let key = IntegrityKey::new(&[9; 32]);
    let forged = Draft::new(Class::Success, transaction).mapped_address(addr(HERE)).sign(&key).finish();
    scene.ours.handle_packet(addr(LAN), &forged, scene.now);
    assert_eq!(scene.check(LAN).outcome, CheckOutcome::Forged);
}

#[test]
fn the_only_address_that_answers_is_taken_because_it_is_the_only_one() {
    let mut scene = Scene::new(&[(LAN, CandidateKind::Host), (WIDE, CandidateKind::Host)], &[(WIDE, 20)]);
    scene.run_for(Duration::from_secs(3));
    let taken = scene.taken();
    assert_eq!((taken.addr, taken.why, taken.rtt), (addr(WIDE), Choice::Only, Duration::from_millis(20)));
    assert_eq!(taken.age, scene.now - scene.began - Duration::from_millis(25), "a pace, and the round trip");
    assert_eq!(scene.check(WIDE).outcome, CheckOutcome::Answered);
}

#[test]
fn a_neighbour_is_taken_because_it_is_nearer_though_slower() {
    let both = [(LAN, CandidateKind::Host), (WIDE, CandidateKind::ServerReflexive)];
    let mut scene = Scene::new(&both, &[(LAN, 12), (WIDE, 10)]);
    scene.run_for(Duration::from_secs(2));
    assert_eq!((scene.taken().addr, scene.taken().why), (addr(LAN), Choice::Nearer(addr(WIDE))));
    assert_eq!(scene.report().checks[0].addr, addr(LAN), "the nearest comes first");
}

#[test]
fn of_two_that_are_as_near_the_reason_is_speed_then_family_then_kind() {
    let other = "203.0.113.5:5";
    let taken = |candidates: &[(&str, CandidateKind)], answering: &[(&str, u64)]| {
        let mut scene = Scene::new(candidates, answering);
        scene.run_for(Duration::from_secs(2));
        (scene.taken().addr, scene.taken().why)
    };
    let (host, reflexive) = (CandidateKind::Host, CandidateKind::ServerReflexive);
    let two = [(WIDE, host), (other, host)];
    assert_eq!(taken(&two, &[(WIDE, 40), (other, 20)]), (addr(other), Choice::Faster(addr(WIDE))));
    let two = [(WIDE, host), (V6, host)];
    assert_eq!(taken(&two, &[(WIDE, 20), (V6, 22)]), (addr(V6), Choice::Ipv6(addr(WIDE))));
    let two = [(WIDE, host), (other, reflexive)];
    assert_eq!(taken(&two, &[(WIDE, 25), (other, 25)]), (addr(WIDE), Choice::Kind(addr(other))));
    let two = [(WIDE, host), (other, host)];
    let kept = taken(&two, &[(WIDE, 20), (other, 24)]);
    assert_eq!(kept.0, addr(WIDE), "the first that answered, and clearly not worse");
}

#[test]
fn a_path_is_kept_while_another_is_hardly_faster() {
    let other = "203.0.113.5:5";
    let two = [(WIDE, CandidateKind::Host), (other, CandidateKind::Host)];
    let mut scene = Scene::new(&two, &[(WIDE, 20)]);
    scene.run_for(Duration::from_millis(200));
    scene.answering.push((addr(other), Duration::from_millis(17)));
    scene.run_for(Duration::from_secs(2));
    assert_eq!((scene.taken().addr, scene.taken().why), (addr(WIDE), Choice::Kept(addr(other))));
}

#[test]
fn an_address_that_answers_no_more_is_told_as_lost() {
    let mut scene = Scene::new(&[(WIDE, CandidateKind::Host)], &[(WIDE, 20)]);
    scene.run_for(Duration::from_secs(2));
    scene.answering.clear();
    scene.run_for(Duration::from_secs(20));
    assert_eq!((scene.check(WIDE).outcome, scene.report().taken), (CheckOutcome::Lost, None));
}

#[test]
fn looking_changes_nothing() {
    let mut scene = Scene::new(&[(WIDE, CandidateKind::Host)], &[(WIDE, 20)]);
    scene.run_for(Duration::from_secs(2));
    let before = format!("{:?}", scene.ours);
    scene.ours.report(scene.now + Duration::from_secs(60));
    assert_eq!(format!("{:?}", scene.ours), before);
}

#[test]
fn a_responder_is_told_with_its_round_trip_and_with_what_it_did_not_answer() {
    let (mut now, here) = (clock::beginning(), addr("192.0.2.1:8080"));
    let mut reflexive = Reflexive::new([7; 32], now);
    reflexive.set_responders(&[here], now);
    let request = reflexive.poll_transmit().unwrap();
    let told = ResponderReport { addr: here, seen: None, rtt: None, unanswered: 1 };
    assert_eq!(reflexive.report(), [told]);
    now += Duration::from_millis(30);
    let transaction = Message::parse(&request.bytes).unwrap().transaction();
    let answer = Draft::new(Class::Success, transaction).mapped_address(addr(WIDE)).finish();
    reflexive.handle_packet(here, &answer, now);
    let told =
        ResponderReport { addr: here, seen: Some(addr(WIDE)), rtt: Some(Duration::from_millis(30)), unanswered: 0 };
    assert_eq!(reflexive.report(), [told]);
    reflexive.refresh(now);
    let told = ResponderReport { addr: here, seen: Some(addr(WIDE)), rtt: None, unanswered: 1 };
    assert_eq!(reflexive.report(), [told], "asked afresh");
}

#[test]
fn the_longest_report_fits_a_message() {
    let far = SocketAddr::from(([u16::MAX; 8], u16::MAX));
    let check = CheckReport {
        addr: far,
        kind: CandidateKind::PeerReflexive,
        reach: Reach::Wide,
        sent: u32::MAX,
        answered: u32::MAX,
        heard: u32::MAX,
        rtt: Some(Duration::MAX),
        outcome: CheckOutcome::Lost,
    };
    let responder = ResponderReport { addr: far, seen: Some(far), rtt: Some(Duration::MAX), unanswered: u32::MAX };
    let report = NetworkReport {
        udp: true,
        routes_v4: true,
        routes_v6: true,
        candidates: vec![Candidate { kind: CandidateKind::PeerReflexive, addr: far }; MAX_CANDIDATES],
        responders: vec![responder; 16],
        relay_rtt: Some(Duration::MAX),
        nat: Default::default(),
        filtering: Filtering::AddressAndPortDependent,
        hairpin: Some(true),
        port_mapping: Some(PortMapping::Open { protocol: MappingProtocol::Upnp, addr: far, life: Duration::MAX }),
        path: Some(PathReport {
            age: Duration::MAX,
            checks: vec![check; MAX_REPORTED_CHECKS],
            taken: Some(TakenPath { addr: far, rtt: Duration::MAX, age: Duration::MAX, why: Choice::Kept(far) }),
            search: Some(SearchReport::GivenUp),
        }),
    };
    assert!(encode(&Outcome::Network(Box::new(report))).len() * 4 < MAX_MESSAGE_BYTES);
}
