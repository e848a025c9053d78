//! The interfaces of this host: where others may reach it without help, which networks it is in, and how large packets
//! may leave.
//!
//! In: the operating system's table, and which address it would send from. Out: [`Interface`]s, best first; the candidates and
//! the networks that follow from them. Nothing is sent, resolved or kept open: a look takes about a millisecond.
//! The interface that the default route leaves by goes first, containers' bridges and VPNs last: their addresses mean
//! nothing elsewhere, or lead through another network's machinery.
//! Bounds: [`MAX_HOST_CANDIDATES`] addresses are offered and as many networks known, the least useful dropped first.

use std::{
    cmp::Reverse,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use peerfleet_proto::{
    path::candidate::{Network, is_global},
    request::link::{Candidate, CandidateKind},
};

pub(super) mod watch;

/// Most addresses of interfaces that are offered: a host with a hundred containers must not crowd out the ones that lead
/// to it. Half of what the other side takes, so that there is room for those that a NAT shows.
pub(super) const MAX_HOST_CANDIDATES: usize = 16;

/// Addresses for documentation (RFC 5737, RFC 3849), to ask the system for its default route: they are nobody's, and
/// choosing a route to them sends nothing.
const ELSEWHERE: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), 9),
];

/// Names of what container engines and hypervisors make, whose addresses are the same on every host.
const BRIDGES: [&str; 13] = [
    "docker", "br-", "veth", "virbr", "lxc", "lxdbr", "incusbr", "cni", "flannel", "cali", "podman", "vboxnet", "vmnet",
];

/// Names of what VPNs make. Point-to-point interfaces count as such whatever their name.
const VPNS: [&str; 6] = ["tun", "tap", "wg", "utun", "tailscale", "zt"];

/// What an interface is for; the order is the preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Purpose {
    /// The default route leaves by it.
    Default,
    /// Some network is behind it.
    Network,
    /// Another network's machinery is behind it: a VPN's, of whatever kind.
    Vpn,
    /// Containers and virtual machines of this host are behind it.
    Bridge,
    /// Nothing is behind it.
    Loopback,
}

/// An interface that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    /// What the system calls it.
    pub(super) name: String,
    /// What it is for.
    pub(super) purpose: Purpose,
    /// Its addresses that mean something to others, best first.
    pub(super) addresses: Vec<Address>,
    /// Largest IP packet that leaves by it, in bytes, if the system says.
    pub(super) mtu: Option<u32>,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    /// The address.
    pub(super) ip: IpAddr,
    /// Bits that it shares with its neighbours: at most 32, or 128.
    pub(super) prefix: u8,
    /// Which of several.
    pub(super) standing: Standing,
}

/// What an address is compared with others of its interface; the order is the preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// The system sends from it: a firewall that lets answers in lets them in there.
    Source,
    /// It changes from day to day (RFC 8981), and the system prefers to send from such.
    Temporary,
    /// Any other.
    Usual,
    /// It is about to be gone (RFC 4862 §5.5.4).
    Deprecated,
}

impl Interface {
    fn read(found: &netdev::Interface, sources: &[IpAddr]) -> Self {
        let flags = |at: usize| found.ipv6_addr_flags.get(at).copied().unwrap_or_default();
        let v4 = found.ipv4.iter().map(|net| (IpAddr::V4(net.addr()), net.prefix_len(), Standing::Usual));
        let v6 = found.ipv6.iter().enumerate().filter(|(at, _)| !(flags(*at).tentative || flags(*at).duplicated));
        let v6 = v6.map(|(at, net)| {
            let standing = match flags(at) {
                flags if flags.deprecated => Standing::Deprecated,
                flags if flags.temporary => Standing::Temporary,
                _ => Standing::Usual,
            };
            (IpAddr::V6(net.addr()), net.prefix_len(), standing)
        });
        let known = v4.chain(v6).filter(|(ip, ..)| means_something(*ip));
        let mut addresses: Vec<_> = known
            .map(|(ip, prefix, standing)| Address {
                ip,
                prefix,
                standing: if sources.contains(&ip) { Standing::Source } else { standing },
            })
            .collect();
        addresses.sort_by_key(|address| (address.standing, Reverse(is_global(address.ip)), address.ip));
        drop_deprecated(&mut addresses);
        let is_default = addresses.iter().any(|address| address.standing == Standing::Source);
        let purpose = purpose(&found.name, is_default, found.is_loopback(), found.is_tun());
        Self { name: found.name.clone(), purpose, addresses, mtu: found.mtu }
    }
}

/// The interfaces that are up and have an address that means something to others, best first.
pub(super) fn interfaces() -> Vec<Interface> {
    let sources: Vec<_> = ELSEWHERE.iter().filter_map(|to| source_towards(*to)).collect();
    let found = netdev::get_interfaces();
    let up = found.iter().filter(|interface| interface.is_up());
    let mut all: Vec<_> = up.map(|interface| Interface::read(interface, &sources)).collect();
    all.retain(|interface| !interface.addresses.is_empty());
    all.sort_by(|one, other| (one.purpose, &one.name).cmp(&(other.purpose, &other.name)));
    all
}

