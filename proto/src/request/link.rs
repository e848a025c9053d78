//! Agreeing on a link: each side's TLS key, its share of the check key, and where it might be reached.

use std::{fmt, net::SocketAddr};

use serde::{Deserialize, Serialize};

/// How the packets of a link may travel. Two instances have at most one link of each route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Route {
    /// Directly where a path is proved, else by way of the relay.
    Auto = 0,
    /// By way of the relay only, because the caller asked for that.
    RelayedOnly = 1,
}

impl Route {
    /// The route whose datagrams carry this lane number.
    pub fn from_lane(lane: u8) -> Option<Self> {
        match lane {
            0 => Some(Self::Auto),
            1 => Some(Self::RelayedOnly),
            _ => None,
        }
    }

    /// The number by which the relay's datagrams name this route.
    pub fn lane(self) -> u8 {
        self as u8
    }
}

/// The asking side's half of a link.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkOffer {
    /// How packets may travel.
    pub route: Route,
    /// The TLS key of this process: an Ed25519 SubjectPublicKeyInfo (RFC 8410), pinned by the other side.
    pub tls_key: Vec<u8>,
    /// Random share of the key that authenticates connectivity checks.
    pub check_share: [u8; 32],
    /// Where this side might be reached directly.
    pub candidates: Vec<Candidate>,
    /// What this side knows of the NAT in front of it; unknown if it wants no search for a path.
    pub nat: Nat,
}

/// The answering side's half of a link.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkAnswer {
    /// The TLS key of this process, as in [`LinkOffer::tls_key`].
    pub tls_key: Vec<u8>,
    /// The other share of the check key.
    pub check_share: [u8; 32],
    /// Where this side might be reached directly.
    pub candidates: Vec<Candidate>,
    /// What this side knows of the NAT in front of it; unknown if it wants no search for a path.
    pub nat: Nat,
}

impl fmt::Debug for LinkOffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { route, tls_key: _, check_share: _, candidates, nat } = self;
        f.debug_struct("LinkOffer")
            .field("route", route)
            .field("candidates", candidates)
            .field("nat", nat)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for LinkAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tls_key: _, check_share: _, candidates, nat } = self;
        f.debug_struct("LinkAnswer").field("candidates", candidates).field("nat", nat).finish_non_exhaustive()
    }
}

/// More places where the sender might be reached, found after the link was agreed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CandidateUpdate {
    /// The sender's full list, in place of the one before.
    pub candidates: Vec<Candidate>,
    /// What the sender knows of its NAT by now, likewise.
    pub nat: Nat,
}

/// An address where a peer might be reached, and how it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Candidate {
    /// How the address is known.
    pub kind: CandidateKind,
    /// The address.
    pub addr: SocketAddr,
}

/// How an address is known; the order, which is not that of the numbers on the wire, is the preference among otherwise
/// equal paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CandidateKind {
    /// An interface of the host has it.
    Host,
    /// A STUN responder saw it.
    ServerReflexive,
    /// An authenticated check came from it.
    PeerReflexive,
    /// The router in front of the host forwards it there, because it was asked to (PCP, NAT-PMP or UPnP).
    Mapped,
}

impl CandidateKind {
    /// Place in the order of preference, the best first: an own address needs nobody's memory, a mapping was promised for
    /// a time, and what a responder or a peer saw lasts as long as packets keep it open.
    pub fn rank(self) -> u8 {
        match self {
            Self::Host => 0,
            Self::Mapped => 1,
            Self::ServerReflexive => 2,
            Self::PeerReflexive => 3,
        }
    }
}

impl Ord for CandidateKind {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank().cmp(&other.rank())
    }
}

impl PartialOrd for CandidateKind {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// What a side knows of the NAT in front of it (RFC 4787 §4.1), as far as its STUN answers tell.
/// Not checked on arrival: a range may be the wrong way round, and a step may be 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Nat {
    /// Whether one local port is seen as one address everywhere.
    pub mapping: Mapping,
    /// How the NAT picks the port of a new mapping.
    pub ports: Ports,
}

/// Whether one local port is seen as one address everywhere.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Mapping {
    /// Fewer than two responders answered.
    #[default]
    Unknown,
    /// Every destination sees the same address, or there is no NAT: one probe to it suffices.
    EndpointIndependent,
    /// Each destination sees another address: the one that a peer will see cannot be asked for.
    Dependent,
}

/// How a NAT picks the port of a new mapping.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Ports {
    /// Too few answers to tell.
    #[default]
    Unknown,
    /// The local port, while it is free.
    Preserving,
    /// The port before, and a constant step.
    Sequential {
        /// The port of the newest mapping known.
        last: u16,
        /// What is added for the next one; never 0.
        step: i16,
    },
    /// Any of a block of ports that this host was given (RFC 6888 §5, RFC 7422).
    Block {
        /// The lowest port of the block.
        first: u16,
        /// Its highest.
        last: u16,
    },
    /// Any.
    Random,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_share_of_the_check_key() {
        let (tls_key, check_share, candidates) = (vec![1], [0xA7; 32], vec![]);
        let nat = Nat::default();
        let answer = LinkAnswer { tls_key: tls_key.clone(), check_share, candidates: candidates.clone(), nat };
        let offer = LinkOffer { route: Route::Auto, tls_key, check_share, candidates, nat };
        assert!(!format!("{offer:?} {answer:?}").contains("167"));
    }

    #[test]
    fn a_mapping_is_preferred_to_what_was_only_seen() {
        use CandidateKind::{Host, Mapped, PeerReflexive, ServerReflexive};
        let mut kinds = [PeerReflexive, ServerReflexive, Mapped, Host];
        kinds.sort_unstable();
        assert_eq!(kinds, [Host, Mapped, ServerReflexive, PeerReflexive]);
    }

    #[test]
    fn a_lane_names_the_route_that_it_is_of() {
        for route in [Route::Auto, Route::RelayedOnly] {
            assert_eq!(Route::from_lane(route.lane()), Some(route));
        }
        assert_eq!((2..=u8::MAX).find_map(Route::from_lane), None);
    }
}
