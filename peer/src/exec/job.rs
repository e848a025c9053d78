//! One job: what its process, its owner and its viewers share.
//!
//! In: output, input, orders and the end, each from the task that has it. Out: the same, to whoever waits for it. It
//! never waits itself and starts nothing. Recorded -> Begun -> Ended (published once); beside it Unowned <-> Owned.
//! Bounds: those of [`Log`] and [`Input`].

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use peerfleet_proto::{
    id::{JobId, PeerId},
    limits::INLINE_OUTPUT_BYTES,
    request::exec::{Captured, ExecSpec, Follow, JobEnd, JobReport, JobSignal, JobSummary},
};
use tokio::sync::{Notify, watch};

use super::{input::Input, log::Log, process, spool::Spool};

/// One of the two streams of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Stdout,
    Stderr,
}

impl Which {
    /// Number of the stream.
    pub(super) fn index(self) -> usize {
        self as usize
    }
}

/// Why a process must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// A caller, or the host's own end, wants it.
    Cancelled,
    /// Nobody reads its output any more.
    BrokenPipe,
}

/// Who may speak to the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Owner {
    /// Counts the owners there were: only the newest speaks.
    pub(super) number: u64,
    /// Whether it is here now.
    pub(super) here: bool,
}

/// One job.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) id: JobId,
    pub(super) caller: PeerId,
    pub(super) follow: Follow,
    command: String,
    started_unix_ms: u64,
    logs: [Mutex<Log>; 2],
    spool: Mutex<Option<Arc<Spool>>>,
    room: [Notify; 2],
    input: Mutex<Input>,
    input_came: Notify,
    interrupts: Notify,
    ending: watch::Sender<Option<Ending>>,
    owner: watch::Sender<Owner>,
    begun: watch::Sender<bool>,
    end: watch::Sender<Option<JobEnd>>,
    /// Told whenever an attached stream may have something to say.
    news: watch::Sender<()>,
    delivered: watch::Sender<bool>,
}

