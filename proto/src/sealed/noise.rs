//! `Noise_IKpsk1_25519_AESGCM_SHA256` (Noise revision 34): the one pattern that we use, and nothing else of Noise.
//!
//! ```text
//! <- s                       the initiator knows the responder's identity
//! -> e, es, s, ss, psk       and its first message already carries a payload
//! <- e, ee, se               from here on there is forward secrecy
//! ```
//!
//! In: keys, prologue, ephemeral secrets, payloads. Out: messages, payloads and the two transport keys.
//! A message that does not verify changes nothing: reading borrows the state, so a forged answer cannot spoil a handshake.
//! `tests/sealed.rs` runs it against another implementation in both roles.

use aes_gcm::{
    Aes256Gcm, KeyInit,
    aead::{Aead, Payload},
};
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::fault::Misbehaved;

/// Bytes of a public key.
pub const KEY_BYTES: usize = 32;

/// Bytes that sealing adds.
pub const TAG_BYTES: usize = 16;

/// Bytes of the first message around its payload: e, sealed s, and the payload's tag.
pub const MESSAGE_1_OVERHEAD: usize = KEY_BYTES + KEY_BYTES + TAG_BYTES + TAG_BYTES;

/// Bytes of the second message around its payload: e and the payload's tag.
pub const MESSAGE_2_OVERHEAD: usize = KEY_BYTES + TAG_BYTES;

const PROTOCOL_NAME: &[u8] = b"Noise_IKpsk1_25519_AESGCM_SHA256";

/// A key of 256 bits that is wiped when dropped.
pub type Key = Zeroizing<[u8; 32]>;

/// The key pair of this side. The public key is computed once, as it costs a third of what an agreement does.
pub struct Identity {
    secret: StaticSecret,
    public: [u8; 32],
}

impl Identity {
    /// The key pair of this secret.
    pub fn new(secret: StaticSecret) -> Self {
        let public = PublicKey::from(&secret).to_bytes();
        Self { secret, public }
    }

    /// The public key.
    pub fn public(&self) -> &[u8; 32] {
        &self.public
    }
}

/// What both sides bring to a handshake.
pub struct Handshake<'a> {
    /// Context that both sides must agree on; a different one fails the handshake.
    pub prologue: &'a [u8],
    /// The pre-shared key.
    pub psk: &'a [u8; 32],
    /// This side's identity.
    pub identity: &'a Identity,
}

/// The keys of an established session.
pub struct Established {
    /// From the initiator to the responder.
    pub forward: Key,
    /// From the responder to the initiator.
    pub backward: Key,
}

/// The initiator between its message and the answer.
pub struct Initiator {
    symmetric: Symmetric,
    identity: StaticSecret,
    ephemeral: StaticSecret,
}

/// The responder between the first message and its answer.
pub struct Responder {
    symmetric: Symmetric,
    remote_identity: [u8; 32],
    remote_ephemeral: [u8; 32],
}

impl Initiator {
    /// Writes the first message, with its payload.
    ///
    /// # Errors
    /// [`Misbehaved::WeakKey`] if the responder's public key is of low order.
    pub fn begin(
        handshake: &Handshake<'_>,
        ephemeral: StaticSecret,
        responder: &[u8; 32],
        payload: &[u8],
    ) -> Result<(Self, Vec<u8>), Misbehaved> {
        let mut symmetric = Symmetric::new(handshake.prologue, responder);
        let mut message = Vec::with_capacity(MESSAGE_1_OVERHEAD + payload.len());
        symmetric.send_ephemeral(&ephemeral, &mut message);
        symmetric.mix_key(&*shared(&ephemeral, responder)?);
        message.extend(symmetric.encrypt_and_hash(&handshake.identity.public));
        symmetric.mix_key(&*shared(&handshake.identity.secret, responder)?);
        symmetric.mix_key_and_hash(handshake.psk);
        message.extend(symmetric.encrypt_and_hash(payload));
        Ok((Self { symmetric, identity: handshake.identity.secret.clone(), ephemeral }, message))
    }

    /// Reads the answer.
    ///
    /// # Errors
    /// [`Misbehaved`] if it does not verify; the state stays as it was.
    pub fn finish(&self, message: &[u8]) -> Result<(Vec<u8>, Established), Misbehaved> {
        let mut symmetric = self.symmetric.clone();
        let (remote, sealed) = message.split_first_chunk::<KEY_BYTES>().ok_or(Misbehaved::Forged)?;
        symmetric.receive_ephemeral(remote);
        symmetric.mix_key(&*shared(&self.ephemeral, remote)?);
        symmetric.mix_key(&*shared(&self.identity, remote)?);
        let payload = symmetric.decrypt_and_hash(sealed)?;
        Ok((payload, symmetric.split()))
    }
}

impl Responder {
    /// Reads the first message: who the initiator is, as proved, its payload, and the state to answer from.
    ///
    /// # Errors
    /// [`Misbehaved`] if it does not verify.
    pub fn read(handshake: &Handshake<'_>, message: &[u8]) -> Result<(Self, Vec<u8>), Misbehaved> {
        let Identity { secret, public } = handshake.identity;
        let mut symmetric = Symmetric::new(handshake.prologue, public);
        let (remote_ephemeral, rest) = message.split_first_chunk::<KEY_BYTES>().ok_or(Misbehaved::Forged)?;
        let (sealed_identity, sealed_payload) =
            rest.split_at_checked(KEY_BYTES + TAG_BYTES).ok_or(Misbehaved::Forged)?;
        symmetric.receive_ephemeral(remote_ephemeral);
        symmetric.mix_key(&*shared(secret, remote_ephemeral)?);
        let identity = symmetric.decrypt_and_hash(sealed_identity)?;
        let remote_identity = identity.try_into().map_err(|_| Misbehaved::Forged)?;
        symmetric.mix_key(&*shared(secret, &remote_identity)?);
        symmetric.mix_key_and_hash(handshake.psk);
        let payload = symmetric.decrypt_and_hash(sealed_payload)?;
        Ok((Self { symmetric, remote_identity, remote_ephemeral: *remote_ephemeral }, payload))
    }

