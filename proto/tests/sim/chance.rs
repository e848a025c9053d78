//! Worlds and misfortunes at random.
//!
//! In: dice. Out: an internet with two machines in it, and things that happen to it. How often each kind comes up is set so that
//! 20,000 worlds have hundreds of every kind.

use std::time::Duration;

use crate::{
    clock::Dice,
    internet::{Families, Internet, Router, WORLD, Weather},
    nat::{FILTERS, Filter, MAPPINGS, Mapping, Nat, PORTS},
    world::World,
};

/// Prefixes that most home networks have: two of them often have the same.
const HOME_PREFIXES: [[u8; 3]; 3] = [[192, 168, 1], [192, 168, 0], [192, 168, 178]];

/// Lifetimes of a mapping, in seconds. RFC 4787 REQ-5 asks for 120 at least; 30 is what Linux has for one way, 20 is the
/// shortest that is common.
const EXPIRIES: [u64; 5] = [20, 30, 60, 120, 300];

/// An internet and the machines of the two peers.
pub(crate) fn internet(dice: &mut Dice) -> (Internet, [usize; 2]) {
    let mut internet = Internet::new(weather(dice), Dice::new(dice.roll()));
    let machines = match dice.below(100) {
        0..=3 => {
            let realm = site(&mut internet, WORLD, dice);
            let machine = machine(&mut internet, realm, dice);
            [machine; 2]
        }
        4..=13 => {
            let realm = site(&mut internet, WORLD, dice);
            internet.realms[realm].isolated = dice.percent(15);
            [0; 2].map(|_| machine(&mut internet, realm, dice))
        }
        14..=25 => {
            let carrier = carrier(&mut internet, WORLD, dice);
            [0; 2].map(|_| beneath(&mut internet, carrier, dice))
        }
        26..=30 => {
            let outer = home(&mut internet, WORLD, dice);
            let inner = home(&mut internet, outer, dice);
            [outer, inner].map(|realm| machine(&mut internet, realm, dice))
        }
        _ => [0; 2].map(|_| {
            let realm = any_realm(&mut internet, dice);
            machine(&mut internet, realm, dice)
        }),
    };
    (internet, machines)
}

fn weather(dice: &mut Dice) -> Weather {
    let least = 1 + dice.below(120);
    let loss_percent = if dice.percent(60) { 0 } else { dice.below(21) };
    Weather { loss_percent, duplicate_percent: dice.below(3), delay_ms: (least, least + dice.below(40)) }
}

pub(crate) fn nat(dice: &mut Dice) -> Nat {
    let mapping = if dice.percent(45) { Mapping::Independent } else { dice.pick(&MAPPINGS) };
    Nat {
        mapping,
        filter: dice.pick(&FILTERS),
        ports: dice.pick(&PORTS),
        expiry: Duration::from_secs(dice.pick(&EXPIRIES)),
        hairpin: dice.percent(40),
        kept_from_outside: dice.percent(50),
    }
}

fn router(dice: &mut Dice, nat: Nat) -> Router {
    Router { nat, firewall: dice.pick(&FILTERS), udp: dice.percent(97), ipv6: dice.percent(97) }
}

/// Where any one machine may be.
fn any_realm(internet: &mut Internet, dice: &mut Dice) -> usize {
    match dice.below(100) {
        0..=9 => WORLD,
        10..=17 => {
            let filter = dice.pick(&[Filter::Address, Filter::Port]);
            let firewall = Nat { mapping: Mapping::None, filter, ..nat(dice) };
            let router = router(dice, firewall);
            internet.add_site(WORLD, router)
        }
        18..=27 => carrier(internet, WORLD, dice),
        28..=42 => {
            let carrier = carrier(internet, WORLD, dice);
            home(internet, carrier, dice)
        }
        43..=52 => {
            let outer = home(internet, WORLD, dice);
            home(internet, outer, dice)
        }
        _ => home(internet, WORLD, dice),
    }
}

fn site(internet: &mut Internet, outside: usize, dice: &mut Dice) -> usize {
    if dice.percent(50) { carrier(internet, outside, dice) } else { home(internet, outside, dice) }
}

