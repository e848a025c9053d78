//! The life of a path: how soon it comes, what it survives, how soon it is left, and what it costs.

use std::time::Duration;

use peerfleet_proto::path::{
    Agent, Agents, Candidate, CandidateKind, Config, Event, Handled, Ignored, Role,
    binding::KEEP_ALIVE_LEAST,
    budget::{CHECKS_AT_ONCE, CHECKS_PER_SECOND},
    check::BURST,
    direct::{DATA_GRACE, KEEP_ALIVE, SHORT_GRACE, SUSPICION, TRIAL},
    pair::DISTRUST_MIN,
};

use super::{
    addr, beginning, host, key,
    street::{Life, Nat},
};

const ONE: &str = "192.0.2.1:4000";
const OTHER: &str = "198.51.100.2:4001";

fn open() -> [Option<Nat>; 2] {
    [None, None]
}

fn percentile(mut times: Vec<Duration>, percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100]
}

// Coming.

#[test]
fn behind_two_nats_a_path_comes_within_three_round_trips_of_the_answer() {
    let times: Vec<_> = (0..400)
        .map(|seed| {
            let nats =
                ["203.0.113.1", "203.0.113.2"].map(|public| Some(Nat { filters_ports: true, ..Nat::new(public, 30) }));
            let mut life = Life::new(["10.0.0.2:4000", "10.0.1.2:4001"], nats, seed);
            life.street.loss_percent = if seed % 2 == 0 { 0 } else { 2 };
            // The offer and then the answer travel 20 ms each; an outer address is known 20 ms after the socket is open, and is
            // told in 20 ms more. At 0 the offer leaves.
            let hosts = [0, 1].map(|at| vec![life.candidates(at)[0]]);
            life.hosts[0].agent.set_local(hosts[0].clone(), life.now);
            life.run(Duration::from_millis(20));
            life.hosts[1].agent.set_local(hosts[1].clone(), life.now);
            life.hosts[1].agent.set_remote(hosts[0].clone(), life.now);
            life.run(Duration::from_millis(20));
            // 40 ms: the answer is here, and word of the first outer address there.
            life.hosts[0].agent.set_remote(hosts[1].clone(), life.now);
            life.introduce(0);
            let answered = life.now;
            life.run(Duration::from_millis(20));
            life.introduce(1);
            life.run_until(Duration::from_secs(10), |life| life.path(0).is_some() && life.path(1).is_some()).unwrap();
            life.now - answered
        })
        .collect();
    let round_trip = Duration::from_millis(40);
    assert!(percentile(times.clone(), 50) <= round_trip * 3, "{:?}", percentile(times, 50));
    assert!(percentile(times.clone(), 95) <= Duration::from_millis(560), "{:?}", percentile(times, 95));
}

#[test]
fn a_check_that_comes_is_checked_back_in_the_middle_of_a_burst() {
    let mut life = Life::new([ONE, OTHER], open(), 1);
    life.street.blocked = true;
    life.introduce(0);
    life.introduce(1);
    // Between the last two steps of the burst.
    life.run(BURST[4] + Duration::from_millis(50));
    life.street.blocked = false;
    let restarted = life.now;
    life.hosts[0].agent.restart(life.now);
    let both = life.run_until(Duration::from_secs(5), |life| life.path(0).is_some() && life.path(1).is_some()).unwrap();
    assert!(both <= Duration::from_millis(65), "{both:?} since {restarted:?}");
}

#[test]
fn the_likeliest_addresses_are_checked_first_and_all_of_them_before_any_again() {
    let now = beginning();
    let mut agent = Agent::new(Config { key: key(1), role: Role::Controlling, seed: [1; 32] }, now);
    agent.set_local(vec![host("192.168.1.4:7"), host("[2001:db8:1::4]:7")], now);
    let named = [
        ("172.17.0.1:9", CandidateKind::Host),
        ("198.51.100.8:8", CandidateKind::ServerReflexive),
        ("198.51.100.8:7", CandidateKind::Mapped),
        ("198.51.100.9:7", CandidateKind::Host),
        ("[2001:db8:9::9]:7", CandidateKind::Host),
        ("192.168.1.9:7", CandidateKind::Host),
        ("[2001:db8:1::9]:7", CandidateKind::Host),
    ];
    let many = named.map(|(text, kind)| Candidate { kind, addr: addr(text) });
    agent.set_remote(many.to_vec(), now);
    let mut sent = Vec::new();
    while sent.len() < named.len() {
        let wake = agent.poll_timeout().unwrap();
        agent.handle_timeout(wake);
        sent.extend(std::iter::from_fn(|| agent.poll_transmit()).map(|transmit| transmit.to));
    }
    let likeliest: Vec<_> = named.iter().rev().map(|(text, _)| addr(text)).collect();
    assert_eq!(sent, likeliest);
}

