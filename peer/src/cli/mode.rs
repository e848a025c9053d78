//! `peer mode`: what this machine lets others do, now and at the next start.

use clap::Args;
use serde_json::json;

use super::context::Context;
use crate::{
    client::Client,
    config::{Layer, MODE_FILE},
    failure::Result,
};

/// Show or set what this machine lets others do
///
/// plan: look, change nothing. edit: write files too. bypass: run commands too. disabled: nothing. Only this machine's
/// own user can set it; a peer that runs takes it at once, and it is kept for the next start.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Mode {
    /// plan, edit, bypass or disabled; without it the mode is shown
    mode: Option<peerfleet_proto::presence::Mode>,
}

const EXAMPLES: &str = "\
Examples:
  peer mode             show it, and who set it
  peer mode bypass      let the others run commands here
  peer mode disabled    let them do nothing at all";

impl Mode {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        let config = context.config(Layer::default())?;
        let daemon = Client::daemon(&config).await?;
        let (mode, origin) = match (self.mode, &daemon) {
            (None, None) => (config.mode.value, config.mode.origin.to_string()),
            (None, Some(daemon)) => {
                let status = daemon.status().await?;
                (status.mode, status.mode_origin)
            }
            (Some(mode), daemon) => {
                config.state.write(MODE_FILE, &format!("{mode}\n"))?;
                let overridden = match daemon {
                    Some(daemon) => daemon.set_mode(mode).await?.overridden_by,
                    None => config.mode.overriding().map(str::to_owned),
                };
                if let Some(by) = overridden {
                    context.ui.warn(&format!("{by} sets the mode again when the peer starts: change it there too"));
                }
                (mode, "peer mode".to_owned())
            }
        };
        if context.ui.json {
            let running = daemon.is_some();
            context.ui.json_line(&json!({ "mode": mode.to_string(), "origin": origin, "running": running }))?;
        } else {
            context.ui.line(&format!("{mode}  ({origin})"))?;
            if daemon.is_none() {
                context.ui.note("no peer runs here now; this holds when it starts");
            }
        }
        Ok(0)
    }
}
