//! Values that a person sets, checked where they enter.

use std::{fmt, str::FromStr};

use peerfleet_proto::{
    limits::{MAX_NAME_BYTES, MAX_TAG_BYTES},
    presence::{valid_name, valid_tag},
};
use zeroize::Zeroizing;

/// A token as somebody typed it. `Debug` never prints it.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenText(Zeroizing<String>);

impl TokenText {
    /// The token.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for TokenText {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl fmt::Debug for TokenText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenText(…)")
    }
}

macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $fault:ident, $what:literal, $longest:expr, $valid:path) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
        pub struct $name(String);

        #[doc = concat!("A text is not ", $what, ".")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
        #[error("{what} has 1 to {longest} of a-z, A-Z, 0-9, `.`, `_`, `-`, the first neither `.` nor `-`", what = $what, longest = $longest)]
        pub struct $fault;

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = $fault;

            fn from_str(text: &str) -> Result<Self, $fault> {
                if $valid(text) { Ok(Self(text.to_owned())) } else { Err($fault) }
            }
        }
    };
}

word! {
    /// What a room is called. With the token it makes the room's keys.
    RoomName, InvalidRoomName, "a room's name", MAX_NAME_BYTES, valid_name
}

word! {
    /// What a machine is called in the room.
    HostName, InvalidHostName, "a machine's name", MAX_NAME_BYTES, valid_name
}

word! {
    /// A word by which machines are chosen.
    Tag, InvalidTag, "a tag", MAX_TAG_BYTES, valid_tag
}

impl HostName {
    /// The name that a host name of the operating system leads to: its first label, other characters replaced.
    pub fn from_system(nodename: &str) -> Self {
        let label = nodename.split('.').next().unwrap_or_default();
        let replaced: String = label
            .chars()
            .map(|char| if char.is_ascii_alphanumeric() || char == '_' { char } else { '-' })
            .skip_while(|char| *char == '-')
            .take(MAX_NAME_BYTES)
            .collect();
        replaced.parse().unwrap_or_else(|InvalidHostName| Self("peer".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_of_the_system_always_leads_to_a_name() {
        let names = ["web-1.example.net", "--größe", "", "漢"].map(|name| HostName::from_system(name).to_string());
        assert_eq!(names, ["web-1", "gr--e", "peer", "peer"]);
    }

    #[test]
    fn a_name_has_neither_space_nor_leading_dash() {
        assert!("-a".parse::<HostName>().is_err());
        assert!("a b".parse::<RoomName>().is_err());
        assert!("".parse::<Tag>().is_err());
        assert!("a".repeat(64).parse::<HostName>().is_err());
    }

    #[test]
    fn a_token_is_not_printed() {
        assert_eq!(format!("{:?}", TokenText::from("secret".to_owned())), "TokenText(…)");
    }
}
