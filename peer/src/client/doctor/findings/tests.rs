use std::time::Duration;

use peerfleet_proto::{
    id::{InstanceId, PeerId, RoomId},
    path::Reach,
    presence::{Epoch, Mode, Presence, Service},
    request::{
        link::{Candidate, CandidateKind, Mapping, Nat, Ports},
        network::{
            CheckOutcome, CheckReport, Choice, Filtering, MappingProtocol, NetworkReport, PathReport, PortMapping,
            ResponderReport, SearchReport, TakenPath,
        },
        transfer::PathNow,
    },
};

use super::*;
use crate::{
    client::doctor::{HostSeen, SILENT_AFTER},
    machine::{Host, Status},
    mesh::{
        Caller, NotJoined, PathView, Report,
        health::{Health, NoHealth},
    },
};

const LAN: &str = "192.168.1.7:41000";
const WIDE: &str = "203.0.113.9:9";

fn responder(rtt: Option<Duration>, unanswered: u32) -> ResponderReport {
    let seen = rtt.map(|_| WIDE.parse().unwrap());
    ResponderReport { addr: "198.51.100.1:8080".parse().unwrap(), seen, rtt, unanswered }
}

fn good_network() -> NetworkReport {
    NetworkReport {
        udp: true,
        routes_v4: true,
        candidates: vec![
            Candidate { kind: CandidateKind::ServerReflexive, addr: WIDE.parse().unwrap() },
            Candidate { kind: CandidateKind::Host, addr: "192.168.1.4:9".parse().unwrap() },
        ],
        responders: vec![responder(Some(Duration::from_millis(20)), 0)],
        relay_rtt: Some(Duration::from_millis(21)),
        nat: Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving },
        ..NetworkReport::default()
    }
}

fn me() -> Caller {
    Caller { peer: PeerId::from_bytes([1; 32]), instance: InstanceId::from_bytes([1; 16]) }
}

fn well() -> Examination {
    let status = Status {
        version: "1.2.3".to_owned(),
        relay: "ws://relay.test:80".to_owned(),
        room: "home".to_owned(),
        room_id: RoomId::from_bytes([0; 32]),
        uplink: UplinkState::Joined,
        name: "here".to_owned(),
        me: me(),
        mode: Mode::Plan,
        mode_origin: "default".to_owned(),
        no_exec: false,
        state_dir: "/state".to_owned(),
    };
    let network = good_network();
    let report = Report {
        uplink: UplinkState::Joined,
        trouble: None,
        relay: Vec::new(),
        proxy: None,
        measuring: false,
        network,
    };
    let clock = Some(Clock { ahead_ms: -30, within: Duration::from_millis(10) });
    Examination {
        relay: "ws://relay.test".parse().unwrap(),
        daemon: true,
        state_dir: "/state".to_owned(),
        health: Ok(Health { status: "ok".to_owned(), version: "1.2.3".to_owned(), clock }),
        mesh: Ok(InRoom { status, others: 1, report }),
        host: None,
    }
}

fn check(addr: &str, reach: Reach, outcome: CheckOutcome) -> CheckReport {
    let answered = u32::from(outcome == CheckOutcome::Answered);
    let addr = addr.parse().unwrap();
    CheckReport { addr, kind: CandidateKind::Host, reach, sent: 6, answered, heard: 0, rtt: None, outcome }
}

fn path(checks: Vec<CheckReport>, taken: Option<TakenPath>) -> PathReport {
    PathReport { age: Duration::from_secs(6), checks, taken, search: None }
}

/// An examination with a host whose link travels so.
fn with_host(now: Option<PathNow>, ours: Option<PathReport>, theirs: NetworkReport) -> Examination {
    let mut seen = well();
    let presence = Presence {
        name: "web-1".to_owned(),
        tags: Vec::new(),
        os: "linux".to_owned(),
        arch: "x86_64".to_owned(),
        version: "1.2.3".to_owned(),
        mode: Mode::Plan,
        services: vec![Service::Exec],
        epoch: Epoch([0; 16]),
    };
    let host = Host {
        peer: PeerId::from_bytes([2; 32]),
        instance: InstanceId::from_bytes([2; 16]),
        presence,
        present: true,
        here: false,
        link: PathView { now, rtt: Some(Duration::from_millis(40)), ..PathView::default() },
    };
    seen.mesh.as_mut().unwrap().report.network.path = ours;
    seen.host = Some(Ok(HostSeen { host, no_link: None, view: Ok(theirs) }));
    seen
}

