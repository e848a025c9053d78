//! The path machine: what it does step by step, what it refuses, and what becomes of a path.
//! What becomes of it in thousands of networks is told in `worlds.rs`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    limits::MAX_CANDIDATES,
    path::{
        Agent, Candidate, CandidateKind, CheckKey, Config, Direct, Event, Handled, Ignored, MAX_QUEUED, PACE,
        ROUND_MAX, ROUND_MIN, Role, Transmit,
        binding::{KEEP_ALIVE_FIRST, KEEP_ALIVE_LEAST},
        check::{BUDGET, BUDGET_WINDOW, BURST},
        direct::{GRACE, KEEP_ALIVE, RECHECK, SHORT_GRACE, SUSPICION},
        pair::MAX_PEER_REFLEXIVE,
    },
    stun::{Class, Draft, IntegrityKey, Message, TransactionId},
};
use proptest::prelude::*;

#[path = "sim/clock.rs"]
#[expect(dead_code, reason = "other tests roll more kinds of dice")]
mod clock;
#[path = "path/life.rs"]
mod life;
#[path = "path/street.rs"]
mod street;

use clock::beginning;

const HERE: &str = "192.0.2.1:4000";
const THERE: &str = "192.0.2.99:4001";
const ELSEWHERE: &str = "192.0.2.66:6666";

// Checking.

#[test]
fn a_new_pair_is_checked_at_the_times_of_a_burst() {
    let mut lone = Lone::new();
    lone.know(&[THERE]);
    let began = lone.now;
    let sent: Vec<_> = lone.sent_during(Duration::from_secs(4)).iter().map(|(at, _)| *at - began).collect();
    assert_eq!(sent, BURST);
}

#[test]
fn nothing_is_checked_before_both_sides_are_known() {
    let mut lone = Lone::new();
    lone.agent.set_remote(vec![host(THERE)], lone.now);
    assert!(lone.sent_during(Duration::from_secs(60)).is_empty());
    lone.agent.set_local(vec![host(HERE)], lone.now);
    assert_eq!(lone.sent_during(Duration::from_secs(1)).len(), BURST.len());
}

#[test]
fn rounds_go_on_for_ever_with_growing_pauses() {
    let mut lone = Lone::new();
    lone.know(&[THERE]);
    let began = lone.now;
    let sent = lone.sent_during(Duration::from_secs(3600));
    let rounds: Vec<_> = sent.iter().step_by(BURST.len()).map(|(at, _)| (*at - began).as_secs()).collect();
    assert_eq!(rounds, [0, 5, 15, 35, 75, 155, 315, 615, 915, 1215, 1515, 1815, 2115, 2415, 2715, 3015, 3315]);
    assert_eq!((ROUND_MIN.as_secs(), ROUND_MAX.as_secs()), (5, 300));
}

#[test]
fn new_candidates_begin_a_round_at_once() {
    let mut lone = Lone::new();
    lone.know(&[THERE]);
    lone.sent_during(Duration::from_secs(100));
    lone.agent.set_remote(vec![host(THERE), host(ELSEWHERE)], lone.now);
    let sent = lone.sent_during(Duration::from_secs(1));
    for to in [THERE, ELSEWHERE] {
        assert_eq!(sent.iter().filter(|(_, transmit)| transmit.to == addr(to)).count(), BURST.len(), "{to}");
    }
}

#[test]
fn a_changed_interface_begins_a_round_at_once() {
    let mut lone = Lone::new();
    lone.know(&[THERE]);
    lone.sent_during(Duration::from_secs(100));
    lone.agent.restart(lone.now);
    assert_eq!(lone.sent_during(Duration::from_secs(1)).len(), BURST.len());
}

#[test]
fn who_comes_to_be_seen_elsewhere_begins_its_rounds_anew_as_the_other_side_does() {
    let mut lone = Lone::new();
    lone.know(&[THERE]);
    lone.sent_during(Duration::from_secs(100));
    let seen = Candidate { kind: CandidateKind::ServerReflexive, addr: addr(ELSEWHERE) };
    let (began, there) = (lone.now, vec![host(HERE), seen]);
    lone.agent.set_local(there, lone.now);
    let sent = lone.sent_during(Duration::from_secs(40));
    let rounds: Vec<_> = sent.iter().step_by(BURST.len()).map(|(at, _)| (*at - began).as_secs()).collect();
    assert_eq!(rounds, [0, 5, 15, 35]);
}