// Data that does not arrive.

#[test]
fn a_path_that_swallows_data_and_answers_checks_is_left_within_two_and_a_half_seconds() {
    for (seed, swallows) in [[true, true], [true, false], [false, true]].into_iter().enumerate() {
        let mut life = Life::direct([ONE, OTHER], open(), seed as u64);
        life.talk();
        life.run(Duration::from_secs(5));
        assert!(life.hosts.iter().all(|host| host.agent.is_delivering()));
        let began = life.now;
        life.street.swallows_data = swallows;
        life.run(Duration::from_secs(8));
        for at in 0..2 {
            let pause = life.longest_pause(at, began);
            assert!(pause <= DATA_GRACE + SUSPICION * 2 + life.relay_delay, "{swallows:?}: {pause:?}");
        }
    }
}

#[test]
fn a_path_that_never_carried_data_is_left_sooner_and_tried_again_ever_less_often() {
    let mut life = Life::new([ONE, OTHER], open(), 1);
    life.street.swallows_data = [true; 2];
    life.talk();
    life.introduce(0);
    life.introduce(1);
    life.run(Duration::from_secs(3600));
    let changes = &life.hosts[0].changes;
    let tries: Vec<_> = changes.chunks(2).map(|pair| (pair[0].0, pair.get(1).map(|left| left.0 - pair[0].0))).collect();
    let slack = Duration::from_millis(300);
    assert!(tries.iter().all(|(_, lasted)| lasted.is_none_or(|lasted| lasted <= TRIAL + slack)), "{tries:?}");
    let pauses: Vec<_> = tries.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    assert!(pauses.len() <= 8 && pauses[0] >= DISTRUST_MIN, "{pauses:?}");
    assert!(pauses.windows(2).all(|pair| pair[0] <= pair[1]), "{pauses:?}");
}

#[test]
fn a_path_that_swallows_data_after_a_while_each_time_is_tried_ever_less_often() {
    let mut life = Life::direct([ONE, OTHER], open(), 1);
    life.talk();
    for _ in 0..600 {
        // Five seconds of each try are let through.
        life.run_until(Duration::from_secs(7200), |life| life.path(0).is_some());
        life.street.swallows_data = [false; 2];
        life.run(Duration::from_secs(5));
        life.street.swallows_data = [true; 2];
        life.run_until(Duration::from_secs(10), |life| life.path(0).is_none()).unwrap();
        if life.elapsed() > Duration::from_secs(3600) {
            break;
        }
    }
    assert!(life.hosts[0].changes.len() <= 20, "{} changes in an hour", life.hosts[0].changes.len());
}

#[test]
fn a_path_that_carries_data_again_is_taken_again() {
    let mut life = Life::direct([ONE, OTHER], open(), 1);
    life.talk();
    life.street.swallows_data = [true; 2];
    life.run(Duration::from_secs(10));
    assert_eq!((life.path(0), life.path(1)), (None, None));
    life.street.swallows_data = [false; 2];
    life.run(DISTRUST_MIN * 3);
    assert!(life.path(0).is_some() && life.path(1).is_some());
    let before = life.hosts[0].changes.len();
    life.run(Duration::from_secs(600));
    assert_eq!(life.hosts[0].changes.len(), before, "and stays");
}

#[test]
fn on_another_network_a_path_that_swallowed_data_is_tried_at_once() {
    let mut life = Life::direct([ONE, OTHER], open(), 1);
    life.talk();
    life.street.swallows_data = [true; 2];
    life.run(Duration::from_secs(10));
    life.street.swallows_data = [false; 2];
    life.hosts[0].inner = addr("192.0.2.77:4000");
    life.introduce(0);
    life.introduce(1);
    let direct = life.run_until(Duration::from_secs(5), |life| life.path(0).is_some());
    assert!(direct.is_some_and(|time| time <= Duration::from_secs(1)), "{direct:?}");
}