fn relayed(checks: Vec<CheckReport>, theirs: NetworkReport) -> Examination {
    with_host(Some(PathNow::Relayed), Some(path(checks, None)), theirs)
}

fn silent() -> Vec<CheckReport> {
    vec![check(LAN, Reach::Lan, CheckOutcome::Silent), check(WIDE, Reach::Wide, CheckOutcome::Silent)]
}

fn of(name: &str, seen: &Examination) -> Finding {
    let mut found: Vec<Finding> = findings(seen).into_iter().filter(|finding| finding.name == name).collect();
    assert_eq!(found.len(), 1, "{name}");
    found.remove(0)
}

fn our_network(seen: &mut Examination) -> &mut NetworkReport {
    &mut seen.mesh.as_mut().unwrap().report.network
}

#[test]
fn a_healthy_machine_has_no_hint_and_exits_0() {
    let found = findings(&well());
    assert!(found.iter().all(|finding| finding.level <= Level::Note), "{found:?}");
    assert_eq!(found.iter().filter(|finding| finding.hint.is_some()).count(), 0);
    assert_eq!(exit_code(&found), 0);
    let names: Vec<&str> = found.iter().map(|finding| finding.name).collect();
    assert_eq!(names, ["state", "daemon", "relay", "clock", "room", "proxy", "udp", "ipv4", "ipv6", "nat", "filter"]);
}

#[test]
fn everything_that_is_to_be_mended_has_a_hint_and_the_exit_code_says_so() {
    let mut seen = relayed(silent(), good_network());
    assert_eq!(exit_code(&findings(&seen)), 1);
    seen.health = Err(NoHealth { cause: "refused".to_owned(), hint: None });
    seen.mesh.as_mut().unwrap().report.uplink = UplinkState::Joining;
    let found = findings(&seen);
    assert_eq!(exit_code(&found), 3, "what cannot be reached weighs more");
    assert!(found.iter().all(|finding| finding.level < Level::Fix || finding.hint.is_some()), "{found:?}");
}

#[test]
fn a_clock_is_told_as_wrong_beyond_the_bound_and_not_before() {
    let told = |ahead_ms: i64| {
        let mut seen = well();
        seen.health.as_mut().unwrap().clock = Some(Clock { ahead_ms, within: Duration::ZERO });
        of("clock", &seen)
    };
    let bound = i64::try_from(CLOCK_BOUND_MS).unwrap();
    assert_eq!([told(bound).level, told(-bound).level], [Level::Good; 2]);
    assert_eq!([told(bound + 1).level, told(-bound - 1).level], [Level::Fix; 2]);
    assert!(told(3_600_000).what.contains("1 h 00 min behind the relay's"), "{:?}", told(3_600_000));
    assert!(told(-3_600_000).what.contains("ahead of the relay's"));
    assert_eq!(told(i64::MIN).level, Level::Fix);
}

#[test]
fn a_relay_that_only_hides_its_health_is_no_unreachable_one() {
    let mut seen = well();
    let cause = "no peerfleet relay answers there: it says `HTTP/1.1 404 Not Found`".to_owned();
    seen.health = Err(NoHealth { cause, hint: None });
    assert_eq!(of("relay", &seen).level, Level::Note);
    assert_eq!(exit_code(&findings(&seen)), 0);
}

#[test]
fn what_can_be_done_about_the_way_to_the_relay_is_told_once() {
    let hint = || Some("ask whoever runs the proxy".to_owned());
    let mut seen = well();
    let report = &mut seen.mesh.as_mut().unwrap().report;
    report.uplink = UplinkState::Joining;
    report.trouble = Some(NotJoined { cause: "the proxy forbids it".to_owned(), hint: hint() });
    assert_eq!(of("room", &seen).hint, hint());
    seen.health = Err(NoHealth { cause: "the proxy forbids it".to_owned(), hint: hint() });
    assert_eq!(of("relay", &seen).hint, hint());
    assert_ne!(of("room", &seen).hint, hint());
}

#[test]
fn a_machine_without_a_token_is_told_what_brings_one() {
    let mut seen = well();
    seen.mesh = Err(Failure::fixable("there is no token").hint("`peer up`"));
    seen.daemon = false;
    seen.host = Some(Err(Failure::fixable("there is no token")));
    let found = findings(&seen);
    assert_eq!(of("room", &seen).hint.as_deref(), Some("`peer up`"));
    assert_eq!((exit_code(&found), found.iter().filter(|finding| finding.what.contains("token")).count()), (1, 1));
}

