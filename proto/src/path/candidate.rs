//! Candidates: which addresses may be checked at all, which of them from here, and how near they are.
//!
//! In: the addresses that both sides name. Out: yes or no, and a [`Reach`]. It never resolves or contacts anything.
//! An IPv4 address written as IPv6 (`::ffff:…`) is read as IPv4, everywhere. An IPv6 link-local address is of no use: it
//! means nothing without the other machine's own number of the interface.
//! Bound: [`MAX_CANDIDATES`] a side, from [`crate::limits`]; what is named beyond it is ignored.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

pub use crate::request::link::{Candidate, CandidateKind};

use crate::limits::MAX_CANDIDATES;

/// How far away an address is, nearest first: the first thing that a path is chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Reach {
    /// This machine.
    Loopback,
    /// A network that this machine has an interface in.
    Lan,
    /// Anywhere else.
    Wide,
}

/// The address with IPv4 written as IPv4, and without what only one machine understands.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// Whether the address can be one host's place to be reached at: no port 0, nobody's, or everybody's address.
pub fn is_usable(addr: SocketAddr) -> bool {
    let ip = canonical(addr).ip();
    let sane = match ip {
        IpAddr::V4(ip) => !ip.is_broadcast() && ip.octets()[0] != 0 && ip.octets()[0] < 240,
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    };
    sane && addr.port() != 0 && !ip.is_unspecified() && !ip.is_multicast()
}

/// Whether an address is one host's for everybody, if no firewall is between: none of a private network, of a carrier's
/// in front of its NATs (RFC 6598), of a link or of a machine by itself.
pub fn is_global(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let is_carriers = ip.octets()[0] == 100 && ip.octets()[1] & 0xC0 == 64;
            !(is_carriers || ip.is_private() || ip.is_link_local() || ip.is_loopback() || ip.is_unspecified())
        }
        IpAddr::V6(ip) => {
            !(ip.is_unique_local() || ip.is_unicast_link_local() || ip.is_loopback() || ip.is_unspecified())
        }
    }
}

/// The usable ones of a list, each address once under its best kind; the first [`MAX_CANDIDATES`] of them.
pub fn admit(candidates: &[Candidate]) -> BTreeMap<SocketAddr, CandidateKind> {
    let mut admitted = BTreeMap::new();
    for candidate in candidates.iter().filter(|candidate| is_usable(candidate.addr)) {
        let addr = canonical(candidate.addr);
        if admitted.len() >= MAX_CANDIDATES && !admitted.contains_key(&addr) {
            continue;
        }
        let kind = admitted.entry(addr).or_insert(candidate.kind);
        *kind = candidate.kind.min(*kind);
    }
    admitted
}

/// A network that this machine has an interface in: the addresses that share their first bits with ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Network {
    first: IpAddr,
    prefix: u8,
}

impl Network {
    /// The network of an interface's address; a prefix of more bits than the address has means the address alone.
    pub fn new(ip: IpAddr, prefix: u8) -> Self {
        let ip = ip.to_canonical();
        let prefix = prefix.min(if ip.is_ipv4() { 32 } else { 128 });
        Self { first: first_of(ip, prefix), prefix }
    }

    /// As nearly as can be told without a prefix: the usual /24 and /64.
    fn guessed(ip: IpAddr) -> Self {
        Self::new(ip, if ip.is_ipv4() { 24 } else { 64 })
    }

    /// Whether an address is in it.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_ipv4() == self.first.is_ipv4() && first_of(ip, self.prefix) == self.first
    }
}

/// The lowest address of the network with this prefix; it has at most as many bits as the address.
fn first_of(ip: IpAddr, prefix: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => IpAddr::V4((u32::from(ip) & !u32::MAX.checked_shr(prefix.into()).unwrap_or(0)).into()),
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) & !u128::MAX.checked_shr(prefix.into()).unwrap_or(0)).into()),
    }
}

/// Our own side: what can be reached from here, and how near it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Local {
    addrs: BTreeMap<SocketAddr, CandidateKind>,
    networks: BTreeSet<Network>,
}

impl Local {
    /// Our side with these candidates, in these networks; without any, they are guessed from the candidates.
    pub fn new(candidates: &[Candidate], networks: &[Network]) -> Self {
        let addrs = admit(candidates);
        let own = addrs.iter().filter(|(addr, kind)| **kind == CandidateKind::Host && !addr.ip().is_loopback());
        let networks = match networks {
            [] => own.map(|(addr, _)| Network::guessed(addr.ip())).collect(),
            known => known.iter().copied().take(MAX_CANDIDATES).collect(),
        };
        Self { addrs, networks }
    }

    /// Whether the interfaces have the same addresses as those of `other`.
    pub fn has_interfaces_of(&self, other: &Self) -> bool {
        self.hosts().eq(other.hosts())
    }

