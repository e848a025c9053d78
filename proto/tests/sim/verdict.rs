//! Which pairs can have a direct path: from the topology alone.
//!
//! In: who is where, behind which routers. Out: a [`Verdict`]. It looks at no packet, no table and no clock; both sides are
//! taken to name their own addresses and those that the relay sees, and to answer and check back whoever checks them.

use crate::{
    internet::{Internet, WORLD},
    nat::{Filter, Mapping},
};

/// What a pair can come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// No packet of one can ever reach the other.
    Severed,
    /// Neither's port can be told before, and neither hears strangers: only guessing both ports would do.
    BothHard,
    /// One's port cannot be told, and the other hears none but ports that it sent to: one port must be found by search.
    NotWithoutSearch,
    /// Checks of named addresses suffice.
    Direct,
}

/// Whether the machines under test search for ports. One line to change once they do.
pub(crate) const WITH_SEARCH: bool = false;

impl Verdict {
    /// Whether the pair must become direct.
    pub(crate) fn is_possible(self) -> bool {
        match self {
            Self::Direct => true,
            Self::NotWithoutSearch => WITH_SEARCH,
            Self::BothHard | Self::Severed => false,
        }
    }
}

/// What the pair of these two machines can come to.
pub(crate) fn verdict(internet: &Internet, one: usize, other: usize) -> Verdict {
    if one == other {
        return Verdict::Direct;
    }
    let paths = [one, other].map(|machine| internet.realms_of(machine));
    by_ipv6(internet, [one, other], &paths).max(by_ipv4(internet, [one, other], &paths))
}

/// Nothing is translated: each opens its own firewalls by sending.
fn by_ipv6(internet: &Internet, machines: [usize; 2], paths: &[Vec<usize>; 2]) -> Verdict {
    let meeting = meeting(paths);
    let passes = paths.iter().flat_map(|path| below(path, meeting)).all(|realm| {
        let router = &internet.realms[*realm].router;
        router.udp && router.ipv6
    });
    let have_it = machines.iter().all(|machine| internet.machines[*machine].v6.is_some());
    if have_it && passes && !internet.realms[meeting].isolated { Verdict::Direct } else { Verdict::Severed }
}

fn by_ipv4(internet: &Internet, machines: [usize; 2], paths: &[Vec<usize>; 2]) -> Verdict {
    if machines.iter().any(|machine| internet.machines[*machine].v4.is_none()) {
        return Verdict::Severed;
    }
    let meeting = meeting(paths);
    let sides = [&paths[0], &paths[1]].map(|path| below(path, meeting));
    // In a realm that is not the public internet only interface addresses are named.
    let is_named = meeting == WORLD || sides.iter().any(|side| side.is_empty());
    let near = if is_named && !internet.realms[meeting].isolated { meet(internet, sides) } else { Verdict::Severed };
    near.max(by_hairpin(internet, meeting, paths))
}

/// Behind one router, both are seen at its outer addresses: by each other too, if it hairpins.
fn by_hairpin(internet: &Internet, meeting: usize, paths: &[Vec<usize>; 2]) -> Verdict {
    let outermost = paths[0].last().filter(|_| meeting != WORLD);
    if outermost.is_some_and(|realm| internet.realms[*realm].router.nat.hairpin) {
        meet(internet, [&paths[0], &paths[1]].map(Vec::as_slice))
    } else {
        Verdict::Severed
    }
}

/// The innermost realm that both are in.
fn meeting(paths: &[Vec<usize>; 2]) -> usize {
    paths[0].iter().copied().find(|realm| paths[1].contains(realm)).unwrap_or(WORLD)
}

fn below(path: &[usize], realm: usize) -> &[usize] {
    let end = path.iter().position(|one| *one == realm).unwrap_or(path.len());
    &path[..end]
}

/// Two machines meet in a realm where both are named; between it and each of them are these routers, innermost first.
fn meet(internet: &Internet, routers: [&[usize]; 2]) -> Verdict {
    if routers.iter().copied().flatten().any(|realm| !internet.realms[*realm].router.udp) {
        return Verdict::Severed;
    }
    let [one, other] = routers.map(|routers| Side::new(internet, routers));
    let is_direct = match (one.moves, other.moves) {
        (false, false) => true,
        (false, true) => one.hears_new_ports,
        (true, false) => other.hears_new_ports,
        (true, true) => calls(&one, &other) || calls(&other, &one),
    };
    match (is_direct, one.moves && other.moves) {
        (true, _) => Verdict::Direct,
        (false, false) => Verdict::NotWithoutSearch,
        (false, true) => Verdict::BothHard,
    }
}

/// What all routers of one side are together.
struct Side {
    /// Another destination sees another port.
    moves: bool,
    /// Even another port of the same address does.
    moves_with_port: bool,
    /// What comes from another port of an address that was sent to gets in.
    hears_new_ports: bool,
    /// It gets in as well through the mapping that the relay saw, which sent to nobody else.
    hears_at_its_name: bool,
}

impl Side {
    fn new(internet: &Internet, routers: &[usize]) -> Self {
        let mut side = Self { moves: false, moves_with_port: false, hears_new_ports: true, hears_at_its_name: true };
        for realm in routers {
            let nat = &internet.realms[*realm].router.nat;
            side.moves |= nat.mapping.moves();
            side.moves_with_port |= nat.mapping == Mapping::Port;
            side.hears_new_ports &= nat.filter != Filter::Port;
            // From the first router that moves on, nothing but packets to the relay went through that mapping.
            side.hears_at_its_name &=
                nat.filter == Filter::Independent || (!side.moves && nat.filter == Filter::Address);
        }
        side
    }
}

/// Neither is where it told. `caller` sends to where `called` told, from a port that nobody knows, and is let in. `called` sends
/// back from another such port, which `caller` must let in. From then on one of the two must keep its port when the other's
/// is new.
fn calls(caller: &Side, called: &Side) -> bool {
    called.hears_at_its_name && caller.hears_new_ports && !(caller.moves_with_port && called.moves_with_port)
}
