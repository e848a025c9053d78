//! Asking through a relay that drops, repeats, reorders, redirects, holds back and changes what it likes: nothing happens
//! twice, on the wrong host or with a wrong outcome, and all is well again as soon as the relay is.

use std::time::Duration;

use peerfleet_proto::{
    exchange::{ACCEPT_AFTER, Address, AskFault, Config, Exchange, MAX_CALLER_BYTES, MAX_IN_PROGRESS},
    id::{InstanceId, RoomId, Slot},
    limits::{ASK_CONNECT_DEADLINE, ASK_LOST_AFTER, ASK_RETRY_FIRST, ASK_RETRY_MAX, MAX_MESSAGE_BYTES, OUTCOME_MEMORY},
    request::{
        Outcome, Request,
        exec::{Command, ExecSpec, Follow},
    },
    sealed::{SOFT_AGE, Sealed},
    wire::relay::{PeerFrame, RefusalReason, Refused},
};
use proptest::prelude::*;

use super::net::{Fate, LATENCY, LONG, Net, Packet, peer_id, scripted, secret};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

// What a relay that misbehaves cannot bring about.

/// What happens in one step of a random story.
#[derive(Debug, Clone)]
enum Act {
    Ask(usize, usize),
    AskAll(usize),
    Wait(u16),
    RestartRelay,
    RestartPeer(usize),
    LeaveAndReturn(usize, u16),
    Sleep(usize, u64),
    Release,
}