/// Host candidates for a socket of this port, best first.
pub(super) fn host_candidates(interfaces: &[Interface], port: u16, with_ipv6: bool) -> Vec<Candidate> {
    let mut ips: Vec<IpAddr> = Vec::new();
    for address in interfaces.iter().flat_map(|interface| &interface.addresses) {
        if (with_ipv6 || address.ip.is_ipv4()) && !ips.contains(&address.ip) {
            ips.push(address.ip);
        }
    }
    // One address of loopback stays whatever else there is: two instances on one machine need no other.
    let loopback = ips.iter().position(|ip| ip.is_loopback()).unwrap_or(ips.len());
    let (others, own) = ips.split_at(loopback);
    let room = MAX_HOST_CANDIDATES.saturating_sub(own.len());
    let offered = others.iter().take(room).chain(own);
    offered.map(|ip| Candidate { kind: CandidateKind::Host, addr: SocketAddr::new(*ip, port) }).collect()
}

/// The networks that neighbours of this host are in. A VPN's is none of them: what seems near there may be far away,
/// and the path beside the VPN is the better one.
pub(super) fn networks(interfaces: &[Interface]) -> Vec<Network> {
    let near = interfaces.iter().filter(|interface| match interface.purpose {
        Purpose::Default | Purpose::Network => true,
        Purpose::Vpn | Purpose::Bridge | Purpose::Loopback => false,
    });
    let addresses = near.flat_map(|interface| &interface.addresses);
    addresses.map(|address| Network::new(address.ip, address.prefix)).take(MAX_HOST_CANDIDATES).collect()
}

/// The IPv4 address that the system would send to the rest of the world from.
pub(super) fn source_v4() -> Option<Ipv4Addr> {
    match source_towards(ELSEWHERE[0])? {
        IpAddr::V4(v4) => Some(v4),
        IpAddr::V6(_) => None,
    }
}

/// Whether this host has a way into the world by IPv6 and none by IPv4.
pub(super) fn is_ipv6_only(interfaces: &[Interface]) -> bool {
    let sources = interfaces.iter().flat_map(|interface| &interface.addresses);
    let mut sources = sources.filter(|address| address.standing == Standing::Source).peekable();
    sources.peek().is_some() && sources.all(|address| address.ip.is_ipv6())
}

/// The address that the system would send from, without sending; `None` for this very machine.
pub(super) fn source_towards(to: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(to).ok()?;
    let source = socket.local_addr().ok()?.ip();
    (!source.is_loopback() && !source.is_unspecified()).then_some(source)
}

fn purpose(name: &str, is_default: bool, is_loopback: bool, is_point_to_point: bool) -> Purpose {
    let is_named = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    if is_loopback {
        Purpose::Loopback
    } else if is_default {
        Purpose::Default
    } else if is_named(&BRIDGES) {
        Purpose::Bridge
    } else if is_point_to_point || is_named(&VPNS) {
        Purpose::Vpn
    } else {
        Purpose::Network
    }
}

/// Deprecated addresses go where the interface has another of their family.
fn drop_deprecated(addresses: &mut Vec<Address>) {
    let lasts = |ipv4: bool| {
        let stays = |address: &&Address| address.ip.is_ipv4() == ipv4 && address.standing != Standing::Deprecated;
        addresses.iter().any(|address| stays(&address) && (ipv4 || is_global(address.ip)))
    };
    let (v4, v6) = (lasts(true), lasts(false));
    addresses
        .retain(|address| address.standing != Standing::Deprecated || if address.ip.is_ipv4() { !v4 } else { !v6 });
}

