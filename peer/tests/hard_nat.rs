//! A host behind a NAT that gives every destination another port, and one behind a NAT that lets in only whom it knows.
//!
//! Needs root, `ip` and `nft`; says loudly where it is skipped, and fails instead if `PEERFLEET_REQUIRE_ALL` is set.

#![cfg(target_os = "linux")]
#![expect(clippy::print_stderr, reason = "who reads a failed or skipped run has nothing else")]

use std::{
    cell::RefCell,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

const PEER: &str = env!("CARGO_BIN_EXE_peer");

/// Where the relay is reached.
const RELAY: &str = "203.0.113.1:8080";

/// Set where a machine that cannot run these tests is an error: in continuous integration.
const REQUIRE_ALL: &str = "PEERFLEET_REQUIRE_ALL";

/// Time for a small file to arrive by a direct path, from the command to its end.
const DIRECT_WITHIN: Duration = Duration::from_secs(10);

/// How long anything else may take before it counts as never.
const DEADLINE: Duration = Duration::from_secs(60);

/// How often something that can only be asked for is asked for.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// Another public port for each whom the host sends to.
const HARD: &str = "oifname wan masquerade random";

/// The host's own port as its public one, whoever it sends to.
const EASY: &str = "oifname wan masquerade";

#[test]
fn a_host_behind_a_hard_nat_and_one_behind_an_easy_one_become_direct() {
    let Some(lab) = Lab::new() else { return };
    let (one, other) = (lab.host("one", HARD, &[]), lab.host("other", EASY, &[]));
    become_direct(&one, &other);
}

#[test]
fn it_does_not_matter_who_asks() {
    let Some(lab) = Lab::new() else { return };
    let (one, other) = (lab.host("one", EASY, &[]), lab.host("other", HARD, &[]));
    become_direct(&one, &other);
}

#[test]
fn who_wants_no_search_makes_none_and_gets_none() {
    let Some(lab) = Lab::new() else { return };
    let (one, other) = (lab.host("one", HARD, &["--no-hard-nat-search"]), lab.host("other", EASY, &[]));
    stay_relayed(&one, &other);
}

#[test]
fn behind_two_hard_nats_there_is_no_search() {
    let Some(lab) = Lab::new() else { return };
    let (one, other) = (lab.host("one", HARD, &[]), lab.host("other", HARD, &[]));
    stay_relayed(&one, &other);
    wait_until("somebody says why", || {
        one.log().contains("both NATs give every destination another port").then_some(())
    });
}

/// A file each way that may only go directly, the second over the path that the first found.
fn become_direct(one: &Host, other: &Host) {
    one.sees(other);
    other.sees(one);
    let begin = Instant::now();
    let sent = one.send(other, "there");
    let took = begin.elapsed();
    assert!(sent.status.success() && took < DIRECT_WITHIN, "{took:?}: {sent:?}");
    let again = other.send(one, "back");
    assert!(again.status.success(), "{again:?}");
    let searched: Vec<_> = [one, other].into_iter().flat_map(Host::searches).collect();
    eprintln!("direct, and through, {took:?} after the command; {}", searched.join("; "));
    assert!(!searched.is_empty());
}

fn stay_relayed(one: &Host, other: &Host) {
    one.sees(other);
    let sent = one.send(other, "there");
    assert_eq!(sent.status.code(), Some(3), "{sent:?}");
    assert!([one, other].into_iter().all(|host| host.searches().is_empty()));
}

/// A public segment with a relay on it, and hosts behind a router each.
struct Lab {
    prefix: String,
    token: String,
    scratch: tempfile::TempDir,
    spaces: RefCell<Vec<String>>,
    relay: RefCell<Option<Child>>,
}

impl Lab {
    fn new() -> Option<Self> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        if let Err(why) = possible() {
            assert!(std::env::var_os(REQUIRE_ALL).is_none(), "{REQUIRE_ALL} is set, but: {why}");
            eprintln!("SKIPPED: no test of hard NATs was run: {why}");
            return None;
        }
        let lab = Self {
            prefix: format!("pfhard-{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed)),
            token: token(),
            scratch: tempfile::tempdir().expect("a temporary folder"),
            spaces: RefCell::default(),
            relay: RefCell::default(),
        };
        let public = lab.space("public");
        ip(&public, "link add public type bridge\nlink set public up\naddr add 203.0.113.1/24 dev public\n");
        lab.run_relay(&public);
        Some(lab)
    }

    /// A host behind a router that translates so, with a peer that runs on it.
    fn host(&self, name: &str, translation: &str, flags: &[&str]) -> Host {
        let n = self.spaces.borrow().len() / 2 + 1;
        let router = self.space(&format!("router{n}"));
        let public = self.name("public");
        ip(&router, &format!("link add wan type veth peer name to-router{n} netns {public}\nlink set wan up\n"));
        ip(&public, &format!("link set to-router{n} master public\nlink set to-router{n} up\n"));
        run("ip", &["netns", "exec", &router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], "");
        let space = self.space(name);
        ip(&space, &format!("link add eth0 type veth peer name lan netns {router}\nlink set eth0 up\n"));
        ip(&router, &format!("addr add 203.0.113.{n}1/24 dev wan\naddr add 10.77.{n}.1/24 dev lan\nlink set lan up\n"));
        ip(&space, &format!("addr add 10.77.{n}.2/24 dev eth0\nroute add default via 10.77.{n}.1\n"));
        run("ip", &["netns", "exec", &router, "nft", "-f", "-"], &rules(translation));
        Host::start(self, &space, name, flags)
    }

    fn run_relay(&self, space: &str) {
        let program = relay();
        let log = fs::File::create(self.scratch.path().join("relay.log")).expect("a log");
        let mut command = in_space(space, &program);
        command.args(["--bind", RELAY]).env_clear().stdin(Stdio::null());
        *self.relay.borrow_mut() = Some(command.stdout(Stdio::null()).stderr(log).spawn().expect("the relay runs"));
        wait_until("the relay is well", || {
            let mut health = in_space(space, &program);
            let asked = health.args(["health", RELAY]).stdout(Stdio::null()).stderr(Stdio::null());
            asked.status().expect("it runs").success().then_some(())
        });
    }

    fn name(&self, label: &str) -> String {
        format!("{}-{label}", self.prefix)
    }

    fn space(&self, label: &str) -> String {
        let name = self.name(label);
        run("ip", &["netns", "add", &name], "");
        self.spaces.borrow_mut().push(name.clone());
        ip(&name, "link set lo up\n");
        name
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(mut relay) = self.relay.get_mut().take() {
            let _gone_already = relay.kill();
            let _gone_already = relay.wait();
        }
        for space in self.spaces.get_mut() {
            let removed = Command::new("ip").args(["netns", "del", space]).status();
            if !removed.is_ok_and(|status| status.success()) {
                eprintln!("the namespace {space} could not be removed");
            }
        }
    }
}

/// A host with a peer that runs on it.
struct Host {
    space: String,
    name: String,
    home: PathBuf,
    daemon: Child,
}

impl Host {
    fn start(lab: &Lab, space: &str, name: &str, flags: &[&str]) -> Self {
        let home = lab.scratch.path().join(name);
        fs::create_dir(&home).expect("a home");
        let log = fs::File::create(home.join("log")).expect("a log");
        let mut command = in_space(space, Path::new(PEER));
        let relay = format!("ws://{RELAY}");
        command.args(["run", "--relay", &relay, "--room", "lab", "--name", name, "--mode", "edit"]).args(flags);
        command.env_clear().env("HOME", &home).env("PEER_TOKEN", &lab.token).env("PEER_LOG", "peerfleet_peer=debug");
        command.current_dir(&home).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let daemon = command.spawn().expect("peer runs");
        Self { space: space.to_owned(), name: name.to_owned(), home, daemon }
    }

    /// Waits until this host lists the other.
    fn sees(&self, other: &Self) {
        wait_until("the room is joined", || {
            let listed = self.command(&["ls", "--json"]).output().expect("peer runs").stdout;
            let hosts: Value = serde_json::from_slice(&listed).ok()?;
            hosts.as_array()?.iter().any(|host| host["name"] == other.name.as_str()).then_some(())
        });
    }

    /// Sends a small file that may only go directly.
    fn send(&self, to: &Self, name: &str) -> Output {
        let file = self.home.join(name);
        fs::write(&file, name.repeat(10_000)).expect("a file");
        let target = format!("{}:{}", to.name, to.home.join(name).display());
        let file = file.to_str().expect("UTF-8");
        self.command(&["send-file", "--json", "--path", "direct", file, &target]).output().expect("peer runs")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.home.join("log")).expect("a log")
    }

    /// What the log says of searches that ended.
    fn searches(&self) -> Vec<String> {
        let ended = |line: &str| line.split_once("a search for a path ended").map(|(_, how)| how.trim().to_owned());
        self.log().lines().filter_map(ended).collect()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = in_space(&self.space, Path::new(PEER));
        command.args(arguments).env_clear().env("HOME", &self.home).current_dir(&self.home).stdin(Stdio::null());
        command
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _gone_already = self.daemon.kill();
        let _gone_already = self.daemon.wait();
        if thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            eprintln!(
                "--- the end of the log of {}:\n{}",
                self.name,
                lines[lines.len().saturating_sub(60)..].join("\n")
            );
        }
    }
}

