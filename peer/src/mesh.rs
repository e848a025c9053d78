//! One instance in one room: who else is there, asking them, and streams to them.
//!
//! In: requests and streams that services and front doors want, and what the relay and the UDP socket bring. Out:
//! outcomes, streams, and calls of [`Serve`] for what others ask. It knows no service.

use std::{fmt, future::Future, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use peerfleet_proto::{
    id::{InstanceId, PeerId, RequestId},
    presence::{Mode, Presence},
    request::{Outcome, Request, link::Route, transfer::PathNow},
    token::RoomKeys,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use x25519_dalek::{PublicKey, StaticSecret};

use self::{
    actor::{Actor, Command, Contact, ReportWanted},
    agreement::AGREE_DEADLINE,
    heads::{LinkHandle, Unopened},
    socket::Switch,
    views::Views,
};
use crate::random;

mod actor;
mod agreement;
mod asks;
mod carrier;
pub mod congestion;
mod dial;
mod evidence;
mod extra;
mod filtering;
mod heads;
pub mod health;
mod interfaces;
mod link;
mod mtu;
mod path;
mod port_mapping;
mod queue;
mod report;
mod roster;
mod routes;
mod sampling;
mod search;
mod socket;
pub mod stream;
mod stun_server;
mod surroundings;
mod tls;
mod udp;
mod uplink;
mod views;
mod wake;
mod wire;

pub use dial::{
    Authorities, DialConfig, InvalidAuthorities, InvalidProxy, InvalidRelayUrl, Proxy, ProxyChoice, RelayUrl,
};
pub use peerfleet_proto::exchange::AskFault;
pub use report::Report;
pub use stream::Stream;
pub use stun_server::{InvalidStunServer, StunServer};

/// Words about one instance in [`Mesh::ask_many`]: asked, accepted, ended.
const WORDS_PER_ASK: usize = 3;

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
    /// Why the room was not joined at the last try.
    pub trouble: Option<NotJoined>,
    /// The other instances, by identity and process.
    pub peers: Vec<PeerEntry>,
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
    /// How long packets have travelled this way.
    pub age: Option<Duration>,
    /// Where they go directly.
    pub address: Option<SocketAddr>,
    /// Bytes of packets sent and received directly.
    pub direct_bytes: u64,
    /// Bytes of packets sent and received by way of the relay.
    pub relayed_bytes: u64,
}

/// Packets of links that an instance dropped, by reason. QUIC sends again what they carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Drops {
    /// Batches for which the connection to the relay was too slow.
    pub to_relay: u64,
    /// Batches from the relay for which the links were too slow.
    pub from_relay: u64,
    /// Batches that were nobody's, or had no way to leave.
    pub stray: u64,
}

/// Why the room is not joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{cause}")]
pub struct NotJoined {
    /// Why.
    pub cause: String,
    /// What to do about it, where more is known than that the relay cannot be reached.
    pub hint: Option<String>,
}

impl NotJoined {
    /// A cause that says all that is known.
    pub(crate) fn because(cause: impl fmt::Display) -> Self {
        Self { cause: cause.to_string(), hint: None }
    }
}

/// What an instance is made of.
pub struct MeshConfig {
    /// Where the relay is.
    pub relay: RelayUrl,
    /// What it is dialled with.
    pub dial: DialConfig,
    /// The room's keys.
    pub keys: Arc<RoomKeys>,
    /// The machine's identity.
    pub identity: StaticSecret,
    /// What it says of itself; the epoch is put in by the instance.
    pub presence: Presence,
    /// Whether links may travel directly at all.
    pub udp: bool,
    /// What is done to find direct paths.
    pub paths: PathConfig,
}

/// What is done to find direct paths, beyond asking the relay. By default nothing: nobody is contacted whom the user did not
/// name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PathConfig {
    /// Whether the router may be asked to forward a port to this machine.
    pub port_mapping: bool,
    /// STUN servers to ask besides the relay.
    pub stun: Vec<StunServer>,
    /// Whether paths through hard NATs are searched for: that takes some 2,000 packets in a few seconds.
    pub hard_nat_search: bool,
}

/// A handle on one instance in one room; clones are the same instance. It leaves the room when the last one is dropped.
#[derive(Clone)]
pub struct Mesh(Arc<Inner>);

struct Inner {
    me: Caller,
    serve: Arc<dyn Serve>,
    commands: mpsc::Sender<Command>,
    roster: watch::Receiver<Arc<Roster>>,
    views: Arc<Views>,
    switch: Arc<Switch>,
}

impl Mesh {
    /// Starts an instance, within a tokio runtime. Never waits for the network: it connects, and connects again, for ever.
    pub fn start(config: MeshConfig, serve: Arc<dyn Serve>) -> Self {
        let peer = PeerId::from_bytes(PublicKey::from(&config.identity).to_bytes());
        let me = Caller { peer, instance: InstanceId::from_bytes(random::bytes()) };
        let (actor, contact) = Actor::new(config, me, Arc::clone(&serve));
        tokio::spawn(actor.run());
        let Contact { commands, roster, views, switch } = contact;
        Self(Arc::new(Inner { me, serve, commands, roster, views, switch }))
    }

    /// Who this is.
    pub fn me(&self) -> Caller {
        self.0.me
    }

    /// Who is in the room, kept up to date.
    pub fn roster(&self) -> watch::Receiver<Arc<Roster>> {
        self.0.roster.clone()
    }

