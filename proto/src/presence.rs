//! What a peer says of itself, sealed for the room.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

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
