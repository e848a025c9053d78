use std::sync::Arc;

use peerfleet_proto::{
    id::InstanceId,
    path::{CheckKey, Role, nat64::Prefix, search::Shot},
    request::{link::Route, network::MappingProtocol},
    stun::{Class, Draft, Message},
};

use super::*;
use crate::mesh::{
    PathConfig,
    agreement::Agreed,
    interfaces::{Address, Interface, Purpose, Standing},
    path::{PathEvent, Whereabouts},
    routes::{Remote, Routes},
    socket::FromSocket,
    surroundings::{Surroundings, Teller},
};

const PORT: u16 = 40_000;
const RELAY: &str = "203.0.113.1:8080";

fn remote() -> Arc<Remote> {
    Routes::default().add(InstanceId::from_bytes([1; 16]), Route::Auto, None)
}

/// Paths with one agent, whose relay answers STUN on two ports.
fn paths(now: Instant) -> (Paths, tokio::sync::mpsc::Receiver<Told>) {
    let (surroundings, facts) = Surroundings::new(PathConfig::default());
    let mut paths = Paths::new(surroundings, now);
    paths.set_responders(vec![RELAY.parse().unwrap()], Some(8081), now);
    paths.open((PORT, true), now);
    let check_key = CheckKey::agree(&[1; 32], &[2; 32]);
    let agreed = Agreed { remote: remote(), check_key, role: Role::Controlling };
    paths.add(agreed, Whereabouts::default(), &Routes::default(), now);
    (paths, facts)
}

fn seen_as(request: &Shot, seen: &str) -> FromSocket {
    let transaction = Message::parse(&request.bytes).unwrap().transaction();
    let packet = Draft::new(Class::Success, transaction).mapped_address(seen.parse().unwrap()).finish();
    FromSocket::Stun { via: None, from: request.to, packet: packet.into() }
}

/// Answers what the responders are asked, by the port that is asked.
fn answer(paths: &mut Paths, seen: impl Fn(u16) -> String, now: Instant) {
    while let Some(request) = paths.poll_transmit() {
        if request.to.ip().to_string() == "203.0.113.1" {
            paths.handle_note(seen_as(&request, &seen(request.to.port())), &Routes::default(), now);
        }
        while paths.poll_event(now).is_some() {}
    }
}

#[tokio::test]
async fn a_nat_that_shows_all_the_same_address_is_told_as_independent() {
    let now = Instant::now();
    let (mut paths, _facts) = paths(now);
    answer(&mut paths, |_| format!("198.51.100.7:{PORT}"), now);
    assert_eq!(paths.nat, Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving });
}

#[tokio::test]
async fn a_nat_that_shows_each_another_address_is_told_as_dependent_with_its_ports_once_they_are_known() {
    let now = Instant::now();
    let (mut paths, _facts) = paths(now);
    answer(&mut paths, |port| format!("198.51.100.7:{}", port + 1000), now);
    assert_eq!(paths.nat, Nat { mapping: Mapping::Dependent, ports: Ports::Unknown });
    paths.handle_fact(Fact::Ports(Ports::Random), now);
    assert_eq!(paths.nat, Nat { mapping: Mapping::Dependent, ports: Ports::Random });
    assert!(matches!(paths.poll_event(now), Some(PathEvent::Moved(_))), "the others are told");
}

#[tokio::test]
async fn an_address_of_our_own_that_comes_back_from_a_responder_means_that_there_is_no_nat() {
    let now = Instant::now();
    let (mut paths, _facts) = paths(now);
    let own = format!("127.0.0.1:{PORT}");
    let request = paths.poll_transmit().unwrap();
    paths.handle_note(seen_as(&request, &own), &Routes::default(), now);
    while paths.poll_event(now).is_some() {}
    assert_eq!(paths.nat, Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving });
}

#[tokio::test]
async fn our_own_request_that_a_nat_sends_back_tells_of_a_hairpin() {
    let now = Instant::now();
    let (mut paths, _facts) = paths(now);
    let request = paths.poll_transmit().unwrap();
    paths.handle_note(seen_as(&request, "198.51.100.7:4000"), &Routes::default(), now);
    while paths.poll_event(now).is_some() {}
    let to_ourselves = std::iter::from_fn(|| paths.poll_transmit()).find(|sent| sent.to.port() == 4000).unwrap();
    assert!(paths.is_measuring());
    let back = FromSocket::Stun { via: None, from: to_ourselves.to, packet: to_ourselves.bytes.into() };
    paths.handle_note(back, &Routes::default(), now);
    assert_eq!(paths.hairpin.outcome(), Some(true));
}