#[test]
fn the_same_candidates_again_change_nothing() {
    let mut lone = Lone::new();
    lone.know(&[THERE]);
    lone.sent_during(Duration::from_secs(3));
    lone.know(&[THERE]);
    assert!(lone.sent_during(Duration::from_secs(1)).is_empty());
}

#[test]
fn a_pair_is_never_checked_more_often_than_its_budget() {
    let mut lone = Lone::new();
    lone.know(&[THERE]);
    let mut sent = Vec::new();
    for _ in 0..200 {
        lone.agent.restart(lone.now);
        sent.extend(lone.sent_during(Duration::from_millis(100)));
    }
    assert!(sent.windows(BUDGET + 1).all(|checks| checks[BUDGET].0 - checks[0].0 >= BUDGET_WINDOW));
    assert!(sent.len() > 4 * BUDGET);
}

#[test]
fn checks_of_many_pairs_keep_the_pace() {
    let mut lone = Lone::new();
    let many: Vec<_> = (1..=100).map(|at| format!("192.0.2.{}:7", at + 100)).collect();
    lone.know(&many.iter().map(String::as_str).collect::<Vec<_>>());
    let sent = lone.sent_during(Duration::from_secs(4));
    assert!(sent.windows(2).all(|pair| pair[1].0 - pair[0].0 >= PACE));
    let mut checked: Vec<_> = sent.iter().map(|(_, transmit)| transmit.to).collect();
    checked.sort_unstable();
    checked.dedup();
    assert_eq!(checked.len(), MAX_CANDIDATES, "candidates beyond the limit are ignored");
}

#[test]
fn addresses_of_nobody_and_everybody_are_not_checked() {
    let mut lone = Lone::new();
    lone.know(&[
        "224.0.0.1:9",
        "0.0.0.0:9",
        "192.0.2.5:0",
        "255.255.255.255:9",
        "127.0.0.1:9",
        HERE,
        "[2001:db8::1]:9",
    ]);
    assert!(lone.sent_during(Duration::from_secs(60)).is_empty());
}

#[test]
fn two_on_one_machine_meet_on_loopback() {
    let mut two = Two::new();
    let sides = [["127.0.0.1:4000", HERE], ["127.0.0.1:4001", THERE]].map(|side| side.map(host).to_vec());
    two.know(sides.clone());
    // Only loopback arrives.
    two.exchange(|to| to.ip().is_loopback(), ["127.0.0.1:4000", "127.0.0.1:4001"].map(addr));
    assert_eq!(two.path(0), Some(addr("127.0.0.1:4001")));
    assert_eq!(two.path(1), Some(addr("127.0.0.1:4000")));
}

#[test]
fn an_address_that_a_search_found_is_checked_whatever_was_spent_on_it_before() {
    let mut lone = Lone::new();
    lone.know(&[THERE]);
    for _ in 0..BUDGET {
        lone.agent.restart(lone.now);
        lone.sent_during(Duration::from_millis(50));
    }
    assert!(lone.sent_during(Duration::from_millis(200)).is_empty());
    for found in [THERE, ELSEWHERE] {
        lone.agent.try_address(addr(found), lone.now);
        let sent = lone.sent_during(Duration::from_millis(900));
        assert_eq!(sent.iter().filter(|(_, transmit)| transmit.to == addr(found)).count(), BURST.len());
    }
}

// Promotion and clearing.

#[test]
fn a_measured_answer_makes_a_path() {
    let mut two = Two::new();
    two.know([vec![host(HERE)], vec![host(THERE)]]);
    let check = two.agents[0].poll_transmit().unwrap();
    assert_eq!(two.path(0), None);
    assert_eq!(two.agents[1].handle_packet(addr(HERE), &check.bytes, two.now), Handled::Check);
    let answer = two.answer_of(1);
    two.now += Duration::from_millis(42);
    assert_eq!(two.agents[0].handle_packet(addr(THERE), &answer.bytes, two.now), Handled::Answer);
    let direct = Direct { addr: addr(THERE), rtt: Duration::from_millis(42) };
    assert_eq!(two.agents[0].poll_event(), Some(Event::PathChanged(Some(direct))));
    assert_eq!(two.agents[0].path(), Some(direct));
    assert_eq!(two.path(1), None, "that we are heard does not say that we hear");
}

