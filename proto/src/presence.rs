//! What a peer says of itself, sealed for the room.
//!
//! In: a [`Presence`] and the room's presence key. Out: sealed bytes that the relay keeps and hands on without reading,
//! and the [`Presence`] again on the other side. A counter inside grows with every sealing, so the relay can withhold a
//! newer presence but not bring back an older one. The relay has proved to it who joined; the seal binds that identity
//! and instance, so no presence can be passed off as another's without a member's help. Bounds: [`MAX_PRESENCE_BYTES`],
//! [`MAX_TAGS`] and their like in [`crate::limits`].

use std::{collections::BTreeMap, fmt, str::FromStr};

use aes_gcm::{
    Aes256Gcm, KeyInit, Nonce,
    aead::{Aead, Payload},
};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    id::{InstanceId, PeerId, RoomId},
    limits::{MAX_NAME_BYTES, MAX_PRESENCE_BYTES, MAX_TAG_BYTES, MAX_TAGS},
    token::RoomKeys,
    wire::{decode, encode},
};

const KEY_LABEL: &[u8] = b"peerfleet presence key of an instance v1";

/// Bytes of the counter before the ciphertext.
const COUNTER_BYTES: usize = 8;

/// Random bytes that an instance publishes; a session with it can only be begun by who knows the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub [u8; 16]);

/// What a host lets others do, from least to most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// Nothing but being seen.
    Disabled,
    /// Look, but change nothing and run nothing.
    Plan,
    /// Change files too.
    Edit,
    /// Everything, running commands included.
    Bypass,
}

/// A mode's name was not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a mode: choose plan, edit, bypass or disabled")]
pub struct InvalidMode;

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Disabled => "disabled",
            Self::Plan => "plan",
            Self::Edit => "edit",
            Self::Bypass => "bypass",
        })
    }
}

impl FromStr for Mode {
    type Err = InvalidMode;

    fn from_str(text: &str) -> Result<Self, InvalidMode> {
        match text {
            "disabled" => Ok(Self::Disabled),
            "plan" => Ok(Self::Plan),
            "edit" => Ok(Self::Edit),
            "bypass" => Ok(Self::Bypass),
            _ => Err(InvalidMode),
        }
    }
}

/// A service that a host offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Service {
    /// Runs commands.
    Exec,
    /// Sends and receives files.
    Transfer,
}

/// What a peer says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// The host's name: see [`valid_name`].
    pub name: String,
    /// The host's tags, sorted, each once.
    pub tags: Vec<String>,
    /// Operating system, as `std::env::consts::OS` has it.
    pub os: String,
    /// Architecture, as `std::env::consts::ARCH` has it.
    pub arch: String,
    /// Version of the peer.
    pub version: String,
    /// What the host lets others do.
    pub mode: Mode,
    /// What the host offers; an instance that offers nothing is no host, only a caller.
    pub services: Vec<Service>,
    /// Who wants to begin a session must know this.
    pub epoch: Epoch,
}

impl Presence {
    /// Whether this instance is a host, to be listed and asked.
    pub fn is_host(&self) -> bool {
        !self.services.is_empty()
    }
}

/// Whether a text can be a host's name: letters, digits, `.`, `_`, `-`, at most [`MAX_NAME_BYTES`], not starting with
/// `-` or `.`. So a name is never taken for a flag, a path, or an operator of a target expression.
pub fn valid_name(text: &str) -> bool {
    is_word(text, MAX_NAME_BYTES)
}

/// Whether a text can be a tag: as a name, at most [`MAX_TAG_BYTES`].
pub fn valid_tag(text: &str) -> bool {
    is_word(text, MAX_TAG_BYTES)
}

fn is_word(text: &str, longest: usize) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !text.starts_with(['-', '.']) && (1..=longest).contains(&text.len()) && text.bytes().all(allowed)
}

/// Why a sealed presence was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PresenceFault {
    /// The seal does not hold: it was changed, or is another's.
    #[error("the seal does not hold")]
    Forged,
    /// An older one than was seen before.
    #[error("older than one seen before")]
    Stale,
    /// The seal holds, but the content breaks a rule: another version's, or a hostile member's.
    #[error("the content breaks a rule")]
    Invalid,
}

/// Seals one instance's presence, each time with the next counter.
pub struct PresenceSealer {
    cipher: Aes256Gcm,
    binding: Vec<u8>,
    counter: u64,
}

impl PresenceSealer {
    /// A sealer for this instance. There must be one for each instance: the counter is the nonce.
    pub fn new(keys: &RoomKeys, peer: PeerId, instance: InstanceId) -> Self {
        let (cipher, binding) = instance_cipher(keys.presence(), keys.room(), peer, instance);
        Self { cipher, binding, counter: 0 }
    }

