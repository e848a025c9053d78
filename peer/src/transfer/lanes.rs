//! How a receiver gets its lanes: streams to the source, over the mesh or within this machine.

use std::{sync::Arc, time::Duration};

use peerfleet_proto::{
    id::Ticket,
    request::{
        Failure, FailureKind, Outcome, Request,
        transfer::{PathNow, PathWish, PullSpec, ReceiveSpec},
    },
};
use tokio::sync::OnceCell;

use super::Transfers;
use crate::mesh::{BoxFuture, Caller, Mesh, PathView, Stream};

/// How long a transfer that must be direct waits for a direct path.
const DIRECT_WITHIN: Duration = Duration::from_secs(10);

/// How long any other waits for one before it starts relayed: a punched path is there by then, or takes long.
const DIRECT_HOPED_FOR: Duration = Duration::from_millis(300);

/// Files below this start at once: they are through before a path is found.
const WORTH_WAITING_BYTES: u64 = 1024 * 1024;

/// Opens pulling streams to one source.
pub trait Lanes: Send + Sync + 'static {
    /// Opens one more; the source's agreement has been read.
    fn open(&self) -> BoxFuture<Result<Stream, LaneFault>>;

    /// How they travel and have travelled.
    fn path(&self) -> PathView;
}

/// Why a lane could not be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneFault {
    /// It may go better in a moment.
    Lost(String),
    /// It will not go better.
    Refused(Failure),
}

/// Lanes over the mesh; a source in this very process is reached without it.
pub struct MeshLanes {
    mesh: Mesh,
    transfers: Transfers,
    spec: ReceiveSpec,
    waited: Arc<OnceCell<()>>,
}

impl MeshLanes {
    /// Lanes to the source of this file.
    pub fn new(mesh: Mesh, transfers: Transfers, spec: &ReceiveSpec) -> Self {
        Self { mesh, transfers, spec: spec.clone(), waited: Arc::new(OnceCell::new()) }
    }

    /// The same, where the source is this very process.
    fn local(&self) -> Option<LocalLanes> {
        let me = self.mesh.me();
        let transfers = self.transfers.clone();
        (me.instance == self.spec.source_instance).then(|| LocalLanes::new(transfers, me, self.spec.ticket))
    }
}

impl Lanes for MeshLanes {
    fn open(&self) -> BoxFuture<Result<Stream, LaneFault>> {
        if let Some(local) = self.local() {
            return local.open();
        }
        let pull = PullSpec { ticket: self.spec.ticket };
        let (mesh, waited, spec) = (self.mesh.clone(), Arc::clone(&self.waited), self.spec.clone());
        Box::pin(async move {
            let source = spec.source_instance;
            match spec.path {
                PathWish::Direct => {
                    if !mesh.wait_direct(source, DIRECT_WITHIN).await {
                        return Err(LaneFault::Refused(no_direct_path()));
                    }
                }
                PathWish::Auto if spec.file.size >= WORTH_WAITING_BYTES => {
                    let wait = || async {
                        let _either_will_do = mesh.wait_direct(source, DIRECT_HOPED_FOR).await;
                    };
                    waited.get_or_init(wait).await;
                }
                PathWish::Auto | PathWish::Relayed => {}
            }
            let opened = mesh.open(source, Request::Pull(pull), spec.path.route()).await;
            let (outcome, stream) = opened.map_err(|fault| LaneFault::Lost(fault.to_string()))?;
            agreed(outcome, stream)
        })
    }

    fn path(&self) -> PathView {
        let mesh = || self.mesh.path(self.spec.source_instance, self.spec.path.route());
        self.local().map_or_else(mesh, |local| local.path())
    }
}

/// Lanes to a source in this process.
pub struct LocalLanes {
    source: Transfers,
    receiver: Caller,
    pull: PullSpec,
}

impl LocalLanes {
    /// Lanes to what `source` offers to `receiver` by this ticket.
    pub fn new(source: Transfers, receiver: Caller, ticket: Ticket) -> Self {
        Self { source, receiver, pull: PullSpec { ticket } }
    }
}

impl Lanes for LocalLanes {
    fn open(&self) -> BoxFuture<Result<Stream, LaneFault>> {
        let (source, receiver, pull) = (self.source.clone(), self.receiver, self.pull);
        Box::pin(async move {
            let (mut stream, far) = Stream::local_pair();
            tokio::spawn(async move { source.serve_pull(receiver, pull, far).await });
            match stream.recv.read_frame::<Outcome>().await {
                Ok(Some(outcome)) => agreed(outcome, stream),
                Ok(None) => Err(LaneFault::Lost("the source ended the stream".to_owned())),
                Err(error) => Err(LaneFault::Lost(error.to_string())),
            }
        })
    }

    fn path(&self) -> PathView {
        PathView { now: Some(PathNow::Direct), ..PathView::default() }
    }
}

/// The stream, if the source agreed to serve it.
fn agreed(outcome: Outcome, stream: Stream) -> Result<Stream, LaneFault> {
    match outcome {
        Outcome::Pulling => Ok(stream),
        Outcome::Failed(failure) if failure.kind == FailureKind::Busy => Err(LaneFault::Lost(failure.what)),
        Outcome::Failed(failure) => Err(LaneFault::Refused(failure)),
        Outcome::Link(_)
        | Outcome::Done
        | Outcome::Job(_)
        | Outcome::Attached(_)
        | Outcome::Jobs(_)
        | Outcome::Offered(_)
        | Outcome::Receiving
        | Outcome::Network(_) => Err(LaneFault::Lost("the source answered something else".to_owned())),
    }
}

fn no_direct_path() -> Failure {
    let what = format!("no direct path to the source was found within {} s", DIRECT_WITHIN.as_secs());
    Failure::new(FailureKind::Unreachable, what, "`--path auto` goes by way of the relay until there is one")
}