#[test]
fn acknowledged_data_keeps_a_path_without_any_check() {
    let mut life = Life::direct([ONE, OTHER], open(), 1);
    life.talk();
    life.run(Duration::from_secs(2));
    let before = life.hosts[0].checks.len();
    life.run(Duration::from_secs(50));
    assert_eq!(life.hosts[0].checks.len(), before);
}

#[test]
fn heavy_loss_is_not_taken_for_a_path_that_swallows_data() {
    for seed in 0..6 {
        let mut life = Life::direct([ONE, OTHER], open(), seed);
        life.talk();
        life.street.loss_percent = 20;
        let before = life.hosts.each_ref().map(|host| host.changes.len());
        life.run(Duration::from_secs(600));
        assert_eq!(life.hosts.each_ref().map(|host| host.changes.len()), before, "seed {seed}");
    }
}

// Paths that die.

#[test]
fn blocked_udp_beneath_traffic_costs_less_than_a_second_and_a_half() {
    for seed in 0..50 {
        let mut life = Life::direct([ONE, OTHER], open(), seed);
        life.talk();
        life.run(Duration::from_millis(1000 + seed * 13));
        let began = life.now;
        life.street.blocked = true;
        life.run(Duration::from_secs(5));
        for at in 0..2 {
            let pause = life.longest_pause(at, began);
            let bound = SUSPICION + SHORT_GRACE + Duration::from_millis(600);
            assert!(pause <= bound, "seed {seed}: {pause:?}");
        }
    }
}

#[test]
fn a_nat_that_forgets_in_the_middle_of_a_transfer_costs_less_than_a_second() {
    let pauses = |filters_ports: bool| -> Vec<Duration> {
        (0..100)
            .flat_map(|seed| {
                let mut nat = Nat::new("203.0.113.1", 30);
                nat.filters_ports = filters_ports;
                let other = Nat { filters_ports, ..Nat::new("203.0.113.2", 30) };
                let mut life = Life::direct(["10.0.0.2:4000", "10.0.1.2:4001"], [Some(nat), Some(other)], seed);
                life.talk();
                if seed % 2 == 0 {
                    // Only the other end has something to say, and this one acknowledges.
                    life.hosts[0].says_every = None;
                }
                life.run(Duration::from_millis(2000 + seed * 17));
                let began = life.now;
                life.hosts[0].nat.as_mut().unwrap().forget();
                life.run(Duration::from_secs(4));
                [life.longest_pause(0, began), life.longest_pause(1, began)]
            })
            .collect()
    };
    // The new mapping gets through to the other side: it is followed without the relay.
    assert!(percentile(pauses(false), 95) <= Duration::from_millis(600), "{:?}", percentile(pauses(false), 95));
    // It does not: the relay takes over until the other side hears of it.
    assert!(percentile(pauses(true), 95) <= Duration::from_secs(1), "{:?}", percentile(pauses(true), 95));
}

#[test]
fn an_idle_peer_is_followed_to_its_new_mapping_by_its_next_check() {
    let nat = Nat::new("203.0.113.1", 30);
    let mut life = Life::direct(["10.0.0.2:4000", OTHER], [Some(nat), None], 3);
    life.hosts[0].nat.as_mut().unwrap().forget();
    let moved = addr("203.0.113.1:20001");
    life.run_until(KEEP_ALIVE * 2, |life| life.path(1) == Some(moved)).unwrap();
    assert!(life.path(0).is_some());
    assert!(life.hosts[1].changes.iter().all(|(_, path)| path.is_some()), "without the relay");
}

#[test]
fn a_check_from_elsewhere_moves_no_path_that_answers() {
    let mut life = Life::direct([ONE, OTHER], open(), 3);
    // Somebody on the way brings a check from an address of its own, and all that is sent there onwards.
    life.hosts[0].agent.restart(life.now);
    let check = life.hosts[0].agent.poll_transmit().unwrap();
    let elsewhere = addr("203.0.113.66:6666");
    assert_eq!(life.hosts[1].agent.handle_packet(elsewhere, &check.bytes, life.now), Handled::Check);
    let sent: Vec<_> = std::iter::from_fn(|| life.hosts[1].agent.poll_transmit()).collect();
    let back =
        sent.iter().find(|transmit| transmit.to == elsewhere && super::class(&transmit.bytes) == super::Class::Request);
    let now = life.now + Duration::from_millis(40);
    if let Some(back) = back {
        life.hosts[0].agent.handle_packet(addr(OTHER), &back.bytes, now);
        let answer = std::iter::from_fn(|| life.hosts[0].agent.poll_transmit())
            .find(|transmit| super::class(&transmit.bytes) == super::Class::Success)
            .unwrap();
        life.hosts[1].agent.handle_packet(elsewhere, &answer.bytes, now);
    }
    life.now = now;
    life.run(Duration::from_secs(60));
    assert_eq!(life.path(1), Some(addr(ONE)));
}

