//! The life of one process, from its start to its end state.
//!
//! In: a process just started, and what its job is told: interrupts, reasons to end. Out: how it ended, once its output
//! is in the logs. It never leaves a process of the group behind, save those of a detached job that exited by itself.
//! Running -> Exited (by itself), or -> Asked (the group got a signal) -> Killed ([`Patience::grace`] later); then the
//! rest of the group is ended in the same two steps, and the pipes are drained.
//!
//! A job whose process exited ends as soon as its pipes do. Where another process of the group keeps a pipe, a quiet
//! moment ends the wait; a detached job waits for it, as nobody waits for the job.

use std::{process::ExitStatus, sync::Arc, time::Duration};

use peerfleet_proto::request::exec::{EndState, Follow, JobEnd};
use rustix::process::Signal;
use tokio::{
    process::Child,
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep_until, timeout, timeout_at},
};

use super::{
    job::{Ending, Job},
    process::{Group, end_state},
    pump::{Phase, Pipes, PumpRules, pump},
};

/// Time that a killed process is waited for; one that the system does not let go of (dead network file systems do
/// that) is left to it.
const AFTER_KILL: Duration = Duration::from_secs(5);

/// Time that the rest of a killed group is waited for: longer only where nobody reaps orphans.
const REST_AFTER_KILL: Duration = Duration::from_millis(100);

/// How long to wait for what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// From asking a group to end to killing it.
    pub(super) grace: Duration,
    /// From the going of an owner to the cancelling of its job.
    pub(super) abandoned: Duration,
}

/// Why a process does not run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    TimedOut,
    Told(Ending),
}

struct Life {
    job: Arc<Job>,
    child: Child,
    group: Group,
    grace: Duration,
    phase: watch::Sender<Phase>,
    pumps: JoinHandle<()>,
}

/// Sees to a process until its end, which the caller publishes.
pub(super) async fn supervise(
    job: Arc<Job>,
    mut child: Child,
    timeout: Option<Duration>,
    patience: Patience,
    rules: PumpRules,
) -> JobEnd {
    let started = Instant::now();
    let deadline = timeout.and_then(|timeout| started.checked_add(timeout));
    let (phase, seen) = watch::channel(Phase::Running);
    let pumps = tokio::spawn(pump(job.clone(), Pipes::of(&mut child), seen, rules));
    let group = Group::of(&child);
    let told = job.clone();
    let cause = cause(&told, deadline, patience.abandoned);
    let mut life = Life { job, child, group, grace: patience.grace, phase, pumps };
    let (state, ended) = life.until_the_end(cause).await;
    life.phase.send_replace(Phase::Drain);
    Life::wait(&mut life.pumps).await;
    JobEnd { state, duration: ended - started }
}

async fn cause(job: &Job, deadline: Option<Instant>, patience: Duration) -> Cause {
    let timed_out = async {
        match deadline {
            Some(deadline) => sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    };
    let abandoned = async {
        match job.follow {
            Follow::Attached => job.abandoned(patience).await,
            Follow::Collected | Follow::Detached => std::future::pending().await,
        }
    };
    tokio::select! {
        () = timed_out => Cause::TimedOut,
        why = job.must_end() => Cause::Told(why),
        () = abandoned => {
            tracing::info!(job = %job.id, "nobody came to read the job's output: it is cancelled");
            Cause::Told(Ending::Cancelled)
        }
    }
}

impl Life {
    async fn until_the_end(&mut self, cause: impl Future<Output = Cause>) -> (EndState, Instant) {
        let mut cause = std::pin::pin!(cause);
        loop {
            tokio::select! {
                status = self.child.wait() => {
                    let ended = Instant::now();
                    self.phase.send_replace(Phase::Exited);
                    self.aftermath(cause).await;
                    return (self.natural(status.ok()), ended);
                }
                cause = &mut cause => return (self.force(cause).await, Instant::now()),
                () = self.job.interrupted() => self.group.signal(Signal::INT),
            }
        }
    }

    /// The process exited by itself: waits for the end of its pipes, then ends the rest of the group.
    async fn aftermath(&mut self, mut cause: impl Future<Output = Cause> + Unpin) {
        let told = loop {
            tokio::select! {
                () = Self::wait(&mut self.pumps) => break false,
                _ = &mut cause => break true,
                () = self.job.interrupted() => self.group.signal(Signal::INT),
            }
        };
        let is_detached = self.job.follow == Follow::Detached;
        if (told || !is_detached) && !self.group.gone_by(Instant::now()).await {
            self.group.ask_to_end(Signal::TERM);
            self.end_rest(Instant::now() + self.grace).await;
        }
    }

    /// Ends the process and its group.
    async fn force(&mut self, cause: Cause) -> EndState {
        let deadline = Instant::now() + self.grace;
        let mut status = None;
        if cause == Cause::Told(Ending::BrokenPipe) {
            self.group.ask_to_end(Signal::PIPE);
            status = timeout(self.grace / 2, self.child.wait()).await.ok();
        }
        if status.is_none() {
            self.group.ask_to_end(Signal::TERM);
            status = timeout_at(deadline, self.child.wait()).await.ok();
        }
        let was_killed = status.is_none();
        if was_killed {
            self.group.signal(Signal::KILL);
            status = timeout(AFTER_KILL, self.child.wait()).await.ok();
        }
        self.end_rest(deadline).await;
        match cause {
            Cause::TimedOut => EndState::TimedOut,
            Cause::Told(Ending::BrokenPipe) if !was_killed => self.natural(status.and_then(Result::ok)),
            Cause::Told(Ending::Cancelled | Ending::BrokenPipe) => EndState::Cancelled,
        }
    }

    async fn end_rest(&mut self, deadline: Instant) {
        if !self.group.gone_by(deadline).await {
            self.group.signal(Signal::KILL);
            self.group.gone_by(Instant::now() + REST_AFTER_KILL).await;
        }
    }

    fn natural(&self, status: Option<ExitStatus>) -> EndState {
        let Some(status) = status else {
            tracing::error!(job = %self.job.id, "the system does not say how the process ended");
            return EndState::Lost;
        };
        end_state(status)
    }

    /// Waits for the pumps, which may have been waited for before.
    async fn wait(pumps: &mut JoinHandle<()>) {
        if !pumps.is_finished() {
            // It neither panics nor is aborted.
            let _ = pumps.await;
        }
    }
}
