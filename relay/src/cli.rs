//! The command line of `relay`: serve, ask a relay how it is, print completions.
//!
//! In: arguments, environment, a configuration file. Out: an exit code; data on stdout, words and the log on stderr.
//! Never starts with a default where something that was written is wrong.
//! Parse -> read the file -> resolve -> serve until a signal -> drain; a second signal ends at once.
//! Exit codes: 0 done, 1 the user can fix it (or the relay that was asked is not healthy), 2 wrong usage, 70 our bug,
//! 141 nobody reads our output.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::{
    CommandFactory, Parser, Subcommand,
    error::{ContextKind, ContextValue, ErrorKind},
};
use clap_complete::Shell;
use tracing_subscriber::EnvFilter;

use crate::{
    Relay,
    config::{Config, FileFault, LogFormat, Options},
};

/// Time for a health check, from dialling to the last byte: below the 5 s that container engines commonly give it.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(3);

/// Longest answer to a health check that is read, in bytes: the counters are about 2 KiB.
const MAX_HEALTH_BYTES: u64 = 64 * 1024;

const EXAMPLES: &str = "\
Examples:
  relay                                       this machine only, port 8080
  relay --bind 0.0.0.0:8080 --bind [::]:8080  everybody, over IPv4 and IPv6
  RELAY_BIND=0.0.0.0:8080 relay               the same by environment
  relay --config /etc/peerfleet/relay.toml    options from a file: `idle-timeout = \"2m\"`
  relay health                                is it well? exit code 0 if so

A flag beats the environment, the environment beats the file, the file beats the default.";

/// Puts the peers of a room in touch and forwards what they seal for each other; it can read none of it
#[derive(Debug, Parser)]
#[command(name = "relay", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    serve: Serve,
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// Read options from this TOML file; names as the long flags have them
    #[arg(long, env = "RELAY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    options: Options,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask a relay how it is; exit code 0 if it is well
    #[command(after_help = "\
Examples:
  relay health                     the relay of this machine, as its environment or file binds it
  relay health 127.0.0.1:9000
  relay health http://relay.example.net:8080/health")]
    Health {
        /// Address or URL of the relay
        #[arg(value_name = "ADDR|URL")]
        target: Option<String>,

        #[command(flatten)]
        here: Here,
    },
    /// Print a script that completes this command in a shell
    #[command(after_help = "\
Examples:
  relay completions bash > /etc/bash_completion.d/relay
  relay completions fish > ~/.config/fish/completions/relay.fish")]
    Completions {
        /// Which shell
        shell: Shell,
    },
}

#[derive(Debug, clap::Args)]
struct Here {
    /// The address that the relay of this machine listens on
    #[arg(long, env = "RELAY_BIND", value_name = "ADDR", value_delimiter = ',')]
    bind: Option<Vec<SocketAddr>>,

    /// The file that the relay of this machine reads
    #[arg(long, env = "RELAY_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Something the user can set right.
struct Failure {
    what: String,
    cause: String,
    hint: &'static str,
}

/// Whoever read our output went away: 128 + SIGPIPE, as the shell reports it of other programs.
const EXIT_BROKEN_PIPE: u8 = 141;

impl Cli {
    /// Reads command line and environment.
    ///
    /// # Errors
    /// The code to end with, once help was printed or it was said what is wrong.
    pub fn read() -> Result<Self, ExitCode> {
        Self::try_parse().map_err(|fault| {
            if !fault.use_stderr() {
                // Nothing is left to be done if nobody reads the help.
                let _ = fault.print();
                return ExitCode::SUCCESS;
            }
            let (what, code) = blame(&fault, &std::env::args().collect::<Vec<_>>());
            let _ = writeln!(io::stderr(), "error: {what}\nhint: `relay --help` lists every option");
            ExitCode::from(code)
        })
    }

    /// Does what the command line says.
    pub fn run(self) -> ExitCode {
        let done = match self.command {
            None => self.serve.run().map(|()| None),
            Some(Command::Health { target, here }) => here.ask(target).map(Some),
            Some(Command::Completions { shell }) => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Self::command(), "relay", &mut script);
                Ok(Some(script))
            }
        };
        match done {
            Ok(None) => ExitCode::SUCCESS,
            Ok(Some(data)) => print(&data),
            Err(failure) => {
                let Failure { what, cause, hint } = failure;
                // Nothing is left to be done if stderr is closed.
                let _ = writeln!(io::stderr(), "error: {what}\ncause: {cause}\nhint: {hint}");
                ExitCode::from(1)
            }
        }
    }
}

