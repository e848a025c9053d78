//! Names of things on the wire, one newtype each, so that no number is taken for another.
//!
//! Text form of every id made of bytes: lower-case base32 (RFC 4648 §6) without padding.

use std::{fmt, str::FromStr};

use data_encoding::{Encoding, Specification};
use serde::{Deserialize, Serialize};

/// Characters of a [`PeerId`] that people are shown; any unambiguous prefix of [`SHORTEST_PREFIX`] or more is accepted.
pub const SHORT_ID_CHARS: usize = 10;

/// Shortest prefix of a [`PeerId`] that names a host: 4 base32 characters are 20 bits, enough for rooms of hundreds.
pub const SHORTEST_PREFIX: usize = 4;

/// The text of an id was not base32 of the right length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a valid id: expected {expected} characters of lower-case base32 (a-z, 2-7)")]
pub struct InvalidId {
    /// How many characters this kind of id has.
    pub expected: usize,
}

macro_rules! byte_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name([u8; $len]);

        impl $name {
            /// Bytes in this id.
            pub const LEN: usize = $len;

            /// The id with exactly these bytes.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// The bytes of this id.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&base32().encode(&self.0))
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let expected = ($len * 8_usize).div_ceil(5);
                let invalid = InvalidId { expected };
                let bytes = base32().decode(text.as_bytes()).map_err(|_| invalid)?;
                Ok(Self(bytes.try_into().map_err(|_| invalid)?))
            }
        }
    };
}

byte_id! {
    /// A room as the relay knows it: the BLAKE3 hash of the room's admission public key. Neither token nor room name
    /// follows from it.
    RoomId, 32
}

byte_id! {
    /// A machine's identity: its long-lived X25519 public key.
    PeerId, 32
}

byte_id! {
    /// One running process of an identity, drawn at random when the process starts.
    InstanceId, 16
}

byte_id! {
    /// Chosen at random by whoever asks; a host answers a repeated id with the first outcome.
    RequestId, 16
}

byte_id! {
    /// Something running on a host. Equal to the [`RequestId`] that started it, so a repeated request is the same job.
    JobId, 16
}

byte_id! {
    /// The right to pull one offered file: 128 random bits, known to the host that offered, the receiver and the
    /// caller.
    Ticket, 16
}

macro_rules! debug_as_text {
    ($($name:ident),*) => {
        $(impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        })*
    };
}

debug_as_text!(RoomId, PeerId, InstanceId, RequestId, JobId);

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(…)")
    }
}

impl PeerId {
    /// The first [`SHORT_ID_CHARS`] characters, for people.
    pub fn short(&self) -> String {
        self.to_string().chars().take(SHORT_ID_CHARS).collect()
    }
}

impl From<RequestId> for JobId {
    fn from(request: RequestId) -> Self {
        Self(request.0)
    }
}

/// The relay's number for one connection in a room, valid as long as the connection and not used again in that room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Slot(pub u32);

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Base32 as ids are written: RFC 4648 alphabet in lower case, no padding; upper case is read as lower.
pub(crate) fn base32() -> Encoding {
    let mut specification = Specification::new();
    specification.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    specification.translate.from.push_str("ABCDEFGHIJKLMNOPQRSTUVWXYZ");
    specification.translate.to.push_str("abcdefghijklmnopqrstuvwxyz");
    specification.encoding().expect("32 distinct symbols are a valid base32 alphabet")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_an_id_reads_back_in_either_case() {
        let peer = PeerId::from_bytes([0xA7; 32]);
        assert_eq!(peer.to_string().parse(), Ok(peer));
        assert_eq!(peer.to_string().to_uppercase().parse(), Ok(peer));
        assert_eq!(peer.to_string().len(), 52);
    }

    #[test]
    fn rejects_text_of_another_length_or_alphabet() {
        assert_eq!("aaaa".parse::<PeerId>(), Err(InvalidId { expected: 52 }));
        assert!("1".repeat(26).parse::<InstanceId>().is_err());
    }

    #[test]
    fn debug_shows_no_ticket() {
        assert_eq!(format!("{:?}", Ticket::from_bytes([7; 16])), "Ticket(…)");
        assert!(format!("{:?}", JobId::from_bytes([7; 16])).starts_with("JobId(a"));
    }

    #[test]
    fn short_form_is_a_prefix() {
        let peer = PeerId::from_bytes([3; 32]);
        assert!(peer.to_string().starts_with(&peer.short()));
        assert_eq!(peer.short().len(), SHORT_ID_CHARS);
    }
}
