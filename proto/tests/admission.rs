//! Joining a room, as the joiner, the relay and their attackers see it.

use peerfleet_proto::{
    admission::{Admission, join},
    fault::Misbehaved,
    id::{InstanceId, PeerId},
    limits::MAX_PRESENCE_BYTES,
    token::{RoomKeys, Token},
    wire::relay::{Challenge, Join},
};
use x25519_dalek::{PublicKey, StaticSecret};

mod common;
use common::Hashes;

const INSTANCE: InstanceId = InstanceId::from_bytes([4; 16]);

#[test]
fn who_holds_token_and_identity_is_admitted_as_that_identity() {
    let (admission, challenge) = Admission::new(&mut Hashes(1));
    let admitted = admission.verify(&answer(&challenge, "dev")).expect("both proofs hold");
    assert_eq!(admitted.peer, identity().1);
    assert_eq!(admitted.room, keys("dev").room());
    assert_eq!(admitted.instance, INSTANCE);
}

#[test]
fn a_captured_join_fits_no_other_challenge() {
    let (_, captured_for) = Admission::new(&mut Hashes(1));
    let captured = answer(&captured_for, "dev");
    let (admission, _) = Admission::new(&mut Hashes(2));
    assert_eq!(admission.verify(&captured), Err(Misbehaved::Forged));
}

#[test]
fn a_stranger_without_the_token_is_not_admitted() {
    let (admission, challenge) = Admission::new(&mut Hashes(1));
    let mut forged = answer(&challenge, "another room");
    forged.admission = *keys("dev").admission_public();
    assert_eq!(admission.verify(&forged), Err(Misbehaved::Forged));
}

#[test]
fn a_member_of_another_room_is_admitted_to_that_room_only() {
    let (admission, challenge) = Admission::new(&mut Hashes(1));
    let admitted = admission.verify(&answer(&challenge, "another room")).expect("both proofs hold");
    assert_eq!(admitted.room, keys("another room").room());
    assert_ne!(admitted.room, keys("dev").room());
}

#[test]
fn a_captured_room_proof_does_not_let_another_identity_in() {
    let (admission, challenge) = Admission::new(&mut Hashes(1));
    let captured = answer(&challenge, "dev");
    let stranger = StaticSecret::from([9; 32]);
    let mut spliced = join(&challenge, &keys("another room"), &stranger, INSTANCE, b"sealed".to_vec()).unwrap();
    spliced.admission = captured.admission;
    spliced.room_proof = captured.room_proof;
    assert_eq!(admission.verify(&spliced), Err(Misbehaved::Forged));
}

#[test]
fn every_flipped_bit_of_a_proof_or_key_voids_the_join() {
    let (_, challenge) = Admission::new(&mut Hashes(1));
    let sound = answer(&challenge, "dev");
    for bit in 0..256 {
        let flip = |bytes: &mut [u8; 32]| bytes[bit / 8] ^= 1 << (bit % 8);
        let mut changed = [sound.clone(), sound.clone(), sound.clone(), sound.clone()];
        flip(&mut changed[0].room_proof);
        flip(&mut changed[1].identity_proof);
        flip(&mut changed[2].admission);
        let mut peer = *sound.peer.as_bytes();
        flip(&mut peer);
        changed[3].peer = PeerId::from_bytes(peer);
        for join in changed {
            let (admission, _) = Admission::new(&mut Hashes(1));
            assert!(admission.verify(&join).is_err(), "bit {bit}");
        }
    }
}

#[test]
fn a_member_cannot_join_as_another_identity() {
    let (admission, challenge) = Admission::new(&mut Hashes(1));
    let mut forged = answer(&challenge, "dev");
    forged.peer = PeerId::from_bytes(PublicKey::from(&StaticSecret::from([9; 32])).to_bytes());
    assert_eq!(admission.verify(&forged), Err(Misbehaved::Forged));
}

#[test]
fn a_changed_presence_or_instance_voids_the_proofs() {
    let changes: [fn(&mut Join); 3] = [
        |join| join.presence.push(0),
        |join| join.instance = InstanceId::from_bytes([5; 16]),
        |join| std::mem::swap(&mut join.room_proof, &mut join.identity_proof),
    ];
    for change in changes {
        let (admission, challenge) = Admission::new(&mut Hashes(1));
        let mut changed = answer(&challenge, "dev");
        change(&mut changed);
        assert_eq!(admission.verify(&changed), Err(Misbehaved::Forged));
    }
}