#[test]
fn an_unsolicited_check_is_answered_and_checked_back() {
    let mut two = Two::new();
    two.agents[0].set_local(vec![host(HERE)], two.now);
    two.agents[0].set_remote(vec![host(THERE)], two.now);
    let check = two.agents[0].poll_transmit().unwrap();
    two.agents[1].handle_packet(addr(ELSEWHERE), &check.bytes, two.now);
    let sent: Vec<_> = two.drain(1);
    assert!(sent.iter().all(|transmit| transmit.to == addr(ELSEWHERE)));
    assert_eq!(
        sent.iter().map(|transmit| class(&transmit.bytes)).collect::<Vec<_>>(),
        [Class::Success, Class::Request]
    );
}

#[test]
fn an_idle_path_is_checked_ever_less_often_down_to_the_longest_interval() {
    let mut two = Two::direct();
    let times = two.check_times(Duration::from_secs(600));
    let pauses: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(times[0] - two.began <= KEEP_ALIVE_FIRST && pauses.is_sorted(), "{pauses:?}");
    // The side that controls is the earlier one, by an eighth.
    assert_eq!(pauses.last().map(|pause| pause.as_secs()), Some(KEEP_ALIVE.as_secs() * 7 / 8));
}

#[test]
fn a_path_on_which_the_other_side_is_heard_for_certain_is_not_checked_besides() {
    let mut two = Two::direct();
    let mut next = two.now;
    let times = two.check_times_while(Duration::from_secs(3600), |agent, now| {
        if now >= next {
            next = now + KEEP_ALIVE_FIRST * 3 / 4;
            // QUIC acknowledges what it hears.
            agent.on_sent(now);
            agent.on_heard(now);
        }
    });
    assert_eq!(times, []);
}

#[test]
fn unanswered_checks_clear_an_idle_path() {
    let mut two = Two::direct();
    let (began, lost) = (two.now, two.time_until_lost(|_, _| {}));
    let bound = KEEP_ALIVE + GRACE;
    assert!(lost - began <= bound && lost - began >= GRACE, "{:?}", lost - began);
}

#[test]
fn unanswered_traffic_clears_a_path_within_two_and_a_half_seconds() {
    let mut two = Two::direct();
    two.now += Duration::from_millis(1100);
    let began = two.now;
    let lost = two.time_until_lost(|agent, now| agent.on_sent(now));
    assert!(lost - began <= SUSPICION + GRACE + Duration::from_millis(50), "{:?}", lost - began);
}

#[test]
fn a_path_beneath_traffic_is_in_doubt_once_a_check_had_its_chance_and_until_one_is_answered() {
    let mut two = Two::direct();
    let began = two.now;
    let doubted = two.time_until(Event::Doubted(true), |agent, now| agent.on_sent(now));
    assert!(doubted - began <= SUSPICION + Duration::from_millis(50), "{:?}", doubted - began);
    assert_eq!((two.path(0), two.agents[0].is_doubted()), (Some(addr(THERE)), true));
    two.check_times(RECHECK);
    assert_eq!((two.path(0), two.agents[0].is_doubted()), (Some(addr(THERE)), false));
}

#[test]
fn what_is_acknowledged_while_a_path_is_in_doubt_keeps_it_no_longer() {
    let mut two = Two::direct();
    let began = two.now;
    let lost = two.time_until_lost(|agent, now| {
        agent.on_sent(now);
        agent.on_data_sent(now);
        if agent.is_doubted() {
            agent.on_delivered(now);
        }
    });
    assert!(lost - began <= SUSPICION + SHORT_GRACE + Duration::from_millis(50), "{:?}", lost - began);
}

#[test]
fn where_the_other_side_sends_by_way_of_the_relay_one_unanswered_check_is_doubt_enough() {
    let mut two = Two::direct();
    let began = two.now;
    let doubted = two.time_until(Event::Doubted(true), |agent, now| {
        agent.on_sent(now);
        agent.on_relayed(now);
    });
    assert!(doubted - began <= SUSPICION + Duration::from_millis(5), "{:?}", doubted - began);
}

