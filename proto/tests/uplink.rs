//! The connection to the relay in virtual time: joining, silence, drains, and who is in the room across rejoins.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    admission::Admission,
    id::{InstanceId, PeerId, Slot},
    limits::{IDLE_TIMEOUT, JOIN_DEADLINE, MAX_PRESENCE_BYTES, REJOIN_MAX, REJOIN_MIN, UPLINK_KEEPALIVE},
    token::{RoomKeys, Token},
    uplink::{
        CONNECT_DEADLINE, Credentials, DEAD_AFTER, Event, LostReason, MAX_MEMBERS, MOVED_PATIENCE, Transmit, Uplink,
    },
    wire::{
        decode,
        relay::{ClosingReason, Member, PeerFrame, PeerToRelay, RelayToPeer, Welcome, control},
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
    assert!(line.uplink.poll_timeout() - line.now >= REJOIN_MAX / 2);
}

#[test]
fn no_relay_can_keep_an_instance_away_or_make_it_hurry() {
    let mut line = Line::new();
    line.join(&[]);
    line.say(RelayToPeer::Drain { jitter_ms: u32::MAX });
    assert!(line.uplink.poll_timeout() <= line.now + REJOIN_MAX);
    let mut longest = Duration::ZERO;
    for _ in 0..12 {
        line.events();
        line.sleep();
        line.join(&[]);
        line.say(RelayToPeer::Drain { jitter_ms: 0 });
        longest = line.uplink.poll_timeout() - line.now;
    }
    assert!(longest >= REJOIN_MAX / 2);
}

#[test]
fn pings_come_in_time_for_a_relay_that_reaps_sooner() {
    for (idle_timeout, keepalive) in [
        (IDLE_TIMEOUT, UPLINK_KEEPALIVE),
        (Duration::from_secs(15), Duration::from_secs(5)),
        (Duration::ZERO, Duration::from_secs(1)),
    ] {
        let mut line = Line::new();
        line.connect();
        line.answer();
        line.say(RelayToPeer::Welcome(welcome(idle_timeout)));
        assert_eq!(line.uplink.poll_timeout(), line.now + keepalive);
        line.sleep();
        assert_eq!(line.uplink.poll_transmit(), Some(Transmit::Ping));
        assert_eq!(line.uplink.poll_timeout(), line.now + keepalive);
    }
}

#[test]
fn a_presence_that_changed_while_joining_is_told_after_the_welcome() {
    let mut line = Line::new();
    line.connect();
    line.answer();
    line.uplink.set_presence(vec![2]);
    assert_eq!(line.uplink.poll_transmit(), None);
    line.say(RelayToPeer::Welcome(welcome(IDLE_TIMEOUT)));
    let told = Transmit::Frame(control(&PeerToRelay::Presence(vec![2])));
    assert_eq!(line.uplink.poll_transmit(), Some(told));
    assert_eq!(line.uplink.poll_transmit(), None);
}

#[test]
fn a_presence_that_changed_while_away_is_told_by_joining_alone() {
    let mut line = Line::new();
    line.join(&[]);
    line.uplink.set_presence(vec![2]);
    assert!(line.uplink.poll_transmit().is_some());
    line.lose();
    line.uplink.set_presence(vec![3]);
    line.join(&[]);
    assert_eq!(line.uplink.poll_transmit(), None);
}

#[test]
fn after_a_relay_restart_a_member_of_the_same_slot_is_reported_as_reachable_again() {
    let mut line = Line::new();
    line.join(&[member(1, 1)]);
    line.lose();
    assert_eq!(line.uplink.instance(Slot(1)), None);
    assert_eq!(line.uplink.identity(instance(1)), Some(member(1, 1).peer));
    assert!(line.join(&[member(1, 1)]).contains(&Event::MemberMoved(member(1, 1))));
}

#[test]
fn a_member_is_remembered_across_a_rejoin_that_broke_before_the_roster_was_complete() {
    let mut line = Line::new();
    line.join(&[member(1, 1), member(2, 2)]);
    line.lose();
    line.connect();
    line.answer();
    line.say(RelayToPeer::Welcome(welcome(IDLE_TIMEOUT)));
    line.say(RelayToPeer::Roster { members: vec![member(5, 1)], last: false });
    line.events();
    line.lose();
    let events = line.join(&[member(8, 1), member(9, 2)]);
    assert_eq!(
        events[1..],
        [Event::MemberMoved(member(8, 1)), Event::MemberMoved(member(9, 2)), Event::RosterComplete]
    );
}

