//! The path machines in random worlds: networks behind networks, and what befalls them, in virtual time.
//!
//! A world follows from its seed alone. What must come of it is said by an oracle that looks at nothing but the topology
//! (`sim/verdict.rs`). `PEERFLEET_WORLD=<seed> cargo test -p peerfleet-proto --test worlds a_named_world -- --nocapture` lives one
//! again and tells it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::Write as _,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use peerfleet_proto::path::{
    PACE, ROUND_MAX, ROUND_MIN, UPGRADE,
    direct::{GRACE, KEEP_ALIVE, SUSPICION},
    search::{PAUSES, SETTLE, round::ROUND},
};

#[path = "sim/chance.rs"]
mod chance;
#[path = "sim/clock.rs"]
mod clock;
#[path = "sim/internet.rs"]
mod internet;
#[path = "sim/nat.rs"]
mod nat;
#[path = "sim/peer.rs"]
mod peer;
#[path = "sim/seeker.rs"]
mod seeker;
#[path = "sim/verdict.rs"]
mod verdict;
#[path = "sim/world.rs"]
mod world;

use chance::Fault;
use clock::Dice;
use internet::{CALM, Families, Internet, Router, WORLD, Weather};
use nat::{FILTERS, Filter, MAPPINGS, Mapping, Nat};
use verdict::{Aim, Verdict};
use world::{RELAY_NOTICED, World};

/// How many random worlds are lived through.
const WORLDS: u64 = 20_000;

/// Time in which a path that carries nothing is given up: a keep-alive interval, the grace, and round trips.
const DETECTION: Duration = Duration::from_secs(KEEP_ALIVE.as_secs() + GRACE.as_secs() + 4);

/// Time in which a possible path is found once both sides look for it: signalling, STUN and a burst, or the round after it.
const FOUND: Duration = Duration::from_secs(10);

/// The same where packets are lost, up to one in five: up to four rounds.
const FOUND_DESPITE_LOSS: Duration = Duration::from_secs(80);

/// Time in which a search has made its first round, from when both sides look for a path.
const FIRST_ROUND: Duration = Duration::from_secs(SETTLE.as_secs() + ROUND.as_secs() + 5);

/// Time in which it has made all its rounds.
const ALL_ROUNDS: Duration = Duration::from_secs(FIRST_ROUND.as_secs() + PAUSES[0].as_secs() + PAUSES[1].as_secs());

/// Longest time for which a side hears nothing while the relay is there: a machine that roams and is told so 5 s later. A path
/// that dies beneath traffic costs half of it in the worst of worlds.
const SILENCE: Duration = Duration::from_secs(7);

/// Longest time for which a side hears nothing after a router restarted, in 95 of 100 cases: in whatever weather, with packets sent
/// every 100 ms.
const PAUSE_AFTER_RESTART: Duration = Duration::from_secs(1);

/// Longest time for which a side hears nothing after UDP was blocked, in every case.
const PAUSE_WITHOUT_UDP: Duration = Duration::from_millis(2500);

/// How long a router remembers a flow at least for an idle path through it to outlive the relay, however long that is gone.
/// Through others it outlives the relay for [`ALONE`]: idle paths are kept alive ever less often until one is lost, and a
/// router's new port is told by way of the relay.
const NAT_MEMORY: Duration = Duration::from_secs(30);

/// See [`NAT_MEMORY`].
const ALONE: Duration = Duration::from_secs(120);

/// Loss, in percent, up to which no path that works is given up.
const HARMLESS_LOSS: u64 = 5;

/// What the first phase of every world is called.
const BEGINNING: &str = "beginning";

/// What was seen of one fault, or of the beginning.
struct Phase {
    kind: &'static str,
    verdict: Verdict,
    /// No packet was lost by chance.
    is_calm: bool,
    /// Rounds of a search had failed before, in what it was then.
    is_spent: bool,
    /// Both sides came to have a direct path.
    direct: bool,
    /// When the last side found its path.
    found: Option<Duration>,
    /// Longest time for which one side heard nothing, if both sent all the while.
    pause: Option<Duration>,
}

/// What was seen of one world.
struct Life {
    phases: Vec<Phase>,
    lived: Duration,
    sent: u64,
    peak: usize,
}

#[test]
fn twenty_thousand_worlds_end_as_the_oracle_says() {
    let (next, lives, failures) = (AtomicU64::new(0), Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let seed = next.fetch_add(1, Ordering::Relaxed)
                    && seed < WORLDS
                {
                    match lived(seed, false) {
                        Ok(life) => lives.lock().unwrap().push(life),
                        Err(why) => failures.lock().unwrap().push((seed, why)),
                    }
                }
            });
        }
    });
    let (lives, mut failures) = (lives.into_inner().unwrap(), failures.into_inner().unwrap());
    print(&figures(&lives));
    failures.sort_unstable();
    let told: Vec<_> = failures.iter().take(8).map(|(seed, why)| format!("world {seed}: {why}")).collect();
    assert!(failures.is_empty(), "{} of {WORLDS} worlds failed:\n{}", failures.len(), told.join("\n"));
    assert_searches_keep_their_odds(&lives);
    let [restarts, blocked] = ["router restarts", "UDP blocked"].map(|kind| pauses(&lives, kind));
    assert!(restarts[restarts.len() * 95 / 100] <= PAUSE_AFTER_RESTART);
    assert!(blocked[blocked.len() - 1] <= PAUSE_WITHOUT_UDP);
}

