//! What others ask of this host: judged, written down, and handed to a service.
//!
//! In: requests and streams with the identity that was proved. Out: outcomes, and streams served to their end. It never
//! does the work itself, and no service is reached past [`access::decide`]. Asked -> Judged (in the audit log) ->
//! Answered (its outcome too). Bounds: those of the services.

use std::sync::Arc;

use peerfleet_proto::{
    id::RequestId,
    request::{
        Failure, FailureKind, Outcome, Request,
        exec::{EndState, ExecSpec},
        transfer::{OfferSpec, PullSpec, ReceiveSpec},
    },
};
use tokio::sync::watch;

use crate::{
    access::{self, Policy},
    exec::{Jobs, process},
    mesh::{BoxFuture, Caller, Serve, Stream},
    store::{Store, audit::WHAT_BYTES},
};

/// What moves files on this host. Paths are its to judge, by [`Policy::admit`], once it has them open.
pub trait Files: Send + Sync + 'static {
    /// Answers an offer.
    fn offer(&self, caller: Caller, spec: OfferSpec) -> BoxFuture<Outcome>;

    /// Serves ranges of an offered file; writes the outcome of the head first.
    fn pull(&self, caller: Caller, spec: PullSpec, stream: Stream) -> BoxFuture<()>;

    /// Receives a file and tells the caller how it goes; writes the outcome of the head first.
    fn receive(&self, caller: Caller, spec: ReceiveSpec, stream: Stream) -> BoxFuture<()>;
}

/// What knows how the network looks from this host.
pub trait Network: Send + Sync + 'static {
    /// Answers a caller, who learns of its own link and of nobody else's.
    fn report(&self, caller: Caller) -> BoxFuture<Outcome>;
}

/// The services of this host.
#[derive(Clone)]
pub struct Services {
    /// Runs commands.
    pub jobs: Jobs,
    /// Moves files; a host without it says so.
    pub files: Option<Arc<dyn Files>>,
    /// Tells of the network; a host without it says so.
    pub network: Option<Arc<dyn Network>>,
    /// What this host allows now.
    pub policy: watch::Receiver<Arc<Policy>>,
    /// Where requests are written down.
    pub store: Store,
}

impl Serve for Services {
    fn ask(&self, caller: Caller, id: RequestId, request: Request) -> BoxFuture<Outcome> {
        let services = self.clone();
        Box::pin(async move { services.answer(caller, id, request).await })
    }

    fn stream(&self, caller: Caller, request: Request, stream: Stream) -> BoxFuture<()> {
        let services = self.clone();
        Box::pin(async move { services.serve(caller, request, stream).await })
    }
}

impl Services {
    fn judge(&self, caller: Caller, request: &Request) -> Result<(), Failure> {
        let policy = self.policy.borrow().clone();
        access::decide(caller.peer, request, &policy)
    }

    async fn answer(self, caller: Caller, id: RequestId, request: Request) -> Outcome {
        let verdict = self.judge(caller, &request);
        let audited = self.store.audit(caller, kind(&request), what(&request), word(&verdict)).await;
        let outcome = match verdict {
            Ok(()) => self.perform(caller, id, request).await,
            Err(failure) => Outcome::Failed(failure),
        };
        self.store.audit_outcome(audited, account(&outcome)).await;
        outcome
    }

    async fn perform(&self, caller: Caller, id: RequestId, request: Request) -> Outcome {
        match request {
            Request::Ping => Outcome::Done,
            Request::Exec(spec) => self.jobs.exec(caller, id, spec).await,
            Request::Jobs => self.jobs.list().await,
            Request::Cancel(job) => self.jobs.cancel(job).await,
            Request::Offer(spec) => match &self.files {
                Some(files) => files.offer(caller, spec).await,
                None => Outcome::Failed(no_files()),
            },
            Request::Network => match &self.network {
                Some(network) => network.report(caller).await,
                None => Outcome::Failed(Failure::new(
                    FailureKind::Invalid,
                    "this host knows nothing of its network",
                    "update peer on that host",
                )),
            },
            Request::Attach(_) | Request::Receive(_) | Request::Pull(_) => Outcome::Failed(Failure::new(
                FailureKind::Invalid,
                "this is asked on a stream, not in a message",
                "update peer on both machines",
            )),
            Request::Link(_) | Request::Candidates(_) => Outcome::Failed(Failure::new(
                FailureKind::Invalid,
                "links are agreed by the mesh, not asked of a host",
                "update peer on both machines",
            )),
        }
    }

