//! Judges the way to the host: which path is taken and why, or what keeps a direct one from being found.
//!
//! In: both sides' views. Out: the findings `host` and `path`. What keeps a direct path away is looked for from the
//! certain to the likely; the first that fits is told.

use std::net::{IpAddr, SocketAddr};

use peerfleet_proto::{
    path::Reach,
    request::{
        link::Mapping,
        network::{CheckOutcome, CheckReport, Choice, NetworkReport, PathReport, SearchReport, TakenPath},
        transfer::PathNow,
    },
};

use super::{
    Finding, Level, MORE_TIME, millis,
    network::{there, udp_gets_out},
};
use crate::{
    client::doctor::{Examination, HostSeen},
    mesh::UplinkState,
    ui::human_duration,
};

/// What is to be said of the host and the way to it; nothing if no host was asked about.
pub(super) fn findings(seen: &Examination) -> Vec<Finding> {
    let visited = match &seen.host {
        None => return Vec::new(),
        // Said of the room already.
        Some(Err(_)) if seen.mesh.is_err() => return Vec::new(),
        Some(Err(why)) => return vec![Finding::of("host", why)],
        Some(Ok(visited)) => visited,
    };
    let mut found = vec![host(visited)];
    if visited.host.here {
        return found;
    }
    found.extend(visited.view.iter().flat_map(|network| there(network, visited.host.name())));
    found.push(match (&visited.no_link, visited.host.link.now) {
        (Some(why), _) => no_link(visited, why),
        (None, None) => no_link(visited, "it ended while it was looked at"),
        (None, Some(PathNow::Direct)) => direct(seen, visited),
        (None, Some(PathNow::Relayed)) => relayed(seen, visited),
    });
    found
}

fn host(visited: &HostSeen) -> Finding {
    let (host, presence) = (&visited.host, &visited.host.presence);
    let about = format!(
        "`{}` ({}), {}/{}, version {}",
        host.name(),
        host.peer.short(),
        presence.os,
        presence.arch,
        presence.version
    );
    if host.here {
        return Finding::new("host", Level::Note, format!("{about} is this machine: there is no way to look at"));
    }
    match &visited.view {
        Ok(_) => Finding::new("host", Level::Good, about),
        Err(why) => {
            let finding = Finding::new("host", Level::Note, format!("{about}; {why}"));
            match &why.hint {
                Some(hint) => finding.hint(hint.clone()),
                None => finding,
            }
        }
    }
}

fn no_link(visited: &HostSeen, why: &str) -> Finding {
    let what = format!("no link to `{}`: {why}", visited.host.name());
    Finding::new("path", Level::Unreachable, what)
        .hint("`peer ls` shows who answers; a machine that was switched off is listed until the relay notices")
}

fn direct(seen: &Examination, visited: &HostSeen) -> Finding {
    let taken = seen.path().and_then(|path| path.taken.as_ref());
    let what = match taken {
        Some(taken) => {
            let TakenPath { addr, rtt, age, why } = *taken;
            let over = over(reach_of(seen.path(), addr), addr);
            let (rtt, age) = (millis(rtt), human_duration(age));
            format!("direct over {over} to {addr}, {rtt}, for {age}: chosen because {}", because(why))
        }
        None => format!("direct{}", address(visited)),
    };
    Finding::new("path", Level::Good, what)
}

fn address(visited: &HostSeen) -> String {
    visited.host.link.address.map(|addr| format!(" to {addr}")).unwrap_or_default()
}

fn reach_of(path: Option<&PathReport>, addr: SocketAddr) -> Reach {
    let check = path.and_then(|path| path.checks.iter().find(|check| check.addr == addr));
    check.map_or(Reach::Wide, |check| check.reach)
}

fn over(reach: Reach, addr: SocketAddr) -> &'static str {
    match reach {
        Reach::Loopback => "this machine's loopback",
        Reach::Lan => "the local network",
        Reach::Wide if is_private(addr) => "a private network",
        Reach::Wide => "the internet",
    }
}