// Moving to another network.

#[test]
fn a_path_from_an_address_that_is_gone_is_left_at_once() {
    let mut life = Life::direct([ONE, OTHER], open(), 1);
    life.hosts[0].inner = addr("203.0.113.9:4000");
    let local = life.candidates(0);
    life.hosts[0].agent.on_source(Some(addr(ONE).ip()), life.now);
    life.hosts[0].agent.set_local(local, life.now);
    assert_eq!(life.hosts[0].agent.poll_event(), Some(Event::PathChanged(None)));
}

#[test]
fn a_path_whose_packets_leave_from_another_address_is_left_at_once() {
    let mut life = Life::direct([ONE, OTHER], open(), 1);
    life.hosts[0].agent.on_source(Some(addr(ONE).ip()), life.now);
    assert!(life.path(0).is_some(), "the first word of it is no change");
    life.hosts[0].agent.on_source(Some(addr("203.0.113.9:1").ip()), life.now);
    assert_eq!(life.path(0), None);
}

#[test]
fn an_interface_that_comes_or_goes_beside_the_path_does_not_end_it() {
    let mut life = Life::direct([ONE, OTHER], open(), 1);
    life.hosts[0].agent.on_source(Some(addr(ONE).ip()), life.now);
    for local in [vec![host(ONE), host("172.17.0.1:4000")], vec![host(ONE)]] {
        life.hosts[0].agent.set_local(local, life.now);
        life.run(Duration::from_secs(5));
    }
    assert_eq!(life.hosts[0].changes.len(), 1, "{:?}", life.hosts[0].changes);
}

#[test]
fn who_moves_to_another_network_is_relayed_within_a_second_and_direct_within_three() {
    for seed in 0..50 {
        let nats =
            ["203.0.113.1", "203.0.113.2"].map(|public| Some(Nat { filters_ports: true, ..Nat::new(public, 30) }));
        let mut life = Life::direct(["10.0.0.2:4000", "10.0.1.2:4001"], nats, seed);
        life.talk();
        life.run(Duration::from_millis(1000 + seed * 31));
        let began = life.now;
        life.hosts[0].inner = addr("10.7.0.2:4000");
        life.hosts[0].nat = Some(Nat { filters_ports: true, ..Nat::new("203.0.113.7", 30) });
        // The system says so at once; the outer address is known and told 300 ms later, when the relay was joined again.
        let inside = vec![host("10.7.0.2:4000")];
        life.hosts[0].agent.set_local(inside, life.now);
        assert_eq!(life.path(0), None, "seed {seed}");
        life.run(Duration::from_millis(300));
        life.introduce(0);
        let news = life.candidates(1);
        life.hosts[0].agent.set_remote(news, life.now);
        let moved = addr("203.0.113.7:20000");
        let is_direct = |life: &Life| life.path(0).is_some() && life.path(1) == Some(moved);
        let direct = life.run_until(Duration::from_secs(10), is_direct);
        assert!(direct.is_some_and(|time| time <= Duration::from_millis(2700)), "seed {seed}: {direct:?}");
        life.run(Duration::from_secs(3));
        for at in 0..2 {
            let pause = life.longest_pause(at, began);
            assert!(pause <= Duration::from_secs(1), "seed {seed}: {pause:?}");
        }
    }
}

// Keeping.

#[test]
fn a_binding_that_dies_in_an_idle_time_shortens_the_next_ones() {
    for expiry in [10, 14, 18, 21] {
        let nat = Nat::new("203.0.113.1", expiry);
        let mut life = Life::direct(["10.0.0.2:4000", OTHER], [Some(nat), None], expiry);
        life.run(Duration::from_secs(300));
        let port = life.hosts[0].nat.as_ref().unwrap().port;
        life.run(Duration::from_secs(1800));
        assert_eq!(life.hosts[0].nat.as_ref().unwrap().port, port, "{expiry} s: it lives ever since");
        let checks = &life.hosts[0].checks;
        let pause = checks[checks.len() - 1].0 - checks[checks.len() - 2].0;
        assert!(pause >= KEEP_ALIVE_LEAST.mul_f32(0.8) && pause.as_secs() < expiry, "{expiry} s: {pause:?}");
    }
}