fn print(data: &[u8]) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(data).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) if fault.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(EXIT_BROKEN_PIPE),
        Err(fault) => {
            let hint = "check the disk or program that output goes to";
            let _ = writeln!(io::stderr(), "error: cannot write to standard output\ncause: {fault}\nhint: {hint}");
            ExitCode::from(1)
        }
    }
}

/// What is wrong, and the exit code: 2 for the command line, 1 for a variable, which is then named in place of the flag
/// that nobody wrote.
fn blame(fault: &clap::Error, arguments: &[String]) -> (String, u8) {
    let text = fault.to_string();
    let first = text.lines().next().unwrap_or_default();
    let what = first.strip_prefix("error: ").unwrap_or(first);
    let Some(ContextValue::String(argument)) = fault.get(ContextKind::InvalidArg) else {
        return (what.to_owned(), 2);
    };
    let flag = argument.split([' ', '=', '[']).next().unwrap_or_default();
    let is_given = |given: &String| given == flag || given.starts_with(&format!("{flag}="));
    let is_value = fault.kind() == ErrorKind::ValueValidation || fault.kind() == ErrorKind::InvalidValue;
    if !is_value || !flag.starts_with("--") || arguments.iter().any(is_given) {
        return (what.to_owned(), 2);
    }
    let variable = format!("RELAY_{}", flag.trim_start_matches('-').replace('-', "_").to_uppercase());
    (what.replace(&format!("'{argument}'"), &variable), 1)
}

/// The configuration in force: what is set on the command line or in the environment, then the file, then defaults.
fn resolve(options: Options, file: Option<PathBuf>) -> Result<(Options, Config), Failure> {
    let beneath = match &file {
        Some(path) => Options::read(path).map_err(|fault| Failure {
            what: "the configuration file cannot be used".into(),
            cause: fault.to_string(),
            hint: match fault {
                FileFault::Unreadable { .. } => "make it, let this user read it, or name another one with --config",
                FileFault::Broken { .. } => "correct that line; `relay --help` lists every option",
            },
        })?,
        None => Options::default(),
    };
    let options = options.over(beneath);
    let config = options.resolve().map_err(|fault| Failure {
        what: "the configuration makes no sense".into(),
        cause: fault.to_string(),
        hint: "correct the flag, the RELAY_… variable or the line of the file that sets it",
    })?;
    Ok((options, config))
}

impl Serve {
    fn run(self) -> Result<(), Failure> {
        let (options, config) = resolve(self.options, self.config)?;
        start_log(&options)?;
        more_files();
        keep_freed_memory();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let served = runtime.context("cannot start the runtime").and_then(|runtime| runtime.block_on(serve(config)));
        served.map_err(|fault| Failure {
            what: "the relay cannot run".into(),
            cause: format!("{fault:#}"),
            hint: "is another program on that port? `--bind` takes another address, port 0 any that is free",
        })
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    // First of all: whoever reads in the log that the relay listens may send one.
    let mut signals = Signals::new().context("cannot listen for signals")?;
    let relay = Relay::bind(config)?;
    let handle = relay.handle();
    let mut run = std::pin::pin!(relay.run());
    tokio::select! {
        () = &mut run => return Ok(()),
        () = signals.next() => handle.shutdown(),
    }
    tokio::select! {
        () = run => {}
        () = signals.next() => tracing::warn!("second signal: stopping at once"),
    }
    Ok(())
}

/// The signals that ask a process to end. Listened to from the beginning, so that none is missed between two waits.
struct Signals {
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        #[cfg(unix)]
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            #[cfg(unix)]
            interrupt: signal(SignalKind::interrupt())?,
            #[cfg(unix)]
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
        #[cfg(not(unix))]
        let _ = tokio::signal::ctrl_c().await;
    }
}

fn start_log(options: &Options) -> Result<(), Failure> {
    let level = options.log_level.as_deref().unwrap_or("info");
    let filter = EnvFilter::try_new(level).map_err(|fault| Failure {
        what: format!("`{level}` is no log level"),
        cause: fault.to_string(),
        hint: "use error, warn, info, debug, trace or a filter such as info,peerfleet_relay=debug",
    })?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match options.log_format.unwrap_or_default() {
        LogFormat::Text => log.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    started.map_err(|fault| Failure {
        what: "the log cannot be started".into(),
        cause: fault.to_string(),
        hint: "this is a bug; please report it",
    })
}

/// One connection is one file: takes all that the system grants, since common defaults (1,024) are below our limits.
fn more_files() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum;
        if let Err(cause) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%cause, "cannot raise the number of open files");
        }
    }
}

