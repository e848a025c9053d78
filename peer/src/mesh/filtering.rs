//! Drives [`peerfleet_proto::path::FilterTrial`]: one socket that lives for some seconds, to learn which packets are let in.
//!
//! In: the responder to ask, and its other port. Out: [`Filtering`], once. The socket is new, because one that has sent to the
//! other port before would be let in from there by any filter; it sends nothing else, and is closed at the end.
//! Bounds: those of the machine.

use std::{io, net::SocketAddr, time::Instant};

use peerfleet_proto::path::{FilterTrial, filtering::Filtering};
use tokio::{net::UdpSocket, time::sleep_until};

use super::{routes::plain, sampling::any_address};
use crate::random;

/// Longest answer that is read; a STUN answer with one address has 52 bytes.
const BUFFER_BYTES: usize = 256;

/// Tries what is let in, and closes the socket.
///
/// # Errors
/// If no socket can be opened.
pub(super) async fn try_filter(responder: SocketAddr, other_port: u16) -> io::Result<Filtering> {
    let socket = UdpSocket::bind(any_address(responder)).await?;
    let mut trial = FilterTrial::new(responder, other_port, random::bytes(), Instant::now());
    let mut buffer = [0; BUFFER_BYTES];
    loop {
        while let Some(request) = trial.poll_transmit() {
            if let Err(error) = socket.send_to(&request.bytes, request.to).await {
                tracing::trace!(%error, "the kernel took no STUN packet");
            }
        }
        if let Some(outcome) = trial.outcome() {
            return Ok(outcome);
        }
        let due = trial.poll_timeout().unwrap_or_else(Instant::now);
        tokio::select! {
            received = socket.recv_from(&mut buffer) => match received {
                Ok((len, from)) => _ = trial.handle_packet(plain(from), &buffer[..len], Instant::now()),
                // An ICMP error about a request; the next read says whether there is more.
                Err(error) => tracing::trace!(%error, "no answer by STUN"),
            },
            () = sleep_until(due.into()) => trial.handle_timeout(Instant::now()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use peerfleet_proto::stun::{Class, Draft, Message};

    use super::*;

    /// A responder that answers from where it is wanted, if it can; gives its two ports.
    async fn responder(changes: bool) -> [SocketAddr; 2] {
        let sockets = [UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap()];
        let [main, other] = sockets.map(Arc::new);
        let addresses = [main.local_addr().unwrap(), other.local_addr().unwrap()];
        for (asked, elsewhere) in [(Arc::clone(&main), Arc::clone(&other)), (other, main)] {
            tokio::spawn(async move {
                let mut buffer = [0; 1500];
                loop {
                    let (len, from) = asked.recv_from(&mut buffer).await.unwrap();
                    let request = Message::parse(&buffer[..len]).unwrap();
                    let answer = Draft::new(Class::Success, request.transaction()).mapped_address(from).finish();
                    let is_changed = changes && request.change_request().is_some();
                    let sender = if is_changed { &elsewhere } else { &asked };
                    sender.send_to(&answer, from).await.unwrap();
                }
            });
        }
        addresses
    }

    #[tokio::test]
    async fn a_way_without_a_filter_is_told_as_that() {
        let [main, other] = responder(true).await;
        assert_eq!(try_filter(main, other.port()).await.unwrap(), Filtering::PortIndependent);
    }

    #[tokio::test]
    async fn of_a_responder_that_does_not_know_the_question_nothing_is_concluded() {
        let [main, other] = responder(false).await;
        assert_eq!(try_filter(main, other.port()).await.unwrap(), Filtering::Unknown);
    }
}
