//! Running a command on one host and following it: its output comes here in order, without a byte lost or repeated.
//!
//! In: what to run, standard input, what the user wants of it meanwhile. Out: output to an [`Output`], and the end.
//! It never holds more than [`STDIN_WINDOW_BYTES`] of input and one piece of output: whoever does not read here holds
//! the process there. Asking -> attached <-> reconnecting (up to [`RECONNECT_DEADLINE`] without progress) -> ended.

use std::{collections::VecDeque, io, time::Duration};

use peerfleet_proto::{
    id::{InstanceId, JobId},
    request::{
        FailureKind, Outcome, Request,
        exec::{Attach, Attached, EndState, ExecSpec, FromCaller, FromHost, JobEnd, JobReport, JobSignal},
        link::Route,
    },
};
use tokio::{sync::mpsc, time::Instant};

use super::{Client, RECONNECT_DEADLINE, RETRY_PAUSE};
use crate::{
    failure::{EXIT_INTERRUPTED, Failure, Kind},
    machine::Host,
    mesh::{AskFault, AskProgress, BoxFuture, Stream, stream::SendHalf},
    ui,
};

mod stdin;

pub use stdin::{STDIN_WINDOW_BYTES, Stdin};

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
    /// One of `refused`, `unreachable`, `lost`, `cancelled`, `spawn_failed`.
    pub state: &'static str,
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
    following.output.started(job).map_err(unwritten)?;
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
                if let Some(job) = job {
                    cancel(client, host.instance, job).await;
                }
                return Err(interrupted(host));
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
            (Ok(_), _) => Err(NotRun { state: "lost", failure: Failure::odd_answer(host.name()).not_run() }),
            (Err(AskFault::Lost | AskFault::DeadlineExceeded), Some(job)) if accepted => Ok((job, None)),
            (Err(fault), _) => Err(NotRun {
                state: if fault == AskFault::Unreachable { "unreachable" } else { "lost" },
                failure: Failure::from_ask(host.name(), fault).not_run(),
            }),
        };
    }
}

struct Following<'a> {
    client: &'a Client,
    host: &'a Host,
    job: JobId,
    owner: bool,
    stdout: u64,
    stderr: u64,
    stdout_broken: bool,
    stderr_broken: bool,
    output: &'a mut dyn Output,
    unsaid: VecDeque<JobSignal>,
}

/// How one attachment ended.
enum Detached {
    End(JobEnd),
    Pause,
    Lost,
    Quit,
    Failed(NotRun),
}

impl<'a> Following<'a> {
    fn new(client: &'a Client, host: &'a Host, job: JobId, owner: bool, output: &'a mut dyn Output) -> Self {
        Self {
            client,
            host,
            job,
            owner,
            stdout: 0,
            stderr: 0,
            stdout_broken: false,
            stderr_broken: false,
            output,
            unsaid: VecDeque::new(),
        }
    }

    fn finished(&self, end: Option<JobEnd>) -> Finished {
        Finished { job: self.job, end, broken_pipe: self.is_broken() }
    }

    fn is_broken(&self) -> bool {
        self.stdout_broken || self.stderr_broken
    }

    fn has_all_of(&self, stdout: u64, stderr: u64) -> bool {
        (self.stdout, self.stderr) == (stdout, stderr)
    }

    async fn write_captured(&mut self, report: &JobReport) -> Result<(), NotRun> {
        self.take(Which::Stdout, report.stdout.bytes.clone()).await.map_err(unwritten)?;
        self.take(Which::Stderr, report.stderr.bytes.clone()).await.map_err(unwritten)
    }