/// What searches promise: each round finds a port with the odds of [`Aim::odds`], and rounds that miss are made again. Rounds that
/// were made in vain, while nothing passed, are not made again for what passes now. Where both routers count, the one try is lost to
/// whatever else they pass meanwhile: that is told, and held to nothing.
fn assert_searches_keep_their_odds(lives: &[Life]) {
    let searches = |aim| {
        let phases = lives.iter().flat_map(|life| &life.phases);
        phases.filter(move |phase| phase.verdict == Verdict::Searched(aim) && !phase.is_spent)
    };
    // Where packets are lost, or a router counted on meanwhile, the second round probes other ports as well.
    for (aim, odds) in [(Aim::Next, Aim::All.odds()), (Aim::Block, Aim::Block.odds()), (Aim::All, Aim::All.odds())] {
        assert_odds(searches(aim).map(|phase| phase.direct), odds, &format!("{aim:?}, all rounds"));
    }
    let calm = |aim| searches(aim).filter(|phase| phase.kind == BEGINNING && phase.is_calm);
    let at_once = |phase: &Phase| phase.found.is_some_and(|found| found <= FIRST_ROUND);
    assert_odds(calm(Aim::Next).map(at_once), Aim::Next.odds(), "Next, first round");
    assert_odds(calm(Aim::All).map(at_once), Aim::All.odds(), "All, first round");
}

fn assert_odds(successes: impl Iterator<Item = bool> + Clone, odds: f64, what: &str) {
    let (tries, missed) = (successes.clone().count(), successes.filter(|success| !success).count());
    let most = most_failures(tries, odds);
    assert!(missed <= most, "{what}: {missed} of {tries} missed, {most} are to be expected at most");
}

/// The most failures among so many tries that are chance: there are more once in a million times (binomial distribution).
fn most_failures(tries: usize, odds: f64) -> usize {
    let mut probability = (0..tries).fold(1.0, |all, _| all * odds);
    let (mut sum, mut failures) = (probability, 0);
    while 1.0 - sum > 1e-6 && failures < tries {
        probability *= (1.0 - odds) / odds * (tries - failures) as f64 / (failures + 1) as f64;
        failures += 1;
        sum += probability;
    }
    failures
}

#[test]
#[expect(clippy::disallowed_methods, reason = "tests may be told what to do by their environment")]
fn a_named_world_ends_as_the_oracle_says() {
    let seed = std::env::var("PEERFLEET_WORLD").map_or(0, |seed| seed.parse().unwrap());
    lived(seed, true).unwrap_or_else(|why| panic!("world {seed}: {why}"));
}

#[test]
fn a_world_follows_from_its_seed() {
    for seed in 0..20 {
        let [mut one, mut other] = [String::new(), String::new()];
        live(seed, &mut one).unwrap();
        live(seed, &mut other).unwrap();
        assert_eq!(one, other);
    }
}

// Who can meet.

#[test]
fn every_pair_of_routers_ends_as_the_oracle_says() {
    let behind_nat = MAPPINGS.iter().flat_map(|mapping| FILTERS.map(|filter| Nat::new(*mapping, filter)));
    let in_the_open = FILTERS.map(|filter| Nat::new(Mapping::None, filter));
    let kinds: Vec<_> = behind_nat.chain(in_the_open).collect();
    for (one, other) in kinds.iter().flat_map(|one| kinds.iter().map(move |other| (*one, *other))) {
        for seed in 0..8 {
            let mut world = apart([one, other], seed);
            let context = format!("seed {seed}: {one:?} and {other:?}");
            assert_eq!(world.verdict(), by_the_book(one, other), "{context}");
            match world.verdict() {
                verdict @ (Verdict::Direct | Verdict::Searched(_)) => {
                    let time = if verdict == Verdict::Direct { FOUND } else { ALL_ROUNDS };
                    assert!(world.run_until(time, World::both_direct).is_some(), "{context}");
                    world.run_for(Duration::from_secs(40));
                    assert!(world.both_direct() && world.paths_carry(), "{context}");
                }
                Verdict::Unseen | Verdict::BothHard | Verdict::Severed => {
                    world.run_for(Duration::from_secs(40));
                    assert!(world.none_direct(), "the oracle is wrong: {context}");
                }
                Verdict::AgainstOdds => {}
            }
        }
    }
}

/// What is known of single NATs (RFC 5128 §3, and tables of many a hole puncher): written down here a second time.
fn by_the_book(one: Nat, other: Nat) -> Verdict {
    let strictness = |nat: Nat| match (nat.mapping, nat.filter) {
        (Mapping::None | Mapping::Independent, Filter::Independent | Filter::Address) => "cone",
        (Mapping::None | Mapping::Independent, Filter::Port) => "port-restricted",
        (Mapping::Address, Filter::Independent) => "symmetric by address, open",
        (Mapping::Address, Filter::Address) => "symmetric by address, restricted",
        (Mapping::Port, Filter::Independent) => "symmetric, open",
        (Mapping::Port, Filter::Address) => "symmetric, restricted",
        (Mapping::Address, Filter::Port) => "symmetric by address, port-restricted",
        (Mapping::Port, Filter::Port) => "symmetric, port-restricted",
    };
    match [strictness(one), strictness(other)] {
        [a, b] if !a.starts_with("symmetric") && !b.starts_with("symmetric") => Verdict::Direct,
        ["cone", _] | [_, "cone"] => Verdict::Direct,
        ["port-restricted", hard] | [hard, "port-restricted"] if hard.starts_with("symmetric by address") => {
            Verdict::Unseen
        }
        ["port-restricted", _] | [_, "port-restricted"] => Verdict::Searched(Aim::All),
        ["symmetric by address, open", b] if !b.ends_with("port-restricted") => Verdict::Direct,
        [a, "symmetric by address, open"] if !a.ends_with("port-restricted") => Verdict::Direct,
        ["symmetric, open", "symmetric by address, restricted"] => Verdict::Direct,
        ["symmetric by address, restricted", "symmetric, open"] => Verdict::Direct,
        ["symmetric, restricted", "symmetric by address, restricted"] => Verdict::Searched(Aim::All),
        ["symmetric by address, restricted", "symmetric, restricted"] => Verdict::Searched(Aim::All),
        [a, b] if a.starts_with("symmetric by address") != b.starts_with("symmetric by address") => {
            Verdict::AgainstOdds
        }
        _ => Verdict::BothHard,
    }
}

