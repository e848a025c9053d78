//! Running a command on one host and following it: its output comes here in order, without a byte lost or repeated.
//!
//! In: what to run, standard input, what the user wants of it meanwhile. Out: output to an [`Output`], and the end.
//! It never holds more than [`STDIN_WINDOW_BYTES`] of input and one piece of output: whoever does not read here holds
//! the process there. Asking -> attached <-> reconnecting (up to [`RECONNECT_DEADLINE`] without progress) -> ended.

use std::{io, time::Duration};

use peerfleet_proto::{
    id::{InstanceId, JobId},
    request::{
        FailureKind, Outcome, Request,
        exec::{EndState, ExecSpec, JobEnd, JobReport, JobSignal},
    },
};
use tokio::{sync::mpsc, time::timeout};

use super::Client;
#[cfg(doc)]
use super::RECONNECT_DEADLINE;
use crate::{
    failure::{EXIT_INTERRUPTED, Failure, Kind},
    machine::Host,
    mesh::{AskFault, AskProgress, BoxFuture},
    ui,
};

mod follow;
mod stdin;

pub use stdin::{STDIN_WINDOW_BYTES, Stdin};

use follow::Following;

/// Time for a host to say that the command runs: it answers within a moment, so this is the way there and back.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// Time for a host to take a cancellation.
const CANCEL_DEADLINE: Duration = Duration::from_secs(5);

/// Time for a process to end after nobody reads its output any more; then it is cancelled.
const BROKEN_PIPE_GRACE: Duration = Duration::from_secs(10);

/// Words to the host that wait to be sent; the speaker waits beyond.
const WORDS_QUEUE: usize = 16;

/// Which of the two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Where output goes.
pub trait Output: Send {
    /// The job was started, or found.
    fn started(&mut self, job: JobId) -> io::Result<()>;

    /// Writes bytes in full before it returns. `BrokenPipe` means that nobody reads this stream any more.
    fn write(&mut self, which: Which, bytes: Vec<u8>) -> BoxFuture<io::Result<()>>;

    /// So many bytes of the stream are gone: the host no longer keeps them.
    fn gap(&mut self, which: Which, bytes: u64);
}

/// What the user wants while the command runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Send a signal to the process group.
    Signal(JobSignal),
    /// End the job by all means.
    Cancel,
    /// Wait no longer.
    Quit,
}

/// How following a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// The job.
    pub job: JobId,
    /// Its end; `None` if the log ends before the job does.
    pub end: Option<JobEnd>,
    /// Whether whoever read our output went away before.
    pub broken_pipe: bool,
}

/// Why a command did not run, or why its end is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotRun {
    /// One of `refused`, `unreachable`, `spawn_failed`: it did not run. `lost`, `cancelled`: it may have.
    pub state: &'static str,
    /// The job that `peer jobs` shows on the host if it did run; `None` if it certainly did not.
    pub job: Option<JobId>,
    /// For a person.
    pub failure: Failure,
}

/// What goes into a command from here.
pub struct Input<'a> {
    /// What it reads, unless it reads nothing.
    pub stdin: Option<Stdin>,
    /// What the user wants meanwhile.
    pub wishes: &'a mut mpsc::Receiver<Wish>,
}

/// Runs a command and follows it to its end.
///
/// # Errors
/// [`NotRun`] if it did not run, or was lost.
pub async fn run(
    client: &Client,
    host: &Host,
    spec: ExecSpec,
    output: &mut dyn Output,
    mut input: Input<'_>,
) -> Result<Finished, NotRun> {
    let (job, report) = start(client, host, spec, input.wishes).await?;
    let mut following = Following::new(client, host, job, true, output);
    following.output.started(job).map_err(|error| unwritten(job, error))?;
    if let Some(report) = report {
        following.write_captured(&report).await?;
        if let Some(end) = report.end.filter(|_| following.has_all_of(report.stdout.total, report.stderr.total)) {
            return Ok(following.finished(Some(end)));
        }
    }
    let end = following.follow(true, &mut input).await?;
    Ok(following.finished(end))
}

/// Starts a command that nobody waits for.
///
/// # Errors
/// [`NotRun`] if it was not started.
pub async fn detach(
    client: &Client,
    host: &Host,
    spec: ExecSpec,
    wishes: &mut mpsc::Receiver<Wish>,
) -> Result<JobId, NotRun> {
    Ok(start(client, host, spec, wishes).await?.0)
}

/// Reads a job's log from its beginning; with `follow`, to the job's end.
///
/// # Errors
/// [`NotRun`] if the host cannot be asked, or does not know the job.
pub async fn log(
    client: &Client,
    host: &Host,
    job: JobId,
    follow: bool,
    output: &mut dyn Output,
    wishes: &mut mpsc::Receiver<Wish>,
) -> Result<Finished, NotRun> {
    let mut following = Following::new(client, host, job, false, output);
    let end = following.follow(follow, &mut Input { stdin: None, wishes }).await?;
    Ok(following.finished(end))
}

