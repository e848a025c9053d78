//! Judges what was seen: what is well, what is worth knowing, and what the user can do.
//!
//! In: an [`Examination`]. Out: [`Finding`]s in a fixed order, each with a stable name, and the exit code. Pure: the same
//! examination has the same findings.
//! Bounds: at most one finding of each name.

use std::{fmt::Display, time::Duration};

use peerfleet_proto::request::{
    link::{Candidate, CandidateKind, Mapping, Ports},
    network::{Filtering, MappingProtocol, NetworkReport, PortMapping, ResponderReport},
};

use super::{Examination, InRoom, SILENT_AFTER};
use crate::{
    failure::{Failure, Kind},
    mesh::{UplinkState, health::Clock},
};

mod way;

/// How far the clocks of this machine and of the relay may differ, in milliseconds, before it is told as something to mend.
/// One minute: times in lists become misleading; what breaks for certain (certificates) needs more.
pub const CLOCK_BOUND_MS: u64 = 60_000;

/// What helps where something was still going on.
const MORE_TIME: &str = "look again in a moment, or give it longer with --timeout 30s";

/// How a finding weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Good,
    /// Worth knowing; nothing needs to be done.
    Note,
    /// The user can mend it.
    Fix,
    /// The relay or the host cannot be reached.
    Unreachable,
}