    /// Seals the presence as it is now: `counter u64 | ciphertext`.
    pub fn seal(&mut self, presence: &Presence) -> Vec<u8> {
        self.counter += 1;
        let counter = self.counter.to_be_bytes();
        let payload = Payload { msg: &encode(presence), aad: &self.binding };
        let ciphertext =
            self.cipher.encrypt(&nonce(counter), payload).expect("a presence is far below the cipher's bound");
        [&counter[..], &ciphertext].concat()
    }
}

/// Opens the presence of the room's instances and remembers how new each was.
pub struct PresenceOpener {
    room: RoomId,
    key: Zeroizing<[u8; 32]>,
    /// By identity too: the same instance id under another identity says nothing of this one.
    newest: BTreeMap<(InstanceId, PeerId), u64>,
}

impl PresenceOpener {
    /// An opener for a room.
    pub fn new(keys: &RoomKeys) -> Self {
        Self { room: keys.room(), key: Zeroizing::new(*keys.presence()), newest: BTreeMap::new() }
    }

    /// Opens what the relay says is the presence of this instance. The one seen last may come again, as it does when
    /// the roster is sent anew.
    ///
    /// # Errors
    /// [`PresenceFault`].
    pub fn open(&mut self, peer: PeerId, instance: InstanceId, sealed: &[u8]) -> Result<Presence, PresenceFault> {
        if sealed.len() > MAX_PRESENCE_BYTES {
            return Err(PresenceFault::Invalid);
        }
        let (counter, ciphertext) = sealed.split_first_chunk::<COUNTER_BYTES>().ok_or(PresenceFault::Forged)?;
        let (cipher, binding) = instance_cipher(&self.key, self.room, peer, instance);
        let payload = Payload { msg: ciphertext, aad: &binding };
        let plain = cipher.decrypt(&nonce(*counter), payload).map_err(|_| PresenceFault::Forged)?;
        let presence: Presence = decode(&plain, MAX_PRESENCE_BYTES).map_err(|_| PresenceFault::Invalid)?;
        if !follows_the_rules(&presence) {
            return Err(PresenceFault::Invalid);
        }
        let newest = self.newest.entry((instance, peer)).or_default();
        let counter = u64::from_be_bytes(*counter);
        if counter < *newest {
            return Err(PresenceFault::Stale);
        }
        *newest = counter;
        Ok(presence)
    }

    /// Forgets an instance that will not come back, so that memory is bounded by who is in the room.
    pub fn forget(&mut self, instance: InstanceId) {
        self.newest.retain(|(known, _), _| *known != instance);
    }
}

