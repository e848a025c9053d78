//! Drives `peerfleet_proto::transfer` with a disk: offers files, serves their ranges, receives files.
//!
//! In: offers, pulling streams and receive requests that `serve` has let through. Out: tickets, ranges, files under
//! their final names, and progress for whoever watches. It never decides who may do what, with one exception: nothing
//! that comes from another peer reads or writes inside this peer's own state folder, wherever symlinks lead.
//! A file on offer is only opened while it is being pulled; a received file is a hidden partial file with a journal
//! beside its final name until its SHA-256 is that of the source.
//! Bounds: [`MAX_OFFERS`] and [`MAX_OFFERS_PER_CALLER`] tickets, each for [`OFFER_LASTS`] after its last use.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use peerfleet_proto::{
    id::{PeerId, Ticket},
    request::{
        Failure, FailureKind, Outcome,
        transfer::{OfferSpec, Offered, Progress, PullSpec, ReceiveSpec},
    },
    transfer::MAX_LANES,
};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};

use crate::mesh::{Caller, Mesh, Stream};

mod buffers;
mod destination;
mod lane;
mod lanes;
mod place;
mod receive;
mod source;
mod whole;

pub use lanes::{LaneFault, Lanes, LocalLanes, MeshLanes};
pub use receive::{ReceiveEnd, Received};

use source::{Content, Offer, OpenSource};

/// Most files on offer at a time, by whomever; a further offer is refused as busy.
pub const MAX_OFFERS: usize = 4096;

/// Most files on offer to one caller's account; its offer that was unused longest makes room.
pub const MAX_OFFERS_PER_CALLER: usize = 256;

/// Time after its last use in which an offer stands: a receiver that comes back next morning still finds it.
pub const OFFER_LASTS: Duration = Duration::from_secs(24 * 60 * 60);

/// Time in which a file that nobody pulls any more is kept open, with what was hashed of it: a lost path comes back.
const KEPT_OPEN: Duration = Duration::from_secs(120);

/// Longest wait for the watcher to take one word of progress, after which it counts as gone.
const WATCHER_DEADLINE: Duration = Duration::from_secs(30);

/// Words of progress that wait for the watcher; a newer one is left out when it is full.
const WATCHER_QUEUE: usize = 4;

/// On whose behalf a file is offered or received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// This machine's own user.
    Here,
    /// Another peer, as proved.
    Remote(PeerId),
}

impl From<Caller> for Origin {
    fn from(caller: Caller) -> Self {
        Self::Remote(caller.peer)
    }
}

/// The transfers of this machine; clones are the same.
#[derive(Clone)]
pub struct Transfers(Arc<Inner>);

struct Inner {
    state_dir: PathBuf,
    offers: Mutex<BTreeMap<Ticket, Offer>>,
}

