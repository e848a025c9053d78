//! What a user set, where, and what follows from it.
//!
//! In: flags, environment, `peer mode`'s file, the configuration file. Out: [`Config`], in which every value knows its
//! origin. Flag goes before environment, before `peer mode` (for the mode), before file, before default. It never
//! replaces something broken by a default: a file that does not read is an error with line and column.
//! [`Layer`] (raw, one per source) -> [`Config`] (resolved). Bound: files of [`MAX_SMALL_FILE_BYTES`].

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use peerfleet_proto::{id::PeerId, presence::Mode};
use serde::{Deserialize, Deserializer, de};

use crate::{
    env::{self, Env},
    failure::{Failure, Result},
    state::{self, MAX_SMALL_FILE_BYTES, StateDir},
};

mod bypass;
pub mod network;
pub mod value;

pub use crate::mesh::{PathConfig, ProxyChoice, RelayUrl, StunServer};
pub use network::Network;
pub use value::{HostName, RoomName, Tag, TokenText};

/// The relay of this very machine: nothing else is contacted unless the user named it.
pub const DEFAULT_RELAY: &str = "ws://127.0.0.1:8080";

/// The room if none is named; it takes the token to be in it.
pub const DEFAULT_ROOM: &str = "home";

/// The name of the file in the state folder in which `peer mode` keeps its word.
pub const MODE_FILE: &str = "mode";

/// What one source says. Absent is not the same as default.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Layer {
    /// Where the relay is.
    #[serde(deserialize_with = "parsed")]
    pub relay: Option<RelayUrl>,
    /// The proxy to reach it through, or none.
    #[serde(deserialize_with = "parsed")]
    pub proxy: Option<ProxyChoice>,
    /// A file with certificate authorities to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// What the room is called.
    #[serde(deserialize_with = "parsed")]
    pub room: Option<RoomName>,
    /// The room's token.
    #[serde(deserialize_with = "token_text")]
    pub token: Option<TokenText>,
    /// A file whose first line is the room's token.
    pub token_file: Option<PathBuf>,
    /// What this machine is called.
    #[serde(deserialize_with = "parsed")]
    pub name: Option<HostName>,
    /// This machine's tags.
    #[serde(deserialize_with = "parsed_each")]
    pub tags: Option<Vec<Tag>>,
    /// What this machine lets others do.
    #[serde(deserialize_with = "parsed")]
    pub mode: Option<Mode>,
    /// Whether commands of others are never run.
    pub no_exec: Option<bool>,
    /// Whether the router may be asked to forward a port.
    pub port_mapping: Option<bool>,
    /// STUN servers to ask besides the relay.
    #[serde(deserialize_with = "parsed_each")]
    pub stun: Option<Vec<StunServer>>,
    /// Whether paths through hard NATs are searched for.
    pub hard_nat_search: Option<bool>,
    /// The folder with identity, jobs and transfers.
    pub state_dir: Option<PathBuf>,
    /// Single identities with less or more than the mode; in a file only.
    #[serde(deserialize_with = "access")]
    pub access: BTreeMap<PeerId, Mode>,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag(&'static str),
    /// An environment variable.
    Environment(&'static str),
    /// `peer mode`.
    ModeCommand,
    /// The configuration file.
    File(PathBuf),
    /// Nobody said anything.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => f.write_str(name),
            Self::Environment(name) => f.write_str(name),
            Self::ModeCommand => f.write_str("peer mode"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A value and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sourced<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub origin: Origin,
}

impl<T> Sourced<T> {
    /// The flag or variable that will set the value again at every start, if one did.
    pub fn overriding(&self) -> Option<&'static str> {
        match self.origin {
            Origin::Flag(name) | Origin::Environment(name) => Some(name),
            Origin::ModeCommand | Origin::File(_) | Origin::Default => None,
        }
    }
}

/// Where the token is to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// Here.
    Text(TokenText),
    /// In the first line of this file.
    File(PathBuf),
}

/// What the sources say together.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the relay is.
    pub relay: Sourced<RelayUrl>,
    /// How to get there.
    pub network: Network,
    /// What the room is called.
    pub room: Sourced<RoomName>,
    /// Where the token is to be had, if anybody said.
    pub token: Option<Sourced<TokenSource>>,
    /// What this machine is called.
    pub name: Sourced<HostName>,
    /// This machine's tags, sorted, each once.
    pub tags: Sourced<Vec<Tag>>,
    /// What this machine lets others do.
    pub mode: Sourced<Mode>,
    /// Whether commands of others are never run.
    pub no_exec: bool,
    /// What is done to find direct paths.
    pub paths: PathConfig,
    /// Single identities with less or more than the mode.
    pub access: BTreeMap<PeerId, Mode>,
    /// The state folder.
    pub state: StateDir,
}

