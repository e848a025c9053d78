//! `peer id`: who this machine is.

use clap::Args;
use serde_json::json;

use super::context::Context;
use crate::{config::Layer, failure::Result, identity::Identity};

/// Print this machine's identity, as others know it; made on first use
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Id {
    /// Print the first characters only, as `peer ls` does
    #[arg(long)]
    short: bool,
}

const EXAMPLES: &str = "\
Examples:
  peer id
  peer id --short
  peer id --state-dir ~/second-peer     of a second peer on this machine";

impl Id {
    pub(super) fn run(self, context: &Context) -> Result<u8> {
        let config = context.config(Layer::default())?;
        let peer = Identity::load_or_create(&config.state)?.peer();
        if context.ui.json {
            context.ui.json_line(&json!({ "id": peer.to_string(), "short": peer.short() }))?;
        } else if self.short {
            context.ui.line(&peer.short())?;
        } else {
            context.ui.line(&peer.to_string())?;
        }
        Ok(0)
    }
}
