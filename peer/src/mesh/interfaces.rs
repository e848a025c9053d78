//! The addresses of this host's interfaces: where others may reach it without help.
//!
//! Out: addresses, best first, without those that no packet can be sent to from elsewhere on their own.
//! Never resolves, asks or opens anything: the operating system's table is read, in about a millisecond.
//! Bounds: [`MAX_CANDIDATES`] addresses, the least useful dropped first.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use peerfleet_proto::{
    limits::MAX_CANDIDATES,
    request::link::{Candidate, CandidateKind},
};

/// How useful an address is to others; the order is the preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    /// Anybody may reach it, if no firewall is between.
    Global,
    /// Those in the same network may.
    Private,
    /// Containers and virtual machines of this host may; elsewhere the same address is somebody else.
    Bridge,
    /// Only this host may.
    Loopback,
}

/// Host candidates for a socket of this port, best first.
pub(super) fn host_candidates(port: u16, with_ipv6: bool) -> Vec<Candidate> {
    let mut found: Vec<(Reach, IpAddr)> = netdev::get_interfaces()
        .iter()
        .filter(|interface| interface.is_up())
        .flat_map(|interface| {
            let v4 = interface.ipv4.iter().map(|net| IpAddr::V4(net.addr()));
            let v6 = interface.ipv6.iter().map(|net| IpAddr::V6(net.addr()));
            let is_bridge = is_bridge(&interface.name);
            v4.chain(v6).filter_map(move |address| Some((reach(address, is_bridge)?, address)))
        })
        .filter(|(_, address)| with_ipv6 || address.is_ipv4())
        .collect();
    found.sort_unstable();
    found.dedup();
    found.truncate(MAX_CANDIDATES);
    let candidate = |(_, ip)| Candidate { kind: CandidateKind::Host, addr: SocketAddr::new(ip, port) };
    found.into_iter().map(candidate).collect()
}

/// Whether an interface is of those that container engines make, whose addresses are the same on every host.
fn is_bridge(name: &str) -> bool {
    ["docker", "br-", "veth", "virbr", "lxc", "cni", "flannel", "cali"].iter().any(|prefix| name.starts_with(prefix))
}

fn reach(address: IpAddr, is_bridge: bool) -> Option<Reach> {
    let reach = match address {
        IpAddr::V4(v4) => reach_v4(v4)?,
        IpAddr::V6(v6) => reach_v6(v6)?,
    };
    Some(if is_bridge { Reach::Bridge } else { reach })
}

fn reach_v4(address: Ipv4Addr) -> Option<Reach> {
    if address.is_unspecified() || address.is_multicast() || address.is_broadcast() {
        return None;
    }
    Some(match address {
        _ if address.is_loopback() => Reach::Loopback,
        _ if address.is_private() || address.is_link_local() => Reach::Private,
        _ => Reach::Global,
    })
}

/// Link-local IPv6 addresses need the number of an interface that only the other host knows: not offered.
fn reach_v6(address: Ipv6Addr) -> Option<Reach> {
    if address.is_unspecified() || address.is_multicast() || address.is_unicast_link_local() {
        return None;
    }
    Some(match address {
        _ if address.is_loopback() => Reach::Loopback,
        _ if address.is_unique_local() => Reach::Private,
        _ => Reach::Global,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach_of(text: &str) -> Option<Reach> {
        reach(text.parse().unwrap(), false)
    }

    #[test]
    fn loopback_is_offered_last() {
        let candidates = host_candidates(7, false);
        let last = candidates.last().expect("every host has a loopback interface");
        assert!(last.addr.ip().is_loopback());
        assert!(candidates.iter().all(|candidate| candidate.addr.port() == 7 && candidate.addr.is_ipv4()));
    }

    #[test]
    fn addresses_that_mean_nothing_elsewhere_are_not_offered() {
        assert_eq!(reach_of("fe80::1"), None);
        assert_eq!(reach_of("::"), None);
        assert_eq!(reach_of("224.0.0.1"), None);
    }

    #[test]
    fn global_comes_before_private_before_bridges() {
        assert!(reach_of("2001:db8::1") < reach_of("10.0.0.1"));
        assert!(reach_of("10.0.0.1") < reach("172.17.0.1".parse().unwrap(), is_bridge("docker0")));
    }
}