    async fn serve(self, caller: Caller, request: Request, mut stream: Stream) {
        let verdict = self.judge(caller, &request);
        let audited = self.store.audit(caller, kind(&request), what(&request), word(&verdict)).await;
        let account = match (verdict, request) {
            (Err(failure), _) => conclude(&mut stream, Outcome::Failed(failure)).await,
            (Ok(()), Request::Attach(attach)) => {
                self.jobs.attach(caller, attach, stream).await;
                "stream ended".into()
            }
            (Ok(()), Request::Pull(spec)) => match &self.files {
                Some(files) => {
                    files.pull(caller, spec, stream).await;
                    "stream ended".into()
                }
                None => conclude(&mut stream, Outcome::Failed(no_files())).await,
            },
            (Ok(()), Request::Receive(spec)) => match &self.files {
                Some(files) => {
                    files.receive(caller, spec, stream).await;
                    "stream ended".into()
                }
                None => conclude(&mut stream, Outcome::Failed(no_files())).await,
            },
            (Ok(()), request) => {
                let outcome = match fresh_id() {
                    Ok(id) => self.perform(caller, id, request).await,
                    Err(failure) => Outcome::Failed(failure),
                };
                conclude(&mut stream, outcome).await
            }
        };
        self.store.audit_outcome(audited, account).await;
    }
}

/// Answers a stream with its head's outcome alone; says how it ended for the audit log.
async fn conclude(stream: &mut Stream, outcome: Outcome) -> String {
    // A caller that left has no use for the outcome.
    if stream.send.write_frame(&outcome).await.is_ok() {
        let _ = stream.send.finish().await;
    }
    account(&outcome)
}

/// The id of a request that came on a stream: a stream is never repeated, so nobody else needs to know it.
fn fresh_id() -> Result<RequestId, Failure> {
    let mut bytes = [0; RequestId::LEN];
    getrandom::fill(&mut bytes).map_err(|error| {
        let what = format!("the host's system gives no random numbers: {error}");
        Failure::new(FailureKind::Os, what, "look at the host's system log")
    })?;
    Ok(RequestId::from_bytes(bytes))
}

fn no_files() -> Failure {
    Failure::new(FailureKind::Invalid, "this host moves no files", "update peer on that host")
}

fn word(verdict: &Result<(), Failure>) -> &'static str {
    if verdict.is_ok() { "allowed" } else { "refused" }
}

fn kind(request: &Request) -> &'static str {
    match request {
        Request::Link(_) => "link",
        Request::Candidates(_) => "candidates",
        Request::Ping => "ping",
        Request::Exec(_) => "exec",
        Request::Attach(_) => "attach",
        Request::Jobs => "jobs",
        Request::Cancel(_) => "cancel",
        Request::Offer(_) => "offer",
        Request::Receive(_) => "receive",
        Request::Pull(_) => "pull",
        Request::Network => "network",
    }
}

/// What was asked for, as the audit log keeps it: a command's text and the names of its variables, never their values.
fn what(request: &Request) -> String {
    match request {
        Request::Link(_) | Request::Candidates(_) | Request::Ping | Request::Jobs | Request::Network => String::new(),
        Request::Exec(spec) => what_to_run(spec),
        Request::Attach(attach) if attach.owner => format!("{} as owner", attach.job),
        Request::Attach(attach) => attach.job.to_string(),
        Request::Cancel(job) => job.to_string(),
        Request::Offer(spec) => format!("{} to {}", text(&spec.path), spec.receiver),
        Request::Receive(spec) => {
            format!("{} of {} into {}", text(&spec.file.name), spec.source, text(&spec.destination))
        }
        Request::Pull(_) => String::new(),
    }
}

fn what_to_run(spec: &ExecSpec) -> String {
    let mut what = process::shown_within(&spec.command, WHAT_BYTES / 2);
    if let Some(cwd) = &spec.cwd {
        what += &format!(" (in {})", text(cwd));
    }
    if !spec.env.is_empty() {
        let names: Vec<String> = spec.env.iter().map(|(name, _)| text(name)).collect();
        what += &format!(" (with {})", names.join(", "));
    }
    what
}

fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// An outcome in a few words.
fn account(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Link(_)
        | Outcome::Done
        | Outcome::Attached(_)
        | Outcome::Jobs(_)
        | Outcome::Offered(_)
        | Outcome::Pulling
        | Outcome::Receiving
        | Outcome::Network(_) => "done".into(),
        Outcome::Job(report) => match report.end.as_ref().map(|end| &end.state) {
            None => "running".into(),
            Some(EndState::Exited(code)) => format!("exited {code}"),
            Some(EndState::Signalled(signal)) => format!("signalled {signal}"),
            Some(EndState::TimedOut) => "timed out".into(),
            Some(EndState::Cancelled) => "cancelled".into(),
            Some(EndState::SpawnFailed(failure)) => format!("not started: {}", failure.what),
            Some(EndState::Lost) => "lost".into(),
        },
        Outcome::Failed(failure) => format!("failed: {}", failure.what),
    }
}