    /// Writes the next bytes of a stream, or drops them when nobody reads it any more.
    async fn take(&mut self, which: Which, bytes: Vec<u8>) -> io::Result<()> {
        let len = bytes.len() as u64;
        let (offset, broken) = match which {
            Which::Stdout => (&mut self.stdout, &mut self.stdout_broken),
            Which::Stderr => (&mut self.stderr, &mut self.stderr_broken),
        };
        *offset += len;
        if *broken || len == 0 {
            return Ok(());
        }
        match self.output.write(which, bytes).await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                *broken = true;
                Ok(())
            }
            written => written,
        }
    }

    async fn follow(&mut self, to_the_end: bool, input: &mut Input<'_>) -> Result<Option<JobEnd>, NotRun> {
        let mut give_up = Instant::now() + RECONNECT_DEADLINE;
        let mut instance = self.host.instance;
        loop {
            let before = (self.stdout, self.stderr);
            match self.attach(instance, to_the_end, input).await {
                Detached::End(end) => return Ok(Some(end)),
                Detached::Pause => return Ok(None),
                Detached::Failed(not_run) => return Err(not_run),
                Detached::Quit => return Err(interrupted(self.host)),
                Detached::Lost => {}
            }
            if self.is_broken() {
                cancel(self.client, instance, self.job).await;
                return Ok(None);
            }
            if before != (self.stdout, self.stderr) {
                give_up = Instant::now() + RECONNECT_DEADLINE;
            }
            if Instant::now() >= give_up {
                return Err(self.lost());
            }
            self.pause(instance, input.wishes).await?;
            instance = self.client.instance_of(self.host).await.unwrap_or(instance);
        }
    }

    /// Waits before the next try; the user can still wish meanwhile.
    async fn pause(&mut self, instance: InstanceId, wishes: &mut mpsc::Receiver<Wish>) -> Result<(), NotRun> {
        let until = Instant::now() + RETRY_PAUSE;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return Ok(()),
                Some(wish) = wishes.recv() => match wish {
                    Wish::Signal(signal) => self.unsaid.push_back(signal),
                    Wish::Cancel => cancel(self.client, instance, self.job).await,
                    Wish::Quit => return Err(interrupted(self.host)),
                },
            }
        }
    }

    async fn attach(&mut self, instance: InstanceId, to_the_end: bool, input: &mut Input<'_>) -> Detached {
        let head = Request::Attach(Attach {
            job: self.job,
            stdout_from: self.stdout,
            stderr_from: self.stderr,
            follow: to_the_end,
            owner: self.owner,
        });
        let opened = tokio::select! {
            opened = self.client.open(instance, head, Route::Auto) => opened,
            quit = quit_wish(input.wishes, &mut self.unsaid, self.client, instance, self.job) => return quit,
        };
        match opened {
            Ok((Outcome::Attached(attached), stream)) => {
                self.resume_at(attached, input.stdin.as_ref());
                self.converse(stream, instance, input).await
            }
            Ok((Outcome::Failed(failure), _)) if failure.kind == FailureKind::Busy => Detached::Lost,
            Ok((Outcome::Failed(failure), _)) => {
                let state = if failure.kind == FailureKind::Refused { "refused" } else { "lost" };
                let what = format!("cannot follow job {} on `{}`", self.job, self.host.name());
                Detached::Failed(NotRun { state, failure: Failure::from_host(what, failure).not_run() })
            }
            Ok((_, _)) => {
                let failure = Failure::odd_answer(self.host.name()).not_run();
                Detached::Failed(NotRun { state: "lost", failure })
            }
            Err(fault) => {
                tracing::debug!(%fault, "could not attach to the job; trying again");
                Detached::Lost
            }
        }
    }

    fn resume_at(&mut self, attached: Attached, stdin: Option<&Stdin>) {
        for (which, at, from) in [
            (Which::Stdout, &mut self.stdout, attached.stdout_from),
            (Which::Stderr, &mut self.stderr, attached.stderr_from),
        ] {
            if from > *at {
                self.output.gap(which, from - *at);
                *at = from;
            }
        }
        if let Some(stdin) = stdin {
            stdin.resume_at(attached.stdin_taken);
        }
    }

    /// Listens and speaks until the stream or the job ends.
    async fn converse(&mut self, stream: Stream, instance: InstanceId, input: &mut Input<'_>) -> Detached {
        let Stream { send, mut recv } = stream;
        let (words, heard) = mpsc::channel(WORDS_QUEUE);
        for signal in self.unsaid.drain(..) {
            // The queue is fresh and longer than the few signals that a person sends meanwhile.
            let _ = words.try_send(FromCaller::Signal(signal));
        }
        let Input { stdin, wishes } = input;
        let stdin = stdin.as_ref();
        let (client, job) = (self.client, self.job);
        tokio::select! {
            ended = self.listen(&mut recv, &words, stdin) => ended,
            Err(error) = speak(send, heard) => {
                tracing::debug!(%error, "the stream of the job broke");
                Detached::Lost
            }
            () = feed(stdin, &words), if stdin.is_some() => Detached::Lost,
            () = grant(wishes, &words, client, instance, job) => Detached::Quit,
        }
    }

    async fn listen(
        &mut self,
        recv: &mut crate::mesh::stream::RecvHalf,
        words: &mpsc::Sender<FromCaller>,
        stdin: Option<&Stdin>,
    ) -> Detached {
        let mut broken_since: Option<Instant> = None;
        loop {
            let patience = broken_since.map(|since| since + BROKEN_PIPE_GRACE);
            let frame = tokio::select! {
                frame = recv.read_frame::<FromHost>() => frame,
                () = sleep_until(patience) => return Detached::Lost,
            };
            let (which, bytes) = match frame {
                Ok(Some(FromHost::Stdout(bytes))) => (Which::Stdout, bytes),
                Ok(Some(FromHost::Stderr(bytes))) => (Which::Stderr, bytes),
                Ok(Some(FromHost::StdinTaken(taken))) => {
                    if let Some(stdin) = stdin {
                        stdin.taken(taken);
                    }
                    continue;
                }
                Ok(Some(FromHost::StdinClosed)) => {
                    if let Some(stdin) = stdin {
                        stdin.close();
                    }
                    continue;
                }
                Ok(Some(FromHost::End(end))) => return Detached::End(end),
                Ok(Some(FromHost::Pause)) => return Detached::Pause,
                Ok(None) | Err(_) => return Detached::Lost,
            };
            if let Err(error) = self.take(which, bytes).await {
                let _ = words.send(FromCaller::Signal(JobSignal::Terminate)).await;
                return Detached::Failed(unwritten(error));
            }
            if self.is_broken() && broken_since.is_none() {
                broken_since = Some(Instant::now());
                if !self.owner || words.send(FromCaller::Signal(JobSignal::BrokenPipe)).await.is_err() {
                    return Detached::Pause;
                }
            }
            let taken = FromCaller::Taken { stdout: self.stdout, stderr: self.stderr };
            if words.send(taken).await.is_err() {
                return Detached::Lost;
            }
        }
    }

    fn lost(&self) -> NotRun {
        let host = self.host.name();
        let failure = Failure::unreachable(format!("lost job {} on `{host}`", self.job))
            .cause(format!("no connection to it for {} s", RECONNECT_DEADLINE.as_secs()))
            .hint(format!("`peer jobs {host}` tells how it ended once the host is back"));
        NotRun { state: "lost", failure: failure.not_run() }
    }
}