    /// What becomes of a path to `remote` when the interfaces were those of `before` until now. Packets left from `source`, as
    /// far as anybody said.
    pub fn ground(&self, before: &Self, remote: SocketAddr, source: Option<IpAddr>) -> Ground {
        if let Some(source) = source {
            let stays = self.hosts().any(|addr| addr.ip() == source);
            return if stays { Ground::Unsure } else { Ground::Gone };
        }
        let carries = |local: &Self| match before.reach(remote) {
            Reach::Loopback => true,
            Reach::Lan => local.reach(remote) == Reach::Lan,
            Reach::Wide => before
                .hosts()
                .filter(|addr| addr.is_ipv4() == remote.is_ipv4() && !addr.ip().is_loopback())
                .any(|addr| local.hosts().any(|host| host.ip() == addr.ip())),
        };
        if carries(before) && !carries(self) { Ground::Gone } else { Ground::Unsure }
    }

    fn hosts(&self) -> impl Iterator<Item = SocketAddr> {
        self.addrs.iter().filter(|(_, kind)| **kind == CandidateKind::Host).map(|(addr, _)| *addr)
    }

    /// Whether a check to this address could arrive: loopback from loopback only, the same family, and not ourselves.
    pub fn can_reach(&self, remote: SocketAddr) -> bool {
        let ourselves = self.addrs.get(&remote) == Some(&CandidateKind::Host);
        let pairs =
            |own: &SocketAddr| own.is_ipv4() == remote.is_ipv4() && own.ip().is_loopback() == remote.ip().is_loopback();
        !ourselves && self.addrs.keys().any(pairs)
    }

    /// How near an address is.
    pub fn reach(&self, remote: SocketAddr) -> Reach {
        if remote.ip().is_loopback() {
            Reach::Loopback
        } else if self.networks.iter().any(|network| network.contains(remote.ip())) {
            Reach::Lan
        } else {
            Reach::Wide
        }
    }
}

/// What a change of interfaces means for a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    /// The address that packets left from is gone, or every one that they could have left from.
    Gone,
    /// It may stand or not.
    Unsure,
}