fn act(peers: usize) -> impl Strategy<Value = Act> {
    prop_oneof![
        6 => (0..peers, 1..peers).prop_map(move |(from, by)| Act::Ask(from, (from + by) % peers)),
        2 => (0..peers).prop_map(Act::AskAll),
        6 => (0_u16..5_000).prop_map(Act::Wait),
        1 => Just(Act::Wait(60_000)),
        1 => Just(Act::RestartRelay),
        1 => (0..peers).prop_map(Act::RestartPeer),
        1 => (0..peers, 0_u16..60_000).prop_map(|(peer, time)| Act::LeaveAndReturn(peer, time)),
        1 => (0..peers, 1_u64..6).prop_map(|(peer, hours)| Act::Sleep(peer, hours)),
        1 => Just(Act::Release),
    ]
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        8 => Just(Fate::Deliver),
        3 => Just(Fate::Drop),
        3 => (2_u8..5).prop_map(Fate::Repeat),
        3 => (0_u16..15_000).prop_map(Fate::Delay),
        2 => Just(Fate::Hold),
        2 => Just(Fate::Copy),
        2 => (1_u8..4).prop_map(Fate::Redirect),
        2 => (1_u8..4).prop_map(Fate::Misattribute),
        2 => any::<u16>().prop_map(Fate::Truncate),
        2 => any::<u16>().prop_map(Fate::Flip),
        1 => Just(Fate::Swap),
        1 => Just(Fate::Recast),
        1 => Just(Fate::Refuse(RefusalReason::QueueFull)),
        1 => Just(Fate::Refuse(RefusalReason::Gone)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_relay_causes_delays_and_failures_only(
        acts in prop::collection::vec(act(4), 1..40),
        fates in prop::collection::vec(fate(), 1..60),
        works_for in prop::collection::vec(0_u64..20_000, 4),
    ) {
        let mut net = Net::new(4);
        for (peer, works_for) in net.peers.iter_mut().zip(works_for) {
            peer.works_for = Duration::from_millis(works_for);
        }
        net.relay = scripted(fates);
        acts.into_iter().for_each(|act| perform(&mut net, act));
        net.assert_sound();

        net.relay = Box::new(|_| Fate::Deliver);
        net.release();
        net.run_for(Duration::from_secs(120));
        net.assert_sound();
        net.assert_all_ended();
        assert_everybody_reaches_everybody(&mut net);

        // Whatever was recorded comes again, much later.
        for later in [OUTCOME_MEMORY * 2, HOUR * 5] {
            net.run_for(later);
            let recorded = net.recorded();
            recorded.into_iter().for_each(|packet| net.put(packet, LATENCY));
            net.run_for(Duration::from_secs(60));
            net.assert_sound();
        }
        assert_everybody_reaches_everybody(&mut net);
    }
}

fn perform(net: &mut Net, act: Act) {
    match act {
        Act::Ask(from, to) => _ = net.ask(from, to),
        Act::AskAll(from) => {
            let others: Vec<_> = (0..net.peers.len()).filter(|to| *to != from).collect();
            net.ask_many(from, &others);
        }
        Act::Wait(milliseconds) => net.run_for(Duration::from_millis(milliseconds.into())),
        Act::RestartRelay => net.restart_relay(SECOND),
        Act::RestartPeer(index) => net.restart_peer(index),
        Act::LeaveAndReturn(index, milliseconds) => {
            net.leave(index);
            net.run_for(Duration::from_millis(milliseconds.into()));
            net.come_back(index);
        }
        Act::Sleep(index, hours) => net.sleep(index, HOUR * hours as u32),
        Act::Release => net.release(),
    }
}

fn assert_everybody_reaches_everybody(net: &mut Net) {
    net.run_for(Duration::from_secs(60));
    let count = net.peers.len();
    let pairs = (0..count).flat_map(|from| (1..count).map(move |by| (from, (from + by) % count)));
    let asked: Vec<_> = pairs.map(|(from, to)| net.ask(from, to)).collect();
    net.run_for(Duration::from_secs(60));
    assert!(asked.into_iter().all(|id| net.is_ok(id)), "a session was spoilt for good");
    net.assert_sound();
}

#[test]
fn a_repeat_held_back_for_hours_does_not_run_again() {
    for held_for in [OUTCOME_MEMORY * 2, HOUR * 3, HOUR * 30] {
        let mut net = Net::new(2);
        let warm = net.ask(0, 1);
        net.run_until_ended(warm);
        // The answer and the word that it was accepted are lost, so the ask is repeated; the repeat is held back.
        let mut repeats = 0;
        net.relay = Box::new(move |packet: &Packet| {
            repeats += u32::from(packet.from == 0);
            match (packet.from, repeats) {
                (0, 1) => Fate::Deliver,
                (0, 2) => Fate::Hold,
                (0, _) => Fate::Deliver,
                (_, 1 | 2) => Fate::Drop,
                (_, _) => Fate::Deliver,
            }
        });
        let id = net.ask(0, 1);
        net.run_until_ended(id);
        assert!(net.is_ok(id) && net.held() == 1);
        net.run_for(held_for);
        net.release();
        net.assert_sound();
    }
}

#[test]
fn a_first_message_held_back_for_hours_does_not_run_again() {
    for held_for in [OUTCOME_MEMORY * 2, HOUR * 3] {
        let mut net = Net::new(2);
        let mut firsts = 0;
        net.relay = Box::new(move |packet: &Packet| {
            firsts += u32::from(packet.from == 0);
            if firsts == 1 { Fate::Hold } else { Fate::Deliver }
        });
        let id = net.ask(0, 1);
        net.run_until_ended(id);
        assert!(net.is_ok(id) && net.held() == 1);
        net.run_for(held_for);
        net.release();
        net.assert_sound();
    }
}

#[test]
fn a_first_message_held_back_while_its_sender_was_forgotten_does_not_run_again() {
    let mut net = Net::new(2);
    let mut firsts = 0;
    net.relay = Box::new(move |packet: &Packet| {
        firsts += u32::from(packet.from == 0);
        if firsts == 1 { Fate::Hold } else { Fate::Deliver }
    });
    let id = net.ask(0, 1);
    net.run_until_ended(id);
    net.leave(0);
    net.run_for(ASK_LOST_AFTER + OUTCOME_MEMORY + SECOND);
    net.come_back(0);
    net.release();
    net.assert_sound();
    let again = net.ask(0, 1);
    net.run_until_ended(again);
    assert!(net.is_ok(again), "who comes back is served");
}

#[test]
fn what_a_sleeping_asker_repeats_long_after_does_not_run_again() {
    let mut net = Net::new(2);
    net.relay = Box::new(|packet| if packet.from == 1 { Fate::Drop } else { Fate::Deliver });
    let id = net.ask(0, 1);
    net.run_for(LATENCY * 2);
    assert_eq!(net.handled.len(), 1);
    net.relay = Box::new(|_| Fate::Deliver);
    // To the asker this is a moment; the host forgets the asker, and makes new epochs.
    net.sleep(0, HOUR * 6);
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Err(AskFault::Lost), "the host cannot know whether it ran");
    net.assert_sound();
    let next = net.ask(0, 1);
    net.run_until_ended(next);
    assert!(net.is_ok(next));
}