impl Job {
    /// A job whose process is about to be started.
    pub(super) fn new(id: JobId, caller: PeerId, spec: &ExecSpec) -> Self {
        let log = || match spec.follow {
            Follow::Attached => Mutex::new(Log::held()),
            Follow::Collected | Follow::Detached => Mutex::new(Log::running()),
        };
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            id,
            caller,
            follow: spec.follow,
            command: process::shown(&spec.command),
            started_unix_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX),
            logs: [log(), log()],
            spool: Mutex::new(None),
            room: [Notify::new(), Notify::new()],
            input: Mutex::new(Input::new(spec.stdin)),
            input_came: Notify::new(),
            interrupts: Notify::new(),
            ending: watch::Sender::new(None),
            owner: watch::Sender::default(),
            begun: watch::Sender::new(false),
            end: watch::Sender::new(None),
            news: watch::Sender::new(()),
            delivered: watch::Sender::new(false),
        }
    }

    /// One stream's log. Held for moments only, never across an await.
    pub(super) fn log(&self, which: Which) -> MutexGuard<'_, Log> {
        self.logs[which.index()].lock().expect("nothing panics while it holds a log")
    }

    /// Standard input on its way to the process. Held as [`Job::log`] is.
    pub(super) fn input(&self) -> MutexGuard<'_, Input> {
        self.input.lock().expect("nothing panics while it holds the input")
    }

    /// The spool, if there is one.
    pub(super) fn spool(&self) -> Option<Arc<Spool>> {
        self.spool_place().clone()
    }

    /// Puts a spool where there is none; says which there is now.
    pub(super) fn put_spool(&self, made: Option<Spool>) -> Option<Arc<Spool>> {
        let mut place = self.spool_place();
        if place.is_none() {
            *place = made.map(Arc::new);
        }
        place.clone()
    }

    /// Lets go of the spool; its disk is free when the last reader is done.
    pub(super) fn drop_spool(&self) {
        *self.spool_place() = None;
    }

    fn spool_place(&self) -> MutexGuard<'_, Option<Arc<Spool>>> {
        self.spool.lock().expect("nothing panics while it holds the spool")
    }

    /// Something happened that an attached stream may tell.
    pub(super) fn tell(&self) {
        self.news.send_replace(());
    }

    /// What [`Job::tell`] tells.
    pub(super) fn news(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }

    /// The owner has passed on output up to this offset.
    pub(super) fn take(&self, which: Which, upto: u64) {
        self.log(which).take(upto);
        self.room[which.index()].notify_one();
    }

    /// Whether the owner has passed on all output, and no more will come.
    pub(super) fn is_taken(&self) -> bool {
        self.end().is_some() && self.log(Which::Stdout).is_taken() && self.log(Which::Stderr).is_taken()
    }

    /// Waits until more may be read from the pipe, and says how much.
    pub(super) async fn room(&self, which: Which) -> usize {
        loop {
            let room = self.log(which).room();
            if room > 0 {
                return room;
            }
            self.room[which.index()].notified().await;
        }
    }

    /// Input came, or its end.
    pub(super) fn wake_input(&self) {
        self.input_came.notify_one();
    }

    /// Waits for [`Job::wake_input`].
    pub(super) async fn input_came(&self) {
        self.input_came.notified().await;
    }

    /// A caller sends a signal.
    pub(super) fn signal(&self, signal: JobSignal) {
        match signal {
            JobSignal::Interrupt => self.interrupts.notify_one(),
            JobSignal::Terminate => self.make_end(Ending::Cancelled),
            JobSignal::BrokenPipe => self.make_end(Ending::BrokenPipe),
        }
    }

    /// Waits until a caller interrupts the process; interrupts that come together are one, as signals are.
    pub(super) async fn interrupted(&self) {
        self.interrupts.notified().await;
    }

    /// The process must end; the first reason stands.
    pub(super) fn make_end(&self, why: Ending) {
        self.ending.send_if_modified(|ending| {
            let first = ending.is_none();
            *ending = ending.or(Some(why));
            first
        });
    }

    /// Whether it must end, perhaps before it began.
    pub(super) fn is_to_end(&self) -> bool {
        self.ending.borrow().is_some()
    }

    /// Waits until the process must end.
    pub(super) async fn must_end(&self) -> Ending {
        let mut ending = self.ending.subscribe();
        let why = ending.wait_for(Option::is_some).await;
        why.ok().and_then(|why| *why).expect("the job holds the sender, and waits for a reason")
    }

    /// A new owner: whoever was it before no longer is. Says its number.
    pub(super) fn claim(&self) -> u64 {
        self.owner.send_modify(|owner| *owner = Owner { number: owner.number + 1, here: true });
        self.owner.borrow().number
    }

    /// The owner of that number left.
    pub(super) fn leave(&self, number: u64) {
        self.owner.send_if_modified(|owner| {
            let was_here = owner.number == number && owner.here;
            owner.here &= owner.number != number;
            was_here
        });
    }

    /// Who owns the job.
    pub(super) fn owner(&self) -> watch::Receiver<Owner> {
        self.owner.subscribe()
    }

    /// Waits until nobody has owned the job for so long.
    pub(super) async fn abandoned(&self, patience: Duration) {
        let mut owner = self.owner.subscribe();
        loop {
            if owner.wait_for(|owner| !owner.here).await.is_err() {
                return;
            }
            if tokio::time::timeout(patience, owner.wait_for(|owner| owner.here)).await.is_err() {
                return;
            }
        }
    }

    /// The process was started, or could not be.
    pub(super) fn begin(&self) {
        self.begun.send_replace(true);
    }

    /// Waits until the process was started, or could not be.
    pub(super) async fn begun(&self) {
        // The job holds the sender: this ends when it has begun.
        let _ = self.begun.subscribe().wait_for(|begun| *begun).await;
    }

    /// The job ended: published once, after its output.
    pub(super) fn finish(&self, end: JobEnd) {
        self.end.send_replace(Some(end));
        self.tell();
    }

    /// The end, if it came.
    pub(super) fn end(&self) -> Option<JobEnd> {
        self.end.borrow().clone()
    }

    /// Waits for the end.
    pub(super) async fn ended(&self) -> JobEnd {
        let mut end = self.end.subscribe();
        let end = end.wait_for(Option::is_some).await;
        end.ok().and_then(|end| end.clone()).expect("the job holds the sender, and waits for an end")
    }

    /// The owner has all there is.
    pub(super) fn deliver(&self) {
        self.delivered.send_replace(true);
    }

    /// Waits until the owner has all there is.
    pub(super) async fn delivered(&self) {
        // The job holds the sender: this ends when it is delivered.
        let _ = self.delivered.subscribe().wait_for(|delivered| *delivered).await;
    }

    /// Bytes of memory that the logs use.
    pub(super) fn memory(&self) -> usize {
        self.log(Which::Stdout).memory() + self.log(Which::Stderr).memory()
    }

    /// Nobody is waited for any longer.
    pub(super) fn settle(&self) {
        self.log(Which::Stdout).settle();
        self.log(Which::Stderr).settle();
    }

    /// Both streams' totals.
    pub(super) fn totals(&self) -> (u64, u64) {
        (self.log(Which::Stdout).total(), self.log(Which::Stderr).total())
    }

    /// Whether the whole output fits a report and is still there.
    pub(super) fn is_small(&self) -> bool {
        [Which::Stdout, Which::Stderr].into_iter().all(|which| {
            let log = self.log(which);
            log.total() <= INLINE_OUTPUT_BYTES as u64 && log.head().len() as u64 == log.total()
        })
    }

    /// How the job stands, without output.
    pub(super) fn bare_report(&self, end: Option<JobEnd>) -> JobReport {
        JobReport { job: self.id, end, stdout: Captured::default(), stderr: Captured::default() }
    }

    /// How the job stands, with the first of its output.
    pub(super) fn report(&self, end: Option<JobEnd>) -> JobReport {
        let captured = |which| {
            let log = self.log(which);
            Captured { bytes: log.head(), total: log.total() }
        };
        JobReport { job: self.id, end, stdout: captured(Which::Stdout), stderr: captured(Which::Stderr) }
    }

    /// The job's line in a list.
    pub(super) fn summary(&self) -> JobSummary {
        let (stdout_bytes, stderr_bytes) = self.totals();
        JobSummary {
            job: self.id,
            caller: self.caller,
            command: self.command.clone(),
            started_unix_ms: self.started_unix_ms,
            end: self.end(),
            stdout_bytes,
            stderr_bytes,
        }
    }
}