#[test]
fn udp_is_blocked_only_if_the_relay_is_there_to_answer() {
    let mut seen = well();
    our_network(&mut seen).responders = vec![responder(None, SILENT_AFTER)];
    assert_eq!(of("udp", &seen).level, Level::Fix);
    our_network(&mut seen).responders = vec![responder(Some(Duration::from_millis(9)), SILENT_AFTER)];
    assert_eq!(of("udp", &seen).level, Level::Fix, "it answered once");
    our_network(&mut seen).responders = vec![responder(Some(Duration::from_millis(9)), SILENT_AFTER - 1)];
    assert_eq!(of("udp", &seen).level, Level::Good, "one may get lost");
    our_network(&mut seen).responders = vec![responder(None, SILENT_AFTER)];
    seen.mesh.as_mut().unwrap().report.uplink = UplinkState::Joining;
    assert_eq!(of("udp", &seen).level, Level::Note);
}

#[test]
fn a_relay_without_stun_is_told_as_that() {
    let mut seen = well();
    our_network(&mut seen).responders.clear();
    let finding = of("udp", &seen);
    assert!(finding.hint.unwrap().contains("--no-stun"), "{}", finding.what);
}

#[test]
fn a_family_is_told_with_its_addresses_and_whether_a_way_leads_beyond() {
    let mut seen = well();
    assert_eq!(of("ipv4", &seen).what, "192.168.1.4; seen from outside as 203.0.113.9:9");
    assert_eq!(of("ipv6", &seen).level, Level::Note);
    our_network(&mut seen).routes_v4 = false;
    let told = of("ipv4", &seen);
    assert!(told.level == Level::Note && told.what.ends_with("no way leads beyond its own networks"), "{told:?}");
}

#[test]
fn a_nat_is_told_by_its_kind() {
    let told = |mapping, ports| {
        let mut seen = well();
        our_network(&mut seen).nat = Nat { mapping, ports };
        of("nat", &seen)
    };
    assert!(told(Mapping::EndpointIndependent, Ports::Preserving).what.contains("easy"));
    let hard = told(Mapping::Dependent, Ports::Block { first: 1024, last: 2047 });
    assert!(hard.what.contains("hard") && hard.what.contains("from 1024 to 2047") && hard.hint.is_some());
    assert_eq!(told(Mapping::Unknown, Ports::Unknown).level, Level::Note);
    let mut seen = well();
    our_network(&mut seen).candidates[0].kind = CandidateKind::Host;
    assert!(of("nat", &seen).what.starts_with("none"));
    our_network(&mut seen).responders.clear();
    assert!(!findings(&seen).iter().any(|finding| finding.name == "nat"), "nobody said how it is seen");
}

#[test]
fn what_is_known_of_filter_hairpin_and_router_is_told() {
    let mut seen = well();
    let network = our_network(&mut seen);
    network.filtering = Filtering::AddressAndPortDependent;
    network.hairpin = Some(false);
    assert!(of("nat", &seen).what.ends_with("do not reach each other by their outer addresses"));
    assert_eq!(of("filter", &seen).what, "the NAT lets in only what comes from addresses and ports that were sent to");
    our_network(&mut seen).candidates[0].kind = CandidateKind::Host;
    assert_eq!(
        of("filter", &seen).what,
        "a firewall lets in only what comes from addresses and ports that were sent to"
    );
    our_network(&mut seen).filtering = Filtering::PortIndependent;
    assert!(
        of("filter", &seen).what.contains("a relay of one address cannot tell"),
        "no more is claimed than is known"
    );
    our_network(&mut seen).filtering = Filtering::Unknown;
    assert!(of("filter", &seen).what.starts_with("not known"));
    our_network(&mut seen).responders.clear();
    assert!(!findings(&seen).iter().any(|finding| finding.name == "filter"), "nobody answered at all");
}

#[test]
fn a_hosts_network_is_told_beside_the_way_there_and_weighs_nothing() {
    let there = NetworkReport {
        filtering: Filtering::AddressAndPortDependent,
        nat: Nat { mapping: Mapping::Dependent, ports: Ports::Random },
        port_mapping: Some(PortMapping::Refused { protocol: MappingProtocol::Upnp }),
        ..good_network()
    };
    let seen = with_host(Some(PathNow::Relayed), Some(path(silent(), None)), there);
    for (name, said) in
        [("host_nat", "a hard one"), ("host_filter", "only what comes from"), ("host_port_mapping", "opens no port")]
    {
        let told = of(name, &seen);
        assert!(told.level <= Level::Note && told.hint.is_none() && told.what.contains(said), "{told:?}");
    }
}