#[tokio::test]
async fn words_of_a_change_are_followed_by_one_look_when_they_have_settled() {
    let now = Instant::now();
    let (mut paths, _facts) = paths(now);
    paths.handle_timeout(now);
    for at in 0..5 {
        paths.handle_fact(Fact::Interfaces, now + Duration::from_millis(at * 10));
    }
    assert_eq!(paths.look_at, now + SETTLE);
}

#[tokio::test]
async fn in_a_new_place_every_address_is_checked_once_and_none_through_the_nat64_of_the_old_one() {
    let mut now = Instant::now();
    let (surroundings, _facts) = Surroundings::new(PathConfig::default());
    let mut paths = Paths::new(surroundings, now);
    paths.open((PORT, true), now);
    let there = "203.0.113.7:9".parse().unwrap();
    let candidates = vec![Candidate { kind: CandidateKind::Host, addr: there }];
    let check_key = CheckKey::agree(&[1; 32], &[2; 32]);
    let agreed = Agreed { remote: remote(), check_key, role: Role::Controlling };
    let shown = |ips: &[&str]| {
        let addresses = ips.iter().map(|ip| Address { ip: ip.parse().unwrap(), prefix: 24, standing: Standing::Usual });
        vec![Interface { name: "any".into(), purpose: Purpose::Default, addresses: addresses.collect(), mtu: None }]
    };
    paths.interfaces = shown(&["192.0.2.5", "2001:db8::5"]);
    paths.begin_anew(now);
    paths.add(agreed, Whereabouts { candidates, nat: Nat::default() }, &Routes::default(), now);
    paths.handle_fact(Fact::Nat64(Prefix::WELL_KNOWN), now);
    let checked = |paths: &mut Paths, now: &mut Instant| {
        let mut checked = Vec::new();
        for _ in 0..8 {
            while paths.poll_event(*now).is_some() {}
            checked.extend(std::iter::from_fn(|| paths.poll_transmit()).map(|shot| shot.to));
            *now += Duration::from_millis(5);
            paths.agents.handle_timeout(*now);
        }
        checked
    };
    let through = SocketAddr::new(Prefix::WELL_KNOWN.embed([203, 0, 113, 7].into()).into(), 9);
    assert_eq!(checked(&mut paths, &mut now), [there, through]);
    paths.interfaces = shown(&["198.51.100.5", "2001:db8:1::5"]);
    paths.begin_anew(now);
    assert_eq!(checked(&mut paths, &mut now), [there]);
}

#[tokio::test]
async fn what_was_learnt_elsewhere_is_not_believed_here() {
    let now = Instant::now();
    let (mut paths, _facts) = paths(now);
    let (teller, mut elsewhere) = Teller::new();
    teller.tell(Fact::Router(mapped("198.51.100.7:9"))).await.unwrap();
    let told = elsewhere.recv().await.unwrap();
    paths.begin_anew(now);
    paths.handle_told(told, now);
    assert_eq!(paths.sampled.mapped(), None);
    paths.handle_fact(Fact::Router(mapped("198.51.100.8:9")), now);
    assert!(paths.candidates().iter().any(|candidate| candidate.kind == CandidateKind::Mapped));
}

fn mapped(addr: &str) -> PortMapping {
    let (protocol, life) = (MappingProtocol::Pcp, Duration::from_secs(3600));
    PortMapping::Open { protocol, addr: addr.parse().unwrap(), life }
}

#[tokio::test]
async fn what_is_let_in_is_tried_once_in_each_place_and_again_when_somebody_wants_to_know() {
    let now = Instant::now();
    let (mut paths, _facts) = paths(now);
    let seen = |_: u16| format!("198.51.100.7:{PORT}");
    assert!(!paths.sampled.filtering().1, "nobody answered yet");
    answer(&mut paths, seen, now);
    assert!(paths.sampled.filtering().1 && paths.is_measuring());
    paths.handle_fact(Fact::Filtering(Filtering::PortIndependent), now);
    answer(&mut paths, seen, now);
    assert_eq!(paths.sampled.filtering(), (Filtering::PortIndependent, false));
    paths.measure(now);
    assert!(paths.sampled.filtering().1 && paths.is_measuring());
    paths.handle_fact(Fact::Filtering(Filtering::Unknown), now);
    assert_eq!(paths.report(None, now).filtering, Filtering::PortIndependent, "it was known in this place");
    paths.begin_anew(now);
    assert_eq!(paths.sampled.filtering(), (Filtering::Unknown, false));
    answer(&mut paths, seen, now);
    assert!(paths.sampled.filtering().1 && paths.is_measuring());
}

#[tokio::test]
async fn a_relay_without_a_second_port_is_not_asked_what_is_let_in() {
    let now = Instant::now();
    let (mut paths, _facts) = paths(now);
    paths.set_responders(vec![RELAY.parse().unwrap()], None, now);
    answer(&mut paths, |_| format!("198.51.100.7:{PORT}"), now);
    assert!(!paths.sampled.filtering().1);
}