#[test]
fn a_member_under_the_instance_id_of_another_does_not_take_its_place() {
    let impostor = Member { peer: PeerId::from_bytes([99; 32]), ..member(6, 1) };
    let mut line = Line::new();
    line.join(&[member(1, 1)]);
    line.say(RelayToPeer::Joined(impostor.clone()));
    line.say(RelayToPeer::Presence { slot: impostor.slot, sealed: vec![66] });
    assert_eq!(line.events(), vec![]);
    assert_eq!(line.uplink.instance(impostor.slot), None);
    assert_eq!(line.uplink.identity(instance(1)), Some(member(1, 1).peer));
    line.lose();
    let events = line.join(&[impostor.clone(), member(7, 1)]);
    assert_eq!(events[1..], [Event::MemberMoved(member(7, 1)), Event::RosterComplete]);
    line.say(RelayToPeer::Left(Slot(7)));
    assert_eq!(line.events(), vec![Event::MemberLeft(member(7, 1)), Event::MemberJoined(impostor)]);
}

#[test]
fn of_two_connections_of_an_instance_either_may_end_first() {
    for (ends_first, stays) in [(1, 5), (5, 1)] {
        let mut line = Line::new();
        line.join(&[member(1, 1), member(5, 1)]);
        line.say(RelayToPeer::Left(Slot(ends_first)));
        assert!(!line.events().iter().any(|event| matches!(event, Event::MemberLeft(_))));
        assert_eq!(line.uplink.members().collect::<Vec<_>>(), vec![&member(stays, 1)]);
    }
}

#[test]
fn members_and_their_presence_are_bounded() {
    let mut line = Line::new();
    line.join(&[]);
    for slot in 0..MAX_MEMBERS + 100 {
        let slot = u32::try_from(slot).unwrap();
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&slot.to_be_bytes());
        line.say(RelayToPeer::Joined(Member { instance: InstanceId::from_bytes(bytes), ..member(slot, 0) }));
    }
    assert_eq!(line.uplink.members().count(), MAX_MEMBERS);
    assert_eq!(line.events().len(), MAX_MEMBERS);
    line.say(RelayToPeer::Joined(Member { presence: vec![0; MAX_PRESENCE_BYTES + 1], ..member(0, 1) }));
    assert_eq!(line.events(), vec![Event::Disconnect, Event::Lost(LostReason::Misbehaved)]);
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
    let (_, challenge) = Admission::new(&mut Hashes(9));
    let before_the_join = [RelayToPeer::Joined(member(1, 1)), RelayToPeer::Welcome(welcome(IDLE_TIMEOUT))];
    let before_the_welcome = [RelayToPeer::Challenge(challenge), RelayToPeer::Left(Slot(1))];
    let in_the_room = [
        RelayToPeer::Challenge(challenge),
        RelayToPeer::Welcome(welcome(IDLE_TIMEOUT)),
        RelayToPeer::Roster { members: vec![member(1, 1)], last: true },
    ];
    let steps: [fn(&mut Line); 3] = [
        |line| line.connect(),
        |line| {
            line.connect();
            line.answer();
        },
        |line| drop(line.join(&[])),
    ];
    for (step, words) in steps.into_iter().zip([&before_the_join[..], &before_the_welcome, &in_the_room]) {
        for word in words {
            let mut line = Line::new();
            step(&mut line);
            line.say(word.clone());
            assert_eq!(line.events(), vec![Event::Disconnect, Event::Lost(LostReason::Misbehaved)], "{word:?}");
        }
    }
}

#[test]
fn nothing_is_sent_of_a_connection_that_is_over() {
    let mut line = Line::new();
    line.join(&[]);
    line.uplink.set_presence(vec![2]);
    line.uplink.handle_disconnected(line.now, &mut line.rng);
    assert_eq!(line.uplink.poll_transmit(), None);
    line.say(RelayToPeer::Joined(member(1, 1)));
    assert_eq!(line.events(), vec![Event::Lost(LostReason::Broken)]);
}

