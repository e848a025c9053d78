//! From a token and a room name to the room's keys.
//!
//! In: the secret that the room's people share, and the room's name. Out: [`RoomKeys`]. Never keeps the token. A
//! generated token has 256 bits and is used as it is; a token that a person chose is stretched first, so that guessing
//! it costs one Argon2id for each guess, even for who recorded all traffic. The room's name is mixed into every key:
//! one token in two rooms gives two unrelated rooms.
//!
//! Bounds: Argon2id with 64 MiB and 3 passes takes about 140 ms, once at start (above OWASP's minimum of 19 MiB and 2
//! passes; RFC 9106 §4 recommends 64 MiB and 3 passes where 2 GiB are too much).

use std::fmt;

use argon2::{Algorithm, Argon2, Params, Version};
use rand_core::CryptoRng;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::id::{RoomId, base32};

/// How generated tokens begin, so that a person and a program recognise one.
pub const TOKEN_PREFIX: &str = "pft1-";

/// Longest token, in bytes: far more than anybody types, and little to hash.
pub const MAX_TOKEN_BYTES: usize = 1024;

/// Chosen tokens shorter than this are warned about.
const WEAK_BELOW_CHARS: usize = 16;

/// Chosen tokens with fewer different characters than this are warned about.
const WEAK_BELOW_DISTINCT: usize = 8;

/// Bytes of the checksum behind a generated token: one typo in 2³² goes unnoticed.
const CHECKSUM_BYTES: usize = 4;

/// Argon2id memory, in KiB.
const STRETCH_KIBIBYTES: u32 = 64 * 1024;

/// Argon2id passes.
const STRETCH_PASSES: u32 = 3;

const CHECKSUM_LABEL: &str = "peerfleet 2026 token checksum v1";
const SALT_LABEL: &str = "peerfleet 2026 token salt v1";
const ADMISSION_LABEL: &str = "peerfleet 2026 room admission key v1";
const PRESENCE_LABEL: &str = "peerfleet 2026 room presence key v1";
const PSK_LABEL: &str = "peerfleet 2026 room pre-shared key v1";

/// The room's secret, as its people have it.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Token(Secret);

#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
enum Secret {
    Generated([u8; 32]),
    Chosen(String),
}

/// A text cannot be used as a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    /// There is nothing.
    #[error("the token is empty")]
    Empty,
    /// It is too long.
    #[error("the token is longer than {MAX_TOKEN_BYTES} bytes")]
    TooLong,
    /// It begins like a generated token, but is none: a character is wrong or missing.
    #[error("the token begins with {TOKEN_PREFIX} but is mistyped or cut off")]
    Mistyped,
}

impl Token {
    /// A new token with 256 bits of randomness.
    pub fn generate(rng: &mut impl CryptoRng) -> Self {
        let mut bytes = [0; 32];
        rng.fill_bytes(&mut bytes);
        Self(Secret::Generated(bytes))
    }

    /// Reads a token: one that was generated, or any text that a person chose. White space around it does not count.
    ///
    /// # Errors
    /// [`InvalidToken`] if it is empty, too long, or a mistyped generated token.
    pub fn parse(text: &str) -> Result<Self, InvalidToken> {
        let text = text.trim();
        if text.is_empty() {
            return Err(InvalidToken::Empty);
        }
        if text.len() > MAX_TOKEN_BYTES {
            return Err(InvalidToken::TooLong);
        }
        let Some(encoded) = generated_part(text) else {
            return Ok(Self(Secret::Chosen(text.to_owned())));
        };
        let bytes = Zeroizing::new(base32().decode(encoded.as_bytes()).map_err(|_| InvalidToken::Mistyped)?);
        let (secret, sum) = bytes.split_first_chunk::<32>().ok_or(InvalidToken::Mistyped)?;
        if sum != checksum(secret) {
            return Err(InvalidToken::Mistyped);
        }
        Ok(Self(Secret::Generated(*secret)))
    }

