//! The STUN codec against published vectors, against another implementation, and against broken input.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::net::SocketAddr;

use data_encoding::HEXLOWER_PERMISSIVE as HEX;
use peerfleet_proto::stun::{
    ChangeRequest, Class, Draft, IntegrityKey, MAX_BYTES, Message, StunFault, TransactionId, is_stun,
};
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use stun_rs::{
    DecoderContextBuilder, HMACKey, MessageClass, MessageDecoderBuilder, MessageEncoderBuilder, StunMessageBuilder,
    attributes::discovery::{self, ChangeRequestFlags},
    attributes::stun::{Fingerprint, MessageIntegritySha256, Software, UserName, XorMappedAddress},
    methods::BINDING,
};

/// RFC 5769 §2.1.
const SAMPLE_REQUEST: &str = "000100582112a442b7e7a701bc34d686fa87dfae802200105354554e207465737420636c69656e74\
    002400046e0001ff80290008932ff9b151263b36000600096576746a3a68367659202020000800149aeaa70cbfd8cb56781ef2b5b2d3f249\
    c1b571a280280004e57a3bcf";

/// RFC 5769 §2.2.
const SAMPLE_IPV4_RESPONSE: &str = "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220\
    002000080001a147e112a643000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96";

/// RFC 5769 §2.3.
const SAMPLE_IPV6_RESPONSE: &str = "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220\
    002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d900080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c";

/// RFC 8489 appendix B.1, as erratum 6268 corrects it.
const SAMPLE_SHA256_REQUEST: &str = "000100902112a44278ad3433c6ad72c029da412e001e00204a3cf38fef6992bda952c678\
    0417da0f24819415569e60b205c46e41407f1704001500296f624d61744a6f733241414143662f2f3439396b39353464364f4c33\
    346f4c394653547679363473410000000014000b6578616d706c652e6f726700001d000400020000001c0020b5c7bf005b6c52a2\
    1c51c5e892f81924136296cb927c43149309278cc6518e65";

const TRANSACTION: TransactionId = TransactionId([7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9]);
const PASSWORD: &str = "VOkJxbRl1RmTxUk/WvJxBt";

