//! A machine to run `peer` on: a home of its own, an environment of its own, and maybe a daemon that a test plays.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
};

use peerfleet_peer::{
    daemon::call::{Call, Reply},
    machine::{Host, Status},
    mesh::{AskProgress, Caller, PathView, Stream, UplinkState, stream::RecvHalf, stream::SendHalf},
};
use peerfleet_proto::{
    id::{InstanceId, PeerId, RequestId, RoomId},
    presence::{Epoch, Mode, Presence, Service},
    request::{Outcome, Request, exec::*},
};
use tokio::{net::UnixListener, process::Command, task::JoinHandle};

pub(crate) struct Machine {
    home: tempfile::TempDir,
    daemon: Option<JoinHandle<()>>,
}

/// What a played daemon does with a call; `None` of it is answered for the test.
pub(crate) type Play = dyn Fn(Call, Stream) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync;

/// What hosts were asked, in order.
pub(crate) type Asked = Arc<Mutex<Vec<Request>>>;

impl Machine {
    pub(crate) fn new() -> Self {
        Self { home: tempfile::tempdir().expect("a temporary folder"), daemon: None }
    }

    /// A machine on which `play` is the daemon.
    pub(crate) fn with_daemon(
        play: impl Fn(Call, Stream) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync + 'static,
    ) -> Self {
        let mut machine = Self::new();
        let state = machine.state();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&state).expect("a state folder");
        let socket = state.join("door.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        fs::write(state.join("door"), socket.to_str().expect("UTF-8")).expect("a note");
        let play: Arc<Play> = Arc::new(play);
        machine.daemon = Some(tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.expect("a connection");
                let (recv, send) = socket.into_split();
                let mut stream = Stream { send: SendHalf::Door(send), recv: RecvHalf::Door(recv) };
                let play = Arc::clone(&play);
                tokio::spawn(async move {
                    if let Ok(Some(call)) = stream.recv.read_frame::<Call>().await {
                        play(call, stream).await;
                    }
                });
            }
        }));
        machine
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.home.path().to_owned()
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.home.path().join(".local/state/peerfleet")
    }

    pub(crate) fn write_config(&self, text: &str) -> PathBuf {
        let path = self.home.path().join(".config/peerfleet/config.toml");
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, text).expect("a file");
        path
    }

    /// The command, with nothing of the test's own environment.
    pub(crate) fn command<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, arguments: I) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peer"));
        command
            .args(arguments)
            .env_clear()
            .env("HOME", self.home.path())
            .env("PEER_PORT_MAPPING", "0")
            .current_dir(self.home.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    pub(crate) async fn peer(&self, line: &str) -> Said {
        self.run(line.split_whitespace()).await
    }

    pub(crate) async fn run<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, arguments: I) -> Said {
        Said::of(self.command(arguments).output().await.expect("peer runs"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(daemon) = &self.daemon {
            daemon.abort();
        }
    }
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Said {
    pub(crate) fn of(output: Output) -> Self {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Self { code: output.status.code(), stdout: output.stdout, stderr }
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("UTF-8")
    }

    pub(crate) fn json(&self) -> Vec<serde_json::Value> {
        self.text().lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }

    /// The lines of a failure by their first words.
    pub(crate) fn part(&self, name: &str) -> Option<&str> {
        self.stderr.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    #[track_caller]
    pub(crate) fn failed(&self, code: i32) -> &Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.part("error").is_some() && self.part("hint").is_some(), "{self:?}");
        self
    }
}

pub(crate) fn host(number: u8, name: &str) -> Host {
    let presence = Presence {
        name: name.to_owned(),
        tags: vec!["web".to_owned()],
        os: "linux".to_owned(),
        arch: "x86_64".to_owned(),
        version: "0.1.0".to_owned(),
        mode: Mode::Bypass,
        services: vec![Service::Exec, Service::Transfer],
        epoch: Epoch([0; 16]),
    };
    Host {
        peer: PeerId::from_bytes([number; 32]),
        instance: InstanceId::from_bytes([number; 16]),
        presence,
        present: true,
        here: false,
        link: PathView::default(),
    }
}

pub(crate) fn me() -> Caller {
    Caller { peer: PeerId::from_bytes([200; 32]), instance: InstanceId::from_bytes([200; 16]) }
}

pub(crate) fn status() -> Status {
    Status {
        version: "0.1.0".to_owned(),
        relay: "ws://relay.test".to_owned(),
        room: "dev".to_owned(),
        room_id: RoomId::from_bytes([1; 32]),
        uplink: UplinkState::Joined,
        name: "here".to_owned(),
        me: me(),
        mode: Mode::Plan,
        mode_origin: "default".to_owned(),
        no_exec: false,
        state_dir: "/state".to_owned(),
    }
}

/// The id under which a played host is asked: told from the instance.
pub(crate) fn request_id(instance: InstanceId) -> RequestId {
    RequestId::from_bytes(*instance.as_bytes())
}

/// Answers what every command asks first; hands back anything else.
pub(crate) async fn introduce(hosts: &[Host], call: Call, mut stream: Stream) -> Option<(Call, Stream)> {
    let reply = match call {
        Call::Status => Reply::Status(status()),
        Call::Hosts => Reply::Hosts(hosts.to_vec()),
        Call::Joined { .. } => Reply::Joined(Ok(())),
        other => return Some((other, stream)),
    };
    let _ = stream.send.write_frame(&reply).await;
    None
}

/// Says how asking an instance ended, as a daemon does.
pub(crate) async fn answer(
    stream: &mut Stream,
    instance: InstanceId,
    ended: Result<Outcome, peerfleet_peer::mesh::AskFault>,
) {
    for progress in [AskProgress::Asked(request_id(instance)), AskProgress::Accepted, AskProgress::Ended(ended)] {
        let _ = stream.send.write_frame(&Reply::Progress(instance, progress)).await;
    }
}

/// A job that ended with this code after writing this.
pub(crate) fn ended(instance: InstanceId, code: i32, stdout: &[u8], stderr: &[u8]) -> Outcome {
    let captured = |bytes: &[u8]| Captured { bytes: bytes.to_vec(), total: bytes.len() as u64 };
    Outcome::Job(JobReport {
        job: request_id(instance).into(),
        end: Some(end(EndState::Exited(code))),
        stdout: captured(stdout),
        stderr: captured(stderr),
    })
}

/// A job that runs.
pub(crate) fn running(instance: InstanceId) -> Outcome {
    let (stdout, stderr) = (Captured::default(), Captured::default());
    Outcome::Job(JobReport { job: request_id(instance).into(), end: None, stdout, stderr })
}

pub(crate) fn end(state: EndState) -> JobEnd {
    JobEnd { state, duration: std::time::Duration::from_millis(12) }
}

pub(crate) async fn attached(stream: &mut Stream, attach: &Attach, stdin_taken: u64) {
    let Attach { stdout_from, stderr_from, .. } = *attach;
    let outcome = Outcome::Attached(Attached { stdin_taken, stdout_from, stderr_from });
    let _ = stream.send.write_frame(&Reply::Opened(Ok(outcome))).await;
}
