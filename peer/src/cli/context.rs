//! What every command starts from: how to speak, the environment, the global flags.

use peerfleet_proto::token::Token;
use tracing_subscriber::EnvFilter;

use super::Global;
use crate::{
    client::{self, Client},
    config::{Config, Layer, ProxyChoice},
    env::{self, Env},
    failure::{Failure, Result},
    ui::Ui,
};

/// What every command starts from.
pub(super) struct Context {
    pub(super) ui: Ui,
    pub(super) env: Env,
    global: Global,
}

impl Context {
    pub(super) fn new(global: Global, env: Env, ui: Ui) -> Self {
        if global.token.is_some() {
            ui.detail("other users of this machine can see --token in the list of processes; --token-file hides it");
        }
        if matches!(&global.proxy, Some(Ok(ProxyChoice::Through(proxy))) if proxy.has_credentials()) {
            ui.detail("other users of this machine can see --proxy in the list of processes; PEER_PROXY hides it");
        }
        Self { ui, env, global }
    }

    /// The configuration, with these flags of the command besides the global ones.
    pub(super) fn config(&self, flags: Layer) -> Result<Config> {
        let global = &self.global;
        let proxy = global.proxy.clone().transpose().map_err(|fault| {
            Failure::usage("cannot use --proxy").cause(fault).hint("`--proxy none` goes without one")
        })?;
        let flags = Layer {
            relay: global.relay.clone(),
            proxy,
            ca_file: global.ca_file.clone(),
            room: global.room.clone(),
            token: global.token.clone(),
            token_file: global.token_file.clone(),
            state_dir: global.state_dir.clone(),
            ..flags
        };
        Config::resolve(&flags, global.config.as_deref(), &self.env)
    }

    /// The way to the mesh: through the daemon, or by an instance of our own if a flag names another room, relay or way.
    pub(super) async fn client(&self) -> Result<Client> {
        self.reach(false).await
    }

    /// The same for who looks at the network around, which takes longer.
    pub(super) async fn examiner(&self) -> Result<Client> {
        self.reach(true).await
    }

    async fn reach(&self, looks: bool) -> Result<Client> {
        let config = self.config(Layer::default())?;
        self.log("off")?;
        if !self.names_a_room()
            && let Some(daemon) = Client::daemon(&config).await?
        {
            self.ui.detail("going through the peer that runs here");
            return Ok(Client::Door(daemon));
        }
        let token = self.token(&config)?;
        self.ui.detail("joining the room for this command alone");
        if looks { Client::join_to_look(&config, token).await } else { Client::join(&config, token).await }
    }

    /// The room's token; warns of one that somebody could guess, or read.
    pub(super) fn token(&self, config: &Config) -> Result<Token> {
        if let Some((path, mode)) = config.exposed_token_file() {
            let path = path.display();
            self.ui
                .warn(&format!("others may read the token in {path} (its mode is {mode:03o}): run `chmod 600 {path}`"));
        }
        let token = client::token(config)?;
        if token.is_weak() {
            self.ui.warn("whoever guesses this token is in the room, and it looks guessable: `peer token new` makes a better one");
        }
        Ok(token)
    }

    /// Whether a flag names a room to join, or the way to it.
    pub(super) fn names_a_room(&self) -> bool {
        let Global { relay, proxy, ca_file, room, token, token_file, .. } = &self.global;
        let way = relay.is_some() || proxy.is_some() || ca_file.is_some();
        way || room.is_some() || token.is_some() || token_file.is_some()
    }

    /// Whether a flag names a relay.
    pub(super) fn names_a_relay(&self) -> bool {
        self.global.relay.is_some()
    }

    /// Whether a flag names a proxy or authorities.
    pub(super) fn names_a_way(&self) -> bool {
        self.global.proxy.is_some() || self.global.ca_file.is_some()
    }

    /// Starts logging to standard error; what, is told by `PEER_LOG`, else by -v, else by the command.
    pub(super) fn log(&self, by_default: &str) -> Result<()> {
        let verbose = match self.ui.verbose {
            0 => by_default,
            1 => "info",
            _ => "debug",
        };
        let filter = self.env.text(env::LOG)?.unwrap_or_else(|| verbose.to_owned());
        let filter = EnvFilter::try_new(&filter).map_err(|fault| {
            Failure::fixable(format!("cannot use {}", env::LOG))
                .cause(fault)
                .hint("write it as in `info` or `peerfleet_peer=debug`")
        })?;
        let colours = self.ui.colours_words();
        // A second start, as in tests, keeps the first.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(colours)
            .try_init();
        Ok(())
    }
}
