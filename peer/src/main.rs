//! The `peer` program: reads its command line, does what it says, ends with the right exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    peerfleet_peer::cli::main()
}
