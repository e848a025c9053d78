//! The connection to the relay in virtual time: joining, silence, drains, and who is in the room across rejoins.

#![expect(clippy::disallowed_methods, reason = "virtual time begins somewhere")]

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    admission::Admission,
    id::{InstanceId, PeerId, Slot},
    limits::{JOIN_DEADLINE, REJOIN_MAX, REJOIN_MIN, UPLINK_KEEPALIVE},
    token::{RoomKeys, Token},
    uplink::{CONNECT_DEADLINE, Credentials, DEAD_AFTER, Event, LostReason, Transmit, Uplink},
    wire::{
        decode,
        relay::{ClosingReason, Member, PeerFrame, PeerToRelay, RelayToPeer, Welcome},
    },
};
use x25519_dalek::StaticSecret;

mod common;
use common::Hashes;

#[test]
fn joins_with_a_proof_that_the_relay_accepts() {
    let mut line = Line::new();
    let (admission, challenge) = Admission::new(&mut Hashes(9));
    line.connect();
    line.say(RelayToPeer::Challenge(challenge));
    let Some(Transmit::Frame(frame)) = line.uplink.poll_transmit() else { panic!("no join") };
    let Ok(PeerFrame::Control(word)) = PeerFrame::split(&frame) else { panic!("no control frame") };
    let Ok(PeerToRelay::Join(join)) = decode(word, word.len()) else { panic!("no join") };
    assert!(admission.verify(&join).is_ok());
}

#[test]
fn pauses_grow_to_their_bound_and_stay_jittered() {
    let mut line = Line::new();
    let mut longest = Duration::ZERO;
    for _ in 0..20 {
        assert_eq!(line.events(), vec![Event::Connect]);
        line.uplink.handle_disconnected(line.now, &mut line.rng);
        assert_eq!(line.events(), vec![Event::Lost(LostReason::NoConnection)]);
        let pause = line.uplink.poll_timeout() - line.now;
        assert!(pause >= REJOIN_MIN / 2 && pause <= REJOIN_MAX);
        longest = longest.max(pause);
        line.sleep();
    }
    assert!(longest > REJOIN_MAX / 2);
}

#[test]
fn the_first_pause_after_a_stable_time_in_the_room_is_short() {
    let mut line = Line::new();
    for _ in 0..10 {
        line.events();
        line.uplink.handle_disconnected(line.now, &mut line.rng);
        line.sleep();
    }
    line.join(&[]);
    for _ in 0..4 {
        line.sleep();
        line.uplink.handle_heard(line.now);
    }
    line.uplink.handle_disconnected(line.now, &mut line.rng);
    assert!(line.uplink.poll_timeout() - line.now <= REJOIN_MIN);
}

#[test]
fn a_connection_that_does_not_come_about_is_dropped() {
    let mut line = Line::new();
    line.events();
    assert_eq!(line.uplink.poll_timeout(), line.now + CONNECT_DEADLINE);
    line.sleep();
    assert_eq!(line.events(), vec![Event::Disconnect, Event::Lost(LostReason::NoConnection)]);
}

#[test]
fn a_relay_that_never_welcomes_is_left() {
    let mut line = Line::new();
    line.connect();
    assert_eq!(line.uplink.poll_timeout(), line.now + JOIN_DEADLINE);
    line.sleep();
    assert_eq!(line.events(), vec![Event::Disconnect, Event::Lost(LostReason::Silent)]);
}

#[test]
fn a_joined_peer_keeps_the_connection_alive_and_leaves_a_silent_relay() {
    let mut line = Line::new();
    line.join(&[]);
    let joined = line.now;
    line.sleep();
    assert_eq!(line.now, joined + UPLINK_KEEPALIVE);
    assert_eq!(line.uplink.poll_transmit(), Some(Transmit::Ping));
    line.sleep();
    line.sleep();
    assert_eq!(line.now, joined + DEAD_AFTER);
    assert_eq!(line.events(), vec![Event::Disconnect, Event::Lost(LostReason::Silent)]);
}

#[test]
fn a_drain_is_answered_by_coming_back_within_its_jitter() {
    let mut line = Line::new();
    line.join(&[]);
    line.say(RelayToPeer::Drain { jitter_ms: 500 });
    assert_eq!(line.events(), vec![Event::Disconnect, Event::Lost(LostReason::Drained)]);
    assert!(line.uplink.poll_timeout() <= line.now + Duration::from_millis(500));
}

#[test]
fn a_refused_proof_is_reported_and_not_tried_again_at_once() {
    let mut line = Line::new();
    line.connect();
    line.say(RelayToPeer::Closing(ClosingReason::BadProof));
    assert_eq!(line.events(), vec![Event::Disconnect, Event::Lost(LostReason::Closed(ClosingReason::BadProof))]);
    assert!(line.uplink.poll_timeout() - line.now >= REJOIN_MAX / 4);
}