fn carrier(internet: &mut Internet, outside: usize, dice: &mut Dice) -> usize {
    let nat = nat(dice);
    let router = router(dice, nat);
    let realm = internet.add_realm(outside, router, [100, 64, internet.realms.len() as u8]);
    internet.realms[realm].isolated = dice.percent(50);
    realm
}

fn home(internet: &mut Internet, outside: usize, dice: &mut Dice) -> usize {
    let nat = nat(dice);
    let router = router(dice, nat);
    // A router refuses a network within that it has outside as well.
    let prefix = dice.pick(&HOME_PREFIXES);
    let is_free = outside == WORLD || !internet.has_prefix(outside, prefix);
    if is_free { internet.add_realm(outside, router, prefix) } else { internet.add_site(outside, router) }
}

/// A customer of a carrier: a telephone, or a machine in a home.
fn beneath(internet: &mut Internet, carrier: usize, dice: &mut Dice) -> usize {
    let realm = if dice.percent(30) { carrier } else { home(internet, carrier, dice) };
    machine(internet, realm, dice)
}

fn families(dice: &mut Dice) -> Families {
    match dice.below(100) {
        0..=64 => Families::V4,
        65..=93 => Families::Both,
        _ => Families::V6,
    }
}

fn machine(internet: &mut Internet, realm: usize, dice: &mut Dice) -> usize {
    let families = families(dice);
    let machine = internet.add_machine(realm, families);
    let bridges = match dice.below(100) {
        0..=79 => 0,
        80..=97 => 1,
        _ => 24,
    };
    internet.machines[machine].bridges = (0..bridges).map(|at| [172, 17 + at % 12, at / 12, 1].into()).collect();
    machine
}

/// Something that happens to a world.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// A router forgets its mappings, and perhaps gets another address.
    RouterRestarts { realm: usize, readdressed: bool },
    /// A router becomes one of another kind.
    RouterReplaced { realm: usize, nat: Nat },
    /// No UDP passes a router, for a while.
    UdpBlocked { realm: usize, time: Duration },
    /// No IPv6 passes a router, for a while, though the addresses stay.
    Ipv6Broken { realm: usize, time: Duration },
    /// A machine moves to another network, and is told so after a while.
    Roams { machine: usize, notice: Duration },
    /// The relay is gone for a while, and its responder.
    RelayGone { time: Duration },
    /// A machine moves to another network while the relay is gone.
    RoamsAlone { machine: usize, time: Duration },
    /// A machine sleeps.
    Sleeps { machine: usize, time: Duration },
    /// The internet carries nothing, for a while.
    Outage { time: Duration },
    /// Loss and round trips change.
    Weather { weather: Weather },
}

/// A fault that can befall this world.
pub(crate) fn fault(world: &mut World) -> Fault {
    let at = world.dice.below(2) as usize;
    let machine = world.peers[at].machine;
    let realms = world.internet.realms_of(machine);
    let dice = &mut world.dice;
    let time = if dice.percent(80) { dice.millis(1000, 30_000) } else { dice.millis(30_000, 400_000) };
    let Some(realm) = (!realms.is_empty()).then(|| dice.pick(&realms)) else {
        return match dice.below(3) {
            0 => Fault::Roams { machine, notice: dice.millis(0, 5000) },
            1 => Fault::RelayGone { time },
            _ => Fault::Outage { time },
        };
    };
    match dice.below(100) {
        0..=24 => Fault::RouterRestarts { realm, readdressed: dice.percent(40) },
        25..=29 => Fault::RouterReplaced { realm, nat: nat(dice) },
        30..=44 => Fault::UdpBlocked { realm, time },
        45..=52 => Fault::Ipv6Broken { realm, time },
        53..=72 => Fault::Roams { machine, notice: dice.millis(0, 5000) },
        73..=78 => Fault::RelayGone { time },
        79..=81 => Fault::RoamsAlone { machine, time },
        82..=88 => Fault::Sleeps { machine, time },
        89..=94 => Fault::Outage { time },
        _ => Fault::Weather { weather: weather(dice) },
    }
}

/// Moves a machine somewhere.
pub(crate) fn roam(world: &mut World, machine: usize, notice: Duration) {
    let realm = any_realm(&mut world.internet, &mut world.dice);
    let families = families(&mut world.dice);
    world.roam(machine, realm, families, notice);
}
