use peerfleet_proto::{
    id::InstanceId,
    path::{CheckKey, Role},
    request::link::{Mapping, Route},
    stun::{Class, Draft, Message},
};

use super::*;
use crate::mesh::PathConfig;

const HERE: &str = "192.0.2.1:4000";
const THERE: &str = "192.0.2.9:4001";

/// Paths with one link, whose other side is an agent that answers as long as it is `heard`; time passes as the tests say.
struct Pair {
    paths: Paths,
    remote: Arc<Remote>,
    routes: Routes,
    other: Agent,
    heard: bool,
    now: Instant,
    /// Checks that were sent, and tellings that are no news.
    checks: Vec<Instant>,
    told: Vec<Instant>,
    lost: Option<Instant>,
}

impl Pair {
    fn new() -> Self {
        let (mut pair, agreed) = Self::offered();
        pair.paths.add(agreed, there(), &pair.routes, pair.now);
        pair
    }

    /// The other side has agreed to a link, and we do not know yet.
    fn offered() -> (Self, Agreed) {
        let now = Instant::now();
        let (surroundings, _facts) = Surroundings::new(PathConfig::default());
        let (mut paths, routes) = (Paths::new(surroundings, now), Routes::default());
        paths.open((4000, true), now);
        let remote = routes.add(InstanceId::from_bytes([1; 16]), Route::Auto, None);
        let key = CheckKey::agree(&[1; 32], &[2; 32]);
        let agreed = Agreed { remote: Arc::clone(&remote), check_key: key.clone(), role: Role::Controlling };
        let mut other = Agent::new(Config { key, role: Role::Controlled, seed: [2; 32] }, now);
        other.set_local(there().candidates, now);
        let (checks, told, lost) = (Vec::new(), Vec::new(), None);
        (Self { paths, remote, routes, other, heard: true, now, checks, told, lost }, agreed)
    }

    fn direct() -> Self {
        let mut pair = Self::new();
        pair.run(Duration::from_secs(2));
        assert!(pair.is_direct());
        pair
    }

    /// Neither side hears the other any more, and ours has noticed.
    fn lost() -> Self {
        let mut pair = Self::direct();
        pair.heard = false;
        pair.run(Duration::from_secs(60));
        assert!(!pair.is_direct());
        pair
    }

    fn is_direct(&self) -> bool {
        self.paths.agents.get(&self.remote.mapped).is_some_and(|agent| agent.path().is_some())
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.turn();
            self.now += Duration::from_millis(5);
            self.paths.handle_timeout(self.now);
            self.other.handle_timeout(self.now);
        }
    }

    fn turn(&mut self) {
        let now = self.now;
        while let Some(event) = self.paths.poll_event(now) {
            match event {
                PathEvent::Again(..) => self.told.push(now),
                PathEvent::Changed { direct: None, .. } => self.lost = Some(now),
                PathEvent::Changed { .. }
                | PathEvent::Doubted { .. }
                | PathEvent::Elsewhere
                | PathEvent::Moved(_)
                | PathEvent::Search(_) => {}
            }
        }
        while let Some(shot) = self.paths.poll_transmit() {
            if shot.to != addr(THERE) {
                continue;
            }
            if Message::parse(&shot.bytes).unwrap().class() == Class::Request {
                self.checks.push(now);
            }
            if self.heard {
                self.other.handle_packet(addr(HERE), &shot.bytes, now);
            }
        }
        while let Some(Transmit { bytes, .. }) = self.other.poll_transmit() {
            if self.heard {
                let note = FromSocket::Stun { via: None, from: addr(THERE), packet: bytes.into() };
                self.paths.handle_note(note, &self.routes, now);
            }
        }
        while self.other.poll_event().is_some() {}
    }

    fn tell(&mut self) {
        self.paths.set_theirs(&self.remote, there(), self.now);
    }

    /// What the responder is asked now.
    fn asked(&mut self) -> Vec<Vec<u8>> {
        let shots = std::iter::from_fn(|| self.paths.poll_transmit());
        shots.filter(|shot| shot.to == addr(RESPONDER)).map(|shot| shot.bytes.to_vec()).collect()
    }

    /// There is a responder, and it answers.
    fn learn_how_it_is_seen(&mut self) {
        self.paths.set_responders(vec![addr(RESPONDER)], None, self.now);
        let transaction = Message::parse(&self.asked()[0]).unwrap().transaction();
        let answer = Draft::new(Class::Success, transaction).mapped_address(addr("198.51.100.7:4000")).finish();
        let note = FromSocket::Stun { via: None, from: addr(RESPONDER), packet: answer.into() };
        self.paths.handle_note(note, &self.routes, self.now);
    }
}