impl Config {
    /// Resolves flags, environment, files and defaults; makes the state folder where it is missing.
    ///
    /// # Errors
    /// If any source does not read, or contradicts itself.
    pub fn resolve(flags: &Layer, config_flag: Option<&Path>, env: &Env) -> Result<Self> {
        let variables = from_environment(env)?;
        let (file, path) = from_file(config_flag, env)?;
        let layers = [
            (flags, Source::Flags),
            (&variables, Source::Environment),
            (&file, Source::File(path.as_deref().unwrap_or(Path::new("")))),
        ];
        let state = open_state(&layers, env)?;
        Ok(Self {
            relay: pick(&layers, |layer| layer.relay.clone(), "--relay", env::RELAY)
                .unwrap_or_else(|| by_default(DEFAULT_RELAY.parse().expect("the default relay is a relay's URL"))),
            network: Network::new(&layers, env),
            room: pick(&layers, |layer| layer.room.clone(), "--room", env::ROOM)
                .unwrap_or_else(|| by_default(DEFAULT_ROOM.parse().expect("the default room has a room's name"))),
            token: token(&layers)?,
            name: pick(&layers, |layer| layer.name.clone(), "--name", env::NAME)
                .unwrap_or_else(|| by_default(system_name())),
            tags: tags(&layers),
            mode: mode(&layers, &state)?,
            no_exec: layers.iter().find_map(|(layer, _)| layer.no_exec).unwrap_or(false),
            paths: PathConfig {
                port_mapping: layers.iter().find_map(|(layer, _)| layer.port_mapping).unwrap_or(true),
                stun: layers.iter().find_map(|(layer, _)| layer.stun.clone()).unwrap_or_default(),
                hard_nat_search: layers.iter().find_map(|(layer, _)| layer.hard_nat_search).unwrap_or(true),
            },
            access: file.access.clone(),
            state,
        })
    }

    /// The token's file and its permission bits, if others may read it.
    pub fn exposed_token_file(&self) -> Option<(&Path, u32)> {
        match self.token.as_ref().map(|token| &token.value) {
            Some(TokenSource::File(path)) => Some((path, state::readable_by_others(path)?)),
            Some(TokenSource::Text(_)) | None => None,
        }
    }

    /// Reads the token from where it is to be had; `None` if nobody said.
    ///
    /// # Errors
    /// If its file cannot be read. The failure never repeats the token.
    pub fn token_text(&self) -> Result<Option<TokenText>> {
        match self.token.as_ref().map(|token| &token.value) {
            None => Ok(None),
            Some(TokenSource::Text(text)) => Ok(Some(text.clone())),
            Some(TokenSource::File(path)) => read_token_file(path).map(Some),
        }
    }
}

/// The layers in the order of their weight, and what each is called.
type Layers<'a> = [(&'a Layer, Source<'a>); 3];

#[derive(Debug, Clone, Copy)]
enum Source<'a> {
    Flags,
    Environment,
    File(&'a Path),
}

impl Source<'_> {
    fn origin(self, flag: &'static str, variable: &'static str) -> Origin {
        match self {
            Self::Flags => Origin::Flag(flag),
            Self::Environment => Origin::Environment(variable),
            Self::File(path) => Origin::File(path.to_owned()),
        }
    }
}

fn pick<T>(
    layers: &Layers<'_>,
    field: impl Fn(&Layer) -> Option<T>,
    flag: &'static str,
    variable: &'static str,
) -> Option<Sourced<T>> {
    layers
        .iter()
        .find_map(|(layer, source)| Some(Sourced { value: field(layer)?, origin: source.origin(flag, variable) }))
}

fn by_default<T>(value: T) -> Sourced<T> {
    Sourced { value, origin: Origin::Default }
}

fn open_state(layers: &Layers<'_>, env: &Env) -> Result<StateDir> {
    let chosen = layers.iter().find_map(|(layer, _)| layer.state_dir.clone());
    let Some(path) = chosen.or_else(|| state::default_path(env)) else {
        return Err(Failure::fixable("there is no state folder")
            .cause("neither HOME nor XDG_STATE_HOME is set")
            .hint("name one with --state-dir or PEER_STATE_DIR"));
    };
    StateDir::open(&path)
}

