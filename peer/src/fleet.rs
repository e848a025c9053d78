//! One command on many hosts: choose, fan out, gather.
//!
//! In: hosts, a target expression, a command. Out: one [`Report`] for every chosen host, exactly once, as they come.
//! It never drops a host in silence: what was not reached, refused, lost or not begun is reported as such.
//! Bounds: [`Order::concurrency`] hosts at once; output of 28 KiB per stream and host, and how much there was in all.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::pin,
    time::{Duration, Instant},
};

use peerfleet_proto::{
    id::{InstanceId, JobId},
    request::{
        FailureKind, Outcome, Request,
        exec::{Captured, EndState, ExecSpec, JobReport},
    },
    target::Target,
};
use tokio::{sync::mpsc, time::timeout};

use crate::{
    client::{self, Client},
    failure::Failure,
    machine::Host,
    mesh::{AskFault, AskProgress},
};

/// Time beyond the command's own that a host may take to be reached and to answer.
const ANSWER_SLACK: Duration = Duration::from_secs(30);

/// Time for hosts to say how their jobs ended after these were cancelled.
const CANCEL_GRACE: Duration = Duration::from_secs(3);

/// Progress that waits to be taken; the hosts' answers wait beyond.
const PROGRESS_QUEUE: usize = 256;

/// What to do on the fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The command; its timeout is the one below.
    pub spec: ExecSpec,
    /// Hosts that work at once.
    pub concurrency: usize,
    /// Time for the command on each host.
    pub timeout: Duration,
    /// Whether the first failure ends all.
    pub fail_fast: bool,
}

/// How it ended on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// The command ended with an exit code.
    Exited,
    /// A signal ended the command.
    Signalled,
    /// It took too long.
    TimedOut,
    /// It was cancelled, or never begun because others failed or the user left.
    Cancelled,
    /// It could not be started.
    SpawnFailed,
    /// The host does not do this.
    Refused,
    /// The host took it, or may have, and no word came of how it ended.
    Lost,
    /// There was no way to the host: it did not run there.
    Unreachable,
}

impl State {
    /// The word in JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Exited => "exited",
            Self::Signalled => "signalled",
            Self::TimedOut => "timed_out",
            Self::Cancelled => "cancelled",
            Self::SpawnFailed => "spawn_failed",
            Self::Refused => "refused",
            Self::Lost => "lost",
            Self::Unreachable => "unreachable",
        }
    }
}

/// What one host had to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The host.
    pub host: Host,
    /// How it ended.
    pub state: State,
    /// The exit code, if it exited.
    pub exit_code: Option<i32>,
    /// The signal, if one ended it.
    pub signal: Option<i32>,
    /// How long the command ran there; else how long we waited.
    pub duration: Duration,
    /// The job, if one was begun.
    pub job: Option<JobId>,
    /// Its standard output.
    pub stdout: Captured,
    /// Its standard error.
    pub stderr: Captured,
    /// Why there is no exit code, for a person.
    pub failure: Option<Failure>,
}

impl Report {
    /// Whether the command ran and exited with 0.
    pub fn is_good(&self) -> bool {
        self.exit_code == Some(0)
    }

    /// Whether there was more output than the report carries.
    pub fn is_truncated(&self) -> bool {
        self.stdout.is_truncated() || self.stderr.is_truncated()
    }

    fn without_job(host: Host, state: State, duration: Duration) -> Self {
        let (stdout, stderr) = (Captured::default(), Captured::default());
        Self { host, state, exit_code: None, signal: None, duration, job: None, stdout, stderr, failure: None }
    }
}

/// The hosts that a target expression selects.
pub fn choose(hosts: Vec<Host>, target: &Target) -> Vec<Host> {
    hosts.into_iter().filter(|host| target.matches(&client::facts(host))).collect()
}

/// Runs the order on these hosts; `on` gets one report for each. `stop` ends it early: what is unfinished is cancelled.
pub async fn run(
    client: &Client,
    hosts: Vec<Host>,
    order: &Order,
    stop: impl Future<Output = ()>,
    mut on: impl FnMut(Report),
) {
    let mut sweep = Sweep::new(client, hosts, order);
    let mut stop = pin!(stop);
    loop {
        sweep.fill();
        let (instance, progress) = tokio::select! {
            progress = sweep.next() => match progress {
                Some(progress) => progress,
                None => break,
            },
            () = &mut stop => break,
        };
        let Some(report) = sweep.progressed(instance, progress) else { continue };
        let stop_here = order.fail_fast && !report.is_good();
        on(report);
        if stop_here {
            break;
        }
    }
    sweep.cancel(&mut on).await;
}

struct Running {
    host: Host,
    job: Option<JobId>,
    since: Instant,
}

struct Sweep<'a> {
    client: &'a Client,
    request: Request,
    deadline: Duration,
    concurrency: usize,
    waiting: VecDeque<Host>,
    running: BTreeMap<InstanceId, Running>,
    sender: mpsc::Sender<(InstanceId, AskProgress)>,
    progress: mpsc::Receiver<(InstanceId, AskProgress)>,
}

impl<'a> Sweep<'a> {
    fn new(client: &'a Client, hosts: Vec<Host>, order: &Order) -> Self {
        let spec = ExecSpec { timeout: Some(order.timeout), ..order.spec.clone() };
        let (sender, progress) = mpsc::channel(PROGRESS_QUEUE);
        Self {
            client,
            request: Request::Exec(spec),
            deadline: order.timeout.saturating_add(ANSWER_SLACK),
            concurrency: order.concurrency.max(1),
            waiting: hosts.into(),
            running: BTreeMap::new(),
            sender,
            progress,
        }
    }