const RESPONDER: &str = "203.0.113.1:8080";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn there() -> Whereabouts {
    let candidate = Candidate { kind: CandidateKind::ServerReflexive, addr: addr(THERE) };
    Whereabouts { candidates: vec![candidate], nat: Nat::default() }
}

#[tokio::test]
async fn a_check_that_overtakes_the_answer_to_our_offer_is_checked_back_once_the_link_is_agreed() {
    let (mut pair, agreed) = Pair::offered();
    pair.other.set_remote(vec![Candidate { kind: CandidateKind::ServerReflexive, addr: addr(HERE) }], pair.now);
    let check = pair.other.poll_transmit().unwrap();
    let note = FromSocket::Stun { via: None, from: addr(THERE), packet: check.bytes.into() };
    pair.paths.handle_note(note, &pair.routes, pair.now);
    pair.paths.add(agreed, Whereabouts::default(), &pair.routes, pair.now);
    let back = std::iter::from_fn(|| pair.paths.poll_transmit()).find(|shot| shot.to == addr(THERE)).unwrap();
    assert_eq!(Message::parse(&back.bytes).unwrap().class(), Class::Request);
    assert!(pair.routes.by_source(addr(THERE)).is_some());
}

#[tokio::test]
async fn the_other_side_is_told_once_that_a_path_was_lost() {
    let pair = Pair::lost();
    assert_eq!(pair.told, [pair.lost.unwrap()]);
}

#[tokio::test]
async fn who_has_no_path_and_is_told_the_same_again_looks_for_one_at_once() {
    let mut pair = Pair::lost();
    // Its next round is half a minute away.
    let before = pair.checks.len();
    pair.heard = true;
    pair.tell();
    pair.run(Duration::from_millis(100));
    assert!(pair.checks.len() > before && pair.is_direct());
}

#[tokio::test]
async fn news_of_the_other_sides_nat_alone_begin_no_round() {
    let mut pair = Pair::lost();
    let before = pair.checks.len();
    let nat = Nat { mapping: Mapping::EndpointIndependent, ..Nat::default() };
    pair.paths.set_theirs(&pair.remote, Whereabouts { nat, ..there() }, pair.now);
    pair.run(Duration::from_millis(100));
    assert_eq!(pair.checks.len(), before);
}

#[tokio::test]
async fn who_is_told_the_same_all_the_time_neither_checks_nor_answers_all_the_time() {
    let mut pair = Pair::lost();
    let before = pair.checks.len();
    for _ in 0..100 {
        pair.tell();
        pair.run(Duration::from_millis(10));
    }
    // Two rounds began.
    let checks = pair.checks.len() - before;
    assert!(checks <= 12, "{checks} checks in a second");
    assert_eq!(pair.told.len(), 1, "only the loss was told");
}

#[tokio::test]
async fn who_has_a_path_and_is_told_the_same_again_does_nothing() {
    let mut pair = Pair::direct();
    let before = (pair.checks.len(), pair.told.len());
    pair.tell();
    pair.run(Duration::from_secs(2));
    assert_eq!((pair.checks.len(), pair.told.len()), before);
}

#[tokio::test]
async fn who_is_back_in_the_room_is_told_where_we_are() {
    let mut pair = Pair::direct();
    pair.paths.is_back(&Arc::clone(&pair.remote), pair.now);
    pair.run(Duration::from_millis(10));
    assert_eq!(pair.told.len(), 1);
}

#[tokio::test]
async fn whoever_comes_back_asks_how_it_is_seen() {
    let mut pair = Pair::direct();
    pair.learn_how_it_is_seen();
    pair.paths.joined(pair.now);
    assert_eq!(pair.asked().len(), 1);
}

#[tokio::test]
async fn responders_are_asked_while_a_link_has_no_path_and_not_while_all_have() {
    let mut pair = Pair::direct();
    pair.learn_how_it_is_seen();
    pair.run(Duration::from_millis(10));
    assert!(pair.paths.reflexive.poll_timeout().is_none(), "nothing will be asked");
    pair.heard = false;
    pair.run(Duration::from_secs(60));
    assert!(!pair.is_direct() && pair.paths.reflexive.poll_timeout().is_some());
}

#[tokio::test]
async fn a_source_that_packets_come_from_stays_though_others_check() {
    let mut pair = Pair::direct();
    for port in 5000..5100 {
        pair.routes.prove_source(&pair.remote, SocketAddr::from(([192, 0, 2, 9], port)));
        let note = FromSocket::Received { mapped: pair.remote.mapped, from: addr(THERE) };
        pair.paths.handle_note(note, &pair.routes, pair.now);
    }
    assert!(pair.routes.by_source(addr(THERE)).is_some());
}
