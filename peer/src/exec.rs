//! The job engine: runs commands, keeps their logs, and lets callers follow, speak to and end them.
//!
//! In: [`ExecSpec`]s under the ids of the requests that brought them, attached streams, cancels. Out: outcomes and
//! frames. It never judges whether a caller may do this ([`crate::access`] did), and never runs one id twice.
//! A job is Running -> Ended -> Settled (its owner has the output, or will not come) -> remembered by the store alone.
//! Bounds: [`JobsConfig`], each with its reason.
//!
//! | to find | look in |
//! |---|---|
//! | starting a process, signals to its group | [`process`] |
//! | when a process is ended, and what its end is called | [mod@supervise] |
//! | reading pipes, holding a process back | [`pump`] |
//! | what is kept of output | [`log`], [`spool`] |
//! | what callers hear and say | [`attach`], [`input`] |

use std::{
    collections::HashMap,
    env,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use peerfleet_proto::{
    id::{JobId, RequestId},
    request::{
        Failure, FailureKind, Outcome,
        exec::{Attach, Captured, EndState, ExecSpec, Follow, JobEnd, JobReport, JobSummary},
    },
    wire,
};
use tokio::{process::Child, time::timeout};

use self::{
    job::{Ending, Job},
    pump::PumpRules,
    shelf::{Remembered, Shelf},
    supervise::{Patience, supervise},
};
use crate::{
    mesh::{Caller, Stream},
    store::{Store, StoreFault},
};

mod attach;
mod input;
mod job;
mod log;
pub(crate) mod process;
mod pump;
mod shelf;
mod spool;
mod supervise;

/// Most bytes of an encoded list of jobs; it travels in a message beside its envelope
/// ([`peerfleet_proto::limits::MAX_MESSAGE_BYTES`]).
const LIST_BYTES: usize = 56 * 1024;

/// Output of ended jobs that waits for its owners, in bytes; beyond it only the newest 64 KiB of each further job stay.
/// Half of what [`JobsConfig::running`] jobs may hold while they run.
const UNDELIVERED_BYTES: usize = 256 * 1024 * 1024;

/// The bounds of the engine.
#[derive(Debug, Clone)]
pub struct JobsConfig {
    /// Folder for output that outgrows memory; no file shows there.
    pub folder: PathBuf,
    /// Jobs that run at once; a further one is refused as busy. 256: four descriptors each fill the 1,024 that a
    /// process has unless configured.
    pub running: usize,
    /// Ended jobs whose logs may still be read. 1,000.
    pub remembered: usize,
    /// Memory for the logs of ended jobs, in bytes; beyond it the oldest lose theirs. 4 MiB, a quarter of what an idle
    /// peer may use.
    pub remembered_bytes: usize,
    /// Ended jobs that keep a log on disk: 16 logs of 64 MiB are 1 GiB.
    pub remembered_spools: usize,
    /// Disk for one job's log, both streams together, in bytes; beyond it the oldest output is gone. 64 MiB.
    pub spool_bytes: u64,
    /// How long an exec that will be attached waits for an end that makes attaching needless. 50 ms: less than a person
    /// notices, more than most commands take.
    pub inline_wait: Duration,
    /// How long an attached job goes on without its owner. 60 s: a relay restart, or a laptop between two networks.
    pub abandoned: Duration,
    /// From asking a process group to end to killing it. 2 s.
    pub grace: Duration,
    /// Silence on a pipe after which nobody is expected to write to it once the process exited. 200 ms.
    pub quiet: Duration,
}

impl JobsConfig {
    /// The usual bounds, with output that outgrows memory in that folder.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            running: 256,
            remembered: 1000,
            remembered_bytes: 4 * 1024 * 1024,
            remembered_spools: 16,
            spool_bytes: 64 * 1024 * 1024,
            inline_wait: Duration::from_millis(50),
            abandoned: Duration::from_secs(60),
            grace: Duration::from_secs(2),
            quiet: Duration::from_millis(200),
        }
    }
}

/// A handle on the job engine; clones are the same engine.
#[derive(Clone)]
pub struct Jobs(Arc<Engine>);

struct Engine {
    config: JobsConfig,
    store: Store,
    home: PathBuf,
    known: Mutex<Known>,
    undelivered: AtomicUsize,
    is_closing: AtomicBool,
}

#[derive(Default)]
struct Known {
    jobs: HashMap<JobId, Arc<Job>>,
    running: usize,
    shelf: Shelf,
    past: Remembered,
}

/// What an id that came with an exec is.
enum Registered {
    New(Arc<Job>),
    Known(Arc<Job>),
    Past,
}

