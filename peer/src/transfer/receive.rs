//! The receiver: drives `proto::transfer::Receiver` with lanes and a partial file, to the file's final name.
//!
//! In: what to receive, lanes, somebody who watches. Out: the file, or why not. What is verified stays on disk when a
//! next try can use it (the source or the path went away, the watcher left) and is removed when it cannot (disk full,
//! no permission, the source's file changed or is damaged).
//!
//! Place found → earlier try checked → ranges → whole compared → finished. A whole that is not the source's after an
//! earlier try was resumed starts over, once.

use std::{
    collections::BTreeMap,
    io,
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use peerfleet_proto::{
    request::{
        Failure, FailureKind,
        transfer::{FileInfo, PathNow, PathWish, Progress, RangeRequest, ReceiveSpec},
    },
    transfer::{Event, LaneId, RangeSet, ReceiveFault, Receiver, is_plausible, span_of},
};
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::{MissedTickBehavior, interval, sleep_until},
};

use super::{
    blocking,
    buffers::{Buffers, workers},
    destination::{Claimed, Partial},
    lane::{Landing, Lane, Report},
    lanes::Lanes,
    place::{Place, invalid, os_failure},
    whole::{STASH, Whole},
};
use crate::mesh::PathView;

/// Ranges in memory: those that wait to be hashed, one that each of four lanes reads, and four on their way to the disk.
const BUFFERS: usize = STASH + 8;

/// Interval of words of progress: five a second look steady.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Reports that wait for the loop: a lane with more to say waits.
const REPORT_QUEUE: usize = 32;

/// A file that stands under its final name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Its size.
    pub bytes: u64,
    /// Bytes that an earlier try had left.
    pub resumed: u64,
    /// SHA-256 of the whole, computed by both sides.
    pub sha256: [u8; 32],
    /// The path that carried most bytes.
    pub path: PathNow,
    /// The final name.
    pub destination: PathBuf,
}

/// Why a file is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveEnd {
    /// What went wrong.
    pub failure: Failure,
    /// Whether what came stays, so that a next try goes on from it.
    pub kept: bool,
}

impl From<Failure> for ReceiveEnd {
    /// A failure on this side.
    fn from(failure: Failure) -> Self {
        let kept = match failure.kind {
            FailureKind::NotFound | FailureKind::Busy | FailureKind::Unreachable | FailureKind::Internal => true,
            FailureKind::Refused | FailureKind::Invalid | FailureKind::Os | FailureKind::Corrupt => false,
        };
        Self { failure, kept }
    }
}

impl ReceiveEnd {
    /// A failure on the source: only another content there makes what came worthless.
    fn by_source(failure: Failure) -> Self {
        let kept = failure.kind != FailureKind::Corrupt;
        Self { failure, kept }
    }
}

impl From<Received> for Progress {
    fn from(received: Received) -> Self {
        let Received { bytes, resumed, sha256, path, destination } = received;
        Self::Done { bytes, resumed, sha256, path, destination: destination.as_os_str().as_bytes().to_vec() }
    }
}

/// What does not change from try to try.
struct Order {
    spec: ReceiveSpec,
    lanes: Arc<dyn Lanes>,
    watcher: mpsc::Sender<Progress>,
    partial: Arc<Partial>,
    path_before: PathView,
}

/// Receives a file.
pub(super) async fn receive(
    forbidden: Option<PathBuf>,
    spec: ReceiveSpec,
    lanes: Arc<dyn Lanes>,
    watcher: mpsc::Sender<Progress>,
) -> Result<Received, ReceiveEnd> {
    let nothing_came = |failure| ReceiveEnd { failure, kept: false };
    if !is_plausible(&spec.file) {
        return Err(nothing_came(invalid("the source describes a file that cannot be", "rename it on the source")));
    }
    let wanted = spec.clone();
    let opened = blocking(move || {
        let place = Place::find(&wanted.destination, &wanted.file.name, forbidden.as_deref())?;
        Partial::open(place, &wanted.source, &wanted.file)
    });
    let (partial, claimed) = opened.await.and_then(|opened| opened).map_err(nothing_came)?;
    let path_before = lanes.path();
    let order = Order { spec, lanes, watcher, partial: Arc::new(partial), path_before };
    let received = order.bring(claimed).await;
    if received.as_ref().is_err_and(|end| !end.kept) {
        let partial = Arc::clone(&order.partial);
        blocking(move || partial.discard()).await.map_err(nothing_came)?;
    }
    received
}