    /// The text that people copy. It is the secret itself: show it only where it was asked for.
    pub fn reveal(&self) -> Zeroizing<String> {
        match &self.0 {
            Secret::Generated(secret) => {
                let bytes = Zeroizing::new([&secret[..], &checksum(secret)].concat());
                // Room for all of it beforehand: growing would leave copies of the secret behind.
                let mut text = Zeroizing::new(String::with_capacity(TOKEN_PREFIX.len() + 2 * bytes.len()));
                text.push_str(TOKEN_PREFIX);
                base32().encode_append(&bytes, &mut text);
                text
            }
            Secret::Chosen(text) => Zeroizing::new(text.clone()),
        }
    }

    /// Whether a person chose it and it looks guessable.
    pub fn is_weak(&self) -> bool {
        match &self.0 {
            Secret::Generated(_) => false,
            Secret::Chosen(text) => {
                let distinct: std::collections::BTreeSet<char> = text.chars().collect();
                text.chars().count() < WEAK_BELOW_CHARS || distinct.len() < WEAK_BELOW_DISTINCT
            }
        }
    }

    fn root(&self, room: &str) -> Zeroizing<[u8; 32]> {
        match &self.0 {
            Secret::Generated(secret) => Zeroizing::new(*secret),
            Secret::Chosen(text) => stretch(text, room),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// What stands behind the prefix of a generated token, in either case, as base32 is read.
fn generated_part(text: &str) -> Option<&str> {
    let (prefix, encoded) = text.split_at_checked(TOKEN_PREFIX.len())?;
    prefix.eq_ignore_ascii_case(TOKEN_PREFIX).then_some(encoded)
}

fn checksum(secret: &[u8; 32]) -> [u8; CHECKSUM_BYTES] {
    let hash = blake3::derive_key(CHECKSUM_LABEL, secret);
    *hash.first_chunk().expect("a hash is longer than a checksum")
}

fn stretch(text: &str, room: &str) -> Zeroizing<[u8; 32]> {
    let salt = blake3::derive_key(SALT_LABEL, room.as_bytes());
    let params = Params::new(STRETCH_KIBIBYTES, STRETCH_PASSES, 1, Some(32)).expect("constants within Argon2's bounds");
    let mut root = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(text.as_bytes(), &salt[..16], root.as_mut())
        .expect("the token is shorter than Argon2's bound, the salt longer than its minimum");
    root
}

/// All keys of one room. Whoever holds them is a member.
pub struct RoomKeys {
    admission: StaticSecret,
    admission_public: [u8; 32],
    room: RoomId,
    presence: Zeroizing<[u8; 32]>,
    psk: Zeroizing<[u8; 32]>,
}

impl RoomKeys {
    /// Derives the keys. With a chosen token this takes 64 MiB and about 140 ms: once, at start.
    pub fn derive(token: &Token, room_name: &str) -> Self {
        let root = token.root(room_name);
        let key = |label| derive(label, &root, room_name);
        let admission = StaticSecret::from(*key(ADMISSION_LABEL));
        let admission_public = PublicKey::from(&admission).to_bytes();
        Self {
            room: room_id(&admission_public),
            admission,
            admission_public,
            presence: key(PRESENCE_LABEL),
            psk: key(PSK_LABEL),
        }
    }

    /// The room as the relay knows it.
    pub fn room(&self) -> RoomId {
        self.room
    }

    /// The key whose possession the relay asks for.
    pub fn admission(&self) -> &StaticSecret {
        &self.admission
    }

    /// The public half of [`RoomKeys::admission`].
    pub fn admission_public(&self) -> &[u8; 32] {
        &self.admission_public
    }

    /// The key that presence is sealed under.
    pub fn presence(&self) -> &[u8; 32] {
        &self.presence
    }

    /// The pre-shared key of sealed messages.
    pub fn psk(&self) -> &[u8; 32] {
        &self.psk
    }
}

impl fmt::Debug for RoomKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RoomKeys({}, …)", self.room)
    }
}

/// The id of the room with this admission public key.
pub fn room_id(admission_public: &[u8; 32]) -> RoomId {
    RoomId::from_bytes(*blake3::hash(admission_public).as_bytes())
}

/// The name's length stands before it, so that no pair of root and name reads as another.
fn derive(label: &str, root: &[u8; 32], room_name: &str) -> Zeroizing<[u8; 32]> {
    let mut hasher = blake3::Hasher::new_derive_key(label);
    hasher.update(root);
    hasher.update(&(room_name.len() as u64).to_be_bytes());
    hasher.update(room_name.as_bytes());
    Zeroizing::new(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter(u8);

    impl rand_core::TryRng for Counter {
        type Error = std::convert::Infallible;

        fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
            Ok(u32::from(self.0))
        }

        fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
            Ok(u64::from(self.0))
        }

        fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
            bytes.fill_with(|| {
                self.0 = self.0.wrapping_add(1);
                self.0
            });
            Ok(())
        }
    }

    impl rand_core::TryCryptoRng for Counter {}

    fn generated() -> Token {
        Token::generate(&mut Counter(0))
    }

    #[test]
    fn a_generated_token_reads_back() {
        let text = generated().reveal();
        assert!(text.starts_with(TOKEN_PREFIX));
        assert_eq!(Token::parse(&format!(" {}\n", *text)), Ok(generated()));
        assert!(!generated().is_weak());
    }

    #[test]
    fn a_mistyped_generated_token_is_never_taken_for_a_chosen_one() {
        let text = generated().reveal();
        let last = if text.ends_with('a') { "b" } else { "a" };
        for wrong in [text[..text.len() - 1].to_owned(), format!("{}{last}", &text[..text.len() - 1]), "pft1-".into()] {
            assert_eq!(Token::parse(&wrong), Err(InvalidToken::Mistyped));
        }
    }

    #[test]
    fn a_generated_token_in_upper_case_is_the_same_token() {
        let upper = generated().reveal().to_uppercase();
        assert_eq!(Token::parse(&upper), Ok(generated()));
        assert_eq!(Token::parse(&upper[..upper.len() - 1]), Err(InvalidToken::Mistyped));
    }

    #[test]
    fn a_chosen_token_may_have_any_characters() {
        for text in ["pft", "pft1", "h\u{e9}llo", "\u{1f511}\u{1f511}"] {
            assert_eq!(Token::parse(text).map(|token| token.reveal().to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn an_empty_token_is_refused_and_a_short_one_is_weak() {
        assert_eq!(Token::parse("  "), Err(InvalidToken::Empty));
        assert_eq!(Token::parse(&"x".repeat(MAX_TOKEN_BYTES + 1)), Err(InvalidToken::TooLong));
        assert!(Token::parse("hunter2").is_ok_and(|token| token.is_weak()));
        assert!(Token::parse("aaaaaaaaaaaaaaaaaaaaaaa").is_ok_and(|token| token.is_weak()));
        assert!(Token::parse("correct horse battery staple").is_ok_and(|token| !token.is_weak()));
    }

    #[test]
    fn one_token_in_two_rooms_gives_unrelated_keys() {
        for token in [generated(), Token::parse("correct horse battery staple").unwrap()] {
            let (one, other) = (RoomKeys::derive(&token, "dev"), RoomKeys::derive(&token, "prod"));
            assert_ne!(one.room(), other.room());
            assert_ne!(one.psk(), other.psk());
            assert_ne!(one.presence(), other.presence());
            assert_eq!(one.room(), RoomKeys::derive(&token, "dev").room());
        }
    }

    #[test]
    fn a_room_of_the_same_name_with_another_token_is_another_room() {
        let other = Token::parse("another horse battery staple").unwrap();
        assert_ne!(RoomKeys::derive(&generated(), "dev").room(), RoomKeys::derive(&other, "dev").room());
    }

    #[test]
    fn debug_shows_no_secret() {
        let token = Token::parse("correct horse battery staple").unwrap();
        assert_eq!(format!("{token:?}"), "Token(…)");
        assert!(!format!("{:?}", RoomKeys::derive(&generated(), "dev")).contains("dev"));
    }

    /// What every guess at a chosen token costs: the parameters of [`stretch`] reproduced from their definition.
    #[test]
    fn a_chosen_token_costs_one_argon2id_for_each_guess() {
        let text = "correct horse battery staple";
        let salt = blake3::derive_key(SALT_LABEL, b"dev");
        let params = Params::new(65_536, 3, 1, Some(32)).unwrap();
        let mut root = [0; 32];
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        argon2.hash_password_into(text.as_bytes(), &salt[..16], &mut root).unwrap();
        let psk = RoomKeys::derive(&Token::parse(text).unwrap(), "dev");
        assert_eq!(psk.psk(), &*derive(PSK_LABEL, &root, "dev"));
    }
}
