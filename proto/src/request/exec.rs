//! Running commands: an exec is a job, whose log can be read again from any offset that is still kept.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Failure;
use crate::id::{JobId, PeerId};
#[cfg(doc)]
use crate::limits::{OUTPUT_WINDOW_BYTES, STDIN_WINDOW_BYTES};

/// What to run and how. The job's id is the id of the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecSpec {
    /// The command.
    pub command: Command,
    /// Working directory; the host user's home if absent.
    pub cwd: Option<Vec<u8>>,
    /// Variables set on top of the host's environment, in order.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Time after which the process group is ended.
    pub timeout: Option<Duration>,
    /// Whether the caller will send standard input by attaching; otherwise it is empty.
    pub stdin: bool,
    /// When the host answers, and what happens to output that nobody reads.
    pub follow: Follow,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// A program and its arguments, as bytes, with no shell between.
    Argv(Vec<Vec<u8>>),
    /// A line for the host's shell (`/bin/sh -c`).
    Shell(Vec<u8>),
}

/// Who reads a job's output, and so when the host answers an exec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Follow {
    /// The caller attaches: the host answers as soon as the job ended with output that fits the answer, or has run for
    /// a moment; a process whose output nobody reads is held back, and ended when nobody comes.
    Attached,
    /// The caller waits for the end only: the host answers then, with as much output as fits; nothing is held back.
    Collected,
    /// Nobody waits: the host answers when the process was started; nothing is held back.
    Detached,
}

/// How a job stands: the answer to an exec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobReport {
    /// The job.
    pub job: JobId,
    /// The end, unless it still runs.
    pub end: Option<JobEnd>,
    /// The first bytes of standard output, at most [`crate::limits::INLINE_OUTPUT_BYTES`].
    pub stdout: Captured,
    /// The first bytes of standard error, likewise.
    pub stderr: Captured,
}

/// The first bytes of one stream of output.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Captured {
    /// The bytes.
    #[serde(with = "crate::wire::bytes")]
    pub bytes: Vec<u8>,
    /// How many there were in all, so far.
    pub total: u64,
}

impl Captured {
    /// Whether there was more than travelled along.
    pub fn is_truncated(&self) -> bool {
        self.total > self.bytes.len() as u64
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobEnd {
    /// The end state.
    pub state: EndState,
    /// From the start of the process to its end.
    pub duration: Duration,
}

/// End states of a job on its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndState {
    /// The process ended by itself with this code.
    Exited(i32),
    /// A signal ended the process.
    Signalled(i32),
    /// The timeout ended the process.
    TimedOut,
    /// A caller ended the process, or nobody came to read it.
    Cancelled,
    /// The process could not be started.
    SpawnFailed(Failure),
    /// The host restarted while the job ran.
    Lost,
}

/// Follow a job from these offsets on. Repeating it after a lost connection loses and repeats nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The job.
    pub job: JobId,
    /// The first byte of standard output that is wanted.
    pub stdout_from: u64,
    /// The first byte of standard error that is wanted.
    pub stderr_from: u64,
    /// Whether to wait for more until the job ends, or end at what there is.
    pub follow: bool,
    /// Whether this caller owns the job: it sends input, its reading holds the process back, and its going ends it.
    pub owner: bool,
}

/// The host's answer to [`Attach`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Bytes of standard input that the host has taken so far: the caller goes on from there.
    pub stdin_taken: u64,
    /// Where standard output goes on: later than asked for if older bytes are no longer kept.
    pub stdout_from: u64,
    /// Where standard error goes on, likewise.
    pub stderr_from: u64,
}

/// What the host says on an attached stream, each behind a u32 length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHost {
    /// The next bytes of standard output.
    Stdout(#[serde(with = "crate::wire::bytes")] Vec<u8>),
    /// The next bytes of standard error.
    Stderr(#[serde(with = "crate::wire::bytes")] Vec<u8>),
    /// Bytes of standard input taken so far: the caller may forget them.
    StdinTaken(u64),
    /// The process no longer reads its standard input.
    StdinClosed,
    /// The job ended and all kept output was sent; the last word.
    End(JobEnd),
    /// The log ends here for now; the last word where the caller did not want to wait.
    Pause,
}

/// What the caller says on an attached stream, each behind a u32 length. The end of this direction means that the
/// caller is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromCaller {
    /// The next bytes of standard input; at most [`STDIN_WINDOW_BYTES`] beyond what the host has taken.
    Stdin(#[serde(with = "crate::wire::bytes")] Vec<u8>),
    /// Standard input ends here.
    StdinEnd,
    /// Output that the caller has passed on, so the host may let go of it. Said before half of
    /// [`OUTPUT_WINDOW_BYTES`] is outstanding, or the process is held back; and at the end, or the host keeps it a while
    /// for a caller that comes back.
    Taken {
        /// Bytes of standard output.
        stdout: u64,
        /// Bytes of standard error.
        stderr: u64,
    },
    /// Send this signal to the process group.
    Signal(JobSignal),
}

/// Signals that a caller may send to a job's process group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobSignal {
    /// SIGINT, as Ctrl-C does.
    Interrupt,
    /// SIGTERM, and SIGKILL if that does not end it.
    Terminate,
    /// Nobody reads the output any more: as SIGPIPE would, and SIGKILL if that does not end it.
    BrokenPipe,
}

/// One line of a host's list of jobs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSummary {
    /// The job.
    pub job: JobId,
    /// Who asked for it, as proved.
    pub caller: PeerId,
    /// The command as a person would write it, shortened.
    pub command: String,
    /// When it was started, in milliseconds since the Unix epoch by the host's clock.
    pub started_unix_ms: u64,
    /// The end, unless it still runs.
    pub end: Option<JobEnd>,
    /// Bytes of standard output so far.
    pub stdout_bytes: u64,
    /// Bytes of standard error so far.
    pub stderr_bytes: u64,
}