#[test]
fn two_on_one_machine_meet_though_udp_is_blocked() {
    let mut internet = calm(1);
    let realm = internet.add_site(WORLD, Router { udp: false, ..Router::new(Nat::SYMMETRIC) });
    let machine = internet.add_machine(realm, Families::V4);
    let mut world = World::new(internet, [machine; 2], Dice::new(1));
    assert_direct(&mut world);
}

#[test]
fn two_behind_one_router_meet_in_their_own_network() {
    for (seed, filter) in (1..).zip(FILTERS) {
        let mut internet = calm(seed);
        let realm = internet.add_site(WORLD, Router::new(Nat::new(Mapping::Port, filter)));
        let machines = [0; 2].map(|_| internet.add_machine(realm, Families::V4));
        let mut world = World::new(internet, machines, Dice::new(seed));
        assert_direct(&mut world);
        for at in 0..2 {
            let there = world.internet.addresses(world.peers[1 - at].machine);
            assert!(there.contains(&world.peers[at].path().unwrap().ip()), "{filter:?}");
        }
    }
}

#[test]
fn guests_who_may_not_talk_to_each_other_meet_only_by_hairpin() {
    for hairpin in [false, true] {
        let mut internet = calm(2);
        let realm = internet.add_site(WORLD, Router::new(Nat { hairpin, ..Nat::PORT_RESTRICTED }));
        internet.realms[realm].isolated = true;
        let machines = [0; 2].map(|_| internet.add_machine(realm, Families::V4));
        let mut world = World::new(internet, machines, Dice::new(2));
        assert_eq!(world.verdict(), if hairpin { Verdict::Direct } else { Verdict::Severed });
        if hairpin { assert_direct(&mut world) } else { assert_relayed(&mut world) }
    }
}

#[test]
fn two_homes_of_one_carrier_meet_only_by_its_hairpin() {
    for hairpin in [false, true] {
        let mut internet = calm(3);
        let carrier = internet.add_site(WORLD, Router::new(Nat { hairpin, ..Nat::FULL_CONE }));
        let machines = [0; 2].map(|_| {
            let home = internet.add_realm(carrier, Router::new(Nat::PORT_RESTRICTED), [192, 168, 1]);
            internet.add_machine(home, Families::V4)
        });
        let mut world = World::new(internet, machines, Dice::new(3));
        if hairpin { assert_direct(&mut world) } else { assert_relayed(&mut world) }
    }
}

#[test]
fn homes_of_two_carriers_meet_through_four_routers_and_one_prefix() {
    let mut internet = calm(4);
    let machines = [0; 2].map(|_| {
        let carrier = internet.add_site(WORLD, Router::new(Nat::PORT_RESTRICTED));
        let home = internet.add_realm(carrier, Router::new(Nat::PORT_RESTRICTED), [192, 168, 1]);
        internet.add_machine(home, Families::V4)
    });
    assert_direct(&mut World::new(internet, machines, Dice::new(4)));
}

#[test]
fn one_behind_the_others_router_reaches_it_there() {
    let mut internet = calm(5);
    let outer = internet.add_site(WORLD, Router { udp: false, ..Router::new(Nat::SYMMETRIC) });
    let inner = internet.add_site(outer, Router::new(Nat::SYMMETRIC));
    let machines = [outer, inner].map(|realm| internet.add_machine(realm, Families::V4));
    assert_direct(&mut World::new(internet, machines, Dice::new(5)));
}

#[test]
fn two_with_ipv6_alone_meet_through_firewalls() {
    let [mut world, mut half] = [[Families::V6; 2], [Families::V6, Families::V4]].map(|families| {
        let mut internet = calm(6);
        let machines = families.map(|families| {
            let realm = internet.add_site(WORLD, Router::new(Nat::SYMMETRIC));
            internet.add_machine(realm, families)
        });
        World::new(internet, machines, Dice::new(6))
    });
    assert_direct(&mut world);
    assert_relayed(&mut half);
}

#[test]
fn ipv6_makes_two_hard_routers_easy_and_leaves_them_hard_when_it_breaks() {
    let mut internet = calm(7);
    let machines = [0; 2].map(|_| {
        let realm = internet.add_site(WORLD, Router::new(Nat::SYMMETRIC));
        internet.add_machine(realm, Families::Both)
    });
    let mut world = World::new(internet, machines, Dice::new(7));
    assert_direct(&mut world);
    assert!(world.peers.iter().all(|peer| peer.path().unwrap().is_ipv6()));
    world.internet.realms[1].router.ipv6 = false;
    world.run_for(DETECTION);
    assert_relayed(&mut world);
}

#[test]
fn blocked_udp_leaves_the_relay_and_what_passes_again_is_found() {
    let mut world = apart([Nat::PORT_RESTRICTED; 2], 8);
    world.internet.realms[1].router.udp = false;
    assert_relayed(&mut world);
    world.internet.realms[1].router.udp = true;
    assert!(world.run_until(Duration::from_secs(120), World::both_direct).is_some());
}

