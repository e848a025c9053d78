//! Joining a room, as the joiner, the relay and their attackers see it.

use peerfleet_proto::{
    admission::{Admission, join},
    fault::Misbehaved,
    id::{InstanceId, PeerId},
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
    let (admission, challenge) = Admission::new(&mut Hashes(1));
    let mut weak = answer(&challenge, "dev");
    weak.admission = [0; 32];
    assert_eq!(admission.verify(&weak), Err(Misbehaved::WeakKey));

    let weak = Challenge { ephemeral: [0; 32], nonce: [0; 32] };
    let refused = join(&weak, &keys("dev"), &identity().0, INSTANCE, vec![]);
    assert_eq!(refused, Err(Misbehaved::WeakKey));
}

#[test]
fn neither_token_nor_room_name_is_in_what_the_joiner_sends() {
    let (_, challenge) = Admission::new(&mut Hashes(1));
    let sent = peerfleet_proto::wire::encode(&answer(&challenge, "dev-room-name"));
    for secret in [&b"dev-room-name"[..], TOKEN.as_bytes(), keys("dev-room-name").psk()] {
        assert!(!sent.windows(secret.len()).any(|bytes| bytes == secret));
    }
}

const TOKEN: &str = "correct horse battery staple";

fn keys(room: &str) -> RoomKeys {
    RoomKeys::derive(&Token::parse(TOKEN).expect("a token"), room)
}

fn identity() -> (StaticSecret, PeerId) {
    let secret = StaticSecret::from([7; 32]);
    let public = PublicKey::from(&secret).to_bytes();
    (secret, PeerId::from_bytes(public))
}

fn answer(challenge: &Challenge, room: &str) -> Join {
    join(challenge, &keys(room), &identity().0, INSTANCE, b"sealed".to_vec()).expect("the relay's key is sound")
}
