//! The `relay` binary.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use peerfleet_relay::cli::Cli;

fn main() -> ExitCode {
    Cli::read().map_or_else(|code| code, Cli::run)
}