fn is_private(addr: SocketAddr) -> bool {
    match addr.ip() {
        IpAddr::V4(ip) => ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

fn because(why: Choice) -> String {
    match why {
        Choice::Only => "no other address answers".to_owned(),
        Choice::Nearer(other) => format!("it is nearer than {other}"),
        Choice::Faster(other) => format!("it is faster than {other}"),
        Choice::Ipv6(other) => format!("it is IPv6 and hardly slower than {other}"),
        Choice::Kind(other) => format!("it is about as fast as {other}, and known more directly"),
        Choice::Kept(other) => format!("it was there first, and {other} is hardly faster"),
    }
}

/// Both sides of a link without a direct path.
struct Sides<'a> {
    name: &'a str,
    joined: bool,
    ours: &'a NetworkReport,
    theirs: Option<&'a NetworkReport>,
    checks: &'a [CheckReport],
    path: Option<&'a PathReport>,
}

fn relayed(seen: &Examination, visited: &HostSeen) -> Finding {
    let Ok(in_room) = &seen.mesh else { return no_link(visited, "the room is not joined") };
    let ours = &in_room.report.network;
    let joined = in_room.report.uplink == UplinkState::Joined;
    let path = ours.path.as_ref();
    let checks = path.map(|path| path.checks.as_slice()).unwrap_or_default();
    let sides = Sides { name: visited.host.name(), joined, ours, theirs: visited.view.as_ref().ok(), checks, path };
    let (level, why, hint) = obstacle(&sides);
    let rtt = visited.host.link.rtt.map(|rtt| format!(" ({})", millis(rtt))).unwrap_or_default();
    Finding::new("path", level, format!("relayed{rtt}: {why}")).hint(hint)
}

/// Time that a person may give the checks when they need more.
const OPEN_PORT: &str = "open a port in either router (UPnP, NAT-PMP or PCP switched on), or give both machines IPv6";

fn obstacle(sides: &Sides<'_>) -> (Level, String, String) {
    let Sides { name, ours, .. } = sides;
    if !ours.udp {
        let why = "this machine gives no UDP socket".to_owned();
        return (Level::Fix, why, "look at what the log says of peer".to_owned());
    }
    if sides.theirs.is_some_and(|theirs| !theirs.udp) {
        let why = format!("`{name}` has no UDP socket");
        return (Level::Fix, why, format!("look at the log of peer on `{name}`"));
    }
    if sides.checks.is_empty() {
        let why = format!("`{name}` names no address at which it might be reached");
        return (Level::Fix, why, format!("run `peer doctor` on `{name}`"));
    }
    unreachable_addresses(sides).or_else(|| blocked(sides)).or_else(|| nats(sides)).unwrap_or_else(|| unanswered(sides))
}

/// Nothing that the other side names can be sent to from here. Its loopback is no way to it, unless it has nothing else.
fn unreachable_addresses(sides: &Sides<'_>) -> Option<(Level, String, String)> {
    let name = sides.name;
    let only_loopback = sides.checks.iter().all(|check| check.addr.ip().is_loopback());
    let checks = || sides.checks.iter().filter(|check| only_loopback || !check.addr.ip().is_loopback());
    if !checks().all(|check| matches!(check.outcome, CheckOutcome::NotTried | CheckOutcome::NoRoute)) {
        return None;
    }
    let (theirs, missing) = if checks().all(|check| check.addr.is_ipv4()) {
        ("IPv4", "IPv6")
    } else if checks().all(|check| check.addr.is_ipv6()) {
        ("IPv6", "IPv4")
    } else {
        let why = format!("this machine knows no way to any address of `{name}`");
        return Some((Level::Fix, why, "look at this machine's routes: `ip route`, `ip -6 route`".to_owned()));
    };
    let why = format!("`{name}` has {theirs} alone, and no way leads there from this machine");
    Some((Level::Fix, why, format!("give this machine {theirs}, or the other one {missing}")))
}

/// One side's network lets no UDP through.
fn blocked(sides: &Sides<'_>) -> Option<(Level, String, String)> {
    let name = sides.name;
    if !sides.joined {
        // It is the relay that would answer.
        return None;
    }
    let here = udp_gets_out(sides.ours) == Some(false);
    let there = sides.theirs.and_then(udp_gets_out) == Some(false);
    let whose = match (here, there) {
        (true, true) => format!("neither this machine's network nor that of `{name}`"),
        (true, false) => "this machine's network does not".to_owned(),
        (false, true) => format!("the network of `{name}` does not"),
        (false, false) => return None,
    };
    let why = if here && there { format!("{whose} lets UDP through") } else { format!("{whose} let UDP through") };
    Some((Level::Fix, why, "let UDP out in that network's firewall; nothing else helps".to_owned()))
}

/// NATs that cannot be got through, or only by a search.
fn nats(sides: &Sides<'_>) -> Option<(Level, String, String)> {
    let name = sides.name;
    let theirs = sides.theirs.map_or(Mapping::Unknown, |theirs| theirs.nat.mapping);
    match (sides.ours.nat.mapping, theirs) {
        (Mapping::Dependent, Mapping::Dependent) => {
            let why = "both NATs give every destination another port; nothing can be done but a port mapping or IPv6";
            Some((Level::Fix, why.to_owned(), OPEN_PORT.to_owned()))
        }
        (Mapping::Dependent, Mapping::EndpointIndependent | Mapping::Unknown) => {
            Some(search(sides, "this machine's NAT"))
        }
        (Mapping::EndpointIndependent | Mapping::Unknown, Mapping::Dependent) => {
            Some(search(sides, &format!("the NAT of `{name}`")))
        }
        (Mapping::EndpointIndependent | Mapping::Unknown, Mapping::EndpointIndependent | Mapping::Unknown) => None,
    }
}

fn search(sides: &Sides<'_>, whose: &str) -> (Level, String, String) {
    let why = format!("{whose} gives every destination another port");
    let theirs = sides.theirs.and_then(|theirs| theirs.path.as_ref());
    let (why, hint) = match [sides.path, theirs].into_iter().flatten().find_map(|path| path.search) {
        Some(SearchReport::Waiting) => (format!("{why}; the search for it begins in a moment"), MORE_TIME),
        Some(SearchReport::Running) => (format!("{why}, which is being searched for"), MORE_TIME),
        Some(SearchReport::GivenUp) => (format!("{why}, which was searched for in vain"), OPEN_PORT),
        Some(SearchReport::NoUse) | None => (why, OPEN_PORT),
    };
    (Level::Fix, why, hint.to_owned())
}

/// Checks get lost for a reason that only they tell.
fn unanswered(sides: &Sides<'_>) -> (Level, String, String) {
    let name = sides.name;
    let going_on = |check: &CheckReport| matches!(check.outcome, CheckOutcome::Planned | CheckOutcome::Waiting);
    if sides.checks.iter().any(|check| check.outcome == CheckOutcome::Forged) {
        let why = format!("an address of `{name}` answers, but not as `{name}` would: somebody else has it");
        return (Level::Fix, why, "look which machine has that address in this network".to_owned());
    }
    if sides.checks.iter().any(going_on) {
        let why = "addresses are still being checked, and none answers yet".to_owned();
        return (Level::Fix, why, MORE_TIME.to_owned());
    }
    if sides.checks.iter().any(|check| check.outcome == CheckOutcome::Distrusted) {
        let why = format!("`{name}` answers directly, but what is larger than a check does not arrive");
        let hint = "look for a firewall or tunnel on the way that drops large UDP packets; it is tried again by itself";
        return (Level::Fix, why, hint.to_owned());
    }
    if sides.checks.iter().any(|check| check.outcome == CheckOutcome::Lost) {
        let why = format!("`{name}` was reached directly, and answers no more");
        return (
            Level::Fix,
            why,
            "it is tried again and again by itself; a network that changed may need a moment".to_owned(),
        );
    }
    let ours_arrive = sides.theirs.and_then(|theirs| theirs.path.as_ref());
    let ours_arrive = ours_arrive.is_some_and(|path| path.checks.iter().any(|check| check.heard > 0));
    let theirs_arrive = sides.checks.iter().any(|check| check.heard > 0);
    let (why, hint) = match (theirs_arrive, ours_arrive) {
        (true, false) => (
            format!("checks of `{name}` arrive here, and none of ours arrives there: a firewall in front of it"),
            format!("let UDP in at `{name}`, for the program peer"),
        ),
        (false, true) => (
            format!("our checks arrive at `{name}`, and nothing comes back: a firewall in front of this machine"),
            "let UDP in at this machine, for the program peer".to_owned(),
        ),
        (true, true) | (false, false) => (
            format!("no address of `{name}` answers: a firewall on either side"),
            "let the program peer send and receive UDP on both machines, at any port".to_owned(),
        ),
    };
    (Level::Fix, why, hint)
}
