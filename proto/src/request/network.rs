//! What a host says of the network around it, and of its side of the link with who asks.
//!
//! It is for people: nothing is decided by it, and a host may leave out whatever it does not know. All times are spans as
//! the answering host's clock measured them, because clocks of two hosts do not agree.
//! Bounds: [`MAX_REPORTED_CHECKS`], `MAX_CANDIDATES` candidates, twice `MAX_RESPONDERS` responders; some 6 KiB.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

use super::link::{Candidate, CandidateKind, Nat};
use crate::path::Reach;

/// Most checks in one report: every candidate of the other side, and as many addresses again that were learnt.
pub const MAX_REPORTED_CHECKS: usize = 2 * crate::limits::MAX_CANDIDATES;

/// How the network looks from a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkReport {
    /// Whether it has a UDP socket, without which nothing travels directly. There is none before its first link.
    pub udp: bool,
    /// Whether its system knows a way to the IPv4 internet.
    pub routes_v4: bool,
    /// Whether its system knows a way to the IPv6 internet.
    pub routes_v6: bool,
    /// Where it might be reached, best first.
    pub candidates: Vec<Candidate>,
    /// Whom it asks by STUN how it is seen. Empty if its relay does not answer STUN.
    pub responders: Vec<ResponderReport>,
    /// Round trip of a WebSocket ping to its relay.
    pub relay_rtt: Option<Duration>,
    /// What it knows of the NAT in front of it.
    pub nat: Nat,
    /// Which packets from outside the NAT lets in.
    pub filtering: Filtering,
    /// Whether two hosts behind that NAT reach each other by their outer addresses.
    pub hairpin: Option<bool>,
    /// Whether the router opened a port for it; `None` before its first link.
    pub port_mapping: Option<PortMapping>,
    /// Its side of the link with who asks, if there is one that may travel directly.
    pub path: Option<PathReport>,
}

/// One STUN responder, and what asking it brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResponderReport {
    /// Where it is.
    pub addr: SocketAddr,
    /// How it sees the host, as it said last.
    pub seen: Option<SocketAddr>,
    /// Round trip of the last answer.
    pub rtt: Option<Duration>,
    /// Requests sent since the last answer.
    pub unanswered: u32,
}

/// Which packets from outside a NAT lets in (RFC 4787 §5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Filtering {
    /// Nobody tried.
    #[default]
    Unknown,
    /// Those of anybody, once the mapping is there.
    EndpointIndependent,
    /// Those from addresses that were sent to.
    AddressDependent,
    /// Those from addresses and ports that were sent to.
    AddressAndPortDependent,
    /// Those from any port of an address that was sent to. Whether also those of anybody, a responder that has one address
    /// cannot tell: it is one of the two above that do not depend on the port.
    PortIndependent,
}

/// What asking the router for a port brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PortMapping {
    /// No router answered by any protocol.
    NoAnswer,
    /// A router answered, and opens no port.
    Refused {
        /// How it answered.
        protocol: MappingProtocol,
    },
    /// The router passes on what comes to this address.
    Open {
        /// How it was asked.
        protocol: MappingProtocol,
        /// The address outside.
        addr: SocketAddr,
        /// For how long the router does so unless it is asked again, counted from when it was asked last.
        life: Duration,
    },
    /// The router would pass on what comes to this address, but that is behind yet another NAT, and so of no use.
    Nested {
        /// How it was asked.
        protocol: MappingProtocol,
        /// The address that the router believes to be outside.
        addr: SocketAddr,
    },
    /// It is being asked for the first time.
    Asking,
    /// It is not asked: the host has a public IPv4 address of its own.
    NotNeeded,
    /// There is none: no default route of IPv4 leads to a router.
    NoRouter,
    /// It is not asked: the host's owner does not want it.
    Off,
}

/// How routers are asked for a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MappingProtocol {
    /// RFC 6887.
    Pcp,
    /// RFC 6886.
    NatPmp,
    /// UPnP Internet Gateway Device.
    Upnp,
}

/// One side of looking for a direct path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathReport {
    /// How long it has been looked for, or taken.
    pub age: Duration,
    /// The other side's addresses, and what checking them brought; nearest first.
    pub checks: Vec<CheckReport>,
    /// The path taken; without one the relay carries everything.
    pub taken: Option<TakenPath>,
    /// The search for a port that cannot be known, if there is anybody to search.
    pub search: Option<SearchReport>,
}

/// One address of the other side, and what checking it brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The address.
    pub addr: SocketAddr,
    /// How it is known.
    pub kind: CandidateKind,
    /// How near it is.
    pub reach: Reach,
    /// Checks sent to it.
    pub sent: u32,
    /// How many of them were answered.
    pub answered: u32,
    /// Checks of the other side that came from it.
    pub heard: u32,
    /// The smoothed round trip, if any was answered.
    pub rtt: Option<Duration>,
    /// How it stands.
    pub outcome: CheckOutcome,
}

/// How checking one address stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CheckOutcome {
    /// It is never sent to: this side has no address of that family, or it is one of its own.
    NotTried,
    /// The system knows no way there.
    NoRoute,
    /// The first check is still to be sent.
    Planned,
    /// The answer to the last check may still come.
    Waiting,
    /// No check was ever answered.
    Silent,
    /// What came from it was not signed by the other side.
    Forged,
    /// The last check was answered, or its answer may still come.
    Answered,
    /// It answered once, and does so no more.
    Lost,
    /// It answers checks and carried no data, so it is not taken for a while.
    Distrusted,
}

/// The direct path that is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenPath {
    /// Where to.
    pub addr: SocketAddr,
    /// The smoothed round trip.
    pub rtt: Duration,
    /// For how long.
    pub age: Duration,
    /// Why this one.
    pub why: Choice,
}

/// Why a path is taken and none of the others that answer; the address is that of the best of those.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Choice {
    /// No other address answers.
    Only,
    /// It is nearer: this machine before its own networks, those before the rest of the world.
    Nearer(SocketAddr),
    /// It is faster, and no farther than that is worth.
    Faster(SocketAddr),
    /// It is hardly slower, and needs no NAT, because it is IPv6.
    Ipv6(SocketAddr),
    /// It is about as fast, and known more directly.
    Kind(SocketAddr),
    /// The other is better, but by so little that a move would cost more than it brings.
    Kept(SocketAddr),
}

/// How the search for a port stands that a NAT will give and nobody can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SearchReport {
    /// It would be of no use, or is not wanted.
    NoUse,
    /// It will begin.
    Waiting,
    /// It goes on.
    Running,
    /// It found nothing, and will not be tried again before a network changes.
    GivenUp,
}