#[test]
fn an_idle_path_costs_less_than_fifty_kilobytes_an_hour() {
    let nat = Nat::new("203.0.113.1", 30);
    let mut life = Life::direct(["10.0.0.2:4000", OTHER], [Some(nat), None], 1);
    life.run(Duration::from_secs(120));
    let before: usize = life.hosts.iter().map(|host| host.bytes).sum();
    life.run(Duration::from_secs(3600));
    let bytes = life.hosts.iter().map(|host| host.bytes).sum::<usize>() - before;
    assert!(bytes <= 50_000, "{bytes}");
}

// Many.

/// Agents that each know eight addresses where nobody answers.
fn crowd(size: u16) -> (Agents<u16>, std::time::Instant) {
    let now = beginning();
    let mut agents = Agents::new(now);
    for at in 0..size {
        let mut seed = [7; 32];
        seed[..2].copy_from_slice(&at.to_be_bytes());
        let config = Config { key: super::CheckKey::agree(&seed, &seed), role: Role::Controlling, seed };
        agents.insert(at, Agent::new(config, now), now);
        agents.tell(&at, now, |agent| {
            let named = (1..=8)
                .map(|port| Candidate { kind: CandidateKind::Host, addr: ([198, 51, 100, 9], 256 * port + at).into() });
            agent.set_local(vec![host(ONE)], now);
            agent.set_remote(named.collect(), now);
        });
    }
    (agents, now)
}

#[test]
fn a_process_sends_no_more_checks_than_its_budget_and_every_agent_gets_its_share() {
    let (mut agents, start) = crowd(200);
    let (mut now, mut times, mut shares) = (start, Vec::new(), std::collections::BTreeMap::new());
    while now < start + Duration::from_secs(4) {
        while let Some(transmit) = agents.poll_transmit() {
            times.push(now);
            *shares.entry(transmit.to.port() % 256).or_insert(0) += 1;
        }
        while agents.poll_event().is_some() {}
        now = agents.poll_timeout().unwrap();
        agents.handle_timeout(now);
    }
    let most = (CHECKS_PER_SECOND + CHECKS_AT_ONCE) as usize;
    for (at, first) in times.iter().enumerate() {
        let within = times[at..].iter().take_while(|time| **time < *first + Duration::from_secs(1)).count();
        assert!(within <= most, "{within} in a second");
    }
    assert!(times.len() >= 4 * CHECKS_PER_SECOND as usize, "{}", times.len());
    let (least, largest) = (shares.values().min().unwrap(), shares.values().max().unwrap());
    assert!(shares.len() == 200 && largest - least <= 1, "{least} to {largest}");
}

#[test]
fn one_link_alone_feels_nothing_of_the_budget() {
    let (mut agents, start) = crowd(1);
    let mut sent = Vec::new();
    let mut now = start;
    while now < start + Duration::from_secs(1) {
        sent.extend(std::iter::from_fn(|| agents.poll_transmit()).map(|_| now - start));
        now = agents.poll_timeout().unwrap();
        agents.handle_timeout(now);
    }
    let (mut alone, _) = (Vec::new(), ());
    let mut agent = Agent::new(Config { key: key(1), role: Role::Controlling, seed: [7; 32] }, start);
    agent.set_local(vec![host(ONE)], start);
    agent.set_remote(
        (1..=8)
            .map(|port| Candidate { kind: CandidateKind::Host, addr: ([198, 51, 100, 9], 256 * port).into() })
            .collect(),
        start,
    );
    let mut now = start;
    while now < start + Duration::from_secs(1) {
        alone.extend(std::iter::from_fn(|| agent.poll_transmit()).map(|_| now - start));
        now = agent.poll_timeout().unwrap();
        agent.handle_timeout(now);
    }
    assert_eq!(sent, alone);
}

