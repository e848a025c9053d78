//! Judges what a network can do: UDP, addresses, NAT, filter, the port that a router opens.
//!
//! In: a [`NetworkReport`], this machine's or another host's. Out: the findings of it. Of another host's network nothing is to be
//! mended here: what it means for the way there is told of the path.

use std::net::SocketAddr;

use peerfleet_proto::request::{
    link::{Candidate, CandidateKind, Mapping, Ports},
    network::{Filtering, MappingProtocol, NetworkReport, PortMapping, ResponderReport},
};

use super::{Finding, Level, MORE_TIME, list, millis};
use crate::{client::doctor::SILENT_AFTER, ui::human_duration};

/// What this machine's network can do.
pub(super) fn here(network: &NetworkReport, joined: bool) -> Vec<Finding> {
    let mut found = vec![udp(network, joined)];
    for (name, is_v4) in [("ipv4", true), ("ipv6", false)] {
        found.push(family(name, network, is_v4));
    }
    found.extend(nat(network, "this machine"));
    found.extend(filter(network));
    found.extend(network.port_mapping.map(|mapping| port_mapping(mapping, "this machine")));
    found
}

/// What another host's network can do.
pub(super) fn there(network: &NetworkReport, name: &str) -> Vec<Finding> {
    let told = |name, finding: Finding| Finding::new(name, finding.level.min(Level::Note), finding.what);
    let whose = format!("`{name}`");
    let nat = nat(network, &whose).map(|finding| told("host_nat", finding));
    let filter = filter(network).map(|finding| told("host_filter", finding));
    let mapping = network.port_mapping.map(|mapping| told("host_port_mapping", port_mapping(mapping, &whose)));
    nat.into_iter().chain(filter).chain(mapping).collect()
}

/// Whether STUN requests are answered; `None` if none was asked for long enough.
pub(super) fn udp_gets_out(network: &NetworkReport) -> Option<bool> {
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
                "nothing comes back: no STUN request to {asked} is answered; at best machines of one network are direct"
            );
            new(Level::Fix, what)
                .hint(format!("let UDP out of this network, at least to {asked}, and into the relay's machine there"))
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

fn nat(network: &NetworkReport, whose: &str) -> Option<Finding> {
    let first = seen(network).next()?;
    let new = |level, what: String| Finding::new("nat", level, what);
    if is_seen_as_it_is(network) {
        return Some(new(Level::Good, format!("none towards the relay: {first} is an address of {whose} itself")));
    }
    let (ports, hairpin) = (ports(network.nat.ports), hairpin(network.hairpin));
    Some(match network.nat.mapping {
        Mapping::Unknown => {
            let what = format!("there is one ({whose} is seen as {first}); of what kind cannot be told{hairpin}");
            new(Level::Note, what).hint(second_port(network))
        }
        Mapping::EndpointIndependent => {
            new(Level::Good, format!("there is an easy one: every destination sees {first}{ports}{hairpin}"))
        }
        Mapping::Dependent => {
            new(Level::Note, format!("there is a hard one: each destination sees another port{ports}{hairpin}"))
                .hint("a direct path needs an easier NAT at the other end, an open port in the router, or IPv6")
        }
    })
}

/// How responders see the host.
fn seen(network: &NetworkReport) -> impl Iterator<Item = SocketAddr> {
    network.responders.iter().filter_map(|responder| responder.seen)
}

/// Whether all of them see an address of its own: nothing translates then.
fn is_seen_as_it_is(network: &NetworkReport) -> bool {
    let own = |candidate: &&Candidate| candidate.kind == CandidateKind::Host;
    seen(network).all(|addr| network.candidates.iter().filter(own).any(|candidate| candidate.addr == addr))
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

/// What is let in from outside, by a NAT or by a firewall.
fn filter(network: &NetworkReport) -> Option<Finding> {
    seen(network).next()?;
    let who = if is_seen_as_it_is(network) { "a firewall lets" } else { "the NAT lets" };
    let new = |what: String| Finding::new("filter", Level::Good, what);
    Some(match network.filtering {
        Filtering::Unknown => {
            let what = "not known: that takes a relay of this version whose second STUN port can be reached";
            Finding::new("filter", Level::Note, what)
        }
        Filtering::EndpointIndependent => new("none: what anybody sends gets in".to_owned()),
        Filtering::AddressDependent => new(format!("{who} in what comes from addresses that were sent to")),
        Filtering::PortIndependent => new(
            "none for ports: what comes from any port of an address that was sent to gets in; whether from other addresses \
             too, a relay of one address cannot tell"
                .to_owned(),
        ),
        Filtering::AddressAndPortDependent => {
            new(format!("{who} in only what comes from addresses and ports that were sent to"))
        }
    })
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

fn port_mapping(mapping: PortMapping, whose: &str) -> Finding {
    let new = |level, what: String| Finding::new("port_mapping", level, what);
    match mapping {
        PortMapping::NoAnswer => new(Level::Note, "none: no router answers PCP, NAT-PMP or UPnP".to_owned()),
        PortMapping::Refused { protocol } => {
            new(Level::Note, format!("none: the router answers {}, but opens no port", by(protocol)))
                .hint("if direct paths fail, allow programs to open ports (PCP, UPnP) in the router's settings")
        }
        PortMapping::Open { protocol, addr, life } => {
            let (by, life) = (by(protocol), human_duration(life));
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
        PortMapping::NotNeeded => new(Level::Good, format!("not needed: {whose} has a public IPv4 address of its own")),
        PortMapping::NoRouter => {
            new(Level::Note, "none: no default route leads to a router that could be asked".to_owned())
        }
        PortMapping::Off => new(
            Level::Note,
            "not asked for: `--no-port-mapping`, PEER_PORT_MAPPING or `port-mapping = false` forbids it".to_owned(),
        ),
    }
}

fn by(protocol: MappingProtocol) -> &'static str {
    match protocol {
        MappingProtocol::Pcp => "PCP",
        MappingProtocol::NatPmp => "NAT-PMP",
        MappingProtocol::Upnp => "UPnP",
    }
}
