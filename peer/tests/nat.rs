//! Hosts behind real NATs of the kernel find the direct paths that there are, and reach each other where there is none.
//!
//! The programs are the real ones: a relay and two peers, each on a machine of its own as far as they can tell. Needs root,
//! and the programs that `.ci/run` installs; says loudly where it is skipped, and fails instead if `PEERFLEET_REQUIRE_ALL` is set.

#![cfg(target_os = "linux")]
#![expect(clippy::print_stderr, reason = "who reads a failed or skipped run has nothing else")]

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

#[path = "nat/cable.rs"]
mod cable;
#[path = "nat/echo.rs"]
mod echo;
#[path = "nat/filtering.rs"]
mod filtering;
#[path = "nat/hard.rs"]
mod hard;
#[path = "nat/lab.rs"]
mod lab;
#[path = "nat/life.rs"]
mod life;
#[path = "nat/measure.rs"]
mod measure;
#[path = "nat/program.rs"]
mod program;

use lab::{Kind, Lab, Site};
use program::{Peer, Sent};

/// Time for a small file to arrive by a direct path, from the command to its end: punching takes a tenth of it.
const DIRECT_WITHIN: Duration = Duration::from_secs(10);

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// One test for each pair of sites: what is written down here is what must be, in both directions. A pair that is to be
/// relayed has the reason beside it; one that can be direct and is not is a bug, never a line here.
macro_rules! pairs {
    (
        direct { $($direct:ident: $a:ident, $b:ident;)* }
        relayed { $($relayed:ident: $c:ident, $d:ident, $why:literal;)* }
    ) => {
        mod a_direct_path_is_found_between {
            $(#[test] fn $direct() { super::become_direct(super::Kind::$a, super::Kind::$b); })*
        }

        mod the_relay_carries_between {
            $(#[test] fn $relayed() { super::stay_relayed(super::Kind::$c, super::Kind::$d, $why); })*
        }

        const PAIRS: &[[Kind; 2]] = &[$([Kind::$a, Kind::$b],)* $([Kind::$c, Kind::$d],)*];
    };
}

pairs! {
    direct {
        two_public_hosts: Public, Public;
        a_public_host_and_a_full_cone: Public, FullCone;
        a_public_host_and_an_address_restricted_nat: Public, AddressRestricted;
        a_public_host_and_a_port_restricted_nat: Public, PortRestricted;
        a_public_host_and_a_symmetric_nat: Public, Symmetric;
        a_public_host_and_a_double_nat: Public, DoubleNat;
        a_public_host_and_one_with_ipv6_alone: Public, V6Only;
        two_full_cones: FullCone, FullCone;
        a_full_cone_and_an_address_restricted_nat: FullCone, AddressRestricted;
        a_full_cone_and_a_port_restricted_nat: FullCone, PortRestricted;
        a_full_cone_and_a_symmetric_nat: FullCone, Symmetric;
        a_full_cone_and_a_double_nat: FullCone, DoubleNat;
        two_address_restricted_nats: AddressRestricted, AddressRestricted;
        an_address_restricted_and_a_port_restricted_nat: AddressRestricted, PortRestricted;
        an_address_restricted_and_a_symmetric_nat: AddressRestricted, Symmetric;
        an_address_restricted_and_a_double_nat: AddressRestricted, DoubleNat;
        two_port_restricted_nats: PortRestricted, PortRestricted;
        a_port_restricted_and_a_double_nat: PortRestricted, DoubleNat;
        two_double_nats: DoubleNat, DoubleNat;
        two_firewalled_hosts_with_ipv6_alone: V6Only, V6Only;
        a_port_restricted_and_a_symmetric_nat: PortRestricted, Symmetric;
        a_double_and_a_symmetric_nat: DoubleNat, Symmetric;
    }
    relayed {
        two_symmetric_nats: Symmetric, Symmetric,
            "where either will send from, nobody knows";
        a_public_host_and_one_without_udp: Public, WithoutUdp, "no UDP passes";
        a_full_cone_and_a_host_without_udp: FullCone, WithoutUdp, "no UDP passes";
        an_address_restricted_nat_and_a_host_without_udp: AddressRestricted, WithoutUdp, "no UDP passes";
        a_port_restricted_nat_and_a_host_without_udp: PortRestricted, WithoutUdp, "no UDP passes";
        a_symmetric_nat_and_a_host_without_udp: Symmetric, WithoutUdp, "no UDP passes";
        a_double_nat_and_a_host_without_udp: DoubleNat, WithoutUdp, "no UDP passes";
        two_hosts_without_udp: WithoutUdp, WithoutUdp, "no UDP passes";
        a_host_with_ipv6_alone_and_one_without_udp: V6Only, WithoutUdp, "no UDP passes";
        a_full_cone_and_a_host_with_ipv6_alone: FullCone, V6Only, "they have no family of addresses in common";
        an_address_restricted_nat_and_a_host_with_ipv6_alone: AddressRestricted, V6Only,
            "they have no family of addresses in common";
        a_port_restricted_nat_and_a_host_with_ipv6_alone: PortRestricted, V6Only,
            "they have no family of addresses in common";
        a_symmetric_nat_and_a_host_with_ipv6_alone: Symmetric, V6Only, "they have no family of addresses in common";
        a_double_nat_and_a_host_with_ipv6_alone: DoubleNat, V6Only, "they have no family of addresses in common";
    }
}

#[test]
fn every_pair_of_sites_is_in_the_table_once() {
    let sorted = |[a, b]: [Kind; 2]| if a <= b { [a, b] } else { [b, a] };
    let written: BTreeSet<_> = PAIRS.iter().copied().map(sorted).collect();
    let all: BTreeSet<_> = Kind::ALL.into_iter().flat_map(|a| Kind::ALL.map(|b| sorted([a, b]))).collect();
    assert_eq!(written, all);
    assert_eq!(PAIRS.len(), all.len());
}

#[test]
fn two_hosts_behind_one_symmetric_nat_reach_each_other_within_their_network() {
    let Some(lab) = Lab::new() else { return };
    let site = lab.site(Kind::Symmetric);
    let (one, other) = (lab.host(&site, "one"), lab.host(&site, "other"));
    exchange_directly("within one network", &one, &other);
}

struct Pair {
    first: (Site, Peer),
    second: (Site, Peer),
}

fn pair(lab: &Lab, first: Kind, second: Kind) -> Pair {
    let sites = (lab.site(first), lab.site(second));
    let hosts = (lab.host(&sites.0, "one"), lab.host(&sites.1, "other"));
    Pair { first: (sites.0, hosts.0), second: (sites.1, hosts.1) }
}

/// Labs that a pair may take whose path is found by a search: the first round finds it 98 times in 100
/// (`peerfleet_proto::path::search`), so three are in vain once in 100,000 times.
const DRAWS: usize = 3;

/// Two hosts at such sites; where a search has to find the path, those of a lab in which it did.
fn met(first: Kind, second: Kind) -> Option<(Lab, Pair)> {
    let has = |kind: Kind| first == kind || second == kind;
    let is_searched = has(Kind::Symmetric) && (has(Kind::PortRestricted) || has(Kind::DoubleNat));
    for draw in 1.. {
        let lab = Lab::new()?;
        let pair = pair(&lab, first, second);
        if !is_searched || draw == DRAWS {
            return Some((lab, pair));
        }
        let (one, other) = (&pair.first.1, &pair.second.1);
        one.sees(other);
        let sent = one.send(&file(one.home(), "first", 64 * KIB), other, "direct").end();
        if sent.code == Some(0) {
            eprintln!("{first:?} x {second:?}: first direct file {:?} after the command", sent.took);
            return Some((lab, pair));
        }
        eprintln!("{first:?} x {second:?}: a search in vain, no {draw}");
    }
    None
}

fn become_direct(first: Kind, second: Kind) {
    let Some((_lab, Pair { first: (_, one), second: (_, other) })) = met(first, second) else { return };
    exchange_directly(&format!("{first:?} x {second:?}"), &one, &other);
}

/// A file each way that may only go directly.
fn exchange_directly(what: &str, one: &Peer, other: &Peer) {
    one.sees(other);
    other.sees(one);
    let there = file(one.home(), "there", 64 * KIB);
    let sent = one.send(&there, other, "direct").end();
    arrived(&sent, &there, other);
    eprintln!("{what}: direct, and through, {:?} after the command", sent.took);
    assert!(sent.took < DIRECT_WITHIN, "{sent:?}");
    let back = file(other.home(), "back", 64 * KIB);
    let sent = other.send(&back, one, "direct").end();
    arrived(&sent, &back, one);
    assert_eq!(sent.last["path"], "direct", "{sent:?}");
}

/// A file that goes where it can, and one that may only go directly and is refused.
fn stay_relayed(first: Kind, second: Kind, why: &str) {
    let Some(lab) = Lab::new() else { return };
    let Pair { first: (_, one), second: (_, other) } = pair(&lab, first, second);
    one.sees(&other);
    let direct = file(one.home(), "direct", 64 * KIB);
    let refused = one.send(&direct, &other, "direct");
    let auto = file(one.home(), "auto", 2 * MIB);
    let sent = one.send(&auto, &other, "auto").end();
    arrived(&sent, &auto, &other);
    assert_eq!(sent.last["path"], "relayed", "{sent:?}");
    let refused = refused.end();
    assert_eq!((refused.code, &refused.last["event"]), (Some(3), &"failed".into()), "{refused:?}");
    assert!(refused.stderr.contains("no direct path"), "{refused:?}");
    assert!(!other.home().join("direct").exists());
    eprintln!("{first:?} x {second:?}: relayed, for {why}");
}

/// A file of that many bytes, no two parts of which are alike.
fn file(folder: &Path, name: &str, bytes: usize) -> PathBuf {
    const PART: usize = 64 * KIB;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let mut part: Vec<u8> = words.flatten().take(PART).collect();
    let path = folder.join(name);
    let mut file = fs::File::create(&path).expect("a file");
    for number in 0..bytes.div_ceil(PART) {
        part[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&part[..PART.min(bytes - number * PART)]).expect("it is written");
    }
    path
}

#[track_caller]
fn arrived(sent: &Sent, file: &Path, at: &Peer) {
    assert_eq!((sent.code, &sent.last["event"]), (Some(0), &"done".into()), "{sent:?}");
    let there = at.home().join(file.file_name().expect("it is named"));
    let same = Command::new("cmp").arg(file).arg(&there).status().expect("cmp runs");
    assert!(same.success(), "{} differs", there.display());
}
