//! Between a process's pipes and its job's logs and input.
//!
//! In: bytes from the pipes, input from the owner, which phase the process is in. Out: bytes in the logs, bytes in the
//! pipe. It never decides when a job ends; it only sees to it that reading does, although some process that nobody
//! knows of may hold a pipe for ever. Running (reads as there is room) -> Exited (reads until the end of the pipe, a
//! quiet moment, or [`AFTERMATH`]) -> Drain (takes what is in the pipe, room or not, at most [`PIPE_BYTES`]).

use std::{future::poll_fn, path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use bytes::BufMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, ChildStderr, ChildStdin, ChildStdout},
    sync::watch,
    task::spawn_blocking,
    time::{Instant, timeout},
};

use super::{
    job::{Job, Which},
    log::Place,
    spool::Spool,
};

/// Time that is spent on reading what processes write after the one that was started has exited.
const AFTERMATH: Duration = Duration::from_secs(2);

/// Most that is read once the process group has ended: the largest pipe that Linux gives to a user
/// (`/proc/sys/fs/pipe-max-size`).
const PIPE_BYTES: usize = 1024 * 1024;

/// First and largest size of the buffer for one read: most jobs say little; a pipe holds 64 KiB, or what its writer asked
/// for.
const READ_BYTES: (usize, usize) = (8 * 1024, 256 * 1024);

/// How a process stands, as far as its pipes are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// It runs.
    Running,
    /// It exited; others may still write to its pipes.
    Exited,
    /// Whoever could be ended was ended.
    Drain,
}

/// How to pump.
#[derive(Debug, Clone)]
pub(super) struct PumpRules {
    /// Folder for the spool.
    pub(super) folder: PathBuf,
    /// Bytes of each of the spool's rings.
    pub(super) ring: u64,
    /// Silence on a pipe after which nobody is expected to write to it, once the process exited.
    pub(super) quiet: Duration,
}

/// The pipes of a process.
pub(super) struct Pipes {
    stdout: ChildStdout,
    stderr: ChildStderr,
    stdin: Option<ChildStdin>,
}

impl Pipes {
    /// Takes the pipes of a process just started.
    ///
    /// # Panics
    /// If it was started without pipes for output.
    pub(super) fn of(child: &mut Child) -> Self {
        let stdout = child.stdout.take().expect("standard output is piped");
        let stderr = child.stderr.take().expect("standard error is piped");
        Self { stdout, stderr, stdin: child.stdin.take() }
    }
}

/// Moves bytes until nothing more is to be expected.
pub(super) async fn pump(job: Arc<Job>, pipes: Pipes, phase: watch::Receiver<Phase>, rules: PumpRules) {
    let input = async {
        if let Some(pipe) = pipes.stdin {
            feed(&job, pipe, phase.clone()).await;
        }
    };
    let output = async {
        tokio::join!(
            collect(&job, Which::Stdout, pipes.stdout, phase.clone(), &rules),
            collect(&job, Which::Stderr, pipes.stderr, phase.clone(), &rules),
        )
    };
    tokio::select! {
        _ = output => {}
        () = async { input.await; std::future::pending().await } => {}
    }
    job.input().close();
}

/// Feeds the process until its input ends or it reads no more.
async fn feed(job: &Job, mut pipe: ChildStdin, mut phase: watch::Receiver<Phase>) {
    let write = async {
        loop {
            if job.input().is_over() {
                return;
            }
            if !job.input().is_waiting() {
                job.input_came().await;
                continue;
            }
            if poll_fn(|cx| job.input().poll_write(Pin::new(&mut pipe), cx)).await.is_err() {
                return;
            }
            job.tell();
        }
    };
    tokio::select! {
        () = write => {}
        _ = phase.wait_for(|phase| *phase == Phase::Drain) => {}
    }
    job.input().close();
    job.tell();
}