fn follows_the_rules(presence: &Presence) -> bool {
    valid_name(&presence.name)
        && presence.tags.len() <= MAX_TAGS
        && presence.tags.iter().all(|tag| valid_tag(tag))
        && valid_tag(&presence.os)
        && valid_tag(&presence.arch)
        && presence.version.len() <= MAX_TAG_BYTES
        && presence.version.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A key for each instance, so that counters of different instances never meet under one key.
fn instance_cipher(key: &[u8; 32], room: RoomId, peer: PeerId, instance: InstanceId) -> (Aes256Gcm, Vec<u8>) {
    let binding = [KEY_LABEL, room.as_bytes(), peer.as_bytes(), instance.as_bytes()].concat();
    let key = Zeroizing::new(*blake3::keyed_hash(key, &binding).as_bytes());
    (Aes256Gcm::new(&(*key).into()), binding)
}

fn nonce(counter: [u8; COUNTER_BYTES]) -> Nonce<aes_gcm::aead::consts::U12> {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter);
    nonce.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::Token;

    fn keys(token: &str) -> RoomKeys {
        RoomKeys::derive(&Token::parse(token).unwrap(), "dev")
    }

    fn presence(name: &str) -> Presence {
        Presence {
            name: name.into(),
            tags: vec!["web".into()],
            os: "linux".into(),
            arch: "x86_64".into(),
            version: "0.1.0".into(),
            mode: Mode::Plan,
            services: vec![Service::Exec],
            epoch: Epoch([9; 16]),
        }
    }

    const PEER: PeerId = PeerId::from_bytes([1; 32]);
    const INSTANCE: InstanceId = InstanceId::from_bytes([2; 16]);

    #[test]
    fn a_sealed_presence_opens_for_members_of_the_room_only() {
        let keys_here = keys("correct horse battery staple");
        let sealed = PresenceSealer::new(&keys_here, PEER, INSTANCE).seal(&presence("web-1"));
        assert_eq!(PresenceOpener::new(&keys_here).open(PEER, INSTANCE, &sealed), Ok(presence("web-1")));
        let elsewhere = keys("another horse battery staple");
        assert_eq!(PresenceOpener::new(&elsewhere).open(PEER, INSTANCE, &sealed), Err(PresenceFault::Forged));
        assert!(!sealed.windows(5).any(|bytes| bytes == b"web-1"));
    }

    #[test]
    fn a_presence_is_no_other_instances_and_no_older_than_the_last() {
        let keys = keys("correct horse battery staple");
        let mut sealer = PresenceSealer::new(&keys, PEER, INSTANCE);
        let (older, newer) = (sealer.seal(&presence("old")), sealer.seal(&presence("new")));
        let mut opener = PresenceOpener::new(&keys);
        let other = InstanceId::from_bytes([3; 16]);
        assert_eq!(opener.open(PEER, other, &newer), Err(PresenceFault::Forged));
        assert_eq!(opener.open(PeerId::from_bytes([7; 32]), INSTANCE, &newer), Err(PresenceFault::Forged));
        assert_eq!(opener.open(PEER, INSTANCE, &newer), Ok(presence("new")));
        assert_eq!(opener.open(PEER, INSTANCE, &newer), Ok(presence("new")));
        assert_eq!(opener.open(PEER, INSTANCE, &older), Err(PresenceFault::Stale));
    }

    #[test]
    fn the_same_instance_id_under_another_identity_makes_no_presence_stale() {
        let keys = keys("correct horse battery staple");
        let impostor = PeerId::from_bytes([9; 32]);
        let mut sealer = PresenceSealer::new(&keys, impostor, INSTANCE);
        let mut opener = PresenceOpener::new(&keys);
        for _ in 0..3 {
            opener.open(impostor, INSTANCE, &sealer.seal(&presence("fake"))).unwrap();
        }
        let sealed = PresenceSealer::new(&keys, PEER, INSTANCE).seal(&presence("web-1"));
        assert_eq!(opener.open(PEER, INSTANCE, &sealed), Ok(presence("web-1")));
    }

    #[test]
    fn an_instance_that_was_forgotten_may_begin_anew() {
        let keys = keys("correct horse battery staple");
        let mut sealer = PresenceSealer::new(&keys, PEER, INSTANCE);
        let (older, newer) = (sealer.seal(&presence("old")), sealer.seal(&presence("new")));
        let mut opener = PresenceOpener::new(&keys);
        opener.open(PEER, INSTANCE, &newer).unwrap();
        opener.forget(INSTANCE);
        assert_eq!(opener.open(PEER, INSTANCE, &older), Ok(presence("old")));
    }

    #[test]
    fn the_longest_presence_that_keeps_the_rules_fits_the_limit() {
        let keys = keys("correct horse battery staple");
        let longest = "x".repeat(MAX_TAG_BYTES);
        let largest = Presence {
            name: "x".repeat(MAX_NAME_BYTES),
            tags: vec![longest.clone(); MAX_TAGS],
            os: longest.clone(),
            arch: longest.clone(),
            version: longest,
            services: vec![Service::Exec, Service::Transfer],
            ..presence("x")
        };
        let sealed = PresenceSealer::new(&keys, PEER, INSTANCE).seal(&largest);
        assert!(sealed.len() <= MAX_PRESENCE_BYTES, "{} bytes", sealed.len());
        assert_eq!(PresenceOpener::new(&keys).open(PEER, INSTANCE, &sealed), Ok(largest));
    }

    #[test]
    fn an_oversized_presence_is_invalid_before_it_is_deciphered() {
        let mut opener = PresenceOpener::new(&keys("correct horse battery staple"));
        let oversized = vec![0; MAX_PRESENCE_BYTES + 1];
        assert_eq!(opener.open(PEER, INSTANCE, &oversized), Err(PresenceFault::Invalid));
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_noticed() {
        let keys = keys("correct horse battery staple");
        let sealed = PresenceSealer::new(&keys, PEER, INSTANCE).seal(&presence("web-1"));
        let mut opener = PresenceOpener::new(&keys);
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(opener.open(PEER, INSTANCE, &changed), Err(PresenceFault::Forged));
            assert_eq!(opener.open(PEER, INSTANCE, &sealed[..at]), Err(PresenceFault::Forged));
        }
    }

    #[test]
    fn a_name_with_control_characters_or_operators_is_invalid() {
        let keys = keys("correct horse battery staple");
        for name in ["", "-rf", ".hidden", "a b", "a\n", "a/b", "web|db", "caf\u{e9}", &"x".repeat(64)] {
            assert!(!valid_name(name), "{name:?}");
            let sealed = PresenceSealer::new(&keys, PEER, INSTANCE).seal(&presence(name));
            assert_eq!(PresenceOpener::new(&keys).open(PEER, INSTANCE, &sealed), Err(PresenceFault::Invalid));
        }
        assert!(valid_name("web-1.example_net"));
    }
}