#[test]
fn two_hard_routers_leave_the_relay_and_are_not_troubled() {
    let mut world = apart([Nat::SYMMETRIC; 2], 9);
    world.run_for(Duration::from_secs(600));
    let before = world.peers.each_ref().map(|peer| peer.audit.sent);
    world.run_for(Duration::from_secs(3600));
    for (peer, before) in world.peers.iter().zip(before) {
        // 12 rounds of 3 pairs and what they bring, and 144 questions to the relay.
        assert!(peer.audit.sent - before <= 600, "{} packets in an hour", peer.audit.sent - before);
    }
    assert!(world.none_direct());
}

#[test]
fn a_hard_router_meets_one_that_hears_new_ports_at_once_and_another_by_search() {
    for filter in FILTERS {
        let mut world = apart([Nat::SYMMETRIC, Nat::new(Mapping::Independent, filter)], 10);
        let found = world.run_until(FIRST_ROUND, World::both_direct).unwrap();
        let is_searched = world.verdict() == Verdict::Searched(Aim::All);
        assert_eq!((is_searched, found > SETTLE), (filter == Filter::Port, filter == Filter::Port), "{found:?}");
        assert!(world.paths_carry());
    }
}

#[test]
fn a_path_that_a_search_found_is_kept_for_an_hour_and_found_again_when_the_router_forgets_it() {
    for seed in 0..10 {
        let mut world = apart([Nat::SYMMETRIC, Nat::PORT_RESTRICTED], seed);
        assert!(world.run_until(ALL_ROUNDS, World::both_direct).is_some(), "seed {seed}");
        let before = world.peers.each_ref().map(|peer| peer.changes.len());
        world.run_for(Duration::from_secs(3600));
        assert_eq!(world.peers.each_ref().map(|peer| peer.changes.len()), before, "seed {seed}");
        world.internet.restart_router(0, seed % 2 == 0);
        world.run_for(DETECTION);
        assert!(world.run_until(ALL_ROUNDS, World::both_direct).is_some() && world.paths_carry(), "seed {seed}");
    }
}

#[test]
fn two_dozen_bridges_of_containers_hide_no_path() {
    for seed in 0..20 {
        let mut internet = calm(seed);
        let machines = [0; 2].map(|_| {
            let realm = internet.add_site(WORLD, Router::new(Nat::PORT_RESTRICTED));
            internet.add_machine(realm, Families::V4)
        });
        for machine in &mut internet.machines {
            machine.bridges = (0..24).map(|at| [172, 17 + at % 12, at / 12, 1].into()).collect();
        }
        assert_direct(&mut World::new(internet, machines, Dice::new(seed)));
    }
}

// What befalls a path.

#[test]
fn easy_pairs_are_direct_within_half_a_second_of_signalling() {
    let mut times: Vec<_> = (0..300)
        .map(|seed| {
            let mut world = apart([Nat::PORT_RESTRICTED; 2], seed);
            let signalled = (world.relay_delay[0] + world.relay_delay[1]) * 2;
            let found = world.run_until(FOUND, World::both_direct).unwrap();
            found.saturating_sub(signalled)
        })
        .collect();
    times.sort_unstable();
    assert!(times[285] <= Duration::from_millis(500), "95 of 100 within {:?}", times[285]);
}

#[test]
fn checks_that_overtake_the_answer_to_an_offer_are_not_lost() {
    for seed in 0..100 {
        let mut world = apart([Nat::OPEN, Nat::PORT_RESTRICTED], seed);
        let one_way = Duration::from_millis(world.internet.weather.delay_ms.1);
        let signal = world.relay_delay[0] + world.relay_delay[1];
        let found = world.run_until(FOUND, |world| world.peers[0].path().is_some()).unwrap();
        // The other side's first check came, we know the key, and ours is answered.
        let most = signal + signal.max(one_way) + one_way * 2 + PACE * 4;
        assert!(found <= most, "seed {seed}: {found:?} rather than {most:?}");
    }
}

#[test]
fn a_router_that_restarts_costs_a_bounded_silence() {
    for seed in 0..60 {
        let mut world = direct([Nat::PORT_RESTRICTED; 2], seed);
        world.set_traffic(true);
        world.run_for(Duration::from_secs(5));
        world.forget_pauses();
        world.internet.restart_router(1, seed % 2 == 0);
        world.run_for(DETECTION * 2);
        assert!(world.longest_pause() <= SILENCE, "seed {seed}: {:?}", world.longest_pause());
        assert!(world.both_direct() && world.paths_carry(), "seed {seed}");
    }
}

#[test]
fn one_that_roams_is_heard_by_the_relay_and_soon_directly() {
    for seed in 0..60 {
        let mut world = direct([Nat::PORT_RESTRICTED; 2], seed);
        let realm = world.internet.add_site(WORLD, Router::new(Nat::ADDRESS_RESTRICTED));
        let before = world.peers[1].path();
        world.set_traffic(true);
        world.forget_pauses();
        world.roam(0, realm, Families::V4, Duration::ZERO);
        let found = world.run_until(DETECTION, |world| world.both_direct() && world.peers[1].path() != before);
        assert!(found.is_some() && world.paths_carry(), "seed {seed}");
        assert!(world.longest_pause() <= SILENCE, "seed {seed}: {:?}", world.longest_pause());
    }
}