#[test]
fn a_path_that_the_other_side_does_not_use_is_checked_every_five_seconds() {
    let mut two = Two::direct();
    // Data is acknowledged all the while, so nothing else asks for a check.
    let times = two.check_times_while(Duration::from_secs(60), |agent, now| {
        agent.on_delivered(now);
        agent.on_relayed(now);
    });
    let pauses: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let longest = KEEP_ALIVE_LEAST + Duration::from_millis(50);
    assert!(
        pauses.len() >= 10 && pauses.iter().all(|pause| (KEEP_ALIVE_LEAST..=longest).contains(pause)),
        "{pauses:?}"
    );
}

#[test]
fn packets_that_anybody_could_send_keep_no_path() {
    let mut two = Two::direct();
    let began = two.now;
    let lost = two.time_until_lost(|agent, now| {
        agent.on_sent(now);
        agent.on_received(addr(THERE), now);
    });
    assert!(lost - began <= KEEP_ALIVE + GRACE, "{:?}", lost - began);
}

#[test]
fn the_clock_alone_clears_no_path() {
    let mut two = Two::direct();
    // The machine slept: many timers are late at once, but nothing was asked.
    two.now += Duration::from_secs(3600);
    two.agents[0].handle_timeout(two.now);
    assert_eq!(two.path(0), Some(addr(THERE)));
}

#[test]
fn a_lost_path_is_checked_again_at_once() {
    let mut two = Two::direct();
    let lost = two.time_until_lost(|_, _| {});
    let again = two.check_times(Duration::from_secs(4));
    assert!(again.first().is_some_and(|at| *at - lost < BUDGET_WINDOW), "{again:?}");
}

#[test]
fn a_path_stays_until_its_checks_fail_though_nobody_names_it() {
    let mut two = Two::direct();
    two.agents[0].set_remote(vec![host(ELSEWHERE)], two.now);
    assert_eq!(two.path(0), Some(addr(THERE)));
    two.time_until_lost(|_, _| {});
    assert_eq!(two.path(0), None);
}

#[test]
fn what_is_queued_wants_to_be_fetched_now() {
    let mut lone = Lone::new();
    lone.know(&[THERE]);
    assert_eq!(lone.agent.poll_timeout(), Some(lone.now));
    lone.agent.poll_transmit().unwrap();
    assert_eq!(lone.agent.poll_timeout(), Some(lone.now + BURST[1]));
}

// Hostile input.

#[test]
fn a_check_under_another_key_is_not_answered() {
    let mut two = Two::direct();
    let mut stranger = Agent::new(Config { key: key(99), role: Role::Controlling, seed: [9; 32] }, two.now);
    stranger.set_local(vec![host(ELSEWHERE)], two.now);
    stranger.set_remote(vec![host(THERE)], two.now);
    let check = stranger.poll_transmit().unwrap();
    let handled = two.agents[1].handle_packet(addr(ELSEWHERE), &check.bytes, two.now);
    assert_eq!(handled, Handled::Ignored(Ignored::NotOurs));
    two.assert_unmoved();
}

#[test]
fn a_check_with_a_wrong_mac_is_not_answered() {
    let mut two = Two::direct();
    let genuine = two.next_check(0);
    let read = Message::parse(&genuine.bytes).unwrap();
    // The name is right, which everybody on the way can see.
    let unsigned = Draft::new(Class::Request, read.transaction()).username(read.username().unwrap()).check_number(77);
    let forged = unsigned.sign(&IntegrityKey::new(b"guess")).finish();
    let bare = Draft::new(Class::Request, read.transaction()).username(read.username().unwrap()).finish();
    for bytes in [forged, bare] {
        for from in [HERE, ELSEWHERE] {
            let handled = two.agents[1].handle_packet(addr(from), &bytes, two.now);
            assert_eq!(handled, Handled::Ignored(Ignored::Forged));
        }
    }
    two.assert_unmoved();
}

