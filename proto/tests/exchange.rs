//! Asking through a relay that does its worst, in virtual time.

#![expect(clippy::disallowed_methods, reason = "virtual time begins somewhere")]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use peerfleet_proto::{
    exchange::{Address, AskFault, Config, Event, Exchange},
    id::{InstanceId, JobId, PeerId, RequestId, RoomId, Slot},
    limits::{ASK_CONNECT_DEADLINE, ASK_LOST_AFTER},
    presence::Epoch,
    request::{Failure, FailureKind, Outcome, Request},
    wire::relay::{MESSAGE_HEADER_BYTES, PeerFrame, RefusalReason, Refused, RelayFrame},
};
use proptest::prelude::*;
use rand_core::Rng;
use x25519_dalek::{PublicKey, StaticSecret};

mod common;
use common::Hashes;

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn an_ask_is_answered_in_one_round_trip_also_the_first() {
    let mut net = Net::new(2);
    let id = net.ask(0, 1, 7);
    net.run_for(Duration::from_millis(100));
    assert_eq!(net.ends[&id], Ok(outcome(1, 7)));
    assert_eq!(net.handled.len(), 1);
    // Initiation there, response and answer back.
    assert_eq!(net.frames, 3);
    let again = net.ask(0, 1, 8);
    net.run_for(Duration::from_millis(100));
    assert_eq!(net.ends[&again], Ok(outcome(1, 8)));
    assert_eq!(net.frames, 5);
}

#[test]
fn two_that_ask_each_other_at_once_are_both_answered() {
    let mut net = Net::new(2);
    let ids = [net.ask(0, 1, 1), net.ask(1, 0, 2)];
    net.run_for(Duration::from_millis(100));
    assert_eq!(net.ends[&ids[0]], Ok(outcome(1, 1)));
    assert_eq!(net.ends[&ids[1]], Ok(outcome(0, 2)));
}

#[test]
fn many_asks_before_the_first_answer_use_one_session() {
    let mut net = Net::new(2);
    let ids: Vec<_> = (0..50).map(|number| net.ask(0, 1, number)).collect();
    net.run_for(Duration::from_millis(500));
    for (number, id) in ids.iter().enumerate() {
        assert_eq!(net.ends[id], Ok(outcome(1, number as u8)));
    }
    assert_eq!(net.frames, 1 + 2 + 49 + 49);
}

#[test]
fn two_hundred_hosts_are_asked_with_one_upload_of_the_request() {
    let mut net = Net::new(201);
    let to: Vec<_> = (1..201).map(|index| net.peers[index].address.instance).collect();
    let big = Request::Cancel(JobId::from_bytes([9; 16]));
    let Peer { exchange, .. } = &mut net.peers[0];
    let asks = exchange.ask_many(&to, big, MINUTE, net.now, &mut net.rng);
    let frame = exchange.poll_transmit().expect("one frame");
    assert!(exchange.poll_transmit().is_none());
    let Ok(PeerFrame::Multicast(multicast)) = PeerFrame::split(&frame) else { panic!("no multicast") };
    assert_eq!(multicast.len(), 200);
    net.send(0, frame);
    net.run_for(Duration::from_millis(500));
    assert!(asks.iter().all(|(_, id)| net.ends[id].is_ok()));
    assert_eq!(net.handled.len(), 200);
}

#[test]
fn who_takes_nothing_is_unreachable() {
    let mut net = Net::new(2);
    net.relay = Relay::Dead;
    let (start, id) = (net.now, net.ask(0, 1, 1));
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Err(AskFault::Unreachable));
    assert_eq!(net.now - start, ASK_CONNECT_DEADLINE);
    let nobody = InstanceId::from_bytes([99; 16]);
    let id = net.peers[0].exchange.ask(nobody, Request::Ping, MINUTE, net.now, &mut net.rng);
    net.settle();
    assert_eq!(net.ends[&id], Err(AskFault::Unreachable));
}

#[test]
fn a_slow_outcome_is_waited_for_and_asked_once() {
    let mut net = Net::new(2);
    net.peers[1].thinks_for = Duration::from_secs(45);
    let id = net.ask(0, 1, 1);
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Ok(outcome(1, 1)));
    assert_eq!(net.handled.len(), 1);
}

