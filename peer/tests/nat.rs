//! Hosts behind real NATs of the kernel find the direct paths that there are, and reach each other where there is none.
//!
//! Needs root, `ip`, `tc` and `nft`; says loudly where it is skipped, and fails instead if `PEERFLEET_REQUIRE_ALL` is set.

#![cfg(target_os = "linux")]
#![expect(clippy::print_stderr, reason = "who reads a failed or skipped run has nothing else")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

#[path = "nat/lab.rs"]
mod lab;
#[path = "nat/program.rs"]
mod program;

use lab::{Lab, Nat, Site};
use program::{Peer, Sent};

/// Time for a small file to arrive by a direct path, from the command to its end: punching takes a tenth of it.
const DIRECT_WITHIN: Duration = Duration::from_secs(10);

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

#[test]
fn two_open_hosts_become_direct() {
    become_direct(Nat::Open, Nat::Open);
}

#[test]
fn an_open_host_and_one_behind_an_easy_nat_become_direct() {
    become_direct(Nat::Open, Nat::Easy);
}

#[test]
fn an_open_host_and_one_behind_a_hard_nat_become_direct() {
    become_direct(Nat::Open, Nat::Hard);
}

#[test]
fn two_hosts_behind_easy_nats_become_direct() {
    become_direct(Nat::Easy, Nat::Easy);
}

#[test]
fn two_firewalled_hosts_that_have_ipv6_alone_become_direct() {
    become_direct(Nat::FirewalledV6, Nat::FirewalledV6);
}

/// Hopeless without guessing ports: the easy NAT lets in nobody but whom its host has sent to, and where the hard one will
/// send from, nobody knows.
#[test]
fn behind_an_easy_and_a_hard_nat_files_go_relayed() {
    stay_relayed(Nat::Easy, Nat::Hard);
}

/// Hopeless: neither side knows where the other will send from.
#[test]
fn behind_two_hard_nats_files_go_relayed() {
    stay_relayed(Nat::Hard, Nat::Hard);
}

#[test]
fn where_no_udp_passes_files_go_relayed() {
    stay_relayed(Nat::WithoutUdp, Nat::Open);
}

#[test]
fn two_hosts_behind_one_hard_nat_reach_each_other_within_their_network() {
    let Some(mut lab) = Lab::new() else { return };
    let site = lab.site(Nat::Hard);
    let (one, other) = (lab.host(site, "one"), lab.host(site, "other"));
    exchange_directly("within one network", &one, &other);
}

#[test]
fn a_direct_path_that_dies_beneath_a_file_is_replaced_by_the_relay_and_found_again() {
    let Some(mut lab) = Lab::new() else { return };
    let Pair { first: (site, one), second: (_, other) } = pair(&mut lab, Nat::Easy, Nat::Easy);
    one.sees(&other);
    lab.slow_down(&one, 40);
    let file = file(one.home(), "large", 24 * MIB);
    let sending = one.send(&file, &other, "auto");
    let moving = |path: &'static str, bytes: u64| {
        move |event: &serde_json::Value| event["path"] == path && event["bytes"].as_u64() >= Some(bytes)
    };
    let cut = sending.until("some came directly", moving("direct", 4 << 20));
    lab.cut_udp(site);
    let relayed = sending.until("it goes by way of the relay", moving("relayed", 0));
    let before = relayed["bytes"].as_u64().expect("a number");
    let onward = sending.until("it goes on there", moving("relayed", before + 1));
    lab.mend_udp(site);
    let sent = sending.end();
    arrived(&sent, &file, &other);
    let seconds = |event: &serde_json::Value| event["seconds"].as_f64().expect("a number");
    eprintln!(
        "cut at {:.2} s; relayed after {:.2} s, going on after {:.2} s",
        seconds(&cut),
        seconds(&relayed) - seconds(&cut),
        seconds(&onward) - seconds(&cut)
    );
    let again = crate::file(one.home(), "again", 64 * KIB);
    let sent = one.send(&again, &other, "direct").end();
    arrived(&sent, &again, &other);
    assert_eq!(one.link(&other)["path"], "direct");
}

struct Pair {
    first: (Site, Peer),
    second: (Site, Peer),
}

fn pair(lab: &mut Lab, first: Nat, second: Nat) -> Pair {
    let sites = (lab.site(first), lab.site(second));
    Pair { first: (sites.0, lab.host(sites.0, "one")), second: (sites.1, lab.host(sites.1, "other")) }
}

fn become_direct(first: Nat, second: Nat) {
    let Some(mut lab) = Lab::new() else { return };
    let Pair { first: (_, one), second: (_, other) } = pair(&mut lab, first, second);
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
fn stay_relayed(first: Nat, second: Nat) {
    let Some(mut lab) = Lab::new() else { return };
    let Pair { first: (_, one), second: (_, other) } = pair(&mut lab, first, second);
    one.sees(&other);
    let auto = file(one.home(), "auto", 2 * MIB);
    let sent = one.send(&auto, &other, "auto").end();
    arrived(&sent, &auto, &other);
    assert_eq!(sent.last["path"], "relayed", "{sent:?}");
    let direct = file(one.home(), "direct", 64 * KIB);
    let sent = one.send(&direct, &other, "direct").end();
    assert_eq!((sent.code, &sent.last["event"]), (Some(3), &"failed".into()), "{sent:?}");
    assert!(sent.stderr.contains("no direct path"), "{sent:?}");
    assert!(!other.home().join("direct").exists());
}

/// A file of that many bytes which no compression shortens.
fn file(folder: &Path, name: &str, bytes: usize) -> PathBuf {
    let path = folder.join(name);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let content: Vec<u8> = words.flatten().take(bytes).collect();
    fs::write(&path, content).expect("a file");
    path
}

#[track_caller]
fn arrived(sent: &Sent, file: &Path, at: &Peer) {
    assert_eq!((sent.code, &sent.last["event"]), (Some(0), &"done".into()), "{sent:?}");
    let there = at.home().join(file.file_name().expect("it is named"));
    let (original, copy) = (fs::read(file).expect("the file"), fs::read(&there).expect("the copy"));
    assert!(original == copy, "{} differs", there.display());
}