    /// The initiator's ephemeral key, which is new in every first message.
    pub fn remote_ephemeral(&self) -> &[u8; 32] {
        &self.remote_ephemeral
    }

    /// The initiator's identity, as proved by what was read.
    pub fn remote_identity(&self) -> &[u8; 32] {
        &self.remote_identity
    }

    /// Writes the answer.
    ///
    /// # Errors
    /// [`Misbehaved::WeakKey`] if a public key of the initiator is of low order.
    pub fn answer(mut self, ephemeral: &StaticSecret, payload: &[u8]) -> Result<(Vec<u8>, Established), Misbehaved> {
        let mut message = Vec::with_capacity(MESSAGE_2_OVERHEAD + payload.len());
        self.symmetric.send_ephemeral(ephemeral, &mut message);
        self.symmetric.mix_key(&*shared(ephemeral, &self.remote_ephemeral)?);
        self.symmetric.mix_key(&*shared(ephemeral, &self.remote_identity)?);
        message.extend(self.symmetric.encrypt_and_hash(payload));
        Ok((message, self.symmetric.split()))
    }
}

fn shared(mine: &StaticSecret, theirs: &[u8; 32]) -> Result<Key, Misbehaved> {
    let shared = mine.diffie_hellman(&PublicKey::from(*theirs));
    if shared.was_contributory() { Ok(Zeroizing::new(shared.to_bytes())) } else { Err(Misbehaved::WeakKey) }
}

/// Noise §5.2, with the cipher state of §5.1 inside.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
struct Symmetric {
    chaining_key: [u8; 32],
    hash: [u8; 32],
    key: [u8; 32],
    counter: u64,
}

impl Symmetric {
    fn new(prologue: &[u8], responder: &[u8; 32]) -> Self {
        // The name has exactly the hash's 32 bytes, so it is taken as it is (§5.2).
        let name: [u8; 32] = PROTOCOL_NAME.try_into().expect("the protocol's name has 32 bytes");
        let mut symmetric = Self { chaining_key: name, hash: name, key: [0; 32], counter: 0 };
        symmetric.mix_hash(prologue);
        symmetric.mix_hash(responder);
        symmetric
    }

    fn send_ephemeral(&mut self, ephemeral: &StaticSecret, message: &mut Vec<u8>) {
        let public = PublicKey::from(ephemeral);
        message.extend(public.as_bytes());
        self.receive_ephemeral(public.as_bytes());
    }

    /// In a handshake with a psk an ephemeral key is mixed into the key as well (§9.2).
    fn receive_ephemeral(&mut self, public: &[u8; 32]) {
        self.mix_hash(public);
        self.mix_key(public);
    }

    fn mix_hash(&mut self, data: &[u8]) {
        self.hash = Sha256::new().chain_update(self.hash).chain_update(data).finalize().into();
    }

    fn mix_key(&mut self, input: &[u8]) {
        let [chaining_key, key, _] = &*hkdf(&self.chaining_key, input);
        (self.chaining_key, self.key, self.counter) = (*chaining_key, *key, 0);
    }

    fn mix_key_and_hash(&mut self, input: &[u8]) {
        let [chaining_key, hash, key] = &*hkdf(&self.chaining_key, input);
        self.mix_hash(hash);
        (self.chaining_key, self.key, self.counter) = (*chaining_key, *key, 0);
    }

    fn encrypt_and_hash(&mut self, plain: &[u8]) -> Vec<u8> {
        let payload = Payload { msg: plain, aad: &self.hash };
        let sealed = cipher(&self.key).encrypt(&nonce(self.counter).into(), payload);
        let sealed = sealed.expect("a message is far below the cipher's bound");
        self.counter += 1;
        self.mix_hash(&sealed);
        sealed
    }

    fn decrypt_and_hash(&mut self, sealed: &[u8]) -> Result<Vec<u8>, Misbehaved> {
        let payload = Payload { msg: sealed, aad: &self.hash };
        let plain = cipher(&self.key).decrypt(&nonce(self.counter).into(), payload).map_err(|_| Misbehaved::Forged)?;
        self.counter += 1;
        self.mix_hash(sealed);
        Ok(plain)
    }

    fn split(&self) -> Established {
        let [forward, backward, _] = &*hkdf(&self.chaining_key, &[]);
        Established { forward: Zeroizing::new(*forward), backward: Zeroizing::new(*backward) }
    }
}

/// AES-256-GCM under this key.
pub(crate) fn cipher(key: &[u8; 32]) -> Aes256Gcm {
    Aes256Gcm::new(key.into())
}

/// Noise's AESGCM nonce: 32 zero bits and the counter, big-endian (§12.4).
pub(crate) fn nonce(counter: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_be_bytes());
    nonce
}

/// Noise's HKDF with three outputs (§4.3); its first two are those of the form with two.
fn hkdf(chaining_key: &[u8; 32], input: &[u8]) -> Zeroizing<[[u8; 32]; 3]> {
    let temporary = Zeroizing::new(hmac(chaining_key, &[input]));
    let first = hmac(&temporary, &[&[1]]);
    let second = hmac(&temporary, &[&first, &[2]]);
    let third = hmac(&temporary, &[&second, &[3]]);
    Zeroizing::new([first, second, third])
}

fn hmac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("HMAC takes keys of any length");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}