#[test]
fn an_outcome_that_takes_too_long_ends_the_ask_at_its_deadline() {
    let mut net = Net::new(2);
    net.peers[1].thinks_for = MINUTE * 10;
    let (start, id) = (net.now, net.ask(0, 1, 1));
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Err(AskFault::DeadlineExceeded));
    assert_eq!(net.now - start, MINUTE);
}

#[test]
fn a_host_that_leaves_while_it_works_and_stays_away_has_lost_the_ask() {
    let mut net = Net::new(2);
    net.peers[1].thinks_for = MINUTE;
    let id = net.ask(0, 1, 1);
    net.run_for(Duration::from_secs(1));
    let gone = net.peers[1].address.instance;
    net.peers[0].exchange.member_left(gone, net.now);
    let left = net.now;
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Err(AskFault::Lost));
    assert_eq!(net.now - left, ASK_LOST_AFTER);
}

#[test]
fn a_restarted_host_is_not_asked_again() {
    let mut net = Net::new(2);
    net.peers[1].thinks_for = MINUTE;
    let id = net.ask(0, 1, 1);
    net.run_for(Duration::from_secs(1));
    net.restart_host(1);
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Err(AskFault::Lost));
    assert_eq!(net.handled.values().sum::<u32>(), 1);
}

#[test]
fn a_relay_that_restarts_in_the_middle_costs_only_time() {
    let mut net = Net::new(3);
    net.peers[1].thinks_for = Duration::from_secs(5);
    let ids = [net.ask(0, 1, 1), net.ask(0, 2, 2)];
    net.run_for(Duration::from_secs(1));
    net.restart_relay();
    net.run_for(Duration::from_secs(20));
    assert_eq!(net.ends[&ids[0]], Ok(outcome(1, 1)));
    assert_eq!(net.ends[&ids[1]], Ok(outcome(2, 2)));
    assert_eq!(net.handled.len(), 2);
}

#[test]
fn an_ask_gets_through_although_the_host_has_forgotten_the_session() {
    let mut net = Net::new(2);
    net.ask(0, 1, 1);
    net.run_for(Duration::from_secs(1));
    // The caller's machine sleeps: to the host it is gone for good, to itself only its connection was lost.
    let caller = net.peers[0].address.instance;
    net.peers[1].exchange.member_left(caller, net.now);
    net.peers[0].exchange.uplink_lost();
    net.run_for(MINUTE * 10);
    net.restart_relay();
    let (start, id) = (net.now, net.ask(0, 1, 2));
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Ok(outcome(1, 2)));
    assert!(net.now - start < Duration::from_secs(2));
    let again = net.ask(0, 1, 3);
    net.run_for(Duration::from_millis(100));
    assert_eq!(net.ends[&again], Ok(outcome(1, 3)));
}

#[test]
fn a_full_queue_is_tried_again_soon() {
    let mut net = Net::new(2);
    net.relay = Relay::QueueFull { times: 3 };
    let id = net.ask(0, 1, 1);
    net.run_for(Duration::from_millis(1500));
    assert_eq!(net.ends[&id], Ok(outcome(1, 1)));
}

#[test]
fn a_replayed_first_message_is_never_taken_again_whatever_the_epoch() {
    let mut net = Net::new(2);
    let id = net.ask(0, 1, 1);
    let first = net.queue.front().expect("the initiation").clone();
    net.run_for(Duration::from_secs(1));
    assert!(net.ends[&id].is_ok());
    for _ in 0..3 {
        net.run_for(Duration::from_secs(1900));
        net.queue.push_back(Packet { at: net.now, ..first.clone() });
        net.run_for(Duration::from_secs(1));
    }
    assert_eq!(net.handled.values().sum::<u32>(), 1);
}

#[test]
fn sessions_are_replaced_without_losing_an_ask() {
    let mut net = Net::new(2);
    for number in 0..20 {
        let id = net.ask(0, 1, number);
        net.run_for(Duration::from_secs(600));
        assert_eq!(net.ends[&id], Ok(outcome(1, number)));
    }
    assert_eq!(net.handled.len(), 20);
}

#[test]
fn a_member_with_another_identity_cannot_ask_in_anothers_name() {
    let mut net = Net::new(3);
    // The relay swaps the sources of peers 1 and 2 towards peer 0.
    net.relay = Relay::SwapSources(1, 2);
    let id = net.ask(1, 0, 1);
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Err(AskFault::Unreachable));
    assert!(net.handled.is_empty());
}