/// Collects one stream of output.
async fn collect(
    job: &Job,
    which: Which,
    mut pipe: impl AsyncRead + Unpin,
    mut phase: watch::Receiver<Phase>,
    rules: &PumpRules,
) {
    let mut buffer = Vec::with_capacity(READ_BYTES.0);
    let mut aftermath = AFTERMATH;
    loop {
        let now = *phase.borrow_and_update();
        let patience = match now {
            Phase::Running => Duration::MAX,
            Phase::Exited if aftermath.is_zero() => return,
            Phase::Exited => rules.quiet.min(aftermath),
            Phase::Drain => break,
        };
        let room = tokio::select! {
            room = job.room(which) => room,
            changed = phase.changed() => if changed.is_ok() { continue } else { return },
        };
        let began = Instant::now();
        let read = tokio::select! {
            read = read(&mut pipe, &mut buffer, room, patience) => read,
            changed = phase.changed() => if changed.is_ok() { continue } else { return },
        };
        match read {
            Read::Some => buffer = keep(job, which, buffer, rules).await,
            Read::End | Read::Quiet => return,
        }
        if now == Phase::Exited {
            aftermath = aftermath.saturating_sub(began.elapsed());
        }
    }
    // Silence or the end comes at once, unless somebody outside the group holds the pipe.
    let _ = timeout(AFTERMATH, drain(job, which, &mut pipe, buffer, rules)).await;
}

async fn drain(job: &Job, which: Which, pipe: &mut (impl AsyncRead + Unpin), mut buffer: Vec<u8>, rules: &PumpRules) {
    let mut left = PIPE_BYTES;
    while left > 0 && read(pipe, &mut buffer, left, rules.quiet).await == Read::Some {
        left -= buffer.len();
        buffer = keep(job, which, buffer, rules).await;
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Read {
    Some,
    End,
    Quiet,
}

/// Reads into the empty buffer, at most `room` bytes. A pipe that breaks has ended.
async fn read(pipe: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>, room: usize, patience: Duration) -> Read {
    let room = room.min(buffer.capacity());
    let mut limited = buffer.limit(room);
    let read = pipe.read_buf(&mut limited);
    let read = if patience == Duration::MAX { Ok(read.await) } else { timeout(patience, read).await };
    match read {
        Ok(Ok(0) | Err(_)) => Read::End,
        Ok(Ok(_)) => Read::Some,
        Err(_) => Read::Quiet,
    }
}

/// Puts the bytes where they belong, and gives back a buffer for the next.
async fn keep(job: &Job, which: Which, bytes: Vec<u8>, rules: &PumpRules) -> Vec<u8> {
    let was_full = bytes.len() == bytes.capacity();
    let place = job.log(which).place(bytes.len(), rules.ring);
    let mut buffer = match place {
        Place::Memory => {
            job.log(which).append(&bytes);
            bytes
        }
        Place::Spool { at, moved } => to_spool(job, which, (at, moved), bytes, rules).await,
    };
    job.tell();
    buffer.clear();
    if was_full && buffer.capacity() < READ_BYTES.1 {
        buffer.reserve_exact(buffer.capacity() * 2);
    }
    buffer
}

async fn to_spool(job: &Job, which: Which, moved: (u64, Vec<u8>), bytes: Vec<u8>, rules: &PumpRules) -> Vec<u8> {
    let (folder, ring, id) = (rules.folder.clone(), rules.ring, job.id);
    let spool = match job.spool() {
        Some(spool) => Some(spool),
        None => {
            let made = spawn_blocking(move || Spool::create(&folder, id, ring)).await;
            job.put_spool(made.ok().and_then(|made| made.inspect_err(|error| warn(job, error)).ok()))
        }
    };
    let Some(spool) = spool else {
        job.log(which).spool_failed(&bytes);
        return bytes;
    };
    let writing = spawn_blocking(move || {
        let (at, moved) = moved;
        let written = spool.write(which, at, &moved);
        let written = written.and_then(|()| spool.write(which, at + moved.len() as u64, &bytes));
        (written, bytes)
    });
    let (written, bytes) = writing.await.expect("writing to a spool neither panics nor is aborted");
    match written {
        Ok(()) => job.log(which).spooled(&bytes, rules.ring),
        Err(error) => {
            warn(job, &error);
            job.log(which).spool_failed(&bytes);
        }
    }
    bytes
}

fn warn(job: &Job, error: &std::io::Error) {
    tracing::warn!(job = %job.id, %error, "the job's output cannot be kept on disk: only the newest of it is kept");
}