#[test]
fn a_recorded_first_message_is_refused_and_not_even_answered() {
    let mut net = Net::new(2);
    net.relay = Box::new(|packet| if packet.from == 0 { Fate::Copy } else { Fate::Deliver });
    let id = net.ask(0, 1);
    net.run_until_ended(id);
    let before = net.sent.len();
    net.release();
    net.run_for(SECOND);
    assert_eq!(net.sent.len(), before);
    net.assert_sound();
}

#[test]
fn no_change_to_any_message_does_more_than_delay() {
    // First message, answer to it, ask and answer in the session: every kind that there is.
    for victim in 0..4 {
        let mut seen = 0;
        let mut bit = 0;
        for _ in 0..24 {
            let mut net = Net::new(2);
            net.relay = Box::new(move |_| {
                seen += 1;
                if seen == victim + 1 { Fate::Flip(bit) } else { Fate::Deliver }
            });
            let first = net.ask(0, 1);
            net.run_until_ended(first);
            let second = net.ask(0, 1);
            net.run_until_ended(second);
            assert!(net.is_ok(first) && net.is_ok(second), "message {victim} with bit {bit} flipped");
            net.assert_sound();
            bit += 7;
            seen = 0;
        }
    }
}

#[test]
fn an_answer_that_points_elsewhere_opens_no_session() {
    let mut net = Net::new(2);
    // The index by which the responder wants to be addressed stands in the clear, behind the initiator's.
    net.relay = Box::new(|packet| match Sealed::split(&packet.sealed) {
        Ok(Sealed::Response { .. }) => Fate::Flip(8 * 8),
        _ => Fate::Deliver,
    });
    net.ask(0, 1);
    net.run_for(LATENCY * 5);
    net.relay = Box::new(|_| Fate::Deliver);
    let asked: Vec<_> = (0..5).map(|_| net.ask(0, 1)).collect();
    net.run_for(ASK_RETRY_FIRST + LATENCY * 5);
    assert!(asked.into_iter().all(|id| net.is_ok(id)), "the next try opens the session that all wait for");
}

#[test]
fn a_stranger_under_anothers_instance_id_is_neither_asked_nor_heard() {
    let mut net = Net::new(3);
    let victim = net.peers[1].address;
    let thief = Address { peer: peer_id(2), instance: victim.instance };
    let config = Config { identity: secret(2), me: thief, room: RoomId::from_bytes([5; 32]), psk: [6; 32].into() };
    let mut stolen = Exchange::new(config, &mut net.rng, net.now);
    let (now, epoch) = (net.now, stolen.epoch());
    net.peers[0].exchange.member_joined(thief, Slot(9), epoch, now, &mut net.rng);
    let asked = net.ask(0, 1);
    let frames = net.sent.iter().map(|(_, frame)| PeerFrame::split(frame).expect("it reads"));
    assert!(frames.into_iter().all(|frame| !matches!(frame, PeerFrame::Message { to: Slot(9), .. })));
    net.run_until_ended(asked);
    assert!(net.is_ok(asked));
    let asker = &net.peers[0];
    stolen.member_joined(asker.address, asker.slot, asker.epoch, now, &mut net.rng);
    stolen.ask(asker.address.instance, Request::Ping, LONG, now, &mut net.rng);
    let frame = stolen.poll_transmit().expect("a first message");
    net.peers[0].exchange.handle_message(Slot(9), &frame[9..], now, &mut net.rng);
    let victims_slot = net.peers[1].slot;
    net.peers[0].exchange.handle_message(victims_slot, &frame[9..], now, &mut net.rng);
    assert_eq!(net.peers[0].exchange.poll_event(), None);
}

