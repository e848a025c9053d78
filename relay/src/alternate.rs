//! The second STUN port: by asking both, a peer learns whether its NAT shows every destination the same address.
//!
//! In: the addresses that STUN is answered on, and the port that was wanted. Out: the sockets of the second port, which
//! main port it belongs to, and which two sockets answer for each other. It answers nothing itself: `stun` does, and by the
//! same rules.
//! The port behind the main one is taken unless another was chosen; if it is taken by somebody else, the system chooses
//! one and a warning says so, because a firewall may have to let it in.
//! Bounds: one socket for each address that is listened on.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use tokio::net::UdpSocket;
use tracing::warn;

use crate::{RelayError, listen_udp, stun::Responder};

/// An address that STUN is answered on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Main {
    /// The address; its port is the one that peers know.
    pub(crate) address: SocketAddr,
    /// Whether the system chose the port.
    pub(crate) is_any_port: bool,
    /// Whether an IPv6 address is for IPv6 alone.
    pub(crate) only_v6: bool,
}

/// The second ports, and what answers on them.
#[derive(Debug, Default)]
pub(crate) struct Alternates {
    /// Sockets that nothing answers on yet.
    pub(crate) sockets: Vec<UdpSocket>,
    /// Second ports by main port.
    pub(crate) ports: BTreeMap<u16, u16>,
}

/// Opens a second port for each main one; `chosen` is what the configuration names.
///
/// # Errors
/// [`RelayError::Bind`] if a port that was named cannot be had.
pub(crate) fn bind(mains: &[Main], chosen: Option<u16>) -> Result<Alternates, RelayError> {
    let mut all = Alternates::default();
    let mut bound: BTreeSet<SocketAddr> = mains.iter().map(|main| main.address).collect();
    for main in mains {
        let port = main.address.port();
        let known = all.ports.get(&port).copied();
        let Some(wanted) = known.or(chosen).or_else(|| beside(main)) else { continue };
        let address = SocketAddr::new(main.address.ip(), wanted);
        // It may be there already: as a main port, or as the second one of another main port.
        if wanted != 0 && bound.contains(&address) {
            all.ports.entry(port).or_insert(wanted);
            continue;
        }
        let socket = match listen_udp(address, main.only_v6) {
            Ok(socket) => socket,
            Err(cause) if chosen.is_some() => return Err(RelayError::Bind { address, protocol: "UDP", cause }),
            Err(cause) if known.is_some() => {
                warn!(%address, %cause, "no second STUN port on this address");
                continue;
            }
            Err(cause) => match instead(main, address, &cause) {
                Some(socket) => socket,
                None => continue,
            },
        };
        if let Ok(address) = socket.local_addr() {
            all.ports.entry(port).or_insert(address.port());
            bound.insert(address);
            all.sockets.push(socket);
        }
    }
    Ok(all)
}

/// Joins each socket with that of the other port of its address, if there is one; `ports` are second ports by main port.
pub(crate) fn paired(sockets: Vec<UdpSocket>, ports: &BTreeMap<u16, u16>) -> Vec<Responder> {
    let at: BTreeMap<SocketAddr, Arc<UdpSocket>> =
        sockets.into_iter().filter_map(|socket| Some((socket.local_addr().ok()?, Arc::new(socket)))).collect();
    let others = |port: u16| {
        let mains = ports.iter().filter(move |(_, second)| **second == port).map(|(main, _)| *main);
        ports.get(&port).copied().into_iter().chain(mains)
    };
    let other = |address: &SocketAddr| {
        others(address.port()).find_map(|port| at.get(&SocketAddr::new(address.ip(), port)).cloned())
    };
    at.iter().map(|(address, socket)| Responder { socket: Arc::clone(socket), other: other(address) }).collect()
}

/// The port behind the main one, or any if that was any.
fn beside(main: &Main) -> Option<u16> {
    if main.is_any_port { Some(0) } else { main.address.port().checked_add(1) }
}

fn instead(main: &Main, address: SocketAddr, cause: &std::io::Error) -> Option<UdpSocket> {
    let any = listen_udp(SocketAddr::new(main.address.ip(), 0), main.only_v6);
    let port = any.as_ref().ok().and_then(|socket| Some(socket.local_addr().ok()?.port()));
    match port {
        Some(port) => warn!(
            %address, %cause, port,
            "the second STUN port is taken, another is used: let it through the firewall, or choose with --stun-alternate-port"
        ),
        None => warn!(%address, %cause, "no second STUN port: peers cannot tell what kind of NAT they are behind"),
    }
    any.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn main_of(socket: &UdpSocket) -> Main {
        Main { address: socket.local_addr().unwrap(), is_any_port: false, only_v6: false }
    }

    async fn anywhere() -> UdpSocket {
        UdpSocket::bind("127.0.0.1:0").await.unwrap()
    }

    /// Two sockets whose ports follow each other.
    async fn neighbours() -> (UdpSocket, UdpSocket) {
        loop {
            let first = anywhere().await;
            let Some(port) = first.local_addr().unwrap().port().checked_add(1) else { continue };
            if let Ok(second) = UdpSocket::bind(("127.0.0.1", port)).await {
                return (first, second);
            }
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_replaced_by_one_that_the_system_chooses() {
        let (first, taken) = neighbours().await;
        let all = bind(&[main_of(&first)], None).unwrap();
        let main = first.local_addr().unwrap().port();
        assert_eq!(all.sockets.len(), 1);
        assert_eq!(all.ports[&main], all.sockets[0].local_addr().unwrap().port());
        assert_ne!(all.ports[&main], taken.local_addr().unwrap().port());
    }

    #[tokio::test]
    async fn a_taken_port_that_was_named_is_an_error() {
        let (first, taken) = (anywhere().await, anywhere().await);
        let port = taken.local_addr().unwrap().port();
        assert!(matches!(bind(&[main_of(&first)], Some(port)), Err(RelayError::Bind { protocol: "UDP", .. })));
    }

    #[tokio::test]
    async fn another_main_port_serves_as_the_second_one() {
        let (first, second) = neighbours().await;
        let all = bind(&[main_of(&first), main_of(&second)], Some(second.local_addr().unwrap().port())).unwrap();
        assert_eq!(all.ports[&first.local_addr().unwrap().port()], second.local_addr().unwrap().port());
        assert!(all.sockets.is_empty());
    }

    #[tokio::test]
    async fn the_two_ports_of_an_address_answer_for_each_other_and_for_no_other_address() {
        let (first, lone) = (anywhere().await, anywhere().await);
        let all = bind(&[main_of(&first)], None).unwrap();
        let (main, second) = (first.local_addr().unwrap(), all.sockets[0].local_addr().unwrap());
        let mut sockets = all.sockets;
        sockets.extend([first, lone]);
        let responders = paired(sockets, &all.ports);
        assert_eq!(responders.len(), 3);
        for Responder { socket, other } in responders {
            let other = other.map(|other| other.local_addr().unwrap());
            let expected = match socket.local_addr().unwrap() {
                address if address == main => Some(second),
                address if address == second => Some(main),
                _lone => None,
            };
            assert_eq!(other, expected);
        }
    }

    #[test]
    fn no_port_is_behind_the_last_one() {
        let address = "127.0.0.1:65535".parse().unwrap();
        assert_eq!(beside(&Main { address, is_any_port: false, only_v6: false }), None);
        assert_eq!(beside(&Main { address, is_any_port: true, only_v6: false }), Some(0));
    }
}