    /// Waits until the room's roster is known.
    ///
    /// # Errors
    /// [`NotJoined`] if that takes longer than `timeout`, or the mesh has stopped.
    pub async fn joined(&self, timeout: Duration) -> Result<(), NotJoined> {
        let mut roster = self.roster();
        let joined = roster.wait_for(|roster| roster.uplink == UplinkState::Joined);
        match tokio::time::timeout(timeout, joined).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(NotJoined::because("this instance has left the room")),
            Err(_) => {
                let trouble = self.0.roster.borrow().trouble.clone();
                Err(trouble.unwrap_or_else(|| {
                    NotJoined::because(format_args!("no answer within {} s", timeout.as_secs_f32()))
                }))
            }
        }
    }

    /// Asks one instance.
    ///
    /// # Errors
    /// [`AskFault`], after `deadline` at the latest.
    pub async fn ask(&self, to: InstanceId, request: Request, deadline: Duration) -> Result<Outcome, AskFault> {
        if to == self.0.me.instance {
            let id = RequestId::from_bytes(random::bytes());
            let asked = self.0.serve.ask(self.0.me, id, request);
            return tokio::time::timeout(deadline, asked).await.map_err(|_| AskFault::DeadlineExceeded);
        }
        let (reply, outcome) = oneshot::channel();
        if !self.command(Command::Ask { to, request: Box::new(request), deadline, reply }).await {
            return Err(AskFault::Unreachable);
        }
        // This instance left the room meanwhile; whether the request had left before is not known any more.
        outcome.await.unwrap_or(Err(AskFault::Lost))
    }

    /// Asks many instances the same; every one of them ends exactly once, unless this instance leaves the room first.
    pub fn ask_many(
        &self,
        to: Vec<InstanceId>,
        request: Request,
        deadline: Duration,
    ) -> mpsc::Receiver<(InstanceId, AskProgress)> {
        let (progress, receiver) = mpsc::channel(to.len().saturating_mul(WORDS_PER_ASK).max(1));
        let mesh = self.clone();
        tokio::spawn(async move {
            mesh.command(Command::AskMany { to, request: Box::new(request), deadline, progress }).await;
        });
        receiver
    }

    /// Opens a stream headed by a request and reads the head's outcome.
    ///
    /// # Errors
    /// [`OpenFault`] if there is no link in time, or it is lost.
    pub async fn open(&self, to: InstanceId, request: Request, route: Route) -> Result<(Outcome, Stream), OpenFault> {
        if to == self.0.me.instance {
            return self.open_here(request).await;
        }
        match self.link(to, route).await?.open(request.clone()).await {
            Ok(opened) => Ok(opened),
            Err(Unopened::Fault(fault)) => Err(fault),
            Err(Unopened::Unused) => self.link(to, route).await?.open(request).await.map_err(|why| match why {
                Unopened::Fault(fault) => fault,
                Unopened::Unused => OpenFault::Lost,
            }),
        }
    }

    /// How the link of that route travels.
    pub fn path(&self, to: InstanceId, route: Route) -> PathView {
        self.0.views.path((to, route))
    }

    /// What is known of the network around, and of the link to `about`. `fresh` begins to measure anew what can be
    /// measured without a link: ask again a moment later.
    ///
    /// # Errors
    /// [`NotJoined`] if the mesh has stopped.
    pub async fn report(&self, about: Option<InstanceId>, fresh: bool) -> Result<Report, NotJoined> {
        let (reply, report) = oneshot::channel();
        self.command(Command::Report(ReportWanted { fresh, about, reply })).await;
        report.await.map_err(|_| NotJoined::because("this instance has left the room"))
    }

    /// What this instance dropped so far.
    pub fn drops(&self) -> Drops {
        self.0.switch.drops()
    }

    /// Waits for a direct path of the link; makes the link if there is none.
    pub async fn wait_direct(&self, to: InstanceId, timeout: Duration) -> bool {
        let waiting = async {
            let mut link = self.link(to, Route::Auto).await.ok()?;
            link.direct.wait_for(|direct| *direct).await.ok()?;
            Some(())
        };
        matches!(tokio::time::timeout(timeout, waiting).await, Ok(Some(())))
    }

    /// Tells the room another mode.
    pub fn set_mode(&self, mode: Mode) {
        let mesh = self.clone();
        tokio::spawn(async move {
            mesh.command(Command::SetMode(mode)).await;
        });
    }

    /// Leaves the room and ends every link.
    pub async fn shutdown(&self) {
        let (reply, left) = oneshot::channel();
        self.command(Command::Shutdown(reply)).await;
        // An error says that it had left already.
        _ = left.await;
    }

    async fn link(&self, to: InstanceId, route: Route) -> Result<LinkHandle, OpenFault> {
        let (reply, link) = oneshot::channel();
        self.command(Command::Link { to, route, reply }).await;
        match tokio::time::timeout(AGREE_DEADLINE, link).await {
            Ok(Ok(link)) => link,
            Ok(Err(_)) => Err(OpenFault::NoLink("this instance has left the room".into())),
            Err(_) => Err(OpenFault::NoLink(format!("it gave no answer within {} s", AGREE_DEADLINE.as_secs()))),
        }
    }

    async fn open_here(&self, request: Request) -> Result<(Outcome, Stream), OpenFault> {
        let (mut here, there) = Stream::local_pair();
        tokio::spawn(self.0.serve.stream(self.0.me, request, there));
        match here.recv.read_frame().await {
            Ok(Some(outcome)) => Ok((outcome, here)),
            Ok(None) | Err(_) => Err(OpenFault::Lost),
        }
    }

    /// Whether the instance is there to take it.
    async fn command(&self, command: Command) -> bool {
        let is_taken = self.0.commands.send(command).await.is_ok();
        if !is_taken {
            tracing::trace!("this instance has left the room");
        }
        is_taken
    }
}
