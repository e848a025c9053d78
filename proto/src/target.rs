//! Which hosts: target expressions, and the one host that a `HOST` argument names.
//!
//! In: text that a person wrote, and what is known of each host. Out: whether the expression matches a host, or where
//! and why the text does not read. It never looks anything up and never changes a host's facts.
//!
//! ```text
//! expression = both { "|" both }
//! both       = part { "&" part }
//! part       = "!" part | "(" expression ")" | word { "," word }
//! word       = "all" | [ ("name" | "tag" | "id" | "os" | "arch") ":" ] pattern
//! ```
//!
//! A list `a,b` means any of them and binds tightest, so `!a,b` is neither. In a pattern `*` stands for any characters
//! and `?` for one. A bare word is a host's name, one of its tags, or its id as lists show it.
//! Bounds: [`MAX_TARGET_BYTES`] and [`MAX_TARGET_DEPTH`], so that no text exhausts time or stack.

use std::{fmt, str::FromStr};

use crate::id::{PeerId, SHORT_ID_CHARS, SHORTEST_PREFIX};

mod host;
mod parse;

pub use host::{HostFault, resolve_host};

/// Longest target expression, in bytes: 256 host names of full length, separated by commas.
pub const MAX_TARGET_BYTES: usize = 16 * 1024;

/// Deepest nesting of brackets and negations: far beyond what a person can read.
pub const MAX_TARGET_DEPTH: usize = 64;

/// What a target expression is matched against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostFacts<'a> {
    /// The identity.
    pub peer: PeerId,
    /// The name it gives itself.
    pub name: &'a str,
    /// Its tags.
    pub tags: &'a [String],
    /// Its operating system, as `linux`.
    pub os: &'a str,
    /// Its processor architecture, as `x86_64`.
    pub arch: &'a str,
}

/// A target expression that was understood. Its text form reads back as the same expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    root: Node,
}

/// Where and why a text is no target expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} (at byte {at})")]
pub struct TargetFault {
    /// Offset into the text, in bytes; its length if the text ended too early.
    pub at: usize,
    /// The rule that was broken.
    pub what: TargetRule,
}

