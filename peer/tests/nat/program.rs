//! The programs of the lab: the relay's binary, peers that run, and files that they send each other.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Once, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use patchbay::Device;
use serde_json::Value;

/// How long anything may take before it counts as never: a slow machine under load needs a fraction of it.
const DEADLINE: Duration = Duration::from_secs(60);

/// How often something that can only be asked for is asked for.
const ASK_EVERY: Duration = Duration::from_millis(50);

const PEER: &str = env!("CARGO_BIN_EXE_peer");

/// Where programs that peers run are.
const PROGRAMS: &str = "/usr/bin:/bin";

/// Asks until there is an answer.
#[track_caller]
pub(super) fn wait_until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begin.elapsed() < DEADLINE, "not within {} s: {what}", DEADLINE.as_secs());
        thread::sleep(ASK_EVERY);
    }
}

/// The relay's program on its server.
pub(super) struct Relay(Child);

impl Relay {
    /// Starts it, and waits until it answers on every address.
    pub(super) fn start(server: Device, addresses: [SocketAddr; 2], log: &Path) -> Self {
        let binary = relay_binary();
        let log = fs::File::options().create(true).append(true).open(log).expect("a log");
        let mut command = mortal(&binary);
        for address in &addresses {
            command.args(["--bind", &address.to_string()]);
        }
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let relay = Self(server.spawn_command_sync(command).expect("the relay runs"));
        for address in addresses {
            wait_until("the relay is well", || {
                let mut health = Command::new(&binary);
                health.args(["health", &address.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
                let mut asked = server.spawn_command_sync(health).expect("it runs");
                asked.wait().expect("it ends").success().then_some(())
            });
        }
        relay
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _gone_already = self.0.kill();
        let _gone_already = self.0.wait();
    }
}

/// A program that ends with whoever started it, even if that is killed.
fn mortal(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// The relay's binary, which is beside the peer's; built anew if it is older than its source, for one of another wire would
/// let nobody in.
fn relay_binary() -> PathBuf {
    static BUILT: Once = Once::new();
    let folder = Path::new(PEER).parent().expect("a binary is in a folder");
    let binary = folder.join("relay");
    BUILT.call_once(|| {
        let profile = match folder.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => "dev",
            Some(profile) => profile,
        };
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "peerfleet-relay", "--bin", "relay", "--profile", profile]);
        build.arg("--target-dir").arg(folder.parent().expect("a profile's folder is in the target folder"));
        assert!(build.status().expect("cargo runs").success(), "the relay does not build");
    });
    binary
}

/// Prints the last lines of a log.
pub(super) fn show_tail(whose: &str, log: &Path) {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    eprintln!("--- the end of the log of {whose}:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
}

/// Runs a command of plain words.
///
/// # Errors
/// If it does not run, or says that it failed.
pub(super) fn succeed(words: &str) -> anyhow::Result<()> {
    let mut words_of = words.split_whitespace();
    let output = Command::new(words_of.next().expect("a program")).args(words_of).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(anyhow::anyhow!("`{words}`: {}", said.trim())) }
}

/// The time of day of a line of a log, in seconds.
fn seconds_of_day(line: &str) -> f64 {
    // "2026-11-21T15:54:37.140243Z  INFO …"
    let time = line.split(['T', 'Z']).nth(1).expect("a time");
    time.split(':').fold(0.0, |sum, part| sum * 60.0 + part.parse::<f64>().expect("a number"))
}

/// A host with a peer that runs on it.
pub(super) struct Peer {
    device: Device,
    name: String,
    home: PathBuf,
    daemon: Child,
}

impl Peer {
    /// Starts it; the host is called as the folder of its home is.
    pub(super) fn start(device: Device, home: &Path, relay: SocketAddr, token: &str, flags: &[&str]) -> Self {
        let name = home.file_name().and_then(|name| name.to_str()).expect("it is named");
        fs::create_dir(home).expect("a home");
        let log = fs::File::create(home.join("log")).expect("a log");
        let mut command = mortal(Path::new(PEER));
        command.args(["run", "--relay", &format!("ws://{relay}"), "--room", "lab", "--name", name, "--mode", "bypass"]);
        command.args(flags);
        command.env_clear().env("PATH", PROGRAMS).env("HOME", home);
        command.env("PEER_TOKEN", token).env("PEER_LOG", "peerfleet_peer=debug");
        command.current_dir(home).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let daemon = device.spawn_command_sync(command).expect("peer runs");
        Self { device, name: name.to_owned(), home: home.to_owned(), daemon }
    }

