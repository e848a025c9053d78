//! `peer doctor` names what a NAT lets in, behind NATs of the kernel of every kind.
//!
//! What a relay of one address cannot tell apart is told as one: a full cone and an address-restricted NAT both let in what
//! comes from another port of the relay's.

use serde_json::Value;

use super::lab::{Kind, Lab};

#[test]
fn without_a_nat_other_ports_of_the_relay_are_let_in() {
    is_told_as(Kind::Public, "port_independent".into());
}

#[test]
fn a_full_cone_lets_in_other_ports_of_the_relay() {
    is_told_as(Kind::FullCone, "port_independent".into());
}

#[test]
fn an_address_restricted_nat_lets_in_other_ports_of_the_relay() {
    is_told_as(Kind::AddressRestricted, "port_independent".into());
}

#[test]
fn a_port_restricted_nat_lets_in_what_was_sent_to() {
    is_told_as(Kind::PortRestricted, "address_and_port_dependent".into());
}

#[test]
fn a_symmetric_nat_lets_in_what_was_sent_to() {
    is_told_as(Kind::Symmetric, "address_and_port_dependent".into());
}

#[test]
fn a_double_nat_lets_in_what_was_sent_to() {
    is_told_as(Kind::DoubleNat, "address_and_port_dependent".into());
}

#[test]
fn a_firewall_of_ipv6_lets_in_what_was_sent_to() {
    is_told_as(Kind::V6Only, "address_and_port_dependent".into());
}

#[test]
fn where_no_udp_passes_nothing_is_said_of_a_filter() {
    is_told_as(Kind::WithoutUdp, Value::Null);
}

fn is_told_as(kind: Kind, filtering: Value) {
    let Some(lab) = Lab::new() else { return };
    let site = lab.site(kind);
    let host = lab.host(&site, "one");
    host.is_in_the_room();
    let said = host.run(&["doctor", "--json"]);
    let told: Value = serde_json::from_slice(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
    assert_eq!(told["network"]["nat"]["filtering"], filtering, "{kind:?}: {told:#}");
}
