//! Drives [`peerfleet_proto::path::Sampling`]: sockets that live for two seconds, to learn how the NAT picks ports.
//!
//! In: the responder to ask. Out: [`Ports`], once. Never sends anything else, and keeps no socket.
//! Bounds: those of the machine.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    task::Poll,
    time::Instant,
};

use peerfleet_proto::path::{
    Sampling,
    mapping::{Ports, SOCKETS},
};
use tokio::{io::ReadBuf, net::UdpSocket, time::sleep_until};

use super::routes::plain;
use crate::random;

/// Longest answer that is read; a STUN answer with one address has 52 bytes.
const BUFFER_BYTES: usize = 256;

/// Asks from several sockets, and closes them.
///
/// # Errors
/// If no socket can be opened.
pub(super) async fn sample(responder: SocketAddr) -> io::Result<Ports> {
    let sockets = open(responder).await?;
    let locals: Vec<_> = sockets.iter().map(|(_, port)| *port).collect();
    let mut sampling = Sampling::new(responder, &locals, random::bytes(), Instant::now());
    let mut buffer = [0; BUFFER_BYTES];
    loop {
        while let Some((number, request)) = sampling.poll_transmit() {
            if let Some((socket, _)) = sockets.get(number)
                && let Err(error) = socket.send_to(&request.bytes, request.to).await
            {
                tracing::trace!(%error, "the kernel took no STUN packet");
            }
        }
        if let Some(outcome) = sampling.outcome() {
            return Ok(outcome);
        }
        let due = sampling.poll_timeout().unwrap_or_else(Instant::now);
        tokio::select! {
            (number, len, from) = receive(&sockets, &mut buffer) => {
                sampling.handle_packet(number, plain(from), &buffer[..len], Instant::now());
            }
            () = sleep_until(due.into()) => sampling.handle_timeout(Instant::now()),
        }
    }
}

async fn open(responder: SocketAddr) -> io::Result<Vec<(UdpSocket, u16)>> {
    let any = any_address(responder);
    let mut sockets = Vec::with_capacity(SOCKETS);
    for _ in 0..SOCKETS {
        let socket = UdpSocket::bind(any).await?;
        let port = socket.local_addr()?.port();
        sockets.push((socket, port));
    }
    Ok(sockets)
}

/// Where a socket that is to send to this address is bound: anywhere, in its family.
pub(super) fn any_address(to: SocketAddr) -> SocketAddr {
    if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() }
}

/// The next packet of any socket: its number, how long it is, and where it came from.
async fn receive(sockets: &[(UdpSocket, u16)], buffer: &mut [u8]) -> (usize, usize, SocketAddr) {
    std::future::poll_fn(|cx| {
        for (number, (socket, _)) in sockets.iter().enumerate() {
            loop {
                let mut read = ReadBuf::new(buffer);
                match socket.poll_recv_from(cx, &mut read) {
                    Poll::Ready(Ok(from)) => return Poll::Ready((number, read.filled().len(), from)),
                    // An ICMP error about a request; the next read says whether there is more.
                    Poll::Ready(Err(_)) => {}
                    Poll::Pending => break,
                }
            }
        }
        Poll::Pending
    })
    .await
}
