//! Sealed messages: our Noise against another implementation, counters, limits, and layout.

use std::collections::BTreeSet;

use data_encoding::HEXLOWER;
use peerfleet_proto::{
    fault::Misbehaved,
    sealed::{
        HARD_LIMIT, OpenKey, SealKey, Sealed, initiation,
        noise::{Handshake, Identity, Initiator, Responder},
        replay::{ReplayWindow, WINDOW},
        response,
    },
};
use proptest::prelude::*;
use x25519_dalek::{PublicKey, StaticSecret};

const PATTERN: &str = "Noise_IKpsk1_25519_AESGCM_SHA256";
const PROLOGUE: &[u8] = b"a room, two instances and an epoch";
const PSK: [u8; 32] = [0x42; 32];

/// The vector that the authors of Cacophony published for this pattern.
#[test]
fn the_published_vector_comes_out() {
    let psk = hex("54686973206973206d7920417573747269616e20706572737065637469766521").try_into().unwrap();
    let initiator = vector_identity("e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1");
    let responder = vector_identity("4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893");
    let first_ephemeral = vector_secret("893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a");
    let second_ephemeral = vector_secret("bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b");
    let prologue = hex("4a6f686e2047616c74");
    let handshake = |identity| Handshake { prologue: &prologue, psk: &psk, identity };

    let payload = hex("4c756477696720766f6e204d69736573");
    let (waiting, first) =
        Initiator::begin(&handshake(&initiator), first_ephemeral, responder.public(), &payload).unwrap();
    let expected = "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944cf5aec5a69cc937598c005d3f36940abe166f1ea\
                    b777e15d8958d533d2d5eca2967c66cfc0788d6197989cac53ecb8e9cb04a2ff8bdf3a9d2bf1897b492c84639583c5486e0205e4\
                    012ac81400e569cb";
    assert_eq!(HEXLOWER.encode(&first), expected);
    let (reading, read) = Responder::read(&handshake(&responder), &first).unwrap();
    assert_eq!(read, payload);

    let payload = hex("4d757272617920526f746862617264");
    let (second, keys) = reading.answer(&second_ephemeral, &payload).unwrap();
    let expected = "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843746e1ca9059ed09501f41b1c01dd32378315c2d7\
                    54bdc29ced08b435f05259";
    assert_eq!(HEXLOWER.encode(&second), expected);
    assert_eq!(waiting.finish(&second).unwrap().0, payload);

    let (mut forward, mut backward) = (OpenKey::new(&keys.forward), OpenKey::new(&keys.backward));
    for (key, counter, plain, sealed) in [
        (&mut forward, 0, "462e20412e20486179656b", "232fe1ce5018b3cd1e732e72894d61fc242473f6919344e30e569a"),
        (&mut backward, 0, "4361726c204d656e676572", "419f5c6e5b039e67e125bcd7fb1cfbb79720ef97e8a3cb2c5a660a"),
    ] {
        assert_eq!(key.open(counter, b"", &hex(sealed)), Ok(hex(plain)));
    }
    let (plain, sealed) =
        ("4a65616e2d426170746973746520536179", "086a04808638c811bb91733c7c6df2a475df82dba1ed7af5251cf4e6e13ccf4376");
    assert_eq!(forward.open(1, b"", &hex(sealed)), Ok(hex(plain)));
}

#[test]
fn our_initiator_and_another_responder_understand_each_other() {
    let mut other = snow(7).build_responder().unwrap();
    let (initiator, first) =
        Initiator::begin(&ours(&identity(1)), secret(2), &public(7), b"the first request").unwrap();
    let mut buffer = [0; 1024];
    let len = other.read_message(&first, &mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"the first request");
    assert_eq!(other.get_remote_static().unwrap(), public(1));
    let len = other.write_message(b"an answer", &mut buffer).unwrap();
    let (payload, keys) = initiator.finish(&buffer[..len]).unwrap();
    assert_eq!(payload, b"an answer");
    assert_transport_agrees(&keys.forward, &keys.backward, other.into_stateless_transport_mode().unwrap());
}

#[test]
fn another_initiator_and_our_responder_understand_each_other() {
    let theirs = public(7);
    let mut other = snow(1).remote_public_key(&theirs).unwrap().build_initiator().unwrap();
    let mut buffer = [0; 1024];
    let len = other.write_message(b"the first request", &mut buffer).unwrap();
    let (responder, payload) = Responder::read(&ours(&identity(7)), &buffer[..len]).unwrap();
    assert_eq!(payload, b"the first request");
    assert_eq!(responder.remote_identity(), &public(1));
    let (second, keys) = responder.answer(&secret(3), b"an answer").unwrap();
    let len = other.read_message(&second, &mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"an answer");
    assert_transport_agrees(&keys.backward, &keys.forward, other.into_stateless_transport_mode().unwrap());
}

#[test]
fn another_psk_prologue_or_responder_fails_the_handshake() {
    let me = identity(1);
    let (_, first) = Initiator::begin(&ours(&me), secret(2), &public(7), b"request").unwrap();
    let right = identity(7);
    assert!(Responder::read(&ours(&right), &first).is_ok());
    let wrong = [
        Handshake { psk: &[0; 32], ..ours(&right) },
        Handshake { prologue: b"another epoch", ..ours(&right) },
        ours(&me),
    ];
    for handshake in wrong {
        assert_eq!(Responder::read(&handshake, &first).err(), Some(Misbehaved::Forged));
    }
}

