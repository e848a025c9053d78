//! Pairs of which one NAT gives every destination another port: a path between them is found by a search, or not at all.
//!
//! In: which side is behind such a NAT, and what it wants. Out: a file arrived directly after a search, or there was none.

use super::{
    KIB, Pair, exchange_directly, file,
    lab::{Kind, Lab},
    met, pair,
    program::{Peer, wait_until},
};

#[test]
fn a_host_behind_a_hard_nat_and_one_behind_an_easy_one_become_direct() {
    become_direct_by_a_search(Kind::Symmetric, Kind::PortRestricted);
}

#[test]
fn it_does_not_matter_who_asks() {
    become_direct_by_a_search(Kind::PortRestricted, Kind::Symmetric);
}

#[test]
fn who_wants_no_search_makes_none_and_gets_none() {
    let Some(lab) = Lab::new() else { return };
    let sites = [Kind::Symmetric, Kind::PortRestricted].map(|kind| lab.site(kind));
    let one = lab.host_with(&sites[0], "one", &["--no-hard-nat-search"]);
    let other = lab.host(&sites[1], "other");
    reach_each_other_by_the_relay_alone(&one, &other);
}

#[test]
fn behind_two_hard_nats_there_is_no_search() {
    let Some(lab) = Lab::new() else { return };
    let Pair { first: (_, one), second: (_, other) } = pair(&lab, Kind::Symmetric, Kind::Symmetric);
    reach_each_other_by_the_relay_alone(&one, &other);
    wait_until("somebody says why", || {
        one.log().contains("both NATs give every destination another port").then_some(())
    });
}

fn become_direct_by_a_search(first: Kind, second: Kind) {
    let Some((_lab, Pair { first: (_, one), second: (_, other) })) = met(first, second) else { return };
    exchange_directly(&format!("{first:?} x {second:?}"), &one, &other);
    let searches: Vec<_> = [&one, &other].into_iter().flat_map(searches).collect();
    eprintln!("{}", searches.join("; "));
    assert!(!searches.is_empty());
}

fn reach_each_other_by_the_relay_alone(one: &Peer, other: &Peer) {
    one.sees(other);
    let refused = one.send(&file(one.home(), "direct", 64 * KIB), other, "direct").end();
    assert_eq!(refused.code, Some(3), "{refused:?}");
    assert!([one, other].into_iter().all(|host| searches(host).is_empty()));
}

/// What a host's log says of searches that ended.
fn searches(host: &Peer) -> Vec<String> {
    let ended = |line: &str| line.split_once("a search for a path ended").map(|(_, how)| how.trim().to_owned());
    host.log().lines().filter_map(ended).collect()
}