impl Level {
    /// The level as JSON writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Fix => "fix",
            Self::Unreachable => "unreachable",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at; scripts tell findings apart by it.
    pub name: &'static str,
    /// How it weighs.
    pub level: Level,
    /// What was found.
    pub what: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Finding {
    fn new(name: &'static str, level: Level, what: impl Into<String>) -> Self {
        Self { name, level, what: what.into(), hint: None }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A failure, as a finding.
    fn of(name: &'static str, failure: &Failure) -> Self {
        let level = if failure.kind == Kind::Unreachable { Level::Unreachable } else { Level::Fix };
        let what = failure.to_string();
        Self { name, level, what, hint: failure.hint.clone() }
    }
}

/// The exit code: 0 all well, 1 something to mend, 3 the relay or the host cannot be reached.
pub fn exit_code(findings: &[Finding]) -> u8 {
    match findings.iter().map(|finding| finding.level).max() {
        None | Some(Level::Good | Level::Note) => 0,
        Some(Level::Fix) => Kind::Fixable.exit_code(),
        Some(Level::Unreachable) => Kind::Unreachable.exit_code(),
    }
}

/// Everything that is to be said of an examination.
pub fn findings(seen: &Examination) -> Vec<Finding> {
    let mut found = vec![
        Finding::new("state", Level::Good, format!("{}, which nobody else can look into", seen.state_dir)),
        daemon(seen),
    ];
    let joined = seen.mesh.as_ref().is_ok_and(|in_room| in_room.report.uplink == UplinkState::Joined);
    found.push(relay(seen, joined));
    found.extend(clock(seen));
    match &seen.mesh {
        Err(why) => found.push(Finding::of("room", why)),
        Ok(in_room) => {
            found.push(room(in_room, joined, seen.health.is_ok()));
            found.push(proxy(in_room.report.proxy.as_deref()));
            found.extend(network(&in_room.report.network, joined));
        }
    }
    found.extend(way::findings(seen));
    found
}

fn daemon(seen: &Examination) -> Finding {
    match &seen.mesh {
        Ok(in_room) if seen.daemon => {
            let status = &in_room.status;
            let what = format!("peer {} runs here as `{}`, mode {}", status.version, status.name, status.mode);
            Finding::new("daemon", Level::Good, what)
        }
        Ok(_) | Err(_) => {
            let what = "no peer runs here for others; this command looked by itself";
            Finding::new("daemon", Level::Note, what).hint("`peer run` makes this machine a host of the room")
        }
    }
}

fn relay(seen: &Examination, joined: bool) -> Finding {
    let rtt = seen.mesh.as_ref().ok().and_then(|in_room| in_room.report.network.relay_rtt);
    let rtt = rtt.map(|rtt| format!(", {} by WebSocket", millis(rtt))).unwrap_or_default();
    let relay = &seen.relay;
    match &seen.health {
        Ok(health) if health.status == "ok" => {
            Finding::new("relay", Level::Good, format!("{relay} answers (version {}){rtt}", health.version))
        }
        Ok(health) => {
            let what = format!("{relay} is shutting down (it says `{}`){rtt}", health.status);
            Finding::new("relay", Level::Note, what).hint("peers join again when it is back")
        }
        Err(why) if joined => {
            let what = format!("{relay} carries frames{rtt}, but does not tell how it is: {why}");
            Finding::new("relay", Level::Note, what)
        }
        Err(why) => {
            let usual = "is the relay running and its address right? --relay or PEER_RELAY names another one";
            Finding::new("relay", Level::Unreachable, format!("{relay} cannot be reached: {why}"))
                .hint(why.hint.as_deref().unwrap_or(usual))
        }
    }
}

fn clock(seen: &Examination) -> Option<Finding> {
    let Clock { ahead_ms, within } = seen.health.as_ref().ok()?.clock?;
    let apart = Duration::from_millis(ahead_ms.unsigned_abs());
    if ahead_ms.unsigned_abs() <= CLOCK_BOUND_MS {
        let what = format!("differs from the relay's by {} (known to {})", millis(apart), millis(within));
        return Some(Finding::new("clock", Level::Good, what));
    }
    let side = if ahead_ms > 0 { "behind" } else { "ahead of" };
    let what = format!(
        "is {} {side} the relay's: times in lists of jobs and in the audit log mislead, files sent from here bear wrong \
         times, and a relay's certificate may count as expired",
        crate::ui::human_duration(apart)
    );
    let hint = "set the clock of whichever is wrong, for instance with `timedatectl set-ntp true`";
    Some(Finding::new("clock", Level::Fix, what).hint(hint))
}

fn room(in_room: &InRoom, joined: bool, relay_answers: bool) -> Finding {
    let room = &in_room.status.room;
    if joined {
        let others = match in_room.others {
            0 => "nobody else is there".to_owned(),
            1 => "1 other host is there".to_owned(),
            many => format!("{many} other hosts are there"),
        };
        return Finding::new("room", Level::Good, format!("`{room}` is joined; {others}"));
    }
    let trouble = in_room.report.trouble.as_ref();
    let why = trouble.map_or("no answer yet", |trouble| trouble.cause.as_str());
    // What keeps from the relay itself is said of the relay already.
    let hint = trouble.and_then(|trouble| trouble.hint.as_deref()).filter(|_| relay_answers);
    Finding::new("room", Level::Unreachable, format!("`{room}` is not joined: {why}"))
        .hint(hint.unwrap_or("links that stand go on; see what is said of the relay"))
}

fn proxy(proxy: Option<&str>) -> Finding {
    let what = match proxy {
        Some(proxy) => format!("the relay is reached by way of {proxy}"),
        None => "none is used on the way to the relay".to_owned(),
    };
    Finding::new("proxy", Level::Good, what)
}

fn network(network: &NetworkReport, joined: bool) -> Vec<Finding> {
    let mut found = vec![udp(network, joined)];
    for (name, is_v4) in [("ipv4", true), ("ipv6", false)] {
        found.push(family(name, network, is_v4));
    }
    found.extend(nat(network));
    found.extend(network.port_mapping.map(port_mapping));
    found
}

/// Whether STUN requests are answered; `None` if none was asked for long enough.
fn udp_gets_out(network: &NetworkReport) -> Option<bool> {
    if network.responders.iter().any(answers) {
        Some(true)
    } else if !network.responders.is_empty() && network.responders.iter().all(is_silent) {
        Some(false)
    } else {
        None
    }
}

fn answers(responder: &ResponderReport) -> bool {
    responder.rtt.is_some() && !is_silent(responder)
}

fn is_silent(responder: &ResponderReport) -> bool {
    responder.unanswered >= SILENT_AFTER
}

fn udp(network: &NetworkReport, joined: bool) -> Finding {
    let new = |level, what: String| Finding::new("udp", level, what);
    if !network.udp {
        let what = "this machine gives no UDP socket: everything goes by the relay";
        return new(Level::Fix, what.to_owned()).hint("look at what the log says of peer");
    }
    let answering = network.responders.iter().filter(|responder| answers(responder));
    let quickest = answering.filter_map(|responder| Some((responder.rtt?, responder.addr))).min();
    match (quickest, udp_gets_out(network)) {
        (Some((rtt, addr)), _) => new(Level::Good, format!("gets out: {addr} answers STUN in {}", millis(rtt))),
        (None, Some(_)) if joined => {
            let asked = list(network.responders.iter().map(|responder| responder.addr));
            let what = format!(
                "nothing comes back: {asked} answers no STUN request; at best machines of one network are direct"
            );
            new(Level::Fix, what).hint(format!(
                "let UDP out of this network, at least to {asked}, and into the relay's machine at that port"
            ))
        }
        (None, None) if joined && network.responders.is_empty() => {
            let what =
                "the relay answers no STUN, so nobody can tell whether UDP gets out, or how this machine is seen";
            new(Level::Fix, what.to_owned()).hint("start the relay without --no-stun, and let UDP in at its port")
        }
        (None, Some(_) | None) => new(Level::Note, "not known: the relay was not there to be asked".to_owned()),
    }
}

fn family(name: &'static str, network: &NetworkReport, is_v4: bool) -> Finding {
    let of = |kind| {
        let candidates = network.candidates.iter().filter(move |candidate: &&Candidate| candidate.kind == kind);
        candidates.map(|candidate| candidate.addr).filter(move |addr| addr.is_ipv4() == is_v4)
    };
    let own: Vec<_> = of(CandidateKind::Host).map(|addr| addr.ip()).filter(|ip| !ip.is_loopback()).collect();
    let seen: Vec<_> = of(CandidateKind::ServerReflexive).collect();
    if own.is_empty() && seen.is_empty() {
        return Finding::new(name, Level::Note, "this machine has no address but its own loopback");
    }
    let seen = if seen.is_empty() { String::new() } else { format!("; seen from outside as {}", list(seen)) };
    let routed = if is_v4 { network.routes_v4 } else { network.routes_v6 };
    let (level, beyond) =
        if routed { (Level::Good, "") } else { (Level::Note, "; no way leads beyond its own networks") };
    Finding::new(name, level, format!("{}{seen}{beyond}", list(own)))
}

fn nat(network: &NetworkReport) -> Option<Finding> {
    let seen: Vec<_> = network.responders.iter().filter_map(|responder| responder.seen).collect();
    let first = seen.first()?;
    let is_own = |addr| {
        let mut own = network.candidates.iter().filter(|candidate| candidate.kind == CandidateKind::Host);
        own.any(|candidate| candidate.addr == addr)
    };
    if seen.iter().all(|addr| is_own(*addr)) {
        let let_in = without_nat(network.filtering);
        let what = format!("none towards the relay: {first} is this machine's own address{let_in}");
        return Some(Finding::new("nat", Level::Good, what));
    }
    let (ports, let_in, hairpin) = (ports(network.nat.ports), let_in(network.filtering), hairpin(network.hairpin));
    let new = |level, what: String| Finding::new("nat", level, format!("{what}; {let_in}{hairpin}"));
    Some(match network.nat.mapping {
        Mapping::Unknown => {
            new(Level::Note, format!("there is one (this machine is seen as {first}); of what kind cannot be told"))
                .hint(second_port(network))
        }
        Mapping::EndpointIndependent => {
            new(Level::Good, format!("there is an easy one: every destination sees {first}{ports}"))
        }
        Mapping::Dependent => {
            new(Level::Note, format!("there is a hard one: each destination sees another port{ports}"))
                .hint("a direct path needs an easier NAT at the other end, an open port in the router, or IPv6")
        }
    })
}

/// What would tell more of a NAT.
fn second_port(network: &NetworkReport) -> String {
    let mut answering = network.responders.iter().filter(|responder| responder.seen.is_some());
    let is_beside = |silent: &&ResponderReport| {
        silent.seen.is_none() && answering.any(|responder| responder.addr.ip() == silent.addr.ip())
    };
    match network.responders.iter().find(is_beside) {
        Some(silent) => format!(
            "let UDP into the relay's machine at {}, its second STUN port: two answers tell what kind of NAT there is",
            silent.addr
        ),
        None => "a relay that answers STUN on a second port tells more: see what its log says of it".to_owned(),
    }
}

/// What a NAT lets in.
fn let_in(filtering: Filtering) -> &'static str {
    match filtering {
        Filtering::Unknown => "what it lets in could not be told",
        Filtering::EndpointIndependent => "it lets in what anybody sends",
        Filtering::AddressDependent => "it lets in what comes from addresses that were sent to",
        Filtering::PortIndependent => {
            "it lets in what comes from any port of an address that was sent to (whether from other addresses too, one \
             relay cannot tell)"
        }
        Filtering::AddressAndPortDependent => "it lets in only what comes from addresses and ports that were sent to",
    }
}

/// What is let in where there is no NAT.
fn without_nat(filtering: Filtering) -> &'static str {
    match filtering {
        Filtering::Unknown => "",
        Filtering::EndpointIndependent => "; no firewall keeps out what others send",
        Filtering::AddressDependent => "; a firewall lets in what comes from addresses that were sent to",
        Filtering::PortIndependent => {
            "; what comes from any port of an address that was sent to gets in (whether from other addresses too, one relay \
             cannot tell)"
        }
        Filtering::AddressAndPortDependent => {
            "; a firewall lets in only what comes from addresses and ports that were sent to"
        }
    }
}

