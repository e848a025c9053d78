//! What is told of a NAT's filter, behind NATs of every kind and with responders of every kind.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    path::{
        FilterTrial, Handled, Ignored, Transmit,
        filtering::{CHANGE_PATIENCE, CHANGE_SPACING, CHANGES, Filtering, REQUESTS},
    },
    stun::{ChangeRequest, Class, Draft, Message, TransactionId},
};

#[path = "sim/clock.rs"]
#[expect(dead_code, reason = "little here is random")]
mod clock;
#[path = "sim/nat.rs"]
#[expect(dead_code, reason = "these NATs have one socket behind them")]
mod nat;

use clock::Dice;
use nat::{FILTERS, Filter, MAPPINGS, Mapping, Nat, PORTS, Table};

const MAIN: &str = "203.0.113.1:8080";
const OTHER: &str = "203.0.113.1:8081";
/// Another address of the responder's, and another port of its main one.
const ELSEWHERE: &str = "203.0.113.9:9999";
const THIRD: &str = "203.0.113.1:9999";
const SOCKET: &str = "192.168.1.4:40000";
const OUTSIDE: &str = "198.51.100.7";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// How the responder treats who asks for an answer from its other port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Responder {
    /// It answers from there.
    Changes,
    /// It does not know the question, and answers from where it was asked.
    Old,
    /// It refuses.
    Refuses,
    /// It would, but nothing comes from its other port, whatever is asked.
    Walled,
    /// It answers from another address altogether, because it has two.
    Elsewhere,
    /// A translator in front of it gives its other port another number for those who were not asked for there.
    Translated,
}

/// One socket behind a NAT, and the responder.
struct World {
    nat: Nat,
    table: Table,
    dice: Dice,
    responder: Responder,
    delay: Duration,
    /// One packet in so many is lost, by chance.
    loss: Option<u64>,
    now: Instant,
    trial: FilterTrial,
    /// On the way, by when it arrives: to the responder, or to the socket.
    going: BTreeMap<(Instant, u64), (SocketAddr, Transmit)>,
    coming: BTreeMap<(Instant, u64), (SocketAddr, Transmit)>,
    sent: Vec<(Instant, Transmit)>,
    number: u64,
}

impl World {
    fn new(nat: Nat, responder: Responder) -> Self {
        let now = clock::beginning();
        Self {
            nat,
            table: Table::default(),
            dice: Dice::new(9),
            responder,
            delay: Duration::from_millis(20),
            loss: None,
            now,
            trial: FilterTrial::new(addr(MAIN), 8081, [3; 32], now),
            going: BTreeMap::new(),
            coming: BTreeMap::new(),
            sent: Vec::new(),
            number: 0,
        }
    }

    fn run(&mut self) -> Filtering {
        loop {
            self.send();
            if let Some(outcome) = self.trial.outcome() {
                assert_eq!(self.trial.poll_timeout(), None, "it is over");
                return outcome;
            }
            let arrivals = [&self.going, &self.coming].into_iter().filter_map(|way| Some(way.keys().next()?.0));
            self.now = arrivals.chain(self.trial.poll_timeout()).min().unwrap().max(self.now);
            self.deliver();
            self.trial.handle_timeout(self.now);
        }
    }

    fn send(&mut self) {
        while let Some(packet) = self.trial.poll_transmit() {
            self.sent.push((self.now, packet.clone()));
            let outside = OUTSIDE.parse().unwrap();
            let seen = self.table.leave(&self.nat, outside, [addr(SOCKET), packet.to], &mut self.dice, self.now);
            if let Some(at) = self.arrival() {
                self.going.insert(at, (seen, packet));
            }
        }
    }

    fn arrival(&mut self) -> Option<(Instant, u64)> {
        self.number += 1;
        let is_lost = self.loss.is_some_and(|one_in| self.dice.below(one_in) == 0);
        (!is_lost).then_some((self.now + self.delay, self.number))
    }

