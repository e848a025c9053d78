//! `peer completions`: what a shell needs to complete our words.

use clap::Args;
use clap_complete::Shell;

use super::context::Context;
use crate::failure::Result;

/// Print completions for a shell
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Completions {
    /// Which shell
    shell: Shell,
}

const EXAMPLES: &str = "\
Examples:
  peer completions bash > ~/.local/share/bash-completion/completions/peer
  peer completions zsh > ~/.zfunc/_peer
  peer completions fish > ~/.config/fish/completions/peer.fish";

impl Completions {
    pub(super) fn run(self, context: &Context, mut command: clap::Command) -> Result<u8> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command, "peer", &mut script);
        context.ui.line(String::from_utf8_lossy(&script).trim_end())?;
        Ok(0)
    }
}