fn hairpin(hairpin: Option<bool>) -> &'static str {
    match hairpin {
        None => "",
        Some(true) => "; machines behind it reach each other by their outer addresses",
        Some(false) => "; machines behind it do not reach each other by their outer addresses",
    }
}

fn ports(ports: Ports) -> String {
    match ports {
        Ports::Unknown => String::new(),
        Ports::Preserving => ", and ports stay as they are".to_owned(),
        Ports::Sequential { last, step } => format!(", in steps of {step} (the last was {last})"),
        Ports::Block { first, last } => format!(", out of the block from {first} to {last}"),
        Ports::Random => ", at random".to_owned(),
    }
}

fn port_mapping(mapping: PortMapping) -> Finding {
    let new = |level, what: String| Finding::new("port_mapping", level, what);
    match mapping {
        PortMapping::NoAnswer => new(Level::Note, "none: no router answers PCP, NAT-PMP or UPnP".to_owned()),
        PortMapping::Refused { protocol } => {
            new(Level::Note, format!("none: the router answers {}, but opens no port", by(protocol)))
                .hint("if direct paths fail, allow programs to open ports (PCP, UPnP) in the router's settings")
        }
        PortMapping::Open { protocol, addr, life } => {
            let (by, life) = (by(protocol), crate::ui::human_duration(life));
            let what = format!("the router passes on what comes to {addr} (asked by {by}, for {life} at a time)");
            new(Level::Good, what)
        }
        PortMapping::Nested { protocol, addr } => {
            let (by, ip) = (by(protocol), addr.ip());
            let what = format!(
                "of no use: the router opens a port (asked by {by}), but stands behind another NAT: its own address outside \
                 is {ip}"
            );
            new(Level::Note, what)
        }
        PortMapping::Asking => {
            new(Level::Note, "not known: the router was asked and has not answered yet".to_owned()).hint(MORE_TIME)
        }
        PortMapping::NotNeeded => {
            new(Level::Good, "not needed: this machine has a public IPv4 address of its own".to_owned())
        }
        PortMapping::NoRouter => {
            new(Level::Note, "none: no default route leads to a router that could be asked".to_owned())
        }
        PortMapping::Off => {
            new(Level::Note, "not asked for: `--no-port-mapping` or `port-mapping = false` forbids it".to_owned())
        }
    }
}

fn by(protocol: MappingProtocol) -> &'static str {
    match protocol {
        MappingProtocol::Pcp => "PCP",
        MappingProtocol::NatPmp => "NAT-PMP",
        MappingProtocol::Upnp => "UPnP",
    }
}

/// A span as people read it: `0.4 ms`, `2.5 s`.
pub fn millis(span: Duration) -> String {
    let ms = span.as_secs_f64() * 1e3;
    if ms < 1000.0 { format!("{ms:.1} ms") } else { crate::ui::human_duration(span) }
}

fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let texts: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if texts.is_empty() { "none".to_owned() } else { texts.join(", ") }
}

#[cfg(test)]
mod tests;