#[test]
fn a_dead_path_is_cleared_in_bounded_time_and_comes_back() {
    for seed in 0..200 {
        let mut dice = Dice::new(seed);
        let nats = std::iter::repeat_with(|| [0; 2].map(|_| chance::nat(&mut dice)));
        let pairs = nats.map(|nats| apart(nats, seed));
        let mut world = pairs.into_iter().find(|world| world.verdict() == Verdict::Direct).unwrap();
        assert_direct(&mut world);
        world.run_for(dice.millis(2000, 20_000));
        world.set_traffic(seed % 2 == 0);
        world.run_for(Duration::from_secs(2));
        world.internet.down = true;
        let idle = if world.traffic { SUSPICION.max(Duration::from_secs(1)) } else { KEEP_ALIVE };
        // What is under way still arrives; four round trips may be longer than the grace.
        let slack = Duration::from_millis(world.internet.weather.delay_ms.1 * 10);
        assert!(world.run_until(idle + GRACE + slack, World::none_direct).is_some(), "not cleared: seed {seed}");
        world.run_for(dice.millis(0, 60_000));
        assert!(world.none_direct(), "a path through nothing: seed {seed}");
        world.internet.down = false;
        assert!(world.run_until(Duration::from_secs(100), World::both_direct).is_some(), "not back: seed {seed}");
    }
}

#[test]
fn routers_that_restart_at_the_same_time_delay_a_path_and_do_not_end_it() {
    for seed in 0..100 {
        let mut world = direct([Nat::ADDRESS_RESTRICTED, Nat::PORT_RESTRICTED], seed);
        let before = world.peers.each_ref().map(|peer| peer.changes.len());
        (1..=2).for_each(|realm| world.internet.restart_router(realm, false));
        let is_new = |world: &World| world.peers.iter().zip(before).all(|(peer, before)| peer.changes.len() > before);
        // A keep-alive interval, the grace, and the refresh of the outer address with its way to the other side.
        let found = world.run_until(Duration::from_secs(45), |world| world.both_direct() && is_new(world));
        assert!(found.is_some() && world.paths_carry(), "seed {seed}");
    }
}

#[test]
fn two_that_roam_at_once_meet_again_within_six_seconds() {
    for seed in 0..60 {
        let mut world = direct([Nat::PORT_RESTRICTED; 2], seed);
        let before = world.peers.each_ref().map(|peer| peer.changes.len());
        for at in 0..2 {
            let realm = world.internet.add_site(WORLD, Router::new(Nat::PORT_RESTRICTED));
            world.roam(world.peers[at].machine, realm, Families::V4, Duration::ZERO);
        }
        let is_new = |world: &World| world.peers.iter().zip(before).all(|(peer, before)| peer.changes.len() > before);
        let found = world.run_until(Duration::from_secs(6), |world| world.both_direct() && is_new(world));
        assert!(found.is_some() && world.paths_carry(), "seed {seed}");
    }
}

#[test]
fn a_path_outlives_the_relay_for_an_hour() {
    for seed in 0..10 {
        let mut world = direct([Nat::PORT_RESTRICTED; 2], seed);
        world.set_traffic(seed % 2 == 0);
        world.forget_pauses();
        world.relay_gone();
        let before = world.peers.each_ref().map(|peer| peer.changes.len());
        world.run_for(Duration::from_secs(3600));
        assert_eq!(world.peers.each_ref().map(|peer| peer.changes.len()), before, "seed {seed}");
        assert!(!world.traffic || world.longest_pause() < Duration::from_secs(1), "seed {seed}");
        world.relay_back();
        world.run_for(Duration::from_secs(60));
        assert!(world.both_direct() && world.paths_carry(), "seed {seed}");
    }
}

#[test]
fn two_that_lost_each_other_at_different_times_meet_again() {
    // Neither hears anybody that it did not send to, and both forget within a round: what one sends in its rounds never arrives,
    // unless the loss of the one makes the other look at the same time. Addresses stay as they are, and are no news.
    for seed in 0..20 {
        let mut world = direct([Nat::PORT_RESTRICTED, Nat::new(Mapping::None, Filter::Port)], seed);
        world.sleep(1);
        world.run_for(Duration::from_secs(340 + 17 * seed));
        world.wake(1);
        let found = world.run_until(DETECTION + FOUND, |world| world.both_direct() && world.peers[0].changes.len() > 2);
        assert!(found.is_some() && world.paths_carry(), "seed {seed}");
    }
}

#[test]
fn a_loss_of_five_percent_moves_no_path_in_an_hour() {
    for seed in 0..20 {
        let mut world = direct([Nat::PORT_RESTRICTED; 2], seed);
        world.internet.weather = Weather { loss_percent: 5, duplicate_percent: 1, delay_ms: (10, 60) };
        world.run_for(UPGRADE);
        let before = world.peers.each_ref().map(|peer| peer.changes.len());
        world.run_for(Duration::from_secs(3600));
        assert_eq!(world.peers.each_ref().map(|peer| peer.changes.len()), before, "seed {seed}");
    }
}

#[test]
fn packets_that_overtake_each_other_by_two_hundred_milliseconds_end_no_path() {
    for seed in 0..20 {
        let mut world = direct([Nat::PORT_RESTRICTED; 2], seed);
        world.set_traffic(true);
        world.internet.weather = Weather { duplicate_percent: 10, delay_ms: (10, 210), ..CALM };
        world.run_for(Duration::from_secs(600));
        let has_lost = |peer: &peer::Peer| peer.changes.iter().any(|(_, path)| path.is_none());
        assert!(!world.peers.iter().any(has_lost) && world.paths_carry(), "seed {seed}");
    }
}