fn token(layers: &Layers<'_>) -> Result<Option<Sourced<TokenSource>>> {
    for (layer, source) in layers {
        let (value, flag, variable) = match (&layer.token, &layer.token_file) {
            (None, None) => continue,
            (Some(text), None) => (TokenSource::Text(text.clone()), "--token", env::TOKEN),
            (None, Some(path)) => (TokenSource::File(path.clone()), "--token-file", env::TOKEN_FILE),
            (Some(_), Some(_)) => {
                let one = source.origin("--token", env::TOKEN);
                let other = source.origin("--token-file", env::TOKEN_FILE);
                return Err(Failure::usage("there are two tokens")
                    .cause(format!("both a token and a token file are given ({one}, {other})"))
                    .hint("give one of them"));
            }
        };
        return Ok(Some(Sourced { value, origin: source.origin(flag, variable) }));
    }
    Ok(None)
}

fn tags(layers: &Layers<'_>) -> Sourced<Vec<Tag>> {
    let mut tags =
        pick(layers, |layer| layer.tags.clone(), "--tags", env::TAGS).unwrap_or_else(|| by_default(Vec::new()));
    tags.value.sort();
    tags.value.dedup();
    tags
}

fn mode(layers: &Layers<'_>, state: &StateDir) -> Result<Sourced<Mode>> {
    let [flags, variables, file] = layers;
    let named = |layer: &(&Layer, Source<'_>)| {
        layer.0.mode.map(|value| Sourced { value, origin: layer.1.origin("--mode", env::MODE) })
    };
    if let Some(mode) = named(flags).or_else(|| named(variables)) {
        return Ok(mode);
    }
    if let Some(value) = stored_mode(state)? {
        return Ok(Sourced { value, origin: Origin::ModeCommand });
    }
    Ok(named(file).unwrap_or_else(|| by_default(Mode::Plan)))
}

/// The mode that `peer mode` stored, if any.
///
/// # Errors
/// If the file is there but holds no mode: guessing could let others do more than was meant.
pub fn stored_mode(state: &StateDir) -> Result<Option<Mode>> {
    let Some(text) = state.read(MODE_FILE)? else { return Ok(None) };
    text.trim().parse().map(Some).map_err(|fault| {
        Failure::fixable(format!("cannot use {}", state.path().join(MODE_FILE).display()))
            .cause(fault)
            .hint("run `peer mode plan` to set it anew")
    })
}

fn system_name() -> HostName {
    HostName::from_system(&rustix::system::uname().nodename().to_string_lossy())
}

fn from_environment(env: &Env) -> Result<Layer> {
    Ok(Layer {
        relay: variable(env, env::RELAY)?,
        proxy: variable(env, env::PROXY)?,
        ca_file: env.path(env::CA_FILE),
        room: variable(env, env::ROOM)?,
        token: env.text(env::TOKEN)?.map(TokenText::from),
        token_file: env.path(env::TOKEN_FILE),
        name: variable(env, env::NAME)?,
        tags: env.text(env::TAGS)?.map(|text| parse_tags(&text)).transpose().map_err(|fault| bad(env::TAGS, fault))?,
        mode: variable(env, env::MODE)?,
        no_exec: switch(env, env::NO_EXEC)?,
        port_mapping: switch(env, env::PORT_MAPPING)?,
        stun: env.text(env::STUN)?.map(|text| parse_each(&text)).transpose().map_err(|fault| bad(env::STUN, fault))?,
        hard_nat_search: switch(env, env::HARD_NAT_SEARCH)?,
        state_dir: env.path(env::STATE_DIR),
        access: BTreeMap::new(),
    })
}

fn variable<T: FromStr<Err: fmt::Display>>(env: &Env, name: &'static str) -> Result<Option<T>> {
    env.text(name)?.map(|text| text.parse()).transpose().map_err(|fault| bad(name, fault))
}

fn bad(name: &str, fault: impl fmt::Display) -> Failure {
    Failure::fixable(format!("cannot use {name}")).cause(fault).hint(format!("correct or unset {name}"))
}

fn switch(env: &Env, name: &'static str) -> Result<Option<bool>> {
    match env.text(name)?.as_deref() {
        None => Ok(None),
        Some("1" | "true" | "yes") => Ok(Some(true)),
        Some("0" | "false" | "no") => Ok(Some(false)),
        Some(_) => Err(bad(name, "it is neither true nor false")),
    }
}

