//! `peer fleet …`: the same on many hosts.

use clap::{Args, Subcommand};

use super::context::Context;
use crate::failure::Result;

mod exec;
mod fold;

/// Do something on many hosts at once
#[derive(Debug, Args)]
#[command(after_help = exec::EXAMPLES)]
pub(super) struct Fleet {
    #[command(subcommand)]
    command: FleetCommand,
}

#[derive(Debug, Subcommand)]
enum FleetCommand {
    Exec(exec::Exec),
}

impl Fleet {
    pub(super) async fn run(self, context: &Context) -> Result<u8> {
        match self.command {
            FleetCommand::Exec(exec) => exec.run(context).await,
        }
    }
}