#[test]
fn a_repeated_check_is_not_answered() {
    let mut two = Two::direct();
    let check = two.next_check(0);
    assert_eq!(two.agents[1].handle_packet(addr(HERE), &check.bytes, two.now), Handled::Check);
    two.drain(1);
    for from in [HERE, ELSEWHERE] {
        let handled = two.agents[1].handle_packet(addr(from), &check.bytes, two.now);
        assert_eq!(handled, Handled::Ignored(Ignored::Repeated));
    }
    two.assert_unmoved();
}

#[test]
fn a_reflected_check_is_not_answered() {
    let mut two = Two::direct();
    let check = two.next_check(0);
    for from in [THERE, ELSEWHERE] {
        let handled = two.agents[0].handle_packet(addr(from), &check.bytes, two.now);
        assert_eq!(handled, Handled::Ignored(Ignored::NotOurs));
    }
    two.assert_unmoved();
}

#[test]
fn an_answer_from_another_address_moves_nothing() {
    let mut two = Two::new();
    two.know([vec![host(HERE)], vec![host(THERE)]]);
    let check = two.agents[0].poll_transmit().unwrap();
    two.agents[1].handle_packet(addr(HERE), &check.bytes, two.now);
    let answer = two.answer_of(1);
    let handled = two.agents[0].handle_packet(addr(ELSEWHERE), &answer.bytes, two.now);
    assert_eq!(handled, Handled::Ignored(Ignored::WrongSource));
    assert_eq!(two.path(0), None);
    assert_eq!(
        two.agents[0].handle_packet(addr(THERE), &answer.bytes, two.now),
        Handled::Answer,
        "the true one counts"
    );
}

#[test]
fn an_answer_counts_once_and_in_time() {
    let mut two = Two::new();
    two.know([vec![host(HERE)], vec![host(THERE)]]);
    let check = two.agents[0].poll_transmit().unwrap();
    two.agents[1].handle_packet(addr(HERE), &check.bytes, two.now);
    let answer = two.answer_of(1);
    let mut late = two.now;
    late += Duration::from_secs(5);
    let mut other = Two::new();
    other.know([vec![host(HERE)], vec![host(THERE)]]);
    other.agents[0].poll_transmit().unwrap();
    let handled = other.agents[0].handle_packet(addr(THERE), &answer.bytes, late);
    assert_eq!(handled, Handled::Ignored(Ignored::NotOurs));
    assert_eq!(two.agents[0].handle_packet(addr(THERE), &answer.bytes, two.now), Handled::Answer);
    let handled = two.agents[0].handle_packet(addr(THERE), &answer.bytes, two.now);
    assert_eq!(handled, Handled::Ignored(Ignored::NotOurs));
}

#[test]
fn an_answer_with_a_wrong_mac_moves_nothing() {
    let mut two = Two::new();
    two.know([vec![host(HERE)], vec![host(THERE)]]);
    let check = two.agents[0].poll_transmit().unwrap();
    let transaction = Message::parse(&check.bytes).unwrap().transaction();
    let answer = || Draft::new(Class::Success, transaction).mapped_address(addr(HERE));
    for bytes in [answer().finish(), answer().sign(&IntegrityKey::new(b"guess")).finish()] {
        let handled = two.agents[0].handle_packet(addr(THERE), &bytes, two.now);
        assert_eq!(handled, Handled::Ignored(Ignored::Forged));
    }
    assert_eq!(two.path(0), None);
}

#[test]
fn an_answer_is_never_longer_than_the_check() {
    for from in [HERE, "[2001:db8::1]:4000"] {
        let mut two = Two::direct();
        let check = two.next_check(0);
        assert_eq!(two.agents[1].handle_packet(addr(from), &check.bytes, two.now), Handled::Check);
        assert!(two.answer_of(1).bytes.len() <= check.bytes.len());
    }
}

#[test]
fn no_more_answers_wait_than_the_limit() {
    let mut two = Two::direct();
    let mut answered = 0;
    for _ in 0..MAX_QUEUED * 2 {
        two.now += PACE * 200;
        let check = two.next_check(0);
        answered += usize::from(two.agents[1].handle_packet(addr(HERE), &check.bytes, two.now) == Handled::Check);
    }
    assert!(answered <= MAX_QUEUED, "{answered}");
}