#[test]
fn jitter_between_paths_that_are_alike_swings_neither_side() {
    for seed in 0..60 {
        let mut internet = Internet::new(Weather { delay_ms: (20, 22), ..CALM }, Dice::new(seed));
        let machines = [0; 2].map(|_| internet.add_machine(WORLD, Families::Both));
        let mut world = World::new(internet, machines, Dice::new(seed));
        world.run_for(Duration::from_secs(1800));
        assert!(world.peers.iter().all(|peer| peer.changes.len() <= 2), "seed {seed}");
    }
}

#[test]
fn an_idle_path_costs_few_packets() {
    let mut world = direct([Nat::PORT_RESTRICTED; 2], 11);
    world.run_for(UPGRADE);
    let before = world.peers.each_ref().map(|peer| peer.audit.sent);
    world.run_for(Duration::from_secs(3600));
    for (peer, before) in world.peers.iter().zip(before) {
        let sent = peer.audit.sent - before;
        // A check or an answer each keep-alive; where paths stand nobody asks the relay how it is seen.
        let most = 3600 / (KEEP_ALIVE.as_secs() * 7 / 8) + 1;
        assert!(sent <= most, "{sent} packets in an hour");
    }
}

fn calm(seed: u64) -> Internet {
    Internet::new(CALM, Dice::new(seed))
}

/// Two machines, each alone behind a router of its own; delays differ from seed to seed.
fn apart(nats: [Nat; 2], seed: u64) -> World {
    let mut dice = Dice::new(seed);
    let least = 1 + dice.below(80);
    let mut internet = Internet::new(Weather { delay_ms: (least, least + 10), ..CALM }, Dice::new(dice.roll()));
    let machines = nats.map(|nat| {
        let realm = internet.add_site(WORLD, Router::new(nat));
        internet.add_machine(realm, Families::V4)
    });
    World::new(internet, machines, dice)
}

/// The same, some time after both are direct.
fn direct(nats: [Nat; 2], seed: u64) -> World {
    let mut world = apart(nats, seed);
    assert_direct(&mut world);
    world.run_for(Duration::from_millis(5000 + 711 * seed));
    world
}

fn assert_direct(world: &mut World) {
    assert!(world.run_until(FOUND, World::both_direct).is_some(), "not direct");
    assert!(world.paths_carry());
}

fn assert_relayed(world: &mut World) {
    world.run_for(Duration::from_secs(60));
    assert!(world.none_direct(), "direct");
}

/// Lives through a world; says what went wrong, with all that was seen.
fn lived(seed: u64, aloud: bool) -> Result<Life, String> {
    let mut story = String::new();
    let life = catch_unwind(AssertUnwindSafe(|| live(seed, &mut story)));
    if aloud {
        print(&story);
    }
    match life {
        Ok(Ok(life)) => Ok(life),
        Ok(Err(why)) => Err(format!("{why}\n{story}")),
        Err(panic) => {
            let why = panic.downcast_ref::<String>().cloned();
            let why = why.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Err(format!("{}\n{story}", why.unwrap_or_default()))
        }
    }
}

fn live(seed: u64, story: &mut String) -> Result<Life, String> {
    let mut dice = Dice::new(seed);
    let (internet, machines) = chance::internet(&mut dice);
    let mut world = World::new(internet, machines, Dice::new(dice.roll()));
    world.set_traffic(dice.percent(50));
    tell(&world, story);
    let mut phases = vec![settled(&mut world, BEGINNING, story)?];
    for _ in 0..dice.below(4) {
        world.run_for(dice.millis(0, 30_000));
        let fault = chance::fault(&mut world);
        writeln!(story, "{:?}: {fault:?}", world.elapsed()).unwrap();
        phases.extend(befall(&mut world, fault, story)?);
    }
    let sent = world.peers.iter().map(|peer| peer.audit.sent).sum();
    let peak = world.peers.iter().map(|peer| peer.audit.peak).max().unwrap();
    Ok(Life { phases, lived: world.elapsed(), sent, peak })
}

fn befall(world: &mut World, fault: Fault, story: &mut String) -> Result<Vec<Phase>, String> {
    world.forget_pauses();
    match fault {
        Fault::RouterRestarts { realm, readdressed } => {
            world.internet.restart_router(realm, readdressed);
            Ok(vec![settled(world, "router restarts", story)?])
        }
        Fault::RouterReplaced { realm, nat } => {
            let router = &mut world.internet.realms[realm].router;
            // Whether it translates at all is a matter of the addresses behind it.
            router.nat = if router.nat.mapping == Mapping::None { router.nat } else { nat };
            world.internet.restart_router(realm, false);
            Ok(vec![settled(world, "router replaced", story)?])
        }
        Fault::UdpBlocked { realm, time } => {
            blocked(world, ["UDP blocked", "UDP unblocked"], time, story, |world, blocked| {
                std::mem::replace(&mut world.internet.realms[realm].router.udp, !blocked)
            })
        }
        Fault::Ipv6Broken { realm, time } => {
            blocked(world, ["IPv6 broken", "IPv6 mended"], time, story, |world, blocked| {
                std::mem::replace(&mut world.internet.realms[realm].router.ipv6, !blocked)
            })
        }
        Fault::Roams { machine, notice } => {
            chance::roam(world, machine, notice);
            world.run_for(notice);
            // What was heard before it was noticed, and while the relay was dialled, is the network's fault.
            world.run_for(world.relay_delay[0].max(world.relay_delay[1]) * 10);
            let pause = world.longest_pause();
            world.forget_pauses();
            let phase = settled(world, "roams", story)?;
            Ok(vec![Phase { pause: phase.pause.map(|later| later.max(pause)), ..phase }])
        }
        Fault::RelayGone { time } => relay_gone(world, time, story),
        Fault::RoamsAlone { machine, time } => {
            world.relay_gone();
            chance::roam(world, machine, Duration::ZERO);
            world.run_for(time);
            world.relay_back();
            world.run_for(RELAY_NOTICED);
            world.forget_pauses();
            Ok(vec![settled(world, "roams without relay", story)?])
        }
        Fault::Sleeps { machine, time } => {
            world.sleep(machine);
            world.run_for(time);
            world.wake(machine);
            world.run_for(Duration::from_secs(1));
            world.forget_pauses();
            Ok(vec![settled(world, "sleeps", story)?])
        }
        Fault::Outage { time } => {
            world.internet.down = true;
            world.run_for(DETECTION);
            honest(world, story)?;
            world.run_for(time);
            world.internet.down = false;
            Ok(vec![settled(world, "outage", story)?])
        }
        Fault::Weather { weather } => {
            world.internet.weather = weather;
            Ok(vec![settled(world, "weather", story)?])
        }
    }
}