    fn deliver(&mut self) {
        while let Some(entry) = self.going.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let (seen, request) = entry.remove();
            if let Some((from, bytes)) = self.answer(seen, &request)
                && let Some(at) = self.arrival()
            {
                self.coming.insert(at, (from, Transmit { to: seen, bytes }));
            }
        }
        while let Some(entry) = self.coming.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let (from, packet) = entry.remove();
            if self.table.enter(&self.nat, from, packet.to, self.now) == Some(addr(SOCKET)) {
                self.trial.handle_packet(from, &packet.bytes, self.now);
            }
        }
    }

    fn answer(&self, seen: SocketAddr, request: &Transmit) -> Option<(SocketAddr, Vec<u8>)> {
        let message = Message::parse(&request.bytes).unwrap();
        let answer = |class| Draft::new(class, message.transaction()).mapped_address(seen).finish();
        let wanted = message.change_request();
        assert!(wanted.is_none() || wanted == Some(ChangeRequest { ip: false, port: true }));
        let from = match (wanted, self.responder) {
            (None, Responder::Walled) if request.to == addr(OTHER) => return None,
            (None, _) | (Some(_), Responder::Old) => request.to,
            (Some(_), Responder::Refuses) => return Some((request.to, answer(Class::Error))),
            (Some(_), Responder::Walled) => return None,
            (Some(_), Responder::Changes) => addr(OTHER),
            (Some(_), Responder::Elsewhere) => addr(ELSEWHERE),
            (Some(_), Responder::Translated) => addr(THIRD),
        };
        Some((from, answer(Class::Success)))
    }
}

fn told(nat: Nat, responder: Responder) -> Filtering {
    World::new(nat, responder).run()
}

/// What an honest answer is: whether other addresses are let in, one address cannot tell.
fn expected(filter: Filter) -> Filtering {
    match filter {
        Filter::Independent | Filter::Address => Filtering::PortIndependent,
        Filter::Port => Filtering::AddressAndPortDependent,
    }
}

#[test]
fn the_filter_of_every_nat_is_told_as_far_as_one_address_can() {
    for mapping in MAPPINGS {
        for filter in FILTERS {
            for ports in PORTS {
                let nat = Nat { ports, ..Nat::new(mapping, filter) };
                assert_eq!(told(nat, Responder::Changes), expected(filter), "{nat:?}");
            }
        }
    }
}

#[test]
fn a_filter_without_translation_is_told_alike() {
    assert_eq!(told(Nat::OPEN, Responder::Changes), Filtering::PortIndependent);
    for filter in FILTERS {
        assert_eq!(told(Nat::new(Mapping::None, filter), Responder::Changes), expected(filter));
    }
}

#[test]
fn of_a_responder_that_cannot_answer_from_elsewhere_nothing_is_concluded() {
    for responder in [Responder::Old, Responder::Refuses, Responder::Walled] {
        for nat in [Nat::OPEN, Nat::FULL_CONE, Nat::ADDRESS_RESTRICTED, Nat::PORT_RESTRICTED, Nat::SYMMETRIC] {
            assert_eq!(told(nat, responder), Filtering::Unknown, "{responder:?} {nat:?}");
        }
    }
}

#[test]
fn an_answer_from_an_address_that_was_never_sent_to_shows_that_anybody_is_let_in() {
    assert_eq!(told(Nat::FULL_CONE, Responder::Elsewhere), Filtering::EndpointIndependent);
}

#[test]
fn an_answer_from_a_third_port_counts_like_one_from_the_second() {
    assert_eq!(told(Nat::ADDRESS_RESTRICTED, Responder::Translated), Filtering::PortIndependent);
    assert_eq!(told(Nat::PORT_RESTRICTED, Responder::Translated), Filtering::AddressAndPortDependent);
}

#[test]
fn a_long_way_to_the_responder_changes_nothing() {
    for (nat, filtering) in
        [(Nat::FULL_CONE, Filtering::PortIndependent), (Nat::PORT_RESTRICTED, Filtering::AddressAndPortDependent)]
    {
        let mut world = World::new(nat, Responder::Changes);
        world.delay = Duration::from_millis(300);
        assert_eq!(world.run(), filtering);
    }
}

#[test]
fn lost_packets_make_no_filter_of_an_open_way() {
    let told = (0..500).map(|seed| {
        let mut world = World::new(Nat::FULL_CONE, Responder::Changes);
        world.loss = Some(20);
        world.dice = Dice::new(seed);
        world.run()
    });
    let told: Vec<_> = told.collect();
    let count = |filtering| told.iter().filter(|told| **told == filtering).count();
    assert!(count(Filtering::AddressAndPortDependent) <= 1, "{told:?}");
    assert!(count(Filtering::PortIndependent) >= 490, "{told:?}");
}

#[test]
fn without_any_answer_it_is_over_after_two_seconds_and_three_packets() {
    let mut world = World::new(Nat::FULL_CONE, Responder::Changes);
    let begin = world.now;
    world.loss = Some(1);
    assert_eq!(world.run(), Filtering::Unknown);
    assert_eq!((world.sent.len(), world.now - begin), (REQUESTS, Duration::from_secs(2)));
}