/// A name space of its own for one test, which this test calls itself again in.
#[cfg(target_os = "linux")]
mod in_a_namespace {
    use std::process::Command;

    use super::*;
    use crate::mesh::interfaces::networks;

    /// Set in the inner run.
    const INNER: &str = "PEERFLEET_TEST_NAMESPACE";

    fn ip(arguments: &str) {
        let status =
            Command::new("ip").args(arguments.split(' ')).status().expect("`ip` is there where this test runs");
        assert!(status.success(), "ip {arguments}");
    }

    /// Whether this is the inner run; the outer one waits for it here.
    fn is_inner(test: &str) -> bool {
        if std::env::var_os(INNER).is_some() {
            return true;
        }
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("PEERFLEET_REQUIRE_ALL").is_none(), "name spaces need root");
            eprintln!("SKIPPED: {test} needs root");
            return false;
        }
        let me = std::env::current_exe().unwrap();
        let mut inner = Command::new("unshare");
        inner.args(["--net", "--mount"]).arg(me).args(["--exact", "--nocapture", test]).env(INNER, "1");
        let output = inner.output().expect("`unshare` is there where this test runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "the inner run found the test");
        false
    }

    #[test]
    fn the_others_are_told_of_the_nat_unless_searches_are_not_wanted() {
        let nat = Nat { mapping: Mapping::Dependent, ports: Ports::Random };
        for (hard_nat_search, told) in [(true, nat), (false, Nat::default())] {
            let now = Instant::now();
            let (surroundings, _facts) = Surroundings::new(PathConfig { hard_nat_search, ..PathConfig::default() });
            let mut paths = Paths::new(surroundings, now);
            paths.set_nat(nat);
            let Some(PathEvent::Moved(here)) = paths.poll_event(now) else { panic!("nobody is told") };
            assert_eq!((here.nat, paths.whereabouts().nat), (told, told));
            paths.set_nat(nat);
            assert!(paths.poll_event(now).is_none(), "the same again is no news");
        }
    }

    #[test]
    fn a_new_address_is_told_within_a_second_and_a_gone_one_too() {
        let test = "mesh::path::here::tests::in_a_namespace::a_new_address_is_told_within_a_second_and_a_gone_one_too";
        if !is_inner(test) {
            return;
        }
        for command in ["link set lo up", "link add lan0 type veth peer name lan1", "link set lan0 up"] {
            ip(command);
        }
        ip("link set lan1 up");
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let (mut paths, mut facts) = paths(Instant::now());
            paths.handle_timeout(Instant::now());
            // Words of the interfaces being made may still come.
            while tokio::time::timeout(SETTLE * 3, facts.recv()).await.is_ok() {}
            paths.look(Instant::now());
            while paths.poll_event(Instant::now()).is_some() {}
            ip("addr add 10.9.8.7/20 dev lan0");
            let began = Instant::now();
            told(&mut paths, &mut facts, |ips| ips.contains(&"10.9.8.7".into())).await;
            println!("a new address was told after {:?}", began.elapsed());
            assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
            assert_eq!(networks(&paths.interfaces), [peerfleet_proto::path::Network::new([10, 9, 0, 0].into(), 20)]);
            ip("addr del 10.9.8.7/20 dev lan0");
            let began = Instant::now();
            told(&mut paths, &mut facts, |ips| !ips.contains(&"10.9.8.7".into())).await;
            assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        });
    }

    /// A relay in the world behind a router, as a process of its own: this very program again.
    struct World(std::process::Child);

    impl Drop for World {
        fn drop(&mut self) {
            // It may have ended by itself, in failure; then the test fails for want of answers.
            _ = self.0.kill();
            _ = self.0.wait();
        }
    }

    const IN_THE_WORLD: &str = "PEERFLEET_TEST_WORLD";
    const RELAY_IN_THE_WORLD: &str = "203.0.113.9:8080";

    #[test]
    fn the_relay_in_the_world_of_another_test_runs_while_it_is_wanted() {
        if std::env::var_os(IN_THE_WORLD).is_none() {
            return;
        }
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let bind = vec![RELAY_IN_THE_WORLD.parse().unwrap()];
            let config = peerfleet_relay::Config { bind, ..peerfleet_relay::Config::default() };
            peerfleet_relay::Relay::bind(config).unwrap().run().await;
        });
    }

    /// Lays cables from here through a router into a world with a relay.
    fn world() -> World {
        assert!(Command::new("mount").args(["-t", "tmpfs", "none", "/run"]).status().unwrap().success());
        ip("netns add router");
        ip("netns add world");
        ip("link set lo up");
        ip("link add lan0 type veth peer name r0 netns router");
        ip("-n router link add r1 type veth peer name w0 netns world");
        ip("addr add 10.1.0.2/24 dev lan0");
        ip("-n router addr add 10.1.0.1/24 dev r0");
        ip("-n router addr add 203.0.113.1/24 dev r1");
        ip("-n world addr add 203.0.113.9/24 dev w0");
        for link in
            ["link set lan0 up", "-n router link set r0 up", "-n router link set r1 up", "-n world link set w0 up"]
        {
            ip(link);
        }
        ip("route add default via 10.1.0.1");
        ip("netns exec router sysctl -qw net.ipv4.ip_forward=1");
        let me = std::env::current_exe().unwrap();
        let test =
            "mesh::path::here::tests::in_a_namespace::the_relay_in_the_world_of_another_test_runs_while_it_is_wanted";
        let mut relay = Command::new("ip");
        relay.args(["netns", "exec", "world"]).arg(me).args(["--exact", test]).env(IN_THE_WORLD, "1");
        World(relay.spawn().unwrap())
    }

    fn translate(rule: &str) {
        for words in ["add table ip nat", "flush table ip nat"] {
            ip(&format!("netns exec router nft {words}"));
        }
        ip("netns exec router nft add chain ip nat post { type nat hook postrouting priority 100 ; }");
        ip(&format!("netns exec router nft add rule ip nat post oifname r1 meta l4proto udp {rule}"));
    }

    /// What two ports of the relay and, if they see two addresses, sixteen sockets tell.
    async fn told_of_nat() -> Nat {
        let socket = tokio::net::UdpSocket::bind("0.0.0.0:0").await.unwrap();
        let port = socket.local_addr().unwrap().port();
        let mut reflexive = Reflexive::new([1; 32], Instant::now());
        reflexive.set_responders(&[RELAY_IN_THE_WORLD.parse().unwrap()], Instant::now());
        reflexive.set_witnesses(&["203.0.113.9:8081".parse().unwrap()], Instant::now());
        let mut buffer = [0; 200];
        while reflexive.mapping() == Mapping::Unknown {
            while let Some(request) = reflexive.poll_transmit() {
                // Until the relay has started, the system says that nobody is there.
                _ = socket.send_to(&request.bytes, request.to).await;
            }
            let due = reflexive.poll_timeout().unwrap();
            tokio::select! {
                received = socket.recv_from(&mut buffer) => {
                    let Ok((len, from)) = received else { continue };
                    reflexive.handle_packet(from, &buffer[..len], Instant::now());
                }
                () = tokio::time::sleep_until(due.into()) => reflexive.handle_timeout(Instant::now()),
            }
        }
        let (nat, asks) = judged(&reflexive, port, &[], Ports::Unknown);
        let Some(responder) = asks else { return nat };
        Nat { ports: crate::mesh::sampling::sample(responder).await.unwrap(), ..nat }
    }

    #[test]
    fn what_the_nat_of_a_real_kernel_does_is_told() {
        if !is_inner("mesh::path::here::tests::in_a_namespace::what_the_nat_of_a_real_kernel_does_is_told") {
            return;
        }
        let _world = world();
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            translate("masquerade");
            let kept = Nat { mapping: Mapping::EndpointIndependent, ports: Ports::Preserving };
            assert_eq!(told_of_nat().await, kept);
            translate("masquerade fully-random");
            assert_eq!(told_of_nat().await, Nat { mapping: Mapping::Dependent, ports: Ports::Random });
            translate("masquerade to :20480-21503 fully-random");
            let block = Ports::Block { first: 20_480, last: 21_503 };
            assert_eq!(told_of_nat().await, Nat { mapping: Mapping::Dependent, ports: block });
        });
    }

    /// Drives the paths as the instance does, until the others are told candidates of this kind.
    async fn told(paths: &mut Paths, facts: &mut tokio::sync::mpsc::Receiver<Told>, holds: impl Fn(&[String]) -> bool) {
        loop {
            let now = Instant::now();
            paths.handle_timeout(now);
            while paths.poll_transmit().is_some() {}
            while let Some(event) = paths.poll_event(now) {
                let PathEvent::Moved(Whereabouts { candidates, .. }) = event else { continue };
                let ips: Vec<_> = candidates.iter().map(|candidate| candidate.addr.ip().to_string()).collect();
                if holds(&ips) {
                    return;
                }
            }
            let due = paths.poll_timeout().unwrap_or(now + Duration::from_secs(1));
            tokio::select! {
                Some(told) = facts.recv() => paths.handle_told(told, Instant::now()),
                () = tokio::time::sleep_until(due.into()) => {}
            }
        }
    }
}
