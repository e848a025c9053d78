//! `peer run`: this machine's peer, until it is told to stop.

use clap::Args;
use peerfleet_proto::presence::Mode;

use super::context::Context;
use crate::{
    config::{Config, HostName, Layer, StunServer, Tag},
    daemon::Daemon,
    failure::Result,
};

/// Run this machine's peer: others see it, and may ask of it what its mode allows
///
/// It reconnects for ever, also to a relay that is not there yet. Other `peer` commands on this machine go through it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Run {
    #[command(flatten)]
    pub(super) host: HostFlags,
}

const EXAMPLES: &str = "\
Examples:
  PEER_TOKEN=pft1-… peer run --relay ws://192.168.1.5:8080 --room home
  peer run --token-file /etc/peerfleet/token --name web-1 --tags web,eu --mode bypass
  peer run --relay wss://example.net/fleet --ca-file ./ca.pem    by TLS, with a certificate of your own
  PEER_PROXY=http://user:secret@proxy:3128 peer run --relay wss://example.net    out through a proxy
  peer run --state-dir ~/second-peer --name second      a second peer on this machine";

// Flags of a peer that others see. No doc comment: clap would show it as the description of the command.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct HostFlags {
    /// What this machine is called in the room [env: PEER_NAME] [default: the host name]
    #[arg(long, value_name = "NAME")]
    name: Option<HostName>,
    /// Words by which it can be chosen, separated by commas [env: PEER_TAGS]
    #[arg(long, value_name = "TAG,…", value_delimiter = ',')]
    tags: Option<Vec<Tag>>,
    /// What it lets others do: plan, edit, bypass or disabled [env: PEER_MODE] [default: plan]
    #[arg(long, value_name = "MODE")]
    mode: Option<Mode>,
    /// Never run commands of others, whatever the mode [env: PEER_NO_EXEC]
    #[arg(long)]
    no_exec: bool,
    /// Do not ask the router to forward a port (PCP, NAT-PMP, UPnP) [env: PEER_PORT_MAPPING=0]
    #[arg(long)]
    no_port_mapping: bool,
    /// STUN servers to ask besides the relay, separated by commas [env: PEER_STUN]
    #[arg(long, value_name = "HOST:PORT,…", value_delimiter = ',')]
    stun: Option<Vec<StunServer>>,
    /// Never search for a path through a hard NAT, which takes some 2,000 packets [env: PEER_HARD_NAT_SEARCH=0]
    #[arg(long)]
    no_hard_nat_search: bool,
}

impl HostFlags {
    pub(super) fn layer(&self) -> Layer {
        Layer {
            name: self.name.clone(),
            tags: self.tags.clone(),
            mode: self.mode,
            no_exec: self.no_exec.then_some(true),
            port_mapping: self.no_port_mapping.then_some(false),
            stun: self.stun.clone(),
            hard_nat_search: self.no_hard_nat_search.then_some(false),
            ..Layer::default()
        }
    }
}

impl Run {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let config = context.config(self.host.layer())?;
        context.log("info")?;
        let lock = Daemon::lock(&config)?;
        let token = context.token(&config)?;
        let daemon = Daemon::start(&config, token, &context.env, lock).await?;
        announce(context, &config, &daemon);
        daemon.run().await;
        Ok(0)
    }
}

/// Says as what this machine goes into which room.
pub(super) fn announce(context: &Context, config: &Config, daemon: &Daemon) {
    let me = daemon.machine().me();
    let proxy = config.network.proxy_for(&config.relay.value).ok().flatten();
    let through = proxy.map(|proxy| format!(" through {} ({})", proxy.value, proxy.origin)).unwrap_or_default();
    context.ui.note(&format!(
        "`{}` ({}) goes into room `{}` on {}{through}, mode {} ({})",
        config.name.value,
        me.peer.short(),
        config.room.value,
        config.relay.value,
        config.mode.value,
        config.mode.origin,
    ));
}