#[test]
fn a_forged_answer_does_not_spoil_the_handshake() {
    let (initiator, first) = Initiator::begin(&ours(&identity(1)), secret(2), &public(7), b"request").unwrap();
    let (responder, _) = Responder::read(&ours(&identity(7)), &first).unwrap();
    let (second, _) = responder.answer(&secret(3), b"").unwrap();
    for at in 0..second.len() {
        let mut forged = second.clone();
        forged[at] ^= 1;
        assert!(initiator.finish(&forged).is_err());
        assert!(initiator.finish(&second[..at]).is_err());
    }
    assert!(initiator.finish(&second).is_ok());
}

#[test]
fn a_responder_of_low_order_is_refused() {
    let refused = Initiator::begin(&ours(&identity(1)), secret(2), &[0; 32], b"request");
    assert_eq!(refused.err(), Some(Misbehaved::WeakKey));
}

#[test]
fn a_message_opens_once_and_only_unchanged() {
    let key = [5; 32].into();
    let (mut seal, mut open) = (SealKey::new(&key, 77), OpenKey::new(&key));
    let sealed = seal.seal(b"hello").unwrap();
    let Ok(Sealed::Transport { receiver, counter, header, ciphertext }) = Sealed::split(&sealed) else { panic!() };
    assert_eq!((receiver, counter), (77, 0));
    let mut other_header = header.to_vec();
    other_header[1] ^= 1;
    assert_eq!(open.open(counter, &other_header, ciphertext), Err(Misbehaved::Forged));
    assert_eq!(open.open(counter + 1, header, ciphertext), Err(Misbehaved::Forged));
    assert_eq!(open.open(counter, header, ciphertext).as_deref(), Ok(&b"hello"[..]));
    assert_eq!(open.open(counter, header, ciphertext), Err(Misbehaved::Forged));
}

#[test]
fn nothing_is_sealed_behind_the_hard_limit() {
    let mut seal = SealKey::new(&[5; 32].into(), 1);
    seal.skip_to(HARD_LIMIT - 1);
    assert!(seal.is_worn());
    assert!(seal.seal(b"the last").is_some());
    assert!(seal.seal(b"one too many").is_none());
}

#[test]
fn layouts_split_back_and_every_truncation_is_refused() {
    assert_eq!(Sealed::split(&initiation(7, b"noise")), Ok(Sealed::Initiation { sender: 7, noise: b"noise" }));
    let whole = response(7, 8, b"noise");
    assert_eq!(Sealed::split(&whole), Ok(Sealed::Response { receiver: 7, sender: 8, noise: b"noise" }));
    for bytes in [initiation(7, b""), response(7, 8, b""), SealKey::new(&[5; 32].into(), 1).seal(b"").unwrap()] {
        let header = bytes.len().min(13);
        for at in 0..header {
            assert!(Sealed::split(&bytes[..at]).is_err());
        }
    }
}

proptest! {
    /// The window agrees with a plain set of everything that was taken.
    #[test]
    fn the_window_takes_each_counter_once(steps in prop::collection::vec((0u64..3000, any::<bool>()), 1..400)) {
        let (mut window, mut taken, mut highest) = (ReplayWindow::default(), BTreeSet::new(), 0_u64);
        for (step, forward) in steps {
            let counter = if forward { highest + step } else { highest.saturating_sub(step) };
            let expected = !taken.contains(&counter) && counter + WINDOW > highest;
            prop_assert_eq!(window.may_be_new(counter), expected);
            prop_assert_eq!(window.take(counter), expected);
            if expected {
                taken.insert(counter);
                highest = highest.max(counter);
            }
        }
    }
}

fn secret(number: u8) -> StaticSecret {
    StaticSecret::from([number; 32])
}

fn public(number: u8) -> [u8; 32] {
    PublicKey::from(&secret(number)).to_bytes()
}

fn hex(text: &str) -> Vec<u8> {
    HEXLOWER.decode(text.as_bytes()).expect("hexadecimal digits")
}

fn vector_secret(text: &str) -> StaticSecret {
    let bytes: [u8; 32] = hex(text).try_into().expect("32 bytes");
    StaticSecret::from(bytes)
}

fn vector_identity(text: &str) -> Identity {
    Identity::new(vector_secret(text))
}

fn identity(number: u8) -> Identity {
    Identity::new(secret(number))
}

fn ours(identity: &Identity) -> Handshake<'_> {
    Handshake { prologue: PROLOGUE, psk: &PSK, identity }
}

fn snow(identity: u8) -> snow::Builder<'static> {
    let key: &'static [u8] = Box::leak(Box::new([identity; 32]));
    let builder = snow::Builder::new(PATTERN.parse().expect("a pattern"));
    builder
        .local_private_key(key)
        .and_then(|builder| builder.prologue(PROLOGUE))
        .and_then(|builder| builder.psk(1, &PSK))
        .expect("each is set once")
}

/// Our transport messages under these keys are what the other implementation writes and reads.
fn assert_transport_agrees(to_other: &[u8; 32], from_other: &[u8; 32], other: snow::StatelessTransportState) {
    let mut buffer = [0; 64];
    for counter in [0, 1, 1 << 20] {
        let len = other.write_message(counter, b"from there", &mut buffer).expect("it fits");
        let mut open = OpenKey::new(&(*from_other).into());
        assert_eq!(open.open(counter, b"", &buffer[..len]).as_deref(), Ok(&b"from there"[..]));
        assert!(OpenKey::new(&(*to_other).into()).open(counter, b"", &buffer[..len]).is_err());
    }
}