/// Sends what is to be said until the stream breaks.
async fn speak(mut send: SendHalf, mut words: mpsc::Receiver<FromCaller>) -> io::Result<()> {
    while let Some(word) = words.recv().await {
        send.write_frame(&word).await?;
    }
    std::future::pending().await
}

/// Sends standard input as far as the host takes it; never ends.
async fn feed(stdin: Option<&Stdin>, words: &mpsc::Sender<FromCaller>) {
    let Some(stdin) = stdin else { return };
    loop {
        let word = stdin.next().await;
        let _ = words.send(word).await;
    }
}

/// Does what the user wants; ends when they want to quit.
async fn grant(
    wishes: &mut mpsc::Receiver<Wish>,
    words: &mpsc::Sender<FromCaller>,
    client: &Client,
    instance: InstanceId,
    job: JobId,
) {
    while let Some(wish) = wishes.recv().await {
        match wish {
            Wish::Signal(signal) => {
                let _ = words.send(FromCaller::Signal(signal)).await;
            }
            Wish::Cancel => cancel(client, instance, job).await,
            Wish::Quit => return,
        }
    }
    std::future::pending().await
}

/// Likewise while no stream stands: signals wait for it.
async fn quit_wish(
    wishes: &mut mpsc::Receiver<Wish>,
    unsaid: &mut VecDeque<JobSignal>,
    client: &Client,
    instance: InstanceId,
    job: JobId,
) -> Detached {
    while let Some(wish) = wishes.recv().await {
        match wish {
            Wish::Signal(signal) => unsaid.push_back(signal),
            Wish::Cancel => cancel(client, instance, job).await,
            Wish::Quit => return Detached::Quit,
        }
    }
    std::future::pending().await
}

async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
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
    NotRun { state, failure: Failure::from_host(format!("cannot run this on `{}`", host.name()), failure).not_run() }
}

fn interrupted(host: &Host) -> NotRun {
    let failure = Failure::new(Kind::Fixable, format!("interrupted; the command on `{}` may still run", host.name()))
        .hint(format!("`peer jobs {}` shows it, `peer cancel` ends it", host.name()))
        .exit_with(EXIT_INTERRUPTED);
    NotRun { state: "cancelled", failure }
}

fn unwritten(error: io::Error) -> NotRun {
    NotRun { state: "lost", failure: ui::unwritten(error) }
}