impl Jobs {
    /// An engine that runs nothing yet.
    pub fn new(store: Store, config: JobsConfig) -> Self {
        let home = env::home_dir().filter(|home| home.is_dir()).unwrap_or_else(|| PathBuf::from("/"));
        let known = Known { past: Remembered::new(crate::store::JOBS_KEPT), ..Known::default() };
        Self(Arc::new(Engine {
            config,
            store,
            home,
            known: Mutex::new(known),
            undelivered: AtomicUsize::new(0),
            is_closing: AtomicBool::new(false),
        }))
    }

    /// Learns from the store what ran before this process: jobs that were running then are lost. Says how many.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn recover(&self) -> Result<usize, StoreFault> {
        let recovered = self.0.store.recover().await?;
        let mut known = self.0.known();
        for job in recovered.jobs {
            known.past.insert(job);
        }
        Ok(recovered.lost)
    }

    /// Runs a command, or says how it stands if it was asked for under this id before.
    pub async fn exec(&self, caller: Caller, id: RequestId, spec: ExecSpec) -> Outcome {
        if let Err(failure) = process::check(&spec) {
            return Outcome::Failed(failure);
        }
        let job = match self.0.register(caller, id.into(), &spec) {
            Ok(Registered::New(job)) => {
                // A task of its own: a job that is registered begins and ends, also when nobody waits any more.
                tokio::spawn(self.0.clone().start(job.clone(), spec));
                job
            }
            Ok(Registered::Known(job)) => job,
            Ok(Registered::Past) => return self.0.past_report(id.into()).await,
            Err(failure) => return Outcome::Failed(failure),
        };
        Outcome::Job(self.0.answer(&job).await)
    }

    /// Serves a stream that follows a job; writes the outcome of its head first.
    pub async fn attach(&self, caller: Caller, attach: Attach, mut stream: Stream) {
        let job = self.0.known().jobs.get(&attach.job).cloned();
        match job {
            Some(job) => attach::attach(job, caller, attach, stream).await,
            None => {
                let _ = stream.send.write_frame(&Outcome::Failed(self.0.unknown(attach.job))).await;
                let _ = stream.send.finish().await;
            }
        }
    }

    /// The jobs that run and the newest of those that ended, newest first: as many as fit an answer.
    pub async fn list(&self) -> Outcome {
        let mut summaries: Vec<JobSummary> = self.0.known().jobs.values().map(|job| job.summary()).collect();
        match self.0.store.jobs().await {
            Ok(past) => {
                let known = self.0.known();
                summaries.extend(past.into_iter().filter(|past| !known.jobs.contains_key(&past.job)));
            }
            Err(fault) => tracing::error!(%fault, "jobs of earlier processes cannot be listed"),
        }
        Outcome::Jobs(fitting(summaries))
    }

    /// Ends a job, and waits for its end.
    pub async fn cancel(&self, job: JobId) -> Outcome {
        let (found, is_past) = {
            let known = self.0.known();
            (known.jobs.get(&job).cloned(), known.past.contains(&job))
        };
        match found {
            Some(job) => {
                job.make_end(Ending::Cancelled);
                job.ended().await;
                Outcome::Done
            }
            None if is_past => Outcome::Done,
            None => Outcome::Failed(self.0.unknown(job)),
        }
    }

    /// Takes no more jobs, ends all that run, and waits for their ends.
    pub async fn shutdown(&self) {
        self.0.is_closing.store(true, Ordering::SeqCst);
        let jobs: Vec<Arc<Job>> = self.0.known().jobs.values().cloned().collect();
        for job in &jobs {
            job.make_end(Ending::Cancelled);
        }
        for job in jobs {
            job.ended().await;
        }
        self.0.store.flush().await;
    }

    /// How many jobs run.
    pub fn running(&self) -> usize {
        self.0.known().running
    }
}

/// Those that run and, of the others, the newest that fit an answer; newest first.
fn fitting(mut summaries: Vec<JobSummary>) -> Vec<JobSummary> {
    summaries.sort_by_key(|summary| (summary.end.is_some(), std::cmp::Reverse(summary.started_unix_ms)));
    let mut left = LIST_BYTES;
    let fit = summaries.iter().take_while(|summary| {
        let len = wire::encode(*summary).len();
        let fits = len <= left;
        left = left.saturating_sub(len);
        fits
    });
    let fit = fit.count();
    summaries.truncate(fit);
    summaries.sort_by_key(|summary| std::cmp::Reverse(summary.started_unix_ms));
    summaries
}