impl Transfers {
    /// None yet. What comes from others never touches `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        let state_dir = state_dir.into();
        let state_dir = state_dir.canonicalize().unwrap_or(state_dir);
        Self(Arc::new(Inner { state_dir, offers: Mutex::new(BTreeMap::new()) }))
    }

    /// Offers one file to one receiver.
    ///
    /// # Errors
    /// [`Failure`] for what cannot be sent (a folder, a device), read or found, or when too much is on offer.
    pub async fn offer(&self, origin: Origin, spec: OfferSpec) -> Result<Offered, Failure> {
        let transfers = self.clone();
        blocking(move || transfers.offer_blocking(origin, &spec)).await?
    }

    /// Serves one pulling stream: says so first, then ranges as they are asked for, until the receiver ends it.
    pub async fn serve_pull(&self, caller: Caller, spec: PullSpec, mut stream: Stream) {
        let served = match self.begin_pull(caller, spec.ticket) {
            Ok((_counted, content)) => match blocking(move || content.open()).await.and_then(|opened| opened) {
                Ok(opened) => serve(&opened, stream).await,
                Err(failure) => refuse(&mut stream, failure).await,
            },
            Err(failure) => refuse(&mut stream, failure).await,
        };
        if let Err(error) = served {
            tracing::debug!(%error, "a pulling stream ended early");
        }
    }

    /// Receives an offered file and says over the stream how it goes: [`Outcome::Receiving`], then [`Progress`].
    /// A watcher that goes away ends the transfer; what is verified stays for the next try.
    pub async fn serve_receive(&self, origin: Origin, spec: ReceiveSpec, mesh: &Mesh, stream: Stream) {
        let lanes = Arc::new(MeshLanes::new(mesh.clone(), self.clone(), &spec));
        self.serve_receive_over(origin, spec, lanes, stream).await;
    }

    /// As [`Transfers::serve_receive`], over lanes of any make.
    pub async fn serve_receive_over(
        &self,
        origin: Origin,
        spec: ReceiveSpec,
        lanes: Arc<dyn Lanes>,
        mut stream: Stream,
    ) {
        if stream.send.write_frame(&Outcome::Receiving).await.is_err() {
            return;
        }
        let (watcher, mut progress) = mpsc::channel(WATCHER_QUEUE);
        let pump = async {
            while let Some(word) = progress.recv().await {
                let written = timeout(WATCHER_DEADLINE, stream.send.write_frame::<Progress>(&word)).await;
                if !matches!(written, Ok(Ok(()))) {
                    break;
                }
            }
            drop(progress);
            stream
        };
        let (received, mut stream) = tokio::join!(self.receive(origin, spec, lanes, watcher), pump);
        let last = match received {
            Ok(received) => Progress::from(received),
            Err(end) => Progress::Failed(end.failure),
        };
        let say = async { stream.send.write_frame(&last).await.is_ok() && stream.send.finish().await.is_ok() };
        if !matches!(timeout(WATCHER_DEADLINE, say).await, Ok(true)) {
            tracing::debug!("the watcher of a transfer went away before its end");
        }
    }

    /// Receives an offered file; words of progress go to `watcher`, whose closing ends the transfer.
    /// Dropping the future ends it too; what is verified stays for the next try.
    ///
    /// # Errors
    /// [`ReceiveEnd`] says why the file is not there, and whether a next try will go on from what came.
    pub async fn receive(
        &self,
        origin: Origin,
        spec: ReceiveSpec,
        lanes: Arc<dyn Lanes>,
        watcher: mpsc::Sender<Progress>,
    ) -> Result<Received, ReceiveEnd> {
        receive::receive(self.forbidden(origin), spec, lanes, watcher).await
    }

    /// The folder that nothing of this origin may touch.
    fn forbidden(&self, origin: Origin) -> Option<PathBuf> {
        match origin {
            Origin::Here => None,
            Origin::Remote(_) => Some(self.0.state_dir.clone()),
        }
    }

    fn offer_blocking(&self, origin: Origin, spec: &OfferSpec) -> Result<Offered, Failure> {
        let offer = Offer::new(origin, spec.receiver, &spec.path, self.forbidden(origin).as_deref())?;
        let mut bytes = [0; Ticket::LEN];
        getrandom::fill(&mut bytes).map_err(|error| internal(format!("no random bytes: {error}")))?;
        let offered = Offered { ticket: Ticket::from_bytes(bytes), file: offer.file.clone() };
        let mut offers = self.offers();
        offers.retain(|_, offer| offer.lanes > 0 || offer.last_used.elapsed() < OFFER_LASTS);
        let of_caller = || offers.iter().filter(|(_, offer)| offer.origin == origin);
        if of_caller().count() >= MAX_OFFERS_PER_CALLER {
            let idle = of_caller().filter(|(_, offer)| offer.lanes == 0).min_by_key(|(_, offer)| offer.last_used);
            let ticket = idle.map(|(ticket, _)| *ticket).ok_or_else(too_many)?;
            offers.remove(&ticket);
        }
        if offers.len() >= MAX_OFFERS {
            return Err(too_many());
        }
        offers.insert(offered.ticket, offer);
        Ok(offered)
    }

    /// The file of a ticket, with one more lane counted for as long as the guard lives.
    fn begin_pull(&self, caller: Caller, ticket: Ticket) -> Result<(LaneGuard<'_>, Arc<Content>), Failure> {
        let mut offers = self.offers();
        let offer = offers.get_mut(&ticket).filter(|offer| offer.receiver == caller.peer).ok_or_else(unknown)?;
        if offer.lanes >= MAX_LANES {
            return Err(too_many());
        }
        offer.lanes += 1;
        Ok((LaneGuard { transfers: self, ticket }, Arc::clone(&offer.content)))
    }

    fn end_pull(&self, ticket: Ticket) {
        let mut offers = self.offers();
        let Some(offer) = offers.get_mut(&ticket) else { return };
        offer.lanes -= 1;
        offer.last_used = Instant::now();
        // Without a runtime the process is on its way out, and the file is closed by that.
        let Ok(runtime) = Handle::try_current() else { return };
        if offer.lanes > 0 {
            return;
        }
        let inner = Arc::downgrade(&self.0);
        runtime.spawn(async move {
            tokio::time::sleep(KEPT_OPEN).await;
            let Some(inner) = inner.upgrade() else { return };
            if let Some(offer) = Self(inner).offers().get(&ticket)
                && offer.lanes == 0
                && offer.last_used.elapsed() >= KEPT_OPEN
            {
                offer.content.close();
            }
        });
    }

    fn offers(&self) -> MutexGuard<'_, BTreeMap<Ticket, Offer>> {
        self.0.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a lane until it is dropped, however the serving of it ends.
struct LaneGuard<'a> {
    transfers: &'a Transfers,
    ticket: Ticket,
}

impl Drop for LaneGuard<'_> {
    fn drop(&mut self) {
        self.transfers.end_pull(self.ticket);
    }
}

async fn serve(opened: &Arc<OpenSource>, mut stream: Stream) -> io::Result<()> {
    stream.send.write_frame(&Outcome::Pulling).await?;
    source::serve_lane(opened, stream).await
}

async fn refuse(stream: &mut Stream, failure: Failure) -> io::Result<()> {
    stream.send.write_frame(&Outcome::Failed(failure)).await?;
    stream.send.finish().await
}

/// Runs what touches the disk where it may wait.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|error| internal(format!("a disk task ended early: {error}")))
}

fn internal(what: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Internal, what, "look at the log of that host")
}

fn unknown() -> Failure {
    Failure::new(
        FailureKind::NotFound,
        "the source no longer offers this file to this host",
        "send it again: what arrived already is not sent twice",
    )
}

fn too_many() -> Failure {
    Failure::new(FailureKind::Busy, "too many files are on offer on the source", "try again when others have ended")
}

/// Whether `path` is `folder` or inside it; both are canonical.
fn is_inside(path: &Path, folder: Option<&Path>) -> bool {
    folder.is_some_and(|folder| path.starts_with(folder))
}
