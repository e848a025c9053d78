//! The STUN responder: tells a peer under which address its UDP packets arrive (RFC 8489).
//!
//! In: UDP packets and where they came from. Out: binding responses, and a reason for each packet that gets none.
//! Never answers with more bytes than came, so a forged source address gains nothing: requests must be padded.
//! Holds no state but each address' pace; asks for no credentials, and a peer must not believe the answer further than
//! as a candidate to be checked.
//! Bounds: [`MOST_PER_SECOND`] answers for each address.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use stun_rs::{
    MessageClass, MessageDecoderBuilder, MessageEncoderBuilder, StunMessage, StunMessageBuilder,
    attributes::stun::{Fingerprint, XorMappedAddress},
    methods::BINDING,
};
use tokio::net::UdpSocket;

use crate::{
    limits::{Origin, Pace},
    metrics::{DropReason, Metrics},
};

/// Answers per second for one address: a peer asks a few times at start and then every 25 s; 100 of them behind one
/// address may start at once.
pub(crate) const MOST_PER_SECOND: u32 = 500;

/// Longest request that is read; the rest of a longer one is cut off by the system, and it does not decode.
const MAX_REQUEST_BYTES: usize = 1500;

/// Pause after a failed read.
const ERROR_PAUSE: Duration = Duration::from_millis(10);

/// Header (20), XOR-MAPPED-ADDRESS of IPv6 (24), FINGERPRINT (8).
const MAX_RESPONSE_BYTES: usize = 52;

/// Answers on this socket until dropped.
pub(crate) async fn respond(socket: UdpSocket, metrics: Arc<Metrics>) {
    let mut pace = Pace::new(MOST_PER_SECOND, Instant::now());
    let mut buffer = [0; MAX_REQUEST_BYTES];
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else {
            // It belongs to an earlier answer, not to the socket; should it stay, it must not take a core.
            tokio::time::sleep(ERROR_PAUSE).await;
            continue;
        };
        let answered = if pace.allows(Origin::of(from), Instant::now()) {
            answer(&buffer[..len], from)
        } else {
            Err(DropReason::StunTooMany)
        };
        match answered {
            Ok(response) => {
                // UDP may lose it as well; the peer asks again.
                if socket.try_send_to(&response, from).is_ok() {
                    metrics.stun_answered();
                }
            }
            Err(reason) => metrics.dropped(reason, 1),
        }
    }
}

fn answer(request: &[u8], from: SocketAddr) -> Result<Vec<u8>, DropReason> {
    let decoder = MessageDecoderBuilder::default().build();
    let (message, len) = decoder.decode(request).map_err(|_| DropReason::StunUnreadable)?;
    if len != request.len() || message.method() != BINDING || message.class() != MessageClass::Request {
        return Err(DropReason::StunUnreadable);
    }
    let mapped = XorMappedAddress::from(SocketAddr::new(from.ip().to_canonical(), from.port()));
    let begun = || {
        StunMessageBuilder::new(BINDING, MessageClass::SuccessResponse)
            .with_transaction_id(*message.transaction_id())
            .with_attribute(mapped.clone())
    };
    // The fingerprint helps to tell STUN from QUIC; where it would make the answer longer than the request, it goes.
    [begun().with_attribute(Fingerprint::default()).build(), begun().build()]
        .iter()
        .filter_map(encode)
        .find(|response| response.len() <= request.len())
        .ok_or(DropReason::StunTooShort)
}

fn encode(message: &StunMessage) -> Option<Vec<u8>> {
    let mut buffer = vec![0; MAX_RESPONSE_BYTES];
    let len = MessageEncoderBuilder::default().build().encode(&mut buffer, message).ok()?;
    buffer.truncate(len);
    Some(buffer)
}

#[cfg(test)]
mod tests {
    use peerfleet_proto::path::{Reflexive, ReflexiveEvent};
    use proptest::prelude::*;
    use stun_rs::{DecoderContextBuilder, TransactionId, attributes::stun::Software};

    use super::*;

    fn request(padding: usize) -> Vec<u8> {
        let mut builder =
            StunMessageBuilder::new(BINDING, MessageClass::Request).with_transaction_id(TransactionId::from([7; 12]));
        if padding > 0 {
            builder = builder.with_attribute(Software::new("x".repeat(padding)).unwrap());
        }
        let mut buffer = vec![0; 600];
        let len = MessageEncoderBuilder::default().build().encode(&mut buffer, &builder.build()).unwrap();
        buffer.truncate(len);
        buffer
    }

    #[test]
    fn padded_request_learns_its_address() {
        for from in ["192.0.2.7:4000", "[2001:db8::7]:4000"] {
            let from: SocketAddr = from.parse().unwrap();
            let response = answer(&request(28), from).unwrap();
            let context = DecoderContextBuilder::default().with_validation().build();
            let decoder = MessageDecoderBuilder::default().with_context(context).build();
            let (message, _) = decoder.decode(&response).unwrap();
            assert_eq!(message.transaction_id().as_bytes(), &[7; 12]);
            let mapped = message.get::<XorMappedAddress>().unwrap().as_xor_mapped_address().unwrap();
            assert_eq!(*mapped.socket_address(), from);
        }
    }

    #[test]
    fn mapped_ipv4_is_told_as_ipv4() {
        let response = answer(&request(28), "[::ffff:192.0.2.7]:4000".parse().unwrap()).unwrap();
        assert_eq!(response, answer(&request(28), "192.0.2.7:4000".parse().unwrap()).unwrap());
    }

    #[test]
    fn request_of_a_peer_learns_its_address() {
        let (now, here) = (Instant::now(), "192.0.2.1:8080".parse().unwrap());
        for from in ["192.0.2.7:4000", "[2001:db8::7]:4000"] {
            let mut reflexive = Reflexive::new([7; 32], now);
            reflexive.set_responders(&[here], now);
            let request = reflexive.poll_transmit().unwrap().bytes;
            let response = answer(&request, from.parse().unwrap()).unwrap();
            reflexive.handle_packet(here, &response, now);
            assert_eq!(reflexive.poll_event(), Some(ReflexiveEvent::Found(from.parse().unwrap())));
        }
    }

    #[test]
    fn bare_request_gets_no_answer() {
        let from = "192.0.2.7:4000".parse().unwrap();
        assert_eq!(request(0).len(), 20);
        assert_eq!(answer(&request(0), from), Err(DropReason::StunTooShort));
        assert_eq!(answer(&request(1), from), Err(DropReason::StunTooShort));
    }

    #[test]
    fn what_is_no_request_gets_no_answer() {
        let from = "192.0.2.7:4000".parse().unwrap();
        let response = answer(&request(28), from).unwrap();
        assert_eq!(answer(&response, from), Err(DropReason::StunUnreadable), "two responders must not play ping-pong");
        let mut trailing = request(28);
        trailing.extend([0; 100]);
        assert_eq!(answer(&trailing, from), Err(DropReason::StunUnreadable));
    }

    proptest! {
        #[test]
        fn answer_is_never_longer_than_what_came(bytes in prop::collection::vec(any::<u8>(), 0..200), flip in 0..60_usize, ipv6: bool) {
            let from = if ipv6 { "[2001:db8::1]:9" } else { "192.0.2.1:9" }.parse().unwrap();
            let mut perturbed = request(flip);
            let at = flip % perturbed.len();
            perturbed[at] ^= bytes.first().copied().unwrap_or(0);
            for packet in [bytes, perturbed, request(flip)] {
                if let Ok(response) = answer(&packet, from) {
                    prop_assert!(response.len() <= packet.len());
                }
            }
        }
    }
}
