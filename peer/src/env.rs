//! Every environment variable that the peer reads, and nothing else reads any: but for `SSL_CERT_FILE` and `SSL_CERT_DIR`,
//! which put other certificate authorities in the place of the system's, and which the library that finds those reads.
//!
//! In: the process's environment, or a map in tests. Out: texts; a variable that is set but empty counts as unset.

use std::{collections::BTreeMap, ffi::OsString, path::PathBuf};

use crate::failure::{Failure, Result};

/// The room's token.
pub const TOKEN: &str = "PEER_TOKEN";
/// A file whose first line is the room's token.
pub const TOKEN_FILE: &str = "PEER_TOKEN_FILE";
/// URL of the relay.
pub const RELAY: &str = "PEER_RELAY";
/// Proxy to reach the relay through, as in `http://USER:PASSWORD@HOST:PORT`, or `none`; goes before the shared ones below.
pub const PROXY: &str = "PEER_PROXY";
/// A PEM file with certificate authorities to trust besides the system's.
pub const CA_FILE: &str = "PEER_CA_FILE";
/// Proxy for `wss://` relays, as many programs read it. Of these pairs lower case goes first, as it does with curl.
pub const HTTPS_PROXY: [&str; 2] = ["https_proxy", "HTTPS_PROXY"];
/// Likewise, for `ws://` relays.
pub const HTTP_PROXY: [&str; 2] = ["http_proxy", "HTTP_PROXY"];
/// Likewise, for relays of which the two above say nothing.
pub const ALL_PROXY: [&str; 2] = ["all_proxy", "ALL_PROXY"];
/// Hosts that the three above are not for, separated by commas.
pub const NO_PROXY: [&str; 2] = ["no_proxy", "NO_PROXY"];
/// Name of the room.
pub const ROOM: &str = "PEER_ROOM";
/// This machine's name in the room.
pub const NAME: &str = "PEER_NAME";
/// This machine's tags, separated by commas.
pub const TAGS: &str = "PEER_TAGS";
/// What this machine lets others do.
pub const MODE: &str = "PEER_MODE";
/// `1` or `true`: commands of others are never run, whatever the mode.
pub const NO_EXEC: &str = "PEER_NO_EXEC";
/// `0` or `false`: the router is not asked to forward a port.
pub const PORT_MAPPING: &str = "PEER_PORT_MAPPING";
/// STUN servers to ask besides the relay, separated by commas.
pub const STUN: &str = "PEER_STUN";
/// `0` or `false`: no search for paths through hard NATs.
pub const HARD_NAT_SEARCH: &str = "PEER_HARD_NAT_SEARCH";
/// The folder with identity, jobs and transfers.
pub const STATE_DIR: &str = "PEER_STATE_DIR";
/// The configuration file.
pub const CONFIG: &str = "PEER_CONFIG";
/// Address that `peer up` lets its relay listen on.
pub const BIND: &str = "PEER_BIND";
/// What to log, as in `info` or `peerfleet_peer=debug`.
pub const LOG: &str = "PEER_LOG";
/// Any value: no colours (<https://no-color.org>).
pub const NO_COLOR: &str = "NO_COLOR";
/// The user's home.
pub const HOME: &str = "HOME";
/// Where state folders go; `$HOME/.local/state` if unset.
pub const XDG_STATE_HOME: &str = "XDG_STATE_HOME";
/// Where configuration goes; `$HOME/.config` if unset.
pub const XDG_CONFIG_HOME: &str = "XDG_CONFIG_HOME";
/// Where sockets go; the state folder if unset.
pub const XDG_RUNTIME_DIR: &str = "XDG_RUNTIME_DIR";

const ALL: [&str; 30] = [
    TOKEN,
    TOKEN_FILE,
    RELAY,
    PROXY,
    CA_FILE,
    HTTPS_PROXY[0],
    HTTPS_PROXY[1],
    HTTP_PROXY[0],
    HTTP_PROXY[1],
    ALL_PROXY[0],
    ALL_PROXY[1],
    NO_PROXY[0],
    NO_PROXY[1],
    ROOM,
    NAME,
    TAGS,
    MODE,
    NO_EXEC,
    PORT_MAPPING,
    STUN,
    HARD_NAT_SEARCH,
    STATE_DIR,
    CONFIG,
    BIND,
    LOG,
    NO_COLOR,
    HOME,
    XDG_STATE_HOME,
    XDG_CONFIG_HOME,
    XDG_RUNTIME_DIR,
];

/// The variables above, as they stood when the program started.
#[derive(Clone, Default)]
pub struct Env(BTreeMap<&'static str, OsString>);

impl Env {
    /// Those of this process.
    pub fn of_process() -> Self {
        Self::from_source(|name| std::env::var_os(name))
    }

    /// Those that `source` gives.
    pub fn from_source(source: impl Fn(&str) -> Option<OsString>) -> Self {
        Self(ALL.iter().filter_map(|name| Some((*name, source(name).filter(|value| !value.is_empty())?))).collect())
    }

    /// The text of a variable, if set.
    ///
    /// # Errors
    /// If it is set to something that is not UTF-8; the value is not repeated, as it may be a secret.
    pub fn text(&self, name: &'static str) -> Result<Option<String>> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        value.to_str().map(|text| Some(text.to_owned())).ok_or_else(|| {
            Failure::fixable(format!("cannot read {name}"))
                .cause("its value is not UTF-8")
                .hint(format!("set {name} to plain text"))
        })
    }

    /// The path in a variable, if set.
    pub fn path(&self, name: &'static str) -> Option<PathBuf> {
        self.0.get(name).map(PathBuf::from)
    }

    /// Whether a variable is set.
    pub fn is_set(&self, name: &'static str) -> bool {
        self.0.contains_key(name)
    }

    /// The base folder in `variable`, else `beneath` the home. As the XDG specification has it, a relative one is ignored.
    pub fn xdg(&self, variable: &'static str, beneath: &str) -> Option<PathBuf> {
        let absolute = |path: &PathBuf| path.is_absolute();
        self.path(variable).filter(absolute).or_else(|| self.path(HOME).filter(absolute).map(|home| home.join(beneath)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_counts_as_unset() {
        let env = Env::from_source(|name| (name == ROOM).then(OsString::new));
        assert_eq!(env.text(ROOM), Ok(None));
    }

    #[test]
    fn a_relative_base_folder_is_ignored() {
        let env = Env::from_source(|name| match name {
            XDG_STATE_HOME => Some("here".into()),
            HOME => Some("/home/u".into()),
            _ => None,
        });
        assert_eq!(env.xdg(XDG_STATE_HOME, ".local/state"), Some("/home/u/.local/state".into()));
    }
}