/// Asks the host; `None` in place of a report if the host took the request but its answer was lost.
async fn start(
    client: &Client,
    host: &Host,
    spec: ExecSpec,
    wishes: &mut mpsc::Receiver<Wish>,
) -> Result<(JobId, Option<JobReport>), NotRun> {
    let mut progress = client.ask_many(&[host.instance], &Request::Exec(spec), START_DEADLINE);
    let mut job = None;
    let mut accepted = false;
    loop {
        let said = tokio::select! {
            said = progress.recv() => said,
            Some(_wish) = wishes.recv() => {
                // It was asked already: without its id nobody could end it.
                if job.is_none()
                    && let Ok(Some((_, AskProgress::Asked(id)))) = timeout(CANCEL_DEADLINE, progress.recv()).await
                {
                    job = Some(JobId::from(id));
                }
                if let Some(job) = job {
                    cancel(client, host.instance, job).await;
                }
                return Err(interrupted(host, job));
            }
        };
        let ended = match said {
            Some((_, AskProgress::Asked(id))) => {
                job = Some(JobId::from(id));
                continue;
            }
            Some((_, AskProgress::Accepted)) => {
                accepted = true;
                continue;
            }
            Some((_, AskProgress::Ended(ended))) => ended,
            None => Err(AskFault::Lost),
        };
        return match (ended, job) {
            (Ok(Outcome::Job(report)), _) => Ok((report.job, Some(report))),
            (Ok(Outcome::Failed(failure)), _) => Err(refused(host, failure)),
            (Ok(_), job) => Err(NotRun { state: "lost", job, failure: Failure::odd_answer(host.name()).not_run() }),
            (Err(AskFault::Lost | AskFault::DeadlineExceeded), Some(job)) if accepted => Ok((job, None)),
            (Err(fault), job) => Err(unasked(host, job, fault)),
        };
    }
}

/// Asking led to nothing, and `job` is what it would have been.
fn unasked(host: &Host, job: Option<JobId>, fault: AskFault) -> NotRun {
    let (state, job) = match fault {
        AskFault::Unreachable => ("unreachable", None),
        AskFault::Lost | AskFault::DeadlineExceeded => ("lost", job),
        AskFault::TooLarge | AskFault::Busy => ("refused", None),
    };
    NotRun { state, job, failure: Failure::from_ask(host.name(), fault).not_run() }
}

/// Asks the host to end a job; whether it did shows in the job's end.
pub(crate) async fn cancel(client: &Client, instance: InstanceId, job: JobId) {
    if let Err(fault) = client.ask(instance, &Request::Cancel(job), CANCEL_DEADLINE).await {
        tracing::debug!(%fault, "the host did not take the cancellation");
    }
}

/// The exit code that a job's end leads to, as a shell would have it.
pub fn exit_code(end: &EndState) -> u8 {
    match end {
        EndState::Exited(code) => u8::try_from(code & 0xFF).expect("masked to a byte"),
        EndState::Signalled(signal) => u8::try_from(128 + (signal & 0x7F)).unwrap_or(u8::MAX),
        EndState::TimedOut => crate::failure::EXIT_TIMED_OUT,
        EndState::Cancelled => EXIT_INTERRUPTED,
        EndState::SpawnFailed(_) | EndState::Lost => crate::failure::EXIT_NOT_RUN,
    }
}

fn refused(host: &Host, failure: peerfleet_proto::request::Failure) -> NotRun {
    let state = match failure.kind {
        FailureKind::Refused | FailureKind::Busy => "refused",
        FailureKind::Unreachable => "unreachable",
        FailureKind::NotFound
        | FailureKind::Invalid
        | FailureKind::Os
        | FailureKind::Corrupt
        | FailureKind::Internal => "spawn_failed",
    };
    let failure = Failure::from_host(format!("cannot run this on `{}`", host.name()), failure).not_run();
    NotRun { state, job: None, failure }
}

fn interrupted(host: &Host, job: Option<JobId>) -> NotRun {
    let failure = Failure::new(Kind::Fixable, format!("interrupted; the command on `{}` may still run", host.name()))
        .hint(format!("`peer jobs {}` shows it, `peer cancel` ends it", host.name()))
        .exit_with(EXIT_INTERRUPTED);
    NotRun { state: "cancelled", job, failure }
}

/// Output of a job that could not be written here.
fn unwritten(job: JobId, error: io::Error) -> NotRun {
    NotRun { state: "lost", job: Some(job), failure: ui::unwritten(error) }
}