// What an honest relay brings about.

#[test]
fn two_hundred_are_asked_with_one_upload_of_what_they_share() {
    let mut net = Net::new(201);
    let everybody: Vec<_> = (1..201).collect();
    for _ in ["without sessions", "with sessions"] {
        net.sent.clear();
        let asked = net.ask_many(0, &everybody);
        assert_eq!(net.sent.len(), 1, "one frame");
        assert!(
            matches!(PeerFrame::split(&net.sent[0].1), Ok(PeerFrame::Multicast(multicast)) if multicast.len() == 200)
        );
        net.run_for(LATENCY * 10);
        assert!(asked.into_iter().all(|id| net.is_ok(id)));
    }
    assert_eq!(net.sent.len(), 1 + 200, "in a session each answers with one frame");
    net.assert_sound();
}

#[test]
fn a_large_request_to_many_keeps_to_the_largest_frame() {
    let mut net = Net::new(201);
    let argument = vec![7; MAX_MESSAGE_BYTES - 100];
    let spec = ExecSpec {
        command: Command::Argv(vec![argument]),
        cwd: None,
        env: Vec::new(),
        timeout: None,
        stdin: false,
        follow: Follow::Collected,
    };
    let to: Vec<_> = net.peers[1..].iter().map(|peer| peer.address.instance).collect();
    let exchange = &mut net.peers[0].exchange;
    exchange.ask_many(&to, Request::Exec(spec), LONG, net.now, &mut net.rng);
    let mut recipients = 0;
    while let Some(frame) = exchange.poll_transmit() {
        let Ok(PeerFrame::Multicast(multicast)) = PeerFrame::split(&frame) else { panic!("a multicast within bounds") };
        recipients += multicast.len();
    }
    assert_eq!(recipients, 200);
}

#[test]
fn two_that_ask_each_other_at_once_are_both_answered() {
    let mut net = Net::new(2);
    let (one, other) = (net.ask(0, 1), net.ask(1, 0));
    net.run_for(LATENCY * 5);
    assert!(net.is_ok(one) && net.is_ok(other));
}

#[test]
fn an_ask_survives_a_relay_that_restarts_under_it() {
    for works_for in [Duration::ZERO, SECOND * 5] {
        let mut net = Net::new(2);
        net.peers[1].works_for = works_for;
        let id = net.ask(0, 1);
        net.run_for(LATENCY * 3 / 2);
        net.restart_relay(SECOND * 2);
        net.run_for(SECOND * 5);
        assert!(net.is_ok(id));
        net.assert_sound();
    }
}

#[test]
fn an_outcome_waits_for_a_caller_whose_connection_was_long_lost() {
    let mut net = Net::new(2);
    net.peers[1].works_for = SECOND * 20;
    let id = net.ask(0, 1);
    net.run_for(SECOND);
    net.leave(0);
    net.run_for(OUTCOME_MEMORY / 2);
    assert!(!net.ends.contains_key(&id), "nothing fails because one's own connection is lost");
    net.come_back(0);
    net.run_for(SECOND);
    assert!(net.is_ok(id));
    net.assert_sound();
}