impl Order {
    async fn bring(&self, claimed: Claimed) -> Result<Received, ReceiveEnd> {
        let mut claimed = claimed;
        loop {
            let mut attempt = self.begin(std::mem::take(&mut claimed)).await?;
            let resumed = attempt.resumed;
            let said = attempt.run().await.map_err(|end| {
                let kept = end.kept && attempt.machine.verified_bytes() > 0;
                ReceiveEnd { kept, ..end }
            })?;
            let landing = Arc::clone(&attempt.landing);
            drop(attempt);
            let path = self.partial.path();
            let hash = move || landing.whole.finish().map_err(|error| os_failure("read", &path, &error));
            let sha256 = blocking(hash).await??;
            if said != sha256 {
                self.retry_mismatch(resumed).await?;
                continue;
            }
            let (partial, file) = (Arc::clone(&self.partial), self.spec.file.clone());
            blocking(move || partial.finish(&file)).await??;
            let (bytes, destination) = (self.spec.file.size, self.partial.path());
            return Ok(Received { bytes, resumed, sha256, path: self.path_mostly(), destination });
        }
    }

    /// Checks what an earlier try left and starts from it.
    async fn begin(&self, claimed: Claimed) -> Result<Attempt<'_>, Failure> {
        let (partial, size) = (Arc::clone(&self.partial), self.spec.file.size);
        let check = move || check_claimed(&partial, size, claimed);
        let (whole, verified) = blocking(check).await?;
        let partial = Arc::clone(&self.partial);
        let landing = Arc::new(Landing { partial, whole, buffers: Buffers::new(BUFFERS), size, workers: workers() });
        let machine = Receiver::new(size, verified, Instant::now());
        let (reports, queue) = mpsc::channel(REPORT_QUEUE);
        let resumed = machine.verified_bytes();
        let (lanes, tasks, last_loss) = (BTreeMap::new(), JoinSet::new(), None);
        Ok(Attempt { order: self, machine, landing, reports, queue, lanes, tasks, resumed, last_loss })
    }

    /// What an earlier try left may be damaged in a way that its hashes do not show; a fresh copy may not be.
    async fn retry_mismatch(&self, resumed: u64) -> Result<(), Failure> {
        if resumed == 0 {
            let what = "the whole file does not have the SHA-256 that the source computed";
            let hint = "send it again; if that happens twice, test the memory and disk of both hosts";
            return Err(Failure::new(FailureKind::Corrupt, what, hint));
        }
        tracing::info!("a resumed file is not the source's: starting over");
        let partial = Arc::clone(&self.partial);
        blocking(move || partial.start_over()).await?
    }

    fn path_mostly(&self) -> PathNow {
        let (before, now) = (self.path_before, self.lanes.path());
        let direct = now.direct_bytes.saturating_sub(before.direct_bytes);
        let relayed = now.relayed_bytes.saturating_sub(before.relayed_bytes);
        match direct.cmp(&relayed) {
            std::cmp::Ordering::Greater => PathNow::Direct,
            std::cmp::Ordering::Less => PathNow::Relayed,
            std::cmp::Ordering::Equal => now.now.unwrap_or(PathNow::Relayed),
        }
    }
}

/// Which of the recorded ranges stand, and the hash of the whole as far as they reach without a gap.
fn check_claimed(partial: &Partial, size: u64, claimed: Claimed) -> (Whole, RangeSet) {
    let (file, for_whole) = (partial.file(), partial.file());
    let whole = Whole::of_partial(size, Box::new(move |bytes, offset| for_whole.read_exact_at(bytes, offset)));
    let mut verified = RangeSet::new();
    for (index, blake3) in claimed {
        let Some(span) = span_of(size, index) else { continue };
        let mut bytes = vec![0; span.len as usize];
        let read: io::Result<()> = file.read_exact_at(&mut bytes, span.offset);
        if read.is_ok() && *blake3::hash(&bytes).as_bytes() == blake3 {
            verified.insert(index);
            whole.pass(index, Bytes::from(bytes));
        }
    }
    (whole, verified)
}

/// One try: a machine, its lanes, and what they report.
struct Attempt<'a> {
    order: &'a Order,
    machine: Receiver,
    landing: Arc<Landing>,
    reports: mpsc::Sender<Report>,
    queue: mpsc::Receiver<Report>,
    lanes: BTreeMap<LaneId, LaneHandle>,
    tasks: JoinSet<()>,
    resumed: u64,
    last_loss: Option<String>,
}

struct LaneHandle {
    requests: mpsc::UnboundedSender<RangeRequest>,
    task: AbortHandle,
    moved: Arc<AtomicU64>,
    seen: u64,
}

