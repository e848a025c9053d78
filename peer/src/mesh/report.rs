//! What an instance knows of the network around it, for people.
//!
//! In: reports of the machines. Out: [`Report`], with what only the operating system can say: whether it knows a way to an
//! address at all. It sends nothing: connecting a UDP socket only looks a route up.
//! Bounds: those of [`NetworkReport`]; one look-up per address that gave no answer, some microseconds each.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use peerfleet_proto::request::network::{CheckOutcome, NetworkReport, PathReport};
use serde::{Deserialize, Serialize};

use super::{NotJoined, UplinkState};

/// What an instance knows of the network around it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How the connection to the relay stands.
    pub uplink: UplinkState,
    /// Why the room was not joined at the last try.
    pub trouble: Option<NotJoined>,
    /// The relay's addresses, the one connected to first; those of the last connection.
    pub relay: Vec<SocketAddr>,
    /// Host and port of the proxy by which the relay is reached, if there is one.
    pub proxy: Option<String>,
    /// Whether it is being found out what the NAT does with what comes from outside and from ourselves; ask again a moment
    /// later.
    pub measuring: bool,
    /// What it would tell others too; the path is that to the instance that was named.
    pub network: NetworkReport,
}

/// Says of addresses without an answer whether the system knows a way there.
pub(super) fn with_routes(mut report: PathReport) -> PathReport {
    for check in &mut report.checks {
        let unanswered = matches!(check.outcome, CheckOutcome::Waiting | CheckOutcome::Silent);
        if unanswered && !has_route(check.addr) {
            check.outcome = CheckOutcome::NoRoute;
        }
    }
    report
}

/// An address of the IPv4 internet that nobody has (RFC 5737): a route to it is one to anywhere.
const ANYWHERE_V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9);

/// Likewise of the IPv6 internet (RFC 3849).
const ANYWHERE_V6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), 9);

/// Whether the system knows a way to the IPv4 internet, and to the IPv6 internet.
pub(super) fn routes() -> (bool, bool) {
    (has_route(ANYWHERE_V4), has_route(ANYWHERE_V6))
}

/// Whether the system would send to this address; also if it cannot be told.
fn has_route(to: SocketAddr) -> bool {
    let any: SocketAddr =
        if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let looked_up = UdpSocket::bind(any).and_then(|socket| socket.connect(to));
    !looked_up.is_err_and(|error| {
        matches!(
            error.kind(),
            io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable | io::ErrorKind::AddrNotAvailable
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_a_route() {
        assert!(has_route("127.0.0.1:9".parse().unwrap()));
    }
}
