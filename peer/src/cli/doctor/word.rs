//! One word for each thing that `peer doctor` names, in tables and in JSON: the words are stable.

use peerfleet_proto::{
    path::Reach,
    request::{
        link::{CandidateKind, Mapping, Ports},
        network::{CheckOutcome, Choice, Filtering, MappingProtocol, PortMapping, SearchReport},
    },
};

/// How an address is known.
pub(super) fn kind(kind: CandidateKind) -> &'static str {
    match kind {
        CandidateKind::Host => "interface",
        CandidateKind::ServerReflexive => "relay",
        CandidateKind::PeerReflexive => "check",
        CandidateKind::Mapped => "router",
    }
}

/// How near an address is.
pub(super) fn reach(reach: Reach) -> &'static str {
    match reach {
        Reach::Loopback => "loopback",
        Reach::Lan => "lan",
        Reach::Wide => "wide",
    }
}

/// How checking an address stands.
pub(super) fn outcome(outcome: CheckOutcome) -> &'static str {
    match outcome {
        CheckOutcome::NotTried => "not_tried",
        CheckOutcome::NoRoute => "no_route",
        CheckOutcome::Planned => "planned",
        CheckOutcome::Waiting => "waiting",
        CheckOutcome::Silent => "silent",
        CheckOutcome::Forged => "forged",
        CheckOutcome::Answered => "answered",
        CheckOutcome::Lost => "lost",
        CheckOutcome::Distrusted => "distrusted",
    }
}

/// Why a path is taken.
pub(super) fn choice(choice: Choice) -> &'static str {
    match choice {
        Choice::Only => "only",
        Choice::Nearer(_) => "nearer",
        Choice::Faster(_) => "faster",
        Choice::Ipv6(_) => "ipv6",
        Choice::Kind(_) => "kind",
        Choice::Kept(_) => "kept",
    }
}

/// How the search for a port stands.
pub(super) fn search(search: SearchReport) -> &'static str {
    match search {
        SearchReport::NoUse => "no_use",
        SearchReport::Waiting => "waiting",
        SearchReport::Running => "running",
        SearchReport::GivenUp => "given_up",
    }
}

/// What a NAT does with addresses.
pub(super) fn mapping(mapping: Mapping) -> Option<&'static str> {
    match mapping {
        Mapping::Unknown => None,
        Mapping::EndpointIndependent => Some("endpoint_independent"),
        Mapping::Dependent => Some("dependent"),
    }
}

/// How a NAT picks ports.
pub(super) fn ports(ports: Ports) -> Option<&'static str> {
    match ports {
        Ports::Unknown => None,
        Ports::Preserving => Some("preserving"),
        Ports::Sequential { .. } => Some("sequential"),
        Ports::Block { .. } => Some("block"),
        Ports::Random => Some("random"),
    }
}

/// Which packets a NAT lets in.
pub(super) fn filtering(filtering: Filtering) -> Option<&'static str> {
    match filtering {
        Filtering::Unknown => None,
        Filtering::EndpointIndependent => Some("endpoint_independent"),
        Filtering::AddressDependent => Some("address_dependent"),
        Filtering::AddressAndPortDependent => Some("address_and_port_dependent"),
        Filtering::PortIndependent => Some("port_independent"),
    }
}

/// What asking a router for a port brought.
pub(super) fn port_mapping(mapping: PortMapping) -> &'static str {
    match mapping {
        PortMapping::NoAnswer => "no_answer",
        PortMapping::Refused { .. } => "refused",
        PortMapping::Open { .. } => "open",
        PortMapping::Nested { .. } => "nested",
        PortMapping::Asking => "asking",
        PortMapping::NotNeeded => "not_needed",
        PortMapping::NoRouter => "no_router",
        PortMapping::Off => "off",
    }
}

/// How a router was asked for a port.
pub(super) fn protocol(protocol: MappingProtocol) -> &'static str {
    match protocol {
        MappingProtocol::Pcp => "pcp",
        MappingProtocol::NatPmp => "nat_pmp",
        MappingProtocol::Upnp => "upnp",
    }
}