#[test]
fn only_so_many_addresses_are_learnt_from_checks() {
    let mut two = Two::new();
    let many = (1..=30).map(|port| Candidate { addr: SocketAddr::new(addr(THERE).ip(), port), ..host(THERE) });
    two.know([vec![host(HERE)], many.collect()]);
    two.drain(1);
    let (mut heard, mut checked) = (0, BTreeSet::new());
    let end = two.now + ROUND_MIN - PACE;
    while two.now < end {
        for check in two.drain(0) {
            heard += 1;
            two.agents[1].handle_packet(SocketAddr::new(addr(ELSEWHERE).ip(), heard), &check.bytes, two.now);
        }
        two.now += PACE;
        two.agents.iter_mut().for_each(|agent| agent.handle_timeout(two.now));
        let checks = two.drain(1).into_iter().filter(|transmit| class(&transmit.bytes) == Class::Request);
        checked.extend(checks.map(|transmit| transmit.to).filter(|to| *to != addr(HERE)));
    }
    assert!(usize::from(heard) > MAX_PEER_REFLEXIVE * 4);
    assert_eq!(checked.len(), MAX_PEER_REFLEXIVE, "{checked:?}");
}

#[test]
fn stun_that_is_no_check_is_not_answered() {
    let mut two = Two::direct();
    let indication = Draft::new(Class::Indication, TransactionId([1; 12])).finish();
    let plain = Draft::new(Class::Request, TransactionId([1; 12])).finish();
    for bytes in [indication, plain] {
        let handled = two.agents[1].handle_packet(addr(HERE), &bytes, two.now);
        assert_eq!(handled, Handled::Ignored(Ignored::NotOurs));
    }
    assert!(matches!(
        two.agents[1].handle_packet(addr(HERE), &[0; 19], two.now),
        Handled::Ignored(Ignored::Malformed(_))
    ));
    two.assert_unmoved();
}

#[derive(Debug, Clone)]
enum Operation {
    Pass(u64),
    SetRemote(Vec<(u8, u8)>),
    SetLocal(Vec<(u8, u8)>),
    Restart,
    Sent,
    DataSent,
    Delivered,
    Relayed,
    Source(Option<u8>),
    Received(u8),
    Deliver { from: u8, flip: Option<(u8, u8)> },
    Noise(Vec<u8>),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let candidates = || proptest::collection::vec((any::<u8>(), any::<u8>()), 0..40);
    let operation = prop_oneof![
        4 => (0..6000_u64).prop_map(Operation::Pass),
        1 => candidates().prop_map(Operation::SetRemote),
        1 => candidates().prop_map(Operation::SetLocal),
        1 => Just(Operation::Restart),
        2 => Just(Operation::Sent),
        1 => Just(Operation::DataSent),
        1 => Just(Operation::Delivered),
        1 => Just(Operation::Relayed),
        1 => proptest::option::of(0..3_u8).prop_map(Operation::Source),
        1 => any::<u8>().prop_map(Operation::Received),
        6 => (any::<u8>(), proptest::option::weighted(0.2, any::<(u8, u8)>()))
            .prop_map(|(from, flip)| Operation::Deliver { from, flip }),
        1 => proptest::collection::vec(any::<u8>(), 0..200).prop_map(Operation::Noise),
    ];
    proptest::collection::vec(operation, 1..120)
}