fn unhex(text: &str) -> Vec<u8> {
    HEX.decode(text.as_bytes()).unwrap()
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn sample_request() -> Vec<u8> {
    let key = IntegrityKey::new(PASSWORD.as_bytes());
    Draft::new(Class::Request, TRANSACTION).username(b"evtj:h6vY").check_number(9).sign(&key).finish()
}

fn sample_answer(mapped: SocketAddr) -> Vec<u8> {
    let key = IntegrityKey::new(PASSWORD.as_bytes());
    Draft::new(Class::Success, TRANSACTION).mapped_address(mapped).sign(&key).finish()
}

// Published vectors.

#[test]
fn reads_the_sample_request_of_rfc_5769() {
    let bytes = unhex(SAMPLE_REQUEST);
    let message = Message::parse(&bytes).unwrap();
    assert!(message.is_binding() && message.has_fingerprint());
    assert_eq!(message.class(), Class::Request);
    assert_eq!(message.username(), Some(&b"evtj:h6vY"[..]));
    assert_eq!(message.transaction().0.to_vec(), unhex("b7e7a701bc34d686fa87dfae"));
    assert_eq!(message.unknown_required(), Some(0x0024), "PRIORITY must be understood, and is not");
    assert!(!message.is_signed_by(&IntegrityKey::new(PASSWORD.as_bytes())), "SHA-1 integrity proves nothing here");
}

#[test]
fn reads_the_mapped_addresses_of_rfc_5769() {
    for (sample, mapped) in [
        (SAMPLE_IPV4_RESPONSE, "192.0.2.1:32853"),
        (SAMPLE_IPV6_RESPONSE, "[2001:db8:1234:5678:11:2233:4455:6677]:32853"),
    ] {
        let bytes = unhex(sample);
        let message = Message::parse(&bytes).unwrap();
        assert_eq!(message.class(), Class::Success);
        assert_eq!(message.mapped_address(), Some(addr(mapped)));
        assert_eq!(message.unknown_required(), None);
    }
}

#[test]
fn verifies_the_sha256_integrity_of_rfc_8489() {
    let bytes = unhex(SAMPLE_SHA256_REQUEST);
    let key = Sha256::digest("マトリックス:example.org:TheMatrIX");
    let message = Message::parse(&bytes).unwrap();
    assert!(message.is_signed_by(&IntegrityKey::new(&key)));
    assert!(!message.is_signed_by(&IntegrityKey::new(PASSWORD.as_bytes())));
    assert!(!message.has_fingerprint());
}

// Against another implementation.

#[test]
fn another_implementation_reads_what_we_write() {
    let key = HMACKey::new_short_term(PASSWORD).unwrap();
    let context = DecoderContextBuilder::default().with_key(key).with_validation().build();
    let decoder = MessageDecoderBuilder::default().with_context(context).build();

    let bytes = sample_request();
    let (request, size) = decoder.decode(&bytes).unwrap();
    assert_eq!(size, bytes.len());
    assert_eq!((request.method(), request.class()), (BINDING, MessageClass::Request));
    assert_eq!(request.transaction_id().as_bytes(), &TRANSACTION.0);
    assert_eq!(request.get::<UserName>().unwrap().as_user_name().unwrap(), "evtj:h6vY");
    assert!(request.get::<MessageIntegritySha256>().is_some() && request.get::<Fingerprint>().is_some());

    for mapped in ["192.0.2.1:32853", "[2001:db8::77]:1"] {
        let bytes = sample_answer(addr(mapped));
        let (answer, _) = decoder.decode(&bytes).unwrap();
        assert_eq!(answer.class(), MessageClass::SuccessResponse);
        let seen = answer.get::<XorMappedAddress>().unwrap().as_xor_mapped_address().unwrap();
        assert_eq!(seen.socket_address(), &addr(mapped));
    }
}

#[test]
fn another_implementation_refuses_our_message_under_another_key() {
    let key = HMACKey::new_short_term("another").unwrap();
    let context = DecoderContextBuilder::default().with_key(key).with_validation().build();
    let decoder = MessageDecoderBuilder::default().with_context(context).build();
    assert!(decoder.decode(&sample_request()).is_err());
}

#[test]
fn reads_what_another_implementation_writes() {
    for mapped in ["192.0.2.1:32853", "[2001:db8::77]:1"] {
        let key = HMACKey::new_short_term(PASSWORD).unwrap();
        let theirs = StunMessageBuilder::new(BINDING, MessageClass::SuccessResponse)
            .with_transaction_id(TRANSACTION.0.into())
            .with_attribute(Software::new("another one").unwrap())
            .with_attribute(XorMappedAddress::from(addr(mapped)))
            .with_attribute(MessageIntegritySha256::new(key))
            .with_attribute(Fingerprint::default())
            .build();
        let mut buffer = [0; MAX_BYTES];
        let size = MessageEncoderBuilder::default().build().encode(&mut buffer, &theirs).unwrap();

        let message = Message::parse(&buffer[..size]).unwrap();
        assert_eq!((message.class(), message.transaction()), (Class::Success, TRANSACTION));
        assert_eq!(message.mapped_address(), Some(addr(mapped)));
        assert!(message.has_fingerprint());
        assert!(message.is_signed_by(&IntegrityKey::new(PASSWORD.as_bytes())));
        assert!(!message.is_signed_by(&IntegrityKey::new(b"another")));
    }
}

#[test]
fn both_read_alike_whence_an_answer_is_wanted() {
    let decoder = MessageDecoderBuilder::default().build();
    let ours = Draft::new(Class::Request, TRANSACTION).change_port().padding().finish();
    let (theirs, size) = decoder.decode(&ours).unwrap();
    let flags = theirs.get::<discovery::ChangeRequest>().unwrap().as_change_request().unwrap().flags();
    assert_eq!((flags, size), (ChangeRequestFlags::ChangePort.into(), ours.len()));

    let (ip, port) = (ChangeRequestFlags::ChangeIp, ChangeRequestFlags::ChangePort);
    for (flags, wanted) in [
        (None, ChangeRequest { ip: false, port: false }),
        (Some(port.into()), ChangeRequest { ip: false, port: true }),
        (Some(ip.into()), ChangeRequest { ip: true, port: false }),
        (Some(ip | port), ChangeRequest { ip: true, port: true }),
    ] {
        let theirs = StunMessageBuilder::new(BINDING, MessageClass::Request)
            .with_transaction_id(TRANSACTION.0.into())
            .with_attribute(discovery::ChangeRequest::new(flags))
            .build();
        let mut buffer = [0; MAX_BYTES];
        let size = MessageEncoderBuilder::default().build().encode(&mut buffer, &theirs).unwrap();
        let message = Message::parse(&buffer[..size]).unwrap();
        assert_eq!(message.change_request(), Some(wanted));
        assert_eq!(message.unknown_required(), Some(0x0003), "who has no other port refuses it");
    }
}

// Broken input.

#[test]
fn a_change_request_of_another_size_is_refused() {
    let mut bytes = Draft::new(Class::Request, TRANSACTION).change_port().finish_bare();
    bytes[23] = 3;
    assert_eq!(Message::parse(&bytes).unwrap_err(), StunFault::Attribute(0x0003));
}

#[test]
fn what_we_write_reads_back() {
    let bytes = sample_request();
    let message = Message::parse(&bytes).unwrap();
    assert_eq!(message.username(), Some(&b"evtj:h6vY"[..]));
    assert_eq!(message.check_number(), Some(9));
    assert_eq!(message.unknown_required(), None);
    assert!(is_stun(bytes[0]) && !is_stun(0x40) && !is_stun(4));
}

#[test]
fn every_truncation_is_refused() {
    for bytes in [sample_request(), sample_answer(addr("[2001:db8::77]:1"))] {
        for length in 0..bytes.len() {
            assert!(Message::parse(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
        }
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let key = IntegrityKey::new(PASSWORD.as_bytes());
    let bytes = sample_request();
    for at in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[at / 8] ^= 1 << (at % 8);
        assert!(!Message::parse(&flipped).is_ok_and(|message| message.has_fingerprint()), "bit {at}");
    }
    let bare = Draft::new(Class::Request, TRANSACTION).username(b"evtj:h6vY").sign(&key).finish_bare();
    for at in 0..bare.len() * 8 {
        let mut flipped = bare.clone();
        flipped[at / 8] ^= 1 << (at % 8);
        assert!(!Message::parse(&flipped).is_ok_and(|message| message.is_signed_by(&key)), "bit {at}");
    }
}

#[test]
fn an_attribute_that_ends_beyond_the_message_is_refused() {
    let mut bytes = Draft::new(Class::Request, TRANSACTION).username(b"abcd").finish_bare();
    bytes[23] = 5;
    assert_eq!(Message::parse(&bytes).unwrap_err(), StunFault::Attribute(0x0006));
    bytes[22] = 0xFF;
    bytes[23] = 0xFF;
    assert_eq!(Message::parse(&bytes).unwrap_err(), StunFault::Attribute(0x0006));
}

#[test]
fn a_message_longer_than_the_limit_is_refused() {
    let mut bytes = Draft::new(Class::Request, TRANSACTION).username(&[b'a'; 508]).finish();
    assert!(Message::parse(&bytes).is_ok());
    bytes.extend_from_slice(&[0; 16]);
    assert_eq!(Message::parse(&bytes).unwrap_err(), StunFault::Size(bytes.len()));
}

#[test]
fn what_stands_behind_the_integrity_counts_for_nothing() {
    let key = IntegrityKey::new(PASSWORD.as_bytes());
    let bytes =
        Draft::new(Class::Success, TRANSACTION).sign(&key).mapped_address(addr("192.0.2.1:9")).username(b"x").finish();
    let message = Message::parse(&bytes).unwrap();
    assert!(message.is_signed_by(&key));
    assert_eq!((message.mapped_address(), message.username()), (None, None));
}

#[test]
fn nothing_may_follow_the_fingerprint() {
    let mut bytes = sample_request();
    bytes.extend_from_slice(&[0x80, 0x22, 0, 0]);
    let length = u16::try_from(bytes.len() - 20).unwrap().to_be_bytes();
    bytes[2..4].copy_from_slice(&length);
    assert_eq!(Message::parse(&bytes).unwrap_err(), StunFault::Attribute(0x8022));
}

#[test]
fn a_truncated_integrity_is_refused() {
    let mut bytes = Draft::new(Class::Request, TRANSACTION).finish_bare();
    bytes.extend_from_slice(&[0, 0x1C, 0, 16]);
    bytes.extend_from_slice(&[0; 16]);
    bytes[3] = 20;
    assert_eq!(Message::parse(&bytes).unwrap_err(), StunFault::Attribute(0x001C));
}

#[test]
fn the_first_of_two_equal_attributes_counts() {
    let bytes = Draft::new(Class::Success, TRANSACTION)
        .mapped_address(addr("192.0.2.1:9"))
        .mapped_address(addr("192.0.2.2:9"))
        .finish();
    assert_eq!(Message::parse(&bytes).unwrap().mapped_address(), Some(addr("192.0.2.1:9")));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
        let _ = Message::parse(&bytes);
    }

    #[test]
    fn random_attributes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 20..600)) {
        bytes.truncate(bytes.len() / 4 * 4);
        bytes[0] &= 0x3F;
        let length = u16::try_from(bytes.len() - 20).unwrap().to_be_bytes();
        bytes[2..4].copy_from_slice(&length);
        bytes[4..8].copy_from_slice(&[0x21, 0x12, 0xA4, 0x42]);
        if let Ok(message) = Message::parse(&bytes) {
            prop_assert!(!message.is_signed_by(&IntegrityKey::new(b"nobody's")));
        }
    }

    #[test]
    fn perturbed_messages_never_panic(at in 0..96_usize, byte: u8, cut in 0..96_usize) {
        let mut bytes = sample_request();
        let length = bytes.len();
        bytes[at % length] = byte;
        bytes.truncate(length - cut.min(length));
        let _ = Message::parse(&bytes);
    }

    #[test]
    fn any_mapped_address_reads_back(ip: std::net::IpAddr, port: u16, transaction: [u8; 12]) {
        let mapped = SocketAddr::new(ip, port);
        let bytes = Draft::new(Class::Success, TransactionId(transaction)).mapped_address(mapped).finish();
        prop_assert_eq!(Message::parse(&bytes).unwrap().mapped_address(), Some(mapped));
    }
}