/// Rules of target expressions that a text can break.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetRule {
    /// There is nothing but spaces.
    #[error("the target is empty; `all` means every host")]
    Empty,
    /// Longer than [`MAX_TARGET_BYTES`].
    #[error("the target is longer than {MAX_TARGET_BYTES} bytes")]
    TooLong,
    /// Nested deeper than [`MAX_TARGET_DEPTH`].
    #[error("brackets and `!` are nested deeper than {MAX_TARGET_DEPTH}")]
    TooDeep,
    /// Something else where a name, tag, `key:value`, `!` or `(` is needed.
    #[error("expected a name, a tag, `key:value`, `!` or `(`")]
    ExpectedTerm,
    /// Something else where two parts must be joined.
    #[error("expected `&`, `|`, `,` or the end")]
    ExpectedJoin,
    /// A bracket was opened and not closed.
    #[error("the bracket opened here is never closed")]
    Unclosed,
    /// A list of words has brackets or a negation in it.
    #[error("a list with `,` holds only words; join other parts with `|`")]
    ListOfWords,
    /// A key that there is not.
    #[error("unknown key; known are `name:`, `tag:`, `id:`, `os:` and `arch:`")]
    UnknownKey,
    /// A key without a value.
    #[error("the value behind the key is missing")]
    MissingValue,
    /// An id that is too short or not base32.
    #[error("an id is given by {SHORTEST_PREFIX} or more of its characters (a-z, 2-7)")]
    InvalidId,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    AnyOf(Vec<Word>),
    Not(Box<Node>),
    Both(Vec<Node>),
    Either(Vec<Node>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Word {
    key: Key,
    pattern: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    All,
    Bare,
    Name,
    Tag,
    Id,
    Os,
    Arch,
}

impl Target {
    /// Reads a target expression.
    ///
    /// # Errors
    /// [`TargetFault`] says where the text stops making sense, and why.
    pub fn parse(text: &str) -> Result<Self, TargetFault> {
        parse::parse(text).map(|root| Self { root })
    }

    /// Whether the expression selects this host.
    pub fn matches(&self, host: &HostFacts<'_>) -> bool {
        self.root.matches(host)
    }
}

impl FromStr for Target {
    type Err = TargetFault;

    fn from_str(text: &str) -> Result<Self, TargetFault> {
        Self::parse(text)
    }
}

impl Node {
    fn matches(&self, host: &HostFacts<'_>) -> bool {
        match self {
            Self::AnyOf(words) => words.iter().any(|word| word.matches(host)),
            Self::Not(inner) => !inner.matches(host),
            Self::Both(parts) => parts.iter().all(|part| part.matches(host)),
            Self::Either(parts) => parts.iter().any(|part| part.matches(host)),
        }
    }
}

impl Word {
    fn matches(&self, host: &HostFacts<'_>) -> bool {
        let pattern = &self.pattern;
        let tagged = || host.tags.iter().any(|tag| glob(pattern, tag));
        match self.key {
            Key::All => true,
            Key::Bare => glob(pattern, host.name) || tagged() || self.is_shown_id(&host.peer),
            Key::Name => glob(pattern, host.name),
            Key::Tag => tagged(),
            Key::Id => has_prefix(&host.peer, pattern),
            Key::Os => glob(&pattern.to_ascii_lowercase(), &host.os.to_ascii_lowercase()),
            Key::Arch => glob(&pattern.to_ascii_lowercase(), &host.arch.to_ascii_lowercase()),
        }
    }

    /// A bare word counts as an id only at full shown length: a four-letter tag must never select, by the chance of a
    /// random id, a host that does not have it.
    fn is_shown_id(&self, peer: &PeerId) -> bool {
        self.pattern.len() >= SHORT_ID_CHARS && has_prefix(peer, &self.pattern)
    }
}

/// Whether the text form of the id begins so, in either case.
fn has_prefix(peer: &PeerId, prefix: &str) -> bool {
    peer.to_string().starts_with(&prefix.to_ascii_lowercase())
}

/// Whether the pattern, with `*` and `?`, covers the whole text. Time is at most the product of both lengths.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[t] => {
                p += 1;
                t += 1;
            }
            Some(_) | None => {
                let Some((behind, taken)) = star else { return false };
                star = Some((behind, taken + 1));
                p = behind;
                t = taken + 1;
            }
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.root.fmt(f)
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AnyOf(words) => write_joined(f, words, ","),
            Self::Not(inner) => match **inner {
                Self::AnyOf(_) | Self::Not(_) => write!(f, "!{inner}"),
                Self::Both(_) | Self::Either(_) => write!(f, "!({inner})"),
            },
            Self::Both(parts) | Self::Either(parts) => {
                let sign = if matches!(self, Self::Both(_)) { " & " } else { " | " };
                for (index, part) in parts.iter().enumerate() {
                    let before = if index == 0 { "" } else { sign };
                    match part {
                        Self::AnyOf(_) | Self::Not(_) => write!(f, "{before}{part}")?,
                        Self::Both(_) | Self::Either(_) => write!(f, "{before}({part})")?,
                    }
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = match self.key {
            Key::All | Key::Bare => "",
            Key::Name => "name:",
            Key::Tag => "tag:",
            Key::Id => "id:",
            Key::Os => "os:",
            Key::Arch => "arch:",
        };
        write!(f, "{key}{}", self.pattern)
    }
}

fn write_joined(f: &mut fmt::Formatter<'_>, words: &[Word], sign: &str) -> fmt::Result {
    for (index, word) in words.iter().enumerate() {
        write!(f, "{}{word}", if index == 0 { "" } else { sign })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