/// Whether an address means something to others. A link-local IPv6 address needs the number of an interface that only
/// the other host knows.
fn means_something(ip: IpAddr) -> bool {
    let sane = match ip {
        IpAddr::V4(v4) => !v4.is_broadcast(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    };
    sane && !ip.is_unspecified() && !ip.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, purpose: Purpose, ips: &[&str]) -> Interface {
        let address = |text: &&str| {
            let (ip, prefix) = text.split_once('/').unwrap();
            Address { ip: ip.parse().unwrap(), prefix: prefix.parse().unwrap(), standing: Standing::Usual }
        };
        Interface { name: name.into(), purpose, addresses: ips.iter().map(address).collect(), mtu: Some(1500) }
    }

    #[test]
    fn loopback_of_this_host_is_offered_last() {
        let all = interfaces();
        let candidates = host_candidates(&all, 7, false);
        let last = candidates.last().expect("every host has a loopback interface");
        assert!(last.addr.ip().is_loopback());
        assert!(candidates.iter().all(|candidate| candidate.addr.port() == 7 && candidate.addr.is_ipv4()));
        assert!(all.iter().all(|interface| interface.mtu.is_some_and(|mtu| mtu >= 1280)));
    }

    #[test]
    fn addresses_that_mean_nothing_elsewhere_are_not_offered() {
        for text in ["fe80::1", "::", "224.0.0.1", "255.255.255.255"] {
            assert!(!means_something(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn the_default_route_comes_before_other_networks_before_vpns_before_bridges() {
        assert!(Purpose::Default < Purpose::Network && Purpose::Network < Purpose::Vpn);
        assert!(Purpose::Vpn < Purpose::Bridge && Purpose::Bridge < Purpose::Loopback);
        assert_eq!(purpose("wlan0", true, false, false), Purpose::Default);
        assert_eq!(purpose("eth1", false, false, false), Purpose::Network);
        assert_eq!(purpose("wg0", false, false, true), Purpose::Vpn);
        assert_eq!(purpose("docker0", false, false, false), Purpose::Bridge);
        assert_eq!(purpose("ppp0", true, false, true), Purpose::Default, "a modem's line is no VPN");
        assert_eq!(purpose("lo", false, true, false), Purpose::Loopback);
    }

    #[test]
    fn a_crowd_of_bridges_does_not_crowd_out_the_rest() {
        let mut all = vec![interface("eth0", Purpose::Default, &["192.168.1.4/22", "2001:db8::4/64"])];
        for at in 0..100 {
            all.push(interface(&format!("br-{at}"), Purpose::Bridge, &[&format!("172.18.{at}.1/24")]));
        }
        all.push(interface("lo", Purpose::Loopback, &["127.0.0.1/8", "::1/128"]));
        let candidates = host_candidates(&all, 7, true);
        assert_eq!(candidates.len(), MAX_HOST_CANDIDATES);
        assert_eq!(candidates[0].addr.to_string(), "192.168.1.4:7");
        assert!(candidates[MAX_HOST_CANDIDATES - 1].addr.ip().is_loopback());
    }

    #[test]
    fn neighbours_are_those_of_networks_with_their_true_prefix() {
        let all = [
            interface("eth0", Purpose::Default, &["192.168.4.4/22"]),
            interface("wg0", Purpose::Vpn, &["10.8.0.2/24"]),
            interface("docker0", Purpose::Bridge, &["172.17.0.1/16"]),
        ];
        assert_eq!(networks(&all), [Network::new("192.168.4.4".parse().unwrap(), 22)]);
    }

    #[test]
    fn a_host_whose_default_routes_are_of_ipv6_alone_has_ipv6_only() {
        let source = |ip: &str| Address { ip: ip.parse().unwrap(), prefix: 64, standing: Standing::Source };
        let mut bridge = interface("docker0", Purpose::Bridge, &["172.17.0.1/16"]);
        let mut lan = interface("eth0", Purpose::Default, &[]);
        assert!(!is_ipv6_only(&[bridge.clone()]), "a host without any way has no NAT64 either");
        lan.addresses.push(source("2001:db8::7"));
        assert!(is_ipv6_only(&[lan.clone(), bridge.clone()]));
        bridge.addresses.push(source("192.0.2.7"));
        assert!(!is_ipv6_only(&[lan, bridge]));
    }

    #[test]
    fn the_source_comes_before_temporary_before_usual_addresses_and_unready_ones_not_at_all() {
        let flags = netdev::interface::ipv6_addr_flags::Ipv6AddrFlags::default;
        let temporary = || netdev::interface::ipv6_addr_flags::Ipv6AddrFlags { temporary: true, ..flags() };
        let addresses = [
            ("fe80::1/64", flags()),
            ("2001:db8::1/64", flags()),
            ("2001:db8::2/64", temporary()),
            ("2001:db8::3/64", temporary()),
            ("2001:db8::4/64", netdev::interface::ipv6_addr_flags::Ipv6AddrFlags { tentative: true, ..flags() }),
            ("2001:db8::5/64", netdev::interface::ipv6_addr_flags::Ipv6AddrFlags { deprecated: true, ..temporary() }),
        ];
        let mut found = netdev::Interface::dummy();
        found.name = "eth0".into();
        found.ipv6 = addresses.iter().map(|(text, _)| text.parse().unwrap()).collect();
        found.ipv6_addr_flags = addresses.map(|(_, flags)| flags).into();
        let read = Interface::read(&found, &["2001:db8::3".parse().unwrap()]);
        let order: Vec<_> = read.addresses.iter().map(|address| address.ip.to_string()).collect();
        assert_eq!(order, ["2001:db8::3", "2001:db8::2", "2001:db8::1"]);
        assert_eq!(read.purpose, Purpose::Default);
    }

    #[test]
    fn a_deprecated_address_is_offered_only_where_there_is_no_other() {
        let old = Address { ip: "2001:db8::1".parse().unwrap(), prefix: 64, standing: Standing::Deprecated };
        let new = Address { ip: "2001:db8:1::1".parse().unwrap(), prefix: 64, standing: Standing::Usual };
        let mut both = vec![new, old];
        drop_deprecated(&mut both);
        assert_eq!(both, [new]);
        let mut alone = vec![old];
        drop_deprecated(&mut alone);
        assert_eq!(alone, [old]);
    }
}