/// Makes the allocator of glibc keep up to 2 MiB of freed memory in place of giving it back at once: a busy relay frees and
/// takes frames of 64 KiB some thousand times a second, and each time the system would take its pages and clear
/// others (measured: a third of the relay's work). glibc keeps twice the largest block that was mapped and freed (mallopt(3),
/// M_MMAP_THRESHOLD); other allocators take no harm.
fn keep_freed_memory() {
    const LARGE_BYTES: usize = 1024 * 1024;
    drop(std::hint::black_box(Vec::<u8>::with_capacity(LARGE_BYTES)));
}

impl Here {
    /// What the relay says of itself, as one line.
    fn ask(self, target: Option<String>) -> Result<Vec<u8>, Failure> {
        let targets = match target {
            Some(target) => vec![target],
            None => {
                let (_, config) = resolve(Options { bind: self.bind, ..Options::default() }, self.config)?;
                config.bind.first().map(|bound| reachable(*bound)).unwrap_or_default()
            }
        };
        let failure = |fault: anyhow::Error| Failure {
            what: format!("the relay at {} is not well", targets.join(" or ")),
            cause: format!("{fault:#}"),
            hint: "is it running? name its address: `relay health ADDR`",
        };
        let body = first_success(targets.iter().map(|target| ask(target))).map_err(failure)?;
        Ok(format!("{body}\n").into_bytes())
    }
}

/// The first success, attempting no further than it takes; else the last failure.
fn first_success<T>(attempts: impl Iterator<Item = anyhow::Result<T>>) -> anyhow::Result<T> {
    let mut last = Err(anyhow::anyhow!("there is no address to ask"));
    for attempt in attempts {
        if attempt.is_ok() {
            return attempt;
        }
        last = attempt;
    }
    last
}

/// Where a relay that listens on `bound` is reached from its own machine, the likelier address first.
fn reachable(bound: SocketAddr) -> Vec<String> {
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    let addresses = match bound.ip() {
        ip if !ip.is_unspecified() => vec![ip],
        IpAddr::V4(_) => vec![v4],
        // It serves IPv4 as well, unless told otherwise; and a container may have no IPv6 loopback.
        IpAddr::V6(_) => vec![v6, v4],
    };
    addresses.into_iter().map(|ip| SocketAddr::new(ip, bound.port()).to_string()).collect()
}

/// The host and port in an address or URL.
fn authority(target: &str) -> anyhow::Result<String> {
    anyhow::ensure!(!target.starts_with("https:") && !target.starts_with("wss:"), "only plain http is asked");
    let bare = target.split_once("://").map_or(target, |(_, rest)| rest);
    let authority = bare.split('/').next().unwrap_or(bare);
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    Ok(if has_port { authority.to_owned() } else { format!("{authority}:80") })
}

fn ask(target: &str) -> anyhow::Result<String> {
    let authority = authority(target)?;
    let addresses: Vec<_> = authority.to_socket_addrs().context("its name does not resolve")?.collect();
    let dials = addresses.iter().map(|address| TcpStream::connect_timeout(address, HEALTH_TIMEOUT));
    let mut stream = first_success(dials.map(|dial| dial.context("it does not answer")))?;
    stream.set_read_timeout(Some(HEALTH_TIMEOUT))?;
    stream.set_write_timeout(Some(HEALTH_TIMEOUT))?;
    write!(stream, "GET /health HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n")?;
    let mut response = String::new();
    stream.take(MAX_HEALTH_BYTES).read_to_string(&mut response).context("its answer does not read")?;
    let (head, body) = response.split_once("\r\n\r\n").context("its answer is no HTTP")?;
    let status = head.lines().next().unwrap_or_default();
    anyhow::ensure!(status.split(' ').nth(1) == Some("200"), "it says: {status}: {body}");
    Ok(body.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn health_target_may_be_an_address_or_a_url() {
        for (target, expected) in [
            ("127.0.0.1:9000", "127.0.0.1:9000"),
            ("http://relay.example.net:8080/health", "relay.example.net:8080"),
            ("ws://[::1]:8080/v1", "[::1]:8080"),
            ("relay.example.net", "relay.example.net:80"),
        ] {
            assert_eq!(authority(target).unwrap(), expected);
        }
        assert!(authority("https://relay.example.net").is_err());
    }

    #[test]
    fn unspecified_address_is_reached_by_loopback() {
        let all = |bound: &str| reachable(bound.parse().unwrap());
        assert_eq!(all("0.0.0.0:8080"), ["127.0.0.1:8080"]);
        assert_eq!(all("[::]:8080"), ["[::1]:8080", "127.0.0.1:8080"]);
        assert_eq!(all("192.0.2.1:1"), ["192.0.2.1:1"]);
    }
}
