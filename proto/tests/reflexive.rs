//! Server-reflexive discovery: whom it asks and when, and whom it believes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    path::{
        Handled, Ignored, Reflexive, ReflexiveEvent, Transmit,
        reflexive::{MAX_RESPONDERS, REFRESH, RETRANSMIT, RETRY_MAX, RETRY_MIN},
    },
    stun::{Class, Draft, Message, TransactionId},
};

#[path = "sim/clock.rs"]
#[expect(dead_code, reason = "nothing here is random")]
mod clock;

const RESPONDER: &str = "203.0.113.1:8080";
const SEEN: &str = "198.51.100.7:40000";

#[test]
fn an_answer_tells_the_address() {
    let mut one = One::new(&[RESPONDER]);
    one.answer_with(SEEN);
    assert_eq!(one.reflexive.poll_event(), Some(ReflexiveEvent::Found(addr(SEEN))));
    assert_eq!(one.reflexive.addresses().into_iter().collect::<Vec<_>>(), [addr(SEEN)]);
}

#[test]
fn a_request_is_as_long_as_the_longest_answer_to_it() {
    let mut one = One::new(&[RESPONDER]);
    let request = one.reflexive.poll_transmit().unwrap().bytes;
    let transaction = Message::parse(&request).unwrap().transaction();
    let answer = Draft::new(Class::Success, transaction).mapped_address(addr("[2001:db8::7]:40000")).finish();
    assert_eq!(request.len(), answer.len());
}

#[test]
fn a_silent_responder_is_asked_five_times_and_then_seldom() {
    let mut one = One::new(&[RESPONDER]);
    one.reflexive.set_active(true, one.now);
    let began = one.now;
    let sent = one.sent_during(Duration::from_secs(3600));
    let times: Vec<_> = sent.iter().map(|(at, _)| *at - began).collect();
    assert_eq!(times[..5], RETRANSMIT);
    let askings: Vec<_> = times.iter().step_by(RETRANSMIT.len()).copied().collect();
    assert!(askings[1] - askings[0] >= RETRY_MIN);
    assert!(askings.windows(3).all(|three| three[2] - three[1] >= three[1] - three[0]), "{askings:?}");
    assert!(askings.windows(2).all(|two| two[1] - two[0] <= RETRY_MAX + Duration::from_secs(12)));
}

#[test]
fn nobody_is_asked_again_while_no_link_needs_it() {
    let mut one = One::new(&[RESPONDER]);
    one.answer_with(SEEN);
    one.reflexive.poll_event();
    assert_eq!(one.reflexive.poll_timeout(), None);
    one.now += REFRESH;
    one.reflexive.set_active(true, one.now);
    assert!(one.reflexive.poll_transmit().is_some(), "what is old is asked at once when a link needs it");
}

#[test]
fn an_active_mapping_is_refreshed() {
    let mut one = One::new(&[RESPONDER]);
    one.reflexive.set_active(true, one.now);
    for _ in 0..3 {
        one.answer_with(SEEN);
        while one.reflexive.poll_event().is_some() {}
        assert_eq!(one.reflexive.poll_timeout(), Some(one.now + REFRESH));
        one.now += REFRESH;
        one.reflexive.handle_timeout(one.now);
    }
}

#[test]
fn only_a_new_address_is_told() {
    let mut one = One::new(&[RESPONDER]);
    one.answer_with(SEEN);
    assert!(one.reflexive.poll_event().is_some());
    one.reflexive.refresh(one.now);
    one.answer_with(SEEN);
    assert_eq!(one.reflexive.poll_event(), None);
    one.reflexive.refresh(one.now);
    one.answer_with("198.51.100.7:40001");
    assert_eq!(one.reflexive.poll_event(), Some(ReflexiveEvent::Found(addr("198.51.100.7:40001"))));
    assert_eq!(one.reflexive.addresses().len(), 1);
}

#[test]
fn a_changed_interface_forgets_and_asks() {
    let mut one = One::new(&[RESPONDER]);
    one.answer_with(SEEN);
    one.reflexive.restart(one.now);
    assert!(one.reflexive.addresses().is_empty());
    one.answer_with(SEEN);
    assert_eq!(one.reflexive.addresses().len(), 1);
}

