//! The programs of the lab: the relay's binary, peers that run, and files that they send each other.

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Once, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::lab::{in_space, show_tail};

/// How long anything may take before it counts as never: a slow machine under load needs a fraction of it.
const DEADLINE: Duration = Duration::from_secs(60);

/// How often something that can only be asked for is asked for.
const ASK_EVERY: Duration = Duration::from_millis(50);

const PEER: &str = env!("CARGO_BIN_EXE_peer");

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

/// The relay's binary, which is beside the peer's; built if it is not there.
pub(super) fn relay() -> PathBuf {
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

/// A host with a peer that runs on it.
pub(super) struct Peer {
    space: String,
    name: String,
    home: PathBuf,
    daemon: Child,
}

impl Peer {
    pub(super) fn start(space: &str, name: &str, home: &Path, relay: &str, token: &str) -> Self {
        fs::create_dir(home).expect("a home");
        let log = fs::File::create(home.join("log")).expect("a log");
        let mut command = in_space(space, Path::new(PEER));
        command.args(["run", "--relay", &format!("ws://{relay}"), "--room", "lab", "--name", name, "--mode", "edit"]);
        command.env_clear().env("HOME", home).env("PEER_TOKEN", token).env("PEER_LOG", "peerfleet_peer=debug");
        command.current_dir(home).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let daemon = command.spawn().expect("peer runs");
        Self { space: space.to_owned(), name: name.to_owned(), home: home.to_owned(), daemon }
    }

    pub(super) fn space(&self) -> &str {
        &self.space
    }

    pub(super) fn home(&self) -> &Path {
        &self.home
    }

    /// Waits until this host lists the other.
    pub(super) fn sees(&self, other: &Self) {
        wait_until("the room is joined", || {
            let listed = self.command(&["ls", "--json"]).output().expect("peer runs").stdout;
            let hosts: Value = serde_json::from_slice(&listed).ok()?;
            hosts.as_array()?.iter().any(|host| host["name"] == other.name.as_str()).then_some(())
        });
    }

    /// Begins to send a file from here to a folder there.
    pub(super) fn send(&self, file: &Path, to: &Self, path: &str) -> Sending {
        let target = format!("{}:{}", to.name, to.home.join(file.file_name().expect("it is named")).display());
        let file = file.to_str().expect("UTF-8");
        Sending::of(self.command(&["send-file", "--json", "--path", path, file, &target]))
    }

    /// What `peer status` says of the link to the other.
    pub(super) fn link(&self, other: &Self) -> Value {
        let said = self.command(&["status", "--json"]).output().expect("peer runs").stdout;
        let status: Value = serde_json::from_slice(&said).expect("JSON");
        let links = status["links"].as_array().cloned().unwrap_or_default();
        links.into_iter().find(|link| link["name"] == other.name.as_str()).unwrap_or(Value::Null)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = in_space(&self.space, Path::new(PEER));
        command.args(arguments).env_clear().env("HOME", &self.home).current_dir(&self.home).stdin(Stdio::null());
        command
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _gone_already = self.daemon.kill();
        let _gone_already = self.daemon.wait();
        if thread::panicking() {
            show_tail(&self.name, &self.home.join("log"));
        }
    }
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
    fn of(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("peer runs");
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