/// Unsolicited packets to the router itself are dropped, as home routers do: answered, they would leave a connection
/// entry that takes the port from the host behind it.
fn rules(translation: &str) -> String {
    format!(
        "table inet lab {{
            chain translate {{ type nat hook postrouting priority 100; {translation}
            }}
            chain own {{ type filter hook input priority 0; iifname wan meta l4proto {{ tcp, udp }} drop
            }}
        }}"
    )
}

fn possible() -> Result<(), String> {
    static TRIALS: AtomicU32 = AtomicU32::new(0);
    for program in ["ip", "nft"] {
        let found = Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
        found.map_err(|error| format!("`{program}` does not run: {error}"))?;
    }
    let trial = format!("pfhard-{}-trial{}", std::process::id(), TRIALS.fetch_add(1, Ordering::Relaxed));
    attempt("ip", &["netns", "add", &trial], "")?;
    let able = attempt("ip", &["netns", "exec", &trial, "nft", "-f", "-"], &rules(HARD));
    run("ip", &["netns", "del", &trial], "");
    able
}

fn token() -> String {
    let made = Command::new(PEER).args(["token", "new"]).output().expect("peer runs");
    String::from_utf8(made.stdout).expect("UTF-8").trim().to_owned()
}

/// The relay's binary, which is beside the peer's; built if it is not there.
fn relay() -> PathBuf {
    static BUILT: Once = Once::new();
    let folder = Path::new(PEER).parent().expect("a binary is in a folder");
    let binary = folder.join("relay");
    BUILT.call_once(|| {
        if binary.exists() {
            return;
        }
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

/// Asks until there is an answer.
#[track_caller]
fn wait_until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(begin.elapsed() < DEADLINE, "not within {} s: {what}", DEADLINE.as_secs());
        thread::sleep(ASK_EVERY);
    }
}

/// The command `program` inside a namespace.
fn in_space(space: &str, program: &Path) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", space]).arg(program);
    command
}

fn ip(space: &str, lines: &str) {
    run("ip", &["-n", space, "-batch", "-"], lines);
}

#[track_caller]
fn run(program: &str, arguments: &[&str], input: &str) {
    if let Err(why) = attempt(program, arguments, input) {
        panic!("{why}\n{input}");
    }
}

fn attempt(program: &str, arguments: &[&str], input: &str) -> Result<(), String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let shown = format!("`{program} {}`", arguments.join(" "));
    let mut child = command.spawn().map_err(|error| format!("{shown}: {error}"))?;
    // Whoever reads no input has closed it, and is judged by how it ends.
    let _closed = child.stdin.take().expect("it is piped").write_all(input.as_bytes());
    let output = child.wait_with_output().map_err(|error| format!("{shown}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{shown}: {}", said.trim())) }
}