#[test]
fn a_new_process_never_gets_what_the_old_one_was_asked() {
    for (works_for, fate) in [(HOUR, Fate::Deliver), (Duration::ZERO, Fate::Drop)] {
        let mut net = Net::new(2);
        net.peers[1].works_for = works_for;
        net.relay = Box::new(move |_| fate);
        let start = net.now;
        let id = net.ask(0, 1);
        net.run_for(SECOND);
        net.restart_peer(1);
        net.relay = Box::new(|_| Fate::Deliver);
        net.run_until_ended(id);
        assert_eq!(net.ends[&id], Err(AskFault::Lost));
        assert!(net.now - start <= ASK_CONNECT_DEADLINE.max(ASK_LOST_AFTER + SECOND));
        let new = net.peers[1].address.instance;
        assert!(net.handled.values().flatten().all(|(host, _)| *host != new));
    }
}

#[test]
fn what_a_host_took_is_lost_however_soon_it_ended() {
    // It is killed while the ask is on its way, as it comes, before it says that it took it, and while that is on its way.
    let moments = [LATENCY / 2, LATENCY, LATENCY + ACCEPT_AFTER / 2, LATENCY * 3 / 2 + ACCEPT_AFTER];
    for (is_warm, moment) in [false, true].into_iter().flat_map(|is_warm| moments.map(|moment| (is_warm, moment))) {
        let mut net = Net::new(2);
        if is_warm {
            let warm = net.ask(0, 1);
            net.run_until_ended(warm);
        }
        net.peers[1].works_for = HOUR;
        let id = net.ask(0, 1);
        net.run_for(moment);
        net.restart_peer(1);
        net.run_until_ended(id);
        assert_eq!(net.handled.contains_key(&id), moment > LATENCY / 2, "{moment:?}");
        assert_eq!(net.ends[&id], Err(AskFault::Lost), "{moment:?}, warm: {is_warm}");
    }
}

#[test]
fn what_was_sent_counts_as_lost_although_the_relay_says_that_nobody_got_it() {
    let mut net = Net::new(2);
    net.peers[1].works_for = HOUR;
    // The relay hands on every ask, and lies about it.
    net.relay = Box::new(|packet| if packet.from == 0 { Fate::Copy } else { Fate::Drop });
    let id = net.ask(0, 1);
    let slot = net.peers[1].slot;
    for tag in 0..50 {
        let gone = Refused { slot, tag, reason: RefusalReason::Gone };
        net.peers[0].exchange.handle_refused(gone, net.now, &mut net.rng);
    }
    net.run_until_ended(id);
    assert!(net.handled.contains_key(&id));
    assert_eq!(net.ends[&id], Err(AskFault::Lost));
}

#[test]
fn what_is_carried_out_after_its_asker_gave_up_was_not_called_unreachable() {
    let mut net = Net::new(2);
    net.relay = Box::new(|_| Fate::Hold);
    let id = net.ask(0, 1);
    net.run_until_ended(id);
    net.relay = Box::new(|_| Fate::Deliver);
    net.release();
    assert!(net.handled.contains_key(&id), "a host that stood still for a while does what it finds");
    net.assert_sound();
}

#[test]
fn what_never_left_was_not_carried_out_and_is_called_unreachable() {
    let mut net = Net::new(2);
    net.leave(1);
    let id = net.ask(0, 1);
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Err(AskFault::Unreachable));
    net.come_back(1);
    net.run_for(SECOND * 60);
    assert!(net.handled.is_empty() && net.sent.is_empty());
}

#[test]
fn whom_a_full_queue_turned_away_comes_back_at_once() {
    let full_once = |sender: usize| {
        let mut count = 0;
        move |packet: &Packet| {
            count += u32::from(packet.from == sender);
            if count == 1 && packet.from == sender { Fate::Refuse(RefusalReason::QueueFull) } else { Fate::Deliver }
        }
    };
    // The first message; an ask in a session; its answer.
    for (is_warm, sender) in [(false, 0), (true, 0), (true, 1)] {
        let mut net = Net::new(2);
        if is_warm {
            let warm = net.ask(0, 1);
            net.run_until_ended(warm);
        }
        net.relay = Box::new(full_once(sender));
        let start = net.now;
        let id = net.ask(0, 1);
        net.run_until_ended(id);
        assert!(net.is_ok(id));
        let took = net.now - start;
        assert!(took >= Duration::from_millis(100) && took < Duration::from_millis(600), "{took:?}");
    }
}

