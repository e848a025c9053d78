//! Where one side of a search is.
//!
//! In: what it says of its NAT and its candidates. Out: the one address of the world's that it is seen at, if any. It trusts
//! what the side says no further than that: nothing else is ever sent to.

use std::net::{IpAddr, SocketAddr};

use crate::{
    path::candidate::{Candidate, CandidateKind, is_usable},
    request::link::Nat,
};

/// What is known of where one side is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Side {
    /// Its NAT.
    pub nat: Nat,
    /// An address at which the world sees it.
    pub public: Option<SocketAddr>,
}

impl Side {
    /// A side with this NAT and these candidates.
    pub fn new(nat: Nat, candidates: &[Candidate]) -> Self {
        let of =
            |kind| candidates.iter().filter(move |candidate| candidate.kind == kind).map(|candidate| candidate.addr);
        let seen = of(CandidateKind::ServerReflexive).find(|addr| is_usable(*addr) && is_elsewhere(*addr));
        let own = || of(CandidateKind::Host).find(|addr| is_public(*addr) && is_usable(*addr));
        Self { nat, public: seen.or_else(own) }
    }
}

/// Whether the address can be another host's, as a responder somewhere sees it. A private one can: NATs behind NATs.
fn is_elsewhere(addr: SocketAddr) -> bool {
    match addr.ip() {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(_) => false,
    }
}

/// Whether the address is one of the whole world's: not of a private network or a carrier's (RFC 1918, RFC 6598).
fn is_public(addr: SocketAddr) -> bool {
    match addr.ip() {
        IpAddr::V4(ip) => {
            let carrier = ip.octets()[0] == 100 && ip.octets()[1] & 0xC0 == 64;
            !carrier && !ip.is_private() && !ip.is_loopback() && !ip.is_link_local()
        }
        IpAddr::V6(_) => false,
    }
}