#[test]
fn the_other_port_is_not_sent_to_before_nothing_more_can_be_expected_of_it() {
    let mut world = World::new(Nat::PORT_RESTRICTED, Responder::Changes);
    world.run();
    let (first, _) = world.sent.iter().find(|(_, packet)| packet.to == addr(OTHER)).unwrap();
    let changes =
        world.sent.iter().filter(|(_, packet)| Message::parse(&packet.bytes).unwrap().change_request().is_some());
    let at: Vec<_> = changes.map(|(at, _)| *at).collect();
    assert_eq!(at.len(), CHANGES);
    assert!(at.windows(2).all(|two| two[1] - two[0] == CHANGE_SPACING));
    assert!(*first - *at.last().unwrap() >= CHANGE_PATIENCE);
    assert!(world.sent.len() <= 2 * REQUESTS + CHANGES);
    assert!(world.sent.iter().all(|(_, packet)| [addr(MAIN), addr(OTHER)].contains(&packet.to)));
}

#[test]
fn an_answer_is_no_longer_than_the_request_for_it() {
    let mut world = World::new(Nat::OPEN, Responder::Changes);
    world.run();
    for (_, packet) in &world.sent {
        let transaction = Message::parse(&packet.bytes).unwrap().transaction();
        let answer = Draft::new(Class::Success, transaction).mapped_address(addr("[2001:db8::7]:40000")).finish();
        assert!(answer.len() <= packet.bytes.len());
    }
}

#[test]
fn what_nobody_asked_for_decides_nothing() {
    let now = clock::beginning();
    let mut trial = FilterTrial::new(addr(MAIN), 8081, [3; 32], now);
    let opening = trial.poll_transmit().unwrap();
    let answer = |request: &Transmit| {
        let transaction = Message::parse(&request.bytes).unwrap().transaction();
        Draft::new(Class::Success, transaction).mapped_address(addr("198.51.100.7:4000")).finish()
    };
    let wrong = Handled::Ignored(Ignored::WrongSource);
    assert_eq!(trial.handle_packet(addr(OTHER), &answer(&opening), now), wrong, "it was not asked");
    assert_eq!(trial.handle_packet(addr(MAIN), &answer(&opening), now), Handled::Answer);
    let change = trial.poll_transmit().unwrap();
    let forged = Draft::new(Class::Success, TransactionId([1; 12])).mapped_address(addr("198.51.100.7:4000")).finish();
    let not_ours = Handled::Ignored(Ignored::NotOurs);
    assert_eq!(trial.handle_packet(addr(OTHER), &forged, now), not_ours);
    assert_eq!(trial.handle_packet(addr(OTHER), &answer(&opening), now), not_ours, "it is no answer from elsewhere");
    assert_eq!(trial.handle_packet(addr(OTHER), &change.bytes, now), not_ours, "a request is no answer");
    assert!(matches!(trial.handle_packet(addr(OTHER), b"x", now), Handled::Ignored(Ignored::Malformed(_))));
    assert_eq!(trial.outcome(), None);
    assert_eq!(trial.handle_packet(addr(OTHER), &answer(&change), now), Handled::Answer);
    assert_eq!(trial.outcome(), Some(Filtering::PortIndependent));
}

#[test]
fn an_answer_from_elsewhere_that_comes_too_late_confirms_nothing() {
    let mut now = clock::beginning();
    let mut trial = FilterTrial::new(addr(MAIN), 8081, [3; 32], now);
    let answer = |request: &Transmit| {
        let transaction = Message::parse(&request.bytes).unwrap().transaction();
        Draft::new(Class::Success, transaction).mapped_address(addr("198.51.100.7:4000")).finish()
    };
    let opening = trial.poll_transmit().unwrap();
    trial.handle_packet(addr(MAIN), &answer(&opening), now);
    let change = trial.poll_transmit().unwrap();
    let confirming = loop {
        now = trial.poll_timeout().unwrap();
        trial.handle_timeout(now);
        if let Some(packet) = trial.poll_transmit().filter(|packet| packet.to == addr(OTHER)) {
            break packet;
        }
    };
    // The filter may have let it in because of what was sent to confirm.
    assert_eq!(trial.handle_packet(addr(OTHER), &answer(&change), now), Handled::Ignored(Ignored::NotOurs));
    assert_eq!(trial.outcome(), None);
    trial.handle_packet(addr(OTHER), &answer(&confirming), now);
    assert_eq!(trial.outcome(), Some(Filtering::AddressAndPortDependent));
}
