//! One instance in one room: who else is there, asking them, and streams to them.
//!
//! In: requests and streams that services and front doors want, and what the relay and the UDP socket bring. Out:
//! outcomes, streams, and calls of [`Serve`] for what others ask. It knows no service.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use peerfleet_proto::{
    id::{InstanceId, PeerId, RequestId},
    presence::{Mode, Presence},
    request::{Outcome, Request, link::Route, transfer::PathNow},
};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

mod congestion;
mod dial;
mod interfaces;
mod link;
mod queue;
mod routes;
mod socket;
pub mod stream;
mod tls;
mod wire;

pub use stream::Stream;

/// A future that a [`Serve`] hands back.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Who asks, as proved by the sealed session or the link's pinned key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The identity.
    pub peer: PeerId,
    /// The process.
    pub instance: InstanceId,
}

/// What answers the requests of others.
pub trait Serve: Send + Sync + 'static {
    /// Answers a request that came as a message.
    fn ask(&self, caller: Caller, id: RequestId, request: Request) -> BoxFuture<Outcome>;

    /// Answers a request that heads a stream: writes the outcome as the first frame, then goes on as the service does.
    fn stream(&self, caller: Caller, request: Request, stream: Stream) -> BoxFuture<()>;
}

/// How the connection to the relay stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum UplinkState {
    /// Not in the room; it is being tried.
    Joining,
    /// In the room, and the roster is complete.
    Joined,
}

/// One other instance in the room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerEntry {
    /// Its identity.
    pub peer: PeerId,
    /// Its process.
    pub instance: InstanceId,
    /// What it says of itself.
    pub presence: Presence,
    /// Whether the relay has it in the room now; otherwise it is only known by its link.
    pub present: bool,
}

/// Who is in the room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roster {
    /// How the connection to the relay stands.
    pub uplink: UplinkState,
    /// The other instances, by identity and process.
    pub peers: Vec<PeerEntry>,
}

/// Why asking led to no outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum AskFault {
    /// The other side never took the request.
    #[error("it cannot be reached")]
    Unreachable,
    /// The other side took the request, then went away.
    #[error("it went away while working on the request")]
    Lost,
    /// The other side took the request, but gave no outcome in time.
    #[error("it gave no answer in time")]
    DeadlineExceeded,
    /// The request is too large for a message.
    #[error("the request is too large")]
    TooLarge,
    /// The other side has too much to do.
    #[error("it is too busy")]
    Busy,
}

/// Why no stream could be opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum OpenFault {
    /// The link could not be agreed or made.
    #[error("no link to it: {0}")]
    NoLink(String),
    /// The link was lost before the outcome of the head came.
    #[error("the link was lost")]
    Lost,
}

/// How asking one of many stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AskProgress {
    /// It is on its way under this id; always comes first. A job that it starts has the same id.
    Asked(RequestId),
    /// The other side has the request.
    Accepted,
    /// It ended.
    Ended(Result<Outcome, AskFault>),
}

/// How a link's packets travel and have travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PathView {
    /// The path now, if there is a link.
    pub now: Option<PathNow>,
    /// Measured round trip of the path now.
    pub rtt: Option<Duration>,
    /// Bytes of packets sent and received directly.
    pub direct_bytes: u64,
    /// Bytes of packets sent and received by way of the relay.
    pub relayed_bytes: u64,
}

/// The mesh stopped, or was never joined in time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{0}")]
pub struct NotJoined(pub String);

/// A handle on one instance in one room; clones are the same instance.
#[derive(Clone)]
pub struct Mesh(Arc<Inner>);

struct Inner;

impl Mesh {
    /// Who this is.
    pub fn me(&self) -> Caller {
        unimplemented!()
    }

    /// Who is in the room, kept up to date.
    pub fn roster(&self) -> watch::Receiver<Arc<Roster>> {
        unimplemented!()
    }

    /// Waits until the room's roster is known.
    pub async fn joined(&self, timeout: Duration) -> Result<(), NotJoined> {
        unimplemented!()
    }

    /// Asks one instance.
    pub async fn ask(&self, to: InstanceId, request: Request, deadline: Duration) -> Result<Outcome, AskFault> {
        unimplemented!()
    }

    /// Asks many instances the same; every one of them ends exactly once.
    pub fn ask_many(
        &self,
        to: Vec<InstanceId>,
        request: Request,
        deadline: Duration,
    ) -> mpsc::Receiver<(InstanceId, AskProgress)> {
        unimplemented!()
    }

    /// Opens a stream headed by a request and reads the head's outcome.
    pub async fn open(&self, to: InstanceId, request: Request, route: Route) -> Result<(Outcome, Stream), OpenFault> {
        unimplemented!()
    }

    /// How the link of that route travels.
    pub fn path(&self, to: InstanceId, route: Route) -> PathView {
        unimplemented!()
    }

    /// Waits for a direct path of the link; makes the link if there is none.
    pub async fn wait_direct(&self, to: InstanceId, timeout: Duration) -> bool {
        unimplemented!()
    }

    /// Tells the room another mode.
    pub fn set_mode(&self, mode: Mode) {
        unimplemented!()
    }

    /// Leaves the room and ends every link.
    pub async fn shutdown(&self) {
        unimplemented!()
    }
}