#[test]
fn a_session_is_replaced_by_age_and_the_old_one_still_brings_its_answers() {
    let mut net = Net::new(2);
    net.peers[1].works_for = SOFT_AGE + SECOND * 5;
    let slow = net.ask(0, 1);
    net.run_for(SOFT_AGE - SECOND);
    net.peers[1].works_for = Duration::ZERO;
    net.sent.clear();
    net.run_for(SECOND * 3);
    let quick = net.ask(0, 1);
    net.run_for(SECOND);
    let first_messages = net.sent.iter().filter(|(_, frame)| frame[9] == 1).count();
    assert_eq!(first_messages, 1, "one session takes the place of one");
    net.run_for(SECOND * 30);
    assert!(net.is_ok(quick) && net.is_ok(slow));
}

#[test]
fn a_session_that_has_died_is_replaced_although_something_came_by_it_just_before() {
    let mut net = Net::new(2);
    net.peers[1].works_for = SECOND * 25;
    let slow = net.ask(0, 1);
    // The first question how it stands goes out while the answer to another ask is on its way.
    let accepted_at = ACCEPT_AFTER + LATENCY * 2;
    net.run_for(accepted_at + ASK_RETRY_MAX - LATENCY - LATENCY / 2);
    net.peers[1].works_for = Duration::ZERO;
    let quick = net.ask(0, 1);
    net.run_until_ended(quick);
    let mut is_replaced = false;
    net.relay = Box::new(move |packet| {
        is_replaced |= packet.sealed[0] == 1;
        if packet.sealed[0] == 3 && !is_replaced { Fate::Drop } else { Fate::Deliver }
    });
    net.run_for(SECOND * 60);
    assert!(net.is_ok(quick) && net.is_ok(slow));
}

#[test]
fn a_session_can_be_begun_under_the_current_and_the_previous_epoch_alone() {
    let mut net = Net::new(3);
    net.tells_epochs = false;
    let first = net.peers[1].epoch;
    while net.peers[1].epoch == first {
        net.run_for(HOUR / 12);
    }
    let id = net.ask(0, 1);
    net.run_until_ended(id);
    assert!(net.is_ok(id), "the previous epoch");
    let second = net.peers[1].epoch;
    while net.peers[1].epoch == second {
        net.run_for(HOUR / 12);
    }
    let id = net.ask(2, 1);
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Err(AskFault::Lost), "the one before");
    assert!(!net.handled.contains_key(&id));
    net.introduce();
    let id = net.ask(2, 1);
    net.run_until_ended(id);
    assert!(net.is_ok(id), "the current one");
}

// Bounds.

#[test]
fn one_caller_has_so_much_under_way_and_others_feel_nothing() {
    let mut net = Net::new(3);
    net.peers[1].works_for = SECOND * 5;
    let asked: Vec<_> = (0..=MAX_IN_PROGRESS).map(|_| net.ask(0, 1)).collect();
    let other = net.ask(2, 1);
    net.run_for(SECOND * 20);
    let (done, refused): (Vec<_>, Vec<_>) = asked.into_iter().partition(|id| net.is_ok(*id));
    assert_eq!((done.len(), refused.len()), (MAX_IN_PROGRESS, 1));
    assert_eq!(net.ends[&refused[0]], Err(AskFault::Busy));
    assert!(net.is_ok(other));
    net.assert_sound();
}