proptest! {
    #[test]
    fn no_sequence_of_operations_panics_or_breaks_a_bound(operations in operations()) {
        let mut two = Two::new();
        let mut flying: Vec<Transmit> = Vec::new();
        for operation in operations {
            let now = two.now;
            let some = |list: Vec<(u8, u8)>| list.into_iter().map(|(ip, port)| host_of(ip, port)).collect::<Vec<_>>();
            match operation {
                Operation::Pass(millis) => two.now += Duration::from_millis(millis),
                Operation::SetRemote(list) => two.agents[0].set_remote(some(list), now),
                Operation::SetLocal(list) => two.agents[0].set_local(some(list), now),
                Operation::Restart => two.agents[0].restart(now),
                Operation::Sent => two.agents[0].on_sent(now),
                Operation::DataSent => two.agents[0].on_data_sent(now),
                Operation::Delivered => two.agents[0].on_delivered(now),
                Operation::Relayed => two.agents[0].on_relayed(now),
                Operation::Source(ip) => two.agents[0].on_source(ip.map(|ip| host_of(ip, 4).addr.ip()), now),
                Operation::Received(from) => two.agents[0].on_received(host_of(from, 7).addr, now),
                Operation::Deliver { from, flip } => {
                    if let Some(Transmit { to, mut bytes }) = flying.pop() {
                        if let Some((at, bit)) = flip {
                            let at = usize::from(at) % bytes.len();
                            bytes[at] ^= 1 << (bit % 8);
                        }
                        two.agents[1].handle_packet(host_of(from, 7).addr, &bytes, now);
                        for answer in two.drain(1) {
                            two.agents[0].handle_packet(to, &answer.bytes, now);
                        }
                    }
                }
                Operation::Noise(bytes) => {
                    two.agents[0].handle_packet(addr(ELSEWHERE), &bytes, now);
                }
            }
            two.agents[0].handle_timeout(two.now);
            let sent = two.drain(0);
            prop_assert!(sent.len() <= MAX_QUEUED);
            flying.extend(sent);
            while two.agents[0].poll_event().is_some() {}
            prop_assert!(two.agents[0].poll_timeout().is_none_or(|wake| wake > two.now), "would wake at once, for ever");
        }
    }
}

// What the tests stand on.

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn host(text: &str) -> Candidate {
    Candidate { kind: CandidateKind::Host, addr: addr(text) }
}

/// A candidate among few, so that operations meet.
fn host_of(ip: u8, port: u8) -> Candidate {
    let ip = if ip < 250 { [192, 0, 2, ip % 8 + 1] } else { [127, 0, 0, ip] };
    Candidate { kind: CandidateKind::Host, addr: SocketAddr::from((ip, u16::from(port % 4 + 4))) }
}

fn class(bytes: &[u8]) -> Class {
    Message::parse(bytes).unwrap().class()
}

fn key(number: u8) -> CheckKey {
    CheckKey::agree(&[number; 32], &[number; 32])
}

/// One agent, to which nobody answers.
struct Lone {
    agent: Agent,
    now: Instant,
}

impl Lone {
    fn new() -> Self {
        let now = beginning();
        Self { agent: Agent::new(Config { key: key(1), role: Role::Controlling, seed: [1; 32] }, now), now }
    }

    fn know(&mut self, remote: &[&str]) {
        self.agent.set_local(vec![host(HERE)], self.now);
        self.agent.set_remote(remote.iter().map(|text| host(text)).collect(), self.now);
    }

    fn sent_during(&mut self, time: Duration) -> Vec<(Instant, Transmit)> {
        let end = self.now + time;
        let mut sent = Vec::new();
        loop {
            sent.extend(std::iter::from_fn(|| self.agent.poll_transmit()).map(|transmit| (self.now, transmit)));
            while self.agent.poll_event().is_some() {}
            match self.agent.poll_timeout().filter(|wake| *wake < end) {
                Some(wake) => self.now = wake,
                None => break,
            }
            self.agent.handle_timeout(self.now);
        }
        self.now = end;
        sent
    }
}

/// Two agents that share a key, and what passes between them by hand: [`HERE`] and [`THERE`].
struct Two {
    agents: [Agent; 2],
    began: Instant,
    now: Instant,
}

impl Two {
    fn new() -> Self {
        let now = beginning();
        let agents = [(Role::Controlling, 1), (Role::Controlled, 2)]
            .map(|(role, seed)| Agent::new(Config { key: key(1), role, seed: [seed; 32] }, now));
        Self { agents, began: now, now }
    }

    /// Both have a path, nothing is planned or queued, and the last answer came now.
    fn direct() -> Self {
        let mut two = Self::new();
        two.know([vec![host(HERE)], vec![host(THERE)]]);
        two.exchange(|_| true, [addr(HERE), addr(THERE)]);
        let wake = |two: &Self, at: usize| two.agents[at].poll_timeout().unwrap() - two.now;
        assert!(wake(&two, 0) > Duration::from_secs(3) && wake(&two, 1) > Duration::from_secs(3));
        assert_eq!((two.path(0), two.path(1)), (Some(addr(THERE)), Some(addr(HERE))));
        two
    }