/// Something does not pass, and later passes again.
fn blocked(
    world: &mut World,
    [during, after]: [&'static str; 2],
    time: Duration,
    story: &mut String,
    mut block: impl FnMut(&mut World, bool) -> bool,
) -> Result<Vec<Phase>, String> {
    let passed = block(world, true);
    let during = settled(world, during, story)?;
    world.run_for(time);
    block(world, !passed);
    world.forget_pauses();
    Ok(vec![during, settled(world, after, story)?])
}

/// Direct paths do not need the relay.
fn relay_gone(world: &mut World, time: Duration, story: &mut String) -> Result<Vec<Phase>, String> {
    let forgets = |realm: &internet::Realm| realm.router.nat.expiry < NAT_MEMORY;
    let outlives = time <= ALONE || !world.internet.realms.iter().any(forgets);
    let was_direct = world.both_direct() && outlives;
    world.relay_gone();
    world.run_for(time);
    if was_direct && world.internet.weather.loss_percent <= HARMLESS_LOSS {
        if !world.both_direct() {
            tell_changes(world, story);
            return Err("a direct path ended with the relay".to_owned());
        }
        if world.traffic && world.longest_pause() > SILENCE {
            return Err(format!("nothing heard for {:?} without the relay", world.longest_pause()));
        }
        honest(world, story)?;
    }
    world.relay_back();
    world.run_for(RELAY_NOTICED);
    world.forget_pauses();
    Ok(vec![settled(world, "relay back", story)?])
}

/// Waits until all is as the oracle says.
fn settled(world: &mut World, kind: &'static str, story: &mut String) -> Result<Phase, String> {
    let (began, verdict, time_to_find) = (world.now, world.verdict(), time_to_find(world, kind));
    let is_spent = world.peers.iter().any(|peer| peer.seeker.failed() > 0);
    let changes = world.peers.each_ref().map(|peer| peer.changes.len());
    if kind != BEGINNING {
        world.run_for(DETECTION);
    }
    match verdict {
        Verdict::Direct => {
            if world.run_until(time_to_find, World::both_direct).is_none() {
                tell_changes(world, story);
                return Err(format!("{kind}: not direct, though {verdict:?}"));
            }
        }
        // Some are missed, as the odds have it: they are counted when all is over.
        Verdict::Searched(_) => _ = world.run_until(time_to_find + ALL_ROUNDS, World::both_direct),
        Verdict::AgainstOdds | Verdict::Unseen | Verdict::BothHard | Verdict::Severed => {
            world.run_for(DETECTION);
            if verdict == Verdict::Severed && !world.none_direct() {
                tell_changes(world, story);
                return Err(format!("{kind}: direct, though {verdict:?}"));
            }
        }
    }
    let pause = world.traffic.then(|| world.longest_pause());
    honest(world, story)?;
    let new = |at: usize| world.peers[at].changes[changes[at]..].iter();
    let found = (0..2).flat_map(new).filter(|(_, path)| path.is_some()).map(|(at, _)| *at - began).max();
    let direct = verdict == Verdict::Direct || world.both_direct();
    let is_calm = world.internet.weather.loss_percent == 0;
    let elapsed = world.elapsed();
    writeln!(story, "{elapsed:?}: {kind}: {verdict:?}, direct {direct}, found {found:?}, pause {pause:?}").unwrap();
    if pause.is_some_and(|pause| pause > SILENCE) {
        tell_changes(world, story);
        return Err(format!("{kind}: nothing heard for {pause:?}"));
    }
    Ok(Phase { kind, verdict, is_calm, is_spent, direct, found, pause })
}

fn time_to_find(world: &World, kind: &str) -> Duration {
    let found = if world.internet.weather.loss_percent == 0 { FOUND } else { FOUND_DESPITE_LOSS };
    // The sides may lose the path one after the other.
    let lost = if kind == BEGINNING { Duration::ZERO } else { DETECTION };
    // Those that have none look for one in rounds, each pause twice as long as the one before; nobody tells them of a change.
    let since = |peer: &peer::Peer| peer.changes.last().map_or(world.elapsed(), |(at, _)| world.now - *at);
    let idle = world.peers.iter().filter(|peer| peer.path().is_none()).map(since).max();
    found + lost + idle.map_or(Duration::ZERO, |idle| (idle + 2 * ROUND_MIN).min(ROUND_MAX))
}

/// Every path that a side takes carries its packets.
fn honest(world: &mut World, story: &mut String) -> Result<(), String> {
    // Between two looks heavy loss may end a path: then another look.
    if world.paths_carry() || world.paths_carry() {
        return Ok(());
    }
    tell_changes(world, story);
    Err("a path that carries nothing".to_owned())
}

fn tell(world: &World, story: &mut String) {
    let internet = &world.internet;
    writeln!(story, "{:?}, relay {:?}, traffic {}", internet.weather, world.relay_delay, world.traffic).unwrap();
    for (number, realm) in internet.realms.iter().enumerate().skip(1) {
        let (outside, isolated) = (realm.outside, realm.isolated);
        writeln!(story, "realm {number} in {outside}, isolated {isolated}: {:?}", realm.router).unwrap();
    }
    for peer in &world.peers {
        writeln!(story, "peer on machine {}: {:?}", peer.machine, internet.machines[peer.machine]).unwrap();
    }
}

fn tell_changes(world: &World, story: &mut String) {
    tell(world, story);
    for peer in &world.peers {
        let began = world.now - world.elapsed();
        let changes: Vec<_> = peer.changes.iter().map(|(at, path)| (*at - began, path)).collect();
        writeln!(story, "now {:?}, {:?}, changes {changes:?}", world.elapsed(), peer.whereabouts()).unwrap();
        writeln!(story, "search {:?} after {} rounds", peer.seeker.standing(), peer.seeker.failed()).unwrap();
    }
}

// Figures.

/// Prints past the capture of tests: figures are worth reading when all is well too.
fn print(text: &str) {
    let mut stderr = std::io::stderr();
    stderr.write_all(text.as_bytes()).unwrap();
}

fn figures(lives: &[Life]) -> String {
    let mut text = String::new();
    let phases = || lives.iter().flat_map(|life| &life.phases);
    let mut classes: BTreeMap<Verdict, (usize, usize)> = BTreeMap::new();
    for phase in phases() {
        let (all, direct) = classes.entry(phase.verdict).or_default();
        *all += 1;
        *direct += usize::from(phase.direct);
    }
    writeln!(text, "{} worlds, {} phases", lives.len(), phases().count()).unwrap();
    for (verdict, (all, direct)) in classes.iter().rev() {
        let share = 100.0 * *direct as f64 / *all as f64;
        writeln!(text, "  {verdict:?}: {all} phases, direct {direct} ({share:.2} %)").unwrap();
    }
    let mut kinds: Vec<_> = phases().map(|phase| phase.kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    for kind in kinds {
        let possible = phases().filter(|phase| phase.kind == kind && phase.verdict == Verdict::Direct);
        let found = spread(possible.filter_map(|phase| phase.found).collect());
        let pause = spread(pauses(lives, kind));
        writeln!(text, "  {kind}: found {found}; pause {pause}").unwrap();
    }
    text.push_str(&searched(lives));
    let lived = lives.iter().map(|life| life.lived).sum::<Duration>();
    let mean = lives.iter().map(|life| life.sent).sum::<u64>() as f64 / 2.0 / lived.as_secs_f64();
    let peak = lives.iter().map(|life| life.peak).max().unwrap_or_default();
    let lived = lived.as_secs() / 3600;
    writeln!(
        text,
        "  {lived} h lived, {mean:.2} packets of the machines a second and peer, most checks in a second {peak}"
    )
    .unwrap();
    text
}

/// What searches found.
fn searched(lives: &[Life]) -> String {
    let mut text = String::new();
    for aim in [Aim::Next, Aim::Block, Aim::All, Aim::Meet] {
        for name in SEARCHES {
            let phases = || lives.iter().flat_map(|life| &life.phases);
            let of_aim = || phases().filter(|phase| phase.verdict == Verdict::Searched(aim));
            let these = || of_aim().filter(|phase| SEARCHES[circumstances(phase)] == name);
            let (all, direct) = (these().count(), these().filter(|phase| phase.direct).count());
            let first = these().filter(|phase| phase.found.is_some_and(|found| found <= FIRST_ROUND)).count();
            let found = spread(these().filter_map(|phase| phase.found).collect());
            writeln!(text, "  searched, {aim:?}, {name}: {all}, direct {direct}, at once {first}; found {found}")
                .unwrap();
        }
    }
    text
}

/// The circumstances of searches.
const SEARCHES: [&str; 4] = [
    "from the beginning, nothing lost",
    "from the beginning, despite loss",
    "after something befell it",
    "after rounds in vain",
];

fn circumstances(phase: &Phase) -> usize {
    match (phase.kind == BEGINNING, phase.is_calm, phase.is_spent) {
        (true, true, _) => 0,
        (true, false, _) => 1,
        (false, _, false) => 2,
        (false, _, true) => 3,
    }
}

/// The pauses after what is called so, shortest first.
fn pauses(lives: &[Life], kind: &str) -> Vec<Duration> {
    let phases = lives.iter().flat_map(|life| &life.phases).filter(|phase| phase.kind == kind);
    let mut pauses: Vec<_> = phases.filter_map(|phase| phase.pause).collect();
    pauses.sort_unstable();
    pauses
}

fn spread(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let Some(last) = times.len().checked_sub(1) else { return "never".to_owned() };
    let at = |share: usize| times[last * share / 1000].as_secs_f64();
    format!(
        "{} times, median {:.2} s, p95 {:.2} s, p99.9 {:.2} s, most {:.2} s",
        last + 1,
        at(500),
        at(950),
        at(999),
        at(1000)
    )
}
