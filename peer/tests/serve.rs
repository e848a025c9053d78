//! Requests as they reach a host: judged, answered and written down.

#![expect(clippy::unwrap_used, reason = "a test says by panicking what went wrong")]

use std::{collections::BTreeMap, fs, sync::Arc};

use peerfleet_peer::{
    access::Policy,
    exec::{Jobs, JobsConfig},
    mesh::{Caller, Serve, Stream},
    serve::Services,
    store::{Store, audit::Audited},
};
use peerfleet_proto::{
    id::{InstanceId, JobId, PeerId, RequestId, Ticket},
    presence::Mode,
    request::{
        FailureKind, Outcome, Request,
        exec::{Attach, Command, EndState, ExecSpec, Follow, FromHost},
        transfer::PullSpec,
    },
};
use tempfile::TempDir;
use tokio::sync::watch;

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_command_does_not_run_and_is_written_down() {
    let host = Host::new(Mode::Plan);
    let outcome = host.ask(exec("touch ran; echo $SECRET", host.folder.path().to_str().unwrap())).await;
    let Outcome::Failed(failure) = outcome else { panic!("{outcome:?}") };
    assert_eq!(failure.kind, FailureKind::Refused);
    assert_eq!(fs::read_dir(host.folder.path()).unwrap().count(), 0);
    let audited = host.audited().await;
    assert_eq!((audited[0].kind.as_str(), audited[0].verdict.as_str()), ("exec", "refused"));
    assert_eq!((audited[0].peer, audited[0].instance), (caller().peer, caller().instance));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allowed_command_is_written_down_without_the_values_of_its_variables() {
    let host = Host::new(Mode::Bypass);
    let Outcome::Job(report) = host.ask(exec("echo $SECRET", "/")).await else { panic!("it is allowed") };
    assert_eq!(report.end.unwrap().state, EndState::Exited(0));
    assert_eq!(report.stdout.bytes, b"hunter2\n");
    let audited = host.audited().await;
    assert_eq!(audited[0].outcome.as_deref(), Some("exited 0"));
    assert!(audited[0].what.contains("echo $SECRET") && audited[0].what.contains("with SECRET"), "{audited:?}");
    assert!(!format!("{audited:?}").contains("hunter2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lowered_mode_holds_from_the_next_request_on() {
    let host = Host::new(Mode::Bypass);
    assert!(matches!(host.ask(exec("true", "/")).await, Outcome::Job(_)));
    host.policy.send_replace(Arc::new(policy(Mode::Edit)));
    assert!(matches!(host.ask(exec("true", "/")).await, Outcome::Failed(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_heads_a_stream_is_judged_and_answered_as_a_message_is() {
    let host = Host::new(Mode::Plan);
    assert_eq!(host.head(Request::Ping).await.0, Outcome::Done);
    assert!(
        matches!(host.head(exec("true", "/")).await.0, Outcome::Failed(failure) if failure.kind == FailureKind::Refused)
    );
    host.policy.send_replace(Arc::new(policy(Mode::Bypass)));
    let (Outcome::Job(report), _) = host.head(exec("echo hello", "/")).await else { panic!("it is allowed") };
    let attach = Attach { job: report.job, stdout_from: 0, stderr_from: 0, follow: true, owner: false };
    let (Outcome::Attached(_), mut stream) = host.head(Request::Attach(attach)).await else { panic!("it is known") };
    let first = stream.recv.read_frame::<FromHost>().await.unwrap();
    assert_eq!(first, Some(FromHost::Stdout(b"hello\n".to_vec())));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_a_stream_is_refused_as_a_message() {
    let host = Host::new(Mode::Bypass);
    let attach = Attach { job: JobId::from_bytes([0; 16]), stdout_from: 0, stderr_from: 0, follow: true, owner: true };
    for request in [Request::Attach(attach), Request::Pull(PullSpec { ticket: Ticket::from_bytes([0; 16]) })] {
        assert!(matches!(host.ask(request).await, Outcome::Failed(failure) if failure.kind == FailureKind::Invalid));
    }
}

struct Host {
    folder: TempDir,
    store: Store,
    policy: watch::Sender<Arc<Policy>>,
    services: Services,
}

impl Host {
    fn new(mode: Mode) -> Self {
        let folder = TempDir::new().unwrap();
        let store = Store::volatile();
        let (policy, seen) = watch::channel(Arc::new(policy(mode)));
        let jobs = Jobs::new(store.clone(), JobsConfig::new(folder.path().into()));
        let services = Services { jobs, files: None, network: None, policy: seen, store: store.clone() };
        Self { folder, store, policy, services }
    }

    async fn ask(&self, request: Request) -> Outcome {
        self.services.ask(caller(), RequestId::from_bytes([fresh_byte(); 16]), request).await
    }

    async fn head(&self, request: Request) -> (Outcome, Stream) {
        let (mut ours, theirs) = Stream::local_pair();
        tokio::spawn(self.services.stream(caller(), request, theirs));
        (ours.recv.read_frame().await.unwrap().unwrap(), ours)
    }

    async fn audited(&self) -> Vec<Audited> {
        self.store.audited(10).await.unwrap()
    }
}

fn policy(mode: Mode) -> Policy {
    Policy { mode, exec: true, access: BTreeMap::new(), state_folder: "/nowhere".into() }
}

fn caller() -> Caller {
    Caller { peer: PeerId::from_bytes([1; 32]), instance: InstanceId::from_bytes([2; 16]) }
}

fn fresh_byte() -> u8 {
    use std::sync::atomic::{AtomicU8, Ordering};
    static NEXT: AtomicU8 = AtomicU8::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn exec(line: &str, cwd: &str) -> Request {
    Request::Exec(ExecSpec {
        command: Command::Shell(line.into()),
        cwd: Some(cwd.into()),
        env: vec![(b"SECRET".to_vec(), b"hunter2".to_vec())],
        timeout: None,
        stdin: false,
        follow: Follow::Collected,
    })
}