    fn know(&mut self, [one, other]: [Vec<Candidate>; 2]) {
        for (at, local, remote) in [(0, &one, &other), (1, &other, &one)] {
            self.agents[at].set_local(local.clone(), self.now);
            self.agents[at].set_remote(remote.clone(), self.now);
        }
    }

    fn path(&self, at: usize) -> Option<SocketAddr> {
        self.agents[at].path().map(|direct| direct.addr)
    }

    /// Carries everything for a second, if it arrives at all; `own` is what each side is seen as.
    fn exchange(&mut self, arrives: impl Fn(SocketAddr) -> bool, own: [SocketAddr; 2]) {
        let end = self.now + Duration::from_secs(1);
        while self.now < end {
            for at in [0, 1, 0, 1] {
                for transmit in self.drain(at).into_iter().filter(|transmit| arrives(transmit.to)) {
                    self.agents[1 - at].handle_packet(own[at], &transmit.bytes, self.now);
                }
                while self.agents[at].poll_event().is_some() {}
            }
            self.now += Duration::from_millis(1);
            self.agents.iter_mut().for_each(|agent| agent.handle_timeout(self.now));
        }
    }

    fn drain(&mut self, at: usize) -> Vec<Transmit> {
        std::iter::from_fn(|| self.agents[at].poll_transmit()).collect()
    }

    fn answer_of(&mut self, at: usize) -> Transmit {
        self.drain(at).into_iter().find(|transmit| class(&transmit.bytes) == Class::Success).unwrap()
    }

    /// A fresh check, as soon as one is due.
    fn next_check(&mut self, at: usize) -> Transmit {
        self.agents[at].restart(self.now);
        loop {
            if let Some(check) = self.agents[at].poll_transmit() {
                return check;
            }
            while self.agents[at].poll_event().is_some() {}
            self.now = self.agents[at].poll_timeout().unwrap().max(self.now);
            self.agents[at].handle_timeout(self.now);
        }
    }

    /// The second agent did nothing, and the first still has its path.
    fn assert_unmoved(&mut self) {
        for at in 0..2 {
            assert!(self.drain(at).iter().all(|transmit| class(&transmit.bytes) == Class::Request));
            assert_eq!(self.agents[at].poll_event(), None);
        }
        assert_eq!((self.path(0), self.path(1)), (Some(addr(THERE)), Some(addr(HERE))));
    }

    /// When the first agent sends checks; they are answered.
    fn check_times(&mut self, time: Duration) -> Vec<Instant> {
        self.check_times_while(time, |_, _| {})
    }

    fn check_times_while(&mut self, time: Duration, mut meanwhile: impl FnMut(&mut Agent, Instant)) -> Vec<Instant> {
        let end = self.now + time;
        let mut times = Vec::new();
        while self.now < end {
            for transmit in self.drain(0) {
                if class(&transmit.bytes) == Class::Request {
                    times.push(self.now);
                }
                self.agents[1].handle_packet(addr(HERE), &transmit.bytes, self.now);
                for answer in self.drain(1) {
                    self.agents[0].handle_packet(addr(THERE), &answer.bytes, self.now);
                }
            }
            while self.agents[0].poll_event().is_some() {}
            self.now += Duration::from_millis(1);
            meanwhile(&mut self.agents[0], self.now);
            self.agents[0].handle_timeout(self.now);
        }
        times
    }

    /// When the first agent gives its path up, if nothing comes any more.
    fn time_until_lost(&mut self, meanwhile: impl FnMut(&mut Agent, Instant)) -> Instant {
        self.time_until(Event::PathChanged(None), meanwhile)
    }

    /// When this happens to the first agent, if nothing comes any more.
    fn time_until(&mut self, event: Event, mut meanwhile: impl FnMut(&mut Agent, Instant)) -> Instant {
        let end = self.now + Duration::from_secs(60);
        while self.now < end {
            meanwhile(&mut self.agents[0], self.now);
            self.drain(0);
            if self.agents[0].poll_event() == Some(event) {
                return self.now;
            }
            self.now += Duration::from_millis(1);
            self.agents[0].handle_timeout(self.now);
        }
        panic!("never: {event:?}");
    }
}