/// Place of an address in the order of first checks, the likeliest first: this network by IPv6, by IPv4, this machine, the world
/// by IPv6, by IPv4, what a router was asked to forward, what was only seen, and last private addresses of other networks,
/// which lead somewhere only where networks are joined.
pub fn order(addr: SocketAddr, kind: CandidateKind, reach: Reach) -> u8 {
    match (reach, kind) {
        (Reach::Lan, _) => u8::from(addr.is_ipv4()),
        (Reach::Loopback, _) => 2,
        (Reach::Wide, CandidateKind::Host) if is_private(addr.ip()) => 7,
        (Reach::Wide, CandidateKind::Host) => 3 + u8::from(addr.is_ipv4()),
        (Reach::Wide, CandidateKind::Mapped) => 5,
        (Reach::Wide, CandidateKind::ServerReflexive | CandidateKind::PeerReflexive) => 6,
    }
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(addr: &str) -> Candidate {
        Candidate { kind: CandidateKind::Host, addr: addr.parse().unwrap() }
    }

    #[test]
    fn an_address_of_nobody_or_everybody_is_not_usable() {
        for addr in [
            "0.0.0.0:1",
            "0.1.2.3:1",
            "224.0.0.1:1",
            "240.0.0.1:1",
            "255.255.255.255:1",
            "192.0.2.1:0",
            "[::]:1",
            "[ff02::1]:1",
            "[fe80::1]:1",
            "[::ffff:224.0.0.1]:1",
            "[::ffff:0.0.0.0]:1",
        ] {
            assert!(!is_usable(addr.parse().unwrap()), "{addr}");
        }
        for addr in ["192.0.2.1:1", "127.0.0.1:9", "169.254.1.1:5", "[::1]:1", "[2001:db8::1]:1", "[fd00::1]:65535"] {
            assert!(is_usable(addr.parse().unwrap()), "{addr}");
        }
    }

    #[test]
    fn addresses_of_a_network_a_carrier_or_a_machine_by_itself_are_not_global() {
        for ip in [
            "10.0.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "100.127.9.9",
            "169.254.1.1",
            "127.0.0.1",
            "fd00::1",
            "fe80::1",
            "::1",
        ] {
            assert!(!is_global(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["198.51.100.7", "100.63.0.1", "100.128.0.1", "2001:db8::1"] {
            assert!(is_global(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn candidates_beyond_the_limit_are_ignored() {
        let many: Vec<_> = (1..100).map(|at| host(&format!("192.0.2.{at}:7"))).collect();
        assert_eq!(admit(&many).len(), MAX_CANDIDATES);
    }

    #[test]
    fn an_address_named_twice_keeps_its_best_kind() {
        let reflexive = Candidate { kind: CandidateKind::ServerReflexive, ..host("192.0.2.1:7") };
        let admitted = admit(&[reflexive, host("[::ffff:192.0.2.1]:7")]);
        assert_eq!(admitted.into_iter().collect::<Vec<_>>(), [(host("192.0.2.1:7").addr, CandidateKind::Host)]);
    }

    #[test]
    fn loopback_is_reached_from_loopback_alone() {
        let remote = "127.0.0.1:9".parse().unwrap();
        assert!(!Local::new(&[host("192.0.2.1:7")], &[]).can_reach(remote));
        assert!(Local::new(&[host("127.0.0.1:7")], &[]).can_reach(remote));
        assert!(!Local::new(&[host("127.0.0.1:7")], &[]).can_reach("192.0.2.2:9".parse().unwrap()));
        assert!(!Local::new(&[host("[::1]:7")], &[]).can_reach(remote));
    }

    #[test]
    fn nobody_checks_the_own_address() {
        let local = Local::new(&[host("192.168.1.4:7")], &[]);
        assert!(!local.can_reach("192.168.1.4:7".parse().unwrap()));
        assert!(local.can_reach("192.168.1.4:8".parse().unwrap()));
    }

    #[test]
    fn a_path_loses_its_ground_with_the_address_it_leaves_from() {
        let before = Local::new(&[host("192.168.1.4:7"), host("10.9.0.4:7"), host("127.0.0.1:7")], &[]);
        let after = Local::new(&[host("10.9.0.4:7"), host("127.0.0.1:7")], &[]);
        let offline = Local::new(&[host("127.0.0.1:7")], &[]);
        let elsewhere = Local::new(&[host("10.7.0.4:7"), host("127.0.0.1:7")], &[]);
        let ground = |after: &Local, remote: &str, source: Option<&str>| {
            after.ground(&before, remote.parse().unwrap(), source.map(|ip| ip.parse().unwrap()))
        };
        assert_eq!(ground(&after, "198.51.100.1:9", Some("192.168.1.4")), Ground::Gone);
        assert_eq!(ground(&after, "198.51.100.1:9", Some("10.9.0.4")), Ground::Unsure);
        assert_eq!(ground(&after, "192.168.1.9:9", None), Ground::Gone, "its network");
        assert_eq!(ground(&after, "198.51.100.1:9", None), Ground::Unsure, "nobody said which of the two it was");
        assert_eq!(ground(&offline, "198.51.100.1:9", None), Ground::Gone, "none is left");
        assert_eq!(ground(&elsewhere, "198.51.100.1:9", None), Ground::Gone, "none that it could have been is left");
        assert_eq!(ground(&offline, "127.0.0.1:9", None), Ground::Unsure);
    }

    #[test]
    fn the_likeliest_addresses_are_checked_first() {
        use CandidateKind::{Host, Mapped, ServerReflexive};
        let local = Local::new(&[host("192.168.1.4:7"), host("[2001:db8:1:2::4]:7")], &[]);
        let inputs = [
            ("[2001:db8:1:2::9]:7", Host),
            ("192.168.1.9:7", Host),
            ("[2001:db8:9::9]:7", Host),
            ("198.51.100.9:7", Host),
            ("198.51.100.8:7", Mapped),
            ("198.51.100.8:8", ServerReflexive),
            ("172.17.0.1:7", Host),
        ];
        let orders = inputs.map(|(addr, kind)| {
            let addr = addr.parse().unwrap();
            order(addr, kind, local.reach(addr))
        });
        assert!(orders.is_sorted_by(|one, other| one < other), "{orders:?}");
    }

    #[test]
    fn a_neighbour_is_nearer_than_the_rest_of_the_world() {
        let local = Local::new(&[host("192.168.1.4:7"), host("[2001:db8:1:2::4]:7"), host("127.0.0.1:7")], &[]);
        assert_eq!(local.reach("127.0.0.1:9".parse().unwrap()), Reach::Loopback);
        assert_eq!(local.reach("192.168.1.9:9".parse().unwrap()), Reach::Lan);
        assert_eq!(local.reach("[2001:db8:1:2::9]:9".parse().unwrap()), Reach::Lan);
        assert_eq!(local.reach("192.168.2.9:9".parse().unwrap()), Reach::Wide);
        assert!(Reach::Loopback < Reach::Lan && Reach::Lan < Reach::Wide);
    }

    #[test]
    fn a_known_network_is_as_large_as_its_prefix_says() {
        let ours = [Network::new("192.168.5.4".parse().unwrap(), 22)];
        let local = Local::new(&[host("192.168.5.4:7"), host("10.8.0.2:7")], &ours);
        assert_eq!(local.reach("192.168.7.9:9".parse().unwrap()), Reach::Lan);
        assert_eq!(local.reach("192.168.8.9:9".parse().unwrap()), Reach::Wide);
        assert_eq!(local.reach("10.8.0.3:9".parse().unwrap()), Reach::Wide, "nobody named that network");
    }

    #[test]
    fn every_prefix_holds_its_own_address_and_the_longest_no_other() {
        for prefix in 0..=u8::MAX {
            for (ip, other) in [("192.0.2.7", "192.0.2.6"), ("2001:db8::7", "2001:db8::6")] {
                let network = Network::new(ip.parse().unwrap(), prefix);
                assert!(network.contains(ip.parse().unwrap()), "{ip}/{prefix}");
                let longest = prefix >= if ip.contains(':') { 128 } else { 32 };
                assert_eq!(network.contains(other.parse().unwrap()), !longest, "{other} in {ip}/{prefix}");
            }
        }
        assert!(!Network::new("0.0.0.0".parse().unwrap(), 0).contains("2001:db8::7".parse().unwrap()));
    }
}