#[test]
fn a_key_of_low_order_is_refused_by_either_side() {
    let (_, challenge) = Admission::new(&mut Hashes(1));
    let sound = answer(&challenge, "dev");
    let keys = keys("dev");
    for point in low_order_points() {
        let as_room = Join { admission: point, ..sound.clone() };
        let as_identity = Join { peer: PeerId::from_bytes(point), ..sound.clone() };
        for weak in [as_room, as_identity] {
            let (admission, _) = Admission::new(&mut Hashes(1));
            assert_eq!(admission.verify(&weak), Err(Misbehaved::WeakKey));
        }
        let weak = Challenge { ephemeral: point, nonce: [0; 32] };
        let refused = join(&weak, &keys, &identity().0, INSTANCE, vec![]);
        assert_eq!(refused, Err(Misbehaved::WeakKey));
    }
}

#[test]
fn one_key_pair_is_one_identity_and_one_room() {
    let (_, challenge) = Admission::new(&mut Hashes(1));
    let sound = answer(&challenge, "dev");
    let with_high_bit = |mut key: [u8; 32]| {
        key[31] |= 0x80;
        key
    };
    let as_room = Join { admission: with_high_bit(sound.admission), ..sound.clone() };
    let as_identity = Join { peer: PeerId::from_bytes(with_high_bit(*sound.peer.as_bytes())), ..sound.clone() };
    for disguised in [as_room, as_identity] {
        let (admission, _) = Admission::new(&mut Hashes(1));
        assert_eq!(admission.verify(&disguised), Err(Misbehaved::WeakKey));
    }
}

#[test]
fn an_oversized_presence_is_not_admitted() {
    let (_, challenge) = Admission::new(&mut Hashes(1));
    for (len, expected) in [(MAX_PRESENCE_BYTES, None), (MAX_PRESENCE_BYTES + 1, Some(Misbehaved::OverLimit))] {
        let (admission, _) = Admission::new(&mut Hashes(1));
        let join = join(&challenge, &keys("dev"), &identity().0, INSTANCE, vec![0; len]).unwrap();
        assert_eq!(admission.verify(&join).err(), expected);
    }
}

#[test]
fn neither_token_nor_room_name_is_in_what_the_joiner_sends() {
    let (_, challenge) = Admission::new(&mut Hashes(1));
    let sent = peerfleet_proto::wire::encode(&answer(&challenge, "dev-room-name"));
    for secret in [&b"dev-room-name"[..], TOKEN.as_bytes(), keys("dev-room-name").psk()] {
        assert!(!sent.windows(secret.len()).any(|bytes| bytes == secret));
    }
}

/// The points of order 1, 2, 4 and 8 of the curve and its twist, and those that are read as one of them.
fn low_order_points() -> Vec<[u8; 32]> {
    let small = |lowest: u8| {
        let mut point = [0; 32];
        point[0] = lowest;
        point
    };
    let near_the_prime = |lowest: u8| {
        let mut point = [0xFF; 32];
        (point[0], point[31]) = (lowest, 0x7F);
        point
    };
    let of_order_8 = [
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    ]
    .map(|hex| data_encoding::HEXLOWER.decode(hex.as_bytes()).expect("hex"))
    .map(|bytes| bytes.try_into().expect("32 bytes"));
    let near = [0xEC, 0xED, 0xEE].map(near_the_prime);
    [small(0), small(1)].into_iter().chain(of_order_8).chain(near).collect()
}

const TOKEN: &str = "correct horse battery staple";

fn keys(room: &str) -> RoomKeys {
    RoomKeys::derive(&Token::parse(TOKEN).expect("not empty"), room)
}

fn identity() -> (StaticSecret, PeerId) {
    let secret = StaticSecret::from([7; 32]);
    let public = PublicKey::from(&secret).to_bytes();
    (secret, PeerId::from_bytes(public))
}

fn answer(challenge: &Challenge, room: &str) -> Join {
    join(challenge, &keys(room), &identity().0, INSTANCE, b"sealed".to_vec()).expect("the relay's key is sound")
}
