//! Which pairs can have a direct path: from the topology alone.
//!
//! In: who is where, behind which routers. Out: a [`Verdict`]. It looks at no packet, no table and no clock; both sides are
//! taken to name their own addresses and those that the relay sees, to answer and check back whoever checks them, and to
//! search where the relay's two ports see that one's port moves.

use peerfleet_proto::path::search::plan::{BLOCK_ODDS, MAX_PROBES, MAX_SOCKETS, odds};

use crate::{
    internet::{Internet, WORLD},
    nat::{Filter, Mapping, Ports},
};

/// What a pair can come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// No packet of one can ever reach the other.
    Severed,
    /// Neither's port can be told before, and neither hears strangers: only guessing both ports would do.
    BothHard,
    /// One's port is another for every address, but not for every port of one: the relay sees the same on both of its ports, so
    /// nobody knows that a search would help.
    Unseen,
    /// A search is made, but needs luck: what it finds must meet a second time, or both sides take the ports of one router that the
    /// other counts on.
    AgainstOdds,
    /// One port, or both, must be found by search.
    Searched(Aim),
    /// Checks of named addresses suffice.
    Direct,
}

/// Where the port that is searched for can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Aim {
    /// Both sides' routers count their ports: each aims at what the other's will come to.
    Meet,
    /// Anywhere.
    All,
    /// In a block.
    Block,
    /// Next to the one before.
    Next,
}

impl Aim {
    /// The probability with which one round finds it, as [`peerfleet_proto::path::search::plan`] has it.
    pub(crate) fn odds(self) -> f64 {
        match self {
            Self::All => odds(64_512, MAX_SOCKETS, MAX_PROBES),
            Self::Block => BLOCK_ODDS,
            Self::Meet | Self::Next => 1.0,
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
    let are_under_one = routers[0].last().is_some_and(|outermost| routers[1].last() == Some(outermost));
    if is_direct { Verdict::Direct } else { searched(&one, &other, are_under_one) }
}

/// Checks of named addresses do not suffice. The relay's two ports see who moves with the port. Under one router, what one side
/// sends takes the ports that the other counts on.
fn searched(one: &Side, other: &Side, are_under_one: bool) -> Verdict {
    match (one.moves_with_port, other.moves_with_port) {
        (true, false) => probed(one, other),
        (false, true) => probed(other, one),
        (true, true) if one.aim == Aim::Next && other.aim == Aim::Next => {
            if are_under_one {
                Verdict::AgainstOdds
            } else {
                Verdict::Searched(Aim::Meet)
            }
        }
        (false, false) if !(one.moves && other.moves) => Verdict::Unseen,
        (true, true) | (false, false) => Verdict::BothHard,
    }
}

/// `hard` opens many ports, one of which `easy` finds.
fn probed(hard: &Side, easy: &Side) -> Verdict {
    // If `easy` comes from a port that `hard` does not expect, each must hear a new port of the other's.
    if !easy.moves || (hard.hears_new_ports && easy.hears_new_ports) {
        Verdict::Searched(hard.aim)
    } else {
        Verdict::AgainstOdds
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
    /// Where the ports of new sockets are seen.
    aim: Aim,
}

impl Side {
    fn new(internet: &Internet, routers: &[usize]) -> Self {
        let mut side = Self {
            moves: false,
            moves_with_port: false,
            hears_new_ports: true,
            hears_at_its_name: true,
            aim: Aim::All,
        };
        for realm in routers {
            let nat = &internet.realms[*realm].router.nat;
            side.moves |= nat.mapping.moves();
            side.moves_with_port |= nat.mapping == Mapping::Port;
            side.hears_new_ports &= nat.filter != Filter::Port;
            // From the first router that moves on, nothing but packets to the relay went through that mapping.
            side.hears_at_its_name &=
                nat.filter == Filter::Independent || (!side.moves && nat.filter == Filter::Address);
            // The outermost that does not keep the port within chooses it.
            let keeps_port = nat.mapping == Mapping::None || nat.ports == Ports::Preserving;
            side.aim = match nat.ports {
                Ports::Sequential if !keeps_port => Aim::Next,
                Ports::Block if !keeps_port => Aim::Block,
                Ports::Random if !keeps_port => Aim::All,
                Ports::Preserving | Ports::Sequential | Ports::Random | Ports::Block => side.aim,
            };
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