#[test]
fn a_path_that_is_taken_is_looked_after_while_a_crowd_waits_for_its_turn() {
    let (mut agents, start) = crowd(300);
    let other = 0xFFFF;
    let configs = [(Role::Controlling, 1), (Role::Controlled, 2)].map(|(role, seed)| Config {
        key: key(1),
        role,
        seed: [seed; 32],
    });
    let [ours, theirs] = configs;
    let (mut now, mut far) = (start, Agent::new(theirs, start));
    agents.insert(other, Agent::new(ours, start), start);
    agents.tell(&other, now, |agent| {
        agent.set_local(vec![host(ONE)], now);
        agent.set_remote(vec![host(OTHER)], now);
    });
    far.set_local(vec![host(OTHER)], now);
    far.set_remote(vec![host(ONE)], now);
    let (mut taken, mut asked) = (None, None);
    while asked.is_none() && now < start + Duration::from_secs(30) {
        while let Some(transmit) = agents.poll_transmit().filter(|_| asked.is_none()) {
            if transmit.to != addr(OTHER) {
                continue;
            }
            if taken.is_some_and(|taken| now > taken + Duration::from_secs(1)) {
                asked = Some(now);
            }
            far.handle_packet(addr(ONE), &transmit.bytes, now);
            while let Some(back) = far.poll_transmit() {
                agents.handle_packet(addr(OTHER), &back.bytes, now);
            }
        }
        while let Some((whose, event)) = agents.poll_event() {
            assert_eq!((whose, event == Event::PathChanged(None)), (other, false));
            taken = Some(now);
        }
        now = agents.poll_timeout().unwrap();
        agents.handle_timeout(now);
        if taken.is_some_and(|taken| now > taken + Duration::from_secs(1)) {
            // From now on something is sent and nothing heard.
            agents.tell(&other, now, |agent| agent.on_sent(now));
        }
    }
    let waited = asked.zip(taken).map(|(asked, taken)| asked - taken - Duration::from_secs(1));
    assert!(waited.is_some_and(|waited| waited <= SUSPICION + Duration::from_millis(50)), "{waited:?}");
}

#[test]
fn a_packet_goes_to_the_one_agent_that_it_is_for() {
    let (mut agents, now) = crowd(100);
    let sent: Vec<_> = std::iter::from_fn(|| agents.poll_transmit()).collect();
    assert!(!sent.is_empty());
    for check in sent.iter().take(20) {
        let whose = check.to.port() % 256;
        let seed = {
            let mut seed = [7; 32];
            seed[..2].copy_from_slice(&whose.to_be_bytes());
            seed
        };
        let mut far = Agent::new(
            Config { key: super::CheckKey::agree(&seed, &seed), role: Role::Controlled, seed: [9; 32] },
            now,
        );
        assert_eq!(far.handle_packet(addr(ONE), &check.bytes, now), Handled::Check);
        let back: Vec<_> = std::iter::from_fn(|| far.poll_transmit()).collect();
        let answer = back.iter().find(|transmit| super::class(&transmit.bytes) == super::Class::Success).unwrap();
        assert_eq!(agents.handle_packet(check.to, &answer.bytes, now), (Some(whose), Handled::Answer));
        far.set_local(vec![host(OTHER)], now);
        far.set_remote(vec![host(ONE)], now);
        let request = std::iter::from_fn(|| far.poll_transmit()).chain(back.clone());
        let request =
            request.into_iter().find(|transmit| super::class(&transmit.bytes) == super::Class::Request).unwrap();
        assert_eq!(agents.handle_packet(check.to, &request.bytes, now), (Some(whose), Handled::Check));
    }
    let mut stranger = Agent::new(Config { key: key(99), role: Role::Controlled, seed: [9; 32] }, now);
    stranger.set_local(vec![host(OTHER)], now);
    stranger.set_remote(vec![host(ONE)], now);
    let check = stranger.poll_transmit().unwrap();
    assert_eq!(agents.handle_packet(addr(OTHER), &check.bytes, now), (None, Handled::Ignored(Ignored::NotOurs)));
}

#[test]
fn a_removed_agent_is_told_nothing_and_says_nothing() {
    let (mut agents, now) = crowd(3);
    while agents.poll_transmit().is_some() {}
    for at in 0..3 {
        agents.remove(&at);
    }
    assert!(agents.is_empty() && agents.poll_timeout().is_none());
    agents.handle_timeout(now + Duration::from_secs(60));
    assert!(agents.poll_transmit().is_none() && agents.poll_event().is_none());
}