    /// Asks as many further hosts as there are free places, with one upload.
    fn fill(&mut self) {
        let free = self.concurrency.saturating_sub(self.running.len()).min(self.waiting.len());
        if free == 0 {
            return;
        }
        let since = Instant::now();
        let hosts: Vec<Host> = self.waiting.drain(..free).collect();
        let to: Vec<InstanceId> = hosts.iter().map(|host| host.instance).collect();
        self.running.extend(hosts.into_iter().map(|host| (host.instance, Running { host, job: None, since })));
        let mut asked = self.client.ask_many(&to, &self.request, self.deadline);
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let mut unfinished: Vec<InstanceId> = to;
            while let Some((instance, progress)) = asked.recv().await {
                if matches!(progress, AskProgress::Ended(_)) {
                    unfinished.retain(|other| *other != instance);
                }
                if sender.send((instance, progress)).await.is_err() {
                    return;
                }
            }
            for instance in unfinished {
                let _ = sender.send((instance, AskProgress::Ended(Err(AskFault::Lost)))).await;
            }
        });
    }

    /// What comes next; `None` when every host has ended.
    async fn next(&mut self) -> Option<(InstanceId, AskProgress)> {
        if self.running.is_empty() { None } else { self.progress.recv().await }
    }

    fn progressed(&mut self, instance: InstanceId, progress: AskProgress) -> Option<Report> {
        match progress {
            AskProgress::Asked(id) => {
                if let Some(running) = self.running.get_mut(&instance) {
                    running.job = Some(id.into());
                }
                None
            }
            AskProgress::Accepted => None,
            AskProgress::Ended(ended) => self.running.remove(&instance).map(|running| report(running, ended)),
        }
    }

    fn cancel_job(&self, instance: InstanceId, job: JobId) {
        let client = self.client.clone();
        tokio::spawn(async move { client::exec::cancel(&client, instance, job).await });
    }

    /// Ends what runs, and reports what did not end by itself.
    async fn cancel(mut self, on: &mut impl FnMut(Report)) {
        for (instance, running) in &self.running {
            if let Some(job) = running.job {
                self.cancel_job(*instance, job);
            }
        }
        let gather = async {
            while let Some((instance, progress)) = self.next().await {
                if let AskProgress::Asked(id) = progress {
                    self.cancel_job(instance, id.into());
                }
                if let Some(report) = self.progressed(instance, progress) {
                    on(report);
                }
            }
        };
        // Those that do not answer in time are reported below.
        let _ = timeout(CANCEL_GRACE, gather).await;
        for Running { host, job, since } in std::mem::take(&mut self.running).into_values() {
            on(Report { job, ..Report::without_job(host, State::Cancelled, since.elapsed()) });
        }
        for host in self.waiting {
            on(Report::without_job(host, State::Cancelled, Duration::ZERO));
        }
    }
}

fn report(running: Running, ended: Result<Outcome, AskFault>) -> Report {
    let Running { host, job, since } = running;
    let name = host.name().to_owned();
    let waited = since.elapsed();
    match ended {
        Ok(Outcome::Job(job)) => of_job(host, job, waited),
        Ok(Outcome::Failed(failure)) => {
            let state = match failure.kind {
                FailureKind::Refused | FailureKind::Busy => State::Refused,
                FailureKind::Unreachable => State::Unreachable,
                FailureKind::NotFound
                | FailureKind::Invalid
                | FailureKind::Os
                | FailureKind::Corrupt
                | FailureKind::Internal => State::SpawnFailed,
            };
            let failure = Some(Failure::from_host(format!("cannot run this on `{name}`"), failure));
            Report { failure, ..Report::without_job(host, state, waited) }
        }
        Ok(_) => {
            let failure = Some(Failure::odd_answer(&name));
            Report { failure, job, ..Report::without_job(host, State::Lost, waited) }
        }
        Err(fault) => {
            let state = match fault {
                AskFault::Unreachable => State::Unreachable,
                AskFault::Lost => State::Lost,
                AskFault::DeadlineExceeded => State::TimedOut,
                AskFault::TooLarge | AskFault::Busy => State::Refused,
            };
            Report { failure: Some(Failure::from_ask(&name, fault)), job, ..Report::without_job(host, state, waited) }
        }
    }
}

fn of_job(host: Host, report: JobReport, waited: Duration) -> Report {
    let JobReport { job, end, stdout, stderr } = report;
    let name = host.name().to_owned();
    let base = Report { job: Some(job), stdout, stderr, ..Report::without_job(host, State::Lost, waited) };
    let Some(end) = end else {
        return Report { failure: Some(Failure::odd_answer(&name)), ..base };
    };
    let base = Report { duration: end.duration, ..base };
    match end.state {
        EndState::Exited(code) => Report { state: State::Exited, exit_code: Some(code), ..base },
        EndState::Signalled(signal) => Report { state: State::Signalled, signal: Some(signal), ..base },
        EndState::TimedOut => Report { state: State::TimedOut, ..base },
        EndState::Cancelled => Report { state: State::Cancelled, ..base },
        EndState::Lost => Report { state: State::Lost, ..base },
        EndState::SpawnFailed(failure) => {
            let failure = Some(Failure::from_host(format!("cannot start this on `{name}`"), failure));
            Report { state: State::SpawnFailed, failure, ..base }
        }
    }
}