#[test]
fn a_connection_from_an_address_that_is_gone_is_made_anew_at_once() {
    let mut line = Line::new();
    line.join(&[]);
    line.moved(true);
    assert_eq!(line.events(), vec![Event::Disconnect, Event::Lost(LostReason::Broken)]);
    assert_eq!(line.uplink.poll_timeout(), line.now);
    line.sleep();
    assert_eq!(line.events(), vec![Event::Connect]);
}

#[test]
fn a_connection_that_may_have_outlived_a_move_is_asked_and_lives_on_if_it_answers() {
    let mut line = Line::new();
    line.join(&[]);
    line.moved(false);
    line.sleep();
    assert_eq!(line.uplink.poll_transmit(), Some(Transmit::Ping));
    line.uplink.handle_heard(line.now + MOVED_PATIENCE / 2);
    line.now += MOVED_PATIENCE;
    line.uplink.handle_timeout(line.now, &mut line.rng);
    assert!(line.uplink.is_joined());
    assert_eq!(line.events(), vec![]);
}

#[test]
fn a_connection_that_is_silent_after_a_move_is_made_anew_at_once() {
    let mut line = Line::new();
    line.join(&[]);
    let moved = line.now;
    line.moved(false);
    line.sleep();
    line.sleep();
    assert_eq!(line.now, moved + MOVED_PATIENCE);
    assert_eq!(line.events(), vec![Event::Disconnect, Event::Lost(LostReason::Silent)]);
    assert_eq!(line.uplink.poll_timeout(), line.now);
}

#[test]
fn who_waited_long_for_a_relay_tries_at_once_from_another_place() {
    let mut line = Line::new();
    for _ in 0..10 {
        line.events();
        line.uplink.handle_disconnected(line.now, &mut line.rng);
        line.sleep();
    }
    line.uplink.handle_disconnected(line.now, &mut line.rng);
    line.events();
    assert!(line.uplink.poll_timeout() > line.now + REJOIN_MIN);
    line.moved(false);
    line.sleep();
    assert_eq!(line.events(), vec![Event::Connect]);
}

#[test]
fn addresses_that_come_and_go_all_the_time_do_not_flood_the_relay() {
    let mut line = Line::new();
    let began = line.now;
    for _ in 0..10 {
        line.join(&[]);
        line.moved(true);
        line.events();
        line.sleep();
    }
    assert!(line.now - began > REJOIN_MIN * 8, "{:?}", line.now - began);
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
        #[expect(clippy::disallowed_methods, reason = "virtual time has to begin somewhere")]
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
        self.answer();
        self.say(RelayToPeer::Welcome(welcome(IDLE_TIMEOUT)));
        for member in members {
            self.say(RelayToPeer::Roster { members: vec![member.clone()], last: false });
        }
        self.say(RelayToPeer::Roster { members: vec![], last: true });
        assert!(self.uplink.is_joined());
        self.events()
    }

    /// Answers a challenge, and so waits for the welcome.
    fn answer(&mut self) {
        let (_, challenge) = Admission::new(&mut self.rng);
        self.say(RelayToPeer::Challenge(challenge));
        assert!(matches!(self.uplink.poll_transmit(), Some(Transmit::Frame(_))));
    }

    /// Loses the connection and waits until the next one is wanted.
    fn lose(&mut self) {
        self.uplink.handle_disconnected(self.now, &mut self.rng);
        assert_eq!(self.events(), vec![Event::Lost(LostReason::Broken)]);
        self.sleep();
    }

    fn say(&mut self, word: RelayToPeer) {
        self.uplink.handle_control(word, self.now, &mut self.rng);
    }

    fn moved(&mut self, is_cut: bool) {
        self.uplink.handle_moved(is_cut, self.now, &mut self.rng);
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

fn welcome(idle_timeout: Duration) -> Welcome {
    let observed = SocketAddr::from(([127, 0, 0, 1], 9));
    let idle_timeout_ms = u32::try_from(idle_timeout.as_millis()).expect("a short time");
    Welcome { slot: Slot(100), observed, idle_timeout_ms, stun: Some(9), stun_alternate: None }
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
