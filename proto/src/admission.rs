//! Joining a room: both sides, as states that are consumed.
//!
//! The relay sends a [`Challenge`] with a key and a nonce made for this connection. The joiner answers with two tags
//! over the transcript: one needs the room's admission key, the other the identity's key. Nothing secret leaves the
//! joiner, a captured [`Join`] fits no other challenge, and who cannot make the second tag cannot join as that
//! identity.
//!
//! [`Admission`] → [`Admitted`] or [`Misbehaved`]; a second try needs a new connection.
//! Never looks at tokens or names: the relay knows the room by the hash of its admission public key.

use blake3::Hasher;
use rand_core::CryptoRng;
use subtle::ConstantTimeEq;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use crate::{
    fault::Misbehaved,
    id::{InstanceId, PeerId, RoomId},
    limits::MAX_PRESENCE_BYTES,
    token::{RoomKeys, room_id},
    wire::{
        RELAY_PROTOCOL,
        relay::{Challenge, Join},
    },
};

const ROOM_PROOF_LABEL: &str = "peerfleet 2026 admission room proof v1";
const IDENTITY_PROOF_LABEL: &str = "peerfleet 2026 admission identity proof v1";
const TRANSCRIPT_LABEL: &[u8] = b"peerfleet admission transcript v1";

/// The relay's side between challenge and join.
pub struct Admission {
    secret: StaticSecret,
    challenge: Challenge,
}

/// A joiner whose proofs held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// The room whose admission key the joiner holds.
    pub room: RoomId,
    /// The identity whose key the joiner holds.
    pub peer: PeerId,
    /// The instance that the joiner says it is.
    pub instance: InstanceId,
}

impl Admission {
    /// Begins with a challenge for one connection.
    pub fn new(rng: &mut impl CryptoRng) -> (Self, Challenge) {
        let secret = StaticSecret::random_from_rng(rng);
        let mut nonce = [0; 32];
        rng.fill_bytes(&mut nonce);
        let challenge = Challenge { ephemeral: PublicKey::from(&secret).to_bytes(), nonce };
        (Self { secret, challenge }, challenge)
    }

    /// Verifies the answer.
    ///
    /// # Errors
    /// [`Misbehaved::WeakKey`] for a public key of low order or not in canonical form, [`Misbehaved::Forged`] if a
    /// proof does not hold, [`Misbehaved::OverLimit`] for a presence longer than [`MAX_PRESENCE_BYTES`].
    pub fn verify(self, join: &Join) -> Result<Admitted, Misbehaved> {
        if join.presence.len() > MAX_PRESENCE_BYTES {
            return Err(Misbehaved::OverLimit);
        }
        // Else one key pair could be many identities, and one admission key many rooms.
        if !is_canonical(&join.admission) || !is_canonical(join.peer.as_bytes()) {
            return Err(Misbehaved::WeakKey);
        }
        let transcript = transcript(&self.challenge, &join.admission, &join.peer, &join.instance, &join.presence);
        let room_proof = proof(ROOM_PROOF_LABEL, &self.secret, &join.admission, &transcript)?;
        let identity_proof = proof(IDENTITY_PROOF_LABEL, &self.secret, join.peer.as_bytes(), &transcript)?;
        // Both are compared whatever the first one says, so that time tells nothing of either.
        let holds = room_proof.ct_eq(&join.room_proof) & identity_proof.ct_eq(&join.identity_proof);
        if !bool::from(holds) {
            return Err(Misbehaved::Forged);
        }
        Ok(Admitted { room: room_id(&join.admission), peer: join.peer, instance: join.instance })
    }
}

/// The joiner's side: answers a challenge.
///
/// # Errors
/// [`Misbehaved::WeakKey`] if the relay's key is of low order: then the proofs would show that no secret was needed.
pub fn join(
    challenge: &Challenge,
    keys: &RoomKeys,
    identity: &StaticSecret,
    instance: InstanceId,
    presence: Vec<u8>,
) -> Result<Join, Misbehaved> {
    let peer = PeerId::from_bytes(PublicKey::from(identity).to_bytes());
    let admission = *keys.admission_public();
    let transcript = transcript(challenge, &admission, &peer, &instance, &presence);
    Ok(Join {
        admission,
        peer,
        instance,
        room_proof: proof(ROOM_PROOF_LABEL, keys.admission(), &challenge.ephemeral, &transcript)?,
        identity_proof: proof(IDENTITY_PROOF_LABEL, identity, &challenge.ephemeral, &transcript)?,
        presence,
    })
}

/// Everything both sides said, each part of fixed length.
fn transcript(
    challenge: &Challenge,
    admission: &[u8; 32],
    peer: &PeerId,
    instance: &InstanceId,
    presence: &[u8],
) -> [u8; 32] {
    let mut hasher = Hasher::new();
    hasher.update(TRANSCRIPT_LABEL);
    hasher.update(RELAY_PROTOCOL.as_bytes());
    hasher.update(&challenge.ephemeral);
    hasher.update(&challenge.nonce);
    hasher.update(admission);
    hasher.update(peer.as_bytes());
    hasher.update(instance.as_bytes());
    hasher.update(blake3::hash(presence).as_bytes());
    *hasher.finalize().as_bytes()
}

/// Whether these bytes are the one form of a public key that X25519 itself writes: below 2²⁵⁵ − 19. Others are read
/// modulo that, as the same key (RFC 7748 §5).
fn is_canonical(key: &[u8; 32]) -> bool {
    let [lowest, middle @ .., highest] = key;
    let at_least_the_prime = *lowest >= 0xED && middle.iter().all(|byte| *byte == 0xFF) && *highest == 0x7F;
    *highest <= 0x7F && !at_least_the_prime
}

fn proof(label: &str, mine: &StaticSecret, theirs: &[u8; 32], transcript: &[u8; 32]) -> Result<[u8; 32], Misbehaved> {
    let shared = mine.diffie_hellman(&PublicKey::from(*theirs));
    if !shared.was_contributory() {
        return Err(Misbehaved::WeakKey);
    }
    let key = Zeroizing::new(blake3::derive_key(label, shared.as_bytes()));
    Ok(*blake3::keyed_hash(&key, transcript).as_bytes())
}
