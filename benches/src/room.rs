//! A room of real processes: one relay and its peers, each with a state folder of its own, ended when dropped.

use std::{
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// How long a process of ours may take until it is ready.
const READY_DEADLINE: Duration = Duration::from_secs(20);

/// A child process that is ended when dropped.
pub struct Process(Child);

impl Process {
    /// Starts a command with its output thrown away.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().with_context(|| format!("cannot start {command:?}"))?))
    }

    /// Starts a command and returns its first line of standard output.
    ///
    /// # Errors
    /// If it cannot be started or ends without a line.
    pub fn start_announcing(command: &mut Command) -> Result<(Self, String)> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let stdout = child.stdout.take().context("standard output is piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.is_empty() {
            bail!("{command:?} ended without a word");
        }
        Ok((Self(child), line.trim().to_owned()))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it ended by itself, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A relay and its peers.
pub struct Room {
    /// State folders of all processes, on the fastest file system there is.
    pub folder: TempDir,
    /// The relay.
    pub relay: Process,
    /// Where the relay listens.
    pub addr: SocketAddr,
    /// The peers, in the order in which they were started.
    pub peers: Vec<Process>,
    /// Generated, so that no peer stretches it: that takes 64 MiB for a moment.
    token: String,
}

impl Room {
    /// Starts a relay.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start() -> Result<Self> {
        let folder = TempDir::new_in("/dev/shm")?;
        // The port is free again as soon as the listener is dropped; nobody else here picks ports.
        let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let relay = Process::start(Command::new(binary("relay")?).args(["--bind", &addr.to_string()]))?;
        let token = String::from_utf8(Command::new(binary("peer")?).args(["token", "new"]).output()?.stdout)?;
        let room = Self { folder, relay, addr, peers: Vec::new(), token: token.trim().to_owned() };
        wait_until("the relay listens", || std::net::TcpStream::connect(addr).is_ok())?;
        Ok(room)
    }

    /// Starts a peer that allows everything, and waits until it is in the room.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn add_peer(&mut self, name: &str) -> Result<()> {
        let peer = Process::start(self.peer(name)?.args(["run", "--mode", "bypass", "--name", name]))?;
        self.peers.push(peer);
        let names = || self.hosts(name).unwrap_or_default();
        wait_until("the peer is in the room", || names().contains(&format!("\"{name}\"")))
    }

    /// Waits until the peer of that state folder sees this many hosts.
    ///
    /// # Errors
    /// If it never does.
    pub fn wait_for_hosts(&self, name: &str, count: usize) -> Result<()> {
        let seen = || self.hosts(name).unwrap_or_default().matches("\"id\"").count();
        wait_until("everybody is in the room", || seen() >= count)
    }

    fn hosts(&self, name: &str) -> Result<String> {
        let output = self.peer(name)?.args(["ls", "--json"]).stderr(Stdio::null()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// A `peer` command with the state folder of that name.
    ///
    /// # Errors
    /// If the binary is not built.
    pub fn peer(&self, name: &str) -> Result<Command> {
        let home = self.folder.path().join(name);
        std::fs::create_dir_all(&home)?;
        let mut command = Command::new(binary("peer")?);
        command.env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", &home).env("PEER_PORT_MAPPING", "0");
        command.env("PEER_STATE_DIR", home.join("state"));
        command.env("PEER_TOKEN", &self.token);
        command.env("PEER_ROOM", "bench");
        command.env("PEER_RELAY", format!("ws://{}", self.addr));
        Ok(command)
    }

    /// A path inside the room's folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A binary of the workspace, built beside this one.
///
/// # Errors
/// If it is not there.
pub fn binary(name: &str) -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    if !path.exists() {
        bail!("{} is not built: run `cargo build --release --workspace` first", path.display());
    }
    Ok(path)
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !holds() {
        if start.elapsed() > READY_DEADLINE {
            bail!("waited {READY_DEADLINE:?} until {what}, in vain");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