    pub(super) fn home(&self) -> &Path {
        &self.home
    }

    /// Waits until this host is in the room.
    pub(super) fn is_in_the_room(&self) {
        wait_until("the room is joined", || {
            let listed = self.run(&["ls", "--json"]).stdout;
            let hosts: Value = serde_json::from_slice(&listed).ok()?;
            hosts.as_array().is_some_and(|hosts| !hosts.is_empty()).then_some(())
        });
    }

    /// Waits until this host lists the other.
    pub(super) fn sees(&self, other: &Self) {
        wait_until("the room is joined", || {
            let listed = self.run(&["ls", "--json"]).stdout;
            let hosts: Value = serde_json::from_slice(&listed).ok()?;
            hosts.as_array()?.iter().any(|host| host["name"] == other.name.as_str()).then_some(())
        });
    }

    /// Begins to send a file from here to a folder there.
    pub(super) fn send(&self, file: &Path, to: &Self, path: &str) -> Sending {
        let target = format!("{}:{}", to.name, to.home.join(file.file_name().expect("it is named")).display());
        let file = file.to_str().expect("UTF-8");
        let mut command = self.command(&["send-file", "--json", "--path", path, file, &target]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Sending::of(self.device.spawn_command_sync(command).expect("peer runs"))
    }

    /// Starts a command on the other host, with its input and output piped to here.
    pub(super) fn exec(&self, other: &Self, words: &[&str]) -> Child {
        let mut command = self.command(&["exec", "--stdin", &other.name, "--"]);
        let log = fs::File::create(self.home.join("exec.log")).expect("a log");
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        self.device.spawn_command_sync(command).expect("peer runs")
    }

    /// How links of this host travelled since `from`, by its own account: when it changed, and whether it became direct.
    pub(super) fn path_changes(&self, from: SystemTime) -> Vec<(Duration, bool)> {
        let changed = |line: &str| match line {
            line if line.contains("packets travel directly") => Some(true),
            line if line.contains("packets travel by way of the relay") => Some(false),
            _ => None,
        };
        self.said(from, changed)
    }

    /// When the first answer to a request came to this host after `from`, by its own account.
    #[track_caller]
    pub(super) fn got_an_answer(&self, from: SystemTime) -> Duration {
        let answered =
            || self.said(from, |line| line.contains("a request is answered").then_some(())).into_iter().next();
        wait_until("a request is answered", answered).0
    }

    /// What of this host's log since `from` is of interest, and how long after.
    fn said<T>(&self, from: SystemTime, interest: impl Fn(&str) -> Option<T>) -> Vec<(Duration, T)> {
        const DAY: f64 = 86_400.0;
        let begin = from.duration_since(UNIX_EPOCH).expect("it is after 1970").as_secs_f64() % DAY;
        let log = self.log();
        let found = log.lines().filter_map(|line| Some((line, interest(line)?)));
        let since = found.map(|(line, what)| ((seconds_of_day(line) - begin).rem_euclid(DAY), what));
        // What was before lies almost a day ahead.
        since
            .filter(|(after, _)| *after < DAY / 2.0)
            .map(|(after, what)| (Duration::from_secs_f64(after), what))
            .collect()
    }

    /// Waits until packets travel directly, or by way of the relay, after `from`; gives the time it took.
    #[track_caller]
    pub(super) fn becomes(&self, direct: bool, from: SystemTime) -> Duration {
        let what = if direct { "packets travel directly" } else { "packets travel by way of the relay" };
        let found = || self.path_changes(from).into_iter().find(|(_, now)| *now == direct);
        wait_until(what, found).0
    }

    /// The shortest of a few round trips to an address, beneath our programs.
    pub(super) fn ping(&self, address: IpAddr) -> Duration {
        let mut command = Command::new("ping");
        command.args(["-q", "-c", "5", "-i", "0.05", "-W", "5", &address.to_string()]).stdout(Stdio::piped());
        let said =
            self.device.spawn_command_sync(command).expect("ping runs").wait_with_output().expect("it ends").stdout;
        let said = String::from_utf8(said).expect("UTF-8");
        // "rtt min/avg/max/mdev = 20.313/20.517/20.800/0.100 ms"
        let shortest = said.split(" = ").nth(1).and_then(|times| times.split('/').next()?.parse::<f64>().ok());
        Duration::from_secs_f64(shortest.unwrap_or_else(|| panic!("no answer: {said}")) / 1e3)
    }

    /// What went through this host's interface, and UDP in and out.
    pub(super) fn traffic(&self) -> Traffic {
        let read = || {
            let interface = fs::read_to_string("/proc/thread-self/net/dev")?;
            let protocols = fs::read_to_string("/proc/thread-self/net/snmp")?;
            Ok((interface, protocols))
        };
        let (interface, protocols) = self.device.run_sync(read).expect("it is Linux");
        let numbers = |line: &str| line.split_whitespace().skip(1).map(|word| word.parse().unwrap_or(0)).collect();
        let bytes: Vec<u64> = interface.lines().find(|line| line.contains("eth0:")).map(numbers).expect("it is there");
        let datagrams: Vec<u64> =
            protocols.lines().filter(|line| line.starts_with("Udp:")).nth(1).map(numbers).expect("it is there");
        Traffic { bytes_in: bytes[0], bytes_out: bytes[8], datagrams_in: datagrams[0], datagrams_out: datagrams[3] }
    }

    /// Time that this host's peer has computed so far.
    pub(super) fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.daemon.id())).expect("it runs");
        // Behind the name, which may hold anything: the 12th and 13th word are ticks, 100 a second, of user and system.
        let words = stat.rsplit(')').next().expect("there is a name").split_whitespace();
        let ticks: u64 = words.skip(11).take(2).map(|word| word.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 10)
    }

    /// The machine.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// What the peer said so far.
    pub(super) fn log(&self) -> String {
        fs::read_to_string(self.log_file()).expect("a log")
    }

    fn log_file(&self) -> PathBuf {
        self.home.join("log")
    }

    /// Runs `peer` with these arguments on this host, beside the one that works there.
    pub(super) fn run(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.device.spawn_command_sync(command).expect("peer runs");
        child.wait_with_output().expect("it ends")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PEER);
        command.args(arguments).env_clear().env("HOME", &self.home).current_dir(&self.home).stdin(Stdio::null());
        command
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _gone_already = self.daemon.kill();
        let _gone_already = self.daemon.wait();
        if thread::panicking() {
            show_tail(&self.name, &self.log_file());
        }
    }
}