#[test]
fn no_advice_is_given_for_a_direct_path_where_there_is_one() {
    let hard = Nat { mapping: Mapping::Dependent, ports: Ports::Random };
    let mut seen = with_host(Some(PathNow::Direct), Some(path(Vec::new(), None)), good_network());
    our_network(&mut seen).nat = hard;
    assert_eq!(of("nat", &seen).hint, None);
    seen.host = None;
    assert!(of("nat", &seen).hint.is_some());
}

#[test]
fn a_proxy_is_told_and_what_it_hinders_is_told_of_the_relay() {
    let mut seen = well();
    assert!(of("proxy", &seen).what.starts_with("none is used"));
    let report = &mut seen.mesh.as_mut().unwrap().report;
    report.proxy = Some("proxy.test:3128".to_owned());
    assert_eq!(of("proxy", &seen).level, Level::Good);
    seen.mesh.as_mut().unwrap().report.uplink = UplinkState::Joining;
    let told = of("proxy", &seen);
    assert!(told.level == Level::Note && told.what.contains("proxy.test:3128"), "{told:?}");
}

#[test]
fn what_asking_the_router_brought_is_told_in_each_case() {
    let addr = "203.0.113.9:41000".parse().unwrap();
    let (pcp, upnp) = (MappingProtocol::Pcp, MappingProtocol::Upnp);
    for (mapping, level, said) in [
        (
            PortMapping::Open { protocol: pcp, addr, life: Duration::from_secs(3600) },
            Level::Good,
            "203.0.113.9:41000 (asked by PCP, for 1 h 00 min at a time)",
        ),
        (PortMapping::Refused { protocol: upnp }, Level::Note, "answers UPnP, but opens no port"),
        (PortMapping::Nested { protocol: pcp, addr }, Level::Note, "behind another NAT"),
        (PortMapping::NoAnswer, Level::Note, "no router answers PCP, NAT-PMP or UPnP"),
        (PortMapping::Asking, Level::Note, "has not answered yet"),
        (PortMapping::NotNeeded, Level::Good, "public IPv4 address"),
        (PortMapping::NoRouter, Level::Note, "no default route"),
        (PortMapping::Off, Level::Note, "--no-port-mapping"),
    ] {
        let mut seen = well();
        our_network(&mut seen).port_mapping = Some(mapping);
        let told = of("port_mapping", &seen);
        assert!(told.level == level && told.what.contains(said), "{told:?}");
    }
    assert!(!findings(&well()).iter().any(|finding| finding.name == "port_mapping"), "nobody was to be asked");
}

#[test]
fn a_second_stun_port_that_does_not_answer_is_told_with_its_address() {
    let mut seen = well();
    let network = our_network(&mut seen);
    network.nat = Nat::default();
    assert!(of("nat", &seen).hint.unwrap().contains("its log"));
    let silent = ResponderReport { addr: "198.51.100.1:8081".parse().unwrap(), ..responder(None, 5) };
    our_network(&mut seen).responders.push(silent);
    assert!(of("nat", &seen).hint.unwrap().contains("at 198.51.100.1:8081, its second STUN port"));
}

#[test]
fn a_direct_path_is_told_with_its_reason() {
    let taken = |why| TakenPath {
        addr: LAN.parse().unwrap(),
        rtt: Duration::from_micros(400),
        age: Duration::from_secs(3),
        why,
    };
    let told = |why| {
        let checks =
            vec![check(LAN, Reach::Lan, CheckOutcome::Answered), check(WIDE, Reach::Wide, CheckOutcome::Answered)];
        of("path", &with_host(Some(PathNow::Direct), Some(path(checks, Some(taken(why)))), good_network()))
    };
    let nearer = told(Choice::Nearer(WIDE.parse().unwrap()));
    assert_eq!(
        nearer.what,
        "direct over the local network to 192.168.1.7:41000, 0.4 ms, for 3.0 s: chosen because it is nearer than 203.0.113.9:9"
    );
    assert_eq!((nearer.level, nearer.hint), (Level::Good, None));
    assert!(told(Choice::Only).what.ends_with("because no other address answers"));
}

#[test]
fn two_hard_nats_are_told_as_hopeless_with_the_two_ways_out() {
    let hard = Nat { mapping: Mapping::Dependent, ports: Ports::Random };
    let mut seen = relayed(silent(), NetworkReport { nat: hard, ..good_network() });
    our_network(&mut seen).nat = hard;
    let finding = of("path", &seen);
    assert_eq!(
        finding.what,
        "relayed (40.0 ms): both NATs give every destination another port; nothing can be done but a port mapping or IPv6"
    );
    assert!(finding.hint.unwrap().contains("IPv6"));
}