#[test]
fn outcomes_that_nobody_fetches_are_forgotten_but_never_run_again() {
    let mut net = Net::new(3);
    let size = 50 * 1024;
    (net.peers[1].works_for, net.peers[1].padding) = (SECOND, size);
    let fitting = MAX_CALLER_BYTES / (size + 100);
    let asked: Vec<_> = (0..fitting + 10).map(|_| net.ask(0, 1)).collect();
    net.run_for(SECOND / 2);
    assert_eq!(net.accepted.len(), asked.len());
    net.relay = Box::new(|packet| if packet.from == 1 && packet.to == 0 { Fate::Drop } else { Fate::Deliver });
    net.run_for(SECOND);
    let other = net.ask(2, 1);
    net.run_for(SECOND * 2);
    assert!(net.is_ok(other), "one caller's outcomes take nobody else's place");
    net.relay = Box::new(|_| Fate::Deliver);
    net.run_for(SECOND * 30);
    let (done, lost): (Vec<_>, Vec<_>) = asked.into_iter().partition(|id| net.is_ok(*id));
    assert_eq!((done.len(), lost.len()), (fitting, 10));
    assert!(lost.iter().all(|id| net.ends[id] == Err(AskFault::Lost)));
    net.assert_sound();
}

#[test]
fn thousands_of_asks_one_after_the_other_are_all_answered() {
    let mut net = Net::new(2);
    net.peers[1].works_for = Duration::ZERO;
    for _ in 0..5_000 {
        let id = net.ask(0, 1);
        net.run_until_ended(id);
        assert!(net.is_ok(id));
    }
    net.assert_sound();
}

#[test]
fn what_does_not_fit_a_message_is_told_at_once() {
    let mut net = Net::new(2);
    let spec = ExecSpec {
        command: Command::Shell(vec![7; MAX_MESSAGE_BYTES]),
        cwd: None,
        env: Vec::new(),
        timeout: None,
        stdin: false,
        follow: Follow::Detached,
    };
    let to = net.peers[1].address.instance;
    let id = net.peers[0].exchange.ask(to, Request::Exec(spec), LONG, net.now, &mut net.rng);
    net.settle();
    assert_eq!(net.ends[&id], Err(AskFault::TooLarge));
    net.peers[1].padding = MAX_MESSAGE_BYTES;
    let id = net.ask(0, 1);
    net.run_until_ended(id);
    assert!(matches!(&net.ends[&id], Ok(Outcome::Failed(failure)) if failure.what.contains("at most")));
}

#[test]
fn whom_nobody_knows_cannot_be_asked_and_endless_deadlines_are_borne() {
    let mut net = Net::new(2);
    let nobody = InstanceId::from_bytes([0xEE; 16]);
    let id = net.peers[0].exchange.ask(nobody, Request::Ping, LONG, net.now, &mut net.rng);
    net.settle();
    assert_eq!(net.ends[&id], Err(AskFault::Unreachable));
    let known = net.peers[1].address.instance;
    net.relay = Box::new(|_| Fate::Drop);
    let id = net.peers[0].exchange.ask(known, Request::Ping, Duration::MAX, net.now, &mut net.rng);
    net.run_until_ended(id);
    assert_eq!(net.ends[&id], Err(AskFault::Lost));
}

#[test]
fn what_was_given_up_ends_in_silence() {
    let mut net = Net::new(2);
    net.peers[1].works_for = SECOND;
    let id = net.ask(0, 1);
    net.run_for(SECOND / 2);
    net.peers[0].exchange.forget(id);
    net.run_for(SECOND * 60);
    assert!(!net.ends.contains_key(&id));
    let next = net.ask(0, 1);
    net.run_until_ended(next);
    assert!(net.is_ok(next));
}

#[test]
fn garbage_is_counted_and_changes_nothing() {
    let mut net = Net::new(2);
    let id = net.ask(0, 1);
    let (slot, now) = (net.peers[0].slot, net.now);
    let host = &mut net.peers[1].exchange;
    for bytes in [&[][..], &[0], &[1; 4], &[2; 200], &[3; 12], &[3; 100], &[9; 50]] {
        host.handle_message(slot, bytes, now, &mut net.rng);
        host.handle_share(slot, bytes, bytes, now, &mut net.rng);
    }
    assert_eq!(host.dropped().values().sum::<u64>(), 14);
    net.run_until_ended(id);
    assert!(net.is_ok(id));
}
