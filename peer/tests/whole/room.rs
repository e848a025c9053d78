//! A relay and some peers, each a process with a home and a state folder of its own, killed when dropped.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    net::SocketAddr,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{self, Child, ChildStdout, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Longest that anything here may take until it is as it should be.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(20);

/// Waits until `look` finds something.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < DEADLINE, "not in time: {what}");
        thread::sleep(POLL);
    }
}

/// A process that ends with its handle.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    /// The process ends here and now, without a word to anybody.
    pub(crate) fn kill(&mut self) {
        // An error says that it has ended already.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }

    /// Most memory it ever had resident, in bytes, without the pages of its program file.
    pub(crate) fn most_memory(&self) -> u64 {
        memory(&format!("/proc/{}/status", self.0.id()), "VmHWM:")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn memory(path: &str, field: &str) -> u64 {
    let status = fs::read_to_string(path).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Set where a machine that cannot run a test is an error: in continuous integration.
const REQUIRE_ALL: &str = "PEERFLEET_REQUIRE_ALL";

/// Says loudly that a test was skipped, or fails where that is an error.
#[expect(clippy::print_stderr, reason = "who reads a skipped run has nothing else")]
pub(crate) fn skip(why: &str) {
    assert!(std::env::var_os(REQUIRE_ALL).is_none(), "{REQUIRE_ALL} is set, but: {why}");
    eprintln!("SKIPPED: {why}");
}

/// A network of its own, in which the only way is TCP: links travel by way of the relay.
struct Space(String);

impl Space {
    fn without_udp() -> Result<Self, String> {
        static SPACES: AtomicU32 = AtomicU32::new(0);
        let name = format!("pfwhole-{}-{}", process::id(), SPACES.fetch_add(1, Ordering::Relaxed));
        run(&["ip", "netns", "add", &name])?;
        let space = Self(name);
        let rules = "table inet only { chain into { type filter hook input priority 0; meta l4proto udp drop; }; }";
        run(&["ip", "-n", &space.0, "link", "set", "lo", "up"])?;
        run(&["ip", "netns", "exec", &space.0, "nft", rules])?;
        Ok(space)
    }

    fn prefix(&self) -> Vec<String> {
        ["nsenter".into(), format!("--net=/run/netns/{}", self.0), "--".into()].into()
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        // It was made here, so it can be removed here; its processes have ended before.
        let _ = run(&["ip", "netns", "del", &self.0]);
    }
}

fn run(words: &[&str]) -> Result<(), String> {
    let output = Command::new(words[0]).args(&words[1..]).output().map_err(|error| format!("{}: {error}", words[0]))?;
    let said = String::from_utf8_lossy(&output.stderr);
    output.status.success().then_some(()).ok_or_else(|| format!("`{}`: {}", words.join(" "), said.trim()))
}

/// The command `program` behind these words.
fn behind(prefix: &[String], program: &Path) -> Command {
    let Some((first, rest)) = prefix.split_first() else { return Command::new(program) };
    let mut command = Command::new(first);
    command.args(rest).arg(program);
    command
}

/// A relay, and a room on it.
pub(crate) struct Room {
    relay: Option<Running>,
    /// Words before every program that lead it into the room's network.
    prefix: Vec<String>,
    _space: Option<Space>,
    pub(crate) relay_address: SocketAddr,
    pub(crate) token: String,
    pub(crate) name: String,
    pub(crate) folder: TempDir,
}

impl Room {
    pub(crate) fn start() -> Self {
        Self::named("whole")
    }

    pub(crate) fn named(name: &str) -> Self {
        Self::with_relay(name, &[])
    }

    /// A room on a relay that was started with these flags too.
    pub(crate) fn with_relay(name: &str, flags: &[&str]) -> Self {
        Self::within(None, name, flags)
    }

    /// A room whose members reach each other by way of the relay alone; `None`, and a loud word, where the machine does
    /// not let us.
    pub(crate) fn without_udp() -> Option<Self> {
        match Space::without_udp() {
            Ok(space) => Some(Self::within(Some(space), "whole", &[])),
            Err(why) => {
                skip(&format!("nothing was tried by way of the relay alone: {why}"));
                None
            }
        }
    }

    fn within(space: Option<Space>, name: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let prefix = space.as_ref().map(Space::prefix).unwrap_or_default();
        let (relay, relay_address) = relay(&prefix, folder.path(), "127.0.0.1:0", flags);
        Self { relay: Some(relay), prefix, _space: space, relay_address, token: new_token(), name: name.into(), folder }
    }

    pub(crate) fn relay(&self) -> &Running {
        self.relay.as_ref().unwrap()
    }

    pub(crate) fn kill_relay(&mut self) {
        self.relay = None;
    }

    pub(crate) fn start_relay(&mut self) {
        self.relay = Some(relay(&self.prefix, self.folder.path(), &self.relay_address.to_string(), &[]).0);
    }

    /// A machine whose peer runs.
    pub(crate) fn peer(&self, name: &str, flags: &[&str]) -> Machine {
        self.peer_by(self.relay_address, name, flags)
    }

    /// A machine whose peer runs and reaches the relay by another address.
    pub(crate) fn peer_by(&self, relay: SocketAddr, name: &str, flags: &[&str]) -> Machine {
        let home = self.folder.path().join(name);
        fs::create_dir_all(&home).unwrap();
        let mut machine = Machine {
            name: name.into(),
            prefix: self.prefix.clone(),
            program: PEER.into(),
            user: None,
            home,
            relay,
            room: self.name.clone(),
            token: self.token.clone(),
            flags: flags.iter().map(ToString::to_string).collect(),
            daemon: None,
        };
        machine.start();
        machine
    }

    /// A machine of another user, whose peer runs.
    pub(crate) fn peer_as(&self, user: u32, name: &str, flags: &[&str]) -> Machine {
        let mut machine = self.peer(name, flags);
        machine.kill();
        machine.become_user(user);
        machine.start();
        machine
    }
}

fn new_token() -> String {
    let output = Command::new(PEER).args(["token", "new"]).env_clear().output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The program under test.
const PEER: &str = env!("CARGO_BIN_EXE_peer");

/// The relay's program: it belongs to another package, and is built if nobody did so far.
fn relay_program() -> PathBuf {
    let program = Path::new(PEER).with_file_name("relay");
    if !program.exists() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--package", "peerfleet-relay", "--bin", "relay"]);
        build.arg("--target-dir").arg(program.ancestors().nth(2).unwrap());
        build.current_dir(env!("CARGO_MANIFEST_DIR"));
        if program.parent().is_some_and(|folder| folder.ends_with("release")) {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success(), "the relay could not be built");
    }
    program
}

fn relay(prefix: &[String], folder: &Path, bind: &str, flags: &[&str]) -> (Running, SocketAddr) {
    let log = folder.join("relay.log");
    let mut command = behind(prefix, &relay_program());
    command.args(["--bind", bind]).args(flags).env_clear().stdin(Stdio::null()).stderr(File::create(&log).unwrap());
    let mut relay = Running(command.spawn().unwrap());
    let address = until("the relay listens", || {
        let said = fs::read_to_string(&log).unwrap();
        assert!(relay.0.try_wait().unwrap().is_none(), "the relay ended: {said}");
        let (_, rest) = said.split_once("addresses=[")?;
        rest.split_once([',', ']'])?.0.parse().ok()
    });
    (relay, address)
}

/// A machine of its own: home, state, and a peer that runs or not.
pub(crate) struct Machine {
    pub(crate) name: String,
    pub(crate) home: PathBuf,
    prefix: Vec<String>,
    program: PathBuf,
    user: Option<u32>,
    relay: SocketAddr,
    room: String,
    pub(crate) token: String,
    flags: Vec<String>,
    daemon: Option<Running>,
}

impl Machine {
    /// Starts its peer.
    pub(crate) fn start(&mut self) {
        let log = File::options().create(true).append(true).open(self.home.join("log")).unwrap();
        let mut command = self.bare();
        command.args(["run", "--name", &self.name]).args(&self.flags).env("PEER_TOKEN", &self.token);
        command.args(["--room", &self.room, "--relay", &format!("ws://{}", self.relay)]);
        self.daemon = Some(Running(command.stdout(Stdio::null()).stderr(log).spawn().unwrap()));
    }

    pub(crate) fn kill(&mut self) {
        self.daemon = None;
    }

    pub(crate) fn daemon(&self) -> &Running {
        self.daemon.as_ref().unwrap()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.home.join("log")).unwrap()
    }

    /// Everything of this machine belongs to another user from now on, and runs as that.
    fn become_user(&mut self, user: u32) {
        let everybody = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.home.parent().unwrap(), everybody.clone()).unwrap();
        fs::remove_dir_all(&self.home).unwrap();
        fs::create_dir(&self.home).unwrap();
        std::os::unix::fs::chown(&self.home, Some(user), Some(user)).unwrap();
        // Where the program was built, others may not look.
        self.program = self.home.with_extension("peer");
        fs::copy(PEER, &self.program).unwrap();
        fs::set_permissions(&self.program, everybody).unwrap();
        self.user = Some(user);
    }

    fn bare(&self) -> Command {
        let mut command = behind(&self.prefix, &self.program);
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command.env_clear().env("HOME", &self.home).env("PEER_PORT_MAPPING", "0").env("PATH", "/usr/bin:/bin");
        command.env("PEER_STATE_DIR", self.home.join("state")).stdin(Stdio::null());
        command
    }

    /// A `peer` command on this machine.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.bare();
        command.args(arguments);
        command
    }

    /// A `peer` command on this machine that joins the room itself, beside the daemon.
    pub(crate) fn beside(&self, arguments: &[&str]) -> Command {
        let relay = format!("ws://{}", self.relay);
        let mut command = self.command(&["--relay", &relay, "--room", &self.room, "--token", &self.token]);
        command.args(arguments);
        command
    }

    /// Runs a `peer` command on this machine to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.command(arguments).output().unwrap().into()
    }

    /// Starts a `peer` command on this machine whose output is read here.
    pub(crate) fn spawn(&self, arguments: &[&str]) -> (Running, BufReader<ChildStdout>) {
        let mut child = self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        (Running(child), stdout)
    }

    /// What this machine's peer says of the others.
    pub(crate) fn hosts(&self) -> Vec<Value> {
        let ended = self.run(&["ls", "--json"]);
        serde_json::from_str::<Vec<Value>>(&ended.stdout).unwrap_or_default()
    }

    /// Waits until this machine's peer sees these.
    pub(crate) fn sees(&self, names: &[&str]) {
        until(&format!("{} sees {names:?}", self.name), || {
            let hosts = self.hosts();
            names.iter().all(|name| hosts.iter().any(|host| host["name"] == **name)).then_some(())
        });
    }

    /// How this machine's link to another travels now.
    pub(crate) fn path_of(&self, name: &str) -> Option<String> {
        let hosts = self.hosts();
        hosts.iter().find(|host| host["name"] == name)?["path"].as_str().map(ToOwned::to_owned)
    }
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Ended {
    pub(crate) fn json(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    pub(crate) fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }
}

/// The next JSON event of a command that runs, until it has ended.
pub(crate) fn next_event(stdout: &mut BufReader<ChildStdout>) -> Option<Value> {
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    serde_json::from_str(&line).ok()
}

/// Numbers that look random and are the same in every run.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&Sha256::digest(bytes))
}
