//! The command line: the tree of commands, and the way from its arguments to an exit code.
//!
//! Each command is a file of this module: its arguments with their help, then what it does.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::{
    config::{ProxyChoice, RelayUrl, RoomName, TokenText},
    env::{self, Env},
    failure::Result,
    mesh::InvalidProxy,
    ui::Ui,
};

mod cancel;
mod completions;
mod context;
mod doctor;
mod exec;
mod fleet;
mod id;
mod jobs;
mod logs;
mod ls;
mod mode;
mod output;
mod run;
mod send_file;
mod signals;
mod span;
mod status;
mod token;
mod up;
mod usage;

use context::Context;

/// Time for what still runs in the background when a command is done.
const BACKGROUND_GRACE: Duration = Duration::from_millis(100);

/// Several machines as one: run commands on them, move files between them, from anywhere
#[derive(Debug, Parser)]
#[command(name = "peer", version, max_term_width = 100, disable_help_subcommand = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  peer up                                             start a relay and this machine's peer
  PEER_TOKEN=pft1-… peer run --relay ws://192.168.1.5:8080    join from another machine
  peer run --relay wss://example.net/fleet --token-file ./token    likewise, by TLS on port 443
  peer ls                                             who is there
  peer doctor web-1                                   how it is reached, and why not better
  peer exec web-1 -- uname -a                         run a command on one host
  peer fleet exec --target 'web & os:linux' -- uptime      run it on many
  peer send-file ./site.tar web-1:/srv/               send a file";

// Not a doc comment: clap would show it in place of the description of the command that has these flags.
// What holds for every command.
#[derive(Debug, Clone, Default, Args)]
struct Global {
    /// Relay to go by [env: PEER_RELAY] [default: ws://127.0.0.1:8080]
    #[arg(long, global = true, value_name = "URL", help_heading = "Connection")]
    relay: Option<RelayUrl>,
    /// HTTP proxy to reach the relay through, as in http://HOST:PORT, or `none` [env: PEER_PROXY] [default: HTTPS_PROXY,
    /// HTTP_PROXY, ALL_PROXY and NO_PROXY]
    #[arg(long, global = true, value_name = "URL", help_heading = "Connection", value_parser = proxy)]
    proxy: Option<ProxyFlag>,
    /// PEM file of certificate authorities to trust besides the system's [env: PEER_CA_FILE]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Connection")]
    ca_file: Option<PathBuf>,
    /// Room to be in [env: PEER_ROOM] [default: home]
    #[arg(long, global = true, value_name = "NAME", help_heading = "Connection")]
    room: Option<RoomName>,
    /// The room's token; other users of this machine can see it, so rather use --token-file or PEER_TOKEN
    #[arg(long, global = true, value_name = "TOKEN", help_heading = "Connection", value_parser = token_text)]
    token: Option<TokenText>,
    /// File whose first line is the room's token [env: PEER_TOKEN_FILE]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Connection")]
    token_file: Option<PathBuf>,
    /// Folder with this machine's identity and records [env: PEER_STATE_DIR] [default: ~/.local/state/peerfleet]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Connection")]
    state_dir: Option<PathBuf>,
    /// Configuration file [env: PEER_CONFIG] [default: ~/.config/peerfleet/config.toml]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Connection")]
    config: Option<PathBuf>,
    /// Print data as JSON
    #[arg(long, global = true, help_heading = "Output")]
    json: bool,
    /// Say nothing but errors
    #[arg(short, long, global = true, help_heading = "Output")]
    quiet: bool,
    /// Say more; twice: say how
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Output")]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::Up),
    Run(run::Run),
    Ls(ls::Ls),
    Status(status::Status),
    Doctor(doctor::Doctor),
    Token(token::Token),
    Id(id::Id),
    Mode(mode::Mode),
    Exec(exec::Exec),
    Jobs(jobs::Jobs),
    Logs(logs::Logs),
    Cancel(cancel::Cancel),
    Fleet(fleet::Fleet),
    SendFile(send_file::SendFile),
    Completions(completions::Completions),
}

/// Does what this process's command line says.
pub fn main() -> ExitCode {
    let env = Env::of_process();
    let no_colour = env.is_set(env::NO_COLOR);
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::report(&error, &Cli::command(), no_colour),
    };
    let ui = Ui::new(cli.global.json, cli.global.quiet, cli.global.verbose, no_colour);
    let code = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => {
            let code = runtime.block_on(run(cli, env, ui));
            runtime.shutdown_timeout(BACKGROUND_GRACE);
            code
        }
        Err(error) => Err(crate::failure::Failure::fixable("cannot start threads").cause(error)),
    };
    ExitCode::from(code.unwrap_or_else(|failure| {
        ui.fail(&failure);
        failure.exit_code()
    }))
}

async fn run(cli: Cli, env: Env, ui: Ui) -> Result<u8> {
    let context = Context::new(cli.global, env, ui);
    match cli.command {
        Command::Up(up) => up.run(&context).await,
        Command::Run(run) => run.run(&context).await,
        Command::Ls(ls) => ls.run(&context).await,
        Command::Status(status) => status.run(&context).await,
        Command::Doctor(doctor) => doctor.run(&context).await,
        Command::Token(token) => token.run(&context),
        Command::Id(id) => id.run(&context),
        Command::Mode(mode) => mode.run(&context).await,
        Command::Exec(exec) => exec.run(&context).await,
        Command::Jobs(jobs) => jobs.run(&context).await,
        Command::Logs(logs) => logs.run(&context).await,
        Command::Cancel(cancel) => cancel.run(&context).await,
        Command::Fleet(fleet) => fleet.run(&context).await,
        Command::SendFile(send_file) => send_file.run(&context).await,
        Command::Completions(completions) => completions.run(&context, Cli::command()),
    }
}

/// What `--proxy` says. Its fault is told later, because the parser would repeat the text, which may hold a password.
type ProxyFlag = std::result::Result<ProxyChoice, InvalidProxy>;

fn proxy(text: &str) -> std::result::Result<ProxyFlag, std::convert::Infallible> {
    Ok(text.parse())
}

fn token_text(text: &str) -> std::result::Result<TokenText, std::convert::Infallible> {
    Ok(text.to_owned().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_token_on_the_command_line_is_not_printed() {
        let cli = Cli::try_parse_from(["peer", "ls", "--token", "hunter2"]).unwrap();
        assert!(!format!("{cli:?}").contains("hunter2"));
    }
}
