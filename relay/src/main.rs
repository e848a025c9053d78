//! The `relay` binary.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use peerfleet_relay::cli::Cli;

fn main() -> ExitCode {
    Cli::parse().run()
}