impl Engine {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("nothing panics while it holds the jobs")
    }

    fn register(&self, caller: Caller, id: JobId, spec: &ExecSpec) -> Result<Registered, Failure> {
        let mut known = self.known();
        if let Some(job) = known.jobs.get(&id) {
            return if job.caller == caller.peer { Ok(Registered::Known(job.clone())) } else { Err(taken()) };
        }
        if known.past.contains(&id) {
            return Ok(Registered::Past);
        }
        if self.is_closing.load(Ordering::SeqCst) {
            return Err(Failure::new(
                FailureKind::Busy,
                "the peer on that host is stopping",
                "try again when it is back",
            ));
        }
        if known.running >= self.config.running {
            return Err(Failure::new(
                FailureKind::Busy,
                format!("{} jobs run on that host already", known.running),
                "wait, or end some: `peer jobs HOST` lists them",
            ));
        }
        let job = Arc::new(Job::new(id, caller.peer, spec));
        known.jobs.insert(id, job.clone());
        known.running += 1;
        Ok(Registered::New(job))
    }

    /// Starts the process once the job's record is written: what may have run shows in the list after any crash.
    async fn start(self: Arc<Self>, job: Arc<Job>, spec: ExecSpec) {
        self.store.job_started(job.summary()).await;
        if job.is_to_end() {
            job.deliver();
            self.end(&job, JobEnd { state: EndState::Cancelled, duration: Duration::ZERO });
            self.shelve(&job);
            return job.begin();
        }
        match process::spawn(&spec, &self.home) {
            Ok(child) => {
                tracing::debug!(job = %job.id, caller = %job.caller.short(), "job started");
                job.begin();
                self.run(job, child, spec.timeout).await;
            }
            Err(failure) => {
                tracing::debug!(job = %job.id, caller = %job.caller.short(), kind = ?failure.kind, "job not started");
                job.deliver();
                self.end(&job, JobEnd { state: EndState::SpawnFailed(failure), duration: Duration::ZERO });
                self.shelve(&job);
                job.begin();
            }
        }
    }

    async fn run(self: Arc<Self>, job: Arc<Job>, child: Child, timeout: Option<Duration>) {
        let patience = Patience { grace: self.config.grace, abandoned: self.config.abandoned };
        let rules = PumpRules {
            folder: self.config.folder.clone(),
            ring: self.config.spool_bytes / 2,
            quiet: self.config.quiet,
        };
        let end = supervise(job.clone(), child, timeout, patience, rules).await;
        tracing::debug!(job = %job.id, duration = ?end.duration, "job ended");
        self.end(&job, end);
        self.await_delivery(&job).await;
        self.shelve(&job);
    }

    fn end(&self, job: &Job, end: JobEnd) {
        self.known().running -= 1;
        self.store.job_ended(JobSummary { end: Some(end.clone()), ..job.summary() });
        job.finish(end);
    }

    /// Waits until the owner of an attached job has its output, or is not expected any more.
    async fn await_delivery(&self, job: &Job) {
        if job.follow != Follow::Attached {
            return;
        }
        let bytes = job.memory();
        if self.undelivered.fetch_add(bytes, Ordering::SeqCst) + bytes <= UNDELIVERED_BYTES {
            tokio::select! {
                () = job.delivered() => {}
                () = job.abandoned(self.config.abandoned) => {}
            }
        }
        self.undelivered.fetch_sub(bytes, Ordering::SeqCst);
    }

    /// Puts an ended job among those that are remembered, and forgets what is too much.
    fn shelve(&self, job: &Arc<Job>) {
        job.settle();
        let mut known = self.known();
        known.shelf.push(job.clone());
        for forgotten in known.shelf.trim(&self.config) {
            known.jobs.remove(&forgotten);
            known.past.insert(forgotten);
        }
    }

    /// Answers an exec as its [`Follow`] says, once its process was started or could not be.
    async fn answer(&self, job: &Arc<Job>) -> JobReport {
        job.begun().await;
        match job.follow {
            Follow::Attached => match timeout(self.config.inline_wait, job.ended()).await {
                Ok(end) if job.is_small() => {
                    job.deliver();
                    job.report(Some(end))
                }
                Ok(_) | Err(_) => job.bare_report(None),
            },
            Follow::Collected => {
                let end = job.ended().await;
                job.report(Some(end))
            }
            Follow::Detached => {
                let end = job.end();
                job.bare_report(end)
            }
        }
    }

    async fn past_report(&self, id: JobId) -> Outcome {
        match self.store.job(id).await {
            Ok(Some(past)) => {
                let captured = |total| Captured { bytes: Vec::new(), total };
                let (stdout, stderr) = (captured(past.stdout_bytes), captured(past.stderr_bytes));
                Outcome::Job(JobReport { job: id, end: past.end, stdout, stderr })
            }
            Ok(None) | Err(_) => Outcome::Failed(self.unknown(id)),
        }
    }

    fn unknown(&self, job: JobId) -> Failure {
        if self.known().past.contains(&job) {
            return Failure::new(
                FailureKind::NotFound,
                format!("the log of job {job} is no longer kept"),
                "`peer jobs HOST` still shows how it ended",
            );
        }
        Failure::new(
            FailureKind::NotFound,
            format!("there is no job {job} on that host"),
            "`peer jobs HOST` lists them",
        )
    }
}

fn taken() -> Failure {
    Failure::new(FailureKind::Invalid, "another peer used this request's id before", "ask again under a new id")
}
