//! `peer doctor --json`: one object, whose fields and words are stable; further ones may come. What is not known is null.

use std::{net::SocketAddr, time::Duration};

use peerfleet_proto::request::{
    link::Candidate,
    network::{CheckReport, Choice, NetworkReport, PathReport, PortMapping, ResponderReport, TakenPath},
    transfer::PathNow,
};
use serde_json::{Value, json};

use super::word;
use crate::{
    client::doctor::{
        Examination, HostSeen,
        findings::{Finding, exit_code},
    },
    mesh::UplinkState,
};

/// All that was seen and found.
pub(super) fn report(seen: &Examination, found: &[Finding]) -> Value {
    let in_room = seen.mesh.as_ref().ok();
    let findings: Vec<Value> = found.iter().map(finding).collect();
    json!({
        "ok": exit_code(found) == 0,
        "findings": findings,
        "daemon": seen.daemon,
        "state_dir": seen.state_dir,
        "relay": relay(seen),
        "network": in_room.map(|in_room| network(&in_room.report.network)),
        "host": seen.host.as_ref().and_then(|host| host.as_ref().ok()).map(|visited| host(seen, visited)),
    })
}

fn finding(finding: &Finding) -> Value {
    let Finding { name, level, what, hint } = finding;
    json!({ "name": name, "level": level.word(), "what": what, "hint": hint })
}

fn relay(seen: &Examination) -> Value {
    let health = seen.health.as_ref().ok();
    let report = seen.mesh.as_ref().ok().map(|in_room| &in_room.report);
    let clock = health.and_then(|health| health.clock);
    let not_joined = report.and_then(|report| report.trouble.as_ref()).map(ToString::to_string);
    let trouble = not_joined.or_else(|| seen.health.as_ref().err().map(ToString::to_string));
    json!({
        "url": seen.relay.to_string(),
        "status": health.map(|health| &health.status),
        "version": health.map(|health| &health.version),
        "joined": report.is_some_and(|report| report.uplink == UplinkState::Joined),
        "trouble": trouble,
        "addresses": report.map(|report| &report.relay),
        "proxy": report.and_then(|report| report.proxy.as_ref()),
        "rtt_ms": report.and_then(|report| report.network.relay_rtt).map(ms),
        "clock_ahead_ms": clock.map(|clock| clock.ahead_ms),
        "clock_within_ms": clock.map(|clock| ms(clock.within)),
    })
}

fn network(network: &NetworkReport) -> Value {
    json!({
        "udp": network.udp,
        "routes_v4": network.routes_v4,
        "routes_v6": network.routes_v6,
        "addresses": network.candidates.iter().map(candidate).collect::<Vec<_>>(),
        "stun": network.responders.iter().map(responder).collect::<Vec<_>>(),
        "nat": {
            "mapping": word::mapping(network.nat.mapping),
            "ports": word::ports(network.nat.ports),
            "filtering": word::filtering(network.filtering),
            "hairpin": network.hairpin,
        },
        "port_mapping": network.port_mapping.map(port_mapping),
    })
}

fn candidate(candidate: &Candidate) -> Value {
    json!({ "address": candidate.addr, "kind": word::kind(candidate.kind) })
}

fn responder(responder: &ResponderReport) -> Value {
    let ResponderReport { addr, seen, rtt, unanswered } = *responder;
    json!({ "address": addr, "sees": seen, "rtt_ms": rtt.map(ms), "unanswered": unanswered })
}

fn port_mapping(mapping: PortMapping) -> Value {
    let (protocol, address, life) = match mapping {
        PortMapping::Refused { protocol } => (Some(protocol), None, None),
        PortMapping::Open { protocol, addr, life } => (Some(protocol), Some(addr), Some(life)),
        PortMapping::Nested { protocol, addr } => (Some(protocol), Some(addr), None),
        PortMapping::NoAnswer
        | PortMapping::Asking
        | PortMapping::NotNeeded
        | PortMapping::NoRouter
        | PortMapping::Off => (None, None, None),
    };
    json!({
        "state": word::port_mapping(mapping),
        "protocol": protocol.map(word::protocol),
        "address": address,
        "life_s": life.map(|life| life.as_secs()),
    })
}

fn host(seen: &Examination, visited: &HostSeen) -> Value {
    let (host, link) = (&visited.host, &visited.host.link);
    let view = visited.view.as_ref().ok();
    json!({
        "id": host.peer.to_string(),
        "name": host.name(),
        "here": host.here,
        "path": link.now.map(|now| match now {
            PathNow::Direct => "direct",
            PathNow::Relayed => "relayed",
        }),
        "address": link.address,
        "rtt_ms": link.rtt.map(ms),
        "age_s": link.age.map(|age| age.as_secs_f64()),
        "no_link": visited.no_link,
        "from_here": seen.path().map(path),
        "from_there": view.and_then(|view| view.path.as_ref()).map(path),
        "network": view.map(network),
    })
}

fn path(path: &PathReport) -> Value {
    json!({
        "age_s": path.age.as_secs_f64(),
        "taken": path.taken.as_ref().map(taken),
        "checks": path.checks.iter().map(check).collect::<Vec<_>>(),
        "search": path.search.map(word::search),
    })
}

fn taken(taken: &TakenPath) -> Value {
    let TakenPath { addr, rtt, age, why } = *taken;
    json!({
        "address": addr,
        "rtt_ms": ms(rtt),
        "age_s": age.as_secs_f64(),
        "why": word::choice(why),
        "than": than(why),
    })
}

fn than(why: Choice) -> Option<SocketAddr> {
    match why {
        Choice::Only => None,
        Choice::Nearer(other)
        | Choice::Faster(other)
        | Choice::Ipv6(other)
        | Choice::Kind(other)
        | Choice::Kept(other) => Some(other),
    }
}

fn check(check: &CheckReport) -> Value {
    let CheckReport { addr, kind, reach, sent, answered, heard, rtt, outcome } = *check;
    json!({
        "address": addr,
        "kind": word::kind(kind),
        "where": word::reach(reach),
        "sent": sent,
        "answered": answered,
        "heard": heard,
        "rtt_ms": rtt.map(ms),
        "outcome": word::outcome(outcome),
    })
}

fn ms(span: Duration) -> f64 {
    (span.as_secs_f64() * 1e6).round() / 1e3
}