#[test]
fn who_stayed_across_a_rejoin_is_not_reported_as_gone() {
    let mut line = Line::new();
    line.join(&[member(1, 1), member(2, 2)]);
    line.uplink.handle_disconnected(line.now, &mut line.rng);
    line.events();
    line.sleep();
    let events = line.join(&[member(7, 1), member(8, 3)]);
    assert!(events.contains(&Event::MemberMoved(member(7, 1))));
    assert!(events.contains(&Event::MemberJoined(member(8, 3))));
    assert!(events.contains(&Event::MemberLeft(member(2, 2))));
    assert!(!events.iter().any(|event| matches!(event, Event::MemberLeft(left) if left.instance == instance(1))));
    assert_eq!(line.uplink.instance(Slot(7)), Some(instance(1)));
    assert_eq!(line.uplink.instance(Slot(1)), None);
}

#[test]
fn an_instance_back_before_its_old_connection_was_reaped_stays_in_the_room() {
    let mut line = Line::new();
    line.join(&[member(1, 1)]);
    line.say(RelayToPeer::Joined(member(5, 1)));
    assert_eq!(line.events(), vec![Event::MemberMoved(member(5, 1))]);
    line.say(RelayToPeer::Left(Slot(1)));
    assert_eq!(line.events(), vec![]);
    assert_eq!(line.uplink.instance(Slot(5)), Some(instance(1)));
    line.say(RelayToPeer::Left(Slot(5)));
    assert_eq!(line.events(), vec![Event::MemberLeft(member(5, 1))]);
}

#[test]
fn a_changed_presence_is_reported_once() {
    let mut line = Line::new();
    line.join(&[member(1, 1)]);
    for _ in 0..2 {
        line.say(RelayToPeer::Presence { slot: Slot(1), sealed: vec![42] });
    }
    let changed = Member { presence: vec![42], ..member(1, 1) };
    assert_eq!(line.events(), vec![Event::PresenceChanged(changed)]);
    line.say(RelayToPeer::Presence { slot: Slot(99), sealed: vec![42] });
    assert_eq!(line.events(), vec![]);
}

#[test]
fn a_relay_that_speaks_out_of_turn_is_left() {
    let mut line = Line::new();
    line.connect();
    line.say(RelayToPeer::Joined(member(1, 1)));
    assert_eq!(line.events(), vec![Event::Disconnect, Event::Lost(LostReason::Misbehaved)]);
}

/// One uplink and its clock.
struct Line {
    uplink: Uplink,
    now: Instant,
    rng: Hashes,
}

impl Line {
    /// An uplink that is about to connect.
    fn new() -> Self {
        let keys = Arc::new(RoomKeys::derive(&Token::generate(&mut Hashes(1)), "dev"));
        let credentials = Credentials { keys, identity: StaticSecret::from([7; 32]), instance: instance(200) };
        let now = Instant::now();
        let mut line = Self { uplink: Uplink::new(credentials, vec![1], now), now, rng: Hashes(3) };
        line.uplink.handle_timeout(now, &mut line.rng);
        line
    }

    fn connect(&mut self) {
        assert!(self.events().contains(&Event::Connect));
        self.uplink.handle_connected(self.now);
    }

    fn join(&mut self, members: &[Member]) -> Vec<Event> {
        self.connect();
        let (_, challenge) = Admission::new(&mut self.rng);
        self.say(RelayToPeer::Challenge(challenge));
        assert!(matches!(self.uplink.poll_transmit(), Some(Transmit::Frame(_))));
        let observed = SocketAddr::from(([127, 0, 0, 1], 9));
        let welcome = Welcome { slot: Slot(100), observed, idle_timeout_ms: 90_000, stun: true };
        self.say(RelayToPeer::Welcome(welcome));
        for member in members {
            self.say(RelayToPeer::Roster { members: vec![member.clone()], last: false });
        }
        self.say(RelayToPeer::Roster { members: vec![], last: true });
        assert!(self.uplink.is_joined());
        self.events()
    }

    fn say(&mut self, word: RelayToPeer) {
        self.uplink.handle_control(word, self.now, &mut self.rng);
    }

    /// Jumps to the next time-out.
    fn sleep(&mut self) {
        self.now = self.uplink.poll_timeout();
        self.uplink.handle_timeout(self.now, &mut self.rng);
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.uplink.poll_event()).collect()
    }
}

fn instance(number: u8) -> InstanceId {
    InstanceId::from_bytes([number; 16])
}

fn member(slot: u32, number: u8) -> Member {
    Member {
        slot: Slot(slot),
        peer: PeerId::from_bytes([number; 32]),
        instance: instance(number),
        presence: vec![number],
    }
}