#[test]
fn an_outcome_beyond_a_message_is_told_as_such() {
    let mut net = Net::new(2);
    net.peers[1].big_outcome = true;
    let id = net.ask(0, 1, 1);
    net.run_for(Duration::from_secs(1));
    assert!(matches!(&net.ends[&id], Ok(Outcome::Failed(Failure { kind: FailureKind::Invalid, .. }))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the relay does: no request is done twice or on another host, and no outcome is another's.
    #[test]
    fn a_hostile_relay_causes_failures_and_delays_only(seed in any::<u64>(), asks in 1_usize..40, peers in 2_usize..5) {
        let mut net = Net::new(peers);
        net.rng = Hashes(seed);
        net.relay = Relay::Hostile;
        let mut expected = BTreeMap::new();
        for number in 0..asks {
            let (from, to) = (net.random(peers), net.random(peers));
            if from == to {
                continue;
            }
            net.peers[to].thinks_for = Duration::from_millis(net.random(3000) as u64);
            expected.insert(net.ask(from, to, number as u8), outcome(to, number as u8));
            let pause = Duration::from_millis(net.random(400) as u64);
            net.run_for(pause);
        }
        net.run_for(Duration::from_secs(3));
        // The relay turns honest, so that everything ends; what it held back is still on its way.
        net.relay = Relay::Honest;
        net.run_for(MINUTE * 3);
        for (id, outcome) in &expected {
            let end = net.ends.get(id);
            prop_assert!(end.is_some(), "an ask never ended");
            if let Some(Ok(answered)) = end {
                prop_assert_eq!(answered, outcome);
            }
        }
        prop_assert!(net.handled.values().all(|times| *times == 1), "a request was done twice");
        prop_assert!(net.misdelivered.is_empty(), "a request reached another host");
    }
}

/// Peers around a relay, on one clock.
struct Net {
    peers: Vec<Peer>,
    now: Instant,
    rng: Hashes,
    relay: Relay,
    queue: VecDeque<Packet>,
    captured: Vec<Packet>,
    frames: usize,
    next_slot: u32,
    asked: BTreeMap<RequestId, usize>,
    handled: BTreeMap<RequestId, u32>,
    misdelivered: BTreeSet<RequestId>,
    ends: BTreeMap<RequestId, Result<Outcome, AskFault>>,
}

struct Peer {
    exchange: Exchange,
    address: Address,
    slot: Slot,
    thinks_for: Duration,
    big_outcome: bool,
    thoughts: Vec<(Instant, InstanceId, RequestId, Outcome)>,
}

#[derive(Clone)]
struct Packet {
    at: Instant,
    from: Slot,
    to: Slot,
    tag: u32,
    part: Bytes,
    shared: Option<Bytes>,
}

enum Relay {
    Honest,
    Dead,
    QueueFull { times: u32 },
    SwapSources(usize, usize),
    Hostile,
}

const LATENCY: Duration = Duration::from_millis(10);

impl Net {
    fn new(count: usize) -> Self {
        let now = Instant::now();
        let mut rng = Hashes(5);
        let peers = (0..count).map(|index| Peer::new(index, 0, Slot(index as u32), &mut rng, now)).collect();
        let mut net = Self {
            peers,
            now,
            rng,
            relay: Relay::Honest,
            queue: VecDeque::new(),
            captured: Vec::new(),
            frames: 0,
            next_slot: count as u32,
            asked: BTreeMap::new(),
            handled: BTreeMap::new(),
            misdelivered: BTreeSet::new(),
            ends: BTreeMap::new(),
        };
        net.introduce_all();
        net
    }

    fn introduce_all(&mut self) {
        let members: Vec<(Address, Slot, Epoch)> =
            self.peers.iter().map(|peer| (peer.address, peer.slot, peer.exchange.epoch())).collect();
        for peer in &mut self.peers {
            for (address, slot, epoch) in members.iter().filter(|(address, ..)| *address != peer.address) {
                peer.exchange.member_joined(*address, *slot, *epoch, self.now, &mut self.rng);
            }
        }
        self.settle();
    }

    fn random(&mut self, below: usize) -> usize {
        self.rng.next_u32() as usize % below
    }

    fn ask(&mut self, from: usize, to: usize, number: u8) -> RequestId {
        let instance = self.peers[to].address.instance;
        let request = Request::Cancel(JobId::from_bytes([number; 16]));
        let id = self.peers[from].exchange.ask(instance, request, MINUTE, self.now, &mut self.rng);
        self.asked.insert(id, to);
        self.settle();
        id
    }

    /// Drains every machine.
    fn settle(&mut self) {
        for index in 0..self.peers.len() {
            while let Some(frame) = self.peers[index].exchange.poll_transmit() {
                self.send(index, frame);
            }
            while let Some(event) = self.peers[index].exchange.poll_event() {
                self.handle_event(index, event);
            }
        }
    }

    fn handle_event(&mut self, index: usize, event: Event) {
        match event {
            Event::Asked { caller, id, request } => {
                *self.handled.entry(id).or_default() += 1;
                if self.asked.get(&id).is_some_and(|to| *to != index) {
                    self.misdelivered.insert(id);
                }
                let number = if let Request::Cancel(job) = request { job.as_bytes()[0] } else { 0 };
                let peer = &mut self.peers[index];
                let words = if peer.big_outcome { "x".repeat(100_000) } else { String::new() };
                let outcome = if peer.big_outcome {
                    Outcome::Failed(Failure::new(FailureKind::Internal, words, ""))
                } else {
                    outcome(index, number)
                };
                peer.thoughts.push((self.now + peer.thinks_for, caller.instance, id, outcome));
            }
            Event::Answered { id, outcome } => assert!(self.ends.insert(id, Ok(outcome)).is_none()),
            Event::Failed { id, fault } => assert!(self.ends.insert(id, Err(fault)).is_none()),
            Event::Accepted { .. } => {}
            Event::EpochChanged(epoch) => {
                let Peer { address, slot, .. } = self.peers[index];
                for peer in self.peers.iter_mut().filter(|peer| peer.address != address) {
                    peer.exchange.member_joined(address, slot, epoch, self.now, &mut self.rng);
                }
            }
        }
    }

    /// A frame reaches the relay, which hands on its shares as it pleases.
    fn send(&mut self, index: usize, frame: Bytes) {
        self.frames += 1;
        let from = self.peers[index].slot;
        let mut packets = Vec::new();
        let at = self.now + LATENCY;
        match PeerFrame::split(&frame).expect("our own frames are well-formed") {
            PeerFrame::Message { to, tag } => {
                packets.push(Packet { at, from, to, tag, part: frame.slice(MESSAGE_HEADER_BYTES..), shared: None });
            }
            PeerFrame::Multicast(multicast) => packets.extend(multicast.parts().map(|(to, part)| {
                let share = RelayFrame::read(&multicast.share(from, part)).expect("shares are well-formed");
                let RelayFrame::MulticastShare { part, shared, .. } = share else { panic!("no share") };
                Packet { at, from, to, tag: multicast.tag, part, shared: Some(shared) }
            })),
            PeerFrame::Control(_) | PeerFrame::Datagram { .. } => panic!("not the exchange's"),
        }
        packets.into_iter().for_each(|packet| self.route(index, packet));
    }

    fn route(&mut self, sender: usize, mut packet: Packet) {
        match &mut self.relay {
            Relay::Honest => self.queue.push_back(packet),
            Relay::Dead => {}
            Relay::QueueFull { times: 0 } => self.queue.push_back(packet),
            Relay::QueueFull { times } => {
                *times -= 1;
                let refused = Refused { slot: packet.to, tag: packet.tag, reason: RefusalReason::QueueFull };
                self.peers[sender].exchange.handle_refused(refused, self.now, &mut self.rng);
            }
            Relay::SwapSources(one, other) => {
                let slots = [self.peers[*one].slot, self.peers[*other].slot];
                if let Some(index) = slots.iter().position(|slot| *slot == packet.from) {
                    packet.from = slots[1 - index];
                }
                self.queue.push_back(packet);
            }
            Relay::Hostile => self.mistreat(packet),
        }
    }

    fn mistreat(&mut self, packet: Packet) {
        self.captured.push(packet.clone());
        let slots: Vec<Slot> = self.peers.iter().map(|peer| peer.slot).collect();
        for _ in 0..self.random(3) {
            let earlier = self.random(self.captured.len());
            let is_replay = self.random(5) == 0;
            let mut packet = if is_replay { self.captured[earlier].clone() } else { packet.clone() };
            packet.at = self.now + Duration::from_millis(self.random(2500) as u64);
            let at = self.random(packet.part.len());
            match self.random(8) {
                0 => packet.to = slots[self.random(slots.len())],
                1 => packet.from = slots[self.random(slots.len())],
                2 => packet.part = packet.part.slice(..at),
                3 => {
                    let mut bytes = packet.part.to_vec();
                    bytes[at] ^= 1 << self.random(8);
                    packet.part = bytes.into();
                }
                4 => std::mem::swap(&mut packet.from, &mut packet.to),
                _ => {}
            }
            self.queue.push_back(packet);
        }
    }

    fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.step(end) {}
        self.now = end;
    }

    fn run_until_ended(&mut self, id: RequestId) {
        while !self.ends.contains_key(&id) {
            assert!(self.step(self.now + MINUTE * 60), "nothing happens any more");
        }
    }

    /// Jumps to whatever happens next, unless that is behind `end`.
    fn step(&mut self, end: Instant) -> bool {
        self.settle();
        let packets = self.queue.iter().map(|packet| packet.at);
        let thoughts = self.peers.iter().flat_map(|peer| peer.thoughts.iter().map(|(at, ..)| *at));
        let timeouts = self.peers.iter().map(|peer| peer.exchange.poll_timeout());
        let next = packets.chain(thoughts).chain(timeouts).min().expect("epochs always have a time-out");
        if next > end {
            return false;
        }
        self.now = self.now.max(next);
        for packet in self.take_due_packets() {
            self.deliver(packet);
        }
        for peer in &mut self.peers {
            for (_, caller, id, outcome) in peer.thoughts.extract_if(.., |(at, ..)| *at <= self.now).collect::<Vec<_>>()
            {
                peer.exchange.answer(caller, id, outcome, self.now);
            }
            if peer.exchange.poll_timeout() <= self.now {
                peer.exchange.handle_timeout(self.now, &mut self.rng);
            }
        }
        self.settle();
        true
    }

    fn take_due_packets(&mut self) -> Vec<Packet> {
        let (due, later) = self.queue.drain(..).partition(|packet| packet.at <= self.now);
        self.queue = later;
        due.into()
    }

    fn deliver(&mut self, packet: Packet) {
        let Some(peer) = self.peers.iter_mut().find(|peer| peer.slot == packet.to) else { return };
        match packet.shared {
            Some(shared) => {
                peer.exchange.handle_share(packet.from, &packet.part, &shared, self.now, &mut self.rng);
            }
            None => peer.exchange.handle_message(packet.from, &packet.part, self.now, &mut self.rng),
        }
        self.settle();
    }

    fn restart_host(&mut self, index: usize) {
        let old = self.peers[index].address.instance;
        let slot = Slot(self.next_slot);
        self.next_slot += 1;
        self.peers[index] = Peer::new(index, 1, slot, &mut self.rng, self.now);
        for peer in &mut self.peers {
            peer.exchange.member_left(old, self.now);
        }
        self.introduce_all();
    }

    fn restart_relay(&mut self) {
        self.queue.clear();
        for peer in &mut self.peers {
            peer.slot = Slot(self.next_slot);
            self.next_slot += 1;
            peer.exchange.uplink_lost();
        }
        self.run_for(Duration::from_secs(2));
        self.introduce_all();
    }
}

impl Peer {
    fn new(index: usize, generation: u8, slot: Slot, rng: &mut Hashes, now: Instant) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&(index as u64 + 1).to_be_bytes());
        let identity = StaticSecret::from(key);
        let mut instance = [generation; 16];
        instance[..8].copy_from_slice(&(index as u64).to_be_bytes());
        let peer = PeerId::from_bytes(PublicKey::from(&identity).to_bytes());
        let address = Address { peer, instance: InstanceId::from_bytes(instance) };
        let room = RoomId::from_bytes([3; 32]);
        let config = Config { identity, me: address, room, psk: [8; 32].into() };
        let exchange = Exchange::new(config, rng, now);
        Self { exchange, address, slot, thinks_for: Duration::ZERO, big_outcome: false, thoughts: Vec::new() }
    }
}

/// An outcome that only this host gives to this request.
fn outcome(host: usize, number: u8) -> Outcome {
    Outcome::Failed(Failure::new(FailureKind::NotFound, format!("host {host}"), format!("number {number}")))
}