impl Attempt<'_> {
    /// Runs to the end of the ranges; gives the source's SHA-256 of the whole.
    async fn run(&mut self) -> Result<[u8; 32], ReceiveEnd> {
        let mut progress = interval(PROGRESS_EVERY);
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if let Some(end) = self.drain() {
                return end;
            }
            let wake = self.machine.poll_timeout().unwrap_or_else(Instant::now);
            tokio::select! {
                biased;
                Some(report) = self.queue.recv() => self.handle(report)?,
                _ = progress.tick() => self.tell()?,
                () = sleep_until(wake.into()) => {
                    self.count_moved();
                    self.machine.handle_timeout(Instant::now());
                }
            }
        }
    }

    /// Does what the machine wants until it wants nothing more.
    fn drain(&mut self) -> Option<Result<[u8; 32], ReceiveEnd>> {
        while let Some(event) = self.machine.poll_event() {
            match event {
                Event::OpenLane(lane) => self.open(lane),
                Event::CloseLane(lane) => self.close(lane),
                Event::Complete { sha256 } => return Some(Ok(sha256)),
                Event::Failed(fault) => return Some(Err(self.failure(fault).into())),
            }
        }
        let now = Instant::now();
        for (lane, handle) in &self.lanes {
            while let Some(request) = self.machine.poll_request(*lane, now) {
                // A lane that has ended reports so: what it was asked goes to another then.
                let _lane_ended = handle.requests.send(request);
            }
        }
        None
    }

    fn handle(&mut self, report: Report) -> Result<(), ReceiveEnd> {
        let now = Instant::now();
        match report {
            Report::Opened(lane) => self.machine.lane_opened(lane, now),
            Report::Lost(lane, why) => {
                tracing::debug!(lane = lane.0, why, "a lane was lost");
                self.last_loss = Some(why);
                self.close(lane);
                self.machine.lane_lost(lane, now);
            }
            Report::DiskFailed(failure) => return Err(failure.into()),
            Report::SourceFailed(failure) => return Err(ReceiveEnd::by_source(failure)),
            Report::Range { lane, index, claimed, actual } => {
                let verdict = self.machine.range_received(lane, index, &claimed, &actual, now);
                tracing::trace!(lane = lane.0, index, ?verdict, "a range came");
                if self.machine.is_verified() {
                    let _watcher_slow = self.order.watcher.try_send(Progress::Verifying);
                }
            }
            Report::Sha256(lane, sha256) => self.machine.sha256_received(lane, sha256, now),
        }
        Ok(())
    }

    fn open(&mut self, id: LaneId) {
        let (requests, asked) = mpsc::unbounded_channel();
        let moved = Arc::new(AtomicU64::new(0));
        let lane = Lane {
            id,
            lanes: Arc::clone(&self.order.lanes),
            requests: asked,
            reports: self.reports.clone(),
            landing: Arc::clone(&self.landing),
            moved: Arc::clone(&moved),
        };
        while self.tasks.try_join_next().is_some() {}
        let task = self.tasks.spawn(lane.run());
        self.lanes.insert(id, LaneHandle { requests, task, moved, seen: 0 });
    }

    fn close(&mut self, lane: LaneId) {
        if let Some(lane) = self.lanes.remove(&lane) {
            lane.task.abort();
        }
    }

    /// Looks at the path and at the lanes, and tells the watcher.
    fn tell(&mut self) -> Result<(), Failure> {
        self.count_moved();
        let path = self.order.lanes.path().now;
        if self.order.spec.path == PathWish::Direct && path == Some(PathNow::Relayed) {
            self.machine.close_open(Instant::now());
        }
        if self.order.watcher.is_closed() {
            let what = "whoever asked for the file has gone";
            return Err(Failure::new(FailureKind::Unreachable, what, "send it again: it goes on from what came"));
        }
        let FileInfo { size: total, .. } = self.order.spec.file;
        let (bytes, resumed) = (self.machine.verified_bytes(), self.resumed);
        let path = path.unwrap_or(PathNow::Relayed);
        let _watcher_slow = self.order.watcher.try_send(Progress::Moved { bytes, total, resumed, path });
        Ok(())
    }

    fn count_moved(&mut self) {
        let now = Instant::now();
        for (lane, handle) in &mut self.lanes {
            let moved = handle.moved.load(Ordering::Relaxed);
            if moved != handle.seen {
                handle.seen = moved;
                self.machine.moved(*lane, now);
            }
        }
    }

    fn failure(&self, fault: ReceiveFault) -> Failure {
        match fault {
            ReceiveFault::Corrupt(_) => {
                let hint = "test the memory and disk of the source, and send the file again";
                Failure::new(FailureKind::Corrupt, fault.to_string(), hint)
            }
            ReceiveFault::Silent => {
                let why = self.last_loss.as_ref().map_or_else(String::new, |why| format!(": {why}"));
                let hint = "send it again when the source is back: it goes on from what came";
                Failure::new(FailureKind::Unreachable, format!("{fault}{why}"), hint)
            }
        }
    }
}