#[test]
fn an_answer_that_nobody_asked_for_is_not_believed() {
    let mut one = One::new(&[RESPONDER]);
    let request = one.reflexive.poll_transmit().unwrap();
    let guessed = answer(TransactionId([7; 12]), SEEN);
    let asked = answer(transaction(&request), SEEN);
    assert_eq!(one.handle(RESPONDER, &guessed), Handled::Ignored(Ignored::NotOurs));
    assert_eq!(one.handle("203.0.113.2:8080", &asked), Handled::Ignored(Ignored::WrongSource));
    assert!(one.reflexive.addresses().is_empty());
    assert_eq!(one.handle(RESPONDER, &asked), Handled::Answer);
    assert_eq!(
        one.handle(RESPONDER, &answer(transaction(&request), "192.0.2.1:1")),
        Handled::Ignored(Ignored::NotOurs)
    );
    assert_eq!(one.reflexive.addresses().into_iter().collect::<Vec<_>>(), [addr(SEEN)]);
}

#[test]
fn an_answer_without_a_usable_address_is_not_believed() {
    let mut one = One::new(&[RESPONDER]);
    let request = one.reflexive.poll_transmit().unwrap();
    for seen in ["0.0.0.0:9", "224.0.0.1:9", "192.0.2.1:0"] {
        let handled = one.handle(RESPONDER, &answer(transaction(&request), seen));
        assert_eq!(handled, Handled::Ignored(Ignored::NoAddress), "{seen}");
    }
    let bare = Draft::new(Class::Success, transaction(&request)).finish();
    assert_eq!(one.handle(RESPONDER, &bare), Handled::Ignored(Ignored::NoAddress));
}

#[test]
fn only_so_many_usable_responders_are_asked() {
    let many: Vec<_> = (0..20).map(|at| format!("203.0.113.{at}:8080")).collect();
    let mut one = One::new(&many.iter().map(String::as_str).chain(["0.0.0.0:1"]).collect::<Vec<_>>());
    let asked: Vec<_> = std::iter::from_fn(|| one.reflexive.poll_transmit()).collect();
    assert_eq!(asked.len(), MAX_RESPONDERS);
}

#[test]
fn a_responder_that_is_no_longer_named_is_forgotten() {
    let mut one = One::new(&[RESPONDER]);
    one.answer_with(SEEN);
    one.reflexive.set_responders(&[addr("203.0.113.2:8080")], one.now);
    assert!(one.reflexive.addresses().is_empty());
    assert_eq!(one.reflexive.poll_transmit().unwrap().to, addr("203.0.113.2:8080"));
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn transaction(request: &Transmit) -> TransactionId {
    Message::parse(&request.bytes).unwrap().transaction()
}

fn answer(transaction: TransactionId, seen: &str) -> Vec<u8> {
    Draft::new(Class::Success, transaction).mapped_address(addr(seen)).finish()
}

struct One {
    reflexive: Reflexive,
    now: Instant,
}

impl One {
    fn new(responders: &[&str]) -> Self {
        let now = clock::beginning();
        let mut reflexive = Reflexive::new([5; 32], now);
        reflexive.set_responders(&responders.iter().map(|text| addr(text)).collect::<Vec<_>>(), now);
        Self { reflexive, now }
    }

    fn handle(&mut self, from: &str, bytes: &[u8]) -> Handled {
        self.reflexive.handle_packet(addr(from), bytes, self.now)
    }

    /// The responder answers the request that is waiting to be sent.
    fn answer_with(&mut self, seen: &str) {
        let request = self.reflexive.poll_transmit().unwrap();
        assert_eq!(request.to, addr(RESPONDER));
        assert_eq!(self.handle(RESPONDER, &answer(transaction(&request), seen)), Handled::Answer);
    }

    fn sent_during(&mut self, time: Duration) -> Vec<(Instant, Transmit)> {
        let end = self.now + time;
        let mut sent = Vec::new();
        loop {
            sent.extend(std::iter::from_fn(|| self.reflexive.poll_transmit()).map(|transmit| (self.now, transmit)));
            match self.reflexive.poll_timeout().filter(|wake| *wake < end) {
                Some(wake) => self.now = wake,
                None => return sent,
            }
            self.reflexive.handle_timeout(self.now);
        }
    }
}