/// Reads tags separated by commas; spaces around them do not count.
///
/// # Errors
/// If one of them is no tag.
pub fn parse_tags(text: &str) -> std::result::Result<Vec<Tag>, value::InvalidTag> {
    parse_each(text)
}

/// Reads words separated by commas; spaces around them do not count.
fn parse_each<T: FromStr>(text: &str) -> std::result::Result<Vec<T>, T::Err> {
    text.split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::parse).collect()
}

fn from_file(flag: Option<&Path>, env: &Env) -> Result<(Layer, Option<PathBuf>)> {
    let named = flag.map(Path::to_owned).or_else(|| env.path(env::CONFIG));
    let is_named = named.is_some();
    let usual = || env.xdg(env::XDG_CONFIG_HOME, ".config").map(|base| base.join("peerfleet").join("config.toml"));
    let Some(path) = named.or_else(usual) else { return Ok((Layer::default(), None)) };
    let bytes = match state::read_small_bytes(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !is_named => return Ok((Layer::default(), None)),
        Err(error) => {
            return Err(Failure::fixable(format!("cannot read configuration {}", path.display()))
                .cause(error)
                .hint("give another file with --config or PEER_CONFIG"));
        }
    };
    let layer = parse_file(&bytes, &path)?;
    if let Some(secret) = secret_in(&layer)
        && state::is_world_readable(&path)
    {
        return Err(Failure::fixable(format!("will not use {}", path.display()))
            .cause(format!("it holds {secret}, and everybody may read it"))
            .hint(format!("run `chmod 600 {}`, or keep that elsewhere (token-file, PEER_PROXY)", path.display())));
    }
    Ok((layer, Some(path)))
}

/// What a file says that not everybody may know.
fn secret_in(layer: &Layer) -> Option<&'static str> {
    let has_password = matches!(&layer.proxy, Some(ProxyChoice::Through(proxy)) if proxy.has_credentials());
    if layer.token.is_some() { Some("the token") } else { has_password.then_some("a proxy's password") }
}

fn parse_file(bytes: &[u8], path: &Path) -> Result<Layer> {
    let failed = |at: Option<(usize, usize)>, why: &str| {
        let at = at.map(|(line, column)| format!(":{line}:{column}")).unwrap_or_default();
        Failure::fixable(format!("cannot read configuration {}{at}", path.display()))
            .cause(why)
            .hint("correct that line; nothing was started")
    };
    let text = std::str::from_utf8(bytes).map_err(|fault| {
        let good = String::from_utf8_lossy(&bytes[..fault.valid_up_to()]);
        failed(Some(line_and_column(&good, good.len())), "what stands there is not UTF-8")
    })?;
    // The parser's own rendering quotes the line, which may hold the token.
    let place = |fault: &toml::de::Error| fault.span().map(|span| line_and_column(text, span.start));
    toml::from_str(text).map_err(|fault| failed(place(&fault), fault.message()))
}

/// Line and column, both from 1, of a byte in a text.
fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn read_token_file(path: &Path) -> Result<TokenText> {
    let text = state::read_small(path).map_err(|error| {
        Failure::fixable(format!("cannot read token file {}", path.display()))
            .cause(error)
            .hint(format!("make one with `umask 077; peer token new > FILE` ({MAX_SMALL_FILE_BYTES} bytes at most)"))
    })?;
    let text = zeroize::Zeroizing::new(text);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned().into())
}

fn parsed<'de, D, T>(deserializer: D) -> std::result::Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    String::deserialize(deserializer)?.parse().map(Some).map_err(de::Error::custom)
}

fn parsed_each<'de, D, T>(deserializer: D) -> std::result::Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(de::Error::custom)).collect::<std::result::Result<_, _>>().map(Some)
}

fn access<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<BTreeMap<PeerId, Mode>, D::Error> {
    let lines = BTreeMap::<AccessPeer, AccessMode>::deserialize(deserializer)?;
    Ok(lines.into_iter().map(|(peer, mode)| (peer.0, mode.0)).collect())
}

/// Who is in a line of `[access]`. A type of its own, as the parser then knows where in the file it is wrong.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct AccessPeer(PeerId);

impl<'de> Deserialize<'de> for AccessPeer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(|fault| de::Error::custom(format_args!("`{text}`: {fault}")))
    }
}

/// What they may do; likewise.
struct AccessMode(Mode);

impl<'de> Deserialize<'de> for AccessMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map(Self).map_err(de::Error::custom)
    }
}

fn token_text<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<TokenText>, D::Error> {
    String::deserialize(deserializer).map(|text| Some(text.into()))
}

#[cfg(test)]
mod tests;
