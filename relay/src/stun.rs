//! The STUN responder: tells a peer under which address its UDP packets arrive (RFC 8489), and whether what comes from another
//! port than it sent to gets in (RFC 5780 §4.4).
//!
//! In: UDP packets and where they came from. Out: binding responses, and a reason for each packet that gets none. An answer goes
//! to where the request came from and nowhere else; who asks for another port by CHANGE-REQUEST is answered from the second port.
//! Another address is refused, as is another port where there is none.
//! Never answers with more bytes than came, nor more often, so a forged source address gains nothing: requests must be padded.
//! Holds no state but each address' pace; asks for no credentials, and a peer must not believe the answer further than
//! as a candidate to be checked.
//! Bounds: [`MOST_PER_SECOND`] answers for each address and port asked.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use stun_rs::{
    ErrorCode as Code, MessageClass, MessageDecoderBuilder, MessageEncoderBuilder, StunAttributeType, StunMessage,
    StunMessageBuilder,
    attributes::{
        discovery::{ChangeRequest, ChangeRequestFlags},
        stun::{ErrorCode, Fingerprint, UnknownAttributes, XorMappedAddress},
    },
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

/// "Unknown Attribute" (RFC 8489 §14.8).
const UNKNOWN_ATTRIBUTE: u16 = 420;

/// A socket that requests come to, and the one of the other port of the same address, if there is one.
#[derive(Debug)]
pub(crate) struct Responder {
    pub(crate) socket: Arc<UdpSocket>,
    pub(crate) other: Option<Arc<UdpSocket>>,
}

/// An answer, and whether it is to leave from the other port.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    bytes: Vec<u8>,
    from_other: bool,
}

/// Answers on this socket until dropped.
pub(crate) async fn respond(responder: Responder, metrics: Arc<Metrics>) {
    let Responder { socket, other } = responder;
    let mut pace = Pace::new(MOST_PER_SECOND, Instant::now());
    let mut buffer = [0; MAX_REQUEST_BYTES];
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else {
            // It belongs to an earlier answer, not to the socket; should it stay, it must not take a core.
            tokio::time::sleep(ERROR_PAUSE).await;
            continue;
        };
        let answered = if pace.allows(Origin::of(from), Instant::now()) {
            answer(&buffer[..len], from, other.is_some())
        } else {
            Err(DropReason::StunTooMany)
        };
        match answered {
            Ok(Answer { bytes, from_other }) => {
                let sender = other.as_ref().filter(|_| from_other).unwrap_or(&socket);
                // UDP may lose it as well; the peer asks again.
                if sender.try_send_to(&bytes, from).is_ok() {
                    metrics.stun_answered();
                }
            }
            Err(reason) => metrics.dropped(reason, 1),
        }
    }
}

fn answer(request: &[u8], from: SocketAddr, has_other: bool) -> Result<Answer, DropReason> {
    let decoder = MessageDecoderBuilder::default().build();
    let (message, len) = decoder.decode(request).map_err(|_| DropReason::StunUnreadable)?;
    if len != request.len() || message.method() != BINDING || message.class() != MessageClass::Request {
        return Err(DropReason::StunUnreadable);
    }
    let wanted = message.get::<ChangeRequest>().and_then(|change| change.as_change_request().ok());
    let flags = wanted.map(ChangeRequest::flags).unwrap_or_default();
    let from_other = flags.contains(ChangeRequestFlags::ChangePort);
    let is_possible = !flags.contains(ChangeRequestFlags::ChangeIp) && (!from_other || has_other);
    let begun = || {
        if is_possible { found(&message, from) } else { refused(&message) }
    };
    // The fingerprint helps to tell STUN from QUIC; where it would make the answer longer than the request, it goes.
    let bytes = [begun().with_attribute(Fingerprint::default()).build(), begun().build()]
        .iter()
        .filter_map(encode)
        .find(|response| response.len() <= request.len())
        .ok_or(DropReason::StunTooShort)?;
    Ok(Answer { bytes, from_other: from_other && is_possible })
}

fn found(request: &StunMessage, from: SocketAddr) -> StunMessageBuilder {
    let mapped = XorMappedAddress::from(SocketAddr::new(from.ip().to_canonical(), from.port()));
    StunMessageBuilder::new(BINDING, MessageClass::SuccessResponse)
        .with_transaction_id(*request.transaction_id())
        .with_attribute(mapped)
}

/// The answer to who wants another port or address where there is none (RFC 8489 §6.3.1).
fn refused(request: &StunMessage) -> StunMessageBuilder {
    let code = Code::new(UNKNOWN_ATTRIBUTE, "").expect("420 is an error code");
    let unknown = UnknownAttributes::from(&[ChangeRequest::get_type().as_u16()][..]);
    StunMessageBuilder::new(BINDING, MessageClass::ErrorResponse)
        .with_transaction_id(*request.transaction_id())
        .with_attribute(ErrorCode::from(code))
        .with_attribute(unknown)
}

