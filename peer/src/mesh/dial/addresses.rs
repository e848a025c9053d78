//! From a host's name to a TCP connection with one of its addresses (RFC 8305, "Happy Eyeballs" version 2).
//!
//! In: a name or an address, and a port. Out: its addresses in the order to try them; the first connection that stands.
//! Never waits for an address that does not answer while another could be tried, and leaves no attempt behind: those
//! that lose are cut.
//! Bounds: [`MAX_ADDRESSES`] of a name, each begun [`NEXT_ATTEMPT`] after the one before or as soon as that has failed;
//! the caller brings the deadline.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use tokio::{
    net::{TcpStream, lookup_host},
    task::JoinSet,
    time::sleep,
};

/// Head start of one address before the next is tried beside it (RFC 8305 §5, the recommended value).
const NEXT_ATTEMPT: Duration = Duration::from_millis(250);

/// Addresses of one name that are tried; with the head start between them, four seconds until the last has begun.
const MAX_ADDRESSES: usize = 16;

/// The addresses of a host, in the order to try them.
///
/// # Errors
/// If the resolver fails or knows none.
pub(super) async fn lookup(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let mut found: Vec<SocketAddr> = lookup_host((host, port)).await?.collect();
    if found.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "it is known, but has no address"));
    }
    found = by_turns(found);
    found.truncate(MAX_ADDRESSES);
    Ok(found)
}

/// IPv6 and IPv4 by turns, first the family that the resolver puts first: it orders by RFC 6724, and so puts IPv6 first
/// wherever this machine has a way to it (RFC 8305 §4).
fn by_turns(found: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let v6_first = found.first().is_some_and(SocketAddr::is_ipv6);
    let (mut first, mut second): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|address| address.is_ipv6() == v6_first);
    let mut mixed = Vec::with_capacity(first.len() + second.len());
    first.reverse();
    second.reverse();
    while !(first.is_empty() && second.is_empty()) {
        mixed.extend(first.pop());
        mixed.extend(second.pop());
    }
    mixed
}

/// The first of the addresses that takes a connection; all others are given up.
///
/// # Errors
/// What each address said, in the order in which they failed.
pub(super) async fn connect_any(
    addresses: &[SocketAddr],
) -> Result<(TcpStream, SocketAddr), Vec<(SocketAddr, io::Error)>> {
    let mut waiting = addresses.iter().copied();
    let mut attempts = JoinSet::new();
    let mut failed = Vec::new();
    loop {
        let next = waiting.next();
        let is_last = next.is_none();
        if let Some(address) = next {
            attempts.spawn(async move { (address, TcpStream::connect(address).await) });
        } else if attempts.is_empty() {
            return Err(failed);
        }
        tokio::select! {
            Some(ended) = attempts.join_next() => match ended {
                Ok((address, Ok(stream))) => return Ok((stream, address)),
                Ok((address, Err(cause))) => failed.push((address, cause)),
                Err(_) => {}
            },
            () = sleep(NEXT_ATTEMPT), if !is_last => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_families_take_turns() {
        let v4 = |last| SocketAddr::from(([192, 0, 2, last], 1));
        let v6: SocketAddr = "[2001:db8::1]:1".parse().unwrap();
        assert_eq!(by_turns(vec![v4(1), v4(2), v6]), vec![v4(1), v6, v4(2)]);
        assert_eq!(by_turns(vec![v6, v4(1), v4(2)]), vec![v6, v4(1), v4(2)]);
    }

    #[tokio::test]
    async fn a_dead_address_does_not_keep_from_a_live_one() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let live = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (_, address) = connect_any(&[closed, live.local_addr().unwrap()]).await.unwrap();
        assert_eq!(address, live.local_addr().unwrap());
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_silent_address_costs_its_head_start_and_no_more() {
        let silent = Silent::new();
        let live = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let begun = std::time::Instant::now();
        let (_, address) = connect_any(&[silent.address, live.local_addr().unwrap()]).await.unwrap();
        assert_eq!(address, live.local_addr().unwrap());
        assert!(begun.elapsed() >= NEXT_ATTEMPT, "the first address had no head start");
        // The system itself would go on trying for two minutes.
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn every_address_that_failed_is_told() {
        let closed = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let addresses = [closed(), closed(), closed()];
        let failed = connect_any(&addresses).await.unwrap_err();
        assert_eq!(failed.iter().map(|(address, _)| *address).collect::<Vec<_>>(), addresses);
        assert!(connect_any(&[]).await.unwrap_err().is_empty());
    }

    /// A port that answers no SYN, as Linux has it: the queue of its listener is full, and nobody accepts.
    #[cfg(target_os = "linux")]
    struct Silent {
        address: SocketAddr,
        _listener: socket2::Socket,
        _waiting: Vec<socket2::Socket>,
    }

    #[cfg(target_os = "linux")]
    impl Silent {
        fn new() -> Self {
            let open = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            let listener = open();
            listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
            listener.listen(0).unwrap();
            let address = listener.local_addr().unwrap().as_socket().unwrap();
            // A queue of length 0 takes one connection; the second is one more than Linux needs to ignore the third.
            let waiting = (0..3).map(|_| {
                let socket = open();
                socket.set_nonblocking(true).unwrap();
                // It is under way, which is all that is wanted.
                let _ = socket.connect(&address.into());
                socket
            });
            Self { address, _waiting: waiting.collect(), _listener: listener }
        }
    }
}
