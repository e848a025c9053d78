//! How large a link's packets may be: what is tried, and where what is too large would be lost.
//!
//! In: this host's interfaces, the other side's candidates, the path as it is proved. Out: the bounds within which QUIC looks
//! for the largest packet by itself (RFC 8899). It never assumes a size: beyond [`INITIAL`] every size is probed first.
//! QUIC looks right after the handshake and seldom again, and knows nothing of paths beneath its one address. So where a path
//! may take far larger packets than usual, the handshake waits a moment for that path ([`settle`]); and on the relay's way, which
//! takes any size, what is larger than [`USUAL`] and than what the direct path took is lost, because the direct path that comes
//! later may not take it.
//! Bounds: [`LARGEST_DIRECT`], [`LARGEST_RELAYED`]; [`SETTLE`] of waiting.

use std::{net::IpAddr, time::Duration};

use peerfleet_proto::{
    path::Network,
    request::link::{Candidate, Route},
};
use quinn::MtuDiscoveryConfig;
use tokio::time::timeout;

use super::{
    interfaces::{Interface, Purpose},
    routes::Remote,
};

/// Packet size that every path takes (RFC 9000 §14), in bytes.
pub(super) const INITIAL: u16 = 1200;

/// Largest packet that is tried on any path, in bytes: Ethernet's 1,500 less IPv6 and UDP.
pub(super) const USUAL: u16 = 1452;

/// Largest packet of a direct path between interfaces that take more than Ethernet's usual 1,500 bytes: ten, which is what
/// QUIC sends at once, fit one UDP send (65,507 bytes). Within this machine and in networks with jumbo frames the cost
/// of a transfer is for each packet, not for each byte.
pub(super) const LARGEST_DIRECT: u16 = 6500;

/// Largest packet of a link that is only ever relayed, in bytes: four fit a frame. Packets are cut for nobody there.
pub(super) const LARGEST_RELAYED: u16 = 16_250;

/// Longest wait for a path that may take larger packets: between neighbours the first check is answered in a tenth of
/// this, and who waits in vain does not feel it.
const SETTLE: Duration = Duration::from_millis(20);

/// Time after which a size is looked for again when a path turned out to take less than the one before.
const AFTER_BLACK_HOLE: Duration = Duration::from_secs(5);

/// IPv6 and UDP before a packet, in bytes; IPv4 has less.
const HEADERS: u32 = 48;

/// Largest packet that a direct path to these candidates may take, judged by this host's interfaces: one of its own
/// addresses is reached within the machine, one of an interface's network through that interface. Everybody names a loopback
/// address, and the addresses of containers' bridges are the same on many machines: those say nothing beside others.
pub(super) fn plausible(interfaces: &[Interface], theirs: &[Candidate]) -> u16 {
    let ips = theirs.iter().map(|theirs| theirs.addr.ip().to_canonical());
    let is_here = ips.clone().all(|ip| ip.is_loopback());
    let telling = ips.filter(|ip| is_here || !ip.is_loopback());
    let largest = telling.filter_map(|ip| leaving_towards(interfaces, ip)).max();
    let payload = largest.unwrap_or(0).saturating_sub(HEADERS);
    u16::try_from(payload).unwrap_or(u16::MAX).clamp(USUAL, LARGEST_DIRECT)
}

/// The MTU of the interface that packets to a neighbour leave by.
fn leaving_towards(interfaces: &[Interface], to: IpAddr) -> Option<u32> {
    let shown = || interfaces.iter().filter(|interface| interface.purpose != Purpose::Bridge);
    let has = |interface: &Interface| interface.addresses.iter().any(|address| address.ip == to);
    if to.is_loopback() || shown().any(has) {
        return interfaces.iter().find(|interface| interface.purpose == Purpose::Loopback)?.mtu;
    }
    let is_near =
        |interface: &&Interface| interface.addresses.iter().any(|own| Network::new(own.ip, own.prefix).contains(to));
    shown().find(is_near)?.mtu
}

/// Waits for the direct path, if it may take larger packets than usual.
pub(super) async fn settle(remote: &Remote) {
    if remote.route == Route::Auto
        && remote.plausible_mtu() > USUAL
        && timeout(SETTLE, remote.directly()).await.is_err()
    {
        tracing::trace!("no neighbour answered at once: the usual packet size");
    }
}

/// The bounds of QUIC's own search, for the path as it is now.
pub(super) fn discovery(remote: &Remote) -> MtuDiscoveryConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.black_hole_cooldown(AFTER_BLACK_HOLE).upper_bound(match remote.route {
        Route::RelayedOnly => LARGEST_RELAYED,
        Route::Auto if remote.direct().is_some() => remote.plausible_mtu(),
        Route::Auto => USUAL,
    });
    discovery
}

#[cfg(test)]
mod tests {
    use peerfleet_proto::request::link::CandidateKind;

    use super::{
        super::interfaces::{Address, Standing},
        *,
    };

    fn interface(purpose: Purpose, ip: &str, prefix: u8, mtu: u32) -> Interface {
        let address = Address { ip: ip.parse().unwrap(), prefix, standing: Standing::Usual };
        Interface { name: "any".into(), purpose, addresses: vec![address], mtu: Some(mtu) }
    }

    fn host() -> Vec<Interface> {
        vec![
            interface(Purpose::Default, "192.168.1.4", 22, 1500),
            interface(Purpose::Network, "10.0.0.4", 24, 9000),
            interface(Purpose::Network, "fd00::4", 64, 4000),
            interface(Purpose::Loopback, "127.0.0.1", 8, 65_536),
        ]
    }

    fn towards(addr: &str) -> u16 {
        plausible(&host(), &[Candidate { kind: CandidateKind::Host, addr: addr.parse().unwrap() }])
    }

    #[test]
    fn larger_packets_are_plausible_only_where_an_interface_takes_them() {
        assert_eq!(towards("10.0.0.9:7"), LARGEST_DIRECT);
        assert_eq!(towards("[::ffff:10.0.0.9]:7"), LARGEST_DIRECT);
        assert_eq!(towards("[fd00::9]:7"), 3952);
        for usual in ["192.168.1.9:7", "10.0.1.9:7", "[2001:db8::1]:7", "203.0.113.5:7"] {
            assert_eq!(towards(usual), USUAL, "{usual}");
        }
        assert_eq!(plausible(&host(), &[]), USUAL);
    }

    #[test]
    fn an_own_address_is_reached_within_the_machine() {
        assert_eq!(towards("192.168.1.4:7"), LARGEST_DIRECT);
        assert_eq!(towards("127.0.0.1:7"), LARGEST_DIRECT);
    }

    #[test]
    fn what_every_machine_names_makes_no_neighbour() {
        let mut host = host();
        host.push(interface(Purpose::Bridge, "172.17.0.1", 16, 65_535));
        let named = ["203.0.113.5:7", "172.17.0.1:7", "172.17.0.9:7", "127.0.0.1:7"];
        let theirs = named.map(|addr| Candidate { kind: CandidateKind::Host, addr: addr.parse().unwrap() });
        assert_eq!(plausible(&host, &theirs), USUAL);
    }

    #[test]
    fn a_small_interface_does_not_lower_what_every_path_is_tried_with() {
        let tunnel = [interface(Purpose::Network, "10.0.0.4", 24, 1280)];
        let neighbour = Candidate { kind: CandidateKind::Host, addr: "10.0.0.9:7".parse().unwrap() };
        assert_eq!(plausible(&tunnel, &[neighbour]), USUAL);
    }
}