fn encode(message: &StunMessage) -> Option<Vec<u8>> {
    let mut buffer = vec![0; MAX_RESPONSE_BYTES];
    let len = MessageEncoderBuilder::default().build().encode(&mut buffer, message).ok()?;
    buffer.truncate(len);
    Some(buffer)
}

#[cfg(test)]
mod tests {
    use peerfleet_proto::{
        path::{FilterTrial, Reflexive, ReflexiveEvent, filtering::Filtering},
        stun::{Class, Message},
    };
    use proptest::prelude::*;
    use stun_rs::{DecoderContextBuilder, TransactionId, attributes::stun::Software};

    use super::*;

    /// What a request asks for, beside its answer.
    const NOTHING: &[ChangeRequestFlags] = &[];
    const PORT: &[ChangeRequestFlags] = &[ChangeRequestFlags::ChangePort];
    const ADDRESS: &[ChangeRequestFlags] = &[ChangeRequestFlags::ChangeIp];
    const BOTH: &[ChangeRequestFlags] = &[ChangeRequestFlags::ChangeIp, ChangeRequestFlags::ChangePort];

    fn request(padding: usize) -> Vec<u8> {
        encoded(begun(), padding)
    }

    fn changing(wanted: &[ChangeRequestFlags], padding: usize) -> Vec<u8> {
        let flags = wanted.iter().copied().collect();
        encoded(begun().with_attribute(ChangeRequest::new(Some(flags))), padding)
    }

    fn begun() -> StunMessageBuilder {
        StunMessageBuilder::new(BINDING, MessageClass::Request).with_transaction_id(TransactionId::from([7; 12]))
    }

    fn encoded(mut builder: StunMessageBuilder, padding: usize) -> Vec<u8> {
        if padding > 0 {
            builder = builder.with_attribute(Software::new("x".repeat(padding)).unwrap());
        }
        let mut buffer = vec![0; 600];
        let len = MessageEncoderBuilder::default().build().encode(&mut buffer, &builder.build()).unwrap();
        buffer.truncate(len);
        buffer
    }

    /// What a responder of one port answers.
    fn answer(request: &[u8], from: SocketAddr) -> Result<Vec<u8>, DropReason> {
        let Answer { bytes, from_other } = super::answer(request, from, false)?;
        assert!(!from_other);
        Ok(bytes)
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
    fn an_answer_leaves_from_the_other_port_if_that_is_wanted_and_there_is_one() {
        let from = "192.0.2.7:4000".parse().unwrap();
        let wanted = |flags, has_other| super::answer(&changing(flags, 28), from, has_other).unwrap();
        let class = |answer: &Answer| Message::parse(&answer.bytes).unwrap().class();
        for (flags, has_other, class_of_answer, from_other) in [
            (NOTHING, true, Class::Success, false),
            (PORT, true, Class::Success, true),
            (PORT, false, Class::Error, false),
            (ADDRESS, true, Class::Error, false),
            (BOTH, true, Class::Error, false),
        ] {
            let answer = wanted(flags, has_other);
            assert_eq!((class(&answer), answer.from_other), (class_of_answer, from_other), "{flags:?} {has_other}");
        }
    }

    #[test]
    fn a_refusal_names_what_was_not_understood() {
        let refusal = answer(&changing(BOTH, 28), "192.0.2.7:4000".parse().unwrap()).unwrap();
        let (message, _) = MessageDecoderBuilder::default().build().decode(&refusal).unwrap();
        let code = message.get::<ErrorCode>().unwrap().as_error_code().unwrap();
        let unknown = message.get::<UnknownAttributes>().unwrap().as_unknown_attributes().unwrap();
        assert_eq!((code.error_code().error_code(), unknown.attributes()), (420, &[3][..]));
    }

    #[test]
    fn a_peer_learns_of_its_filter_and_is_not_deceived_by_a_responder_of_one_port() {
        let (here, other): (SocketAddr, SocketAddr) =
            ("192.0.2.1:8080".parse().unwrap(), "192.0.2.1:8081".parse().unwrap());
        for (has_other, told) in [(true, Filtering::PortIndependent), (false, Filtering::Unknown)] {
            for from in ["192.0.2.7:4000", "[2001:db8::7]:4000"] {
                let now = Instant::now();
                let mut trial = FilterTrial::new(here, other.port(), [7; 32], now);
                while let Some(request) = trial.poll_transmit() {
                    let answer = super::answer(&request.bytes, from.parse().unwrap(), has_other).unwrap();
                    trial.handle_packet(if answer.from_other { other } else { here }, &answer.bytes, now);
                }
                assert_eq!(trial.outcome(), Some(told));
            }
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
        let refusal = answer(&changing(PORT, 28), from).unwrap();
        for answered in [response, refusal] {
            assert_eq!(
                answer(&answered, from),
                Err(DropReason::StunUnreadable),
                "two responders must not play ping-pong"
            );
        }
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
            for packet in [bytes, perturbed, request(flip), changing(PORT, flip), changing(BOTH, flip)] {
                for has_other in [true, false] {
                    if let Ok(response) = super::answer(&packet, from, has_other) {
                        prop_assert!(response.bytes.len() <= packet.len());
                    }
                }
            }
        }
    }
}
