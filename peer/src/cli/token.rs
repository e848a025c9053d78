//! `peer token new`: a token that nobody can guess.

use clap::{Args, Subcommand};
use serde_json::json;

use super::context::Context;
use crate::{failure::Result, random::SystemRandom};

/// Make tokens; whoever holds a room's token is in the room
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Token {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Print a new token of 256 random bits
    #[command(after_help = EXAMPLES)]
    New,
}

const EXAMPLES: &str = "\
Examples:
  peer token new
  (umask 077; peer token new > token); peer run --token-file token";

impl Token {
    pub(super) fn run(self, context: &Context) -> Result<u8> {
        let TokenCommand::New = self.command;
        let token = peerfleet_proto::token::Token::generate(&mut SystemRandom).reveal();
        if context.ui.json {
            context.ui.json_line(&json!({ "token": token.as_str() }))?;
        } else {
            context.ui.line(&token)?;
        }
        Ok(0)
    }
}
