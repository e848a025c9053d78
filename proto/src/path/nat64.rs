//! IPv4 addresses as a host without IPv4 reaches them: by way of a NAT64 (RFC 6146), under an IPv6 address made of both.
//!
//! In: what a resolver says of `ipv4only.arpa` (RFC 7050), candidates. Out: the NAT's prefix, candidates that can be reached.
//! Never makes an address of one that is not everybody's: a NAT64 leads to the IPv4 internet alone (RFC 6052 §3.1).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::candidate::{Candidate, is_global};

/// The name whose IPv4 addresses are fixed, and whose IPv6 addresses only a DNS64 makes up (RFC 7050 §3).
pub const KNOWN_NAME: &str = "ipv4only.arpa";

/// The IPv4 addresses of [`KNOWN_NAME`] (RFC 7050 §2.2).
const KNOWN_ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 0, 170), Ipv4Addr::new(192, 0, 0, 171)];

/// Bytes of a prefix that may be, the usual one first (RFC 6052 §2.2).
const LENGTHS: [usize; 6] = [12, 8, 7, 6, 5, 4];

/// The byte between the parts, which is always 0 (RFC 6052 §2.2).
const RESERVED: usize = 8;

/// The first bytes of the IPv6 addresses that a NAT64 takes for IPv4 ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    octets: [u8; 16],
    bytes: usize,
}

impl Prefix {
    /// The one that most networks have: 64:ff9b::/96 (RFC 6052 §2.1).
    pub const WELL_KNOWN: Self = Self { octets: [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], bytes: 12 };

    /// The prefix that an IPv6 address of [`KNOWN_NAME`] shows.
    pub fn discovered(address: Ipv6Addr) -> Option<Self> {
        let octets = address.octets();
        LENGTHS.iter().find_map(|bytes| {
            let mut prefix = Self { octets: [0; 16], bytes: *bytes };
            prefix.octets[..*bytes].copy_from_slice(&octets[..*bytes]);
            KNOWN_ADDRESSES.iter().any(|known| prefix.embed(*known) == address).then_some(prefix)
        })
    }

    /// The IPv6 address by which an IPv4 address is reached.
    pub fn embed(&self, address: Ipv4Addr) -> Ipv6Addr {
        let mut octets = self.octets;
        let places = (self.bytes..octets.len()).filter(|at| *at != RESERVED);
        for (at, octet) in places.zip(address.octets()) {
            octets[at] = octet;
        }
        octets.into()
    }
}

/// The candidates, and behind them those that are reached by way of a NAT64.
pub fn reachable(candidates: &[Candidate], prefix: Option<Prefix>) -> Vec<Candidate> {
    let through = candidates.iter().filter_map(|candidate| match (prefix?, candidate.addr.ip().to_canonical()) {
        (prefix, IpAddr::V4(ip)) if is_global(ip.into()) => {
            Some(Candidate { addr: SocketAddr::new(prefix.embed(ip).into(), candidate.addr.port()), ..*candidate })
        }
        (_, IpAddr::V4(_) | IpAddr::V6(_)) => None,
    });
    candidates.iter().copied().chain(through).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::path::CandidateKind;

    fn prefix(text: &str, bytes: usize) -> Prefix {
        Prefix { octets: text.parse::<Ipv6Addr>().unwrap().octets(), bytes }
    }

    /// The table of RFC 6052 §2.4.
    const TABLE: [(&str, usize, &str); 6] = [
        ("2001:db8::", 4, "2001:db8:c000:221::"),
        ("2001:db8:100::", 5, "2001:db8:1c0:2:21::"),
        ("2001:db8:122::", 6, "2001:db8:122:c000:2:2100::"),
        ("2001:db8:122:300::", 7, "2001:db8:122:3c0:0:221::"),
        ("2001:db8:122:344::", 8, "2001:db8:122:344:c0:2:2100::"),
        ("2001:db8:122:344::", 12, "2001:db8:122:344::192.0.2.33"),
    ];

    #[test]
    fn addresses_are_embedded_as_the_standard_has_it() {
        for (text, bytes, expected) in TABLE {
            let embedded = prefix(text, bytes).embed(Ipv4Addr::new(192, 0, 2, 33));
            assert_eq!(embedded, expected.parse::<Ipv6Addr>().unwrap(), "{text}/{}", bytes * 8);
        }
    }

    #[test]
    fn a_prefix_is_discovered_from_what_a_resolver_made_up() {
        for (text, bytes, _) in TABLE {
            for known in KNOWN_ADDRESSES {
                let prefix = prefix(text, bytes);
                assert_eq!(Prefix::discovered(prefix.embed(known)), Some(prefix), "{text}");
            }
        }
        assert_eq!(Prefix::discovered("64:ff9b::192.0.0.170".parse().unwrap()), Some(Prefix::WELL_KNOWN));
        assert_eq!(Prefix::discovered("2001:db8::1".parse().unwrap()), None);
    }

    #[test]
    fn what_is_not_everybodys_is_not_reached_through_a_nat64() {
        let all: Vec<_> = ["198.51.100.7:1", "192.168.1.7:2", "100.64.0.1:3", "127.0.0.1:4", "[2001:db8::7]:5"]
            .map(|addr| Candidate { kind: CandidateKind::ServerReflexive, addr: addr.parse().unwrap() })
            .into();
        let reached = reachable(&all, Some(Prefix::WELL_KNOWN));
        assert_eq!(reached[..5], all);
        let through: Vec<_> = reached[5..].iter().map(|candidate| candidate.addr.to_string()).collect();
        assert_eq!(through, ["[64:ff9b::c633:6407]:1"]);
        assert_eq!(reachable(&all, None), all);
    }
}