#[test]
fn a_search_for_a_hard_nats_port_is_told_with_how_it_stands() {
    let hard = Nat { mapping: Mapping::Dependent, ports: Ports::Random };
    let mut seen = relayed(silent(), NetworkReport { nat: hard, ..good_network() });
    let told = of("path", &seen).what;
    assert!(told.ends_with("the NAT of `web-1` gives every destination another port"), "{told}");
    for (search, said) in [
        (SearchReport::Waiting, "begins in a moment"),
        (SearchReport::Running, "is being searched for"),
        (SearchReport::GivenUp, "searched for in vain"),
    ] {
        our_network(&mut seen).path.as_mut().unwrap().search = Some(search);
        let told = of("path", &seen).what;
        assert!(told.contains(said), "{told}");
    }
}

#[test]
fn blocked_udp_is_told_with_whose_network_blocks_it() {
    let blocked = || NetworkReport { responders: vec![responder(None, 5)], ..good_network() };
    assert!(of("path", &relayed(silent(), blocked())).what.contains("the network of `web-1` does not let UDP through"));
    let mut seen = relayed(silent(), good_network());
    our_network(&mut seen).responders = vec![responder(None, 5)];
    assert!(of("path", &seen).what.contains("this machine's network does not let UDP through"));
    let mut seen = relayed(silent(), blocked());
    our_network(&mut seen).responders = vec![responder(None, 5)];
    assert!(of("path", &seen).what.contains("neither"));
}

#[test]
fn families_that_do_not_meet_are_told() {
    let never = vec![check("[2001:db8::7]:9", Reach::Wide, CheckOutcome::NotTried)];
    let told = of("path", &relayed(never, good_network())).what;
    assert!(told.contains("`web-1` has IPv6 alone"), "{told}");
    let never = vec![
        check(WIDE, Reach::Wide, CheckOutcome::NoRoute),
        check("[2001:db8::7]:9", Reach::Wide, CheckOutcome::NotTried),
    ];
    assert!(of("path", &relayed(never, good_network())).what.contains("knows no way to any address"));
    assert!(of("path", &relayed(Vec::new(), good_network())).what.contains("names no address"));
}

#[test]
fn of_a_firewall_it_is_told_on_which_side_it_is() {
    let heard = || {
        let mut checks = silent();
        checks[0].heard = 3;
        checks
    };
    let theirs = |checks| NetworkReport { path: Some(path(checks, None)), ..good_network() };
    assert!(of("path", &relayed(heard(), theirs(silent()))).what.contains("a firewall in front of it"));
    assert!(of("path", &relayed(silent(), theirs(heard()))).what.contains("a firewall in front of this machine"));
    assert!(of("path", &relayed(silent(), theirs(silent()))).what.contains("on either side"));
}

#[test]
fn what_is_still_going_on_forged_or_lost_is_told_as_that() {
    let told = |outcome| of("path", &relayed(vec![check(LAN, Reach::Lan, outcome)], good_network())).what;
    assert!(told(CheckOutcome::Waiting).contains("still being checked"));
    assert!(told(CheckOutcome::Forged).contains("somebody else"));
    assert!(told(CheckOutcome::Lost).contains("answers no more"));
    assert!(told(CheckOutcome::Distrusted).contains("larger than a check"));
}

#[test]
fn a_host_without_a_link_or_of_no_such_name_is_unreachable() {
    let mut seen = with_host(None, None, good_network());
    assert_eq!(of("path", &seen).level, Level::Unreachable);
    seen.host = Some(Err(Failure::unreachable("cannot reach `x`").hint("`peer ls`")));
    let finding = of("host", &seen);
    assert_eq!((finding.level, finding.hint.as_deref()), (Level::Unreachable, Some("`peer ls`")));
    assert!(!findings(&seen).iter().any(|finding| finding.name == "path"));
}

#[test]
fn a_host_that_tells_no_view_is_still_examined_from_here() {
    let mut seen = relayed(silent(), good_network());
    let Some(Ok(visited)) = &mut seen.host else { panic!("there is a host") };
    visited.view =
        Err(Failure::new(Kind::Refused, "it does not tell its view").cause("its mode is disabled").hint("h"));
    let finding = of("host", &seen);
    assert_eq!(finding.level, Level::Note);
    assert!(finding.what.ends_with("it does not tell its view: its mode is disabled"), "{}", finding.what);
    assert!(of("path", &seen).what.contains("no address of `web-1` answers"));
}