/// What a host sent and received so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Traffic {
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub datagrams_in: u64,
    pub datagrams_out: u64,
}

/// A file on its way.
pub(super) struct Sending {
    child: Child,
    events: mpsc::Receiver<Value>,
    stderr: Option<JoinHandle<String>>,
    begin: Instant,
}

/// How a file's way ended.
#[derive(Debug)]
pub(super) struct Sent {
    pub code: Option<i32>,
    pub last: Value,
    pub stderr: String,
    pub took: Duration,
}

impl Sending {
    fn of(mut child: Child) -> Self {
        let (stdout, mut stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let (told, events) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).expect("a line of JSON");
                if told.send(event).is_err() {
                    return;
                }
            }
        });
        let stderr = thread::spawn(move || {
            let mut text = String::new();
            let _ended = stderr.read_to_string(&mut text);
            text
        });
        Self { child, events, stderr: Some(stderr), begin: Instant::now() }
    }

    /// Reads events until one is as wished; the file must not be there before.
    #[track_caller]
    pub(super) fn until(&self, what: &str, wished: impl Fn(&Value) -> bool) -> Value {
        let begin = Instant::now();
        loop {
            let event = self.next();
            if wished(&event) {
                return event;
            }
            assert!(event["event"] == "progress", "ended before {what}: {event}");
            assert!(begin.elapsed() < DEADLINE, "not within {} s: {what}: {event}", DEADLINE.as_secs());
        }
    }

    /// Waits for the end.
    #[track_caller]
    pub(super) fn end(mut self) -> Sent {
        let mut last = Value::Null;
        loop {
            match self.events.recv_timeout(DEADLINE) {
                Ok(event) => last = event,
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("no event within {} s after {last}", DEADLINE.as_secs()),
            }
        }
        let code = self.child.wait().expect("it ends").code();
        let stderr = self.stderr.take().expect("it is taken once").join().expect("it is read");
        Sent { code, last, stderr, took: self.begin.elapsed() }
    }

    #[track_caller]
    fn next(&self) -> Value {
        self.events.recv_timeout(DEADLINE).expect("an event")
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _gone_already = self.child.wait();
    }
}
